"""Ways to set all singular values of a matrix near 1: Newton-Schulz, and an SVD as the reference."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from speedrun_mup.core.device import has_triton

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # Keller Jordan's quintic: singular values end in about [0.7, 1.2]
NEWTON_SCHULZ_STEPS = 5
CONVERGENT = (2.0, -1.5, 0.5)  # a quintic whose fixed point 1 attracts with an error that is squared in every step
SMALLEST_SYMMETRIC = 512  # rows: from four tiles of 128 on, computing the lower half saves a third of the tiles or more


def newton_schulz(matrices: Tensor) -> Tensor:
    """Roughly orthogonalize each of (N, d_out, d_in): same singular vectors, singular values near 1. Zero stays zero."""
    return quintic_steps(
        matrices, matrices.norm(dim=(-2, -1), keepdim=True) + 1e-7, [NEWTON_SCHULZ] * NEWTON_SCHULZ_STEPS
    )


def newton_schulz_12(matrices: Tensor) -> Tensor:
    """Orthogonalize each of (N, d_out, d_in) by twelve steps that converge, as modded-nanogpt's track 3 does."""
    return quintic_steps(matrices, matrices.norm(dim=(-2, -1), keepdim=True) + 1e-7, [CONVERGENT] * 12)


def quintic_steps(matrices: Tensor, scale: Tensor, coefficients: Sequence[tuple[float, float, float]]) -> Tensor:
    """X / scale, then X <- a X + (b X X^T + c (X X^T)^2) X for each (a, b, c): a polynomial of the singular values.

    Args:
        matrices: X, (N, d_out, d_in).
        scale: (N, 1, 1); brings all singular values to 1 or below.
        coefficients: of each step.
    """
    tall = matrices.size(-2) > matrices.size(-1)
    x = matrices.mT if tall else matrices
    x = x / scale
    use_triton = symmetric_products_pay(x)
    for a, b, c in coefficients:
        if use_triton:
            from speedrun_mup.core.kernels.triton import symmetric_product

            gram = symmetric_product(x)
            polynomial = symmetric_product(gram, gram, alpha=c, beta=b)
        else:
            gram = x @ x.mT
            polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, polynomial, x, beta=a)
    return x.mT if tall else x


def symmetric_products_pay(x: Tensor) -> bool:
    """Whether computing half of x x^T (N, m, n) and mirroring it is worth a kernel of our own, where there is Triton."""
    return x.dtype is torch.bfloat16 and x.size(-2) >= SMALLEST_SYMMETRIC and has_triton(x.device)


def orthogonalize(matrices: Tensor) -> Tensor:
    """The reference of `newton_schulz`: set every singular value of (N, d_out, d_in) to exactly 1, by SVD."""
    u, _, vh = torch.linalg.svd(matrices, full_matrices=False)
    return u @ vh
