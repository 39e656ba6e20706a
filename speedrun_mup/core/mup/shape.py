"""Base shapes: from a base and a delta model to a ParamSpec for every parameter, and to and from .bsh files.

Same names and file format as microsoft/mup's module. What set_base_shapes finds out is kept on the modules (spec.py);
`p.infshape` on the tensors is a convenience that copies of a model may lose.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import yaml
from torch import nn
from torch.nn.modules.conv import _ConvNd

from speedrun_mup.core.mup.infshape import BaseShapeError, InfDim, InfShape, infer_spec, zip_infshape
from speedrun_mup.core.mup.layer import MuReadout, rescale_linear_bias, weight_spec
from speedrun_mup.core.mup.rules import Role
from speedrun_mup.core.mup.spec import ParamSpec, named_specs

Dims = Sequence[int | InfDim]
Shapes = nn.Module | Mapping[str, Dims] | str | Path  # a model, {parameter name: sizes} or a .bsh file
Model = TypeVar("Model", bound=nn.Module)

_HEADER = """\
# Base shapes of a model for muP, in YAML: one list per parameter.
# null is a finite dimension; a number is the base size of a dimension that grows with width.
"""
_FINITE = "# finite sizes: "  # a comment, which other readers of the format skip


def get_shapes(model: nn.Module) -> dict[str, Dims]:
    """Sizes of every parameter by name; `model.get_shapes()` instead, if the model defines that."""
    if hasattr(model, "get_shapes"):
        return model.get_shapes()  # type: ignore[operator]
    return {name: tuple(p.shape) for name, p in model.named_parameters()}


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
    base = yaml.safe_dump({name: s.base_shape() for name, s in shapes.items()}, indent=4)
    Path(file).write_text(f"{_HEADER}{_FINITE}{json.dumps(finite)}\n{base}")


def load_base_shapes(filename: str | Path) -> dict[str, InfShape]:
    """{name: InfShape} from a .bsh file, also one by microsoft/mup. Finite sizes are None if the file has none."""
    text = Path(filename).read_text()
    shapes = {name: InfShape.from_base_shape(base) for name, base in yaml.safe_load(text).items()}
    for line in text.splitlines():
        if line.startswith(_FINITE):
            for name, sizes in json.loads(line.removeprefix(_FINITE)).items():
                shapes[name] = InfShape(InfDim(d.base_dim, size) for d, size in zip(shapes[name], sizes, strict=True))
    return shapes


def _extract_shapes(source: Shapes) -> Mapping[str, Dims]:
    if isinstance(source, nn.Module):
        return get_shapes(source)
    return load_base_shapes(source) if isinstance(source, str | Path) else source


def _unwrapped(shapes: Mapping[str, Dims]) -> dict[str, Dims]:
    """The same under the names that DistributedDataParallel and torch.compile put their prefix to."""
    names = list(shapes)
    for prefix in ("module.", "_orig_mod.", "module."):
        if all(name.startswith(prefix) for name in names):
            names = [name.removeprefix(prefix) for name in names]
    return dict(zip(names, shapes.values()))


def zip_infshapes(base: Shapes, target: Shapes) -> dict[str, InfShape]:
    """{name in target: InfShape} of `target` over `base`. Raises BaseShapeError naming what does not fit."""
    base_shapes, target_shapes = _unwrapped(_extract_shapes(base)), _extract_shapes(target)
    plain = _unwrapped(target_shapes)
    if base_shapes.keys() != plain.keys():
        only_base, only_target = sorted(base_shapes.keys() - plain), sorted(plain.keys() - base_shapes)
        raise BaseShapeError(f"parameters differ: only in the base {only_base}, only in the target {only_target}")
    infshapes = {}
    for name, key in zip(target_shapes, plain):
        sizes = [dim.dim if isinstance(dim, InfDim) else dim for dim in plain[key]]
        try:
            infshapes[name] = zip_infshape(base_shapes[key], sizes)  # type: ignore[arg-type]
        except BaseShapeError as fault:
            raise BaseShapeError(f"{name}: {fault}") from None
    return infshapes


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


def _resolve(module: nn.Module, local: str, infshape: InfShape) -> ParamSpec:
    """What `module`'s parameter `local` is: role and layout as declared, else inferred."""
    declared: ParamSpec | None = vars(module).get("mup_specs", {}).get(local)
    spec = infer_spec(infshape, module) if declared is None or declared.inferred else declared
    base = tuple(d.base_dim or d.dim for d in infshape)
    return replace(spec, base_shape=base, shape=tuple(infshape.shape()))  # type: ignore[arg-type]


