"""Processes that work together: World (rank, size, device), its collectives, and sums that do not depend on its size.

One process is a group of one: every collective below is the identity at size 1 and needs no process group there.
"""

from __future__ import annotations

import atexit
import ctypes
import dataclasses
import datetime
import math
import os
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

from speedrun_mup.core.device import env_int, pick_device
from speedrun_mup.core.errors import CollectiveError, ConfigError, UserError, in_a_line

T = TypeVar("T")

PARENT_DIED = signal.SIGUSR2  # a signal of its own, because one death may send it more than once
ROLL_CALL_S = 3.0  # how long ranks that lost another wait for each other's response
LOOK_S = 1.0  # between two looks whether a collective over gloo is done
PATIENCE = datetime.timedelta(days=100)  # of gloo itself, whose clock runs while this process is suspended


def tree_sum(terms: Sequence[Tensor]) -> Tensor:
    """The sum of equally shaped tensors by neighbours, ((0 + 1) + (2 + 3)) + ..., an odd one out waiting for the next round.

    Every aligned block of 2^k terms is a branch of its own, so the bits do not depend on who sums which block.
    """
    while len(terms) > 1:
        terms = [a + b for a, b in zip(terms[::2], terms[1::2])] + list(terms[len(terms) - len(terms) % 2 :])
    return terms[0]


class TreeSum:
    """`tree_sum`, entry by entry, of lists of tensors that come one at a time. Holds log2 of them, and changes them."""

    def __init__(self) -> None:
        self._branches: list[tuple[int, list[Tensor]]] = []  # (terms in it, their sums), ever smaller

    def add(self, tensors: list[Tensor]) -> None:
        """Take the next term."""
        terms = 1
        while self._branches and self._branches[-1][0] == terms:
            tensors, terms = self._joined(self._branches.pop()[1], tensors), 2 * terms
        self._branches.append((terms, tensors))

    def total(self) -> list[Tensor]:
        """The sums of all terms so far."""
        (_, total), *branches = reversed(self._branches)
        for _, branch in branches:
            total = self._joined(branch, total)
        return total

    @staticmethod
    def _joined(left: list[Tensor], right: list[Tensor]) -> list[Tensor]:
        torch._foreach_add_(left, right)
        return left


class Handle:
    """A collective under way. `wait()` blocks until its result is in place."""

    def __init__(self, *finish: Callable[[], object]):
        self._finish = finish

    def wait(self) -> None:
        """Block until the result is in place. Raises CollectiveError if a rank is lost."""
        for step in self._finish:
            step()
        self._finish = ()


