"""NorMuon against numbers of the public program and a slow reference; its axis; and that it is a spectral update."""

from __future__ import annotations

import dataclasses
import os
import re
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.dist import run_ranks
from test_golden import named
from test_optimizers import groups_of
from test_polar_express import GOLDEN, summary
from test_training import curve, weights
from torch import Tensor, nn

from speedrun_mup.config import make_config
from speedrun_mup.coord_check import CheckVerdict, gpt_coord_check
from speedrun_mup.core import mup
from speedrun_mup.core.errors import ConfigError
from speedrun_mup.core.model import GPT, GPTConfig
from speedrun_mup.core.mup import PARAMETRIZATIONS, ParamSpec, Role, Update
from speedrun_mup.core.optimizers import OPTIMIZERS, GroupHyperparams, param_groups
from speedrun_mup.core.optimizers.normuon import NorMuon
from speedrun_mup.core.optimizers.polar_express import polar_express, polar_express_by_svd
from speedrun_mup.training import train
from speedrun_mup.training.build import tuned_values

CASES = [(shape, label) for shape, labels in GOLDEN["normuon"].items() for label in labels]
F32, BF16 = 4e-6, 0.03  # of the movement after three steps; the program's own bfloat16 differs from float64 by 0.025


def golden_start(shape: str) -> tuple[nn.Parameter, list[Tensor]]:
    """The golden parameter, its shape times 0.05, and its gradients."""
    sizes = torch.Size(map(int, shape.split("x")))
    return nn.Parameter(named(f"opt.P.{shape}", sizes, 0.05)), [
        named(f"opt.G{t}.{shape}", sizes, 1.0) for t in range(3)
    ]


def golden_settings(shape: str, label: str) -> dict[str, Any]:
    lr, beta2, *momenta = map(float, re.findall(r"\d+(?:\.\d+)?", label.replace("b2", "")))
    rows, columns = map(int, shape.split("x"))
    factor = max(1.0, rows / columns) ** 0.5
    return {"lr": lr * factor, "beta2": beta2, "momenta": momenta or [0.95] * 3, "dim": -2 if rows >= columns else -1}


def three_steps(shape: str, label: str, **options: Any) -> tuple[list[Tensor], NorMuon]:
    """The parameter after each step, and the optimizer."""
    chosen, (parameter, gradients) = golden_settings(shape, label), golden_start(shape)
    group = {"params": [("p", parameter)], "lr": chosen["lr"], "beta2": chosen["beta2"], "neuron_dim": chosen["dim"]}
    optimizer = NorMuon([group], **options)
    after = []
    for gradient, momentum in zip(gradients, chosen["momenta"], strict=True):
        optimizer.param_groups[0]["momentum"] = momentum
        parameter.grad = gradient
        optimizer.step()
        after.append(parameter.detach().clone())
    return after, optimizer


@pytest.mark.parametrize("shape, label", CASES)
def test_golden_steps(shape, label):
    expected, (after, optimizer) = GOLDEN["normuon"][shape][label], three_steps(shape, label)
    movement = (after[-1] - golden_start(shape)[0]).norm().item()
    for got, step in zip(after, expected["after"], strict=True):
        for key, value in summary(got).items():
            assert value == pytest.approx(step[key], rel=0, abs=F32 * movement * (4 if key != "first" else 1)), key
    slices = optimizer.slices()
    for state, name in (("momentum_buffer", "momentum"), ("second_moment", "second_moment")):
        got = summary(slices[f"p/{state}"].tensor)
        assert got["norm"] == pytest.approx(expected[name]["norm"], rel=1e-5)
        assert got["first"] == pytest.approx(expected[name]["first"], rel=1e-4)


@pytest.mark.parametrize("shape, label", CASES)
def test_steps_are_those_of_the_slow_reference(shape, label):
    """Written out neuron by neuron, in float64, with the polynomial of singular values by an SVD."""
    chosen, (parameter, gradients) = golden_settings(shape, label), golden_start(shape)
    turned = chosen["dim"] == -1
    w = parameter.detach().double().T if turned else parameter.detach().double()
    buffer, moments = torch.zeros_like(w), [0.0] * len(w)
    for gradient, mu in zip(gradients, chosen["momenta"], strict=True):
        g = gradient.double().T if turned else gradient.double()
        buffer = mu * buffer + (1 - mu) * g
        update = polar_express_by_svd(((1 - mu) * g + mu * buffer)[None])[0]
        rows = []
        for i, neuron in enumerate(update):
            moments[i] = chosen["beta2"] * moments[i] + (1 - chosen["beta2"]) * (neuron @ neuron).item() / len(neuron)
            rows.append(neuron / max(moments[i], 1e-10) ** 0.5)
        scaled = torch.stack(rows)
        w = w - chosen["lr"] * scaled * update.norm() / scaled.norm()
    after, _ = three_steps(shape, label)
    expected = w.T if turned else w
    assert (after[-1].double() - expected).norm() < F32 * (expected - golden_start(shape)[0]).norm()
    narrow, _ = three_steps(shape, label, orthogonalizer=lambda x: polar_express(x.bfloat16()))
    assert (narrow[-1].double() - expected).norm() < BF16 * (expected - golden_start(shape)[0]).norm()


def test_a_zero_gradient_moves_nothing():
    parameter = nn.Parameter(torch.ones(2, 3, 4))
    optimizer = NorMuon(groups_of([parameter]))
    parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    assert torch.equal(parameter.detach(), torch.ones(2, 3, 4))


