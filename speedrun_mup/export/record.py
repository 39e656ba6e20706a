"""The .pt file that modded-nanogpt itself saves: {"step": ..., "model": state_dict}; ours also has the run's settings."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import math
import re
import zipfile
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from torch import Tensor

from speedrun_mup.config import TrainConfig
from speedrun_mup.core.errors import UserError, in_a_line
from speedrun_mup.core.model import declarations
from speedrun_mup.core.model.loss import RECORD26, SOFTCAP_SLOPE
from speedrun_mup.core.model.record import strip_compiled, to_record, unpack_scalars
from speedrun_mup.data.manifest import open_corpus
from speedrun_mup.data.shards import TOKENIZER_FILE
from speedrun_mup.export import ROOM, Request, step_of
from speedrun_mup.files import open_regular, printable, whole_file
from speedrun_mup.training.checkpoint import Loaded
from speedrun_mup.training.checkpoint_manifest import CheckpointError, DamagedCheckpoint, os_faults
from speedrun_mup.training.load import VOCABULARY, check_weights, find_checkpoint
from speedrun_mup.training.model_config import Vocabulary, model_config
from speedrun_mup.training.run_folder import saved_config

RANKS = 8  # of the record, which pads its scalars to a multiple of them
_PARTS = r"attn\.qkv_w|attn\.c_proj\.weight|mlp\.c_fc\.weight|mlp\.c_proj\.weight"
NAMES = re.compile(rf"scalars|(embed|lm_head|value_embeds\.\d+)\.weight|blocks\.\d+\.({_PARTS})")  # the record's
UNUSED = "record_scalars"  # in the state of an imported checkpoint: the file's scalars, also those that no layer uses


def export_pt(path: Path, out: Path, fold: bool = True, tokenizer: str = "") -> list[str]:
    """Write the model of checkpoint `path` to the file `out`, as the speedrun itself saves it and loads it.

    Names, the flat scalars and the type of embeddings are the record's.

    Args:
        path: the checkpoint.
        out: a file, which is replaced.
        fold: put muP's divisor of the logits, which the record's program does not know, into the head.
        tokenizer: its name, unless it can be told by the number of tokens; written for `import` to ask for it.

    Returns:
        Lines about what is not as in the checkpoint.
    """
    loaded = Loaded(path)
    check_weights(loaded)
    model, cfg, notes = loaded.model, None, list[str]()
    if "config" in loaded.state:
        cfg = loaded.cfg
        if fold and (factor := _head_factor(cfg, model)) != 1:
            model = model | {"lm_head.weight": (model["lm_head.weight"].double() * factor).float()}
            cfg = dataclasses.replace(cfg, parametrization="record26", base_width=None)
            notes.append(f"the head is multiplied by {factor:.6g}, muP's factor on its logits")
    if cfg and declarations(model_config(cfg, Vocabulary(len(model["embed.weight"])))).lm_head.cap != RECORD26:
        notes.append("its soft cap is not that of record 26, whose own program computes other logits from this file")
    saved = _as_the_record(model, loaded.state.get(UNUSED), path)
    if any(saved[name].dtype != tensor.dtype for name, tensor in model.items() if name in saved):
        notes.append("embeddings are rounded to bfloat16, the type that they have in the record")
    if foreign := [name for name in saved if not NAMES.fullmatch(name)]:
        notes.append(f"{min(foreign)} is not in record 26, whose own program refuses this file")
    content = {"step": loaded.step, "model": saved} | ({"settings": dataclasses.asdict(cfg)} if cfg else {})
    content |= {"tokenizer": tokenizer} if tokenizer else {}
    buffer = io.BytesIO()
    torch.save(content, buffer)
    with os_faults(out, CheckpointError, ROOM):
        out.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(out) as file:
            file.write(buffer.getbuffer())
    return notes


def _head_factor(cfg: TrainConfig, model: dict[str, Tensor]) -> float:
    """What the head has to be multiplied by for the record's program, which divides its output by 7.5 sqrt(width)."""
    rows = len(model["embed.weight"])
    factor = declarations(model_config(cfg, Vocabulary(rows))).logit_scale * SOFTCAP_SLOPE * math.sqrt(cfg.width)
    return 1.0 if math.isclose(factor, 1, rel_tol=1e-9) else factor


