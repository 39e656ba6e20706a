"""What training costs in floating-point operations, by the formulas that MFU (used share of the peak) is stated with."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import torch
from torch import Tensor

from speedrun_mup.config import TrainConfig
from speedrun_mup.core.model import GPTConfig, declarations
from speedrun_mup.core.mup import named_specs
from speedrun_mup.training.model_config import Vocabulary, model_config
from speedrun_mup.training.schedules import Schedule


def flops_per_token(cfg: TrainConfig, vocab_size: int) -> float:
    """FLOPs to train on one token: 6 per matrix weight that it meets, and 12 * width per key in each attention layer.

    Keys are those inside window and micro-batch, averaged over training, while the window grows; that they also have to
    be of the same document is left out, so this is an upper bound (2.7 % too much for record 26). Also left out: the
    optimizers, of which Muon takes 0.55 % there but a large part of a very small model's step, and validation.
    """
    shape = model_config(cfg, Vocabulary(vocab_size))
    return weight_flops(shape) + attention_flops(shape, *_mean_keys(cfg.schedule))


def run_flops(cfg: TrainConfig, vocab_size: int) -> float:
    """FLOPs of a whole training run."""
    return flops_per_token(cfg, vocab_size) * cfg.schedule.tokens


def weight_flops(shape: GPTConfig) -> float:
    """6 N: two for each weight that a token is multiplied with, forward, and twice that backward."""
    return 6.0 * _declared_costs(_without_runtime(shape))[0]


def attention_flops(shape: GPTConfig, long: float, short: float) -> float:
    """Of scores and their use, per token: 12 * width per key. long, short: mean keys in layers of either window."""
    _, layers = _declared_costs(_without_runtime(shape))
    costs = {flops for flops, _ in layers}
    return sum(cost * sum(long if is_long else short for flops, is_long in layers if flops == cost) for cost in costs)


def _without_runtime(shape: GPTConfig) -> GPTConfig:
    """`shape` without what costs depend on in no way."""
    return dataclasses.replace(
        shape, bos_token=0, parametrization="sp", base_width=shape.width, widest_window=None, base_layers=None
    )


@functools.lru_cache(maxsize=256)
def _declared_costs(shape: GPTConfig) -> tuple[float, list[tuple[float, bool]]]:
    """What the parts of a model declare: weights met by a token; FLOPs per key of each attention, and if its window is long."""
    model = declarations(shape)
    weights = sum(spec.products_per_token for _, _, spec in named_specs(model))
    attention: list[Any] = [module for module in model.modules() if hasattr(module, "flops_per_key")]
    return weights, [(module.flops_per_key, module.has_long_window) for module in attention]


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
