"""Settings of an exported model, for Hugging Face's transformers 4.57 and 5. This file needs nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import PretrainedConfig


class SpeedrunConfig(PretrainedConfig):
    """The GPT of modded-nanogpt's record 26, at any size.

    Args:
        vocab_size: rows of the embeddings and of the head; more than the tokenizer has, since training pads it.
        hidden_size: the width.
        num_hidden_layers: at least 2.
        num_attention_heads: of each layer that has attention.
        head_dim: of a head; a multiple of 4.
        intermediate_size: inside an MLP.
        block_size: tokens of a block, in which attention windows are counted.
        attention_windows: of each layer, in blocks; None for a layer without attention. A query at offset r of its block
            sees r + 1 + block_size * (window - 1) keys.
        value_embeddings: which of the value embeddings each layer adds to its values; None for none.
        attention_scale: of the scores.
        attention_gate: channels of its input that gate each head; 0: no gates.
        logit_cap: logits are logit_cap * sigmoid(logit_scale * head output).
        logit_scale: 1 where the multipliers are in the head's weights.
        max_position_embeddings: tokens of a sequence in training; the model takes any number.
        bos_token_id: opens a document; documents do not see each other.
        **kwargs: what every config takes.
    """

    model_type = "speedrun_mup"
    keys_to_ignore_at_inference = ["past_key_values"]

    def __init__(
        self,
        vocab_size: int = 50304,
        hidden_size: int = 768,
        num_hidden_layers: int = 12,
        num_attention_heads: int = 6,
        head_dim: int = 128,
        intermediate_size: int = 3072,
        block_size: int = 128,
        attention_windows: Sequence[int | None] = (14, 7, 7, 7, 14, 7, 7, None, 7, 7, 7, 14),
        value_embeddings: Sequence[int | None] = (0, 1, 2, None, None, None, None, None, None, 0, 1, 2),
        attention_scale: float = 0.12,
        attention_gate: int = 0,
        logit_cap: float = 30.0,
        logit_scale: float = 1.0,
        max_position_embeddings: int = 49152,
        bos_token_id: int = 50256,
        **kwargs: Any,
    ):
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.head_dim = head_dim
        self.intermediate_size = intermediate_size
        self.block_size = block_size
        self.attention_windows = list(attention_windows)
        self.value_embeddings = list(value_embeddings)
        self.attention_scale = attention_scale
        self.attention_gate = attention_gate
        self.logit_cap = logit_cap
        self.logit_scale = logit_scale
        self.max_position_embeddings = max_position_embeddings
        # What a cache keeps of every layer: the tokens of the longest window.
        kwargs.setdefault("use_cache", True)
        kwargs.setdefault("tie_word_embeddings", False)
        self.sliding_window = block_size * max(window or 0 for window in self.attention_windows)
        self.layer_types = ["sliding_attention"] * num_hidden_layers
        for derived in ("sliding_window", "layer_types"):
            kwargs.pop(derived, None)
        super().__init__(bos_token_id=bos_token_id, **kwargs)
