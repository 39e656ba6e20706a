"""Attention over packed documents: one mask rule, three backends that must agree, and the layer that uses them.

T tokens, D width, H heads, C head_dim, B tokens per block, N = T / B blocks, W window in blocks. No batch dimension:
documents are packed one after another into a single sequence, as in the speedrun.

- dense: the mask written out as (T, T). The reference; O(T^2) memory.
- blocked: each block of queries sees the W blocks of keys that end with its own. O(T * W * B) memory, any device.
- flex: FlexAttention with block lists, for CUDA (KoszarskyB, record 12). The window truncates the lists by a tensor, so it
  never recompiles.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from speedrun_mup.core import mup
from speedrun_mup.core.model.layers import INTO_THE_LAYER, Linear, rms_norm, rotate
from speedrun_mup.core.model.shape import ModelShape
from speedrun_mup.core.model.values import ValueRows
from speedrun_mup.core.mup import DepthRole, Role

ATTENTION_SCALE = 0.12  # record 26's constant; with QK norm the largest score is 0.12 * head_dim
Window = int | Tensor  # in blocks; a 0-d int32 tensor where a compiled graph must not depend on its value


def may_attend(q: Tensor, k: Tensor, doc_q: Tensor, doc_k: Tensor, window: Window, block_size: int) -> Tensor:
    """THE mask rule: causal, within the document, within the window. All arguments broadcast; returns bool.

    q, k: token positions. doc_q, doc_k: their document numbers. The window counts blocks, not tokens: a query at
    offset r in its block sees r + 1 + block_size * (window - 1) keys. A window below 1 means 1.
    """
    reach = window.clamp(min=1) if isinstance(window, Tensor) else max(window, 1)
    return (k <= q) & (doc_k == doc_q) & (q // block_size - k // block_size < reach)


def document_numbers(tokens: Tensor, bos_token: int) -> Tensor:
    """(T,) token ids -> (T,) int32 document of each; a BOS belongs to the document that it opens."""
    return (tokens == bos_token).cumsum(0, dtype=torch.int32)


class Backend(Protocol):
    """How to attend. `mask` is whatever this backend's `build_mask` made, once per window and forward pass."""

    def build_mask(self, doc: Tensor, window: Window, block_size: int, widest: int | None = None) -> Any:
        """(T,) document numbers -> this backend's own form of the mask. widest: what a window that is a tensor may come to."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Any, scale: float) -> Tensor:
        """q, k, v (T, H, C) -> (T, H, C)."""


class Dense:
    """The reference, a textbook implementation: softmax over the full (T, T) matrix of scores."""

    def build_mask(self, doc: Tensor, window: Window, block_size: int, widest: int | None = None) -> Tensor:
        """(T,) -> (T, T) bool."""
        t = torch.arange(len(doc), device=doc.device)
        return may_attend(t[:, None], t[None, :], doc[:, None], doc[None, :], window, block_size)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float) -> Tensor:
        """q, k, v (T, H, C) -> (T, H, C)."""
        scores = torch.einsum("qhc,khc->hqk", q, k).float() * scale
        weights = scores.masked_fill(~mask, float("-inf")).softmax(dim=-1)
        return torch.einsum("hqk,khc->qhc", weights.type_as(v), v)


class Blocked:
    """Each block of queries against the W blocks of keys that end with its own, through scaled_dot_product_attention."""

    def build_mask(self, doc: Tensor, window: Window, block_size: int, widest: int | None = None) -> Tensor:
        """(T,) -> (N, 1, B, W * B) float: 0 where attention is allowed, -inf elsewhere. W is at most N.

        For a tensor W is `widest`, or N: shapes may not depend on what it holds.
        """
        n = len(doc) // block_size
        if isinstance(window, Tensor):
            w = n if widest is None else widest
        else:
            w = window
        w = min(max(w, 1), n)
        q = torch.arange(len(doc), device=doc.device).view(n, block_size, 1)
        k = q[:, :1] + torch.arange((1 - w) * block_size, block_size, device=doc.device)
        allowed = (k >= 0) & may_attend(q, k, doc[q], doc[k.clamp(min=0)], window, block_size)
        zero = torch.zeros((), device=doc.device)
        return torch.where(allowed, zero, float("-inf"))[:, None]

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float) -> Tensor:
        """q, k, v (T, H, C) -> (T, H, C)."""
        n, _, block_size, span = mask.shape
        before = span - block_size

        def windows(x: Tensor) -> Tensor:  # (T, H, C) -> (N, H, W * B, C)
            return F.pad(x, (0, 0, 0, 0, before, 0)).unfold(0, span, block_size).transpose(-1, -2)

        queries = q.unflatten(0, (n, block_size)).transpose(1, 2)
        out = F.scaled_dot_product_attention(queries, windows(k), windows(v), mask.type_as(q), scale=scale)
        return out.transpose(1, 2).flatten(0, 1)


def block_lists(doc: Tensor, window: Window, block_size: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(T,) documents -> counts (N,) and key-block indices (N, N), first of partial, then of full blocks, all int32.

    Nearest block first, so that a window is a smaller count: record 26's way to widen it without recompiling. A block
    is full when both it and its queries lie in one and the same document and it is not the diagonal one.
    """
    first, last = doc.view(-1, block_size)[:, 0], doc.view(-1, block_size)[:, -1]
    i = torch.arange(len(first), device=doc.device)
    below = i[None, :] < i[:, None]
    meets = (first[:, None] <= last[None, :]) & (last[:, None] >= first[None, :])
    inside = (first[:, None] == last[None, :]) & (last[:, None] == first[None, :])
    full = below & inside
    partial = (below | (i[None, :] == i[:, None])) & meets & ~full
    reach = torch.as_tensor(window, dtype=torch.int32, device=doc.device).clamp(min=1)

    def nearest_first(blocks: Tensor) -> tuple[Tensor, Tensor]:
        order = blocks.int().argsort(dim=-1, stable=True).flip(-1)
        return blocks.sum(-1, dtype=torch.int32), order.int().contiguous()

    n_partial, partial_order = nearest_first(partial)
    n_full, full_order = nearest_first(full)
    n_partial = torch.minimum(n_partial, (reach - n_full).clamp(min=1))
    return n_partial, partial_order, torch.minimum(n_full, reach - 1), full_order


