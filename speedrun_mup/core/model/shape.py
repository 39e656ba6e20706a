"""What all parts of a model have in common: sizes, the pattern of layers, the parametrization."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from speedrun_mup.core import mup
from speedrun_mup.core.errors import ConfigError

VOCAB_MULTIPLE = 128
VALUE_EMBEDS = 3


@dataclass(frozen=True)
class ModelShape:
    """The shape of a model, its base width and its parametrization.

    vocab_size: of the tokenizer; padded up to a multiple of 128 inside. base_width: the width that the learning rates
    were tuned at. bos_token: opens a document. parametrization: a name in mup.PARAMETRIZATIONS or a table of your own.
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
        if self.n_layer < 6 or self.n_layer % 2:
            raise ConfigError(
                f"n_layer={self.n_layer} must be even and at least 6 (three value embeddings on each side)"
            )
        if not 0 <= self.bos_token < self.vocab_size:
            raise ConfigError(f"bos_token={self.bos_token} is outside the vocabulary of {self.vocab_size}")

    @property
    def padded_vocab(self) -> int:
        """V: the vocabulary rounded up to a multiple of 128. The padding takes part in the softmax, as in the record."""
        return -(-self.vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE

    @property
    def rules(self) -> mup.Parametrization:
        """The rule table in force."""
        if isinstance(self.parametrization, mup.Parametrization):
            return self.parametrization
        if self.parametrization not in mup.PARAMETRIZATIONS:
            raise ConfigError(
                f"parametrization={self.parametrization!r} is unknown; choose {', '.join(mup.PARAMETRIZATIONS)}"
            )
        return mup.PARAMETRIZATIONS[self.parametrization]

    @property
    def layer_without_attention(self) -> int:
        """The second layer of the decoder half has an MLP only: layer 7 of 12."""
        return self.n_layer // 2 + 1

    def has_long_window(self, layer: int) -> bool:
        """Every fourth layer from either end, mirrored in the middle: 0, 4, 7 and 11 of 12."""
        from_end = layer if layer < self.n_layer // 2 else self.n_layer - 1 - layer
        return from_end % 4 == 0

    def value_embed_of(self, layer: int) -> int | None:
        """Which of the three value embeddings a layer adds: 012...012."""
        last_three = layer - (self.n_layer - 3)
        return layer if layer < 3 else last_three if last_three >= 0 else None
