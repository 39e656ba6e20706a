"""An optimizer and a rule table that are not part of the package: a class and a dict here, and one line each."""

from __future__ import annotations

import dataclasses
import os
import signal
from pathlib import Path

import pytest
import torch
from helpers.dist import run_ranks
from test_training import curve, weights

from speedrun_mup.cli import main
from speedrun_mup.config import make_config
from speedrun_mup.coord_check import CheckVerdict, gpt_coord_check
from speedrun_mup.core import mup
from speedrun_mup.core.errors import ConfigError
from speedrun_mup.core.mup import PARAMETRIZATIONS, Role, Update, UpdateScaling
from speedrun_mup.core.optimizers import OPTIMIZERS, EntryOptimizer, GroupHyperparams, param_groups
from speedrun_mup.sweep import pick_arms
from speedrun_mup.training import train
from speedrun_mup.training.build import tuned_values


class Lion(EntryOptimizer):
    """Lion by Chen et al. (arXiv 2302.06675): the sign of a mean of gradients. Its step has entries of size lr."""

    label = "Lion"
    kind = Update.ENTRYWISE
    defaults = {"lr": 1e-4, "betas": (0.9, 0.99), "weight_decay": 0.0}
    state_names = ("mean",)

    def update(self, values, gradient, state, group):
        near, far = group["betas"]
        step = state["mean"].lerp(gradient, 1 - near).sign()
        decayed = values * (1 - group["lr"] * group["weight_decay"])
        return decayed - group["lr"] * step, {"mean": state["mean"].lerp(gradient, 1 - far)}


class LionAsSpectral(Lion):
    """Lion taken for what it is not."""

    kind = Update.SPECTRAL


class Careful(Lion):
    """One that has an eps."""

    defaults = Lion.defaults | {"eps": 1e-3}


@pytest.fixture(autouse=True)
def _registered(monkeypatch):
    """One line each; what is around them takes both out again."""
    monkeypatch.setattr(OPTIMIZERS, "_things", dict(OPTIMIZERS._things))
    OPTIMIZERS.register("lion", Lion)
    OPTIMIZERS.register("spectral-lion", LionAsSpectral)
    wrong = dataclasses.replace(mup.mup().rules[Role.HIDDEN], entrywise=UpdateScaling())
    table = mup.Parametrization("constant-rate", mup.mup().rules | {Role.HIDDEN: wrong})
    monkeypatch.setitem(PARAMETRIZATIONS, table.name, table)


LION = {"matrix_optimizer": "lion", "matrix_lr": 0.002}


@pytest.mark.slow
def test_it_trains_and_resumes_bit_for_bit(tiny):
    whole = train(tiny(name="whole", iterations=6, **LION))
    assert whole.val_loss < curve(whole.folder, "val")[0][1] - 0.3
    cfg = tiny(name="part", iterations=6, **LION)
    stop = lambda step, model, batches: os.kill(os.getpid(), signal.SIGTERM) if step == 2 else None  # noqa: E731
    assert train(cfg, observe=stop).steps == 3
    again = train(dataclasses.replace(cfg, resume=str(Path(cfg.out) / "part")))
    assert curve(again.folder) == curve(whole.folder)
    assert all(torch.equal(tensor, weights(whole)[name]) for name, tensor in weights(again).items())


@pytest.mark.parametrize(
    "given, betas", [({}, (0.9, 0.99)), ({"adam_beta2": 0.5}, (0.9, 0.99)), ({"matrix_beta1": 0.3}, (0.3, 0.99))]
)
def test_it_has_betas_of_its_own(given, betas):
    """Not Adam's, unless its group has some, be it one of the two."""
    layer = torch.nn.Linear(8, 8, bias=False)
    mup.declare(layer, "weight", Role.HIDDEN, (4, 4), "out in", "matrix")
    groups = param_groups(layer, PARAMETRIZATIONS["mup"], tuned_values(make_config("laptop", LION | given)))
    assert Lion(groups["lion"]).param_groups[0]["betas"] == betas


def test_its_own_eps_is_scaled_by_width_unless_its_group_has_one():
    OPTIMIZERS.register("careful", Careful)
    layer = torch.nn.Linear(8, 8, bias=False)
    mup.declare(layer, "weight", Role.HIDDEN, (4, 4), "out in", "matrix")
    for given, eps in (({}, 1e-3), ({"adam_eps": 1e-5}, 1e-3), ({"matrix_eps": 1e-4}, 1e-4)):
        cfg = make_config("laptop", LION | {"matrix_optimizer": "careful"} | given)
        (group,) = param_groups(layer, PARAMETRIZATIONS["mup"], tuned_values(cfg))["careful"]
        ((_, _, spec),) = mup.named_specs(layer)
        factors = spec.factors(PARAMETRIZATIONS["mup"], Update.ENTRYWISE)
        assert group["eps"] == pytest.approx(eps * factors.eps) and factors.eps != 1


