"""Base shapes: what grows, roles, files, and errors where upstream guessed. Defect n: see docs/mup-library.md."""

import copy
import pickle

import pytest
import torch
from helpers.mup_zoo import Tiny, tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from speedrun_mup.core import mup
from speedrun_mup.core.mup import InfDim, InfShape, Role

# a file as microsoft/mup writes it, for tiny_mlp(8)
UPSTREAM_BSH = """\
# This is a base shape file encoded in yaml
# - `null` indicates a dimension is "finite", i.e. a non-"width" dimension
# - a number indicates the base dimension of an "infinite" dimension, i.e. some notion of "width"
0.bias:
- 8
0.weight:
- 8
- null
1.bias:
- null
1.weight:
- null
- 8
"""


def tiny_mlp(width: int, d_in: int = 5, d_out: int = 3) -> nn.Sequential:
    return nn.Sequential(nn.Linear(d_in, width), mup.MuReadout(width, d_out))


# InfDim and InfShape


def test_infdim():
    assert InfDim(8, 32).isinf() and InfDim(8, 32).width_mult() == 4
    assert not InfDim(None, 32).isinf() and InfDim(None, 32).width_mult() == 1
    assert repr(InfDim(8, 32)) == str(InfDim(8, 32)) == "InfDim(8, 32)"
    assert str(InfDim(None, 32)) == "FinDim(32)"


def test_infshape():
    shape = InfShape([InfDim(None, 3), InfDim(8, 16), InfDim(8, 32)])
    assert (shape.ninf(), shape.main_idx, shape.main, shape.width_mult()) == (2, 2, InfDim(8, 32), 4)
    assert shape.base_shape() == [None, 8, 8] and shape.shape() == [3, 16, 32]
    assert repr(InfShape([InfDim(8, 16)])) == "InfShape([InfDim(8, 16)])"
    assert InfShape([InfDim(None, 3)]).main is None and InfShape([InfDim(None, 3)]).width_mult() == 1
    with pytest.raises(ValueError, match="made of InfDims"):
        InfShape([3])
    with pytest.raises(mup.BaseShapeError, match="declare"):
        shape.main_idx = 0


sizes = st.integers(1, 9)
infdims = st.builds(InfDim, st.none() | sizes, sizes)


@pytest.mark.slow
@given(st.lists(infdims, max_size=5))
@settings(deadline=None)
def test_infshape_round_trips(dims):
    shape = InfShape(dims)
    assert InfShape.deserialize(shape.serialize()) == shape
    assert pickle.loads(pickle.dumps(shape)) == copy.deepcopy(shape) == shape
    assert hash(shape) == hash(InfShape(dims))
    if shape.ninf() <= 2:
        assert InfShape.from_spec(shape.spec) == shape
        sides = {Role.SCALAR: 0, Role.INPUT: 1, Role.OUTPUT: 1, Role.HIDDEN: 2}
        assert sides[shape.spec.role] == shape.ninf()


def test_defect_9_equality_counts_the_length():
    assert InfShape([InfDim(8, 16)]) != InfShape([InfDim(8, 16), InfDim(None, 3)])


def test_zip_infshape():
    assert mup.zip_infshape([64, 3], [128, 3]) == InfShape([InfDim(64, 128), InfDim(None, 3)])
    assert mup.zip_infshape([64, 3], [64, 3], fin_if_same=False) == InfShape([InfDim(64, 64), InfDim(3, 3)])
    assert mup.zip_infshape([InfDim(64, None), InfDim(None, None)], [64, 7]) == InfShape(
        [InfDim(64, 64), InfDim(None, 7)]
    )
    with pytest.raises(ValueError, match="not str"):
        mup.zip_infshape(["64"], [64])


def test_defect_9_mismatches_raise():
    with pytest.raises(mup.BaseShapeError, match="has 2 dimensions, target"):
        mup.zip_infshape([64, 3], [128, 3, 3])
    with pytest.raises(mup.BaseShapeError, match="finite dimension is 3 in the base and 4"):
        mup.zip_infshape([InfDim(64, None), InfDim(None, 3)], [128, 4])


# Models


def test_eight_routes_to_the_same_shapes(tmp_path):
    file = tmp_path / "tiny.bsh"

    def build(width, device):
        with torch.device(device):
            return Tiny(width)

    found = []
    for device in ("cpu", "meta"):
        base, delta = build(8, device), build(9, device)
        routes = [
            ({"base": base, "delta": delta, "savefile": file}),
            ({"base": str(file)}),
            ({"base": file, "delta": mup.get_shapes(delta)}),
            ({"base": mup.make_base_shapes(base, delta)}),
            ({"base": mup.get_shapes(base), "delta": mup.get_shapes(delta)}),
        ]
        found += [mup.get_infshapes(mup.set_base_shapes(build(32, device), **route)) for route in routes]
    assert all(shapes == found[0] for shapes in found)
    model = build(32, "cpu")
    with pytest.raises(mup.BaseShapeError):  # nothing differs between base and delta, so nothing may grow
        mup.set_base_shapes(model, Tiny(8), delta=Tiny(8))


