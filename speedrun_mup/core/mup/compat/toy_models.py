"""A small MLP and CNN in muP or in the standard parametrization, for coordinate checks of the library itself."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import nn

from speedrun_mup.core.mup.compat import init
from speedrun_mup.core.mup.compat.layer import MuReadout
from speedrun_mup.core.mup.compat.shape import set_base_shapes

INITS: dict[str, Callable[..., Any]] = {
    "default": lambda tensor: tensor,
    "const_uniform": partial(init.uniform_, a=-0.1, b=0.1),
    "const_normal": partial(init.normal_, std=0.1),
    "const_trunc_normal": partial(init.trunc_normal_, std=0.1, a=-0.2, b=0.2),
    "xavier_uniform": init.xavier_uniform_,
    "xavier_normal": init.xavier_normal_,
    "kaiming_fan_in_uniform": init.kaiming_uniform_,
    "kaiming_fan_in_normal": init.kaiming_normal_,
    "kaiming_fan_out_uniform": partial(init.kaiming_uniform_, mode="fan_out"),
    "kaiming_fan_out_normal": partial(init.kaiming_normal_, mode="fan_out"),
}


def mlp(width: int, readout: Callable[..., nn.Linear] = MuReadout, batchnorm: bool = False) -> nn.Sequential:
    """(B, 192) -> (B, 10) through two hidden layers."""
    norm = nn.BatchNorm1d if batchnorm else nn.Identity
    return nn.Sequential(
        *(nn.Linear(192, width), norm(width), nn.ReLU()),
        *(nn.Linear(width, width), norm(width), nn.ReLU(), readout(width, 10)),
    )


def cnn(width: int, readout: Callable[..., nn.Linear] = MuReadout, batchnorm: bool = False) -> nn.Sequential:
    """(B, 3, 8, 8) -> (B, 10) through two convolutions and a linear layer."""
    norm = nn.BatchNorm2d if batchnorm else nn.Identity
    return nn.Sequential(
        *(nn.Conv2d(3, width, 3, padding=1), norm(width), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(width, 2 * width, 3, padding=1), norm(2 * width), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()),
        *(nn.Linear(8 * width, 16 * width), nn.ReLU(), readout(16 * width, 10)),
    )


ARCHITECTURES = {"mlp": (mlp, 64), "cnn": (cnn, 4)}  # constructor and base width


def lazy_models(
    arch: str,
    widths: Iterable[int],
    mup: bool = True,
    init: str = "kaiming_fan_in_normal",
    readout_zero_init: bool = True,
    batchnorm: bool = False,
) -> dict[int, Callable[[], nn.Module]]:
    """{width: constructor of "mlp" or "cnn"}, in muP and initialised by INITS[init]; else torch's default."""
    build, base_width = ARCHITECTURES[arch]

    def make(width: int) -> nn.Module:
        if not mup:
            return set_base_shapes(build(width, nn.Linear, batchnorm), None)
        model = build(width, partial(MuReadout, readout_zero_init=readout_zero_init), batchnorm)
        with torch.device("meta"):
            base, delta = (build(w, batchnorm=batchnorm) for w in (base_width, 2 * base_width))
        set_base_shapes(model, base, delta=delta)
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                INITS[init](parameter)
        if readout_zero_init:
            model[-1].reset_parameters()  # type: ignore[operator]
        return model

    return {width: partial(make, width) for width in widths}
