"""Many small runs: arms x widths x learning rates x seeds, in parallel, resumable, refined where it counts.

    sweep = Sweep(make_config("laptop", {"base_width": 64}), widths=(64, 128, 256), arms=pick_arms(["mup", "adam-sp"]))
    with closing(LocalEngine()) as engine:
        print(run_sweep(sweep, Path("sweeps/laptop"), engine).summary())

A cell is one run. Its id is a hash of what it computes, and it is done once cells/<id>/result.json exists. Only the
process that holds the folder's lock writes there, so workers may die at any moment. The same command does what is
missing; another one with the same base adds to the folder. Cells differ in nothing but arm, width, seed and a factor
2**octaves on one hyperparameter, the knob. A seed draws initialisation and, but in the record's own order, the order of
the data, so that all cells of one seed share it (common random numbers) and seeds differ in both.
"""

from __future__ import annotations

import contextlib
import csv
import functools
import gc
import hashlib
import io
import itertools
import json
import math
import multiprocessing
import os
import shutil
import signal
import sys
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, fields, replace
from multiprocessing import connection
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from tqdm import tqdm

from speedrun_mup.config import TrainConfig
from speedrun_mup.core.errors import ConfigError, Diverged, UserError, in_a_line
from speedrun_mup.core.utils import pick_device
from speedrun_mup.data.corpus import find_corpus
from speedrun_mup.data.shards import Corpus
from speedrun_mup.files import own_folder, printable, read_bytes, write_whole
from speedrun_mup.interrupts import after_imports
from speedrun_mup.packages import import_package
from speedrun_mup.training.flops import model_shape, run_flops
from speedrun_mup.training.hardware import pick_dtype
from speedrun_mup.training.run import train
from speedrun_mup.training.run_folder import FREE_TO_CHANGE, FolderLock
from speedrun_mup.training.tracking import PROVENANCE, clock, read_metrics, source_sha256
from speedrun_mup.transfer import (
    MADE_WITH,
    Array,
    CurveKey,
    Doubt,
    Run,
    TransferResult,
    differing,
    is_rate,
    measure_transfer,
    missing,
)

SCHEMA = 1  # of result.json; part of every id
SWEEP, CELLS, RESULT, SCRATCH = "sweep.json", "cells", "result.json", "running"
# What a factor of powers of two makes sense on.
KNOBS = ("lr_scale", "matrix_lr", "embed_lr", "head_lr", "scalar_lr", "weight_decay", "adam_eps", "scalar_eps")
ATTEMPTS = 3  # a cell that fails is tried again twice
MOST_OCTAVES = 32.0  # either way that a grid may go
MAX_EXTENSION = 3.0  # octaves beyond either end of the grid that was asked for
TAIL = 0.1  # last fraction of training whose mean loss is `train_loss`
# Settings without a part in an id. The corpus has a fingerprint; what happens to a diverging run is part of the result.
NOT_COMPUTED = FREE_TO_CHANGE - {"on_nonfinite"}
# Settings that came after the first results, with what those had in their place. An id says nothing of them there.
ADDED = {"data_order": "record"}
MOST_WORKERS, MOST_SEEDS, MOST_STEPS, MOST_RUNS = 1024, 100, 10**7, 10**6

# ---------------------------------------------------------------------------------------------------------------------
# What is asked for
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Arm:
    """One way to scale with width, as settings. predicted: octaves per doubling that a control's optimum must drift.

    The prediction is for a knob that turns just what is scaled wrongly. lr_scale turns groups that are right as well,
    and the common optimum then lies between, so the sign is what counts.
    """

    name: str
    settings: Mapping[str, Any]
    predicted: float | None = None


# Adam's rate for hidden matrices at base width, where all tables agree: the best of a sweep of matrix_lr alone, laptop
# preset at width 64, one seed. (Record 26 gives its Adam groups multiples of 0.008.)
ADAM = {"hidden_optimizer": "adam", "matrix_lr": 0.008}
MUON = {"hidden_optimizer": "muon"}

# adam-sp is the table "sp", not "adam-constant": what people do without muP. A constant rate is then too fast by m in
# hidden matrices and readout; both call for -1 octave per doubling, which shows even where one knob turns all rates.
ARMS: dict[str, Arm] = {
    arm.name: arm
    for arm in (
        Arm("mup", {"parametrization": "mup", **MUON}),
        Arm("record26", {"parametrization": "record26", **MUON}),
        Arm("adam-mup", {"parametrization": "mup", **ADAM}),
        Arm("adam-sp", {"parametrization": "sp", **ADAM}, predicted=-1.0),
        Arm("muon-sqrt-m", {"parametrization": "muon-sqrt-m", **MUON}, predicted=-0.5),
        Arm("muon-over-m", {"parametrization": "muon-over-m", **MUON}, predicted=1.0),
    )
}


def pick_arms(names: Iterable[str]) -> tuple[Arm, ...]:
    """The arms called `names`. Raises ConfigError for an unknown one."""
    unknown = [name for name in names if name not in ARMS]
    if unknown:
        raise ConfigError(f"arm {unknown[0]!r} is unknown; choose from {', '.join(ARMS)}")
    return tuple(ARMS[name] for name in names)


def check_given(arms: Sequence[Arm], given: Mapping[str, Any]) -> None:
    """ConfigError if a setting that somebody gave is one that an arm fixes otherwise: no arm overrides a user in silence."""

    def clashes(arm: Arm, names: Iterable[str]) -> list[str]:
        return [name for name in names if arm.settings.get(name, given[name]) != given[name]]

    fixed = [name for name in given if any(name in arm.settings for arm in ARMS.values())]
    for arm in arms:
        for name in clashes(arm, fixed):
            flag = "--" + name.replace("_", "-")
            fit = [other.name for other in ARMS.values() if not clashes(other, fixed)]
            together = " ".join(f"{one}={given[one]}" for one in fixed)
            choice = f"choose among --arms {' '.join(fit)}" if fit else f"no arm has {together}"
            knob = f", or turn it with --knob {name}" if name in KNOBS else ""
            why = f"{flag} {given[name]}: arm {arm.name} fixes {name} at {arm.settings[name]}"
            raise ConfigError(f"{why}; leave {flag} out{knob}, or {choice}")


@dataclass(frozen=True)
class Cell:
    """One run: its place in the table and its settings. corpus, vocab: fingerprint and vocabulary of its data."""

    arm: str
    width: int
    octaves: float
    seed: int
    cfg: TrainConfig
    corpus: str
    vocab: int

    def __str__(self) -> str:
        return f"{self.arm} width {self.width} 2^{self.octaves:g} seed {self.seed}"

    @functools.cached_property
    def id(self) -> str:
        """16 hex digits, the same wherever the cell runs: a hash of its arm, what it computes, and the data."""
        settings = {name: value for name, value in computed_settings(self.cfg).items() if ADDED.get(name, ()) != value}
        what = [SCHEMA, self.arm, self.corpus, settings]
        text = json.dumps(what, sort_keys=True, allow_nan=False)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    @functools.cached_property
    def flops(self) -> float:
        """What training it takes."""
        return run_flops(self.cfg, self.vocab)


