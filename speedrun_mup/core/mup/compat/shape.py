"""Base shapes: from a base and a delta model to a ParamSpec for every parameter, and to and from .bsh files.

Same names and file format as microsoft/mup's module. What set_base_shapes finds out is kept on the modules (spec.py);
`p.infshape` on the tensors is a convenience that copies of a model may lose.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import stat
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from torch import nn
from torch.nn.modules.conv import _ConvNd

from speedrun_mup.core.errors import in_a_line
from speedrun_mup.core.mup.compat.infshape import BaseShapeError, InfDim, InfShape, infer_spec, zip_infshape
from speedrun_mup.core.mup.compat.layer import MuReadout, rescale_start
from speedrun_mup.core.mup.compat.layers import LayerSource, sources
from speedrun_mup.core.mup.rules import PARAMETRIZATIONS, Role
from speedrun_mup.core.mup.spec import ParamSpec, Place, adapter_advice, main_place, named_specs, places

Dims = Sequence[int | InfDim]
Shapes = nn.Module | Mapping[str, Dims] | str | Path  # a model, {parameter name: sizes} or a .bsh file
Model = TypeVar("Model", bound=nn.Module)

_HEADER = """\
# Base shapes of a model for muP, in YAML: one list per parameter.
# null is a finite dimension; a number is the base size of a dimension that grows with width.
"""
_FINITE = "# finite sizes: "  # a comment, which other readers of the format skip
_MOST_BYTES = 1 << 23


def get_shapes(model: nn.Module) -> dict[str, Dims]:
    """Sizes of every parameter by name; `model.get_shapes()` instead, if the model defines that."""
    if hasattr(model, "get_shapes"):
        return model.get_shapes()  # type: ignore[operator]
    shapes: dict[str, Dims] = {}
    for name, p in model.named_parameters():
        if isinstance(p, nn.parameter.UninitializedParameter):
            raise BaseShapeError(f"{name} of a lazy module has no shape yet: run a batch through the model first")
        shapes[name] = tuple(p.shape)
    return shapes


def get_infshapes(model: nn.Module) -> dict[str, InfShape]:
    """InfShape of every parameter by name, read from the modules. Raises UndeclaredParameterError."""
    return {name: InfShape.from_spec(spec) for name, _, spec in named_specs(model)}


def save_base_shapes(model_or_shapes: nn.Module | Mapping[str, InfShape], file: str | Path) -> None:
    """Write the base shapes of a model (after set_base_shapes) or {name: InfShape} to a .bsh file.

    Raises BaseShapeError if no dimension grows: a model that is its own base does not show what does.
    """
    shapes = get_infshapes(model_or_shapes) if isinstance(model_or_shapes, nn.Module) else model_or_shapes
    if not any(s.ninf() for s in shapes.values()):
        raise BaseShapeError(f"{file}: no dimension would grow with width; give a delta model of another width")
    finite = {name: [None if dim.isinf() else dim.dim for dim in s] for name, s in shapes.items()}
    import yaml  # only for files, so that everything else needs torch alone

    base = yaml.safe_dump({name: s.base_shape() for name, s in shapes.items()}, indent=4)
    try:
        Path(file).write_text(f"{_HEADER}{_FINITE}{json.dumps(finite)}\n{base}")
    except OSError as fault:
        raise BaseShapeError(f"cannot write base shapes: {in_a_line(fault)}") from None


def load_base_shapes(filename: str | Path) -> dict[str, InfShape]:
    """{name: InfShape} from a .bsh file, also one by microsoft/mup. Finite sizes are None if the file has none.

    Raises:
        BaseShapeError: for what is not such a file, in one line.
    """
    import yaml

    text = _read(filename)
    try:
        sizes = yaml.safe_load(text)
        finite = [json.loads(line.removeprefix(_FINITE)) for line in text.splitlines() if line.startswith(_FINITE)]
    except (yaml.YAMLError, ValueError, RecursionError) as fault:
        raise BaseShapeError(f"{filename} is not a file of base shapes: {in_a_line(fault)}; save it again") from None
    if not sizes or not all(_are_shapes(part) for part in [sizes, *finite]):
        raise BaseShapeError(
            f"{filename} is not a file of base shapes: it lacks {{name: [sizes or null]}}; save it again"
        )
    shapes = {name: InfShape.from_base_shape(base) for name, base in sizes.items()}
    for name, known in ((name, known) for part in finite for name, known in part.items()):
        if len(known) != len(shapes.get(name, ())):
            raise BaseShapeError(f"{filename}: the finite sizes of {name!r} belong to another shape; save it again")
        shapes[name] = InfShape(InfDim(d.base_dim, size) for d, size in zip(shapes[name], known))
    return shapes


def _read(filename: str | Path) -> str:
    """The text of a regular file of up to _MOST_BYTES."""
    try:
        handle = os.open(filename, os.O_RDONLY | os.O_NONBLOCK)  # which a pipe without a writer would hold up
        with os.fdopen(handle, "rb") as file:
            info = os.fstat(handle)
            if not stat.S_ISREG(info.st_mode) or info.st_size > _MOST_BYTES:
                raise BaseShapeError(f"{filename} is not a file of base shapes: not a regular file of up to 8 MiB")
            return file.read(_MOST_BYTES).decode()
    except (OSError, ValueError) as fault:
        if isinstance(fault, BaseShapeError):
            raise
        raise BaseShapeError(f"cannot read base shapes from {filename!r}: {in_a_line(fault)}") from None


def _are_shapes(found: object) -> bool:
    """Whether it is {name: [size or None]}."""
    return isinstance(found, dict) and all(
        isinstance(name, str)
        and isinstance(sizes, list)
        and all(size is None or (type(size) is int and size >= 0) for size in sizes)
        for name, sizes in found.items()
    )


def _extract_shapes(source: Shapes) -> Mapping[str, Dims]:
    if isinstance(source, nn.Module):
        return get_shapes(source)
    if isinstance(source, str | Path):
        return load_base_shapes(source)
    if not isinstance(source, Mapping):
        raise BaseShapeError(f"base shapes are a model, {{name: sizes}} or a .bsh file, not {type(source).__name__}")
    return source


# What wrappers put into names: torch.compile, activation checkpointing, FullyShardedDataParallel.
_WRAPPERS = ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")


def _plain(name: str, also: tuple[str, ...] = ()) -> str:
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS + also)


def _plain_names(base: Iterable[str], target: Iterable[str]) -> tuple[dict[str, str], dict[str, str]]:
    """{plain name: name} of both, without what wrappers put into names.

    DistributedDataParallel's "module" is a name that models have too: it goes only if the two do not match otherwise.
    """
    for also in ((), ("module",)):
        plain_base, plain_target = ({_plain(name, also): name for name in names} for names in (base, target))
        if plain_base.keys() == plain_target.keys():
            break
    return plain_base, plain_target


def zip_infshapes(base: Shapes, target: Shapes) -> dict[str, InfShape]:
    """{name in target: InfShape} of `target` over `base`.

    Raises:
        BaseShapeError: naming what does not fit.
    """
    base_shapes, target_shapes = _extract_shapes(base), _extract_shapes(target)
    base_names, target_names = _plain_names(base_shapes, target_shapes)
    if base_names.keys() != target_names.keys() or len(target_names) != len(target_shapes):
        raise BaseShapeError(_mismatch(base_names, target_names))
    infshapes = {}
    for plain, name in target_names.items():
        sizes = [dim.dim if isinstance(dim, InfDim) else dim for dim in target_shapes[name]]
        try:
            infshapes[name] = zip_infshape(base_shapes[base_names[plain]], sizes)  # type: ignore[arg-type]
        except BaseShapeError as fault:
            raise BaseShapeError(f"{name}: {fault}") from None
    return infshapes


def _mismatch(base: Mapping[str, str], target: Mapping[str, str]) -> str:
    """What to say about names that are not the same."""
    only_base, only_target = sorted(base.keys() - target.keys()), sorted(target.keys() - base.keys())
    few_base, few_target = (f"{names[:4]}{' ...' if len(names) > 4 else ''}" for names in (only_base, only_target))
    hint = ""
    if any("_flat_param" in name for name in only_target):
        hint = "; call set_base_shapes before sharding, or shard with use_orig_params=True"
    elif any("parametrizations." in name or name.endswith(("_orig", "_v")) for name in [*only_base, *only_target]):
        hint = "; build the base with the same parametrizations (weight_norm and others)"
    return f"parameters differ: only in the base {few_base}, only in the target {few_target}{hint}"


def clear_dims(infshape_dict: Mapping[str, InfShape]) -> dict[str, InfShape]:
    """The same without the present sizes of infinite dimensions (None); finite sizes stay, to be checked later."""
    return {
        name: InfShape(InfDim(dim.base_dim, None if dim.isinf() else dim.dim) for dim in infshape)
        for name, infshape in infshape_dict.items()
    }


def make_base_shapes(
    base_shapes: Shapes, delta_shapes: Shapes, savefile: str | Path | None = None
) -> dict[str, InfShape]:
    """Base shapes in which exactly the dimensions that differ between base and delta grow; also saved to `savefile`."""
    shapes = clear_dims(zip_infshapes(base_shapes, delta_shapes))
    if savefile is not None:
        save_base_shapes(shapes, savefile)
    return shapes


def _resolve(place: Place, infshape: InfShape, made: dict[tuple[int, str], LayerSource]) -> ParamSpec:
    """What the parameter is there: role and layout as declared, else inferred."""
    source = made.get((id(place.module), place.local), LayerSource(place.module, place.local))
    if source.how and source.tensor == "weight" and isinstance(source.layer, MuReadout):
        raise BaseShapeError(
            "muP has no rule for a readout whose weight is parametrized, which fixes its size: leave the readout plain"
        )
    if place.spec is not None and not place.spec.inferred:
        base = tuple(d.base_dim or d.dim for d in infshape)
        return replace(place.spec, base_shape=base, shape=tuple(infshape.shape()))  # type: ignore[arg-type]
    if source.how == "magnitude":
        return _gain(infshape)
    spec = infer_spec(infshape, source.layer, source.tensor)
    if isinstance(source.layer, (MuReadout, *_TABLES)) and _first_grows(source.tensor, infshape):
        raise BaseShapeError(
            f"{spec.shape}: its first dimension differs from the base {spec.base_shape}; "
            "a vocabulary must not grow with width"
        )
    if source.how == "normalised" and spec.m_in != spec.m_out:
        raise BaseShapeError(
            "a norm that is fixed (spectral_norm, orthogonal) fits muP only where both sides grow alike: "
            "leave this layer plain, or use weight_norm"
        )
    return spec


def _gain(infshape: InfShape) -> ParamSpec:
    """Of a tensor whose entries each multiply one activation."""
    words = tuple("out" if dim.isinf() else "-" for dim in infshape)
    base: Any = tuple(dim.base_dim or dim.dim for dim in infshape)
    role = Role.INPUT if infshape.ninf() else Role.SCALAR
    return ParamSpec(role, base, tuple(infshape.shape()), words, inferred=True)  # type: ignore[arg-type]


def _first_grows(tensor: str, infshape: InfShape) -> bool:
    return tensor == "weight" and len(infshape) == 2 and infshape[0].isinf()


def _how_to_declare(place: Place, infshape: InfShape) -> str:
    """The two calls to choose from."""
    base = tuple(d.base_dim or d.dim for d in infshape)
    owner = f'model.get_submodule("{place.path}")' if place.path else "model"
    grown, other = (("in", "out"), ("out", "in"))
    layouts = [" ".join(sides[not dim.isinf()] for dim in infshape) for sides in (grown, other)]
    return (
        f'before set_base_shapes, mup.declare({owner}, "{place.local}", mup.Role.HIDDEN, {base}, "{layouts[0]}") for a '
        f'matrix that reads activations of this width (a router, a projection), or mup.Role.INPUT, "{layouts[1]}" for a '
        "table whose rows become activations or are added to them (positions, a bias for each expert), or whose numbers "
        "belong to one channel each (A_log of Mamba)"
    )


def _explained(fault: BaseShapeError, place: Place, infshape: InfShape, where: list[Place]) -> BaseShapeError:
    """The fault with the parameter's name, and with what to do if only the user can know what it is."""
    text = f"{place.name} {tuple(infshape.shape())}: {fault}"
    if str(fault).startswith("one dimension grows"):
        text += "; if the other one is the same by coincidence, pass delta= to set_base_shapes; else say it: "
        text += _how_to_declare(place, infshape)
    tables = _tables(where)
    if tables and not isinstance(place.module, _TABLES):
        text += f". It is also {tables[0]}: a readout that shares an embedding is {_share(tables[0])}"
    return BaseShapeError(text)


