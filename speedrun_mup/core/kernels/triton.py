"""Kernels in Triton. Import this only where there is Triton; everything here has a plain equal elsewhere."""

# N matrices of M rows and K columns; TILE x TILE entries of the result per program

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE, TILE_K = 128, 64


@triton.jit
def _symmetric_kernel(
    a, add, out, M, K, alpha, beta, a_n, a_m, a_k, ADD: tl.constexpr, TILE: tl.constexpr, TILE_K: tl.constexpr
):
    row, column, matrix = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    if column > row:
        return  # the mirror image of a tile that another program computes
    rows = row * TILE + tl.arange(0, TILE)
    columns = column * TILE + tl.arange(0, TILE)
    a += matrix.to(tl.int64) * a_n
    sums = tl.zeros((TILE, TILE), dtype=tl.float32)
    for start in range(0, K, TILE_K):
        k = start + tl.arange(0, TILE_K)
        left = tl.load(
            a + rows[:, None] * a_m + k[None, :] * a_k, mask=(rows[:, None] < M) & (k[None, :] < K), other=0.0
        )
        right = tl.load(
            a + columns[None, :] * a_m + k[:, None] * a_k, mask=(columns[None, :] < M) & (k[:, None] < K), other=0.0
        )
        sums = tl.dot(left, right, sums, input_precision="ieee")
    sums *= alpha
    inside = (rows[:, None] < M) & (columns[None, :] < M)
    first = matrix.to(tl.int64) * M * M
    at = first + rows[:, None] * M + columns[None, :]
    if ADD:
        sums += beta * tl.load(add + at, mask=inside, other=0.0).to(tl.float32)
    result = sums.to(out.dtype.element_ty)
    tl.store(out + at, result, mask=inside)
    if row != column:
        mirrored = first + columns[:, None] * M + rows[None, :]
        tl.store(out + mirrored, tl.trans(result), mask=(columns[:, None] < M) & (rows[None, :] < M))


def symmetric_product(a: Tensor, add: Tensor | None = None, alpha: float = 1.0, beta: float = 0.0) -> Tensor:
    """alpha * a a^T + beta * add of (N, M, K) and a symmetric (N, M, M): only half of the result is computed.

    The other half is its mirror image. Sums are float32.
    """
    n, m, k = a.shape
    out = torch.empty(n, m, m, dtype=a.dtype, device=a.device)
    tiles = triton.cdiv(m, TILE)
    _symmetric_kernel[(tiles, tiles, n)](
        a,
        a if add is None else add.contiguous(),
        out,
        m,
        k,
        alpha,
        beta,
        *a.stride(),
        ADD=add is not None,
        TILE=TILE,
        TILE_K=TILE_K,
        num_warps=8,
        num_stages=4,
    )
    return out


@triton.jit
def _transpose_kernel(a, out, M, K, TILE: tl.constexpr):
    rows = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    columns = tl.program_id(1).to(tl.int64) * TILE + tl.arange(0, TILE)
    inside = (rows[:, None] < M) & (columns[None, :] < K)
    tile = tl.load(a + rows[:, None] * K + columns[None, :], mask=inside, other=0)
    inside = (columns[:, None] < K) & (rows[None, :] < M)
    tl.store(out + columns[:, None] * M + rows[None, :], tl.trans(tile), mask=inside)


def transpose_bytes(a: Tensor) -> Tensor:
    """(M, K) of a one-byte type -> the contiguous (K, M). Both sides move whole lines of 128 bytes."""
    (m, k), tiles = a.shape, (triton.cdiv(a.size(0), TILE), triton.cdiv(a.size(1), TILE))
    out = a.new_empty(k, m)
    _transpose_kernel[tiles](a.contiguous().view(torch.uint8), out.view(torch.uint8), m, k, TILE=TILE, num_warps=8)
    return out
