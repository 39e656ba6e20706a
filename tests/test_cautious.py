"""Cautious weight decay against numbers of the public program and a slow reference; what decay follows; resuming."""

from __future__ import annotations

import json
import re
from contextlib import closing
from pathlib import Path

import pytest
import torch
from test_golden import named
from test_optimizers import groups_of
from test_polar_express import summary
from torch import Tensor, nn

from speedrun_mup.config import make_config
from speedrun_mup.core.distributed import World
from speedrun_mup.core.errors import ConfigError
from speedrun_mup.core.optimizers import OPTIMIZERS, DistAdam, adam_formula
from speedrun_mup.core.optimizers.normuon import NorMuon
from speedrun_mup.training import train
from speedrun_mup.training.build import tuned_values
from speedrun_mup.training.run import Run

GOLDEN = json.loads((Path(__file__).parent / "data" / "optimizer_techniques.json").read_text())
SHAPES = ("48x32", "32x48", "64x64")


def start(shape: str, scale: float) -> tuple[nn.Parameter, list[Tensor]]:
    """The golden parameter and its gradients."""
    sizes = torch.Size(map(int, shape.split("x")))
    return nn.Parameter(named(f"opt.P.{shape}", sizes, scale)), [
        named(f"opt.G{t}.{shape}", sizes, 1.0) for t in range(3)
    ]


def close(found: Tensor, expected: dict, tolerance: float) -> None:
    """A golden summary; `tolerance` is of the whole tensor."""
    for key, value in summary(found).items():
        wide = 1 if key in ("first", "norm") else 4
        assert value == pytest.approx(expected[key], rel=0, abs=tolerance * wide), key


def steps(optimizer, gradients: list[Tensor]) -> list[Tensor]:
    """The one parameter after each step."""
    parameter, after = optimizer.param_groups[0]["params"][0], []
    for gradient in gradients:
        parameter.grad = gradient
        optimizer.step()
        after.append(parameter.detach().clone())
    return after


MUON = [(shape, label) for shape in SHAPES for label in GOLDEN["cautious"]["muon"][shape]]


def cautious_normuon(shape: str, label: str) -> tuple[NorMuon, list[Tensor]]:
    """The program decays by wd lr lr_eff, where lr_eff has the shape's factor and lr_mul."""
    lr, wd = (float(x) for x in re.findall(r"(?:lr|wd)(\d+(?:\.\d+)?)", label)[:2])
    rows, columns = map(int, shape.split("x"))
    factor = max(1.0, rows / columns) ** 0.5 * (2 if label.endswith("lr_mul2") else 1)
    parameter, gradients = start(shape, 1.0 if label.endswith("bigP") else 0.05)
    group = {"params": [("p", parameter)], "lr": lr * factor, "weight_decay": wd * lr, "beta2": 0.9, "momentum": 0.95}
    group |= {"neuron_dim": -2 if rows >= columns else -1, "cautious": True}
    return NorMuon([group]), gradients


@pytest.mark.parametrize("shape, label", MUON)
def test_golden_steps_of_normuon(shape, label):
    optimizer, gradients = cautious_normuon(shape, label)
    before = optimizer.param_groups[0]["params"][0].detach().clone()
    after = steps(optimizer, gradients)
    movement = (after[-1] - before).norm().item()
    for got, expected in zip(after, GOLDEN["cautious"]["muon"][shape][label], strict=True):
        close(got, expected, 4e-6 * movement + 1e-7 * before.norm().item())


def test_golden_steps_of_the_two_matrices_of_an_mlp():
    """Up has twice the rate, by its shape; down, stored (in, out), four times, by a multiplier: decay follows the rates."""
    whole, sizes = named("opt.P.mlp", torch.Size((1, 2, 64, 16)), 0.05)[0], torch.Size((1, 2, 64, 16))
    parameters = [nn.Parameter(part.clone()) for part in whole]
    common = {"weight_decay": 1.2 * 0.023, "beta2": 0.9, "momentum": 0.95, "neuron_dim": -2, "cautious": True}
    optimizer = NorMuon(
        [{"params": [(f"p{i}", p)], "lr": 0.023 * lr, **common} for i, (p, lr) in enumerate(zip(parameters, (2, 4)))]
    )
    for t, expected in enumerate(GOLDEN["cautious"]["muon"]["mlp_pair_64x16_lr0.023_wd1.2"]):
        for p, gradient in zip(parameters, named(f"opt.G{t}.mlp", sizes, 1.0)[0], strict=True):
            p.grad = gradient
        optimizer.step()
        for p, name in zip(parameters, ("up", "down"), strict=True):
            close(p.detach(), expected[name], 4e-6)


ADAM = [(shape, label) for shape in SHAPES for label in GOLDEN["cautious"]["adam"][shape]]


