"""The scores of torch's own attention, for a check that looks at what modules put out: scores are no module's output.

Shapes: L queries, S keys; E is the size of a head. Scores are what goes into the softmax, without an additive mask.
"""

from __future__ import annotations

import inspect
import itertools
import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode


def _unmasked(scores: Tensor, mask: Tensor | None) -> Tensor:
    """The entries (N,) of `scores` (..., L, S) that `mask` lets through: where it is True, or above its type's lowest number."""
    if mask is None:
        return scores.flatten()
    seen = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min
    scores, seen = torch.broadcast_tensors(scores, seen)
    return scores[seen]


def dot_product_scores(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """The scores (N,) that count in F.scaled_dot_product_attention with the same arguments, in float32 at least.

    query (..., H, L, E), key (..., H or fewer with enable_gqa, S, E).
    """
    if enable_gqa:
        key = key.repeat_interleave(query.size(-3) // key.size(-3), dim=-3)
    scale = query.size(-1) ** -0.5 if scale is None else scale
    query, key = (x.float() if x.dtype.itemsize < 4 else x for x in (query, key))
    query, key = query * scale, key * 1.0  # copies: the check takes products of a parameter itself for its effect
    with torch.autocast(query.device.type, enabled=False):
        scores = query @ key.mT
    if is_causal:
        attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    elif materialize := getattr(attn_mask, "_materialize", None):  # a CausalBias, whose import would be the compiler's
        attn_mask = materialize(scores.device)
    return _unmasked(scores, attn_mask)


def score_bound(query: Tensor, key: Tensor, *args: Any, scale: float | None = None, **kwargs: Any) -> Tensor:
    """The score of a query and a key that agree in every entry, each of the rms that they have here: what training may reach.

    With a scale of 1 / sqrt(head size) it grows with the size of a head, also where random queries hide it.
    """
    size = query.size(-1)
    rms = [x.detach().float().square().mean().sqrt() for x in (query, key)]
    return rms[0] * rms[1] * size * (size**-0.5 if scale is None else scale)


class _IntoSoftmax(TorchDispatchMode):
    """Keeps what goes into a softmax."""

    scores: Tensor

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._softmax.default:
            self.scores = args[0]
        return func(*args, **(kwargs or {}))


def multi_head_scores(*args: Any, **kwargs: Any) -> Tensor:
    """The scores (N,) of F.multi_head_attention_forward with the same arguments, which scales by itself: padding counts."""
    given = inspect.signature(F.multi_head_attention_forward).bind(*args, **kwargs).arguments
    mask = given.get("attn_mask")
    explicit = {
        "attn_mask": None,
        "key_padding_mask": None,
        "is_causal": False,
        "need_weights": True,
        "training": False,
    }
    copies = {name: x * 1.0 for name, x in given.items() if isinstance(x, Tensor) and x.is_floating_point()}  # as above
    with _IntoSoftmax() as softmax:
        F.multi_head_attention_forward(**given | copies | explicit)
    if mask is None:
        return softmax.scores.flatten()
    scores = softmax.scores[..., : mask.size(-1)]  # without the keys that bias_k and add_zero_attn append
    return _unmasked(scores, ~mask if mask.dtype == torch.bool else mask)


_SCORES: dict[Any, Callable[..., Tensor]] = {
    F.scaled_dot_product_attention: dot_product_scores,
    F.multi_head_attention_forward: multi_head_scores,
}


class AttentionScores(TorchFunctionMode):
    """Inside it, see(name, scores) is called for every attention that torch computes for `model`. Results do not change.

    Seen are F.scaled_dot_product_attention and nn.MultiheadAttention, not attention that is made otherwise, and no nested
    tensors. name: of the innermost module that runs, and ".scores"; with [1], [2] ... for further ones in one call of
    it. scores (N,): see dot_product_scores; without gradient. bounds: whether to see NAME.scores.bound too, a number, of
    F.scaled_dot_product_attention. hooks: on the modules; remove them to be rid of it.
    """

    def __init__(self, model: nn.Module, see: Callable[[str, Tensor], None], bounds: bool = False):
        super().__init__()
        self.see, self.bounds = see, bounds
        # What looks into torch's own products cannot be compiled. Only what compiles has imported the compiler, which takes
        # seconds and fixes where its cache is.
        compiles = "torch._dynamo" in sys.modules
        self.scores_of = {func: torch.compiler.disable(f) if compiles else f for func, f in _SCORES.items()}
        self.running: list[tuple[str, Iterator[int]]] = []  # modules, outermost first, and numbers for their attentions
        self.hooks = [
            hook
            for name, module in model.named_modules()
            for hook in (
                module.register_forward_pre_hook(partial(self._begin, name)),
                module.register_forward_hook(self._end, always_call=True),
            )
        ]

    def _begin(self, name: str, *args: Any) -> None:
        self.running.append((name, itertools.count()))

    def _end(self, *args: Any) -> None:
        self.running.pop()

    def __enter__(self) -> AttentionScores:
        self.running = [("", itertools.count())]  # for what runs outside of modules
        return super().__enter__()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func in _SCORES and not (isinstance(out, Tensor) and out.is_nested):
            with torch.no_grad():
                scores = self.scores_of[func](*args, **(kwargs or {}))
            name, numbers = self.running[-1]
            number = next(numbers)
            if scores.numel():
                seen = (f"{name}." if name else "") + "scores" + (f"[{number}]" if number else "")
                self.see(seen, scores)
                if self.bounds and func is F.scaled_dot_product_attention:
                    self.see(f"{seen}.bound", score_bound(*args, **(kwargs or {})))
        return out
