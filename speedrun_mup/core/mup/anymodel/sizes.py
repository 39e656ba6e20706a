"""The same model at base size and at another: what grows with width is what differs between the two.

A base is said in the model's own words: fields of its config (Hugging Face's, or a dataclass), arguments of a function
that builds it, a model, or stored base shapes.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Mapping
from fractions import Fraction
from typing import Any, cast

import torch
from torch import nn

from speedrun_mup.core.errors import in_a_line
from speedrun_mup.core.mup.compat.infshape import BaseShapeError
from speedrun_mup.core.mup.compat.shape import Shapes

Build = Callable[..., nn.Module]
Fields = dict[str, Any]
Base = Mapping[str, Any] | int | nn.Module | Shapes | None

STORED = "mup_base"  # where a config keeps the fields that its model was adapted with

# What configs call the width of the model, and what follows it unless the base says otherwise: feed-forward sizes, and
# the number of heads, so that heads keep their size.
_WIDTHS = ("hidden_size", "n_embd", "d_model", "embed_dim", "hidden_dim", "dim", "width")
_FOLLOWERS = (
    *("intermediate_size", "ffn_dim", "n_inner", "d_ff", "d_inner", "ffn_hidden_size", "encoder_ffn_dim"),
    *("decoder_ffn_dim", "moe_intermediate_size", "shared_expert_intermediate_size", "time_step_rank"),
    *("num_attention_heads", "n_head", "n_heads", "num_heads", "encoder_attention_heads", "decoder_attention_heads"),
    *("num_key_value_heads", "n_kv_heads", "n_kv_head", "num_kv_heads"),
)
_HEADS, _KEY_VALUE_HEADS = _FOLLOWERS[11:17], _FOLLOWERS[17:]
_LAYERS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers", "n_blocks")


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Base and delta as set_base_shapes takes them. build: the base model with its values, where it can be built.

    model: the base as a model, on meta, where there is one. fields: what a config should remember of it. m_depth: layers
    here over those of the base; the models compared have as many as here. layers: here; None where the base says nothing.
    """

    base: Shapes
    delta: Shapes | None = None
    build: Callable[[], nn.Module] | None = None
    fields: Fields | None = None
    m_depth: float = 1.0
    layers: int | None = None

    @property
    def model(self) -> nn.Module | None:
        """The base as a model, if it is one."""
        return self.base if isinstance(self.base, nn.Module) else None


def sizes_of(model: nn.Module, base: Base, build: Build | None = None, delta: Any = None) -> Sizes:
    """What `base` means for `model`.

    Args:
        base: fields of model.config, or arguments of `build`, that differ at base size; one number, the argument of
            `build`; a model; or stored shapes. None: the fields that the model's config remembers.
        build: a function that makes the model from these arguments.
        delta: another size, said likewise. By default twice every field that differs between base and model.

    Raises:
        BaseShapeError: for a base that cannot be built, or that leaves open what grows.
    """
    config = getattr(model, "config", None)
    stored = getattr(config, STORED, None)
    if base is None:
        if stored is None:
            raise BaseShapeError(
                "base= is missing: say the size that the rates were tuned at, as fields of the model's config "
                '({"hidden_size": 256}), arguments of build=, a model, or a .bsh file'
            )
        base = dict(stored)
    if _are_fields(base):
        return _by_fields(model, base, build, delta, stored)
    if build is not None:
        raise BaseShapeError("build= goes with a base of its arguments: base=256, or base={'n_embd': 256}")
    return Sizes(cast(Shapes, base), delta)


def _are_fields(said: Any) -> bool:
    """Whether it is sizes to build with: a number, or a mapping that holds some, not shapes."""
    if isinstance(said, Mapping):
        return not said or any(isinstance(value, int | float | str) for value in said.values())
    return isinstance(said, int)


def _by_fields(model: nn.Module, base: Any, build: Build | None, delta: Any, stored: Any) -> Sizes:
    """Sizes from fields of a config, or from arguments of `build`."""
    config = getattr(model, "config", None)
    here: Fields = {}
    if build is not None:
        make, fields = _builder(build), base
    elif isinstance(base, int):
        raise BaseShapeError(
            f"base={base} is an argument of build=, which is missing: pass the function that builds it"
        )
    else:
        make, fields, here = _rebuilder(model, config, base)
        if stored is not None and dict(stored) != fields:
            raise BaseShapeError(
                f"the model's config says that it was trained over the base {dict(stored)}, not {fields}: leave base= out"
            )
    other = _doubled(fields, here, config) if delta is None else delta
    if _are_fields(other):
        other = _complete(config, other)[0] if build is None and delta is not None else other
        other = _on_meta(make, other)
    remembered = fields if build is None and hasattr(config, "to_dict") else None
    deep = next((name for name in _LAYERS if name in here), None)
    layers, m_depth = (here[deep], here[deep] / fields[deep]) if deep else (None, 1.0)
    as_deep = fields | {deep: layers} if deep else fields
    return Sizes(_on_meta(make, as_deep), other, lambda: _with_values(make, fields), remembered, m_depth, layers)


