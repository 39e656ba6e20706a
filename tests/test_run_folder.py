"""Going on with a run: longer, elsewhere, from other weights; which run `--resume auto` takes; folders that are renamed."""

import dataclasses
import errno
import json
import os
import shutil
from contextlib import closing
from pathlib import Path

import pytest
import torch
from conftest import TINY
from faults.harness import fork, wait
from helpers.dist import run_ranks
from helpers.runs import newest_unfinished
from test_cli import as_flags
from test_training import assert_same_training, curve, weights

from speedrun_mup.cli import main
from speedrun_mup.core.errors import ConfigError, UserError
from speedrun_mup.core.utils import World
from speedrun_mup.data.corpus import write_synthetic
from speedrun_mup.training.checkpoint import CheckpointError, Loaded
from speedrun_mup.training.resume import describe_extension
from speedrun_mup.training.run import Run, train
from speedrun_mup.training.run_folder import FolderLock, claim_unfinished, saved_config
from speedrun_mup.training.tracking import attempts, read_metrics


def settings(tiny, folder, **changes):
    """What the command makes of `--resume folder` and flags."""
    return dataclasses.replace(saved_config(folder), resume=str(folder), **changes)


# --- a longer run


@pytest.mark.slow
def test_a_finished_run_can_be_extended(tiny):
    first = train(tiny(name="a", save_every=3))
    longer = train(settings(tiny, first.folder, iterations=12))
    assert longer.finished and longer.steps == 12 and [step for step, _ in curve(longer.folder)] == list(range(12))
    assert saved_config(longer.folder).iterations == 12
    assert (
        attempts(longer.folder)[-1]["changed"] == {"iterations": [6, 12]}
        and attempts(longer.folder)[-1]["from_step"] == 6
    )
    said = (longer.folder / "log.txt").read_text()
    assert "extended from 6 to 12 steps: " in said and "step 6 lies in the old cooldown" in said
    rates = [r["lr"] / 0.05 for r in read_metrics(longer.folder) if r["kind"] == "train"]
    assert rates[5] < 0.5 < 1.0 == rates[6] and rates[11] < 0.3


@pytest.mark.slow
def test_an_extended_run_that_is_interrupted_goes_on_to_the_bit(tiny):
    folders = []
    for name in ("whole", "cut"):
        folders.append(train(tiny(name=name)).folder)
    whole = train(settings(tiny, folders[0], iterations=12, save_every=2))

    def leave(step, model, batches):
        if step == 9:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(settings(tiny, folders[1], iterations=12, save_every=2), observe=leave)
    assert newest_unfinished(folders[1].parent) == folders[1]
    assert_same_training(whole, train(settings(tiny, folders[1])))  # config.json knows the new length


def test_extending_before_the_cooldown_says_that_the_rate_stays(tiny):
    cfg = tiny(iterations=200, cooldown=0.5)
    assert "up to step 40 the learning rate was that of the longer run too" in describe_extension(100, cfg, 40)
    late = describe_extension(100, cfg, 90)
    assert "fallen to 0.28 of its peak, and it continues at 1.00" in late and "start again" in late


@pytest.mark.slow
def test_a_run_does_not_get_shorter(tiny):
    folder = train(tiny(name="a")).folder
    with pytest.raises(CheckpointError, match="iterations was 6, is 4"):
        train(settings(tiny, folder, iterations=4))


# --- from other weights


@pytest.mark.slow
@pytest.mark.parametrize("source", ["folder", "checkpoint"])
def test_a_new_run_begins_with_the_weights_of_another(tiny, source):
    first = train(tiny(name="a"))
    path = first.folder / "checkpoints" / "step-00000006"
    given, seen = (first.folder if source == "folder" else path), {}

    def see(step, model, batches):
        if step == 0:
            seen.update({name: p.detach().clone() for name, p in model.named_parameters()})

    second = train(tiny(name="b", init_from=str(given), iterations=3), observe=see)
    assert [step for step, _ in curve(second.folder)] == [0, 1, 2] and curve(second.folder)[0][1] < 4.0
    assert all(torch.equal(seen[name], tensor) for name, tensor in weights(first).items())
    assert saved_config(second.folder).init_from == str(path.absolute())
    assert f"starting at step 0 with the weights of {path}" in (second.folder / "log.txt").read_text()


