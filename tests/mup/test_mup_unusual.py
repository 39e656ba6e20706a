"""Models that are not made of plain Linear layers: ties, bare matrices, parametrized layers, wrappers, later groups."""

import copy
import functools
import io
import os
import pickle

import pytest
import torch
import torch.nn.functional as F
from helpers.mup_zoo import Tiny, learning_rates, loss_of, tiny, tokens
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn.utils import parametrizations, prune

from speedrun_mup.core import mup
from speedrun_mup.core.errors import ConfigError, UserError
from speedrun_mup.core.mup import Role


def shaped(build, width=64, base=16, **options):
    """build(width) over build(base), seeded."""
    torch.manual_seed(0)
    return mup.set_base_shapes(build(width), build(base), delta=build(2 * base), **options)


def roles(model):
    return {name: spec.role.value for name, _, spec in mup.named_specs(model)}


def one_line(fault):
    return "\n" not in str(fault.value) and len(str(fault.value)) < 1000


# Ties


class Tied(nn.Module):
    """An embedding and a readout, tied one way or another."""

    def __init__(self, width, tie="", head=mup.MuReadout, first="emb"):
        super().__init__()
        parts = {"emb": nn.Embedding(50, width), "mid": nn.Linear(width, width), "head": head(width, 50)}
        for name in sorted(parts, key=lambda name: name != first):
            setattr(self, name, parts[name])
        if tie == "head":
            self.head.weight = self.emb.weight
        elif tie == "emb":
            nn.init.normal_(self.head.weight, std=0.02)
            self.emb.weight = self.head.weight

    def forward(self, ids):
        return self.head(self.mid(self.emb(ids)))


@pytest.mark.parametrize("first", ["emb", "head"])
@pytest.mark.parametrize("tie", ["head", "emb"])
def test_a_tie_by_assignment_leaves_the_embedding_alone(tie, first):
    build = functools.partial(Tied, tie=tie, first=first)
    torch.manual_seed(0)
    before = build(64).emb.weight.detach().clone()
    model = shaped(build)
    for _ in range(2):
        assert torch.equal(model.emb.weight, before) and model.emb.weight is model.head.weight
        mup.set_base_shapes(model, build(32), delta=build(16))  # another base rescales no more than the first
    shared = mup.MuSharedReadout(model.emb.weight, bias=False)
    shared.bias = model.head.bias
    shared.mup_specs = model.head.mup_specs
    x = torch.randn(3, 64)
    assert torch.equal(model.head(x), shared(x))
    assert roles(model)["emb.weight" if first == "emb" else "head.weight"] == "input"
    assert set(learning_rates(mup.MuSGD(model, lr=1.0), model).values()) == {1.0, 2.0}
    bias = model.head.bias.detach().clone()
    model.head.reset_parameters()
    assert torch.equal(model.emb.weight, before) and not torch.equal(model.head.bias, bias)


def test_a_tie_made_later_is_one_too():
    model = shaped(Tied)
    before = model.emb.weight.detach().clone()
    model.head.weight = model.emb.weight
    x = torch.randn(3, 64)
    torch.testing.assert_close(model.head(x), x / 4 @ before.T + model.head.bias)
    assert set(learning_rates(mup.MuAdam(model, lr=1.0), model).values()) == {1.0, 1 / 4}
    tied = functools.partial(Tied, tie="head")
    mup.set_base_shapes(model, tied(32), delta=tied(16))
    assert torch.equal(model.emb.weight, before)


def test_two_readouts_that_share_are_rescaled_once():
    class Two(nn.Module):
        def __init__(self, width):
            super().__init__()
            self.a, self.b = mup.MuReadout(width, 50), mup.MuReadout(width, 50)
            self.b.weight, self.b.bias = self.a.weight, self.a.bias

    torch.manual_seed(0)
    before = Two(64).a.weight.detach().clone()
    torch.testing.assert_close(shaped(Two).b.weight, 2 * before)


def test_an_embedding_that_takes_the_start_of_a_readout_is_refused():
    def build(width):
        model = Tied(width)
        model.emb.weight = model.head.weight
        return model

    with pytest.raises(mup.BaseShapeError, match=r"head: .*mup\.MuSharedReadout") as fault:
        shaped(build)
    assert one_line(fault)
    shaped(build, rescale_params=False)
    shaped(build, width=16)  # nothing to rescale


@pytest.mark.parametrize("first", ["emb", "head"])
def test_a_tied_linear_layer_is_told_of_the_shared_readout(first):
    with pytest.raises(mup.BaseShapeError, match=r"head.weight .*mup\.MuSharedReadout\(model\.emb\.weight") as fault:
        shaped(functools.partial(Tied, tie="head", head=nn.Linear, first=first))
    assert one_line(fault) and "declare" not in str(fault.value)


def test_a_bare_parameter_that_is_an_embedding_is_told_too():
    class Bare(nn.Module):
        def __init__(self, width):
            super().__init__()
            self.emb = nn.Embedding(50, width)
            self.out = self.emb.weight

    with pytest.raises(mup.BaseShapeError, match=r"out .*mup\.MuSharedReadout"):
        shaped(Bare)


