"""200 random modules of torch.nn, with odd arguments, through every public function: right roles, or one line."""

import collections
import copy
import math
import random
import traceback
import warnings

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn.utils import parametrizations

from speedrun_mup.core import mup
from speedrun_mup.core.errors import UserError

BASE, DELTA, WIDTH = 8, 16, 32


class Bare(nn.Module):
    """Parameters of its own."""

    def __init__(self, *shapes):
        super().__init__()
        for i, shape in enumerate(shapes):
            self.register_parameter(f"p{i}", nn.Parameter(torch.randn(tuple(shape))))


class Size:
    """A finite size, or a multiple of the width."""

    def __init__(self, rng):
        self.grows, self.of = rng.random() < 0.6, rng.choice([1, 2, 3, 5])

    def __call__(self, width):
        return self.of * width if self.grows else self.of


def layer(rng):
    """A random layer as a function of width, and which axes of each of its tensors are read from: {name: axes or None}."""
    a, b, c = (Size(rng) for _ in range(3))
    k, flag, groups = rng.choice([1, 2, 3]), rng.random() < 0.5, rng.choice([1, 1, 2])
    dims = rng.choice([1, 2, 3])
    conv, transposed = (getattr(nn, f"{name}{dims}d") for name in ("Conv", "ConvTranspose"))
    recurrent, cell = rng.choice([nn.RNN, nn.LSTM, nn.GRU]), rng.choice([nn.RNNCell, nn.LSTMCell, nn.GRUCell])
    norm = rng.choice([nn.BatchNorm1d, nn.BatchNorm2d, nn.InstanceNorm1d])
    raw = [tuple(rng.choice([a, b, lambda w: 1, lambda w: 3]) for _ in range(rng.randint(0, 3))) for _ in range(2)]
    kinds = {
        "Linear": (lambda w: nn.Linear(a(w), b(w), bias=flag), {"weight": (1,)}),
        "MuReadout": (lambda w: mup.MuReadout(a(w), b(w), bias=flag, readout_zero_init=k == 1), {"weight": (1,)}),
        "Bilinear": (lambda w: nn.Bilinear(a(w), b(w), c(w), bias=flag), {"weight": (1, 2)}),
        "Conv": (lambda w: conv(groups * a(w), groups * b(w), k, groups=groups, bias=flag), {"weight": (1,)}),
        "ConvTranspose": (lambda w: transposed(a(w), b(w), k, bias=flag), {"weight": (0,)}),
        "Embedding": (lambda w: nn.Embedding(7 * k, a(w), padding_idx=0 if flag else None), {"weight": ()}),
        "EmbeddingBag": (lambda w: nn.EmbeddingBag(b(w), a(w)), {"weight": ()}),
        "LayerNorm": (lambda w: nn.LayerNorm([a(w), b(w)][:k], elementwise_affine=flag), {"weight": (), "bias": ()}),
        "RMSNorm": (lambda w: nn.RMSNorm([k, a(w)]), {"weight": ()}),
        "GroupNorm": (lambda w: nn.GroupNorm(1, a(w)), {}),
        "Norm": (lambda w: norm(a(w), affine=flag), {}),
        "PReLU": (lambda w: nn.PReLU(a(w)), {}),
        "RNN": (lambda w: recurrent(a(w), b(w), num_layers=k, bidirectional=flag), {"weight_": (1,)}),
        "LSTM": (lambda w: nn.LSTM(a(w), 8 * b(w) + c(w), proj_size=c(w)), {"weight_": (1,)}),
        "Cell": (lambda w: cell(a(w), b(w), bias=flag), {"weight_": (1,)}),
        "Attention": (
            lambda w: nn.MultiheadAttention(a(w), 1, kdim=b(w), vdim=c(w), bias=flag, add_bias_kv=not flag),
            {"proj_weight": (1,), "proj.weight": (1,), "bias_": ()},
        ),
        "Encoder": (
            lambda w: nn.TransformerEncoderLayer(a(w), 1, dim_feedforward=b(w), bias=flag),
            {"proj_weight": (1,), "proj.weight": (1,), "linear": (1,)},
        ),
        "Bare": (lambda w: Bare(*([size(w) for size in shape] for shape in raw)), {"p": None}),
        "Dropout": (lambda w: nn.Dropout(0.5), {}),
    }
    kind = rng.choice(list(kinds))
    return kind, *kinds[kind]


