"""The rows of the fault matrix that no module's own tests cover, and the check that every row has a test."""

from __future__ import annotations

import ast
import contextlib
import ctypes
import dataclasses
import hashlib
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import closing
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY
from helpers.dist import run_ranks
from test_checkpoint import reseal
from test_cli import as_flags
from test_training import assert_same_training, curve, poison, state_of

from faults.harness import dice, fork, path_of, repeats, tapped, wait
from faults.matrix import MATRIX
from faults.torchrun import ROOT, Torchrun, is_alive, until
from speedrun_mup import files
from speedrun_mup.cli import main
from speedrun_mup.config import TrainConfig, settings
from speedrun_mup.core.errors import CollectiveError, ConfigError, NonFiniteError, UserError
from speedrun_mup.core.model import SoftcapCrossEntropy
from speedrun_mup.core.optimizers import Slice
from speedrun_mup.core.utils import World
from speedrun_mup.data.corpus import find_corpus
from speedrun_mup.data.manifest import write_manifest
from speedrun_mup.data.shards import ShardError, measure_shard, read_shard, write_shard
from speedrun_mup.training.checkpoint import STATE, CheckpointError, Checkpoints, Loaded
from speedrun_mup.training.resume import DEFAULTS_FOR_OLD_CHECKPOINTS, check_resumable
from speedrun_mup.training.run import Run, train
from speedrun_mup.training.tracking import read_metrics

SIGNALS = repeats(6)  # at random times
CYCLES = repeats(5)  # of a scheduler that preempts
ATTEMPTS = pytest.mark.parametrize("attempt", range(repeats(1)))  # under torchrun

STOPPED = 75


@pytest.mark.slow
def test_every_row_has_a_test_that_exists():
    assert f"the table of {len(MATRIX)} faults" in (ROOT / "docs" / "reliability.md").read_text()
    defined = {
        f"{path.relative_to(ROOT)}::{node.name}"
        for path in (ROOT / "tests").rglob("test_*.py")
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.FunctionDef)
    }
    for row in MATRIX:
        assert row.tests, row
        for test in row.tests:
            assert test in defined, (row.number, test)


def whole_and_cut(tiny, **changes) -> tuple[TrainConfig, TrainConfig, int]:
    """A run that was left alone, the config of one that is to be wounded, and how long the first took, in seconds."""
    begun = time.monotonic()
    cfg = tiny(name="whole", width=32, **changes)
    assert train(cfg).finished
    return cfg, dataclasses.replace(cfg, name="cut"), time.monotonic() - begun


def folder_of(cfg: TrainConfig) -> Path:
    return Path(cfg.out) / str(cfg.name)


def assert_same_run(cfg: TrainConfig, other: TrainConfig) -> None:
    """Metrics and final weights of two finished runs are the same to the bit."""
    with closing(Run(dataclasses.replace(cfg, resume=str(folder_of(cfg))), World())) as run:
        result = run.train()
    assert_same_training(result, dataclasses.replace(result, folder=folder_of(other)))


def life_of(cfg: TrainConfig, work: Callable[[TrainConfig], object] = train) -> int:
    """Start or go on with a run in a process of its own, silent, that ends as the command would; its process id."""
    resumed = dataclasses.replace(
        cfg, resume=str(folder_of(cfg)) if (folder_of(cfg) / "config.json").exists() else None
    )

    def life() -> None:
        sys.stdout = sys.stderr = open(os.devnull, "w")
        try:
            os._exit(0 if work(resumed).finished else STOPPED)
        except UserError as fault:
            os._exit(fault.exit_code)

    return fork(life)


def steps_done(cfg: TrainConfig) -> int:
    with contextlib.suppress(ConfigError):
        return sum(record["kind"] == "train" for record in read_metrics(folder_of(cfg)))
    return 0


# --- checkpoint, written