def test_roles_and_multipliers():
    specs = {name: (s.role, s.m_in, s.m_out) for name, _, s in mup.named_specs(tiny())}
    vector = (Role.INPUT, 1, 4)
    assert specs == {
        "embed.weight": vector,
        "qkv": (Role.HIDDEN, 4, 4),
        "fc.weight": (Role.HIDDEN, 4, 4),
        "fc.bias": vector,
        "proj.weight": (Role.HIDDEN, 4, 4),
        "proj.bias": vector,
        "norm.weight": vector,
        "norm.bias": vector,
        "gate": (Role.SCALAR, 1, 1),
        "readout.weight": (Role.OUTPUT, 4, 1),
        "readout.bias": (Role.SCALAR, 1, 1),
    }


def test_infshape_on_tensors():
    model = tiny()
    for (name, p), shape in zip(model.named_parameters(), mup.get_infshapes(model).values()):
        assert p.infshape == shape, name
    assert model.qkv.infshape.fanin_fanout() == (InfDim(8, 32), InfDim(8, 32))
    assert model.proj.weight.infshape.fanin_fanout() == (InfDim(32, 128), InfDim(8, 32))


def test_convolutions():
    def build(w):
        return nn.ModuleList([nn.Conv2d(3, w, 3), nn.Conv1d(w, 2 * w, 3), nn.ConvTranspose2d(w, 2 * w, 3)])

    model = mup.set_base_shapes(build(16), build(4), delta=build(8))
    specs = [spec for name, _, spec in mup.named_specs(model) if name.endswith("weight")]
    assert [(s.role, s.fan_in, s.fan_out) for s in specs] == [
        (Role.INPUT, 3, 16),
        (Role.HIDDEN, 16, 32),
        (Role.HIDDEN, 16, 32),
    ]


def test_declared_role_and_layout_win():
    class Custom(nn.Module):
        def __init__(self, width):
            super().__init__()
            self.transposed = nn.Parameter(torch.zeros(width, 4 * width))
            self.table = nn.Parameter(torch.zeros(7, width))
            mup.declare(self, "transposed", Role.HIDDEN, (8, 32), "in out")
            mup.declare(self, "table", Role.OUTPUT, (7, 8), "out in", group="head")

    model = mup.set_base_shapes(Custom(16), Custom(8))
    assert model.transposed.infshape.main_idx == 0
    assert model.transposed.infshape.fanin_fanout() == (InfDim(8, 16), InfDim(32, 64))
    spec = model.mup_specs["table"]
    assert (spec.role, spec.m_in, spec.group) == (Role.OUTPUT, 2, "head")
    mup.set_base_shapes(model, None)  # the standard parametrization: same roles, no multiplier
    assert model.mup_specs["table"].role is Role.OUTPUT and model.mup_specs["table"].m_in == 1


def test_a_role_declared_late_is_not_overruled_by_the_tensor():
    model = tiny()
    mup.declare(model.proj, "weight", mup.Role.HIDDEN, (8, 32), "in out")
    with pytest.raises(mup.UndeclaredParameterError):
        mup.MuSGD(model.parameters(), lr=1.0)
    assert mup.get_infshapes(model)["proj.weight"].main_idx == 0


def test_base_equal_to_target_keeps_what_is_infinite():
    model = mup.set_base_shapes(Tiny(8), Tiny(8), delta=Tiny(16))
    assert model.fc.weight.infshape == InfShape([InfDim(32, 32), InfDim(8, 8)])
    assert mup.get_infshapes(mup.set_base_shapes(Tiny(32), mup.get_infshapes(model))) == mup.get_infshapes(tiny())


def test_no_base_is_the_standard_parametrization():
    model = mup.set_base_shapes(tiny_mlp(8), None)
    assert all(s.ninf() == 0 for s in mup.get_infshapes(model).values())
    assert model[1].width_mult() == 1


def test_get_shapes_hook():
    class Hooked(nn.Linear):
        def get_shapes(self):
            return {"weight": (8, 8), "bias": (8,)}

    assert mup.get_shapes(Hooked(2, 2)) == {"weight": (8, 8), "bias": (8,)}


