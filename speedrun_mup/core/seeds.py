"""Stateless seeds. Needs no torch."""

from __future__ import annotations

import hashlib


def seed_for(seed: int, *purpose: object) -> int:
    """A 63-bit seed that depends only on its arguments: randomness needs no state to be saved, whatever the rank."""
    digest = hashlib.sha256(repr((seed, *purpose)).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1