def _builder(build: Build) -> Callable[[Any], nn.Module]:
    return lambda fields: build(**fields) if isinstance(fields, Mapping) else build(fields)


def _rebuilder(
    model: nn.Module, config: Any, base: Mapping[str, Any]
) -> tuple[Callable[[Any], nn.Module], Fields, Fields]:
    """(a function from fields to a model of the same config but for them, all fields of the base, those of the model)."""
    kind = type(model)
    if not (dataclasses.is_dataclass(config) or hasattr(type(config), "from_dict")):
        raise BaseShapeError(
            f"a {kind.__name__} has no config that a base of fields could change: pass build=, a function that makes the "
            "model from them, or a model of the base size as base="
        )
    fields, here = _complete(config, base)

    def make(changed: Fields) -> nn.Module:
        if dataclasses.is_dataclass(config):
            return kind(dataclasses.replace(config, **changed))  # type: ignore[type-var]
        known = {name: value for name, value in config.to_dict().items() if name != STORED}
        return kind(type(config).from_dict(known | changed))

    return make, fields, here


def _complete(config: Any, base: Mapping[str, Any]) -> tuple[Fields, Fields]:
    """(the fields of the base with what follows the width, the same fields in `config`). Says what it added."""
    aliases = getattr(config, "attribute_map", {})
    fields = {aliases.get(name, name): value for name, value in base.items()}
    for name in fields:
        if not hasattr(config, name):
            raise BaseShapeError(f"the model's config has no {name!r}: base= takes its fields, as {_known(config)}")
    width = next((name for name in _WIDTHS if name in fields), None)
    added: Fields = {}
    if width is not None:
        ratio = Fraction(fields[width], getattr(config, width))
        for name in _FOLLOWERS:
            size = getattr(config, name, None)
            if name not in fields and type(size) is int and name not in aliases:
                added[name] = _follow(name, size, ratio, fields | {width: fields[width]})
        added |= _head_size(config, fields | added, width)
    added = {name: value for name, value in added.items() if value != getattr(config, name)}
    if added:
        named = ", ".join(f"{name}={value}" for name, value in added.items())
        warnings.warn(f"base={dict(base)}: {named} follow the width; name them in base= to say otherwise", stacklevel=6)
    fields |= added
    return fields, {name: getattr(config, name) for name in fields}


def _follow(name: str, size: int, ratio: Fraction, fields: Fields) -> int:
    at_base = size * ratio
    if at_base.denominator != 1:
        raise BaseShapeError(
            f"base={fields} leaves {name} open: it is {size} here and would be {float(at_base):g} there; name it in base="
        )
    return int(at_base)


def _head_size(config: Any, fields: Fields, width: str) -> Fields:
    """The size of a head, where it is a field that the config worked out from those that changed."""
    heads = next((name for name in _HEADS if isinstance(getattr(config, name, None), int)), None)
    size = getattr(config, "head_dim", None)
    if heads is None or "head_dim" in fields or type(size) is not int:
        return {}
    if size * getattr(config, heads) != getattr(config, width):  # one of its own
        return {}
    return {"head_dim": fields[width] // fields.get(heads, getattr(config, heads))}


def _known(config: Any) -> str:
    known = [name for name in (*_WIDTHS, *_FOLLOWERS) if isinstance(getattr(config, name, None), int)]
    return ", ".join(known[:6]) or "its own names"


def _doubled(base: Any, here: Fields, config: Any) -> Any:
    """Another size of the base: twice what differs from the model. At base size, where nothing does, twice all of it, and
    of what follows the width: so that the same grows there as at any other size. It has as many layers as the model.
    """
    if isinstance(base, int):
        return 2 * base
    layers = {name: here[name] for name in _LAYERS if name in here}
    sizes = {name: value for name, value in base.items() if type(value) is int and name not in layers}
    grown = {name: 2 * value for name, value in sizes.items() if here.get(name) != value}
    if not grown and (layers or any(name in _WIDTHS for name in sizes)):
        known = (name for name in (*_WIDTHS, *_FOLLOWERS) if name not in getattr(config, "attribute_map", {}))
        sizes |= {name: size for name in known if type(size := getattr(config, name, None)) is int}
    return base | layers | (grown or {name: 2 * value for name, value in sizes.items()})


def _on_meta(make: Callable[[Any], nn.Module], fields: Any) -> nn.Module:
    try:
        with torch.device("meta"), torch.random.fork_rng(devices=[]):
            return make(fields)
    except Exception as fault:
        if isinstance(fault, BaseShapeError):
            raise
        raise BaseShapeError(
            f"the model with {fields} cannot be built on the meta device ({in_a_line(fault)}): check these sizes, or build "
            "it yourself and pass base=MODEL, delta=MODEL"
        ) from None


def _with_values(make: Callable[[Any], nn.Module], fields: Any) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return make(fields)
