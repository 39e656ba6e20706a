"""Mu-optimizers: every factor comes from the rule table; nothing of the caller's is changed; torch is the reference."""

import copy
import functools
import math

import pytest
import torch
import torch.nn.functional as F
from helpers.mup_zoo import ADAM, SGD, Tiny, learning_rates, loss_of, tiny
from torch import nn

from speedrun_mup.core import mup
from speedrun_mup.core.errors import ConfigError
from speedrun_mup.core.mup.compat.toy_models import cnn, mlp

HIDDEN = ("qkv", "fc.weight", "proj.weight")


def by_name(optimizer, model, key):
    """{parameter name: value of `key` in its group}."""
    names = {id(p): name for name, p in model.named_parameters()}
    return {names[id(p)]: g[key] for g in optimizer.param_groups for p in g["params"]}


# Base width


@pytest.mark.parametrize("arch", [mlp, cnn])
@pytest.mark.parametrize(
    "plain, mu",
    [(torch.optim.SGD, mup.MuSGD), (torch.optim.Adam, mup.MuAdam), (torch.optim.AdamW, mup.MuAdamW)],
    ids=["sgd", "adam", "adamw"],
)
def test_base_width_is_plain_torch_bit_for_bit(arch, plain, mu):
    """Initialisation and five steps of training."""
    results = []
    for readout, build in ((nn.Linear, plain), (mup.MuReadout, mu)):
        torch.manual_seed(0)
        model = arch(8, readout)
        if readout is mup.MuReadout:
            mup.set_base_shapes(model, arch(8), delta=arch(16))
        torch.manual_seed(1)
        start = copy.deepcopy(model.state_dict())
        optimizer = build(model.parameters(), lr=0.01)
        data, labels = torch.randn(16, 3, 8, 8), torch.randint(10, (16,))
        for _ in range(5):
            optimizer.zero_grad()
            F.cross_entropy(model(data.flatten(1) if arch is mlp else data), labels).backward()
            optimizer.step()
        results.append((start, model.state_dict()))
    for ours, theirs in zip(*results):
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_muon_at_base_width_is_plain_torch_bit_for_bit():
    model = mup.set_base_shapes(mlp(8), mlp(8), delta=mlp(16))
    twin = copy.deepcopy(model)
    for m, optimizer in (
        (model, mup.MuMuon([model[3].weight], lr=0.1)),
        (twin, torch.optim.Muon([twin[3].weight], lr=0.1)),
    ):
        m[3].weight.grad = torch.ones_like(m[3].weight).tril()
        optimizer.step()
    assert torch.equal(model[3].weight, twin[3].weight)


# Learning rates


@pytest.mark.parametrize("mu, expected", [(mup.MuAdam, ADAM), (mup.MuAdamW, ADAM), (mup.MuSGD, SGD)])
def test_every_way_to_name_parameters(mu, expected):
    model = tiny()
    half = len(ADAM) // 2
    parameters, named = list(model.parameters()), list(model.named_parameters())
    for params in (
        model,
        iter(parameters),
        iter(named),
        [{"params": parameters[:half]}, {"params": iter(parameters[half:])}],
        [{"params": named[:half]}, {"params": named[half:]}],
    ):
        optimizer = mu(params, lr=1.0)
        assert learning_rates(optimizer, model) == pytest.approx(expected)
    assert mu([{"params": model.qkv}], lr=1.0).param_groups[0]["params"] == [model.qkv]


def test_effective_step_of_adam_is_the_learning_rate():
    model = tiny()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = mup.MuAdam(model, lr=0.5)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    for name, p in model.named_parameters():
        torch.testing.assert_close(before[name] - p, torch.full_like(p, 0.5 * ADAM[name]), msg=name)


def test_defect_3_sgd_on_stacked_matrices():
    """(3, out, in) has the ratio of its matrices, 1, also when the layout is only inferred."""
    model = tiny()
    assert learning_rates(mup.MuSGD(model, lr=1.0), model)["qkv"] == 1.0
    raw = nn.Parameter(torch.zeros(3, 32, 32))
    raw.infshape = mup.zip_infshape((3, 8, 8), (3, 32, 32))
    assert mup.MuSGD([raw], lr=1.0).param_groups[0]["lr"] == 1.0


