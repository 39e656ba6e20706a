"""Techniques from outside the package: one class with its config and one entry of a registry.

It is XSA of the public program (record 82): what a head puts out loses its component along the token's own value. All that
works on models has to learn of it from what it declares.
"""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from contextlib import closing
from dataclasses import dataclass

import pytest
import torch
from test_model import batch, fill
from torch import nn

from speedrun_mup import config, techniques
from speedrun_mup.config import add_technique, make_config, settings, swept_settings
from speedrun_mup.coord_check import gpt_coord_check
from speedrun_mup.core import mup
from speedrun_mup.core.distributed import World
from speedrun_mup.core.errors import ConfigError
from speedrun_mup.core.model import GPT, MLP, Block, Head, HeadConfig, UNetConfig, rotary_table
from speedrun_mup.core.model.cache import Decoder
from speedrun_mup.core.mup import Role
from speedrun_mup.core.registry import resolve
from speedrun_mup.explain import explain
from speedrun_mup.param_groups import ParamGroup
from speedrun_mup.settings import NOT_NEGATIVE, setting
from speedrun_mup.techniques import TECHNIQUES, Technique
from speedrun_mup.training import train
from speedrun_mup.training.flops import weight_flops
from speedrun_mup.training.model_config import Vocabulary, model_config
from speedrun_mup.training.run import Run


@dataclass(frozen=True)
class WithoutOwnValue:
    def build(self, shape, layer):
        return LessOwnValue(shape) if not shape.has_long_window(layer) else None


class LessOwnValue(nn.Module):
    def __init__(self, shape):
        super().__init__()
        heads, base_heads = shape.width // shape.head_dim, shape.base_width // shape.head_dim
        self.alpha = nn.Parameter(torch.empty(heads))
        mup.declare(self, "alpha", Role.INPUT, (base_heads,), "out", group="xsa", init="zero", uses=2 * shape.head_dim)

    def forward(self, y, x, v):
        along = (y * v).sum(-1, keepdim=True) / v.square().sum(-1, keepdim=True).clamp(min=1e-8)
        return y - self.alpha.tanh()[:, None] * along * v


def without_own_value(cfg, wanted):
    return dataclasses.replace(cfg, attn=dataclasses.replace(cfg.attn, options=(*cfg.attn.options, WithoutOwnValue())))


@dataclass(frozen=True)
class MomentumCooldown:
    """Of record 89: back to where the warmup began."""

    steps: int
    end: float

    def __call__(self, step, now, schedule):
        left = (schedule.iterations - step) / self.steps
        return now if left >= 1 else now._replace(momentum=self.end + left * (now.momentum - self.end))


def with_momentum_cooldown(schedule, steps, momentum_end):
    return dataclasses.replace(schedule, options=(*schedule.options, MomentumCooldown(steps, momentum_end)))


class Straight(UNetConfig):
    """Another topology: layers one after the other."""

    def build(self, shape, attention):
        return StraightLayers(Block(attention(layer), MLP(shape)) for layer in range(shape.n_layer))


class StraightLayers(nn.ModuleList):
    def forward(self, x0, context):
        for block in self:
            x0 = block(x0, context)
        return x0


def with_wiring(cfg, name):
    return dataclasses.replace(cfg, wiring={"straight": Straight()}[name])


class PenalizedConfig(HeadConfig):
    def build(self, shape):
        return Penalized(shape)


class Penalized(Head):
    """Another loss: large logits cost something in training."""

    def loss(self, x, targets):
        return super().loss(x, targets) + 0.1 * self.logits(x).square().sum() / targets.numel()


def with_penalty(cfg, wanted):
    return dataclasses.replace(cfg, head=PenalizedConfig())


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    monkeypatch.setattr(config, "_in_force", config._in_force)  # forget them after the test
    mine = dict(TECHNIQUES)
    for module in (config, techniques):
        monkeypatch.setattr(module, "TECHNIQUES", mine)
    add_technique(
        "xsa",
        Technique(
            "remove the component along the own value",
            model=f"{__name__}:without_own_value",
            param_groups={"xsa": ParamGroup("how much of the own value is removed", lr=0.04, eps=1e-3)},
        ),
    )
    add_technique(
        "momentum_cooldown",
        Technique(
            "steps at the end over which Muon's momentum falls",
            0,
            schedule=with_momentum_cooldown,
            valid=(NOT_NEGATIVE,),
            settings={"momentum_end": setting("schedule", "where it falls to", 0.85, affects="result")},
        ),
    )
    add_technique(
        "wiring", Technique("how layers are connected", "unet", model=with_wiring, choices=("unet", "straight"))
    )
    add_technique("logit_penalty", Technique("keep logits small", model=with_penalty))


NEW = {
    f"blocks.{layer}.attn.options.0.alpha" for layer in (1, 2, 3)
}  # of 6 layers, 4 has no attention, 0 and 5 long windows