def apply_infshapes(model: nn.Module, infshapes: Mapping[str, InfShape]) -> None:
    """Give every module the specs of its parameters and every parameter `p` its `p.infshape`.

    A role and layout that were declared win over inferred ones. Raises BaseShapeError if a vocabulary grows with width.
    """
    by_id = {id(p): infshapes[name] for name, p in model.named_parameters()}
    attached = set()
    for path, module in model.named_modules():
        for local, p in module.named_parameters(recurse=False):
            spec = _resolve(module, local, by_id[id(p)])
            if (
                isinstance(module, MuReadout | nn.Embedding)
                and local == "weight"
                and spec.inferred
                and by_id[id(p)][0].isinf()
            ):
                raise BaseShapeError(
                    f"{path}.weight {spec.shape}: its first dimension differs from the base {spec.base_shape}; "
                    "a vocabulary must not grow with width"
                )
            vars(module).setdefault("mup_specs", {})[local] = spec
            if id(p) not in attached:
                p.infshape = InfShape.from_spec(spec)
            attached.add(id(p))


def set_base_shapes(
    model: Model,
    base: Shapes | None,
    rescale_params: bool = True,
    delta: Shapes | None = None,
    savefile: str | Path | None = None,
    do_assert: bool = True,
) -> Model:
    """Tell every parameter of `model` its shape at base width and its role, and return the model.

    base: a model (may be on meta), {name: shape}, a .bsh file, or None for the standard parametrization. delta: another
    width of the base; the dimensions that differ are those that grow. Without it, those where base and model differ.
    rescale_params: turn torch's initialisation of readouts and biases into muP's; pass False for a trained model. Safe
    to call again, on the same or another base. On meta nothing is rescaled: call again once the model has values.
    do_assert: refuse what the shapes leave open. Raises BaseShapeError.
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
        if not any(isinstance(shape, InfShape) for shape in shapes.values()):
            _assert_no_guess(model)
    if rescale_params:
        for module in model.modules():
            if isinstance(module, MuReadout):
                module._rescale_parameters()
            elif isinstance(module, nn.Linear | _ConvNd):
                rescale_linear_bias(module)
    return model


def assert_hidden_size_inf(model: nn.Module) -> None:
    """Raise BaseShapeError for a linear or convolution layer from width to a finite dimension that is not a MuReadout.

    Such a layer misses muP's forward factor. If the model applies it by itself, declare the weight as OUTPUT.
    """
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | _ConvNd) and not isinstance(module, MuReadout):
            spec = weight_spec(module)
            if spec.inferred and spec.role is Role.OUTPUT:
                raise BaseShapeError(
                    f"{name}.weight {spec.shape} reads from a dimension that grows with width, writes to one that does "
                    "not: make the layer a MuReadout, let its output grow too, or declare the weight as Role.OUTPUT"
                )


def _assert_no_guess(model: nn.Module) -> None:
    """Raise BaseShapeError where, without a delta, comparing two widths cannot tell an input from an output tensor."""
    for name, p, spec in named_specs(model):
        owner = model.get_submodule(name.rpartition(".")[0])
        known = isinstance(owner, nn.Linear | _ConvNd | nn.Embedding) or type(owner).__module__.startswith("torch.")
        if spec.inferred and not known and p.ndim >= 2 and spec.role is Role.INPUT:
            raise BaseShapeError(
                f"{name} {spec.shape} differs from the base {spec.base_shape} in one dimension, by intent or by "
                "coincidence; pass delta= to set_base_shapes, or declare the parameter"
            )
