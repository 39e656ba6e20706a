"""MuonH and AdamH against numbers of the public program and a slow reference; their widths' rules, with controls."""

from __future__ import annotations

import pytest
import torch
from test_cautious import GOLDEN, SHAPES, close, start, steps
from test_optimizers import parameters
from torch import nn

from speedrun_mup.config import TrainConfig, make_config
from speedrun_mup.coord_check import CheckVerdict, gpt_coord_check
from speedrun_mup.core import mup
from speedrun_mup.core.errors import ConfigError
from speedrun_mup.core.model import GPT
from speedrun_mup.core.mup import PARAMETRIZATIONS, DepthRole, ParamSpec, Role, Update
from speedrun_mup.core.mup.depth_rules import DEPTH_RULES
from speedrun_mup.core.optimizers import OPTIMIZERS, newton_schulz_12, orthogonalize
from speedrun_mup.core.optimizers.hyperball import AdamH, MuonH
from speedrun_mup.sweep.arms import pick_arms
from speedrun_mup.training import train
from speedrun_mup.training.build import build_optimizers
from speedrun_mup.training.model_config import Vocabulary, model_config

CASES = [(kind, lr, shape) for kind in ("muonh", "adamh") for lr in (0.018, 0.1) for shape in SHAPES]


def after_three_steps(kind: str, lr: float, shape: str):
    parameter, gradients = start(shape, 0.05)
    before = parameter.detach().clone()
    return before, gradients, steps(OPTIMIZERS[kind]([{"params": [("p", parameter)], "lr": lr}]), gradients)


@pytest.mark.parametrize("kind, lr, shape", CASES)
def test_golden_steps(kind, lr, shape):
    before, _, after = after_three_steps(kind, lr, shape)
    movement = (after[-1] - before).norm().item()
    for got, expected in zip(after, GOLDEN["muonh"][f"{kind}_lr{str(lr)[1:]}"][shape], strict=True):
        close(got, expected, 6e-6 * movement)


@pytest.mark.parametrize("kind, lr, shape", CASES)
def test_steps_are_those_of_the_slow_reference(kind, lr, shape):
    """Written out in float64, with the polar factor by an SVD."""
    before, gradients, after = after_three_steps(kind, lr, shape)
    w = before.double()
    first, second = torch.zeros_like(w), torch.zeros_like(w)
    for t, gradient in enumerate(gradients, 1):
        g = gradient.double()
        if kind == "muonh":
            first = 0.95 * first + 0.05 * g
            x = orthogonalize((0.05 * g + 0.95 * first)[None])[0]
        else:
            first, second = 0.9 * first + 0.1 * g, 0.95 * second + 0.05 * g**2
            x = (first / (1 - 0.9**t)) / ((second / (1 - 0.95**t)) ** 0.5 + 1e-8)
        length = sum(entry**2 for row in w.tolist() for entry in row) ** 0.5
        w = w - lr * length * x / x.norm()
        w = w * length / w.norm()
    assert (after[-1].double() - w).norm() < (3e-3 if kind == "muonh" else 6e-6) * (w - before).norm()
    assert after[-1].norm().item() == pytest.approx(before.norm().item(), rel=1e-6)


@pytest.mark.parametrize("kind", [MuonH, AdamH])
def test_matrices_of_a_stack_keep_their_own_norms(kind):
    (stack,) = parameters([(3, 4, 6)])
    stack.data *= torch.tensor([0.1, 1.0, 10.0])[:, None, None]
    lengths = stack.detach().norm(dim=(1, 2))
    optimizer = kind([{"params": [("p", stack)], "lr": 0.3}])
    steps(optimizer, [torch.randn(3, 4, 6, generator=torch.Generator().manual_seed(t)) for t in range(2)])
    torch.testing.assert_close(stack.detach().norm(dim=(1, 2)), lengths)


