"""Record 26's schedules: the very steps at which its window widens, its learning rates and its momentum."""

from __future__ import annotations

import math
from fractions import Fraction
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from speedrun_mup.cli import main
from speedrun_mup.config import TrainConfig, make_config
from speedrun_mup.core.errors import ConfigError
from speedrun_mup.training.schedules import Schedule, Stage, lr_factor, muon_momentum, window_blocks

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


@pytest.mark.slow
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


# --- one object for all of it ---

STAGES = st.lists(
    st.tuples(st.integers(1, 5), st.integers(1, 6), st.sampled_from([1.0, 1.5, 2.0])), min_size=1, max_size=4
)


def scheduled(stages, iterations: int, **changes) -> Schedule:
    settings = {
        "micro_batch_tokens": 128,
        "block_size": 32,
        "window_tokens": 96,
        "cooldown": 0.45,
        "final_lr_frac": 0.1,
        "momentum": (0.95, 0.85, 300),
    }
    return Schedule(tuple(stages), iterations, **settings | changes)


@pytest.mark.slow
@given(STAGES, st.integers(20, 60))
def test_what_comes_before_a_step_is_the_sum_over_the_steps(parts, iterations):
    whole = sum(part for part, _, _ in parts)
    schedule = scheduled([Stage(Fraction(part, whole), n, lr) for part, n, lr in parts], iterations)
    batches = [schedule.at(step).micro_batches for step in range(iterations + 5)]
    for step in range(iterations + 5):  # what is read ahead lies beyond the end
        assert schedule.micro_batches_before(step) == sum(batches[:step])
        assert schedule.tokens_before(step) == sum(schedule.at(each).tokens for each in range(step))
    assert schedule.tokens == schedule.tokens_before(iterations)
    assert all(n % schedule.group == 0 for n in batches) and batches[schedule.largest_step] == max(batches)


@pytest.mark.parametrize(
    ("windows", "training", "validation"),
    [([8, 2], 5, 5), ([2, 8], 11, 12), ([3, 3], 11, 12), ([None, 1], 5, 5), ([1, None], 11, 12), ([None], 11, 12)],
)
def test_the_widest_step_is_the_last_with_the_longest_window(windows, training, validation):
    stages = [Stage(Fraction(1, len(windows)), 1, window=window) for window in windows]
    schedule = scheduled(stages, 12)
    for last, expected in ((11, training), (12, validation)):
        assert schedule.widest_step(last) == expected
        assert schedule.at(expected).window == max(schedule.at(step).window for step in range(last + 1))


def test_the_default_is_record_26_bit_for_bit():
    cfg = TrainConfig()
    schedule = cfg.schedule
    for step in range(STEPS + 1):
        now = schedule.at(step)
        assert now.lr_factor == lr_factor(step / STEPS, 0.45, 0.1)
        assert now.momentum == muon_momentum(step, 300, 0.85, 0.95)
        assert now.window == record_window(step)
        assert (now.micro_batches, now.sequence_tokens, now.loss_weights) == (8, 49_152, (1.0,))
    assert schedule.tokens == 1750 * 393_216 and schedule.widest_window == 14 and schedule.is_constant


# step, learning rate, batch of a later record, which has the stages of record 46 with other factors on the learning rate
LATER_RECORD = [
    *((0, 1.0, 131_072), (422, 1.0, 131_072), (423, 1.52, 262_144), (507, 1.52, 262_144), (508, 1.52, 262_144)),
    *((509, 1.51820209974, 262_144), (700, 1.17480314961, 262_144), (846, 0.912309711286, 262_144)),
    *((847, 1.02708661417, 393_216), (848, 1.02501312336, 393_216), (1000, 0.709842519685, 393_216)),
    *((1234, 0.224645669291, 393_216), (1235, 0.222572178478, 393_216)),
]


def test_batch_and_learning_rate_of_a_record_with_stages():
    stages = [Stage(Fraction(1, 3), 8 * n, lr) for n, lr in ((1, 1.0), (2, 1.52), (3, 1.73))]
    schedule = scheduled(stages, 1270, micro_batch_tokens=16_384, block_size=128, cooldown=0.6, final_lr_frac=0.15)
    for step, lr, batch in LATER_RECORD:
        assert schedule.at(step).lr_factor == pytest.approx(lr, rel=1e-11), step
        assert schedule.at(step).tokens == batch, step
    assert schedule.tokens == 338_821_120 - 15 * 393_216  # its total, without the 15 steps that it adds at the end


