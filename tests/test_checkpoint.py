from __future__ import annotations

import errno
import json
import math
import os
import re
import resource
import shutil
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from faults.harness import count_calls, dice, die_at, fail_at, fork, on_ranks, path_of, repeats, tapped, wait
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

import speedrun_mup
from speedrun_mup.core.errors import ConfigError
from speedrun_mup.core.utils import World
from speedrun_mup.export.dcp import import_dcp
from speedrun_mup.export.record import import_pt
from speedrun_mup.training.checkpoint import (
    MANIFEST,
    MODEL,
    STATE,
    CheckpointError,
    Checkpoints,
    DamagedCheckpoint,
    Loaded,
    Slice,
    check_match,
    list_checkpoints,
)
from speedrun_mup.training.checkpoint_manifest import json_bytes, json_with_digest

KILLS = repeats(20)  # lives ended at a random time
FLIPS = repeats(60)  # single bits
CUTS = repeats(20)  # truncations
RANK_KILLS = repeats(4)  # two-process lives that lose a rank

OPTIM_SIZES = {"embed/exp_avg": 35, "embed/exp_avg_sq": 35, "head/momentum": 12, "gate/exp_avg": 2}


def model_of(step: int) -> dict[str, Tensor]:
    """A model that only this step has."""
    return {
        "embed": torch.arange(35.0).view(7, 5) / 3 + step,
        "head": torch.arange(12.0).view(3, 4).to(torch.bfloat16) * step,
        "steps": torch.tensor(step),
    }


def optim_of(step: int, key: str) -> Tensor:
    """The whole of one optimizer state that only this step has."""
    return torch.arange(float(OPTIM_SIZES[key])) / 7 - step


