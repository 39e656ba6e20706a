"""What a run takes from a checkpoint: everything, to resume, or the weights only, to begin another run with them.

What a resume may change is said where a setting is declared (`affects` and `on_resume`); `check_resumable` holds it to that.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from speedrun_mup.config import TrainConfig, known_settings, settings
from speedrun_mup.core.distributed import World
from speedrun_mup.core.model import GPT
from speedrun_mup.core.model.loss import RECORD26
from speedrun_mup.core.optimizers import ShardedOptimizer
from speedrun_mup.data.shards import Corpus
from speedrun_mup.files import printable
from speedrun_mup.settings import flag_of
from speedrun_mup.training.checkpoint import CheckpointError, Checkpoints, DamagedCheckpoint, Loaded, check_match
from speedrun_mup.training.model_config import model_config
from speedrun_mup.training.tracking import attempts, source_sha256

# What earlier checkpoints lack. Those before schedules counted skipped data in steps, as data_offset.
DEFAULTS_FOR_OLD_CHECKPOINTS: dict[str, Any] = {"data_offset": 0, "skipped_micro_batches": 0, "losses": []}


_STATE: dict[str, Any] = {  # what a checkpoint says about its run
    "step": int,
    "train_s": int | float,
    "data_offset": int,
    "skipped_micro_batches": int,
    "val_loss": int | float | None,
    "losses": list,
    "optimizer_steps": dict,
    "corpus": str,
    "config": dict,
}


def checked_state(state: dict[str, Any], path: Path) -> dict[str, Any]:
    """The state in the checkpoint `path`, which may be anybody's. DamagedCheckpoint unless a run could have written it."""
    lists = {name: state.get(name) for name in ("losses", "optimizer_steps")}
    steps = lists["optimizer_steps"]
    counts = [state.get(name) for name in ("step", "data_offset", "skipped_micro_batches")]
    counts += [*(steps.values() if isinstance(steps, dict) else ())]
    wrong = [name for name, kind in _STATE.items() if not isinstance(state.get(name, ()), kind)]
    wrong += ["a count"] * any(type(count) is not int or not 0 <= count < 2**53 for count in counts)
    if not wrong:
        numbers = [*state["losses"], state["train_s"], state["val_loss"] or 0.0]
        wrong = ["a number"] * any(type(number) not in (int, float) or not abs(number) < 1e300 for number in numbers)
        wrong += ["iterations"] * (type(state["config"].get("iterations")) is not int)
    if wrong:
        raise DamagedCheckpoint(
            f"{printable(path)}: its state has no right {wrong[0]}; remove it, or restore it from a copy"
        )
    return state


def check_resumable(cfg: TrainConfig, corpus: Corpus, state: dict[str, Any], path: Path) -> None:
    """Raise CheckpointError listing every setting that differs from those that `path` was made with.

    A run may get longer; `describe_extension` says what that means.
    """
    if not state["corpus"]:
        raise CheckpointError(
            f"{path} was imported, without what its optimizers held; begin a run with --init-from {path}"
        )
    now, before = vars(cfg), known_settings(state["config"])
    fixed = [key for key, meta in settings().items() if meta.must_match and before[key] != now[key]]
    if longer := is_longer(before["iterations"], cfg.iterations):
        fixed.remove("iterations")
    differ = [f"{key} was {printable(before[key])}, is {now[key]}" for key in fixed]
    if not corpus.is_known_as(state["corpus"]):
        differ.append("the corpus is not the same")
    if longer and not fixed:
        shorter = dataclasses.replace(cfg, iterations=before["iterations"]).schedule
        if not cfg.schedule.agrees(shorter, state.get("step", 0)):
            differ.append(
                f"iterations was {before['iterations']}, is {cfg.iterations}, which moves stages that it went through"
            )
    if differ:
        raise CheckpointError(f"{path} belongs to another run: {'; '.join(differ)}; resume without changing these")


def is_longer(before: Any, now: int) -> bool:
    """Whether a run of `before` steps is extended by asking for `now`."""
    return isinstance(before, int) and before < now


def describe_extension(before: int, cfg: TrainConfig, start: int) -> str:
    """What it does to the schedules that a run of `before` steps continues to `cfg.iterations` from step `start`."""
    now, cooled = cfg.iterations, math.ceil(before * (1 - cfg.cooldown))
    said = (
        f"extended from {before} to {now} steps: the attention window and the cooldown of the learning rate, now from step "
        f"{math.ceil(now * (1 - cfg.cooldown))}, are laid over the new length"
    )
    if start <= cooled:
        return f"{said}; up to step {start} the learning rate was that of the longer run too"
    fell, rises = (dataclasses.replace(cfg, iterations=length).schedule.at(start).lr_factor for length in (before, now))
    return (
        f"{said}; step {start} lies in the old cooldown, where the learning rate had fallen to {fell:.2f} of its peak, and "
        f"it continues at {rises:.2f}: the result is not that of {now} steps from the start; for that, start again, or "
        f"delete the checkpoints after step {cooled} if an older one was kept (--keep-every), and resume"
    )


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
        notes = [*notes, describe_extension(before, cfg, state["step"])]
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
            f"{shapes.get(first) or 'missing or unexpected'}, not {tuple(own[first].shape) if first in own else 'known'}; "
            f"{_other_shape(loaded.cfg, cfg)}"
        )
    theirs = loaded.cfg
    with torch.device("meta"):
        head = GPT(model_config(theirs, corpus, "dense", torch.float32)).lm_head
    same = (
        theirs.head_dim == cfg.head_dim
        and math.isclose(head.scale, model.logit_scale)
        and head.cap == model.lm_head.cap
    )
    if not same:
        raise CheckpointError(
            f"--init-from {path}: the same weights give other predictions with these settings; keep its --parametrization "
            f"{theirs.parametrization} --base-width {theirs.tuned_width} --head-dim {theirs.head_dim}"
            f"{' --asymmetric-softcap' if head.cap != RECORD26 else ''}"
        )
    model.load_state_dict({name: tensor.to(own[name].dtype) for name, tensor in loaded.model.items()})


def _other_shape(theirs: TrainConfig, cfg: TrainConfig) -> str:
    """What to give so that a model gets the parameters of another run's."""
    sizes = [name for name, meta in settings().items() if name in ("width", "n_layer") or meta.group == "techniques"]
    differ = [name for name in sizes if getattr(theirs, name) != getattr(cfg, name)]
    told = [f"{flag_of(name)} {getattr(theirs, name)} (here {getattr(cfg, name)})" for name in differ]
    return f"that run has {', '.join(told)}" if told else "its settings are these; give data with the same tokens"


def _other_type(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> str:
    """Which type a tensor has instead of which, if one of them has another; else nothing."""
    for name in found.keys() & expected.keys():
        now, before = (str(tensors[name].dtype).removeprefix("torch.") for tensors in (expected, found))
        if now != before:
            return f"{now} instead of {before}"
    return ""


def describe_other_code(folder: Path) -> list[str]:
    """A line if the last attempt of the run in `folder` had other code than this one."""
    before, now = next((attempt.get("source_sha256") for attempt in attempts(folder)[-1:]), None), source_sha256()
    if before in (None, now):
        return []
    return [
        f"the code changed since this run's last attempt: its hash was {printable(before)[:12]}, is {now[:12]}; continuing"
    ]
