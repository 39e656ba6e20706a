"""mup.adapt: muP for any model, without touching its code."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from torch import nn

from speedrun_mup.core.mup.anymodel.depth import set_depth_roles
from speedrun_mup.core.mup.anymodel.forward import Factor, scale_attention, scale_embedding, set_factor
from speedrun_mup.core.mup.anymodel.guard import watch
from speedrun_mup.core.mup.anymodel.roles import Roles, declare_roles
from speedrun_mup.core.mup.anymodel.sizes import STORED, Base, Build, Sizes, sizes_of
from speedrun_mup.core.mup.anymodel.start import turn_start
from speedrun_mup.core.mup.compat.infshape import BaseShapeError, InfShape
from speedrun_mup.core.mup.compat.layer import rescale_init
from speedrun_mup.core.mup.compat.shape import make_base_shapes, set_base_shapes, zip_infshapes
from speedrun_mup.core.mup.rules import PARAMETRIZATIONS, Parametrization
from speedrun_mup.core.mup.spec import named_specs

Model = TypeVar("Model", bound=nn.Module)

INITS = ("turn", "one-std", "torch", "keep")


def adapt(
    model: Model,
    base: Base = None,
    *,
    build: Build | None = None,
    delta: Any = None,
    roles: Roles | None = None,
    init: str | None = None,
    parametrization: Parametrization = PARAMETRIZATIONS["mup"],
) -> Model:
    """Give a model muP: roles, start, forward factors. Its code stays as it is; at base size it computes what it did.

    Roles follow from the model at two sizes, both built on the meta device. Its readout becomes a MuReadout (the same
    nn.Linear with a multiplier), attention whose heads widen is scaled by 1 / head_dim, and what it starts with is
    turned into muP's start. Call it on a fresh model, before wrappers; safe to repeat. Then take mup.optimizer(model, lr=...).

    Args:
        base: the size that rates were tuned at: fields of model.config (`{"hidden_size": 256}`: Hugging Face's, or a
            dataclass), arguments of `build`, one number for it, a model, or stored shapes (a .bsh file). None: what the
            config of a saved model remembers.
        build: a function that makes the model, `build(256)` or `build(**base)`.
        delta: another size, said as base is, to see what grows; by default twice the base.
        roles: of parameters that nothing shows, by name or pattern: `{"*.gate.weight": "hidden"}`. With layers in the base
            also "writes" (into the residual stream), "branch" or "outside".
        init: how the model was initialised: "turn" finds out from its values, compared with those at base size;
            "one-std" (one for all widths), "torch" (the start of torch's layers), "keep" (trained, or muP's already). By
            default "turn", and "keep" where the base is what the config of a saved model remembers.
        parametrization: the rule table of the start, whose depth rule is CompleteP by default. Hand the same one to the
            optimizer.

    Raises:
        BaseShapeError: in one line, with what to declare, for what nothing shows.
    """
    init = init or ("keep" if base is None else "turn")
    if init not in INITS:
        raise BaseShapeError(f"init={init!r} is unknown; choose {', '.join(INITS)}")
    sizes = sizes_of(model, base, build, delta)
    infshapes = _grown(model, sizes)
    convolutions = declare_roles(model, infshapes, roles or {})
    set_base_shapes(model, sizes.base, rescale_params=init == "torch", delta=sizes.delta)
    if sizes.layers is not None:
        if init == "torch":
            raise BaseShapeError(
                "init='torch' goes with a base of the same layers only: leave init= out, it is found out"
            )
        set_depth_roles(model, sizes.layers, sizes.m_depth, roles or {})
    for place in convolutions:
        set_factor(place.module, Factor(PARAMETRIZATIONS["mup"].forward(place.spec), reads=True))  # type: ignore[arg-type]
    if sizes.model is not None:
        scale_attention(model, sizes.model)
        scale_embedding(model, sizes.model)
    _start(model, sizes, init, parametrization)
    if sizes.fields is not None:
        setattr(model.config, STORED, dict(sizes.fields))
    watch(model)
    return model


def _grown(model: nn.Module, sizes: Sizes) -> Mapping[str, InfShape]:
    """The InfShape of every parameter."""
    base = sizes.base if sizes.delta is None else make_base_shapes(sizes.base, sizes.delta)
    infshapes = zip_infshapes(base, model)
    if not any(shape.ninf() for shape in infshapes.values()):
        raise BaseShapeError(
            "nothing grows between the base and this model: if it has base size, pass delta=, a model of another width "
            "(or give base as fields of its config, or with build=)"
        )
    return infshapes


def _start(model: nn.Module, sizes: Sizes, init: str, table: Parametrization) -> None:
    if init == "one-std":
        rescale_init(model)
    if init != "turn" or all(spec.m_in == spec.m_out == spec.m_depth == 1 for _, _, spec in named_specs(model)):
        return
    if sizes.build is not None:
        at_base = sizes.build()
    elif sizes.model is not None and not any(p.is_meta for p in sizes.model.parameters()):
        at_base = sizes.model
    else:
        raise BaseShapeError(
            "how the model was initialised cannot be seen without the base model's values: pass init='one-std' (one std for "
            "all widths, as GPT-2's), 'torch' (the start of torch's layers) or 'keep' (trained, or muP's already)"
        )
    turn_start(model, at_base, table)
