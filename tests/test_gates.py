"""The sparse attention gate: the public program's numbers, its width rule with a control, and what it is without."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from test_golden import named
from test_model import batch, fill
from test_model import tiny as small_shape
from test_polar_express import GOLDEN, summary
from torch import Tensor
from torch.func import functional_call

from speedrun_mup.config import make_config
from speedrun_mup.coord_check import CheckVerdict, gpt_coord_check
from speedrun_mup.core import mup
from speedrun_mup.core.errors import ConfigError
from speedrun_mup.core.model import GPT, Context, GPTConfig, rotary_table
from speedrun_mup.core.model.attention import AttentionConfig, Dense
from speedrun_mup.core.model.options.gates import SparseGate, add_attention_gate
from speedrun_mup.core.model.values import OwnValue, ValueRows
from speedrun_mup.core.mup.rules import Exponents
from speedrun_mup.explain import explain
from speedrun_mup.training import train
from speedrun_mup.training.checkpoint import Loaded
from speedrun_mup.training.flops import weight_flops

T, D, HEAD = 64, 64, 16


def near(found: Tensor, expected: dict) -> None:
    """Within float32 of a golden summary: sums cancel, so their error is measured against the norm."""
    got = summary(found)
    assert got["norm"] == pytest.approx(expected["norm"], rel=1e-5)
    for key in ("sum", "probe"):
        assert got[key] == pytest.approx(expected[key], abs=1e-5 * expected["norm"] * found.numel() ** 0.5), key
    count = len(expected["first"])
    assert got["first"][:count] == pytest.approx(expected["first"], rel=1e-4, abs=1e-4)


@pytest.mark.parametrize("window", [24, 8])
def test_the_gate_and_its_gradients_are_the_public_programs(window):
    """The program's window counts tokens: blocks of one token, and the token itself, are the same."""
    leaves = {
        "attn.x": named("attn.x", torch.Size((T, D)), 1.0),
        "attn.qkvo": named("attn.qkvo", torch.Size((4 * D, D)), D**-0.5),
        "attn.gate": named("attn.gate", torch.Size((4, 12)), 0.3),
        "attn.sa": named("attn.sa", torch.Size((2,)), 0.1) + torch.tensor([0.5, 1.0]),
    }
    for leaf in leaves.values():
        leaf.requires_grad_()
    x, qkvo, gate, (s0, s1) = (leaves[f"attn.{name}"] for name in ("x", "qkvo", "gate", "sa"))
    shape = GPTConfig(97, 0, 6, D, D, HEAD, 1, attention="dense")
    layer = AttentionConfig(0.1, (SparseGate(),)).build(shape, 0, OwnValue(0))
    documents = torch.bucketize(torch.arange(T), torch.tensor([23, 40]), right=True)
    mask = Dense().build_mask(documents, window + 1, 1)
    values = ValueRows((torch.stack([s0, s0.detach()]),), ())
    weights = {
        "qkv_w": qkvo[: 3 * D].view(3, D, D),
        "c_proj.weight": s1 * qkvo[3 * D :],
        "options.0.weight": gate,
    }
    y = functional_call(layer, weights, (x, Context((mask, mask), rotary_table(T, HEAD, x.device), values)))
    golden = GOLDEN["attention_gate"][f"window{window}"]
    near(y, golden["out"])
    loss = (y * named("A4.y", torch.Size((1, T, D)), 1.0)[0]).sum()
    assert loss.item() == pytest.approx(golden["loss"], abs=1e-4)
    for name, grad in zip(leaves, torch.autograd.grad(loss, tuple(leaves.values())), strict=True):
        near(grad, golden["grad"][name])


def test_a_gate_begins_at_one_half_and_is_a_parameter_of_every_attention_layer():
    plain, gated = GPT(small_shape()), GPT(add_attention_gate(small_shape(), 12))
    new = dict(gated.named_parameters()).keys() - dict(plain.named_parameters()).keys()
    assert new == {f"blocks.{layer}.attn.options.0.weight" for layer in (0, 1, 2, 3, 5)}
    for name, parameter in plain.named_parameters():
        assert torch.equal(parameter, gated.get_parameter(name)), name
    fill(plain)
    gated.load_state_dict(plain.state_dict(), strict=False)
    tokens, _ = batch()
    with torch.no_grad():
        halved = gated.hidden(tokens, 3)
        for block in plain.blocks:
            if block.attn is not None:
                block.attn.c_proj.weight *= 0.5
        torch.testing.assert_close(halved, plain.hidden(tokens, 3))
        assert not torch.allclose(gated.hidden(tokens, 3), fill(gated).hidden(tokens, 3))


def test_flops_and_explain_know_of_the_gates():
    plain, gated = small_shape(), add_attention_gate(small_shape(), 12)
    assert weight_flops(gated) - weight_flops(plain) == 6 * 5 * 2 * 12  # layers with attention, heads, channels
    cfg = make_config("laptop", {"width": 256, "base_width": 64, "attention_gate": 12})
    rows = [row for row in explain(cfg, 257) if "options" in row.name]
    assert len(rows) == 5 and {row.role for row in rows} == {"input"}
    for row in rows:
        assert row.infshape == ((2, 8), (12, 12)) and row.optimizer == "adam"
        assert row.here.lr == row.base.lr == 0.008 and row.here.init_std == 0


def test_more_channels_than_the_width_are_an_error():
    with pytest.raises(ConfigError, match="attention_gate=33 is more than the width, 32; try 12"):
        GPT(add_attention_gate(small_shape(), 33))


@pytest.mark.slow
def test_a_run_with_gates_trains_them_and_resumes_to_the_same_bits(tiny):
    still = {"cooldown": 0.0, "window_tokens": 32, "attention_gate": 12}
    whole = train(tiny(name="whole", **still))
    half = train(tiny(name="half", iterations=3, **still))
    moments = [key for key in Loaded(half.folder / "checkpoints/step-00000003").optim_sizes if "options" in key]
    assert len(moments) == 2 * 5  # of the layers with attention
    assert train(tiny(resume=str(half.folder), **still)).val_loss == whole.val_loss
    assert train(tiny(name="plain", **still | {"attention_gate": 0})).val_loss != whole.val_loss


@pytest.mark.slow
def test_the_width_rule_of_gates_passes_the_coordinate_check_and_a_wrong_one_fails():
    """Input-like: a constant rate. The control's grows with the number of heads, and only the gates may show it."""
    small = {
        "data": "synthetic",
        "width": 32,
        "base_width": 32,
        "parametrization": "mup",
        "head_dim": 16,
        "block_size": 32,
    }
    cfg = make_config("laptop", small | {"attention_gate": 12})
    right = mup.PARAMETRIZATIONS["mup"]
    wrong = dataclasses.replace(right, lr_by_group={"gate": Exponents(fan_out=1.0)})
    slopes = []
    for table, expected in ((right, (CheckVerdict.PASS, CheckVerdict.WARN)), (wrong, (CheckVerdict.FAIL,))):
        found = gpt_coord_check(cfg, table=table, widths=(32, 64, 128), tokens=192, progress=False, controls=False)
        updates = {row.kind: row for row in found.arm.rows if row.quantity == "update"}
        gate = updates.pop("blocks.*.attn.options.*.weight")
        assert gate.verdict in expected and gate.predicted == 0
        assert CheckVerdict.FAIL not in [row.verdict for row in updates.values()], found.summary()
        slopes.append(gate.slope)
    assert slopes[1] - slopes[0] == pytest.approx(1, abs=0.1)
