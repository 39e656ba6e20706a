import contextlib
import errno
import json
import os
import shutil
import sys
import threading
import time
import types
from fractions import Fraction
from unittest import mock

import pytest

from speedrun_mup.core.errors import ConfigError
from speedrun_mup.report import plot_loss_curve
from speedrun_mup.training.schedules import Schedule, Stage
from speedrun_mup.training.tracking import (
    RunLog,
    clock,
    missing_steps,
    provenance,
    read_metrics,
    read_status,
    source_sha256,
)


def record(step, train_s, loss=2.0):
    return {"kind": "train", "step": step, "loss": loss, "tokens": (step + 1) * 1000, "train_s": train_s}


@pytest.fixture
def log(tmp_path):
    opened = []

    def make(steps=100, start=0, main=True, progress=True, track="none"):
        schedule = Schedule((Stage(Fraction(1), 1),), steps, 1000, 1, 1, 0.0, 0.0, (0.9, 0.9, 0))
        opened.append(RunLog(tmp_path, schedule, start, main, progress, track, {"width": 64}))
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
    told = [line for line in capsys.readouterr().out.splitlines() if "estimated time" in line]
    assert told == ["estimated time: 5h32m (from the first steps)"]  # 997 steps of 20 s
    assert "5h32m" in (tmp_path / "log.txt").read_text()


def test_a_very_slow_first_step_is_enough(log, capsys):
    log(steps=100).train(record(0, train_s=100))
    assert "estimated time: 2h45m" in capsys.readouterr().out


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
    line = json.dumps(record(0, 1.0))
    (tmp_path / "metrics.jsonl").write_text(f"{line}\nnonsense\n{line}\n")
    with pytest.raises(ConfigError, match=r"metrics.jsonl:2 is not JSON"):
        read_metrics(tmp_path)


def test_other_ranks_are_silent(log, tmp_path, capsys):
    run = log(main=False)
    run.say("x")
    run.train(record(0, 1.0))
    assert capsys.readouterr().out == "" and not list(tmp_path.iterdir())


