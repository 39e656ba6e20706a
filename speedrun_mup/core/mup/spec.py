"""What a parameter is, declared where it is born and kept on the module that owns it.

Tensors lose their attributes when a model is deep-copied, materialised, sharded or loaded with assign=True; modules
keep theirs. So a spec lives in its module's `mup_specs`, under the parameter's local name.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

from speedrun_mup.core.errors import UserError
from speedrun_mup.core.mup.rules import Factors, Parametrization, Role


class UndeclaredParameterError(UserError, KeyError):
    """A parameter whose role nobody declared. Scaling it by 1 would be a silent guess."""

    def __str__(self) -> str:
        return str(self.args[0])


@dataclass(frozen=True)
class ParamSpec:
    """Role, shape at base width, shape here, and which dimensions are the fan-in and fan-out.

    layout: one word per dimension: "in", "out", or anything else for a dimension that is neither (a stack, a kernel).
    group: the learning-rate group that the parameter belongs to (embed, value_embed, matrix, head, scalar, ...).
    m_depth: depth multiplier, for a parameter that writes a residual branch into the stream; see rules.py.
    inferred: whether set_base_shapes worked out role and layout by itself; if so, it may do that again.
    """

    role: Role
    base_shape: tuple[int, ...]
    shape: tuple[int, ...]
    layout: tuple[str, ...]
    group: str = ""
    m_depth: float = 1.0
    inferred: bool = False

    def __post_init__(self) -> None:
        if not len(self.base_shape) == len(self.shape) == len(self.layout):
            raise ValueError(
                f"base shape {self.base_shape}, shape {self.shape} and layout {' '.join(self.layout)!r} "
                "must have one entry per dimension"
            )

    def _dim(self, word: str, shape: tuple[int, ...]) -> int:
        return shape[self.layout.index(word)] if word in self.layout else 1

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

    def factors(self, table: Parametrization, optimizer: str) -> Factors:
        """This parameter's row of the table in numbers; see Parametrization.factors."""
        return table.factors(self.role, self.m_in, self.m_out, optimizer, self.group, self.m_depth)


def declare(
    module: nn.Module,
    name: str,
    role: Role,
    base_shape: tuple[int, ...],
    layout: str,
    group: str = "",
    m_depth: float = 1.0,
) -> ParamSpec:
    """Record what `module`'s own parameter `name` is. Call it right after creating the parameter.

    layout: one word per dimension, "3 out in" for three stacked matrices. The other arguments are ParamSpec's fields.
    """
    parameter = module.get_parameter(name)
    spec = ParamSpec(role, tuple(base_shape), tuple(parameter.shape), tuple(layout.split()), group, m_depth)
    vars(parameter).pop("infshape", None)  # a convenience of set_base_shapes that says something else now
    vars(module).setdefault("mup_specs", {})[name] = spec
    return spec


def named_specs(model: nn.Module) -> Iterator[tuple[str, nn.Parameter, ParamSpec]]:
    """(name, parameter, spec) of every parameter of `model`, in named_parameters() order.

    Raises UndeclaredParameterError for a parameter without a spec.
    """
    modules = dict(model.named_modules())
    for name, parameter in model.named_parameters():
        owner, _, local = name.rpartition(".")
        specs: dict[str, ParamSpec] = getattr(modules[owner], "mup_specs", {})
        if local not in specs:
            raise UndeclaredParameterError(
                f"parameter {name} {tuple(parameter.shape)} has no declared role; call mup.declare or set_base_shapes"
            )
        yield name, parameter, specs[local]
