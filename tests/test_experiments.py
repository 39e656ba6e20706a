"""Published experiments: their tables still give the verdicts that their pages state."""

import re
from pathlib import Path

import pytest

from speedrun_mup.transfer import Verdict, measure_transfer, read_runs

FOLDER = Path(__file__).parent.parent / "docs" / "experiments"


@pytest.mark.parametrize(
    "sweep, controls, base", [("all", {"adam-sp": -1.0}, 64), ("matrix", {"muon-sqrt-m": -0.5}, 64)]
)
def test_the_width_transfer_tables_give_the_published_verdicts(sweep, controls, base):
    runs = read_runs(FOLDER / "width-transfer" / sweep / "runs.csv")
    result = measure_transfer(runs, controls=controls, tested=["mup"], base_width=base)
    assert result.verdict is Verdict.PASS
    page = (FOLDER / "width-transfer.md").read_text()
    for name in ("mup", *controls):
        drift = result.arms[name].drift
        low, high = drift.interval()
        row = rf"\| {sweep} \| `{name}` \|[^|]*\| {drift.value:+.2f} \({low:+.2f} to {high:+.2f}\) \|"
        assert re.search(row.replace("+", r"\+"), page), row


@pytest.mark.parametrize(
    ("widths", "label"), [((32, 64, 128, 256), "32 to 256"), ((32, 64, 128), "32 to 128, the question")]
)
def test_the_table_of_matrix_seeds_gives_the_published_verdicts(widths, label):
    runs = [run for run in read_runs(FOLDER / "matrix-seeds" / "runs.csv") if run.width in widths]
    (arm,) = measure_transfer(runs, base_width=64).arms.values()
    low, high = arm.drift.interval()
    row = rf"\| {label} \|[^|]*\| {arm.drift.value:+.2f} \({low:+.2f} to {high:+.2f}\) \| {arm.verdict} \|"
    assert re.search(row.replace("+", r"\+"), (FOLDER / "matrix-seeds.md").read_text()), row
