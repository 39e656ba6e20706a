"""Run a function on several gloo ranks: forked processes that meet as torchrun's do, in a tenth of a second."""

from __future__ import annotations

import os
import pickle
import signal
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from faults.harness import fork_together
from torch.distributed import TCPStore

from speedrun_mup.core.utils import World, join_world, leave_world

T = TypeVar("T")


def new_store() -> TCPStore:
    """A meeting place on a port that is free, kept by this process as torchrun's agent does."""
    return TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


def run_ranks(
    size: int,
    work: Callable[[World], T],
    timeout_s: float = 180.0,
    store: TCPStore | None = None,
    join_timeout_s: float | None = None,
    lost: Sequence[int] = (),
) -> list[T | None]:
    """What `work` returns (picklable) on each of `size` ranks. `store` is for a group that is not the first there.

    join_timeout_s: of collectives, if not `timeout_s`. lost: ranks that need not come to an end; theirs is None. Raises
    RuntimeError as soon as another fails, with its traceback, or when the time is up. No rank outlives this.
    """
    store = store or new_store()
    environment = {
        "WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",  # the store exists already: all ranks are clients of it
    }
    with tempfile.TemporaryDirectory() as folder:
        answers = [Path(folder, str(rank)) for rank in range(size)]

        def live(rank: int) -> None:
            torch.set_num_threads(1)
            os.environ.update(environment, RANK=str(rank), LOCAL_RANK=str(rank))
            answer: tuple[bool, Any]
            try:
                answer = True, work(join_world("cpu", join_timeout_s or timeout_s))
                leave_world()
            except Exception:
                answer = False, traceback.format_exc()
            answers[rank].write_bytes(pickle.dumps(answer))
            os._exit(not answer[0])

        pids = fork_together([partial(live, rank) for rank in range(size)])
        ranks = {pid: rank for rank, pid in enumerate(pids)}
        awaited = {pid: rank for pid, rank in ranks.items() if rank not in lost}
        given_up = [pid for pid in ranks if pid not in awaited]
        try:
            _wait(awaited, answers, time.monotonic() + timeout_s)
        finally:
            for pid in [*awaited, *given_up]:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
        return [pickle.loads(path.read_bytes())[1] if path.exists() else None for path in answers]


def _wait(ranks: dict[int, int], answers: list[Path], deadline: float) -> None:
    """Take each rank that ends well out of `ranks`; raise for one that does not."""
    while ranks:
        for pid, rank in list(ranks.items()):
            ended, status = os.waitpid(pid, os.WNOHANG)
            if not ended:
                continue
            del ranks[pid]
            if status:
                said = pickle.loads(answers[rank].read_bytes())[1] if answers[rank].exists() else f"status {status}"
                raise RuntimeError(f"rank {rank} failed: {said}")
        if time.monotonic() > deadline:
            raise RuntimeError(f"rank {min(ranks.values())} did not end in time")
        time.sleep(0.002)