def adam_settings(label: str) -> dict:
    """The program decays by l^2 wd wd_mul, l = lr lr_mul, so decay handed to an optimizer that multiplies by l has one l."""
    betas = re.search(r"b\((.+?),(.+?)\)", label)
    lr, lr_mul = re.search(r"lr(\.\d+)(?:x(\d+))?", label).groups()
    decay = re.search(r"wd(\.\d+)(?:x(\d+))?", label)
    wd, wd_mul = decay.groups() if decay else (0, 1)
    lr = float(lr) * float(lr_mul or 1)
    return {
        "lr": lr,
        "betas": tuple(map(float, betas.groups())) if betas else (0.5, 0.95),
        "weight_decay": lr * float(wd) * float(wd_mul or 1),
        "eps": 1e-10,
        "cautious": True,
    }


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("shape, label", ADAM)
def test_golden_steps_of_adam(shape, label, compiled):
    """adam_formula is what a compiler gets."""
    parameter, gradients = start(shape, 1.0)
    before = parameter.detach().clone()
    optimizer = DistAdam([{"params": [("p", parameter)], **adam_settings(label)}])
    optimizer.formula = adam_formula if compiled else None
    after, golden = steps(optimizer, gradients), GOLDEN["cautious"]["adam"][shape][label]
    expected = golden["after"] if isinstance(golden["after"], list) else [golden["after"]]
    movement = (after[-1] - before).norm().item()
    for got, wanted in zip(after[-len(expected) :], expected, strict=True):
        close(got, wanted, 4e-7 * movement + 4e-7 * before.norm().item())
    for state, name in (("exp_avg", "m"), ("exp_avg_sq", "v")):
        assert summary(optimizer.slices()[f"p/{state}"].tensor)["norm"] == pytest.approx(golden[name]["norm"], rel=1e-5)


@pytest.mark.parametrize("build", [NorMuon, DistAdam])
def test_each_entry_decays_if_its_step_goes_towards_zero(build):
    """The slow reference: entry by entry, from the same optimizer without decay."""
    rate, lr = 0.3, 0.05
    plain, decaying = (nn.Parameter(start("48x32", 0.1)[0].detach()) for _ in range(2))
    gradient = start("48x32", 1.0)[1][0]
    steps(build(groups_of([plain], lr=lr)), [gradient])
    steps(build(groups_of([decaying], lr=lr, weight_decay=rate / lr, cautious=True)), [gradient])
    expected, decayed = plain.detach().clone(), 0
    before = start("48x32", 0.1)[0].detach()
    for i in range(before.size(0)):
        for j in range(before.size(1)):
            step = before[i, j] - plain[i, j]
            if (step * before[i, j]).item() > 0:
                expected[i, j] -= rate * before[i, j]
                decayed += 1
    assert 0.2 < decayed / before.numel() < 0.8
    torch.testing.assert_close(decaying.detach(), expected)


def test_without_gradient_all_entries_decay_in_muon_and_none_in_adam():
    for build, golden in ((NorMuon, GOLDEN["cautious"]["zero_gradient"]["muon_ratio"]), (DistAdam, 1.0)):
        parameter = start("48x32", 1.0)[0]
        before = parameter.detach().clone()
        lr = 0.023 * 1.5**0.5 if build is NorMuon else 0.008
        decay = 1.2 * 0.023
        steps(build(groups_of([parameter], lr=lr, weight_decay=decay, cautious=True)), [torch.zeros_like(before)])
        torch.testing.assert_close(parameter.detach(), before * golden)


def test_the_setting_reaches_the_groups_that_decay():
    cfg = make_config("laptop", {"cautious_decay": True, "matrix_weight_decay": 0.1})
    assert {name: group.options for name, group in tuned_values(cfg).items() if group.options} == {
        "matrix": {"cautious": True}
    }
    with pytest.raises(ConfigError, match="cautious_decay has no effect without weight decay; leave it out, or give"):
        tuned_values(make_config("laptop", {"cautious_decay": True}))


def test_an_optimizer_that_cannot_is_refused(monkeypatch):
    monkeypatch.setattr(DistAdam, "defaults", {key: DistAdam.defaults[key] for key in ("lr", "betas", "weight_decay")})
    with pytest.raises(ConfigError, match="cautious_decay: adam, which has group embed, cannot; choose muon, normuon$"):
        tuned_values(make_config("laptop", {"cautious_decay": True, "weight_decay": 0.1}))
    assert OPTIMIZERS["adam"] is DistAdam


@pytest.mark.parametrize("name, power", [("rate", 0), ("squared", 1), ("constant", -1)])
def test_what_decay_follows(name, power):
    schedule = make_config("laptop", {"decay_schedule": name, "iterations": 10, "final_lr_frac": 0.0}).schedule
    for step in range(10):
        now = schedule.at(step)
        assert now.decay_factor == now.lr_factor**power
    assert schedule.at(10).decay_factor == (1.0 if name == "rate" else 0.0)


@pytest.mark.slow
def test_a_run_decays_by_it_and_resumes_to_the_same_bits(tiny):
    still = {"cooldown": 0.0, "window_tokens": 32, "weight_decay": 0.5, "iterations": 4, "cautious_decay": True}
    whole, half = train(tiny(name="whole", **still)), train(tiny(name="half", **still | {"iterations": 2}))
    assert train(tiny(resume=str(half.folder), **still)).val_loss == whole.val_loss
    plain = train(tiny(name="plain", **still | {"cautious_decay": False}))
    assert plain.val_loss != whole.val_loss


def test_a_run_s_decay_follows_its_schedule(tiny):
    with closing(Run(tiny(weight_decay=0.5, decay_schedule="squared", cooldown=1.0), World())) as run:
        run.set_schedule(3)
        factor = run.schedule.at(3).lr_factor
        assert factor < 0.6
        for group in (group for optimizer in run.optimizers for group in optimizer.param_groups):
            assert group["lr"] == group["initial_lr"] * factor
            assert group["weight_decay"] == group["initial_weight_decay"] * factor > 0
