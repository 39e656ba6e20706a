import dataclasses
import json
import math
import os
import random
import shutil
import signal
import sys
import threading
import time
from contextlib import ExitStack, closing
from pathlib import Path

import pytest
import torch
from faults.harness import dice, fork, repeats, wait
from faults.torchrun import until
from helpers.dist import run_ranks
from helpers.runs import newest_unfinished
from safetensors.torch import load_file

from speedrun_mup.config import make_config
from speedrun_mup.core.errors import ConfigError, NonFiniteError, Stopped
from speedrun_mup.core.utils import PARENT_DIED, World, stop_with_parent
from speedrun_mup.data.corpus import find_corpus, write_synthetic
from speedrun_mup.data.shards import ShardError, read_shard
from speedrun_mup.report import plot_loss_curve
from speedrun_mup.training.checkpoint import CheckpointError
from speedrun_mup.training.divergence import FiniteCheck, LossSpikeDetector
from speedrun_mup.training.memory import micro_batches_at_once
from speedrun_mup.training.passes import Passes
from speedrun_mup.training.resume import check_resumable
from speedrun_mup.training.run import Run, train
from speedrun_mup.training.signals import stop_signals
from speedrun_mup.training.tracking import read_metrics


def weights(result):
    return load_file(result.folder / "checkpoints" / f"step-{result.steps:08d}" / "model.safetensors")


@pytest.fixture
def opened():
    """opened(cfg): a Run that is closed after the test."""
    with ExitStack() as stack:
        yield lambda cfg: stack.enter_context(closing(Run(cfg, World())))


def curve(folder, kind="train"):
    return [(r["step"], r["loss"]) for r in read_metrics(folder) if r["kind"] == kind]


def assert_same_training(a, b):
    assert curve(a.folder) == curve(b.folder)
    assert curve(a.folder, "val") == curve(b.folder, "val")
    first, second = weights(a), weights(b)
    assert first.keys() == second.keys()
    for name in first:
        assert torch.equal(first[name], second[name]), name


@pytest.mark.slow
def test_a_run_trains_and_leaves_its_folder_complete(tiny):
    result = train(tiny(iterations=30, name="a"))
    assert result.finished and result.steps == 30 and result.tokens == 30 * 512
    assert result.val_loss < 4.0 < curve(result.folder, "val")[0][1]
    assert [step for step, _ in curve(result.folder)] == list(range(30))
    assert {path.name for path in result.folder.iterdir()} >= {
        "config.json",
        "provenance.json",
        "log.txt",
        "metrics.jsonl",
    }
    provenance = json.loads((result.folder / "provenance.json").read_text())
    assert provenance["torch"] == torch.__version__ and len(provenance["source_sha256"]) == 64


@pytest.mark.slow
def test_step_0_loss_is_that_of_the_uniform_distribution(tiny):
    assert curve(train(tiny(iterations=1)).folder)[0][1] == pytest.approx(4.852030263919617, rel=1e-6)  # ln 128


@pytest.mark.slow
def test_the_seed_fixes_everything_and_another_seed_changes_it(tiny):
    first, second, other = train(tiny(name="1")), train(tiny(name="2")), train(tiny(name="3", seed=1))
    assert_same_training(first, second)
    assert curve(first.folder)[2:] != curve(other.folder)[2:]


@pytest.mark.slow
@pytest.mark.parametrize("hidden", ["muon", "adam"])
def test_at_base_width_mup_is_the_record_bit_for_bit(tiny, hidden):
    same = {"width": 32, "base_width": 32, "matrix_optimizer": hidden}
    assert_same_training(
        train(tiny(name="mup", parametrization="mup", **same)),
        train(tiny(name="plain", parametrization="record26", **same)),
    )


@pytest.mark.slow
def test_at_another_width_mup_is_not_the_record(tiny):
    assert (
        curve(train(tiny(name="mup")).folder)[3:] != curve(train(tiny(name="r", parametrization="record26")).folder)[3:]
    )


@pytest.mark.slow
def test_kernel_warmup_leaves_no_trace(tiny):
    assert_same_training(train(tiny(name="cold")), train(tiny(name="warm", kernel_warmup=3)))


