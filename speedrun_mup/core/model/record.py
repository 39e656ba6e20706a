"""The record's checkpoints: names of compiled modules, and one flat vector where this model has named parameters.

The first edition's checkpoints have that vector too. L layers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from torch import Tensor

SCALARS = "scalars"  # 5 L numbers, the record's padded to a multiple of its 8 ranks
RANKS_PADDING = 64


def ranges_of_scalars(n_layer: int) -> dict[str, tuple[int, tuple[int, ...]]]:
    """Where each parameter begins in the flat vector, and its shape. What lies between was never used: 1 at all times."""
    L = n_layer
    return {
        "blocks.skip_weights": (0, (L // 2,)),
        "blocks.x0_lambdas": (L, (L, 2)),
        "value_embeds.lambdas": (3 * L, (L, 2)),
    }


def unpack_scalars(flat: Tensor, n_layer: int) -> dict[str, Tensor]:
    """The named parameters in the flat vector (5 L or more,). ValueError if it is of another number of layers."""
    if flat.ndim != 1 or not 5 * n_layer <= len(flat) < 5 * n_layer + RANKS_PADDING:
        raise ValueError(f"{SCALARS} has shape {tuple(flat.shape)}, not ({5 * n_layer},)")
    return {
        name: flat[begin : begin + math.prod(shape)].view(shape)
        for name, (begin, shape) in ranges_of_scalars(n_layer).items()
    }


def pack_scalars(named: Mapping[str, Tensor], unused: float | Tensor = 1.0) -> Tensor:
    """The flat vector (5 L,) of `named`, which may hold more than the scalars: the inverse of `unpack_scalars`.

    unused: what the entries have that no layer uses; a tensor (5 L or more,) for one value each, and a vector of its size.
    """
    lambdas = named["blocks.x0_lambdas"]
    flat = lambdas.new_ones(len(unused) if isinstance(unused, Tensor) else 5 * len(lambdas)) * unused
    for name, (begin, shape) in ranges_of_scalars(len(lambdas)).items():
        flat[begin : begin + math.prod(shape)] = named[name].flatten()
    return flat


def to_record(state_dict: Mapping[str, Tensor], unused: float | Tensor = 1.0) -> dict[str, Tensor]:
    """`state_dict` with the record's one flat vector instead of the named scalars; as it is, if it has none."""
    named = ranges_of_scalars(0).keys()
    if not named <= state_dict.keys():
        return dict(state_dict)
    packed = {SCALARS: pack_scalars(state_dict, unused)}
    return packed | {name: tensor for name, tensor in state_dict.items() if name not in named}


def strip_compiled(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict without the "_orig_mod." that torch.compile puts before every name."""
    return {name.removeprefix("_orig_mod."): tensor for name, tensor in state_dict.items()}