def share(size: int, rank: int, ranks: int) -> tuple[int, int]:
    """[begin, end) of a rank, as DistAdam splits; empty on the last ranks if there is little."""
    part = -(-size // ranks)
    return min(rank * part, size), min(rank * part + part, size)


def slices_of(step: int, rank: int = 0, ranks: int = 1) -> dict[str, Slice]:
    """One rank's part of the optimizer."""
    found = {}
    for key, size in OPTIM_SIZES.items():
        begin, end = share(size, rank, ranks)
        found[key] = Slice(begin, end, optim_of(step, key)[begin:end])
    return found


def save(root: Path, step: int, world: World | None = None) -> Path:
    """Save the step that everybody knows, keeping two."""
    world = world or World()
    checkpoints = Checkpoints(root, world)
    return checkpoints.save(
        step, model_of(step), slices_of(step, world.rank, world.size), {"step": step, "loss": 1 / 3}
    )


def assert_is_step(loaded: Loaded, step: int) -> None:
    """Every byte of `loaded` is that of `step`."""
    assert loaded.step == step and loaded.state == {"step": step, "loss": 1 / 3}
    check_match(loaded.model, model_of(step))
    for name, tensor in model_of(step).items():
        assert torch.equal(loaded.model[name], tensor)
    assert loaded.optim_sizes == OPTIM_SIZES
    for key, size in OPTIM_SIZES.items():
        assert torch.equal(loaded.slice(key, 0, size), optim_of(step, key))


def newest(root: Path) -> Path:
    """The newest intact checkpoint, which must exist, with any number of reports."""
    found = Checkpoints(root, World()).newest(lambda line: None)
    assert found is not None
    return found


def names(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir())


def reseal(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change a manifest and make its seal good again, as somebody who knows the format could."""
    body = json.loads((folder / MANIFEST).read_bytes())
    del body["sha256"]
    change(body)
    (folder / MANIFEST).write_bytes(json_with_digest(body))


# --- round trips ---


DTYPES = [
    *(torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.float8_e4m3fn),
    *(torch.int64, torch.int32, torch.uint8, torch.uint16, torch.bool),
]


def raw(tensor: Tensor) -> Tensor:
    return tensor.flatten().view(torch.uint8)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_and_shape_comes_back_bitwise(tmp_path, dtype):
    bits = torch.randint(0, 2 if dtype == torch.bool else 256, (240,), dtype=torch.uint8).view(dtype)
    model = {"matrix": bits[:20].view(4, 5), "scalar": bits[3].clone(), "none": bits[:0].view(0, 3)}
    model["strided"] = model["matrix"].t()
    path = Checkpoints(tmp_path, World()).save(7, model, {"matrix/m": Slice(0, 20, bits[:20])}, {})
    loaded = Loaded(path)
    check_match(loaded.model, model)
    for name, tensor in model.items():
        assert torch.equal(raw(loaded.model[name]), raw(tensor))
    assert torch.equal(raw(loaded.slice("matrix/m", 2, 19)), raw(bits[2:19]))


@pytest.mark.slow
@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(value=st.floats(allow_nan=False, allow_infinity=False))
def test_state_floats_are_exact(value):
    assert math.copysign(1, json.loads(json_bytes(value))) == math.copysign(1, value)
    assert json.loads(json_bytes({"x": [value]})) == {"x": [value]}


@pytest.mark.parametrize("state", [{"x": math.nan}, {"x": math.inf}, {"x": (1, 2)}, {1: 2}, {"x": torch.ones(1)}])
def test_state_that_json_would_change_is_refused(tmp_path, state):
    with pytest.raises((ValueError, TypeError)):
        Checkpoints(tmp_path, World()).save(1, {}, {}, state)
    assert names(tmp_path) == []


def test_empty_model_and_optimizer(tmp_path):
    loaded = Loaded(Checkpoints(tmp_path, World()).save(0, {}, {}, {}))
    assert (loaded.model, loaded.optim_sizes, loaded.state, loaded.step) == ({}, {}, {}, 0)


@pytest.mark.parametrize("writers", [1, 2, 3, 5])
def test_any_number_of_ranks_reads_what_any_number_wrote(tmp_path, writers):
    paths = on_ranks(writers, lambda world: save(tmp_path, 9, world))
    assert paths == [tmp_path / "step-00000009"] * writers
    assert len(list(paths[0].glob("optim-*"))) == writers
    for readers in (1, 2, 3, 4):
        loaded = Loaded(newest(tmp_path))
        assert_is_step(loaded, 9)
        for rank in range(readers):
            for key, wanted in slices_of(9, rank, readers).items():
                got = loaded.slice(key, wanted.begin, wanted.end)
                assert torch.equal(got, wanted.tensor) and got.dtype == wanted.tensor.dtype


def test_a_chain_of_world_sizes_loses_nothing(tmp_path):
    save(tmp_path, 1)
    for step, ranks in ((2, 2), (3, 3), (4, 1)):

        def resume_and_save(world: World, step: int = step) -> Path:
            checkpoints = Checkpoints(tmp_path, world)
            loaded = checkpoints.load(checkpoints.newest(print))
            parts = {}
            for key, size in loaded.optim_sizes.items():
                begin, end = share(size, world.rank, world.size)
                parts[key] = Slice(begin, end, loaded.slice(key, begin, end))
            return checkpoints.save(step, loaded.model, parts, loaded.state)

        paths = on_ranks(ranks, resume_and_save)
        assert paths == [tmp_path / f"step-{step:08d}"] * ranks
    loaded = Loaded(paths[0])
    loaded.step = 1
    assert_is_step(loaded, 1)


@pytest.mark.slow
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    cuts=st.lists(st.integers(0, 40), min_size=1, max_size=4), reads=st.tuples(st.integers(0, 40), st.integers(0, 40))
)
def test_slices_equal_the_slow_way(tmp_path, cuts, reads):
    whole = torch.randn(40)
    edges = [0, *sorted(cuts), 40]
    root = Path(tempfile.mkdtemp(dir=tmp_path))

    def write(world: World) -> Path:
        begin, end = edges[world.rank], edges[world.rank + 1]
        return Checkpoints(root, world).save(1, {}, {"w/m": Slice(begin, end, whole[begin:end])}, {})

    paths = on_ranks(len(edges) - 1, write)
    begin, end = sorted(reads)
    assert torch.equal(Loaded(paths[0]).slice("w/m", begin, end), whole[begin:end])


@pytest.mark.parametrize("ranges", [[(0, 4), (3, 8)], [(0, 4), (5, 8)], [(1, 4), (4, 8)], [(0, 8), (0, 8)]])
def test_a_gap_or_an_overlap_stops_all_ranks(tmp_path, ranges):
    def write(world: World) -> Path:
        begin, end = ranges[world.rank]
        return Checkpoints(tmp_path, world).save(1, {}, {"w/m": Slice(begin, end, torch.zeros(end - begin))}, {})

    faults = on_ranks(2, write)
    assert all(isinstance(fault, CheckpointError) and "w/m leave a gap or overlap" in str(fault) for fault in faults)
    assert names(tmp_path) == []


def test_slice_checks_its_own_range():
    for begin, end, tensor in (
        (0, 3, torch.ones(2)),
        (2, 1, torch.ones(0)),
        (0, 4, torch.ones(2, 2)),
        (-1, 1, torch.ones(2)),
    ):
        with pytest.raises(ValueError, match="does not fit"):
            Slice(begin, end, tensor)


def test_asking_for_what_is_not_there(tmp_path):
    loaded = Loaded(save(tmp_path, 1))
    for key, begin, end in (("nobody/m", 0, 1), ("gate/exp_avg", 0, 3), ("gate/exp_avg", 2, 1)):
        with pytest.raises(CheckpointError, match=key):
            loaded.slice(key, begin, end)


def test_check_match_lists_the_keys():
    ones = torch.ones(2, 3)
    check_match({"a": ones}, {"a": ones.clone()})
    found = {"a": ones, "b": ones, "d": ones, "e": ones.bfloat16()}
    expected = {"a": ones, "b": ones.t(), "c": ones, "e": ones}
    with pytest.raises(CheckpointError) as fault:
        check_match(found, expected)
    for text in (
        "4 keys",
        "c is missing",
        "d is unexpected",
        "b is (2, 3) float32, not (3, 2)",
        "e is (2, 3) bfloat16",
    ):
        assert text in str(fault.value)
    assert "\n" not in str(fault.value) and fault.value.exit_code == 4


GOLDEN_1 = {  # written by version 0.1.0 on two ranks
    "model.safetensors": b"X\0\0\0\0\0\0\0"
    b'{"__metadata__":{"format":"pt"},"w":{"dtype":"BF16","shape":[2,1],"data_offsets":[0,4]}}\0\x3f\0\xc0',
    "optim-0000-of-0002.safetensors": b"X\0\0\0\0\0\0\0"
    b'{"__metadata__":{"format":"pt"},"w/m":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}} \0\0\x80\x3f\0\0\0\x40',
    "optim-0001-of-0002.safetensors": b"X\0\0\0\0\0\0\0"
    b'{"__metadata__":{"format":"pt"},"w/m":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}} \0\0\x40\x40',
    "state.json": b'{\n "loss": 0.1\n}',
    "manifest.json": b"""{
 "files": {
  "model.safetensors": {
   "sha256": "8d62f450a422d6672afec02e51ade0996ccc14f8d5feb2a32d27c1eb8c3011af",
   "size": 100
  },
  "optim-0000-of-0002.safetensors": {
   "sha256": "56dc4e0f73f2b5378506acd9a530954f39df3847398bedeed1dd32baa0ae7131",
   "size": 104
  },
  "optim-0001-of-0002.safetensors": {
   "sha256": "7d8e7bcb73e07163d6b047602f010cf204b9c2484d99c71c850a60981870f057",
   "size": 100
  },
  "state.json": {
   "sha256": "a082bde64c7afa6307902e3139d08e9a4531dc91f788315aaae9afe0821f923d",
   "size": 16
  }
 },
 "ranks": 2,
 "schema": 1,
 "sha256": "17a24662aa152e90eb4231848cab126e0a7caba4a6bbec64b97ee12df7febf5a",
 "slices": {
  "w/m": [
   [
    0,
    0,
    2
   ],
   [
    1,
    2,
    3
   ]
  ]
 },
 "step": 12,
 "written_by": "speedrun-mup 0.1.0"
}""",
}


def test_schema_1_stays_readable(tmp_path):
    folder = tmp_path / "step-00000012"
    folder.mkdir()
    for name, data in GOLDEN_1.items():
        (folder / name).write_bytes(data)
    loaded = Loaded(newest(tmp_path))
    assert (loaded.step, loaded.state, loaded.optim_sizes) == (12, {"loss": 0.1}, {"w/m": 3})
    check_match(loaded.model, {"w": torch.empty(2, 1, dtype=torch.bfloat16)})
    assert loaded.model["w"].tolist() == [[0.5], [-2.0]] and loaded.slice("w/m", 0, 3).tolist() == [1.0, 2.0, 3.0]


# --- the commit ---


def test_order_of_syncs_and_renames(tmp_path):
    for step in (1, 2):
        save(tmp_path, step)
    events: list[tuple[str, str]] = []
    lock = threading.Lock()

    def tap(name: str, args: tuple[Any, ...]) -> None:
        with lock:
            events.append((name, path_of(name, args)))

    with tapped(tap):
        on_ranks(2, lambda world: save(tmp_path, 3, world))
    temp, root = str(tmp_path / ".tmp-step-00000003"), str(tmp_path)
    data = [MODEL, STATE, "optim-0000-of-0002.safetensors", "optim-0001-of-0002.safetensors"]
    commit = events.index(("rename", temp))
    sealed = events.index(("write", f"{temp}/{MANIFEST}"))
    for name in data:
        written = max(i for i, event in enumerate(events) if event == ("write", f"{temp}/{name}"))
        assert written < events.index(("fsync", f"{temp}/{name}")) < sealed
    assert sealed < events.index(("fsync", f"{temp}/{MANIFEST}")) < events.index(("fsync", temp)) < commit
    assert commit < events.index(("fsync", root)) < events.index(("rename", str(tmp_path / "step-00000001")))
    unlinked = [i for i, (name, _) in enumerate(events) if name in ("unlink", "rmdir")]
    assert min(unlinked) > events.index(("rename", str(tmp_path / "step-00000001")))


def test_a_complete_step_is_kept_and_a_damaged_one_is_replaced(tmp_path):
    path = save(tmp_path, 5)
    before = {file.name: (file.read_bytes(), file.stat().st_mtime_ns) for file in path.iterdir()}
    Checkpoints(tmp_path, World()).save(5, {"other": torch.ones(3)}, {}, {})
    assert {file.name: (file.read_bytes(), file.stat().st_mtime_ns) for file in path.iterdir()} == before
    os.truncate(path / MODEL, 10)
    assert_is_step(Loaded(save(tmp_path, 5)), 5)


def test_purge_counts_only_intact_ones(tmp_path):
    for step in range(1, 6):
        Checkpoints(tmp_path, World(), keep_last=9).save(
            step, model_of(step), slices_of(step), {"step": step, "loss": 1 / 3}
        )
    (tmp_path / "step-00000005" / MANIFEST).unlink()
    os.truncate(tmp_path / "step-00000003" / STATE, 1)
    (tmp_path / "step-00000009").mkdir()  # newer than what is saved: not ours to judge
    (tmp_path / "notes.txt").write_text("mine")
    save(tmp_path, 6)
    assert names(tmp_path) == ["notes.txt", "step-00000004", "step-00000006", "step-00000009"]
    assert_is_step(Loaded(newest(tmp_path)), 6)


def test_milestones_stay(tmp_path):
    checkpoints = Checkpoints(tmp_path, World(), keep_last=3, milestone_every=10)
    for step in range(5, 46, 5):
        checkpoints.save(step, {}, {}, {})
    assert names(tmp_path) == [f"step-{step:08d}" for step in (10, 20, 30, 35, 40, 45)]


def test_keeping_one_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="keep_last=1"):
        Checkpoints(tmp_path, World(), keep_last=1)


def test_clean_removes_only_leftovers(tmp_path):
    save(tmp_path, 1)
    for leftover in (".tmp-step-00000002", ".trash-step-00000000"):
        shutil.copytree(tmp_path / "step-00000001", tmp_path / leftover)
    (tmp_path / ".tmp-other").touch()
    on_ranks(2, lambda world: Checkpoints(tmp_path, world).clean())
    assert names(tmp_path) == [".tmp-other", "step-00000001"]
    Checkpoints(tmp_path / "not there yet", World()).clean()


def test_leftovers_do_not_hinder_a_save(tmp_path):
    prepare(tmp_path, after_clean)
    save(tmp_path, 3)
    assert names(tmp_path) == ["step-00000002", "step-00000003"]


# --- crashes ---


def one_rank(root: Path) -> None:
    save(root, 3)


def two_ranks(root: Path) -> None:
    paths = on_ranks(2, lambda world: save(root, 3, world))
    assert paths == [root / "step-00000003"] * 2, paths


def over_damaged(root: Path) -> None:
    save(root, 3)


def after_clean(root: Path) -> None:
    Checkpoints(root, World()).clean()
    save(root, 3)


def prepare(root: Path, scenario: Callable[[Path], None]) -> None:
    """What is on the disk before a scenario: steps 1 and 2, and the leftovers or the damage that it is about."""
    for step in (1, 2):
        save(root, step)
    if scenario is over_damaged:
        shutil.copytree(root / "step-00000002", root / "step-00000003")
    if scenario is after_clean:
        shutil.copytree(root / "step-00000002", root / ".tmp-step-00000003")
        shutil.copytree(root / "step-00000002", root / ".trash-step-00000001")


SLOW = pytest.mark.slow
SCENARIOS = [one_rank, two_ranks, pytest.param(over_damaged, marks=SLOW), pytest.param(after_clean, marks=SLOW)]


@pytest.mark.slow
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_every_crash_point(tmp_path, scenario):
    prepare(tmp_path / "model", scenario)
    shutil.copytree(tmp_path / "model", tmp_path / "rehearsal")
    calls = count_calls(lambda: scenario(tmp_path / "rehearsal"))
    points = [(k, part) for k, name in enumerate(calls) for part in ((0.0, 0.5) if name == "write" else (0.0,))]
    assert len(points) >= 35
    for index, part in points:
        root = tmp_path / f"{index}-{part}"
        shutil.copytree(tmp_path / "model", root)

        def life(root: Path = root, index: int = index, part: float = part) -> None:
            with tapped(die_at(index, part)):
                scenario(root)

        assert wait(fork(life)) == -signal.SIGKILL, f"no death at call {index} of {calls}"
        survivor = Loaded(newest(root))
        assert_is_step(survivor, survivor.step)
        assert survivor.step in (2, 3)
        Checkpoints(root, World()).clean()
        assert all(re.fullmatch(r"step-\d{8}", name) for name in names(root))
        with tapped(lambda name, args: None):
            save(root, 4)
        assert names(root) == [f"step-{survivor.step:08d}", "step-00000004"]
        assert_is_step(Loaded(newest(root)), 4)
        shutil.rmtree(root)


@pytest.mark.slow
def test_random_kills(tmp_path):
    rng = dice(0)
    acknowledged = 0

    def life(reader: int, writer: int) -> None:
        os.close(reader)
        checkpoints = Checkpoints(tmp_path, World())
        checkpoints.clean()
        found = checkpoints.newest(lambda line: None)
        step = checkpoints.load(found).step if found else 0
        while True:
            step += 1
            state = {"step": step, "loss": 1 / 3}
            checkpoints.save(step, model_of(step), slices_of(step), state, wait=step % 2 == 0)
            checkpoints.poll(wait=True)
            os.write(writer, step.to_bytes(8, "little"))

    for trial in range(KILLS):
        reader, writer = os.pipe()
        child = fork(lambda reader=reader, writer=writer: life(reader, writer))
        os.close(writer)
        acks = os.read(reader, 8) if trial % 2 else b""  # half of the lives last for one save at least
        time.sleep(rng.uniform(0, 0.1))
        os.kill(child, signal.SIGKILL)
        assert wait(child) == -signal.SIGKILL
        while chunk := os.read(reader, 1 << 16):
            acks += chunk
        os.close(reader)
        acknowledged = int.from_bytes(acks[-8:], "little") if acks else acknowledged
        reports: list[str] = []
        found = Checkpoints(tmp_path, World()).newest(reports.append)
        assert reports == []
        if found is None:
            assert acknowledged == 0
        else:
            loaded = Loaded(found)
            assert_is_step(loaded, loaded.step)
            assert loaded.step >= acknowledged
    assert acknowledged >= KILLS // 2


# --- damage ---


def assert_unusable(folder: Path) -> None:
    """Loading raises, wherever the damage sits."""
    with pytest.raises(DamagedCheckpoint):
        loaded = Loaded(folder)
        for key, size in loaded.optim_sizes.items():
            loaded.slice(key, 0, size)


def assert_falls_back(root: Path, file: Path) -> str:
    """The newest is skipped with one line that names the file, and the one before is chosen, whole."""
    reports: list[str] = []
    found = Checkpoints(root, World()).newest(reports.append)
    assert found == root / "step-00000001"
    assert len(reports) == 1 and file.name in reports[0] and "step-00000002" in reports[0] and "\n" not in reports[0]
    assert_is_step(Loaded(found), 1)
    assert_unusable(file.parent)
    return reports[0]


@pytest.fixture
def two_steps(tmp_path) -> list[Path]:
    """The files of step 2, written by two ranks, with step 1 to fall back to."""
    for step in (1, 2):
        on_ranks(2, lambda world, step=step: save(tmp_path, step, world))
    files = sorted((tmp_path / "step-00000002").iterdir())
    assert len(files) == 5
    return files


@pytest.mark.slow
def test_flipped_bits_are_never_loaded(tmp_path, two_steps):
    rng = dice(1)
    for _ in range(FLIPS):
        file = rng.choice(two_steps)
        data = file.read_bytes()
        position = rng.randrange(8 * len(data))
        flipped = bytearray(data)
        flipped[position // 8] ^= 1 << position % 8
        file.write_bytes(flipped)
        assert_falls_back(tmp_path, file)
        file.write_bytes(data)
    assert_is_step(Loaded(newest(tmp_path)), 2)


@pytest.mark.slow
def test_truncated_longer_and_missing_files_are_never_loaded(tmp_path, two_steps):
    rng = dice(2)
    for trial in range(CUTS):
        file = two_steps[trial % len(two_steps)]
        data = file.read_bytes()
        length = [0, len(data) - 1][trial] if trial < 2 else rng.randrange(len(data))
        file.write_bytes(data[:length])
        assert_falls_back(tmp_path, file)
        file.write_bytes(data)
    for file in two_steps:
        data = file.read_bytes()
        file.write_bytes(data + b"\0")
        line = assert_falls_back(tmp_path, file)
        assert file.name == MANIFEST or f"has {len(data) + 1} bytes instead of {len(data)}" in line
        file.unlink()
        assert_falls_back(tmp_path, file)
        file.mkdir()
        assert_falls_back(tmp_path, file)
        file.rmdir()
        file.write_bytes(data)
    assert_is_step(Loaded(newest(tmp_path)), 2)


def test_swapped_files_and_renamed_folders_are_noticed(tmp_path):
    for step in (1, 2):
        save(tmp_path, step)
    shutil.copy(tmp_path / "step-00000001" / STATE, tmp_path / "step-00000002" / STATE)
    assert_falls_back(tmp_path, tmp_path / "step-00000002" / STATE)
    shutil.copytree(tmp_path / "step-00000001", tmp_path / "step-00000003")
    reports: list[str] = []
    assert Checkpoints(tmp_path, World()).newest(reports.append) == tmp_path / "step-00000001"
    assert "holds step 1" in reports[0]


def test_nothing_there_is_none_and_nothing_intact_is_an_error(tmp_path):
    assert Checkpoints(tmp_path / "nowhere", World()).newest(print) is None
    (tmp_path / "step-00000004").mkdir()
    with pytest.raises(CheckpointError, match="none of the 1 checkpoints"):
        Checkpoints(tmp_path, World()).newest(lambda line: None)


def test_every_rank_gets_the_choice_or_the_fault(tmp_path):
    save(tmp_path, 1)
    reports: list[str] = []
    (tmp_path / "step-00000002").mkdir()
    found = on_ranks(3, lambda world: Checkpoints(tmp_path, world).newest(reports.append))
    assert found == [tmp_path / "step-00000001"] * 3 and len(reports) == 1
    (tmp_path / "step-00000001" / MODEL).unlink()
    faults = on_ranks(3, lambda world: Checkpoints(tmp_path, world).newest(reports.append))
    assert all(isinstance(fault, CheckpointError) and "none of the 2" in str(fault) for fault in faults)


def test_ranks_that_see_different_folders_refuse(tmp_path):
    roots = [tmp_path / "a", tmp_path / "b"]
    save(roots[0], 1)
    Checkpoints(roots[1], World()).save(1, {}, {}, {})
    faults = on_ranks(2, lambda world: Checkpoints(roots[world.rank], world).newest(print))
    assert all(isinstance(fault, CheckpointError) and "rank 1: " in str(fault) for fault in faults)
    assert all("share one disk" in str(fault) for fault in faults)


def test_a_newer_schema_names_both_versions(tmp_path):
    save(tmp_path, 1)
    path = save(tmp_path, 2)
    reseal(path, lambda body: body.update(schema=2, written_by="speedrun-mup 9.9"))
    for look in (lambda: Loaded(path), lambda: newest(tmp_path), lambda: save(tmp_path, 2)):
        with pytest.raises(
            CheckpointError, match=r"written by speedrun-mup 9\.9 in schema 2, this is speedrun-mup"
        ) as fault:
            look()
        assert not isinstance(fault.value, DamagedCheckpoint)


@pytest.mark.parametrize(
    "change",
    [
        lambda body: body.pop("schema"),
        lambda body: body.pop("files"),
        lambda body: body.update(ranks=10**12),
        lambda body: body.update(slices=[1]),
        lambda body: body["files"].update({"../../outside": body["files"].pop(STATE)}),
    ],
)
def test_a_sealed_but_senseless_manifest_is_damage(tmp_path, change):
    path = save(tmp_path, 1)
    reseal(path, change)
    with pytest.raises(DamagedCheckpoint, match=MANIFEST):
        Loaded(path)


# --- disk faults ---


@pytest.mark.slow
def test_a_disk_fault_at_any_call_spares_the_earlier_ones(tmp_path):
    for step in (1, 2):
        save(tmp_path / "model", step)
    shutil.copytree(tmp_path / "model", tmp_path / "rehearsal")
    calls = count_calls(lambda: save(tmp_path / "rehearsal", 3))
    codes = [errno.ENOSPC, errno.EIO, errno.EROFS, errno.EACCES]
    for index, name in enumerate(calls):
        root, code = tmp_path / str(index), codes[index % 4]
        shutil.copytree(tmp_path / "model", root)
        with pytest.raises(CheckpointError, match=errno.errorcode[code]) as fault, tapped(fail_at(index, code)):
            save(root, 3)
        text = str(fault.value)
        assert "\n" not in text
        left = newest(root)
        if "is not saved" in text:
            assert re.search(r"It needs [\d,]+ bytes, [\d,]+ are free", text)
            assert not list(root.glob(".tmp-*")), (index, name)
            assert_is_step(Loaded(root / "step-00000002"), 2)
            assert_is_step(Loaded(left), int(left.name[5:]))
        else:
            assert re.search("step 3 is saved, but .*step-00000001 stays", text)
            assert_is_step(Loaded(left), 3)
        with tapped(lambda name, args: None):
            save(root, 4)
        assert_is_step(Loaded(newest(root)), 4)
        shutil.rmtree(root)


def test_one_rank_failing_fails_all(tmp_path):
    on_ranks(3, lambda world: save(tmp_path, 1, world))

    def tap(name: str, args: tuple[Any, ...]) -> None:
        if name == "write" and "optim-0001" in path_of(name, args):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with tapped(tap):
        faults = on_ranks(3, lambda world: save(tmp_path, 2, world))
    pattern = r"step 2 is not saved: rank 1: \S+optim-0001-of-0003.safetensors: ENOSPC \(No space left on device\)"
    assert all(isinstance(fault, CheckpointError) and re.search(pattern, str(fault)) for fault in faults), faults
    assert names(tmp_path) == ["step-00000001"]
    paths = on_ranks(3, lambda world: save(tmp_path, 2, world))
    assert paths == [tmp_path / "step-00000002"] * 3


def test_file_size_limit(tmp_path):
    save(tmp_path, 1)

    def life() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
        with pytest.raises(CheckpointError, match="EFBIG"):
            Checkpoints(tmp_path, World()).save(2, {"big": torch.zeros(10_000)}, {}, {})

    assert wait(fork(life)) == 0
    assert names(tmp_path) == ["step-00000001"]
    assert_is_step(Loaded(newest(tmp_path)), 1)


def test_a_disk_that_is_really_full(tmp_path):
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(tmp_path)]
    if subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("mounting a small tmpfs needs root")
    try:
        save(tmp_path, 1)
        with pytest.raises(CheckpointError, match=r"ENOSPC .* needs 4,\d{3},\d{3} bytes, [\d,]{7,9} are free"):
            Checkpoints(tmp_path, World()).save(2, {"big": torch.zeros(1_000_000)}, {}, {})
        assert names(tmp_path) == ["step-00000001"]
        assert_is_step(Loaded(newest(tmp_path)), 1)
        assert_is_step(Loaded(save(tmp_path, 3)), 3)
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


def test_a_rank_without_the_folder_fails_all(tmp_path):
    def write(world: World) -> Path:
        return save(tmp_path if world.rank == 0 else tmp_path / "another disk", 1, world)

    faults = on_ranks(2, write)
    assert all(
        isinstance(fault, CheckpointError) and "rank 1" in str(fault) and "ENOENT" in str(fault) for fault in faults
    )
    assert names(tmp_path) == []


# --- in the background ---


class Gate:
    """Holds the first write back until it is opened."""

    def __init__(self) -> None:
        self.reached, self.open = threading.Event(), threading.Event()

    def __call__(self, name: str, args: tuple[Any, ...]) -> None:
        if name == "write":
            self.reached.set()
            assert self.open.wait(60)


def save_later(checkpoints: Checkpoints, step: int) -> Path:
    state = {"step": step, "loss": 1 / 3}
    return checkpoints.save(step, model_of(step), slices_of(step), state, wait=False)


def test_background_save_holds_the_step_that_was_saved(tmp_path):
    gate, checkpoints = Gate(), Checkpoints(tmp_path, World())
    model, parts, state = model_of(4), slices_of(4), {"step": 4, "loss": 1 / 3}
    with tapped(gate):
        path = checkpoints.save(4, model, parts, state, wait=False)
        assert gate.reached.wait(60) and not path.exists() and checkpoints.poll() is None
        for tensor in [*model.values(), *(part.tensor for part in parts.values())]:
            tensor.zero_()
        state["step"] = 0
        gate.open.set()
        assert checkpoints.poll(wait=True) == path
    assert checkpoints.poll() is None and checkpoints.close() is None
    assert_is_step(Loaded(path), 4)
    assert_is_step(Loaded(newest(tmp_path)), 4)


def test_background_and_foreground_write_the_same_bytes(tmp_path):
    first = save(tmp_path / "a", 4)
    checkpoints = Checkpoints(tmp_path / "b", World())
    second = save_later(checkpoints, 4)
    assert checkpoints.close() == second
    assert {f.name: f.read_bytes() for f in first.iterdir()} == {f.name: f.read_bytes() for f in second.iterdir()}


@pytest.mark.parametrize("following", ["save", "close"])
def test_there_is_never_a_second_writer(tmp_path, following):
    gate, checkpoints = Gate(), Checkpoints(tmp_path, World())
    with tapped(gate):
        path = save_later(checkpoints, 1)
        assert gate.reached.wait(60)
        call = (lambda: save_later(checkpoints, 2)) if following == "save" else checkpoints.close
        thread = threading.Thread(target=call)
        thread.start()
        time.sleep(0.1)
        assert thread.is_alive() and names(tmp_path) == [".tmp-step-00000001"]
        gate.open.set()
        thread.join(60)
        assert path.exists()
        checkpoints.close()
    assert names(tmp_path) == ["step-00000001", "step-00000002"][: 2 if following == "save" else 1]


@pytest.mark.parametrize("surface", ["poll", "save", "close"])
def test_a_background_fault_surfaces_once(tmp_path, surface):
    checkpoints = Checkpoints(tmp_path, World())
    with tapped(fail_at(4, errno.EIO)):
        save_later(checkpoints, 1)
        checkpoints._pending.exception(60)
    calls = {"poll": checkpoints.poll, "save": lambda: save_later(checkpoints, 2), "close": checkpoints.close}
    with pytest.raises(CheckpointError, match=r"step 1 is not saved: .*EIO"):
        calls[surface]()
    assert checkpoints.poll() is None
    if surface != "close":
        save_later(checkpoints, 3)
        assert checkpoints.close() == tmp_path / "step-00000003"
    assert not list(tmp_path.glob(".tmp-*"))


def test_all_ranks_learn_of_a_background_save_at_the_same_poll(tmp_path):
    def look(world: World) -> list[Path | None]:
        checkpoints, pending = Checkpoints(tmp_path, world), Future()
        checkpoints._pending = pending
        seen = []
        for finished in (0, 1):
            if world.rank == finished:
                pending.set_result(tmp_path)
            seen.append(checkpoints.poll())
        return seen

    assert on_ranks(2, look) == [[None, tmp_path]] * 2


# --- real processes ---


def rank_life(root: Path, rank: int, size: int, store: Path, work: Callable[[World], None]) -> Callable[[], None]:
    """`work` in a gloo group that meets in the file `store`."""

    def life() -> None:
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
        work(World(rank, size))
        dist.destroy_process_group()

    return life


@pytest.mark.dist
def test_background_saves_beside_training_collectives(tmp_path):
    root = tmp_path / "run"

    def work(world: World) -> None:
        checkpoints = Checkpoints(root, world)
        durable = []
        total = torch.zeros(3)
        for step in range(1, 41):
            ones = torch.ones(3)
            world.all_reduce(ones).wait()
            total += ones
            if step % 10 == 0:
                parts = slices_of(step, world.rank, world.size)
                checkpoints.save(step, model_of(step), parts, {"step": step, "loss": 1 / 3}, wait=step % 20 == 0)
            durable.append(checkpoints.poll())
        durable.append(checkpoints.close())
        assert total.tolist() == [80.0] * 3
        assert world.gather_objects(durable) == [durable, durable]
        assert checkpoints.newest(print) == root / "step-00000040"

    children = [fork(rank_life(root, rank, 2, tmp_path / "store", work)) for rank in range(2)]
    assert [wait(child) for child in children] == [0, 0]
    assert names(root) == ["step-00000030", "step-00000040"]
    assert_is_step(Loaded(newest(root)), 40)


@pytest.mark.dist
@pytest.mark.parametrize("background", [False, True])
def test_losing_a_rank_leaves_the_last_commit(tmp_path, background, monkeypatch):
    monkeypatch.setattr("speedrun_mup.core.distributed.ROLL_CALL_S", 0.2)
    rng = dice(3)
    for trial in range(RANK_KILLS):
        root = tmp_path / str(trial)
        on_ranks(2, lambda world, root=root: save(root, 1, world))
        victim, index = rng.randrange(2), rng.randrange(12)

        def work(world: World, root: Path = root, victim: int = victim, index: int = index) -> None:
            checkpoints = Checkpoints(root, world)
            parts = slices_of(2, world.rank, world.size)
            with tapped(die_at(index, 0.5) if world.rank == victim else lambda name, args: None):
                checkpoints.save(2, model_of(2), parts, {"step": 2, "loss": 1 / 3}, wait=not background)
                checkpoints.close()
            os.kill(os.getpid(), signal.SIGKILL)  # a rank that had less to do than `index` dies here

        children = [fork(rank_life(root, rank, 2, tmp_path / f"store{trial}", work)) for rank in range(2)]
        started = time.monotonic()
        codes = [wait(child) for child in children]
        assert codes[victim] == -signal.SIGKILL and time.monotonic() - started < 20
        survivor = Loaded(newest(root))
        assert_is_step(survivor, survivor.step)
        Checkpoints(root, World()).clean()
        assert_is_step(Loaded(save(root, 3)), 3)


# --- other formats, and files that mean harm ---


class Bomb:
    """Unpickling this creates a file."""

    def __init__(self, sentinel: Path):
        self.sentinel = sentinel

    def __reduce__(self):
        return os.system, (f"touch {self.sentinel}",)


def test_no_planted_code_runs(tmp_path):
    sentinel, root = tmp_path / "sentinel", tmp_path / "run"
    bomb = tmp_path / "bomb.pt"
    torch.save({"model": {"w": Bomb(sentinel)}}, bomb)
    torch.save({"model": Bomb(sentinel)}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    save(root, 1)
    path = save(root, 2)
    for name in (".metadata", "state.pkl", "optim-0001-of-0001.safetensors"):  # beside: never opened
        shutil.copy(bomb, path / name)
    assert_is_step(Loaded(newest(root)), 2)
    for file in (MODEL, STATE, "optim-0000-of-0001.safetensors", MANIFEST):  # instead: wrong hash
        kept = (path / file).read_bytes()
        shutil.copy(bomb, path / file)
        assert_falls_back(root, path / file)
        (path / file).write_bytes(kept)
    for file in (MODEL, "optim-0000-of-0001.safetensors"):  # instead, by somebody who can seal: not safetensors
        kept, seal = (path / file).read_bytes(), (path / MANIFEST).read_bytes()
        shutil.copy(bomb, path / file)
        size, digest = bomb.stat().st_size, sha256(bomb.read_bytes()).hexdigest()
        reseal(
            path, lambda body, file=file, entry={"size": size, "sha256": digest}: body["files"].update({file: entry})
        )
        assert_unusable(path)
        (path / file).write_bytes(kept)
        (path / MANIFEST).write_bytes(seal)
    for file in (bomb, tmp_path / "old.pt"):
        with pytest.raises(CheckpointError, match=r"not a \.pt file of plain tensors"):
            import_pt(file)
    with pytest.raises(CheckpointError, match="trusted=True"):
        import_dcp(path)
    assert not sentinel.exists()
    torch.load(bomb, weights_only=False)
    assert sentinel.exists()  # the bomb was live


def test_the_package_never_unpickles():
    package = Path(speedrun_mup.__file__).parent
    for file in package.rglob("*.py"):
        text = file.read_text()
        assert not re.search(r"import pickle|from pickle|pickle\.loads?\b|weights_only\s*=\s*False", text), file
        for call in re.findall(r"(?<!safetensors\.)torch\.load\((.*)", text):
            assert "weights_only=True" in call, (file, call)


# --- folders that somebody else made ---


@pytest.mark.slow
@pytest.mark.parametrize("name", [MANIFEST, MODEL, STATE, "optim-0000-of-0001.safetensors"])
@pytest.mark.parametrize("kind", ["fifo", "zero", "folder", "sparse"])
def test_what_is_no_regular_file_is_damage_and_no_wait(name, kind, tmp_path):
    save(tmp_path, 1)
    path = save(tmp_path, 2) / name
    path.unlink()
    make = {"fifo": os.mkfifo, "zero": lambda path: path.symlink_to("/dev/zero"), "folder": Path.mkdir}
    make.get(kind, lambda path: path.touch() or os.truncate(path, 2**40))(path)
    assert newest(tmp_path).name == "step-00000001"
    with pytest.raises(DamagedCheckpoint) as caught:
        Loaded(path.parent).slice("head/momentum", 0, 12)
    assert "\n" not in str(caught.value)
    assert [fault is None for _, fault in list_checkpoints(tmp_path)] == [False, True]


def test_nothing_is_written_or_removed_through_a_link(tmp_path):
    mine, evil = tmp_path / "mine", tmp_path / "evil"
    for step in (1, 2):
        save(mine, step)
    (mine / ".tmp-step-00000003").mkdir()
    before = sorted(mine.rglob("*"))
    evil.symlink_to(mine)
    for work in (Checkpoints(evil, World()).clean, lambda: save(evil, 4)):
        with pytest.raises(CheckpointError, match="evil is a symbolic link; put the folder itself in its place"):
            work()
    evil.unlink()
    save(evil, 1)
    for name in (".tmp-step-00000007", ".trash-step-00000007", "step-00000002", ".tmp-step-00000003"):
        (evil / name).symlink_to(mine / "step-00000002")
    checkpoints, said = Checkpoints(evil, World()), []
    assert checkpoints.newest(said.append).name == "step-00000001" and "is a symbolic link" in said[0]
    checkpoints.clean()
    (evil / ".trash-step-00000002").symlink_to(mine / "step-00000001")
    for step in (3, 4):
        save(evil, step)
    assert names(evil) == ["step-00000003", "step-00000004"]
    assert sorted(mine.rglob("*")) == before


ODD = [None, True, -1, 1.5, "x", [], {}, 10**30, [[0, 0]], [["x", 0, 1]], [[0, 5, 1]], [[9, 0, 35]], [[0, 0, 99]]]


@pytest.mark.parametrize("value", ODD, ids=str)
def test_a_sealed_manifest_of_any_types_is_one_line(value, tmp_path):
    save(tmp_path, 1)
    first = newest(tmp_path)
    places: list[tuple[str, ...]] = [("step",), ("ranks",), ("files",), ("slices",), ("schema",), ("files", MODEL)]
    places += [("files", MODEL, "size"), ("files", MODEL, "sha256"), ("slices", "embed/exp_avg")]
    for place in places:
        shutil.rmtree(tmp_path / "step-00000002", ignore_errors=True)
        folder = shutil.copytree(first, tmp_path / "step-00000002")

        def change(body: dict[str, Any], place: tuple[str, ...] = place) -> None:
            body["step"] = 2
            for key in place[:-1]:
                body = body[key]
            body[place[-1]] = value

        reseal(folder, change)
        found = dict(list_checkpoints(tmp_path))[folder]
        if found is None:  # its bytes are right, but who holds what is a lie: told when it is asked for
            with pytest.raises(CheckpointError) as caught:
                Loaded(folder).slice("embed/exp_avg", 0, 35)
            found = str(caught.value)
        assert "\n" not in found and len(found) < 600


@pytest.mark.parametrize("content", [b"[]", b"3", b"[" * 10**5, b"\xff", b'{"a": NaN'])
def test_a_sealed_state_of_any_type_is_one_line(content, tmp_path):
    folder = save(tmp_path, 1)
    (folder / STATE).write_bytes(content)
    reseal(folder, lambda body: body["files"][STATE].update(size=len(content), sha256=sha256(content).hexdigest()))
    with pytest.raises(DamagedCheckpoint, match="state.json") as caught:
        Loaded(folder)
    assert "\n" not in str(caught.value)
