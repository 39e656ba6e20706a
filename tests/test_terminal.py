import errno
import io
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest
from conftest import TINY
from faults.harness import fork, wait
from test_cli import as_flags

from speedrun_mup import terminal
from speedrun_mup.cli import main
from speedrun_mup.terminal import guarded, tell
from speedrun_mup.training.tracking import read_metrics, read_status

ROOT = Path(__file__).parent.parent


def stream(number, path=None, encoding="utf-8", errors="strict"):
    """Descriptor `number` is `path` from here on, or closed; what Python makes of it at its start."""
    if path is None:
        os.close(number)
        return None
    os.dup2(os.open(path, os.O_WRONLY), number)
    return open(number, "w", encoding=encoding, errors=errors, closefd=False)


def broken_pipe(number):
    reader, writer = os.pipe()
    os.close(reader)
    os.dup2(writer, number)
    return open(number, "w", closefd=False)


STREAMS = {
    "stdout full": lambda: setattr(sys, "stdout", stream(1, "/dev/full")),
    "stdout closed": lambda: setattr(sys, "stdout", stream(1)),
    "stdout broken": lambda: setattr(sys, "stdout", broken_pipe(1)),
    "stdout ascii": lambda: setattr(sys, "stdout", stream(1, "/dev/null", "ascii")),
    "stdout latin-1": lambda: setattr(sys, "stdout", stream(1, "/dev/null", "latin-1")),
    "stderr full": lambda: setattr(sys, "stderr", stream(2, "/dev/full")),
    "stderr closed": lambda: setattr(sys, "stderr", stream(2)),
    "both full": lambda: (STREAMS["stdout full"](), STREAMS["stderr full"]()),
    "both broken": lambda: (setattr(sys, "stdout", broken_pipe(1)), setattr(sys, "stderr", broken_pipe(2))),
    "all closed": lambda: (os.close(0), STREAMS["stdout closed"](), STREAMS["stderr closed"]()),
}


def life(words, streams, said):
    """Run a command with odd streams; what stderr gets goes to the file `said`, unless it is odd itself."""
    os.dup2(os.open(said, os.O_WRONLY | os.O_CREAT), 2)
    sys.stderr = open(2, "w", closefd=False)
    sys.stdout = open(os.devnull, "w")
    STREAMS[streams]()
    os._exit(main(words))


@pytest.mark.slow
@pytest.mark.parametrize("streams", STREAMS)
def test_no_terminal_ends_a_run_or_changes_its_exit_code(streams, warm, tmp_path):
    odd = "\x1b[31m宽" if "ascii" in streams or "latin" in streams else "a"
    settings = {name: value for name, value in TINY.items() if name != "progress"}  # shown, as by default
    words = ["train", *as_flags(settings), "--out", str(tmp_path), "--name", odd]
    child = fork(lambda: life(words, streams, tmp_path / "said"))
    assert wait(child) == 0
    folder = tmp_path / odd
    assert read_status(folder)["status"] == "finished" and len(read_metrics(folder)) == 9
    assert (folder / "loss.png").read_bytes().startswith(b"\x89PNG")
    said = (tmp_path / "said").read_text()
    lines = 1 if streams in ("stdout full", "stdout broken") else 0
    assert said.count("\n") == lines and ("stdout cannot be written" in said) == bool(lines)


@pytest.mark.parametrize(
    "streams, code", [("stdout full", 1), ("stdout closed", 1), ("stdout ascii", 0), ("stderr closed", 0)]
)
def test_a_command_that_only_prints_says_when_that_is_lost(streams, code, tmp_path):
    child = fork(lambda: life(["explain", "--width", "128"], streams, tmp_path / "said"))
    assert wait(child) == code
    assert (tmp_path / "said").read_text().count("\n") == int(streams == "stdout full")


class Full(io.StringIO):
    """A stream on a full disk."""

    def write(self, text):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_what_libraries_print_is_guarded_too(capsys, monkeypatch):
    tell("a\x1b[31mb\u202e")
    tell("wrong", error=True)
    assert capsys.readouterr() == ("a\\x1b[31mb\\u202e\n", "wrong\n")
    narrow = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    for odd in (None, Full(), types.SimpleNamespace(), narrow):
        monkeypatch.setattr(sys, "stdout", odd)
        tell("宽")
    assert narrow.buffer.getvalue() == b"\\u5bbd\n"


def test_a_guard_says_once_what_fails_and_lets_the_rest_through(monkeypatch):
    err = io.StringIO()
    monkeypatch.setattr(sys, "stdout", Full())
    monkeypatch.setattr(sys, "stderr", err)
    with guarded(keep_going=True) as screen:
        for _ in range(3):
            print("line", flush=True)
        print("still\x07here", file=sys.stderr)
        assert screen.lost
    lines = err.getvalue().splitlines()
    assert lines[0].startswith("warning: stdout cannot be written (OSError: [Errno 28]") and lines[1:] == [
        "still\\x07here"
    ]


def test_descriptors_that_were_closed_are_no_one_else_s(tmp_path):
    def work():
        for number in range(3):
            os.close(number)
        sys.stdout = sys.stderr = None
        with terminal.guarded(keep_going=True):
            file = os.open(tmp_path / "mine", os.O_WRONLY | os.O_CREAT)
            os.write(1, b"printed by a library")
            os._exit(0 if file > 2 and not (tmp_path / "mine").stat().st_size else 1)

    assert wait(fork(work)) == 0


HANGING = """
import atexit, threading, time

class Run:
    def log(self, values, step):
        time.sleep(1000)

def init(**settings):
    atexit.register(time.sleep, 1000)
    threading.Thread(target=time.sleep, args=(1000,)).start()
    return Run()
"""


@pytest.mark.slow
def test_a_tracker_that_hangs_does_not_keep_the_process(tmp_path):
    (tmp_path / "wandb.py").write_text(HANGING)
    (tmp_path / "program.py").write_text(
        "import sys\nfrom speedrun_mup.training import trackers\ntrackers.TRACKER_WAIT_S = 0.5\n"
        "from speedrun_mup.__main__ import main\nsys.exit(main())\n"
    )
    settings = as_flags({name: value for name, value in TINY.items() if name != "progress"})
    words = [sys.executable, "program.py", "train", *settings, "--track", "wandb", "--name", "a"]
    env = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{tmp_path}"}
    done = subprocess.run(words, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and done.stderr.count("\n") == 1 and "did not end within 0.5 s" in done.stderr
    assert "validation loss" in done.stdout and read_status(tmp_path / "runs" / "a")["status"] == "finished"
