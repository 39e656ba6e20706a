"""The known ways to get muP wrong, a test each; docs/pitfalls.md lists them."""

import copy
import dataclasses
import re
from contextlib import closing
from pathlib import Path

import pytest
import torch
from torch import nn

from speedrun_mup.coord_check import CheckVerdict, gpt_coord_check
from speedrun_mup.core import mup
from speedrun_mup.core.model import GPT, GPTConfig, softcap_cross_entropy
from speedrun_mup.core.model.options.gates import add_attention_gate
from speedrun_mup.core.mup import PARAMETRIZATIONS, Exponents, Role, named_specs
from speedrun_mup.core.optimizers import DistAdam, Muon, Tuned, param_groups
from speedrun_mup.core.utils import World
from speedrun_mup.training.build import tuned_values
from speedrun_mup.training.run import Run
from speedrun_mup.transfer import Point, measure_transfer

SHAPE = {"vocab_size": 65, "bos_token": 64, "n_layer": 6, "head_dim": 16, "block_size": 32}
TUNED = {group: Tuned("adam", 0.1, eps=1e-10) for group in ("embed", "value_embed", "head", "scalar")} | {
    "matrix": Tuned("muon", 0.05)
}


def gpt(width=64, base_width=16, parametrization="mup", seed=0):
    return GPT(GPTConfig(width=width, base_width=base_width, parametrization=parametrization, **SHAPE), seed)


def lively(width=64, base_width=16):
    """A GPT whose zero-initialised parts are not zero, so that its logits say something."""
    model = gpt(width, base_width)
    rng = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=rng))
    return model


TOKENS = torch.randint(0, 64, (65,), generator=torch.Generator().manual_seed(1))
INPUTS, TARGETS = TOKENS[:-1].int(), TOKENS[1:]


def check(cfg, table=None, **options):
    options = {"widths": (32, 64, 128), "seeds": 1, "tokens": 256, "controls": False, "progress": False} | options
    return gpt_coord_check(cfg, table=table, **options)


@pytest.fixture
def small(tiny):
    return tiny(base_width=32, width=32, window_tokens=64, micro_batch_tokens=256)


@pytest.mark.slow
@pytest.mark.parametrize("head, slope", [(0.5, 0.5), (2.0, -1.0)])
def test_head_corrected_by_half_or_twice(small, head, slope):
    result = check(small, mup.mup(head=head))
    assert result.verdict is CheckVerdict.FAIL
    assert result.arm.update_slope(Role.OUTPUT) == pytest.approx(slope, abs=0.25)


def test_the_head_s_multiplier_is_in_every_path():
    model = lively()  # m = 4
    logits = model.logits(INPUTS, 2)
    expected = nn.functional.cross_entropy(logits, TARGETS, reduction="sum")
    torch.testing.assert_close(model(INPUTS, TARGETS, 2), expected)  # training
    with torch.no_grad():
        torch.testing.assert_close(model(INPUTS, TARGETS, 2), expected)  # evaluation
        torch.testing.assert_close(model.logits(INPUTS[:32], 2)[-1], logits[31])  # generation: a prefix's next token
    hidden = model.hidden(INPUTS, 2)
    torch.testing.assert_close(
        softcap_cross_entropy(hidden, model.lm_head.weight, TARGETS, model.logit_scale), expected
    )
    assert model.logit_scale == pytest.approx(1 / (7.5 * 16**0.5 * 4))


@pytest.mark.slow
@pytest.mark.parametrize("table, slope", [("muon-over-m", -1.0), ("muon-sqrt-m", 0.5)])
def test_muon_with_a_factor_that_it_does_not_need(small, table, slope):
    result = check(small, PARAMETRIZATIONS[table])
    assert result.verdict is CheckVerdict.FAIL
    assert result.arm.update_slope(Role.HIDDEN) == pytest.approx(slope, abs=0.25)


@pytest.mark.parametrize("name", PARAMETRIZATIONS)
def test_every_table_is_the_identity_at_base_width(name):
    for _, _, spec in named_specs(gpt(16, 16)):
        for optimizer in ("adam", "sgd", *(["muon"] if spec.role is Role.HIDDEN else [])):
            assert spec.factors(PARAMETRIZATIONS[name], optimizer) == mup.Multipliers(1.0, 1.0, 1.0, 1.0, 1.0)


@pytest.mark.slow
def test_two_steps_are_too_few_to_see_zero_initialised_layers_move(small):
    assert check(small, steps=2).verdict is CheckVerdict.INCONCLUSIVE


def test_fused_and_transposed_layouts():
    specs = {name: spec for name, _, spec in named_specs(gpt())}
    qkv = specs["blocks.0.attn.qkv_w"]
    assert (qkv.m_in, qkv.m_out) == (4, 4) and qkv.factors(PARAMETRIZATIONS["mup"], "sgd").lr == 1
    module = nn.Module()
    module.w = nn.Parameter(torch.zeros(64, 256))
    plain = mup.declare(module, "w", Role.HIDDEN, (16, 32), "out in")
    module.w = nn.Parameter(torch.zeros(256, 64))
    turned = mup.declare(module, "w", Role.HIDDEN, (32, 16), "in out")
    assert (plain.m_in, plain.m_out) == (turned.m_in, turned.m_out) == (8, 4)


