"""Polar Express by Amsel, Persson, Musco and Gower (arXiv 2505.16932): Newton-Schulz with other coefficients in each step.

modded-nanogpt has it since record 38, with these coefficients, which were computed for the safety factor 1.02.
"""

from __future__ import annotations

import torch
from torch import Tensor

from speedrun_mup.core.optimizers.orthogonalization import quintic_steps

SAFETY = 1.02
COEFFICIENTS = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)


def polar_express(matrices: Tensor) -> Tensor:
    """Roughly orthogonalize each of (N, d_out, d_in). Zero stays zero.

    Singular values that start above a thousandth of the Frobenius norm end in [0.859, 1.141].
    """
    return quintic_steps(matrices, SAFETY * matrices.norm(dim=(-2, -1), keepdim=True) + 1e-6, COEFFICIENTS)


def polar_express_by_svd(matrices: Tensor) -> Tensor:
    """The reference: each singular value s, over its matrix's scale, becomes a s + b s^3 + c s^5 in every step."""
    u, s, vh = torch.linalg.svd(matrices, full_matrices=False)
    s = s / (SAFETY * s.norm(dim=-1, keepdim=True) + 1e-6)
    for a, b, c in COEFFICIENTS:
        s = a * s + b * s**3 + c * s**5
    return (u * s[..., None, :]) @ vh