@pytest.mark.slow
def test_row_04_training_outlives_a_full_disk(tiny, tmp_path):
    mount = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(tmp_path)]
    if subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("mounting a small tmpfs needs root")
    try:
        cfg, ballast = (
            tiny(name="full", out=str(tmp_path / "runs"), width=32, save_every=2, iterations=8),
            tmp_path / "x",
        )

        def fill_and_free(step, model, batches):
            if step == 3:  # step 2 is saved; steps 4 and 6 will not fit
                until(lambda: (folder_of(cfg) / "checkpoints" / "step-00000002").exists())
                with contextlib.suppress(OSError), open(ballast, "wb", buffering=0) as file:
                    while True:
                        file.write(bytes(4096))
            if step == 6:
                ballast.unlink()

        result = train(cfg, fill_and_free)
        assert result.finished
        log = (folder_of(cfg) / "log.txt").read_text()
        told = [line for line in log.splitlines() if line.startswith("warning: step 4 is not saved")]
        assert len(told) == 1 and "ENOSPC (No space left on device)" in told[0] and "bytes" in told[0]
        assert sorted(path.name for path in (folder_of(cfg) / "checkpoints").iterdir())[-1] == "step-00000008"
        assert Loaded(folder_of(cfg) / "checkpoints" / "step-00000008").step == 8
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


def test_row_11_two_processes_in_one_folder(tiny):
    cfg = tiny(name="shared")
    ready = Path(cfg.out) / "ready"

    def hold() -> None:
        with closing(Run(cfg, World())):
            ready.touch()
            time.sleep(60)

    first = fork(hold)
    until(ready.exists)
    with pytest.raises(ConfigError, match=f"in use by process {first}; stop it or choose another --name"):
        Run(dataclasses.replace(cfg, resume=str(folder_of(cfg))), World())
    os.kill(first, signal.SIGKILL)
    wait(first)
    Run(dataclasses.replace(cfg, resume=str(folder_of(cfg))), World()).close()


@pytest.mark.dist
def test_row_12_clocks_that_differ_and_jump(tiny, monkeypatch):
    cfg = tiny(name="clocks", save_every=2, iterations=5)

    def on_a_wrong_clock(world: World) -> list[int]:
        now, saved, save = time.time, [], Checkpoints.save
        jumps = random.Random(world.rank)
        monkeypatch.setattr(time, "time", lambda: now() + jumps.uniform(-1e6, 1e6))
        monkeypatch.setattr(Checkpoints, "save", lambda *args, **kw: (saved.append(args[1]), save(*args, **kw))[1])
        assert train(cfg).finished
        return saved

    assert run_ranks(2, on_a_wrong_clock) == [[2, 4, 5]] * 2


# --- checkpoint, read


def test_row_16_every_setting_that_changes_the_run_is_refused(tiny):
    cfg = tiny()
    corpus, _ = find_corpus("synthetic", "byte")
    state = {"config": dataclasses.asdict(cfg), "corpus": corpus.fingerprint}
    check_resumable(cfg, corpus, state, Path("x"))
    for name, meta in settings().items():
        other = state | {"config": state["config"] | {name: "another"}}
        if not meta.must_match:
            check_resumable(cfg, corpus, other, Path("x"))
        else:
            with pytest.raises(CheckpointError, match=f"x belongs to another run: {name} was another, is ") as fault:
                check_resumable(cfg, corpus, other, Path("x"))
            assert fault.value.exit_code == 4


@pytest.mark.slow
def test_row_17_another_model_is_refused_whole(tiny):
    with closing(Run(tiny(name="a", iterations=2), World())) as run:
        run.train()
        path = run.folder / "checkpoints" / "step-00000002"
        loaded, before = Loaded(path), state_of(run)
        model = dict(loaded.model)
        model["blocks.0.more"] = model.pop("blocks.0.mlp.c_fc.weight")
        model["lm_head.weight"] = model["lm_head.weight"][:-1]
        optim = {key: Slice(0, size, loaded.slice(key, 0, size)) for key, size in loaded.optim_sizes.items()}
        other = Checkpoints(run.folder / "other", World()).save(2, model, optim, loaded.state)
        with pytest.raises(CheckpointError) as fault:
            run.load(other)
        for text in ("blocks.0.mlp.c_fc.weight is missing", "blocks.0.more is unexpected", "lm_head.weight is ("):
            assert text in str(fault.value)
        after = state_of(run)
        assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


