"""A run's folder from a .pt file, so that a model from elsewhere can be sampled, evaluated, exported and trained further."""

# L layers, D width, V rows of an embedding

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from speedrun_mup.config import TrainConfig, build, make_config, settings
from speedrun_mup.config_file import from_json
from speedrun_mup.core.distributed import World
from speedrun_mup.core.errors import ConfigError
from speedrun_mup.core.model import declarations
from speedrun_mup.core.model.record import SCALARS, to_record, unpack_scalars
from speedrun_mup.core.model.shape import VOCAB_MULTIPLE
from speedrun_mup.data.manifest import GPT2_BOS, GPT2_VOCAB
from speedrun_mup.data.shards import TOKENIZER_FILE, file_sha256
from speedrun_mup.data.tokenizers import ByteTokenizer, Tokenizer, find_tokenizer
from speedrun_mup.export.record import UNUSED, RecordFile, read_pt
from speedrun_mup.files import printable
from speedrun_mup.flags import LARGEST
from speedrun_mup.settings import flag_of
from speedrun_mup.training.checkpoint import CheckpointError, Checkpoints
from speedrun_mup.training.load import VOCABULARY
from speedrun_mup.training.model_config import Vocabulary, model_config
from speedrun_mup.training.run_folder import RunFolder

TYPES = (torch.float32, torch.bfloat16, torch.float16)
SHOWN = 3  # names in a message
MOST_SETTINGS = 1000
SIZES = ("width", "n_layer")  # that the tensors have
KNOWN = {
    "gpt2": Vocabulary(GPT2_VOCAB, GPT2_BOS),
    "byte": Vocabulary(ByteTokenizer.vocab_size, ByteTokenizer.bos_token),
}


def import_run(
    file: Path, out: Path, asked: Mapping[str, Any] | None = None, tokenizer: str | None = None, bos: str | None = None
) -> Path:
    """Make a run's folder of the model in a .pt file of modded-nanogpt's, or one that `export --to pt` wrote.

    Args:
        file: its weights are checked against the record's names and shapes, and taken bit for bit.
        out: the folder, a new one.
        asked: settings of the model that its tensors do not show; default: those in the file, else record 26's.
        tokenizer: gpt2, byte, a tokenizer.json or a prepared corpus; default: gpt2 or byte, by the size of the vocabulary.
        bos: the token that opens a document, where a tokenizer.json does not say it.

    Returns:
        `out`.

    Raises:
        ConfigError: `out` exists, or these settings are no model.
        CheckpointError: the file is damaged, or holds another model.
    """
    if os.path.lexists(out):
        raise ConfigError(f"{printable(out)} exists; name a new folder, or remove it")
    found = read_pt(file)
    rows, sizes = _sizes(found.model, file)
    tokens = _tokens(rows, tokenizer, bos, file, found.tokenizer)
    cfg, step = _settings(found, sizes, dict(asked or {}), out, file)
    _check(found.model, cfg, tokens.vocabulary, file)
    try:
        run_folder = RunFolder(cfg, World())
    except BaseException:
        with contextlib.suppress(OSError):
            out.rmdir()  # empty, or not ours
        raise
    try:
        _fill(run_folder, cfg, step, found.model, tokens)
        run_folder.log.say(
            f"{printable(out)}: step {step:,} of {cfg.iterations:,}, width {cfg.width}, {cfg.n_layer} layers, heads of "
            f"{cfg.head_dim}, {tokens.name} tokens, from {printable(file)}"
        )
        run_folder.write_status("finished")
        run_folder.close()
    except BaseException:
        if run_folder.lock:
            run_folder.lock.close()
        shutil.rmtree(run_folder.path, ignore_errors=True)  # there was nothing in its place
        raise
    return out


class Tokens(NamedTuple):
    """What a model's ids are: the tokenizer's name, its sizes, and itself unless its name is enough."""

    name: str
    vocabulary: Vocabulary
    tokenizer: Tokenizer | None


def _fill(run_folder: RunFolder, cfg: TrainConfig, step: int, model: Mapping[str, Tensor], tokens: Tokens) -> None:
    """Write the one checkpoint, then what makes a folder a run."""
    path = run_folder.path / TOKENIZER_FILE
    if tokens.tokenizer:
        tokens.tokenizer.save(run_folder.path)
    told = {"tokenizer": tokens.name, "tokenizer_sha256": file_sha256(path) if path.exists() else ""}
    scalars = model[SCALARS].detach()
    weights = {name: tensor.detach().contiguous() for name, tensor in model.items() if name != SCALARS}
    state = {
        "step": step,
        "train_s": 0.0,
        "skipped_micro_batches": 0,
        "val_loss": None,
        "losses": [],
        "optimizer_steps": {},
        "corpus": "",
        "config": dataclasses.asdict(cfg),
        VOCABULARY: told | tokens.vocabulary._asdict(),
        UNUSED: scalars.tolist(),
    }
    checkpoints = Checkpoints(run_folder.path / "checkpoints", World())
    checkpoints.save(step, weights | unpack_scalars(scalars, cfg.n_layer), {}, state)
    checkpoints.close()
    run_folder.open_log(cfg, 0)