def test_fan_in_and_fan_out_that_grow_differently():
    def build(m_in, m_out, layout):
        class Matrix(nn.Module):
            def __init__(self):
                super().__init__()
                sizes = {"in": 8 * m_in, "out": 4 * m_out}
                self.w = nn.Parameter(torch.zeros([sizes[word] for word in layout.split()]))
                mup.declare(self, "w", mup.Role.HIDDEN, tuple({"in": 8, "out": 4}[w] for w in layout.split()), layout)

        return Matrix()

    for layout in ("out in", "in out"):
        model = build(4, 2, layout)
        assert mup.MuSGD(model, lr=1.0).param_groups[0]["lr"] == pytest.approx(2 / 4)
        assert mup.MuAdam(model, lr=1.0).param_groups[0]["lr"] == pytest.approx(1 / 4)


def test_defect_6_tensor_learning_rate():
    lr = torch.tensor(1.0)
    model = tiny()
    optimizer = mup.MuAdam(model, lr=lr)
    assert learning_rates(optimizer, model) == pytest.approx(ADAM)
    assert lr == 1.0 and len({id(g["lr"]) for g in optimizer.param_groups}) == len(optimizer.param_groups)


def test_defect_7_defaults_are_those_of_torch():
    model = tiny()
    optimizer = mup.MuAdamW(model)
    assert [by_name(optimizer, model, key)["gate"] for key in ("lr", "weight_decay", "eps")] == [1e-3, 0.01, 1e-8]
    assert mup.MuSGD(model).param_groups[0]["weight_decay"] == 0
    preset = mup.MuAdam(model, impl=functools.partial(torch.optim.AdamW, lr=3.0))
    assert by_name(preset, model, "lr")["gate"] == 3.0
    with pytest.raises(ValueError, match="empty parameter list"):
        mup.MuAdam([], lr=1.0)
    with pytest.raises(ConfigError, match="pass lr="):
        mup.process_param_groups([model.gate])


def test_defect_7_callers_groups_are_left_alone():
    model = tiny()
    groups = [{"params": list(model.parameters()), "lr": 1.0}]
    kept = copy.copy(groups[0])
    mup.MuAdamW(groups, weight_decay=0.1)
    mup.process_param_groups(groups)
    assert len(groups) == 1 and groups[0] == kept and groups[0]["params"] is kept["params"]


def test_group_options_are_kept_and_parameters_stay_in_order():
    model = tiny()
    optimizer = mup.MuAdamW([{"params": model.parameters(), "lr": 2.0, "betas": (0.1, 0.2), "tag": "x"}], lr=1.0)
    assert all(g["betas"] == (0.1, 0.2) and g["tag"] == "x" for g in optimizer.param_groups)
    assert learning_rates(optimizer, model) == pytest.approx({name: 2 * lr for name, lr in ADAM.items()})
    order = [name for name, p in model.named_parameters()]
    for group in optimizer.param_groups:
        places = [order.index(name) for name, p in model.named_parameters() if any(p is q for q in group["params"])]
        assert places == sorted(places)


def test_schedulers_keep_the_ratios():
    model = tiny()
    optimizer = mup.MuAdam(model, lr=1.0)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    optimizer.step()
    scheduler.step()
    assert learning_rates(optimizer, model) == pytest.approx({name: lr / 2 for name, lr in ADAM.items()})


def test_optimizer_state_round_trip():
    model, twin = tiny(), tiny()
    first, second = mup.MuAdam(model, lr=0.01), mup.MuAdam(twin, lr=0.01)
    for _ in range(2):
        loss_of(model).backward()
        first.step()
    twin.load_state_dict(model.state_dict())
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    for m, optimizer in ((model, first), (twin, second)):
        m.zero_grad()
        loss_of(m).backward()
        optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), twin.parameters()))


def test_parametrization_is_the_only_source_of_factors():
    model = tiny()
    wrong = mup.MuAdam(model, lr=1.0, parametrization=mup.PARAMETRIZATIONS["adam-constant"])
    assert set(learning_rates(wrong, model).values()) == {1.0}
    for table in mup.PARAMETRIZATIONS.values():
        for mu, optimizer in ((mup.MuAdamW, "adam"), (mup.MuSGD, "sgd")):
            made = mu(model, lr=1.0, weight_decay=1.0, parametrization=table)
            for name, _, spec in mup.named_specs(model):
                factors = spec.factors(table, optimizer)
                assert by_name(made, model, "lr")[name] == factors.lr
                assert by_name(made, model, "weight_decay")[name] == factors.weight_decay