@pytest.mark.slow
def test_row_18_a_checkpoint_of_version_0_1_0_resumes(tiny):
    """Its state lacks what was added since, and its config the newer settings: both mean what they meant then."""
    whole, cut, _ = whole_and_cut(tiny)

    def leave(step, model, batches):
        if step == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    train(cut, leave)
    path = folder_of(cut) / "checkpoints" / "step-00000004"
    state = json.loads((path / STATE).read_text())
    for key in DEFAULTS_FOR_OLD_CHECKPOINTS:
        state.pop(key, None)
    for key in ("deterministic", "on_nonfinite", "keep_every", "timeout_s"):
        del state["config"][key]
    text = json.dumps(state).encode()
    (path / STATE).write_bytes(text)
    entry = {"size": len(text), "sha256": hashlib.sha256(text).hexdigest()}
    reseal(path, lambda body: body["files"].update({STATE: entry}))
    assert train(dataclasses.replace(cut, resume=str(folder_of(cut)))).finished
    assert_same_run(whole, cut)


@pytest.mark.dist
def test_row_19_changing_the_number_of_ranks(tiny):
    whole, cut, _ = whole_and_cut(tiny, deterministic=True, iterations=6)

    def leave_at(last: int, step, model, batches):
        if step == last:
            os.kill(os.getpid(), signal.SIGTERM)

    for size, last in ((2, 1), (4, 3), (1, 9)):
        resumed = dataclasses.replace(cut, resume=str(folder_of(cut)) if size != 2 else None)
        work = partial(train, resumed, partial(leave_at, last))
        assert run_ranks(size, lambda world, work=work: work().finished) == [size == 1] * size
    assert_same_run(whole, cut)
    refused = (
        "4 micro-batches cannot be shared by 3 processes; start one of 1, 2, 4, or give --micro-batches of which every stage "
        "of --batch-schedule makes a multiple of 3"
    )

    def start_3(world: World) -> str:
        with pytest.raises(ConfigError) as fault:
            train(tiny(name="three"))
        return str(fault.value)

    assert run_ranks(3, start_3) == [refused] * 3


# --- data


def test_row_30_data_that_would_end_too_early(tiny):
    with pytest.raises(ShardError, match="the data ends after 1 epoch"):
        train(tiny(name="long", epochs=1, iterations=100_000))
    assert not (Path(tiny().out) / "long").exists()


def own_corpus(folder: Path) -> Path:
    """A copy of the synthetic corpus."""
    corpus, _ = find_corpus("synthetic", "byte")
    return Path(shutil.copytree(corpus.directory, folder))


@pytest.mark.slow
def test_row_31_another_corpus_in_the_same_place(tiny, tmp_path):
    data = own_corpus(tmp_path / "data")
    cfg = tiny(name="a", data=str(data), iterations=3)
    train(cfg)
    manifest = json.loads((data / "corpus.json").read_text())
    name = next(iter(manifest["train"]))
    tokens = np.array(read_shard(data / name))
    tokens[10], tokens[11] = tokens[11] ^ 1, tokens[10] ^ 1
    (data / name).unlink()
    write_shard(data / name, tokens)
    kept = {key: manifest[key] for key in ("tokenizer", "vocab_size", "bos_token", "source")}
    shards = {
        part: {name: measure_shard(data / name, kept["vocab_size"], kept["bos_token"]) for name in manifest[part]}
        for part in ("train", "val")
    }
    write_manifest(data, **kept, **shards)
    with pytest.raises(CheckpointError, match="the corpus is not the same; resume without changing"):
        train(dataclasses.replace(cfg, resume=str(folder_of(cfg))))


