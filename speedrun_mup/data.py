"""The batches that training and validation take from a corpus of shards.

Training batches are aligned to documents as in modded-nanogpt's record 26: each sequence starts at a BOS token, and the
tokens between the end of a sequence and the next BOS are skipped. Which tokens a micro-batch holds depends only on the
shards, the seed and its global index, so the order is the same on 1 GPU and on 8, and resuming needs no state but the step.
"""

# T tokens of a micro-batch, N micro-batches of a step, C tokens of a validation chunk

from __future__ import annotations

import bisect
import threading
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import count
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from speedrun_mup.core.errors import ConfigError
from speedrun_mup.core.utils import seed_for
from speedrun_mup.shards import MIXTURE_PERIOD, Corpus, Mixture, Shard, ShardError

Batch = tuple[Tensor, Tensor]  # inputs (T,) int32 and targets (T,) int64: the same tokens, one place further


def _to_batch(tokens: np.ndarray) -> Batch:
    """T + 1 tokens as inputs (T,) int32 and targets (T,) int64."""
    return torch.from_numpy(tokens[:-1].astype(np.int32)), torch.from_numpy(tokens[1:].astype(np.int64))


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


class Usage(NamedTuple):
    """What one epoch trains on: `used` = steps * N * T tokens; `skipped` ones lie between sequences or end a shard."""

    steps: int
    used: int
    skipped: int


class Batches(ABC):
    """The micro-batches of a training run: T tokens each, N to a step, found by their index in the whole run."""

    T: int
    N: int

    @abstractmethod
    def micro_batch(self, index: int) -> Batch:
        """Micro-batch `index` = step * N + i of the whole run: inputs (T,) int32 and targets (T,) int64."""

    @abstractmethod
    def epoch_of(self, step: int) -> int:
        """Which epoch `step` lies in, from 0. ShardError if the data has run out by then."""

    @abstractmethod
    def place(self, index: int) -> tuple[str, int]:
        """The shard's name and the first token in it of micro-batch `index` = step * N + i of the whole run."""

    @abstractmethod
    def usage(self) -> Usage:
        """What one epoch uses and skips. Indexes every shard."""

    def stream(self, start_step: int, rank: int, size: int, depth: int = 2) -> Generator[list[Batch], None, None]:
        """For every step from `start_step` on, this rank's contiguous N / size micro-batches, read `depth` steps ahead.

        Reading happens in a thread that ends with the iterator; its errors surface at the step that they belong to.
        Raises ConfigError if N is not a multiple of `size`.
        """
        share = self.share(size)
        return self._prefetch(start_step, range(rank * share, (rank + 1) * share), depth)

    def share(self, size: int) -> int:
        """Micro-batches of a step for each of `size` ranks. ConfigError if N is not a multiple of it."""
        if self.N % size:
            fits = ", ".join(str(n) for n in range(1, self.N + 1) if self.N % n == 0)
            raise ConfigError(f"{self.N} micro-batches cannot be shared by {size} processes; start one of {fits}")
        return self.N // size

    def _load(self, step: int, share: range) -> list[Batch]:
        return [self.micro_batch(step * self.N + i) for i in share]

    def _prefetch(self, start_step: int, share: range, depth: int) -> Generator[list[Batch], None, None]:
        pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="batches")
        try:
            ahead: deque[Future[list[Batch]]] = deque()
            for step in count(start_step):
                ahead.append(pool.submit(self._load, step, share))
                if len(ahead) > depth:
                    yield ahead.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)


