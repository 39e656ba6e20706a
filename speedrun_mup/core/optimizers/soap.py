"""SOAP-Muon: the momentum, preconditioned in the bases of SOAP, is what Muon orthogonalizes; and the matrix's norm is steered.

Result 44 of modded-nanogpt's track 3, its optimizer benchmark (2750 steps; Muon 3250), and with `row_floor` and cautious
decay result 46 (2690). SOAP is by Vyas et al. (arXiv 2409.11321). R rows and C columns of a matrix; N matrices.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from speedrun_mup.core.mup.depth_rules import DepthRole
from speedrun_mup.core.mup.rules import Update
from speedrun_mup.core.mup.spec import ParamSpec
from speedrun_mup.core.optimizers.cautious import cautiously_decayed
from speedrun_mup.core.optimizers.hyperball import NonZero, frobenius
from speedrun_mup.core.optimizers.optimizer import State
from speedrun_mup.core.optimizers.orthogonalization import CONVERGENT, quintic_steps
from speedrun_mup.core.optimizers.sharding import ParamShard

BETA2 = 0.9  # of Gram matrices and of the second moment in their bases
SMALLEST_STEP = 0.3825  # of a step before its rate, as a share of the matrix's norm
OUTWARD = 0.5  # what is left of the part of a step that would lengthen the matrix
TRUST = (0.45, 0.85)  # floor and cap of the gate in the first part of a run
TRUST_FADES = (1375 / 2900, 1625 / 2900)  # progress at which the floor begins to fall, and is zero and the cap gone
MIN_AGREEMENT = 0.2
EPS = 1e-7


class SoapMuon(NonZero):
    """SOAP-Muon. For HIDDEN matrices or stacks of them only, none of which may begin at zero.

    lr: as Muon's, but for the shape's factor, which is `shape_gain` here, because a step is compared to its matrix.
    row_floor: the smallest step is one of each row. gated: how far the preconditioned momentum is believed depends on whether
    it agrees with the momentum and the gradient; on in the output of attention. progress: of the run, 0 to 1; the gate fades
    with it. Weight decay is cautious.
    """

    label = "SOAP-Muon"
    kind = Update.SPECTRAL
    defaults = {
        "lr": 0.0375,
        "momentum": 0.95,
        "weight_decay": 0.0,
        "row_floor": True,
        "gated": False,
        "shape_gain": 1.0,
        "progress": 0.0,
    }
    state_names = ("momentum_buffer", "second_moment", "row_gram", "column_gram", "row_basis", "column_basis")

    @classmethod
    def options_for(cls, spec: ParamSpec) -> dict[str, Any]:
        """Muon's factor for the shape; the gate, in a square matrix that writes to the stream."""
        gated = spec.depth_role is DepthRole.WRITES and spec.base_fan_out == spec.base_fan_in
        return {"shape_gain": math.sqrt(max(1.0, spec.base_fan_out / spec.base_fan_in)), "gated": gated}

    def _state_shape(self, name: str, shard: ParamShard) -> tuple[int, ...]:
        rows, columns = shard.unit
        return {"row": (rows, rows), "column": (columns, columns)}.get(name.partition("_")[0], shard.unit)

    def update(self, gradient: Tensor, state: State, group: Mapping[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """The orthogonalized momentum, preconditioned; and Gram matrices with their bases, which the next step uses."""
        gradient, momentum = gradient.float(), group["momentum"]
        buffer = state["momentum_buffer"].lerp(gradient, 1 - momentum)
        ahead = gradient.lerp(buffer, momentum)
        bases = state["row_basis"], state["column_basis"]
        direction, moment = preconditioned(ahead, state["second_moment"], *bases)
        if group["gated"]:
            direction = blended(ahead, direction, trust(direction, ahead, gradient, group["progress"]))
        update = quintic_steps(direction, schatten4(direction), [CONVERGENT] * 12) * group["shape_gain"]
        rows = state["row_gram"].lerp(gradient @ gradient.mT, 1 - BETA2)
        columns = state["column_gram"].lerp(gradient.mT @ gradient, 1 - BETA2)
        row_basis, row_order = next_basis(rows, bases[0], self.steps_taken)
        column_basis, column_order = next_basis(columns, bases[1], self.steps_taken)
        moment = moment.take_along_dim(row_order[..., None], -2).take_along_dim(column_order[..., None, :], -1)
        return update, dict(
            zip(self.state_names, (buffer, moment, rows, columns, row_basis, column_basis), strict=True)
        )

    def moved(self, values: Tensor, update: Tensor, group: Mapping[str, Any]) -> Tensor:
        """Each matrix after a step whose outward part is braked, which is not too small, and whose new norm is set."""
        lr, norm = group["lr"], frobenius(values)
        step = braked(update, values)
        if group["row_floor"]:
            lengths = (torch.linalg.vector_norm(each, dim=-1, keepdim=True) for each in (values, step))
            own, its = (each.clamp(min=1e-8) for each in lengths)
            step = step * (SMALLEST_STEP * own / its).clamp(min=1)
        else:
            step = step * (SMALLEST_STEP * norm / frobenius(step).clamp(min=1e-10)).clamp(min=1)
        to = values - lr * step
        to = to * (radius(values, step, lr) / frobenius(to).clamp(min=1e-10))
        if group["weight_decay"]:
            to = cautiously_decayed(to, lr * group["weight_decay"], step * values > 0)
        return to


def schatten4(matrices: Tensor) -> Tensor:
    """The fourth root of the sum of fourth powers of singular values of each matrix (N, R, C), (N, 1, 1), at least EPS."""
    return frobenius(matrices @ matrices.mT).sqrt().clamp(min=EPS)


def preconditioned(
    ahead: Tensor, second_moment: Tensor, row_basis: Tensor, column_basis: Tensor
) -> tuple[Tensor, Tensor]:
    """Adam's normalisation of (N, R, C) in the two bases, as large as before, and the new moment; as it was without bases."""
    inside = row_basis.mT @ ahead @ column_basis
    has_bases = row_basis.abs().amax(dim=(-2, -1), keepdim=True) > 0
    moment = torch.where(has_bases, BETA2 * second_moment + (1 - BETA2) * inside.square(), second_moment)
    outside = row_basis @ (inside / moment.clamp(min=1e-16).sqrt()) @ column_basis.mT
    return torch.where(has_bases, outside * (schatten4(ahead) / schatten4(outside)), ahead), moment


def trust(direction: Tensor, ahead: Tensor, gradient: Tensor, progress: float) -> Tensor:
    """How far to believe each direction, (N, 1, 1): by how it agrees with the momentum, and with the gradient next to it."""
    agrees = ((cosine(direction, ahead) - MIN_AGREEMENT) / (1 - MIN_AGREEMENT)).clamp(0, 1)
    downhill = (cosine(direction, gradient) / cosine(ahead, gradient).clamp(min=1e-8)).clamp(0, 1)
    return (agrees * downhill).clamp(*trust_bounds(progress))


def trust_bounds(progress: float) -> tuple[float, float]:
    """Floor and cap of the gate."""
    begin, end = TRUST_FADES
    left = min(1.0, max(0.0, (end - progress) / (end - begin)))
    return TRUST[0] * left, TRUST[1] if progress < end else 1.0


def blended(ahead: Tensor, direction: Tensor, share: Tensor | float) -> Tensor:
    """A `share` of the way from one to the other, as large as the first."""
    between = ahead + share * (direction - ahead)
    return between * (schatten4(ahead) / schatten4(between))


def cosine(x: Tensor, y: Tensor) -> Tensor:
    """Of the angle between matrices (N, R, C), (N, 1, 1)."""
    return inner(x, y) / (frobenius(x) * frobenius(y)).clamp(min=1e-16)


def inner(x: Tensor, y: Tensor) -> Tensor:
    """The sum of products of entries of each matrix, (..., 1, 1)."""
    return (x * y).sum(dim=(-2, -1), keepdim=True)


def braked(step: Tensor, values: Tensor) -> Tensor:
    """`step`, which is subtracted, with OUTWARD of its part along `values` where it would lengthen them."""
    along = inner(step, values) / frobenius(values).square().clamp(min=1e-16)
    return step - (1 - OUTWARD) * along.clamp(max=0) * values


def radius(values: Tensor, step: Tensor, lr: float) -> Tensor:
    """The norm that each matrix shall have after the step: to first order what it would have."""
    norm = frobenius(values)
    return norm - lr * inner(step, values) / norm.clamp(min=1e-10)


def next_basis(gram: Tensor, basis: Tensor, step: int) -> tuple[Tensor, Tensor]:
    """The basis (N, D, D) of Gram matrices for the next step, and the order (N, D) that its columns had in the old one.

    The first is made of eigenvectors, largest first; later ones by one step of QR iteration, as in SOAP.
    """
    if step == 1:
        vectors = torch.linalg.eigh(torch.nan_to_num(gram, 0.0, 0.0, 0.0)).eigenvectors.flip(-1)
        return vectors, torch.arange(gram.size(-1), device=gram.device).expand(gram.shape[:-1])
    sizes = (basis * (gram @ basis)).sum(dim=-2)
    order = sizes.argsort(dim=-1, descending=True, stable=True)
    ordered = basis.take_along_dim(order[..., None, :], -1)
    return torch.linalg.qr(torch.nan_to_num(gram @ ordered, 0.0, 0.0, 0.0)).Q, order
