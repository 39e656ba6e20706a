"""Plans: the cheapest sweep that answers the question, what it promises, and whether that came true."""

import dataclasses
import json
import math
import random
from contextlib import closing

import pytest

from speedrun_mup.config import TrainConfig
from speedrun_mup.core.errors import ConfigError
from speedrun_mup.plan import Plan, Prediction, compare, expected_lr_error, make_plan, predict
from speedrun_mup.sweep import CellResult, Failure, LocalEngine, read_results, run_flops, run_sweep
from speedrun_mup.training import train
from speedrun_mup.transfer import TransferError

SPEED = 1e9  # FLOPs per second of a worker
OVERHEAD_S = 2.0
OPTIMUM = 0.3


def loss_at(cell):
    """A bowl around OPTIMUM; loss falls as 1 / sqrt(width)."""
    luck = random.Random(cell.id).gauss(0, 0.002) + 0.01 * cell.seed
    return 2.5 + 4 * cell.width**-0.5 + 0.03 * (cell.octaves - OPTIMUM) ** 2 + luck


class FakeEngine:
    """Two workers of known speed that train nothing."""

    workers = 2

    def __init__(self):
        self.ran = []

    def run(self, cells, scratch):
        for cell in cells:
            self.ran.append(cell)
            loss, train_s = loss_at(cell), cell.flops / SPEED
            curve = [round(4.85 - (4.85 - loss) * step / cell.cfg.iterations, 6) for step in range(cell.cfg.iterations)]
            place = (cell.id, cell.arm, cell.width, cell.octaves, cell.seed)
            yield (
                cell,
                CellResult(
                    *place,
                    *(loss, loss, False, "", curve, train_s + OVERHEAD_S, train_s, cell.flops, cell.corpus),
                    config={"iterations": cell.cfg.iterations},
                    made_with={"source_sha256": "0", "torch": "2", "device": "none"},
                ),
            )

    def close(self):
        pass


@pytest.fixture
def target(tiny):
    """A target of width 256; its proxies can be 16, 32, 64 and 128 wide."""
    return tiny(width=256, base_width=32, iterations=20)


@pytest.fixture
def out(tmp_path):
    return tmp_path / "sweep"


def test_more_budget_buys_a_better_known_learning_rate(target, out):
    plans = [make_plan(target, out, FakeEngine(), budget_minutes=minutes) for minutes in (5, 10, 20, 1000)]
    for plan, minutes in zip(plans, (5, 10, 20, 1000)):
        assert plan.sweep_s <= 60 * minutes
    errors = [plan.lr_error for plan in plans]
    assert errors == sorted(errors, reverse=True) and errors[0] > errors[-1]
    assert plans[-1].widths == (16, 32, 64, 128) and plans[-1].seeds == 5
    assert all(plan.seeds >= 2 and plan.widths[-1] >= 4 * plan.widths[0] for plan in plans)


def test_costs_are_counted(target, out):
    engine = FakeEngine()
    plan = make_plan(target, out, engine, budget_flops=1e18)
    assert plan.runs == 4 * 11 * plan.seeds and plan.target_flops == run_flops(target, 65)
    each = [run_flops(dataclasses.replace(target, width=width), 65) for width in plan.widths]
    assert plan.flops == pytest.approx(11 * plan.seeds * sum(each))
    assert plan.sweep_s == pytest.approx((plan.runs * OVERHEAD_S + plan.flops / SPEED) / 2)
    assert plan.target_s == pytest.approx(plan.target_flops / SPEED / 2)
    assert {(cell.cfg.iterations, cell.width) for cell in engine.ran} == {(3, width) for width in plan.widths}
    assert f"{plan.flops / plan.target_flops:.1%} of the target run" in plan.summary()
    assert make_plan(target, out, engine, budget_flops=plan.flops - 1).flops < plan.flops


def test_finished_cells_make_timing_unnecessary(target, out):
    plan = make_plan(target, out, FakeEngine(), budget_minutes=5)
    run_sweep(plan.sweep, out, FakeEngine(), progress=False)
    again = FakeEngine()
    assert make_plan(target, out, again, budget_minutes=5).sweep_s == pytest.approx(plan.sweep_s)
    assert not again.ran


def test_a_width_that_would_take_long_to_time_is_not_timed(target, out, monkeypatch):
    engine = FakeEngine()
    monkeypatch.setattr("speedrun_mup.plan.PROBE_S", OVERHEAD_S + 0.001)
    make_plan(target, out, engine, budget_flops=1e18)
    assert {cell.width for cell in engine.ran} == {16}


def test_impossible_plans_are_refused_in_one_line(target, out):
    with pytest.raises(ConfigError, match="needs a budget"):
        make_plan(target, out, FakeEngine())
    with pytest.raises(ConfigError, match="the smallest takes .* FLOPs and .* minutes here"):
        make_plan(target, out, FakeEngine(), budget_minutes=0.1)
    with pytest.raises(ConfigError, match="plan for a width of 128 or more"):
        make_plan(dataclasses.replace(target, width=64), out, FakeEngine(), budget_minutes=1)
    broken = FakeEngine()
    broken.run = lambda cells, scratch: ((cell, Failure("no power")) for cell in cells)
    with pytest.raises(ConfigError, match="timing mup width 16 .* no power"):
        make_plan(target, out, broken, budget_minutes=1)


