"""Plans: the cheapest sweep that answers the question, what it promises, and by how much it misses."""

import dataclasses
import itertools
import json
import random
import re
import subprocess
import sys
from contextlib import closing

import numpy as np
import pytest
from test_transfer import sweep

from speedrun_mup.cli import main
from speedrun_mup.commands.sweep import budget_of
from speedrun_mup.config import TrainConfig, make_config
from speedrun_mup.core.errors import ConfigError
from speedrun_mup.data.corpus import find_corpus
from speedrun_mup.plan import (
    Budget,
    NoPlanFits,
    Plan,
    Prediction,
    choose_plan,
    compare,
    design_table,
    expected_lr_error,
    load_plan,
    make_plan,
    predict,
    read_plan,
    recommended_config,
    run_plan,
)
from speedrun_mup.plan.folder import read_prediction
from speedrun_mup.plan.prediction import _why_wide, miss
from speedrun_mup.sweep import Failure, LocalEngine, RunResult, read_results, run_sweep
from speedrun_mup.training import train
from speedrun_mup.training.flops import run_flops
from speedrun_mup.transfer import TransferError, loss_forecast, measure_transfer

SPEED = 1e9  # FLOPs per second of a worker
OVERHEAD_S = 2.0
OPTIMUM = 0.3


def loss_at(cell, optimum=OPTIMUM):
    """A bowl around OPTIMUM; loss falls as 1 / sqrt(width)."""
    luck = random.Random(cell.id).gauss(0, 0.002) + 0.01 * cell.seed
    return 2.5 + 4 * cell.size**-0.5 + 0.03 * (cell.log2_factor - optimum) ** 2 + luck


class FakeEngine:
    """Two workers of known speed that train nothing."""

    workers = 2

    def __init__(self, optimum=OPTIMUM):
        self.ran, self.optimum = [], optimum

    def run(self, cells, scratch):
        for cell in cells:
            self.ran.append(cell)
            loss, train_s = loss_at(cell, self.optimum), cell.flops / SPEED
            curve = [round(4.85 - (4.85 - loss) * step / cell.cfg.iterations, 6) for step in range(cell.cfg.iterations)]
            place = (cell.id, cell.arm, dict(cell.sizes), cell.log2_factor, cell.seed)
            yield (
                cell,
                RunResult(
                    *place,
                    *(
                        loss,
                        loss,
                        False,
                        "",
                        curve,
                        train_s + OVERHEAD_S,
                        train_s,
                        cell.flops,
                        cell.corpus,
                        cell.vocab_size,
                    ),
                    config={"iterations": cell.cfg.iterations},
                    made_with={"source_sha256": "0", "torch": "2", "device": "none"},
                ),
            )

    def close(self):
        pass


@pytest.fixture
def target(tiny):
    """A target of width 128; its proxies are 16, 32 and 64 wide."""
    return tiny(width=128, base_width=32)


@pytest.fixture
def wide(target):
    """A target of width 512; its proxies can be 16 to 256 wide."""
    return dataclasses.replace(target, width=512)


@pytest.fixture
def out(tmp_path):
    return tmp_path / "sweep"


@pytest.mark.slow
def test_more_budget_buys_a_better_known_learning_rate(wide, out):
    minutes = (1, 3, 12, 1000)
    plans = [make_plan(wide, out, FakeEngine(), budget_minutes=budget) for budget in minutes]
    assert all(plan.sweep_s <= 60 * budget for plan, budget in zip(plans, minutes))
    errors = [plan.lr_error for plan in plans]
    assert errors == sorted(errors, reverse=True) and errors[0] > errors[-1]
    assert plans[-1].widths == (16, 32, 64, 128, 256) and plans[-1].seeds == (5, 5, 5, 5, 5)
    assert all(len(plan.widths) >= 3 and plan.seeds[0] > 1 for plan in plans)
    assert not plans[0].refine and plans[-1].refine


