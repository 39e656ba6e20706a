"""From a run's settings to its model's config: the only place that knows both."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch

from speedrun_mup.config import TrainConfig
from speedrun_mup.core.model import GPTConfig
from speedrun_mup.scaling import depth_of
from speedrun_mup.techniques import with_techniques


class HasVocabulary(Protocol):
    """A corpus, or a Vocabulary."""

    @property
    def vocab_size(self) -> int:
        """Tokens that the tokenizer has."""

    @property
    def bos_token(self) -> int:
        """The one that opens a document."""


class Vocabulary(NamedTuple):
    """What a model must know of the data where there is none."""

    vocab_size: int
    bos_token: int = 0


def model_config(
    cfg: TrainConfig,
    vocabulary: HasVocabulary,
    attention: str = "dense",
    dtype: torch.dtype = torch.float32,
    fp8: bool = False,
) -> GPTConfig:
    """The model that `cfg` describes.

    Args:
        cfg: the run's settings.
        vocabulary: the corpus that it trains on, or a Vocabulary.
        attention: the backend, in place of the setting, which may say "auto".
        dtype: of embeddings and activations, likewise.
        fp8: whether the head trains with FP8 matmuls, likewise.

    Raises:
        ConfigError: for an impossible shape.
    """
    shape = GPTConfig(
        vocab_size=vocabulary.vocab_size,
        bos_token=vocabulary.bos_token,
        n_layer=cfg.n_layer,
        width=cfg.width,
        base_width=cfg.tuned_width,
        head_dim=cfg.head_dim,
        block_size=cfg.block_size,
        parametrization=cfg.parametrization,
        embed_dtype=dtype,
        attention=attention,
        fp8=fp8,
        widest_window=cfg.schedule.widest_window,
        **depth_of(cfg),
    )
    return with_techniques("model", shape, cfg)
