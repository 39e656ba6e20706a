"""Factors of the forward pass that are not a readout's: of what a module puts out, and of attention whose heads widen.

A factor is a hook on the module, which copies, torch.compile and wrappers for many processes keep, and which no state
dict holds: it is a matter of the base, and comes back with it. `fold` bakes it into weights.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from speedrun_mup.core.mup.compat.infshape import BaseShapeError
from speedrun_mup.core.mup.rules import Role

_HEAD_SIZES = ("head_dim", "head_size", "attention_head_size", "d_head", "d_k")
_HEADS = ("num_attention_heads", "num_heads", "n_heads", "n_head", "heads")
_WIDTHS = ("embed_dim", "hidden_size", "n_embd", "d_model", "dim")
_SCALES = (
    "scaling",
    "scale",
    "softmax_scale",
    "attn_scale",
    "sm_scale",
    "scale_factor",
    "inv_norm_factor",
    "norm_factor",
)
_NORMS = ("q_norm", "q_layernorm", "query_norm", "norm_q")
_QUERIES = ("q_proj", "wq", "to_q", "query", "q_lin", "q")
_FUSED = ("c_attn", "qkv", "qkv_proj", "Wqkv", "wqkv", "to_qkv")
_INTERLEAVED = ("query_key_value",)


@dataclass(frozen=True)
class Factor:
    """A hook that multiplies what a module puts out, or reads. first: only so many entries of it; None: all.

    heads: entries come in so many groups, and `first` counts in each.
    """

    factor: float
    first: int | None = None
    heads: int = 1
    reads: bool = False

    def of(self, size: int) -> Tensor:
        """One number for each of `size` entries."""
        factors = torch.full((self.heads, size // self.heads), self.factor)
        if self.first is not None:
            factors[:, self.first :] = 1.0
        return factors.flatten()

    def __call__(self, module: nn.Module, inputs: Any, output: Any = None) -> Any:
        """As a hook before forward (without output) or after it."""
        x = inputs[0] if self.reads else output
        scaled = x * (self.factor if self.first is None else self.of(x.size(-1)).to(x))
        return (scaled, *inputs[1:]) if self.reads else scaled


def set_factor(module: nn.Module, factor: Factor) -> None:
    """Put the factor on the module, in place of one that is there. A factor of 1 is none."""
    drop_factors(module)
    if math.isclose(factor.factor, 1.0):
        return
    handle = module.register_forward_pre_hook(factor) if factor.reads else module.register_forward_hook(factor)
    vars(module)["mup_factor"] = factor, handle.id


def drop_factors(module: nn.Module) -> Factor | None:
    """Take the factor off the module, and return it."""
    factor, key = vars(module).pop("mup_factor", (None, None))
    for hooks in (module._forward_pre_hooks, module._forward_hooks):
        hooks.pop(key, None)
    return factor


def _number(module: nn.Module, names: Iterable[str]) -> int | None:
    """The first of these attributes of a module's own that is a whole number."""
    own = vars(module)
    return next((own[name] for name in names if isinstance(own.get(name), int)), None)


def head_size(module: nn.Module) -> int | None:
    """The size of a head of an attention module; None for what is none."""
    if (size := _number(module, _HEAD_SIZES)) is not None:
        return size
    heads, width = _number(module, _HEADS), _number(module, _WIDTHS)
    return width // heads if heads and width else None


def scale_attention(model: nn.Module, base: nn.Module) -> None:
    """Have scores grow as 1 / head_dim where heads are wider than in `base`, as at base size where they are not.

    Raises:
        BaseShapeError: where the module has neither a scale of its own nor queries that can be told apart.
    """
    at_base = dict(base.named_modules())
    for path, module in model.named_modules():
        if path not in at_base or not _attends(module):
            continue
        size, base_size = head_size(module), head_size(at_base[path])
        if size and base_size and size != base_size:
            _scale(path, module, at_base[path], size / base_size)


def _attends(module: nn.Module) -> bool:
    """Whether it is an attention module itself: it has heads, and owns a matrix from width to width."""
    specs = [vars(child).get("mup_specs", {}).get("weight") for child in module.children()]
    owns = any(spec is not None and spec.role is Role.HIDDEN for spec in specs)
    return isinstance(module, nn.MultiheadAttention) or (head_size(module) is not None and owns)


