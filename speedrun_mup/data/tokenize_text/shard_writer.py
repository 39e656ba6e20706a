"""From sorted pieces to shards."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
from tqdm import tqdm

from speedrun_mup.core.errors import ConfigError
from speedrun_mup.data.external_sort import Merge, Piece, SortedBlock
from speedrun_mup.data.shards import ShardFacts, shard_header
from speedrun_mup.data.tokenize_text.job import Job
from speedrun_mup.data.tokenize_text.progress import Progress
from speedrun_mup.data.tokenizers import Tokenizer
from speedrun_mup.files import new_file

_BLOCK_BYTES, _SLICE_BYTES = 2**22, 2**14  # of tokens that are merged at a time, at least; and from each piece, if many


def write_shards(job: Job, work: Progress, part: str, pieces: Sequence[Piece], tokenizer: Tokenizer) -> None:
    """Merge the pieces of a part into its shards, after those that are there."""
    written = sum(documents for _, documents in work.shards[part].values())
    total = sum(piece.facts.records for piece in pieces)
    merge = Merge(pieces, max(_BLOCK_BYTES, len(pieces) * _SLICE_BYTES))
    plan = deque(plan_shards(merge.sizes(written), job.settings.shard_tokens))
    bar = tqdm(total=total, initial=written, unit=" documents", desc=f"{part} shards", disable=not job.progress)
    with bar, contextlib.closing(ShardWriter(work, part, tokenizer, plan)) as writer:
        for block in merge.blocks(written):
            writer.add(block)
            bar.update(len(block.sizes))


class Planned(NamedTuple):
    """What a shard is going to hold."""

    documents: int
    tokens: int


def plan_shards(sizes: Iterable[np.ndarray], shard_tokens: int) -> Iterator[Planned]:
    """The shards for documents of these sizes in bytes, in a row: each is ended by the first document that fills it."""
    documents = tokens = 0
    for some in sizes:
        ends = np.cumsum(some) // 2
        first, begin = 0, 0
        while (filling := int(np.searchsorted(ends, begin + shard_tokens - tokens))) < len(ends):
            yield Planned(documents + filling + 1 - first, tokens + int(ends[filling]) - begin)
            documents, tokens, first, begin = 0, 0, filling + 1, int(ends[filling])
        documents, tokens = documents + len(ends) - first, tokens + int(ends[-1]) - begin
    if documents:
        yield Planned(documents, tokens)


class ShardWriter:
    """Writes the shards of one part ("train" or "val") as planned.

    A shard is begun again unless it was finished: a part of one is never taken up. Its facts are those of what is written,
    checked before it is, so nothing is read back.
    """

    def __init__(self, work: Progress, part: str, tokenizer: Tokenizer, plan: deque[Planned]):
        self._work, self._part, self._plan = work, part, plan
        self._vocab_size, self._bos_token = tokenizer.vocab_size, tokenizer.bos_token
        self._file: BinaryIO | None = None
        self._sha256, self._left, self._bos_count = hashlib.sha256(), 0, 0

    @property
    def _path(self) -> Path:
        return self._work.directory / f"{self._part}_{len(self._work.shards[self._part]):06d}.bin"

    def add(self, block: SortedBlock) -> None:
        """Write some documents."""
        ends, first, begin = np.cumsum(block.sizes), 0, 0
        while first < len(ends):
            if self._file is None:
                self._file = new_file(self._path)
                self._sha256, self._left, self._bos_count = hashlib.sha256(), self._plan[0].documents, 0
                self._write(memoryview(shard_header(self._plan[0].tokens)))
            last = min(len(ends), first + self._left)
            end = int(ends[last - 1])
            data = memoryview(block.data)[begin:end]
            ids = np.frombuffer(data, "<u2")
            if ids.max() >= self._vocab_size:
                raise ConfigError(f"the tokenizer gave id {ids.max()}, but has {self._vocab_size}; choose another one")
            self._bos_count += int(np.count_nonzero(ids == self._bos_token))
            self._write(data)
            self._left -= last - first
            first, begin = last, end
            if self._left == 0:
                self.finish()

    def _write(self, data: memoryview) -> None:
        if self._file:
            self._file.write(data)
            self._sha256.update(data)

    def finish(self) -> None:
        """End the shard that grows and note it."""
        if self._file:
            self._file.flush()
            os.fsync(self._file.fileno())
        self.close()
        planned = self._plan.popleft()
        facts = ShardFacts(planned.tokens, self._bos_count, self._sha256.hexdigest())
        self._work.shards[self._part][self._path.name] = facts, planned.documents
        self._work.save_if_due()

    def close(self) -> None:
        """Let go of the file."""
        if self._file:
            self._file.close()
        self._file = None
