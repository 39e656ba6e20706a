"""Several sizes at once, on runs whose exponents are planted: drifts, law, forecasts, verdicts, and what is refused."""

import dataclasses
import math

import numpy as np
import pytest
from helpers.surfaces import BASE, World, design

from speedrun_mup.transfer import TransferError, Verdict, loss_forecast, measure_transfer
from speedrun_mup.transfer import law as law_module
from speedrun_mup.transfer.fits import optima
from speedrun_mup.transfer.law import ANY_EXPONENT, COUPLING, Prior, fit_law, law_at
from speedrun_mup.transfer.surface import Known, fit_surface

ALL = tuple(BASE)
FAR = {"width": 4, "n_layer": 1, "batch_tokens": 2, "tokens": 4}  # doublings, of which tokens and width lie outside


def sizes_at(doublings):
    return {name: BASE[name] * 2**j for name, j in doublings.items()}


def simulated(world, rng=0, names=None, **options):
    return list(world.runs(design(names or tuple(world.drifts)), np.random.default_rng(rng), **options))


# ---- one axis: the estimator that there was -------------------------------------------------------------------------


@pytest.mark.parametrize("drift", [0.0, 0.1, -0.5])
def test_with_one_size_it_is_the_estimator_of_one_axis(drift):
    runs = simulated(World({"width": drift}), grid=range(-3, 4))
    one = measure_transfer(runs, resamples=300)
    arm = one.arms["runs"]
    surface = fit_surface(runs, ["width"], resamples=300)
    np.testing.assert_allclose(surface["width"].drift.draws, arm.drift.draws, atol=1e-12)
    assert surface.verdict is arm.verdict is (Verdict.FAIL if drift == -0.5 else Verdict.PASS)
    there, here = loss_forecast(arm, 1024), surface.predict({"width": 1024})
    assert here.log2_value.value == pytest.approx(there.log2_value.value, abs=1e-9)
    assert here.log2_value.interval() == pytest.approx(there.log2_value.interval(), abs=0.1)
    assert here.loss.value == pytest.approx(there.loss.value, abs=0.05)


def test_runs_without_any_optimum_are_refused_in_one_line():
    runs = simulated(World({"width": 0.0, "tokens": 0.0}, sigma=0.001), grid=range(2, 5))
    with pytest.raises(TransferError, match="no runs have a best value.*minimum at the left edge") as fault:
        fit_surface(runs, ["width", "tokens"], resamples=20)
    assert "\n" not in str(fault.value)


# ---- the plane and the law beside slow references -------------------------------------------------------------------


def test_the_plane_is_that_of_plain_least_squares():
    """Each row of resampled optima by itself, with priors as further observations."""
    prior = Prior(-0.3, 0.05)
    known = Known(priors={"tokens": prior})
    surface = fit_surface(
        simulated(World({"width": 0.1, "tokens": -0.2})), ["width", "tokens"], known=known, resamples=50
    )
    fits, (wide, _) = surface.optima.fits, optima(surface.optima.fits)
    root = np.sqrt([fit.weight for fit in fits])
    design_matrix = np.column_stack([np.ones(len(fits)), surface.optima.doublings]) * root[:, None]
    rows = np.vstack([design_matrix, [0, 0, 1 / prior.sd]])
    for row in (0, 7, 50):
        mean = prior.mean if row == 0 else surface.plane.of_priors[1, row] / surface.plane.of_priors[1, 0] * prior.mean
        expected = np.linalg.lstsq(rows, np.append(wide[:, row] * root, mean / prior.sd), rcond=None)[0]
        found = surface.plane.slopes @ wide[:, row] + surface.plane.of_priors[:, row]
        np.testing.assert_allclose(found, expected[1:], rtol=1e-9)


