"""Multi-token loss and asymmetric soft cap against numbers of the public program, a slow reference; in runs."""

from __future__ import annotations

import dataclasses
import hashlib
import math
import os
import signal
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_cautious import GOLDEN, close
from test_golden import named
from test_training import curve
from torch import Tensor

from speedrun_mup.config import make_config
from speedrun_mup.core.distributed import World
from speedrun_mup.core.model import GPT
from speedrun_mup.core.model.loss import (
    Cap,
    SoftcapCrossEntropy,
    softcap,
    targets_ahead,
    token_losses,
    weighted_loss_and_gradient,
)
from speedrun_mup.core.model.options.cap import ASYMMETRIC
from speedrun_mup.training import train
from speedrun_mup.training.model_config import Vocabulary, model_config
from speedrun_mup.training.run import Run

SCALE = 1 / 7.5


def ints(name: str, size: int, high: int) -> Tensor:
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little")
    return torch.from_numpy(np.random.default_rng(seed).integers(0, high, size))


def golden_z() -> Tensor:
    return named("A9.z", torch.Size((64, 97)), 2.0).double()


def test_the_cap_is_the_golden_one():
    close(softcap(golden_z(), SCALE, ASYMMETRIC).double(), GOLDEN["softcap"]["capped"], 3e-4)
    close(softcap(golden_z(), SCALE).double(), GOLDEN["softcap"]["sym_30_7.5"]["capped"], 3e-4)
    assert softcap(torch.zeros(1), SCALE, ASYMMETRIC).item() == pytest.approx(GOLDEN["softcap"]["value_at_0"])
    y = ints("A9.y", 64, 97)[:, None]
    losses, grad = weighted_loss_and_gradient(golden_z(), y, SCALE, True, None, torch.ones(1), ASYMMETRIC)
    assert losses.sum().item() == pytest.approx(GOLDEN["softcap"]["ce_sum"], rel=1e-6)
    assert grad is not None
    close(grad, GOLDEN["softcap"]["grad_z_of_sum"], 1e-5)


@pytest.mark.parametrize(
    "label, weights", [("1_.5_.25", (1, 0.5, 0.25)), ("1_.5", (1, 0.5)), ("1_.5_.1", (1, 0.5, 0.1))]
)
def test_golden_losses_of_several_tokens(label, weights):
    golden, y = GOLDEN["multi_token"][label], targets_ahead(ints("A9.y", 64, 97), len(weights))
    losses, grad = weighted_loss_and_gradient(golden_z(), y, SCALE, True, None, torch.tensor(weights), ASYMMETRIC)
    assert losses.sum().item() == pytest.approx(golden["loss_sum"], rel=1e-6)
    close(losses.double(), golden["rows"], 3e-5)
    assert grad is not None
    close(grad, golden["grad_z"], 1e-5)


@pytest.mark.parametrize("cap", [Cap(), ASYMMETRIC])
@pytest.mark.parametrize("budget", [1, 10**6])
def test_the_chunked_loss_is_the_slow_reference(cap, budget):
    """All logits at once, token by token, gradients by autograd."""
    rng = torch.Generator().manual_seed(0)
    x, w = (torch.randn(size, generator=rng).requires_grad_() for size in ((7, 8), (5, 8)))
    y, weights = torch.tensor([0, 3, 4, 1, 1, 2, 0]), torch.tensor([1.0, 0.5, 0.25])
    loss = SoftcapCrossEntropy.apply(x, w, targets_ahead(y, 3), 0.3, budget, None, False, weights, cap)
    found = torch.autograd.grad(2 * loss, (x, w))
    logits = cap.height * torch.sigmoid(x @ w.T * 0.3 + cap.shift)
    wanted = torch.zeros(())
    for t in range(7):
        for k in range(3):
            if t + k < 7:
                wanted = wanted + weights[k] * F.cross_entropy(logits[t : t + 1], y[t + k : t + k + 1])
    torch.testing.assert_close(loss, wanted)
    torch.testing.assert_close(found, torch.autograd.grad(2 * wanted, (x, w)))
    plain = token_losses(x.detach(), w.detach(), y, 0.3, budget, False, cap)
    torch.testing.assert_close(plain, F.cross_entropy(logits, y, reduction="none").detach())


def test_weights_fall_as_the_record_s():
    schedule = make_config("laptop", {"multi_token": True, "iterations": 1270}).schedule
    compared = 0
    for row in GOLDEN["schedules"]["rows"]:
        if row["step"] < 1270:
            assert schedule.at(row["step"]).loss_weights == pytest.approx(row["mtp"], abs=1e-9), row["step"]
            compared += 1
    assert compared > 15


@pytest.mark.slow
def test_a_run_with_both_resumes_to_the_same_bits_and_logs_a_loss_of_one_token(tiny):
    """Resumed where the number of tokens ahead changes: steps 0, 1 have three of them, 2, 3 two, and 4, 5 one."""
    still = {"cooldown": 0.0, "window_tokens": 32, "val_every": 0, "multi_token": True, "asymmetric_softcap": True}
    whole = train(tiny(name="whole", **still))
    stop = lambda step, model, batches: os.kill(os.getpid(), signal.SIGTERM) if step == 1 else None  # noqa: E731
    cfg = tiny(name="part", **still)
    assert train(cfg, observe=stop).steps == 2
    assert train(dataclasses.replace(cfg, resume=str(Path(cfg.out) / "part"))).val_loss == whole.val_loss
    first = curve(whole.folder)[0][1]
    assert first == pytest.approx(math.log(128), abs=0.5)


@pytest.mark.slow
@pytest.mark.parametrize("deterministic", [False, True])
def test_the_gradient_of_a_step_is_that_of_its_micro_batches_one_by_one(tiny, deterministic):
    """No target of one micro-batch is in another, however many go side by side."""
    cfg = tiny(multi_token=True, deterministic=deterministic)
    with closing(Run(cfg, World())) as run, closing(run.passes.batches.stream(0, 0, 1)) as stream:
        batches = next(stream)
        run.passes.accumulate_gradients(batches, 0)
        found = {name: p.grad.clone() for name, p in run.model.named_parameters() if p.grad is not None}
        run.model.zero_grad()
        weights = (1.0, 0.5, 0.25)
        for inputs, targets in batches:
            stream_ = run.model.hidden(inputs, run.passes.window(0))
            logits = run.model.lm_head.logits(stream_)
            losses = [
                weights[k] * F.cross_entropy(logits[: len(logits) - k], targets[k:], reduction="sum") for k in range(3)
            ]
            (torch.stack(losses).sum() / len(batches)).backward()
        for name, gradient in found.items():
            torch.testing.assert_close(gradient, run.model.get_parameter(name).grad, rtol=1e-4, atol=1e-5)


def test_both_are_in_a_model_and_its_schedule_only_if_asked_for():
    cfg = make_config("laptop", {"asymmetric_softcap": True})
    assert GPT(model_config(cfg, Vocabulary(257))).lm_head.cap == ASYMMETRIC
    assert GPT(model_config(make_config("laptop", {}), Vocabulary(257))).lm_head.cap == Cap()
    assert make_config("laptop", {}).schedule.at(0).loss_weights == (1.0,)
