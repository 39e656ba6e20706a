"""Plans over several sizes: what is chosen, what it promises, that it keeps it, and what is refused."""

import dataclasses
import json
import math

import numpy as np
import pytest
from helpers.surfaces import World
from test_plan import OVERHEAD_S, SPEED, FakeEngine

from speedrun_mup.cli import main
from speedrun_mup.config import make_config
from speedrun_mup.core.errors import ConfigError
from speedrun_mup.data.corpus import find_corpus
from speedrun_mup.plan import (
    Budget,
    NoPlanFits,
    choose_joint_plan,
    is_joint,
    load_joint_plan,
    predict_joint,
    run_joint_plan,
    save_joint_plan,
    whole_target,
)
from speedrun_mup.plan.joint import expected_errors
from speedrun_mup.plan.known import known_in, published_priors
from speedrun_mup.sweep import read_results
from speedrun_mup.training.flops import run_flops
from speedrun_mup.training.tracking import clock
from speedrun_mup.transfer import Known, Prior
from speedrun_mup.transfer.axes import size_axis, sized

NAMES = ("width", "n_layer", "batch_tokens", "tokens")
SETTINGS = {"parametrization": "mup", "base_width": 64, "head_dim": 16, "data": "embedded", "width": 256, "n_layer": 12}
TARGET = whole_target(make_config("laptop", SETTINGS | {"micro_batch_tokens": 256}), 4096, 2**21)
WORLD = World(
    {"width": 0.0, "n_layer": 0.0, "batch_tokens": 0.4, "tokens": -0.3},
    {"width": 0.5, "n_layer": 0.4, "batch_tokens": 0.3, "tokens": 0.4},
    {"width": 0.08, "n_layer": 0.04, "batch_tokens": 0.05, "tokens": 0.12},
    sigma=0.003,
    offset=0.005,
)


def doublings(sizes, base):
    return {name: math.log2(sizes[name] / base[name]) for name in WORLD.drifts if name in sizes}


class PlantedEngine(FakeEngine):
    """Trains nothing: its losses are those of a world."""

    def __init__(self, base, shift=0.0):
        super().__init__()
        self.base, self.shift = base, shift

    def run(self, cells, scratch):
        for spec, result in super().run(cells, scratch):
            at = doublings(spec.sizes, self.base)
            luck = np.random.default_rng([int(spec.id, 16), 1]).standard_normal() * WORLD.sigma
            offset = np.random.default_rng([spec.seed, *spec.place]).standard_normal() * WORLD.offset
            loss = (
                WORLD.loss(at) + WORLD.curvature * (spec.log2_factor - WORLD.best(at) - self.shift) ** 2 + luck + offset
            )
            yield spec, dataclasses.replace(result, loss=loss)


def test_the_target_is_whole_micro_batches_and_steps():
    target = whole_target(make_config("laptop", SETTINGS | {"micro_batch_tokens": 256}), 4000, 2_000_000)
    assert target.micro_batches * target.micro_batch_tokens == 4096
    assert target.schedule.tokens == round(2_000_000 / 4096) * 4096


@pytest.mark.slow
def test_proxies_are_smaller_in_every_size_and_keep_the_budget():
    plan = choose_joint_plan(TARGET, NAMES, Budget(share=0.05))
    corpus, _ = find_corpus(TARGET.data, TARGET.tokenizer)
    assert plan.sizes == {"width": 256, "n_layer": 12, "batch_tokens": 4096, "tokens": 2**21}
    assert len(plan.places) == 10 and len(plan.seeds) == 10 and plan.flops <= 0.05 * plan.target_flops
    points = plan.runs // sum(plan.seeds)
    costs = [run_flops(sized(TARGET, place), corpus.vocab_size) for place in plan.places]
    exact = points * sum(cost * count for cost, count in zip(costs, plan.seeds, strict=True))
    assert plan.flops == pytest.approx(exact, rel=0.01)
    for place in plan.places:
        cfg = sized(TARGET, place)
        assert cfg.iterations >= 64 and all(size_axis(name).of(cfg) == size for name, size in place.items())
    for name, size in plan.sizes.items():
        values = sorted({place[name] for place in plan.places})
        assert [value / values[0] for value in values] == [1, 2, 4] and values[-1] <= size
    dearer = choose_joint_plan(TARGET, NAMES, Budget(share=0.2))
    assert dearer.loss_width < plan.loss_width and dearer.flops > plan.flops


@pytest.mark.slow
def test_priors_make_the_same_budget_sharper():
    priors = {"drift": {"tokens": [-0.3, 0.03]}, "loss": {name: [0.45, 0.1] for name in NAMES}}
    alone = choose_joint_plan(TARGET, NAMES, Budget(share=0.05))
    told = choose_joint_plan(TARGET, NAMES, Budget(share=0.05), priors)
    assert told.loss_width < alone.loss_width and told.value_error < alone.value_error


