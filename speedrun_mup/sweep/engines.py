"""Where runs are computed: worker processes of this machine, or a Ray cluster."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import contextmanager
from multiprocessing import connection
from pathlib import Path
from typing import Any, Protocol

import torch
from tqdm import tqdm

from speedrun_mup.core.errors import ConfigError, in_a_line
from speedrun_mup.core.utils import pick_device
from speedrun_mup.packages import import_package
from speedrun_mup.sweep.any_sweep import AnyRun, run_safely
from speedrun_mup.sweep.result import Failure, RunResult

MOST_WORKERS = 1024
Outcome = tuple[AnyRun, RunResult | Failure]


class Engine(Protocol):
    """A place to run, `workers` runs at a time."""

    workers: int

    def run(self, specs: Iterator[AnyRun], scratch: Path) -> Generator[Outcome]:
        """Make runs and yield each when it is finished. The next one is taken from `specs` when a worker is free."""

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

    GPUs are dealt out in turn. A worker that dies costs the run it was at, which becomes a Failure; another takes its
    place. Workers outlive neither the engine nor the process that made it.
    """

    def __init__(self, workers: int | None = None, device: str = "auto"):
        gpus = visible_gpus(device)
        self.workers = workers or len(gpus) or (1 if pick_device(device).type == "mps" else cores())
        self._pool = [
            _Worker(_threads(self.workers) | ({"CUDA_VISIBLE_DEVICES": gpus[rank % len(gpus)]} if gpus else {}))
            for rank in range(self.workers)
        ]

    def run(self, specs: Iterator[AnyRun], scratch: Path) -> Generator[Outcome]:
        """See Engine. Leaving it early kills the workers that are busy."""
        idle, busy = list(self._pool), dict[_Worker, AnyRun]()
        try:
            while True:
                while idle and (spec := next(specs, None)) is not None:
                    worker = idle.pop()
                    worker.send(spec, scratch)
                    busy[worker] = spec
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
    """A process that makes one run after another. It starts with its first, and again if it has died."""

    def __init__(self, environment: Mapping[str, str]):
        self.environment = environment
        self.process: Any = None

    def send(self, spec: AnyRun, scratch: Path) -> None:
        """Give it a run."""
        if self.process is None or not self.process.is_alive():
            self.close()
            context = multiprocessing.get_context("spawn")
            self.connection, theirs = context.Pipe()
            self.begun, begin = context.Pipe(duplex=False)
            self.process = context.Process(target=_work, args=(theirs, begin), daemon=True)
            with _environment(self.environment):  # torch reads it when the process imports it
                self.process.start()
            theirs.close()  # so that its death is the end of the file
            begin.close()
        with contextlib.suppress(OSError):  # it died just now, and `receive` will notice
            self.connection.send((spec, scratch))

    def receive(self) -> RunResult | Failure:
        """Its answer, or a Failure if it died over it. ConfigError if Python could not even start it."""
        try:
            return self.connection.recv()
        except (EOFError, OSError):
            self.process.join()
            if self.process.exitcode == 1 and not self._has_begun():
                raise ConfigError(
                    "a worker process ended before it began, as its own message says: it imports the script that starts the "
                    'sweep; there, what is to run once must be under `if __name__ == "__main__":`'
                ) from None
            return Failure(f"its process died (exit code {self.process.exitcode})")

    def _has_begun(self) -> bool:
        try:
            return bool(self.begun.recv())
        except (EOFError, OSError):
            return False

    def close(self) -> None:
        """Kill it."""
        if self.process is not None:
            self.process.kill()
            self.process.join()
            self.connection.close()
            self.begun.close()
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


def _work(tasks: Any, begin: Any) -> None:
    """The life of a worker: until its parent closes the connection or dies. begin: gets a word at its start."""
    begin.send(True)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent too, which decides
    tqdm.set_lock(threading.RLock())  # the default is a semaphore, which a killed process leaves behind
    threading.Thread(target=_die_with_parent, daemon=True).start()
    with contextlib.suppress(EOFError, OSError):
        while True:
            tasks.send(_answer(tasks))


def _answer(tasks: Any) -> RunResult | Failure:
    """What comes of the next run; a Failure if this process lacks what its settings need."""
    try:
        spec, scratch = tasks.recv()
    except (EOFError, OSError):  # there is none
        raise
    except Exception as fault:
        advice = 'register it when the module is imported, not under `if __name__ == "__main__"`'
        return _cannot_read(fault, advice)
    return run_safely(spec, scratch)


def _cannot_read(fault: BaseException, advice: str) -> Failure:
    why = "a worker process cannot read the run, perhaps because it lacks a setting that another process added"
    return Failure(f"{why} ({in_a_line(fault)}); {advice}")


def _die_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent:
        parent.join()
    os._exit(1)


RAY_LISTENS = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"  # Ray's own variable: 0 is the loopback, 1 all addresses


class RayEngine:
    """Tasks on a Ray cluster: that of RAY_ADDRESS, else one of `workers` processes on this machine.

    One of our own listens on the loopback only, unless RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER=1, and has no dashboard: anyone who
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
        self._task = ray.remote(**resources)(run_safely)

    def _refuse_open_ports(self) -> None:
        """ConfigError if this version of Ray, or one that was imported before, listens for other machines unasked."""
        address = self._ray.util.get_node_ip_address()
        if os.environ[RAY_LISTENS] == "0" and address not in ("127.0.0.1", "::1", "localhost"):
            self._ray.shutdown()
            why = f"Ray listens on {address}, where others can reach it and run code"
            raise ConfigError(f"{why}; behind a firewall allow it with {RAY_LISTENS}=1, or use --engine local")

    def run(self, specs: Iterator[AnyRun], scratch: Path) -> Generator[Outcome]:
        """See Engine. Leaving it early cancels the tasks under way."""
        ray = self._ray
        busy: dict[Any, AnyRun] = {}
        try:
            while True:
                while len(busy) < self.workers and (spec := next(specs, None)) is not None:
                    busy[self._task.remote(spec, scratch.resolve())] = spec
                if not busy:
                    return
                (task, *_), _ = ray.wait(list(busy))
                try:
                    outcome = ray.get(task)
                except ray.exceptions.RayTaskError as fault:  # `run_safely` raises nothing: it could not be called
                    advice = "install the module that adds it on every node, and import it in `sitecustomize`"
                    outcome = _cannot_read(getattr(fault, "cause", None) or fault, advice)
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