class TrainBatches(Batches):
    """Document-aligned micro-batches of T tokens, N to a step, in an order that depends on nothing but the seed.

    Epoch 0 visits the steps in file order, as record 26 does; epoch e > 0 in an order drawn from (seed, e). `epochs`
    None repeats for ever. Shards are opened, checked against the vocabulary and indexed when a step first needs them.
    Raises ShardError for a bad shard, or when the corpus does not hold even one step.
    """

    def __init__(
        self, corpus: Corpus, micro_batch_tokens: int, micro_batches: int, seed: int, epochs: int | None = None
    ):
        self.corpus, self.T, self.N, self.seed, self.epochs = corpus, micro_batch_tokens, micro_batches, seed, epochs
        self._shards: list[Shard] = []
        self._starts: list[np.ndarray] = []  # per shard (steps, N)
        self._ends: list[int] = []  # per shard: steps of the epoch up to its end
        self._order: tuple[int, np.ndarray] | None = None  # the last shuffled epoch and its order
        self._lock = threading.Lock()  # the trainer and its prefetching thread both index
        self._locate(0)

    @property
    def steps_per_epoch(self) -> int:
        """Steps in one pass over the corpus. Indexes every shard."""
        with self._lock:
            while self._index_next_shard():
                pass
        return self._ends[-1]

    def usage(self) -> Usage:
        """How many tokens one epoch uses and skips. Indexes every shard."""
        used = self.steps_per_epoch * self.N * self.T
        return Usage(self.steps_per_epoch, used, sum(len(shard) for shard in self._shards) - used)

    def epoch_of(self, step: int) -> int:
        """Which epoch `step` lies in, from 0. ShardError if the data has run out by then."""
        return self._locate(step)[0]

    def place(self, index: int) -> tuple[str, int]:
        """The shard's name and the first token in it of micro-batch `index` = step * N + i of the whole run."""
        number, start = self._place(index)
        return self._shards[number].path.name, start

    def micro_batch(self, index: int) -> Batch:
        """Micro-batch `index` of the whole run: inputs (T,) int32 and targets (T,) int64."""
        number, start = self._place(index)
        return _to_batch(self._shards[number].take(start, start + self.T + 1))

    def _place(self, index: int) -> tuple[int, int]:
        step, i = divmod(index, self.N)
        _, number, row = self._locate(step)
        return number, int(self._starts[number][row, i])

    def _locate(self, step: int) -> tuple[int, int, int]:
        """The epoch of `step`, the number of the shard that holds it, and the step's row in that shard's index."""
        if step < 0:
            raise IndexError(f"step {step} is before the first")
        with self._lock:
            while (not self._ends or step >= self._ends[-1]) and self._index_next_shard():
                pass
            total = self._ends[-1]
            if total == 0:
                tokens, wanted = sum(len(shard) for shard in self._shards), 2 * self.N * self.T + 1
                raise ShardError(
                    f"{self.corpus.directory}: {tokens:,} train tokens in {len(self._shards)} shard(s) hold no step: "
                    f"one of {self.N} x {self.T} needs a shard of more than {wanted:,}; lower the batch or add data"
                )
            epoch, row = divmod(step, total)
            if self.epochs is not None and epoch >= self.epochs:
                raise ShardError(
                    f"{self.corpus.directory}: the data ends after {self.epochs} epoch(s) of {total:,} steps, but step "
                    f"{step:,} (from 0) was asked for; train fewer steps, allow more epochs or add shards"
                )
            if epoch > 0:
                row = int(self._shuffled(epoch, total)[row])
        number = bisect.bisect_right(self._ends, row)
        return epoch, number, row - (self._ends[number - 1] if number else 0)

    def _index_next_shard(self) -> bool:
        """Open, check and index one more shard. False if there is none left."""
        if len(self._shards) == len(self.corpus.train):
            return False
        shard = Shard(self.corpus.train[len(self._shards)])
        bos = shard.find(self.corpus.bos_token, self.corpus.vocab_size)
        if len(bos) == 0:
            raise ShardError(
                f"{shard.path}: none of its {len(shard):,} tokens is the BOS token {self.corpus.bos_token}, so no "
                "document starts in it; write BOS before every document"
            )
        starts = find_steps(bos, len(shard), self.T, self.N)
        self._shards.append(shard)
        self._starts.append(starts)
        self._ends.append((self._ends[-1] if self._ends else 0) + len(starts))
        return True

    def _shuffled(self, epoch: int, total: int) -> np.ndarray:
        """The order (total,) of the steps in `epoch`, by raw PCG64 draws: NumPy's permutation() may change some day."""
        if self._order is None or self._order[0] != epoch:
            draws = np.random.PCG64(seed_for(self.seed, "epoch", epoch)).random_raw(total)
            self._order = epoch, np.argsort(draws, kind="stable")
        return self._order[1]


class Turns:
    """Whose turn it is in a mixture: after any number of turns, each part has had its share as nearly as can be."""

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