def test_defect_17_the_readout_is_corrected_once():
    """Forward factor times Adam's learning rate is 1/m for every table that claims to be muP, and from one place."""
    model = tiny()
    x = torch.eye(32)[:1]
    forward = (model.readout(x) - model.readout.bias) / model.readout.weight[:, 0]
    assert forward.mean().item() == pytest.approx(1 / 4)
    assert learning_rates(mup.MuAdam(model, lr=1.0), model)["readout.weight"] == 1.0


# Epsilon


def test_eps_follows_the_gradients():
    model = tiny()
    eps = by_name(mup.MuAdam(model, eps=1.0), model, "eps")
    assert {name for name, value in eps.items() if value == 1.0} == {"gate", "readout.bias"}
    assert {value for name, value in eps.items() if name not in ("gate", "readout.bias")} == {0.25}
    assert set(by_name(mup.MuAdam(model, eps=1.0, scale_eps=False), model, "eps").values()) == {1.0}


def test_an_impl_without_eps():
    model = tiny()
    optimizer = mup.MuAdam(model, impl=torch.optim.Rprop, lr=1.0)
    assert learning_rates(optimizer, model) == pytest.approx(ADAM) and "eps" not in optimizer.param_groups[0]


# Weight decay


def shrinkage(mu, model, **kwargs):
    """{parameter name: what a step with zero gradients takes away from it, relative}, for lr = 0.1."""
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = mu(model, lr=0.1, **kwargs)
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    return {name: round((1 - p / before[name]).nanmean().item(), 5) for name, p in model.named_parameters()}


@pytest.mark.parametrize("mu", [mup.MuAdamW, mup.MuSGD])
def test_weight_decay_takes_the_same_share_at_every_width(mu):
    names = ("embed.weight", "fc.weight", "fc.bias", "readout.weight", "gate")
    for model in (tiny(), mup.set_base_shapes(Tiny(8), Tiny(8), delta=Tiny(16))):
        assert {shrinkage(mu, model, weight_decay=0.2)[name] for name in names} == {0.02}


@pytest.mark.parametrize(
    "regime, hidden, vector",
    [
        ("independent", 0.02, 0.02),
        ("coupled", 0.005, 0.02),
        ("compute-optimal", 0.005, 0.005),
        ("steady-state", 0.01, 0.02),
    ],
)
def test_weight_decay_regimes_at_four_times_the_width(regime, hidden, vector):
    shares = shrinkage(mup.MuAdamW, tiny(), weight_decay=0.2, parametrization=mup.mup(weight_decay=regime))
    assert [shares[name] for name in HIDDEN] == [hidden] * 3
    assert shares["embed.weight"] == shares["readout.weight"] == vector and shares["gate"] == 0.02


def test_decoupled_wd_leaves_weight_decay_alone():
    model = tiny()
    assert set(by_name(mup.MuAdamW(model, decoupled_wd=True), model, "weight_decay").values()) == {0.01}


def test_unknown_regime_and_regime_without_derivation():
    with pytest.raises(ValueError, match="choose independent"):
        mup.mup(weight_decay="magic")
    with pytest.raises(ValueError, match="derived for adam"):
        mup.MuSGD(tiny(), parametrization=mup.mup(weight_decay="steady-state"))


# Muon


def matrix(rows, columns, base_rows, base_columns):
    p = nn.Parameter(torch.zeros(rows, columns))
    p.infshape = mup.zip_infshape((base_rows, base_columns), (rows, columns), fin_if_same=False)
    return p


