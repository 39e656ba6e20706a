"""From documents to ids on all cores, in order, and onto the disk as sorted pieces."""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
from tqdm import tqdm

from speedrun_mup.core.errors import UserError, in_a_line
from speedrun_mup.data.documents import Document, DocumentReader, Position
from speedrun_mup.data.sources import SourceError
from speedrun_mup.data.tokenize_text import progress
from speedrun_mup.data.tokenize_text.chunks import Chunk, Encoded, Row, Step, chained, chunks_of, hashed, name_bad
from speedrun_mup.data.tokenize_text.job import PARTS, Job, TextSettings
from speedrun_mup.data.tokenize_text.progress import Progress
from speedrun_mup.data.tokenizers import Tokenizer, panics_as_faults
from speedrun_mup.files import printable

PIECE_BYTES = 2**24  # of tokens that are sorted in memory
_Ids = list[memoryview | ValueError]


def _encode(chunk: Chunk, tokenizer: Tokenizer) -> _Ids:
    """Every document of a chunk as bytes of ids, BOS first, or what the tokenizer's library says against it."""
    texts = [document.text for document in chunk.documents]
    try:
        with panics_as_faults():
            encoded = tokenizer.encode_batch(texts)
    except UserError:
        raise
    except Exception as fault:
        if len(texts) == 1:
            return [ValueError(in_a_line(fault))]
        return [_encode(chunk._replace(documents=[document]), tokenizer)[0] for document in chunk.documents]
    cuts = [0, *itertools.accumulate(len(ids) + 1 for ids in encoded)]
    row = np.empty(cuts[-1], "<u2")
    row[cuts[:-1]] = tokenizer.bos_token
    for begin, end, ids in zip(cuts, cuts[1:], encoded):
        row[begin + 1 : end] = ids
    view = row.data.cast("B")
    return [view[2 * begin : 2 * end] for begin, end in itertools.pairwise(cuts)]


def _encode_in_order(chunks: Iterable[Chunk], tokenizer: Tokenizer, workers: int) -> Iterator[tuple[Chunk, _Ids]]:
    """Every chunk with its documents' ids, in order; `workers` threads encode, and few chunks wait at any time.

    A fault in reading is raised after the chunks before it.
    """
    pool = ThreadPoolExecutor(workers, thread_name_prefix="tokenize")
    waiting: deque[tuple[Chunk, Future[_Ids]]] = deque()
    try:
        try:
            for chunk in chunks:
                waiting.append((chunk, pool.submit(_encode, chunk, tokenizer)))
                if len(waiting) > 2 * workers:
                    done, encoded = waiting.popleft()
                    yield done, encoded.result()
        except UserError:
            for done, encoded in waiting:
                yield done, encoded.result()
            raise
        for done, encoded in waiting:
            yield done, encoded.result()
    finally:
        pool.shutdown(cancel_futures=True)


def read_text(job: Job, work: Progress, tokenizer: Tokenizer) -> None:
    """Bring the rest of the text to the disk as sorted pieces."""
    reader, documents = _resume(job, work)
    after = work.steps[-1] if work.steps else Step()
    seen = (
        {tag for part in PARTS for piece in work.pieces(part) for tag in piece.tags()}
        if (job.settings.drop_duplicates)
        else set()
    )
    total = sum(source.size for source in job.sources)
    bar = tqdm(total=total or None, unit="B", unit_scale=True, disable=not job.progress, initial=reader.bytes_read)
    encoded_badly, tokens = 0, 0
    with bar, PieceWriter(work, job.settings) as writer:
        chunks = chunks_of(documents, after, job.settings, seen)
        bad_before = after.tally.bad
        for chunk, encoded in _encode_in_order(chunks, tokenizer, job.workers):
            rows = []
            for document, ids in zip(chunk.documents, encoded):
                if isinstance(ids, memoryview):
                    rows.append(Row(document.is_val, document.digest, document.number, ids))
                    tokens += len(ids) // 2
                    continue
                fault = f"{document.place}: {tokenizer.name} cannot encode this document ({ids})"
                if not job.skip_bad:
                    raise SourceError(f"{fault}; fix it, or leave such documents out with --on-bad-document skip")
                encoded_badly += 1
                name_bad(fault, bad_before + encoded_badly)
            tally = chunk.tally._replace(bad=chunk.tally.bad + encoded_badly)
            writer.add(Encoded(chunk._replace(documents=[]), rows, tally))
            bar.update(reader.bytes_read - bar.n)
            bar.set_postfix_str(f"{tokens / 1e6:.1f}M tokens", refresh=False)
        writer.finish()


def _resume(job: Job, work: Progress) -> tuple[DocumentReader, Iterator[Document]]:
    """The documents after the last step. What is read again of its source must be what was read before."""
    while work.steps:
        source = work.steps[-1].end.source
        reader = dataclasses.replace(job, skip_bad=True).reader(Position(source, 0))
        documents = iter(reader)
        there = [(step.end.documents, step.chain) for step in work.steps if step.end.source == source]
        chain, count = 0, 0
        good = sum(step.end.source < source for step in work.steps)
        for until, noted in there:
            for document in itertools.islice(documents, until - count):
                if document.end.source != source:
                    break
                _, digest = hashed(document.text)
                chain, count = chained(chain, int.from_bytes(digest[:8])), count + 1
            if (count, chain) != (until, noted):
                break
            good += 1
        if good == len(work.steps):
            reader.skip_bad = job.skip_bad
            return reader, documents
        print(
            f"{printable(job.sources[source].name) if source < len(job.sources) else 'the text'} has changed; reading it again"
        )
        work.forget(good)
    reader = job.reader()
    return reader, iter(reader)


class PieceWriter:
    """Collects what was encoded, and brings it to the disk as pieces: large enough, or often enough, while reading continues.

    What is collected is kept too when the block is left by an exception, Ctrl-C included.
    """

    def __init__(self, work: Progress, settings: TextSettings):
        self._work, self._settings = work, settings
        self._collected: list[Encoded] = []
        self._bytes, self._since = 0, time.monotonic()
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="pieces")
        self._writing: Future[None] | None = None
        self._failed = False

    def __enter__(self) -> PieceWriter:
        return self

    def add(self, encoded: Encoded) -> None:
        """Take one chunk."""
        self._collected.append(encoded)
        self._bytes += sum(len(row.ids) for row in encoded.rows)
        if self._bytes >= PIECE_BYTES or time.monotonic() - self._since > progress.COMMIT_EVERY_S:
            self._write(is_end=False)

    def _write(self, is_end: bool) -> None:
        self._wait()
        collected, self._collected, self._bytes, self._since = self._collected, [], 0, time.monotonic()
        self._writing = self._pool.submit(self._add, collected, is_end)

    def _add(self, collected: Sequence[Encoded], is_end: bool) -> None:
        """Write some of the text, unless what comes before it could not be written."""
        if self._failed:
            return
        try:
            self._work.add(collected, self._settings, is_end)
        except BaseException:
            self._failed = True
            raise

    def _wait(self) -> None:
        writing, self._writing = self._writing, None
        if writing:
            writing.result()

    def finish(self) -> None:
        """Write the rest; the text is at its end."""
        self._write(is_end=True)
        self._wait()

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            self._wait()
            if kind is not None and self._collected:
                self._write(is_end=False)
                self._wait()
        finally:
            self._pool.shutdown()