_TABLES = (nn.Embedding, nn.EmbeddingBag)


def _tables(where: list[Place]) -> list[str]:
    return [place.name for place in where if isinstance(place.module, _TABLES)]


def _share(table: str, bias: bool = False) -> str:
    owner = f"model.{table}" if all(map(str.isidentifier, table.split("."))) else f'model.get_parameter("{table}")'
    return f"mup.MuSharedReadout({owner}, bias={bias})"


def _check_ties(specs: Mapping[Place, ParamSpec], where: list[Place]) -> None:
    """Raise BaseShapeError if a tied parameter is two things at once; a readout may share what an embedding owns."""
    kinds = {(s.role, s.m_in, s.m_out): p for p in where if (s := specs[p]).role is not Role.OUTPUT}
    if len(kinds) > 1:
        (one, *_), (first, second, *_) = kinds, kinds.values()
        raise BaseShapeError(
            f"{first.name} is {second.name} too, {one[0].value} here and not the same there: untie them, or declare both"
        )


def _check_magnitude(specs: Mapping[Place, ParamSpec], made: Mapping[tuple[int, str], LayerSource]) -> None:
    """Raise BaseShapeError where weight_norm's magnitude, a norm of the weight, would itself grow with width."""
    directions = {}
    for place, spec in specs.items():
        source = made.get((id(place.module), place.local))
        if source and source.how == "direction":
            directions[id(source.layer), source.tensor] = spec
    for place, spec in specs.items():
        source = made.get((id(place.module), place.local))
        if not (source and source.how == "magnitude" and spec.inferred):
            continue
        direction = directions[id(source.layer), source.tensor]
        sides = zip(direction.shape, direction.base_shape, spec.shape if spec.shape else itertools.repeat(1))
        summed = math.prod(size / base for size, base, kept in sides if kept == 1)
        if not math.isclose(summed * PARAMETRIZATIONS["mup"].init(direction) ** 2, 1.0):
            raise BaseShapeError(
                f"{place.name} {spec.shape}: weight_norm over these dimensions makes a magnitude that grows with width: "
                "take one magnitude for each output (dim=0; dim=1 of a transposed convolution), or leave the layer plain"
            )


