"""Learning rate, Muon momentum and attention window as pure functions. `progress` runs from 0 to 1 over training."""

from __future__ import annotations

import math


def lr_factor(progress: float, cooldown: float, floor: float) -> float:
    """Constant, then linear decay over the last `cooldown` fraction down to `floor`; no warmup. Record 26: 0.45, 0.10."""
    if progress < 1 - cooldown:
        return 1.0
    left = (1 - progress) / cooldown if cooldown > 0 else 0.0
    return left + floor * (1 - left)


def muon_momentum(step: int, warmup_steps: int, start: float, final: float) -> float:
    """Linear warmup in absolute steps, as in record 26 (0.85 to 0.95 over 300), whatever the length of the run."""
    return final if step >= warmup_steps else start + (final - start) * step / warmup_steps


def window_blocks(progress: float, final_tokens: int, block_size: int) -> int:
    """Blocks in the long attention window: final_tokens * progress, rounded up to blocks, at least 1.

    Record 26 (1728 tokens, blocks of 128) goes from 1 to 14 blocks: 1792 tokens, a little past its nominal length.
    """
    return max(1, math.ceil(final_tokens * progress / block_size))
