"""What all parts of a model have in common: sizes, the pattern of layers, the parametrization."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from speedrun_mup.core import mup
from speedrun_mup.core.errors import ConfigError

VOCAB_MULTIPLE = 128
VALUE_EMBEDS = 3


@dataclass(frozen=True)
class ModelShape:
    """The shape of a model, its base width and depth, and its parametrization.

    vocab_size: of the tokenizer; padded up to a multiple of 128 inside. base_width: the width that the learning rates
    were tuned at. bos_token: opens a document. parametrization: a name in mup.PARAMETRIZATIONS or a table of your own.
    base_layers: the depth that they were tuned at; None: this one. depth_rule: what follows depth, and how.
    fp8: train the head with FP8 matmuls; it predicts and validates without them, as in the record. widest_window: in
    blocks, what a window that is given as a tensor may come to (None: the whole sequence).
    Raises ConfigError for an impossible shape.
    """

    vocab_size: int = 50257
    bos_token: int = 50256
    n_layer: int = 12
    width: int = 768
    base_width: int = 768
    head_dim: int = 128
    block_size: int = 128
    parametrization: str | mup.Parametrization = "record26"
    embed_dtype: torch.dtype = torch.float32
    attention: str = "blocked"
    fp8: bool = False
    widest_window: int | None = None
    base_layers: int | None = None
    depth_rule: mup.DepthRule = mup.NO_DEPTH_RULE

    def __post_init__(self) -> None:
        if self.head_dim < 4 or self.head_dim % 4:
            raise ConfigError(f"head_dim={self.head_dim} must be a multiple of 4 (half of its pairs rotate)")
        for name in ("width", "base_width"):
            value = getattr(self, name)
            if value < self.head_dim or value % self.head_dim:
                near = max(value // self.head_dim, 1) * self.head_dim
                raise ConfigError(
                    f"{name}={value} is not a multiple of head_dim={self.head_dim}; try {near} or {near + self.head_dim}"
                )
        if self.n_layer < 2:
            raise ConfigError(f"n_layer={self.n_layer} must be at least 2 (a layer on each side of the U-net)")
        if not 0 <= self.bos_token < self.vocab_size:
            raise ConfigError(f"bos_token={self.bos_token} is outside the vocabulary of {self.vocab_size}")

    @property
    def padded_vocab(self) -> int:
        """V: the vocabulary rounded up to a multiple of 128. The padding takes part in the softmax, as in the record."""
        return -(-self.vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE

    @property
    def rules(self) -> mup.Parametrization:
        """The rule table in force, with the depth rule."""
        table = self.parametrization
        if isinstance(table, str):
            if table not in mup.PARAMETRIZATIONS:
                raise ConfigError(f"parametrization={table!r} is unknown; choose {', '.join(mup.PARAMETRIZATIONS)}")
            table = mup.PARAMETRIZATIONS[table]
        return table if self.base_layers is None else replace(table, depth=self.depth_rule)

    @property
    def m_depth(self) -> float:
        """Depth multiplier: layers over those that learning rates were tuned at."""
        return self.n_layer / (self.base_layers or self.n_layer)

    @property
    def layer_without_attention(self) -> int | None:
        """The second layer of the decoder half has an MLP only: layer 7 of 12. Models of fewer than 6 layers have no such."""
        return (self.n_layer + 1) // 2 + 1 if self.n_layer >= 6 else None

    def has_long_window(self, layer: int) -> bool:
        """Every fourth layer from either end, mirrored in the middle: 0, 4, 7 and 11 of 12."""
        return min(layer, self.n_layer - 1 - layer) % 4 == 0

    @property
    def value_embeds(self) -> int:
        """How many value embeddings there are: three, but fewer where they would meet in the middle."""
        return min(VALUE_EMBEDS, self.n_layer // 2)

    @property
    def layers_with_value_embeds(self) -> int:
        """How many on each side. The same share of the layers as at base depth, or what they add would fade with depth."""
        share = round(self.value_embeds * self.m_depth)
        return min(max(share, self.value_embeds), self.n_layer // 2)

    def value_embed_of(self, layer: int) -> int | None:
        """Which of the value embeddings a layer adds: 012...012; from base 12, 24 layers have 001122...001122."""
        layers = self.layers_with_value_embeds
        place = layer if layer < layers else layer - (self.n_layer - layers)
        return place * self.value_embeds // layers if 0 <= place < layers else None
