"""Sparse attention gate: each head's output times a sigmoid of a few channels of the layer's input.

ClassicLarry, record 28: about 50 steps fewer at slightly slower steps. T tokens, D width, H heads, C head_dim.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from speedrun_mup.core import mup
from speedrun_mup.core.errors import ConfigError
from speedrun_mup.core.model.gpt import GPTConfig
from speedrun_mup.core.model.shape import ModelShape
from speedrun_mup.core.mup import DepthRole, Role


@dataclass(frozen=True)
class SparseGate:
    """channels: how many of the normed stream it reads. 12 since record 30, at every width: a gate is input-like."""

    channels: int = 12

    def build(self, shape: ModelShape, layer: int) -> HeadGate:
        """The gate of one layer."""
        if self.channels > shape.width:
            raise ConfigError(f"attention_gate={self.channels} is more than the width, {shape.width}; try 12")
        return HeadGate(self.channels, shape)


class HeadGate(nn.Module):
    """y_h * sigmoid(sum over c of weight[h, c] * x_c), which begins at one half."""

    def __init__(self, channels: int, shape: ModelShape):
        super().__init__()
        heads, base_heads = shape.width // shape.head_dim, shape.base_width // shape.head_dim
        self.weight = nn.Parameter(torch.empty(heads, channels))
        mup.declare(
            self,
            "weight",
            Role.INPUT,
            (base_heads, channels),
            "out in",
            "gate",
            init="zero",
            uses=1,
            depth=DepthRole.BRANCH,
        )

    def forward(self, y: Tensor, x: Tensor, v: Tensor) -> Tensor:
        """The heads' outputs y (T, H, C), the layer's normed input x (T, D), values v (T, H, C) -> (T, H, C)."""
        gate = F.linear(x[:, : self.weight.size(1)], self.weight.type_as(x)).sigmoid()  # (T, H)
        return y * gate[..., None]


def add_attention_gate(cfg: GPTConfig, channels: int) -> GPTConfig:
    """`cfg` with a gate in every attention layer, the last of what changes the heads' outputs."""
    return replace(cfg, attn=replace(cfg.attn, options=(*cfg.attn.options, SparseGate(channels))))
