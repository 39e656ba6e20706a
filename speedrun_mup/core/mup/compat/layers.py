"""What torch's own layers are known to do: which sides their tensors have, how they start, what makes a tensor of others.

Two words for every tensor: its layout (see ParamSpec), and its start, the std that torch initialises it with.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.utils import parametrizations, parametrize
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from speedrun_mup.core.mup.spec import ParamSpec

_GAINS = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, nn.PReLU, _NormBase)  # every entry multiplies one activation
_PROJECTIONS = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")


def _is_matrix(module: nn.Module, tensor: str) -> bool:
    """Whether torch's class applies the tensor as a matrix (out, in), with a convolution's kernel behind."""
    if isinstance(module, nn.RNNBase | nn.RNNCellBase):
        return tensor.startswith("weight_")
    if isinstance(module, nn.MultiheadAttention):
        return tensor in _PROJECTIONS
    return isinstance(module, nn.Linear | _ConvNd) and tensor == "weight"


def layout_of(module: nn.Module, tensor: str, ndim: int) -> list[str] | None:
    """One word for each of the `ndim` dimensions of a tensor of `module`; None where torch's classes do not show it."""
    if isinstance(module, _GAINS) and tensor in ("weight", "bias"):
        return ["out"] * ndim
    if isinstance(module, nn.Embedding | nn.EmbeddingBag) and tensor == "weight" and ndim == 2:
        return ["-", "out"]
    if isinstance(module, nn.MultiheadAttention) and tensor in ("bias_k", "bias_v") and ndim == 3:
        return ["-", "-", "out"]
    if isinstance(module, nn.Bilinear) and tensor == "weight" and ndim == 3:
        return ["out", "in", "in"]
    if _is_matrix(module, tensor) and ndim >= 2:
        return (["in", "out"] if isinstance(module, _ConvTransposeNd) else ["out", "in"]) + ["-"] * (ndim - 2)
    return None


def _ratio(spec: ParamSpec, dim: int) -> float:
    return spec.shape[dim] / spec.base_shape[dim]


def tensor_spec(module: nn.Module, tensor: str) -> ParamSpec | None:
    """The spec of the matrix that makes `tensor` of `module`: its own, or that of what it is computed from."""
    own: dict[str, ParamSpec] = vars(module).get("mup_specs", {})
    found = own.get(tensor) or own.get(f"{tensor}_v") or own.get(f"{tensor}_orig")
    if found is None and parametrize.is_parametrized(module, tensor):
        made = vars(module.parametrizations[tensor]).get("mup_specs", {})  # type: ignore[index]
        found = made.get("original") or made.get("original1")
    return found


def torch_start(module: nn.Module, tensor: str, spec: ParamSpec) -> float | None:
    """The std that torch gives `tensor` here over the one it gives at base width; None if it is constant or unknown."""
    if isinstance(module, nn.RNNBase | nn.RNNCellBase):  # everything by the hidden size
        first = tensor_spec(module, "weight_ih_l0" if isinstance(module, nn.RNNBase) else "weight_ih")
        return None if first is None else _ratio(first, 0) ** -0.5
    if isinstance(module, nn.Linear | _ConvNd | nn.Bilinear):  # everything by the weight's second dimension
        weight = tensor_spec(module, "weight")
        return None if weight is None else _ratio(weight, 1) ** -0.5
    if isinstance(module, nn.MultiheadAttention) and tensor in _PROJECTIONS:  # Xavier's
        return math.sqrt(sum(spec.base_shape) / sum(spec.shape))
    if isinstance(module, nn.MultiheadAttention) and tensor in ("bias_k", "bias_v"):
        return _ratio(spec, 2) ** -0.5
    return None


@dataclass(frozen=True)
class LayerSource:
    """What a parameter is part of: a `tensor` of a `layer`, and how it is made of it.

    how: "" if it is the tensor; "kept" if what makes the tensor leaves its shape and scale; "magnitude" and "direction"
    of weight_norm; "normalised" if the tensor's size does not depend on the parameter's.
    """

    layer: nn.Module
    tensor: str
    how: str = ""


def _made_by(parametrizations_of_it: nn.Module, local: str) -> str:
    kinds = list(parametrizations_of_it.children())
    if any(isinstance(kind, parametrizations._WeightNorm) for kind in kinds):
        return "magnitude" if local == "original0" else "direction"
    if any(isinstance(kind, parametrizations._SpectralNorm | parametrizations._Orthogonal) for kind in kinds):
        return "normalised"
    return "kept" if local == "original" else ""


def _by_hooks(module: nn.Module) -> Iterator[tuple[str, LayerSource]]:
    """(local name, LayerSource) of what torch's older functions, weight_norm, spectral_norm and prune, made of parameters."""
    for hook in module._forward_pre_hooks.values():
        if isinstance(hook, WeightNorm):
            yield f"{hook.name}_g", LayerSource(module, hook.name, "magnitude")
            yield f"{hook.name}_v", LayerSource(module, hook.name, "direction")
        elif isinstance(hook, SpectralNorm):
            yield f"{hook.name}_orig", LayerSource(module, hook.name, "normalised")
        elif hasattr(hook, "_tensor_name"):  # prune's, whose import takes its time
            yield f"{hook._tensor_name}_orig", LayerSource(module, hook._tensor_name, "kept")


def sources(model: nn.Module) -> dict[tuple[int, str], LayerSource]:
    """{(id of a module, local name): LayerSource} of the parameters of `model` that are not themselves what a layer uses."""
    found: dict[tuple[int, str], LayerSource] = {}
    for module in model.modules():
        found |= {(id(module), local): source for local, source in _by_hooks(module)}
        if parametrize.is_parametrized(module):
            for tensor, made_of in module.parametrizations.items():  # type: ignore[union-attr, operator]
                for local in made_of._parameters:
                    how = _made_by(made_of, local)
                    source = LayerSource(module, tensor, how) if how else LayerSource(made_of, local)
                    found[id(made_of), local] = source
    return found
