"""The coordinate check must pass what is right, fail what is wrong, and say so when it cannot tell."""

import json
import math
import re
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from speedrun_mup.cli import main
from speedrun_mup.config import make_config
from speedrun_mup.coord_check import (
    CheckVerdict,
    Control,
    CoordCheckError,
    Series,
    SlopeThresholds,
    coord_check,
    gpt_coord_check,
)
from speedrun_mup.coord_check.gpt import gpt_controls
from speedrun_mup.coord_check.observe import CheckSetup, Observer, norms
from speedrun_mup.core import mup
from speedrun_mup.core.errors import ConfigError
from speedrun_mup.core.model import GPT
from speedrun_mup.core.mup import PARAMETRIZATIONS, DepthRole, Exponents, Role, Update
from speedrun_mup.core.optimizers import DistAdam, Muon, Tuned, param_groups
from speedrun_mup.data.corpus import find_corpus
from speedrun_mup.report.checks import check_section
from speedrun_mup.training.model_config import model_config

MUP = PARAMETRIZATIONS["mup"]
ROOT = Path(__file__).parent.parent

# ---------------------------------------------------------------------------------------------------------------------
# A muP MLP in which every column of the rule table is in use

BASE, CLASSES, FEATURES = 32, 10, 16


class Layer(nn.Module):
    """A matrix (d_out, d_in) that takes init and forward multiplier from the table."""

    def __init__(self, table, d_in, d_out, role, base_shape, std):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(d_out, d_in))
        spec = mup.declare(self, "weight", role, base_shape, "out in", "matrix" if role is Role.HIDDEN else "")
        self.scale = table.forward(spec)
        nn.init.normal_(self.weight, std=std * table.init(spec))

    def forward(self, x):
        return F.linear(x, self.weight) * self.scale


class MLP(nn.Module):
    def __init__(self, width, table=MUP):
        super().__init__()
        self.first = Layer(table, FEATURES, width, Role.INPUT, (BASE, FEATURES), FEATURES**-0.5)
        self.hidden = nn.ModuleList(
            Layer(table, width, width, Role.HIDDEN, (BASE, BASE), (2 / BASE) ** 0.5) for _ in range(2)
        )
        self.last = Layer(table, width, CLASSES, Role.OUTPUT, (CLASSES, BASE), 0.1 * BASE**-0.5)
        self.bias = nn.Parameter(torch.zeros(width))
        mup.declare(self, "bias", Role.INPUT, (BASE,), "out")
        self.gain = nn.Parameter(torch.ones(()))
        mup.declare(self, "gain", Role.SCALAR, (), "")

    def forward(self, x):
        x = F.relu(self.first(x) + self.bias)
        for layer in self.hidden:
            x = F.relu(self.gain * layer(x))
        return self.last(x)


def classification(shape, batches=7, size=128):
    """Random inputs of this shape, with labels by a random linear teacher."""
    rng = torch.Generator().manual_seed(0)
    teacher = torch.randn(math.prod(shape), CLASSES, generator=rng)
    for _ in range(batches):
        x = torch.randn(size, *shape, generator=rng)
        yield x, (x.flatten(1) @ teacher).argmax(dim=1)


def cross_entropy(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1])


def train_with(kind, table=MUP, lr=0.003, eps=1e-12):
    """What makes optimizers for an MLP: adam, sgd, or muon (with adam for the rest)."""

    def make(model):
        if kind == "sgd":
            return mup.MuSGD(model, parametrization=table, lr=0.1)
        tuned = {"": Tuned("adam", lr, eps=eps), "matrix": Tuned(kind, 0.05 if kind == "muon" else lr, eps=eps)}
        groups = param_groups(model, table, tuned)
        return [DistAdam(groups["adam"])] + [Muon(groups["muon"]) for _ in groups.keys() & {"muon"}]

    return make


def check_mlp(kind="adam", table=MUP, widths=(64, 128, 256), **options):
    adam = {key: options.pop(key) for key in ("lr", "eps") if key in options}
    return coord_check(
        lambda width: MLP(width, table),
        widths,
        classification((FEATURES,)),
        cross_entropy,
        train_with(kind, table, **adam),
        output_scale=lambda m: {
            f"{name}.weight": layer.scale for name, layer in m.named_modules() if isinstance(layer, Layer)
        },
        **{"progress": False, "seeds": 2} | options,
    )


BINDING = {"eps": 1.0, "lr": 1.0}  # gradients are far below 1


