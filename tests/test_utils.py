"""A world of one needs no process group, a world of several adds up, and a broken environment is said in one line."""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
import time
from functools import partial

import pytest
import torch
from faults.harness import fork_together
from helpers.dist import new_store, run_ranks

from speedrun_mup.core.errors import CollectiveError, ConfigError, NonFiniteError, UserError
from speedrun_mup.core.utils import (
    TreeSum,
    World,
    generator,
    has_triton,
    join_world,
    leave_world,
    pick_device,
    seed_for,
    told_of_slurm,
    tree_sum,
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


def test_a_rank_touches_no_gpu_but_its_own(monkeypatch, environment):
    """A process that touches a GPU takes a few hundred MB there: eight of them on the first one are gigabytes."""
    touched = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch, "empty", lambda size, device: touched.append(device))
    environment(LOCAL_RANK="2")
    assert pick_device() == pick_device("cuda") == torch.device("cuda", 2)
    assert touched == [torch.device("cuda", 2)] * 2
    environment(LOCAL_RANK="4")
    with pytest.raises(ConfigError, match="LOCAL_RANK=4 but this machine has 4 GPUs; use --nproc_per_node=4"):
        pick_device()


def test_every_user_error_has_its_own_exit_code():
    codes = [error.exit_code for error in (UserError, ConfigError, NonFiniteError, CollectiveError)]
    assert codes == [1, 2, 5, 6]


# Sums


def neighbours(terms: list[str]) -> str:
    """How `tree_sum` puts brackets, by recursion: the largest power of two that leaves something goes to the left."""
    if len(terms) == 1:
        return terms[0]
    left = 1 << ((len(terms) - 1).bit_length() - 1)
    return f"({neighbours(terms[:left])}+{neighbours(terms[left:])})"


def test_tree_sums_by_neighbours_whether_at_once_or_one_by_one():
    generator = torch.Generator().manual_seed(0)
    for n in range(1, 20):
        terms = [torch.randn(50, generator=generator) * 10.0**i for i in range(n)]
        brackets = neighbours([f"t{i}" for i in range(n)])
        expected = eval(brackets, {f"t{i}": term for i, term in enumerate(terms)})
        assert torch.equal(tree_sum(terms), expected)
        tree = TreeSum()
        for term in terms:
            tree.add([term.clone(), term[:3].clone()])
        total, start = tree.total()
        assert torch.equal(total, expected) and torch.equal(start, expected[:3])
        for block in (2, 4, 8):  # what ranks with `block` terms each would do
            if n % block == 0:
                assert torch.equal(
                    tree_sum([tree_sum(terms[i : i + block]) for i in range(0, n, block)]), tree_sum(terms)
                )


def _strict_sums(world: World) -> list[torch.Tensor]:
    """One number of each rank's many, whose sum depends on the order."""
    strict = dataclasses.replace(world, strict=True)
    mine = torch.randn(12, generator=torch.Generator().manual_seed(world.rank)) * 1000.0**world.rank
    total = mine.clone()
    strict.all_reduce(total).wait()
    part, handle = strict.reduce_scatter(mine.view(4, 3))
    handle.wait()
    full, gathering = strict.all_gather(part)
    gathering.wait()
    return [total, full.flatten()]


@pytest.mark.dist
def test_sums_of_a_strict_world_are_trees():
    terms = [torch.randn(12, generator=torch.Generator().manual_seed(rank)) * 1000.0**rank for rank in range(4)]
    for answers in run_ranks(4, _strict_sums):
        for answer in answers:
            assert torch.equal(answer, tree_sum(terms))


# Lost ranks


def _lose_rank_1(how: str, world: World) -> str:
    """What the others are told when rank 1 does not come to a collective."""
    world.barrier()
    if world.rank == 1:
        if how == "dies":
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(60)
    try:
        total = torch.ones(3)
        world.all_reduce(total).wait()
    except CollectiveError as fault:
        return str(fault)
    return "no error"


@pytest.mark.dist
@pytest.mark.parametrize("how", ["dies", "hangs"])
def test_the_others_name_a_rank_that_is_lost(how, monkeypatch):
    monkeypatch.setattr("speedrun_mup.core.distributed.ROLL_CALL_S", 1.0)
    begun = time.monotonic()
    told = run_ranks(3, partial(_lose_rank_1, how), join_timeout_s=8, lost=[1])
    assert time.monotonic() - begun < 30
    for rank in (0, 2):
        assert told[rank].startswith("no response from rank 1 (") and "\n" not in told[rank]
        assert told[rank].endswith("; start all ranks again with --resume")


