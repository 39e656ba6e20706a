"""Against SVD, torch's own optimizers and formulas written out; and the same update however many ranks share it."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import pytest
import torch
from helpers.dist import run_ranks
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from speedrun_mup.core import mup
from speedrun_mup.core.model import GPT, GPTConfig
from speedrun_mup.core.mup import PARAMETRIZATIONS, Role
from speedrun_mup.core.optimizers import (
    DistAdam,
    Muon,
    ShardedOptimizer,
    Slice,
    Tuned,
    adam_formula,
    newton_schulz,
    orthogonalize,
    param_groups,
)
from speedrun_mup.core.optimizers.normuon import NorMuon
from speedrun_mup.core.optimizers.sharding import Member, Owned
from speedrun_mup.core.utils import Handle, World, generator

Build = Callable[[list[dict[str, Any]], World], ShardedOptimizer]


def randn(*shape: int, seed: object = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=generator(0, seed, shape), dtype=dtype)


def parameters(shapes: Iterable[tuple[int, ...]], dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    return [nn.Parameter(randn(*shape, seed=("p", i)).to(dtype)) for i, shape in enumerate(shapes)]


def groups_of(params: list[nn.Parameter], **values: object) -> list[dict[str, Any]]:
    """One group per parameter, named p0, p1, ..."""
    return [{"params": [(f"p{i}", p)], **values} for i, p in enumerate(params)]


def gradient(shape: tuple[int, ...], step: int, index: int) -> Tensor:
    """The gradient of parameter `index` at `step`, summed over ranks; of very different size from row to row."""
    return randn(*shape, seed=("g", step, index)) * torch.logspace(-3, 1, shape[0]).view(-1, *[1] * (len(shape) - 1))


def step_once(optimizer: torch.optim.Optimizer, params: list[nn.Parameter], step: int) -> None:
    for i, p in enumerate(params):
        p.grad = gradient(tuple(p.shape), step, i).to(p.dtype)
    optimizer.step()


# Newton-Schulz


def with_singular_values(n: int, rows: int, columns: int, values: Tensor) -> Tensor:
    u, _ = torch.linalg.qr(randn(n, rows, min(rows, columns), seed="u", dtype=torch.float64))
    v, _ = torch.linalg.qr(randn(n, columns, min(rows, columns), seed="v", dtype=torch.float64))
    return ((u * values) @ v.mT).float()


SHAPES = [(16, 16), (48, 16), (16, 48), (64, 16), (1, 8), (8, 1), (3, 5)]


@pytest.mark.parametrize(("rows", "columns"), SHAPES)
@pytest.mark.parametrize("size", [1e-4, 1.0, 1e4])
def test_newton_schulz_is_svd_up_to_singular_values_near_1(rows, columns, size):
    """Input of condition 10, which is well-conditioned for five steps; of any size."""
    rank = min(rows, columns)
    x = with_singular_values(3, rows, columns, size * torch.logspace(-1, 0, rank, dtype=torch.float64))
    got, exact = newton_schulz(x), orthogonalize(x)
    assert got.shape == x.shape and got.dtype == x.dtype
    values = torch.linalg.svdvals(got)
    assert values.min() >= 0.6 and values.max() <= 1.3
    # The same singular vectors: seen from those of the input, the result is diagonal.
    u, _, vh = torch.linalg.svd(x, full_matrices=False)
    seen = u.mT @ got @ vh.mT
    torch.testing.assert_close(seen, torch.diag_embed(seen.diagonal(dim1=-2, dim2=-1)), rtol=0, atol=2e-4)
    torch.testing.assert_close(seen.diagonal(dim1=-2, dim2=-1).sort().values, values.sort().values, rtol=1e-3, atol=0)
    assert (got - exact).abs().max() <= 0.4


@pytest.mark.parametrize(("rows", "columns"), SHAPES)
def test_a_batch_is_its_matrices_one_by_one(rows, columns):
    x = randn(5, rows, columns) * torch.logspace(-3, 3, 5)[:, None, None]
    x[2] = 0
    got = newton_schulz(x)
    torch.testing.assert_close(got, torch.cat([newton_schulz(x[i : i + 1]) for i in range(5)]), rtol=1e-4, atol=1e-5)
    assert not got[2].any()
    torch.testing.assert_close(newton_schulz(x.mT), got.mT)
    torch.testing.assert_close(newton_schulz(-x), -got)


def test_orthogonalize_sets_every_singular_value_to_1():
    x = randn(4, 12, 5)
    torch.testing.assert_close(orthogonalize(x).mT @ orthogonalize(x), torch.eye(5).expand(4, 5, 5))
    torch.testing.assert_close(orthogonalize(orthogonalize(x)), orthogonalize(x))


def test_newton_schulz_of_a_random_matrix_keeps_small_directions_small():
    """It does not converge: that is known and wanted. A singular value far below 1e-3 of the norm stays below 1."""
    x = with_singular_values(1, 32, 32, torch.tensor([1.0] * 31 + [1e-6], dtype=torch.float64))
    values = torch.linalg.svdvals(newton_schulz(x))[0]
    assert values[-1] < 0.01 and values[-2] > 0.6 and values[0] < 1.3


# Muon


def test_muon_is_torchs_muon_where_the_two_define_the_same_thing():
    """torch.optim.Muon with adjust_lr_fn "original" multiplies the update by sqrt(max(1, rows / columns)).

    Ours has that factor in the learning rate already. torch decays by its unadjusted learning rate, ours by the one it
    steps with, so weight decay is divided by the factor. Both keep momentum as an exponential average with a Nesterov
    look-ahead. torch orthogonalizes in bfloat16 everywhere and one matrix at a time, so ours is told to use bfloat16.
    What torch does not have: stacks of matrices, a share for each rank.
    """
    shapes, lr, decay = [(12, 12), (24, 6), (6, 24), (24, 6)], 0.05, 0.1
    ours, theirs = parameters(shapes), parameters(shapes)
    groups = groups_of(ours)
    for group, (rows, columns) in zip(groups, shapes, strict=True):
        factor = math.sqrt(max(1, rows / columns))
        group |= {"lr": lr * factor, "weight_decay": decay / factor}
    muon = Muon(groups, momentum=0.9, orthogonalizer=lambda x: newton_schulz(x.bfloat16()))
    reference = torch.optim.Muon(theirs, lr=lr, weight_decay=decay, momentum=0.9, adjust_lr_fn="original")
    for step in range(4):
        step_once(muon, ours, step)
        step_once(reference, theirs, step)
    for i, start in enumerate(parameters(shapes)):
        assert (ours[i] - theirs[i]).norm() <= 0.02 * (theirs[i] - start).norm()  # bfloat16, rounded at other places
        buffer = reference.state[theirs[i]]["momentum_buffer"]
        torch.testing.assert_close(muon.slices()[f"p{i}/momentum_buffer"].tensor, buffer.flatten())


def test_muon_step_by_step():
    """buf = mu buf + (1 - mu) g; u = (1 - mu) g + mu buf; p = (1 - lr wd) p - lr O(u), for each matrix of a stack."""
    shapes = [(3, 6, 4), (6, 4), (4, 4)]
    params = parameters(shapes)
    expected = [p.detach().clone() for p in params]
    buffers = [torch.zeros(shape) for shape in shapes]
    muon = Muon(groups_of(params, lr=0.1, weight_decay=0.2), momentum=0.7, orthogonalizer=orthogonalize)
    for step in range(3):
        momentum = 0.7 + 0.1 * step
        for group in muon.param_groups:
            group["momentum"] = momentum
        step_once(muon, params, step)
        for i, shape in enumerate(shapes):
            g = gradient(shape, step, i)
            buffers[i] = momentum * buffers[i] + (1 - momentum) * g
            ahead = (1 - momentum) * g + momentum * buffers[i]
            matrices = [orthogonalize(m[None])[0] for m in ahead.view(-1, *shape[-2:])]
            expected[i] = (1 - 0.1 * 0.2) * expected[i] - 0.1 * torch.stack(matrices).view(shape)
    torch.testing.assert_close([p.detach() for p in params], expected, rtol=1e-4, atol=1e-5)


def test_muon_leaves_gradients_alone_and_survives_their_absence():
    params = parameters([(4, 4), (4, 4)])
    kept = [p.detach().clone() for p in params]
    params[0].grad = gradient((4, 4), 0, 0)
    Muon(groups_of(params)).step()
    assert torch.equal(params[0].grad, gradient((4, 4), 0, 0))
    assert not torch.equal(params[0], kept[0]) and torch.equal(params[1], kept[1])


def test_muon_takes_matrices_only():
    for shape in ((5,), (2, 2, 2, 2)):
        with pytest.raises(ValueError, match="Muon takes matrices or stacks of them; p0 has shape"):
            Muon(groups_of(parameters([shape])))


# Adam


def test_adam_is_torchs_adam_when_eps_does_not_bind():
    shapes = [(7,), (5, 3), (2, 3, 4), (1,)]
    ours, theirs = parameters(shapes), parameters(shapes)
    adam = DistAdam(groups_of(ours, lr=0.03, betas=(0.8, 0.95), eps=0.0))
    reference = torch.optim.Adam(theirs, lr=0.03, betas=(0.8, 0.95), eps=0.0)
    for step in range(5):
        step_once(adam, ours, step)
        step_once(reference, theirs, step)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("decay", [0.0, 0.3])
def test_adam_with_an_eps_that_binds_is_the_records_formula(decay):
    """eps is not bias-corrected there. torch's eps is: the two differ by far more than rounding."""
    lr, (b1, b2), eps = 0.03, (0.8, 0.95), 0.5
    shapes = [(7,), (5, 3)]
    params, theirs = parameters(shapes), parameters(shapes)
    expected = [p.detach().double() for p in params]
    m, v = ([torch.zeros(shape, dtype=torch.float64) for shape in shapes] for _ in range(2))
    adam = DistAdam(groups_of(params, lr=lr, betas=(b1, b2), eps=eps, weight_decay=decay))
    torchs = torch.optim.AdamW(theirs, lr=lr, betas=(b1, b2), eps=eps, weight_decay=decay)
    for step in range(4):
        step_once(adam, params, step)
        step_once(torchs, theirs, step)
        t = step + 1
        for i, shape in enumerate(shapes):
            g = gradient(shape, step, i).double()
            m[i] = b1 * m[i] + (1 - b1) * g
            v[i] = b2 * v[i] + (1 - b2) * g**2
            expected[i] = (1 - lr * decay) * expected[i]
            expected[i] -= lr * math.sqrt(1 - b2**t) / (1 - b1**t) * m[i] / (v[i].sqrt() + eps)
    for mine, wanted, other in zip(params, expected, theirs, strict=True):
        torch.testing.assert_close(mine.detach().double(), wanted, rtol=1e-5, atol=1e-6)
        assert (mine - other).abs().max() > 0.005


