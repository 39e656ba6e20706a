"""What a parameter is, declared where it is born and kept on the module that owns it.

Tensors lose their attributes when a model is deep-copied, materialised, sharded or loaded with assign=True; modules
keep theirs. So a spec lives in its module's `mup_specs`, under the parameter's local name.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from speedrun_mup.core.errors import UserError
from speedrun_mup.core.mup.depth_rules import DepthRole
from speedrun_mup.core.mup.rules import USUAL_DEPTH_ROLES, Multipliers, Parametrization, Role, Update
from speedrun_mup.core.seeds import generator


class BaseShapeError(UserError, ValueError):
    """Base, delta and target shapes that contradict each other, or leave open which dimensions grow."""


class UndeclaredParameterError(UserError, KeyError):
    """A parameter whose role is undeclared. Scaling it by 1 would be a silent guess."""

    def __str__(self) -> str:
        return str(self.args[0])


@dataclass(frozen=True)
class Init:
    """The distribution of a parameter's first values at base width; the rule table scales its std with width.

    std: standard deviation; 0 for constants. by_fan_in: std is meant for a fan-in of 1 and falls with its root.
    uniform: uniform instead of normal. constant: the values where std is 0, repeated over the parameter.
    """

    std: float = 0.0
    by_fan_in: bool = False
    uniform: bool = False
    constant: tuple[float, ...] = (0.0,)

    def draw(self, shape: tuple[int, ...], std: float, rng: torch.Generator, factor: float = 1.0) -> Tensor:
        """Values of `shape` in float32. std: what ParamSpec.init_std makes of `self.std`. factor: on constants."""
        values = torch.empty(shape)
        if not std:
            constant = [value * factor for value in self.constant]
            return values.copy_(torch.tensor(constant[0] if len(constant) == 1 else constant))
        bound = math.sqrt(3) * std
        return values.uniform_(-bound, bound, generator=rng) if self.uniform else values.normal_(std=std, generator=rng)


INITS = {"zero": Init(), "unit": Init(std=1.0), "fan_in": Init(std=1.0, by_fan_in=True)}


@dataclass(frozen=True)
class ParamSpec:
    """Role, shape at base width, shape here, and which dimensions are the fan-in and fan-out.

    layout: one word per dimension: "in", "out", or anything else for a dimension that is neither (a stack, a kernel).
    A side may have several dimensions ("in in out"); its size is their product.
    group: the learning-rate group that the parameter belongs to (embed, value_embed, matrix, head, scalar, ...).
    m_depth: depth multiplier.
    inferred: whether set_base_shapes worked out role and layout by itself; if so, it may do that again.
    init: how it starts; None where the module initialises it itself.
    uses: matrix products with it for each token of a forward pass; None: by its role.
    depth: where it stands to the residual stream; None: by its role, see depth_role.
    """

    role: Role
    base_shape: tuple[int, ...]
    shape: tuple[int, ...]
    layout: tuple[str, ...]
    group: str = ""
    m_depth: float = 1.0
    inferred: bool = False
    init: Init | None = None
    uses: float | None = None
    depth: DepthRole | None = None

    def __post_init__(self) -> None:
        if not len(self.base_shape) == len(self.shape) == len(self.layout):
            raise BaseShapeError(
                f"base shape {self.base_shape}, shape {self.shape} and layout {' '.join(self.layout)!r} "
                "must have one entry per dimension"
            )

    def _dim(self, word: str, shape: tuple[int, ...]) -> int:
        return math.prod([size for size, its_word in zip(shape, self.layout) if its_word == word])

    @property
    def fan_in(self) -> int:
        """Size of the input side here; 1 if the parameter has none."""
        return self._dim("in", self.shape)

    @property
    def fan_out(self) -> int:
        """Size of the output side here; 1 if the parameter has none."""
        return self._dim("out", self.shape)

    @property
    def base_fan_in(self) -> int:
        """Size of the input side at base width."""
        return self._dim("in", self.base_shape)

    @property
    def base_fan_out(self) -> int:
        """Size of the output side at base width."""
        return self._dim("out", self.base_shape)

    @property
    def m_in(self) -> float:
        """Width multiplier of the input side."""
        return self.fan_in / self.base_fan_in

    @property
    def m_out(self) -> float:
        """Width multiplier of the output side."""
        return self.fan_out / self.base_fan_out

    def factors(self, table: Parametrization, update: Update | str) -> Multipliers:
        """This parameter's row of the table in numbers; see Parametrization.factors."""
        return table.factors(self.role, self.m_in, self.m_out, update, self.group, self.m_depth, self.depth_role)

    @property
    def depth_role(self) -> DepthRole:
        """Where it stands to the residual stream: as declared, else by USUAL_DEPTH_ROLES."""
        return self.depth or USUAL_DEPTH_ROLES[self.role]

    @property
    def products_per_token(self) -> float:
        """Weights that a token is multiplied with: of hidden and output matrices all; embeddings are looked up."""
        by_role = 1 if self.role in (Role.HIDDEN, Role.OUTPUT) else 0
        return math.prod(self.shape) * (by_role if self.uses is None else self.uses)

    def init_std(self, table: Parametrization) -> float:
        """Standard deviation of the first values at this width; 0 where they are constant, or not declared."""
        if self.init is None or not self.init.std:
            return 0.0
        base = self.init.std * self.base_fan_in**-0.5 if self.init.by_fan_in else self.init.std
        return base * table.init(self)


