"""Which sequence comes when, in every epoch of both orders, and whose turn it is in a mixture. All but reading is here.

"record" is modded-nanogpt's record 26: sequences start at a BOS token, in file order, and the tokens between the end of a
sequence and the next BOS are skipped; later epochs shuffle the steps. "shuffled" cuts the tokens into sequences without
gaps and shuffles these again in every epoch. An order depends only on the shards, the seed and the index of a sequence in
the whole run, so it is the same on 1 GPU and on 8, and resuming needs no state but the step.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from speedrun_mup.core.seeds import seed_for
from speedrun_mup.data.shards import MIXTURE_PERIOD


def find_steps(bos: np.ndarray, shard_tokens: int, T: int, N: int) -> np.ndarray:
    """Where the micro-batches of every step that a shard holds start: (steps, N) int64, from its BOS positions (d,).

    The next micro-batch starts at the first BOS that is at least T tokens after the last one's start. A step is taken
    only while more than 2 N T + 1 tokens remain after its position, which is 0 for the first step (record 26's rule).
    """
    following = np.searchsorted(bos, bos + T).tolist()
    chain, at = [], 0
    while at < len(bos):
        chain.append(at)
        at = following[at]
    starts = bos[chain]
    steps = max(len(starts) - 1, 0) // N  # the last start is followed by no BOS that far away
    position = starts[: steps * N : N].copy()
    position[:1] = 0
    steps = int(np.count_nonzero(position + 2 * N * T + 1 < shard_tokens))
    return starts[: steps * N].reshape(steps, N)


def record_order(seed: int, epoch: int, steps: int) -> np.ndarray:
    """Which step comes when in an epoch of the record's order, (steps,); epoch 0 takes them as they come.

    By raw PCG64 draws, because NumPy's permutation() may change some day.
    """
    draws = np.random.PCG64(seed_for(seed, "epoch", epoch)).random_raw(steps)
    return np.argsort(draws, kind="stable")


def shuffled_order(seed: int, epoch: int, sequences: int) -> Permutation:
    """Which sequence comes when in an epoch of the shuffled order."""
    return Permutation(sequences, seed_for(seed, "sequences", epoch))


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
