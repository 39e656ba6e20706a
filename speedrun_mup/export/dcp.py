"""A folder of torch.distributed.checkpoint, which torchtitan and others read."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch import Tensor

from speedrun_mup.core.errors import in_a_line
from speedrun_mup.files import printable
from speedrun_mup.training.checkpoint import Loaded
from speedrun_mup.training.manifest import CheckpointError


def export_dcp(path: Path, out_dir: Path) -> None:
    """Write the model of checkpoint `path` to a new folder as "model.<name>", for torch.distributed.checkpoint."""
    import torch.distributed.checkpoint as dcp  # takes seconds to import

    if os.path.lexists(out_dir):
        raise CheckpointError(f"{printable(out_dir)} exists, and DCP would overwrite it in place; name a new folder")
    content = {"model": Loaded(path).model}
    try:
        dcp.save(content, checkpoint_id=out_dir, no_dist=True)
    except Exception as fault:  # of torch, which wraps those of the disk in several ways
        why = printable(in_a_line(fault.__cause__ or fault))
        raise CheckpointError(f"{printable(out_dir)} is not whole: {why}; remove it, and make room") from fault


def import_dcp(folder: Path, trusted: bool = False) -> dict[str, Tensor]:
    """The "model.<name>" tensors of a DCP folder. Its metadata is a pickle: reading it can run code."""
    if not trusted:
        raise CheckpointError(
            f"reading {folder} can execute code hidden in it; pass trusted=True if you know who wrote it"
        )
    import torch.distributed.checkpoint as dcp  # takes seconds to import

    try:
        entries = dcp.FileSystemReader(folder).read_metadata().state_dict_metadata
        tensors = {
            name: torch.empty(entry.size, dtype=entry.properties.dtype)
            for name, entry in entries.items()
            if name.startswith("model.") and isinstance(entry, dcp.metadata.TensorStorageMetadata)
        }
        dcp.load(tensors, checkpoint_id=folder, no_dist=True)
        return {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
    except Exception as fault:  # of a damaged folder, anything
        why = printable(in_a_line(fault.__cause__ or fault))
        raise CheckpointError(f"{printable(folder)} is not a folder of torch.distributed.checkpoint: {why}") from fault