def test_adam_in_bfloat16_computes_in_float32_and_rounds_once():
    """Moments have the parameter's type, as in the record; a step is the float32 step from them, rounded."""
    params = parameters([(9, 4)], torch.bfloat16)
    adam = DistAdam(groups_of(params, lr=0.1, weight_decay=0.1))
    m = v = torch.zeros(36)
    for step in range(3):
        before = params[0].detach().float().flatten()
        step_once(adam, params, step)
        g = gradient((9, 4), step, 0).bfloat16().float().flatten()
        m, v, t = 0.8 * m + 0.2 * g, 0.95 * v + 0.05 * g**2, step + 1
        wanted = before * (1 - 0.01) - 0.1 * math.sqrt(1 - 0.95**t) / (1 - 0.8**t) * m / (v.sqrt() + 1e-10)
        m, v = m.bfloat16().float(), v.bfloat16().float()
        found = adam.slices()
        assert {part.tensor.dtype for part in found.values()} == {torch.bfloat16}
        for got, exact in (
            (params[0].detach().flatten(), wanted),
            (found["p0/exp_avg"].tensor, m),
            (found["p0/exp_avg_sq"].tensor, v),
        ):
            assert got.dtype == torch.bfloat16
            torch.testing.assert_close(got.float(), exact.bfloat16().float(), rtol=2**-7, atol=1e-8)  # one unit at most
            m, v = found["p0/exp_avg"].tensor.float(), found["p0/exp_avg_sq"].tensor.float()