@pytest.mark.parametrize("adjust", [None, "original", "match_rms_adamw"])
@pytest.mark.parametrize("shape", [(32, 8, 64, 16), (32, 8, 32, 64), (8, 32, 64, 32), (16, 16, 16, 48)])
def test_muon_update_follows_the_spectral_rule(adjust, shape):
    """What a step does to the matrix: torch's length at base shape, times sqrt(m_out / m_in)."""
    base_rows, base_columns, rows, columns = shape

    def length(p, build):
        p.grad = torch.randn_like(p)
        converging = {"ns_coefficients": (1.5, -0.5, 0.0), "ns_steps": 40}
        build([p], lr=1.0, weight_decay=0.0, momentum=0.0, nesterov=False, adjust_lr_fn=adjust, **converging).step()
        return torch.linalg.matrix_norm(p.detach(), 2).item()

    torch.manual_seed(0)
    at_base = length(nn.Parameter(torch.zeros(base_rows, base_columns)), torch.optim.Muon)
    here = length(matrix(rows, columns, base_rows, base_columns), mup.MuMuon)
    spectral = math.sqrt((rows / base_rows) / (columns / base_columns))
    assert here == pytest.approx(at_base * spectral, rel=0.02)
    group = mup.MuMuon([matrix(rows, columns, base_rows, base_columns)], lr=1.0, weight_decay=0.5).param_groups[0]
    assert group["lr"] * group["weight_decay"] == pytest.approx(0.5)


def test_muon_owns_hidden_matrices_only():
    model = tiny()
    with pytest.raises(ValueError, match="muon must not own"):
        mup.MuMuon(model, lr=1.0)
    hidden = [p for _, p, spec in mup.named_specs(model) if spec.role is mup.Role.HIDDEN and p.ndim == 2]
    assert set(learning_rates(mup.MuMuon(hidden, lr=1.0), model).values()) == {1.0}


def test_muon_of_others():
    p = matrix(32, 64, 8, 16)
    with pytest.raises(ConfigError, match="shape_factor"):
        mup.MuMuon([p], impl=torch.optim.SGD, lr=1.0)
    optimizer = mup.MuMuon([p], impl=torch.optim.SGD, lr=1.0, shape_factor=lambda rows, columns: rows)
    assert optimizer.param_groups[0]["lr"] == 8 / 32


# Depth


class Deep(nn.Module):
    """One branch-closing matrix and one residual scalar, at depth multiplier 2."""

    def __init__(self):
        super().__init__()
        self.proj, self.skip = nn.Parameter(torch.zeros(16, 16)), nn.Parameter(torch.ones(3))
        mup.declare(self, "proj", mup.Role.HIDDEN, (4, 4), "out in", m_depth=2.0)
        mup.declare(self, "skip", mup.Role.SCALAR, (3,), "n", m_depth=2.0)


def test_depth_divides_the_learning_rate_of_marked_parameters():
    model = Deep()
    assert learning_rates(mup.MuAdam(model, lr=1.0), model) == {"proj": 1 / 8, "skip": 1 / 2}
    assert mup.MuMuon([model.proj], model=model, lr=1.0).param_groups[0]["lr"] == 1 / 2
    assert model.mup_specs["proj"].factors(mup.mup(), "adam").init == 1 / 4  # 1/sqrt(m) and 1/m_depth
    decay = by_name(mup.MuAdamW(model, lr=1.0, weight_decay=1.0), model, "weight_decay")
    assert decay == {"proj": 8, "skip": 2}  # lr * weight_decay does not feel depth
    assert learning_rates(mup.MuAdam(model, lr=1.0, parametrization=mup.PARAMETRIZATIONS["sp"]), model) == {
        "proj": 1,
        "skip": 1,
    }
    with pytest.raises(ValueError, match="no depth rule"):
        mup.MuSGD(model, lr=1.0)


def test_depth_factor_on_lr_is_a_branch_multiplier_for_zero_initialised_matrices():
    """1/m_depth on Adam's LR of a branch's last matrix, or on the branch: the same function after every step."""
    functions = []
    for multiplier, lr in ((1.0, 0.05), (0.5, 0.1)):
        torch.manual_seed(0)
        inner, proj, x, y = nn.Linear(8, 8), nn.Linear(8, 8, bias=False), torch.randn(16, 8), torch.randn(16, 8)
        nn.init.zeros_(proj.weight)
        optimizer = torch.optim.Adam(
            [{"params": inner.parameters()}, {"params": proj.parameters(), "lr": lr}], eps=1e-30
        )
        for _ in range(4):
            optimizer.zero_grad()
            out = x + multiplier * proj(inner(x).relu())
            F.mse_loss(out, y).backward()
            optimizer.step()
        functions.append(out.detach())
    torch.testing.assert_close(*functions)