def test_one_tensor_in_two_roles_is_refused():
    class Two(nn.Module):
        def __init__(self, width):
            super().__init__()
            self.a, self.b = (
                nn.Linear(2 * width, width, bias=False),
                nn.ConvTranspose1d(width, 2 * width, 1, bias=False),
            )
            self.b.weight = self.a.weight = nn.Parameter(torch.zeros(width, 2 * width))

    def two(width, other):
        model = Two(width)
        model.a.weight = model.b.weight = nn.Parameter(torch.zeros(width, other))
        return model

    with pytest.raises(mup.BaseShapeError, match="untie"):
        mup.set_base_shapes(two(64, 32), two(16, 16), delta=two(32, 32))


# Bare matrices and torch's layers that are no Linear


class Router(nn.Module):
    def __init__(self, width, declare=None):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, width) * width**-0.5)
        if declare:
            exec(declare, {"model": self, "mup": mup})


def test_a_bare_matrix_to_or_from_a_finite_size_has_to_be_declared_and_the_message_says_how():
    with pytest.raises(mup.BaseShapeError, match=r"weight \(8, 64\): one dimension grows") as fault:
        shaped(Router)
    assert one_line(fault)
    call = str(fault.value).split("before set_base_shapes, ")[1].split(" for a matrix")[0]
    model = shaped(functools.partial(Router, declare=call))
    assert model.mup_specs["weight"].factors(mup.mup(), "adam").lr == 1 / 4 and roles(model) == {"weight": "hidden"}
    with pytest.raises(mup.BaseShapeError, match="one dimension grows"):
        mup.apply_infshapes(Router(64), mup.make_base_shapes(Router(16), Router(32)))


@pytest.mark.parametrize("shape", [(1, 1, 64), (1, 7, 64), (64, 1, 1), (64,)])
def test_vectors_and_what_is_added_to_every_example_are_inputs(shape):
    def build(width):
        module = nn.Module()
        module.p = nn.Parameter(torch.zeros([width if size == 64 else size for size in shape]))
        return module

    assert roles(shaped(build)) == {"p": "input"}


def test_gains_over_several_dimensions_are_inputs():
    assert set(roles(shaped(lambda w: nn.LayerNorm([5, w]))).values()) == {"input"}
    assert set(roles(shaped(lambda w: nn.LayerNorm([w, w]))).values()) == {"input"}


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_recurrent_layers(kind):
    """Roles by what is read and written, and a start that is torch's at base width: upstream shrinks the inputs."""
    model = shaped(lambda w: kind(20, w, num_layers=2), width=256)
    assert roles(model)["weight_ih_l0"] == "input" and model.mup_specs["weight_ih_l0"].layout == ("out", "in")
    assert {roles(model)[name] for name in ("weight_hh_l0", "weight_ih_l1")} == {"hidden"}
    at_base, here = 16**-0.5 / 3**0.5, 256**-0.5 / 3**0.5
    for name, expected in {"weight_ih_l0": at_base, "bias_hh_l1": at_base, "weight_hh_l0": here}.items():
        assert getattr(model, name).std().item() == pytest.approx(expected, rel=0.1), name
    mup.set_base_shapes(model, kind(20, 16, num_layers=2), delta=kind(20, 32, num_layers=2))
    assert model.weight_ih_l0.std().item() == pytest.approx(at_base, rel=0.1)


def test_a_projection_of_an_lstm_has_to_be_declared():
    def build(width, declared=False):
        model = nn.LSTM(20, width, proj_size=6)
        if declared:
            mup.declare(model, "weight_hr_l0", Role.HIDDEN, (6, 16), "out in")
        return model

    with pytest.raises(
        mup.BaseShapeError, match=r"weight_hr_l0 \(6, 64\) .*mup\.declare\(model, \"weight_hr_l0\""
    ) as fault:
        shaped(build)
    assert one_line(fault) and "MuReadout" not in str(fault.value)
    model = shaped(functools.partial(build, declared=True))
    assert (roles(model)["weight_hr_l0"], roles(model)["weight_hh_l0"]) == ("hidden", "input")


def test_attention_with_its_own_sizes_of_keys():
    model = shaped(lambda w: nn.MultiheadAttention(w, 2, kdim=5, vdim=3, add_bias_kv=True), width=256)
    found = roles(model)
    assert [found[name] for name in ("q_proj_weight", "k_proj_weight", "v_proj_weight", "bias_k")] == [
        "hidden",
        "input",
        "input",
        "input",
    ]
    expected = nn.MultiheadAttention(16, 2, kdim=5, vdim=3, add_bias_kv=True)
    assert model.k_proj_weight.std().item() == pytest.approx(expected.k_proj_weight.std().item(), rel=0.25)
    with pytest.raises(mup.BaseShapeError, match="k_proj_weight"):
        mup.set_base_shapes(*(nn.MultiheadAttention(8, 2, kdim=w) for w in (64, 16)))


