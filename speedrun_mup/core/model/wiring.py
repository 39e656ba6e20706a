"""Wiring: which layers there are, and how they are connected. Topologies do not compose, so a model has one.

T tokens, D width, L layers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from speedrun_mup.core import mup
from speedrun_mup.core.model.attention import Attention, Context
from speedrun_mup.core.model.layers import MLP, rms_norm
from speedrun_mup.core.model.shape import ModelShape
from speedrun_mup.core.mup import DepthRole, Init, Role


class Block(nn.Module):
    """One layer: attention, then the MLP; each reads the normed stream and adds to it."""

    def __init__(self, attn: Attention, mlp: MLP):
        super().__init__()
        self.attn = attn
        self.mlp = mlp

    def forward(self, x: Tensor, context: Context) -> Tensor:
        """(T, D) -> (T, D)."""
        x = x + self.attn(rms_norm(x), context)
        return x + self.mlp(rms_norm(x))


class BlockWithoutAttention(nn.Module):
    """A layer of which only the MLP is left (YouJiacheng, record 17)."""

    attn = None

    def __init__(self, mlp: MLP):
        super().__init__()
        self.mlp = mlp

    def forward(self, x: Tensor, context: Context) -> Tensor:
        """(T, D) -> (T, D)."""
        return x + self.mlp(rms_norm(x))


@dataclass(frozen=True)
class UNetConfig:
    """The record's wiring, see UNet."""

    def build(self, shape: ModelShape, attention: Callable[[int], Attention]) -> UNet:
        """The layers of a model of this shape. attention: makes that of a layer."""
        return UNet(
            shape,
            [
                BlockWithoutAttention(MLP(shape))
                if layer == shape.layer_without_attention
                else Block(attention(layer), MLP(shape))
                for layer in range(shape.n_layer)
            ],
        )


class UNet(nn.ModuleList):
    """Two halves: each layer of the second gets the output of its mirror image in the first; all get x0.

    Of an odd number of layers, the middle one belongs to neither half. skip_weights (L / 2,): of those outputs, for the
    layers of the second half in their order. x0_lambdas (L, 2): of the stream and of x0, the normed embedding, at the start
    of each layer.
    """

    def __init__(self, shape: ModelShape, blocks: list[nn.Module]):
        super().__init__(blocks)
        L = shape.n_layer
        self.skip_weights = nn.Parameter(torch.empty(L // 2))
        self.x0_lambdas = nn.Parameter(torch.empty(L, 2))
        one, own = Init(constant=(1.0,)), Init(constant=(1.0, 0.0))
        skip, stream = DepthRole.SKIP, DepthRole.STREAM
        mup.declare(self, "skip_weights", Role.SCALAR, (L // 2,), "layer", "scalar", init=one, depth=skip)
        mup.declare(self, "x0_lambdas", Role.SCALAR, (L, 2), "layer pair", "scalar", init=own, depth=stream)

    def forward(self, x0: Tensor, context: Context) -> Tensor:
        """x0 (T, D) -> the stream after the last layer, (T, D)."""
        layers = list(zip(self, self.x0_lambdas.unbind(), strict=True))
        half, second = len(layers) // 2, -(-len(layers) // 2)
        x = x0
        outputs: list[Tensor] = []
        for block, lambdas in layers[:second]:
            x = block(mix(lambdas, x, x0), context)
            outputs.append(x)
        del outputs[half:]
        for (block, lambdas), weight in zip(layers[second:], self.skip_weights.unbind(), strict=True):
            x = x + weight * outputs.pop()  # U-net skips: Brendan Hogan, record 11
            x = block(mix(lambdas, x, x0), context)
        return x


def mix(lambdas: Tensor, x: Tensor, x0: Tensor) -> Tensor:
    """lambdas[0] * x + lambdas[1] * x0: the shortcut from the embedding (Grad62304977 and Keller Jordan, record 9)."""
    own, first = lambdas.unbind()
    return own * x + first * x0
