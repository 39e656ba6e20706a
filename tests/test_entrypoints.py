"""The commands of the README, started as a user starts them."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers.dist import new_store

from speedrun_mup import __main__ as entry
from speedrun_mup.training.tracking import read_metrics

ROOT = Path(__file__).parent.parent
TINY = [
    *("--data", "synthetic", "--device", "cpu", "--head-dim", "16", "--block-size", "32", "--window-tokens", "96"),
    *("--micro-batch-tokens", "128", "--micro-batches", "2", "--val-tokens", "1024", "--val-chunk-tokens", "256"),
]


def run(*command, cwd, fails=False):
    done = subprocess.run([str(word) for word in command], cwd=cwd, capture_output=True, text=True, timeout=300)
    assert fails or done.returncode == 0, done.stdout + done.stderr
    return done


def losses(folder):
    return [record["loss"] for record in read_metrics(folder) if record["kind"] == "train"]


@pytest.mark.slow
@pytest.mark.parametrize("script", ["train.py", "scripts/train.py"])
def test_scripts_work_from_any_folder(script, tmp_path):
    words = [
        "--mup",
        "--width",
        "64",
        "--base-width",
        "32",
        "--iterations",
        "3",
        "--seed",
        "42",
        "--no-compile",
        "--name",
        "a",
    ]
    done = run(sys.executable, ROOT / script, *words, *TINY, cwd=tmp_path)
    for name in ("checkpoints/step-00000003/model.safetensors", "loss.png", "metrics.jsonl", "config.json"):
        assert (tmp_path / "runs" / "a" / name).exists()
    assert "validation loss" in done.stdout and "loss curve" in done.stdout


@pytest.mark.dist
def test_ranks_end_without_taking_the_interpreter_down(tmp_path):
    # Threads of gloo may outlive a group for a moment, and abort a process whose interpreter is taken down meanwhile.
    program = (
        "import atexit, os, sys; from speedrun_mup.__main__ import main; atexit.register(os.abort); "
        f"sys.exit(main(['train', '--iterations', '1', '--out', {str(tmp_path)!r}, *{TINY!r}]))"
    )
    store = new_store()
    place = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port)}
    place |= {"TORCHELASTIC_USE_AGENT_STORE": "True"}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", program],
            env=os.environ | place | {"RANK": str(rank)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    said = [rank.communicate(timeout=300)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0]
    assert "validation loss" in said[0] and not said[1]


@pytest.mark.slow
def test_the_module_and_the_command_list(tmp_path):
    assert "train" in run(sys.executable, "-m", "speedrun_mup", "--help", cwd=ROOT).stdout
    wrong = run(sys.executable, "-m", "speedrun_mup", "trian", cwd=ROOT, fails=True)
    assert wrong.returncode == 2 and wrong.stderr.count("\n") == 1


@pytest.mark.slow
@pytest.mark.dist
def test_torchrun_trains_the_curve_of_one_process(tmp_path):
    words = ["--mup", "--width", "64", "--base-width", "32", "--iterations", "8", "--val-every", "4"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--log-dir={tmp_path / 'torchrun'}"]
    run(sys.executable, ROOT / "train.py", *words, *TINY, "--name", "one", cwd=tmp_path)
    run(*torchrun, "--nproc_per_node=2", ROOT / "train.py", *words, *TINY, "--name", "two", cwd=tmp_path)
    assert losses(tmp_path / "runs" / "two") == pytest.approx(losses(tmp_path / "runs" / "one"), rel=1e-4)
    uneven = run(*torchrun, "--nproc_per_node=3", ROOT / "train.py", *words, *TINY, cwd=tmp_path, fails=True)
    assert uneven.returncode != 0
    assert (
        "micro-batches cannot be shared by 3 processes" in uneven.stderr
        and "Traceback" not in uneven.stderr.split("torch/")[0]
    )


@pytest.mark.slow
def test_a_wheel_installs_and_trains_from_any_folder(tmp_path):
    built = run(sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", tmp_path, ROOT, cwd=tmp_path, fails=True)
    if built.returncode:
        pytest.skip(f"pip cannot build a wheel here: {built.stderr.splitlines()[-1]}")
    wheel = next(tmp_path.glob("*.whl"))
    site, elsewhere = tmp_path / "site", tmp_path / "elsewhere"
    run(sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", site, wheel, cwd=tmp_path)
    elsewhere.mkdir()
    script = "import sys, speedrun_mup.cli as c; print(c.__file__); sys.exit(c.main(sys.argv[1:]))"
    done = subprocess.run(
        [sys.executable, "-c", script, "train", "--width", "64", "--iterations", "2", *TINY],
        cwd=elsewhere,
        env=os.environ | {"PYTHONPATH": str(site)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert str(site) in done.stdout and (elsewhere / "runs").is_dir()


COUNTED = """if True:
    import os, runpy, signal, sys, warnings
    class Counting:  # sends Ctrl-C while the module number LAST is being looked for
        last = int(sys.argv.pop(1))
        def find_spec(self, name, path, target=None):
            Counting.last -= 1
            if Counting.last == 0:
                os.kill(os.getpid(), signal.SIGINT)
    sys.meta_path.insert(0, Counting())
    sys.argv[0] = "speedrun-mup"
    runpy.run_module("speedrun_mup", run_name="__main__")"""
TRAIN = ["train", "--data", "synthetic", "--device", "cpu", "--iterations", "1", "--val-tokens", "4096"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "number", [20, 40, 120, 300, *(pytest.param(n, marks=pytest.mark.slow) for n in range(400, 2000, 400))]
)
def test_ctrl_c_while_modules_are_imported_is_one_line(number, tmp_path):
    """Libraries catch KeyboardInterrupt, pass it on as ImportError, or abort; torch alone imports 1,500 modules."""
    words = [sys.executable, "-c", COUNTED, str(number), *TRAIN]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    early = "error: stopped by SIGINT before there was a run; start the same command again\n"
    stopped = done.stderr == early or re.fullmatch(
        "error: stopped by SIGINT, nothing new saved; resume with .*\n", done.stderr
    )
    known = done.stderr == "error: interrupted\n" if done.returncode == 130 else done.returncode == 75 and stopped
    assert known, (number, done.returncode, done.stderr[-500:])


@pytest.mark.slow
@pytest.mark.parametrize(
    "words", [TRAIN, ["explain"], ["transfer", "x.csv"], ["coord-check"], ["plan", "--budget", "1h"]]
)
def test_ctrl_c_at_any_moment_is_one_line(words, tmp_path):
    for tenth in (
        range(10, 40, 3) if words == TRAIN else (14, 24)
    ):  # a busy machine takes a while until Python has begun
        command = [sys.executable, "-m", "speedrun_mup", *words]
        with subprocess.Popen(
            command, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        ) as run:
            time.sleep(tenth / 10)
            run.send_signal(signal.SIGINT)
            said = run.stderr.read()
        if run.returncode in (0, 2, 3):  # it was over before
            continue
        assert run.returncode in (75, 130) and "Traceback" not in said, (tenth, run.returncode, said)


def test_in_the_background_of_a_shell_ctrl_c_is_not_for_us():
    previous = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        assert entry.main(["--version"]) == 0 and signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, previous)