@pytest.mark.slow
def test_a_run_from_weights_that_is_stopped_before_its_first_save_begins_with_them_again(tiny):
    first = train(tiny(name="a"))
    whole = train(tiny(name="b", init_from=str(first.folder)))
    Run(tiny(name="c", init_from=str(first.folder)), World()).close()
    assert_same_training(whole, train(settings(tiny, first.folder.parent / "c")))


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes, said",
    [
        ({"width": 96}, "another model, 27 of its parameters do not fit"),
        ({"width": 96}, "that run has --width 64 (here 96)"),
        ({"attention_gate": 12}, "that run has --attention-gate 0 (here 12)"),
        (
            {"base_width": 64},
            "the same weights give other predictions with these settings; keep its --parametrization mup",
        ),
        ({"head_dim": 32}, "keep its --parametrization mup --base-width 32 --head-dim 16"),
    ],
)
def test_weights_that_do_not_fit_are_refused_in_one_line_and_leave_the_name_free(tiny, changes, said):
    first = train(tiny(name="a", iterations=1))
    with pytest.raises(CheckpointError, match="--init-from .*: ") as fault:
        train(tiny(name="b", init_from=str(first.folder), **changes))
    assert said in str(fault.value) and "\n" not in str(fault.value)
    assert not (first.folder.parent / "b").exists()


@pytest.mark.slow
def test_init_from_nothing_or_beside_resume_is_one_line(tiny, tmp_path, capsys):
    folder = train(tiny(name="a", iterations=1)).folder
    with pytest.raises(CheckpointError, match="no checkpoint there; give a run's folder or a step-N in it"):
        train(tiny(name="b", init_from=str(tmp_path)))
    assert main(["train", "--resume", str(folder), "--init-from", str(folder)]) == 2
    assert capsys.readouterr().err.endswith("continues one; leave out one of them\n")


@pytest.mark.dist
def test_ranks_begin_with_the_same_weights(tiny):
    first = train(tiny(name="a"))

    def work(world):
        return train(tiny(name="b", init_from=str(first.folder))).finished

    assert run_ranks(2, work) == [True, True]
    alone = train(tiny(name="c", init_from=str(first.folder)))
    theirs = curve(first.folder.parent / "b")
    assert [loss for _, loss in theirs] == pytest.approx([loss for _, loss in curve(alone.folder)], rel=1e-4)


# --- elsewhere


@pytest.mark.slow
def test_data_that_moved_are_known_by_their_fingerprint(tiny, tmp_path):
    old = write_synthetic(tmp_path / "old", 20_000, 4000, 1).directory
    run = train(tiny(data=str(old), name="a", save_every=3))
    whole = dataclasses.replace(run, folder=Path(shutil.copytree(run.folder, run.folder.parent / "whole")))
    shutil.rmtree(run.folder / "checkpoints" / "step-00000006")
    new = old.rename(tmp_path / "new")
    with pytest.raises(UserError, match="if the data moved, add --data and their new place"):
        train(settings(tiny, run.folder))
    resumed = train(settings(tiny, run.folder, data=str(new)))
    assert resumed.finished
    assert_same_training(whole, resumed)
    assert saved_config(run.folder).data == str(new)
    other = write_synthetic(tmp_path / "other", 20_000, 4000, 2).directory
    with pytest.raises(CheckpointError, match="the corpus is not the same"):
        train(settings(tiny, run.folder, data=str(other)))