def test_bilinear_layers_have_two_sides_to_read_from():
    model = shaped(lambda w: nn.Bilinear(w, w, w), width=64)
    spec = model.mup_specs["weight"]
    assert (spec.role, spec.m_in, spec.m_out) == (Role.HIDDEN, 16, 4)
    x = torch.randn(500, 64)
    assert model(x, x).std().item() == pytest.approx(
        nn.Bilinear(16, 16, 16)(x[:, :16], x[:, 16:32]).std().item(), rel=0.3
    )
    assert roles(shaped(lambda w: nn.Bilinear(3, 4, w)))["weight"] == "input"
    with pytest.raises(mup.BaseShapeError, match=r'mup\.Role\.HIDDEN, \(5, 16, 16\), "out in in"'):
        shaped(lambda w: nn.Bilinear(w, w, 5))


def test_the_message_about_a_linear_layer_says_what_helps():
    with pytest.raises(mup.BaseShapeError, match=r"MuReadout; inside the model .*declare.*HIDDEN") as fault:
        shaped(lambda w: nn.Sequential(nn.Embedding(13, w), nn.Linear(w, 13)))
    assert one_line(fault) and "only if the model itself multiplies" in str(fault.value)


def test_a_lazy_module_is_told_to_run_first():
    with pytest.raises(mup.BaseShapeError, match="run a batch"):
        mup.set_base_shapes(nn.LazyLinear(3), nn.LazyLinear(3))
    with pytest.raises(UserError):
        list(mup.named_specs(nn.LazyLinear(3)))


# An initialisation of one's own


class Own(nn.Module):
    """One std for all widths, another for the matrix that closes a branch."""

    def __init__(self, width, tie=False):
        super().__init__()
        self.emb, self.fc, self.proj = nn.Embedding(50, width), nn.Linear(width, width), nn.Linear(width, width)
        self.head = mup.MuReadout(width, 50, bias=False)
        if tie:
            self.head.weight = self.emb.weight
        self.start()

    def start(self):
        for p, std in (
            (self.emb.weight, 0.02),
            (self.fc.weight, 0.02),
            (self.proj.weight, 0.01),
            (self.head.weight, 0.02),
        ):
            nn.init.normal_(p, std=std)
        nn.init.zeros_(self.fc.bias)


@pytest.mark.parametrize("tie", [False, True])
@pytest.mark.parametrize("again", [False, True])
def test_an_initialisation_with_one_std_is_turned_into_that_of_mup(tie, again):
    build = functools.partial(Own, tie=tie)
    model = shaped(build, width=256, rescale_params=False)
    if again:
        model.start()
    for _ in range(2):
        mup.rescale_init(model)
        mup.set_base_shapes(model, build(16), delta=build(32))
    for p, std in (
        (model.emb.weight, 0.02),
        (model.fc.weight, 0.005),
        (model.proj.weight, 0.0025),
        (model.head.weight, 0.02),
    ):
        assert p.std().item() == pytest.approx(std, rel=0.05)
    mup.set_base_shapes(model, build(64), delta=build(32))
    mup.rescale_init(model)
    assert model.fc.weight.std().item() == pytest.approx(0.01, rel=0.05)


def test_an_initialisation_that_was_rescaled_before_is_refused():
    with pytest.raises(mup.BaseShapeError, match="rescale_params=False"):
        mup.rescale_init(shaped(Own))
    model = shaped(functools.partial(mlp, wrap=NEW["weight_norm"]), rescale_params=False)
    with pytest.raises(mup.BaseShapeError, match="weight_norm"):
        mup.rescale_init(model)


# Parametrized layers


def mlp(width, wrap=lambda layer: layer, where=1):
    layers = [nn.Linear(20, width), nn.Linear(width, width), mup.MuReadout(width, 5)]
    layers[where] = wrap(layers[where])
    return nn.Sequential(*layers)


OLD = {"old weight_norm": nn.utils.weight_norm, "old spectral_norm": nn.utils.spectral_norm}
NEW = {
    "weight_norm": parametrizations.weight_norm,
    "spectral_norm": parametrizations.spectral_norm,
    "orthogonal": parametrizations.orthogonal,
    "prune": lambda layer: prune.l1_unstructured(layer, "weight", amount=0.5),
}


@pytest.mark.parametrize("name", [*OLD, *NEW])
@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated")
def test_a_hidden_matrix_keeps_its_factor_under_what_computes_it(name):
    model = shaped(functools.partial(mlp, wrap=(OLD | NEW)[name]))
    rates = learning_rates(mup.MuAdam(model, lr=1.0), model)
    matrices = [p for p, rate in rates.items() if rate == 1 / 4]
    assert len(matrices) == 1 and matrices[0].startswith("1.")
    assert {p for p, rate in rates.items() if p not in matrices and rate != 1} == set()
    assert model[1].bias.std().item() == pytest.approx(16**-0.5 / 3**0.5, rel=0.3)
    optimizer = mup.MuAdamW(model, lr=0.01)
    x, y = torch.randn(8, 20), torch.randint(5, (8,))
    before = F.cross_entropy(model(x), y)
    before.backward()
    optimizer.step()
    assert F.cross_entropy(model(x), y) < before