@pytest.mark.slow
@pytest.mark.parametrize("kind, options", [("adam", {}), ("adam", BINDING), ("sgd", {}), ("muon", {})])
def test_a_mup_mlp_passes(kind, options):
    result = check_mlp(kind, widths=(64, 128, 256, 512), seeds=3, **options)
    assert result.verdict is CheckVerdict.PASS, result.summary()
    assert result.controls[0].slope == pytest.approx(0.5, abs=0.2)


def broken(role, column, kind, power=0.5):
    """muP with one entry off by sqrt(m)."""
    extra = Exponents(fan_out=power) if role is Role.INPUT else Exponents(fan_in=power)
    rule = MUP.rules[role]
    if column in ("init", "forward"):
        rule = replace(rule, **{column: getattr(rule, column) * extra})
    else:
        scaling = rule.scaling(Update(kind))
        scaling = replace(scaling, **{column: getattr(scaling, column) * extra})
        rule = replace(rule, **{Update(kind).value: scaling})
    return replace(MUP, name=f"{role.value} {column} broken", rules={**MUP.rules, role: rule})


PARAMETRIZED = (Role.INPUT, Role.HIDDEN, Role.OUTPUT)
BREAKABLE = [
    *((role, column, "adam") for role in PARAMETRIZED for column in ("init", "forward", "lr", "eps")),
    *((role, "lr", "sgd") for role in PARAMETRIZED),
    (Role.HIDDEN, "lr", "muon"),
]


def check_broken(role, column, kind, power):
    options = BINDING if column == "eps" else {}
    result = check_mlp(kind, broken(role, column, kind, power), controls=[], **options)
    assert result.verdict is CheckVerdict.FAIL, result.summary()
    return result.arm


@pytest.mark.slow
@pytest.mark.parametrize("role, column, kind", BREAKABLE)
def test_any_rule_of_the_table_broken_by_root_m_fails(role, column, kind):
    arm = check_broken(role, column, kind, 0.5)
    own = [
        row
        for row in arm.rows
        if row.role is role and row.quantity == ("init" if column in ("init", "forward") else "update")
    ]
    off = sum(row.slope - row.predicted for row in own) / len(own)
    assert off == pytest.approx(-0.5 if column == "eps" else 0.5, abs=0.35)


@pytest.mark.slow
@pytest.mark.parametrize("library", [mup.init, nn.init])
def test_an_initialisation_that_knows_no_width_fails_and_the_summary_says_how_to_mend_it(library):
    def plain(width):
        readout = mup.MuReadout(width, CLASSES, readout_zero_init=True)
        return nn.Sequential(nn.Linear(FEATURES, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), readout)

    def build(width):
        model = mup.set_base_shapes(plain(width), plain(64), delta=plain(128))
        library.normal_(model[2].weight, std=0.15)
        return model

    widths, data = [64, 128, 256], list(classification((FEATURES,)))
    result = coord_check(build, widths, data, cross_entropy, lambda m: mup.MuAdam(m, lr=0.003), seeds=2, progress=False)
    (init,) = (row for row in result.arm.rows if row.quantity == "init" and row.kind == "2.weight")
    wrong = library is nn.init
    assert init.slope == pytest.approx(0.5 if wrong else 0.0, abs=0.1)
    assert ("init of 2.weight: initialise with mup.init, after set_base_shapes" in result.summary()) == wrong


@pytest.mark.slow
@pytest.mark.parametrize("role, column, kind", BREAKABLE)
def test_the_same_in_the_other_direction(role, column, kind):
    check_broken(role, column, kind, -0.5)


# ---------------------------------------------------------------------------------------------------------------------
# Other models


def small_cnn(width):
    """Two convolutions, a hidden matrix and a readout that starts at zero; roles declared."""
    model = nn.Sequential(
        *(nn.Conv2d(1, width, 3, padding=1), nn.ReLU(), nn.AvgPool2d(2)),
        *(nn.Conv2d(width, width, 3, padding=1), nn.ReLU(), nn.AvgPool2d(2), nn.Flatten()),
        *(nn.Linear(4 * width, 2 * width), nn.ReLU(), mup.MuReadout(2 * width, CLASSES, readout_zero_init=True)),
    )
    b = 16
    for index, name, role, base, layout in (
        (0, "weight", Role.INPUT, (b, 1, 3, 3), "out in k k"),
        (0, "bias", Role.INPUT, (b,), "out"),
        (3, "weight", Role.HIDDEN, (b, b, 3, 3), "out in k k"),
        (3, "bias", Role.INPUT, (b,), "out"),
        (7, "weight", Role.HIDDEN, (2 * b, 4 * b), "out in"),
        (7, "bias", Role.INPUT, (2 * b,), "out"),
        (9, "weight", Role.OUTPUT, (CLASSES, 2 * b), "out in"),
        (9, "bias", Role.SCALAR, (CLASSES,), "-"),
    ):
        mup.declare(model[index], name, role, base, layout)
    for index in (0, 3, 7):
        nn.init.kaiming_normal_(model[index].weight)
        nn.init.zeros_(model[index].bias)
    return model


