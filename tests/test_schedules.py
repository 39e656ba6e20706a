"""Record 26's schedules: the very steps at which its window widens, its learning rates and its momentum."""

from __future__ import annotations

import math
from fractions import Fraction
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from speedrun_mup.training.schedules import lr_factor, muon_momentum, window_blocks

STEPS = 1750  # of record 26


def record_window(step: int) -> int:
    return window_blocks(step / STEPS, final_tokens=1728, block_size=128)


def test_the_window_widens_at_the_steps_of_the_record():
    windows = [record_window(step) for step in range(STEPS + 1)]
    first = [windows.index(blocks) for blocks in range(1, 14)]
    assert first == [0, 130, 260, 389, 519, 649, 778, 908, 1038, 1167, 1297, 1426, 1556]
    assert windows.index(14) == 1686
    assert windows == sorted(windows) and set(windows) == set(range(1, 15))
    assert windows[-1] == 14  # 1792 tokens, although the record says 1728


@given(st.integers(1, 5000), st.integers(1, 40), st.integers(1, 40), st.data())
def test_the_window_is_final_tokens_times_progress_rounded_up(steps, block_size, blocks, data):
    step = data.draw(st.integers(0, steps))
    exact = Fraction(blocks * step, steps)
    got = window_blocks(step / steps, blocks * block_size, block_size)
    # Where the product is a whole number of blocks, rounding may take it over: the window then widens one step early.
    assert got in {max(1, math.ceil(exact)), max(1, math.ceil(exact * (1 + Fraction(1, 2**50))))}


@pytest.mark.parametrize(
    ("step", "factor"), [(0, 1.0), (962, 1.0), (1137.5, 0.8), (1356.25, 0.55), (1531.25, 0.35), (1750, 0.1)]
)
def test_lr_factor_of_the_record(step, factor):
    """No warmup, constant to 55 % of the steps (962.5), then linear down to a tenth."""
    assert lr_factor(step / STEPS, cooldown=0.45, floor=0.1) == pytest.approx(factor, rel=1e-12)


def test_lr_factor_is_constant_then_a_straight_line():
    factors = [lr_factor(step / STEPS, 0.45, 0.1) for step in range(STEPS + 1)]
    assert set(factors[:963]) == {1.0}
    slopes = {round(a - b, 9) for a, b in pairwise(factors[963:])}
    assert slopes == {round(0.9 / (0.45 * STEPS), 9)}
    assert factors[963] == pytest.approx(1 - 0.5 * 0.9 / (0.45 * STEPS)) and factors[-1] == pytest.approx(0.1)


@pytest.mark.parametrize("floor", [0.0, 0.1, 1.0])
def test_lr_factor_without_cooldown_is_one_up_to_the_last_step(floor):
    assert lr_factor(0.999, 0.0, floor) == 1.0
    assert lr_factor(1.0, 0.0, floor) == floor  # the floor, at progress 1, where no step is taken


def test_lr_factor_may_cool_down_all_the_way():
    assert [lr_factor(p, 1.0, 0.0) for p in (0.0, 0.25, 1.0)] == [1.0, 0.75, 0.0]


def test_momentum_warms_up_over_300_steps_and_stays():
    values = [muon_momentum(step, 300, 0.85, 0.95) for step in (0, 30, 150, 299, 300, 301, 10**6)]
    assert values[:4] == pytest.approx([0.85, 0.86, 0.9, 0.85 + 0.1 * 299 / 300], rel=1e-12)
    assert values[4:] == [0.95] * 3


def test_momentum_without_warmup_is_final_at_once():
    assert muon_momentum(0, 0, 0.85, 0.95) == 0.95