def test_the_error_in_advance_is_that_of_a_line_through_measured_optima():
    """Against fits of simulated sweeps: 5 points an octave apart, noise and curvature as assumed."""
    rng = random.Random(0)
    noise, curvature, seeds, widths, target = 0.005, 0.02, 3, (32, 64, 128), 512
    predictions = []
    for _ in range(400):
        optima = []
        for _ in widths:
            ys = [curvature * k * k + rng.gauss(0, noise / math.sqrt(seeds)) for k in (-2, -1, 0, 1, 2)]
            slope = sum(k * y for k, y in zip((-2, -1, 0, 1, 2), ys)) / 10
            bend = sum((k * k - 2) * y for k, y in zip((-2, -1, 0, 1, 2), ys)) / 14
            optima.append(-slope / (2 * bend))
        slope = (optima[2] - optima[0]) / 2
        predictions.append(sum(optima) / 3 + slope * 3)
    spread = math.sqrt(sum(p * p for p in predictions) / len(predictions))
    assert expected_lr_error(widths, seeds, target) == pytest.approx(spread, rel=0.1)


def test_a_record_sized_target_has_proxies_from_one_head_up(out, cache_folder):
    target = TrainConfig(data="synthetic", parametrization="mup", base_width=768, width=1024)
    plan = make_plan(target, out, FakeEngine(), budget_flops=2e18)
    assert plan.widths[-1] == 512 and plan.sweep.base.base_width == 768
    own = dataclasses.replace(target, base_width=None)
    assert make_plan(own, out, FakeEngine(), budget_flops=2e18).sweep.base.base_width == 1024


# ---------------------------------------------------------------------------------------------------------------------
# Prediction and comparison
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def swept(target, out):
    """A plan carried out."""
    plan = make_plan(target, out, FakeEngine(), budget_minutes=20)
    assert run_sweep(plan.sweep, out, FakeEngine(), progress=False).complete
    return plan


def test_the_prediction_holds_the_planted_truth(swept, target, out):
    prediction = predict(out)
    slow, fast = prediction.lr_scale_interval
    assert slow < 2**OPTIMUM < fast and fast / slow < 1.2
    low, high = prediction.loss_interval
    assert low < 2.5 + 4 * 256**-0.5 + 0.01 * (swept.seeds - 1) / 2 < high
    assert prediction.verdict == "PASS" and "--lr-scale 1.2" in prediction.summary()
    assert json.loads((out / "plan.json").read_text())["prediction"]["lr_scale"] == prediction.lr_scale


def test_rates_are_relative_to_the_targets(target, out):
    plan = make_plan(dataclasses.replace(target, lr_scale=4.0), out, FakeEngine(), budget_minutes=20)
    run_sweep(plan.sweep, out, FakeEngine(), progress=False)
    assert predict(out).lr_scale == pytest.approx(4 * 2**OPTIMUM, rel=0.05)


def test_without_a_plan_or_a_sweep_there_is_no_prediction(target, out, tmp_path):
    with pytest.raises(ConfigError, match="make a plan first"):
        predict(out)
    plan = make_plan(target, out, FakeEngine(), budget_minutes=20)
    with pytest.raises(ConfigError, match=r"sweep.json is missing"):
        predict(out)
    lone = dataclasses.replace(plan.sweep, seeds=(0,))
    run_sweep(lone, out, FakeEngine(), progress=False)
    with pytest.raises(ConfigError, match="run a second seed"):
        predict(out)
    run_sweep(dataclasses.replace(plan.sweep, widths=(16,)), tmp_path / "narrow", FakeEngine(), progress=False)
    (out / "plan.json").rename(tmp_path / "narrow" / "plan.json")
    with pytest.raises(TransferError, match="two widths"):
        predict(tmp_path / "narrow")


def test_predicted_against_measured(swept, target, out):
    prediction = predict(out)
    result = train(dataclasses.replace(target, lr_scale=2 * prediction.lr_scale, seed=5, name="target", save=False))
    comparison = compare(out, result.folder)
    assert comparison.prediction == prediction and comparison.measured == result.val_loss
    assert comparison.octaves == pytest.approx(1) and "2^+1.00 times the predicted" in comparison.summary()
    assert not comparison.inside and "outside" in comparison.summary()
    near = dataclasses.replace(comparison, measured=prediction.loss, octaves=0.0)
    assert near.inside and near.summary().endswith("inside")


def test_only_the_planned_run_is_compared(swept, target, out):
    result = train(dataclasses.replace(target, name="short", iterations=2, save=False))
    with pytest.raises(ConfigError, match="holds no prediction yet"):
        compare(out, result.folder)
    predict(out)
    with pytest.raises(ConfigError, match="iterations was planned as 20, is 2"):
        compare(out, result.folder)


@pytest.mark.slow
@pytest.mark.dist
def test_from_plan_to_comparison_with_real_runs(tiny, out):
    target = tiny(width=128, base_width=32, iterations=40, val_every=0, save=False)
    with closing(LocalEngine(2, device="cpu")) as engine:
        plan = make_plan(target, out, engine, budget_flops=2e12)
        assert isinstance(plan, Plan) and plan.sweep_s > 0
        sweep = dataclasses.replace(plan.sweep, seeds=(0, 1))
        assert run_sweep(sweep, out, engine, progress=False).complete
    assert len(read_results(out)) >= 3 * 7 * 2
    prediction = predict(out)
    assert isinstance(prediction, Prediction)
    comparison = compare(out, train(dataclasses.replace(target, lr_scale=prediction.lr_scale, name="t")).folder)
    low, high = prediction.loss_interval
    assert abs(comparison.measured - prediction.loss) < max(2 * (high - low), 0.2)