def computed_settings(cfg: TrainConfig) -> dict[str, Any]:
    """The settings that decide what a run computes, without where it runs and what it shows."""
    return {name: value for name, value in asdict(cfg).items() if name not in NOT_COMPUTED}


@dataclass(frozen=True)
class Sweep:
    """Which cells to run.

    base: what all cells have in common, with a base_width. octaves: the grid, as powers of two on `knob`, one of
    KNOBS. adaptive: extend the grid where the minimum turns out to be at its edge, and, with refine, add the
    half octaves around the minimum, else one point on its better side. Raises ConfigError.
    """

    base: TrainConfig
    widths: tuple[int, ...]
    arms: tuple[Arm, ...] = (ARMS["mup"],)
    octaves: tuple[float, ...] = (-3.0, -2.0, -1.0, 0.0, 1.0, 2.0, 3.0)
    seeds: tuple[int, ...] = (0, 1, 2)
    knob: str = "lr_scale"
    adaptive: bool = True
    refine: bool = True

    def __post_init__(self) -> None:
        for name in ("widths", "arms", "octaves", "seeds"):
            values = [getattr(value, "name", value) for value in getattr(self, name)]
            if not values or len(set(values)) < len(values):
                raise ConfigError(f"{name}={','.join(map(str, values))}: name at least one, and none twice")
        if len(self.seeds) > MOST_SEEDS:
            raise ConfigError(f"{len(self.seeds)} seeds: give at most {MOST_SEEDS}")
        if self.knob not in KNOBS:
            raise ConfigError(f"knob={self.knob!r} cannot be turned; choose {', '.join(KNOBS)}")
        if not getattr(self.base, self.knob):
            flag = "--" + self.knob.replace("_", "-")
            raise ConfigError(f"{self.knob}=0 stays 0 under any factor; give {flag} what the factor 1 stands for")
        if far := [at for at in self.octaves if not abs(at) <= MOST_OCTAVES]:
            raise ConfigError(f"octaves={far[0]:g} must be from -{MOST_OCTAVES:g} to {MOST_OCTAVES:g}: a power of two")
        if self.base.base_width is None:
            raise ConfigError("a sweep needs the width that its settings were tuned at; give --base-width")

    def cell(self, arm: Arm, width: int, octaves: float, seed: int, corpus: Corpus) -> Cell:
        """One cell. The data are named so that a worker with another working directory finds them too."""
        data = self.base.data if self.base.data in ("embedded", "synthetic") else corpus.data
        settings: dict[str, Any] = {"data": data, "width": width, "seed": seed, **arm.settings}
        quiet: dict[str, Any] = {"save": False, "val_every": 0, "track": "none", "progress": False}
        cfg = replace(self.base, out="", name=None, resume=None, **quiet, **settings)
        knob: dict[str, Any] = {self.knob: getattr(cfg, self.knob) * 2.0**octaves}
        cfg = replace(cfg, **knob)
        return Cell(arm.name, width, float(octaves), seed, cfg, corpus.fingerprint, corpus.vocab_size)

    def cells(self, points: Mapping[tuple[str, int], Iterable[float]], corpus: Corpus) -> list[Cell]:
        """The cells of all seeds at `points`: (arm, width) -> octaves."""
        return [
            self.cell(arm, width, octaves, seed, corpus)
            for arm in self.arms
            for width in self.widths
            for octaves in sorted(points[arm.name, width])
            for seed in self.seeds
        ]


# ---------------------------------------------------------------------------------------------------------------------
# What it costs
# ---------------------------------------------------------------------------------------------------------------------


class Pace:
    """How long a cell takes in one worker, learnt from finished ones: steps by their FLOPs, and what comes with a run.

    What comes with a run is setting up and validation. What is known of the nearest width counts.
    """

    def __init__(self, results: Iterable[CellResult] = ()):
        self._known: dict[int, _Spent] = {}
        for result in results:
            self.learn(result)

    @property
    def known(self) -> bool:
        """Whether there is anything to go by."""
        return bool(self._known)

    def learn(self, result: CellResult) -> None:
        """Count a finished cell."""
        if result.flops:
            spent = self._known.setdefault(result.width, _Spent())
            spent.flops += result.flops
            spent.train_s += result.train_s
            spent.other_s += result.seconds - result.train_s
            spent.cells += 1

    def seconds(self, width: int, flops: float) -> float:
        """What a cell will take; 0 while nothing is known."""
        if not self.known:
            return 0.0
        spent = self._nearest(width)
        return spent.other_s / spent.cells + flops * spent.train_s / spent.flops

    def flops_per_s(self, width: int) -> float:
        """Training speed of one worker. Raises ConfigError while nothing is known."""
        if not self.known:
            raise ConfigError("no cell has finished, so nothing is known about speed; run one first")
        return self._nearest(width).flops / self._nearest(width).train_s

    def _nearest(self, width: int) -> _Spent:
        return self._known[min(self._known, key=lambda at: abs(math.log(at / width)))]


@dataclass
class _Spent:
    """Sums over cells of one width."""

    flops: float = 0.0
    train_s: float = 0.0
    other_s: float = 0.0
    cells: int = 0


# ---------------------------------------------------------------------------------------------------------------------
# What came of it
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class CellResult:
    """A finished cell, as in its result.json.

    loss: validation loss at the end; train_loss: mean over the last tenth of training; both nan if never reached.
    diverged: the loss or a gradient stopped being a number, or the run ended above its initial loss. That is a finding.
    reason: of the divergence. curve: training loss of steps 0, 1, 2, ... seconds: of the whole cell; train_s: of its
    optimizer steps. flops: of the steps that were taken. made_with: versions and device.
    """

    id: str
    arm: str
    width: int
    octaves: float
    seed: int
    loss: float
    train_loss: float
    diverged: bool
    reason: str
    curve: list[float]
    seconds: float
    train_s: float
    flops: float
    corpus: str
    config: dict[str, Any]
    made_with: dict[str, str]

    @property
    def lr(self) -> float:
        """The factor on the knob."""
        return 2.0**self.octaves

    def to_json(self) -> str:
        """One line of strict JSON; a number that is not finite becomes null."""
        values = asdict(self) | {"loss": _or_null(self.loss), "train_loss": _or_null(self.train_loss)}
        values["curve"] = [_or_null(loss) for loss in self.curve]
        return json.dumps({"schema": SCHEMA, **values}, allow_nan=False)

    @staticmethod
    def from_json(text: str | bytes, source: Path) -> CellResult:
        """Read back `to_json`. ConfigError naming `source` for anything else."""
        try:
            values = json.loads(text)
            if values.pop("schema") != SCHEMA or values.keys() != {entry.name for entry in fields(CellResult)}:
                raise ValueError("made by another version")
            values |= {name: _or_nan(values[name]) for name in ("loss", "train_loss")}
            values["curve"] = [_or_nan(loss) for loss in values["curve"]]
            result = CellResult(**values)
            _check_types(result)
        except (ValueError, KeyError, AttributeError, TypeError, OverflowError, RecursionError) as fault:
            why = f"{printable(source)} is no result of a run ({in_a_line(fault)}); delete it and run the sweep again"
            raise ConfigError(why) from None
        return result


