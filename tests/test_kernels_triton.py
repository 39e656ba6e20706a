"""Triton's kernels against plain products: here through Triton's interpreter, on a GPU as they are."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys

import pytest
import torch

from speedrun_mup.core.kernels.fp8 import transposed
from speedrun_mup.core.optimizers import newton_schulz, orthogonalization, orthogonalize
from speedrun_mup.core.utils import generator

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")

INTERPRETED = """
import torch
from speedrun_mup.core.kernels.triton import symmetric_product, transpose_bytes
torch.manual_seed(0)
for shape in ((128, 256), (1, 300), (130, 77)):
    a = torch.randint(0, 256, shape, dtype=torch.uint8)
    assert torch.equal(transpose_bytes(a), a.T), shape
for n, m, k in ((2, 128, 64), (1, 130, 70), (2, 257, 33)):  # whole tiles, and tiles that stick out
    a = torch.randn(n, m, k)
    add = torch.randn(n, m, m)
    add = add + add.mT
    for matrices in (a, torch.randn(n, k, m).mT):
        got = symmetric_product(matrices)
        torch.testing.assert_close(got, got.mT, rtol=1e-5, atol=1e-4)
        torch.testing.assert_close(got, matrices @ matrices.mT, rtol=1e-5, atol=1e-4)
        got = symmetric_product(matrices, add, alpha=2.0315, beta=-4.775)
        torch.testing.assert_close(got, got.mT, rtol=1e-5, atol=1e-4)
        torch.testing.assert_close(got, 2.0315 * matrices @ matrices.mT - 4.775 * add, rtol=1e-5, atol=1e-3)
print("ok")
"""


@pytest.mark.slow
@needs_triton
def test_the_interpreted_kernel_is_the_plain_product():
    """In a process of its own: Triton asks for its interpreter when a kernel is defined."""
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", INTERPRETED], capture_output=True, text=True, env=environment)
    assert done.stdout.strip() == "ok", done.stderr


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(16, 384), (16_384, 50_304), (130, 77)])
def test_turned_bytes_are_torchs(shape):
    a = torch.randint(0, 256, shape, dtype=torch.uint8, device="cuda")
    for x in (a, a.T):  # the second lies across memory
        assert torch.equal(transposed(x), x.T)
    assert torch.equal(transposed(a.view(torch.float8_e5m2)).view(torch.uint8), a.T)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(3, 768, 768), (2, 768, 3072), (2, 520, 1000)])
def test_newton_schulz_with_half_the_products_is_newton_schulz(shape, monkeypatch):
    x = torch.randn(shape, generator=generator(0, "ns")).bfloat16().cuda()
    assert orthogonalization.symmetric_products_pay(x)
    fast = newton_schulz(x)
    monkeypatch.setattr(orthogonalization, "symmetric_products_pay", lambda x: False)
    plain, exact = newton_schulz(x), orthogonalize(x.float())
    assert (fast - plain).float().norm() < 0.02 * plain.float().norm()
    assert (fast.float() - exact).norm() < 0.35 * exact.norm()  # Newton-Schulz leaves singular values in [0.7, 1.2]


def test_products_are_plain_on_a_cpu_and_for_small_matrices():
    assert not orthogonalization.symmetric_products_pay(torch.zeros(1, 1024, 1024, dtype=torch.bfloat16))