def _scale(path: str, module: nn.Module, base: nn.Module, growth: float) -> None:
    """Make the scale of one attention module what it is at base, over `growth`."""
    own = vars(module)
    name = next((name for name in _SCALES if isinstance(own.get(name), float)), None)
    if name is not None:
        original, at_base = own.get("mup_scale", (name, own[name]))[1], getattr(base, name)
        power = 1 if math.log(original / at_base) / math.log(growth) > 0.25 else -1  # sqrt(head_dim) divides scores
        own[name] = at_base * growth**power
        own["mup_scale"] = name, original, (own[name] / original) ** -power
        return
    if not isinstance(module, nn.MultiheadAttention):
        for known in (*_NORMS, *_QUERIES, *_FUSED):
            child = module._modules.get(known)
            if child is not None:
                set_factor(child, Factor(growth**-0.5, _query_entries(module) if known in _FUSED else None))
                return
    raise BaseShapeError(
        f"{path} ({type(module).__name__}): its heads are {growth:g} times as wide as at base size, and nothing shows where "
        "their scale could be: keep the size of a head (more heads instead), or give the module an attribute `scale`, "
        "head_dim**-0.5, that its forward uses; it is then set"
    )


def bake_factors(model: nn.Module) -> None:
    """Multiply weights by the factors that scale_attention and set_factor gave, and take those away.

    Raises:
        BaseShapeError: where no weight can hold a factor.
    """
    for path, module in model.named_modules():
        name, original, ratio = vars(module).pop("mup_scale", (None, None, 1.0))
        if name is not None:
            vars(module)[name] = original
            if math.isclose(ratio, 1.0):  # the model's own code had scaled it
                continue
            child, factor = _queries(path, module, ratio)
            _bake(f"{path}.{child}", module._modules[child], factor)
    for path, module in model.named_modules():
        if (hooked := drop_factors(module)) is not None:
            _bake(path, module, hooked)


def _queries(path: str, module: nn.Module, ratio: float) -> tuple[str, Factor]:
    """The module that puts out the queries, or their norm, and the factor that makes scores `ratio` times as large."""
    for known in (*_NORMS, *_QUERIES, *_FUSED, *_INTERLEAVED):
        child = module._modules.get(known)
        if child is None:
            continue
        if known in _INTERLEAVED:  # queries, keys and values of a head side by side, as GPT-NeoX has them
            size = head_size(module) or 0
            return known, Factor(ratio, size, child.weight.size(0) // (3 * size))  # type: ignore[operator]
        return known, Factor(ratio, _query_entries(module) if known in _FUSED else None)
    raise BaseShapeError(
        f"{path} ({type(module).__name__}): nothing shows which weights make queries, to hold their scale"
    )


@torch.no_grad()
def _bake(path: str, module: nn.Module, factor: Factor) -> None:
    weight, bias = module._parameters.get("weight"), module._parameters.get("bias")
    gain = weight is not None and weight.ndim == 1
    if weight is None or (gain and not _is_proportional(module, weight)):
        raise BaseShapeError(
            f"{path} ({type(module).__name__}): its factor {factor.factor:.4g} fits into no weight of it"
        )
    if factor.reads or gain or isinstance(module, nn.Embedding):
        times = torch.tensor(factor.factor)
    else:
        times = factor.of(weight.size(1 if stores_in_out(module) else 0))
        if bias is not None:
            module.bias = nn.Parameter(bias * times.to(bias))
        times = times if stores_in_out(module) else times.view(-1, *[1] * (weight.ndim - 1))
    module.weight = nn.Parameter(weight * times.to(weight))


def stores_in_out(module: nn.Module) -> bool:
    """Whether it is Hugging Face's Conv1D, a linear layer whose weight is (in, out)."""
    return type(module).__name__ == "Conv1D" and not isinstance(module, nn.Conv1d)


def _is_proportional(module: nn.Module, gain: nn.Parameter) -> bool:
    """Whether what a norm puts out grows with its gain: Gemma's does not, which multiplies by 1 + gain."""
    x = torch.ones(1, len(gain), dtype=gain.dtype, device=gain.device).cumsum(-1)
    bias, before = module._parameters.get("bias"), module(x)
    gain.mul_(2)
    after = module(x)
    gain.div_(2)
    return bias is None and torch.allclose(after, 2 * before)


def _query_entries(module: nn.Module) -> int:
    """How many of the entries of a fused projection are queries, which come first."""
    return (_number(module, _HEADS) or 0) * (head_size(module) or 0)


def scale_embedding(model: nn.Module, base: nn.Module) -> None:
    """Undo a factor sqrt(width) that a model gives its embedding by itself (Gemma; scale_embedding of others)."""
    config = getattr(model, "config", None)
    named = str(getattr(config, "model_type", ""))
    if not (named.startswith("gemma") or getattr(config, "scale_embedding", False)):
        return
    table, at_base = (m.get_input_embeddings() for m in (model, base))  # type: ignore[operator]
    set_factor(table, Factor((at_base.weight.shape[1] / table.weight.shape[1]) ** 0.5))
