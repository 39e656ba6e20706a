"""An exported model, in plain PyTorch, for Hugging Face's transformers 4.57 and 5. Needs configuration_speedrun.py only.

n texts, t tokens of each at a time, s tokens that are seen, D width, H heads, C head_dim, B tokens per block, V vocabulary.

The architecture is record 26 of modded-nanogpt, by Keller Jordan and contributors; names of modules are theirs.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DynamicCache, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from .configuration_speedrun import SpeedrunConfig

RMS_EPS = torch.finfo(torch.float32).eps
QUERIES = 512  # that are looked at together in a long text, at least


def rms_norm(x: Tensor) -> Tensor:
    """Divide (..., D) by the root mean square of its last dimension, in float32; no gain."""
    x32 = x.float()
    return (x32 * (x32.square().mean(dim=-1, keepdim=True) + RMS_EPS).rsqrt()).type_as(x)


def rotary(positions: Tensor, head_dim: int) -> tuple[Tensor, Tensor]:
    """cos and signed sin at positions (n, t), (n, t, 1, C) float32; half of the pairs do not rotate."""
    rotating = head_dim // 4
    frequency = (1 / 1024) ** torch.linspace(0, 1, rotating, device=positions.device)
    frequency = torch.cat([frequency, frequency.new_zeros(head_dim // 2 - rotating)])
    angle = positions.float()[..., None, None] * frequency
    cos, sin = angle.cos(), angle.sin()
    return torch.cat([cos, cos], dim=-1), torch.cat([sin, -sin], dim=-1)


def rotate(x: Tensor, cos_sin: tuple[Tensor, Tensor]) -> Tensor:
    """Rotary embedding of (n, t, H, C) in float32; pairs are (i, i + C / 2)."""
    cos, sin = cos_sin
    x32 = x.float()
    return torch.addcmul(x32 * cos, x32.roll(x.size(-1) // 2, dims=-1), sin).type_as(x)


class Facts(NamedTuple):
    """What a mask depends on, of each token that can be seen, (n, s) int64: its position, whether it opens a document,
    whether it is no padding."""

    positions: Tensor
    opens: Tensor
    real: Tensor


class Piece(NamedTuple):
    """Some of the queries, the keys that they may see, and which of these they do see: bool (n, 1, queries, keys)."""

    queries: slice
    keys: slice
    allowed: Tensor


def pieces_of(facts: Facts, t: int, window: int, block_size: int) -> list[Piece]:
    """The attention mask of the last `t` tokens, a few blocks of queries at a time, so that it does not grow with s * t.

    Causal, within the document, within the window, which counts blocks: a query at offset r of its block sees
    r + 1 + B * (window - 1) keys. Padding has to be on the left or on the right of a text, not within.
    """
    s, reach = facts.positions.size(1), window * block_size
    document, slot = facts.opens.cumsum(dim=1), torch.arange(s, device=facts.positions.device)
    together, pieces = max(reach, QUERIES), []
    for begin in range(s - t, s, together):
        queries, keys = (
            slice(begin, min(begin + together, s)),
            slice(max(begin - reach + 1, 0), min(begin + together, s)),
        )
        q, k = facts.positions[:, queries, None], facts.positions[:, None, keys]
        allowed = (k <= q) & (document[:, queries, None] == document[:, None, keys])
        allowed &= q // block_size - k // block_size < window
        allowed &= facts.real[:, None, keys] > 0
        allowed |= slot[queries, None] == slot[None, keys]  # padding sees itself, so that its softmax is a number
        pieces.append(Piece(slice(begin - s + t, queries.stop - s + t), keys, allowed[:, None]))
    return pieces


class HeadGate(nn.Module):
    """Each head's output times a sigmoid of a few channels of the layer's input (ClassicLarry, record 28)."""

    def __init__(self, config: SpeedrunConfig):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config.num_attention_heads, config.attention_gate))

    def forward(self, y: Tensor, x: Tensor) -> Tensor:
        """y (n, t, H, C), the layer's normed input x (n, t, D) -> (n, t, H, C)."""
        return y * F.linear(x[..., : self.weight.size(1)], self.weight).sigmoid()[..., None]


