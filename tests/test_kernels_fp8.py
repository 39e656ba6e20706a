"""The 8-bit products against the same sums in float64, entry by entry, within the error that rounding explains."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from speedrun_mup.core.kernels import fp8
from speedrun_mup.core.kernels.fp8 import E4M3, E5M2, LARGEST, Scales, has_fp8, head_scales, mm, mm_backward, quantize
from speedrun_mup.core.utils import generator

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
UNIT = {E4M3: 2.0**-4, E5M2: 2.0**-3, torch.bfloat16: 2.0**-9}  # half the gap between neighbours, relative
SMALLEST = {E4M3: 2.0**-9, E5M2: 2.0**-16}  # the gap between subnormals


def inputs(rows: int, width: int, vocab: int, device: str = "cpu") -> tuple[Tensor, Tensor, Tensor]:
    """A normed stream, weights and a gradient of the size that they have in training."""
    rng = generator(0, "fp8", rows, width, vocab)
    x = F.rms_norm(torch.randn(rows, width, generator=rng), (width,))
    w, g = torch.randn(vocab, width, generator=rng), torch.randn(rows, vocab, generator=rng) * 0.01
    return x.bfloat16().to(device), w.to(device), g.bfloat16().to(device)


@pytest.mark.parametrize("dtype", [E4M3, E5M2])
@given(st.floats(-1e6, 1e6), st.floats(1e-6, 10))
@settings(deadline=None)
def test_quantizing_clamps_and_rounds_to_the_nearest(dtype, value, scale):
    most = torch.finfo(dtype).max
    exact = max(min(value / scale, most), -most)
    got = quantize(torch.tensor([value], dtype=torch.float64), scale, dtype).double().item()
    assert abs(got - exact) <= max(UNIT[dtype] * abs(exact), SMALLEST[dtype] / 2) * 1.00001


@pytest.mark.parametrize("dtype", [E4M3, E5M2])
def test_infinities_are_clamped_and_nan_stays(dtype):
    q = quantize(torch.tensor([float("inf"), float("-inf"), float("nan")]), 1.0, dtype).double()
    assert q[0] == -q[1] == torch.finfo(dtype).max and q[2].isnan()


def within(got: Tensor, a: Tensor, b: Tensor, relative: float, floor_a: float, floor_b: float) -> None:
    """`got` is a @ b up to `relative` of the sum of magnitudes, and what values too small to store may add."""
    a, b = a.double(), b.double()
    allowed = relative * (a.abs() @ b.abs()) + floor_a * b.abs().sum(0) + floor_b * a.abs().sum(1, keepdim=True)
    assert ((got.double() - a @ b).abs() <= allowed * 1.0001).all()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("rows", "width", "vocab"), [(16, 32, 16), (48, 64, 128), (128, 256, 384)])
def test_products_are_the_float64_ones_within_rounding(rows, width, vocab, device):
    """Two factors of 3 mantissa bits and a bfloat16 result; in the backward one of 2 and one of 3."""
    x, w, g = inputs(rows, width, vocab, device)
    scales = head_scales(width, 1.0)
    out, x8, w8 = mm(x, w, *scales)
    grad_x, grad_w = mm_backward(g, x8, w8, *scales)
    assert out.dtype == grad_x.dtype == torch.bfloat16 and grad_w.dtype == torch.float32
    assert torch.equal(w8, quantize(w, scales.w, E4M3).view(torch.uint8)) and x8.shape == x.shape
    e4, e5, bf = UNIT[E4M3], UNIT[E5M2], UNIT[torch.bfloat16]
    tiny = Scales(*(s * SMALLEST[d] / 2 for s, d in zip(scales, (E4M3, E4M3, E5M2), strict=True)))
    within(out, x, w.T, (1 + e4) ** 2 * (1 + bf) - 1 + 2**-10, tiny.x, tiny.w)  # 2^-10: fast accumulation on a GPU
    mixed = (1 + e4) * (1 + e5) - 1 + 2**-12
    within(grad_x, g, w, (1 + mixed) * (1 + bf) - 1, tiny.grad, tiny.w)
    within(grad_w, g.T, x, mixed, tiny.grad, tiny.x)


@pytest.mark.slow
def test_errors_average_out_over_long_sums():
    """What training feels is the error relative to the result as a whole."""
    x, w, g = inputs(256, 512, 256)
    scales = head_scales(512, 1.0)
    out, x8, w8 = mm(x, w, *scales)
    grad_x, grad_w = mm_backward(g, x8, w8, *scales)
    for got, exact, most in (
        (out, x.double() @ w.double().T, 0.04),
        (grad_x, g.double() @ w.double(), 0.07),
        (grad_w, g.double().T @ x.double(), 0.07),
    ):
        assert ((got.double() - exact).norm() / exact.norm()).item() < most


def test_a_gradient_that_comes_as_e5m2_is_taken_as_it_is():
    x, w, g = inputs(32, 64, 128)
    scales = head_scales(64, 1.0)
    _, x8, w8 = mm(x, w, *scales)
    for a, b in zip(
        mm_backward(g, x8, w8, *scales), mm_backward(quantize(g, scales.grad, E5M2), x8, w8, *scales), strict=True
    ):
        assert torch.equal(a, b)


def test_autograd_gives_what_the_backward_operator_gives():
    x, w, g = inputs(32, 64, 128)
    scales = head_scales(64, 1.0)
    x, w = x.requires_grad_(), w.requires_grad_()
    out, x8, w8 = mm(x, w, *scales)
    out.backward(g)
    grad_x, grad_w = mm_backward(g, x8, w8, *scales)
    assert torch.equal(x.grad, grad_x) and torch.equal(w.grad, grad_w)


@pytest.mark.slow
@pytest.mark.parametrize("device", DEVICES)
def test_the_operators_are_registered_as_torch_wants_them(device):
    x, w, g = inputs(16, 32, 48, device)
    scales = head_scales(32, 1.0)
    with torch.no_grad():
        _, x8, w8 = mm(x, w, *scales)
    torch.library.opcheck(mm, (x.requires_grad_(), w.requires_grad_(), *scales))
    torch.library.opcheck(mm_backward, (g, x8, w8, *scales))


@pytest.mark.parametrize("m", [1, 4, 16])
def test_the_smallest_gradient_that_survives_does_not_depend_on_width(m):
    """The gradient of the raw output is (p - y) / (sqrt(base) m) in muP; record 26's fixed scale would lose ever more."""
    base = 768
    p = torch.tensor([1e-6])  # of a token that is nearly ruled out
    grad = p / (math.sqrt(base) * m)
    kept = quantize(grad, head_scales(base * m, 1 / m).grad, E5M2).double() * head_scales(base * m, 1 / m).grad
    assert kept.item() == pytest.approx(grad.item(), rel=0.25)
    if m > 1:
        assert quantize(grad, head_scales(base, 1.0).grad, E5M2).double().item() in (0, SMALLEST[E5M2])


def test_scales_are_the_records_at_its_width():
    assert head_scales(768, 1.0) == Scales(math.sqrt(768) / 448, 24 / 448, 1 / 448)
    largest = quantize(torch.tensor([math.sqrt(768)]), head_scales(768, 1.0).x, E4M3).item()
    assert largest == LARGEST


@pytest.mark.parametrize("fault", [RuntimeError, TypeError])
def test_a_device_has_fp8_if_it_multiplies_some(monkeypatch, fault):
    def product(*args, **kwargs):
        raise fault

    assert has_fp8(torch.device("cpu"))  # as the tests above
    monkeypatch.setattr(fp8, "_product", product)
    assert not has_fp8(torch.device("cpu"))


def test_a_full_device_is_not_taken_for_one_without_fp8(monkeypatch):
    def product(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(fp8, "_product", product)
    with pytest.raises(torch.OutOfMemoryError):
        has_fp8(torch.device("cpu"))