def test_a_size_with_a_known_drift_may_do_with_one_doubling():
    """Next to one doubling of the others: cheaper, and the sizes can still be told apart."""
    target = whole_target(make_config("laptop", SETTINGS | {"micro_batch_tokens": 256}), 1024, 163840)
    with pytest.raises(ConfigError, match="tokens=163840 leaves no room for three"):
        choose_joint_plan(target, ("width", "tokens"), Budget(share=10))
    priors = published_priors(target, ("width", "tokens"))
    plan = choose_joint_plan(target, ("width", "tokens"), Budget(share=0.85), priors)
    base = plan.places[0]
    assert plan.places[1:] == tuple(
        {"width": a * base["width"], "tokens": b * base["tokens"]} for a, b in ((2, 1), (4, 1), (2, 2))
    )
    assert plan.priors == priors and plan.flops <= 0.85 * plan.target_flops


def test_published_drifts_are_those_beyond_the_rule_in_force():
    mean, sd = published_priors(TARGET, NAMES)["drift"]["tokens"]
    ruled = make_config("laptop", SETTINGS | {"base_tokens": 65536, "tokens_rule": "completedp"})
    assert published_priors(ruled, NAMES)["drift"]["tokens"] == [pytest.approx(mean + 0.5), sd]
    with pytest.raises(ConfigError, match="add tokens to --axes"):
        published_priors(TARGET, ("width",))


@pytest.mark.slow
def test_a_budget_in_time_is_kept(tmp_path):
    """Timed by a few steps; the plan that is in a folder is found again, though times differ."""
    engine, names = FakeEngine(), ["width", "tokens"]
    plan = choose_joint_plan(TARGET, names, Budget(minutes=120), engine=engine)
    assert {16, 32} <= {run.cfg.width for run in engine.ran} and plan.workers == 2
    longest = max(run_flops(sized(TARGET, place), 256) for place in plan.places) / SPEED
    assert longest + OVERHEAD_S < plan.sweep_s <= 120 * 60
    assert f"; about {clock(plan.sweep_s)} with 2 workers" in plan.summary()
    with pytest.raises(NoPlanFits, match="minutes here") as error:
        choose_joint_plan(TARGET, names, Budget(minutes=0.01), engine=FakeEngine())
    enough = Budget(minutes=float(error.value.enough.removesuffix("m")))
    assert choose_joint_plan(TARGET, names, enough, engine=FakeEngine()).sweep_s <= enough.most_s
    save_joint_plan(plan, tmp_path, Budget(minutes=120))
    assert load_joint_plan(TARGET, names, Budget(minutes=120), {}, tmp_path) == plan
    for other in ((TARGET, names, Budget(minutes=60), {}), (TARGET, ["width"], Budget(minutes=120), {})):
        assert load_joint_plan(*other, tmp_path) is None
    assert load_joint_plan(dataclasses.replace(TARGET, n_layer=6), names, Budget(minutes=120), {}, tmp_path) is None


@pytest.mark.slow
def test_grids_lie_around_a_best_rate_that_is_far_from_what_was_tuned(tmp_path):
    """A best factor of 0.22, as on a corpus with another vocabulary: the base finds it, the others start there."""
    plan = choose_joint_plan(TARGET, ("width", "tokens"), Budget(share=0.2))
    save_joint_plan(plan, tmp_path, Budget(share=0.3))
    base = plan.places[0]
    assert run_joint_plan(plan, tmp_path, PlantedEngine(base, shift=math.log2(0.22) - WORLD.optimum)).complete
    prediction = predict_joint(tmp_path)
    best = TARGET.lr_scale * 2 ** (WORLD.best(doublings(plan.sizes, base)) - WORLD.optimum) * 0.22
    slow, fast = prediction.lr_scale_interval
    assert slow <= best <= fast and fast < 1.5 * slow
    tried = {place: set() for place in ({run.place for run in read_results(tmp_path)})}
    for run in read_results(tmp_path):
        tried[run.place].add(round(math.log2(run.factor)))
    assert max(tried[tuple(base.values())]) > 0  # the grid that was planned
    assert all(max(at) < 1 for place, at in tried.items() if place != tuple(base.values()))


def test_expected_errors_are_those_of_the_design():
    """One axis, no priors: the formula of a weighted line; and more seeds, a nearer target, a prior each help."""
    places, target = [{"width": 64 * 2**j} for j in range(3)], {"width": 1024}
    rate, loss = expected_errors(places, (2, 2, 2), (-2, -1, 0, 1, 2), target, Known())
    weight = 4 * 10 * 2 / 0.25**2
    assert rate == pytest.approx(math.sqrt((1 / 3 + 3**2 / 2) / weight), rel=1e-6)
    for better in (
        expected_errors(places, (4, 4, 4), (-2, -1, 0, 1, 2), target, Known()),
        expected_errors(places, (2, 2, 2), (-2, -1, 0, 1, 2), {"width": 512}, Known()),
        expected_errors(
            places,
            (2, 2, 2),
            (-2, -1, 0, 1, 2),
            target,
            Known(priors={"width": Prior(0, 0.01)}, loss_priors={"width": Prior(0.5, 0.1)}),
        ),
    ):
        assert better[0] < rate and better[1] < loss