def check_cnn(optimizer):
    widths, images = (16, 32, 64, 128), classification((1, 8, 8), size=64)
    return coord_check(small_cnn, widths, images, cross_entropy, optimizer, seeds=3, progress=False)


@pytest.mark.slow
def test_a_mup_cnn_passes():
    result = check_cnn(lambda model: mup.MuAdam(model, lr=0.003))
    assert result.verdict is CheckVerdict.PASS, result.summary()
    assert {row.kind for row in result.arm.rows if row.role is Role.HIDDEN} == {"3.weight", "3", "7.weight", "7"}


@pytest.mark.slow
def test_the_same_cnn_fails_with_an_optimizer_that_knows_no_mup():
    result = check_cnn(lambda model: torch.optim.Adam(model.parameters(), lr=0.001))
    assert result.verdict is CheckVerdict.FAIL
    assert result.arm.update_slope(Role.HIDDEN) > 0.5


# ---------------------------------------------------------------------------------------------------------------------
# The GPT

SMALL = {"data": "synthetic", "width": 32, "base_width": 32, "parametrization": "mup", "head_dim": 16, "block_size": 32}
WITH_ADAM = {"matrix_optimizer": "adam", "matrix_lr": 0.004}  # low, so that few steps stay in the linear regime


def check_gpt(changes=None, **options):
    cfg = make_config("laptop", SMALL | (changes or {}))
    return gpt_coord_check(cfg, **{"widths": (32, 64, 128), "tokens": 192, "progress": False} | options)


@pytest.fixture(scope="module")
def gpt_result():
    return check_gpt()


@pytest.mark.slow
def test_the_gpt_passes_and_every_control_fails_as_predicted(gpt_result):
    assert gpt_result.verdict is CheckVerdict.PASS, gpt_result.summary()
    seen = {control.arm.name: control for control in gpt_result.controls}
    assert set(seen) == {"muon-over-m", "muon-sqrt-m", "adam-constant", "head-sqrt"}
    for control in seen.values():
        assert control.seen and control.arm.verdict is CheckVerdict.FAIL
        assert control.slope == pytest.approx(control.predicted, abs=0.2), control.arm.name


@pytest.mark.slow
def test_all_named_activations_are_there(gpt_result):
    names = {series.name for series in gpt_result.arm.series if series.quantity == "activation"}
    attention = {f"blocks.0.attn.qkv_w[{i}]" for i in range(3)} | {"blocks.0.attn.scores", "blocks.0.attn", "blocks.0"}
    assert attention | {"embed", "value_embeds.1", "blocks.5.mlp.c_fc", "blocks.5.mlp", "lm_head"} <= names


@pytest.mark.slow
def test_every_parameter_of_the_gpt_has_an_effect_and_a_gradient(gpt_result):
    names = {name for name, _ in GPT(model_config(*small_shape())).named_parameters()}
    for quantity in ("effect", "gradient"):
        found = {series.name.split("[")[0] for series in gpt_result.arm.series if series.quantity == quantity}
        assert found == names


def small_shape():
    cfg = make_config("laptop", SMALL)
    return cfg, find_corpus("synthetic")[0], "dense", torch.float32


@pytest.mark.slow
def test_the_gpt_with_adam_alone_is_right_too():
    assert check_gpt(WITH_ADAM, controls=False, tokens=256).arm.verdict is CheckVerdict.PASS


@pytest.mark.parametrize("optimizer, way", [("muon", "polar-express"), ("normuon", "newton-schulz")])
def test_the_controls_of_adam_have_no_orthogonalizer(optimizer, way):
    cfg = make_config("laptop", {"matrix_optimizer": optimizer, "orthogonalizer": way})
    names = {wrong.matrix_optimizer: wrong.orthogonalizer for wrong, _, _ in gpt_controls(cfg)}
    assert names == {optimizer: way, "adam": None}