def wrapped(rng, kind, build):
    """The layer, sometimes under something that computes its weight, or under a wrapper."""
    ways = ["", "", "", "", "checkpoint", "weight_norm", "weight_norm_dim", "spectral_norm"]
    way = rng.choice(ways) if kind in ("Linear", "MuReadout", "Conv", "ConvTranspose", "Bilinear") else ""
    wraps = {
        "": lambda module: module,
        "checkpoint": checkpoint_wrapper,
        "weight_norm": parametrizations.weight_norm,
        "weight_norm_dim": lambda module: parametrizations.weight_norm(module, dim=1),
        "spectral_norm": parametrizations.spectral_norm,
    }
    return way, lambda width: wraps[way](build(width))


def models(seed):
    rng = random.Random(seed)
    kind, build, reads = layer(rng)
    way, build = wrapped(rng, kind, build)
    nested = rng.random() < 0.3

    def make(width):
        torch.manual_seed(seed)
        return nn.ModuleDict({"inner": nn.Sequential(build(width))}) if nested else build(width)

    return kind, way, reads, make


def expected(kind, way, reads, name, base, delta, here):
    """(role, Adam's factor) by what is read and what is written, or None for what has to be refused."""
    grows = [b != d for b, d in zip(base, delta)]
    m = [h / b for h, b in zip(here, base)]
    axes = next((axes for part, axes in reads.items() if part in name and "norm" not in name), ())
    if name.endswith("original0") or (axes and len(base) < 2):
        axes = ()  # one gain for each output; biases
    if kind == "Embedding" or kind == "EmbeddingBag":
        return None if grows[0] else ("input" if grows[1] else "scalar", 1.0)
    if axes is None:
        if sum(grows) > 2:
            return None
        if sum(grows) == 2:
            return "hidden", 1 / m[max(i for i, g in enumerate(grows) if g)]
        others = {size for size, g in zip(base, grows) if not g}
        one_row = len(base) > 2 and (others == {1} or (base[0] == 1 and not grows[0]))
        if any(grows) and len(base) > 1 and not one_row:
            return None
        axes = ()
    if kind == "MuReadout" and len(base) == 2 and (grows[0] or way not in ("", "checkpoint")):
        return None
    read, written = any(grows[i] for i in axes), any(g for i, g in enumerate(grows) if i not in axes)
    role = {(True, True): "hidden", (True, False): "output", (False, True): "input", (False, False): "scalar"}[
        read, written
    ]
    if role == "output" and kind != "MuReadout":
        return None
    return role, math.prod(1 / m[i] for i in axes) if role == "hidden" else 1.0


def refused_by_size(kind, way, reads, base, delta, here):
    """Whether what computes a weight does not fit muP: a fixed norm, or a magnitude that grows."""
    name = next((name for name in base if name.endswith(("original", "original1"))), None)
    if name is None:
        return False
    axes = next(iter(reads.values()))
    m = [h / b if b != d else 1.0 for h, b, d in zip(here[name], base[name], delta[name])]
    m_in, m_out = (math.prod(x for i, x in enumerate(m) if (i in axes) == side) for side in (True, False))
    if way == "spectral_norm":
        return m_in != m_out
    kept = 1 if way.endswith("dim") else 0
    variance = 1 / m_in if m_in > 1 else 1.0
    if not math.isclose(variance, 1 / m[1] if m[1] > 1 else 1.0) and kind != "Linear" and kind != "Conv":
        return True  # torch starts these by their second axis, and the magnitude is drawn with it
    return not math.isclose(math.prod(x for i, x in enumerate(m) if i != kept) * variance, 1.0)