@pytest.mark.slow
def test_costs_are_counted(wide, out):
    engine = FakeEngine()
    plan = make_plan(wide, out, engine, budget_flops=1e18)
    assert plan.runs == 5 * 9 * 5 and plan.target_flops == run_flops(wide, 65)
    each = [run_flops(dataclasses.replace(wide, width=width), 65) for width in plan.widths]
    assert plan.flops == pytest.approx(9 * 5 * sum(each))
    assert plan.sweep_s == pytest.approx((plan.runs * OVERHEAD_S + plan.flops / SPEED) / 2)
    assert plan.target_s == pytest.approx(plan.target_flops / SPEED / 2)
    assert {(cell.cfg.iterations, cell.size) for cell in engine.ran} == {(3, width) for width in plan.widths}
    assert f"{plan.flops / plan.target_flops:.1%} of the target run" in plan.summary()
    assert ("tuning costs more than training" in plan.summary()) == (plan.flops > plan.target_flops)
    dear = dataclasses.replace(plan, flops=1.5 * plan.target_flops)
    assert "150.0% of the target run (for a target this small tuning costs more than training it" in dear.summary()
    cheap = make_plan(wide, out, engine, budget_flops=plan.flops / 4)
    assert cheap.flops <= plan.flops / 4 and cheap.seeds[0] > cheap.seeds[-1]
    assert {(sweep.sizes, len(sweep.seeds)) for sweep in cheap.sweeps} == {
        (tuple(w for w, s in zip(cheap.widths, cheap.seeds) if s == seeds), seeds) for seeds in set(cheap.seeds)
    }


@pytest.mark.slow
def test_a_budget_may_be_a_share_of_the_target_run(wide, out):
    plan = make_plan(wide, out, FakeEngine(), budget_share=3.0)
    assert plan.flops <= 3 * plan.target_flops
    with pytest.raises(ConfigError, match=r"\(\d+\.\d% of the target run\)"):
        make_plan(wide, out, FakeEngine(), budget_share=0.001)


@pytest.mark.slow
def test_a_plan_is_found_again_and_not_taken_for_another(target, out, monkeypatch):
    assert load_plan(target, out, {}) is None
    plan = make_plan(target, out, FakeEngine(), budget_minutes=20)
    assert load_plan(dataclasses.replace(target, out="elsewhere", progress=True), out, {}).summary() == plan.summary()
    assert load_plan(target, out, {"budget_minutes": 20}).sweeps == plan.sweeps
    real = find_corpus(target.data, target.tokenizer)[0]
    newer = dataclasses.replace(real, fingerprint="new", former_fingerprint=real.fingerprint)
    with monkeypatch.context() as patch:  # a later version may give the same tokens another fingerprint
        patch.setattr("speedrun_mup.plan.folder.find_corpus", lambda *_: (newer, ""))
        assert load_plan(target, out, {}).sweeps == plan.sweeps
    deeper = dataclasses.replace(target, n_layer=8)
    assert load_plan(deeper, out, {}) is None  # nothing was run, so nothing is lost with it
    run_plan(plan, out, FakeEngine(), progress=False)
    with pytest.raises(ConfigError, match=r"another plan, and runs of it: n_layer was 6, is 8"):
        load_plan(deeper, out, {})
    assert load_plan(target, out, {"budget_minutes": 21}) is None  # it is made anew, and finished cells count
    with pytest.raises(ConfigError, match=r"another plan, and runs of it: data=embedded is not the corpus"):
        load_plan(dataclasses.replace(target, data="embedded"), out, {})
    content = json.loads((out / "plan.json").read_text())
    del content["seeds"]
    (out / "plan.json").write_text(json.dumps(content))
    with pytest.raises(ConfigError, match=r"plan.json is missing or damaged"):
        load_plan(target, out, {})