@pytest.mark.parametrize(
    "base, shape, layout, dim",
    [
        ((32, 32), (64, 64), "out in", -2),
        ((32, 32), (64, 64), "in out", -1),
        ((128, 32), (256, 64), "out in", -2),
        ((32, 128), (64, 256), "out in", -1),
        ((32, 16), (32, 64), "out in", -2),  # the shape alone would say -1
        ((3, 32, 32), (3, 64, 64), "stack in out", -1),
    ],
)
def test_neurons_are_counted_along_the_side_that_was_declared_longer_at_base_width(base, shape, layout, dim):
    spec = ParamSpec(Role.HIDDEN, base, shape, tuple(layout.split()))
    assert NorMuon.options_for(spec) == {"neuron_dim": dim}


def test_groups_tell_it_which_side_is_which():
    layer = nn.Linear(16, 16, bias=False)
    mup.declare(layer, "weight", Role.HIDDEN, (16, 16), "in out", "matrix")
    (group,) = param_groups(layer, PARAMETRIZATIONS["mup"], {"matrix": GroupHyperparams("normuon", 0.05)})["normuon"]
    assert group["neuron_dim"] == -1 and "orthogonalizer" not in group  # so it has its own: Polar Express
    assert NorMuon([group]).param_groups[0]["orthogonalizer"] == "polar-express"


def test_settings_reach_it_and_one_that_has_no_effect_is_refused(tiny):
    cfg = tiny(matrix_optimizer="normuon", matrix_beta2=0.9, orthogonalizer="newton-schulz")
    groups = param_groups(GPT(GPTConfig(20, 0, 6, 32, 16, 16, 16)), PARAMETRIZATIONS["mup"], tuned_values(cfg))
    assert {(group["beta2"], group["orthogonalizer"]) for group in groups["normuon"]} == {(0.9, "newton-schulz")}
    assert not any("beta2" in group or "orthogonalizer" in group for group in groups["adam"])
    with pytest.raises(ConfigError, match="orthogonalizer has no effect on adam; leave it out, or choose muon or"):
        train(tiny(matrix_optimizer="adam", orthogonalizer="polar-express"))


def test_its_second_moment_is_not_adams():
    built = {}
    for beta2 in (0.95, 0.99):
        cfg = make_config("laptop", {"matrix_optimizer": "normuon", "adam_beta2": beta2})
        model = GPT(GPTConfig(20, 0, 6, 32, 16, 16, 16))
        groups = param_groups(model, PARAMETRIZATIONS["mup"], tuned_values(cfg))
        assert {group["betas"] for group in groups["adam"]} == {(0.8, beta2)}
        built[beta2] = {group["beta2"] for group in NorMuon(groups["normuon"]).param_groups}
    assert built == {0.95: {0.95}, 0.99: {0.95}}


# That it is a spectral update is measured, with what must fail beside it


class Entrywise(NorMuon):
    """NorMuon as it would be scaled if its update were taken for one of entries."""

    kind = Update.ENTRYWISE


class Narrow(NorMuon):
    """NorMuon with an update in bfloat16, as on CUDA."""

    defaults = NorMuon.defaults | {"orthogonalizer": lambda x: polar_express(x.bfloat16())}


class NarrowEntrywise(Narrow, Entrywise):
    """Both."""


@pytest.fixture
def registered(monkeypatch):
    monkeypatch.setattr(OPTIMIZERS, "_things", dict(OPTIMIZERS._things))
    for name, kind in {"entrywise": Entrywise, "narrow": Narrow, "narrow-entrywise": NarrowEntrywise}.items():
        OPTIMIZERS.register(f"{name}-normuon", kind)


def update_slope(optimizer: str, orthogonalizer: str | None = None) -> tuple[CheckVerdict, float]:
    """Verdict of the check and mean slope of the hidden matrices' updates."""
    small = {"block_size": 32, "window_tokens": 64, "head_dim": 16, "data": "embedded", "parametrization": "mup"}
    small |= {"width": 32, "base_width": 32, "matrix_optimizer": optimizer, "orthogonalizer": orthogonalizer}
    result = gpt_coord_check(make_config("laptop", small), (32, 64, 128), tokens=192, controls=False, progress=False)
    return result.verdict, result.arm.update_slope(Role.HIDDEN)


@pytest.mark.slow
@pytest.mark.parametrize(
    "optimizer, orthogonalizer", [("normuon", None), ("narrow-normuon", None), ("muon", "polar-express")]
)
def test_updates_have_the_size_of_a_spectral_update_at_every_width(registered, optimizer, orthogonalizer):
    _, slope = update_slope(optimizer, orthogonalizer)
    assert slope == pytest.approx(0.0, abs=0.15)


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["entrywise-normuon", "narrow-entrywise-normuon"])
def test_taken_for_an_entrywise_update_it_is_seen_to_shrink_as_one_over_width(registered, optimizer):
    verdict, slope = update_slope(optimizer)
    assert verdict is CheckVerdict.FAIL and slope == pytest.approx(-1.0, abs=0.2)


@pytest.mark.dist
def test_a_run_resumes_bit_for_bit_on_other_numbers_of_ranks(tiny):
    same = {"matrix_optimizer": "normuon", "deterministic": True, "micro_batches": 8, "iterations": 6, "val_every": 3}
    whole = train(tiny(name="whole", **same))

    def stop_at(last):
        return lambda step, model, batches: os.kill(os.getpid(), signal.SIGTERM) if step == last else None

    cfg = tiny(name="part", **same)
    resumed = dataclasses.replace(cfg, resume=str(Path(cfg.out) / "part"))
    assert run_ranks(2, lambda world: train(cfg, observe=stop_at(1)).steps) == [2] * 2
    assert run_ranks(4, lambda world: train(resumed, observe=stop_at(3)).steps) == [4] * 4
    again = train(resumed)
    assert again.finished and curve(again.folder) == curve(whole.folder)
    first, second = weights(again), weights(whole)
    assert all(torch.equal(first[name], second[name]) for name in second)