def _be_suspended(world: World) -> object:
    """What comes of a collective in which all ranks are suspended for longer than it may take."""
    ranks = " ".join(map(str, world.gather_objects(os.getpid())))
    if world.is_main:
        subprocess.Popen(["sh", "-c", f"sleep 0.3; kill -STOP {ranks}; sleep 4; kill -CONT {ranks}"])
    else:
        for _ in range(15):
            time.sleep(0.1)
    try:
        return world.gather_objects(world.rank)
    except CollectiveError as fault:
        return str(fault)


@pytest.mark.dist
def test_the_time_in_which_a_whole_group_was_suspended_does_not_count():
    begun = time.monotonic()
    assert run_ranks(2, _be_suspended, join_timeout_s=3) == [[0, 1], [0, 1]]
    assert time.monotonic() - begun > 4  # they were


END = """
import sys, time
from speedrun_mup.core.errors import CollectiveError
from speedrun_mup.core.utils import join_world, leave_world
world = join_world("cpu", 2)
world.barrier()
if world.rank == 1:
    time.sleep(120)
try:
    world.barrier()
except CollectiveError as fault:
    print(fault)
leave_world()
"""


@pytest.mark.dist
def test_a_process_that_lost_a_rank_ends_though_gloo_waits_on(environment):
    store = new_store()
    environment(WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(store.port))
    shared = os.environ | {"TORCHELASTIC_USE_AGENT_STORE": "True"}
    ranks = [
        subprocess.Popen([sys.executable, "-c", END], env=shared | {"RANK": rank}, stdout=subprocess.PIPE)
        for rank in "01"
    ]
    try:
        said, _ = ranks[0].communicate(timeout=60)
    finally:
        for rank in ranks:
            rank.kill()
            rank.communicate()
    assert ranks[0].returncode == CollectiveError.exit_code and b"no response from rank 1 (" in said


def test_a_port_that_nobody_answers_at_is_one_line(environment):
    environment(WORLD_SIZE="2", RANK="1", MASTER_ADDR="127.0.0.1", MASTER_PORT="9")
    with pytest.raises(CollectiveError, match=r"rank 1 of 2 cannot meet the others at 127.0.0.1:9 \(") as caught:
        join_world("cpu", timeout_s=1)
    assert "\n" not in str(caught.value)


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
        "joined again": join_world("cpu", world.timeout_s) == world,
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
    monkeypatch.setattr("helpers.dist.join_world", join_late)
    for attempt in ("0", "1"):
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", attempt)
        assert run_ranks(2, lambda world: world.gather_objects(world.rank), 10, store) == [[0, 1]] * 2


@pytest.mark.dist
def test_the_helper_reports_a_rank_that_fails_and_ends_one_that_hangs(monkeypatch):
    pids: list[int] = []
    monkeypatch.setattr(
        "helpers.dist.fork_together", lambda works: pids.extend(started := fork_together(works)) or started
    )

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


@pytest.mark.skipif(torch.cuda.is_available(), reason="takes a machine without a GPU for one where kernels fail")
def test_kernels_that_fail_are_not_used_and_the_warning_says_why():
    has_triton.cache_clear()
    assert not has_triton(torch.device("cpu"))
    with pytest.warns(UserWarning, match=r"torch's kernels instead of ours in Triton, which fail here: \w+: \S"):
        assert not has_triton(torch.device("cuda", 0))
    has_triton.cache_clear()


@pytest.mark.parametrize("task", [0, 1])
def test_a_task_of_several_that_knows_of_no_other_is_refused(monkeypatch, task):
    """srun -n 2 python train.py would train the same run twice."""
    for name, value in {"SLURM_NTASKS": "2", "SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": str(task)}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match="Slurm has 2 tasks here, and RANK and WORLD_SIZE are not set") as fault:
        join_world("cpu")
    assert "\n" not in str(fault.value)
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert join_world("cpu").size == 1


def test_a_batch_script_of_a_job_with_several_tasks_is_told_and_goes_on(monkeypatch):
    assert told_of_slurm() == ""
    for name, value in {"SLURM_NTASKS": "2", "SLURM_PROCID": "0"}.items():
        monkeypatch.setenv(name, value)
    assert join_world("cpu").size == 1 and "each would train a run of its own" in told_of_slurm()
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert told_of_slurm() == ""