def _resolve_all(model: nn.Module, infshapes: Mapping[str, InfShape]) -> dict[Place, ParamSpec]:
    """What every parameter is, at every place where it is registered. Changes nothing."""
    found, made = places(model), sources(model)
    specs: dict[Place, ParamSpec] = {}
    for name, p in model.named_parameters():
        where, infshape = found[id(p)], infshapes.get(name)
        if not isinstance(infshape, InfShape) or len(infshape) != p.ndim:
            raise BaseShapeError(f"{name} {tuple(p.shape)} has no shape of its own in infshapes: it says {infshape!r}")
        for place in where:
            try:
                specs[place] = _resolve(place, infshape, made)
            except BaseShapeError as fault:
                raise _explained(fault, place, infshape, where) from None
        _check_ties(specs, where)
    _check_magnitude(specs, made)
    return specs


def apply_infshapes(model: nn.Module, infshapes: Mapping[str, InfShape]) -> None:
    """Give every module the specs of its parameters and every parameter `p` its `p.infshape`.

    A role and layout that were declared win over inferred ones. Nothing is changed if something does not fit.

    Raises:
        BaseShapeError: for a parameter whose role cannot be known, a vocabulary that grows with width, and a readout
            whose values come from a checkpoint that was trained over another base.
    """
    names, own = _plain_names(infshapes, [name for name, _ in model.named_parameters()])
    infshapes = {name: infshapes[names[plain]] for plain, name in own.items() if plain in names}
    specs, found = _resolve_all(model, infshapes), places(model)
    for place, spec in specs.items():
        if isinstance(place.module, MuReadout) and place.local == "weight":
            place.module.check_loaded(spec, place.path)
    for place, spec in specs.items():
        vars(place.module).setdefault("mup_specs", {})[place.local] = spec
        vars(place.module).pop("mup_shared", None)
    for name, p in model.named_parameters():
        where = found[id(p)]
        main = main_place(where) or where[0]
        infshape = InfShape.from_spec(specs[main])
        infshape.name, p.infshape = name, infshape  # type: ignore[attr-defined]
        owner = next((place for place in where if not isinstance(place.module, MuReadout)), where[0])
        for place in where:
            if place is not owner:
                shared = vars(place.module).setdefault("mup_shared", {})
                shared[place.local] = "readout" if isinstance(owner.module, MuReadout) else "table"


