"""The head: from the stream to logits and to the loss. T tokens, D width, V padded vocabulary."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from speedrun_mup.core import mup
from speedrun_mup.core.kernels.fp8 import head_scales
from speedrun_mup.core.model.layers import Linear
from speedrun_mup.core.model.loss import (
    FUSED_LOGIT_BYTES,
    LOGIT_BUDGET,
    SOFTCAP_SLOPE,
    SoftcapCrossEntropy,
    softcap,
    token_losses,
)
from speedrun_mup.core.model.shape import ModelShape
from speedrun_mup.core.mup import Role


@dataclass(frozen=True)
class HeadConfig:
    """An untied readout with soft-capped logits, see Head."""

    def build(self, shape: ModelShape) -> Head:
        """The head of a model of this shape."""
        return Head(shape)


class Head(Linear):
    """The readout, untied since record 8 and at zero in the beginning since record 5 (Grad62304977 and Keller Jordan).

    Its own forward is the raw product; `logits` are scaled and capped. scale: what the products are multiplied by before
    the cap: muP's divisor is in it. fused: compile the loss around the products.
    """

    def __init__(self, shape: ModelShape):
        super().__init__(shape.width, shape.padded_vocab)
        base_shape = (shape.padded_vocab, shape.base_width)
        spec = mup.declare(self, "weight", Role.OUTPUT, base_shape, "out in", "head", init="zero")
        forward = shape.rules.forward(spec)
        self.scale = forward / (SOFTCAP_SLOPE * math.sqrt(shape.base_width))
        self.fp8_scales = head_scales(shape.width, forward) if shape.fp8 else None  # FP8: YouJiacheng, record 19
        self.fused = False
        self.fused_budget = FUSED_LOGIT_BYTES // shape.embed_dtype.itemsize

    def logits(self, x: Tensor) -> Tensor:
        """The stream (T, D) -> (T, V) float32."""
        return softcap(self(x), self.scale)

    def loss(self, x: Tensor, targets: Tensor) -> Tensor:
        """The stream (T, D) and (T,) int64 targets -> the cross-entropy summed over tokens, a float32 scalar."""
        if not torch.is_grad_enabled():
            return self.losses(x, targets).sum()
        return SoftcapCrossEntropy.apply(x, self.weight, targets, self.scale, self._budget, self.fp8_scales, self.fused)

    @torch.no_grad()
    def losses(self, x: Tensor, targets: Tensor) -> Tensor:
        """The stream (T, D) and (T,) int64 targets -> the cross-entropy of every token, (T,) float32; not in FP8."""
        return token_losses(x, self.weight, targets, self.scale, self._budget, self.fused)

    @property
    def _budget(self) -> int:
        return self.fused_budget if self.fused else LOGIT_BUDGET