@pytest.mark.parametrize(
    "name, where, width_to_width",
    [("weight_norm", 2, False), ("spectral_norm", 2, False), ("spectral_norm", 0, False), ("orthogonal", 0, False)],
)
def test_norms_that_do_not_fit_mup_are_refused(name, where, width_to_width):
    with pytest.raises(mup.BaseShapeError, match=rf"{where}\.parametrizations.*plain") as fault:
        shaped(functools.partial(mlp, wrap=NEW[name], where=where))
    assert one_line(fault)


@pytest.mark.parametrize(
    "dim, where, fits", [(0, 0, True), (0, 1, True), (1, 1, True), (1, 0, False), (None, 1, False)]
)
def test_the_magnitude_of_weight_norm_may_not_grow(dim, where, fits):
    build = functools.partial(mlp, wrap=functools.partial(parametrizations.weight_norm, dim=dim), where=where)
    sizes = [build(w)[where].parametrizations.weight.original0.mean().item() for w in (64, 1024)]
    assert (sizes[1] == pytest.approx(sizes[0], rel=0.1)) == fits
    if fits:
        shaped(build)
    else:
        with pytest.raises(mup.BaseShapeError, match="magnitude that grows"):
            shaped(build)


def test_a_parametrization_of_the_users_own():
    class Symmetric(nn.Module):
        def forward(self, x):
            return x.triu() + x.triu(1).mT

    def symmetric(layer, tensor="weight"):
        nn.utils.parametrize.register_parametrization(layer, tensor, Symmetric())
        return layer

    class Low(nn.Module):
        def __init__(self, width):
            super().__init__()
            self.a, self.b = nn.Parameter(torch.zeros(4, width)), nn.Parameter(torch.zeros(width, 4))

        def forward(self, x):
            return x + self.b @ self.a

    def low(layer):
        nn.utils.parametrize.register_parametrization(layer, "weight", Low(len(layer.weight)))
        return layer

    assert roles(shaped(functools.partial(mlp, wrap=symmetric)))["1.parametrizations.weight.original"] == "hidden"
    with pytest.raises(mup.BaseShapeError, match=r"1\.parametrizations\.weight\.0\.a .*mup\.declare") as fault:
        shaped(functools.partial(mlp, wrap=low))
    assert one_line(fault)

    def declared(width):
        model = mlp(width, low)
        mup.declare(model[1], "parametrizations.weight.0.a", Role.HIDDEN, (4, 16), "out in")
        mup.declare(model[1], "parametrizations.weight.0.b", Role.INPUT, (16, 4), "out in")
        return model

    model = shaped(declared)
    rates = learning_rates(mup.MuAdam(model, lr=1.0), model)
    assert [rates[f"1.parametrizations.weight.0.{name}"] for name in "ab"] == [1 / 4, 1.0]


# Wrappers


@pytest.mark.parametrize("wrap", [checkpoint_wrapper, functools.partial(torch.compile, backend="eager")])
def test_wrapped_parts_and_wrapped_models(wrap):
    def part(width):
        model = mlp(width)
        model[1] = wrap(model[1])
        return model

    plain = shaped(mlp)
    for model in (
        mup.set_base_shapes(part(64), mlp(16), delta=mlp(32)),
        mup.set_base_shapes(mlp(64), part(16), delta=mlp(32)),
        mup.set_base_shapes(wrap(part(64)), mlp(16), delta=part(32)),
        wrap(shaped(mlp)),
    ):
        assert list(roles(model).values()) == list(roles(plain).values())
        found = [group["lr"] for group in mup.MuAdam(model, lr=1.0).param_groups]
        assert found == [group["lr"] for group in mup.MuAdam(plain, lr=1.0).param_groups]


def test_a_module_that_is_called_module_is_no_wrapper():
    def build(width):
        return nn.ModuleDict(
            {"module": nn.Linear(20, width), "net": nn.ModuleDict({"module": nn.Linear(width, width)})}
        )

    assert len(roles(shaped(build))) == 4
    with pytest.raises(mup.BaseShapeError, match="parameters differ"):
        mup.set_base_shapes(build(64), nn.ModuleDict({"x": nn.Linear(20, 16)}))


# Later groups


IMPLS = [
    (mup.MuAdam, {}),
    (mup.MuAdam, {"impl": torch.optim.RAdam}),
    (mup.MuAdamW, {}),
    (mup.MuSGD, {"lr": 1e-3}),
    (mup.MuAdam, {"impl": functools.partial(torch.optim.AdamW, weight_decay=0.3)}),
    (mup.MuAdamW, {"parametrization": mup.mup(weight_decay="steady-state"), "scale_eps": False}),
]