class MixedBatches(Batches):
    """Micro-batches of several corpora by turns, each corpus in its own order and, if it is used up, in epochs of its own.

    Which one comes when depends only on the shares: nothing needs to be saved for resuming. Raises what TrainBatches raises.
    """

    def __init__(
        self, mixture: Mixture, micro_batch_tokens: int, micro_batches: int, seed: int, epochs: int | None = None
    ):
        self.T, self.N = micro_batch_tokens, micro_batches
        self.parts = [TrainBatches(part, micro_batch_tokens, 1, seed, epochs) for part in mixture.parts]
        self._turns = Turns(mixture.shares)

    def micro_batch(self, index: int) -> Batch:
        """Micro-batch `index` = step * N + i of the whole run: inputs (T,) int32 and targets (T,) int64."""
        part, own = self._turn(index)
        return part.micro_batch(own)

    def place(self, index: int) -> tuple[str, int]:
        """The folder's and shard's name and the first token in it of micro-batch `index` = step * N + i."""
        part, own = self._turn(index)
        name, start = part.place(own)
        return f"{part.corpus.directory.name}/{name}", start

    def _turn(self, index: int) -> tuple[TrainBatches, int]:
        """Whose micro-batch `index` is, and its index among that part's."""
        part = self._turns.part_of(index)
        return self.parts[part], int(self._turns.taken(index)[part])

    def epoch_of(self, step: int) -> int:
        """The highest epoch that a part has come to by the end of `step`."""
        taken = self._turns.taken((step + 1) * self.N)
        return max(part.epoch_of(int(n) - 1) for part, n in zip(self.parts, taken) if n)

    def usage(self) -> Usage:
        """What the steps before any part repeats use and skip. Indexes every shard."""
        usages = [part.usage() for part in self.parts]
        longest = sum(usage.steps for usage in usages) * MIXTURE_PERIOD
        turns = min(
            bisect.bisect_right(range(longest), usage.steps, key=lambda n: self._turns.taken(n)[k]) - 1
            for k, usage in enumerate(usages)
        )
        used = turns // self.N * self.N * self.T
        return Usage(turns // self.N, used, sum(usage.used + usage.skipped for usage in usages) - used)


def train_batches(
    corpus: Corpus, micro_batch_tokens: int, micro_batches: int, seed: int, epochs: int | None = None
) -> Batches:
    """The micro-batches of a corpus or a mixture. Raises ShardError."""
    if isinstance(corpus, Mixture):
        return MixedBatches(corpus, micro_batch_tokens, micro_batches, seed, epochs)
    return TrainBatches(corpus, micro_batch_tokens, micro_batches, seed, epochs)


class ValBatches:
    """Validation in contiguous chunks of C tokens, not aligned to documents: chunk i of a shard starts at token i * C.

    There are val_tokens // C chunks, fewer if the shards end before: `len()` tells. Parts of a mixture take turns. Split the
    indices over ranks as you like: a chunk is the same on any number of them. Raises ShardError if the shards do not hold
    one chunk.
    """

    def __init__(self, corpus: Corpus, val_tokens: int, chunk_tokens: int):
        self.chunk_tokens = chunk_tokens
        self._chunks = _val_chunks(corpus, val_tokens // chunk_tokens, chunk_tokens)
        if not self._chunks:
            raise ShardError(
                f"{corpus.directory}: no chunk of {chunk_tokens:,} + 1 tokens fits in val_tokens={val_tokens:,} and "
                "the val shards; lower --val-chunk-tokens or use more validation data"
            )

    def __len__(self) -> int:
        return len(self._chunks)

    def __getitem__(self, i: int) -> Batch:
        shard, start = self._chunks[i]
        return _to_batch(shard.take(start, start + self.chunk_tokens + 1))


def _val_chunks(corpus: Corpus, count: int, chunk_tokens: int) -> list[tuple[Shard, int]]:
    """Up to `count` chunks: their shard and their first token. A mixture's parts take turns until one has no more."""
    chunks: list[tuple[Shard, int]] = []
    if isinstance(corpus, Mixture):
        turns = Turns(corpus.shares)
        waiting = [iter(_val_chunks(part, count, chunk_tokens)) for part in corpus.parts]
        while len(chunks) < count and (chunk := next(waiting[turns.part_of(len(chunks))], None)):
            chunks.append(chunk)
        return chunks
    for shard in map(Shard, corpus.val):
        fitting = min((len(shard) - 1) // chunk_tokens, count - len(chunks))
        if fitting > 0:
            shard.find(corpus.bos_token, corpus.vocab_size, stop=fitting * chunk_tokens + 1)
            chunks += [(shard, i * chunk_tokens) for i in range(fitting)]
    return chunks
