"""An architecture technique from outside the package: one class with its config, one setting, one line of a registry.

It is XSA of the public program (record 82): what a head puts out loses its component along the token's own value. All that
works on models has to learn of it from what it declares.
"""

from __future__ import annotations

import dataclasses
from contextlib import closing
from dataclasses import dataclass

import pytest
import torch
from test_model import batch, fill
from torch import nn

from speedrun_mup import config
from speedrun_mup.config import add_setting, make_config
from speedrun_mup.coord_check import gpt_coord_check
from speedrun_mup.core import mup
from speedrun_mup.core.distributed import World
from speedrun_mup.core.model import GPT, rotary_table
from speedrun_mup.core.model.cache import Decoder
from speedrun_mup.core.model.options import TECHNIQUES
from speedrun_mup.core.mup import Role
from speedrun_mup.explain import explain
from speedrun_mup.settings import setting
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
        mup.declare(
            self, "alpha", Role.INPUT, (base_heads,), "out", group="scalar", init="zero", uses=2 * shape.head_dim
        )

    def forward(self, y, x, v):
        along = (y * v).sum(-1, keepdim=True) / v.square().sum(-1, keepdim=True).clamp(min=1e-8)
        return y - self.alpha.tanh()[:, None] * along * v


def without_own_value(cfg, wanted):
    return dataclasses.replace(cfg, attn=dataclasses.replace(cfg.attn, options=(*cfg.attn.options, WithoutOwnValue())))


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    monkeypatch.setattr(config, "_in_force", config._in_force)  # forget it after the test
    monkeypatch.setitem(TECHNIQUES, "xsa", without_own_value)
    add_setting("xsa", bool, setting("model", "remove the component along the own value", False, affects="result"))


NEW = {
    f"blocks.{layer}.attn.options.0.alpha" for layer in (1, 2, 3)
}  # of 6 layers, 4 has no attention, 0 and 5 long windows


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
        assert (row.role, row.infshape, row.here.lr, row.here.init_std) == ("input", ((2, 8),), here.scalar_lr, 0)
    with_it, without = (
        weight_flops(model_config(dataclasses.replace(here, xsa=wanted), Vocabulary(257))) for wanted in (True, False)
    )
    assert with_it - without == 6 * 3 * 8 * 2 * 32


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
