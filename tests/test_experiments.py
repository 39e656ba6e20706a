"""Published experiments: their tables still give the verdicts that their pages state."""

import math
import re
from pathlib import Path

import pytest

from speedrun_mup.transfer import Verdict, measure_transfer, read_points

FOLDER = Path(__file__).parent.parent / "docs" / "experiments"


@pytest.mark.parametrize(
    "sweep, controls, base", [("all", {"adam-sp": -1.0}, 64), ("matrix", {"muon-sqrt-m": -0.5}, 64)]
)
def test_the_width_transfer_tables_give_the_published_verdicts(sweep, controls, base):
    runs = read_points(FOLDER / "width-transfer" / sweep / "runs.csv")
    result = measure_transfer(runs, controls=controls, tested=["mup"], base_size=base)
    assert result.verdict is Verdict.PASS
    page = (FOLDER / "width-transfer.md").read_text()
    for name in ("mup", *controls):
        drift = result.arms[name].drift
        low, high = drift.interval()
        row = rf"\| {sweep} \| `{name}` \|[^|]*\| {drift.value:+.2f} \({low:+.2f} to {high:+.2f}\) \|"
        assert re.search(row.replace("+", r"\+"), page), row


def test_the_readouts_rate_over_sqrt_m_makes_the_records_rules_mup():
    """The published losses of both arms, of the same seeds; and the drift on the page."""
    turned, mup = (
        {
            (run.sizes["width"], run.log2_value, run.seed): run.loss
            for run in read_points(FOLDER / page / "runs.csv")
            if run.arm == arm
        }
        for page, arm in (("readout-rate", "record26"), ("record26-drift", "mup"))
    )
    pairs = [
        (turned[width, -0.5 * math.log2(width / 64), seed], mup[width, 0.0, seed])
        for width in (32, 64, 128, 256)
        for seed in range(3)
        if (width, 0.0, seed) in mup
    ]
    assert len(pairs) == 10 and all(abs(ours - theirs) < 2e-4 for ours, theirs in pairs)
    (arm,) = measure_transfer(read_points(FOLDER / "readout-rate" / "runs.csv"), base_size=64).arms.values()
    low, high = arm.drift.interval()
    row = f"| -0.5 | {arm.drift.value:+.2f} ({low:+.2f} to {high:+.2f}) |"
    assert arm.verdict is Verdict.FAIL and row in (FOLDER / "readout-rate.md").read_text()


@pytest.mark.parametrize(
    ("widths", "label"), [((32, 64, 128, 256), "32 to 256"), ((32, 64, 128), "32 to 128, the question")]
)
def test_the_table_of_matrix_seeds_gives_the_published_verdicts(widths, label):
    runs = [run for run in read_points(FOLDER / "matrix-seeds" / "runs.csv") if run.sizes["width"] in widths]
    (arm,) = measure_transfer(runs, base_size=64).arms.values()
    low, high = arm.drift.interval()
    row = rf"\| {label} \|[^|]*\| {arm.drift.value:+.2f} \({low:+.2f} to {high:+.2f}\) \| {arm.verdict} \|"
    assert re.search(row.replace("+", r"\+"), (FOLDER / "matrix-seeds.md").read_text()), row


def test_the_table_of_data_order_gives_the_published_verdicts():
    runs = read_points(FOLDER / "data-order" / "runs.csv")
    result = measure_transfer(runs, controls={"adam-sp": -1.0}, base_size=64)
    assert result.verdict is Verdict.PASS
    for name in ("mup", "adam-sp"):
        drift = result.arms[name].drift
        low, high = drift.interval()
        row = f"| `{name}` | 32 to 128 | {drift.value:+.2f} ({low:+.2f} to {high:+.2f}) |"
        assert row in (FOLDER / "data-order.md").read_text()