@pytest.mark.parametrize("mu, options", IMPLS)
def test_a_group_that_is_added_later_is_scaled_like_the_first(mu, options):
    model = tiny()
    names = {id(p): name for name, p in model.named_parameters()}

    def groups(optimizer):
        keys = ("lr", "weight_decay", "eps")
        return {names[id(p)]: [g.get(key) for key in keys] for g in optimizer.param_groups for p in g["params"]}

    whole = mu(model, **options)
    for source in ({"model": model}, {}):
        later = mu(model.embed.parameters(), **options, **source)
        for params in (model.fc.parameters(), [model.qkv], model.proj.weight, model.norm.parameters()):
            later.add_param_group({"params": params})
        assert {name: values for name, values in groups(whole).items() if name in groups(later)} == groups(later)
        assert "fc.weight" in groups(later) and "qkv" in groups(later)
    later.add_param_group({"params": [model.gate], "lr": 7.0})
    assert groups(later)["gate"][0] == 7.0
    with pytest.raises(mup.UndeclaredParameterError):
        later.add_param_group({"params": [nn.Parameter(torch.zeros(3))]})


def test_a_group_added_to_muon_is_scaled_or_refused():
    model = shaped(lambda w: nn.Sequential(nn.Linear(w, w), nn.Linear(w, 2 * w), nn.Conv1d(w, w, 3)), base=16)
    optimizer = mup.MuMuon([model[0].weight], lr=1.0, adjust_lr_fn="match_rms_adamw")
    optimizer.add_param_group({"params": [model[1].weight]})
    assert [g["lr"] for g in optimizer.param_groups] == [
        mup.MuMuon([layer.weight], lr=1.0, adjust_lr_fn="match_rms_adamw").param_groups[0]["lr"] for layer in model[:2]
    ]
    with pytest.raises(mup.NoRuleError, match=r"0\.bias \(64,\): a spectral update must not own input"):
        optimizer.add_param_group({"params": [model[0].bias]})


@pytest.mark.parametrize("given", ["tensor", "pair", "model"])
def test_muon_names_the_convolution_that_it_cannot_take(given):
    model = shaped(lambda w: nn.Sequential(nn.Conv2d(w, w, 3, bias=False)))
    weight = model[0].weight
    params = {"tensor": [weight], "pair": [("conv", weight)], "model": model}[given]
    with pytest.raises(UserError, match=r"(0\.weight|conv) \(64, 64, 3, 3\): .*two dimensions") as fault:
        mup.MuMuon(params, lr=0.1)
    assert one_line(fault)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))])
def test_a_copied_optimizer_steps_and_refuses_to_guess(copied):
    model = tiny()
    optimizer = mup.MuAdam(model.fc.parameters(), lr=0.1)
    loss_of(model).backward()
    optimizer.step()
    twin = copied(optimizer)
    assert isinstance(twin, torch.optim.Adam) and type(twin) is type(optimizer) and type(twin).__name__ == "Adam"
    assert twin.state_dict()["state"][0]["step"] == 1
    twin.step()
    with pytest.raises(ConfigError, match="make a new one"):
        twin.add_param_group({"params": [model.qkv]})


def test_optimizers_whose_step_or_eps_is_of_another_kind():
    model = tiny()
    for options in ({}, {"scale_eps": False}, {"eps": (1e-30, 1e-3)}):
        with pytest.raises(ConfigError, match="Adafactor") as fault:
            mup.MuAdam(model, impl=torch.optim.Adafactor, lr=1e-2, **options)
        assert one_line(fault)

    class PairOfEps(torch.optim.SGD):
        def __init__(self, params, lr=1e-3, eps=(1e-30, 1e-3), weight_decay=0.0):
            super().__init__(params, lr=lr, weight_decay=weight_decay)

    optimizer = mup.MuAdam(model, impl=PairOfEps, lr=1.0)
    assert {g["eps"] for g in optimizer.param_groups} == {(1e-30, 1e-3)}
    assert learning_rates(optimizer, model)["fc.weight"] == 1 / 4


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_zero_redundancy_optimizer():
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        from torch.distributed.optim import ZeroRedundancyOptimizer

        model = tiny()
        impl = functools.partial(ZeroRedundancyOptimizer, optimizer_class=torch.optim.Adam)
        optimizer = mup.MuAdam(model.fc.parameters(), impl=impl, lr=1.0, model=model)
        optimizer.add_param_group({"params": [model.qkv]})
        assert learning_rates(optimizer, model) == {"fc.weight": 1 / 4, "fc.bias": 1.0, "qkv": 1 / 4}
        assert learning_rates(optimizer.optim, model) == learning_rates(optimizer, model)
        before = loss_of(model)
        before.backward()
        optimizer.param_groups[0]["lr"] = optimizer.param_groups[1]["lr"] = 1e-3
        optimizer.step()
        assert loss_of(model) < before
    finally:
        torch.distributed.destroy_process_group()


# Checkpoints


def test_fold_gives_a_plain_model_with_equal_logits():
    for tied in (False, True):
        model = tiny(tied=tied)
        optimizer = mup.MuAdam(model, lr=0.01)
        loss_of(model).backward()
        optimizer.step()
        kept = copy.deepcopy(model.state_dict())
        plain = mup.fold(model)
        torch.testing.assert_close(plain(tokens()), model(tokens()))
        assert type(plain.readout) is nn.Linear and plain.readout.weight is not plain.embed.weight
        assert all(torch.equal(value, kept[name]) for name, value in model.state_dict().items())
        with pytest.raises(mup.UndeclaredParameterError):
            mup.MuAdam(plain, lr=0.01)
        other = Tiny(32)
        other.readout = nn.Linear(32, 11)
        other.load_state_dict(plain.state_dict())
        torch.testing.assert_close(other(tokens()), model(tokens()))
    with pytest.raises(mup.UndeclaredParameterError):
        mup.fold(Tiny(32))


