"""Keys and FLOPs against the mask itself; the record's numbers are in test_sweep.py."""

import pytest
import torch

from speedrun_mup.core import mup
from speedrun_mup.core.model import GPTConfig
from speedrun_mup.core.model.attention import may_attend
from speedrun_mup.core.mup import Role
from speedrun_mup.training.flops import attention_flops, keys_seen, weight_flops


@pytest.mark.parametrize("window", [0, 1, 2, 5, 99])
@pytest.mark.parametrize("opens", [(), (0,), (3, 4, 20), tuple(range(48))])
def test_keys_seen_are_those_that_the_mask_allows(window, opens):
    doc = torch.tensor([t in opens for t in range(48)]).cumsum(0)
    t = torch.arange(48)
    allowed = may_attend(t[:, None], t, doc[:, None], doc, window, 8)
    assert keys_seen(doc, window, 8) == pytest.approx(allowed.sum().item() / 48)


def test_the_record_by_its_specification():
    """6 N = 727.3 MF; 51.7 MF of attention at 865 and 377 keys, 30.7 with the document mask at 426 and 256."""
    shape = GPTConfig()
    assert weight_flops(shape) == 6 * 121_208_832
    assert attention_flops(shape, 865, 377) == pytest.approx(51.7e6, rel=1e-3)
    assert attention_flops(shape, 426, 256) == pytest.approx(30.7e6, rel=2e-3)


def by_formula(shape: GPTConfig, long: float, short: float) -> tuple[float, float]:
    """The counts as formulas in the record's own numbers of matrices."""
    attention = shape.n_layer - 1  # one layer has none
    weights = 6.0 * ((4 * attention + 8 * shape.n_layer) * shape.width**2 + shape.padded_vocab * shape.width)
    layers = [layer for layer in range(shape.n_layer) if layer != shape.layer_without_attention]
    return weights, 12.0 * shape.width * sum(long if shape.has_long_window(layer) else short for layer in layers)


@pytest.mark.parametrize(
    "shape",
    [
        GPTConfig(),
        GPTConfig(257, 256, 6, 64, 64, 32, 64, "mup"),
        GPTConfig(1000, 0, 20, 96, 32, 16, 8, mup.mup(head=0.5)),
    ],
)
def test_what_modules_declare_comes_to_the_formulas(shape):
    assert (weight_flops(shape), attention_flops(shape, 426.7, 255.9)) == by_formula(shape, 426.7, 255.9)


def test_a_module_may_declare_how_often_a_token_is_multiplied():
    module = torch.nn.Linear(8, 4, bias=False)
    products = [
        mup.declare(module, "weight", role, (4, 8), "out in", uses=uses).products_per_token
        for role, uses in (
            (Role.HIDDEN, None),
            (Role.OUTPUT, None),
            (Role.INPUT, None),
            (Role.INPUT, 1),
            (Role.HIDDEN, 3),
        )
    ]
    assert products == [32, 32, 0, 32, 96]