@pytest.mark.slow
@pytest.mark.parametrize("how", ["cut", "removed"])
def test_row_32_shards_that_vanish(tiny, tmp_path, how):
    data = own_corpus(tmp_path / "data")
    cfg = tiny(name="a", data=str(data), iterations=12, save_every=2, val_every=0)

    def wound(step, model, batches):
        if step == 4 and how == "removed":
            shutil.rmtree(data)  # held open: the kernel keeps it for us
        elif step == 4:
            for shard in data.glob("*.bin"):
                os.truncate(shard, 2000)

    if how == "removed":
        assert train(cfg, wound).finished
    else:
        with pytest.raises(ShardError, match=r"was [\d,]+ bytes, is now 2,000; do not change it during a run"):
            train(cfg, wound)
    newest = Checkpoints(folder_of(cfg) / "checkpoints", World()).newest(print)
    assert Loaded(newest).step >= 4


# --- numbers


@pytest.mark.dist
@pytest.mark.parametrize("culprit", [0, 1])
def test_row_36_a_nan_on_one_rank_stops_all(tiny, culprit):
    cfg = tiny(name="nan")

    def work(world: World) -> tuple[str, bool]:
        with closing(Run(cfg, world)) as run:
            seen = {}

            def observe(step, model, batches):
                seen[step] = state_of(run)
                poison(2, when=lambda batches: world.rank == culprit)(step, model, batches)

            with pytest.raises(NonFiniteError) as fault:
                run.train(observe)
            after = state_of(run)
            return str(fault.value), all(torch.equal(after[name], tensor) for name, tensor in seen[2].items())

    for text, unchanged in run_ranks(2, work):
        assert unchanged and f"step 2: not finite on rank {culprit}: blocks.2.mlp.c_fc.weight;" in text
    dump = json.loads((folder_of(cfg) / "bad-step-00000002.json").read_text())
    norms = [rank["gradient_norms"]["blocks.2.mlp.c_fc.weight"] for rank in dump["ranks"]]
    assert norms[culprit] == "NaN" and norms[1 - culprit] > 0


def test_row_38_a_loss_over_no_tokens():
    x, weight = torch.zeros(0, 8, requires_grad=True), torch.ones(5, 8, requires_grad=True)
    loss = SoftcapCrossEntropy.apply(x, weight, torch.zeros(0, dtype=torch.int64), 1.0, 1 << 20)
    loss.backward()
    assert loss.item() == 0 and torch.equal(weight.grad, torch.zeros(5, 8)) and x.grad.shape == (0, 8)


# --- processes


@pytest.mark.slow
@pytest.mark.usefixtures("warm")
def test_row_41_signals_at_random_times(tiny):
    whole, cut, duration = whole_and_cut(tiny, iterations=40, save_every=7, val_every=5)
    rng, stopped, lives = dice(0), 0, 0
    while stopped < SIGNALS:
        cfg, code = dataclasses.replace(cut, name=f"cut {lives}"), STOPPED
        while code:
            child, lives = life_of(cfg), lives + 1
            if stopped < SIGNALS:
                time.sleep(rng.uniform(0, duration / 6))
                os.kill(child, rng.choice([signal.SIGTERM, signal.SIGINT, signal.SIGUSR1]))
            began, code = time.monotonic(), wait(child)
            assert code in (0, STOPPED, -signal.SIGTERM, -signal.SIGUSR1, 1) and time.monotonic() - began < 25
            stopped += code == STOPPED
            assert lives < 10 * SIGNALS
        assert_same_run(whole, cfg)


