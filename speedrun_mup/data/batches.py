"""The batches that training takes from a corpus of shards.

order.py says which sequence comes when; here they are found in the shards, read ahead, and shared by the ranks.
"""

# T tokens of a micro-batch, N micro-batches of a group (of a step, if the batch is constant)

from __future__ import annotations

import bisect
import threading
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Generator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache, partial
from itertools import count
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

import numpy as np

from speedrun_mup.config import PRESETS, TrainConfig, make_config
from speedrun_mup.core.errors import ConfigError
from speedrun_mup.data.order import MixtureSchedule, find_steps, record_order, shuffled_order
from speedrun_mup.data.shards import MIXTURE_PERIOD, Corpus, Mixture, Shard, ShardError, TokenRow

if TYPE_CHECKING:
    from torch import Tensor

Batch: TypeAlias = "tuple[Tensor, Tensor]"  # inputs (T,) int32; targets (T,) int64, the same tokens one place further


def to_batch(tokens: np.ndarray) -> Batch:
    """T + 1 tokens as inputs (T,) int32 and targets (T,) int64."""
    import torch  # here, because what only counts tokens is done sooner without it

    return torch.from_numpy(tokens[:-1].astype(np.int32)), torch.from_numpy(tokens[1:].astype(np.int64))


class EpochStats(NamedTuple):
    """What one epoch trains on: its whole steps, and tokens. `skipped` ones lie between sequences or at an end."""

    steps: int
    used: int
    skipped: int

    @property
    def share(self) -> float:
        """The part of the tokens that an epoch trains on."""
        return self.used / (self.used + self.skipped)


class Batches(ABC):
    """The micro-batches of a training run: T tokens each, found by their index in the whole run.

    They come in groups of N, and a step takes whole groups: one, unless the batch changes from step to step. `before` says
    how many micro-batches all steps before a given one take; by default step * N.
    """

    def __init__(self, T: int, N: int, before: Callable[[int], int] | None = None):
        self.T, self.N = T, N
        self.before = before or (lambda step: step * N)
        self.groups = f"groups of {N} micro-batches" if before else "steps"  # what an error counts

    @abstractmethod
    def micro_batch(self, index: int) -> Batch:
        """Micro-batch `index` of the whole run: inputs (T,) int32 and targets (T,) int64."""

    @abstractmethod
    def epoch_at(self, index: int) -> int:
        """Which epoch micro-batch `index` is of, from 0. ShardError if the data has run out by then."""

    def epoch_of(self, step: int, skipped: int = 0) -> int:
        """Which epoch `step` ends in, from 0, if `skipped` micro-batches are left out before it. Raises as `epoch_at`."""
        return self.epoch_at(self.before(step + 1) + skipped - 1)

    @abstractmethod
    def place(self, index: int) -> tuple[str, int]:
        """The shard's name and the first token in it of micro-batch `index` of the whole run."""

    @abstractmethod
    def usage(self) -> EpochStats:
        """What one epoch uses and skips. Indexes every shard."""

    @abstractmethod
    def describe(self) -> str:
        """The order, and which share of the tokens one epoch uses, for the log. Indexes no shard."""

    @abstractmethod
    def confirm(self) -> None:
        """Wait until all shards that were read are known to be what the manifest says. ShardError if one is not."""

    def stream(
        self, start_step: int, rank: int, size: int, depth: int = 2, skipped: int = 0
    ) -> Generator[list[Batch], None, None]:
        """For every step from `start_step` on, this rank's micro-batches: a contiguous part, read `depth` steps ahead.

        Reading happens in a thread that ends with the iterator; its errors surface at the step that they belong to.
        Raises as `check_ranks`.

        Args:
            start_step: the first step.
            rank: whose micro-batches.
            size: of ranks.
            depth: steps to read ahead.
            skipped: micro-batches that are left out before `start_step`.
        """
        self.check_ranks(size)
        return self._prefetch(start_step, rank, size, depth, skipped)

    def check_ranks(self, size: int) -> None:
        """ConfigError unless `size` ranks can share every step's micro-batches evenly: N must be a multiple of it."""
        if self.N % size:
            fits = ", ".join(str(n) for n in range(1, self.N + 1) if self.N % n == 0)
            raise ConfigError(
                f"{self.N} micro-batches cannot be shared by {size} processes; start one of {fits}, or give --micro-batches of "
                f"which every stage of --batch-schedule makes a multiple of {size}"
            )

    def indices(self, step: int, rank: int, size: int, skipped: int = 0) -> range:
        """Which micro-batches of the whole run `rank` of `size` takes at `step`."""
        first, end = self.before(step) + skipped, self.before(step + 1) + skipped
        share = (end - first) // size
        return range(first + rank * share, first + (rank + 1) * share)

    def _load(self, indices: range) -> list[Batch]:
        return [self.micro_batch(index) for index in indices]

    def _prefetch(
        self, start_step: int, rank: int, size: int, depth: int, skipped: int
    ) -> Generator[list[Batch], None, None]:
        pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="batches")
        try:
            ahead: deque[Future[list[Batch]]] = deque()
            for step in count(start_step):
                ahead.append(pool.submit(self._load, self.indices(step, rank, size, skipped)))
                if len(ahead) > depth:
                    yield ahead.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)


