"""Head, soft cap and cross-entropy: a reference, and one function over chunks of rows that is what training uses.

T tokens, D width, V padded vocabulary, R rows of a chunk.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from speedrun_mup.core.kernels.fp8 import E5M2, Scales, mm, mm_backward, quantize

SOFTCAP, SOFTCAP_SLOPE = 30.0, 7.5  # logits = 30 * sigmoid(z / (7.5 * sqrt(width)))
LOGIT_BUDGET = 2**24  # logits held at a time by the chunked loss: 64 MiB in float32
FUSED_LOGIT_BYTES = 2**31  # of them where none is written in float32: 16,384 rows of the record's head in bfloat16


class Cap(NamedTuple):
    """Logits are height * sigmoid(z * scale + shift)."""

    height: float = SOFTCAP
    shift: float = 0.0


RECORD26 = Cap()


def softcap(z: Tensor, scale: float, cap: Cap = RECORD26) -> Tensor:
    """30 * sigmoid(z * scale) in float32: equal to 15 * tanh(z * scale / 2) up to a constant that the softmax ignores."""
    return cap.height * torch.sigmoid(z.float() * scale + cap.shift if cap.shift else z.float() * scale)


def softcap_cross_entropy(x: Tensor, weight: Tensor, targets: Tensor, scale: float) -> Tensor:
    """The reference of `SoftcapCrossEntropy`: all logits at once, gradients by autograd."""
    return F.cross_entropy(softcap(F.linear(x, weight.type_as(x)), scale), targets, reduction="sum")


def loss_and_gradient(
    z: Tensor, targets: Tensor, scale: float, wanted: bool, grad_s: float | None
) -> tuple[Tensor, Tensor | None]:
    """Losses (R,) of a head's raw output z (R, V) and, if wanted, their gradient: z's type, or e5m2 divided by grad_s.

    As few operations for each of the T x V entries as there can be, for a compiler to fuse into two passes: on a GPU they,
    and not memory, are what the time goes into. Capped logits are below 30, so no maximum is subtracted; a gradient is
    below a quarter of the cap's slope, at most 448 in units of `head_scales`, so `quantize` would find nothing to clamp.
    """
    gate = torch.sigmoid(z.float() * scale)
    likely = torch.exp2(gate * (SOFTCAP * math.log2(math.e)))
    total = likely.sum(dim=-1)
    target_gate = torch.sigmoid(z.gather(1, targets[:, None])[:, 0].float() * scale)
    losses = total.log() - SOFTCAP * target_gate
    if not wanted:
        return losses, None
    slope = SOFTCAP * scale if grad_s is None else SOFTCAP * scale / grad_s
    hit = torch.arange(z.size(1), device=z.device) == targets[:, None]
    share = likely * total.reciprocal()[:, None]
    grad = torch.where(hit, share - 1, share) * (gate - gate * gate) * slope
    return losses, grad.to(z.dtype if grad_s is None else E5M2)


def loss_and_gradient_in_place(
    z: Tensor, targets: Tensor, scale: float, wanted: bool, grad_s: float | None
) -> tuple[Tensor, Tensor | None]:
    """The same in fewer passes and less memory, for where nothing fuses."""
    gate = z.float().mul_(scale).sigmoid_()
    likely = (gate * SOFTCAP).exp_()
    total = likely.sum(dim=-1, keepdim=True)
    target = targets[:, None]
    losses = (total.log() - gate.gather(1, target) * SOFTCAP)[:, 0]
    if not wanted:
        return losses, None
    grad = likely.div_(total)
    grad.scatter_add_(1, target, grad.new_full(target.shape, -1.0))
    grad.mul_(gate).mul_(gate.neg_().add_(1).mul_(SOFTCAP * scale))
    return losses, grad.type_as(z) if grad_s is None else quantize(grad, grad_s, E5M2)


def weighted_loss_and_gradient(
    z: Tensor, targets: Tensor, scale: float, wanted: bool, grad_s: float | None, weights: Tensor, cap: Cap
) -> tuple[Tensor, Tensor | None]:
    """`loss_and_gradient` of several weighted targets of each row, and any cap: the sum of their cross-entropies.

    Args:
        z, scale, wanted, grad_s: as there.
        targets: (R, K); -1 is none, which adds nothing.
        weights: (K,).
        cap: of the logits.
    """
    gate = torch.sigmoid(z.float() * scale + cap.shift)
    likely = torch.exp(gate * cap.height)
    total = likely.sum(dim=-1, keepdim=True)
    share_of = weights * (targets >= 0)  # (R, K)
    at, whole = targets.clamp(min=0), share_of.sum(dim=-1, keepdim=True)
    losses = (whole * total.log())[:, 0] - cap.height * (share_of * gate.gather(1, at)).sum(dim=-1)
    if not wanted:
        return losses, None
    grad = likely * (whole / total)
    grad = grad.scatter_add(1, at, -share_of) * (gate - gate * gate) * (cap.height * scale)
    return losses, grad.to(z.dtype) if grad_s is None else quantize(grad, grad_s, E5M2)


@functools.cache
def _fused_loss_and_gradient() -> Callable[..., tuple[Tensor, Tensor | None]]:
    return torch.compile(loss_and_gradient, dynamic=False)


@functools.cache
def _fused_weighted() -> Callable[..., tuple[Tensor, Tensor | None]]:
    return torch.compile(weighted_loss_and_gradient, dynamic=False)


def _formula(fused: bool, weights: Tensor | None, cap: Cap) -> Callable[..., tuple[Tensor, Tensor | None]]:
    """What gives losses and gradients of a chunk."""
    if weights is None and cap == RECORD26:
        return _fused_loss_and_gradient() if fused else loss_and_gradient_in_place
    weighted = _fused_weighted() if fused else weighted_loss_and_gradient

    def of_chunk(
        z: Tensor, targets: Tensor, scale: float, wanted: bool, grad_s: float | None
    ) -> tuple[Tensor, Tensor | None]:
        own = torch.ones(1, device=z.device) if weights is None else weights
        return weighted(z, targets.view(len(targets), -1), scale, wanted, grad_s, own, cap)

    return of_chunk


def token_losses(
    x: Tensor, weight: Tensor, targets: Tensor, scale: float, budget: int, fused: bool = False, cap: Cap = RECORD26
) -> Tensor:
    """The cross-entropy of every token, without gradients: what validation and evaluation take.

    Args:
        x: the stream, (T, D).
        weight: (V, D).
        targets: (T,).
        scale: on the products, before the cap.
        budget: logits to hold at a time.
        fused: compile what is around the products.
        cap: of the logits.

    Returns:
        (T,) float32.
    """
    w = weight.type_as(x)
    losses = torch.empty(len(x), dtype=torch.float32, device=x.device)
    rows, both = _rows_at_a_time(budget, w), _formula(fused, None, cap)
    for begin in range(0, len(x), rows):
        chunk = slice(begin, begin + rows)
        losses[chunk], _ = both(F.linear(x[chunk], w), targets[chunk], scale, False, None)
    return losses


def _rows_at_a_time(budget: int, weight: Tensor) -> int:
    """A power of two, so that chunks are alike."""
    return 1 << (max(1, budget // len(weight)).bit_length() - 1)


def targets_ahead(targets: Tensor, count: int) -> Tensor:
    """(T,) -> (T, count): the next token, the one after it, ...; -1 where that is beyond the row."""
    ahead = targets.new_full((len(targets), count), -1)
    for k in range(min(count, len(targets))):
        ahead[: len(targets) - k, k] = targets[k:]
    return ahead


class SoftcapCrossEntropy(torch.autograd.Function):
    """Head, softcap and summed cross-entropy over chunks of rows, so that (T, V) logits never exist.

    The gradient is computed with the loss, while a chunk's logits are there, so nothing is computed twice. fp8: scales
    of FP8 matmuls; fused: compile what is around the matmuls.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        targets: Tensor,
        scale: float,
        budget: int,
        fp8: Scales | None = None,
        fused: bool = False,
        weights: Tensor | None = None,
        cap: Cap = RECORD26,
    ) -> Tensor:
        """x (T, D), weight (V, D), targets (T,), scale on the logits, logits to hold at a time -> float32 scalar.

        With weights (K,), targets are (T, K), see `weighted_loss_and_gradient`.
        """
        w = weight if fp8 else weight.type_as(x)
        rows = _rows_at_a_time(budget, w)
        losses = torch.empty(len(x), dtype=torch.float32, device=x.device)
        needs_x, needs_w = ctx.needs_input_grad[:2]
        grad_x = torch.empty_like(x) if needs_x else None
        grad_w: Tensor | None = None
        both = _formula(fused, weights, cap)
        for begin in range(0, len(x), rows):
            chunk = slice(begin, begin + rows)
            z, *stored = mm(x[chunk], w, *fp8) if fp8 else (F.linear(x[chunk], w),)
            losses[chunk], grad = both(z, targets[chunk], scale, needs_x or needs_w, fp8.grad if fp8 else None)
            if grad is None:
                continue
            by_x, by_w = mm_backward(grad, *stored, *fp8) if fp8 else (grad @ w, grad.T @ x[chunk])
            if grad_x is not None:
                grad_x[chunk] = by_x
            if needs_w:
                grad_w = by_w.float() if grad_w is None else grad_w.add_(by_w)
        if needs_w and grad_w is None:  # no rows
            grad_w = torch.zeros_like(weight, dtype=torch.float32)
        ctx.save_for_backward(grad_x, grad_w)
        ctx.weight_dtype = weight.dtype
        return losses.sum()

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Any:
        """Scale the gradients that forward left."""
        grad_x, grad_w = ctx.saved_tensors
        (grad,) = grad_outputs
        return (
            None if grad_x is None else grad_x * grad.type_as(grad_x),
            None if grad_w is None else (grad_w * grad).to(ctx.weight_dtype),
            *[None] * 7,
        )
