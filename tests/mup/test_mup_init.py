"""Init functions: torch's at base shape; elsewhere the base's distribution times the table's factor."""

import functools

import pytest
import torch
from helpers.mup_zoo import Tiny, tiny
from torch import nn

from speedrun_mup.core import mup
from speedrun_mup.core.mup.compat.toy_models import INITS, cnn, lazy_models, mlp

FUNCTIONS = [f for name, f in INITS.items() if name != "default"]


def plain(f):
    """torch's function with the same arguments."""
    if isinstance(f, functools.partial):
        return functools.partial(getattr(nn.init, f.func.__name__), **f.keywords)
    return getattr(nn.init, f.__name__)


@pytest.mark.parametrize("arch, batchnorm", [(mlp, False), (mlp, True), (cnn, False), (cnn, True)])
def test_base_width_is_torch_bit_for_bit(arch, batchnorm):
    for f in FUNCTIONS:
        models = []
        for fill, readout in ((f, mup.MuReadout), (plain(f), nn.Linear)):
            torch.manual_seed(0)
            model = arch(8, readout, batchnorm)
            if fill is f:
                mup.set_base_shapes(model, arch(8, batchnorm=batchnorm), delta=arch(16, batchnorm=batchnorm))
            torch.manual_seed(0)
            for parameter in model.parameters():
                if parameter.ndim >= 2:
                    fill(parameter)
            models.append(model)
        assert all(torch.equal(p, q) for p, q in zip(*(m.parameters() for m in models))), f


# which parameters keep torch's bits away from base width: 0 input, 3 hidden, 6 readout (MLP)
@pytest.mark.parametrize(
    "init, same",
    [
        ("default", {"0.weight", "0.bias", "3.weight"}),
        ("kaiming_fan_in_normal", {"0.weight", "0.bias", "3.weight"}),
        ("kaiming_fan_in_uniform", {"0.weight", "0.bias", "3.weight"}),
        ("kaiming_fan_out_normal", {"0.bias", "3.weight", "6.weight"}),
        ("kaiming_fan_out_uniform", {"0.bias", "3.weight", "6.weight"}),
        ("xavier_normal", {"0.bias", "3.weight"}),
        ("xavier_uniform", {"0.bias", "3.weight"}),
        ("const_normal", {"0.weight", "0.bias", "6.weight"}),
        ("const_uniform", {"0.weight", "0.bias", "6.weight"}),
        ("const_trunc_normal", {"0.weight", "0.bias", "6.weight"}),
    ],
)
@pytest.mark.parametrize("width", [32, 96, 128])
def test_what_differs_from_torch_at_another_width(init, same, width):
    torch.manual_seed(0)
    ours = lazy_models("mlp", [width], init=init, readout_zero_init=False)[width]()
    torch.manual_seed(0)
    theirs = mlp(width, nn.Linear)
    for parameter in theirs.parameters():
        if parameter.ndim >= 2 and init != "default":
            plain(INITS[init])(parameter)
    pairs = zip(ours.named_parameters(), theirs.parameters())
    assert {name for (name, p), q in pairs if torch.equal(p, q)} == same


@pytest.mark.parametrize("f", FUNCTIONS)
def test_defect_4_std_is_that_of_the_base_times_the_factor(f):
    """Input, hidden, stacked, readout and convolution shapes at m = 4. Upstream raised for stacked ones."""
    torch.manual_seed(0)
    for base, shape, factor in [
        ((64, 50), (256, 50), 1.0),
        ((50, 64), (50, 256), 1.0),
        ((64, 64), (256, 256), 0.5),
        ((3, 64, 64), (3, 256, 256), 0.5),
        ((32, 16, 3, 3), (128, 64, 3, 3), 0.5),
        ((64, 48), (256, 96), 2**-0.5),
        ((50, 40), (50, 40), 1.0),
    ]:
        tensor = torch.empty(shape)
        tensor.infshape = mup.zip_infshape(base, shape)
        expected = plain(f)(torch.empty(base)).std().item() * factor
        assert f(tensor).std().item() == pytest.approx(expected, rel=0.1), (base, shape)


def test_a_mean_is_refused_for_hidden_matrices():
    model = tiny()
    for fill in (
        mup.init.ones_,
        mup.init.eye_,
        mup.init.uniform_,
        functools.partial(mup.init.normal_, mean=1.0),
        functools.partial(mup.init.trunc_normal_, a=-1.0),
    ):
        with pytest.raises(mup.BaseShapeError, match=r"hidden matrix \(128, 32\)"):
            fill(model.fc.weight)
        fill(model.readout.weight)
        fill(mup.set_base_shapes(Tiny(32), None).embed.weight)
    assert mup.init.ones_(model.gate).sum() == 2  # upstream refused finite tensors
    assert mup.init.normal_(model.norm.weight, mean=100.0).mean() > 90


def test_constant_std_init():
    seen = []
    mup.init.constant_std_init_(tiny().fc.weight, lambda tensor, scale: seen.append(scale))
    assert seen == [0.5]
