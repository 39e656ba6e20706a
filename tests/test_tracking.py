import json
import sys

import pytest

from speedrun_mup.core.errors import ConfigError
from speedrun_mup.report import plot_loss_curve
from speedrun_mup.tracking import RunLog, clock, provenance, read_metrics


def record(step, train_s, loss=2.0):
    return {"kind": "train", "step": step, "loss": loss, "tokens": (step + 1) * 1000, "train_s": train_s}


@pytest.fixture
def log(tmp_path):
    opened = []

    def make(steps=100, start=0, main=True, progress=True, track="none"):
        opened.append(RunLog(tmp_path, steps, start, main, progress, track, {"width": 64}))
        return opened[-1]

    yield make
    for each in opened:
        each.close()


def test_clock():
    assert [clock(5), clock(245), clock(12_000), clock(187_200)] == ["0m05s", "4m05s", "3h20m", "2d04h"]


def test_a_long_run_says_so_once_from_its_first_steps(log, tmp_path, capsys):
    run = log(steps=1000)
    for step in range(5):
        run.train(record(step, train_s=9 + 20 * (step + 1)))  # the first step is slower: it warms up
    told = [line for line in capsys.readouterr().out.splitlines() if "this run will take" in line]
    assert told == ["this run will take about 5h32m here, by its first steps; going on"]  # 997 steps of 20 s
    assert "5h32m" in (tmp_path / "log.txt").read_text()


def test_a_very_slow_first_step_is_enough(log, capsys):
    log(steps=100).train(record(0, train_s=100))
    assert "about 2h45m here" in capsys.readouterr().out


def test_a_short_run_says_nothing(log, capsys):
    run = log(steps=100)
    for step in range(5):
        run.train(record(step, train_s=float(step + 1)))
    assert "will take" not in capsys.readouterr().out


def test_pace_leaves_out_the_first_step(log, tmp_path):
    run = log(steps=10)
    for step, train_s in enumerate([5.0, 6.0, 7.0]):
        run.train(record(step, train_s))
    assert [round(r["tokens_per_s"]) for r in read_metrics(tmp_path)] == [200, 1000, 1000]


def test_after_a_rollback_no_step_is_charged_with_what_was_dropped(log, tmp_path, capsys):
    run = log(steps=1000)
    for step in range(100):
        run.train(record(step, train_s=float(step + 1)))
    run.rewind(2, train_s=100.0)
    for step in (2, 3):
        run.train(record(step, train_s=99.0 + step))
    assert [round(row["tokens_per_s"]) for row in read_metrics(tmp_path)] == [1000] * 4
    assert "will take" not in capsys.readouterr().out


def test_numbers_that_are_not_finite_stay_strict_json(log, tmp_path):
    log().train(record(0, 1.0, loss=float("nan")))

    def refuse(text):
        raise ValueError(text)

    line = (tmp_path / "metrics.jsonl").read_text()
    assert json.loads(line, parse_constant=refuse)["loss"] is None


def test_metrics_that_are_not_there_are_one_line(tmp_path):
    with pytest.raises(ConfigError, match=r"metrics.jsonl cannot be read \(No such file or directory\); give"):
        read_metrics(tmp_path)


def test_a_resumed_log_drops_what_the_dead_life_wrote_later(log, tmp_path):
    first = log()
    for step in range(4):
        first.train(record(step, float(step + 1)))
    first.close()
    log(start=2).train(record(2, 3.5))
    assert [(r["step"], r["train_s"]) for r in read_metrics(tmp_path)] == [(0, 1.0), (1, 2.0), (2, 3.5)]


def test_a_damaged_line_in_the_middle_is_an_error(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 0}\nnonsense\n{"step": 2}\n')
    with pytest.raises(ConfigError, match=r"metrics.jsonl:2 is not JSON"):
        read_metrics(tmp_path)


def test_other_ranks_are_silent(log, tmp_path, capsys):
    run = log(main=False)
    run.say("x")
    run.train(record(0, 1.0))
    assert capsys.readouterr().out == "" and not list(tmp_path.iterdir())


def test_a_full_disk_costs_one_warning(log, monkeypatch, capsys):
    class Full:
        name = "metrics.jsonl"

        def write(self, text):
            raise OSError(28, "No space left on device")

        def close(self):
            pass

    run = log()
    run._metrics.close()
    monkeypatch.setattr(run, "_metrics", Full())
    for step in range(3):
        run.train(record(step, float(step + 1)))
    assert capsys.readouterr().err.count("No space left on device") == 1


def test_a_missing_tracker_names_its_extra(log, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ConfigError, match=r"pip install 'speedrun-mup\[wandb\]'"):
        log(track="wandb")


def test_trackers_get_every_number(log, monkeypatch, tmp_path):
    class FakeTracker:
        calls: list = []

        def init(self, **kwargs):
            self.calls.append(kwargs["config"])
            return self

        def log(self, values, step):
            self.calls.append((step, values))

        def finish(self):
            self.calls.append("finished")

    fake = FakeTracker()
    monkeypatch.setitem(sys.modules, "trackio", fake)
    run = log(track="trackio")
    run.train(record(0, 1.0))
    run.close()
    assert fake.calls[0] == {"width": 64} and fake.calls[2] == "finished"
    step, values = fake.calls[1]
    assert step == 0 and values["train/loss"] == 2.0 and values["train/tokens_per_s"] == 1000


def test_provenance_names_versions_and_sources():
    made = provenance(["train.py", "--width", "64"])
    assert made["command"] == "train.py --width 64" and len(made["source_sha256"]) == 64 and made["revision"]


def test_provenance_needs_no_git(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert provenance([])["revision"] == "not known: no git, or not a git checkout"


def test_the_loss_curve_is_a_picture(log, tmp_path):
    run = log()
    for step in range(5):
        run.train(record(step, float(step + 1), loss=3.0 - 0.1 * step))
    run.val({"kind": "val", "step": 5, "loss": 2.5, "train_s": 5.0})
    out = plot_loss_curve([tmp_path], tmp_path / "loss.png")
    assert out.read_bytes().startswith(b"\x89PNG") and out.stat().st_size > 5000