def test_a_state_dict_is_refused_by_a_plain_model_and_under_another_base():
    model = tiny()
    state = model.state_dict()
    plain = Tiny(32)
    plain.readout = nn.Linear(32, 11)
    with pytest.raises(RuntimeError, match=r"readout\.mup_multiplier"):
        plain.load_state_dict(state)
    other = mup.set_base_shapes(Tiny(32), Tiny(16), delta=Tiny(8))
    with pytest.raises(
        mup.BaseShapeError, match=r"'readout'.* over base size 8 with multiplier 0.25, this .* 16 and 0.5"
    ) as fault:
        other.load_state_dict(state)
    assert one_line(fault)
    with pytest.raises(mup.BaseShapeError, match="damaged"):
        other.load_state_dict(state | {"readout.mup_multiplier": torch.zeros(3)})
    unset = Tiny(32)
    unset.load_state_dict(state)  # as long as it has no base it computes nothing
    with pytest.raises(mup.UndeclaredParameterError):
        unset(tokens())
    with pytest.raises(mup.BaseShapeError, match="would change its outputs"):
        mup.set_base_shapes(unset, Tiny(16), delta=Tiny(8), rescale_params=False)
    with pytest.raises(mup.BaseShapeError, match="rescale_params=False"):
        mup.set_base_shapes(unset, Tiny(8), delta=Tiny(16))
    mup.set_base_shapes(unset, Tiny(8), delta=Tiny(16), rescale_params=False)
    torch.testing.assert_close(unset(tokens()), model(tokens()))


def test_a_checkpoint_of_base_width_is_checked_by_its_metadata_and_one_without_any_loads():
    small = mup.set_base_shapes(Tiny(32), Tiny(32), delta=Tiny(16))
    assert "readout.mup_multiplier" not in small.state_dict()
    file = io.BytesIO()
    torch.save(small.state_dict(), file)
    file.seek(0)
    with pytest.raises(mup.BaseShapeError, match="over base size 32"):
        tiny().load_state_dict(torch.load(file, weights_only=True))
    bare = {name: p.detach().clone() for name, p in tiny().named_parameters()}  # as microsoft/mup saves it
    tiny().load_state_dict(bare, strict=True)


def test_output_mult_is_part_of_what_is_checked():
    def build(width, mult=1.0):
        return nn.Sequential(mup.MuReadout(width, 5, output_mult=mult))

    def over(base, mult=1.0):
        return mup.set_base_shapes(build(64, mult), build(base), delta=build(2 * base))

    over(16, 2.0).load_state_dict(over(32).state_dict())  # 2/4 and 1/2: the same function
    with pytest.raises(mup.BaseShapeError):
        over(16, 3.0).load_state_dict(over(16).state_dict())


# Files


@pytest.mark.slow
@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"- 1\n",
        b"a: 5\n",
        b"a: [x]\n",
        b"a: [1.5]\n",
        b"a: [true]\n",
        b"{",
        b"\xff\xfe\x00",
        b"[" * 3000,
        b"null\n",
    ]
    + [b"# finite sizes: {\na: [8]\n", b'# finite sizes: {"b": [1]}\na: [8]\n', b"# finite sizes: 5\na: [8]\n"]
    + [b"a: !!python/object/apply:os.system [true]\n", b"1: [8]\n"],
)
def test_a_damaged_file_of_base_shapes_is_one_line(tmp_path, content):
    file = tmp_path / "x.bsh"
    file.write_bytes(content)
    with pytest.raises(mup.BaseShapeError, match=r"x\.bsh") as fault:
        mup.load_base_shapes(file)
    assert one_line(fault)


def test_what_is_no_file_of_base_shapes_is_one_line(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path, tmp_path / "absent", "/dev/zero"):
        with pytest.raises(mup.BaseShapeError) as fault:
            mup.set_base_shapes(nn.Linear(2, 2), path)
        assert one_line(fault)
    with pytest.raises(mup.BaseShapeError, match="not int"):
        mup.set_base_shapes(nn.Linear(2, 2), 5)


# Adapters, distributed checkpoints, one optimizer made of several


class Adapter(nn.Module):
    """As PEFT wraps a layer."""

    def __init__(self, layer):
        super().__init__()
        self.base_layer, self.lora_A = layer, nn.Linear(layer.in_features, 4, bias=False)
        self.lora_B = nn.Linear(4, layer.out_features, bias=False)

    def forward(self, x):
        return self.base_layer(x) + self.lora_B(self.lora_A(x))

    def merged(self):
        layer = copy.deepcopy(self.base_layer)
        layer.weight.data += self.lora_B.weight @ self.lora_A.weight
        return layer


