"""Readout layers: linear layers from width to a finite dimension, with muP's multiplier on the way out."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from speedrun_mup.core.mup.rules import PARAMETRIZATIONS, ROOT_PER_IN, Parametrization, Role
from speedrun_mup.core.mup.spec import ParamSpec, UndeclaredParameterError


def weight_spec(module: nn.Module) -> ParamSpec:
    """What the module's weight is. Raises UndeclaredParameterError."""
    specs: dict[str, ParamSpec] = vars(module).get("mup_specs", {})
    if "weight" not in specs:
        raise UndeclaredParameterError(f"{module} has no base shape; call set_base_shapes on the model before using it")
    return specs["weight"]


@torch.no_grad()
def _rescale(module: nn.Module, parameters: Iterable[Tensor | None], factor: float) -> None:
    """Multiply fresh parameters by `factor`, once: repeated calls do nothing, another factor replaces the first.

    Meta tensors have no values to scale: call again once they do.
    """
    present = [p for p in parameters if p is not None]
    if not any(p.is_meta for p in present):
        for parameter in present:
            parameter.mul_(factor / vars(module).get("mup_rescaled", 1.0))
        vars(module)["mup_rescaled"] = factor


class MuReadout(nn.Linear):
    """A linear layer from a dimension that grows with width to one that does not (d_model to vocabulary).

    (..., in_features) -> (..., out_features). Its input is multiplied by output_mult and by the table's forward factor,
    1 / width multiplier in muP; the bias is not. readout_zero_init: start at zero. parametrization: hand the same one
    to the optimizer. Raises UndeclaredParameterError in forward until set_base_shapes or declare.
    """

    def __init__(
        self,
        *args: Any,
        readout_zero_init: bool = False,
        output_mult: float = 1.0,
        parametrization: Parametrization = PARAMETRIZATIONS["mup"],
        **kwargs: Any,
    ):
        self.readout_zero_init, self.output_mult, self.parametrization = readout_zero_init, output_mult, parametrization
        super().__init__(*args, **kwargs)

    def reset_parameters(self) -> None:
        """Initialise anew, as torch does or to zero, keeping a rescaling that was asked for before."""
        factor = vars(self).pop("mup_rescaled", 1.0)
        if self.readout_zero_init:
            for parameter in self._own_parameters():
                nn.init.zeros_(parameter)
        else:
            self._draw()
        _rescale(self, self._own_parameters(), factor)

    def _draw(self) -> None:
        super().reset_parameters()

    def _own_parameters(self) -> list[Tensor]:
        return [p for p in (self.weight, self.bias) if p is not None]

    def width_mult(self) -> float:
        """Width multiplier of the input dimension."""
        return weight_spec(self).m_in

    def _rescale_parameters(self) -> None:
        """Turn torch's init, std 1/sqrt(fan_in), into the table's, relative to base width. Safe to repeat."""
        spec = weight_spec(self)
        power = self.parametrization.rules[Role.OUTPUT].init * ROOT_PER_IN.inverse()
        _rescale(self, self._own_parameters(), power(spec.m_in, spec.m_out))

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features)."""
        spec = weight_spec(self)
        factor = self.parametrization.rules[Role.OUTPUT].forward(spec.m_in, spec.m_out)
        return super().forward(x * (self.output_mult * factor))


class MuSharedReadout(MuReadout):
    """A readout that shares `weight` (out_features, in_features) with an embedding and leaves its init alone."""

    def __init__(self, weight: nn.Parameter, bias: bool = True, **kwargs: Any):
        super().__init__(weight.shape[1], weight.shape[0], bias=False, **kwargs | {"device": "meta"})
        self.weight = weight
        if bias:
            self.bias = nn.Parameter(weight.new_empty(weight.shape[0]))
        self.reset_parameters()

    def _draw(self) -> None:
        bound = self.in_features**-0.5
        for bias in self._own_parameters():
            nn.init.uniform_(bias, -bound, bound)

    def _own_parameters(self) -> list[Tensor]:
        return [] if self.bias is None else [self.bias]


def rescale_linear_bias(linear: nn.Module) -> None:
    """Turn torch's init of a linear or convolution bias, std 1/sqrt(fan_in), into muP's constant. Safe to repeat."""
    spec = weight_spec(linear)
    m_in = spec.shape[1] / spec.base_shape[1]  # torch takes the fan-in from here, also for transposed convolutions
    _rescale(linear, [linear.bias], ROOT_PER_IN.inverse()(m_in, 1.0))  # type: ignore[list-item]
