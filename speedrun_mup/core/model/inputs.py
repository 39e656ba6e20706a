"""Token inputs: from ids to x0, the normed stream that every layer starts from. T tokens, D width, V vocabulary."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor, nn

from speedrun_mup.core import mup
from speedrun_mup.core.model.layers import Embedding, rms_norm
from speedrun_mup.core.model.shape import ModelShape
from speedrun_mup.core.mup import Role


class InputOption(Protocol):
    """The config of a technique that changes the embedded tokens before the norm."""

    def build(self, shape: ModelShape) -> nn.Module:
        """A module (rows (T, D), tokens (T,)) -> (T, D)."""


@dataclass(frozen=True)
class TokenInputsConfig:
    """One embedding of tokens. options: techniques that change its rows before the norm, in this order."""

    options: tuple[InputOption, ...] = ()

    def build(self, shape: ModelShape) -> TokenInputs:
        """The part of a model of this shape."""
        return TokenInputs(self, shape)


class TokenInputs(Embedding):
    """Embedding and norm."""

    def __init__(self, cfg: TokenInputsConfig, shape: ModelShape):
        super().__init__(shape.padded_vocab, shape.width, shape.embed_dtype)
        base_shape = (shape.padded_vocab, shape.base_width)
        mup.declare(self, "weight", Role.INPUT, base_shape, "in out", "embed", init="unit")
        self.options = nn.ModuleList(option.build(shape) for option in cfg.options)

    def forward(self, tokens: Tensor) -> Tensor:
        """(T,) ids -> x0 (T, D)."""
        rows = super().forward(tokens)
        for option in self.options:
            rows = option(rows, tokens)
        return rms_norm(rows)