def test_an_adapter_around_a_readout_is_told_to_go_on_a_folded_model():
    model = shaped(mlp)
    model[2] = Adapter(model[2])
    for attempt in (
        lambda: mup.MuAdam(model, lr=1.0),
        lambda: shaped(lambda w: nn.Sequential(nn.Linear(20, w), Adapter(mup.MuReadout(w, 5)))),
    ):
        with pytest.raises(UserError, match=r"adapter around the readout .*mup\.fold") as fault:
            attempt()
        assert one_line(fault)
    x = torch.randn(3, 20)
    folded, wanted = mup.fold(model), model(x)
    torch.testing.assert_close(folded(x), wanted)
    folded[2] = folded[2].merged()
    torch.testing.assert_close(folded(x), wanted)
    model[2] = model[2].merged()
    assert not torch.allclose(model(x), wanted)  # which is why


def test_distributed_state_dicts_are_checked_too():
    from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict

    model, twin = shaped(mlp), shaped(mlp)
    model[2].weight.data.mul_(1.1)
    set_model_state_dict(twin, get_model_state_dict(model))
    x = torch.randn(3, 20)
    torch.testing.assert_close(twin(x), model(x))
    torch.testing.assert_close(torch.func.functional_call(twin, dict(model.state_dict()), x), model(x))
    with pytest.raises(mup.BaseShapeError, match="over base size 16"):
        set_model_state_dict(shaped(mlp, base=32), get_model_state_dict(model))


def muon_and_adam(model):
    specs = list(mup.named_specs(model))
    hidden = [p for _, p, spec in specs if spec.role is Role.HIDDEN]
    others = [p for _, p, spec in specs if spec.role is not Role.HIDDEN]
    return mup.MuMuon(hidden, lr=0.02), mup.MuAdamW(others, lr=1e-3)


def test_combined_optimizers_are_one():
    apart, joined = shaped(mlp), shaped(mlp)
    two, one = muon_and_adam(apart), mup.Combined(*muon_and_adam(joined))
    schedules = [torch.optim.lr_scheduler.LinearLR(optimizer, 0.5, total_iters=4) for optimizer in (*two, one)]
    x, y = torch.randn(8, 20), torch.randint(5, (8,))

    def closure():
        one.zero_grad()
        loss = F.cross_entropy(joined(x), y)
        loss.backward()
        return loss

    for step in range(4):
        for optimizer in two:
            optimizer.zero_grad()
        loss = F.cross_entropy(apart(x), y)
        loss.backward()
        for optimizer in two:
            optimizer.step()
        assert one.step(closure) == loss
        for schedule in schedules:
            schedule.step()
        if step == 1:  # as after a restart, and as a copy
            state = copy.deepcopy(one.state_dict())
            one.load_state_dict(state)
            assert [g["lr"] for g in one.param_groups] == [g["lr"] for o in two for g in o.param_groups]
            assert one.param_groups[0] is one.optimizers[0].param_groups[0]
    assert all(torch.equal(p, q) for p, q in zip(apart.parameters(), joined.parameters()))
    assert copy.deepcopy(one).param_groups[0]["lr"] == one.param_groups[0]["lr"]
    with pytest.raises(ConfigError, match="one of the optimizers"):
        one.add_param_group({"params": [nn.Parameter(torch.zeros(1))]})
    with pytest.raises(ConfigError, match="2 combined"):
        one.load_state_dict({"state": {}, "param_groups": []})


# Small things that were tracebacks, or silent


def test_a_tie_by_memory_only_is_refused():
    def build(width):
        model = Tied(width)
        model.head.weight.data = model.emb.weight.data
        return model

    with pytest.raises(
        mup.BaseShapeError, match=r"head\.weight and emb\.weight .* one memory.*mup\.MuSharedReadout"
    ) as fault:
        shaped(build)
    assert one_line(fault)


def test_a_bag_of_embeddings_that_is_tied():
    def build(width):
        model = nn.Sequential(nn.EmbeddingBag(50, width), mup.MuReadout(width, 50))
        model[1].weight = model[0].weight
        return model

    assert shaped(build)[0].weight.std().item() == pytest.approx(1.0, rel=0.1)


def test_an_input_of_an_lstm_under_weight_norm_whose_start_cannot_be_turned_is_refused():
    build = lambda w: parametrizations.weight_norm(nn.LSTM(20, w), "weight_ih_l0")  # noqa: E731
    with pytest.raises(mup.BaseShapeError, match="weight_ih_l0 is parametrized.*rescale_params=False"):
        shaped(build)
    assert roles(shaped(build, rescale_params=False))["parametrizations.weight_ih_l0.original1"] == "input"
    shaped(lambda w: parametrizations.weight_norm(nn.LSTM(20, w), "weight_hh_l0"))


def test_shapes_of_a_plain_model_fit_a_wrapped_one():
    wrapped = checkpoint_wrapper(mlp(64))
    mup.apply_infshapes(wrapped, {name: mup.get_infshapes(shaped(mlp))[name] for name, _ in mlp(64).named_parameters()})
    assert "hidden" in roles(wrapped).values()
    part = mlp(64)
    part[1] = torch.compile(part[1], backend="eager")
    mup.apply_infshapes(part, mup.get_infshapes(shaped(mlp)))
    assert list(roles(part).values()) == list(roles(shaped(mlp)).values())