class Attention(nn.Module):
    """Attention with QK norm (Grad62304977 and Keller Jordan, record 5) and mixed values (KoszarskyB, record 14)."""

    def __init__(self, config: SpeedrunConfig, layer: int):
        super().__init__()
        D, window = config.hidden_size, config.attention_windows[layer]
        self.layer, self.head_dim, self.scale = layer, config.head_dim, config.attention_scale
        self.window = 0 if window is None else window
        self.qkv_w = nn.Parameter(torch.empty(3, config.num_attention_heads * config.head_dim, D))
        self.c_proj = nn.Linear(config.num_attention_heads * config.head_dim, D, bias=False)
        self.options = nn.ModuleList([HeadGate(config)] if config.attention_gate else [])

    def forward(
        self,
        x: Tensor,
        own: Tensor,
        embedded: Tensor | None,
        cos_sin: tuple[Tensor, Tensor],
        pieces: Sequence[Piece],
        cache: Any,
    ) -> Tensor:
        """The normed stream (n, t, D) -> (n, t, D).

        Args:
            x: the normed stream.
            own: the weight of the layer's own values.
            embedded: what is added to them, (n, t, D); None for nothing.
            cos_sin: of the tokens' positions.
            pieces: of the mask, for this layer's window.
            cache: of transformers, or None.

        Returns:
            What the layer adds to the stream.
        """
        q, k, v = F.linear(x, self.qkv_w.flatten(end_dim=1)).unflatten(2, (3, -1, self.head_dim)).unbind(2)
        q, k = rms_norm(rotate(q, cos_sin)), rms_norm(rotate(k, cos_sin))
        v = own.to(v.device) * v
        if embedded is not None:
            v = v + embedded.view_as(v)
        q, k, v = (part.transpose(1, 2) for part in (q, k, v))  # (n, H, t, C)
        if cache is not None:
            k, v = cache.update(k, v, self.layer)
        parts = [
            F.scaled_dot_product_attention(
                q[:, :, piece.queries], k[:, :, piece.keys], v[:, :, piece.keys], piece.allowed, scale=self.scale
            )
            for piece in pieces
        ]
        y = torch.cat(parts, dim=2).transpose(1, 2)
        for option in self.options:
            y = option(y, x)
        return self.c_proj(y.flatten(2))


class MLP(nn.Module):
    """A squared ReLU inside (So et al., arXiv 2109.08668)."""

    def __init__(self, config: SpeedrunConfig):
        super().__init__()
        self.c_fc = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.c_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(n, t, D) -> (n, t, D)."""
        return self.c_proj(self.c_fc(x).relu().square())


class Block(nn.Module):
    """One layer: attention, which one layer goes without (YouJiacheng, record 17), then the MLP."""

    def __init__(self, config: SpeedrunConfig, layer: int):
        super().__init__()
        self.attn = None if config.attention_windows[layer] is None else Attention(config, layer)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, *context: Any) -> Tensor:
        """(n, t, D) -> (n, t, D). context: what Attention takes."""
        if self.attn is not None:
            x = x + self.attn(rms_norm(x), *context)
        return x + self.mlp(rms_norm(x))


class Values(nn.ModuleList):
    """The value embeddings; lambdas (L, 2): weights of each layer's own value and of its value embedding."""

    def __init__(self, config: SpeedrunConfig):
        count = 1 + max((which for which in config.value_embeddings if which is not None), default=-1)
        super().__init__(nn.Embedding(config.vocab_size, config.hidden_size) for _ in range(count))
        self.lambdas = nn.Parameter(torch.empty(config.num_hidden_layers, 2))

    def forward(self, tokens: Tensor) -> list[Tensor]:
        """(n, t) -> of each embedding, (n, t, D)."""
        return [embedding(tokens) for embedding in self]