def test_record_46_with_the_settings_that_make_it():
    changes = {"batch_schedule": "record46", "micro_batch_tokens": 16_384}
    schedule = make_config("record26", changes | {"iterations": 1500}).schedule
    assert [schedule.at(step).tokens for step in (0, 499, 500, 999, 1000, 1500)] == [
        *(131_072, 131_072, 262_144, 262_144, 393_216, 393_216)
    ]
    assert schedule.describe() == (
        "1500 steps, 393,216,000 tokens: 131,072 from step 0, 262,144 from step 500, 393,216 from step 1000"
    )
    same = make_config("record26", changes | {"iterations": 1500, "batch_schedule": "1/3:1, 1/3:2:1.51, 1/3:3:1.93"})
    assert same.schedule == schedule


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("record99", "is neither constant, record46 nor stages such as 1/3:1"),
        ("1/2:1,", "is neither constant"),
        ("1/2:1,1/2:-1", "is neither constant"),
        ("1/0:1,1:1", "is neither constant"),
        ("1/3:1,1/3:2", "the fractions of its stages, 1/3 [+] 1/3, do not add up to 1"),
        ("1/2:1,1/2:1.3", "13/10 times micro_batches=4 is no whole number; give more, smaller --micro-batches"),
        ("1/2:0,1/2:1", "stage 1 of 2 has 0 micro-batches in a step; take 1 to 2"),
        ("1/2:1:0,1/2:1", "the factors of stage 1 of 2 are not positive and finite"),
        ("1/100:1,99/100:2", "stage 1 of 2 has no step in iterations=6; train longer or with fewer stages"),
        ("9" * 5000, "is neither constant"),
    ],
)
def test_a_schedule_that_no_run_can_have_is_one_line(text, said, tiny, capsys):
    with pytest.raises(ConfigError, match=said) as caught:
        tiny(batch_schedule=text)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400
    assert main(["train", "--micro-batches", "4", "--iterations", "6", "--batch-schedule", text]) == 2
    told = capsys.readouterr()
    assert told.err.count("\n") == 1 and "batch_schedule" in told.err and "Traceback" not in told.err


@pytest.mark.parametrize(
    ("stage", "said"),
    [
        (Stage(Fraction(1), 1, sequence_tokens=48), "sequences of 48 tokens; they must divide micro_batch_tokens=128"),
        (Stage(Fraction(1), 1, sequence_tokens=16), "be multiples of block_size=32"),
        (Stage(Fraction(1), 1, loss_weights=(1.0, 0.5)), "weighs 2 tokens ahead; the model predicts 1"),
        (Stage(Fraction(1), 1, loss_weights=()), "weighs 0 tokens ahead"),
        (Stage(Fraction(1), 1, loss_weights=(0.0,)), "not positive"),
    ],
)
def test_a_stage_that_no_run_can_have_is_one_line(stage, said):
    with pytest.raises(ConfigError, match=said):
        scheduled([stage], 6)


def test_longer_runs_agree_while_they_are_in_the_same_stage():
    thirds = [Stage(Fraction(1, 3), n) for n in (1, 2, 3)]
    short, long = scheduled(thirds, 30), scheduled(thirds, 60)
    assert [long.agrees(short, step) for step in (0, 10, 11, 20, 30)] == [True, True, False, False, False]
    assert all(
        scheduled([Stage(Fraction(1), 2)], n).agrees(scheduled([Stage(Fraction(1), 2)], 30), 30) for n in (40, 60)
    )


@pytest.mark.parametrize(
    ("numbers", "said"),
    [
        ({"window": 0}, "a stage's window=0 must be a whole number, at least 1$"),
        ({"micro_batches": 8 / 2}, "a stage's micro_batches=4.0 must be a whole number, at least 1; divide with //"),
        ({"micro_batches": None}, "micro_batches=None"),
        ({"sequence_tokens": -64}, "sequence_tokens=-64"),
    ],
)
def test_a_stage_is_checked_where_it_is_made(numbers, said):
    with pytest.raises(ConfigError, match=said):
        Stage(**{"fraction": Fraction(1), "micro_batches": 1} | numbers)