@pytest.mark.slow
def test_packed_micro_batches_train_as_separate_ones(tiny):
    packed, apart = (
        curve(train(tiny(name="p", micro_batches_per_forward=4)).folder),
        curve(train(tiny(name="s", micro_batches_per_forward=1)).folder),
    )
    assert [loss for _, loss in packed] == pytest.approx([loss for _, loss in apart], rel=2e-5)


@pytest.mark.slow
def test_stopping_and_resuming_is_bitwise_an_uninterrupted_run(tiny):
    whole = train(tiny(name="whole"))

    def stop_at_4(step, model, batches):
        if step == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    part = train(tiny(name="part"), observe=stop_at_4)
    assert not part.finished and part.steps == 4
    again = train(tiny(name="part", resume=str(part.folder)))
    assert again.finished
    assert_same_training(whole, again)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, PARENT_DIED])
def test_before_the_first_step_a_signal_ends_the_run_at_once(tiny, number):
    """Compiling can take minutes, and torchrun kills after 30 s."""

    def stop(step, model, batches):
        os.kill(os.getpid(), number)
        raise AssertionError("goes on")

    whole = train(tiny(name="whole"))
    with pytest.raises(Stopped, match=r"stopped by \S.*, nothing new saved; resume with --resume .*part"):
        train(tiny(name="part"), observe=stop)
    folder = Path(tiny().out) / "part"
    assert json.loads((folder / "status.json").read_text())["status"] == "stopped"
    assert not list((folder / "checkpoints").glob("step-*"))
    assert newest_unfinished(folder.parent) == folder
    assert_same_training(whole, train(tiny(name="part", resume=str(folder))))


def test_a_second_signal_does_not_interrupt_what_the_first_began(tiny):
    def stop(step, model, batches):
        try:
            os.kill(os.getpid(), signal.SIGINT)
        finally:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Stopped, match="stopped by SIGINT, nothing new saved"):
        train(tiny(name="twice"), observe=stop)


def test_a_third_signal_ends_even_a_run_that_does_not_end_itself(tmp_path):
    def life() -> None:
        with stop_signals():
            for _ in range(3):
                try:
                    os.kill(os.getpid(), signal.SIGTERM)
                except BaseException:
                    (tmp_path / "dropped").touch()
        os._exit(0)

    assert wait(fork(life)) == 128 + signal.SIGTERM and (tmp_path / "dropped").exists()


@pytest.mark.slow
def test_a_finished_run_stays_finished(tiny, monkeypatch):
    folder = train(tiny(name="done")).folder

    def stop(run, step):
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Run, "validate", stop)
    with pytest.raises(Stopped):
        train(tiny(name="done", resume=str(folder)))
    assert json.loads((folder / "status.json").read_text())["status"] == "finished"


@pytest.mark.slow
def test_a_signal_in_the_last_step_leaves_the_validation_to_the_next_life(tiny):
    whole = train(tiny(name="whole"))

    def stop_at_the_end(step, model, batches):
        if step == 5:
            os.kill(os.getpid(), signal.SIGTERM)

    part = train(tiny(name="part"), observe=stop_at_the_end)
    assert (part.finished, part.steps) == (False, 6) and newest_unfinished(part.folder.parent) == part.folder
    again = train(tiny(name="part", resume=str(part.folder)))
    assert again.finished and newest_unfinished(part.folder.parent) is None
    assert_same_training(whole, again)


@pytest.mark.slow
def test_resume_survives_a_folder_without_any_checkpoint(tiny):
    run = tiny(name="x")
    Run(run, World()).close()  # opened, never trained
    with pytest.raises(CheckpointError, match=r"runs/x belongs to another run: matrix_lr was 0.05, is 0.1; resume"):
        train(dataclasses.replace(run, resume=str(Path(run.out) / "x"), matrix_lr=0.1))
    assert train(dataclasses.replace(run, resume=str(Path(run.out) / "x"))).finished


