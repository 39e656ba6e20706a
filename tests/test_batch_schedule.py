"""Runs whose batch changes from stage to stage: data, tokens, gradients, resuming, cost. And a schedule from outside."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import signal
from contextlib import closing
from fractions import Fraction
from functools import partial
from itertools import chain, pairwise
from pathlib import Path

import pytest
import torch
from faults.test_matrix import assert_same_run, folder_of
from helpers.dist import run_ranks
from test_checkpoint import reseal, sha256
from test_training import assert_same_training, curve, poison

from speedrun_mup.core.errors import ConfigError, OutOfMemory
from speedrun_mup.core.utils import World
from speedrun_mup.data.batches import batches_of
from speedrun_mup.data.corpus import find_corpus
from speedrun_mup.training import schedules, train
from speedrun_mup.training.checkpoint import STATE, CheckpointError
from speedrun_mup.training.flops import attention_flops, flops_per_token, run_flops, weight_flops
from speedrun_mup.training.model_config import Vocabulary, model_config
from speedrun_mup.training.run import Run
from speedrun_mup.training.schedules import Stage
from speedrun_mup.training.tracking import read_metrics

# Of 9 steps with 2 micro-batches: 2 in steps 0 to 2, 4 in 3 to 5, 6 in 6 to 8.
THIRDS = {"iterations": 9, "micro_batches": 2, "batch_schedule": "1/3:1,1/3:2:1.5,1/3:3:2", "cooldown": 0.0}
BATCHES = [2, 2, 2, 4, 4, 4, 6, 6, 6]


def leave_at(last: int, step: int, model, batches) -> None:
    if step == last:
        os.kill(os.getpid(), signal.SIGTERM)


def mid_stage(tiny, at: int, **changes):
    """A run of THIRDS, and the config of the same run that was stopped at step `at`, one before, and can be resumed."""
    whole, cut = (tiny(name=name, **THIRDS | changes) for name in ("whole", "cut"))
    assert train(whole).finished and not train(cut, partial(leave_at, at)).finished
    return whole, dataclasses.replace(cut, resume=str(folder_of(cut)))


@pytest.mark.slow
@pytest.mark.parametrize("order", ["shuffled", "record"])
def test_every_micro_batch_is_used_once_and_in_order(tiny, order):
    cfg, used = tiny(name="a", data_order=order, **THIRDS), []
    result = train(cfg, lambda step, model, batches: used.append([inputs.tolist() for inputs, _ in batches]))
    assert [len(batches) for batches in used] == BATCHES
    data = batches_of(cfg, find_corpus(cfg.data, cfg.tokenizer)[0])
    assert list(chain.from_iterable(used)) == [data.micro_batch(index)[0].tolist() for index in range(sum(BATCHES))]
    assert result.tokens == sum(BATCHES) * 128


@pytest.mark.slow
def test_metrics_count_the_tokens_and_the_learning_rate_of_each_stage(tiny):
    records = [
        row for row in read_metrics(train(tiny(name="a", lr_scale=1e-9, **THIRDS)).folder) if row["kind"] == "train"
    ]
    assert [row["tokens"] for row in records] == [128 * sum(BATCHES[: step + 1]) for step in range(9)]
    assert [row["lr"] for row in records] == pytest.approx([0.05e-9] * 3 + [0.075e-9] * 3 + [0.1e-9] * 3)
    assert [row["loss"] for row in records] == pytest.approx([math.log(128)] * 9)  # per token, whatever the batch
    for before, row in pairwise(records[1:]):
        first = records[0]
        rate = (row["tokens"] - first["tokens"]) / (row["train_s"] - first["train_s"])
        assert row["tokens_per_s"] == pytest.approx(rate) and row["tokens"] > before["tokens"]


@pytest.mark.slow
@pytest.mark.parametrize("strict", [False, True])
def test_the_gradient_is_the_mean_over_the_micro_batches_of_its_step(tiny, strict):
    with closing(Run(tiny(name="a", deterministic=strict, **THIRDS), World())) as run:
        batches = next(run.passes.batches.stream(7, 0, 1))
        assert len(batches) == 6
        run.passes.accumulate_gradients(batches, 7)
        accumulated = run.model.lm_head.weight.grad.clone()
        run.model.zero_grad()
        for inputs, targets in batches:
            run.model(inputs, targets, run.passes.window(7)).backward()
    torch.testing.assert_close(accumulated, run.model.lm_head.weight.grad / 6)


@pytest.mark.slow
@pytest.mark.parametrize("at", [3, 4, 7])
def test_resuming_in_the_middle_of_a_stage_is_bitwise(tiny, at):
    whole, cut = mid_stage(tiny, at)
    assert train(cut).finished
    assert_same_run(whole, cut)


@pytest.mark.dist
def test_resuming_on_other_numbers_of_ranks_is_bitwise(tiny):
    """Steps of 4 and of 8 micro-batches, on 2, 4 and 1 ranks."""
    cfg = {"deterministic": True, "iterations": 8, "micro_batches": 4, "batch_schedule": "1/2:1,1/2:2:1.5"}
    whole, cut = (tiny(name=name, width=32, **cfg) for name in ("whole", "cut"))
    assert train(whole).finished
    for size, last in ((2, 2), (4, 5), (1, 9)):
        resumed = dataclasses.replace(cut, resume=str(folder_of(cut)) if size != 2 else None)
        work = partial(train, resumed, partial(leave_at, last))
        assert run_ranks(size, lambda world, work=work: work().finished) == [size == 1] * size
    assert_same_run(whole, cut)


@pytest.mark.dist
def test_ranks_that_cannot_share_the_micro_batches_of_a_stage_are_one_line(tiny):
    def work(world):
        with pytest.raises(ConfigError, match="2 micro-batches cannot be shared by 3 processes; start one of 1, 2"):
            Run(tiny(name="a", iterations=9, micro_batches=6, batch_schedule="1/3:1/3,1/3:2/3,1/3:1"), world)
        return Path(tiny().out, "a").exists()

    assert run_ranks(3, work) == [False] * 3
    with pytest.raises(ConfigError, match="6 micro-batches cannot be shared by 4 processes"):
        batches_of(tiny(micro_batches=6), find_corpus("synthetic", "byte")[0]).check_ranks(4)


def test_strict_sums_need_a_branch_of_the_tree_in_every_stage(tiny):
    cfg = tiny(deterministic=True, iterations=9, micro_batches=4, batch_schedule="1/3:1,1/3:2,1/3:3")
    with pytest.raises(ConfigError, match="6 micro-batches per process do not fit the tree"):
        run_ranks_pack(cfg)


def run_ranks_pack(cfg) -> int:
    from speedrun_mup.training.memory import micro_batches_at_once

    return micro_batches_at_once(cfg, 2, torch.device("cpu"))


@pytest.mark.parametrize(
    ("pack", "told", "needed", "less"),
    [
        (16, "2 of 2, 4 of 4, 6 of 6", "2 x 128", "--micro-batches-per-forward 1, or "),
        (4, "2 of 2, 4 of 4, 4 of 6", "2 x 128", "--micro-batches-per-forward 1, or "),
        (1, "1 of 2, 1 of 4, 1 of 6", "1 x 128", ""),
    ],
)
def test_what_a_pass_takes_is_told_for_each_stage(tiny, monkeypatch, pack, told, needed, less):
    """No pass takes more than its step has, and advice for too little memory starts from what it took."""
    with closing(Run(tiny(name="a", micro_batches_per_forward=pack, **THIRDS), World())) as run:
        assert f"; {told} micro-batches of 128 tokens a pass, " in run.passes.describe()
        batches = next(run.passes.batches.stream(0, 0, 1))
        monkeypatch.setattr(run.passes, "accumulate_gradients", out_of_memory)
        with pytest.raises(
            OutOfMemory, match=f"no memory for {needed} tokens at once .*; try {less}--micro-batch-tokens"
        ):
            run.take_step(batches, 0)


def out_of_memory(*args):
    raise MemoryError


@pytest.mark.slow
def test_rolling_back_over_the_edge_of_a_stage_leaves_out_the_data(tiny):
    """Bad data at step 4, a checkpoint at step 2: steps 2 and on train on what follows that data."""
    with closing(Run(tiny(name="back", on_nonfinite="rollback", save_every=2, **THIRDS), World())) as run:
        trained, bad = {}, run.passes.batches.micro_batch(sum(BATCHES[:4]))[0]

        def observe(step, model, batches):
            trained[step] = [inputs.tolist() for inputs, _ in batches]
            poison(step, when=lambda batches: torch.equal(batches[0][0], bad))(step, model, batches)

        assert run.train(observe).finished
        skipped = sum(BATCHES[:5]) - sum(BATCHES[:4])  # from the checkpoint at step 4 to the end of the bad step
        assert run.skipped_micro_batches == skipped
        for step in range(9):
            first = sum(BATCHES[:step]) + (0 if step < 4 else skipped)
            expected = [run.passes.batches.micro_batch(first + i)[0].tolist() for i in range(BATCHES[step])]
            assert trained[step] == expected, step


@pytest.mark.slow
def test_a_checkpoint_that_counts_skipped_data_in_steps_still_resumes(tiny):
    """As it was before there were schedules."""
    whole, cut = (tiny(name=name, iterations=8) for name in ("whole", "cut"))
    assert not train(cut, partial(leave_at, 3)).finished
    with closing(Run(dataclasses.replace(cut, resume=str(folder_of(cut))), World())) as run:
        assert run.start == 4 and run.skipped_micro_batches == 0
    folder = folder_of(cut) / "checkpoints" / "step-00000004"
    state = json.loads((folder / STATE).read_text())
    del state["skipped_micro_batches"], state["config"]["batch_schedule"]
    text = json.dumps(state | {"data_offset": 3}).encode()
    (folder / STATE).write_bytes(text)
    reseal(folder, lambda body: body["files"][STATE].update(size=len(text), sha256=sha256(text).hexdigest()))
    with closing(Run(dataclasses.replace(cut, resume=str(folder_of(cut))), World())) as run:
        assert run.start == 4 and run.skipped_micro_batches == 3 * whole.micro_batches


@pytest.mark.slow
def test_a_run_gets_longer_only_where_its_stages_stay(tiny):
    early = train(tiny(name="early", **THIRDS), partial(leave_at, 1)).folder
    assert train(tiny(name="early", resume=str(early), **THIRDS | {"iterations": 12})).finished
    late = train(tiny(name="late", **THIRDS), partial(leave_at, 4)).folder
    with pytest.raises(CheckpointError, match="iterations was 9, is 12, which moves stages that it went through"):
        train(tiny(name="late", resume=str(late), **THIRDS | {"iterations": 12}))
    with pytest.raises(CheckpointError, match=r"batch_schedule was 1/3:1,.*, is constant"):
        train(tiny(name="late", resume=str(late), **THIRDS | {"batch_schedule": "constant"}))


@pytest.mark.slow
def test_data_end_and_repeat_where_the_tokens_say_so(tiny):
    corpus = find_corpus("synthetic", "byte")[0]
    cfg = tiny(name="a", **THIRDS)
    epoch = batches_of(cfg, corpus).sequences
    long = dataclasses.replace(cfg, iterations=epoch // 4 - epoch // 4 % 3)  # 4 micro-batches a step, in the mean
    assert train(dataclasses.replace(cfg, epochs=1)).finished
    Run(dataclasses.replace(long, name="fits", epochs=1), World()).close()
    longer = dataclasses.replace(long, iterations=long.iterations + 6, name="ends", epochs=1)
    with pytest.raises(
        Exception, match=r"the data ends after 1 epoch.* of [\d,]+ groups of 2 micro-batches, but group"
    ):
        Run(longer, World())
    assert batches_of(long, corpus).epoch_of(long.iterations - 1) == 0
    assert batches_of(dataclasses.replace(longer, epochs=None), corpus).epoch_of(longer.iterations - 1) == 1


def test_flops_are_those_of_every_step_by_its_tokens(tiny):
    cfg = tiny(**THIRDS | {"iterations": 30, "micro_batch_tokens": 256})

    def keys(
        window: int,
    ) -> float:  # a query in block b sees its block's part, and whole blocks before, inside the window
        blocks = 256 // 32
        return sum(32 * min(b, max(window, 1) - 1) for b in range(blocks)) / blocks + (32 + 1) / 2

    shape, total = model_config(cfg, Vocabulary(65)), 0.0
    for step in range(30):
        window = cfg.schedule.at(step).window
        per_token = weight_flops(shape) + attention_flops(shape, keys(window), keys(window // 2))
        total += per_token * cfg.schedule.at(step).tokens
    assert run_flops(cfg, 65) == pytest.approx(total, rel=1e-12)
    constant = dataclasses.replace(cfg, batch_schedule="constant")
    assert flops_per_token(cfg, 65) > flops_per_token(constant, 65)  # more of its tokens meet wide windows


def test_a_micro_batch_is_as_many_sequences_as_its_stage_says(tiny, monkeypatch):
    """Cut in place, it is the same as its parts one by one."""
    half = [Stage(Fraction(1, 2), 2, sequence_tokens=64), Stage(Fraction(1, 2), 2)]
    monkeypatch.setitem(schedules.BATCH_SCHEDULES, "short first", lambda micro_batches: half)
    with closing(Run(tiny(name="a", batch_schedule="short first"), World())) as run:
        batch = next(run.passes.batches.stream(0, 0, 1))[0]
        inputs, targets = run.passes.sequences(batch, 0)
        assert (inputs[[0, 64]] == run.corpus.bos_token).all() and torch.equal(targets, batch[1])
        assert run.passes.sequences(batch, 5)[0] is batch[0]
        for parameter in run.model.parameters():  # the head begins at zero, and would not see what comes before
            torch.nn.init.normal_(parameter, std=0.05)
        parts = sum(run.model(inputs[s], targets[s], 2) for s in (slice(0, 64), slice(64, 128)))
        torch.testing.assert_close(run.model(inputs, targets, 2), parts)
        assert not torch.isclose(run.model(*batch, 2), parts, rtol=1e-6)


# --- a schedule from outside the package: a list of stages, under a name ---


def batch_warmup(micro_batches: int) -> list[Stage]:
    """Half the batch and a narrow window for a sixth of the steps, a lower weight of the loss, then record 26."""
    return [
        Stage(Fraction(1, 6), micro_batches // 2, lr_factor=0.5, window=1, sequence_tokens=64, loss_weights=(0.5,)),
        Stage(Fraction(5, 6), micro_batches),
    ]


@pytest.mark.slow
def test_a_schedule_can_come_from_outside(tiny, monkeypatch):
    monkeypatch.setitem(schedules.BATCH_SCHEDULES, "batch warmup", batch_warmup)
    cfg = tiny(name="a", iterations=12, batch_schedule="batch warmup")
    taken = {}
    result = train(cfg, lambda step, model, batches: taken.update({step: len(batches)}))
    assert taken == {step: 2 if step < 2 else 4 for step in range(12)} and result.tokens == 128 * (2 * 2 + 10 * 4)
    assert result.finished and result.val_loss < curve(result.folder)[0][1]
    again = train(dataclasses.replace(cfg, name="b"))
    assert_same_training(result, again)
    assert curve(train(tiny(name="c", iterations=12)).folder) != curve(result.folder)


@pytest.mark.slow
def test_the_weight_of_the_loss_scales_the_gradient(tiny, monkeypatch):
    halves = [Stage(Fraction(1, 2), 4, loss_weights=(0.5,)), Stage(Fraction(1, 2), 4)]
    monkeypatch.setitem(schedules.BATCH_SCHEDULES, "halves", lambda micro_batches: halves)
    with closing(Run(tiny(name="a", batch_schedule="halves", window_tokens=32), World())) as run:
        batches, gradients = next(run.passes.batches.stream(0, 0, 1)), []
        for step in (0, 5):
            run.passes.accumulate_gradients(batches, step)
            gradients.append(run.model.lm_head.weight.grad.clone())
            run.model.zero_grad()
    torch.testing.assert_close(2 * gradients[0], gradients[1])