@pytest.mark.slow
def test_proxies_are_scaled_and_optimized_like_the_target(target, out):
    adam = dataclasses.replace(target, matrix_optimizer="adam", parametrization="sp", matrix_lr=0.004)
    engine = FakeEngine()
    plan = make_plan(adam, out, engine, budget_minutes=20)
    run_plan(plan, out, engine, progress=False)
    assert {(c.cfg.matrix_optimizer, c.cfg.parametrization, c.cfg.matrix_lr) for c in engine.ran} == {
        ("adam", "sp", 0.004)
    }
    assert {result.arm for result in read_results(out)} == {"adam-sp"} and predict(out).lr_scale > 0
    own = make_plan(dataclasses.replace(adam, base_width=None), out, engine, budget_minutes=20)
    assert own.sweeps[0].arms[0].settings == {"parametrization": "mup", "matrix_optimizer": "adam"}
    asked = make_plan(dataclasses.replace(adam, base_width=128), out, engine, budget_minutes=20)
    assert (
        asked.sweeps[0].arms[0].settings["parametrization"] == "sp"
    )  # said for its own width, it holds for narrower ones


@pytest.mark.slow
def test_finished_cells_make_timing_unnecessary(target, out):
    plan = make_plan(target, out, FakeEngine(), budget_minutes=20)
    run_plan(plan, out, FakeEngine(), progress=False)
    again = FakeEngine()
    assert make_plan(target, out, again, budget_minutes=20).sweep_s == pytest.approx(plan.sweep_s)
    assert not again.ran


@pytest.mark.slow
def test_a_width_that_would_take_long_to_time_is_not_timed(wide, out, monkeypatch):
    engine = FakeEngine()
    monkeypatch.setattr("speedrun_mup.plan.design.PROBE_S", OVERHEAD_S + 0.001)
    make_plan(wide, out, engine, budget_flops=1e18)
    assert {cell.size for cell in engine.ran} == {16}


def test_impossible_plans_are_refused_in_one_line(target, out):
    with pytest.raises(ConfigError, match="needs a budget"):
        make_plan(target, out, FakeEngine())
    with pytest.raises(ConfigError, match=r"the smallest takes .* FLOPs \(.* of the target run\) and .* minutes here"):
        make_plan(target, out, FakeEngine(), budget_minutes=0.1)
    with pytest.raises(ConfigError, match="plan for a width of 128 or more"):
        make_plan(dataclasses.replace(target, width=64), out, FakeEngine(), budget_minutes=1)
    broken = FakeEngine()
    broken.run = lambda cells, scratch: ((cell, Failure("no power")) for cell in cells)
    with pytest.raises(ConfigError, match=r"timing mup width 16 .* no power"):
        make_plan(target, out, broken, budget_minutes=1)


@pytest.mark.slow
def test_the_plan_of_the_readme_fits_its_budget(cache_folder, out):
    """10 % buy no ladder of a factor of four; the short one is offered, with what it loses."""
    target = make_config("laptop", {"width": 512, "base_width": 64, "head_dim": 16})
    engine = FakeEngine()
    plan, designs = choose_plan(target, out, engine, Budget(share=0.1))
    assert plan.widths == (16, 32, 48) and plan.is_short and plan.flops < 0.1 * plan.target_flops
    assert "less than a factor of 4" in plan.summary() and "INCONCLUSIVE" in plan.summary()
    assert {cell.size for cell in engine.ran} == {16, 32, 48} and not out.exists()
    whole, _ = choose_plan(target, out, FakeEngine(), Budget(share=0.12))
    assert whole.widths == (16, 32, 64) and not whole.is_short and "INCONCLUSIVE" not in whole.summary()
    table = design_table(designs, plan)
    assert table.count("*") == 1 and "no verdict" in table and "16 (2), 32 (1), 64 (1)" in table
    costs = [(design.flops, -design.lr_error) for design in designs]
    assert costs == sorted(costs) and all(less[1] < more[1] for less, more in itertools.pairwise(costs))


@pytest.mark.parametrize("budget", [Budget(minutes=0.2), Budget(flops=1e6 + 1), Budget(share=0.001)])
def test_a_budget_that_is_too_small_is_told_what_is_enough(target, out, budget):
    engine = FakeEngine()
    with pytest.raises(NoPlanFits, match="the smallest takes") as refusal:
        choose_plan(target, out, engine, budget)
    assert bool(engine.ran) == bool(budget.minutes)  # FLOPs need no timing
    amounts = {name.removeprefix("budget_"): amount for name, amount in budget_of(refusal.value.enough).items()}
    assert amounts.keys() == {name for name, value in vars(budget).items() if value}
    plan, _ = choose_plan(target, out, engine, Budget(**amounts))
    assert plan.flops <= Budget(**amounts).most_flops(plan.target_flops)