@pytest.mark.slow
def test_with_adam_alone_muons_controls_are_left_out():
    result = check_gpt(WITH_ADAM, tokens=256)
    assert result.verdict is CheckVerdict.PASS, result.summary()
    assert [control.arm.name for control in result.controls] == ["adam-constant", "head-sqrt"]


@pytest.mark.slow
def test_two_steps_prove_nothing_about_layers_behind_zeros():
    result = check_gpt(steps=2, controls=False)
    assert result.verdict is CheckVerdict.INCONCLUSIVE
    assert result.reasons[0].startswith("2 updates are too few")
    (still,) = (reason.split(" did not move in 2 updates")[0] for reason in result.reasons if "did not move" in reason)
    # The gradient of a skip's weight is rounding alone until a block adds something: some processors round it to zero.
    assert set(still.split(", ")) - {"blocks.skip_weights"} == {
        "blocks.*.attn.qkv_w",
        "blocks.*.mlp.c_fc.weight",
        "value_embeds.*.weight",
        "value_embeds.lambdas",
    }


@pytest.mark.slow
@pytest.mark.parametrize(
    "role, column, kind",
    [
        *((Role.INPUT, column, "adam") for column in ("init", "lr")),
        *((Role.OUTPUT, column, "adam") for column in ("forward", "lr")),
        *((Role.HIDDEN, column, "adam") for column in ("init", "lr")),
        (Role.HIDDEN, "lr", "muon"),
    ],
)
@pytest.mark.parametrize("power", [0.5, -0.5])
def test_a_broken_rule_fails_the_gpt(role, column, kind, power):
    changes = WITH_ADAM if role is Role.HIDDEN and kind == "adam" else {}
    result = check_gpt(changes, table=broken(role, column, kind, power), controls=False)
    assert result.verdict is CheckVerdict.FAIL, result.summary()


@pytest.mark.slow
def test_the_check_of_the_laptop_preset_passes():
    """As by default, without its widest model, which takes two thirds of the time."""
    assert gpt_coord_check(widths=(64, 128, 256), progress=False).verdict is CheckVerdict.PASS


# ---------------------------------------------------------------------------------------------------------------------
# What it measures


class Zoo(nn.Module):
    """A parameter used in every way that the check can follow, and some that it must take element by element."""

    def __init__(self, width=8, dtype=None):
        super().__init__()
        self.dtype = dtype
        shapes = {
            "stack": ((3, width, width), Role.HIDDEN, "stack out in"),
            "turned": ((width, width), Role.HIDDEN, "in out"),
            "experts": ((2, width, width), Role.HIDDEN, "expert in out"),
            "kernel": ((width, width, 3), Role.HIDDEN, "out in k"),
            "table": ((5, width), Role.INPUT, "vocab out"),
            "gain": ((width,), Role.INPUT, "out"),
        }
        for name, (shape, role, layout) in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.randn(shape) / width))
            mup.declare(self, name, role, shape, layout)
        self.linear = nn.Linear(width, width)
        mup.declare(self.linear, "weight", Role.HIDDEN, (width, width), "out in")
        mup.declare(self.linear, "bias", Role.INPUT, (width,), "out")

    def forward(self, tokens):
        x = F.embedding(tokens, self.table)  # (B, T, D)
        inputs = {"table": tokens, "stack": x}
        weight = self.stack.flatten(end_dim=1)
        x = F.linear(x, weight if self.dtype is None else weight.to(self.dtype).float()).chunk(3, dim=-1)[1]
        inputs["turned"] = x
        x = torch.einsum("btd,df->btf", x, self.turned)
        inputs["linear"] = x
        x = self.linear(x)
        inputs["experts"] = x
        x = torch.bmm(x.flatten(0, 1).expand(2, -1, -1), self.experts).sum(0).view_as(x)
        inputs["kernel"] = x
        x = F.conv1d(x.transpose(1, 2), self.kernel, padding=1).transpose(1, 2)
        return x * self.gain + F.linear(x, self.table).sum(-1, keepdim=True), inputs


def rms(x):
    return x.float().square().mean().sqrt().item()


class Tied(nn.Module):
    """An embedding that is the readout too, with one residual layer between."""

    def __init__(self, width: int):
        super().__init__()
        self.embed, self.layer = nn.Embedding(16, width), nn.Linear(width, width)
        self.readout = mup.MuSharedReadout(self.embed.weight)

    def forward(self, tokens):
        """(B,) -> (B, 16)."""
        x = self.embed(tokens)
        return self.readout(x + self.layer(x).relu())