@pytest.mark.parametrize("good", [None, True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_formula_for_a_compiler_is_adam(dtype, good):
    """In bfloat16 too both round once, so that an entry is one unit off at most, where the last bits of float32 differ."""
    shapes = [(16, 8), (5,)]
    runs = [parameters(shapes, dtype) for _ in range(2)]
    optimizers = [DistAdam(groups_of(params, eps=1e-3), lr=0.05, weight_decay=0.1) for params in runs]
    optimizers[1].formula = adam_formula
    for step in range(4):
        for params, optimizer in zip(runs, optimizers, strict=True):
            for i, p in enumerate(params):
                p.grad = gradient(tuple(p.shape), step, i).to(dtype)
            optimizer.step(good if good is None else torch.tensor(good or step == 0))
    rtol = 1e-5 if dtype is torch.float32 else 2**-7
    for plain, fused in zip(*runs, strict=True):
        torch.testing.assert_close(fused, plain, rtol=rtol, atol=1e-6)
    states = [{key: part.tensor for key, part in optimizer.slices().items()} for optimizer in optimizers]
    torch.testing.assert_close(states[1], states[0], rtol=rtol, atol=1e-6)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [1, 3])
def test_compiled_adam_is_adam_on_a_gpu(dtype, size):
    """Shares of 1,000,003 entries and of two, after a checkpoint too, and a step that is withheld.

    In bfloat16 a last bit of float32 can round an entry the other way, a unit of what it was then, not of what is left
    of it after later steps: entries may differ by two units of a step's 0.05 to 0.1, and 99 of 100 not at all.
    """
    torch.compiler.reset()  # eight variants of a function are all that a process compiles
    rtol, atol = (1e-5, 1e-6) if dtype is torch.float32 else (2**-6, 2**-7 * 0.1)
    for rank in range(size):
        world = World(rank, size, torch.device("cuda"))
        results = []
        for compiled in (False, True):
            params = [nn.Parameter(p.detach().cuda()) for p in parameters([(1_000_003,), (2,)], dtype)]
            optimizer = DistAdam(groups_of(params, eps=1e-3), world, lr=0.05, weight_decay=0.1)
            if compiled:
                optimizer.compile_parts()
            for step in range(4):
                optimizer.steps_taken += 1
                for i, shard in enumerate(optimizer.shards):
                    ((_, p, group),) = shard.members
                    g = randn(*p.shape, seed=("g", step, i)).to(dtype).cuda()[shard.first : shard.first + shard.count]
                    good = None if step == 0 else torch.tensor(step != 2, device="cuda")
                    optimizer.update_in_place(shard.values(), g, optimizer.state_of(shard), group, good)
                if step == 1:
                    kept = {key: part.tensor.clone() for key, part in optimizer.slices().items()}
                    optimizer.load_slices(lambda key, begin, end, kept=kept: kept[key], optimizer.steps_taken)
            results.append([*(p.detach() for p in params), *(part.tensor for part in optimizer.slices().values())])
        for plain, fused in zip(*results, strict=True):
            torch.testing.assert_close(fused, plain, rtol=rtol, atol=atol)
            assert dtype is torch.float32 or (fused != plain).sum() <= 0.01 * len(plain)


def test_adam_does_nothing_for_a_zero_gradient_but_decay():
    """With the default eps 0 / (0 + eps) is 0: rows of an embedding that were never seen stay where they are."""
    params = parameters([(6, 2)])
    kept = params[0].detach().clone()
    params[0].grad = torch.zeros(6, 2)
    adam = DistAdam(groups_of(params, lr=0.1, eps=Tuned("adam", 0.1).eps))
    adam.step()
    assert torch.equal(params[0], kept)
    adam.param_groups[0]["weight_decay"] = 0.5
    adam.step()
    torch.testing.assert_close(params[0].detach(), kept * (1 - 0.1 * 0.5))


def test_adam_skips_a_parameter_without_gradient():
    params = parameters([(3,), (3,)])
    kept = params[1].detach().clone()
    params[0].grad = torch.ones(3)
    adam = DistAdam(groups_of(params, lr=0.1))
    adam.step()
    assert torch.equal(params[1], kept) and set(adam.slices()) == {"p0/exp_avg", "p0/exp_avg_sq"}


# Groups from the rule table


def tiny(width: int, parametrization: str) -> GPT:
    return GPT(GPTConfig(20, 0, 6, width, 16, 8, 8, parametrization))


def tuned(hidden: str) -> dict[str, Tuned]:
    """Every group at its own learning rate, so that one taken for another is seen."""
    rates = {"embed": 0.6, "value_embed": 0.5, "head": 0.22, "scalar": 0.04}
    matrix = Tuned(hidden, 0.05 if hidden == "muon" else 0.002, weight_decay=0.2, eps=1e-9)
    return {group: Tuned("adam", lr, 0.1, 1e-9) for group, lr in rates.items()} | {"matrix": matrix}


def kind(name: str) -> str:
    """The name of a parameter without its place: c_fc, for blocks.3.mlp.c_fc.weight."""
    return [word for word in name.split(".") if word != "weight" and not word.isdigit()][-1]


def effective_rates(model: GPT, hidden: str) -> dict[str, set[float]]:
    """The length of a step by every parameter, measured: entrywise for Adam, as a spectral norm for Muon."""
    for parameter in model.parameters():
        nn.init.zeros_(parameter)
    groups = param_groups(model, model.cfg.rules, tuned(hidden))
    optimizers: list[ShardedOptimizer] = [DistAdam(groups["adam"])]
    if hidden == "muon":
        optimizers.append(Muon(groups["muon"], orthogonalizer=orthogonalize))
    for parameter in model.parameters():
        parameter.grad = randn(*parameter.shape) if parameter.ndim > 1 else torch.ones_like(parameter)
        if hidden == "adam" or parameter.ndim == 1 or parameter.size(0) == model.cfg.padded_vocab:
            parameter.grad = parameter.grad.sign()
    for optimizer in optimizers:
        optimizer.step()
    by_muon = {name for optimizer in optimizers[1:] for name, _, _ in optimizer.named_groups()}
    measured: dict[str, set[float]] = {}
    for name, p in model.named_parameters():
        steps = torch.linalg.svdvals(p.detach()) if name in by_muon else p.detach().abs()
        assert steps.max() <= steps.min() * 1.0001, name
        measured.setdefault(kind(name), set()).add(float(f"{steps.max().item():.3g}"))
    return measured


SCALARS = ("skip_weights", "x0_lambdas", "lambdas")
RATES = {"embed": {0.6}, "value_embeds": {0.5}, "lm_head": {0.22}} | {name: {0.04} for name in SCALARS}


@pytest.mark.parametrize(
    ("hidden", "parametrization", "matrices", "c_fc"),
    [
        ("muon", "mup", 0.05, 0.1),  # c_fc is four times taller than wide: sqrt(4)
        ("muon", "record26", 0.05, 0.1),
        ("muon", "muon-over-m", 0.05 / 4, 0.1 / 4),
        ("muon", "muon-sqrt-m", 0.05 * 2, 0.1 * 2),
        ("adam", "mup", 0.002 / 4, 0.002 / 4),
        ("adam", "record26", 0.002, 0.002),
        ("adam", "adam-constant", 0.002, 0.002),
    ],
)
def test_effective_learning_rates_at_four_times_the_base_width(hidden, parametrization, matrices, c_fc):
    """The head and the embeddings have equal shapes and different rates: grouping by shape would mix them up."""
    rates = effective_rates(tiny(64, parametrization), hidden)
    assert {name: rates[name] for name in RATES} == RATES
    assert rates["qkv_w"] == rates["c_proj"] == {matrices}
    assert rates["c_fc"] == {c_fc}


@pytest.mark.parametrize("hidden", ["muon", "adam"])
@pytest.mark.parametrize("parametrization", PARAMETRIZATIONS)
def test_at_base_width_every_table_gives_the_tuned_values_exactly(hidden, parametrization):
    model = tiny(16, parametrization)
    values = {
        name: {key: value for key, value in group.items() if key != "params"}
        for groups in param_groups(model, model.cfg.rules, tuned(hidden)).values()
        for group in groups
        for name, _ in group["params"]
    }
    assert set(values) == {name for name, _ in model.named_parameters()}
    for name, _, spec in mup.named_specs(model):
        base = tuned(hidden)[spec.group]
        lr = base.lr * 2 if base.optimizer == "muon" and name.endswith("c_fc.weight") else base.lr
        expected = {"lr": lr, "initial_lr": lr}
        expected |= dict.fromkeys(("weight_decay", "initial_weight_decay"), base.weight_decay)
        assert values[name] == expected | ({"eps": base.eps} if base.optimizer == "adam" else {}), name


@pytest.mark.parametrize(("hidden", "matrix_decay"), [("muon", 0.2), ("adam", 0.2 * 4)])
def test_eps_and_weight_decay_at_four_times_the_base_width(hidden, matrix_decay):
    """eps follows the size of gradients, 1/m but for scalars; lr * weight_decay stays what it was."""
    model = tiny(64, "mup")
    for optimizer, groups in param_groups(model, model.cfg.rules, tuned(hidden)).items():
        for group in groups:
            ((name, _),) = group["params"]
            if optimizer == "adam":
                assert group["eps"] == pytest.approx(1e-9 if kind(name) in SCALARS else 1e-9 / 4), name
            hidden_matrix = name.startswith("blocks.") and kind(name) not in SCALARS
            assert group["weight_decay"] == pytest.approx(matrix_decay if hidden_matrix else 0.1), name


def test_a_depth_multiplier_is_heeded():
    """Parameters that write into the stream may have one; the learning rate of muP is divided by it."""
    layer = nn.Linear(8, 8, bias=False)
    mup.declare(layer, "weight", Role.HIDDEN, (8, 8), "out in", "matrix", m_depth=2.0)
    for hidden, lr in (("muon", 0.05), ("adam", 0.002)):
        (group,) = param_groups(layer, PARAMETRIZATIONS["mup"], tuned(hidden))[hidden]
        assert group["lr"] == pytest.approx(lr / 2)


def test_an_undeclared_parameter_or_an_untuned_group_is_an_error():
    with pytest.raises(mup.UndeclaredParameterError):
        param_groups(nn.Linear(2, 2), PARAMETRIZATIONS["mup"], tuned("muon"))
    with pytest.raises(KeyError, match="scalar"):
        param_groups(
            tiny(16, "mup"), PARAMETRIZATIONS["mup"], {k: v for k, v in tuned("muon").items() if k != "scalar"}
        )
    with pytest.raises(ValueError, match="spectral update must not own output parameters"):
        param_groups(tiny(16, "mup"), PARAMETRIZATIONS["mup"], tuned("muon") | {"head": Tuned("muon", 0.1)})


# Shares


def adam(groups: list[dict[str, Any]], world: World) -> DistAdam:
    return DistAdam(groups, world, lr=0.05, weight_decay=0.1)


def muon(groups: list[dict[str, Any]], world: World) -> Muon:
    return Muon(groups, world, lr=0.05, weight_decay=0.1)


def normuon(groups: list[dict[str, Any]], world: World) -> NorMuon:
    return NorMuon(groups, world, lr=0.05, weight_decay=0.1)


ADAM_SHAPES = [(7,), (5, 3), (1,), (2, 3, 4)]  # no size divides by two and by three
MUON_SHAPES = [(3, 4, 4), (4, 4), (6, 4), (4, 6), (2, 6, 4)]  # 4 + 3 + 1 matrices
EACH = pytest.mark.parametrize(
    ("build", "shapes"),
    [(adam, ADAM_SHAPES), (muon, MUON_SHAPES), (normuon, MUON_SHAPES)],
    ids=["adam", "muon", "normuon"],
)


PARTS = {1: [1], 2: [2, -1], 3: [1, 1, -1]}  # of the gradient, by rank: their sum is it exactly, in any order and type


def after_three_steps(build: Build, shapes: list[tuple[int, ...]], world: World, dtype: torch.dtype) -> tuple[Any, Any]:
    """Parameters and this rank's slices. Every rank has its own part of the gradient."""
    params = parameters(shapes, dtype)
    optimizer = build(groups_of(params), world)
    for step in range(3):
        for i, p in enumerate(params):
            p.grad = (PARTS[world.size][world.rank] * gradient(tuple(p.shape), step, i)).to(dtype)
        optimizer.step()
    return [p.detach() for p in params], optimizer.slices()


@pytest.mark.dist
@pytest.mark.parametrize("size", [2, 3])
@EACH
def test_ranks_together_take_the_step_of_one(build, shapes, size):
    alone, whole = after_three_steps(build, shapes, World(), torch.float32)
    answers = run_ranks(size, lambda world: after_three_steps(build, shapes, world, torch.float32))
    for params, _ in answers:
        torch.testing.assert_close(params, alone, rtol=1e-5, atol=1e-6)
        assert all(map(torch.equal, params, answers[0][0]))  # among themselves ranks agree to the bit
    for key, part in merged([slices for _, slices in answers]).items():
        torch.testing.assert_close(part, whole[key].tensor, rtol=1e-5, atol=1e-6)


@pytest.mark.dist
def test_ranks_share_bfloat16_parameters_too():
    """The embeddings of the record. Adam works entry by entry, so sharing changes no bit."""
    alone, whole = after_three_steps(adam, ADAM_SHAPES, World(), torch.bfloat16)
    answers = run_ranks(3, lambda world: after_three_steps(adam, ADAM_SHAPES, world, torch.bfloat16))
    for params, _ in answers:
        assert all(map(torch.equal, params, alone))
    for key, state in merged([slices for _, slices in answers]).items():
        assert state.dtype == torch.bfloat16 and torch.equal(state, whole[key].tensor)


def merged(ranks: list[dict[str, Slice]]) -> dict[str, Tensor]:
    """Whole states from the slices of all ranks, which must tile them."""
    whole: dict[str, Tensor] = {}
    for key in sorted({key for slices in ranks for key in slices}):
        parts = sorted((slices[key] for slices in ranks if key in slices), key=lambda part: (part.begin, part.end))
        assert [part.begin for part in parts] == [0, *(part.end for part in parts[:-1])], key
        assert all(len(part.tensor) == part.end - part.begin for part in parts)
        whole[key] = torch.cat([part.tensor for part in parts]).clone()
    return whole


def fetch_from(states: dict[str, Tensor]) -> Callable[[str, int, int], Tensor]:
    return lambda key, begin, end: states[key][begin:end]


def shared_out(build: Build, shapes: list[tuple[int, ...]], states: dict[str, Tensor], size: int) -> dict[str, Tensor]:
    """Load `states` into `size` ranks and collect what they then hold. No rank talks to another for that."""
    ranks = []
    for rank in range(size):
        optimizer = build(groups_of(parameters(shapes)), World(rank, size))
        optimizer.load_slices(fetch_from(states), 2)
        assert optimizer.steps_taken == 2
        ranks.append(optimizer.slices())
    return merged(ranks)


@given(st.integers(1, 9), st.integers(1, 9))
@settings(deadline=None, max_examples=10)
@pytest.mark.parametrize("build", [adam, muon, normuon])
def test_state_moves_between_any_numbers_of_ranks_and_training_goes_on_bit_for_bit(build, size, other):
    shapes = ADAM_SHAPES if build is adam else MUON_SHAPES
    params = parameters(shapes)
    optimizer = build(groups_of(params), World())
    for step in range(2):
        step_once(optimizer, params, step)
    states = merged([optimizer.slices()])
    kept = {adam: ["exp_avg", "exp_avg_sq"], muon: ["momentum_buffer"], normuon: ["momentum_buffer", "second_moment"]}
    assert {key: len(state) for key, state in states.items()} == {
        f"p{i}/{state}": math.prod(shape[:-1] if state == "second_moment" else shape)
        for i, shape in enumerate(shapes)
        for state in kept[build]
    }
    once = shared_out(build, shapes, states, size)
    twice = shared_out(build, shapes, once, other)
    assert all(torch.equal(states[key], twice[key]) for key in states) and states.keys() == twice.keys()

    resumed_params = [nn.Parameter(p.detach().clone()) for p in params]
    resumed = build(groups_of(resumed_params), World())
    resumed.load_slices(fetch_from(twice), 2)
    for step in range(2, 4):
        step_once(optimizer, params, step)
        step_once(resumed, resumed_params, step)
    assert all(map(torch.equal, params, resumed_params))


@EACH
def test_a_rank_holds_no_more_than_its_share(build, shapes):
    states = merged([after_three_steps(build, shapes, World(), torch.float32)[1]])
    total = sum(len(state) for state in states.values())
    for size in (2, 4):
        for rank in range(size):
            optimizer = build(groups_of(parameters(shapes)), World(rank, size))
            optimizer.load_slices(fetch_from(states), 3)
            held = sum(len(part.tensor) for part in optimizer.slices().values())
            assert held <= total / size + (2 * len(shapes) if build is adam else 3 * 24)


@EACH
def test_before_the_first_step_and_after_a_reset_there_is_no_state(build, shapes):
    params = parameters(shapes)
    optimizer = build(groups_of(params), World())

    def nothing(key: str, begin: int, end: int) -> Tensor:
        raise AssertionError(f"{key} was asked for")

    assert optimizer.slices() == {}
    optimizer.load_slices(nothing, 0)
    step_once(optimizer, params, 0)
    first = [p.detach().clone() for p in params]
    step_once(optimizer, params, 1)
    optimizer.reset()
    assert optimizer.slices() == {} and optimizer.steps_taken == 0
    for p, start in zip(params, parameters(shapes), strict=True):
        p.data.copy_(start.detach())
    step_once(optimizer, params, 0)
    assert all(map(torch.equal, params, first))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@EACH
def test_where_a_step_is_not_good_nothing_changes(build, shapes, dtype):
    """Even if every gradient is NaN; and where it is good, `good` changes no bit."""
    plain, gated = parameters(shapes, dtype), parameters(shapes, dtype)
    first, second = build(groups_of(plain), World()), build(groups_of(gated), World())
    for step in range(3):
        for i, (p, q) in enumerate(zip(plain, gated, strict=True)):
            p.grad = gradient(tuple(p.shape), step, i).to(dtype)
            q.grad = p.grad.clone()
        first.step()
        second.step(torch.tensor(True))
        kept = [p.detach().clone() for p in gated], {key: s.tensor.clone() for key, s in second.slices().items()}
        for q in gated:
            q.grad = torch.full_like(q, float("nan"))
        second.step(torch.tensor(False))
        second.steps_taken -= 1
        assert all(map(torch.equal, gated, kept[0])) and all(map(torch.equal, plain, gated))
        assert all(torch.equal(s.tensor, kept[1][key]) for key, s in second.slices().items())


class Apart:
    """Another placement: parameters are stored flat and elsewhere, and their values gathered for an update, as in FSDP2.

    It has the methods of `ParamShard` and nothing of `Replicated`: an optimizer may need no more.
    """

    def __init__(self, members: Sequence[Member], unit: tuple[int, ...], world: World):
        self.members, self.unit, self.state = members, unit, {}
        self.flat = [parameter.detach().clone().flatten() for _, parameter, _ in members]
        self.counts = [len(flat) // math.prod(unit) for flat in self.flat]
        self.count = sum(self.counts)

    def owned(self) -> Iterator[Owned]:
        starts = itertools.accumulate(self.counts, initial=0)
        return (Owned(member.name, 0, n, start) for member, n, start in zip(self.members, self.counts, starts))

    def collect_gradients(self) -> tuple[Tensor, Handle]:
        return torch.cat([p.grad.reshape(-1, *self.unit) for _, p, _ in self.members]), Handle()

    def values(self) -> Tensor:
        return self.flat[0].clone()

    def publish_values(self, values: Tensor) -> Handle:
        return Handle(lambda: self.flat[0].copy_(values))

    def stored(self) -> list[Tensor]:
        return self.flat

    def publish_updates(self, updates: Tensor) -> tuple[list[Tensor], Handle]:
        return [part.flatten() for part in updates.split(self.counts)], Handle()


@pytest.mark.parametrize("kind, shapes", [(DistAdam, ADAM_SHAPES), (Muon, MUON_SHAPES), (NorMuon, MUON_SHAPES)])
def test_an_optimizer_knows_placement_by_its_protocol_alone(kind, shapes):
    here, elsewhere = parameters(shapes), parameters(shapes)
    plain, apart = kind(groups_of(here)), kind(groups_of(elsewhere), placement=Apart)
    for step in range(3):
        step_once(plain, here, step)
        step_once(apart, elsewhere, step)
    stored = {member.name: flat for shard in apart.shards for member, flat in zip(shard.members, shard.flat)}
    assert all(torch.equal(p.detach().flatten(), stored[f"p{i}"]) for i, p in enumerate(here))
    assert all(map(torch.equal, elsewhere, parameters(shapes)))
    ours, theirs = plain.slices(), apart.slices()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key].tensor, theirs[key].tensor) for key in ours)