@pytest.mark.slow
def test_a_long_validation_is_reckoned_and_not_waited_for(target, out):
    engine = FakeEngine()
    long = dataclasses.replace(target, val_tokens=1024 * 1024)
    plan, short = (
        make_plan(long, out, engine, budget_flops=1e18),
        make_plan(target, out, FakeEngine(), budget_flops=1e18),
    )
    assert max(cell.cfg.val_tokens for cell in engine.ran) == 8192
    a_step = run_flops(target, 65) / target.iterations / target.schedule.at(0).tokens  # FLOPs per token of the target
    assert a_step * (2**20 - 8192) / 3 / SPEED * plan.runs / 2 > plan.sweep_s - short.sweep_s > 0


@pytest.fixture
def no_workers(monkeypatch, tmp_path):
    """The plan command, with an engine that trains nothing, in an empty folder."""
    engine = FakeEngine()
    monkeypatch.setattr("speedrun_mup.sweep.open_engine", lambda **options: engine)
    monkeypatch.chdir(tmp_path)
    return engine


@pytest.mark.slow
def test_what_if_leaves_nothing_behind(no_workers, tmp_path, capsys):
    words = ["plan", "--width", "512", "--base-width", "64", "--head-dim", "16", "--data", "synthetic"]
    for more in (["--budget", "10%"], ["--budget", "40%", "--n-layer", "8"]):
        assert main([*words, *more]) == 0
        told = capsys.readouterr()
        assert "proxies: widths" in told.out and "* " in told.out and "rules: muP from base width 64" in told.err
        assert "timing: 3 steps of width 16, 2 at a time" in told.err
    assert not list(tmp_path.iterdir())
    assert main([*words, "--budget", "40%", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["plan"] in told["designs"] and told["target"]["width"] == 512
    assert main([*words, "--budget", "1%"]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.endswith(f"enough is: speedrun-mup {' '.join(words)} --budget 7.6%")
    assert main([*words, "--budget", "7.6%"]) == 0 and main([*words, "--json", "--run"]) == 2


@pytest.mark.slow
def test_a_plan_that_is_kept_gives_way_until_it_has_runs(no_workers, tmp_path, capsys):
    words = ["plan", "--width", "128", "--base-width", "32", "--head-dim", "16", "--data", "synthetic", "--out", "p"]
    assert main([*words, "--budget", "400%"]) == 0 and main([*words, "--budget", "400%", "--n-layer", "8"]) == 0
    assert read_plan(tmp_path / "p")[0].n_layer == 8
    assert main([*words, "--n-layer", "8"]) == 0 and "proxies: widths" in capsys.readouterr().out
    assert main([*words, "--budget", "400%", "--n-layer", "8", "--run"]) == 0
    assert main([*words, "--budget", "400%", "--n-layer", "10"]) == 2
    assert "runs of it: n_layer was 8, is 10; choose another --out" in capsys.readouterr().err


@pytest.mark.slow
def test_the_first_line_comes_before_torch():
    script = """if True:
        import sys
        from speedrun_mup.commands import plan
        def say(*lines):
            print(*lines, "torch" in sys.modules)
            sys.exit(0)
        plan.say = say
        plan.run(["--width", "512", "--base-width", "64", "--budget", "1h"])"""
    said = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert said.startswith("rules: muP from base width 64") and said.endswith("False\n")


def test_the_error_in_advance_is_that_of_a_line_through_measured_optima():
    """Against fits of simulated sweeps on a refined grid, noise and curvature as assumed, seeds 3, 2, 1."""
    rng, us = np.random.default_rng(0), np.array([-2, -1.5, -1, -0.5, 0, 0.5, 1, 1.5, 2])
    widths, seeds, j = (32, 64, 128), np.array([3, 2, 1]), np.array([-4.0, -3.0, -2.0])
    noise = rng.normal(0, 0.005, (2000, 3, len(us))) / np.sqrt(seeds)[:, None]
    c, b, _ = np.polyfit(us, (0.02 * us**2 + noise).reshape(-1, len(us)).T, 2)
    optima = (-b / (2 * c)).reshape(2000, 3)
    at_target = np.polyfit(j, optima.T, 1, w=np.sqrt(seeds))[1]
    assert expected_lr_error(widths, seeds.tolist(), us.tolist(), 512) == pytest.approx(at_target.std(), rel=0.1)


def test_a_record_sized_target_has_proxies_from_one_head_up(out, cache_folder):
    target = TrainConfig(data="synthetic", parametrization="mup", base_width=768, width=1024)
    plan = make_plan(target, out, FakeEngine(), budget_flops=2e19)
    assert plan.widths[-1] == 512 and plan.sweeps[0].base.base_width == 768
    own = dataclasses.replace(target, base_width=None)
    assert make_plan(own, out, FakeEngine(), budget_flops=2e19).sweeps[0].base.base_width == 1024


# ---------------------------------------------------------------------------------------------------------------------
# Prediction and comparison
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def swept(target, out):
    """A plan carried out."""
    plan = make_plan(target, out, FakeEngine(), budget_minutes=20)
    engine = FakeEngine()
    result = run_plan(plan, out, engine, progress=False)
    assert result.complete and result.ran == len(engine.ran) == len(result.results)
    return plan


@pytest.mark.slow
def test_the_prediction_holds_the_planted_truth(swept, target, out):
    prediction = predict(out)
    assert prediction.lr_scale == pytest.approx(2**OPTIMUM, rel=0.03)
    (slow, fast), (low, high) = prediction.lr_scale_interval, prediction.loss_interval
    assert slow < prediction.lr_scale < fast < 1.2 * slow
    assert low < 2.5 + 4 * 128**-0.5 + 0.02 < high < low + 0.25  # seeds 0 to 4 add 0.02 on average
    assert prediction.verdict == "PASS" and "--lr-scale 1.2" in prediction.summary()
    assert json.loads((out / "plan.json").read_text())["prediction"]["lr_scale"] == prediction.lr_scale
    assert recommended_config(out) == dataclasses.replace(target, lr_scale=prediction.lr_scale)


@pytest.mark.slow
def test_the_prediction_is_also_in_bits_per_byte_where_the_runs_have_them(swept, out, monkeypatch):
    assert predict(out).bits_per_byte is None and "bits" not in predict(out).summary()
    known = [dataclasses.replace(run, bits_per_byte=1.4 * run.loss) for run in read_results(out)]
    monkeypatch.setattr("speedrun_mup.plan.prediction.read_results", lambda folder: known)
    prediction = predict(out)
    assert prediction.bits_per_byte == pytest.approx(1.4 * prediction.loss)
    assert f"{prediction.bits_per_byte:.3f} bits per byte" in prediction.summary()
    assert Prediction.from_json(json.loads((out / "plan.json").read_text())["prediction"]) == prediction


@pytest.mark.slow
def test_a_prediction_of_an_earlier_edition_is_read(swept, out):
    """It had neither what its loss comes to in bits per byte nor why the interval is wide; a required field may not lack."""
    prediction, content = predict(out), json.loads((out / "plan.json").read_text())
    for name in ("bits_per_byte", "wide"):
        del content["prediction"][name]
        (out / "plan.json").write_text(json.dumps(content))
        assert read_prediction(out)[1] == dataclasses.replace(
            prediction, wide="" if name == "wide" else prediction.wide
        )
    for damage in {"lr_scale": 1.0, "width": 1}, content["prediction"] | {"of_tomorrow": 1}:
        (out / "plan.json").write_text(json.dumps(content | {"prediction": damage}))
        with pytest.raises(ConfigError, match="missing or damaged"):
            read_prediction(out)


@pytest.mark.slow
def test_a_plan_stays_within_its_share_where_the_grid_would_grow_and_goes_on_with_a_larger_one(target, out):
    share = 1.001 * make_plan(target, out, FakeEngine(), budget_share=5.0).flops / run_flops(target, 65)
    plan, far = make_plan(target, out, FakeEngine(), budget_share=share), FakeEngine(optimum=-3.0)  # outside the grid
    result = run_plan(plan, out, far, progress=False)
    assert not result.complete and result.left and result.flops <= share * run_flops(target, 65)
    assert f"FLOP budget exhausted, {result.left} runs left; raise --budget to continue" in result.summary()
    planned_cells = {(cell.size, cell.log2_factor, cell.seed) for cell in read_results(out)}
    for width, seeds in zip(plan.widths, plan.seeds, strict=True):  # what an extension takes, no wider model lacks
        assert {(width, at, seed) for at in plan.log2_factors for seed in range(seeds)} <= planned_cells
    assert load_plan(target, out, {"budget_share": 50.0}) is None
    larger = make_plan(target, out, far, budget_share=50.0)
    assert run_plan(larger, out, far, progress=False).complete


@pytest.mark.slow
def test_progress_is_counted_over_the_whole_plan(target, out, capsys):
    """Not from 1 in each of its sweeps; a command that goes on counts on."""
    share = 1.001 * make_plan(target, out, FakeEngine(), budget_share=5.0).flops / run_flops(target, 65)
    plan = make_plan(target, out, FakeEngine(), budget_share=share)
    assert len(plan.sweeps) > 1
    capsys.readouterr()
    run_sweep(plan.sweeps[0], out, FakeEngine(), progress=False)
    before = len(read_results(out))
    result = run_plan(plan, out, FakeEngine())
    places = re.findall(r"^run (\d+) of about (\d+)  ", capsys.readouterr().out, re.MULTILINE)
    assert [int(at) for at, _ in places] == list(range(before + 1, len(result.results) + 1)) and before > 0
    assert {int(of) for _, of in places} == {max(plan.runs, len(result.results))}


@pytest.mark.slow
@pytest.mark.parametrize("trouble", ["stopped", "failed"])
def test_an_earlier_sweep_without_room_hides_no_later_trouble(target, out, monkeypatch, trouble):
    """Who stops the command, or has cells that fail, gets no prediction in place of that."""
    share = 1.001 * make_plan(target, out, FakeEngine(), budget_share=5.0).flops / run_flops(target, 65)
    plan = make_plan(target, out, FakeEngine(), budget_share=share)
    assert len(plan.sweeps) > 1
    whole, calls = run_sweep, []

    def run(sweep, out, engine, **options):
        calls.append(sweep)
        result = whole(sweep, out, engine, **options)
        broken = {"stopped": True} if trouble == "stopped" else {"failed": {"a cell": "no luck"}}
        return result if len(calls) == 1 else dataclasses.replace(result, left=1, used_up=False, **broken)

    monkeypatch.setattr("speedrun_mup.plan.folder.run_sweep", run)
    result = run_plan(plan, out, FakeEngine(optimum=-3.0), progress=False)
    assert len(calls) == 2 and not result.complete and not result.used_up and result.left > 1


@pytest.mark.slow
def test_rates_are_relative_to_the_targets(target, out):
    plan = make_plan(dataclasses.replace(target, lr_scale=4.0), out, FakeEngine(), budget_minutes=20)
    run_plan(plan, out, FakeEngine(), progress=False)
    assert predict(out).lr_scale == pytest.approx(4 * 2**OPTIMUM, rel=0.05)


@pytest.mark.slow
def test_without_a_plan_or_a_sweep_there_is_no_prediction(target, out, tmp_path):
    with pytest.raises(ConfigError, match="make a plan first"):
        predict(out)
    (sweep,) = make_plan(target, out, FakeEngine(), budget_minutes=20).sweeps
    with pytest.raises(ConfigError, match=r"sweep.json is missing"):
        predict(out)
    run_sweep(dataclasses.replace(sweep, sizes=(16,)), out, FakeEngine(), progress=False)
    with pytest.raises(TransferError, match="two widths.*; or plan again with a larger --budget"):
        predict(out)
    run_sweep(dataclasses.replace(sweep, seeds=(0,)), tmp_path / "lone", FakeEngine(), progress=False)
    (out / "plan.json").rename(tmp_path / "lone" / "plan.json")
    with pytest.raises(ConfigError, match="run a second seed"):
        predict(tmp_path / "lone")


@pytest.mark.slow
def test_a_wide_interval_is_explained():
    """Three widths do not tell the law; with four, and the noise well known, there is nothing to explain."""
    three, four = (
        next(iter(measure_transfer(sweep(widths=widths, sigma=0.001, offset=0.001, seeds=range(8))).arms.values()))
        for widths in ((64, 128, 256), (64, 128, 256, 512))
    )
    told = _why_wide(three, loss_forecast(three, 2048))
    assert "because 3 widths do not determine how the loss falls with width" in told and "seeds" not in told
    few = next(
        iter(measure_transfer(sweep(widths=(64, 128, 256), sigma=0.001, offset=0.001, seeds=(0, 1))).arms.values())
    )
    assert "seeds are few (2, 2, 2 at widths 64, 128, 256)" in _why_wide(few, loss_forecast(few, 2048))
    assert _why_wide(four, loss_forecast(four, 512)) == ""


@pytest.mark.slow
def test_predicted_against_measured(swept, target, out):
    prediction = predict(out)
    result = train(dataclasses.replace(target, lr_scale=2 * prediction.lr_scale, seed=5, name="target", save=False))
    comparison = compare(out, result.folder)
    assert comparison.prediction == prediction and comparison.measured == result.val_loss
    assert comparison.log2_factor == pytest.approx(1) and "2^+1.00 times the predicted" in comparison.summary()
    assert not comparison.inside and "outside" in comparison.summary()
    wide = dataclasses.replace(comparison, prediction=dataclasses.replace(prediction, wide="the interval is wide"))
    assert "\nthe interval is wide\n" in wide.summary()
    near = dataclasses.replace(comparison, measured=prediction.loss, log2_factor=0.0)
    assert near.inside and "missed by +0.0000 nats; inside the 90 % interval (" in near.summary()


@pytest.mark.slow
def test_only_the_planned_run_is_compared(swept, target, out):
    result = train(dataclasses.replace(target, name="short", iterations=2, save=False))
    with pytest.raises(ConfigError, match="holds no prediction yet"):
        compare(out, result.folder)
    predict(out)
    with pytest.raises(ConfigError, match="iterations was planned as 6, is 2"):
        compare(out, result.folder)
    other = train(dataclasses.replace(target, name="other", data="embedded", save=False))
    with pytest.raises(ConfigError, match="trained on other data"):
        compare(out, other.folder)


@pytest.mark.slow
@pytest.mark.dist
def test_from_plan_to_comparison_with_real_runs(tiny, out):
    target = tiny(width=128, base_width=32, iterations=12, save=False)
    each = [run_flops(dataclasses.replace(target, width=width), 65) for width in (16, 32, 64)]
    with closing(LocalEngine(2, device="cpu")) as engine:
        plan = make_plan(target, out, engine, budget_flops=9.01 * (4 * each[0] + 2 * each[1] + each[2]))
        assert isinstance(plan, Plan) and plan.sweep_s > 0 and plan.seeds == (4, 2, 1)
        assert run_plan(plan, out, engine, progress=False).complete
    assert len(read_results(out)) >= 5 * sum(plan.seeds)
    prediction = predict(out)
    assert isinstance(prediction, Prediction)
    comparison = compare(out, train(dataclasses.replace(target, lr_scale=prediction.lr_scale, name="t")).folder)
    low, high = prediction.loss_interval
    assert abs(comparison.measured - prediction.loss) < max(2 * (high - low), 0.2)


def test_a_miss_has_the_sign_of_what_was_measured():
    assert miss(2.0, (1.9, 2.1), 2.15) == "missed by +0.1500 nats; outside the 90 % interval (1.9000 to 2.1000)"
    assert miss(2.0, (1.9, 2.1), 1.95) == "missed by -0.0500 nats; inside the 90 % interval (1.9000 to 2.1000)"