@pytest.mark.slow
def test_a_readout_that_is_the_embedding_knows_the_token_it_read():
    """Its start is larger than that of a random one and falls by less than 1 / sqrt(width); it must only not grow."""

    def build(width, wrong=False):
        model = mup.set_base_shapes(Tied(width), Tied(64), delta=Tied(128))
        with torch.no_grad():
            model.embed.weight.mul_((width / 64) ** 0.5 if wrong else 1.0)
        return model

    rows = {}
    for wrong in (False, True):
        result = coord_check(
            partial(build, wrong=wrong),
            [64, 128, 256, 512],
            [torch.randint(0, 16, (64,), generator=torch.Generator().manual_seed(t)) for t in range(7)],
            lambda model, tokens: F.cross_entropy(model(tokens), (3 * tokens) % 16),
            lambda model: mup.MuAdam(model, lr=0.01),
            seeds=2,
            progress=False,
        )
        (rows[wrong],) = (row for row in result.arm.rows if row.quantity == "init" and row.kind.endswith("(readout)"))
        assert wrong or result.verdict is CheckVerdict.PASS, result.summary()
    assert -0.4 < rows[False].slope < 0 and rows[False].verdict is CheckVerdict.PASS and rows[False].predicted is None
    assert rows[True].verdict is CheckVerdict.FAIL


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_effects_are_those_of_the_plain_formulas(dtype):
    torch.manual_seed(0)
    model, tokens = Zoo(dtype=dtype), torch.randint(0, 5, (2, 7))
    observer = Observer(
        model, CheckSetup(None, [[]], lambda model, record: None, lambda model: {"turned": 10.0}, SlopeThresholds())
    )
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    observer.look(0, lambda: model(tokens))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p))
        delta = {name: p - start[name] for name, p in model.named_parameters()}
        x = model(tokens)[1]
        last = F.conv1d(x["kernel"].transpose(1, 2), model.kernel, padding=1).transpose(1, 2)
    observer.look(1, lambda: model(tokens))
    expected = {
        "table": F.embedding(tokens, delta["table"]),
        "table (readout)": F.linear(last, delta["table"]),
        **{f"stack[{i}]": F.linear(x["stack"], delta["stack"][i]) for i in range(3)},
        "turned": 10 * (x["turned"] @ delta["turned"]),
        "linear.weight": F.linear(x["linear"], delta["linear.weight"]),
        "linear.bias": delta["linear.bias"],
        "experts": torch.stack([x["experts"] @ matrix for matrix in delta["experts"]]),
        "kernel": F.conv1d(x["kernel"].transpose(1, 2), delta["kernel"], padding=1),
        "gain": delta["gain"],
    }
    found = {name: at[1] for (quantity, name), at in observer.found.values.items() if quantity == "effect"}
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        tolerance = 1e-5 if dtype is None or not name.startswith("stack") else 1e-2
        assert found[name] == pytest.approx(rms(value), rel=tolerance), name
    at_start = {name: at[0] for (quantity, name), at in observer.found.values.items() if quantity == "effect"}
    assert at_start["table"] == pytest.approx(rms(start["table"][tokens]), rel=1e-5)
    assert at_start["gain"] == pytest.approx(rms(start["gain"]), rel=1e-5)


def test_norms_are_those_of_the_singular_values():
    torch.manual_seed(0)
    spec = mup.ParamSpec(Role.HIDDEN, (2, 4, 6), (2, 12, 18), ("stack", "in", "out"))
    weight, moved, last = (torch.randn(2, 12, 18) for _ in range(3))
    values = norms(spec, weight, moved, last)
    scale = (12 / 18) ** 0.5
    assert values["norm"] == pytest.approx(scale * torch.linalg.matrix_norm(weight, ord=2).mean().item(), rel=0.05)
    assert values["update norm"] == pytest.approx(
        scale * torch.linalg.matrix_norm(moved, ord=2).mean().item(), rel=0.05
    )
    orthogonal = torch.linalg.qr(torch.randn(2, 18, 12))[0].mT
    assert norms(spec, weight, moved, orthogonal)["flatness"] == pytest.approx(1, rel=1e-4)
    assert values["flatness"] < 0.8


class Noisy(MLP):
    def forward(self, x):
        return super().forward(F.dropout(x, 0.5))


