"""Stateless seeds. Torch is imported by `generator` alone."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def seed_for(seed: int, *purpose: object) -> int:
    """A 63-bit seed that depends only on its arguments: randomness needs no state to be saved, whatever the rank."""
    digest = hashlib.sha256(repr((seed, *purpose)).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def generator(seed: int, *purpose: object) -> torch.Generator:
    """A CPU generator seeded by `seed_for`. Initialise on the CPU with it and every device starts from the same bits."""
    import torch

    return torch.Generator().manual_seed(seed_for(seed, *purpose))