@pytest.mark.slow
@pytest.mark.parametrize("signals", [2, 3])
def test_row_42_second_and_third_signal(tiny, tmp_path, signals):
    cfg, saving, go_on = tiny(name="a", iterations=2000, val_every=0), tmp_path / "saving", tmp_path / "go on"

    def held_save(name: str, args: tuple) -> None:
        if name == "write" and path_of(name, args).endswith("model.safetensors") and not saving.exists():
            saving.touch()
            until(go_on.exists)

    def work(cfg: TrainConfig):
        with tapped(held_save):
            return train(cfg)

    child = life_of(cfg, work)
    until(lambda: steps_done(cfg) > 2)
    os.kill(child, signal.SIGTERM)
    until(saving.exists)
    for _ in range(signals - 1):
        os.kill(child, signal.SIGTERM)
        time.sleep(0.2)
    go_on.touch()
    assert wait(child) == (STOPPED if signals == 2 else 128 + signal.SIGTERM)
    newest = Checkpoints(folder_of(cfg) / "checkpoints", World()).newest(print)
    assert (newest is None) == (signals == 3)
    assert newest is None or Loaded(newest).step == steps_done(cfg)


@pytest.mark.dist
@pytest.mark.parametrize("victim", [0, 1])
def test_row_43_a_signal_to_one_rank(tiny, victim):
    cfg = tiny(name="one", iterations=50)

    def work(world: World) -> tuple[bool, int]:
        def observe(step, model, batches):
            if step == 4 and world.rank == victim:
                os.kill(os.getpid(), signal.SIGTERM)

        result = train(cfg, observe)
        return result.finished, result.steps

    assert run_ranks(2, work) == [(False, 5)] * 2
    assert Loaded(folder_of(cfg) / "checkpoints" / "step-00000005").step == 5


@pytest.mark.dist
@pytest.mark.parametrize("victims", [{0}, {1}, {0, 1}])
def test_row_43_a_signal_before_the_first_step_is_done(tiny, victims):
    """Whoever got it asks to be started again; whoever did not lost a rank. Nobody hangs, and the folder can go on."""
    cfg = tiny(name="early", iterations=50)

    def work(world: World) -> int:
        def observe(step, model, batches):
            if world.rank in victims:
                os.kill(os.getpid(), signal.SIGTERM)

        try:
            train(cfg, observe)
        except UserError as fault:
            return fault.exit_code
        raise AssertionError("goes on")

    codes = run_ranks(2, work)
    assert [code == STOPPED for code in codes] == [rank in victims for rank in range(2)] and set(codes) <= {STOPPED, 6}
    assert train(dataclasses.replace(cfg, resume=str(folder_of(cfg)), iterations=50)).finished


@pytest.mark.slow
def test_row_44_preempted_again_and_again(tiny):
    whole, cut, _ = whole_and_cut(tiny, iterations=4 * CYCLES)
    cycles = runs = 0
    while cycles < CYCLES:
        cfg, runs, code = dataclasses.replace(cut, name=f"cut {runs}"), runs + 1, STOPPED
        while code:
            child, before = life_of(cfg), steps_done(cfg)
            until(lambda cfg=cfg, before=before, child=child: steps_done(cfg) > before or not is_alive(child))
            os.kill(child, signal.SIGTERM if cycles % 2 else signal.SIGUSR1)
            code = wait(child)
            assert code in (0, STOPPED, -signal.SIGTERM, -signal.SIGUSR1)  # the last two: as Python itself was ending
            cycles += code == STOPPED
        assert_same_run(whole, cfg)
        assert runs < 2 * CYCLES


UNDER_TORCHRUN = TINY | {
    "width": 32,
    "deterministic": True,
    "iterations": 20,
    "save_every": 2,
    "val_every": 0,
    "timeout_s": 20.0,
}