def test_twelve_steps_orthogonalize():
    x = torch.randn(2, 48, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    torch.testing.assert_close(newton_schulz_12(x), orthogonalize(x), rtol=0, atol=1e-6)


def test_a_matrix_at_zero_is_refused_in_a_line():
    with pytest.raises(
        ConfigError, match="MuonH steers the norm of each matrix, and p begins at zero, so it would stay"
    ):
        MuonH([{"params": [("p", nn.Parameter(torch.stack([torch.ones(3, 3), torch.zeros(3, 3)])))]}])


def test_its_rate_and_first_values_come_with_its_name_unless_given():
    cfg = make_config("laptop", {"matrix_optimizer": "muonh"})
    assert (cfg.matrix_lr, cfg.hidden_init) == (0.018, "track3")
    given = make_config("laptop", {"matrix_optimizer": "muonh", "matrix_lr": 0.1, "hidden_init": "record26"})
    assert (given.matrix_lr, given.hidden_init) == (0.1, "record26")
    assert make_config("laptop", {"matrix_optimizer": "muon"}).hidden_init == "record26"
    (arm,) = pick_arms(["adamh-mup"])
    assert arm.settings["hidden_init"] == "track3" and arm.settings["matrix_lr"] == 0.018
    with pytest.raises(ConfigError, match="matrix_weight_decay has no effect on muonh; leave it out, or choose muon"):
        make_config("laptop", {"matrix_optimizer": "muonh", "matrix_weight_decay": 0.1})


def test_hidden_matrices_of_track_3_have_its_standard_deviations_at_every_width():
    cfg = make_config("laptop", {"width": 128, "base_width": 64, "hidden_init": "track3"})
    model = GPT(model_config(cfg, Vocabulary(257)))
    for name, factor, fan_in in (("attn.c_proj", 1.25, 128), ("mlp.c_fc", 1.5, 128), ("mlp.c_proj", 3.0, 512)):
        weight = model.get_parameter(f"blocks.2.{name}.weight")
        assert weight.std().item() == pytest.approx(factor * (0.33 / fan_in) ** 0.5, rel=0.03), name
    plain = GPT(model_config(TrainConfig(**{**vars(cfg), "hidden_init": "record26"}), Vocabulary(257)))
    assert torch.equal(plain.blocks[2].attn.qkv_w, model.blocks[2].attn.qkv_w)
    assert not plain.blocks[2].attn.c_proj.weight.any()


# How they scale


@pytest.mark.parametrize("kind, exponent", [(Update.RELATIVE_SPECTRAL, 0.0), (Update.RELATIVE_ENTRYWISE, -0.5)])
def test_the_table_scales_a_share_of_the_norm(kind, exponent):
    """The step itself, share times norm, is then as large as Muon's and Adam's: singular values alike, entries as 1 / m."""
    spec = ParamSpec(Role.HIDDEN, (16, 16), (64, 64), ("out", "in"))
    factors = spec.factors(PARAMETRIZATIONS["mup"], kind)
    assert factors.lr == pytest.approx(4**exponent)
    norm = factors.init * 4  # entries' std times the root of their number
    size = 4 if kind is Update.RELATIVE_ENTRYWISE else 2  # of a direction's norm: sqrt(in out), sqrt(in)
    absolute = Update.ENTRYWISE if kind is Update.RELATIVE_ENTRYWISE else Update.SPECTRAL
    assert factors.lr * norm / size == pytest.approx(spec.factors(PARAMETRIZATIONS["mup"], absolute).lr)
    with pytest.raises(mup.NoRuleError, match=f"a {kind.value} update must not own output parameters"):
        ParamSpec(Role.OUTPUT, (16, 16), (16, 64), ("out", "in")).factors(PARAMETRIZATIONS["mup"], kind)


@pytest.mark.parametrize("rule", DEPTH_RULES)
@pytest.mark.parametrize("role", [DepthRole.WRITES, DepthRole.BRANCH])
def test_what_scales_the_first_values_with_depth_scales_the_step_too(rule, role):
    exponents = DEPTH_RULES[rule].exponents(role)
    assert exponents.rate(True) + exponents.init == exponents.rate(False) == exponents.lr


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["muonh", "adamh"])
def test_a_run_learns_and_resumes_to_the_same_bits(tiny, optimizer):
    still = {"cooldown": 0.0, "window_tokens": 32, "iterations": 4, "matrix_optimizer": optimizer}
    whole, half = train(tiny(name="whole", **still)), train(tiny(name="half", **still | {"iterations": 2}))
    assert train(tiny(resume=str(half.folder), **still)).val_loss == whole.val_loss < 3.9


SMALL = {"data": "synthetic", "width": 32, "base_width": 32, "head_dim": 16, "block_size": 32, "parametrization": "mup"}


@pytest.mark.slow
@pytest.mark.parametrize("optimizer, control", [("muonh", "muonh-sqrt-m"), ("adamh", "adamh-constant")])
def test_the_coordinate_check_passes_and_its_control_fails(optimizer, control):
    cfg = make_config("laptop", SMALL | {"matrix_optimizer": optimizer})
    found = gpt_coord_check(cfg, widths=(32, 64, 128), tokens=192, progress=False, controls=False)
    assert found.verdict is not CheckVerdict.FAIL, found.summary()
    wrong = make_config("laptop", SMALL | {"matrix_optimizer": optimizer, "parametrization": control})
    broken = gpt_coord_check(wrong, widths=(32, 64, 128), tokens=192, progress=False, controls=False)
    assert broken.verdict is CheckVerdict.FAIL
    assert broken.arm.update_slope(Role.HIDDEN) - found.arm.update_slope(Role.HIDDEN) == pytest.approx(0.5, abs=0.15)


def test_its_state_is_built_for_every_hidden_matrix(tiny):
    cfg = tiny(matrix_optimizer="adamh")
    optimizers = build_optimizers(GPT(model_config(cfg, Vocabulary(65))), cfg, None)
    assert {type(optimizer).__name__ for optimizer in optimizers} == {"AdamH", "DistAdam"}