@pytest.mark.parametrize(
    "attempt",
    [
        lambda model: mup.MuAdam(5, lr=1.0),
        lambda model: mup.MuAdam(model[0].weight, lr=1.0),
        lambda model: mup.MuAdam([5], lr=1.0),
        lambda model: mup.MuAdam([{"lr": 1.0}], lr=1.0),
        lambda model: mup.MuAdam([model[0].weight, {"params": []}], lr=1.0),
        lambda model: mup.MuAdam(model, lr="0.1"),
        lambda model: mup.MuAdam(model, lr=None),
        lambda model: mup.MuAdam(model, lr=1.0, weight_decay="0.1"),
        lambda model: mup.MuAdam(model, impl="adam", lr=1.0),
        lambda model: mup.MuAdam(model, lr=1.0).add_param_group({}),
        lambda model: mup.init.kaiming_normal_(model[1].weight, mode="fan"),
        lambda model: mup.declare(model[1], "weight", Role.HIDDEN, (16, 16), "out"),
        lambda model: mup.save_base_shapes(model, "/dev/full/x.bsh"),
        lambda model: mup.rescale_linear_bias(shaped(nn.LayerNorm)),
        lambda model: mup.set_base_shapes(model, {"x": 3}),
        lambda model: mup.set_base_shapes(model, {name: (0, 3) for name, _ in model.named_parameters()}),
        lambda model: mup.apply_infshapes(model, {name: (3, 3) for name, _ in model.named_parameters()}),
    ],
)
def test_odd_arguments_are_one_line(attempt):
    with pytest.raises(UserError) as fault:
        attempt(shaped(mlp))
    assert one_line(fault)


# What a message says to write works as it is written


def pasted(build, call):
    """`build` with a call that a message has."""

    def changed(width):
        model = build(width)
        exec(call, {"model": model, "mup": mup})
        return model

    return changed


def test_the_line_for_a_tied_linear_layer_works_as_it_is_written():
    class Model(nn.Module):
        def __init__(self, width):
            super().__init__()
            self.parts = nn.ModuleList([nn.Embedding(50, width), nn.Linear(width, 50)])
            self.parts[1].weight = self.parts[0].weight

    with pytest.raises(mup.BaseShapeError, match=r"parts\.1\.weight .*too\. Untie") as fault:
        shaped(Model)
    assert one_line(fault)
    model = shaped(pasted(Model, str(fault.value).rpartition(", as ")[2]))
    assert model.parts[1].weight is model.parts[0].weight and model.parts[1].bias is not None
    assert roles(model) == {"parts.0.weight": "input", "parts.1.bias": "scalar"}


@pytest.mark.parametrize("kind", [nn.Conv1d, nn.ConvTranspose1d])
def test_the_line_for_a_last_convolution_works_and_starts_it_as_a_readout(kind):
    def build(width):
        return nn.Sequential(nn.Conv1d(4, width, 3), kind(width, 20, 1))

    with pytest.raises(mup.BaseShapeError, match="last layer of the model, multiply what it reads by 1/8 ") as fault:
        shaped(build, width=128)
    call = str(fault.value).split("set_base_shapes, ")[1].split("; inside")[0]
    torch.manual_seed(0)
    model = shaped(pasted(build, call), width=128)
    torch.manual_seed(0)
    before = build(128)[1].weight
    grows = 1 if kind is nn.Conv1d else 0
    torch.testing.assert_close(model[1].weight, before * (8**0.5 if grows else 1))  # torch takes the fan-in from 1
    assert roles(model)["1.weight"] == "output" and not hasattr(model[1], "multiplier")


@pytest.mark.parametrize("m_depth", [1.0, 4.0])
def test_a_declared_linear_layer_starts_by_the_table(m_depth):
    """A readout of the user's own as MuReadout does, the end of a residual branch divided by m_depth."""

    def build(width, declared=False):
        model = nn.Sequential(nn.Linear(20, width), nn.Linear(width, width), nn.Linear(width, 5))
        if declared:
            mup.declare(model[1], "weight", Role.HIDDEN, (16, 16), "out in", m_depth=m_depth)
            mup.declare(model[2], "weight", Role.OUTPUT, (5, 16), "out in")
        return model

    torch.manual_seed(0)
    before = build(64)
    torch.manual_seed(0)
    model = shaped(functools.partial(build, declared=True))
    torch.testing.assert_close(model[1].weight, before[1].weight / m_depth)
    torch.testing.assert_close(model[2].weight, before[2].weight * 2)
    mup.set_base_shapes(model, build(16), delta=build(32))
    torch.testing.assert_close(model[2].weight, before[2].weight * 2)


def test_all_layers_of_the_kind_are_counted_at_once():
    def build(width):
        return nn.Sequential(nn.Linear(4, width), *(nn.Linear(width, 8) for _ in range(7)))

    with pytest.raises(
        mup.BaseShapeError, match=r"^1\.weight .*, as 6 more: 2\.weight, .*5\.weight, \.\.\.: "
    ) as fault:
        shaped(build)
    assert one_line(fault) and "6.weight" not in str(fault.value)