def _sizes(model: Mapping[str, Tensor], file: Path) -> tuple[int, dict[str, int]]:
    """Rows of the embedding, and the settings that the tensors show."""
    embedding = model.get("embed.weight")
    layers = [int(found[1]) for name in model if (found := re.match(r"blocks\.(\d{1,4})\.", name))]
    if embedding is None or embedding.ndim != 2 or not layers:
        raise CheckpointError(
            f"{printable(file)} is no model of modded-nanogpt's record 26: it has no embed.weight (V, D), or no blocks.N.*"
        )
    return len(embedding), dict(zip(SIZES, (embedding.size(1), max(layers) + 1), strict=True))


def _tokens(rows: int, asked: str | None, bos: str | None, file: Path, told: Any) -> Tokens:
    """The tokenizer that is asked for, or the one that has so many rows, unless the file says that its own is another."""
    if asked is None and told is None:
        asked = next((name for name, known in KNOWN.items() if _padded(known.vocab_size) == rows), None)
    if asked is None:
        kind = "" if told is None else f"{printable(told, 40)} "
        raise ConfigError(
            f"{printable(file)} has {rows:,} rows of {kind}tokens; give the --tokenizer that they belong to, such as the corpus "
            "that it was trained on"
        )
    if bos is None and asked in KNOWN:
        found = Tokens(asked, KNOWN[asked], None)
    else:
        tokenizer = find_tokenizer(asked, bos)
        kept = None if tokenizer.name in KNOWN else tokenizer
        found = Tokens(tokenizer.name, Vocabulary(tokenizer.vocab_size, tokenizer.bos_token), kept)
    if _padded(found.vocabulary.vocab_size) != rows:
        raise ConfigError(
            f"{printable(file)} has {rows:,} rows of tokens, and tokenizer {printable(asked)} has "
            f"{found.vocabulary.vocab_size:,}, padded {_padded(found.vocabulary.vocab_size):,}; give another --tokenizer"
        )
    return found


def _padded(vocab_size: int) -> int:
    return -(-vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE


def _settings(
    found: RecordFile, sizes: dict[str, int], asked: dict[str, Any], out: Path, file: Path
) -> tuple[TrainConfig, int]:
    """The settings of a run that could have come to this model, and the step that it is at."""
    values = sizes | asked | {"out": str(out.parent), "name": out.name, "progress": False}
    kept: dict[str, Any] = {}
    if found.settings is not None:
        plain = isinstance(found.settings, dict) and len(found.settings) <= MOST_SETTINGS
        if not plain or not all(
            isinstance(name, str) and isinstance(value, str | int | float | None)
            for name, value in found.settings.items()
        ):  # a list that holds itself twice doubles at each level
            raise CheckpointError(f"{printable(file)}: its settings are none; remove them from the file")
        try:
            told = from_json(json.dumps(found.settings), file)
        except (TypeError, ValueError, RecursionError):
            raise CheckpointError(f"{printable(file)}: its settings are none; remove them from the file") from None
        kept = {
            name: getattr(told, name) for name, meta in settings().items() if meta.is_result and name != "init_from"
        }
    step = found.step
    if step is not None and (type(step) is not int or not 0 <= step <= LARGEST):
        shown = f"{step:.6g}" if type(step) is float else f"of type {type(step).__name__}"
        shown = "negative or too large" if type(step) is int else shown
        raise CheckpointError(f"{printable(file)}: its step is {shown}, not a count up to {LARGEST:,}; repair the file")
    if step is not None and "iterations" not in kept | values:
        values["iterations"] = max(step, TrainConfig.iterations)
    if values["width"] % (kept | values).get("head_dim", TrainConfig.head_dim):
        raise ConfigError(f"{printable(file)} has width {values['width']}; give the --head-dim of its attention heads")
    cfg = build(kept | values) if kept else make_config("record26", values)
    if step is not None and step > cfg.iterations:
        raise ConfigError(
            f"{printable(file)} is of step {step}, after {flag_of('iterations')} {cfg.iterations}; give more"
        )
    return cfg, cfg.iterations if step is None else step


def _check(model: Mapping[str, Tensor], cfg: TrainConfig, vocabulary: Vocabulary, file: Path) -> None:
    """CheckpointError unless these are all tensors of the model, in their shapes, of finite numbers."""
    expected = to_record(declarations(model_config(cfg, vocabulary)).state_dict())
    if wrong := [name for name in expected if name not in model]:
        raise _other(file, f"lacks {_named(wrong)}")
    if wrong := [name for name in model if name not in expected]:
        raise _other(file, f"has {_named(wrong)}, which is unknown")
    for name, tensor in model.items():
        wanted, shape = tuple(expected[name].shape), tuple(tensor.shape)
        fits = len(shape) == 1 and wanted[0] <= shape[0] < wanted[0] + 64 if name == SCALARS else shape == wanted
        if not fits:
            raise _other(file, f"has {name} of shape {shape}, not {wanted}")
        if tensor.dtype not in TYPES or tensor.layout != torch.strided or tensor.device.type != "cpu":
            raise _other(file, f"has {name} as {tensor.dtype}, {tensor.layout}, not as dense numbers of 16 or 32 bits")
        if not tensor.isfinite().all():
            raise CheckpointError(
                f"{printable(file)}: {name} has numbers that are not finite; take an earlier checkpoint"
            )


def _other(file: Path, what: str) -> CheckpointError:
    return CheckpointError(f"{printable(file)} is another model than record 26: it {what}")


def _named(names: list[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(printable(name, 60) for name in names[:SHOWN]) + more