def set_base_shapes(
    model: Model,
    base: Shapes | None,
    rescale_params: bool = True,
    delta: Shapes | None = None,
    savefile: str | Path | None = None,
    do_assert: bool = True,
) -> Model:
    """Declare shape at base width and role of every parameter of `model`, and return the model.

    Safe to call again, on the same or another base. On meta nothing is rescaled: call again once the model has values.

    Args:
        base: a model (may be on meta), {name: shape}, a .bsh file, or None for the standard parametrization.
        delta: another width of the base; the dimensions that differ are those that grow. Without it, those where base
            and model differ.
        rescale_params: turn torch's initialisation of layers into muP's; pass False for a trained model, and if you
            initialise it yourself afterwards.
        savefile: a .bsh file to write.
        do_assert: refuse layers from width to a finite dimension that miss muP's forward factor.

    Raises:
        BaseShapeError: for what the shapes leave open, or contradict.
    """
    shapes = _extract_shapes(model if base is None else base)
    if delta is not None:
        shapes = zip_infshapes(shapes, delta)
    infshapes = zip_infshapes(shapes, model)
    if savefile is not None:
        save_base_shapes(infshapes, savefile)
    apply_infshapes(model, infshapes)
    if do_assert:
        assert_hidden_size_inf(model)
    if rescale_params:
        _check_memory(model)
        for act in (_check_start, rescale_start):
            for path, module in model.named_modules():
                try:
                    act(module)
                except BaseShapeError as fault:
                    raise BaseShapeError(f"{path or 'the model'}: {fault}") from None
    return model