class Layers(nn.ModuleList):
    """Two halves: each layer of the second gets the output of its mirror image in the first; all get x0.

    Of an odd number of layers, the middle one belongs to neither half.
    """

    def __init__(self, config: SpeedrunConfig):
        L = config.num_hidden_layers
        super().__init__(Block(config, layer) for layer in range(L))
        self.skip_weights = nn.Parameter(torch.empty(L // 2))
        self.x0_lambdas = nn.Parameter(torch.empty(L, 2))

    def forward(self, x0: Tensor, contexts: Sequence[tuple[Any, ...]]) -> list[Tensor]:
        """x0 (n, t, D), what Attention takes for each layer -> the stream before the first and after every layer."""
        streams, half = [x0], len(self) // 2
        for layer, (block, context) in enumerate(zip(self, contexts)):
            x, mirrored = streams[-1], layer - (len(self) - half)
            if mirrored >= 0:  # U-net skips: Brendan Hogan, record 11
                skipped = streams[half - mirrored].to(x.device)
                x = x + self.skip_weights[mirrored].to(x.device) * skipped
            own, first = self.x0_lambdas[layer].to(x.device).unbind()
            streams.append(block(own * x + first * x0.to(x.device), *context))
        return streams


class SpeedrunForCausalLM(PreTrainedModel, GenerationMixin):
    """The language model. Text begins with BOS, as the tokenizer writes it."""

    config_class = SpeedrunConfig
    main_input_name = "input_ids"
    _supports_sdpa = True
    _no_split_modules = ["Block"]
    _keep_in_fp32_modules_strict = ["lambdas", "skip_weights", "x0_lambdas"]

    def __init__(self, config: SpeedrunConfig):
        super().__init__(config)
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.value_embeds = Values(config)
        self.blocks = Layers(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> Any:
        """Predict the next token of each.

        Args:
            input_ids: (n, t).
            attention_mask: (n, all tokens so far), 0 for padding, which is on one side of a text.
            position_ids: (n, t); default: those of attention_mask, counted without padding.
            past_key_values: a dynamic cache of transformers.
            inputs_embeds: refused, since value embeddings need the tokens.
            labels: (n, t), as other models of transformers take them; -100 is left out.
            use_cache: keep keys and values; default: as the config says.
            output_hidden_states: also return the stream before the first and after every layer.
            return_dict: False returns a tuple.
            logits_to_keep: of this many last tokens, or of these; 0: of all.
            **kwargs: num_items_in_batch goes to the loss.

        Returns:
            Loss if there are labels, logits (n, kept, V) float32, cache.
        """
        if input_ids is None or inputs_embeds is not None:
            raise ValueError("this model adds embeddings of its tokens in several layers: it takes input_ids only")
        cache = past_key_values
        if cache is None and (getattr(self.config, "use_cache", True) if use_cache is None else use_cache):
            cache = DynamicCache(config=self.config)
        if getattr(cache, "is_compileable", False):
            raise ValueError("this model takes dynamic caches only; leave out cache_implementation")
        streams = self._streams(input_ids, self._facts(input_ids, attention_mask, position_ids, cache), cache)
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        z = self.lm_head(rms_norm(streams[-1])[:, kept])
        logits = self.config.logit_cap * torch.sigmoid(z.float() * self.config.logit_scale)
        loss = None
        if labels is not None:
            count = {name: value for name, value in kwargs.items() if name == "num_items_in_batch"}
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=logits.size(-1), **count)
        wanted = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        output = CausalLMOutputWithPast(
            loss=loss, logits=logits, past_key_values=cache, hidden_states=tuple(streams) if wanted else None
        )
        return output.to_tuple() if return_dict is False else output

    def _facts(self, tokens: Tensor, mask: Tensor | None, positions: Tensor | None, cache: Any) -> Facts:
        """Of the tokens that the cache has and of the new ones.

        The cache keeps them as a layer of its own, so that they are sorted, repeated and cropped with the keys: as that of
        the layer without attention, or one more.
        """
        n, t = tokens.shape
        if mask is not None and mask.ndim != 2:
            raise ValueError(f"attention_mask has {mask.ndim} dimensions; give (texts, tokens)")
        real = torch.ones_like(tokens) if mask is None else mask[:, -t:].long()
        if positions is None and mask is not None:
            positions = (mask.long().cumsum(dim=1) - 1).clamp(min=0)[:, -t:]
        elif positions is None:
            past = 0 if cache is None else cache.get_seq_length()
            positions = torch.arange(past, past + t, device=tokens.device)
        new = Facts(positions.expand(n, t).long(), (tokens == self.config.bos_token_id).long() * real, real)
        if cache is None:
            return new
        windows = self.config.attention_windows
        layer = windows.index(None) if None in windows else len(windows)
        if len(cache.layers) == layer > 0:
            cache.layers.append(copy.copy(cache.layers[0]))  # nothing is in it yet
        kept = torch.stack(new[1:], dim=-1)[:, None]
        positions, kept = cache.update(new.positions[:, None, :, None], kept, layer)
        return Facts(positions[:, 0, :, 0], *kept[:, 0].unbind(dim=-1))

    def _streams(self, tokens: Tensor, facts: Facts, cache: Any) -> list[Tensor]:
        """(n, t) -> the stream before the first and after every layer, (n, t, D) each."""
        t, windows = tokens.size(1), self.config.attention_windows
        pieces = {
            window: pieces_of(facts, t, window, self.config.block_size) for window in {*windows} if window is not None
        }
        cos_sin = rotary(facts.positions[:, -t:], self.config.head_dim)
        rows, weights = self.value_embeds(tokens), self.value_embeds.lambdas
        contexts = []
        for layer, (window, which) in enumerate(zip(windows, self.config.value_embeddings)):
            embedded = None if which is None else weights[layer, 1].to(rows[which].device) * rows[which]
            contexts.append((weights[layer, 0], embedded, cos_sin, pieces.get(window, ()), cache))
        return self.blocks(rms_norm(self.embed(tokens)), contexts)

    def _init_weights(self, module: nn.Module) -> None:
        """First values of a model that is not loaded: the record's."""
        if isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight)
        elif isinstance(module, Attention):
            bound = 0.5 * (3 / module.qkv_w.size(-1)) ** 0.5
            nn.init.uniform_(module.qkv_w, -bound, bound)
        elif isinstance(module, nn.Linear | HeadGate):
            nn.init.zeros_(module.weight)
        elif isinstance(module, MLP):
            bound = 0.5 * (3 / module.c_fc.in_features) ** 0.5
            nn.init.uniform_(module.c_fc.weight, -bound, bound)
        elif isinstance(module, Values):
            nn.init.constant_(module.lambdas, 0.5)
        elif isinstance(module, Layers):
            nn.init.ones_(module.skip_weights)
            nn.init.zeros_(module.x0_lambdas)
            nn.init.ones_(module.x0_lambdas[:, :1])

    def get_input_embeddings(self) -> nn.Module:
        """The first one; value embeddings come in later layers."""
        return self.embed

    def set_input_embeddings(self, value: Any) -> None:
        """Replace the first one."""
        self.embed = value

    def get_output_embeddings(self) -> nn.Module:
        """The head."""
        return self.lm_head

    def set_output_embeddings(self, new_embeddings: Any) -> None:
        """Replace the head."""
        self.lm_head = new_embeddings

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> nn.Module:
        """Refused: the value embeddings would have to be resized too."""
        raise ValueError(
            "the vocabulary of this model cannot be resized: its value embeddings have a row for each token"
        )
