"""SOAP-Muon against numbers of the public program, piece by piece and whole; its width rule; resuming."""

from __future__ import annotations

import pytest
import torch
from test_cautious import GOLDEN, close, steps
from test_golden import named
from torch import Tensor, nn

from speedrun_mup.config import make_config
from speedrun_mup.coord_check import CheckVerdict, gpt_coord_check
from speedrun_mup.core import mup
from speedrun_mup.core.errors import ConfigError
from speedrun_mup.core.model import GPT
from speedrun_mup.core.mup import Role
from speedrun_mup.core.optimizers.orthogonalization import orthogonalize
from speedrun_mup.core.optimizers.soap import (
    SoapMuon,
    blended,
    braked,
    next_basis,
    preconditioned,
    radius,
    schatten4,
    trust,
    trust_bounds,
)
from speedrun_mup.training import train
from speedrun_mup.training.model_config import Vocabulary, model_config

PIECES = GOLDEN["soap"]["pieces"]
CASES = [(result, case) for result in ("44", "46") for case in GOLDEN["soap"][f"soap_muon_{result}"]]


def tensor(name: str, *shape: int, scale: float = 1.0) -> Tensor:
    """A golden input, (1, rows, columns) in float64."""
    return named(name, torch.Size(shape), scale).double()[None]


@pytest.mark.parametrize("result, case", CASES)
def test_golden_steps(result, case):
    parameter = nn.Parameter(named("opt.P.64x64", torch.Size((64, 64)), float(case.rpartition("P")[2])))
    before = parameter.detach().clone()
    last = result == "46"
    group = {"params": [("p", parameter)], "row_floor": last, "weight_decay": 0.025 if last else 0.0}
    optimizer = SoapMuon([group | {"gated": case.startswith("attn.proj")}])
    golden = GOLDEN["soap"][f"soap_muon_{result}"][case]
    after = steps(optimizer, [named(f"opt.G{t}.64x64", torch.Size((64, 64)), 1.0) for t in range(4)])
    movement = (after[-1] - before).norm().item()
    for got, expected in zip(after, golden["after"], strict=True):
        close(got, expected, 6e-5 * movement)
    slices = optimizer.slices()
    for state, name in (("row_gram", "row_gg"), ("column_gram", "col_gg"), ("second_moment", "exp_avg_sq")):
        close(slices[f"p/{state}"].tensor, golden[name], 1e-3 * golden[name]["norm"])


def test_golden_pieces():
    u, w = tensor("T3.u", 48, 32), tensor("T3.w", 48, 32)
    assert schatten4(u).item() == pytest.approx(PIECES["schatten4_norm"], rel=1e-9)
    fourth = torch.linalg.svdvals(u[0]).pow(4).sum() ** 0.25
    assert schatten4(u).item() == pytest.approx(fourth.item(), rel=1e-9)
    inward, outward = u + 0.2 * w, u - 0.2 * w
    close(braked(inward, w)[0], PIECES["radial_inward"], 1e-8)
    close(braked(outward, w)[0], PIECES["radial_outward"], 1e-8)
    assert torch.equal(braked(inward, w), inward) and not torch.equal(braked(outward, w), outward)
    assert radius(w, u, 0.1).item() == pytest.approx(PIECES["target_radius"], rel=1e-9)
    raw, s, g = (tensor(f"T3.{name}", 64, 64) for name in ("raw", "s", "g"))
    pairs = [(0.5 * raw + s, raw + g), (raw + 1.5 * g, raw + g)]
    gates = [trust(direction, ahead, g, 1.0).item() for direction, ahead in pairs]
    assert gates == pytest.approx(PIECES["trust_gate"], abs=1e-9)
    assert trust(*pairs[0], g, 0.0).item() == pytest.approx(0.45)
    for step, floor in PIECES["trust_floor_by_step"].items():
        assert trust_bounds(int(step) / 2900)[0] == pytest.approx(floor, abs=1e-9)
        assert trust_bounds(int(step) / 2900)[1] == (0.85 if int(step) < 1625 else 1.0)
    close(blended(raw, s, 0.5)[0], PIECES["blend_half"], 1e-8)