def posterior(doublings, losses, error, prior, steps, rng):
    """Draws of the law's numbers by walkers that step along each other's differences (ter Braak 2006): slow, and right
    whatever the shape of what is probable."""
    count, scale = doublings.shape[1], np.abs(losses).max()

    def log_density(values):
        exponents, coupling = values[:, 1 + count : 1 + 2 * count], values[:, -1] * scale
        allowed = (coupling >= 1e-3) & (coupling <= 1.6) & (np.abs(exponents - 0.75) <= 1.25).all(axis=1)
        squares = (((law_at(values, doublings) - losses) / error) ** 2).sum(axis=1)
        squares += (((exponents - prior.mean) / prior.sd) ** 2).sum(axis=1)
        squares += ((coupling - COUPLING.mean) / COUPLING.sd) ** 2
        return np.where(allowed, -0.5 * squares, -np.inf)

    middle = np.array([losses[0], *[0.1] * count, *[prior.mean] * count, COUPLING.mean / scale])
    spread = np.array([0.003, *[0.02] * count, *[0.1] * count, 0.1 / scale])
    walkers = middle + spread * rng.standard_normal((60, len(middle)))
    density, kept = log_density(walkers), []
    for step in range(steps):
        one, other = rng.permutation(60), rng.permutation(60)
        stride = 2.38 / math.sqrt(2 * len(middle)) if step % 10 else 1.0
        trial = walkers + stride * (walkers[one] - walkers[other]) + 1e-5 * rng.standard_normal(walkers.shape)
        found = log_density(trial)
        better = np.log(rng.uniform(size=60)) < found - density
        walkers, density = np.where(better[:, None], trial, walkers), np.where(better, found, density)
        kept.append(walkers)
    return np.concatenate(kept[steps // 4 :])


@pytest.mark.slow
def test_the_law_spreads_as_a_random_walk_over_all_laws_does(monkeypatch):
    monkeypatch.setattr(law_module, "USUAL_MISFIT", 0.0)  # the walk knows the law's form
    rng, world = np.random.default_rng(3), World({"width": 0.0, "tokens": 0.0})
    places = [{"width": i, "tokens": j} for i in range(3) for j in range(2)]
    doublings = np.array([[at["width"], at["tokens"]] for at in places], float)
    error = np.full(6, 0.003)
    losses = np.array([world.loss(at) for at in places])  # on the law, so that it has no misfit
    target = np.array([[4.0, 3.0]])
    law = fit_law(doublings, losses, error, math.inf, [ANY_EXPONENT] * 2, 1000, rng)
    slow = posterior(doublings, losses, error, ANY_EXPONENT, 2000, rng)
    for fast, walked in [(law.at(target)[1:, 0], law_at(slow, target)[:, 0]), (law.exponents[1:, 0], slow[:, 3])]:
        (low, middle, high), there = np.quantile(fast, [0.05, 0.5, 0.95]), np.quantile(walked, [0.05, 0.5, 0.95])
        assert np.abs([low, middle, high] - there).max() < 0.2 * (there[2] - there[0])


def test_the_law_adds_or_multiplies_as_its_coupling_says():
    doublings = np.array([[0.0, 0.0], [3.0, 0.0], [0.0, 3.0], [3.0, 3.0]])
    for coupling, both in [(1e-9, 2.8 + (2.4 - 2.8) * 2), (1 / 1.8, 1.0 + 1.4**2 / 1.8)]:
        values = np.array([[2.8, 0.4, 0.4, 0.5, 0.5, coupling]])
        base, one, other, together = law_at(values, doublings)[0]
        values[:, 1:3] *= 0.4 / (base - one) if coupling < 1e-3 else 1.0
        found = law_at(values, doublings)[0]
        if coupling < 1e-3:
            assert found[1] == pytest.approx(2.4) and found[3] == pytest.approx(both, abs=1e-5)
        else:
            assert (found[3] - 1.0) * (found[0] - 1.0) == pytest.approx((found[1] - 1.0) * (found[2] - 1.0))
    assert one == other and together < one < base


# ---- coverage and power ---------------------------------------------------------------------------------------------


def judged(names, repeats, sigma=0.005, **options):
    """Shares of planted exponents, rates and losses inside their intervals; of right rules that pass, of wrong ones that fail."""
    shares = {"drift": [], "value": [], "loss": [], "right": [], "wrong": []}
    for repeat in range(repeats):
        rng = np.random.default_rng([repeat, len(names)])
        world = World.drawn(names, rng, sigma=sigma, offset=2 * sigma)
        runs = list(world.runs(design(names), rng, **options))
        wrong = {name: drift + rng.choice([-0.5, 0.5]) for name, drift in world.drifts.items()}
        surface = fit_surface(runs, names, known=Known(world.drifts), resamples=200, seed=repeat)
        mistaken = fit_surface(runs, names, known=Known(wrong), resamples=200, seed=repeat)
        for name in names:
            low, high = surface[name].drift.interval()
            shares["drift"].append(low <= world.drifts[name] <= high)
            shares["right"].append(surface[name].verdict is Verdict.PASS)
            shares["wrong"].append(mistaken[name].verdict is Verdict.FAIL)
        forecast, far = (
            mistaken.predict(sizes_at({name: FAR[name] for name in names})),
            {name: FAR[name] for name in names},
        )
        (low, high), best = forecast.log2_value.interval(), world.best(far)
        shares["value"].append(low <= best <= high)
        run = world.loss(far) + math.hypot(world.sigma, world.offset) * rng.standard_normal()
        low, high = forecast.loss.interval()
        shares["loss"].append(low <= run <= high)
    return {name: float(np.mean(hits)) for name, hits in shares.items()}


@pytest.mark.slow
def test_planted_exponents_are_covered_and_rules_judged():
    """Few repeats: benchmarks/surface_coverage.py makes many."""
    found = judged(("width", "tokens"), 12)
    assert found["drift"] >= 0.75 and found["value"] >= 0.7 and found["loss"] >= 0.7
    assert found["right"] >= 0.9 and found["wrong"] >= 0.95


@pytest.mark.slow
def test_ninety_percent_intervals_hold_over_four_axes():
    found = judged(ALL, 40)
    assert 0.84 <= found["drift"] <= 0.97 and 0.8 <= found["value"] <= 0.99 and 0.8 <= found["loss"] <= 0.99
    assert found["right"] >= 0.9 and found["wrong"] >= 0.95


def test_intervals_grow_with_the_distance_and_say_how_far():
    surface = fit_surface(simulated(World({"width": 0.0, "tokens": -0.3})), ["width", "tokens"], resamples=300)
    widths = []
    for j in (1, 3, 5):
        forecast = surface.predict(sizes_at({"width": j, "tokens": j}))
        (low, high), (small, large) = forecast.loss.interval(), forecast.log2_value.interval()
        widths.append((high - low, large - small))
        assert list(forecast.outside.values()) == [max(j - 2, 0)] * 2
    assert widths[0] < widths[1] < widths[2] and widths[2][0] > 2 * widths[0][0] and widths[2][1] > 2 * widths[0][1]
    assert "width by 3 above, tokens by 3 above" in forecast.distance and "follows the measured drift on tokens" in str(
        forecast
    )
    below = surface.predict({"width": 32, "tokens": BASE["tokens"]})
    assert below.outside == {"width": -1.0, "tokens": 0.0} and "width by 1 below" in below.distance
    assert surface.predict(sizes_at({"width": 0, "tokens": 2})).distance.startswith("inside")


@pytest.mark.slow
def test_priors_sharpen_what_few_runs_leave_open():
    runs = simulated(World({"width": 0.0, "tokens": -0.3}, sigma=0.02))
    names = ["width", "tokens"]
    alone = fit_surface(runs, names, resamples=300)
    known = Known(priors={"tokens": Prior(-0.3, 0.02)}, loss_priors={name: Prior(0.5, 0.05) for name in names})
    told = fit_surface(runs, names, known=known, resamples=300)

    def width(estimate):
        low, high = estimate.interval()
        return high - low

    assert width(told["tokens"].drift) < 0.7 * width(alone["tokens"].drift)
    assert told["tokens"].drift.value == pytest.approx(-0.3, abs=0.03)
    far = sizes_at({"width": 4, "tokens": 4})
    assert width(told.predict(far).loss) < 0.7 * width(alone.predict(far).loss)
    assert width(told["width"].loss_exponent) < 0.2 and width(alone["width"].loss_exponent) > 0.5


@pytest.mark.slow
def test_scatter_beyond_noise_widens_the_intervals():
    """Optima that no plane fits, by much more than their noise and less than what blocks a verdict."""
    names = ("width", "tokens")
    runs = simulated(World(dict.fromkeys(names, 0.0), sigma=0.001, offset=0.0))
    places = sorted({tuple(run.sizes.items()) for run in runs})
    bumps = dict(zip(places, 0.2 * np.random.default_rng(5).standard_normal(len(places)), strict=True))
    bumpy = [
        dataclasses.replace(run, loss=run.loss + 0.05 * bumps[tuple(run.sizes.items())] * math.log2(run.value))
        for run in runs
    ]
    (low, high), (small, large) = (
        fit_surface(some, names, resamples=300)["width"].drift.interval() for some in (runs, bumpy)
    )
    assert large - small > 3 * (high - low)


def test_a_place_off_the_plane_is_named_and_blocks_the_verdict():
    runs = simulated(World({"width": 0.0, "tokens": 0.0}, sigma=0.001))
    moved = [
        dataclasses.replace(run, value=run.value * 2) if run.sizes == sizes_at({"width": 1, "tokens": 1}) else run
        for run in runs
    ]
    surface = fit_surface(moved, ["width", "tokens"], resamples=100)
    assert surface.verdict is Verdict.INCONCLUSIVE
    assert any("width 128, tokens 131072: optimum +0" in text and "off the plane" in text for text in surface.reasons)


@pytest.mark.slow
def test_unknown_noise_decides_nothing():
    surface = fit_surface(simulated(World({"width": 0.0, "tokens": 0.0}), seeds=1), ["width", "tokens"])
    assert surface.verdict is Verdict.INCONCLUSIVE and "the noise is unknown" in surface.reasons[0]
    assert len(surface.predict(sizes_at({"width": 3, "tokens": 3})).loss.draws) == 1
    known = fit_surface(simulated(World({"width": 0.0, "tokens": 0.0}), seeds=1), ["width", "tokens"], sigma=0.005)
    assert known.verdict is Verdict.PASS


# ---- what is refused ------------------------------------------------------------------------------------------------


def fails(runs, names, part, **options):
    with pytest.raises(TransferError) as error:
        fit_surface(runs, names, resamples=50, **options)
    assert part in str(error.value) and "\n" not in str(error.value), error.value


def test_runs_that_cannot_tell_the_sizes_apart_say_what_to_add():
    rng, world = np.random.default_rng(0), World({"width": 0.0, "tokens": 0.0})
    together = list(world.runs([{"width": j, "tokens": j} for j in range(3)], rng))
    fails(together, ["width", "tokens"], "width goes together with tokens in these runs")
    fails(together, ["width", "tokens"], "add runs with width 256, tokens 65536")
    one = list(world.runs([{"width": j} for j in range(3)], rng))
    fails(
        one,
        ["width", "tokens"],
        "tokens has one value in these runs (65536): add runs with another tokens, such as 131072",
    )
    fails(one, ["width", "n_layer"], "a run without a size n_layer; it has width, tokens")
    fails(one, ["width"], "prior of depth: no such size here", known=Known(priors={"depth": Prior(0, 1)}))
    fails(one, ["width"], "base tokens=1: no such size", base={"tokens": 1})
    fails(one + one, ["width"], "two runs of width 64")
    fails([], ["width"], "no runs")
    fails(one, [], "no sizes")
    fails([*one, dataclasses.replace(one[0], arm="sp")], ["width"], "a surface of 2 arms")
    edge = [
        run for run in simulated(World({"width": 0.0, "tokens": 0.0})) if run.value <= 1 or run.sizes["width"] == 64
    ]
    fails(edge, ["width", "tokens"], "minimum at the right edge of the grid")


def test_a_forecast_needs_every_size_once():
    surface = fit_surface(simulated(World({"width": 0.0, "tokens": 0.0})), ["width", "tokens"], resamples=50)
    for sizes, part in [
        ({"width": 512}, "needs width, tokens"),
        ({"width": 512, "tokens": 0}, "forecast of tokens 0"),
        ({"width": 512, "tokens": 2**17, "depth": 3}, "look at depth"),
    ]:
        with pytest.raises(TransferError, match=part):
            surface.predict(sizes)