@pytest.mark.slow
def test_watching_does_not_change_training_nor_the_callers_random_state():
    batches = list(classification((FEATURES,)))
    torch.manual_seed(7)
    state = torch.get_rng_state()
    result = coord_check(Noisy, [64, 128, 256], batches, cross_entropy, train_with("adam"), seeds=1, progress=False)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(0)
    model = Noisy(128)
    optimizers, losses = train_with("adam")(model), []
    for batch in batches[:-1]:
        loss = cross_entropy(model, batch)
        loss.backward()
        losses.append(loss.item())
        for optimizer in optimizers:
            optimizer.step()
        model.zero_grad()
    (series,) = (series for series in result.arm.series if series.quantity == "loss")
    assert series.values[1, :-1] == pytest.approx(losses, rel=1e-12)


@pytest.mark.slow
def test_the_same_seed_gives_the_same_result():
    assert check_mlp(seeds=1).to_json() == check_mlp(seeds=1).to_json()


@pytest.mark.parametrize("exponent", [-1.0, 0.0, 0.5])
def test_a_planted_slope_is_found_where_all_widths_have_values(exponent):
    widths = (64, 128, 512)
    values = np.outer(np.array(widths) ** exponent, [1.0, 5.0, 2.0, 3.0])
    values[1, 0] = math.nan
    assert Series("effect", "w", Role.HIDDEN, values).slope(widths, slice(0, None)) == pytest.approx(exponent)
    assert Series("effect", "w", Role.HIDDEN, values).slope(widths, slice(0, 1)) is None


def test_kinds_and_thresholds():
    def kind(name, quantity="effect"):
        return Series(quantity, name, Role.HIDDEN, np.ones((3, 1))).kind

    assert kind("blocks.12.attn.qkv_w[2]") == "blocks.*.attn.qkv_w"
    assert kind("blocks.12.attn.qkv_w[2]", "activation") == "blocks.*.attn.qkv_w[2]"
    assert (
        kind("0.weight") == "0.weight"
        and kind("experts.3") == "experts.*"
        and kind("layer2.conv1.weight") == "layer2.conv1.weight"
    )
    judge = SlopeThresholds().judge
    assert [judge(x) for x in (0.15, -0.16, 0.3, -0.31)] == [
        CheckVerdict.PASS,
        CheckVerdict.WARN,
        CheckVerdict.WARN,
        CheckVerdict.FAIL,
    ]
    assert judge(math.nan) is judge(math.inf) is CheckVerdict.FAIL


# ---------------------------------------------------------------------------------------------------------------------
# When it cannot tell


@pytest.mark.slow
def test_a_control_that_does_not_fail_makes_it_inconclusive():
    blind = Control("same", MLP, train_with("adam"), role=Role.HIDDEN, slope=-1.0)
    result = check_mlp(controls=[blind])
    assert result.arm.verdict is not CheckVerdict.FAIL and result.verdict is CheckVerdict.INCONCLUSIVE
    assert (
        result.reasons == (result.reasons[0],)
        and "control same was not detected: its hidden updates" in result.reasons[0]
    )


@pytest.mark.slow
def test_without_controls_it_can_fail_but_not_pass():
    result = check_mlp(controls=[])
    assert result.verdict is CheckVerdict.INCONCLUSIVE and "no control was run" in result.reasons[0]


@pytest.mark.slow
def test_a_parameter_that_nobody_trains_makes_it_inconclusive():
    def forget_bias(model):
        return torch.optim.SGD([p for name, p in model.named_parameters() if name != "bias"], lr=0.1)

    result = coord_check(
        MLP, [64, 128, 256], classification((FEATURES,)), cross_entropy, forget_bias, progress=False, seeds=1
    )
    assert result.verdict is CheckVerdict.INCONCLUSIVE
    assert "bias did not move in 6 updates" in result.reasons
    frozen = coord_check(
        lambda width: freeze(MLP(width), "bias"),
        [64, 128, 256],
        classification((FEATURES,)),
        cross_entropy,
        forget_bias,
        progress=False,
        seeds=1,
    )
    assert not any("did not move" in reason for reason in frozen.reasons)  # frozen on purpose


def freeze(model, name):
    model.get_parameter(name).requires_grad_(False)
    return model


@pytest.mark.slow
def test_a_matrix_that_cannot_be_followed_makes_it_inconclusive():
    class Normed(MLP):
        def forward(self, x):
            x = F.relu(self.first(x) + self.bias) * self.gain
            for layer in self.hidden:
                x = F.relu(F.linear(x, F.normalize(layer.weight, dim=1)))
            return self.last(x)

    result = coord_check(
        Normed, [64, 128, 256], classification((FEATURES,)), cross_entropy, train_with("adam"), progress=False, seeds=1
    )
    assert result.verdict is CheckVerdict.INCONCLUSIVE
    assert any(reason.startswith("hidden.*.weight cannot be followed") for reason in result.reasons)


