"""Values: embeddings of tokens that are added to attention's values (KoszarskyB, record 14, after Zhou et al. 2024).

T tokens, D width, H heads, C head_dim, L layers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from speedrun_mup.core import mup
from speedrun_mup.core.model.layers import Embedding
from speedrun_mup.core.model.shape import ModelShape
from speedrun_mup.core.mup import DepthRole, Init, Role


class ValueRows(NamedTuple):
    """What all layers share. lambdas: a pair (2,) for each layer. rows: of each value embedding, (T, D), not normed."""

    lambdas: tuple[Tensor, ...]
    rows: tuple[Tensor, ...]


@dataclass(frozen=True)
class ValuesConfig:
    """Three value embeddings (fewer below 6 layers), each shared by a layer from the start and one from the end."""

    def build(self, shape: ModelShape) -> Values:
        """The part of a model of this shape that all layers share."""
        return Values(shape)

    def mixer(self, shape: ModelShape, layer: int) -> nn.Module:
        """What a layer does with its values: a module (v (T, H, C), x (T, D), ValueRows) -> (T, H, C)."""
        which = shape.value_embed_of(layer)
        return OwnValue(layer) if which is None else MixedValue(layer, which)


class Values(nn.ModuleList):
    """The value embeddings, and the weights of a layer's own value and of its value embedding."""

    def __init__(self, shape: ModelShape):
        V, D, L, base = shape.padded_vocab, shape.width, shape.n_layer, shape.base_width
        super().__init__(Embedding(V, D, shape.embed_dtype) for _ in range(shape.value_embeds))
        self.lambdas = nn.Parameter(torch.empty(L, 2))
        for embedding in self:
            mup.declare(embedding, "weight", Role.INPUT, (V, base), "in out", "value_embed", init="unit")
        half = Init(constant=(0.5, 0.5))
        mup.declare(self, "lambdas", Role.SCALAR, (L, 2), "layer pair", "scalar", init=half, depth=DepthRole.BRANCH)

    def forward(self, tokens: Tensor) -> ValueRows:
        """(T,) ids -> what the layers' mixers take."""
        return ValueRows(self.lambdas.unbind(), tuple(embedding(tokens) for embedding in self))


class OwnValue(nn.Module):
    """A layer without a value embedding: sparsified by YouJiacheng, record 17."""

    def __init__(self, layer: int):
        super().__init__()
        self.layer = layer

    def forward(self, v: Tensor, x: Tensor, values: ValueRows) -> Tensor:
        """v (T, H, C), the layer's normed input x (T, D) -> (T, H, C)."""
        return values.lambdas[self.layer][0] * v


class MixedValue(nn.Module):
    """A layer with a value embedding: weighted like the value mixing of record 9 (Grad62304977 and Keller Jordan)."""

    def __init__(self, layer: int, which: int):
        super().__init__()
        self.layer, self.which = layer, which

    def forward(self, v: Tensor, x: Tensor, values: ValueRows) -> Tensor:
        """v (T, H, C), the layer's normed input x (T, D) -> (T, H, C)."""
        own, embedded = values.lambdas[self.layer].unbind()
        return own * v + embedded * values.rows[self.which].view_as(v)