@dataclass(frozen=True)
class World:
    """This process among its peers: `rank` of `size`, computing on `device`. Build one with `join_world`.

    strict: sums over ranks are canonical trees. timeout_s: how long a collective waits for the others; over gloo, time in
    which this process was suspended does not count. Collectives raise CollectiveError naming the ranks that give no sign
    of life.
    """

    rank: int = 0
    size: int = 1
    device: torch.device = torch.device("cpu")
    strict: bool = False
    timeout_s: float = 600.0
    group: Any = field(default=None, compare=False, repr=False)

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, the only one that prints and writes shared files."""
        return self.rank == 0

    def aside(self) -> World:
        """The same ranks in a gloo group of their own, for a thread whose collectives must not mix with training's."""
        if self.size == 1:
            return self
        group = dist.new_group(backend="gloo", timeout=datetime.timedelta(seconds=self.timeout_s))
        dist.distributed_c10d._set_pg_timeout(PATIENCE, group)
        return dataclasses.replace(self, group=group)

    @property
    def over_gloo(self) -> bool:
        """Whether the ranks talk over gloo, else NCCL."""
        return self.group is not None or self.device.type != "cuda"

    def all_reduce(self, tensor: Tensor, op: str = "sum") -> Handle:
        """Reduce `tensor` in place over all ranks. op: sum, max or min."""
        if self.size == 1:
            return Handle()
        if self.strict and op == "sum":
            full, gathering = self.all_gather(tensor[None])
            return Handle(gathering.wait, lambda: tensor.copy_(tree_sum(full.unbind())))
        ops = {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX, "min": dist.ReduceOp.MIN}
        return self._started(lambda: dist.all_reduce(tensor, ops[op], group=self.group, async_op=True))

    def reduce_scatter(self, full: Tensor) -> tuple[Tensor, Handle]:
        """Start summing `full` (size * n, ...) over ranks; the part holds this rank's n rows once the handle is done."""
        if self.size == 1:
            return full, Handle()
        part = full.new_empty(len(full) // self.size, *full.shape[1:])
        if self.strict:
            parts = torch.empty_like(full)  # my n rows as each rank has them
            swap = self._started(
                lambda: dist.all_to_all_single(parts, full.contiguous(), group=self.group, async_op=True)
            )
            return part, Handle(swap.wait, lambda: part.copy_(tree_sum(parts.chunk(self.size))))
        if self.over_gloo:  # whose own is the same, in one wait that nothing can bound
            whole = full.clone()
            return part, Handle(self.all_reduce(whole).wait, lambda: part.copy_(whole.chunk(self.size)[self.rank]))
        call = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
        return part, self._started(lambda: call(part, full.contiguous(), group=self.group, async_op=True))

    def all_gather(self, part: Tensor) -> tuple[Tensor, Handle]:
        """Start concatenating every rank's `part` (n, ...) into (size * n, ...), complete once the handle is done."""
        if self.size == 1:
            return part, Handle()
        full = part.new_empty(len(part) * self.size, *part.shape[1:])
        call = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
        return full, self._started(lambda: call(full, part.contiguous(), group=self.group, async_op=True))

    def gather_objects(self, value: Any) -> list[Any]:
        """Every rank's picklable `value`, in rank order, on every rank. Also a barrier."""
        if self.size == 1:
            return [value]
        c10d, place = dist.distributed_c10d, torch.device("cpu") if self.over_gloo else self.device
        mine, size = c10d._object_to_tensor(value, place, self.group)
        sizes, gathering = self.all_gather(size)
        gathering.wait()
        longest = int(sizes.max())
        texts, gathering = self.all_gather(torch.nn.functional.pad(mine, (0, longest - len(mine))))
        gathering.wait()
        texts = texts.cpu().view(self.size, longest)
        return [c10d._tensor_to_object(text, int(size), self.group) for text, size in zip(texts, sizes, strict=True)]

    def from_main(self, value: Any) -> Any:
        """Rank 0's picklable `value`, on every rank. Also a barrier."""
        return self.gather_objects(value if self.is_main else None)[0]

    def on_main(self, work: Callable[[], T]) -> T:
        """The result of `work`, which rank 0 alone does, on every rank; picklable. Its UserError is raised on all."""
        outcome: T | UserError = self.from_main(_attempt(work) if self.is_main else None)
        if isinstance(outcome, UserError):
            raise outcome
        return outcome

    def on_all(self, work: Callable[[], T]) -> T:
        """This rank's result of `work`, which all ranks do. The UserError of the first that has one is raised on all."""
        outcome = _attempt(work)
        faults = self.gather_objects(outcome if isinstance(outcome, UserError) else None)
        if fault := next(filter(None, faults), None):
            raise fault
        return cast(T, outcome)

    def check_agreement(self, facts: Mapping[str, Any]) -> None:
        """CollectiveError unless all ranks have the same facts, by name."""
        for rank, theirs in enumerate(self.gather_objects(facts)):
            differ = [name for name in facts if theirs.get(name) != facts[name]]
            if differ:
                raise CollectiveError(
                    f"ranks {self.rank} and {rank} differ in {', '.join(differ)}; start all with one command"
                )

    def _started(self, start: Callable[[], Any]) -> Handle:
        with self._noticing_the_lost():
            work = start()

        def finish() -> None:
            with self._noticing_the_lost():
                if self.over_gloo:
                    _wait_awake(work, self.timeout_s)
                else:
                    work.wait()

        return Handle(finish)

    @contextmanager
    def _noticing_the_lost(self) -> Iterator[None]:
        """Turn what a backend raises when a rank is dead or late into a CollectiveError that names it."""
        try:
            yield
        except RuntimeError as fault:
            said = f"{self._call_roll()} ({in_a_line(fault)})"
            _abandon_groups()
            raise CollectiveError(f"{said}; start all ranks again with --resume") from fault

    def _call_roll(self) -> str:
        """The ranks that do not respond. The store answers for the others; a store that is gone died with its host, rank 0."""
        others = [rank for rank in range(self.size) if rank != self.rank]
        try:
            store = dist.distributed_c10d._get_default_store()
            store.set(f"alive/{self.rank}", "yes")
            with suppress(RuntimeError):
                store.wait([f"alive/{rank}" for rank in others], datetime.timedelta(seconds=ROLL_CALL_S))
            lost = [rank for rank in others if not store.check([f"alive/{rank}"])]
        except RuntimeError:
            return f"rank {self.rank} lost the process that the ranks meet at, rank 0 or torchrun"
        named = ", ".join(map(str, lost))
        return f"no response from rank {named}" if lost else f"rank {self.rank} lost connection to the other ranks"

    def barrier(self) -> None:
        """Wait until every rank is here."""
        self.gather_objects(None)


def _attempt(work: Callable[[], T]) -> T | UserError:
    try:
        return work()
    except UserError as fault:
        return fault


_abandoned: list[Any] = []  # groups in which a rank was lost


def _abandon_groups() -> None:
    """Have nothing wait for gloo's threads, which keep waiting for lost ranks: no destructor, nor the end of the process."""
    if not _abandoned:
        atexit.register(_end_at_once)
    _abandoned.extend(dist.distributed_c10d._world.pg_map)


def _end_at_once() -> None:
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError, AttributeError):  # full, closed, or None
            stream.flush()
    os._exit(CollectiveError.exit_code)


