"""Rules for depth: their numbers, the model that they make, and that a factor on a branch needs no forward pass of its own."""

import dataclasses
import types

import pytest
import torch
from torch import nn

from speedrun_mup.config import make_config
from speedrun_mup.core import mup
from speedrun_mup.core.errors import ConfigError
from speedrun_mup.core.model import GPT, GPTConfig, rms_norm
from speedrun_mup.core.model.wiring import BlockWithoutAttention, mix
from speedrun_mup.core.mup import DEPTH_RULES, PARAMETRIZATIONS, DepthRole, Role
from speedrun_mup.core.mup.depth_rules import depth_rule
from speedrun_mup.core.optimizers import DistAdam, Muon, Tuned, param_groups
from speedrun_mup.core.utils import generator
from speedrun_mup.scaling import rules_in_force
from speedrun_mup.training.model_config import Vocabulary, model_config

COMPLETEP = DEPTH_RULES["completep"]
TUNED = {group: Tuned("adam", 0.2, 0.1, 1e-8) for group in ("embed", "value_embed", "head", "scalar", "gate")}
TUNED["matrix"] = Tuned("muon", 0.05, 0.1)


def gpt(n_layer=6, base_layers=None, rule=COMPLETEP, table="mup") -> GPT:
    shape = {"vocab_size": 65, "bos_token": 64, "width": 32, "base_width": 16, "head_dim": 16, "block_size": 8}
    cfg = GPTConfig(**shape, n_layer=n_layer, base_layers=base_layers, depth_rule=rule, parametrization=table)
    return GPT(cfg, seed=1)


@pytest.mark.parametrize("rule", DEPTH_RULES.values(), ids=DEPTH_RULES)
def test_at_base_depth_a_rule_changes_no_bit(rule):
    plain, ruled = gpt(rule=DEPTH_RULES["none"]), gpt(base_layers=6, rule=rule)
    for name, parameter in ruled.named_parameters():
        assert torch.equal(parameter, plain.get_parameter(name)), name
    assert told(ruled) == told(plain)


def told(model, wanted=("lr", "eps", "weight_decay")):
    """{parameter: the values that its optimizer gets}."""
    groups = param_groups(model, model.cfg.rules, TUNED)
    return {
        group["params"][0][0]: tuple(group.get(key) for key in wanted) for some in groups.values() for group in some
    }


# Place of a parameter -> factors on start, rate and eps at four times the base depth.
FOURFOLD = {
    "none": dict.fromkeys(DepthRole, (1, 1, 1)),
    "completep": {
        DepthRole.OUTSIDE: (1, 1, 1),
        DepthRole.BRANCH: (1, 1, 1 / 4),
        DepthRole.WRITES: (1 / 4, 1 / 4, 1),
        DepthRole.SKIP: (1 / 4, 1 / 4, 1),
        DepthRole.STREAM: (1, 1 / 4, 1),
    },
    "hyperp": {
        DepthRole.OUTSIDE: (1, 1 / 2, 1),
        DepthRole.BRANCH: (1, 1 / 2, 1 / 2),
        DepthRole.WRITES: (1 / 2, 1 / 4, 1),
        DepthRole.SKIP: (1 / 4, 1 / 8, 1),
        DepthRole.STREAM: (1, 1 / 4, 1),
    },
}


@pytest.mark.parametrize("name", DEPTH_RULES)
@pytest.mark.parametrize("role", DepthRole)
def test_the_numbers_of_a_rule_at_four_times_the_base_depth(name, role):
    table = dataclasses.replace(PARAMETRIZATIONS["mup"], depth=DEPTH_RULES[name])
    spec = mup.ParamSpec(Role.HIDDEN, (8, 8), (8, 8), ("out", "in"), m_depth=4.0, depth=role)
    factors = spec.factors(table, "adam")
    assert (factors.init, factors.lr, factors.eps) == FOURFOLD[name][role]
    assert factors.lr * factors.weight_decay == 1  # the rule for weight decay is muP's: it does not feel the rate