def _no_step(corpus: Corpus, tokens: int, shards: int, needs: str) -> ShardError:
    return ShardError(
        f"{corpus.directory}: {tokens:,} train tokens in {shards} shard(s) hold no step: {needs}; lower the batch or "
        "add data"
    )


def _data_ends(batches: OneCorpus, groups: int, group: int) -> ShardError:
    kind = batches.groups
    return ShardError(
        f"{batches.corpus.directory}: the data ends after {batches.epochs} epoch(s) of {groups:,} {kind}, but "
        f"{'step' if kind == 'steps' else 'group'} {group:,} (from 0) was asked for; train fewer steps, allow more epochs or "
        "add shards"
    )


class TrainBatches(Batches):
    """The record's order: micro-batches of T tokens that start at a document, N to a group.

    Epoch 0 visits the groups in file order, as record 26 does; epoch e > 0 in an order drawn from (seed, e). `epochs`
    None repeats indefinitely. Shards are opened, checked against the vocabulary and indexed when a group first needs them.
    Raises ShardError for a bad shard, or when the corpus does not hold even one group.
    """

    def __init__(
        self,
        corpus: Corpus,
        micro_batch_tokens: int,
        micro_batches: int,
        seed: int,
        epochs: int | None = None,
        before: Callable[[int], int] | None = None,
    ):
        super().__init__(micro_batch_tokens, micro_batches, before)
        self.corpus, self.seed, self.epochs = corpus, seed, epochs
        self._shards: list[Shard] = []
        self._starts: list[np.ndarray] = []  # per shard (steps, N)
        self._ends: list[int] = []  # per shard: steps of the epoch up to its end
        self._order = lru_cache(1)(partial(record_order, seed))
        self._lock = threading.Lock()  # the trainer and its prefetching thread both index
        self._locate(0)

    @property
    def steps_per_epoch(self) -> int:
        """Steps in one pass over the corpus. Indexes every shard."""
        with self._lock:
            while self._index_next_shard():
                pass
        return self._ends[-1]

    def usage(self) -> EpochStats:
        """How many tokens one epoch uses and skips. Indexes every shard."""
        used = self.steps_per_epoch * self.N * self.T
        return EpochStats(self.steps_per_epoch, used, sum(len(shard) for shard in self._shards) - used)

    def describe(self) -> str:
        """The order, and which share of the tokens one epoch uses, judged by the shards that are indexed by now."""
        with self._lock:
            indexed, total = len(self._shards), len(self.corpus.train)
            share = self._ends[-1] * self.N * self.T / sum(len(shard) for shard in self._shards)
        judged = "" if indexed == total else f", judged by {indexed} of {total} shards"
        return f"the record's; an epoch trains on {share:.1%} of the tokens, the rest lies between sequences{judged}"

    def confirm(self) -> None:
        """Wait until all shards that were read are known to be what the manifest says. ShardError if one is not."""
        for shard in list(self._shards):
            shard.confirm()

    def epoch_at(self, index: int) -> int:
        """Which epoch micro-batch `index` is of, from 0. ShardError if the data has run out by then."""
        return self._locate(index // self.N)[0]

    def place(self, index: int) -> tuple[str, int]:
        """The shard's name and the first token in it of micro-batch `index` of the whole run."""
        number, start = self._place(index)
        return self._shards[number].path.name, start

    def micro_batch(self, index: int) -> Batch:
        """Micro-batch `index` of the whole run: inputs (T,) int32 and targets (T,) int64."""
        number, start = self._place(index)
        return to_batch(self._shards[number].take(start, start + self.T + 1))

    def _place(self, index: int) -> tuple[int, int]:
        group, i = divmod(index, self.N)
        _, number, row = self._locate(group)
        return number, int(self._starts[number][row, i])

    def _locate(self, group: int) -> tuple[int, int, int]:
        """The epoch of a group, the number of the shard that holds it, and its row in that shard's index."""
        if group < 0:
            raise IndexError(f"step {group} is before the first")
        with self._lock:
            while (not self._ends or group >= self._ends[-1]) and self._index_next_shard():
                pass
            total = self._ends[-1]
            if total == 0:
                tokens, wanted = sum(len(shard) for shard in self._shards), 2 * self.N * self.T + 1
                needs = f"one of {self.N} x {self.T} needs a shard of more than {wanted:,}"
                raise _no_step(self.corpus, tokens, len(self._shards), needs)
            epoch, row = divmod(group, total)
            if self.epochs is not None and epoch >= self.epochs:
                raise _data_ends(self, total, group)
            if epoch > 0:
                row = int(self._order(epoch, total)[row])
        number = bisect.bisect_right(self._ends, row)
        return epoch, number, row - (self._ends[number - 1] if number else 0)

    def _index_next_shard(self) -> bool:
        """Open, check and index one more shard. False if there is none left."""
        if len(self._shards) == len(self.corpus.train):
            return False
        shard = self.corpus.open(self.corpus.train[len(self._shards)])
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


class ShuffledBatches(Batches):
    """The shuffled order: the tokens of all shards as one row, cut every T tokens, in a new order in each epoch.

    A sequence that does not start at a BOS gets one in front, so that sequences side by side never see one another. The
    cuts are the same in every epoch. A step may take its last sequences from the next epoch; none is left out. `epochs`
    None repeats indefinitely. Needs no index: a shard is opened when a sequence of it is first read. Raises ShardError for a
    bad shard, or when the corpus does not hold even one step.
    """

    def __init__(
        self,
        corpus: Corpus,
        micro_batch_tokens: int,
        micro_batches: int,
        seed: int,
        epochs: int | None = None,
        before: Callable[[int], int] | None = None,
    ):
        super().__init__(micro_batch_tokens, micro_batches, before)
        self.corpus, self.seed, self.epochs = corpus, seed, epochs
        self._row = TokenRow(corpus, corpus.train)
        self.sequences = (len(self._row) - 1) // self.T
        if self.sequences < self.N:
            needs = f"one of {self.N} x {self.T} needs {self.N * self.T + 1:,}"
            raise _no_step(corpus, len(self._row), len(corpus.train), needs)
        self._order = lru_cache(2)(lambda epoch: shuffled_order(seed, epoch, self.sequences))

    def usage(self) -> EpochStats:
        """How many tokens one epoch uses and skips."""
        used = self.sequences * self.T
        return EpochStats(self.sequences // self.N, used, len(self._row) - used)

    def describe(self) -> str:
        """The order, and which share of the tokens one epoch uses."""
        return f"shuffled by seed {self.seed}; an epoch trains on {self.usage().share:.1%} of the tokens"

    def confirm(self) -> None:
        """Wait until all shards that were read are known to be what the manifest says. ShardError if one is not."""
        self._row.confirm()

    def epoch_at(self, index: int) -> int:
        """Which epoch micro-batch `index` is of, from 0. ShardError if the data has run out by then."""
        return self._locate(index)[0]

    def place(self, index: int) -> tuple[str, int]:
        """The shard's name and the first token in it of micro-batch `index` of the whole run."""
        path, start = self._row.place(self._locate(index)[1])
        return path.name, start

    def micro_batch(self, index: int) -> Batch:
        """Micro-batch `index` of the whole run: inputs (T,) int32 and targets (T,) int64."""
        _, start = self._locate(index)
        tokens = self._row.take(start, start + self.T + 1)
        if tokens[0] != self.corpus.bos_token:
            tokens[1:] = tokens[:-1].copy()
            tokens[0] = self.corpus.bos_token
        return to_batch(tokens)

    def _locate(self, index: int) -> tuple[int, int]:
        """The epoch of a micro-batch, and its first token in the row."""
        if index < 0:
            raise IndexError(f"micro-batch {index} is before the first")
        epoch, place = divmod(index, self.sequences)
        if self.epochs is not None and epoch >= self.epochs:
            raise _data_ends(self, self.sequences // self.N, index // self.N)
        return epoch, self._order(epoch)(place) * self.T


class MixedBatches(Batches):
    """Micro-batches of several corpora, interleaved, each corpus in its own order and, if it is used up, in epochs of its own.

    Which one comes when depends only on the shares: nothing needs to be saved for resuming. Raises what the parts raise.
    """

    def __init__(
        self,
        mixture: Mixture,
        micro_batch_tokens: int,
        micro_batches: int,
        seed: int,
        epochs: int | None = None,
        order: str = "record",
        before: Callable[[int], int] | None = None,
    ):
        super().__init__(micro_batch_tokens, micro_batches, before)
        self.parts = [ORDERS[order](part, micro_batch_tokens, 1, seed, epochs) for part in mixture.parts]
        self._turns = MixtureSchedule(mixture.shares)

    def describe(self) -> str:
        """The order, and which share of its tokens one epoch of each part uses."""
        return "; ".join(f"{part.corpus.directory.name}: {part.describe()}" for part in self.parts)

    def confirm(self) -> None:
        """Wait until all shards that were read are known to be what the manifest says. ShardError if one is not."""
        for part in self.parts:
            part.confirm()

    def micro_batch(self, index: int) -> Batch:
        """Micro-batch `index` of the whole run: inputs (T,) int32 and targets (T,) int64."""
        part, own = self._turn(index)
        return part.micro_batch(own)

    def place(self, index: int) -> tuple[str, int]:
        """The folder's and shard's name and the first token in it of micro-batch `index`."""
        part, own = self._turn(index)
        name, start = part.place(own)
        return f"{part.corpus.directory.name}/{name}", start

    def _turn(self, index: int) -> tuple[OneCorpus, int]:
        """Whose micro-batch `index` is, and its index among that part's."""
        part = self._turns.part_of(index)
        return self.parts[part], int(self._turns.taken(index)[part])

    def epoch_at(self, index: int) -> int:
        """The highest epoch that a part has come to by micro-batch `index`."""
        taken = self._turns.taken(index + 1)
        return max(part.epoch_at(int(n) - 1) for part, n in zip(self.parts, taken) if n)

    def usage(self) -> EpochStats:
        """What the steps before any part repeats use and skip. Indexes every shard."""
        usages = [part.usage() for part in self.parts]
        longest = sum(usage.steps for usage in usages) * MIXTURE_PERIOD
        turns = min(
            bisect.bisect_right(range(longest), usage.steps, key=lambda n: self._turns.taken(n)[k]) - 1
            for k, usage in enumerate(usages)
        )
        used = turns // self.N * self.N * self.T
        return EpochStats(turns // self.N, used, sum(usage.used + usage.skipped for usage in usages) - used)


OneCorpus = TrainBatches | ShuffledBatches
ORDERS: dict[str, type[TrainBatches] | type[ShuffledBatches]] = {"record": TrainBatches, "shuffled": ShuffledBatches}


def train_batches(
    corpus: Corpus,
    micro_batch_tokens: int,
    micro_batches: int,
    seed: int,
    epochs: int | None = None,
    order: str = "record",
    before: Callable[[int], int] | None = None,
) -> Batches:
    """The micro-batches of a training run.

    Args:
        corpus: or a mixture of several.
        micro_batch_tokens: T.
        micro_batches: N, of a group.
        seed: of the order.
        epochs: after which the data ends; None repeats them.
        order: one of ORDERS.
        before: micro-batches of all steps before a step, if steps take more than one group.

    Raises:
        ShardError: for a bad shard, or data that do not hold one group.
    """
    if isinstance(corpus, Mixture):
        return MixedBatches(corpus, micro_batch_tokens, micro_batches, seed, epochs, order, before)
    return ORDERS[order](corpus, micro_batch_tokens, micro_batches, seed, epochs, before)


def batches_of(cfg: TrainConfig, corpus: Corpus) -> Batches:
    """The micro-batches that a run of these settings trains on, in the order and the groups of its schedule."""
    schedule = cfg.schedule
    before = None if schedule.is_constant else schedule.micro_batches_before
    return train_batches(corpus, cfg.micro_batch_tokens, schedule.group, cfg.seed, cfg.epochs, cfg.data_order, before)


def uses(corpus: Corpus) -> dict[str, str]:
    """For each preset, the order of its batches, which share of the tokens an epoch uses, and whether validation fits."""
    told = {}
    for name in PRESETS:
        cfg = make_config(name, {})
        try:
            batches = batches_of(cfg, corpus)
        except ShardError:
            told[name] = f"too little text for a step of {cfg.micro_batches} x {cfg.micro_batch_tokens:,} tokens"
        else:
            told[name] = f"sequences of {cfg.micro_batch_tokens:,} tokens; order {batches.describe()}"
            if not any(corpus.tokens_in(path) > cfg.val_chunk_tokens for path in corpus.val):
                told[name] += (
                    f"; too little to validate on: train with a --val-chunk-tokens below {cfg.val_chunk_tokens:,}"
                )
    return told