def test_names_must_match():
    with pytest.raises(mup.BaseShapeError, match=r"only in the base \['1.bias'\]"):
        mup.set_base_shapes(nn.Sequential(nn.Linear(5, 8), mup.MuReadout(8, 3, bias=False)), tiny_mlp(4))


# Files


def test_bsh_written_by_upstream(tmp_path):
    file = tmp_path / "upstream.bsh"
    file.write_text(UPSTREAM_BSH)
    model = mup.set_base_shapes(tiny_mlp(32), str(file))
    assert mup.get_infshapes(model) == mup.get_infshapes(mup.set_base_shapes(tiny_mlp(32), tiny_mlp(8)))


def test_bsh_that_upstream_reads(tmp_path):
    """But for comments, the same file."""
    file = tmp_path / "ours.bsh"
    mup.make_base_shapes(tiny_mlp(8), tiny_mlp(16), file)
    without_comments = [line for line in file.read_text().splitlines() if not line.startswith("#")]
    assert without_comments == UPSTREAM_BSH.splitlines()[3:]


def test_defect_9_bsh_with_another_vocabulary(tmp_path):
    file = tmp_path / "ours.bsh"
    mup.make_base_shapes(tiny_mlp(8, d_out=17), tiny_mlp(16, d_out=17), file)
    with pytest.raises(mup.BaseShapeError, match=r"1.weight: .* is 17 in the base and 23"):
        mup.set_base_shapes(tiny_mlp(32, d_out=23), file)


def test_defect_9_another_vocabulary_without_delta():
    with pytest.raises(mup.BaseShapeError, match="must not grow"):
        mup.set_base_shapes(tiny_mlp(32, d_out=23), tiny_mlp(8, d_out=17))
    with pytest.raises(mup.BaseShapeError, match="must not grow"):
        mup.set_base_shapes(nn.Embedding(23, 8), nn.Embedding(17, 4))


def test_defect_10_a_file_in_which_nothing_grows(tmp_path):
    with pytest.raises(mup.BaseShapeError, match="delta"):
        mup.set_base_shapes(tiny_mlp(8), tiny_mlp(8), savefile=tmp_path / "x.bsh")
    with pytest.raises(mup.BaseShapeError, match="delta"):
        mup.save_base_shapes(mup.set_base_shapes(tiny_mlp(8), None), tmp_path / "x.bsh")
    assert not list(tmp_path.iterdir())
    model = mup.set_base_shapes(tiny_mlp(8), tiny_mlp(8), delta=tiny_mlp(16))
    mup.save_base_shapes(model, tmp_path / "x.bsh")
    assert mup.load_base_shapes(tmp_path / "x.bsh")["0.bias"].base_shape() == [8]


# Guesses refused


class Raw(nn.Module):
    """A user's own matrices: (ffn, d) up and (d, ffn) down."""

    def __init__(self, width: int, ffn: int):
        super().__init__()
        self.up = nn.Parameter(torch.zeros(ffn, width))
        self.down = nn.Parameter(torch.zeros(width, ffn))


def test_defect_11_coincident_sizes_without_delta():
    """The hidden size 256 at both widths looks finite; in nn.Linear layers and in raw matrices that is refused."""
    with pytest.raises(mup.BaseShapeError, match="pass delta="):
        mup.set_base_shapes(Raw(128, 256), Raw(64, 256))
    model = mup.set_base_shapes(Raw(128, 256), Raw(64, 256), delta=Raw(128, 512))
    assert {spec.role for _, _, spec in mup.named_specs(model)} == {Role.HIDDEN}

    def layers(width, ffn):
        return nn.Sequential(nn.Linear(width, ffn), nn.Linear(ffn, width))

    with pytest.raises(mup.BaseShapeError, match="MuReadout"):
        mup.set_base_shapes(layers(128, 256), layers(64, 256))


def test_three_infinite_dimensions_need_a_layout():
    class Heads(nn.Module):
        def __init__(self, heads, declare=False):
            super().__init__()
            self.w = nn.Parameter(torch.zeros(heads, 4 * heads, 8 * heads))
            if declare:
                mup.declare(self, "w", Role.HIDDEN, (1, 4, 8), "heads out in")

    with pytest.raises(mup.BaseShapeError, match="declare"):
        mup.set_base_shapes(Heads(3), Heads(1), delta=Heads(2))
    spec = mup.set_base_shapes(Heads(3, True), Heads(1), delta=Heads(2)).mup_specs["w"]
    assert (spec.m_in, spec.m_out) == (3, 3)