def test_multipliers_survive_copies_and_are_never_guessed():
    model = gpt()
    before = param_groups(model, model.cfg.rules, TUNED)
    after = param_groups(copy.deepcopy(model), model.cfg.rules, TUNED)
    assert [g["lr"] for g in before["adam"]] == [g["lr"] for g in after["adam"]]
    model.extra = nn.Parameter(torch.zeros(4))
    with pytest.raises(mup.UndeclaredParameterError, match="extra"):
        param_groups(model, model.cfg.rules, TUNED)


def test_parameters_of_one_shape_keep_their_own_learning_rates():
    model = gpt()
    tuned = TUNED | {"embed": Tuned("adam", 0.3), "head": Tuned("adam", 0.2)}
    adam = DistAdam(param_groups(model, model.cfg.rules, tuned)["adam"])
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for _, parameter, _ in adam.named_groups():
        parameter.grad = torch.ones_like(parameter)
    adam.step()
    moved = {name: (before[name] - p).abs().max().item() for name, p in model.named_parameters()}
    assert moved["embed.weight"] == pytest.approx(0.3, rel=1e-4) and moved["lm_head.weight"] == pytest.approx(
        0.2, rel=1e-4
    )


def test_the_schedule_keeps_ratios_of_scaled_learning_rates(tiny):
    with closing(Run(tiny(matrix_optimizer="adam"), World())) as run:
        rates = [[g["lr"] for o in run.optimizers for g in o.param_groups]]
        run.set_schedule(step=5)
        rates.append([g["lr"] for o in run.optimizers for g in o.param_groups])
    factors = {after / before for before, after in zip(*rates)}
    assert max(factors) == pytest.approx(min(factors)) and max(factors) < 1


@pytest.mark.parametrize("width", [16, 64])
def test_decay_per_step_is_what_was_tuned_at_every_width(width):
    model = gpt(width)
    tuned = {group: dataclasses.replace(value, optimizer="adam", weight_decay=0.5) for group, value in TUNED.items()}
    adam = DistAdam(param_groups(model, model.cfg.rules, tuned)["adam"])
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for _, parameter, _ in adam.named_groups():
        parameter.grad = torch.zeros_like(parameter)
    adam.step()
    for name, parameter, spec in named_specs(model):
        shrink = 1 - tuned[spec.group].lr * 0.5  # independent of width: lr * weight_decay is kept
        torch.testing.assert_close(parameter.detach(), before[name] * shrink)


@pytest.mark.slow
def test_eps_does_not_bind_at_any_width(tiny):
    for width in (32, 128):
        with closing(Run(tiny(name=f"w{width}", width=width, matrix_optimizer="adam", iterations=8), World())) as run:
            run.train()
            moments = run.optimizers[0].slices()
            for name, _, group in run.optimizers[0].named_groups():
                if not name.endswith(("lambdas", "skip_weights")):  # their eps is there to bind on noise
                    second = moments[f"{name}/exp_avg_sq"].tensor.sqrt()
                    touched = second > 0
                    assert (second[touched] < 10 * group["eps"]).float().mean() < 1e-3, name


def test_base_shapes_in_which_nothing_grows_are_refused(tmp_path):
    def mlp(width):
        return nn.Sequential(
            nn.Linear(8, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), mup.MuReadout(width, 4)
        )

    model = mup.set_base_shapes(mlp(64), mlp(16), delta=mlp(32))
    assert [spec.role for _, _, spec in named_specs(model)].count(Role.HIDDEN) == 1
    with pytest.raises(mup.BaseShapeError, match="delta"):
        mup.set_base_shapes(mlp(16), mlp(16), savefile=tmp_path / "x.bsh")


def test_another_vocabulary_is_refused():
    def model(width, vocab):
        return nn.Sequential(nn.Embedding(vocab, width), nn.Linear(width, width), mup.MuReadout(width, vocab))

    with pytest.raises(mup.BaseShapeError):
        mup.set_base_shapes(model(64, 32), model(16, 50), delta=model(32, 50))


