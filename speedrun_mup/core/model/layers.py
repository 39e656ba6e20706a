"""What a model is built of: norm, activation, matrices, rotary positions, attention, MLP and block.

T tokens, D width, H heads, C head_dim, V padded vocabulary. There is no batch dimension.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from speedrun_mup.core import mup
from speedrun_mup.core.attention import BACKENDS
from speedrun_mup.core.model.config import GPTConfig
from speedrun_mup.core.mup import Init, Role

RMS_EPS = torch.finfo(torch.float32).eps  # what torch uses for bf16 inputs too since January 2025
# Matrices that read the stream; those that write it start at zero, so that every layer starts as the identity.
INTO_THE_LAYER = Init(std=0.5, by_fan_in=True, uniform=True)
ATTENTION_SCALE = 0.12  # record 26's constant; with QK norm the largest score is 0.12 * head_dim


class RMSNorm(torch.autograd.Function):
    """x / sqrt(mean(x^2) + eps) over the last dimension, in float32; several times faster than autograd's on a CPU."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        """(..., D) -> (..., D)."""
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
        scale = (norm.square() / x.size(-1) + RMS_EPS).rsqrt()
        y = x * scale  # float32
        # Torch 2.11 compiles a Function that ends with a conversion to the same type to zero gradients.
        if y.dtype is not x.dtype:
            y = y.type_as(x)
        ctx.save_for_backward(y, scale)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        """scale * (g - y * mean(g * y))."""
        (grad,), (y, scale) = grads, ctx.saved_tensors
        along = (grad * y).mean(dim=-1, keepdim=True, dtype=torch.float32)
        return (torch.addcmul(grad.float(), y.float(), along, value=-1) * scale).type_as(grad)


def rms_norm(x: Tensor) -> Tensor:
    """Divide (..., D) by the root mean square of its last dimension; no gain. The reference is F.rms_norm."""
    return RMSNorm.apply(x)


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
    """A table (V, D)."""

    def __init__(self, vocab: int, width: int, dtype: torch.dtype):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab, width, dtype=dtype))

    def forward(self, tokens: Tensor) -> Tensor:
        """(T,) ids -> (T, D)."""
        return F.embedding(tokens, self.weight)


@functools.lru_cache(maxsize=2)  # of a run's training and of its validation
@torch.inference_mode(False)  # else one that validation made first could not be used in training
def rotary_table(length: int, head_dim: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """cos and signed sin, (T, 1, C) float32. The slower half of the pairs does not rotate at all (half-truncated RoPE)."""
    rotating = head_dim // 4
    frequency = (1 / 1024) ** torch.linspace(0, 1, rotating, device=device)
    frequency = torch.cat([frequency, frequency.new_zeros(head_dim // 2 - rotating)])
    angle = torch.arange(length, device=device, dtype=torch.float32)[:, None] * frequency
    cos, sin = angle.cos()[:, None], angle.sin()[:, None]
    return torch.cat([cos, cos], dim=-1), torch.cat([sin, -sin], dim=-1)


def rotate(x: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
    """Rotary embedding of (T, H, C) in float32; pairs are (i, i + C / 2)."""
    cos, sin = table
    x32 = x.float()
    return torch.addcmul(x32 * cos, x32.roll(x.size(-1) // 2, dims=-1), sin).type_as(x)


class Attention(nn.Module):
    """Causal attention with QK norm, rotary positions and an optional value embedding."""

    def __init__(self, cfg: GPTConfig):
        super().__init__()
        D, base = cfg.width, cfg.base_width
        self.head_dim = cfg.head_dim
        self.backend = BACKENDS[cfg.attention]()
        self.qkv_w = nn.Parameter(torch.empty(3, D, D))
        self.c_proj = Linear(D, D)
        mup.declare(self, "qkv_w", Role.HIDDEN, (3, base, base), "stack out in", "matrix", init=INTO_THE_LAYER)
        mup.declare(self.c_proj, "weight", Role.HIDDEN, (base, base), "out in", "matrix", init="zero")

    def forward(
        self, x: Tensor, value_embed: Tensor | None, lambdas: Tensor, mask: Any, table: tuple[Tensor, Tensor]
    ) -> Tensor:
        """x, value_embed (T, D), lambdas (2,) -> (T, D)."""
        T = len(x)
        qkv = F.linear(x, self.qkv_w.flatten(end_dim=1).type_as(x)).view(T, -1, self.head_dim)  # (T, 3H, C)
        H = qkv.size(1) // 3
        qk, v = qkv.split([2 * H, H], dim=1)
        q, k = rms_norm(rotate(qk, table)).chunk(2, dim=1)  # turning keeps the norm, so this is the record's order too
        v = lambdas[0] * v
        if value_embed is not None:
            v = v + lambdas[1] * value_embed.view_as(v)
        y = self.backend.attend(q, k, v, mask, ATTENTION_SCALE)
        return self.c_proj(y.reshape(T, -1))


class MLP(nn.Module):
    """Four times wider inside, with a squared ReLU (So et al., Primer, arXiv 2109.08668)."""

    def __init__(self, cfg: GPTConfig):
        super().__init__()
        D, base = cfg.width, cfg.base_width
        self.c_fc = Linear(D, 4 * D)
        self.c_proj = Linear(4 * D, D)
        mup.declare(self.c_fc, "weight", Role.HIDDEN, (4 * base, base), "out in", "matrix", init=INTO_THE_LAYER)
        mup.declare(self.c_proj, "weight", Role.HIDDEN, (base, 4 * base), "out in", "matrix", init="zero")

    def forward(self, x: Tensor) -> Tensor:
        """(T, D) -> (T, D)."""
        return self.c_proj(ReluSquared.apply(self.c_fc(x)))


class Block(nn.Module):
    """One layer: mix with the embedding, attend (in all layers but one), then the MLP."""

    def __init__(self, cfg: GPTConfig, layer: int):
        super().__init__()
        self.attn = None if layer == cfg.layer_without_attention else Attention(cfg)
        self.mlp = MLP(cfg)

    def forward(
        self,
        x: Tensor,
        x0: Tensor,
        mix: Tensor,
        value_embed: Tensor | None,
        lambdas: Tensor,
        mask: Any,
        table: tuple[Tensor, Tensor],
    ) -> Tensor:
        """x and x0, the normed embedding, (T, D); mix and lambdas (2,) -> (T, D)."""
        x = mix[0] * x + mix[1] * x0
        if self.attn is not None:
            x = x + self.attn(rms_norm(x), value_embed, lambdas, mask, table)
        return x + self.mlp(rms_norm(x))