@pytest.mark.slow
def test_it_trains_checkpoints_and_resumes(tiny):
    still = {"cooldown": 0.0, "window_tokens": 32, "xsa": True}
    whole, half = train(tiny(name="whole", **still)), train(tiny(name="half", iterations=3, **still))
    assert train(tiny(resume=str(half.folder), **still)).val_loss == whole.val_loss
    assert train(tiny(name="plain", **still | {"xsa": False})).val_loss != whole.val_loss
    with closing(Run(tiny(resume=str(whole.folder), **still), World())) as run:
        trained = {name for name, p in run.model.named_parameters() if name.endswith("alpha") and p.all()}
    assert trained == NEW


def test_explain_and_flops_know_it():
    here = make_config("laptop", {"width": 256, "base_width": 64, "xsa": True})
    rows = {row.name: row for row in explain(here, 257) if row.name in NEW}
    assert rows.keys() == NEW
    for row in rows.values():
        assert (row.role, row.infshape, row.here.lr, row.here.init_std) == ("input", ((2, 8),), 0.04, 0)
    with_it, without = (
        weight_flops(model_config(dataclasses.replace(here, xsa=wanted), Vocabulary(257))) for wanted in (True, False)
    )
    assert with_it - without == 6 * 3 * 8 * 2 * 32


@pytest.mark.slow
def test_the_coordinate_check_judges_it():
    small = {
        "data": "synthetic",
        "width": 32,
        "base_width": 32,
        "parametrization": "mup",
        "head_dim": 16,
        "block_size": 32,
    }
    cfg = make_config("laptop", small | {"xsa": True})
    found = gpt_coord_check(cfg, widths=(32, 64, 128), steps=4, tokens=128, progress=False, controls=False)
    assert "blocks.*.attn.options.*.alpha" in {row.kind for row in found.arm.rows if row.quantity == "update"}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's compiler has some of its own
def test_it_compiles_into_one_graph_and_decodes_token_by_token(tiny):
    model = fill(GPT(model_config(tiny(xsa=True), Vocabulary(257, 256))))
    tokens, _ = batch(64)
    tokens[1:] = torch.where(tokens[1:] == 256, 0, tokens[1:])  # one document
    with torch.no_grad():
        expected = model.logits(tokens, 3)[-1]
        torch.testing.assert_close(Decoder(model, 3)(tokens[None])[0], expected, rtol=1e-4, atol=1e-4)
    stream = torch.compile(model.stream, backend="eager", fullgraph=True, dynamic=False)
    inputs = (tokens, torch.tensor(3, dtype=torch.int32), rotary_table(len(tokens), 16, tokens.device))
    torch.testing.assert_close(stream(*inputs), model.stream(*inputs))


@pytest.mark.slow
def test_a_schedule_is_a_technique_too(tiny):
    still = {"momentum": 0.95, "momentum_warmup": 0}
    cfg, plain = tiny(momentum_cooldown=2, momentum_end=0.5, **still), tiny(**still)
    before, after = ([each.schedule.at(step) for step in range(7)] for each in (plain, cfg))
    assert [now.momentum for now in after] == [0.95] * 5 + [0.725, 0.5]
    assert [now._replace(momentum=0.95) for now in after] == before
    assert cfg.schedule.tokens == plain.schedule.tokens
    assert train(cfg).val_loss != train(plain).val_loss


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{"wiring": "straight"}, {"logit_penalty": True}])
def test_another_wiring_or_loss_is_a_technique_too(changes, tiny):
    still = {"iterations": 2, "val_every": 0}
    here, plain = tiny(name="with", **still, **changes), tiny(name="plain", **still)
    assert train(here).val_loss != train(plain).val_loss
    both = [{row.name for row in explain(cfg, 257)} for cfg in (here, plain)]
    lacking = {"blocks.skip_weights", "blocks.x0_lambdas"} if "wiring" in changes else set()
    assert both[1] - both[0] == lacking
    with pytest.raises(ConfigError, match="wiring='dense' is not one of unet, straight"):
        tiny(wiring="dense")


def test_its_settings_have_no_effect_without_it_and_say_so():
    assert settings()["xsa"].group == "techniques" and {"xsa_lr", "gate_lr"} <= {*swept_settings()}
    for name, needs in (("xsa_lr", "xsa"), ("momentum_end", "momentum_cooldown"), ("gate_lr", "attention_gate")):
        with pytest.raises(ConfigError, match=f"{name} has no effect without {needs}; leave it out"):
            make_config("laptop", {name: 0.3})
        assert getattr(make_config("laptop", {name: 0.3, needs: 1}), name) == 0.3
    with pytest.raises(ConfigError, match="momentum_cooldown=-1 must be finite and at least 0"):
        make_config("laptop", {"momentum_cooldown": -1})
    with pytest.raises(ConfigError, match="setting xsa cannot be added: its name is taken"):
        add_technique("xsa", Technique("another", model=without_own_value))


@pytest.mark.slow
def test_every_technique_of_the_package_is_found_where_the_registry_says():
    for name, technique in techniques.TECHNIQUES.items():
        for place in (technique.model, technique.schedule):
            assert not isinstance(place, str) or not place or callable(resolve(place)), name
    code = "import sys, speedrun_mup.techniques, speedrun_mup.config; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"