@pytest.mark.slow
def test_a_model_that_blows_up_fails():
    def loss(model, batch):
        width = model.bias.numel()
        return cross_entropy(model, batch) * (math.inf if width == 256 else 1.0)

    result = coord_check(
        MLP, [64, 128, 256], classification((FEATURES,)), loss, train_with("adam"), controls=[], progress=False, seeds=1
    )
    assert result.verdict is CheckVerdict.FAIL
    json.loads(result.to_json(), parse_constant=pytest.fail)
    assert "FAIL" in result.summary()


@pytest.mark.parametrize(
    "call, error, text",
    [
        (lambda: check_mlp(widths=(64, 128)), CoordCheckError, "at least 3 widths"),
        (lambda: check_mlp(widths=(64, 96, 128)), CoordCheckError, "4 times the narrowest"),
        (lambda: check_mlp(steps=0), CoordCheckError, "at least one step"),
        (
            lambda: coord_check(MLP, [8, 16, 32], [], cross_entropy, train_with("adam")),
            CoordCheckError,
            "data has no batch",
        ),
        (lambda: check_gpt(tokens=96), CoordCheckError, "tokens=96 is less than the widest width, 128"),
        (lambda: check_gpt(widths=(32, 64, 136)), ConfigError, "width=136 is not a multiple of head_dim=16"),
    ],
)
def test_impossible_wishes_are_refused_at_once_in_one_line(call, error, text):
    with pytest.raises(error, match=text) as fault:
        call()
    assert "\n" not in str(fault.value)


# ---------------------------------------------------------------------------------------------------------------------
# What it tells


@pytest.mark.slow
def test_summary_json_and_picture(gpt_result, tmp_path):
    text = gpt_result.summary()
    assert text.endswith("verdict: PASS")
    for part in ("blocks.*.attn.qkv_w", "lm_head.weight", "control head-sqrt", ": detected", "flatness"):
        assert part in text
    report = json.loads(gpt_result.to_json(), parse_constant=pytest.fail)
    assert report["verdict"] == "PASS" and report["reasons"] == []
    (row,) = (row for row in report["arm"]["rows"] if row["kind"] == "lm_head.weight" and row["quantity"] == "update")
    assert row["role"] == "output" and row["predicted"] == 0 and row["verdict"] == "PASS" and abs(row["slope"]) < 0.15
    assert len(report["controls"]) == 4 and report["controls"][0]["arm"]["widths"] == [32, 64, 128]
    for name in ("check.png", "again.png"):
        gpt_result.plot(tmp_path / name)
    assert (tmp_path / "check.png").read_bytes()[:4] == b"\x89PNG"
    assert (tmp_path / "check.png").read_bytes() == (tmp_path / "again.png").read_bytes()


def python_blocks():
    return re.findall(r"^```python\n(.*?)^```", (ROOT / "docs" / "coord-check.md").read_text(), re.M | re.S)


@pytest.mark.slow
def test_the_mlp_of_the_documentation_passes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(python_blocks()[0].replace("optimizer=", "progress=False, optimizer="), names)
    assert names["result"].verdict is CheckVerdict.PASS and (tmp_path / "mlp.png").exists()
    assert check_section(tmp_path / "mlp.json", 0).title == "Coordinate check: PASS"


def test_the_attention_of_the_documentation_is_torchs():
    torch.manual_seed(0)
    q, k, v, mask = *torch.randn(3, 2, 4, 5, 8), torch.ones(5, 5, dtype=torch.bool).tril()
    names = {"nn": nn, "math": math, "self": nn.Module(), "q": q, "k": k, "v": v, "scale": 0.3, "mask": mask}
    exec(python_blocks()[1], names)
    torch.testing.assert_close(names["y"], F.scaled_dot_product_attention(q, k, v, mask, scale=0.3))


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_the_gpt2_of_the_documentation_passes():
    pytest.importorskip("transformers")
    names = {}
    mlp, _, gpt2 = python_blocks()
    exec(
        mlp.split("\n\n\n")[0] + "\n" + gpt2.replace("optimizer=", "progress=False, optimizer="),
        names,
    )
    assert names["result"].verdict is CheckVerdict.PASS


# Depth


