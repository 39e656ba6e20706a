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
    RECORD26,
    SOFTCAP_SLOPE,
    Cap,
    SoftcapCrossEntropy,
    softcap,
    token_losses,
)
from speedrun_mup.core.model.shape import ModelShape
from speedrun_mup.core.mup import Role


@dataclass(frozen=True)
class HeadConfig:
    """An untied readout with soft-capped logits, see Head. cap: of the logits."""

    cap: Cap = RECORD26

    def build(self, shape: ModelShape) -> Head:
        """The head of a model of this shape."""
        head = Head(shape)
        head.cap = self.cap
        return head


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
        self.fused, self.cap = False, RECORD26
        self.fused_budget = FUSED_LOGIT_BYTES // shape.embed_dtype.itemsize

    def logits(self, x: Tensor) -> Tensor:
        """The stream (T, D) -> (T, V) float32."""
        return softcap(self(x), self.scale, self.cap)

    def loss(self, x: Tensor, targets: Tensor, weights: Tensor | None = None) -> Tensor:
        """The stream (T, D) and (T,) int64 targets -> the cross-entropy summed over tokens, a float32 scalar.

        weights: (K,), of K targets of each token, which are (T, K) then; -1 is none.
        """
        if not torch.is_grad_enabled() and weights is None:
            return self.losses(x, targets).sum()
        more = self.scale, self._budget, self.fp8_scales, self.fused, weights, self.cap
        return SoftcapCrossEntropy.apply(x, self.weight, targets, *more)

    @torch.no_grad()
    def losses(self, x: Tensor, targets: Tensor) -> Tensor:
        """The stream (T, D) and (T,) int64 targets -> the cross-entropy of every token, (T,) float32; not in FP8."""
        return token_losses(x, self.weight, targets, self.scale, self._budget, self.fused, self.cap)

    @property
    def _budget(self) -> int:
        return self.fused_budget if self.fused else LOGIT_BUDGET