@contextlib.contextmanager
def full_disk(code=errno.ENOSPC):
    """Every write of a line stops half way, as it does where the last block is full; the rest of a file system works."""
    real = os.write

    def write(descriptor, data):
        if len(data) > 1:
            real(descriptor, bytes(data)[: len(data) // 2])
        raise OSError(code, os.strerror(code))

    with mock.patch.object(os, "write", write):
        yield


def test_a_full_disk_costs_one_warning(log, tmp_path, capsys):
    """Once there is room again, the gap is told."""
    run = log()
    run.write_status("running")
    run.train(record(0, 1.0))
    with full_disk():
        for step in range(1, 4):
            run.train(record(step, float(step + 1)))
    told = capsys.readouterr().err
    assert told.count("\n") == 1 and "No space left on device" in told and "make room" in told
    run.train(record(4, 5.0))
    assert [row["step"] for row in read_metrics(tmp_path)] == [0, 4]  # no torn half of a line between them
    gap = "metrics.jsonl can be written again; it lacks steps 1 to 3"
    assert gap in capsys.readouterr().err and gap in (tmp_path / "log.txt").read_text()
    assert read_status(tmp_path) == {"status": "running", "why": None, "missing_steps": [(1, 3)]}
    run.close()
    log(start=5).write_status("running")  # a later life knows of it, too
    assert read_status(tmp_path)["missing_steps"] == [(1, 3)]
    assert "lacks steps 1 to 3" in capsys.readouterr().err


def test_a_gap_at_the_end_is_told_in_the_status(log, tmp_path):
    run = log()
    run.train(record(0, 1.0))
    with full_disk():
        run.train(record(1, 2.0))
    run.write_status("finished")
    assert read_status(tmp_path)["missing_steps"] == [(1, 1)]


def test_a_step_with_bad_numbers_is_not_missing(log, tmp_path):
    run = log()
    run.train(record(0, 1.0))
    run.dump("bad-step-00000001.json", {"loss": float("nan")})
    run.train(record(2, 3.0))
    assert missing_steps(tmp_path, read_metrics(tmp_path)) == []
    assert json.loads((tmp_path / "bad-step-00000001.json").read_text()) == {"loss": "NaN"}


@pytest.mark.parametrize("code", [errno.EROFS, errno.EIO, errno.EFBIG, errno.ENOSPC])
def test_what_cannot_be_written_never_raises(code, log, tmp_path, capsys):
    run = log()
    shutil.rmtree(tmp_path)  # the folder is gone as well
    with full_disk(code):
        run.say("a line")
        run.train(record(0, 1.0))
        run.write_status("finished")
        run.dump("bad-step-00000001.json", {})
        run.close()
    assert "a line" in capsys.readouterr().out


RECORD = {"kind": "train", "step": 3, "loss": 2.0, "tokens": 100, "train_s": 1.0}
ODD_LINES = [
    b"\xff\xfe\x00",
    b"null",
    b"[1]",
    b'"x"',
    b"[" * 60_000,
    b'{"a":' * 10_000,
    b"x" * 100_000,
    b"{}",
    b'{"kind": ["train"], "step": 3}',
    *(json.dumps(RECORD | change).encode() for change in ({"step": None}, {"step": -1}, {"step": "3"}, {"step": True})),
    *(
        json.dumps(RECORD | change).encode()
        for change in ({"loss": "2"}, {"loss": []}, {"tokens": 1.5}, {"tokens": None})
    ),
    *(json.dumps({k: v for k, v in RECORD.items() if k != key}).encode() for key in RECORD),
    json.dumps(RECORD).replace("2.0", "1e999").encode(),
    json.dumps(RECORD).replace("2.0", "NaN").encode(),
    json.dumps(RECORD).replace("2.0", "9" * 5000).encode(),
    json.dumps(RECORD).replace("2.0", "9" * 400).encode(),
]


@pytest.mark.parametrize("line", ODD_LINES, ids=range(len(ODD_LINES)))
def test_a_line_that_no_run_writes_is_named_unless_it_is_the_last(line, tmp_path):
    good = json.dumps(RECORD).encode() + b"\n"
    (tmp_path / "metrics.jsonl").write_bytes(good + line + b"\n" + good)
    with pytest.raises(ConfigError, match=r"metrics.jsonl:2 (is|has)") as caught:
        read_metrics(tmp_path)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400
    (tmp_path / "metrics.jsonl").write_bytes(good + line)
    assert read_metrics(tmp_path) == [RECORD]


def test_a_torn_last_line_is_cut_off_before_the_next_one(log, tmp_path):
    log().train(record(0, 1.0))
    with open(tmp_path / "metrics.jsonl", "ab") as file:
        file.write(b'{"kind": "tr\xff')
    log(start=1).train(record(1, 2.0))
    assert [row["step"] for row in read_metrics(tmp_path)] == [0, 1]


@pytest.mark.slow
def test_a_million_lines_take_seconds(tmp_path):
    line = json.dumps(RECORD) + "\n"
    (tmp_path / "metrics.jsonl").write_text(line * 200_000)
    began = time.process_time()
    assert len(read_metrics(tmp_path)) == 200_000
    assert time.process_time() - began < 6


@pytest.mark.parametrize("name", ["metrics.jsonl", "log.txt"])
def test_nothing_is_written_through_a_link_or_into_a_fifo(name, log, tmp_path):
    victim = tmp_path / "victim"
    victim.write_text("precious")
    (tmp_path / name).symlink_to(victim)
    with pytest.raises(ConfigError, match="it is a symbolic link, not a regular file"):
        log()
    (tmp_path / name).unlink()
    os.mkfifo(tmp_path / name)
    with pytest.raises(ConfigError, match="it is a FIFO, not a regular file"):
        log()
    assert victim.read_text() == "precious"


def test_a_status_is_replaced_whatever_stands_in_its_place(log, tmp_path):
    os.mkfifo(tmp_path / "status.json")
    assert read_status(tmp_path)["status"] == "not known"
    log().write_status("running")
    assert read_status(tmp_path)["status"] == "running"


@pytest.mark.parametrize(
    "content", [b"", b"[]", b'{"status": 1, "why": null}', b'{"status": "x"}', b"[" * 10**5, b"\xff"]
)
def test_a_damaged_status_is_not_known(content, tmp_path):
    (tmp_path / "status.json").write_bytes(content)
    assert read_status(tmp_path) == {"status": "not known", "why": None, "missing_steps": []}


class Service:
    """A tracker that does as its class says at one of its calls."""

    def __init__(self, where, what):
        self.where, self.what, self.steps, self.calls = where, what, [], []

    def _at(self, where):
        self.calls.append(where)
        if where == self.where:
            self.what()

    def init(self, **settings):
        self._at("init")
        return self

    def log(self, values, step):
        self._at("log")
        self.steps.append(step)

    def finish(self):
        self._at("finish")


def raising(fault):
    def work():
        raise fault

    return work


@pytest.mark.parametrize("where", ["init", "log", "finish"])
@pytest.mark.parametrize(
    "fault", [ConnectionError("gone\nand more"), SystemExit(3), KeyboardInterrupt(), MemoryError()]
)
def test_a_tracker_that_raises_is_switched_off_in_one_line(where, fault, log, tmp_path, capsys, monkeypatch):
    service = Service(where, raising(fault))
    monkeypatch.setitem(sys.modules, "wandb", service)
    run = log(track="wandb", progress=False)
    for step in range(3):
        run.train(record(step, float(step + 1)))
    run.close()
    told = capsys.readouterr().err
    assert told.count("\n") == 1 and f"wandb failed ({type(fault).__name__}" in told and "WANDB_MODE=offline" in told
    assert told in (tmp_path / "log.txt").read_text() and service.calls.count(where) == 1
    assert len(read_metrics(tmp_path)) == 3


@pytest.mark.parametrize("where", ["init", "log", "finish"])
def test_a_tracker_that_hangs_is_waited_for_a_bounded_time(where, log, capsys, monkeypatch):
    never = threading.Event()
    monkeypatch.setitem(sys.modules, "wandb", Service(where, lambda: never.wait(30)))
    monkeypatch.setattr("speedrun_mup.training.trackers.TRACKER_WAIT_S", 0.2)
    run = log(track="wandb", progress=False)
    began = time.monotonic()
    run.train(record(0, 1.0))
    run.close()
    assert time.monotonic() - began < 5 and "did not end within 0.2 s" in capsys.readouterr().err
    never.set()


def test_a_folder_of_the_package_s_name_is_not_the_package(log, tmp_path, monkeypatch):
    (tmp_path / "trackio").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "trackio", raising=False)
    with pytest.raises(ConfigError, match=r"pip install 'speedrun-mup\[trackio\]'"):
        log(track="trackio")


def test_tensorboard_hides_what_a_dead_life_mirrored(log, tmp_path, monkeypatch):
    made = []

    class SummaryWriter:
        def __init__(self, path, purge_step=None):
            made.append((path, purge_step))

        def add_scalar(self, name, value, step):
            pass

        def close(self):
            made.append("closed")

    package = types.SimpleNamespace(SummaryWriter=SummaryWriter)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", package)
    run = log(track="tensorboard")
    for step in range(4):
        run.train(record(step, float(step + 1)))
    run.close()
    run = log(track="tensorboard", start=3)
    run.rewind(2)
    run.close()
    path = str(tmp_path / "tensorboard")
    assert made == [(path, None), "closed", (path, 3), "closed", (path, 2), "closed"]


def test_tensorboard_does_not_follow_a_linked_folder(log, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", types.SimpleNamespace(SummaryWriter=None))
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "tensorboard").symlink_to(tmp_path / "elsewhere")
    log(track="tensorboard").close()
    assert "it is a symbolic link, not a folder" in capsys.readouterr().err


def test_the_hash_of_the_source_is_taken_once(monkeypatch):
    before = source_sha256()
    monkeypatch.setattr("pathlib.Path.read_bytes", lambda path: b"changed since")
    assert source_sha256() == before == provenance([])["source_sha256"]
    source_sha256.cache_clear()
    assert source_sha256() != before
    source_sha256.cache_clear()


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


@pytest.mark.slow
def test_the_loss_curve_is_a_picture(log, tmp_path):
    run = log()
    for step in range(5):
        run.train(record(step, float(step + 1), loss=3.0 - 0.1 * step))
    run.val({"kind": "val", "step": 5, "loss": 2.5, "train_s": 5.0})
    out = plot_loss_curve([tmp_path], tmp_path / "loss.png")
    assert out.read_bytes().startswith(b"\x89PNG") and out.stat().st_size > 5000
