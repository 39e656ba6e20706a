"""FP8 matmuls, as custom operators `nanogpt::mm` and `nanogpt::mm_backward`.

Values and weights are stored as e4m3 (3 bits of mantissa, up to 448), gradients as e5m2 (2 bits, up to 57,344), each
divided by a scale that is fixed in advance, as in record 26 of the speedrun. The conversion clamps: what it does with
numbers out of range otherwise depends on version and device.
"""

# R rows, D width, V padded vocabulary

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from speedrun_mup.core.device import has_triton, is_out_of_memory

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
LARGEST = 448.0  # of e4m3; of e5m2 it is 128 times that
LARGEST_WEIGHT = 24.0  # that record 26 allows for
GRANULE = 16  # every dimension has to be a multiple of this


class Scales(NamedTuple):
    """What 1.0 stands for in the stored values, weights and gradients."""

    x: float
    w: float
    grad: float


def head_scales(width: int, forward: float) -> Scales:
    """The scales of a head that reads a normed stream, |x| <= sqrt(width), under a loss summed over tokens.

    forward: the parametrization's factor on the logits, 1 at base width. Gradients of the head's raw output are
    proportional to it, so their scale has to be as well; else small ones vanish in wide models.
    """
    return Scales(width**0.5 / LARGEST, LARGEST_WEIGHT / LARGEST, forward / LARGEST)


def quantize(x: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    """x / scale, clamped to the range of `dtype` and rounded to it. NaN stays NaN."""
    most = torch.finfo(dtype).max
    return (x.float() / scale).clamp(-most, most).to(dtype)


def _product(a: Tensor, b: Tensor, a_s: float, b_s: float, out: torch.dtype, fast: bool) -> Tensor:
    """a (m, k) row-major times b (k, n) column-major, both FP8; float32 sums, unless `fast`, rounded to `out`."""
    a_scale, b_scale = (torch.full((), scale, dtype=torch.float32, device=a.device) for scale in (a_s, b_s))
    return torch._scaled_mm(a, b, a_scale, b_scale, out_dtype=out, use_fast_accum=fast)


def _mm(x: Tensor, w: Tensor, x_s: float, w_s: float) -> tuple[Tensor, Tensor, Tensor]:
    x8, w8 = quantize(x, x_s, E4M3), quantize(w, w_s, E4M3)
    out = _product(x8, w8.T, x_s, w_s, torch.bfloat16, fast=True)
    return out, x8.view(torch.uint8), w8.view(torch.uint8)


@functools.cache
def _fused_mm() -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    """`_mm`, compiled: on a GPU the conversions have to be single passes to be worth it."""
    return torch.compile(_mm, dynamic=False)


def transposed(x: Tensor) -> Tensor:
    """(m, n) in FP8 -> the contiguous (n, m): the matmuls want both factors along the sum."""
    if has_triton(x.device):
        from speedrun_mup.core.kernels.triton import transpose_bytes

        return transpose_bytes(x)
    return x.T.contiguous()


@torch.library.custom_op("nanogpt::mm", mutates_args=())
def mm(x: Tensor, w: Tensor, x_s: float, w_s: float, grad_s: float) -> tuple[Tensor, Tensor, Tensor]:
    """x (R, D), w (V, D) -> x w^T (R, V) bfloat16, and the bytes of x and w as e4m3, for the backward, as is grad_s.

    Bytes, because torch cannot so much as add up e4m3, which its own checks of an operator want to do.
    """
    return (_fused_mm() if x.is_cuda else _mm)(x, w, x_s, w_s)


@mm.register_fake
def _(x: Tensor, w: Tensor, x_s: float, w_s: float, grad_s: float) -> tuple[Tensor, Tensor, Tensor]:
    out = x.new_empty(len(x), len(w), dtype=torch.bfloat16)
    return out, x.new_empty(x.shape, dtype=torch.uint8), w.new_empty(w.shape, dtype=torch.uint8)


@torch.library.custom_op("nanogpt::mm_backward", mutates_args=())
def mm_backward(grad: Tensor, x8: Tensor, w8: Tensor, x_s: float, w_s: float, grad_s: float) -> tuple[Tensor, Tensor]:
    """grad (R, V) of `mm`'s output, and the bytes it gave -> gradients of x (R, D) bfloat16 and of w (V, D) float32.

    A gradient that comes as e5m2 is taken to be divided by grad_s already.
    """
    x8, w8 = x8.view(E4M3), w8.view(E4M3)
    g8 = (grad if grad.dtype == E5M2 else quantize(grad, grad_s, E5M2)).contiguous()
    grad_x = _product(g8, transposed(w8).T, grad_s, w_s, torch.bfloat16, fast=False)
    grad_w = _product(transposed(g8), transposed(x8).T, grad_s, x_s, torch.float32, fast=False)
    return grad_x, grad_w


@mm_backward.register_fake
def _(grad: Tensor, x8: Tensor, w8: Tensor, x_s: float, w_s: float, grad_s: float) -> tuple[Tensor, Tensor]:
    return x8.new_empty(x8.shape, dtype=torch.bfloat16), w8.new_empty(w8.shape, dtype=torch.float32)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, w, *ctx.scales = inputs
    _, x8, w8 = output
    ctx.save_for_backward(x8, w8)
    ctx.dtypes = x.dtype, w.dtype


def _differentiate(ctx: Any, grad: Tensor, *_: None) -> tuple[Tensor | None, ...]:
    grad_x, grad_w = mm_backward(grad, *ctx.saved_tensors, *ctx.scales)
    return grad_x.to(ctx.dtypes[0]), grad_w.to(ctx.dtypes[1]), None, None, None


mm.register_autograd(_differentiate, setup_context=_save)


def has_fp8(device: torch.device) -> bool:
    """Whether `device` has FP8 matmuls: found out by trying one."""
    try:
        a = torch.zeros(GRANULE, GRANULE, device=device)
        _product(a.to(E4M3), a.to(E4M3).T, 1.0, 1.0, torch.bfloat16, fast=True)
        _product(a.to(E5M2), a.to(E4M3).T, 1.0, 1.0, torch.float32, fast=False)
    except (RuntimeError, TypeError) as fault:  # no such product, no such type
        if is_out_of_memory(fault):
            raise
        return False
    return True