@pytest.mark.slow
@pytest.mark.dist
@ATTEMPTS
def test_row_45_torchrun_is_killed(tmp_path, attempt):
    flags = as_flags(UNDER_TORCHRUN | {"iterations": 5000, "save_every": 0})
    with Torchrun(2, tmp_path, ["--preset", "laptop", *flags], ["--standalone"]) as run:
        run.wait_for_step(3)
        workers = run.workers()
        assert len(workers) == 2
        os.kill(run.process.pid, signal.SIGKILL)
        until(lambda: not any(map(is_alive, workers)))
        _, said = run.end()
        assert json.loads((run.folder / "status.json").read_text())["status"] == "stopped", said
        assert "by the end of torchrun or SIGUSR2, saved" in said
        newest = Checkpoints(run.folder / "checkpoints", World()).newest(print)
        assert Loaded(newest).step == max(record["step"] for record in read_metrics(run.folder)) + 1


@pytest.mark.slow
@pytest.mark.dist
@ATTEMPTS
def test_row_47_torchrun_restarts_after_a_death(tmp_path, tiny, attempt):
    flags = as_flags(UNDER_TORCHRUN)
    with Torchrun(2, tmp_path, ["--preset", "laptop", *flags], ["--standalone", "--max-restarts=2"]) as run:
        run.wait_for_step(4)
        os.kill(run.workers()[1], signal.SIGKILL)
        code, said = run.end()
    assert code == 0 and "no response from rank 1" in said and "resumed from " in said
    alone = train(tiny(**{**UNDER_TORCHRUN, "name": "alone", "save_every": 0}))
    assert_same_training(alone, dataclasses.replace(alone, folder=run.folder))
    assert [step for step, _ in curve(run.folder)] == list(range(20))


@pytest.mark.dist
def test_row_49_ranks_that_disagree(tiny):
    def work(world: World) -> str:
        with pytest.raises(CollectiveError) as fault:
            train(tiny(name="x", seed=world.rank, matrix_lr=0.05 + world.rank))
        return str(fault.value)

    told = run_ranks(2, work)
    assert told == [f"ranks {r} and {1 - r} differ in seed, matrix_lr; start all with one command" for r in (0, 1)]
    assert not (Path(tiny().out) / "x").exists()


# --- resources, settings, security


@pytest.mark.slow
def test_row_51_out_of_memory(tiny, tmp_path):
    cfg, told = tiny(name="a", micro_batch_tokens=2048, save_every=1, val_every=0), tmp_path / "told"

    def starve(step, model, batches):
        if step == 2:
            used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (used + (1 << 22), -1))

    def work(cfg: TrainConfig):
        ctypes.CDLL(None).mallopt(-3, 1 << 16)  # M_MMAP_THRESHOLD: what is freed goes back, and must not do
        try:
            return train(cfg, starve)
        except UserError as fault:
            told.write_text(str(fault))
            raise

    assert wait(life_of(cfg, work)) == 6
    assert told.read_text().startswith("step 2: no memory for 4 x 2,048 tokens at once (")
    assert told.read_text().endswith(
        "; try --micro-batches-per-forward 2, or --micro-batch-tokens 1024 --micro-batches 8"
    )
    assert Loaded(Checkpoints(folder_of(cfg) / "checkpoints", World()).newest(print)).step in (1, 2)


@pytest.mark.parametrize("name", ["../../x", "/x", "..", ".x", "a/b", "x" * 300, "a\0b", ""])
def test_row_53_names_that_lead_out(name, tmp_path, capsys):
    out = tmp_path / "a" / "b"
    code = main(["train", *as_flags(TINY), "--preset", "laptop", "--out", str(out), f"--name={name}"])
    assert code == 2
    assert ("is not a folder name inside out" if name else "--name: it is empty") in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_row_54_a_log_on_a_full_device(tiny, capsys, monkeypatch):
    cfg, opened = tiny(name="a", iterations=6, save_every=3), files._descriptor
    on_full = lambda path, access: os.open("/dev/full", os.O_RDWR) if path.name == "log.txt" else opened(path, access)  # noqa: E731
    monkeypatch.setattr(files, "_descriptor", on_full)
    assert train(cfg).finished
    assert capsys.readouterr().err.count("No space left on device") == 1
    assert Loaded(folder_of(cfg) / "checkpoints" / "step-00000006").step == 6
