"""A world of one needs no process group, a world of several adds up, and a broken environment is said in one line."""

from __future__ import annotations

import os
import time

import pytest
import torch
from dist import new_store, run_ranks
from faults.harness import fork

from speedrun_mup.core.utils import (
    CollectiveError,
    ConfigError,
    NonFiniteError,
    UserError,
    World,
    generator,
    join_world,
    leave_world,
    pick_device,
    seed_for,
)

TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


@pytest.fixture
def environment(monkeypatch):
    """environment(RANK="0", ...): only these of torchrun's variables are set."""

    def make(**variables: str) -> None:
        for name in TORCHRUN:
            monkeypatch.delenv(name, raising=False)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    return make


# One process


def test_in_a_world_of_one_every_collective_is_the_identity():
    world = World()
    x = torch.arange(6.0)
    kept = x.clone()
    for op in ("sum", "max", "min"):
        world.all_reduce(x, op).wait()
    for call in (world.reduce_scatter, world.all_gather):
        same, handle = call(x)
        handle.wait()
        handle.wait()  # waiting again is harmless
        assert same is x and torch.equal(x, kept)
    value = object()
    assert world.gather_objects(value) == [value] and world.from_main(value) is value
    world.barrier()
    assert world.is_main and not World(1, 2).is_main


def test_without_torchrun_a_process_is_a_world_of_one(environment):
    environment()
    assert join_world("cpu") == World(0, 1, torch.device("cpu"))
    assert not torch.distributed.is_initialized()
    leave_world()


