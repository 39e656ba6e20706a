"""Polar Express against numbers of the public program, against an SVD, and in bfloat16."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_golden import named
from torch import Tensor

from speedrun_mup.core.optimizers.orthogonalization import orthogonalize
from speedrun_mup.core.optimizers.polar_express import polar_express, polar_express_by_svd

GOLDEN = json.loads((Path(__file__).parent / "data" / "techniques.json").read_text())


def summary(x: Tensor) -> dict[str, Any]:
    """As in techniques.json; data/README.md says what it is."""
    flat = x.double().flatten()
    probe = flat @ torch.from_numpy(np.cos(np.arange(1, len(flat) + 1)))
    return {"sum": flat.sum().item(), "norm": flat.norm().item(), "probe": probe.item(), "first": flat[:4].tolist()}


def golden_input(case: str) -> Tensor:
    """The golden matrix of a case, or three of them, (N, d_out, d_in) in float64."""
    if case == "batch3x32x48":
        return named("A1.G.batch", torch.Size((3, 32, 48)), 1.0).double()
    shape = "64x64" if case == "tiny_scale" else case
    x = named(f"A1.G.{shape}", torch.Size(map(int, shape.split("x"))), 1.0).double()
    return (x * 1e-5 if case == "tiny_scale" else x)[None]


@pytest.mark.parametrize("case", GOLDEN["polar_express"])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-9), (torch.float32, 2e-5)])
def test_golden_matrices(case, dtype, tolerance):
    got, expected = summary(polar_express(golden_input(case).to(dtype))), GOLDEN["polar_express"][case]
    for key, value in expected.items():  # sums of thousands of terms round differently on each processor
        assert got[key] == pytest.approx(value, rel=tolerance, abs=tolerance * expected["norm"]), key


@pytest.mark.parametrize("s", GOLDEN["scalar_map"])
def test_each_singular_value_follows_the_golden_polynomial(s):
    """A diagonal matrix that is s and something else after scaling; large, so that the 1e-6 does not count."""
    value = 1e6 * float(s)
    rest = max((1e6 / 1.02) ** 2 - value**2, 0.0) ** 0.5
    for function in (polar_express, polar_express_by_svd):
        out = function(torch.diag(torch.tensor([value, rest], dtype=torch.float64))[None])
        assert out[0, 0, 0].item() == pytest.approx(GOLDEN["scalar_map"][s], rel=1e-9)


@pytest.mark.parametrize("case", GOLDEN["polar_express"])
def test_it_is_its_polynomial_of_the_singular_values(case):
    x = golden_input(case)
    torch.testing.assert_close(polar_express(x), polar_express_by_svd(x), rtol=0, atol=1e-10)


def test_it_is_nearer_to_an_orthogonal_matrix_than_newton_schulz_and_bfloat16_is_near_enough():
    x = golden_input("48x32")
    exact, out = orthogonalize(x), polar_express(x)
    values = torch.linalg.svdvals(out)
    assert values.min() > 0.859 and values.max() < 1.141
    assert (out - exact).norm() < 0.1 * exact.norm()
    assert (polar_express(x.bfloat16()) - out).norm() < 0.05 * out.norm()
    assert not polar_express(torch.zeros(2, 3, 4)).any()