def test_every_rule_says_where_it_is_from():
    assert all(rule.source and rule.grade in "ABC" for rule in DEPTH_RULES.values())


@pytest.mark.parametrize("table", ["mup", "record26"])
def test_what_writes_into_the_stream_is_weighed_by_depth_whatever_the_rule_for_width(table):
    shallow, deep = told(gpt(6, table=table)), told(gpt(12, 6, table=table))
    for name in ("blocks.0.attn.c_proj.weight", "blocks.5.mlp.c_proj.weight", "blocks.skip_weights"):
        lr, _, decay = deep[name]
        assert lr == pytest.approx(shallow[name][0] / 2)
        assert lr * decay == pytest.approx(shallow[name][0] * shallow[name][2]), name
    for name in ("blocks.0.attn.qkv_w", "blocks.5.mlp.c_fc.weight", "embed.weight", "lm_head.weight"):
        assert deep[name] == shallow[name]
    assert set(gpt(12, 6, table=table).blocks.skip_weights.tolist()) == {0.5}


class Written:
    """The forward pass with every factor of CompleteP written out: the reference of the rule, which has none there."""

    def __init__(self, model: GPT, factor: float):
        self.factor = factor
        for block in model.blocks:
            own = self.without_attention if isinstance(block, BlockWithoutAttention) else self.block
            block.forward = types.MethodType(own, block)
        model.blocks.forward = types.MethodType(self.unet, model.blocks)

    def block(self, block, x, context):
        x = x + self.factor * block.attn(rms_norm(x), context)
        return x + self.factor * block.mlp(rms_norm(x))

    def without_attention(self, block, x, context):
        return x + self.factor * block.mlp(rms_norm(x))

    def unet(self, blocks, x0, context):
        layers, outputs, x = list(zip(blocks, blocks.x0_lambdas)), [], x0
        half = len(layers) // 2
        for block, lambdas in layers[:half]:
            outputs.append(x := block(mix(lambdas, x, x0), context))
        for (block, lambdas), weight in zip(layers[half:], blocks.skip_weights):
            x = block(mix(lambdas, x + self.factor * weight * outputs.pop(), x0), context)
        return x


def losses(model: GPT, changed=lambda name, group: None, steps=4) -> list[float]:
    """Of some updates. changed: given every parameter's group."""
    groups = param_groups(model, model.cfg.rules, TUNED)
    for some in groups.values():
        for group in some:
            changed(group["params"][0][0], group)
    optimizers = [DistAdam(groups["adam"]), Muon(groups["muon"])]
    found = []
    tokens = torch.randint(0, 65, (65,), generator=generator(0, "tokens"))
    for _ in range(steps):
        loss = model(tokens[:-1].int(), tokens[1:], 2)
        model.zero_grad()
        loss.backward()
        found.append(loss.item() / 64)
        for optimizer in optimizers:
            optimizer.step()
    return found


@pytest.mark.slow
def test_the_rule_trains_the_model_with_written_out_factors():
    """1/m_depth on what is added to the stream is in starts and rates; eps follows the gradients, rates of x0 mixing fall."""

    def by_hand(name, group):
        if name.endswith("x0_lambdas"):
            group.update(lr=group["lr"] / 2, weight_decay=group["weight_decay"] * 2)
        if name.endswith("embeds.lambdas"):
            group["eps"] /= 2
        if name.endswith("skip_weights"):
            group["eps"] /= 2  # of the factor's derivative, which is half of that of the whole weight

    written = gpt(4, rule=DEPTH_RULES["none"])
    Written(written, 0.5)
    expected, ruled, unruled = losses(written, by_hand), losses(gpt(4, 2)), losses(gpt(4, rule=DEPTH_RULES["none"]))
    assert ruled == pytest.approx(expected, rel=1e-5)
    assert unruled != pytest.approx(expected, rel=1e-2)


