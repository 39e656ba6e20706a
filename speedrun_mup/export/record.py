"""The .pt file that modded-nanogpt itself saves: {"model": state_dict}."""

from __future__ import annotations

import io
from pathlib import Path

import torch
from torch import Tensor

from speedrun_mup.core.errors import in_a_line
from speedrun_mup.core.model.record import to_record
from speedrun_mup.export import Request
from speedrun_mup.files import open_regular, printable, whole_file
from speedrun_mup.training.checkpoint import Loaded
from speedrun_mup.training.load import find_checkpoint
from speedrun_mup.training.manifest import CheckpointError, os_faults


def export_pt(path: Path, out: Path) -> None:
    """Write the model of checkpoint `path` as {"model": state_dict} to the file `out`, as the speedrun itself saves."""
    buffer = io.BytesIO()
    torch.save({"model": to_record(Loaded(path).model)}, buffer)
    with os_faults(out, CheckpointError), whole_file(out) as file:
        file.write(buffer.getvalue())


def write_pt(request: Request) -> str:
    """The checkpoint that is asked for as a .pt file; its weights stay as they are."""
    _, path = find_checkpoint(request.folder, request.step)
    export_pt(path, request.out)
    return f"{printable(path)} is written to {printable(request.out)}"


def import_pt(path: Path) -> dict[str, Tensor]:
    """The state dict under "model" in a .pt file, without torch.compile's "_orig_mod." prefix. Executes no code."""
    try:
        with open_regular(path) as file:
            content = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as fault:  # a bad file can make the parser raise anything
        why = printable(in_a_line(fault))
        raise CheckpointError(f"{printable(path)} is not a .pt file of plain tensors: {why}") from fault
    model = content.get("model") if isinstance(content, dict) else None
    if not isinstance(model, dict) or not all(isinstance(v, Tensor) and isinstance(k, str) for k, v in model.items()):
        raise CheckpointError(f'{path} has no state dict under "model"; save {{"model": model.state_dict()}}')
    return {name.removeprefix("_orig_mod."): tensor for name, tensor in model.items()}
