"""Which sequence comes when: a permutation that takes no memory, and whose turn it is in a mixture."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from speedrun_mup.data.shards import MIXTURE_PERIOD


def _mixed(x: int) -> int:
    """64 bits from 64 bits, well mixed: the finalizer of SplitMix64 (Steele, Lea and Flood, 2014)."""
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & _64_BITS
    x = (x ^ x >> 27) * 0x94D049BB133111EB & _64_BITS
    return x ^ x >> 31


_64_BITS = 2**64 - 1
_ROUNDS = 8


class Permutation:
    """A permutation of 0 to count - 1 that takes no memory, drawn by a seed.

    A Feistel network over pairs of numbers, not bits, walked until it comes back below count (Black and Rogaway, 2002).

    Args:
        count: how many there are; at least 1.
        seed: 63 bits, as `seed_for` gives.
    """

    def __init__(self, count: int, seed: int):
        self.count = count
        self._left = math.isqrt(count - 1) + 1
        self._right = -(-count // self._left)
        self._keys = [_mixed(seed + number * 0x9E3779B97F4A7C15 & _64_BITS) for number in range(_ROUNDS)]

    def __call__(self, place: int) -> int:
        """Which one stands at `place`."""
        while True:
            left, right = divmod(place, self._right)
            for number, key in enumerate(self._keys):
                if number % 2:
                    right = (right + _mixed(key ^ left)) % self._right
                else:
                    left = (left + _mixed(key ^ right)) % self._left
            place = left * self._right + right
            if place < self.count:
                return place


class MixtureSchedule:
    """Whose turn it is in a mixture: after any number of turns, each part has had its share as closely as possible."""

    def __init__(self, shares: Sequence[int]):
        taken = np.zeros((MIXTURE_PERIOD + 1, len(shares)), np.int64)
        for turn in range(MIXTURE_PERIOD):
            owed = (turn + 1) * np.array(shares) - taken[turn] * MIXTURE_PERIOD
            taken[turn + 1] = taken[turn]
            taken[turn + 1, np.argmax(owed)] += 1
        self._taken = taken

    def taken(self, turns: int) -> np.ndarray:
        """How many of the first `turns` turns were each part's: (parts,) int64."""
        periods, rest = divmod(turns, MIXTURE_PERIOD)
        return periods * self._taken[-1] + self._taken[rest]

    def part_of(self, turn: int) -> int:
        """Whose turn `turn` is."""
        return int(np.argmax(self.taken(turn + 1) - self.taken(turn)))