def _check_types(result: CellResult) -> None:
    """Raises ValueError for what `run_cell` cannot have written: anybody may have sent the folder."""
    names = (result.id, result.arm, result.reason, result.corpus, *result.made_with, *result.made_with.values())
    costs = (result.seconds, result.train_s, result.flops)
    iterations = result.config["iterations"]
    good = {
        "names": all(isinstance(name, str) for name in names) and result.arm == printable(result.arm, 100),
        "whole numbers": all(type(number) is int for number in (result.width, result.seed, iterations)),
        "diverged": isinstance(result.diverged, bool),
        "costs": all(isinstance(number, (int, float)) and 0 <= number < math.inf for number in costs),
    }
    good["octaves"] = abs(float(result.octaves)) <= 2 * MOST_OCTAVES
    good["width"] = good["whole numbers"] and 0 < result.width < 2**31
    good["curve"] = good["whole numbers"] and len(result.curve) <= iterations <= MOST_STEPS
    if wrong := [name for name, fine in good.items() if not fine]:
        raise ValueError(f"impossible: {', '.join(wrong)}")


def _or_null(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _or_nan(value: float | None) -> float:
    return math.nan if value is None else float(value)


@dataclass(frozen=True)
class Failure:
    """A cell that came to nothing, and why, in one line."""

    why: str


Outcome = tuple[Cell, CellResult | Failure]


def run_cell(cell: Cell, scratch: Path) -> CellResult:
    """Train one cell in a folder of its own inside `scratch`, which is removed afterwards. Prints nothing.

    Raises what `train` raises, except for divergence, and ConfigError if this machine has other data.
    """
    began = time.perf_counter()
    corpus, _ = find_corpus(cell.cfg.data, cell.cfg.tokenizer)
    if not corpus.is_known_as(cell.corpus):
        raise ConfigError(f"data={cell.cfg.data}: not the corpus that the sweep began with; bring back the same files")
    torch.compiler.reset()  # else the ninth model that a process compiles would run uncompiled, without a word
    gc.collect()  # a compiled model is in a cycle, and would keep its memory on the GPU
    folder = scratch / f"{cell.id}-{os.getpid()}"
    loss, reason = math.nan, ""
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            try:
                result = train(replace(cell.cfg, out=str(scratch), name=folder.name))
            except Diverged as fault:
                reason = str(fault)
            else:
                if not result.finished:
                    raise UserError(f"stopped by a signal at step {result.steps}; run the sweep again")
                loss = _or_nan(result.val_loss)
        records = [record for record in read_metrics(folder) if record["kind"] == "train"]
        made_with = json.loads((folder / PROVENANCE).read_text().splitlines()[-1])
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    curve = [math.nan] * (records[-1]["step"] + 1 if records else 0)  # nan stays where a bad step was skipped
    for record in records:
        curve[record["step"]] = round(_or_nan(record["loss"]), 6)
    first = next((value for value in curve if math.isfinite(value)), math.nan)
    if not reason and not loss < first:
        reason = f"ended at a loss of {loss:.4f}, began at {first:.4f}"
    tail = [value for value in curve[-max(1, round(TAIL * cell.cfg.iterations)) :] if math.isfinite(value)]
    return CellResult(
        id=cell.id,
        arm=cell.arm,
        width=cell.width,
        octaves=cell.octaves,
        seed=cell.seed,
        loss=loss,
        train_loss=float(np.mean(tail)) if tail and len(curve) == cell.cfg.iterations else math.nan,
        diverged=bool(reason),
        reason=reason,
        curve=curve,
        seconds=time.perf_counter() - began,
        train_s=records[-1]["train_s"] if records else 0.0,
        flops=cell.flops * len(curve) / cell.cfg.iterations,
        corpus=cell.corpus,
        config=computed_settings(cell.cfg),
        made_with={name: made_with[name] for name in ("speedrun_mup", "revision", "source_sha256", "torch", "platform")}
        | {"device": _device_name(cell.cfg.device), "dtype": _dtype_name(cell.cfg)},
    )


def _device_name(device: str) -> str:
    kind = pick_device(device).type
    return torch.cuda.get_device_name() if kind == "cuda" else kind


def _dtype_name(cfg: TrainConfig) -> str:
    return str(pick_dtype(cfg, pick_device(cfg.device))).removeprefix("torch.")


def attempt(cell: Cell, scratch: Path) -> CellResult | Failure:
    """`run_cell`, with any exception as a Failure."""
    try:
        return run_cell(cell, scratch)
    except UserError as fault:
        return Failure(str(fault))
    except Exception as fault:
        return Failure(in_a_line(fault))


# ---------------------------------------------------------------------------------------------------------------------
# Engines: where cells run
# ---------------------------------------------------------------------------------------------------------------------


class Engine(Protocol):
    """A place to run cells, `workers` at a time."""

    workers: int

    def run(self, cells: Iterator[Cell], scratch: Path) -> Generator[Outcome]:
        """Run cells and yield each when it is finished. The next one is taken from `cells` when a worker is free."""

    def close(self) -> None:
        """End all processes."""


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def visible_gpus(device: str) -> list[str]:
    """Names for CUDA_VISIBLE_DEVICES, one for each GPU that may be used; none if `device` is neither auto nor cuda."""
    count = torch.cuda.device_count() if device in ("auto", "cuda") else 0
    listed = os.environ.get("CUDA_VISIBLE_DEVICES")
    return listed.split(",")[:count] if listed else [str(number) for number in range(count)]


def _threads(workers: int) -> dict[str, str]:
    """OpenMP threads that wait by spinning take the cores from one another: measured, a factor of up to 7."""
    return {"OMP_NUM_THREADS": str(max(1, cores() // workers)), "OMP_WAIT_POLICY": "PASSIVE"}


class LocalEngine:
    """Worker processes on this machine, by default one per GPU (a Mac has one) or, without GPUs, one per core.

    GPUs are dealt out in turn. A worker that dies costs the cell it was at, which becomes a Failure; another takes its
    place. Workers outlive neither the engine nor the process that made it.
    """

    def __init__(self, workers: int | None = None, device: str = "auto"):
        gpus = visible_gpus(device)
        self.workers = workers or len(gpus) or (1 if pick_device(device).type == "mps" else cores())
        self._pool = [
            _Worker(_threads(self.workers) | ({"CUDA_VISIBLE_DEVICES": gpus[rank % len(gpus)]} if gpus else {}))
            for rank in range(self.workers)
        ]

    def run(self, cells: Iterator[Cell], scratch: Path) -> Generator[Outcome]:
        """See Engine. Leaving it early kills the workers that are busy."""
        idle, busy = list(self._pool), dict[_Worker, Cell]()
        try:
            while True:
                while idle and (cell := next(cells, None)) is not None:
                    worker = idle.pop()
                    worker.send(cell, scratch)
                    busy[worker] = cell
                if not busy:
                    return
                ready = connection.wait([worker.connection for worker in busy])
                for worker in [worker for worker in busy if worker.connection in ready]:
                    outcome = worker.receive()
                    idle.append(worker)
                    yield busy.pop(worker), outcome
        finally:
            for worker in busy:
                worker.close()

    def close(self) -> None:
        """Kill all workers; a later `run` starts new ones."""
        for worker in self._pool:
            worker.close()


class _Worker:
    """A process that runs one cell after another. It starts with its first cell, and again if it has died."""

    def __init__(self, environment: Mapping[str, str]):
        self.environment = environment
        self.process: Any = None

    def send(self, cell: Cell, scratch: Path) -> None:
        """Give it a cell."""
        if self.process is None or not self.process.is_alive():
            self.close()
            context = multiprocessing.get_context("spawn")
            self.connection, theirs = context.Pipe()
            self.process = context.Process(target=_work, args=(theirs,), daemon=True)
            with _environment(self.environment):  # torch reads it when the process imports it
                self.process.start()
            theirs.close()  # so that its death is the end of the file
        with contextlib.suppress(OSError):  # it died just now, and `receive` will notice
            self.connection.send((cell, scratch))

    def receive(self) -> CellResult | Failure:
        """Its answer, or a Failure if it died over it."""
        try:
            return self.connection.recv()
        except (EOFError, OSError):
            self.process.join()
            return Failure(f"its process died (exit code {self.process.exitcode})")

    def close(self) -> None:
        """Kill it."""
        if self.process is not None:
            self.process.kill()
            self.process.join()
            self.connection.close()
            self.process = None


@contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
    """Environment variables, for processes that are started meanwhile."""
    before = dict(os.environ)
    os.environ.update(values)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def _work(tasks: Any) -> None:
    """The life of a worker: until its parent closes the connection or dies."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent too, which decides
    tqdm.set_lock(threading.RLock())  # the default is a semaphore, which a killed process leaves behind
    threading.Thread(target=_die_with_parent, daemon=True).start()
    with contextlib.suppress(EOFError, OSError):
        while True:
            tasks.send(attempt(*tasks.recv()))


def _die_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent:
        parent.join()
    os._exit(1)


RAY_LISTENS = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"  # Ray's own variable: 0 is the loopback, 1 all addresses


class RayEngine:
    """Tasks on a Ray cluster: that of RAY_ADDRESS, else one of `workers` processes on this machine.

    One of our own listens on the loopback only, unless RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER=1, and has no dashboard: whoever
    reaches Ray's ports can run code. A task takes one GPU, where there are any, else one core. Raises ConfigError without
    the package.
    """

    def __init__(self, workers: int | None = None, device: str = "auto"):
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        if "RAY_ADDRESS" not in os.environ:
            os.environ.setdefault(RAY_LISTENS, "0")  # before it is imported; on any system, whatever the name says
        try:
            ray: Any = import_package("ray")
        except ImportError:
            raise ConfigError("engine=ray needs a package: pip install 'speedrun-mup[ray]'") from None
        self._ray = ray
        if "RAY_ADDRESS" in os.environ:
            ray.init(log_to_driver=False)
        else:
            own = {"num_cpus": workers or cores(), "include_dashboard": False, "object_store_memory": 100 * 2**20}
            ray.init(address="local", log_to_driver=False, **own)
            self._refuse_open_ports()
        have = ray.cluster_resources()
        gpus = int(have.get("GPU", 0)) if device in ("auto", "cuda") else 0
        self.workers = workers or gpus or int(have["CPU"])
        environment = {"env_vars": _threads(cores())}
        resources = {"num_cpus": 1, "num_gpus": 1 if gpus else 0, "max_retries": 0, "runtime_env": environment}
        self._task = ray.remote(**resources)(attempt)

    def _refuse_open_ports(self) -> None:
        """ConfigError if this version of Ray, or one that was imported before, listens for other machines unasked."""
        address = self._ray.util.get_node_ip_address()
        if os.environ[RAY_LISTENS] == "0" and address not in ("127.0.0.1", "::1", "localhost"):
            self._ray.shutdown()
            why = f"Ray listens on {address}, where others can reach it and run code"
            raise ConfigError(f"{why}; behind a firewall allow it with {RAY_LISTENS}=1, or use --engine local")

    def run(self, cells: Iterator[Cell], scratch: Path) -> Generator[Outcome]:
        """See Engine. Leaving it early cancels the tasks under way."""
        ray = self._ray
        busy: dict[Any, Cell] = {}
        try:
            while True:
                while len(busy) < self.workers and (cell := next(cells, None)) is not None:
                    busy[self._task.remote(cell, scratch.resolve())] = cell
                if not busy:
                    return
                (task, *_), _ = ray.wait(list(busy))
                try:
                    outcome = ray.get(task)
                except ray.exceptions.RayError as fault:
                    outcome = Failure(f"{type(fault).__name__}: its process or node died")
                yield busy.pop(task), outcome
        finally:
            for task in busy:
                ray.cancel(task, force=True)

    def close(self) -> None:
        """Leave the cluster, and end it if it is ours."""
        self._ray.shutdown()


ENGINES: dict[str, Callable[[int | None, str], Engine]] = {"local": LocalEngine, "ray": RayEngine}


def open_engine(engine: str, workers: int | None, device: str) -> Engine:
    """The engine called `engine`. Raises ConfigError for an unknown one, or without workers."""
    if engine not in ENGINES:
        raise ConfigError(f"engine={engine!r} is unknown; choose from {', '.join(ENGINES)}")
    if workers is not None and workers < 1:
        raise ConfigError(f"workers={workers} must be at least 1")
    if workers is not None and workers > MOST_WORKERS:
        raise ConfigError(f"workers={workers} must be at most {MOST_WORKERS}")
    return ENGINES[engine](workers, device)


# ---------------------------------------------------------------------------------------------------------------------
# Running
# ---------------------------------------------------------------------------------------------------------------------


def next_points(losses: Mapping[float, float], grid: Sequence[float], refine: bool = True) -> set[float]:
    """Octaves still to be run at one width. losses: octaves -> loss of all points so far, not finite where it diverged.

    A minimum less than an octave from an end asks for one octave more there, up to MAX_EXTENSION beyond `grid`. Any
    other asks, if `refine`, for the half octaves around it, which are those around the three lowest points of a bowl on a grid of
    octaves; but for none at or beyond the first divergence. Without `refine` it asks for the octave beyond the better of its
    two neighbours: of three points the minimum may lie midway between two, and then noise moves it out of their reach. Next
    to a divergence it asks for the half octave before that.
    """
    stable = {at: loss for at, loss in losses.items() if math.isfinite(loss)}
    left, right = min(losses, default=0.0), max(losses, default=0.0)
    if not losses:
        wanted = set()
    elif not stable:
        wanted = {left - 1}
    else:
        best = min(stable, key=lambda at: (stable[at], at))
        if best - left < 1:
            wanted = {left - 1}
        elif right - best < 1 and right in stable:
            wanted = {right + 1}
        elif refine:
            end = min((at for at in losses if at not in stable), default=right)
            wanted = {at for at in (best + halves / 2 for halves in range(-3, 4)) if left < at < end}
        elif (cliff := min((at for at in losses if at not in stable and at > best), default=math.inf)) <= best + 1:
            wanted = {best + 0.5} if best + 0.5 < cliff else set()
        else:
            to_the_right = stable.get(best + 1, math.inf) < stable.get(best - 1, math.inf)
            wanted = {best + (2 if to_the_right else -2)}
    low, high = min(grid) - MAX_EXTENSION, max(grid) + MAX_EXTENSION
    return {at for at in wanted if low <= at <= high} - set(losses)


@dataclass(frozen=True)
class SweepResult:
    """What a call of `run_sweep` leaves.

    results: every finished cell of the folder, also of earlier calls. ran: cells finished by this call. failed: cell ->
    reason, after ATTEMPTS. left: wanted cells that neither finished nor failed. stopped: by a signal. used_up: nothing but
    the budget of FLOPs, which has no room for any of those left, is in the way.
    """

    out: Path
    results: tuple[CellResult, ...]
    ran: int
    failed: dict[str, str]
    left: int
    stopped: bool
    seconds: float
    used_up: bool

    @property
    def complete(self) -> bool:
        """Whether nothing is left to run."""
        return not self.left and not self.failed

    @property
    def flops(self) -> float:
        """Of all finished cells."""
        return sum(result.flops for result in self.results)

    def cost(self, target: TrainConfig, vocab_size: int) -> float:
        """FLOPs of all finished cells over those of the run that they are to save from being tuned."""
        return self.flops / run_flops(target, vocab_size)

    def summary(self) -> str:
        """Counts and cost, and a table of mean losses for each arm."""
        diverged = sum(result.diverged for result in self.results)
        worked = clock(sum(result.seconds for result in self.results))
        lines = [
            f"{self.out}: {len(self.results)} runs done ({self.ran} now, in {clock(self.seconds)}), "
            f"{diverged} diverged, {len(self.failed)} failed, {self.left} left",
            f"cost: {self.flops:.3g} FLOPs, {worked} of one worker's time",
            *(f"failed: {cell}: {why}" for cell, why in self.failed.items()),
        ]
        lines += [f"warning: {doubt.text}" for doubt in made_differently(self.results)]
        if self.used_up:
            lines.append(f"the budget of FLOPs has no room for the {self.left} runs left; a larger one goes on")
        elif self.left:
            lines.append("run the same command again to go on")
        return "\n".join([*lines, *_tables(self.results)])


def _tables(results: Sequence[CellResult]) -> Iterator[str]:
    """Mean validation loss, a table per arm: widths down, octaves across."""
    for arm in dict.fromkeys(result.arm for result in results):
        means = mean_losses(result for result in results if result.arm == arm)
        grid = sorted({at for _, _, at in means})
        yield ""
        yield f"{arm:<12}" + "".join(f"{f'2^{at:g}':>9}" for at in grid)
        for width in sorted({width for _, width, _ in means}):
            losses = (means.get((arm, width, at)) for at in grid)
            shown = ("" if loss is None else "diverged" if math.isnan(loss) else f"{loss:.4f}" for loss in losses)
            yield f"width {width:<6}" + "".join(f"{text:>9}" for text in shown)


def mean_losses(results: Iterable[CellResult]) -> dict[tuple[str, int, float], float]:
    """(arm, width, octaves) -> validation loss, mean over seeds; nan if one diverged."""
    losses: dict[tuple[str, int, float], list[float]] = defaultdict(list)
    for result in results:
        losses[result.arm, result.width, result.octaves].append(math.nan if result.diverged else result.loss)
    return {key: float(np.mean(values)) for key, values in losses.items()}


def run_sweep(
    sweep: Sweep,
    out: Path,
    engine: Engine,
    *,
    budget_minutes: float | None = None,
    budget_flops: float | None = None,
    progress: bool = True,
    part: tuple[int, int] = (0, 0),
) -> SweepResult:
    """Run what is missing of `sweep` in the folder `out`, round after round until the grid needs nothing more.

    budget_minutes: for this call; no cell is begun that would end later, as far as is known. budget_flops: for all
    cells of the folder together. part: (runs before this sweep, about how many in all), if it is part of more. SIGINT,
    SIGTERM and SIGUSR1 stop it: what is under way is given up, what is finished stays. Raises ConfigError if
    `out` is in use, cannot be written, or holds cells of another base.
    """
    corpus, _ = find_corpus(sweep.base.data, sweep.base.tokenizer)
    for width in sweep.widths:
        model_shape(replace(sweep.base, width=width), corpus.vocab_size)
    began = time.monotonic()
    stopped = False
    with _open_folder(out) as scratch, closing(_Progress(progress, *part)) as shown:
        corpus = replace(corpus, fingerprint=_admit(sweep, out, corpus))
        deadline = math.inf if budget_minutes is None else began + 60 * budget_minutes
        shown.say(f"seeds draw the {_seeds_draw(sweep.base)}")
        rounds = _Rounds(out, scratch, engine, shown, deadline, math.inf if budget_flops is None else budget_flops)
        if other := _of_other_code(rounds.done.values()):
            shown.say(other)
        points = {(arm.name, width): set(map(float, sweep.octaves)) for arm in sweep.arms for width in sweep.widths}
        if sweep.adaptive:  # where an earlier call refined the grid, new seeds follow
            points = {key: points[key] | set(losses) for key, losses in rounds.curves(points).items()}
        try:
            with _signals_interrupt():
                while rounds.run(sweep.cells(points, corpus)) and sweep.adaptive:
                    curves = rounds.curves(points)
                    more = {key: points[key] | next_points(curves[key], sweep.octaves, sweep.refine) for key in points}
                    if more == points:
                        break
                    points = more
        except KeyboardInterrupt as stop:
            stopped = True
            shown.say(f"stopped by {stop}; {len(rounds.done)} runs are finished, run the same command again to go on")
        left = [
            cell
            for cell in sweep.cells(points, corpus)
            if cell.id not in rounds.done and str(cell) not in rounds.failed
        ]
        _note_failed(out, (cell for cell in sweep.cells(points, corpus) if str(cell) in rounds.failed))
        results = tuple(sorted(rounds.done.values(), key=_place))
        used_up = bool(left) and not stopped and not rounds.failed and not any(map(rounds.pays_for, left))
        took = time.monotonic() - began
        return SweepResult(out, results, rounds.ran, rounds.failed, len(left), stopped, took, used_up)


def _seeds_draw(cfg: TrainConfig) -> str:
    """What differs between the seeds of a sweep."""
    if cfg.data_order == "record":
        return "initialisation; the data keep the record's order, the same for all seeds, in the first epoch"
    return "initialisation and the order of the data"


def _of_other_code(results: Iterable[CellResult]) -> str:
    """A line about results that other code made than what runs now, or nothing."""
    mine = source_sha256()
    others = Counter(hashed for result in results if (hashed := result.made_with.get("source_sha256", mine)) != mine)
    if not others:
        return ""
    made = ", ".join(f"{printable(name, 12)} ({count})" for name, count in others.most_common(3))
    return f"{others.total()} runs here were made by other code, {made}; this is {printable(mine, 12)}: the verdict will say so"


def _place(result: CellResult) -> tuple[str, int, float, int]:
    return result.arm, result.width, result.octaves, result.seed


class _Rounds:
    """What one call has done so far, and what it may still spend. done: id -> result, of all cells in the folder."""

    def __init__(
        self, out: Path, scratch: Path, engine: Engine, shown: _Progress, deadline: float, budget_flops: float
    ):
        self.out, self.scratch, self.engine, self.shown = out, scratch, engine, shown
        self.deadline, self.budget_flops = deadline, budget_flops
        self.done = {result.id: result for result in read_results(out)}
        self.pace = Pace(self.done.values())
        self.spent = sum(result.flops for result in self.done.values())
        self.ran = 0
        self.tries: Counter[str] = Counter()
        self.failed: dict[str, str] = {}
        self.waiting: list[Cell] = []

    def curves(self, points: Collection[tuple[str, int]]) -> dict[tuple[str, int], dict[float, float]]:
        """(arm, width) -> octaves -> mean loss of the finished cells, for those in `points`."""
        curves: dict[tuple[str, int], dict[float, float]] = {key: {} for key in points}
        for (arm, width, octaves), loss in mean_losses(self.done.values()).items():
            if (arm, width) in curves:
                curves[arm, width][octaves] = loss
        return curves

    def run(self, cells: Sequence[Cell]) -> bool:
        """Run those of `cells` that are not done, failed ones up to ATTEMPTS times; False if the budget ended it."""
        while todo := [cell for cell in cells if cell.id not in self.done and self.tries[cell.id] < ATTEMPTS]:
            self.waiting = sorted(todo, key=lambda cell: -cell.flops)
            self.shown.expect(len(self.waiting))
            with closing(self.engine.run(self._affordable(), self.scratch)) as outcomes:
                for cell, outcome in outcomes:
                    self.tries[cell.id] += 1
                    self._note(cell, outcome)
            if self.waiting:
                return False
        return True

    def _affordable(self) -> Iterator[Cell]:
        """Take waiting cells, longest first, as long as one fits the budget; with unknown pace, the shortest first."""
        while fitting := [cell for cell in self.waiting if self._fits(cell)]:
            cell = fitting[0 if self.pace.known or self.deadline == math.inf else -1]
            self.waiting.remove(cell)
            self.spent += cell.flops
            yield cell

    def _fits(self, cell: Cell) -> bool:
        return time.monotonic() + self.pace.seconds(cell.width, cell.flops) <= self.deadline and self.pays_for(cell)

    def pays_for(self, cell: Cell) -> bool:
        """Whether the budget of FLOPs has room for `cell`."""
        return self.spent + cell.flops <= self.budget_flops

    def _note(self, cell: Cell, outcome: CellResult | Failure) -> None:
        """Keep a result; say a failure once."""
        name = str(cell)
        self.spent += (0.0 if isinstance(outcome, Failure) else outcome.flops) - cell.flops
        if isinstance(outcome, Failure):
            what = "failed"
            if name not in self.failed:
                self.shown.say(f"{name}: {outcome.why}; it will be tried {ATTEMPTS} times")
            self.failed[name] = outcome.why
        else:
            what = "diverged" if outcome.diverged else f"loss {outcome.loss:.4f}"
            _write(self.out / CELLS / cell.id / RESULT, outcome.to_json() + "\n")
            self.done[cell.id] = outcome
            self.failed.pop(name, None)
            self.pace.learn(outcome)
            self.ran += 1
        left = sum(self.pace.seconds(cell.width, cell.flops) for cell in self.waiting)
        self.shown.finished(f"{name}: {what}, {clock(left / self.engine.workers)} left")


class _Progress:
    """A bar on a terminal, a line per run elsewhere. before, about: runs over already, and all that are expected, if known."""

    def __init__(self, show: bool, before: int = 0, about: int = 0):
        self._plain = show and not sys.stderr.isatty()
        self._bar = tqdm(total=about, initial=before, unit="run", disable=not show or self._plain, dynamic_ncols=True)
        self._show, self._about, self._total, self._count = show, about, about, before

    def expect(self, cells: int) -> None:
        """So many cells more."""
        self._total = max(self._count + cells, self._about)
        self._bar.total = self._total
        self._bar.refresh()

    def finished(self, text: str) -> None:
        """One cell more is over."""
        self._count += 1
        self._bar.set_postfix_str(text)
        self._bar.update()
        if self._plain:
            place = f"run {self._count} of about {self._total}" if self._about else f"{self._count}/{self._total}"
            print(f"{place}  {text}", flush=True)

    def say(self, text: str) -> None:
        """A line that stays."""
        if self._show:
            self._bar.clear()
            print(text, flush=True)

    def close(self) -> None:
        """Leave the terminal in order."""
        self._bar.close()


@contextmanager
def _open_folder(out: Path) -> Iterator[Path]:
    """Hold `out` against other processes; yields a scratch folder in it, which is empty before and gone afterwards."""
    scratch = out / SCRATCH
    try:
        out.mkdir(parents=True, exist_ok=True)
        own_folder(out / CELLS)
        lock = FolderLock(out, "--out")
    except OSError as fault:
        raise ConfigError(f"{printable(out)} cannot be written ({fault.strerror}); choose another --out") from None
    with closing(lock):
        shutil.rmtree(scratch, ignore_errors=True)
        if scratch.is_symlink() or scratch.exists():
            raise ConfigError(f"{printable(scratch)} is no folder of this sweep's; delete it")
        for torn in out.glob(f"{CELLS}/*/.{RESULT}.*"):  # half-written, by a process that was killed
            torn.unlink(missing_ok=True)
        try:
            yield scratch
        finally:
            shutil.rmtree(scratch, ignore_errors=True)


@contextmanager
def _signals_interrupt() -> Iterator[None]:
    """SIGINT, SIGTERM and SIGUSR1 raise KeyboardInterrupt with their name, but in other threads than the main one."""

    def interrupt(number: int, frame: Any) -> None:
        def stop() -> None:
            raise KeyboardInterrupt(signal.Signals(number).name)

        after_imports(stop, frame)

    previous = {}
    try:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
                previous[number] = signal.signal(number, interrupt)
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _admit(sweep: Sweep, out: Path, corpus: Corpus) -> str:
    """Add what is asked to sweep.json; returns the corpus's fingerprint there, which earlier versions may have written.

    Raises ConfigError if the cells there have another base, data or arm.
    """
    path = out / SWEEP
    axes = {"width", "seed", "parametrization"}
    settings = {name: value for name, value in computed_settings(sweep.base).items() if name not in axes}
    base = {"schema": SCHEMA, "knob": sweep.knob, "corpus": corpus.fingerprint, **settings}
    arms = {arm.name: {"settings": dict(arm.settings), "predicted": arm.predicted} for arm in sweep.arms}
    asked: dict[str, Any] = {name: list(getattr(sweep, name)) for name in ("widths", "octaves", "seeds")}
    asked |= {"arms": list(arms), "adaptive": sweep.adaptive, "refine": sweep.refine}
    before: dict[str, Any] = read_definition(out) if path.exists() else {"base": base, "arms": {}, "asked": []}
    known = ADDED | before["base"]
    if corpus.is_known_as(known.get("corpus", "")):
        base["corpus"] = known["corpus"]
    differ = [f"{key} was {printable(known.get(key))}, is {base[key]}" for key in base if known.get(key) != base[key]]
    differ += [f"arm {name} was another" for name in arms if before["arms"].get(name, arms[name]) != arms[name]]
    if differ:
        raise ConfigError(f"{out} holds another sweep: {'; '.join(differ)}; choose another folder")
    requests = before["asked"] + ([] if asked in before["asked"] else [asked])
    after = before | {"base": base, "arms": before["arms"] | arms, "asked": requests}
    _write(path, json.dumps(after, indent=1, allow_nan=False) + "\n")
    return base["corpus"]


def _note_failed(out: Path, cells: Iterable[Cell]) -> None:
    """Add cells that were given up to sweep.json: points by which a grid grew are in no request."""
    definition = read_definition(out)
    failed = definition.get("failed", [])
    more = [
        place for place in ([cell.arm, cell.width, cell.octaves, cell.seed] for cell in cells) if place not in failed
    ]
    if more:
        content = json.dumps(definition | {"failed": failed + more}, indent=1, allow_nan=False)
        _write(out / SWEEP, content + "\n")


def _write(path: Path, text: str) -> None:
    """Replace a file of a sweep's folder, which may have come from somebody else. Raises ConfigError."""
    try:
        own_folder(path.parent)
    except OSError as fault:
        raise ConfigError(f"{printable(path.parent)} cannot be used ({fault.strerror}); delete it") from None
    write_whole(path, text, "make room and run the same command again")


# ---------------------------------------------------------------------------------------------------------------------
# Reading a sweep folder
# ---------------------------------------------------------------------------------------------------------------------


def read_definition(out: Path) -> dict[str, Any]:
    """The sweep.json of a folder: base, arms, asked. Raises ConfigError if there is none."""
    path = out / SWEEP
    try:
        definition = json.loads(read_bytes(path))
        base, arms, asked = (definition[name] for name in ("base", "arms", "asked"))
        drifts = [arm["predicted"] for arm in arms.values()]
        good = isinstance(base["base_width"], int) and base["knob"] in KNOBS and all(map(_is_request, asked))
        good = good and all(drift is None or math.isfinite(drift) for drift in drifts)
        good = good and all(name == printable(name, 100) for name in arms)
        good = good and all(map(_is_place, definition.get("failed", [])))
    except (OSError, KeyError, TypeError, AttributeError, ValueError, RecursionError):
        good = False
    if not good:
        raise ConfigError(f"{printable(path)} is missing or damaged; give the folder of a sweep")
    return definition


def _is_request(asked: Mapping[str, Any]) -> bool:
    """Whether this is an entry of "asked" in a sweep.json, of a size that somebody may have meant."""
    axes = [asked[name] for name in ("widths", "seeds", "octaves", "arms")]
    numbers = [*asked["widths"], *asked["seeds"], *asked["octaves"]]
    sane = all(isinstance(number, (int, float)) and abs(number) < 2**63 for number in numbers)
    return sane and math.prod(map(len, axes)) <= MOST_RUNS and all(isinstance(arm, str) for arm in asked["arms"])


def _is_place(entry: Sequence[Any]) -> bool:
    """Whether this is an entry of "failed" in a sweep.json: arm, width, octaves, seed."""
    arm, width, octaves, seed = entry
    return isinstance(arm, str) and type(width) is type(seed) is int and math.isfinite(octaves)


def read_results(out: Path) -> list[CellResult]:
    """All finished cells of a folder, by arm, width, learning rate and seed. Raises ConfigError for a damaged one."""
    results = []
    for path in out.glob(f"{CELLS}/*/{RESULT}"):
        try:
            result = CellResult.from_json(read_bytes(path), path)
        except OSError as fault:
            raise ConfigError(f"{printable(path)} cannot be read ({fault.strerror}); delete it") from None
        if result.id != path.parent.name:
            raise ConfigError(f"{printable(path)} is the result of another run, {printable(result.id, 20)}; delete it")
        results.append(result)
    return sorted(results, key=_place)


def runs_table(out: Path) -> list[Run]:
    """The finished cells as the estimator takes them: lr is the factor on the knob; a diverged run's loss is nan."""
    return [_as_run(result) for result in read_results(out)]


def _as_run(result: CellResult) -> Run:
    return Run(result.width, result.lr, result.seed, math.nan if result.diverged else result.loss, result.arm)


def made_differently(results: Sequence[CellResult]) -> list[Doubt]:
    """Doubts about results that several versions of the code, of torch, several devices or types of numbers made."""
    pairs = [(result, _as_run(result)) for result in results]
    return [
        doubt
        for name in MADE_WITH
        for doubt in differing(name, ((result.made_with.get(name, ""), run) for result, run in pairs))
    ]


def not_run(out: Path, results: Sequence[CellResult], arms: Collection[str]) -> tuple[list[Doubt], list[str]]:
    """Doubts about runs of `arms` that were asked for in a folder and have no result; and what its grids still grow by."""
    curves: dict[tuple[str, int], dict[float, float]] = defaultdict(dict)
    for (arm, width, octaves), loss in mean_losses(results).items():
        curves[arm, width][octaves] = loss
    requests: dict[tuple[str, int], list[dict[str, Any]]] = defaultdict(list)
    definition = read_definition(out)
    for asked in definition["asked"]:
        for key in itertools.product(asked["arms"], asked["widths"]):
            requests[key].append(asked)
    have = {(result.arm, result.width, result.octaves, result.seed) for result in results}
    wanted: dict[str, set[tuple[int, float, int]]] = {arm: set() for arm in arms}
    for (arm, width), some in requests.items():
        if arm in wanted:
            wanted[arm] |= {(width, at, seed) for at, seed in _points_asked(some, curves[arm, width])}
    for arm, width, octaves, seed in definition.get("failed", []):
        if arm in wanted:
            wanted[arm].add((width, octaves, seed))
    absent = {arm: [place for place in sorted(places) if (arm, *place) not in have] for arm, places in wanted.items()}
    names = {arm: [f"width {w} 2^{at:g} seed {seed}" for w, at, seed in places] for arm, places in absent.items()}
    growing = sum(_grows(some, curves[key]) for key, some in requests.items() if key[0] in wanted)
    notes = [f"the grid still grows by {growing} points: run the same sweep again"] if growing else []
    return [*missing(names, {arm: len(places) for arm, places in wanted.items()})], notes


def _points_asked(requests: Sequence[Mapping[str, Any]], curve: Mapping[float, float]) -> set[tuple[float, int]]:
    """(octaves, seed) of all runs that `requests` want at one width of one arm. curve: octaves -> mean loss, so far.

    Points outside all grids come from growing them, and want all seeds.
    """
    grids = [set(map(float, asked["octaves"])) for asked in requests]
    grown = set(curve) - set().union(*grids)
    points: set[tuple[float, int]] = set()
    for asked, grid in zip(requests, grids):
        if asked.get("adaptive"):
            grid = grid | grown
        points |= set(itertools.product(grid, asked["seeds"]))
    return points


def _grows(requests: Sequence[Mapping[str, Any]], curve: Mapping[float, float]) -> int:
    """How many points an adaptive grid still asks for; of several requests, which saw other curves, nobody knows."""
    asked = requests[0]
    if len(requests) > 1 or not asked.get("adaptive") or not set(map(float, asked["octaves"])) <= set(curve):
        return 0
    return len(next_points(curve, asked["octaves"], asked.get("refine", True)))


def training_curves(out: Path) -> dict[CurveKey, Array]:
    """(arm, width, lr, seed) -> (steps, 2) step and training loss; nan from where a diverged run ended."""
    curves = {}
    for result in read_results(out):
        losses = np.full(result.config["iterations"], np.nan)
        losses[: len(result.curve)] = result.curve
        curve = np.stack([np.arange(len(losses), dtype=float), losses], axis=1)
        curves[result.arm, result.width, result.lr, result.seed] = curve
    return curves


COLUMNS = ("arm", "width", "lr", "log2_lr", "seed", "loss", "diverged", "train_loss", "seconds", "flops", *MADE_WITH)


def write_csv(out: Path, path: Path) -> None:
    """The finished cells as a table that `transfer.read_runs` reads; losses are nan where a run diverged.

    The factor on the knob is in the column lr, or, if that is no learning rate, in one that `_knob` names.
    """
    knob = _knob(read_definition(out))
    file = io.StringIO(newline="")
    writer = csv.writer(file)
    writer.writerow(name if is_rate(knob) else name.replace("lr", knob) for name in COLUMNS)
    for cell in read_results(out):
        loss = math.nan if cell.diverged else cell.loss
        place = (cell.arm, cell.width, cell.lr, cell.octaves, cell.seed)
        cost = (round(cell.seconds, 3), f"{cell.flops:.6g}")
        made = (cell.made_with.get(name, "") for name in MADE_WITH)
        writer.writerow([*place, loss, int(cell.diverged), cell.train_loss, *cost, *made])
    write_whole(path, file.getvalue())


def _knob(definition: Mapping[str, Any]) -> str:
    """What the runs' lr stands for: a factor on learning rates by their setting's name, on another by NAME_factor."""
    knob = definition["base"]["knob"]
    return knob if is_rate(knob) else f"{knob}_factor"


def knob_flag(definition: Mapping[str, Any], arm: str) -> tuple[str, float]:
    """The flag for what the sweep turned, and its value where the factor is 1: ("--lr-scale", 1.0)."""
    name = definition["base"]["knob"]
    return f"--{name.replace('_', '-')}", (definition["base"] | definition["arms"][arm]["settings"])[name]


def measure_sweep(out: Path, arms: Collection[str] | None = None, **options: Any) -> TransferResult:
    """`measure_transfer` on a sweep folder, with its controls, base width and training curves.

    arms: those to look at (default: all). An arm without a predicted drift is under test, and the verdict is over all
    of these. A prediction is about learning rates: with another knob that arm is neither tested nor a control. options:
    for `measure_transfer`. Raises ConfigError, TransferError.
    """
    definition = read_definition(out)
    known = [name for name in definition["arms"] if arms is None or name in arms]
    unknown = set(arms or ()) - set(known)
    if unknown:
        raise ConfigError(f"{out} has no arm {', '.join(sorted(unknown))}; it has {', '.join(definition['arms'])}")
    results = [result for result in read_results(out) if result.arm in known]
    runs = [_as_run(result) for result in results]
    several = [name for name in known if len({run.width for run in runs if run.arm == name}) > 1]
    curves = {key: curve for key, curve in training_curves(out).items() if key[0] in several}
    knob = _knob(definition)
    predicted = {name: definition["arms"][name]["predicted"] for name in known}
    if not is_rate(knob):
        tested = [name for name in known if predicted[name] is None] or known
        options["tested"] = options.get("tested") or tested
        predicted = {}
    base = definition["base"]["base_width"]
    everywhere = all(any(run.width == base for run in runs if run.arm == name) for name in known)
    absent, notes = not_run(out, results, known)
    about = {"doubts": [*made_differently(results), *absent], "notes": notes}
    options = {"base_width": base if everywhere else None, "curves": curves, "knob": knob, **about} | options
    return measure_transfer(runs, controls={k: v for k, v in predicted.items() if v is not None}, **options)
