"""A folder of torch.distributed.checkpoint, which torchtitan and others read."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from speedrun_mup.core.errors import in_a_line
from speedrun_mup.export import ROOM, Request, step_of
from speedrun_mup.files import printable, whole_folder
from speedrun_mup.training.checkpoint import Loaded
from speedrun_mup.training.checkpoint_manifest import CheckpointError, os_faults
from speedrun_mup.training.load import check_weights, find_checkpoint


@contextmanager
def _quiet() -> Iterator[None]:
    """Without warnings that there is only one process, and of what DCP itself deprecates."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def export_dcp(path: Path, out_dir: Path) -> None:
    """Write the model of checkpoint `path` to a new folder as "model.<name>", for torch.distributed.checkpoint."""
    import torch.distributed.checkpoint as dcp  # takes seconds to import

    if os.path.lexists(out_dir):
        raise CheckpointError(f"{printable(out_dir)} exists, and DCP would overwrite it in place; name a new folder")
    loaded = Loaded(path)
    check_weights(loaded)
    with os_faults(out_dir, CheckpointError, ROOM), whole_folder(out_dir) as folder:
        try:
            with _quiet():
                dcp.save({"model": loaded.model}, checkpoint_id=folder, no_dist=True)
        except (Exception, dcp.CheckpointException) as fault:  # the latter is no Exception
            raise CheckpointError(f"{printable(out_dir)} cannot be written: {_why(fault)}; {ROOM}") from fault


def write_dcp(request: Request) -> str:
    """The checkpoint that is asked for as a folder; its weights stay as they are."""
    folder, path = find_checkpoint(request.folder, request.step)
    export_dcp(path, request.out)
    return f'{step_of(folder, path)} is written to {printable(request.out)}, with "model." before each name'


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
        with _quiet():
            dcp.load(tensors, checkpoint_id=folder, no_dist=True)
        return {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
    except (Exception, dcp.CheckpointException) as fault:  # of a damaged folder, anything
        raise CheckpointError(
            f"{printable(folder)} is not a folder of torch.distributed.checkpoint: {_why(fault)}"
        ) from fault


def _why(fault: BaseException) -> str:
    """What went wrong, of torch, which wraps the faults of the disk in several ways."""
    for inner, _ in getattr(fault, "failures", {}).values():
        fault = inner
    return printable(in_a_line(fault.__cause__ or fault))
