"""torch.nn.init with widths: the distribution that torch's function gives at base shape, times the table's init factor.

Same names as microsoft/mup's module. Call set_base_shapes first. At base shape every function is torch's, bit for bit.
Arguments must not depend on width. Fans are torch's, of the base shape; only what grows, and how, is ours.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.init import calculate_gain as calculate_gain

from speedrun_mup.core.mup.compat.infshape import BaseShapeError, spec_of
from speedrun_mup.core.mup.rules import PARAMETRIZATIONS, Role
from speedrun_mup.core.mup.spec import ParamSpec


def _factor(spec: ParamSpec) -> float:
    return PARAMETRIZATIONS["mup"].init(spec)


def _need(spec: ParamSpec, centred: bool, what: str) -> None:
    if spec.role is Role.HIDDEN and not centred:
        raise BaseShapeError(f"{what} of a hidden matrix {spec.shape} cannot scale with width; centre it at zero")


def constant_std_init_(tensor: Tensor, sampler_: Callable[..., Any]) -> Tensor:
    """Fill with `sampler_(tensor, scale=factor)`, for a distribution whose arguments do not know the tensor's shape."""
    sampler_(tensor, scale=_factor(spec_of(tensor)))
    return tensor


def normal_(tensor: Tensor, mean: float = 0.0, std: float = 1.0) -> Tensor:
    """torch.nn.init.normal_ with width. mean must be 0 for a hidden matrix."""
    _need(spec_of(tensor), mean == 0, "a mean")
    return constant_std_init_(tensor, lambda t, scale: nn.init.normal_(t, mean * scale, std * scale))


def uniform_(tensor: Tensor, a: float = 0.0, b: float = 1.0) -> Tensor:
    """torch.nn.init.uniform_ with width. a must be -b for a hidden matrix."""
    _need(spec_of(tensor), a == -b, "a mean")
    return constant_std_init_(tensor, lambda t, scale: nn.init.uniform_(t, a * scale, b * scale))


def trunc_normal_(tensor: Tensor, mean: float = 0.0, std: float = 1.0, a: float = -2.0, b: float = 2.0) -> Tensor:
    """torch.nn.init.trunc_normal_ with width; the bounds scale too. mean must be 0 and a be -b for a hidden matrix."""
    _need(spec_of(tensor), mean == 0 and a == -b, "a mean")
    arguments = (mean, std, a, b)
    return constant_std_init_(tensor, lambda t, scale: nn.init.trunc_normal_(t, *(x * scale for x in arguments)))


def ones_(tensor: Tensor) -> Tensor:
    """torch.nn.init.ones_; not for a hidden matrix."""
    _need(spec_of(tensor), False, "a constant")
    return nn.init.ones_(tensor)


def eye_(tensor: Tensor) -> Tensor:
    """torch.nn.init.eye_; not for a hidden matrix."""
    _need(spec_of(tensor), False, "a diagonal")
    return nn.init.eye_(tensor)


def _fans(shape: tuple[int, ...]) -> tuple[int, int]:
    """torch's fan-in and fan-out of a tensor (out, in, *kernel)."""
    kernel = math.prod(shape[2:])
    return shape[1] * kernel, shape[0] * kernel


def _at_base(tensor: Tensor, init_: Callable[..., Tensor], fan: Callable[[int, int], int], **kwargs: Any) -> Tensor:
    """Fill by `init_`, whose std is proportional to 1/sqrt(fan); then make that fan the base's, and scale by width."""
    spec = spec_of(tensor)
    init_(tensor, **kwargs)
    scale = _factor(spec) * math.sqrt(fan(*_fans(spec.shape)) / fan(*_fans(spec.base_shape)))
    with torch.no_grad():
        return tensor.mul_(scale)


def xavier_uniform_(tensor: Tensor, gain: float = 1.0) -> Tensor:
    """torch.nn.init.xavier_uniform_ with width."""
    return _at_base(tensor, nn.init.xavier_uniform_, lambda fan_in, fan_out: fan_in + fan_out, gain=gain)


def xavier_normal_(tensor: Tensor, gain: float = 1.0) -> Tensor:
    """torch.nn.init.xavier_normal_ with width."""
    return _at_base(tensor, nn.init.xavier_normal_, lambda fan_in, fan_out: fan_in + fan_out, gain=gain)


def _kaiming(tensor: Tensor, init_: Callable[..., Tensor], a: float, mode: str, nonlinearity: str) -> Tensor:
    if mode not in ("fan_in", "fan_out"):
        raise BaseShapeError(f"mode={mode!r} is unknown; choose fan_in or fan_out")
    pick = ("fan_in", "fan_out").index(mode)
    return _at_base(tensor, init_, lambda *fans: fans[pick], a=a, mode=mode, nonlinearity=nonlinearity)


def kaiming_uniform_(tensor: Tensor, a: float = 0.0, mode: str = "fan_in", nonlinearity: str = "leaky_relu") -> Tensor:
    """torch.nn.init.kaiming_uniform_ with width."""
    return _kaiming(tensor, nn.init.kaiming_uniform_, a, mode, nonlinearity)


def kaiming_normal_(tensor: Tensor, a: float = 0.0, mode: str = "fan_in", nonlinearity: str = "leaky_relu") -> Tensor:
    """torch.nn.init.kaiming_normal_ with width."""
    return _kaiming(tensor, nn.init.kaiming_normal_, a, mode, nonlinearity)
