"""Dimensions and shapes that know which of their sizes grow with width; the role of a tensor inferred from its shape.

Same names as microsoft/mup's module. A dimension is infinite if it grows with width, else finite.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from speedrun_mup.core.mup.compat.layers import layout_of
from speedrun_mup.core.mup.rules import Role
from speedrun_mup.core.mup.spec import BaseShapeError as BaseShapeError
from speedrun_mup.core.mup.spec import ParamSpec, UndeclaredParameterError


@dataclass(frozen=True)
class InfDim:
    """A size `dim` and, if it grows with width, its size at base width (`base_dim`, else None)."""

    base_dim: int | None
    dim: int | None

    def isinf(self) -> bool:
        """Whether the dimension grows with width."""
        return self.base_dim is not None

    def width_mult(self) -> float:
        """dim / base_dim; 1 for a finite dimension."""
        return 1 if self.base_dim is None else self.dim / self.base_dim  # type: ignore[operator]

    def __repr__(self) -> str:
        return f"InfDim({self.base_dim}, {self.dim})"

    def __str__(self) -> str:
        return repr(self) if self.isinf() else f"FinDim({self.dim})"


class InfShape(tuple[InfDim, ...]):
    """The InfDims of a tensor: what `p.infshape` is. Equality counts the length; it can be hashed and pickled.

    main_idx, main: the infinite dimension that width_mult() looks at: the fan-in if that grows, else the fan-out.
    """

    _spec: ParamSpec | None = None
    name: str = ""  # of the parameter, for messages

    def __new__(cls, dims: Iterable[InfDim] = (), spec: ParamSpec | None = None) -> InfShape:
        """From InfDims, with `spec` where the layout is known. Raises BaseShapeError for anything that is no InfDim."""
        self = super().__new__(cls, dims)
        for dim in self:
            if not isinstance(dim, InfDim):
                raise BaseShapeError(f"an InfShape is made of InfDims, not of {type(dim).__name__} ({dim!r})")
        self._spec = spec
        return self

    @property
    def spec(self) -> ParamSpec:
        """What the parameter is: as declared or inferred with its module, else inferred from the shape alone."""
        return self._spec or infer_spec(self)

    @property
    def main_idx(self) -> int | None:
        """Index of `main`; None if every dimension is finite. Read-only: declare the layout on the module."""
        words = self._spec.layout if self._spec else ("-",) * len(self)
        infinite = [i for i, dim in enumerate(self) if dim.isinf()]
        return max(infinite, key=lambda i: (words[i] == "in", words[i] == "out", i), default=None)

    @main_idx.setter
    def main_idx(self, value: int) -> None:
        raise BaseShapeError(
            "infshape.main_idx is read-only; for an (in, out) tensor call "
            'mup.declare(module, name, mup.Role.HIDDEN, base_shape, "in out") before set_base_shapes'
        )

    @property
    def main(self) -> InfDim | None:
        """The infinite dimension at main_idx."""
        return None if self.main_idx is None else self[self.main_idx]

    def ninf(self) -> int:
        """How many dimensions are infinite."""
        return sum(dim.isinf() for dim in self)

    def width_mult(self) -> float:
        """Width multiplier of `main`; 1 if every dimension is finite."""
        return 1 if self.main is None else self.main.width_mult()

    def fanin_fanout(self) -> tuple[InfDim, InfDim]:
        """The fan-in and fan-out dimensions, wherever they stand: (3, out, in) has both. BaseShapeError below 2-D."""
        if len(self) < 2:
            raise BaseShapeError(f"fan-in and fan-out need two dimensions, {self!r} has {len(self)}")
        layout = self.spec.layout
        sides = [[dim for dim, its_word in zip(self, layout) if its_word == word] for word in ("in", "out")]
        fan_in, fan_out = (max(side, key=InfDim.isinf, default=None) for side in sides)
        return (fan_in, fan_out) if fan_in and fan_out else (self[1], self[0])

    def fanin_fanout_mult_ratio(self) -> float:
        """Width multiplier of the fan-in over that of the fan-out."""
        fan_in, fan_out = self.fanin_fanout()
        return fan_in.width_mult() / fan_out.width_mult()

    def base_shape(self) -> list[int | None]:
        """Sizes at base width, None where finite."""
        return [dim.base_dim for dim in self]

    def shape(self) -> list[int | None]:
        """Sizes here."""
        return [dim.dim for dim in self]

    def serialize(self) -> dict[str, list[int | None]]:
        """As plain lists under the keys base_shape and shape."""
        return {"base_shape": self.base_shape(), "shape": self.shape()}

    @classmethod
    def deserialize(cls, d: dict[str, list[int | None]]) -> InfShape:
        """The inverse of serialize."""
        return cls(InfDim(base, dim) for base, dim in zip(d["base_shape"], d["shape"], strict=True))

    @classmethod
    def from_base_shape(cls, bsh: Iterable[int | None]) -> InfShape:
        """With unknown sizes here (None)."""
        return cls(InfDim(base, None) for base in bsh)

    @classmethod
    def from_spec(cls, spec: ParamSpec) -> InfShape:
        """The shape that `spec` describes: infinite where its role says so, or where base and present size differ."""
        grows = GROWS[spec.role]
        dims = zip(spec.layout, spec.base_shape, spec.shape, strict=True)
        return cls((InfDim(b if word in grows or b != d else None, d) for word, b, d in dims), spec)

    def __repr__(self) -> str:
        return f"InfShape([{', '.join(map(repr, self))}])"


GROWS = {Role.INPUT: ("out",), Role.HIDDEN: ("in", "out"), Role.OUTPUT: ("in",), Role.SCALAR: ()}


def zip_infshape(base_dims: Sequence[int | InfDim], dims: Sequence[int], fin_if_same: bool = True) -> InfShape:
    """The InfShape of a tensor of sizes `dims`: infinite where they differ from `base_dims`, or where that says so.

    fin_if_same: whether an int base equal to the size means finite. Raises BaseShapeError for a different number of
    dimensions, a finite dimension of another size, and a base that is neither int nor InfDim.
    """
    base, sizes = tuple(base_dims), tuple(dims)
    if len(base) != len(sizes):
        raise BaseShapeError(
            f"base {base} has {len(base)} dimensions, target {sizes} has {len(sizes)}; rebuild the base"
        )
    infdims = []
    for b, d in zip(base, sizes):
        if isinstance(b, InfDim):
            if not b.isinf() and b.dim not in (None, d):
                raise BaseShapeError(f"a finite dimension is {b.dim} in the base and {d} in {sizes}; make them equal")
            infdims.append(InfDim(b.base_dim, d))
        elif isinstance(b, int):
            infdims.append(InfDim(None if b == d and fin_if_same else b, d))
        else:
            raise BaseShapeError(f"a base dimension is an int or an InfDim, not {type(b).__name__} ({b!r})")
    if any(dim.isinf() and 0 in (dim.base_dim, dim.dim) for dim in infdims):
        raise BaseShapeError(f"base {base}, target {sizes}: a size of 0 has no width multiplier")
    return InfShape(infdims)


def infer_spec(infshape: InfShape, module: nn.Module | None = None, tensor: str = "weight") -> ParamSpec:
    """Role and layout of a `tensor` of this shape, owned by `module`.

    No infinite dimension: SCALAR. Of torch's own layers it is known which dimensions are read from and written to. Else,
    one: INPUT for a vector. Two: HIDDEN, (out, in) as torch stores weights, other dimensions being stacks or kernels.

    Raises:
        BaseShapeError: where that leaves a choice. A tensor without a module is taken for a vector or a matrix.
    """
    infinite = [i for i, dim in enumerate(infshape) if dim.isinf()]
    words = layout_of(module, tensor, len(infshape)) if module is not None else None
    if words is None:
        words = _layout_by_shape(infshape, infinite, guess=module is None)
    grown = frozenset(words[i] for i in infinite)
    roles = {frozenset(sides): role for role, sides in GROWS.items()}
    if grown not in roles:  # a vocabulary, for one
        raise BaseShapeError(f"{infshape!r}: dimension {words.index('-')} must not grow with width")
    sizes: Any = tuple(infshape.shape())
    base: Any = tuple(dim.base_dim or dim.dim for dim in infshape)
    return ParamSpec(roles[grown], base, sizes, tuple(words), inferred=True)


def _layout_by_shape(infshape: InfShape, infinite: list[int], guess: bool) -> list[str]:
    words = ["-"] * len(infshape)
    if len(infinite) == 1:
        others = [dim.dim for dim in infshape if not dim.isinf()]
        # one row for all positions or examples, (1, 1, d) or (1, T, d); or one number for each channel, (d, 1, 1)
        added = len(words) > 2 and (infshape[0] == InfDim(None, 1) or set(others) == {1})
        if not (len(words) == 1 or added or guess):
            raise BaseShapeError("one dimension grows with width, and the shape does not show whether it is read from")
        words[infinite[0]] = "out"
    elif len(infinite) == 2:
        words[infinite[0]], words[infinite[1]] = "out", "in"
    elif infinite:
        raise BaseShapeError(
            f"{infshape!r}: in and out are ambiguous; declare them with mup.declare(module, name, role, base, layout)"
        )
    return words


def spec_of(tensor: Tensor) -> ParamSpec:
    """What set_base_shapes attached to the tensor. Raises UndeclaredParameterError if a copy of the model lost it."""
    if not hasattr(tensor, "infshape"):
        raise UndeclaredParameterError(
            f"a tensor {tuple(tensor.shape)} has no infshape: call set_base_shapes; if it was lost (deepcopy, "
            "to_empty, FSDP2, load_state_dict(assign=True)), pass the model to the optimizer, or bring it back with "
            "apply_infshapes(model, get_infshapes(model))"
        )
    return tensor.infshape.spec
