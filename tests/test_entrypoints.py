"""The commands of the README, started as a user starts them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from speedrun_mup.tracking import read_metrics

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
