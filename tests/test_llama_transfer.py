"""The runs of docs/experiments/llama.md: what is run next, and that both twins are one model at base width."""

import csv
from argparse import Namespace
from pathlib import Path

import pytest
import torch

from benchmarks import llama_transfer
from benchmarks.llama_transfer import OCTAVES, Run, missing
from speedrun_mup.transfer import Verdict, measure_transfer, read_points

ROOT = Path(__file__).resolve().parent.parent


def done(loss_at, arm="adamw-mup", width=32, octaves=OCTAVES):
    return {Run(arm, width, at, 0): {"loss": str(loss_at(at))} for at in octaves}


def test_what_is_missing_is_the_grid_then_what_extends_it():
    ask = {"arms": ["adamw-mup"], "widths": [32], "seeds": [0]}
    assert [run.octave for run in missing({}, **ask)] == list(OCTAVES)
    assert [run.octave for run in missing(done(lambda at: (at + 2) ** 2), **ask)] == [-3.0]
    assert not list(missing(done(lambda at: at**2, octaves=(*OCTAVES, -3.0)), **ask))
    assert [run.octave for run in missing(done(lambda at: "nan" if at > 1 else -at), **ask)] == [1.5]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_twins_are_one_model_at_base_width(kind):
    pytest.importorskip("transformers")
    updates = []
    for arm in (f"{kind}-mup", f"{kind}-sp"):
        model, optimizer = llama_transfer.build(Run(arm, 64, 0.0, 3))
        for seed in range(2):
            llama_transfer.loss_of(model, torch.arange(10).view(1, 10) + seed).backward()
            optimizer.step()
        updates.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert torch.equal(*updates)


def test_a_killed_command_continues(tmp_path, monkeypatch):
    path, ran = tmp_path / "runs.csv", []

    class Pool:
        def __init__(self, *_):
            pass

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def submit(self, train, run):
            from concurrent.futures import Future

            ran.append(run)
            future = Future()
            values = (run.arm, run.width, 2.0**run.octave, run.seed, run.octave**2, 1.0, 0.1)
            future.set_result(dict(zip(llama_transfer.COLUMNS, values)))
            return future

    monkeypatch.setattr(llama_transfer, "ProcessPoolExecutor", Pool)
    monkeypatch.setattr(llama_transfer, "corpus", lambda part: None)
    options = Namespace(arms=["muon-mup"], widths=[32, 64], seeds=[0, 1], workers=2, minutes=None)
    assert llama_transfer.sweep(path, options) == 0
    whole = path.read_text()
    assert len(ran) == len(set(ran)) == len(list(csv.DictReader(path.read_text().splitlines()))) >= 20
    path.write_text("".join(whole.splitlines(True)[:7]))
    ran.clear()
    assert llama_transfer.sweep(path, options) == 0
    assert sorted(path.read_text().splitlines()) == sorted(whole.splitlines()) and len(ran) == whole.count("\n") - 7


@pytest.mark.slow
def test_the_page_has_the_numbers_of_its_runs():
    page = (ROOT / "docs" / "experiments" / "llama.md").read_text()
    runs = read_points(ROOT / "docs" / "experiments" / "llama" / "runs.csv")
    result = measure_transfer(runs, controls={"adamw-sp": -1.0}, tested=["adamw-mup", "muon-mup"], base_size=64)
    assert result.verdict is Verdict.INCONCLUSIVE and len(result.arms) == 4
    for name, arm in result.arms.items():
        (low, high), best = arm.drift.interval(), ", ".join(f"{fit.optimum:+.2f}" for fit in arm.fits)
        drift = f"{arm.drift.value:+.3f} ({low:+.3f} to {high:+.3f})".replace("+-", "-")
        row = next(line for line in page.partition("## Results")[2].splitlines() if line.startswith(f"| `{name}`"))
        assert f"| {best} | {drift} | {arm.fits[-1].best_losses[0]:.4f} |" in row, (row, best, drift)
