"""The world a process lives in (rank, size, device) and stateless seeds.

One process is a group of one: every collective below is the identity at size 1 and needs no process group there.
"""

from __future__ import annotations

import datetime
import hashlib
import os
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from speedrun_mup.core.errors import CollectiveError as CollectiveError
from speedrun_mup.core.errors import ConfigError as ConfigError
from speedrun_mup.core.errors import NonFiniteError as NonFiniteError
from speedrun_mup.core.errors import UserError as UserError


class Handle:
    """A collective under way. `wait()` blocks until its result is in place; gloo has no futures for reduce-scatter."""

    def __init__(self, work: Any = None):
        self._work = work

    def wait(self) -> None:
        """Block until the result is in place."""
        if self._work is not None:
            self._work.wait()
        self._work = None


@dataclass(frozen=True)
class World:
    """This process among its peers: `rank` of `size`, computing on `device`. Build one with `join_world`."""

    rank: int = 0
    size: int = 1
    device: torch.device = torch.device("cpu")

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, the only one that prints and writes shared files."""
        return self.rank == 0

    def all_reduce(self, tensor: Tensor, op: str = "sum") -> Handle:
        """Reduce `tensor` in place over all ranks. op: sum, max or min."""
        if self.size == 1:
            return Handle()
        ops = {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX, "min": dist.ReduceOp.MIN}
        return Handle(dist.all_reduce(tensor, ops[op], async_op=True))

    def reduce_scatter(self, full: Tensor) -> tuple[Tensor, Handle]:
        """Start summing `full` (size * n, ...) over ranks; the part holds this rank's n rows once the handle is done."""
        if self.size == 1:
            return full, Handle()
        part = full.new_empty(len(full) // self.size, *full.shape[1:])
        call = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
        return part, Handle(call(part, full.contiguous(), async_op=True))

    def all_gather(self, part: Tensor) -> tuple[Tensor, Handle]:
        """Start concatenating every rank's `part` (n, ...) into (size * n, ...), complete once the handle is done."""
        if self.size == 1:
            return part, Handle()
        full = part.new_empty(len(part) * self.size, *part.shape[1:])
        call = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
        return full, Handle(call(full, part.contiguous(), async_op=True))

    def gather_objects(self, value: Any) -> list[Any]:
        """Every rank's picklable `value`, in rank order, on every rank. Also a barrier."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def from_main(self, value: Any) -> Any:
        """Rank 0's picklable `value`, on every rank. Also a barrier for all but rank 0."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, device=self.device if self.device.type == "cuda" else None)
        return box[0]

    def barrier(self) -> None:
        """Wait until every rank is here."""
        self.gather_objects(None)


def pick_device(name: str = "auto") -> torch.device:
    """The torch device called `name`; "auto" takes CUDA, else MPS, else CPU. ConfigError if it is not on this machine."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        torch.empty(1, device=name)
    except (RuntimeError, AssertionError) as fault:
        raise ConfigError(
            f"device={name} is not usable here ({str(fault).splitlines()[0]}); try --device cpu"
        ) from None
    return torch.device(name)


def _env_int(name: str, default: int) -> int:
    text = os.environ.get(name, str(default))
    try:
        return int(text)
    except ValueError:
        raise ConfigError(
            f"environment variable {name}={text!r} is not a number; start with torchrun or unset it"
        ) from None


def join_world(device: str = "auto", timeout_s: float = 600.0) -> World:
    """Join the process group that torchrun's environment describes, or be a world of one without it.

    Uses NCCL on CUDA and gloo elsewhere. Every restart of torchrun gets a fresh key space, because the shared store still
    holds the addresses of the dead (pytorch issue 135712). Raises ConfigError for a broken environment.
    """
    rank, size, local_rank = _env_int("RANK", 0), _env_int("WORLD_SIZE", 1), _env_int("LOCAL_RANK", 0)
    if not 0 <= rank < size:
        raise ConfigError(f"environment has RANK={rank} but WORLD_SIZE={size}; RANK must be from 0 to {size - 1}")
    chosen = pick_device(device)
    if chosen.type == "cuda":
        if local_rank >= torch.cuda.device_count():
            have = torch.cuda.device_count()
            raise ConfigError(f"LOCAL_RANK={local_rank} but this machine has {have} GPUs; use --nproc_per_node={have}")
        chosen = torch.device("cuda", local_rank)
        torch.cuda.set_device(chosen)
    if size > 1 and not dist.is_initialized():
        missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
        if missing:
            raise ConfigError(f"WORLD_SIZE={size} but {', '.join(missing)} is not set; start with torchrun")
        _env_int("MASTER_PORT", 0)
        timeout = datetime.timedelta(seconds=timeout_s)
        store, rank, size = next(dist.rendezvous("env://", timeout=timeout))
        store = dist.PrefixStore("attempt" + os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
        backend = "nccl" if chosen.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout)
    return World(rank, size, chosen)


def leave_world() -> None:
    """Leave the process group, if this process is in one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def seed_for(seed: int, *purpose: object) -> int:
    """A 63-bit seed that depends only on its arguments: randomness needs no state to be saved, whatever the rank."""
    digest = hashlib.sha256(repr((seed, *purpose)).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def generator(seed: int, *purpose: object) -> torch.Generator:
    """A CPU generator seeded by `seed_for`. Initialise on the CPU with it and every device starts from the same bits."""
    return torch.Generator().manual_seed(seed_for(seed, *purpose))
