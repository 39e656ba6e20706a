"""From the start that a model has to muP's, whatever its own initialisation does with width.

How a tensor's own start follows width is seen by comparing its values with those of the same model at base size: it does
not, or falls with the root of the fan-in, of the fan-out, or of their sum. Only which of these is taken from the values;
the factor itself is exact.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from speedrun_mup.core.mup.compat.infshape import BaseShapeError
from speedrun_mup.core.mup.compat.layer import _rescale
from speedrun_mup.core.mup.compat.layers import torch_start
from speedrun_mup.core.mup.rules import PARAMETRIZATIONS, Parametrization
from speedrun_mup.core.mup.spec import ParamSpec, Place, main_place, places, starred

_SURE = 4.0  # standard errors of a root mean square
_SLACK = 0.03  # in log2: what a truncated normal or a clamp may add


@dataclass
class _Kind:
    """Tensors that start alike: those of one name in all layers. Sums of squares here and at base, numbers of entries."""

    members: list[tuple[Place, ParamSpec]] = field(default_factory=list)
    here: float = 0.0
    entries: int = 0
    base: float = 0.0
    base_entries: int = 0


def turn_start(model: nn.Module, base: nn.Module, table: Parametrization) -> None:
    """Multiply the parameters of a fresh `model` so that they start as muP says, relative to `base`. Safe to repeat.

    base: the same model at base size, with its own start. At base size nothing is changed. table: whose start.

    Raises:
        BaseShapeError: for values that follow width in no way that an initialisation does: of a trained model.
    """
    for name, kind in _kinds(model, base).items():
        for (place, _), factor in zip(kind.members, _factors(name, kind, table)):
            if factor != 1.0 or place.local in vars(place.module).get("mup_rescaled", {}):
                _rescale(place.module, {place.local: factor})
    for module in model.modules():
        vars(module)["mup_own_start"] = True


def _kinds(model: nn.Module, base: nn.Module) -> dict[str, _Kind]:
    found = places(model)
    kinds: dict[str, _Kind] = {}
    for name, p in model.named_parameters():
        place = main_place(found[id(p)])
        if place is None or place.spec is None or p.is_meta:
            continue
        done: Mapping[str, float] = vars(place.module).get("mup_rescaled", {})
        kind = kinds.setdefault(starred(name), _Kind())
        kind.members.append((place, place.spec))
        kind.here += _squares(p) / done.get(place.local, 1.0) ** 2
        kind.entries += p.numel()
    for name, p in base.named_parameters():  # which may have fewer layers
        if (at_base := kinds.get(starred(name))) is not None:
            at_base.base += _squares(p)
            at_base.base_entries += p.numel()
    return kinds


@torch.no_grad()
def _squares(x: Tensor) -> float:
    return x.detach().double().square().sum().item()


def _factors(name: str, kind: _Kind, table: Parametrization) -> list[float]:
    """What to multiply each member by."""
    if not kind.here or not kind.base:
        return [1.0] * len(kind.members)
    spec = kind.members[0][1]
    seen = math.log2(kind.here / kind.entries / (kind.base / kind.base_entries)) / 2
    error = _SURE * math.sqrt((1 / kind.entries + 1 / kind.base_entries) / 2) / math.log(2) + _SLACK
    ways = _ways(*kind.members[0])
    nearest = min(ways, key=lambda way: abs(math.log2(way) - seen))
    if abs(math.log2(nearest) - seen) > error:
        raise BaseShapeError(
            f"{name} {spec.shape} has values {2**seen:.3g} times as large as at base size, which no initialisation does "
            f"({', '.join(f'{way:.3g}' for way in sorted(ways))} would be): pass init='keep' for a trained model, or if you "
            "initialise it for muP yourself"
        )
    return [_exactly_one(table.init(spec) / nearest) for _, spec in kind.members]


def _exactly_one(factor: float) -> float:
    return 1.0 if math.isclose(factor, 1.0) else factor


def _ways(place: Place, spec: ParamSpec) -> list[float]:
    """How much smaller a start may be than at base: one std for all widths, muP's, and by fan-in, fan-out or both."""
    ways = [1.0, PARAMETRIZATIONS["mup"].init(spec), spec.m_in**-0.5, spec.m_out**-0.5]
    both, at_base = spec.fan_in + spec.fan_out, spec.base_fan_in + spec.base_fan_out
    ways += [(both / at_base) ** -0.5] if len(spec.shape) > 1 else []
    of_torch = torch_start(place.module, place.local, spec)
    ways += [of_torch] if of_torch else []
    ways += [way * spec.m_depth**-0.5 for way in ways]  # GPT-2's last matrices of branches
    return list(dict.fromkeys(ways))
