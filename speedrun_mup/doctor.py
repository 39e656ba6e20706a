"""Check the environment, or the folder of a run: device, memory, disk, data, checkpoints."""

from __future__ import annotations

import dataclasses
import math
import os
import platform
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

import torch

from speedrun_mup.config import TrainConfig
from speedrun_mup.core.errors import UserError, in_a_line
from speedrun_mup.core.utils import is_out_of_memory, pick_device
from speedrun_mup.data.batches import batches_of
from speedrun_mup.data.corpus import find_corpus
from speedrun_mup.data.inspect_corpus import inspect_corpus
from speedrun_mup.data.shards import Corpus, Mixture
from speedrun_mup.data.validation import ValBatches
from speedrun_mup.explain import explain
from speedrun_mup.files import kind_of
from speedrun_mup.training.checkpoint import list_checkpoints
from speedrun_mup.training.hardware import pick_attention, pick_compile, pick_dtype
from speedrun_mup.training.run_folder import FolderLock
from speedrun_mup.training.tracking import (
    CONFIG,
    LOG,
    METRICS,
    PROVENANCE,
    STATUS,
    attempts,
    missing_steps,
    read_metrics,
    read_status,
    source_sha256,
    spans,
)

SUPPORTED_TORCH = ((2, 11), (2, 14))  # from, and before, as pyproject.toml has it
SLACK = 1.1  # of free space over need, below which it is called tight


class Level(Enum):
    """How bad a finding is."""

    GOOD = "ok"
    WARNING = "warn"
    BAD = "BAD"


@dataclass(frozen=True)
class Finding:
    """One line of a diagnosis. fix: what to do about it, if something is to be done."""

    level: Level
    subject: str
    text: str
    fix: str = ""


def examine(cfg: TrainConfig, folder: Path | None = None) -> Iterator[Finding]:
    """Findings about running `cfg` here, and about the run in `folder`, each as soon as it is known.

    Changes nothing.
    """
    yield from _versions()
    findings: list[Finding] = []
    device = _guarded("device", lambda: pick_device(cfg.device), findings)
    if device:
        _guarded("device", lambda: findings.extend(_device(cfg, device)), findings)
    yield from findings
    findings = []
    found = _guarded("data", lambda: find_corpus(cfg.data, cfg.tokenizer), findings)
    if found:
        corpus, told = found
        findings.append(Finding(Level.GOOD, "data", told.removeprefix("data: ")))
        _guarded("data", lambda: findings.extend(_data(cfg, corpus)), findings)
        parameters = sum(math.prod(row.shape) for row in explain(cfg, corpus.vocab_size))
        if device:
            findings += _memory(parameters, device)
        findings += _disk(cfg, parameters, folder)
    yield from findings
    if folder:
        yield from _run_folder(folder, found[0] if found else None)


def _guarded(subject: str, work: Callable, findings: list[Finding]):
    """What `work` returns, or None and a finding if it raises a UserError, which says what to do, or memory is full."""
    try:
        return work()
    except UserError as fault:
        text, _, fix = str(fault).rpartition("; ")
        findings.append(Finding(Level.BAD, subject, text or fix, fix if text else ""))
    except (RuntimeError, MemoryError) as fault:
        if not is_out_of_memory(fault):
            raise
        findings.append(Finding(Level.BAD, subject, f"no memory to try it ({in_a_line(fault)})", "stop what fills it"))
    return None


def _versions() -> Iterator[Finding]:
    release = tuple(int(number) for number in torch.__version__.split("+")[0].split(".")[:2])
    known = SUPPORTED_TORCH[0] <= release < SUPPORTED_TORCH[1]
    text = f"torch {torch.__version__}, Python {platform.python_version()}, {platform.platform()}"
    fix = "install torch from 2.11 to 2.13: nothing else was tested"
    yield Finding(Level.GOOD if known else Level.WARNING, "versions", text, "" if known else fix)


def _device(cfg: TrainConfig, device: torch.device) -> Iterator[Finding]:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    why = "asked for" if cfg.device != "auto" else "the first of CUDA, MPS and CPU that is there"
    yield Finding(Level.GOOD, "device", f"{device.type} ({why}): {name}, {torch.get_num_threads()} CPU threads")
    dtype, (compiled, why_compiled) = pick_dtype(cfg, device), pick_compile(cfg, device)
    why = "asked for" if cfg.dtype != "auto" else "bfloat16 where a GPU computes in it, else float32"
    yield Finding(Level.GOOD, "dtype", f"{str(dtype).removeprefix('torch.')} ({why})")
    yield Finding(Level.GOOD, "compile", f"{'yes' if compiled else 'no'} ({why_compiled})")
    findings: list[Finding] = []
    picked = _guarded("attention", lambda: pick_attention(cfg, device, dtype, compiled), findings)
    if picked:
        findings.append(Finding(Level.GOOD, "attention", f"{picked[0]} ({picked[1]})"))
    yield from findings