@pytest.mark.slow
def test_a_plan_is_run_and_predicts_what_is_planted(tmp_path):
    plan = choose_joint_plan(TARGET, NAMES, Budget(share=0.1))
    save_joint_plan(plan, tmp_path, Budget(share=0.1))
    engine = PlantedEngine(plan.places[0])
    assert is_joint(tmp_path) and run_joint_plan(plan, tmp_path, engine).complete
    assert {run.sizes["tokens"] for run in read_results(tmp_path)} == {place["tokens"] for place in plan.places}
    prediction = predict_joint(tmp_path)
    far = doublings(plan.sizes, plan.places[0])
    low, high = prediction.loss_interval
    assert low <= WORLD.loss(far) <= high
    slow, fast = prediction.lr_scale_interval
    assert slow <= TARGET.lr_scale * 2 ** WORLD.best(far) <= fast
    assert prediction.drifts["tokens"][0] == pytest.approx(-0.3, abs=0.1)
    assert prediction.drifts["batch_tokens"][0] == pytest.approx(0.4, abs=0.1)
    assert prediction.verdicts["width"] == "PASS" and prediction.verdicts["tokens"] == "FAIL"
    assert prediction.outside["width"] == math.log2(256 / max(place["width"] for place in plan.places))
    with pytest.raises(ConfigError, match="holds another plan, and runs of it"):
        save_joint_plan(dataclasses.replace(plan, refine=not plan.refine), tmp_path, Budget(share=0.1))


@pytest.mark.parametrize(
    ("budget", "names", "target", "fault"),
    [
        (Budget(minutes=30), NAMES, TARGET, "needs a budget; give --budget, such as 2%, 1e15 FLOPs, or 30m"),
        (Budget(), NAMES, TARGET, "needs a budget"),
        (
            Budget(share=1e-6),
            NAMES,
            TARGET,
            "no plan over width, n_layer, batch_tokens, tokens fits the budget: the smallest",
        ),
        (
            Budget(share=1),
            NAMES,
            dataclasses.replace(TARGET, n_layer=6),
            "n_layer=6 leaves no room for three proxy values",
        ),
        (Budget(share=1), ("width",), dataclasses.replace(TARGET, width=32), "plan for 64 or more, or leave width out"),
        (Budget(share=1), ("tokens",), dataclasses.replace(TARGET, iterations=200), "tokens=819200 leaves no room"),
    ],
)
def test_a_target_without_room_for_proxies_is_refused(budget, names, target, fault):
    with pytest.raises(ConfigError, match=fault) as error:
        choose_joint_plan(target, names, budget)
    if budget.share == 1e-6:
        assert isinstance(error.value, NoPlanFits) and error.value.enough.endswith("%")


FLAGS = "--mup --base-width 64 --head-dim 16 --micro-batch-tokens 256 --width 256 --n-layer 12 --tokens 2M --batch-tokens 4k"


@pytest.mark.slow
def test_the_command_plans(tmp_path, capsys):
    assert main(["plan", *FLAGS.split(), "--budget", "5%", "--out", str(tmp_path)]) == 0
    told = capsys.readouterr().out
    assert "target: width 256, n_layer 12, batch_tokens 4096, tokens 1998848" in told and "10 places from width" in told
    content = json.loads((tmp_path / "plan.json").read_text())
    assert content["kind"] == "joint" and content["prediction"] is None
    assert main(["report", str(tmp_path)]) > 1
    assert "holds no prediction yet" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "fault"),
    [
        ("--iterations 100", "--tokens and --iterations say the same of the target; give one"),
        ("--micro-batches 4", "--batch-tokens and --micro-batches say the same of the target; give one"),
        ("--axes heads", "--axes heads: choose among width, n_layer, batch_tokens, tokens"),
        ("--priors nowhere.json", "--priors nowhere.json: cannot be read as JSON"),
        ("--json", "--json is for a plan over width alone"),
        ("--budget 0.001%", "no plan over width, n_layer, batch_tokens, tokens fits the budget"),
    ],
)
def test_flags_that_contradict_each_other_get_one_line(more, fault, capsys):
    assert main(["plan", *FLAGS.split(), *([] if "budget" in more else ["--budget", "5%"]), *more.split()]) > 1
    told = [line for line in capsys.readouterr().err.strip().splitlines() if line.startswith("error")]
    assert len(told) == 1 and fault in told[0]


@pytest.mark.parametrize(
    "values", [{"drift": {"tokens": 1}}, {"slope": {}}, {"loss": {"width": [0.5, 0]}}, {"drift": []}]
)
def test_priors_that_make_no_sense_are_refused(values):
    with pytest.raises(ConfigError, match="priors: give"):
        known_in(values, NAMES)
