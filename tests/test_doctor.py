"""The doctor finds what is wrong, says what to do, and changes nothing."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import sys
import time
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY
from test_cli import as_flags

from speedrun_mup.cli import main
from speedrun_mup.core.utils import World
from speedrun_mup.data.corpus import find_corpus
from speedrun_mup.doctor import Level, examine
from speedrun_mup.training.run import Run, train


def bad(findings):
    """{subject: text} of all that is not good."""
    return {finding.subject: finding.text for finding in findings if finding.level is not Level.GOOD}


@pytest.fixture
def run(tiny):
    """A finished run with three checkpoints, in its folder."""
    return train(tiny(name="a", width=32, iterations=6, save_every=2, keep_every=2, val_every=0)).folder


@pytest.mark.slow
def test_a_healthy_machine_and_run(tiny, run, tmp_path, capsys):
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    assert main(["doctor", "--resume", str(run)]) == 0
    assert main(["doctor", str(run), "--resume", "runs/other"]) == 2
    assert f"--resume runs/other and {run} are two runs; leave out one" in capsys.readouterr().err
    assert main(["doctor", str(run)]) == 0
    told = capsys.readouterr().out
    for text in (
        "cpu (asked for)",
        "float32 (bfloat16 where a GPU computes in it, else float32)",
        "no (only worthwhile on CUDA)",
        "blocked (FlexAttention has no backward on cpu)",
        " steps an epoch, ",
        f"6 checkpoints in {run} take up to",
        "intact: step-00000006, step-00000004, step-00000002; a resume starts from step-00000006",
        "6 steps recorded, 0 twice",
        f"{run}: finished",
    ):
        assert text in told
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before
    (run / ".lock").unlink()
    assert main(["doctor", str(run)]) == 0 and not (run / ".lock").exists()
    assert main(["doctor", *as_flags(TINY), "--preset", "laptop", "--out", str(tmp_path / "new")]) == 0
    assert not (tmp_path / "new").exists()


@pytest.mark.slow
def test_damaged_checkpoints(tiny, run):
    cfg = tiny(resume=str(run))
    os.truncate(run / "checkpoints" / "step-00000006" / "model.safetensors", 100)
    (run / "checkpoints" / ".tmp-step-00000008").mkdir()
    findings = list(examine(cfg, run))
    assert "step-00000006/model.safetensors: has 100 bytes instead of" in bad(findings)["checkpoint"]
    assert any("a resume starts from step-00000004" in finding.text for finding in findings)
    assert any("left by a kill" in finding.text and ".tmp-step-00000008" in finding.text for finding in findings)
    for step in (2, 4):
        (run / "checkpoints" / f"step-0000000{step}" / "state.json").unlink()
    lost = [finding for finding in examine(cfg, run) if finding.subject == "checkpoint" and finding.level is Level.BAD]
    assert len(lost) == 3 and "restore it from a copy" in lost[0].fix
    assert main(["doctor", "--resume", str(run)]) == 1


def test_changed_and_missing_data(tiny, tmp_path):
    corpus, _ = find_corpus("synthetic", "byte")
    data = Path(shutil.copytree(corpus.directory, tmp_path / "data"))
    shard = next(data.glob("*.bin"))
    tokens = np.fromfile(shard, "<u2")
    tokens[1000] ^= 1
    tokens.tofile(shard)
    assert f"{shard}: not what the manifest says" in bad(examine(tiny(data=str(data))))["data"]
    assert "not a folder" in bad(examine(tiny(data=str(tmp_path / "nowhere"))))["data"]
    assert "epochs" in bad(examine(tiny(iterations=2000, epochs=2)))["data"]


def test_mixture_that_repeats_within_the_first_step(tiny):
    """The tiny part has fewer sequences than its 999 turns in a step."""
    corpus, _ = find_corpus("synthetic", "byte")
    data = f"{corpus.directory}:999,{corpus.directory}:1"
    cfg = tiny(data=data, micro_batches=4000, val_every=0)
    found = [finding for finding in examine(cfg) if finding.subject == "data" and finding.level is not Level.GOOD]
    assert [(each.level, each.text) for each in found] == [
        (Level.WARNING, "a part of the mixture repeats within the first step")
    ]
    assert "repeats within" in bad(examine(dataclasses.replace(cfg, epochs=1)))["data"]


def test_what_is_too_little(tiny, monkeypatch):
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=10_000_000))
    found = bad(examine(tiny()))
    assert set(found) == {"disk"} and "0.0 GB free, 3 checkpoints in" in found["disk"]
    assert not bad(examine(tiny(save=False)))
    huge = bad(examine(tiny(width=8192, base_width=32)))
    assert "memory" in huge and "parameters with gradients and optimizer" in huge["memory"]


def test_a_full_gpu_is_a_finding(tiny, monkeypatch):
    def full(cfg, device):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    monkeypatch.setattr("speedrun_mup.doctor.pick_compile", full)
    assert "no memory to try it (OutOfMemoryError: CUDA out of memory" in bad(examine(tiny()))["device"]


def test_what_is_not_here(tiny):
    absent = "cuda" if sys.platform == "darwin" else "mps"
    for change, subject, text in (
        ({"device": absent}, "device", f"device={absent} is not usable here"),
        ({"attention": "flex"}, "attention", "attention=flex cannot be used: FlexAttention has no backward on cpu"),
        ({"out": "/proc"}, "disk", "/proc cannot be written"),
    ):
        assert text in bad(examine(tiny(**change)))[subject]


@pytest.mark.slow
def test_how_a_run_ended(tiny, run):
    cfg = tiny(resume=str(run))
    for status, text in (("running", "crashed (no final status)"), ("failed", "failed: NonFiniteError: step 3")):
        (run / "status.json").write_text(json.dumps({"status": status, "why": "NonFiniteError: step 3"}))
        assert text in bad(examine(cfg, run))["run"]
    (run / "bad-step-00000003.json").write_text("{}")
    assert "bad-step-00000003.json" in bad(examine(cfg, run))["numbers"]
    os.utime(run / "log.txt", (time.time() + 9000,) * 2)
    assert "in the future" in bad(examine(cfg, run))["clock"]
    lines = (run / "provenance.json").read_text().splitlines()
    (run / "provenance.json").write_text(json.dumps(json.loads(lines[-1]) | {"torch": "2.9.0"}) + "\n")
    assert "the run used torch 2.9.0" in bad(examine(cfg, run))["versions"]
    record = (run / "metrics.jsonl").read_text().splitlines()[0]
    with open(run / "metrics.jsonl", "a") as file:
        file.write(record + "\n")
    assert "1 twice" in bad(examine(cfg, run))["metrics"]


def test_a_run_in_use_and_one_without_checkpoints(tiny):
    cfg = tiny(name="open")
    with closing(Run(cfg, World())) as run:
        findings = list(examine(dataclasses.replace(cfg, resume=str(run.folder)), run.folder))
    assert any(f"is in use by process {os.getpid()}" in finding.text for finding in findings)
    assert "none in" in bad(findings)["checkpoint"]


@pytest.mark.slow
def test_a_gap_in_the_metrics_is_told(tiny, run, capsys):
    path = run / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(line for line in lines if json.loads(line)["step"] not in (2, 3)))
    assert "metrics.jsonl lacks steps 2 to 3" in bad(examine(tiny(), run))["metrics"]
    path.write_text("".join(lines[:2]))
    (run / "status.json").write_text(json.dumps({"status": "finished", "why": None, "missing_steps": [[2, 5]]}))
    assert "lacks steps 2 to 5" in bad(examine(tiny(), run))["metrics"]
    (run / "bad-step-00000002.json").write_text("{}")  # a step that was withheld has a dump, and no record
    assert "lacks steps 3 to 5" in bad(examine(tiny(), run))["metrics"]


@pytest.mark.slow
def test_links_and_fifos_of_a_received_folder_are_findings(tiny, run, tmp_path, capsys):
    for name in ("status.json", "metrics.jsonl", "provenance.json", ".lock", "log.txt"):
        (run / name).unlink()
    os.mkfifo(run / "status.json")
    os.mkfifo(run / ".lock")
    for name in ("metrics.jsonl", "provenance.json"):
        (run / name).symlink_to("/dev/zero")
    (run / "log.txt").symlink_to(tmp_path / "nowhere")
    (run / "checkpoints").rename(tmp_path / "elsewhere")
    (run / "checkpoints").symlink_to(tmp_path / "elsewhere")
    assert main(["doctor", str(run)]) == 1
    told = capsys.readouterr().out
    for name in (
        "status.json is a FIFO",
        "metrics.jsonl is a symbolic link",
        ".lock is a FIFO",
        "checkpoints is a symbolic link",
    ):
        assert name in told
    assert "log.txt is a symbolic link" in told and "status.json is damaged" in told


@pytest.mark.slow
def test_other_code_and_damaged_notes_are_told(tiny, run):
    (run / "provenance.json").write_text(
        '\xff\n[1]\n{"torch": "0.1", "source_sha256": "other", "revision": "abc"}\nnot json\n'
    )
    texts = [finding.text for finding in examine(tiny(), run) if finding.subject == "versions"]
    assert any("the run used torch 0.1" in text for text in texts) and any("other code (abc)" in text for text in texts)