@pytest.mark.slow
def test_a_type_that_auto_chooses_may_change_with_the_device(tiny, monkeypatch):
    run = train(tiny(name="a", save_every=3, width=32))
    shutil.rmtree(run.folder / "checkpoints" / "step-00000006")
    monkeypatch.setattr("speedrun_mup.training.build.pick_dtype", lambda cfg, device: torch.bfloat16)
    resumed = train(settings(tiny, run.folder))
    assert resumed.finished and weights(resumed)["embed.weight"].dtype is torch.bfloat16
    assert "this device takes bfloat16 instead of float32" in (run.folder / "log.txt").read_text()
    with pytest.raises(CheckpointError, match="dtype was auto, is bfloat16"):
        train(settings(tiny, run.folder, dtype="bfloat16"))


@pytest.mark.slow
def test_other_code_is_told_of_and_goes_on(tiny, monkeypatch):
    run = train(tiny(name="a"))
    assert "the code changed" not in (train(settings(tiny, run.folder)).folder / "log.txt").read_text()
    monkeypatch.setattr("speedrun_mup.training.resume.source_sha256", lambda: "f" * 64)
    assert train(settings(tiny, run.folder)).finished
    assert "the code changed since this run's last attempt" in (run.folder / "log.txt").read_text()


# --- which run


@pytest.mark.slow
def test_a_run_is_left_out_that_is_in_use_of_other_settings_unreadable_or_diverged(tiny):
    out, said, begun = Path(tiny().out), [], []
    for name in ("taken", "used", "other", "config", "fifo", "log", "metrics", "checkpoint", "diverged", "done"):
        changes = {"matrix_lr": 0.1} if name == "other" else {}
        with closing(Run(tiny(name=name, save_every=1, **changes), World())) as run:
            if name in ("checkpoint", "done"):
                run.train()
        begun.append(out / name / "config.json")
    (out / "config" / "config.json").write_bytes(b"\xff{")
    os.mkfifo(out / "fifo" / "status.json")
    os.unlink(out / "fifo" / "config.json")
    os.mkfifo(out / "fifo" / "config.json")
    os.unlink(out / "log" / "log.txt")
    os.mkfifo(out / "log" / "log.txt")
    (out / "metrics" / "metrics.jsonl").write_text("{}\n[]\n")
    for step in (out / "checkpoint" / "checkpoints").iterdir():
        (step / "state.json").write_bytes(b"")
    (out / "diverged" / "status.json").write_text('{"status": "diverged", "why": "x"}')
    (out / "done" / "status.json").write_text('{"status": "finished", "why": null}')
    for moment, config in enumerate(begun):  # the one to take is the oldest
        os.utime(config, (moment, moment))
    with closing(FolderLock(out / "used")):
        lock = claim_unfinished(out, {"matrix_lr": 0.05, "out": "elsewhere", "resume": "auto"}, said.append)
    assert lock and lock.folder == out / "taken"
    with closing(lock), pytest.raises(ConfigError, match="in use by process"):
        FolderLock(out / "taken")
    told = {Path(line.split(": ")[0].rpartition(" ")[2]).name: line for line in said}
    assert told.keys() == {"used", "other", "config", "fifo", "log", "metrics", "checkpoint", "diverged"}
    assert "matrix_lr is 0.1, not 0.05" in told["other"] and "in use by process" in told["used"]
    assert all("\n" not in line for line in said)


def test_two_runs_begun_in_one_second_have_folders_of_their_own(tiny):
    with closing(Run(tiny(), World())) as one, closing(Run(tiny(), World())) as other:
        assert one.folder != other.folder


def test_each_of_several_jobs_takes_a_run_of_its_own(tiny):
    out = Path(tiny().out)
    for name in ("a", "b"):
        Run(tiny(name=name), World()).close()
    locks = [claim_unfinished(out) for _ in range(3)]
    assert {lock.folder.name for lock in locks if lock} == {"a", "b"} and locks[2] is None
    for lock in locks[:2]:
        lock.close()