def test_small_gates_and_gains_are_not_hidden():
    class Gated(nn.Module):
        def __init__(self, width):
            super().__init__()
            self.gate = nn.Parameter(torch.zeros(width // 16, 12))  # heads x 12: only one side grows
            self.gain = nn.Parameter(torch.ones(width))
            self.bias = nn.Parameter(torch.zeros(12))
            mup.declare(
                self, "gate", Role.INPUT, (1, 12), "out in"
            )  # a bare matrix does not tell which side is read from

    specs = {name: spec for name, _, spec in named_specs(mup.set_base_shapes(Gated(64), Gated(16), delta=Gated(32)))}
    adam = {name: spec.factors(PARAMETRIZATIONS["mup"], "adam").lr for name, spec in specs.items()}
    assert adam == {"gate": 1.0, "gain": 1.0, "bias": 1.0}


def test_a_changed_aspect_ratio_changes_muon_s_rate():
    module = nn.Module()
    module.wide = nn.Parameter(torch.zeros(64, 16 * 64))  # four times the base's MLP ratio
    mup.declare(module, "wide", Role.HIDDEN, (16, 4 * 16), "out in", "matrix")
    group = param_groups(module, PARAMETRIZATIONS["mup"], TUNED)["muon"][0]
    assert group["lr"] == pytest.approx(0.05 * (4 / 16) ** 0.5)  # sqrt(m_out / m_in)


def test_the_pattern_of_layers_is_relative():
    for layers in (6, 8, 12, 24):
        cfg = GPTConfig(**SHAPE | {"n_layer": layers}, width=16, base_width=16)
        long = [layer for layer in range(layers) if cfg.has_long_window(layer)]
        assert long == sorted(layers - 1 - layer for layer in long) and long[0] == 0
        assert [cfg.value_embed_of(layer) for layer in (0, 1, 2, -3, -2, -1) if layer >= 0] == [0, 1, 2]
        assert [cfg.value_embed_of(layers + layer) for layer in (-3, -2, -1)] == [0, 1, 2]


def test_only_width_differs_between_the_runs_of_an_arm(tiny):
    narrow, wide = tiny(width=32, base_width=32), tiny(width=128, base_width=32)
    assert {f.name for f in dataclasses.fields(narrow) if getattr(narrow, f.name) != getattr(wide, f.name)} == {"width"}
    assert wide.schedule.at(0).tokens >= wide.width  # fewer tokens than width would leave Muon's update short of rank


def test_bf16_embeddings_still_move_at_the_end_of_training():
    """Learning rate 0.06 at the floor on entries of size 10 is above bfloat16's half ulp, at any width (exponent 0)."""
    for base_width in (16, 64):
        model = gpt(64, base_width)
        group = next(
            g for g in param_groups(model, model.cfg.rules, TUNED)["adam"] if g["params"][0][0] == "embed.weight"
        )
        assert group["lr"] == 0.1  # no factor of m
    entries = torch.full((1000,), 10.0, dtype=torch.bfloat16)
    assert ((entries - 0.06) != entries).all() and ((entries - 0.06 / 4) == entries).all()


@pytest.mark.parametrize("drift, verdict", [(0.0, "PASS"), (-0.5, "FAIL"), (1.0, "FAIL")])
def test_transfer_is_a_measured_drift_not_an_argmin(drift, verdict):
    rng = torch.Generator().manual_seed(0)
    runs = [
        Point(
            {"width": width},
            2.0**k,
            seed,
            3 + 0.02 * (k - drift * i) ** 2 + 0.002 * torch.randn((), generator=rng).item(),
        )
        for i, width in enumerate((64, 128, 256))
        for k in range(-4, 5)
        for seed in range(3)
    ]
    assert str(measure_transfer(runs, resamples=300).arms["runs"].verdict) == verdict


def test_an_optimum_on_the_edge_proves_nothing():
    rng = torch.Generator().manual_seed(0)
    runs = [
        Point({"width": w}, 2.0**k, s, 3.0 - 0.1 * k + 0.002 * torch.randn((), generator=rng).item())
        for w in (64, 128, 256)
        for k in range(-2, 3)
        for s in range(2)
    ]
    assert str(measure_transfer(runs, resamples=300).verdict) == "INCONCLUSIVE"


def test_a_checkpoint_is_not_rescaled_again():
    def model(width):
        return nn.Sequential(nn.Linear(8, width), mup.MuReadout(width, 4))

    first = mup.set_base_shapes(model(64), model(16), delta=model(32))
    second = mup.set_base_shapes(model(64), model(16), delta=model(32))
    second.load_state_dict(first.state_dict())
    mup.set_base_shapes(second, model(16), delta=model(32), rescale_params=False)
    x = torch.randn(3, 8)
    torch.testing.assert_close(first(x), second(x), rtol=0, atol=0)


def test_tuned_values_cover_every_group_of_the_model(tiny):
    """With all techniques of later records; without them there is none that has no values."""
    plain, everything = gpt(), GPT(add_attention_gate(gpt().cfg, 12))
    groups, all_groups = ({spec.group for _, _, spec in named_specs(model)} for model in (plain, everything))
    assert groups < all_groups == set(tuned_values(tiny()))
    assert Exponents(1, 0)(2, 3) == 2 and Exponents(0, -1)(2, 4) == 0.25
    assert isinstance(Muon(param_groups(gpt(), PARAMETRIZATIONS["mup"], TUNED)["muon"]), Muon)


def test_the_page_lists_every_pitfall_that_is_tested_here():
    page = (Path(__file__).parent.parent / "docs" / "pitfalls.md").read_text()
    listed = set(re.findall(r"`(test_\w+)`", page))
    tested = {name for name in globals() if name.startswith("test_")}
    assert listed == tested - {"test_tuned_values_cover_every_group_of_the_model"} - {
        "test_the_page_lists_every_pitfall_that_is_tested_here"
    }