SHALLOW = {"width": 32, "base_width": 32, "head_dim": 16, "block_size": 16, "data": "synthetic", "base_layers": 2}


def depth_check(sizes=(2, 4, 8), controls=False, **changes):
    cfg = make_config("laptop", SHALLOW | changes)
    return gpt_coord_check(cfg, sizes, axis="n_layer", steps=4, tokens=64, controls=controls, progress=False)


@pytest.mark.slow
def test_along_depth_every_layer_learns_as_much_and_all_together_add_as_much():
    result = depth_check((4, 8, 16), controls=True, base_layers=4)
    assert result.verdict is CheckVerdict.PASS, result.summary()
    assert [(c.arm.name, c.seen) for c in result.controls] == [
        (name, True) for name in ("no-depth-rule", "branch-per-sqrt", "branch-too-small", "inner-rates-grow")
    ]
    for control in result.controls:
        assert control.slope == pytest.approx(control.predicted, abs=0.2)
    rows = {(row.quantity, row.kind): row for row in result.arm.rows}
    writes = rows["update", "blocks.*.mlp.c_proj.weight"]
    assert (writes.role, writes.predicted) == (DepthRole.WRITES, -1.0) and writes.slope == pytest.approx(-1, abs=0.15)
    assert rows["update", "blocks.skip_weights"].verdict is None and rows["stream", "stream"].predicted == 0.0
    told = json.loads(result.to_json())
    assert told["axis"] == "n_layer" and {"writes", "branch", None} <= {
        series["role"] for series in told["arm"]["series"]
    }
    told = result.summary()
    assert "numbers of layers 4, 8, 16" in told and "completep from 4 layers" in told and "what all layers add" in told


@pytest.mark.slow
@pytest.mark.parametrize(("rule", "off"), [("none", 1.0), ("hyperp", 0.0)])
def test_a_wrong_rule_for_depth_fails(rule, off):
    """Without a rule the stream is changed the more, the more layers there are; HyperP's layers learn less in deeper models."""
    result = depth_check(depth_rule=rule)
    assert result.verdict is CheckVerdict.FAIL
    assert result.arm.update_slope(DepthRole.WRITES) == pytest.approx(off, abs=0.3)
    assert result.arm.update_slope(DepthRole.BRANCH) == pytest.approx(-0.5 if rule == "hyperp" else 0.0, abs=0.15)
    stream = next(row for row in result.arm.rows if row.quantity == "stream")
    assert (stream.verdict is CheckVerdict.FAIL) == (rule == "none") and stream.slope > (
        0.3 if rule == "none" else -0.3
    )


def test_a_check_of_depth_is_asked_for_by_its_axis(tmp_path, capsys, monkeypatch):
    asked = []

    def check(cfg, sizes, **options):
        asked.append((cfg.depth_rule, cfg.base_layers, sizes, options["axis"]))
        raise CoordCheckError("asked")

    monkeypatch.setattr("speedrun_mup.coord_check.gpt_coord_check", check)
    for words in (["--axis", "n_layer", "--values", "4", "8,16"], ["--axis", "n_layer", "--base-layers", "12"], []):
        assert main(["coord-check", "--out", str(tmp_path), *words]) == 2
    assert asked == [
        ("completep", 6, [4, 8, 16], "n_layer"),
        ("completep", 12, [6, 12, 24], "n_layer"),
        ("none", None, [64, 128, 256, 512], "width"),
    ]
    capsys.readouterr()
    for words, fault in (
        (
            ["--widths", "64", "--axis", "width"],
            "--widths is short for --axis width --values; give the one or the other",
        ),
        (["--values", "6"], "--values are of an --axis: width or n_layer"),
        (["--axis", "n_layer", "--n-layer", "6"], "--n-layer is what is scaled; leave it out, or give --values"),
        (["--axis", "tokens"], "argument --axis: invalid choice: 'tokens'"),
    ):
        assert main(["coord-check", "--out", str(tmp_path), *words]) == 2
        told = capsys.readouterr().err
        assert fault in told and told.count("\n") == 1


def test_a_check_of_depth_without_a_base_or_with_too_few_sizes_is_refused():
    with pytest.raises(CoordCheckError, match="n_layer has no base: give the layers that the rates were tuned at"):
        depth_check(base_layers=None, depth_rule="none")
    says = r"numbers of layers=\[2, 4\].*give at least 3 numbers of layers, the deepest 4 times the shallowest"
    with pytest.raises(CoordCheckError, match=says):
        depth_check((2, 4))
