"""What earlier editions left on disk: runs resume, sweeps continue, tables and checks are read.

data/first_edition/README.md says what the artifacts are and how they were made.
"""

from __future__ import annotations

import json
import tarfile
from pathlib import Path

import pytest
import safetensors.torch
import torch

from speedrun_mup.cli import main
from speedrun_mup.core.model.record import to_record
from speedrun_mup.data.validation import ValBatches
from speedrun_mup.training.load import load_run

DATA = Path(__file__).parent / "data" / "first_edition"
COMMITS = {  # and what a sweep of that commit has to be given, because a default has changed since
    "d318bfe": ["--data-order", "record"],
    "818aea1": [],
}
SWEEP = (
    *("sweep", "--widths", "16", "32", "--octaves", "-1", "0", "1", "--seeds", "1", "--arms", "mup", "adam-sp"),
    *("--iterations", "4", "--head-dim", "8", "--base-width", "8", "--data", "synthetic", "--micro-batch-tokens", "64"),
    *("--micro-batches", "2", "--val-tokens", "4096", "--device", "cpu", "--workers", "1", "--no-adaptive"),
    *("--out", "sweep"),
)


@pytest.fixture(params=COMMITS)
def commit(request, tmp_path, monkeypatch) -> str:
    """The commit whose artifacts are unpacked in the working directory."""
    with tarfile.open(DATA / f"{request.param}.tar.xz") as archive:
        archive.extractall(tmp_path, filter="data")
    monkeypatch.chdir(tmp_path)
    return request.param


def losses(path: str) -> list[tuple[str, int, float]]:
    """The kind, step and loss of every line of a run's metrics that has one."""
    records = [json.loads(line) for line in Path(path).read_text().splitlines()]
    return [(r["kind"], r["step"], r["loss"]) for r in records if r["kind"] in ("train", "val")]


def same_losses(found: list, expected: list) -> bool:
    """Whether two lists of losses agree: but for the rounding of another processor, or of another release of torch."""
    rel = 2e-6 if torch.__version__.startswith("2.13.0") else 1e-4
    return [row[:-1] for row in found] == [row[:-1] for row in expected] and [row[-1] for row in found] == (
        pytest.approx([row[-1] for row in expected], rel=rel, abs=0.0)
    )


@pytest.mark.slow
def test_a_run_resumes_as_the_code_that_began_it_resumed_it(commit, capsys):
    begun, expected = losses("run/metrics.jsonl"), losses("expected.jsonl")
    assert begun == expected[: len(begun)] and len(begun) < len(expected)
    assert main(["train", "--resume", "run"]) == 0, capsys.readouterr().err
    assert same_losses(losses("run/metrics.jsonl"), expected)


@pytest.mark.slow
def test_load_run_gives_the_model_that_the_run_had(commit, capsys):
    """Every weight of the unfinished run; the validation loss of the finished one, which the old code gave."""
    (checkpoint,) = Path("run/checkpoints").iterdir()
    written = safetensors.torch.load_file(checkpoint / "model.safetensors")
    found = to_record(load_run("run", device="cpu").model.state_dict(), unused=written["scalars"])
    assert found.keys() == written.keys() and all(torch.equal(found[name], written[name]) for name in found)
    assert main(["train", "--resume", "run"]) == 0, capsys.readouterr().err
    (*_, (kind, step, loss)) = losses("expected.jsonl")
    for dtype, rel in ((None, 1e-6), (torch.bfloat16, 2e-2)):
        run = load_run("run", device="cpu", dtype=dtype)
        batches = ValBatches(run.corpus, run.config.val_tokens, run.config.val_chunk_tokens)
        with torch.no_grad():
            total = sum(run.model(*batches[i], run.window).item() for i in range(len(batches)))
        assert (kind, step) == ("val", run.step)
        assert total / len(batches) / run.config.val_chunk_tokens == pytest.approx(loss, rel=rel)
        assert run.model.embed.weight.dtype is (dtype or torch.float32)


def test_doctor_finds_the_checkpoint_intact(commit, capsys):
    (checkpoint,) = Path("run/checkpoints").iterdir()
    assert main(["doctor", "run"]) == 0
    assert f"a resume starts from {checkpoint.name}" in capsys.readouterr().out


@pytest.mark.slow
def test_a_sweep_continues_with_the_runs_that_it_has(commit, capsys):
    files = sorted(Path("sweep/cells").glob("*/result.json"))
    before = {file: (file.read_bytes(), file.stat().st_mtime_ns) for file in files}
    lost = files[5]
    lost.unlink()
    assert main([*SWEEP, *COMMITS[commit]]) == 0, capsys.readouterr().err
    assert "12 runs done (1 now" in capsys.readouterr().out
    after = sorted(Path("sweep/cells").glob("*/result.json"))
    assert after == files, "a run has another hash than it had"
    for file in files:
        if file != lost:
            assert (file.read_bytes(), file.stat().st_mtime_ns) == before[file]
    old, new = json.loads(before[lost][0]), json.loads(lost.read_text())
    assert same_losses([(new["sizes"]["width"], new["loss"])], [(old["width"], old["loss"])])


def test_a_sweep_and_its_table_are_judged_alike(commit, capsys):
    judged = []
    for source in (["sweep"], ["sweep/runs.csv", "--controls", "adam-sp=-1"]):
        assert main(["transfer", *source, "--json"]) == 1
        found = json.loads(capsys.readouterr().out)
        judged.append({name: (arm["verdict"], arm["reasons"]) for name, arm in found["arms"].items()})
        assert found["verdict"] == "INCONCLUSIVE"
    assert judged[0] == judged[1] and judged[0].keys() == {"mup", "adam-sp"}
    assert any("at the right edge of the grid: extend the sweep to 2^2" in reason for reason in judged[0]["mup"][1])


@pytest.mark.slow
def test_a_sweep_and_its_table_are_reported(commit, capsys):
    assert main(["report", "sweep", "--coord-check", "coord-check/coord-check.json"]) == 0, capsys.readouterr().err
    assert Path("sweep/report/coord-check.png").exists()
    assert main(["report", "sweep/runs.csv", "--out", "table"]) == 0, capsys.readouterr().err
    for page in ("sweep/report/report.md", "table/report.md"):
        assert "INCONCLUSIVE" in Path(page).read_text()
