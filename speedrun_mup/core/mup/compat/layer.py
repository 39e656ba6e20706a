"""Readout layers: linear layers from width to a finite dimension, with muP's multiplier on the way out."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from speedrun_mup.core.errors import in_a_line
from speedrun_mup.core.mup.compat.infshape import BaseShapeError
from speedrun_mup.core.mup.compat.layers import sources, tensor_spec, torch_start
from speedrun_mup.core.mup.rules import PARAMETRIZATIONS, ROOT_PER_IN, Parametrization, Role
from speedrun_mup.core.mup.spec import ParamSpec, UndeclaredParameterError


def weight_spec(module: nn.Module) -> ParamSpec:
    """What the module's weight is. Raises UndeclaredParameterError."""
    specs: dict[str, ParamSpec] = vars(module).get("mup_specs", {})
    if "weight" not in specs:
        raise UndeclaredParameterError(
            f"a {type(module).__name__} has no base shape; call set_base_shapes on the model before using it"
        )
    return specs["weight"]


@torch.no_grad()
def _rescale(module: nn.Module, factors: Mapping[str, float]) -> None:
    """Multiply fresh parameters by their factors, once: repeated calls do nothing, another factor replaces the first.

    Left alone is what another module owns too and has to rescale. Meta tensors have no values to scale: call again
    once they do.
    """
    done: dict[str, float] = vars(module).setdefault("mup_rescaled", {})
    for local, factor in factors.items():
        parameter, ratio = module._parameters.get(local), factor / done.get(local, 1.0)
        if (
            local in vars(module).get("mup_shared", ())
            or math.isclose(ratio, 1.0)
            or getattr(module, local, None) is None
        ):
            continue
        if parameter is None:
            raise BaseShapeError(
                f"{local} is parametrized, so torch's start cannot be turned into muP's: pass rescale_params=False to "
                "set_base_shapes and initialise the layer yourself"
            )
        if not parameter.is_meta:
            parameter.mul_(ratio)
            done[local] = factor