def _as_the_record(model: dict[str, Tensor], scalars: Any, path: Path) -> dict[str, Tensor]:
    """`model` with the record's flat scalars, `scalars` where no layer uses them, and embeddings in bfloat16."""
    layers = len(model.get("blocks.x0_lambdas", ()))
    try:
        unused = torch.ones(-(-5 * layers // RANKS) * RANKS) if scalars is None else torch.tensor(scalars).float()
        unpack_scalars(unused, layers)
    except (ValueError, TypeError, RuntimeError, OverflowError) as fault:
        raise DamagedCheckpoint(f"{printable(path)}: its {UNUSED} are not a vector: {in_a_line(fault)}") from None
    embeddings = re.compile(r"embed\.weight|value_embeds\.\d+\.weight")
    return {
        name: tensor.bfloat16() if embeddings.fullmatch(name) else tensor
        for name, tensor in to_record(model, unused).items()
    }


def write_pt(request: Request) -> str:
    """The checkpoint that is asked for as a .pt file."""
    folder, path = find_checkpoint(request.folder, request.step)
    tokenizer, place = _tokens_of(folder, path)
    notes = export_pt(path, request.out, request.fold, tokenizer)
    written = f"{step_of(folder, path)} is written to {printable(request.out)}"
    back = f"back into a run: speedrun-mup import {printable(request.out)} --out runs/NAME"
    back += f" --tokenizer {printable(place)}" if tokenizer else ""
    return "\n".join([written, *notes, back])


def _tokens_of(folder: Path, path: Path) -> tuple[str, Path]:
    """The name of a run's tokenizer, and where it is; no name for bytes and for GPT-2's, and where the data are gone."""
    name, place = "", Path(saved_config(folder).data)
    if vocabulary := Loaded(path).state.get(VOCABULARY):  # of an imported run
        name, place = str(vocabulary["tokenizer"]), folder / TOKENIZER_FILE
    elif place.is_dir():
        with contextlib.suppress(UserError):
            name = open_corpus(place).tokenizer
    return "" if name in ("byte", "gpt2") else name, place


class RecordFile(NamedTuple):
    """What a .pt file holds; step, settings and the tokenizer's name are whatever it says, or None."""

    model: dict[str, Tensor]
    step: Any
    settings: Any
    tokenizer: Any


def read_pt(path: Path) -> RecordFile:
    """The state dict under "model" in a .pt file, without torch.compile's "_orig_mod." prefix, and what is said of it.

    Executes no code, and takes no more memory than the file and the largest of its storages. CheckpointError if there is none.
    """
    try:
        with open_regular(path) as file:
            size = file.seek(0, io.SEEK_END)
            _check_not_packed(file, size)
            content = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as fault:  # a bad file can make the parser raise anything
        why = printable(in_a_line(fault))
        raise CheckpointError(f"{printable(path)} is not a .pt file of plain tensors: {why}") from fault
    model = content.get("model") if isinstance(content, dict) else None
    if not isinstance(model, dict) or not all(isinstance(v, Tensor) and isinstance(k, str) for k, v in model.items()):
        raise CheckpointError(
            f'{printable(path)} has no state dict under "model"; save {{"model": model.state_dict()}}'
        )
    if sum(tensor.numel() * tensor.element_size() for tensor in model.values()) > size:
        raise CheckpointError(f"{printable(path)} has tensors that are larger than the file: views; save whole tensors")
    named = strip_compiled(model)
    if len(named) < len(model):
        raise CheckpointError(f"{printable(path)} has a tensor twice, with and without _orig_mod.; save one of them")
    return RecordFile(named, content.get("step"), content.get("settings"), content.get("tokenizer"))


def import_pt(path: Path) -> dict[str, Tensor]:
    """The model in a .pt file; see `read_pt`."""
    return read_pt(path).model


def _check_not_packed(file: BinaryIO, size: int) -> None:
    """ValueError for a zip file whose content is larger than it. torch.save compresses nothing."""
    file.seek(0)
    if zipfile.is_zipfile(file) and sum(entry.file_size for entry in zipfile.ZipFile(file).infolist()) > size:
        raise ValueError("it is compressed, and torch.save compresses nothing")
    file.seek(0)