def _enough(subject: str, need: float, free: float, what: str, fix: str) -> Finding:
    level = Level.BAD if free < need else Level.WARNING if free < SLACK * need else Level.GOOD
    text = f"{free / 1e9:,.1f} GB free, {what} {need / 1e9:,.2f} GB"
    return Finding(level, subject, text, "" if level is Level.GOOD else fix)


def _memory(parameters: int, device: torch.device) -> Iterator[Finding]:
    """Weights, gradients, at most two optimizer states and a snapshot of weights and states, 4 bytes each."""
    what = f"{parameters:,} parameters with gradients and optimizer state take, without activations, up to"
    fix = "choose a smaller --width, or more ranks"
    if device.type == "cuda":
        yield _enough("memory", 16.0 * parameters, torch.cuda.mem_get_info(device)[0], what, fix)
    elif (info := Path("/proc/meminfo")).exists() and (match := re.search(r"MemAvailable:\s+(\d+)", info.read_text())):
        yield _enough("memory", 28.0 * parameters, 1024.0 * int(match[1]), what, fix)
    else:
        yield Finding(Level.GOOD, "memory", f"{what} {28e-9 * parameters:,.2f} GB; free memory is unknown here")


def _disk(cfg: TrainConfig, parameters: int, folder: Path | None) -> Iterator[Finding]:
    where = folder or Path(cfg.out)
    there = next(path for path in (where.absolute(), *where.absolute().parents) if path.is_dir())
    try:
        with tempfile.NamedTemporaryFile(dir=there):
            pass
    except OSError as fault:
        yield Finding(Level.BAD, "disk", f"{there} cannot be written ({fault.strerror})", "choose another with --out")
        return
    count = cfg.keep_last + 1 + (cfg.iterations // cfg.keep_every if cfg.keep_every else 0)
    what = f"{count} checkpoints in {where} take up to"
    fix = "free some space, or choose another disk with --out"
    yield _enough("disk", 12.0 * parameters * count * cfg.save, shutil.disk_usage(there).free, what, fix)


def _data(cfg: TrainConfig, corpus: Corpus) -> Iterator[Finding]:
    parts = corpus.parts if isinstance(corpus, Mixture) else (corpus,)
    if faults := [fault for part in parts for fault in inspect_corpus(part).faults]:
        for fault in faults:
            yield Finding(Level.BAD, "data", fault, "delete the folder and prepare the corpus again")
        return
    for note in ValBatches(corpus, cfg.val_tokens, cfg.val_chunk_tokens).notes:
        yield Finding(Level.WARNING, "data", f"validation: {note}", "lower --val-tokens, or use more validation data")
    batches = batches_of(dataclasses.replace(cfg, epochs=None), corpus)
    usage = batches.usage()
    if not usage.steps:
        level = Level.WARNING if cfg.epochs is None else Level.BAD
        text = "a part of the mixture repeats within the first step"
        yield Finding(level, "data", text, "lower the batch, or give that part less weight or more text")
        return
    epochs = cfg.schedule.micro_batches_before(cfg.iterations) / (usage.steps * batches.N)
    text = (
        f"{usage.steps:,} {batches.groups} an epoch, which trains on {usage.share:.1%} of the tokens; "
        f"this run takes {epochs:.2f} epochs"
    )
    too_long = cfg.epochs is not None and epochs > cfg.epochs
    fix = (
        f"train at most {usage.steps * (cfg.epochs or 0):,} {batches.groups}, or allow more --epochs"
        if too_long
        else ""
    )
    yield Finding(Level.BAD if too_long else Level.GOOD, "data", text, fix)


def _run_folder(folder: Path, corpus: Corpus | None) -> Iterator[Finding]:
    yield from _state_of_run(folder)
    yield from _kinds(folder)
    yield from _checkpoints(folder)
    findings: list[Finding] = []
    _guarded("metrics", lambda: findings.extend(_metrics(folder)), findings)
    yield from findings
    for dump in sorted(folder.glob("bad-step-*.json")):
        fix = "it lists the tokens and the norm of every gradient; see --on-nonfinite"
        yield Finding(Level.WARNING, "numbers", f"{dump} describes a step with NaN or Inf", fix)
    yield from _code(folder)
    newest = max((path.lstat().st_mtime for path in folder.iterdir()), default=0.0)
    if newest > time.time() + 60:
        text = f"files in {folder} are {newest - time.time():,.0f} s in the future"
        yield Finding(Level.WARNING, "clock", text, "set the clock; --resume auto goes by it to find the newest run")


def _kinds(folder: Path) -> Iterator[Finding]:
    """What is no file or folder of its own where a run writes: it writes nothing through a link, and waits for no FIFO."""
    wanted = dict.fromkeys((METRICS, LOG, STATUS, CONFIG, PROVENANCE, ".lock"), "a regular file")
    for name, kind in (wanted | dict.fromkeys(("checkpoints", "tensorboard"), "a folder")).items():
        path = folder / name
        if os.path.lexists(path) and (found := kind_of(path.lstat().st_mode)) != kind:
            fix = "remove it" if kind == "a regular file" else "put the folder itself in its place"
            yield Finding(Level.BAD, "files", f"{path} is {found}, not {kind}: a run writes nothing there", fix)


def _metrics(folder: Path) -> Iterator[Finding]:
    if not os.path.lexists(folder / METRICS):
        return
    records = read_metrics(folder)
    steps = [record["step"] for record in records if record["kind"] == "train"]
    doubles = len(steps) - len(set(steps))
    level = Level.WARNING if doubles else Level.GOOD
    fix = "a resumed run writes them again" if doubles else ""
    yield Finding(level, "metrics", f"{len(steps):,} steps recorded, {doubles} twice", fix)
    noted = read_status(folder)["missing_steps"]
    missing = missing_steps(folder, records, max((last + 1 for _, last in noted), default=0))
    if missing:
        text = f"{METRICS} lacks steps {spans(missing)}: there was no room for them when they came"
        yield Finding(
            Level.WARNING, "metrics", text, "checkpoints and later records are not touched by that; make room"
        )


def _code(folder: Path) -> Iterator[Finding]:
    last = (attempts(folder) or [{}])[-1]
    before = last.get("torch", torch.__version__)
    if before != torch.__version__:
        text = f"the run used torch {before}, this is {torch.__version__}"
        yield Finding(Level.WARNING, "versions", text, "to resume bit for bit, use the same one")
    if last.get("source_sha256", source_sha256()) != source_sha256():
        text = f"the run used other code ({last.get('revision')}) than this"
        yield Finding(Level.WARNING, "versions", text, "to resume bit for bit, check out the same revision")


def _state_of_run(folder: Path) -> Iterator[Finding]:
    holder = FolderLock.holder(folder)
    told = read_status(folder)
    status, why = told["status"], told["why"]
    if holder:
        yield Finding(Level.GOOD, "run", f"{folder} is in use by process {holder}")
    elif status == "running":
        yield Finding(Level.WARNING, "run", f"{folder}: crashed (no final status)", f"resume it with --resume {folder}")
    elif status in ("failed", "diverged"):
        yield Finding(Level.WARNING, "run", f"{folder}: {status}: {why}", f"fix it, then rerun with --resume {folder}")
    elif status == "not known" and os.path.lexists(folder / STATUS):
        text = f"{folder / STATUS} is damaged: how the run ended is not known"
        yield Finding(Level.WARNING, "run", text, f"remove it; a resumed run ({folder}) writes it again")
    else:
        yield Finding(Level.GOOD, "run", f"{folder}: {status}")


def _checkpoints(folder: Path) -> Iterator[Finding]:
    root = folder / "checkpoints"
    found = list_checkpoints(root)
    intact = [path.name for path, damage in found if damage is None]
    for _, damage in found:
        if damage:
            fix = "delete it" if intact else "there is no other: restore it from a copy, or start again"
            yield Finding(Level.WARNING if intact else Level.BAD, "checkpoint", damage, fix)
    if intact:
        yield Finding(Level.GOOD, "checkpoint", f"intact: {', '.join(intact)}; a resume starts from {intact[0]}")
    elif not found:
        yield Finding(Level.WARNING, "checkpoint", f"none in {root}", "a resume starts at step 0")
    leftovers = [path.name for path in sorted(root.glob(".t*-step-*"))] if root.is_dir() else []
    if leftovers:
        yield Finding(Level.GOOD, "checkpoint", f"left by a kill, removed at the next start: {', '.join(leftovers)}")