def _check_memory(model: nn.Module) -> None:
    """Raise BaseShapeError if a readout's values are those of another parameter too, by way of `.data`."""
    readouts = {id(module.weight) for module in model.modules() if isinstance(module, MuReadout)}
    memory: dict[int, str] = {}
    for name, p in sorted(model.named_parameters(), key=lambda pair: id(pair[1]) in readouts):
        if type(p) is not nn.Parameter or p.is_meta or not p.numel():
            continue
        other = memory.setdefault(p.data_ptr(), name)
        if other != name and id(p) in readouts:
            raise BaseShapeError(
                f"{name} and {other} are two parameters with one memory: share the parameter, readout.weight = "
                f"embedding.weight, or use {_share(other)}"
            )


def _check_start(module: nn.Module) -> None:
    if isinstance(module, MuReadout):
        module.check_start()


def assert_hidden_size_inf(model: nn.Module) -> None:
    """Raise BaseShapeError for a layer from width to a finite dimension that is not a MuReadout.

    Such a layer misses muP's forward factor, or is a projection inside the model, which only the user can know.
    """
    bad = [
        (Place(path, module, local), spec)
        for path, module in model.named_modules()
        for local, spec in vars(module).get("mup_specs", {}).items()
        if spec.inferred and spec.role is Role.OUTPUT and not isinstance(module, MuReadout)
    ]
    if not bad:
        return
    (place, spec), *others = bad
    tables = _tables(places(model).get(id(place.module._parameters.get(place.local)), []))
    few = f", as {len(others)} more: {', '.join(other.name for other, _ in others[:4])}{', ...' * (len(others) > 4)}"
    raise BaseShapeError(
        f"{place.name} {spec.shape} reads from a dimension that grows with width, writes to one that does not"
        f"{few if others else ''}: {adapter_advice(model, place.name) or _remedy(place, spec, tables)}"
    )


def _remedy(place: Place, spec: ParamSpec, tables: list[str]) -> str:
    """What to write, for each thing that such a layer may be."""
    owner = f'model.get_submodule("{place.path}")' if place.path else "model"
    if tables:
        bias = getattr(place.module, "bias", None) is not None
        kept = f'model.set_submodule("{place.path}", {_share(tables[0], bias)})' if place.path else _share(tables[0])
        return f"it is the embedding {tables[0]} too. Untie it and make it a MuReadout, or keep it, as {kept}"

    def call(role: str) -> str:
        layout = " ".join(spec.layout)
        return f'mup.declare({owner}, "{place.local}", mup.Role.{role}, {spec.base_shape}, "{layout}")'

    last, output = (
        "",
        " (as mup.Role.OUTPUT declare it only if the model itself multiplies the result by the table's 1/m)",
    )
    if isinstance(place.module, nn.Linear):
        last = "instead of nn.Linear as the last layer of the model, write mup.MuReadout; "
    elif isinstance(place.module, _ConvNd):
        last = (
            f"if it is the last layer of the model, multiply what it reads by 1/{spec.m_in:g} (base width / width) in "
            f"forward, and declare the weight before set_base_shapes, {call('OUTPUT')}; "
        )
        output = ""
    return (
        f"{last}inside the model (a router, keys and values of fixed size), declare the weight before set_base_shapes, "
        f"{call('HIDDEN')}; if it should grow, change the model or pass delta={output}"
    )
