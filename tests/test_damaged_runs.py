"""Every small file of a run's folder, damaged in many ways: each command that reads it answers in a line, at once."""

from __future__ import annotations

import json
import os
import shutil
import signal
from contextlib import contextmanager
from pathlib import Path
from random import Random

import pytest
from faults.harness import dice, repeats
from test_checkpoint import reseal

from speedrun_mup.cli import main
from speedrun_mup.core.errors import UserError
from speedrun_mup.report import plot_loss_curve
from speedrun_mup.training import train
from speedrun_mup.training.checkpoint import MANIFEST, STATE

COUNT = repeats(4)  # damaged folders of each file
STEP = "checkpoints/step-00000004"
FILES = (
    *("status.json", "config.json", "metrics.jsonl", "provenance.json", ".lock", "log.txt"),
    *(f"{STEP}/{MANIFEST}", f"{STEP}/{STATE}"),
)
VALUES = (
    None,
    True,
    -1,
    0,
    1.5,
    1e308,
    10**40,
    2**63,
    "",
    "x",
    "\x1b[31m\n\u202e",
    "9" * 400,
    [],
    [[]],
    {},
    {"a": None},
    ["a", 1],
)
WHOLE = (
    b"",
    b"\0",
    b"\xff\xfe",
    b"null",
    b"[]",
    b"3",
    b'"x"',
    b"{",
    b"[" * 100_000,
    b'{"a":' * 50_000,
    b"1" * 5000,
    b"\n" * 99,
)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A folder with one run that stopped before its end, as far as it says."""
    from conftest import TINY

    from speedrun_mup.config import make_config

    out = tmp_path_factory.mktemp("damaged") / "runs"
    settings = TINY | {"width": 32, "iterations": 4, "val_every": 2, "save_every": 2, "out": str(out), "name": "a"}
    train(make_config("laptop", settings))
    (out / "a" / "status.json").write_text(json.dumps({"status": "running", "why": None}))
    return out


def somewhere(content, random: Random):
    """A container in a JSON value, and a key of it."""
    while True:
        key = random.choice(list(content) if isinstance(content, dict) else range(len(content)))
        inner = content[key]
        if not isinstance(inner, dict | list) or not inner or random.random() < 0.3:
            return content, key
        content = inner


def change_value(content, random: Random):
    """Another value, or none, at some place."""
    if isinstance(content, dict | list) and content:
        holder, key = somewhere(content, random)
        if random.random() < 0.2:
            del holder[key]
        else:
            holder[key] = random.choice(VALUES)
    return content


def damage(path: Path, random: Random) -> str:
    """Damage a file in one way, and say which."""
    content = path.read_bytes()
    kind = random.choice(["value"] * 6 + ["whole", "bytes", "cut", "special", "sealed"])
    if kind == "sealed" and path.name == MANIFEST:
        body = json.loads(content)
        del body["sha256"]
        reseal(path.parent, lambda old: (old.clear(), old.update(change_value(body, random))))
    elif kind == "sealed" and path.name == STATE:
        path.write_text(json.dumps(change_value(json.loads(content), random)))
        seal(path)
    elif kind in ("value", "sealed") and content.strip().startswith(b"{"):
        lines = content.splitlines() if path.name.endswith("jsonl") else [content]
        at = random.randrange(len(lines))
        lines[at] = json.dumps(
            change_value(json.loads(lines[at].splitlines()[0] if path.name == "provenance.json" else lines[at]), random)
        ).encode()
        path.write_bytes(b"\n".join(lines) + b"\n")
        if path.name == STATE and random.random() < 0.8:
            seal(path)
    elif kind == "whole":
        path.write_bytes(random.choice(WHOLE))
    elif kind == "cut":
        path.write_bytes(content[: random.randrange(len(content) + 1)])
    elif kind == "special":
        path.unlink()
        makers = (os.mkfifo, Path.mkdir, lambda p: p.symlink_to("/dev/zero"), lambda p: p.symlink_to("nowhere"))
        random.choice((*makers, lambda p: (p.touch(), os.truncate(p, 2**33))))(path)
    else:
        changed = bytearray(content or b"x")
        for _ in range(random.randint(1, 6)):
            changed[random.randrange(len(changed))] = random.randrange(256)
        path.write_bytes(changed)
    return kind


def seal(path: Path) -> None:
    """Make a checkpoint's manifest agree with one of its files, as somebody who knows the format could."""
    from hashlib import sha256

    content = path.read_bytes()
    facts = {"size": len(content), "sha256": sha256(content).hexdigest()}
    reseal(path.parent, lambda body: body["files"].update({path.name: facts}))


@contextmanager
def within(seconds: float):
    """An exception in what takes longer: it waits for something."""

    def late(number, frame):
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@pytest.mark.slow
def test_the_commands_take_the_run_as_long_as_it_is_whole(runs, tmp_path, capsys):
    shutil.copytree(runs, tmp_path / "runs")
    folder = tmp_path / "runs" / "a"
    assert main(["doctor", str(folder)]) == 0
    assert main(["train", "--resume", str(folder), "--no-compile"]) == 0
    assert "already complete" in capsys.readouterr().out


def test_steps_of_the_optimizers_that_are_gone_or_anothers_are_one_line(runs, tmp_path, capsys):
    for number, change in enumerate((lambda steps: steps.pop("Muon"), lambda steps: steps.update(Other=4))):
        out = tmp_path / str(number)
        shutil.copytree(runs, out)
        state = max((out / "a" / "checkpoints").glob("step-*")) / STATE
        content = json.loads(state.read_text())
        change(content["optimizer_steps"])
        state.write_text(json.dumps(content))
        seal(state)
        assert main(["train", "--resume", str(out / "a"), "--no-compile"]) not in (0, 1)
        (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
        assert "no right steps of" in line, line


@pytest.mark.slow
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_small_file_is_told_in_a_line_by_every_command(name, runs, tmp_path, capsys):
    random = dice(sum(name.encode()))
    for number in range(COUNT):
        out = tmp_path / str(number)
        kind = None
        for command in ("doctor", "resume", "auto", "curve"):
            state = random.getstate()
            shutil.copytree(runs, out)
            kind = damage(out / "a" / name, random)
            if command != "curve":
                random.setstate(state)  # the same damage for the next command
            words = {
                "doctor": ["doctor", str(out / "a")],
                "resume": ["train", "--resume", str(out / "a"), "--no-compile"],
                "auto": ["train", "--resume", "auto", "--out", str(out), "--data", "synthetic", "--iterations", "1",
                         "--preset", "laptop", "--width", "32", "--val-every", "0", "--micro-batches", "1",
                         "--micro-batch-tokens", "64", "--val-tokens", "512", "--device", "cpu"],
            }  # fmt: skip
            with within(60):
                if command == "curve":
                    try:
                        plot_loss_curve([out / "a"], out / "loss.png")
                    except UserError as fault:
                        assert "\n" not in str(fault)
                    code = 0
                else:
                    code = main(words[command])
            told = capsys.readouterr()
            where = f"{name}, {kind}, {number}, {command}: {told.err[-800:]}"
            assert code in (0, 1, 2, 3, 4, 5), where
            errors = [line for line in told.err.splitlines() if line.startswith("error:")]
            assert len(errors) == int(bool(code)) or (command == "doctor" and not errors), where
            assert all(
                line.startswith(("error:", "warning:")) and len(line) < 2000 for line in told.err.splitlines()
            ), where
            assert "\x1b" not in told.out + told.err and "\u202e" not in told.out + told.err, where
            shutil.rmtree(out)