@pytest.mark.dist
def test_all_ranks_take_the_run_that_rank_0_locked(tiny):
    from speedrun_mup.commands.train import settle

    out = Path(tiny().out)
    for name in ("a", "b"):
        Run(tiny(name=name), World()).close()

    def work(world):
        cfg, lock = settle({"preset": "auto", "resume": "auto", "out": str(out), "device": "cpu"})
        assert (lock is not None) == world.is_main
        result = train(cfg, lock=lock)
        return str(result.folder), result.finished

    told = run_ranks(2, work)
    assert told[0] == told[1] and told[0][1]
    assert newest_unfinished(out) != Path(told[0][0])


@pytest.mark.slow
def test_resume_auto_starts_a_new_run_beside_one_that_is_in_use(tmp_path):
    flags = ["train", *as_flags(TINY), "--out", str(tmp_path), "--resume", "auto"]
    assert main([*flags, "--name", "a", "--iterations", "1"]) == 0
    (tmp_path / "a" / "status.json").unlink()
    with closing(FolderLock(tmp_path / "a")):
        assert wait(fork(lambda: os._exit(main(flags)))) == 0
    assert len([path for path in tmp_path.iterdir() if (path / "config.json").exists()]) == 2


# --- renamed


@pytest.mark.slow
def test_a_run_goes_on_in_its_folder_when_that_is_renamed(tiny):
    out = Path(tiny().out)
    whole = train(tiny(name="whole", save_every=2))

    def rename(step, model, batches):
        if step == 3:
            (out / "a").rename(out / "b")
            Run(tiny(name="a"), World()).close()  # another run takes the name

    result = train(tiny(name="a", save_every=2), observe=rename)
    assert result.finished and result.folder.samefile(out / "b")
    assert_same_training(whole, dataclasses.replace(result, folder=out / "b"))
    assert json.loads((out / "b" / "status.json").read_text())["status"] == "finished"
    assert not list((out / "a" / "checkpoints").glob("*")) and not (out / "a" / "status.json").exists()
    assert "was renamed to " in (out / "b" / "log.txt").read_text()
    assert train(settings(tiny, out / "a")).finished  # and the other run was left alone


@pytest.mark.slow
def test_a_folder_that_is_gone_ends_the_run_in_one_line(tiny):
    out = Path(tiny().out)

    def remove(step, model, batches):
        if step == 1:
            shutil.rmtree(out / "a")

    with pytest.raises(UserError, match="was renamed or deleted while the run worked in it") as fault:
        train(tiny(name="a", save_every=2), observe=remove)
    assert "\n" not in str(fault.value) and not (out / "a").exists()


@pytest.mark.dist
def test_all_ranks_follow_a_renamed_folder(tiny):
    out = Path(tiny().out)

    def work(world):
        def rename(step, model, batches):
            if step == 3 and world.is_main:
                (out / "a").rename(out / "b")

        return train(tiny(name="a", save_every=2), observe=rename).finished

    assert run_ranks(2, work) == [True, True]
    assert Loaded(out / "b" / "checkpoints" / "step-00000006").step == 6 and not (out / "a").exists()


@pytest.mark.slow
def test_a_folder_may_be_renamed_between_two_lives(tiny):
    run = train(tiny(name="a", save_every=3))
    shutil.rmtree(run.folder / "checkpoints" / "step-00000006")
    moved = run.folder.rename(run.folder.parent / "moved")
    assert train(settings(tiny, moved)).folder == moved


@pytest.mark.slow
@pytest.mark.parametrize(
    "resume, fix", [(True, "continue in a copy of its folder, with --resume"), (False, "with --out")]
)
def test_a_run_on_a_disk_that_is_read_only_is_told_what_helps(tiny, monkeypatch, resume, fix):
    cfg = tiny(name="there", iterations=1)
    train(cfg)

    def read_only(path):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))

    monkeypatch.setattr("speedrun_mup.files.open_lock", read_only)
    there = f"{cfg.out}/there"
    asked = dataclasses.replace(cfg, resume=there) if resume else dataclasses.replace(cfg, name="other")
    with pytest.raises(ConfigError, match=rf"\.lock cannot be written \(Read-only file system\); .*{fix}$"):
        train(asked)
