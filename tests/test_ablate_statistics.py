"""Verdicts on simulated ablations with planted gains; and the distributions and intervals that they rest on."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from speedrun_mup.ablate.statistics import (
    Estimated,
    Finding,
    Verdict,
    at_best_rates,
    best_rates,
    combined,
    fisher_tail,
    gain_of,
    holm,
    judge,
    noise_of,
    steps_to,
    student_quantile,
    student_tail,
)

WIDTHS, SEEDS, NOISE = (64, 128, 256), 3, 0.003
PLANTED = {  # gains at the three widths, in nats
    "grows": (0.005, 0.02, 0.035),
    "holds": (0.025, 0.025, 0.025),
    "fades": (0.03, 0.0175, 0.005),
    "gone": (0.04, 0.02, 0.0),
    "hurts": (-0.02, -0.02, -0.02),
    "turns": (0.02, 0.0, -0.02),
}
NAMED = {"gone": "fades", "turns": "hurts"}


def simulated(rng: np.random.Generator, gains: list[tuple[float, ...]]) -> list[Finding]:
    """An ablation: a baseline and an arm for each of `gains`, three rates, common seeds, independent noise of each run.

    Every arm has a best rate of its own, up to half a step off the grid.
    """
    arms = [(0.0,) * len(WIDTHS), *gains]
    wide = 2.0 - 0.2 * np.arange(len(WIDTHS))[None, :, None, None]
    rates = np.arange(-1.0, 2.0)[None, None, :, None] - rng.uniform(-0.5, 0.5, (len(arms), 1, 1, 1))
    seeds = 0.02 * rng.standard_normal((1, len(WIDTHS), 1, SEEDS))
    losses = wide + 0.05 * (rates**2 - (rates**2).min(axis=2, keepdims=True)) + seeds
    losses = losses - np.array(arms)[:, :, None, None]
    losses = at_best_rates(losses + NOISE * rng.standard_normal(losses.shape))
    noise = [noise_of(losses[:, w]) for w in range(len(WIDTHS))]
    estimates = [[gain_of(arm[w], losses[0, w], noise[w]) for w in range(len(WIDTHS))] for arm in losses[1:]]
    return judge([str(i) for i in range(len(gains))], estimates, WIDTHS)


@pytest.mark.slow
def test_planted_gains_get_their_verdicts():
    """Next to six techniques without effect; every kind right in 90 % at least."""
    rng, right = np.random.default_rng(0), dict.fromkeys(PLANTED, 0)
    for _ in range(60):
        found = simulated(rng, [*PLANTED.values(), *[(0.0,) * 3] * 6])
        for name, finding in zip(PLANTED, found):
            right[name] += finding.verdict.value.lower() == NAMED.get(name, name)
    assert {name for name, count in right.items() if count < 54} == set(), right


def alarms(runs: int) -> float:
    """The share of ablations of twelve techniques without effect in which any has a verdict."""
    rng = np.random.default_rng(1)
    none = [(0.0,) * 3] * 12
    return sum(any(f.verdict is not Verdict.INCONCLUSIVE for f in simulated(rng, none)) for _ in range(runs)) / runs


@pytest.mark.slow
def test_placebos_alarm_in_one_of_twenty_ablations_at_most():
    """All twelve together. 120 ablations: a true rate of 5 % is above 10 % here in one of a hundred draws."""
    assert alarms(120) <= 0.1


@pytest.mark.slow
def test_placebos_alarm_in_one_of_twenty_ablations_at_most_exactly():
    assert alarms(800) <= 0.05


@pytest.mark.slow
def test_without_holm_they_would(monkeypatch):
    monkeypatch.setattr("speedrun_mup.ablate.statistics.holm", list)
    assert alarms(60) > 0.1


@pytest.mark.slow
def test_intervals_for_all_together_cover():
    rng, missed = np.random.default_rng(2), 0
    for _ in range(40):
        found = simulated(rng, list(PLANTED.values()))
        missed += any(
            abs(gain.value - true) > reach
            for finding, truth in zip(found, PLANTED.values())
            for gain, true, reach in zip(finding.gains, truth, finding.reach)
        )
    assert missed <= 4


def test_a_noisier_arm_has_its_own_noise():
    rng = np.random.default_rng(3)
    losses = 0.001 * rng.standard_normal((8, 3))
    losses[1] = [0.2, -0.1, 0.3]
    gain = gain_of(losses[1], losses[0], noise_of(np.delete(losses, 1, axis=0)))
    assert gain.freedom == 2 and gain.variance == pytest.approx((losses[0] - losses[1]).var(ddof=1) / 3)
    assert gain_of(losses[2], losses[0], noise_of(np.delete(losses, 1, axis=0))).freedom == 6 * 2


def test_noise_is_what_is_left_after_arms_and_seeds():
    """The slow reference, entry by entry."""
    losses = np.random.default_rng(4).standard_normal((4, 3))
    arm, seed, all_ = losses.mean(1), losses.mean(0), losses.mean()
    left = sum((losses[i, j] - arm[i] - seed[j] + all_) ** 2 for i, j in itertools.product(range(4), range(3)))
    assert noise_of(losses) == pytest.approx((left / 6, 6))
    shifted = losses + np.arange(4)[:, None] * 10 + np.arange(3) * 100
    assert noise_of(shifted) == pytest.approx((left / 6, 6))


def test_each_arm_is_taken_at_its_own_best_rate_and_never_where_a_run_diverged():
    losses = np.array([[[[3.0, 3.0], [2.0, 2.2], [1.0, math.nan]]], [[[1.0, 1.1], [2.0, 2.0], [3.0, 3.0]]]])
    assert best_rates(losses).tolist() == [[1], [0]]
    assert at_best_rates(losses).tolist() == [[[2.0, 2.2]], [[1.0, 1.1]]]
    gone = np.full_like(losses, math.nan)
    assert best_rates(gone).tolist() == [[-1], [-1]] and np.isnan(at_best_rates(gone)).all()
    (found,) = judge(["x"], [[Estimated(math.nan, math.nan, 0.0)] * 2], (64, 128))
    assert found.verdict is Verdict.INCONCLUSIVE and found.p == 1


def test_one_width_says_nothing_of_trends():
    assert judge(["x"], [[Estimated(1.0, 1e-4, 10.0)]], (64,))[0].verdict is Verdict.INCONCLUSIVE
    assert judge(["x"], [[Estimated(-1.0, 1e-4, 10.0)]], (64,))[0].verdict is Verdict.HURTS


@pytest.mark.parametrize(
    "t, freedom, tail", [(12.706, 1, 0.025), (4.303, 2, 0.025), (2.228, 10, 0.025), (1.645, math.inf, 0.05)]
)
def test_student_s_distribution_is_that_of_tables(t, freedom, tail):
    assert student_tail(t, freedom) == pytest.approx(tail, rel=2e-3)
    assert student_quantile(1 - tail, freedom) == pytest.approx(t, rel=2e-3)


def test_fisher_s_distribution_is_that_of_tables():
    assert fisher_tail(4.103, 2, 10) == pytest.approx(0.05, rel=1e-3)
    assert fisher_tail(7.559, 2, 10) == pytest.approx(0.01, rel=1e-3)
    for t in (0.5, 2.0):
        assert fisher_tail(t**2, 1, 7) == pytest.approx(2 * student_tail(t, 7))


def test_holm_s_method():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.6, 0.7]) == [1.0, 1.0] and holm([]) == []


def test_a_sum_of_estimates():
    one = Estimated(1.0, 0.04, 4.0)
    both = combined([one, one], np.array([0.5, 0.5]))
    assert both == pytest.approx((1.0, 0.02, 8.0))
    assert one.reach(0.05) == pytest.approx(2.776 * 0.2, rel=1e-3) and one.p == pytest.approx(2 * student_tail(5.0, 4))


def test_steps_to_a_loss():
    assert steps_to([5, 4, 3, 2, 1], 2.5, over=2) == 4 and steps_to([5, 4, 3, 2, 1], 3.0, over=2) == 3.5
    assert steps_to([1, 1], 2.0, over=1) == 1
    assert math.isnan(steps_to([5, 4], 1.0, over=2)) and math.isnan(steps_to([1.0], 2.0, over=2))
