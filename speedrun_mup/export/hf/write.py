"""The folder itself: code, settings, weights, tokenizer and a model card."""

from __future__ import annotations

import importlib.resources
import json
import os
from pathlib import Path

import torch

from speedrun_mup.export import ROOM, Request
from speedrun_mup.export.hf.model_card import model_card
from speedrun_mup.export.hf.model_files import CODE, generation_settings, model_settings, weights_of, write_weights
from speedrun_mup.export.hf.tokenizer_files import tokenizer_files
from speedrun_mup.files import printable, whole_folder
from speedrun_mup.training.checkpoint_manifest import CheckpointError, os_faults
from speedrun_mup.training.load import LoadedRun, load_run
from speedrun_mup.training.safetensors_writer import write_file


def write_hf(request: Request) -> str:
    """The run that is asked for as a folder that AutoModelForCausalLM and AutoTokenizer load."""
    run = load_run(request.folder, request.step, "cpu", request.data, torch.float32)
    export_hf(run, request.out, request.fold)
    shown = printable(request.out)
    return (
        f"step {run.step} of {printable(run.folder)} is written to {shown}\n"
        f"load it with AutoModelForCausalLM.from_pretrained({str(shown)!r}, trust_remote_code=True); "
        f"{shown}/README.md says more"
    )


def export_hf(run: LoadedRun, out: Path, fold: bool = True) -> None:
    """Write `run` to the new folder `out`, whole or not at all.

    Args:
        run: in float32, on the CPU.
        out: the folder.
        fold: put the scale of the logits, and muP's multiplier with it, into the head's weights; else config.json has it.

    Raises:
        ConfigError: its tokens stand for no text, or it has a technique that the exported code has not.
        CheckpointError: the folder exists, or cannot be written.
    """
    if os.path.lexists(out):
        raise CheckpointError(f"{printable(out)} exists; name a new folder, or remove it")
    settings = model_settings(run, fold)
    texts = {name: _json(content) for name, content in tokenizer_files(run.tokenizer).items()}
    bos = json.loads(texts["tokenizer_config.json"])["bos_token"]
    texts |= {
        "config.json": _json(settings),
        "generation_config.json": _json(generation_settings(run.model.cfg)),
        "README.md": model_card(run, out.resolve().name, settings, bos),
    }
    own = importlib.resources.files(__package__)
    texts |= {f"{name}.py": (own / f"{name}.py").read_text(encoding="utf-8") for name in CODE}
    with os_faults(out, CheckpointError, ROOM), whole_folder(out) as folder:
        for name, text in texts.items():
            write_file(folder / name, text.encode())
        write_weights(folder, weights_of(run, fold))


def _json(content: object) -> str:
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"