def test_the_share_of_layers_with_value_embeddings_is_that_of_the_base():
    """Else what they add would fade as layers and their factors are added. Without base layers, or below, nothing changes."""

    def pattern(n_layer, base_layers=None):
        shape = GPTConfig(n_layer=n_layer, base_layers=base_layers)
        found = [shape.value_embed_of(layer) for layer in range(n_layer)]
        return "".join("." if which is None else str(which) for which in found)

    assert pattern(12) == pattern(12, 12) == "012......012"
    assert pattern(24, 12) == "001122............001122" and pattern(24, 6) == "000011112222" * 2
    assert pattern(24) == pattern(24, 24) == "012" + 18 * "." + "012"
    assert pattern(6, 12) == "012012" and pattern(7, 6) == "012.012" and pattern(10, 6) == "0011200112"
    for n_layer in (5, 7, 9, 18, 31):
        for base in (2, 5, 6, 12):
            shape = GPTConfig(n_layer=n_layer, base_layers=base)
            used = [shape.value_embed_of(layer) for layer in range(n_layer)]
            assert {*used} - {None} == {*range(shape.value_embeds)}  # none of them is idle


def test_the_first_values_of_what_adds_to_the_stream_fall_with_depth():
    module = nn.Module()
    module.last = nn.Parameter(torch.empty(16, 16))
    mup.declare(module, "last", Role.HIDDEN, (16, 16), "out in", init="unit", depth=DepthRole.WRITES)
    starts = []
    for m_depth in (1.0, 4.0):
        mup.set_depth(module, m_depth)
        mup.init_parameters(module, mup.mup(), seed=0)
        starts.append(module.last.detach().clone())
    torch.testing.assert_close(starts[1], starts[0] / 4)


ASKED = {  # flags -> depth rule and base layers, of (laptop, record26)
    (): (("none", None), ("none", None)),
    (("n_layer", 24),): (("none", None), ("none", None)),
    (("base_layers", 8),): (("completep", 8), ("completep", 8)),
    (("depth_rule", "hyperp"),): (("hyperp", 6), ("hyperp", 12)),
    (("depth_rule", "none"),): (("none", None), ("none", None)),
    (("depth_rule", "none"), ("base_layers", 6)): (("none", 6), ("none", 6)),
}


@pytest.mark.parametrize("asked", ASKED)
def test_base_layers_or_a_rule_switch_depth_on(asked):
    made = [make_config(preset, dict(asked)) for preset in ("laptop", "record26")]
    assert tuple((cfg.depth_rule, cfg.base_layers) for cfg in made) == ASKED[asked]
    assert [f"depth: {cfg.depth_rule} from" in rules_in_force(cfg) for cfg in made] == [bool(made[0].base_layers)] * 2


def test_exponents_of_the_user_s_own():
    asked = {"base_layers": 6, "n_layer": 12, "depth_branch_exponent": -0.5, "depth_lr_exponent": 0.25}
    shape = model_config(make_config("laptop", asked), Vocabulary(65))
    assert shape.m_depth == 2 and (shape.depth_rule.branch, shape.depth_rule.lr) == (-0.5, 0.25)
    assert shape.depth_rule.skip == COMPLETEP.skip
    with pytest.raises(ConfigError, match="depth_branch_exponent has no effect without base_layers"):
        make_config("laptop", {"depth_branch_exponent": -0.5})
    with pytest.raises(ConfigError, match="depth_lr_exponent=nan must be"):
        make_config("laptop", {"base_layers": 6, "depth_lr_exponent": float("nan")})


def test_an_unknown_rule_is_refused():
    with pytest.raises(ConfigError, match="depth_rule='mu' is unknown; choose none, completep, hyperp"):
        depth_rule("mu")
    with pytest.raises(ConfigError, match="depth_rule='mu' is not one of none, completep, hyperp"):
        make_config("laptop", {"depth_rule": "mu"})