def _wait_awake(work: Any, timeout_s: float) -> None:
    """Wait for a collective over gloo for `timeout_s` of the time in which this process runs.

    No rank counts as lost because a whole job was suspended: however long that was, it counts as one look.
    """
    for _ in range(math.ceil(timeout_s / LOOK_S)):
        try:
            work.wait(datetime.timedelta(seconds=min(timeout_s, LOOK_S)))
            return
        except RuntimeError:
            if work.is_completed():  # just now, or by a fault, which comes again
                work.wait()
                return
    raise RuntimeError(f"nothing came for {timeout_s:g} s")


def told_of_slurm() -> str:
    """The error where Slurm has several tasks and this one does not know the others, or nothing."""
    if {"RANK", "WORLD_SIZE"} & set(os.environ):
        return ""
    tasks = max(env_int("SLURM_STEP_NUM_TASKS", 1), env_int("SLURM_NTASKS", 1))
    if tasks < 2:
        return ""
    return (
        f"Slurm has {tasks} tasks here, and RANK and WORLD_SIZE are not set: each would train a run of its own. For one run, "
        "start one task per node, srun --ntasks-per-node=1 torchrun --nproc_per_node=GPUS ...; for several, set WORLD_SIZE=1"
    )


def join_world(device: str = "auto", timeout_s: float = 600.0, strict: bool = False) -> World:
    """Join the process group that torchrun's environment describes, or be a world of one without it.

    Uses NCCL on CUDA and gloo elsewhere. Every restart of torchrun gets a fresh key space, because the shared store still
    holds the addresses of the dead. Raises ConfigError for a broken environment, and in one of several tasks that srun
    started without a launcher. (A script that sbatch runs is one of one, with the number of tasks it may start.)
    """
    if (env_int("SLURM_STEP_NUM_TASKS", 1) > 1 or env_int("SLURM_PROCID", 0) > 0) and (lonely := told_of_slurm()):
        raise ConfigError(lonely)
    rank, size = env_int("RANK", 0), env_int("WORLD_SIZE", 1)
    if not 0 <= rank < size:
        raise ConfigError(f"environment has RANK={rank} but WORLD_SIZE={size}; RANK must be from 0 to {size - 1}")
    chosen = pick_device(device)
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    if size > 1 and not dist.is_initialized():
        missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
        if missing:
            raise ConfigError(f"WORLD_SIZE={size} but {', '.join(missing)} is not set; start with torchrun")
        env_int("MASTER_PORT", 0)
        timeout = datetime.timedelta(seconds=timeout_s)
        try:
            store, rank, size = next(dist.rendezvous("env://", timeout=timeout))
            store = dist.PrefixStore("attempt" + os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
            backend = "nccl" if chosen.type == "cuda" else "gloo"
            dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout)
            if backend == "gloo":
                dist.distributed_c10d._set_pg_timeout(PATIENCE)
        except RuntimeError as fault:
            where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
            raise CollectiveError(
                f"rank {rank} of {size} cannot meet the others at {where} ({in_a_line(fault, 200)}); check that "
                "all ranks start and that the port is free"
            ) from fault
    return World(rank, size, chosen, strict, timeout_s)


_left = False


def leave_world() -> None:
    """Leave the process group, if this process is in one."""
    global _left
    if dist.is_initialized():
        dist.destroy_process_group()
        _left = True


def has_left() -> bool:
    """Whether this process was one of several. Threads of its group may outlive the group for a moment."""
    return _left


def stop_with_parent() -> None:
    """On Linux, have the kernel send PARENT_DIED to this process when its parent dies: torchrun's ranks become no orphans.

    It comes once for every thread of the parent that another one outlives, so how often says nothing.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, PARENT_DIED)  # 1 is PR_SET_PDEATHSIG
