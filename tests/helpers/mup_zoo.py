"""A small model with every kind of parameter, and what the tests of the muP library do with it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from speedrun_mup.core import mup

V = 11


class Tiny(nn.Module):
    """tokens (B, T) -> logits (B, T, V): embedding, three stacked matrices, two linear layers, norm, gate, readout."""

    def __init__(self, width: int, base_width: int = 8, tied: bool = False):
        super().__init__()
        self.embed = nn.Embedding(V, width)
        self.qkv = nn.Parameter(torch.randn(3, width, width) * width**-0.5)
        mup.declare(self, "qkv", mup.Role.HIDDEN, (3, base_width, base_width), "3 out in")
        self.fc = nn.Linear(width, 4 * width)
        self.proj = nn.Linear(4 * width, width)
        self.norm = nn.LayerNorm(width)
        self.gate = nn.Parameter(torch.ones(2))
        self.readout = mup.MuSharedReadout(self.embed.weight) if tied else mup.MuReadout(width, V)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        q, k, v = torch.einsum("btd,ned->nbte", self.norm(x), self.qkv)
        x = x + self.gate[0] * torch.tanh(q * k) * v
        x = x + self.gate[1] * self.proj(self.fc(self.norm(x)).relu())
        return self.readout(x)


def tiny(width: int = 32, **kwargs: bool) -> Tiny:
    """Tiny at width 32 over base width 8, so that m = 4."""
    torch.manual_seed(0)
    return mup.set_base_shapes(Tiny(width, **kwargs), Tiny(8, **kwargs), delta=Tiny(16, **kwargs))


def tokens() -> Tensor:
    return torch.randint(V, (2, 5), generator=torch.Generator().manual_seed(3))


def loss_of(model: nn.Module) -> Tensor:
    return F.cross_entropy(model(tokens()).flatten(0, 1), tokens().roll(1, 1).flatten())


def learning_rates(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, float]:
    """{parameter name: learning rate} that the optimizer will use."""
    names = {id(p): name.removeprefix("module.").removeprefix("_orig_mod.") for name, p in model.named_parameters()}
    return {names[id(p)]: float(g["lr"]) for g in optimizer.param_groups for p in g["params"]}


# Adam learning rates of Tiny at m = 4, for lr = 1
ADAM = {
    "embed.weight": 1.0,
    "qkv": 0.25,
    "fc.weight": 0.25,
    "fc.bias": 1.0,
    "proj.weight": 0.25,
    "proj.bias": 1.0,
    "norm.weight": 1.0,
    "norm.bias": 1.0,
    "gate": 1.0,
    "readout.weight": 1.0,
    "readout.bias": 1.0,
}
# and of SGD
SGD = {name: 1.0 for name in ADAM} | {
    name: 4.0 for name in ("embed.weight", "fc.bias", "proj.bias", "norm.weight", "norm.bias", "readout.weight")
}