def declare(
    module: nn.Module,
    name: str,
    role: Role,
    base_shape: tuple[int, ...],
    layout: str,
    group: str = "",
    m_depth: float = 1.0,
    init: Init | str | None = None,
    uses: float | None = None,
    depth: DepthRole | None = None,
) -> ParamSpec:
    """Record what `module`'s own parameter `name` is. Call it right after creating the parameter.

    Args:
        name: of a parameter of `module`, or of one of its submodules ("parametrizations.weight.original").
        layout: one word per dimension, "3 out in" for three stacked matrices.
        init: how it starts: "zero", "unit" (normal, std 1), "fan_in" (normal, std 1 / sqrt(fan-in)), or an Init.
        role, base_shape, group, m_depth, uses, depth: ParamSpec's fields.

    Raises:
        BaseShapeError: for a base shape or a layout of another number of dimensions.
        UndeclaredParameterError: for an init of another name.
    """
    if isinstance(init, str) and init not in INITS:
        raise UndeclaredParameterError(f"{name}: init={init!r} is unknown; choose {', '.join(INITS)} or an mup.Init")
    parameter = module.get_parameter(name)
    owner, _, local = name.rpartition(".")
    spec = ParamSpec(
        role,
        tuple(base_shape),
        tuple(parameter.shape),
        tuple(layout.split()),
        group,
        m_depth,
        init=INITS[init] if isinstance(init, str) else init,
        uses=uses,
        depth=depth,
    )
    vars(parameter).pop("infshape", None)  # a convenience of set_base_shapes that says something else now
    vars(module.get_submodule(owner)).setdefault("mup_specs", {})[local] = spec
    return spec


class Place(NamedTuple):
    """Where a parameter is registered: the module's path, the module, and the parameter's name there."""

    path: str
    module: nn.Module
    local: str

    @property
    def name(self) -> str:
        """As named_parameters says it."""
        return f"{self.path}.{self.local}" if self.path else self.local

    @property
    def spec(self) -> ParamSpec | None:
        """What was declared or inferred there."""
        return vars(self.module).get("mup_specs", {}).get(self.local)


def places(model: nn.Module) -> dict[int, list[Place]]:
    """{id of a parameter: where it is registered, in named_modules() order}: more than one place if it is tied.

    Unlike names, modules are the same under wrappers that change how parameters are called.
    """
    found: dict[int, list[Place]] = {}
    for path, module in model.named_modules():
        for local, parameter in module.named_parameters("", recurse=False, remove_duplicate=False):
            found.setdefault(id(parameter), []).append(Place(path, module, local))
    return found


def starred(name: str) -> str:
    """`name` with stars for the numbers in it, but for a leading one: the layers of a bare nn.Sequential are not alike."""
    return re.sub(r"(?<=\.)\d+(?![^.])", "*", name)


def main_place(where: list[Place]) -> Place | None:
    """The place that says what a tied parameter is: of an embedding and a readout that share one, the embedding's."""
    known = [place for place in where if place.spec is not None]
    return min(known, key=lambda place: place.spec.role is Role.OUTPUT, default=None)  # type: ignore[union-attr]


def named_specs(model: nn.Module) -> Iterator[tuple[str, nn.Parameter, ParamSpec]]:
    """(name, parameter, spec) of every parameter of `model`, in named_parameters() order.

    Raises:
        UndeclaredParameterError: for a parameter without a spec.
    """
    found = places(model)
    for name, parameter in model.named_parameters():
        place = main_place(found.get(id(parameter), []))
        if place is None or place.spec is None:
            size = "" if isinstance(parameter, nn.parameter.UninitializedParameter) else f" {tuple(parameter.shape)}"
            raise UndeclaredParameterError(f"parameter {name}{size} has no declared role; {_advice(model, name)}")
        yield name, parameter, place.spec


@torch.no_grad()
def init_parameters(model: nn.Module, table: Parametrization, seed: int) -> None:
    """Fill every parameter as declared, from `seed` and its own name: the same bits on every device and rank.

    Parameters on the meta device are checked and skipped.

    Raises:
        UndeclaredParameterError: for a parameter without a spec, or whose spec has no init.
    """
    for name, parameter, spec in named_specs(model):
        if spec.init is None:
            raise UndeclaredParameterError(
                f"parameter {name} {spec.shape} has no declared init; give mup.declare(..., init=...)"
            )
        if not parameter.is_meta:
            rng = generator(seed, "init", name)
            parameter.copy_(spec.init.draw(spec.shape, spec.init_std(table), rng, table.depth_init(spec)))


def set_depth(model: nn.Module, m_depth: float) -> None:
    """Give every parameter of `model` this depth multiplier: its layers over those that values were tuned at."""
    for module in model.modules():
        specs = vars(module).get("mup_specs", {})
        specs |= {name: replace(spec, m_depth=m_depth) for name, spec in specs.items()}


def set_init(model: nn.Module, starts: Mapping[str, Init]) -> None:
    """Have parameters begin otherwise than their modules declared, by what their names end in."""
    for path, module in model.named_modules():
        specs = vars(module).get("mup_specs", {})
        for local, spec in specs.items():
            found = [init for ending, init in starts.items() if f"{path}.{local}".endswith(f".{ending}")]
            specs[local] = replace(spec, init=found[-1]) if found else spec


def adapter_advice(model: nn.Module, name: str) -> str:
    """What to do if the parameter belongs to an adapter around a readout; else empty."""
    for path, module in model.named_modules():
        inner = getattr(module, "base_layer", None)  # where PEFT keeps the layer that it adapts
        if name.startswith(f"{path}.") and hasattr(type(inner), "mup_multiplier"):
            return (
                f"it belongs to an adapter around the readout {path}, which misses the readout's multiplier, also when "
                "it is merged: put adapters on mup.fold(model)"
            )
    return ""


def _advice(model: nn.Module, name: str) -> str:
    if "_flat_param" in name:
        return "shard with use_orig_params=True, or with fully_shard"
    return adapter_advice(model, name) or "call mup.declare or set_base_shapes"