class Flex:
    """FlexAttention. Its mask function holds the whole rule, window included, so evaluating it densely is also right."""

    def build_mask(self, doc: Tensor, window: Window, block_size: int, widest: int | None = None) -> Any:
        """(T,) -> BlockMask."""
        from torch.nn.attention.flex_attention import BlockMask

        reach = torch.as_tensor(window, dtype=torch.int32, device=doc.device)

        def rule(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            return may_attend(q, k, doc[q], doc[k], reach, block_size)

        n_partial, partial, n_full, full = (x[None, None] for x in block_lists(doc, window, block_size))
        return BlockMask.from_kv_blocks(n_partial, partial, n_full, full, BLOCK_SIZE=block_size, mask_mod=rule)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Any, scale: float) -> Tensor:
        """q, k, v (T, H, C) -> (T, H, C)."""
        from torch.nn.attention.flex_attention import flex_attention

        q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
        return flex_attention(q, k, v, block_mask=mask, scale=scale)[0].transpose(0, 1)


BACKENDS: dict[str, Callable[[], Backend]] = {"dense": Dense, "blocked": Blocked, "flex": Flex}


class Context(NamedTuple):
    """What all layers see of a sequence. masks: the backend's, for the short and the long window."""

    masks: tuple[Any, Any]
    cos_sin: tuple[Tensor, Tensor]
    values: ValueRows


class HeadsOption(Protocol):
    """The config of a technique that changes what the heads put out, before the projection."""

    def build(self, shape: ModelShape, layer: int) -> nn.Module | None:
        """A module (y (T, H, C), x (T, D), v (T, H, C)) -> (T, H, C); None where the layer goes without."""


@dataclass(frozen=True)
class AttentionConfig:
    """An attention layer. scale: of the scores. options: techniques that change the heads' outputs, in this order."""

    scale: float = ATTENTION_SCALE
    options: tuple[HeadsOption, ...] = ()

    def build(self, shape: ModelShape, layer: int, mixer: nn.Module) -> Attention:
        """The attention of one layer. mixer: what it does with its values."""
        return Attention(self, shape, layer, mixer)


class Attention(nn.Module):
    """Causal attention over packed documents.

    flops_per_key: of scores and their use in training, for each token and key that it sees.
    """

    def __init__(self, cfg: AttentionConfig, shape: ModelShape, layer: int, mixer: nn.Module):
        super().__init__()
        D, base = shape.width, shape.base_width
        self.head_dim, self.scale = shape.head_dim, cfg.scale
        self.has_long_window = shape.has_long_window(layer)
        self.flops_per_key = 12.0 * D
        self.backend = BACKENDS[shape.attention]()
        self.qkv_w = nn.Parameter(torch.empty(3, D, D))
        self.c_proj = Linear(D, D)
        inside, last, own = DepthRole.BRANCH, DepthRole.WRITES, (base, base)
        mup.declare(self, "qkv_w", Role.HIDDEN, (3, *own), "stack out in", "matrix", init=INTO_THE_LAYER, depth=inside)
        mup.declare(self.c_proj, "weight", Role.HIDDEN, own, "out in", "matrix", init="zero", depth=last)
        self.value = mixer
        built = (option.build(shape, layer) for option in cfg.options)
        self.options = nn.ModuleList(option for option in built if option is not None)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        """The normed stream (T, D) -> (T, D)."""
        T = len(x)
        qkv = F.linear(x, self.qkv_w.flatten(end_dim=1).type_as(x)).view(T, -1, self.head_dim)  # (T, 3H, C)
        H = qkv.size(1) // 3
        qk, v = qkv.split([2 * H, H], dim=1)
        # QK norm (Grad62304977 and Keller Jordan, record 5). Rotation preserves the norm, so the norm after the rotary
        # embedding equals the record's norm before it.
        q, k = rms_norm(rotate(qk, context.cos_sin)).chunk(2, dim=1)
        v = self.value(v, x, context.values)
        y = self.backend.attend(q, k, v, context.masks[self.has_long_window], self.scale)
        for option in self.options:
            y = option(y, x, v)
        return self.c_proj(y.reshape(T, -1))
