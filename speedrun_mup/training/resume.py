"""What a run takes from a checkpoint: everything, to resume, or the weights only, to begin another run with them."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from speedrun_mup.config import TrainConfig
from speedrun_mup.core.distributed import World
from speedrun_mup.core.model import GPT
from speedrun_mup.core.optimizers import ShardedOptimizer
from speedrun_mup.data.shards import Corpus
from speedrun_mup.files import printable
from speedrun_mup.training.checkpoint import CheckpointError, Checkpoints, DamagedCheckpoint, Loaded, check_match
from speedrun_mup.training.model_config import model_config
from speedrun_mup.training.run_folder import check_resumable, checked_state, is_longer, told_of_extension
from speedrun_mup.training.tracking import lives, source_sha256

# What earlier checkpoints lack. Those before schedules counted skipped data in steps, as data_offset.
DEFAULTS_FOR_OLD_CHECKPOINTS: dict[str, Any] = {"data_offset": 0, "skipped_micro_batches": 0, "losses": []}


def restore(
    loaded: Loaded, cfg: TrainConfig, corpus: Corpus, model: GPT, optimizers: Sequence[ShardedOptimizer]
) -> tuple[dict[str, Any], list[str]]:
    """Give model and optimizers what a checkpoint of this run holds. Nothing changes if it does not fit.

    Args:
        loaded: the checkpoint.
        cfg: the settings of the run that resumes.
        corpus: its data.
        model: with --dtype auto, its type may be another one on this device.
        optimizers: on any number of ranks.

    Returns:
        The state: step, train_s, skipped_micro_batches, val_loss, losses; and lines about what changes with it.

    Raises:
        CheckpointError: if it belongs to another run.
    """
    state = checked_state(DEFAULTS_FOR_OLD_CHECKPOINTS | loaded.state, loaded.path)
    check_resumable(cfg, corpus, state, loaded.path)
    own, notes, weights = model.state_dict(), list[str](), loaded.model
    if cfg.dtype == "auto" and (types := _other_type(weights, own)):
        notes.append(f"--dtype auto: this device takes {types}, so from here on numbers are rounded otherwise")
        weights = {name: tensor.to(own[name].dtype) if name in own else tensor for name, tensor in weights.items()}
    check_match(weights, own)
    if strangers := {type(optimizer).__name__ for optimizer in optimizers} ^ set(state["optimizer_steps"]):
        raise DamagedCheckpoint(
            f"{printable(loaded.path)}: its state has no right steps of {printable(min(strangers))}; remove it, or "
            "restore it from a copy"
        )
    state["skipped_micro_batches"] += state["data_offset"] * cfg.micro_batches
    model.load_state_dict(weights)
    for optimizer in optimizers:
        optimizer.load_slices(loaded.slice, state["optimizer_steps"][type(optimizer).__name__])
    before = state["config"]["iterations"]
    if is_longer(before, cfg.iterations):
        notes = [*notes, told_of_extension(before, cfg, state["step"])]
    return state, notes


def take_weights(source: Path, model: GPT, cfg: TrainConfig, corpus: Corpus, world: World) -> tuple[Path, list[str]]:
    """Begin with the weights in `source`, the folder of a run or of a checkpoint.

    Args:
        source: what --init-from names.
        model: gets the weights.
        cfg: its settings.
        corpus: its data.
        world: all its ranks call this.

    Returns:
        The checkpoint that they came from, and lines about it.

    Raises:
        CheckpointError: on all ranks, if there is none or it does not fit.
    """
    notes: list[str] = []
    path = source
    if not re.fullmatch(r"step-\d+", source.name):
        root = Checkpoints(source / "checkpoints", world)
        found = root.newest(notes.append)
        root.close()
        if found is None:
            raise CheckpointError(f"--init-from {source}: no checkpoint there; give a run's folder or a step-N in it")
        path = found
    world.on_all(lambda: _load_weights(Loaded(path), model, cfg, corpus))
    return path, [*notes, f"starting at step 0 with the weights of {path}"]


def _load_weights(loaded: Loaded, model: GPT, cfg: TrainConfig, corpus: Corpus) -> None:
    """Take the weights. CheckpointError if they are another model's, or mean another function here."""
    own, path = model.state_dict(), loaded.path
    shapes = {name: (tuple(loaded.model[name].shape) if name in loaded.model else None) for name in own}
    differ = [name for name, tensor in own.items() if shapes[name] != tuple(tensor.shape)]
    differ += [name for name in loaded.model if name not in own]
    if differ:
        first = differ[0]
        raise CheckpointError(
            f"--init-from {path}: another model, {len(differ)} of its parameters do not fit; {first} is "
            f"{shapes.get(first) or 'missing or unexpected'}, not {tuple(own[first].shape) if first in own else 'known'};"
            " give the same --width, --n-layer and tokens"
        )
    theirs = loaded.cfg
    with torch.device("meta"):
        scale = GPT(model_config(theirs, corpus, "dense", torch.float32)).logit_scale
    if theirs.head_dim != cfg.head_dim or not math.isclose(scale, model.logit_scale):
        raise CheckpointError(
            f"--init-from {path}: the same weights give other predictions with these settings; keep its --parametrization "
            f"{theirs.parametrization} --base-width {theirs.tuned_width} --head-dim {theirs.head_dim}"
        )
    model.load_state_dict({name: tensor.to(own[name].dtype) for name, tensor in loaded.model.items()})


def _other_type(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> str:
    """Which type a tensor has instead of which, if one of them has another; else nothing."""
    for name in found.keys() & expected.keys():
        now, before = (str(tensors[name].dtype).removeprefix("torch.") for tensors in (expected, found))
        if now != before:
            return f"{now} instead of {before}"
    return ""


def told_of_other_code(folder: Path) -> list[str]:
    """A line if the last life of the run in `folder` had other code than this one."""
    before, now = next((life.get("source_sha256") for life in lives(folder)[-1:]), None), source_sha256()
    if before in (None, now):
        return []
    return [
        f"the code changed since this run's last attempt: its hash was {printable(before)[:12]}, is {now[:12]}; continuing"
    ]
