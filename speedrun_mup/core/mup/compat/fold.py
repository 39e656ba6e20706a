"""Out of muP: a plain model that computes the same."""

from __future__ import annotations

import copy
from typing import Any, TypeVar

import torch
from torch import nn

from speedrun_mup.core.errors import in_a_line
from speedrun_mup.core.mup.anymodel.forward import bake_factors
from speedrun_mup.core.mup.anymodel.sizes import STORED
from speedrun_mup.core.mup.compat.infshape import BaseShapeError
from speedrun_mup.core.mup.compat.layer import MuReadout
from speedrun_mup.core.mup.spec import places

Model = TypeVar("Model", bound=nn.Module)


@torch.no_grad()
def fold(model: Model) -> Model:
    """A copy of `model` that computes the same without muP: its readouts are nn.Linear, their multiplier in the weight.

    So are the factors that adapt gave embeddings and the queries of heads that widen.
    So its state dict loads into plain classes, and merging an adapter is exact. A readout that shares an embedding gets
    a weight of its own: where a Hugging Face config says tie_word_embeddings, the copy's says no. The copy has no base
    shapes; to continue training in muP, keep `model`.

    Raises:
        UndeclaredParameterError: if set_base_shapes was not called.
        BaseShapeError: for a readout of a class of yours with a forward of its own.
    """
    try:
        plain = copy.deepcopy(model)
    except (RuntimeError, TypeError, AssertionError) as fault:  # sharded, for one
        raise BaseShapeError(
            f"cannot copy the model ({in_a_line(fault)}): load its full state dict into one that is not sharded, fold that"
        ) from None
    owners, untied = places(plain), False
    for path, module in plain.named_modules():
        if isinstance(module, MuReadout):
            if type(module).forward is not MuReadout.forward:
                raise BaseShapeError(f"{path or 'the model'}: {type(module).__name__} has a forward of its own to fold")
            tied = len(owners[id(module.weight)]) > 1
            untied |= tied
            folded = nn.Parameter(module.weight * module.multiplier, requires_grad=module.weight.requires_grad)
            module.weight = folded
            module.__class__ = nn.Linear  # type: ignore[assignment]
    bake_factors(plain)
    for module in plain.modules():
        for name in ("mup_specs", "mup_shared", "mup_rescaled", "mup_loaded", "mup_own_start"):
            vars(module).pop(name, None)
    for parameter in plain.parameters():
        vars(parameter).pop("infshape", None)
    config: Any = getattr(plain, "config", None)
    if untied and getattr(config, "tie_word_embeddings", False):
        config.tie_word_embeddings = False
    if hasattr(config, STORED):
        delattr(config, STORED)
    return plain