@pytest.mark.dist
def test_it_is_shared_out_over_ranks(tiny):
    same = {"iterations": 4, "deterministic": True, "micro_batches": 8, **LION}
    alone = train(tiny(name="1", **same))
    cfg = tiny(name="4", **same)
    assert run_ranks(4, lambda world: train(cfg).finished) == [True] * 4
    assert curve(Path(cfg.out) / "4") == curve(alone.folder)


@pytest.mark.parametrize("table, rate", [("mup", "0.002 -> 0.0005"), ("constant-rate", "0.002")])
def test_the_table_scales_it_by_its_kind_and_explain_shows_both(table, rate, capsys):
    flags = "--preset laptop --width 256 --base-width 64 --matrix-optimizer lion --matrix-lr 0.002 --parametrization"
    assert main(["explain", *flags.split(), table]) == 0
    (row,) = (line for line in capsys.readouterr().out.splitlines() if "qkv_w" in line)
    assert row.split(" lion ")[1].strip().split("  ")[0] == rate


@pytest.mark.slow
def test_the_coordinate_check_sees_that_its_kind_is_right():
    small = {"data": "synthetic", "width": 32, "base_width": 32, "head_dim": 16, "block_size": 32}
    slopes = {}
    for optimizer, table in (("lion", "mup"), ("spectral-lion", "mup"), ("lion", "constant-rate")):
        changes = {"parametrization": table, "matrix_optimizer": optimizer, "matrix_lr": 0.002}
        cfg = make_config("laptop", small | changes)
        result = gpt_coord_check(cfg, (32, 64, 128), tokens=192, controls=False, progress=False)
        slopes[optimizer, table] = result.arm.update_slope(Role.HIDDEN)
        assert (result.verdict is CheckVerdict.FAIL) == (abs(slopes[optimizer, table]) > 0.3)
    right, *wrong = slopes.values()
    assert right == pytest.approx(0.0, abs=0.15) and wrong == pytest.approx([1.0, 1.0], abs=0.25)


def test_a_sweep_has_an_arm_of_it():
    (arm,) = pick_arms(["lion-constant-rate"])
    assert arm.settings == {"parametrization": "constant-rate", "matrix_optimizer": "lion"}
    with pytest.raises(
        ConfigError,
        match="arm 'lyon-mup' is unknown; .* optimizer of muon, adam, normuon, muonh, adamh, soap-muon, lion",
    ):
        pick_arms(["lyon-mup"])


def test_a_name_that_is_taken_or_unknown_is_refused_in_a_line():
    OPTIMIZERS.register("lion", Lion)  # again, by a module that is imported twice
    with pytest.raises(ConfigError, match="optimizer 'adam' is registered already; choose another name"):
        OPTIMIZERS.register("adam", Lion)
    with pytest.raises(
        ConfigError, match="optimizer 'lyon' is unknown; choose muon, adam, normuon, muonh, adamh, soap-muon, lion"
    ):
        OPTIMIZERS["lyon"]
    with pytest.raises(TypeError, match="Lion has no eps; it has lr, betas, weight_decay"):
        Lion([torch.nn.Parameter(torch.zeros(2))], eps=1.0)


def test_a_model_of_ones_own_takes_it_too():
    layer = torch.nn.Linear(8, 8, bias=False)
    mup.declare(layer, "weight", Role.HIDDEN, (4, 4), "out in", "matrix")
    groups = param_groups(layer, PARAMETRIZATIONS["mup"], {"matrix": GroupHyperparams("lion", 0.01)})
    layer.weight.grad = torch.ones_like(layer.weight)
    before = layer.weight.detach().clone()
    OPTIMIZERS["lion"](groups["lion"]).step()
    torch.testing.assert_close(layer.weight.detach(), before - 0.005)


@pytest.mark.parametrize(
    "optimizer, controls",
    [
        (
            "normuon",
            {"muon-over-m": "normuon", "muon-sqrt-m": "normuon", "adam-constant": "adam", "head-sqrt": "normuon"},
        ),
        ("lion", {"adam-constant": "lion", "head-sqrt": "lion"}),
    ],
)
def test_the_check_has_a_control_for_every_rule_of_the_kinds_in_use(optimizer, controls, monkeypatch):
    given = []
    monkeypatch.setattr("speedrun_mup.coord_check.gpt.coord_check", lambda **options: given.extend(options["controls"]))
    built = {}
    monkeypatch.setattr(
        "speedrun_mup.coord_check.gpt.build_optimizers", lambda model, cfg, world: built.update({model: cfg})
    )
    gpt_coord_check(make_config("laptop", {"matrix_optimizer": optimizer, "data": "synthetic"}))
    for control in given:
        control.optimizer(control.name)
    assert {name: cfg.matrix_optimizer for name, cfg in built.items()} == controls


@pytest.mark.parametrize(
    ("name", "thing", "fault"),
    [
        ("x", None, "optimizer 'x' is None; register a class or a function"),
        ("a b", Lion, "optimizer 'a b' needs a name of letters, digits"),
        ("", Lion, "optimizer '' needs a name"),
    ],
)
def test_what_cannot_be_registered_is_one_line(name, thing, fault):
    with pytest.raises(ConfigError, match=fault):
        OPTIMIZERS.register(name, thing)
    assert name not in OPTIMIZERS