@pytest.mark.parametrize("tied", [False, True])
def test_linear_readout_is_refused(tied):
    def build(width):
        model = nn.Sequential(nn.Embedding(11, width), nn.Linear(width, 11, bias=False))
        if tied:
            model[1].weight = model[0].weight
        return model

    with pytest.raises(mup.BaseShapeError, match=r"1\.weight .*MuReadout"):
        mup.set_base_shapes(build(32), build(8), delta=build(16))
    mup.set_base_shapes(build(32), build(8), delta=build(16), do_assert=False)


def test_defect_16_convolution_readout_is_refused_unless_declared():
    def build(width, declare=False):
        model = nn.Sequential(nn.Conv2d(3, width, 3), nn.Conv2d(width, 10, 1))
        if declare:
            mup.declare(model[1], "weight", Role.OUTPUT, (10, 4, 1, 1), "out in - -")
        return model

    with pytest.raises(mup.BaseShapeError, match="declare the weight"):
        mup.set_base_shapes(build(16), build(4), delta=build(8))
    assert mup.set_base_shapes(build(16, True), build(4), delta=build(8))[1].mup_specs["weight"].m_in == 4


# Rescaling


def test_rescaling_gives_base_width_variance():
    """Readout and biases start with the distribution they have at base width, whatever the width."""

    def build(w):
        return nn.Sequential(nn.Linear(64, w), nn.Linear(w, w), mup.MuReadout(w, 64))

    torch.manual_seed(0)
    model = mup.set_base_shapes(build(1024), build(64), delta=build(128))
    expected = 64**-0.5 / 3**0.5  # U(-1/sqrt(fan_in), 1/sqrt(fan_in)) at base width
    for parameter in (model[1].bias, model[2].weight, model[2].bias):
        assert parameter.std().item() == pytest.approx(expected, rel=0.2)
    assert model[1].weight.std().item() == pytest.approx(1024**-0.5 / 3**0.5, rel=0.05)


def test_defect_13_rescaling_twice_is_rescaling_once():
    model = tiny()
    before = copy.deepcopy(model)
    mup.set_base_shapes(model, Tiny(8), delta=Tiny(16))
    model.readout._rescale_parameters()
    mup.rescale_linear_bias(model.fc)
    for (name, p), q in zip(model.named_parameters(), before.parameters()):
        assert torch.equal(p, q), name


def test_another_base_replaces_the_first():
    model = tiny()
    mup.set_base_shapes(model, Tiny(16), delta=Tiny(8))
    torch.manual_seed(0)
    direct = mup.set_base_shapes(Tiny(32), Tiny(16), delta=Tiny(8))
    for (name, p), q in zip(model.named_parameters(), direct.parameters()):
        torch.testing.assert_close(p, q, msg=name)


def test_reset_parameters_of_a_readout_keeps_the_rescaling():
    torch.manual_seed(0)
    readout = mup.set_base_shapes(mup.MuReadout(1024, 64), mup.MuReadout(64, 64), delta=mup.MuReadout(128, 64))
    before = readout.weight.std().item()
    readout.reset_parameters()
    assert readout.weight.std().item() == pytest.approx(before, rel=0.02)
    readout.readout_zero_init = True
    readout.reset_parameters()
    assert not readout.weight.any() and not readout.bias.any()


def test_defect_5_shared_readout():
    """Right sizes with the default bias, and the embedding keeps its own initialisation."""
    torch.manual_seed(0)
    embed = nn.Embedding(11, 32)
    before = embed.weight.detach().clone()
    readout = mup.MuSharedReadout(embed.weight)
    assert (readout.in_features, readout.out_features, readout.bias.shape) == (32, 11, (11,))
    assert tiny(tied=True)(torch.zeros(1, 2, dtype=torch.long)).shape == (1, 2, 11)

    def build(width):
        model = nn.Sequential(nn.Embedding(11, width))
        model.append(mup.MuSharedReadout(model[0].weight, readout_zero_init=True))
        return model

    torch.manual_seed(0)
    model = mup.set_base_shapes(build(32), build(8), delta=build(16))
    assert torch.equal(model[0].weight, before) and model[1].weight is model[0].weight
    assert not model[1].bias.any() and model[1].width_mult() == 4


def test_readout_divides_its_input_but_not_the_bias():
    build = lambda w: mup.MuReadout(w, 3, output_mult=5.0)  # noqa: E731
    readout = mup.set_base_shapes(build(32), build(8), delta=build(16))
    x = torch.randn(4, 32)
    torch.testing.assert_close(readout(x), x * 5 / 4 @ readout.weight.T + readout.bias)
    half = mup.MuReadout(32, 3, parametrization=mup.mup(head=0.5))
    mup.set_base_shapes(half, build(8), delta=build(16))
    torch.testing.assert_close(half(x), x / 2 @ half.weight.T + half.bias)
