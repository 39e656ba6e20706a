"""What a module declares about its parameters: how they start."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from speedrun_mup.core import mup
from speedrun_mup.core.mup import PARAMETRIZATIONS, Init, Role, UndeclaredParameterError


def layer(width: int, init: Init | str | None) -> nn.Linear:
    """A square matrix that was tuned at width 64."""
    module = nn.Linear(width, width, bias=False)
    mup.declare(module, "weight", Role.HIDDEN, (64, 64), "out in", init=init)
    return module


@pytest.mark.parametrize(
    ("init", "std"),
    [("zero", 0), ("unit", 0.5), ("fan_in", 1 / 16), (Init(0.5, by_fan_in=True, uniform=True), 1 / 32)],
)
def test_an_init_is_scaled_by_the_table_from_base_width(init, std):
    """At 4 times the base width a hidden matrix gets half the std, whatever it is made of."""
    module = layer(256, init)
    mup.init_parameters(module, PARAMETRIZATIONS["mup"], seed=1)
    (spec,) = (spec for _, _, spec in mup.named_specs(module))
    assert spec.init_std(PARAMETRIZATIONS["mup"]) == pytest.approx(std)
    assert module.weight.std().item() == pytest.approx(std, rel=0.02)
    uniform = isinstance(init, Init)
    assert (module.weight.abs().max() <= 3**0.5 * std * (1 + 1e-6)) == (uniform or not std)


def test_constants_repeat_over_the_parameter():
    module = nn.Module()
    module.pairs = nn.Parameter(torch.empty(3, 2))
    mup.declare(module, "pairs", Role.SCALAR, (3, 2), "n n", init=Init(constant=(1.0, 0.0)))
    mup.init_parameters(module, PARAMETRIZATIONS["mup"], seed=1)
    assert module.pairs.tolist() == [[1, 0]] * 3


def test_first_values_depend_on_seed_and_name_alone():
    one, two = nn.ModuleList([layer(64, "unit"), layer(64, "unit")]), nn.ModuleList([layer(64, "unit")])
    for module, seed in ((one, 1), (two, 1)):
        mup.init_parameters(module, PARAMETRIZATIONS["mup"], seed)
    assert torch.equal(one[0].weight, two[0].weight) and not torch.equal(one[0].weight, one[1].weight)
    mup.init_parameters(two, PARAMETRIZATIONS["mup"], 2)
    assert not torch.equal(one[0].weight, two[0].weight)


def test_an_init_that_is_missing_or_unknown_is_an_error():
    with pytest.raises(UndeclaredParameterError, match=r"parameter weight \(64, 64\) has no declared init"):
        mup.init_parameters(layer(64, None), PARAMETRIZATIONS["mup"], 1)
    with pytest.raises(
        UndeclaredParameterError, match="init='fan-in' is unknown; choose zero, unit, fan_in or an mup.Init"
    ):
        layer(64, "fan-in")
