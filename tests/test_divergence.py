"""Runs that diverged, and what the metrics say of a step."""

import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from helpers.dist import run_ranks

from speedrun_mup.core.errors import Diverged, NonFiniteError
from speedrun_mup.core.utils import World
from speedrun_mup.training.checkpoint import Loaded
from speedrun_mup.training.divergence import exploded_weights, failed_to_learn
from speedrun_mup.training.run import Run, train
from speedrun_mup.training.schedules import lr_factor
from speedrun_mup.training.tracking import read_metrics


def steps(folder):
    return [record for record in read_metrics(folder) if record["kind"] == "train"]


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["stop", "skip", "rollback"])
@pytest.mark.parametrize("scale", [1e6, 1e30, 1e37])
def test_weights_that_explode_end_a_run_under_every_policy(tiny, policy, scale):
    """The softcap keeps the loss finite, so that no gradient is bad."""
    with pytest.raises(Diverged, match="the weights exploded|not finite|no checkpoint to roll back to") as fault:
        train(tiny(name="a", iterations=40, lr_scale=scale, on_nonfinite=policy, save_every=5, val_every=10, width=32))
    folder = Path(tiny().out) / "a"
    status = json.loads((folder / "status.json").read_text())
    assert "up to step" not in str(fault.value) and fault.value.exit_code == 5 and "\n" not in str(fault.value)
    assert status["status"] == "diverged" and str(fault.value) in status["why"]
    assert not list((folder / "checkpoints").glob("step-*"))  # none of these weights is worth keeping


@pytest.mark.slow
def test_a_run_that_ends_above_where_it_began_keeps_its_last_good_checkpoint(tiny):
    """Good for 15 steps, then somebody breaks the head: the loss stays finite, and far above the untrained model's."""

    def break_it(step, model, batches):
        if step >= 15:
            with torch.no_grad():
                model.lm_head.weight.normal_(generator=torch.Generator().manual_seed(step))

    run = tiny(name="a", iterations=40, save_every=5, keep_last=2, width=32)
    with pytest.raises(
        Diverged, match=r"step 40: diverged: the loss was \d+\.\d+ in the median of the last 5 steps, above"
    ):
        train(run, observe=break_it)
    folder = Path(run.out) / "a"
    kept = {path.name for path in (folder / "checkpoints").iterdir()}
    assert "step-00000015" in kept and "step-00000040" not in kept
    assert "not saved, so that the checkpoint before stays" in (folder / "log.txt").read_text()
    assert json.loads((folder / "status.json").read_text())["status"] == "diverged"


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{"lr_scale": 1e3}, {"lr_scale": 1e4, "matrix_optimizer": "adam"}])
def test_a_model_that_saturates_for_ever_diverged_though_its_loss_is_no_higher(tiny, changes):
    with pytest.raises(Diverged, match="the gradient is zero"):
        train(tiny(name="a", iterations=40, val_every=0, save=False, **changes))


@pytest.mark.slow
@pytest.mark.parametrize("iterations", [1, 2, 3, 5])
@pytest.mark.parametrize("scale", [1e-6, 1.0, 8.0])
def test_a_short_honest_run_did_not_diverge(tiny, iterations, scale):
    """At 8 times the rate the loss is above its start after the first steps, and falls far below it later."""
    assert train(tiny(iterations=iterations, lr_scale=scale, width=32, val_every=0)).finished


@pytest.mark.slow
@pytest.mark.parametrize("scale", [1e-8, 16.0, 64.0])
def test_a_run_that_learns_nothing_or_with_a_kick_did_not_diverge(tiny, scale):
    assert train(tiny(iterations=40, lr_scale=scale, val_every=0, save=False)).finished


def test_what_counts_as_a_failure_to_learn():
    began = math.log(128)
    assert failed_to_learn([9.0] * 19, began, 19) == ""  # too early to say
    assert "was 9.0000 in the median of the last 5 steps, above the 4.8520" in failed_to_learn([9.0] * 20, began, 20)
    assert failed_to_learn([3.0] * 17 + [30.0] * 2 + [3.0], began, 20) == ""  # a spike
    assert failed_to_learn([began] * 40, began, 40, grad_norm=1e-3) == ""
    assert failed_to_learn([began] * 40, began, 40, grad_norm=0.0) != ""
    assert failed_to_learn([], began, 40) == ""  # resumed at its end


