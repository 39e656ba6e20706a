"""What the parts of a model are built of: norm, activation, matrices, rotary positions and the MLP.

T tokens, D width, H heads, C head_dim, V padded vocabulary. There is no batch dimension.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from speedrun_mup.core import mup
from speedrun_mup.core.model.shape import ModelShape
from speedrun_mup.core.mup import DepthRole, Init, Role

RMS_EPS = torch.finfo(torch.float32).eps  # what torch uses for bf16 inputs too since January 2025
# Matrices that read the stream; those that write it start at zero, so that every layer starts as the identity.
INTO_THE_LAYER = Init(std=0.5, by_fan_in=True, uniform=True)


class RMSNorm(torch.autograd.Function):
    """x / sqrt(mean(x^2) + eps) over the last dimension, in float32; several times faster than autograd's on a CPU."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        """(..., D) -> (..., D)."""
        y, scale = _normed(x)
        ctx.save_for_backward(y, scale)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        """scale * (g - y * mean(g * y))."""
        (grad,), (y, scale) = grads, ctx.saved_tensors
        mean_gy = (grad * y).mean(dim=-1, keepdim=True, dtype=torch.float32)
        return (torch.addcmul(grad.float(), y.float(), mean_gy, value=-1) * scale).type_as(grad)


def rms_norm(x: Tensor) -> Tensor:
    """Divide (..., D) by the root mean square of its last dimension; no gain. The reference is F.rms_norm."""
    return RMSNorm.apply(x) if torch.is_grad_enabled() else _normed(x)[0]


def _normed(x: Tensor) -> tuple[Tensor, Tensor]:
    """The normed (..., D), and what it was multiplied by, (..., 1) float32."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
    scale = (norm.square() / x.size(-1) + RMS_EPS).rsqrt()
    y = x * scale  # float32
    # Torch 2.11 compiles a Function that ends with a conversion to the same type to zero gradients.
    return (y if y.dtype is x.dtype else y.type_as(x)), scale


class ReluSquared(torch.autograd.Function):
    """relu(x)^2 with one saved tensor and two passes in the backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        """(...) -> (...)."""
        r = x.relu()
        ctx.save_for_backward(r)
        return r * r

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        """2 relu(x) g."""
        return (grads[0] * ctx.saved_tensors[0]).mul_(2)


class Linear(nn.Module):
    """A matrix (d_out, d_in) without bias, cast to the activation's type at use.

    The batch of one keeps torch's compiler from folding a sum that follows into the product: that costs a copy of the
    summand, where the norm that comes next can add it on its way.
    """

    def __init__(self, d_in: int, d_out: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(d_out, d_in))

    def forward(self, x: Tensor) -> Tensor:
        """(T, d_in) -> (T, d_out)."""
        return F.linear(x[None], self.weight.type_as(x))[0]


class Embedding(nn.Module):
    """A matrix (V, D) of one row for each token."""

    def __init__(self, vocab: int, width: int, dtype: torch.dtype):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab, width, dtype=dtype))

    def forward(self, tokens: Tensor) -> Tensor:
        """(T,) ids -> (T, D)."""
        return F.embedding(tokens, self.weight)


@functools.lru_cache(maxsize=2)  # of a run's training and of its validation
@torch.inference_mode(False)  # else one that validation made first could not be used in training
def rotary_table(length: int, head_dim: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """`rotary` of the positions from 0 on, (T, 1, C)."""
    return rotary(torch.arange(length, device=device), head_dim)


def rotary(positions: Tensor, head_dim: int) -> tuple[Tensor, Tensor]:
    """cos and signed sin at positions (T,), (T, 1, C) float32. The slower half of the pairs does not rotate at all
    (half-truncated RoPE)."""
    rotating = head_dim // 4
    frequency = (1 / 1024) ** torch.linspace(0, 1, rotating, device=positions.device)
    frequency = torch.cat([frequency, frequency.new_zeros(head_dim // 2 - rotating)])
    angle = positions.float()[:, None] * frequency
    cos, sin = angle.cos()[:, None], angle.sin()[:, None]
    return torch.cat([cos, cos], dim=-1), torch.cat([sin, -sin], dim=-1)


def rotate(x: Tensor, cos_sin: tuple[Tensor, Tensor]) -> Tensor:
    """Rotary embedding of (T, H, C) in float32; pairs are (i, i + C / 2)."""
    cos, sin = cos_sin
    x32 = x.float()
    return torch.addcmul(x32 * cos, x32.roll(x.size(-1) // 2, dims=-1), sin).type_as(x)


class MLP(nn.Module):
    """Four times wider inside, with a squared ReLU (So et al., Primer, arXiv 2109.08668)."""

    def __init__(self, shape: ModelShape):
        super().__init__()
        D, base = shape.width, shape.base_width
        self.c_fc = Linear(D, 4 * D)
        self.c_proj = Linear(4 * D, D)
        up, down, inside = (4 * base, base), (base, 4 * base), DepthRole.BRANCH
        mup.declare(self.c_fc, "weight", Role.HIDDEN, up, "out in", "matrix", init=INTO_THE_LAYER, depth=inside)
        mup.declare(self.c_proj, "weight", Role.HIDDEN, down, "out in", "matrix", init="zero", depth=DepthRole.WRITES)

    def forward(self, x: Tensor) -> Tensor:
        """(T, D) -> (T, D)."""
        x = self.c_fc(x)
        return self.c_proj(ReluSquared.apply(x) if torch.is_grad_enabled() else x.relu_().square_())
