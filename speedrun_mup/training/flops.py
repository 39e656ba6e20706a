"""What training costs in floating-point operations, by the formulas that MFU (used share of the peak) is stated with."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from speedrun_mup.config import TrainConfig
from speedrun_mup.core.model import GPTConfig
from speedrun_mup.training.schedules import Schedule


def flops_per_token(cfg: TrainConfig, vocab_size: int) -> float:
    """FLOPs to train on one token: 6 per matrix weight that it meets, and 12 * width per key in each attention layer.

    Keys are those inside window and micro-batch, averaged over training, while the window grows; that they also have to
    be of the same document is left out, so this is an upper bound (2.7 % too much for record 26). Also left out: the
    optimizers, of which Muon takes 0.55 % there but a large part of a very small model's step, and validation.
    """
    shape = model_shape(cfg, vocab_size)
    return weight_flops(shape) + attention_flops(shape, *_mean_keys(cfg.schedule))


def run_flops(cfg: TrainConfig, vocab_size: int) -> float:
    """FLOPs of a whole training run."""
    return flops_per_token(cfg, vocab_size) * cfg.schedule.tokens


def weight_flops(shape: GPTConfig) -> float:
    """6 N: two for each weight that a token is multiplied with, forward, and twice that backward."""
    attention = shape.n_layer - 1  # one layer has none
    return 6.0 * ((4 * attention + 8 * shape.n_layer) * shape.width**2 + shape.padded_vocab * shape.width)


def attention_flops(shape: GPTConfig, long: float, short: float) -> float:
    """Of scores and their use, per token: 12 * width per key. long, short: mean keys in layers of either window."""
    layers = [layer for layer in range(shape.n_layer) if layer != shape.layer_without_attention]
    return 12.0 * shape.width * sum(long if shape.has_long_window(layer) else short for layer in layers)


def model_shape(cfg: TrainConfig, vocab_size: int) -> GPTConfig:
    """The model's shape. Raises ConfigError for an impossible one."""
    return GPTConfig(
        vocab_size, 0, cfg.n_layer, cfg.width, cfg.tuned_width, cfg.head_dim, cfg.block_size, cfg.parametrization
    )


@functools.cache
def _mean_keys(schedule: Schedule) -> tuple[float, float]:
    """Keys that a query sees, mean over positions and tokens of training, in layers with the long and the short window."""

    def keys(window: int, tokens: int) -> float:
        blocks = tokens // schedule.block_size
        window = min(max(window, 1), blocks)
        return schedule.block_size * (window - 1) * (blocks - window / 2) / blocks + (schedule.block_size + 1) / 2

    steps = [schedule.at(step) for step in range(schedule.iterations)]
    groups = [step.micro_batches // schedule.group for step in steps]
    return (
        sum(keys(step.window, step.sequence_tokens) * n for step, n in zip(steps, groups)) / sum(groups),
        sum(keys(step.window // 2, step.sequence_tokens) * n for step, n in zip(steps, groups)) / sum(groups),
    )


def keys_seen(doc: Tensor, window: int, block_size: int) -> float:
    """Mean number of keys that the mask lets a query attend to. doc: (T,) document numbers; window in blocks."""
    t = torch.arange(len(doc))
    opens = torch.ones(len(doc), dtype=torch.bool)
    opens[1:] = doc[1:] != doc[:-1]
    start = torch.where(opens, t, 0).cummax(0).values
    first = torch.maximum(start, (t // block_size - max(window, 1) + 1) * block_size)
    return (t - first + 1).double().mean().item()
