"""Text read a few tokens at a time: keys and values of what came before are kept, so a token costs the same at any length.

n sequences, t tokens of each at a time, H heads, C head_dim, B tokens per block, S tokens that a cache holds. Everything in
a model but attention works on a token by itself, so it takes the tokens of all sequences as one row of n * t. Techniques of the
token inputs may look at earlier tokens, and keep no state between calls: a model with one is refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from speedrun_mup.core.errors import ConfigError
from speedrun_mup.core.model.attention import Attention, may_attend
from speedrun_mup.core.model.gpt import GPT, GPTConfig
from speedrun_mup.core.model.layers import rotary


class CacheSlots(NamedTuple):
    """Where tokens go in the caches of one window, and what they see there, in place of a backend's mask.

    rows: of the cache (n * S, H, C), (n * t,). mask: (n, 1, t, U), over the first U of the S tokens: 0 where attention is
    allowed, -inf elsewhere.
    """

    size: int
    rows: Tensor
    mask: Tensor

    def to(self, device: torch.device) -> CacheSlots:
        """The same for caches on `device`."""
        return CacheSlots(self.size, self.rows.to(device), self.mask.to(device))

    def next(self, n: int) -> CacheSlots:
        """Of the token after one token of each text, in the same block: it sees itself too. Changes this one's mask."""
        rows = self.rows + 1
        first = torch.arange(0, n * self.size, self.size, device=rows.device)
        self.mask.flatten(start_dim=1).scatter_(1, (rows - first)[:, None], 0.0)
        return CacheSlots(self.size, rows, self.mask)


class Cache:
    """A layer's keys and values of the last S tokens: a ring of as many blocks as the layer's window, (n * S, H, C) each.

    Takes the place of the layer's attention backend. Keys are stored after the rotation, values after mixing.
    """

    def __init__(self) -> None:
        self.keys: Tensor | None = None
        self.values: Tensor | None = None

    def attend(self, q: Tensor, k: Tensor, v: Tensor, place: CacheSlots, scale: float) -> Tensor:
        """Store k and v, and attend to what is there: q, k, v (n * t, H, C) -> (n * t, H, C)."""
        n, _, t, used = place.mask.shape
        if self.keys is None or self.values is None:
            self.keys, self.values = (x.new_zeros(n * place.size, *x.shape[1:]) for x in (k, v))
        self.keys.index_copy_(0, place.rows, k)
        self.values.index_copy_(0, place.rows, v)
        keys, values = (x.unflatten(0, (n, -1))[:, :used].transpose(1, 2) for x in (self.keys, self.values))
        queries = q.unflatten(0, (n, t)).transpose(1, 2)
        y = F.scaled_dot_product_attention(queries, keys, values, place.mask, scale=scale)
        return y.transpose(1, 2).flatten(0, 1)


def check_decodable(cfg: GPTConfig) -> None:
    """ConfigError for a model that cannot read a few tokens at a time."""
    if options := cfg.inputs.options:
        names = ", ".join(type(option).__name__ for option in options)
        raise ConfigError(
            f"this model cannot write text: {names} of its token inputs may need earlier tokens, which are not kept yet; "
            "use eval, and train without --sample-every"
        )


class Decoder:
    """A model that reads n texts, a few tokens at a time: `decoder(tokens)` are the logits of what comes next.

    Every text is one document: start it with BOS. The reference is `model.logits` of the whole text.

    Args:
        model: stays as it is; its weights are shared.
        window: the long attention window, in blocks.

    Raises:
        ConfigError: for a model with techniques of token inputs.
    """

    def __init__(self, model: GPT, window: int):
        check_decodable(model.cfg)
        with torch.device("meta"):
            self.model = GPT(replace(model.cfg, attention="dense", fp8=False))  # the backend is replaced
        self.model.load_state_dict(model.state_dict(), assign=True)
        self.windows = (max(window // 2, 1), max(window, 1))
        self.device = model.embed.weight.device
        self.lengths = torch.zeros(1, dtype=torch.int64)  # of the n texts so far, on the CPU: nothing waits for a GPU
        self.caches: list[Cache] = []
        self.places: list[CacheSlots] = []  # of the last token of each text, for the short and the long window
        for module in self.model.modules():
            if isinstance(module, Attention):
                self.caches.append(Cache())
                module.backend = self.caches[-1]  # type: ignore[assignment]

    @torch.inference_mode()
    def __call__(self, tokens: Tensor) -> Tensor:
        """The next tokens of each text, (n, t) -> logits of the one after them, (n, V) float32."""
        block = self.model.cfg.block_size
        while True:
            now = tokens[:, : block - int((self.lengths % block).max())]  # no further than to the end of a block
            x = self._read(now)
            tokens = tokens[:, now.size(1) :]
            if not tokens.size(1):
                return self.model.lm_head.logits(x)

    def _read(self, tokens: Tensor) -> Tensor:
        """(n, t) within one block -> the stream at the last of them, (n, D)."""
        n, t = tokens.shape
        at = self.lengths[:, None] + torch.arange(t)
        self.lengths = self.lengths + t
        if t == 1 and self.places and bool((at % self.model.cfg.block_size).all()):
            self.places = [place.next(n) for place in self.places]
        else:
            self.places = [self._place(at, window).to(self.device) for window in self.windows]
        short, long = self.places
        cos_sin = rotary(at.flatten().to(self.device), self.model.cfg.head_dim)
        x = self.model.read(tokens.flatten().to(self.device), (short, long), cos_sin)
        self.places = self.places if t == 1 else []
        return x.unflatten(0, (n, t))[:, -1]

    def _place(self, at: Tensor, window: int) -> CacheSlots:
        """Of tokens at the positions `at` (n, t). What they overwrite is a block that the window has left behind."""
        block = self.model.cfg.block_size
        size, last = window * block, at[:, -1:]
        used = min(-(-(int(last.max()) + 1) // block) * block, size)
        k = last - (last - torch.arange(used)) % size  # the positions that the ring holds then
        document = k.new_zeros(())
        allowed = may_attend(at[:, :, None], k[:, None], document, document, window, block) & (k >= 0)[:, None]
        rows = at % size + torch.arange(len(at))[:, None] * size
        mask = torch.zeros(allowed.shape, dtype=self.model.cfg.embed_dtype).masked_fill(~allowed, float("-inf"))
        return CacheSlots(size, rows.flatten(), mask[:, None])

    def take(self, rows: Sequence[int]) -> None:
        """Continue these of the texts; the same one several times continues in several ways."""
        n = len(self.lengths)
        self.places, self.lengths = [], self.lengths[list(rows)]
        for cache in self.caches:
            cache.keys, cache.values = (
                None if x is None else x.unflatten(0, (n, -1))[list(rows)].flatten(0, 1)
                for x in (cache.keys, cache.values)
            )

    def join(self, others: Sequence[Decoder]) -> None:
        """Read the texts of the others too, which have read something each, in addition to its own."""
        self.places = []
        self.lengths = torch.cat([self.lengths, *(other.lengths for other in others)])
        for cache, *theirs in zip(self.caches, *(other.caches for other in others), strict=True):
            cache.keys = torch.cat([cache.keys, *(other.keys for other in theirs)])
            cache.values = torch.cat([cache.values, *(other.values for other in theirs)])

    @property
    def memory(self) -> int:
        """Bytes of all keys and values that are kept."""
        return sum(x.nbytes for cache in self.caches for x in (cache.keys, cache.values) if x is not None)