def is_fair(fault):
    """A line of ours, or torch's own complaint about an argument."""
    last = traceback.extract_tb(fault.__traceback__)[-1].filename
    if isinstance(fault, UserError):
        return "\n" not in str(fault)
    return isinstance(fault, ValueError | TypeError | RuntimeError | NotImplementedError) and "/torch/" in last


def attempt(unfair, what, function, *arguments, **options):
    """The function's result, or None; a fault that is not fair goes into `unfair`."""
    try:
        return function(*arguments, **options)
    except Exception as fault:
        if not is_fair(fault):
            unfair.append((what, repr(fault), traceback.extract_tb(fault.__traceback__)[-1]))
        return None


def every_function(model, make, tmp_path, seed):
    """Call all that is public on a model that has its shapes; the unfair faults."""
    unfair = []
    call = lambda what, *rest, **options: attempt(unfair, (seed, what), *rest, **options)  # noqa: E731
    base, delta = make(BASE), make(DELTA)
    call("save", mup.save_base_shapes, model, tmp_path / "x.bsh")
    call("make", mup.make_base_shapes, base, delta, tmp_path / "x.bsh")
    call("load", mup.load_base_shapes, tmp_path / "x.bsh")
    call("from file", mup.set_base_shapes, make(WIDTH), tmp_path / "x.bsh")
    call("no base", mup.set_base_shapes, make(WIDTH), None)
    call("no delta", mup.set_base_shapes, make(WIDTH), make(BASE))
    call("again", mup.set_base_shapes, model, base, delta=delta)
    shapes = call("infshapes", mup.get_infshapes, model)
    call("apply", mup.apply_infshapes, make(WIDTH), shapes or {})
    call("apply to another", mup.apply_infshapes, base, {})
    call("clear", mup.clear_dims, shapes or {})
    call("zip", mup.zip_infshapes, base, {"x": (3,)})
    call("assert", mup.assert_hidden_size_inf, model)
    call("fold", mup.fold, model)
    call("load state", model.load_state_dict, copy.deepcopy(model.state_dict()))
    call("own bias", mup.rescale_linear_bias, model)
    for mu in (mup.MuAdam, mup.MuAdamW, mup.MuSGD, mup.MuMuon):
        optimizer = call(mu.__name__, mu, model, lr=0.1)
        call(f"{mu.__name__} list", mu, list(model.parameters()), lr=0.1)
        if optimizer is not None:
            call("add", optimizer.add_param_group, {"params": [nn.Parameter(torch.zeros(2))]})
    for name in (name for name in mup.init.__dict__ if name.endswith("_") and not name.startswith(("_", "constant"))):
        for p in model.parameters():
            call(name, getattr(mup.init, name), p)
    return unfair


@pytest.mark.slow
@pytest.mark.parametrize("block", range(8))
@pytest.mark.filterwarnings("ignore")
def test_random_modules(block, tmp_path):
    outcomes, unfair, wrong = collections.Counter(), [], []
    for seed in range(25 * block, 25 * (block + 1)):
        kind, way, reads, make = models(seed)
        base, delta, here = (
            {name: tuple(p.shape) for name, p in make(w).named_parameters()} for w in (BASE, DELTA, WIDTH)
        )
        wanted = {n: expected(kind, way, reads, n, base[n], delta[n], here[n]) for n in base}
        refuse = None in wanted.values() or refused_by_size(kind, way, reads, base, delta, here)
        model = make(WIDTH)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            made = attempt(unfair, (seed, kind, way), mup.set_base_shapes, model, make(BASE), delta=make(DELTA))
        outcomes["refused" if made is None else "accepted"] += 1
        if (made is None) != refuse:
            wrong.append((seed, kind, way, "refused" if made is None else "accepted", wanted, base, delta))
        elif made is not None:
            adam = mup.mup()
            found = {n: (s.role.value, s.factors(adam, "adam").lr) for n, _, s in mup.named_specs(model)}
            wrong += [(seed, kind, way, n, found[n], w) for n, w in wanted.items() if found[n] != pytest.approx(w)]
            unfair += every_function(model, make, tmp_path, seed)
    assert not unfair and not wrong
    assert outcomes["accepted"] >= 5 and outcomes["refused"] >= 1