def test_what_counts_as_exploded():
    weights = {"a": torch.ones(3), "b": torch.ones(2, 2)}
    assert exploded_weights(weights) == ""
    for value in (2e5, -2e5, math.inf, math.nan):
        weights["b"][1, 0] = value
        assert exploded_weights(weights).startswith("the weights exploded: b has a value of ")


@pytest.mark.slow
def test_metrics_tell_rate_and_gradient(tiny):
    cfg = tiny(name="a", iterations=8, lr_scale=0.5, cooldown=0.5)
    records = steps(train(cfg).folder)
    rates = [0.05 * 0.5 * lr_factor(step / 8, 0.5, cfg.final_lr_frac) for step in range(8)]
    assert [record["lr"] for record in records] == pytest.approx(rates) and rates[7] < rates[0]
    again, norms = Run(tiny(name="b", iterations=8, lr_scale=0.5, cooldown=0.5), World()), []
    accumulate = again.passes.accumulate_gradients

    def measured(batches, step):
        loss = accumulate(batches, step)
        norms.append(
            math.hypot(*(p.grad.double().norm().item() for p in again.model.parameters() if p.grad is not None))
        )
        return loss

    again.passes.accumulate_gradients = measured
    again.train()
    again.close()
    assert [record["grad_norm"] for record in records] == pytest.approx(norms, rel=1e-5)


@pytest.mark.dist
@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("hidden", ["muon", "adam", "normuon"])
def test_the_gradient_s_norm_is_that_of_the_sum_over_ranks(tiny, strict, hidden):
    """Not the sum of the ranks' norms, which is about sqrt(ranks) times as large."""
    changes = {"iterations": 3, "width": 32, "deterministic": strict, "matrix_optimizer": hidden, "val_every": 0}
    alone = steps(train(tiny(name="1", micro_batches_per_forward=1, **changes)).folder)
    for size in (2, 4):
        run_ranks(
            size, lambda world, size=size: train(tiny(name=str(size), micro_batches_per_forward=1, **changes)).finished
        )
        several = steps(Path(tiny().out) / str(size))
        assert [r["grad_norm"] for r in several] == pytest.approx([r["grad_norm"] for r in alone], rel=1e-3)


@pytest.mark.slow
def test_bits_per_byte_are_the_loss_of_text_over_its_bytes(tiny):
    """Of the byte tokenizer, BOS has no byte and its loss does not count; a synthetic language has no bytes at all."""
    cfg = tiny(name="bytes", data="embedded", iterations=1, val_every=0, width=32)
    with_bytes = [r for r in read_metrics(train(cfg).folder) if r["kind"] == "val"]
    run = Run(tiny(name="again", data="embedded", iterations=1, val_every=0, width=32), World())
    run.model.load_state_dict(Loaded(Path(cfg.out) / "bytes" / "checkpoints" / "step-00000001").model)
    losses, targets = [], []
    for inputs, wanted in (run.passes.val_batches[i] for i in range(len(run.passes.val_batches))):
        with torch.no_grad():
            logits = run.model.logits(inputs, run.passes.window(1))
        losses.append(F.cross_entropy(logits, wanted, reduction="none"))
        targets.append(wanted)
    run.close()
    losses, is_text = torch.cat(losses).double(), torch.cat(targets) != 256
    assert with_bytes[0]["loss"] == pytest.approx(losses.mean().item(), rel=1e-6) and not is_text.all()
    assert with_bytes[0]["bits_per_byte"] == pytest.approx(losses[is_text].mean().item() / math.log(2), rel=1e-6)
    without = [r for r in read_metrics(train(tiny(name="none", iterations=1)).folder) if r["kind"] == "val"]
    assert without and all(record["bits_per_byte"] is None for record in without)


def test_numbers_that_are_not_finite_are_a_divergence(tiny):
    assert issubclass(NonFiniteError, Diverged)