class MuReadout(nn.Linear):
    """A linear layer from a dimension that grows with width to one that does not (d_model to vocabulary).

    (..., in_features) -> (..., out_features). Its input is multiplied by output_mult and by the table's forward factor,
    1 / width multiplier in muP; the bias is not. A weight that is shared with an embedding (`readout.weight =
    embedding.weight`) keeps the embedding's initialisation, as in MuSharedReadout. state_dict() holds the multiplier
    next to the weight, and loading it checks that this model's is the same; one without it loads as it is.

    Args:
        readout_zero_init: start at zero.
        output_mult: a hyperparameter, the same at every width.
        parametrization: hand the same one to the optimizer.

    Raises:
        UndeclaredParameterError: in forward, until set_base_shapes or declare.
    """

    mup_multiplier = None  # what walks along the names of a state dict finds this one too

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
        """Initialise again, as torch does or to zero, keeping a rescaling that was asked for before."""
        factors = vars(self).pop("mup_rescaled", {})
        vars(self).pop("mup_loaded", None)
        own = self._own_parameters()
        if self.readout_zero_init:
            for local in own:
                nn.init.zeros_(getattr(self, local))
        elif "weight" in own:
            super().reset_parameters()
        elif own:
            nn.init.uniform_(self.bias, -(self.in_features**-0.5), self.in_features**-0.5)
        _rescale(self, factors)

    def _own_parameters(self) -> list[str]:
        shared = vars(self).get("mup_shared", ())
        return [local for local in ("weight", "bias") if getattr(self, local) is not None and local not in shared]

    def width_mult(self) -> float:
        """Width multiplier of the input dimension."""
        return weight_spec(self).m_in

    @property
    def multiplier(self) -> float:
        """What forward multiplies its input by. Raises UndeclaredParameterError."""
        return self._multiplier(weight_spec(self))

    def _multiplier(self, spec: ParamSpec) -> float:
        return self.output_mult * self.parametrization.rules[Role.OUTPUT].forward(spec.m_in, spec.m_out)

    def _rescale_parameters(self) -> None:
        """Turn torch's init, std 1/sqrt(fan_in), into the table's, relative to base width. Safe to repeat."""
        factor = self.check_start()
        _rescale(self, {local: factor for local in self._own_parameters()})

    def check_start(self) -> float:
        """The factor of _rescale_parameters. Raises BaseShapeError if the values are none that it is for."""
        spec = weight_spec(self)
        power = self.parametrization.rules[Role.OUTPUT].init * ROOT_PER_IN.inverse()
        factor = power(spec.m_in, spec.m_out)
        before = vars(self).get("mup_rescaled", {}).get("weight", 1.0)
        if "mup_loaded" in vars(self) and factor != before:
            raise BaseShapeError("the readout's values are trained, from a checkpoint: pass rescale_params=False")
        if vars(self).get("mup_shared", {}).get("weight") == "table" and factor != 1 and self._is_torch_start():
            raise BaseShapeError(
                "the embedding has this readout's weight, whose start shrinks with width: tie them the other way, "
                "readout.weight = embedding.weight, or use mup.MuSharedReadout(embedding.weight); or initialise the "
                "weight first, with one std for all widths (after set_base_shapes only with rescale_params=False)"
            )
        return factor

    def _is_torch_start(self) -> bool:
        """Whether the weight is as nn.Linear draws it: uniform, and filling the range of plus and minus 1/sqrt(fan_in)."""
        weight = self.weight.detach()
        if weight.is_meta or weight.numel() < 100:
            return False
        most, std = (
            weight.abs().max().item() * self.in_features**0.5,
            weight.std().item() * (3 * self.in_features) ** 0.5,
        )
        return 0.97 < most <= 1 + 1e-6 and abs(std - 1) < 0.1

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features)."""
        return super().forward(x * self.multiplier)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        spec = tensor_spec(self, "weight")
        if spec is not None:
            values = [self._multiplier(spec), float(spec.base_fan_in)]
            getattr(destination, "_metadata", {}).get(prefix[:-1], {})[MULTIPLIER] = values
            if values[0] != 1.0:  # else any linear layer computes the same
                destination[prefix + MULTIPLIER] = torch.tensor(values, dtype=torch.float64, device="cpu")

    def _load_from_state_dict(self, state_dict: Any, prefix: str, local_metadata: Any, *args: Any) -> None:
        saved = state_dict.pop(prefix + MULTIPLIER, local_metadata.get(MULTIPLIER))
        if saved is not None:
            try:
                multiplier, base = (float(value) for value in saved)
            except (TypeError, ValueError, RuntimeError) as fault:
                raise BaseShapeError(f"the state dict's {prefix}{MULTIPLIER} is damaged: {in_a_line(fault)}") from None
            vars(self)["mup_loaded"] = multiplier, base
            spec = tensor_spec(self, "weight")
            if spec is not None:
                self.check_loaded(spec, prefix[:-1])
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)

    def check_loaded(self, spec: ParamSpec, name: str) -> None:
        """Raise BaseShapeError if a checkpoint that was loaded had another multiplier than the readout has with `spec`."""
        loaded, base = vars(self).get("mup_loaded", (self._multiplier(spec), spec.base_fan_in))
        if not math.isclose(loaded, self._multiplier(spec), rel_tol=5e-3):
            raise BaseShapeError(
                f"readout {name!r}: the checkpoint was trained over base size {base:g} with multiplier {loaded:g}, this "
                f"model has {spec.base_fan_in} and {self._multiplier(spec):g}, which would change its outputs: call "
                "set_base_shapes with the base that it was trained with, or load mup.fold(model) into a plain model"
            )


# Next to a readout's weight in state_dict(), and in its metadata: [the multiplier, in_features at base width].
MULTIPLIER = "mup_multiplier"


class MuSharedReadout(MuReadout):
    """A readout that shares `weight` (out_features, in_features) with an embedding and leaves its init alone."""

    def __init__(self, weight: nn.Parameter, bias: bool = True, **kwargs: Any):
        super().__init__(weight.shape[1], weight.shape[0], bias=False, **kwargs | {"device": "meta"})
        vars(self)["mup_shared"] = {"weight": "table"}
        self.weight = weight
        if bias:
            self.bias = nn.Parameter(weight.new_empty(weight.shape[0]))
        self.reset_parameters()

    def _own_parameters(self) -> list[str]:
        return [] if self.bias is None else ["bias"]


def rescale_linear_bias(linear: nn.Module) -> None:
    """Turn torch's init of a linear or convolution bias, std 1/sqrt(fan_in), into muP's constant. Safe to repeat."""
    spec = tensor_spec(linear, "weight") or weight_spec(linear)
    if len(spec.shape) < 2:
        raise BaseShapeError(f"a {type(linear).__name__} is not a linear or convolution layer: nothing to rescale")
    m_in = spec.shape[1] / spec.base_shape[1]  # torch takes the fan-in from here, also for transposed convolutions
    _rescale(linear, {"bias": ROOT_PER_IN.inverse()(m_in, 1.0)})


def rescale_start(module: nn.Module) -> None:
    """Turn the start that torch gives a module of its own into muP's, for all of its parameters. Safe to repeat."""
    if "mup_own_start" in vars(module):  # rescale_init's
        return
    if isinstance(module, MuReadout):
        module._rescale_parameters()
        return
    if isinstance(module, nn.Linear | _ConvNd):
        rescale_linear_bias(module)
    specs = {name: spec for name, spec in vars(module).get("mup_specs", {}).items() if name in module._parameters}
    for source in sources(module).values():
        if source.layer is module and source.how in ("kept", "magnitude"):  # refused if it would have to change
            specs[source.tensor] = tensor_spec(module, source.tensor)
    if isinstance(module, nn.Linear | _ConvNd):
        specs.pop("bias", None)  # rescale_linear_bias's
    factors = {}
    for name, spec in specs.items():
        start = torch_start(module, name, spec)
        if start is not None:
            factors[name] = PARAMETRIZATIONS["mup"].init(spec) / start
    _rescale(module, factors)


def rescale_init(model: nn.Module) -> None:
    """Turn an initialisation of your own, with one std for all widths, into muP's. Safe to repeat.

    Hidden matrices shrink by 1/sqrt(width multiplier), whatever std each has; the rest is as it was. Call it after
    set_base_shapes(..., rescale_params=False) and after your initialisation.

    Raises:
        BaseShapeError: if set_base_shapes has rescaled already, and for weight_norm, whose magnitude is drawn by itself.
    """
    modules = list(model.modules())
    if any(vars(module).get("mup_rescaled") and "mup_own_start" not in vars(module) for module in modules):
        raise BaseShapeError("set_base_shapes took the values for torch's start: call it with rescale_params=False")
    if any(source.how == "magnitude" for source in sources(model).values()):
        raise BaseShapeError("the magnitude of weight_norm has its own start: initialise before weight_norm is applied")
    for module in modules:
        specs: dict[str, ParamSpec] = vars(module).get("mup_specs", {})
        vars(module)["mup_own_start"] = True
        _rescale(module, {name: PARAMETRIZATIONS["mup"].init(spec) for name, spec in specs.items()})