@pytest.mark.parametrize(
    ("variables", "says"),
    [
        ({"WORLD_SIZE": "2", "RANK": "0"}, "WORLD_SIZE=2 but MASTER_ADDR, MASTER_PORT is not set; start with torchrun"),
        ({"WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}, "WORLD_SIZE=2 but RANK is not set"),
        ({"WORLD_SIZE": "2", "RANK": "2"}, "RANK=2 but WORLD_SIZE=2; RANK must be from 0 to 1"),
        ({"WORLD_SIZE": "2", "RANK": "-1"}, "RANK=-1 but WORLD_SIZE=2"),
        ({"RANK": "1"}, "RANK=1 but WORLD_SIZE=1"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE='two' is not a number; start with torchrun or unset it"),
        ({"RANK": ""}, "RANK='' is not a number"),
        ({"LOCAL_RANK": "1.0"}, "LOCAL_RANK='1.0' is not a number"),
        (
            {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "http"},
            "MASTER_PORT='http' is not a number",
        ),
    ],
)
def test_a_broken_environment_is_a_config_error_of_one_line(environment, variables, says):
    environment(**variables)
    with pytest.raises(ConfigError) as caught:
        join_world("cpu", timeout_s=1)
    assert says in str(caught.value) and "\n" not in str(caught.value)
    assert not torch.distributed.is_initialized()


def test_pick_device():
    assert pick_device("cpu") == torch.device("cpu")
    assert pick_device().type in ("cuda", "mps", "cpu")
    for name in ("gpu", "cuda:99"):
        with pytest.raises(ConfigError, match=f"device={name} is not usable here .*; try --device cpu") as caught:
            pick_device(name)
        assert "\n" not in str(caught.value)


def test_every_user_error_has_its_own_exit_code():
    codes = [error.exit_code for error in (UserError, ConfigError, NonFiniteError, CollectiveError)]
    assert codes == [1, 2, 5, 6]


# Seeds


def test_seeds_depend_on_their_arguments_only_and_never_change():
    assert seed_for(0) == 3582888934675442504
    assert seed_for(1234, "init", "embed.weight") == 1011096170252221381
    seeds = {seed_for(*args) for args in ((0,), (1,), (0, "init"), (0, "init", 1), (0, "init", "1"), (0, ("init", 1)))}
    assert len(seeds) == 6 and all(0 <= seed < 2**63 for seed in seeds)


def test_generators_give_the_same_bits_whatever_the_global_state():
    first = torch.rand(3, generator=generator(7, "data", 3))
    torch.manual_seed(99)
    assert torch.equal(first, torch.rand(3, generator=generator(7, "data", 3)))
    assert not torch.equal(first, torch.rand(3, generator=generator(7, "data", 4)))


# Several processes


def _collectives(world: World) -> dict[str, object]:
    rank, size = world.rank, world.size
    full = torch.arange(2.0 * size).view(size, 2) * 10**rank
    part, scattering = world.reduce_scatter(full)
    rows, gathering = world.all_gather(torch.full((2, 3), float(rank)))
    reduced = {}
    for op in ("sum", "max", "min"):
        reduced[op] = torch.tensor(float(rank + 1))
        world.all_reduce(reduced[op], op).wait()
    scattering.wait()
    gathering.wait()
    view, strided = world.all_gather(torch.arange(4.0).view(2, 2).t() + 10 * rank)  # not contiguous
    strided.wait()
    world.barrier()
    return {
        "world": (rank, size, world.is_main, str(world.device)),
        "part": part.tolist(),
        "rows": rows.tolist(),
        "view": view.tolist(),
        "reduced": {op: value.item() for op, value in reduced.items()},
        "objects": world.gather_objects({"rank": rank}),
        "from_main": world.from_main(f"said by {rank}"),
        "joined again": join_world("cpu") == world,
    }


@pytest.mark.dist
@pytest.mark.parametrize("size", [2, 3])
def test_collectives_over_gloo(size):
    total = sum(10**rank for rank in range(size))
    for rank, answer in enumerate(run_ranks(size, _collectives)):
        assert answer == {
            "world": (rank, size, rank == 0, "cpu"),
            "part": [[2.0 * rank * total, (2.0 * rank + 1) * total]],
            "rows": [[float(r)] * 3 for r in range(size) for _ in range(2)],
            "view": [[a + 10.0 * r, a + 2 + 10.0 * r] for r in range(size) for a in (0, 1)],
            "reduced": {"sum": size * (size + 1) / 2, "max": size, "min": 1},
            "objects": [{"rank": r} for r in range(size)],
            "from_main": "said by 0",
            "joined again": True,
        }


@pytest.mark.dist
def test_a_restarted_group_meets_in_a_fresh_key_space(monkeypatch):
    """The store outlives the first attempt and still holds its addresses when rank 0 of the second comes late."""

    def join_late(device: str, timeout_s: float) -> World:
        time.sleep(0.3 if os.environ["RANK"] == "0" else 0)
        return join_world(device, timeout_s)

    store = new_store()
    monkeypatch.setattr("dist.join_world", join_late)
    for attempt in ("0", "1"):
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", attempt)
        assert run_ranks(2, lambda world: world.gather_objects(world.rank), 10, store) == [[0, 1]] * 2


@pytest.mark.dist
def test_the_helper_reports_a_rank_that_fails_and_ends_one_that_hangs(monkeypatch):
    pids: list[int] = []
    monkeypatch.setattr("dist.fork", lambda work: pids.append(fork(work)) or pids[-1])

    def fail(world: World) -> None:
        if world.rank == 1:
            raise ArithmeticError("rank 1 gives up")
        time.sleep(60)

    def hang(world: World) -> None:
        time.sleep(60)

    def die(world: World) -> None:
        os._exit(3)

    began = time.monotonic()
    with pytest.raises(RuntimeError, match=r"rank 1 failed: (?s:.)*ArithmeticError: rank 1 gives up"):
        run_ranks(2, fail)
    with pytest.raises(RuntimeError, match="rank 0 did not end in time"):
        run_ranks(2, hang, timeout_s=1)
    with pytest.raises(RuntimeError, match=r"rank [01] failed: status"):
        run_ranks(2, die)
    assert time.monotonic() - began < 20
    assert len(pids) == 6
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