def fork_train(cfg, delay):
    """Train in a forked child and SIGKILL it after `delay` seconds; True if it got to its end first."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            sys.stdout = sys.stderr = open(os.devnull, "w")
            code = 0 if train(cfg).finished else 2
        finally:
            os._exit(code)
    deadline = time.monotonic() + delay
    while time.monotonic() < deadline:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            assert os.waitstatus_to_exitcode(status) == 0
            return True
        time.sleep(0.005)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return False


@pytest.mark.slow
@pytest.mark.usefixtures("warm")
def test_sigkill_at_random_moments_changes_nothing(tiny):
    """Runs are killed and resumed until they finish, as many as it takes for `kills` to be dealt."""
    settings = {"width": 32, "iterations": 16, "save_every": 1, "val_every": 5}
    begun = time.monotonic()
    whole = train(tiny(name="whole", **settings))
    duration, rng, kills, runs = time.monotonic() - begun, dice(0), 0, 0
    while kills < repeats(8):
        cfg, runs = tiny(name=f"killed {runs}", **settings), runs + 1
        folder = Path(cfg.out) / str(cfg.name)
        while True:
            resume = str(folder) if (folder / "config.json").exists() else None
            patience = duration * rng.uniform(0.1, 0.8) if kills < repeats(8) else 600
            if fork_train(dataclasses.replace(cfg, resume=resume), patience):
                break
            kills += 1
        assert_same_training(whole, dataclasses.replace(whole, folder=folder))


POISONED = "blocks.2.mlp.c_fc.weight"


def poison(*steps, value=float("nan"), when=lambda batches: True):
    """An observer that puts `value` into one entry of one gradient at each of `steps`, for batches that `when` takes."""

    def observe(step, model, batches):
        if step in steps and when(batches):
            parameter = model.get_parameter(POISONED)
            handle = parameter.register_hook(
                lambda grad: (handle.remove(), grad.index_fill(0, torch.tensor([3]), value))[1]
            )

    return observe


def state_of(run):
    """Copies of all weights and of all optimizer state."""
    weights = {name: p.detach().clone() for name, p in run.model.named_parameters()}
    slices = {k: part.tensor.clone() for optimizer in run.optimizers for k, part in optimizer.slices().items()}
    return weights | slices


def assert_same_state(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


LAGS = pytest.mark.parametrize("lag", [0, 1], ids=["at once", "a step late"])


@pytest.mark.slow
@LAGS
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_non_finite_gradient_stops_before_the_update(tiny, opened, value, lag):
    until, run = opened(tiny(name="until", iterations=8)), opened(tiny(name="nan", iterations=8))
    run.recovery.lag, seen = lag, {}

    def observe(step, model, batches):
        poison(4, value=value)(step, model, batches)
        seen[step] = state_of(run)

    with pytest.raises(
        NonFiniteError, match=rf"step 4: not finite on rank 0: {POISONED}; the weights are those before"
    ):
        run.train(observe)
    assert_same_state(state_of(run), seen[4])
    assert max(seen) == 4 + lag  # the host was not held up, and yet nothing more changed
    until.train(lambda step, model, batches: step != 4 or assert_same_state(state_of(until), seen[4]))
    assert [step for step, _ in curve(run.folder)] == [0, 1, 2, 3]


@pytest.mark.slow
def test_the_bad_step_is_dumped(tiny, opened):
    run = opened(tiny(name="nan", micro_batches=2))
    with pytest.raises(NonFiniteError):
        run.train(poison(3))
    text = (run.folder / "bad-step-00000003.json").read_text()
    dump = json.loads(text, parse_constant=lambda text: pytest.fail(f"{text} is not strict JSON"))
    assert (dump["step"], dump["first_micro_batch"]) == (3, 3 * 2)
    (rank,) = dump["ranks"]
    assert math.isfinite(rank["loss"]) and rank["gradient_norms"].pop(POISONED) == "NaN"
    assert all(norm >= 0 for norm in rank["gradient_norms"].values())
    assert len(rank["gradient_norms"]) == len(list(run.model.parameters())) - 1
    for i, place in enumerate(rank["micro_batches"]):
        tokens = read_shard(run.corpus.directory / place["shard"])[place["first_token"] :][:128].tolist()
        bos = run.corpus.bos_token  # stands in front of a sequence that starts inside a document
        expected = tokens if tokens[0] == bos else [bos, *tokens[:-1]]
        assert expected == run.passes.batches.micro_batch(3 * 2 + i)[0].tolist()


@pytest.mark.slow
@LAGS
def test_skipping_leaves_out_the_update_and_nothing_else(tiny, opened, lag):
    run, seen = opened(tiny(name="skip", on_nonfinite="skip", iterations=8)), {}
    run.recovery.lag = lag

    def observe(step, model, batches):
        seen[step] = state_of(run)
        poison(3)(step, model, batches)

    assert run.train(observe).finished
    assert_same_state(seen[3], seen[4])
    assert not torch.equal(seen[4][POISONED], seen[5][POISONED])
    assert [step for step, _ in curve(run.folder)] == [0, 1, 2, 4, 5, 6, 7]
    assert "warning: step 3: not finite on rank 0" in (run.folder / "log.txt").read_text()


@pytest.mark.slow
def test_a_run_whose_steps_are_all_bad_gives_up(tiny, opened):
    run = opened(tiny(name="skip", on_nonfinite="skip", iterations=20))
    with pytest.raises(NonFiniteError, match="step 10: "):
        run.train(poison(*range(20)))


@pytest.mark.slow
def test_the_step_after_a_rollback_is_not_charged_with_the_dropped_ones(tiny, opened):
    run = opened(tiny(name="back", on_nonfinite="rollback", iterations=6, save_every=2))

    def observe(step, model, batches):
        if step == 5 and not run.skipped_micro_batches:
            run.train_s += 1000.0
            poison(5)(step, model, batches)

    assert run.train(observe).finished
    after = [row for row in read_metrics(run.folder) if row["kind"] == "train" and row["step"] >= 4]
    assert all(row["train_s"] > 1000 and row["tokens_per_s"] > 10 for row in after)  # 512 tokens in 1000 s would be 0.5


@pytest.mark.slow
@LAGS
def test_rolling_back_leaves_out_the_data(tiny, opened, lag):
    """Bad data at step 5, a checkpoint at step 4: steps 4 and on train on what follows that data, and a resume knows."""
    run = opened(tiny(name="back", on_nonfinite="rollback", iterations=9, save_every=2))
    run.recovery.lag, trained = lag, {}
    bad = run.passes.batches.micro_batch(5 * 4)[0]

    def observe(step, model, batches):
        trained[step] = batches[0][0]
        poison(step, when=lambda batches: torch.equal(batches[0][0], bad))(step, model, batches)

    result = run.train(observe)
    assert result.finished and curve(run.folder)[-1][0] == 8
    assert [step for step, _ in curve(run.folder)] == list(range(9))  # no line twice
    for step in range(9):
        data_step = step if step < 4 else step + 2
        assert torch.equal(trained[step], run.passes.batches.micro_batch(data_step * 4)[0])
    run.close()
    again = opened(tiny(name="back", on_nonfinite="rollback", iterations=9, save_every=2, resume=str(run.folder)))
    assert again.start == 9 and again.skipped_micro_batches == 2 * 4


@pytest.mark.slow
def test_rolling_back_is_bitwise_a_resume_with_later_data(tiny, opened):
    cfg = {"iterations": 9, "save_every": 4}
    whole = opened(tiny(name="back", on_nonfinite="rollback", **cfg))
    whole.train(lambda step, model, batches: whole.skipped_micro_batches or poison(5)(step, model, batches))
    other = opened(tiny(name="other", **cfg))

    def leave(step, model, batches):
        if step == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        other.train(leave)
    other.close()
    resumed = opened(tiny(name="other", resume=str(other.folder), **cfg))
    assert resumed.start == 4
    resumed.skipped_micro_batches = 2 * 4
    resumed.train()
    assert_same_state(state_of(whole), state_of(resumed))


@pytest.mark.slow
def test_rolling_back_without_a_checkpoint_says_what_is_missing(tiny, opened):
    run = opened(tiny(name="back", on_nonfinite="rollback"))
    with pytest.raises(NonFiniteError, match="no checkpoint to roll back to; set --save-every"):
        run.train(poison(2))


def test_a_spike_is_told_and_a_resumed_run_tells_it_too():
    rng = random.Random(0)
    losses = [3 + rng.gauss(0, 0.01) for _ in range(200)]
    watch = LossSpikeDetector()
    assert [watch.update(loss) for loss in losses] == [None] * 200
    assert len(watch.history) == 128 and watch.history[-1] == losses[-1]
    for each in (LossSpikeDetector(watch.history), watch):
        assert "jumped to 3.1000; the last 128 were " in each.update(3.1)
        assert each.update(3.02) is None
    assert LossSpikeDetector([3.0] * 31).update(9.0) is None  # too few to say


@pytest.mark.slow
def test_a_spike_in_a_run_is_a_warning_and_its_window_is_saved(tiny, opened):
    run = opened(tiny(name="spike", iterations=40, on_nonfinite="skip"))

    def observe(step, model, batches):
        if step == 38:
            with torch.no_grad():
                model.lm_head.weight.mul_(-30)

    run.train(observe)
    assert "warning: step 38: the loss jumped to" in (run.folder / "log.txt").read_text()
    run.close()
    again = opened(tiny(name="spike", iterations=40, on_nonfinite="skip", resume=str(run.folder)))
    assert again.recovery.spikes.history == [loss for _, loss in curve(run.folder)]


@pytest.mark.slow
def test_a_validation_loss_that_is_not_finite_ends_the_run_in_one_line(tiny, monkeypatch, tmp_path):
    monkeypatch.setattr(Passes, "evaluate", lambda passes, step: (3.0 if step == 0 else math.nan, None))
    with pytest.raises(NonFiniteError, match="step 3: the validation loss is nan") as fault:
        train(tiny(name="a", save_every=1))
    folder = Path(tiny().out) / "a"
    assert "\n" not in str(fault.value) and json.loads((folder / "status.json").read_text())["status"] == "diverged"
    assert curve(folder, "val") == [(0, 3.0), (3, None)]
    assert plot_loss_curve([folder], tmp_path / "loss.png").stat().st_size > 0


@pytest.mark.slow
def test_a_start_that_fails_leaves_its_name_free(tiny, monkeypatch):
    monkeypatch.setitem(sys.modules, "trackio", None)
    with pytest.raises(ConfigError, match="track=trackio needs a package"):
        train(tiny(name="a", track="trackio"))
    assert newest_unfinished(Path(tiny().out)) is None
    assert train(tiny(name="a")).finished


@pytest.mark.dist
def test_ranks_that_cannot_share_the_micro_batches_leave_no_folder(tiny):
    def work(world):
        with pytest.raises(ConfigError, match="4 micro-batches cannot be shared by 3 processes; start one of 1, 2, 4"):
            Run(tiny(name="a", micro_batches=4), world)
        return Path(tiny().out, "a").exists()

    assert run_ranks(3, work) == [False] * 3


@pytest.mark.dist
def test_all_ranks_hear_of_a_start_that_fails(tiny):
    def work(world):
        sys.modules["trackio"] = None
        with pytest.raises(ConfigError, match="track=trackio needs a package"):
            train(tiny(name="a", track="trackio"))
        return True

    assert run_ranks(2, work) == [True, True]


@pytest.mark.slow
def test_resuming_with_other_settings_names_them(tiny):
    result = train(tiny(name="a"))
    with pytest.raises(CheckpointError, match=r"width was 64, is 96.*matrix_lr was 0.05, is 0.1"):
        train(tiny(name="a", resume=str(result.folder), width=96, matrix_lr=0.1))


@pytest.mark.slow
def test_a_finished_run_resumes_to_nothing(tiny):
    result = train(tiny(name="a"))
    before = (result.folder / "checkpoints" / "step-00000006" / "manifest.json").stat().st_mtime_ns
    assert train(tiny(name="a", resume=str(result.folder))).finished
    assert (result.folder / "checkpoints" / "step-00000006" / "manifest.json").stat().st_mtime_ns == before
    assert [step for step, _ in curve(result.folder)] == list(range(6))


def test_two_runs_cannot_share_a_folder(tiny):
    with closing(Run(tiny(name="a"), World())), pytest.raises(ConfigError, match="in use by process"):
        Run(tiny(name="a"), World())


@pytest.mark.slow
def test_an_existing_run_is_not_overwritten(tiny):
    train(tiny(name="a"))
    with pytest.raises(ConfigError, match="already holds a run"):
        train(tiny(name="a"))


@pytest.mark.slow
def test_newest_unfinished_run(tiny):
    out = Path(tiny().out)
    assert newest_unfinished(out) is None
    train(tiny(name="done"))
    Run(tiny(name="open"), World()).close()
    assert newest_unfinished(out) == out / "open"


@pytest.mark.slow
def test_a_failed_save_costs_a_warning_and_three_the_run(tiny, opened, monkeypatch):
    run = opened(tiny(name="full", save_every=1))
    calls = []

    def fail(*args, **kwargs):
        calls.append(args[0])
        raise CheckpointError("disk full")

    monkeypatch.setattr(run.checkpoints, "save", fail)
    with pytest.raises(CheckpointError):
        run.train()
    assert calls == [1, 2, 3]
    assert (run.folder / "log.txt").read_text().count("warning: disk full") == 2


@pytest.mark.slow
def test_a_torn_line_of_metrics_is_dropped_on_resume(tiny):
    result = train(tiny(name="a", save_every=3))
    with open(result.folder / "metrics.jsonl", "a") as file:
        file.write('{"kind": "tr')
    train(tiny(name="a", resume=str(result.folder)))
    assert [step for step, _ in curve(result.folder)] == list(range(6))


@pytest.mark.slow
def test_adam_can_own_the_hidden_matrices(tiny):
    result = train(tiny(matrix_optimizer="adam", matrix_lr=0.01, iterations=30))
    assert result.val_loss < 4.0


def test_micro_batches_are_summed_over_tokens_and_averaged(tiny, opened):
    """The gradient of N micro-batches is the mean over them of the gradient summed over tokens (record26: AVG of SUMs)."""
    run = opened(tiny())
    batches = next(run.passes.batches.stream(0, 0, 1))
    run.passes.accumulate_gradients(batches, 0)
    accumulated = run.model.lm_head.weight.grad.clone()
    run.model.zero_grad()
    for inputs, targets in batches:
        run.model(inputs, targets, 1).backward()
    torch.testing.assert_close(accumulated, run.model.lm_head.weight.grad / 4)


def test_signals_are_restored_afterwards():
    before = signal.getsignal(signal.SIGTERM)
    with stop_signals() as received:
        received.something_to_save = True
        os.kill(os.getpid(), signal.SIGTERM)
        assert received == ["SIGTERM"]
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.slow
def test_the_end_of_a_parent_with_many_threads_is_heard_of_once(tmp_path):
    """The kernel tells of it up to once for each of its threads; three signals would end the process without a save."""
    for trial in range(5):
        ready, told = tmp_path / f"ready {trial}", tmp_path / f"told {trial}"

        def rank(ready=ready, told=told) -> None:
            stop_with_parent()
            with stop_signals() as received:
                received.something_to_save = True
                ready.touch()
                until(lambda: received)
                time.sleep(0.2)
                (tmp_path / "part").write_text(repr(received))
                (tmp_path / "part").rename(told)

        def torchrun(rank=rank) -> None:
            for _ in range(8):
                threading.Thread(target=time.sleep, args=(60,), daemon=True).start()
            fork(rank)
            time.sleep(60)

        parent = fork(torchrun)
        until(ready.exists)
        os.kill(parent, signal.SIGKILL)
        wait(parent)
        until(told.exists, 20)
        assert told.read_text() == "['the end of torchrun or SIGUSR2']"


STRICT = {"deterministic": True, "micro_batches": 8, "iterations": 5, "val_every": 2}


@pytest.mark.dist
@pytest.mark.parametrize("hidden", ["muon", "adam", "normuon"])
def test_a_strict_run_is_the_same_to_the_bit_on_any_number_of_ranks(tiny, hidden):
    alone = train(tiny(name="1", matrix_optimizer=hidden, **STRICT))
    for size in (2, 4):
        cfg = tiny(name=str(size), matrix_optimizer=hidden, **STRICT)
        results = run_ranks(size, lambda world, cfg=cfg: dataclasses.asdict(train(cfg))["finished"])
        assert results == [True] * size
        assert_same_training(alone, dataclasses.replace(alone, folder=Path(cfg.out) / cfg.name))


@pytest.mark.dist
def test_without_strict_the_bits_depend_on_the_number_of_ranks_but_little_else_does(tiny):
    """The test above could not fail if this one could not pass."""
    changes = STRICT | {"deterministic": False, "micro_batches_per_forward": 1}
    alone = train(tiny(name="1", **changes))
    assert run_ranks(4, lambda world: train(tiny(name="4", **changes)).finished) == [True] * 4
    folder = Path(tiny().out) / "4"
    ours, theirs = ([loss for _, loss in curve(f)] for f in (alone.folder, folder))
    assert ours != theirs and ours == pytest.approx(theirs, rel=1e-4)


def test_strict_needs_branches_of_the_tree():
    with pytest.raises(ConfigError, match="3 micro-batches per process do not fit the tree"):
        micro_batches_at_once(
            make_config("laptop", {"deterministic": True, "micro_batches": 6}), 2, torch.device("cpu")
        )
    for size in (1, 3, 6):
        assert (
            micro_batches_at_once(
                make_config("laptop", {"deterministic": True, "micro_batches": 6}), size, torch.device("cpu")
            )
            == 1
        )


@pytest.mark.slow
def test_a_mixture_trains_and_resumes(tiny, tmp_path):
    folders = [write_synthetic(tmp_path / f"part{seed}", 20_000, 4000, seed).directory for seed in (1, 2)]
    data = f"{folders[0]}:0.7,{folders[1]}:0.3"
    whole = train(tiny(data=data, name="whole", save_every=3))
    shutil.rmtree(whole.folder / "checkpoints" / "step-00000006")
    resumed = train(tiny(data=data, resume=str(whole.folder), save_every=3))
    assert resumed.finished and curve(resumed.folder) == curve(train(tiny(data=data, name="again")).folder)
    other = curve(train(tiny(data=f"{folders[0]}:0.3,{folders[1]}:0.7", name="other")).folder)
    assert other != curve(whole.folder)


@pytest.mark.slow
def test_training_time_counts_the_wait_for_a_step_that_the_device_still_works_on(tiny, monkeypatch):
    """As on a GPU, whose verdict on a step is read during the next one."""
    read = FiniteCheck.read
    monkeypatch.setattr(FiniteCheck, "read", lambda check: time.sleep(0.1) or read(check))
    with closing(Run(tiny(), World())) as run:
        run.recovery.lag = 1
        run.train()
    assert run.train_s > 0.1 * run.cfg.iterations


@pytest.mark.parametrize("at_once", [2**24, 0])
def test_shard_that_is_not_the_manifests_ends_a_run(tiny, tmp_path, monkeypatch, capsys, at_once):
    """One token of the training text is another: in one line, before the first step or, if hashed meanwhile, at the end."""
    monkeypatch.setattr("speedrun_mup.data.bound.AT_ONCE", at_once)
    corpus, _ = find_corpus("synthetic", "byte")
    data = Path(shutil.copytree(corpus.directory, tmp_path / "data"))
    path = data / corpus.train[0].name
    raw = bytearray(path.read_bytes())
    raw[-2] ^= 1
    path.write_bytes(raw)
    with pytest.raises(ShardError, match="not what the manifest says") as error:
        train(tiny(data=str(data), name="a"))
    assert error.value.exit_code == 3 and "\n" not in str(error.value)
    assert not list((tmp_path / "runs").rglob("step-00000006")) or not at_once


@pytest.mark.slow
def test_a_run_says_its_order_and_a_validation_smaller_than_asked(tiny, capsys):
    train(tiny(iterations=1, val_tokens=10**6))
    said = capsys.readouterr().out
    assert "data order: shuffled by seed 0; an epoch trains on 100.0% of the tokens" in said
    assert "validation: 49,920 tokens, as there are no more, of the 1,000,000 that --val-tokens asks for" in said


def test_a_run_on_upstreams_shards_resumes_by_its_former_fingerprint(tiny):
    cfg = tiny()
    corpus, _ = find_corpus("synthetic", "byte")
    known = dataclasses.replace(corpus, former_fingerprint="former")
    check_resumable(cfg, known, {"config": dataclasses.asdict(cfg), "corpus": "former"}, Path("x"))
    with pytest.raises(CheckpointError, match="the corpus is not the same"):
        check_resumable(cfg, corpus, {"config": dataclasses.asdict(cfg), "corpus": "former"}, Path("x"))
