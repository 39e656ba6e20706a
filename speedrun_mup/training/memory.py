"""How much of a step goes through the model at once, and what to lower when memory runs out; all from the settings."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch

from speedrun_mup.config import TrainConfig
from speedrun_mup.core.device import is_out_of_memory
from speedrun_mup.core.errors import ConfigError, OutOfMemory

TOKENS_AT_ONCE = {"cpu": 8192, "mps": 16_384, "cuda": 65_536}  # what one forward pass takes at most, by itself


@contextmanager
def translate_oom(cfg: TrainConfig, step: int, work: str = "passes", at_once: int = 1) -> Iterator[None]:
    """Turn running out of memory into an OutOfMemory that says what took how much, and what would take less.

    Args:
        cfg: the settings in force.
        step: that the run is at.
        work: model, passes, update or validation.
        at_once: micro-batches in one forward pass.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as fault:
        if not is_out_of_memory(fault):
            raise
        text = (str(fault).splitlines() or ["MemoryError"])[0]
        said = text.partition(". GPU ")[0].rpartition("] ")[2]
        needed, advice = memory_advice(cfg, work, at_once)
        raise OutOfMemory(f"step {step}: no memory for {needed} ({said}); try {advice}") from None


def memory_advice(cfg: TrainConfig, work: str, at_once: int) -> tuple[str, str]:
    """What `work` takes at once, and settings that let it take less."""
    if work == "model":
        return "the weights", "a smaller --width"
    if work == "update":
        return "the optimizers' step", "a smaller --width, or more GPUs, which share the optimizers' state"
    validation = work == "validation"
    size = cfg.val_chunk_tokens if validation else cfg.micro_batch_tokens
    smaller = half_in_blocks(size, cfg.block_size)
    if not smaller:
        advice = "a smaller --width"
    elif validation:
        advice = f"--val-chunk-tokens {smaller}"
    else:
        advice = f"--micro-batch-tokens {smaller} --micro-batches {cfg.batch_tokens // smaller}"
    if not validation and at_once > 1:
        advice = f"--micro-batches-per-forward {at_once // 2}, or {advice}"
    return f"{f'validation on {size:,}' if validation else f'{at_once} x {size:,}'} tokens at once", advice


def micro_batches_at_once(cfg: TrainConfig, world_size: int, device: torch.device) -> int:
    """How many of a rank's micro-batches one forward pass takes side by side. ConfigError if --deterministic cannot be kept."""
    shares = [max(stage.micro_batches // world_size, 1) for stage in cfg.schedule.stages]
    if cfg.deterministic:
        if world_size > 1 and (odd := next((share for share in shares if share & (share - 1)), 0)):
            raise ConfigError(
                f"{odd} micro-batches per process do not fit the tree that --deterministic sums in; start 1 process, leave "
                "--deterministic out, or choose processes, --micro-batches and --batch-schedule so that each process has 1, 2, "
                "4, 8, ... of them in every stage"
            )
        return 1
    if cfg.micro_batches_per_forward:
        return min(cfg.micro_batches_per_forward, max(shares))
    fits, common = TOKENS_AT_ONCE[device.type] // cfg.micro_batch_tokens, math.gcd(*shares)
    return max((n for n in range(1, common + 1) if common % n == 0 and n <= fits), default=1)


def fit_micro_batch(cfg: TrainConfig, at_once: int, fits: Callable[[TrainConfig], bool]) -> TrainConfig:
    """`cfg` with as many tokens in one forward pass as `fits` says do fit, for the same tokens in a step.

    At first fewer micro-batches go side by side, which changes nothing but rounding; then they get half as long and twice
    as many, which puts other tokens into a step. ConfigError if not even one block fits.
    """
    cfg = replace(cfg, fit_memory=False, micro_batches_per_forward=at_once)
    while not fits(cfg):
        if cfg.micro_batches_per_forward > 1:
            cfg = replace(cfg, micro_batches_per_forward=cfg.micro_batches_per_forward // 2)
        else:
            half = half_in_blocks(cfg.micro_batch_tokens, cfg.block_size)
            if 2 * half != cfg.micro_batch_tokens:
                raise _too_large("a micro-batch", cfg.micro_batch_tokens, cfg.block_size)
            cfg = replace(cfg, micro_batch_tokens=half, micro_batches=2 * cfg.micro_batches)
    return cfg


def fit_val_chunk(cfg: TrainConfig, fits: Callable[[TrainConfig], bool]) -> TrainConfig:
    """`cfg` with as many tokens in a validation chunk as `fits` says do fit. ConfigError if not even one block fits.

    A document that begins in the chunk before is seen without its beginning, which more documents then are.
    """
    while not fits(cfg):
        half = half_in_blocks(cfg.val_chunk_tokens, cfg.block_size)
        if not half:
            raise _too_large("a validation chunk", cfg.val_chunk_tokens, cfg.block_size)
        cfg = replace(cfg, val_chunk_tokens=half)
    return cfg


def half_in_blocks(tokens: int, block_size: int) -> int:
    """Half of `tokens`, rounded down to whole blocks."""
    return tokens // (2 * block_size) * block_size


def _too_large(what: str, tokens: int, block_size: int) -> ConfigError:
    return ConfigError(
        f"{what} of {tokens} tokens does not fit into memory and cannot be halved: "
        f"it must be a multiple of block_size={block_size}; use a smaller --width"
    )