def test_golden_bases_of_a_rectangular_matrix():
    """From a given state: eigenvectors of Gram matrices, then one refresh."""
    golden = PIECES["soap_given_state_48x32"]
    a, b = tensor("T3.rowA", 48, 96), tensor("T3.colB", 32, 96)
    rows, columns, moment = a @ a.mT / 96, b @ b.mT / 96, torch.full((1, 48, 32), 0.5, dtype=torch.float64)
    (row_basis, _), (column_basis, _) = next_basis(rows, rows, 1), next_basis(columns, columns, 1)
    first, moment = preconditioned(tensor("T3.m", 48, 32), moment, row_basis, column_basis)
    close(first[0], golden["precond"], 1e-7)
    g = tensor("T3.g48", 48, 32)
    rows, columns = 0.9 * rows + 0.1 * g @ g.mT, 0.9 * columns + 0.1 * g.mT @ g
    close(rows[0], golden["row_gg"], 1e-8)
    row_basis, row_order = next_basis(rows, row_basis, 2)
    column_basis, column_order = next_basis(columns, column_basis, 2)
    moment = moment[:, row_order[0]][:, :, column_order[0]]
    second, _ = preconditioned(tensor("T3.m2", 48, 32), moment, row_basis, column_basis)
    close(second[0], golden["precond_after_refresh"], 1e-6)


def test_preconditioning_is_adam_in_the_bases_of_singular_vectors():
    """The slow reference: entry by entry in a basis of one's own, for the second step."""
    u, basis = tensor("T3.u", 8, 8)[:, :8, :8], orthogonalize(tensor("T3.w", 8, 8))
    moment = torch.full_like(u, 0.3)
    got, new = preconditioned(u, moment, basis, basis)
    inside = basis[0].T @ u[0] @ basis[0]
    for i in range(8):
        for j in range(8):
            wanted = 0.9 * 0.3 + 0.1 * inside[i, j] ** 2
            assert new[0, i, j].item() == pytest.approx(wanted.item())
            inside[i, j] /= wanted**0.5
    outside = basis[0] @ inside @ basis[0].T
    torch.testing.assert_close(got[0] / got.norm(), outside / outside.norm())
    assert schatten4(got).item() == pytest.approx(schatten4(u).item())
    assert torch.equal(preconditioned(u, moment, torch.zeros_like(u), torch.zeros_like(u))[0], u)


def test_the_gate_is_on_in_the_output_of_attention_alone():
    model = GPT(model_config(make_config("laptop", {"width": 64, "hidden_init": "track3"}), Vocabulary(257)))
    options = {name: SoapMuon.options_for(spec) for name, _, spec in mup.named_specs(model) if spec.role is Role.HIDDEN}
    assert {name.split(".", 2)[2] for name, option in options.items() if option["gated"]} == {"attn.c_proj.weight"}
    assert {option["shape_gain"] for name, option in options.items() if "c_fc" in name} == {2.0}


def test_a_bad_gradient_is_survived_and_changes_nothing():
    parameter = nn.Parameter(torch.eye(4))
    optimizer = SoapMuon([{"params": [("p", parameter)]}])
    for bad in (True, False, True):
        parameter.grad = torch.full((4, 4), float("nan")) if bad else torch.arange(16.0).view(4, 4) - 7
        optimizer.step(torch.tensor(not bad))
    assert parameter.isfinite().all() and not torch.equal(parameter.detach(), torch.eye(4))
    with pytest.raises(ConfigError, match="SOAP-Muon .* p begins at zero"):
        SoapMuon([{"params": [("p", nn.Parameter(torch.zeros(4, 4)))]}])


@pytest.mark.slow
def test_a_run_learns_and_resumes_to_the_same_bits(tiny):
    still = {"cooldown": 0.0, "window_tokens": 32, "iterations": 4, "width": 32, "matrix_optimizer": "soap-muon"}
    whole, half = train(tiny(name="whole", **still)), train(tiny(name="half", **still | {"iterations": 2}))
    assert train(tiny(resume=str(half.folder), **still)).val_loss == whole.val_loss


SMALL = {"data": "synthetic", "width": 32, "base_width": 32, "head_dim": 16, "block_size": 32}


@pytest.mark.slow
@pytest.mark.parametrize("table, verdict", [("mup", CheckVerdict.PASS), ("muon-over-m", CheckVerdict.FAIL)])
def test_the_coordinate_check_passes_and_its_control_fails(table, verdict):
    cfg = make_config("laptop", SMALL | {"matrix_optimizer": "soap-muon", "parametrization": table})
    found = gpt_coord_check(cfg, widths=(32, 64, 128), tokens=192, progress=False, controls=False)
    failed = found.verdict is CheckVerdict.FAIL
    assert failed is (verdict is CheckVerdict.FAIL), found.summary()
