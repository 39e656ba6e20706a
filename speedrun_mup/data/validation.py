"""The chunks of the validation split; in a mixture without the documents that another part trains on."""

# C tokens of a validation chunk

from __future__ import annotations

import bisect
import contextlib
import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from speedrun_mup.core.errors import UserError
from speedrun_mup.data.batches import Batch, to_batch
from speedrun_mup.data.bound import cache_folder
from speedrun_mup.data.order import MixtureSchedule
from speedrun_mup.data.shards import Corpus, Mixture, Shard, ShardError
from speedrun_mup.files import printable, read_json, write_whole


class ValBatches:
    """Validation in contiguous chunks of C tokens, not aligned to documents: chunk i of a shard starts at token i * C.

    There are val_tokens // C chunks, fewer if the shards end before: see `len()` and `notes`. Split the indices over ranks
    as you like: a chunk is the same on any number of them. Raises ShardError if the shards do not hold one chunk.

    Parts of a mixture take turns by their weights until each has been through once; the chunks of a part with fewer
    than its share come again, so that the mean is that of the weights. Documents of one part's validation that another
    part trains on are left out.
    """

    def __init__(self, corpus: Corpus, val_tokens: int, chunk_tokens: int):
        self.chunk_tokens = chunk_tokens
        self.notes: list[str] = []  # what a user should know about it, a line each
        asked = val_tokens // chunk_tokens
        if isinstance(corpus, Mixture):
            self._chunks = self._mixed_chunks(corpus, asked)
        else:
            self._chunks = _val_chunks(corpus, asked, chunk_tokens)
        if not self._chunks:
            raise _no_chunk(corpus, chunk_tokens, val_tokens)
        if len(self._chunks) < asked:
            self.notes.append(
                f"{len(self) * chunk_tokens:,} tokens, as there are no more, of the {val_tokens:,} that --val-tokens asks for"
            )

    def __len__(self) -> int:
        return len(self._chunks)

    def confirm(self) -> None:
        """Wait until all shards that are read are known to be what the manifest says. ShardError if one is not."""
        for source in {id(source): source for source, _ in self._chunks}.values():
            if isinstance(source, Shard):
                source.confirm()

    def __getitem__(self, i: int) -> Batch:
        source, start = self._chunks[i]
        return to_batch(source.take(start, start + self.chunk_tokens + 1))

    def rows(self) -> Iterator[np.ndarray]:
        """The tokens of all chunks; those that follow one another in their source are one row, of which the first token is
        not predicted."""
        rows: list[tuple[Shard | _Tokens, int, int]] = []
        row_of: dict[int, int] = {}  # of a source: its last one
        for source, start in self._chunks:
            number = row_of.get(id(source), -1)
            if number >= 0 and rows[number][2] == start:
                rows[number] = source, rows[number][1], start + self.chunk_tokens
            else:
                row_of[id(source)] = len(rows)
                rows.append((source, start, start + self.chunk_tokens))
        for source, start, stop in rows:
            yield source.take(start, stop + 1)

    def _mixed_chunks(self, mixture: Mixture, asked: int) -> list[Chunk]:
        own, turns = [], MixtureSchedule(mixture.shares)
        for part, seen in zip(mixture.parts, trained_elsewhere(mixture)):
            name = printable(part.directory)
            if seen:
                self.notes.append(
                    f"{len(seen):,} validation documents of {name} are left out, as another part trains on them"
                )
                chunks = _val_chunks_without(part, seen, asked, self.chunk_tokens)
            else:
                chunks = _val_chunks(part, asked, self.chunk_tokens)
            if asked and not chunks:
                raise _no_chunk(part, self.chunk_tokens, asked * self.chunk_tokens)
            own.append(chunks)
        held = np.array([len(chunks) for chunks in own])
        total = bisect.bisect_left(range(asked), True, key=lambda n: bool((turns.taken(n) >= held).all()))
        for part, chunks, due in zip(mixture.parts, own, turns.taken(total)):
            if len(chunks) < due:
                self.notes.append(
                    f"{printable(part.directory)} has {len(chunks) * self.chunk_tokens:,} of the "
                    f"{due * self.chunk_tokens:,} tokens of its weight; they count as often as it takes"
                )
        picked = [(turns.part_of(turn), turns.taken(turn)) for turn in range(total)]
        return [own[part][taken[part] % len(own[part])] for part, taken in picked]


def _no_chunk(corpus: Corpus, chunk_tokens: int, val_tokens: int) -> ShardError:
    return ShardError(
        f"{printable(corpus.directory)}: no chunk of {chunk_tokens:,} + 1 tokens fits in val_tokens={val_tokens:,} and "
        "the val shards; lower --val-chunk-tokens or use more validation data"
    )


class _Tokens:
    """Tokens in memory, to be taken as from a shard."""

    def __init__(self, tokens: np.ndarray):
        self._tokens = tokens

    def take(self, start: int, stop: int) -> np.ndarray:
        """Tokens start to stop."""
        return self._tokens[start:stop]


Chunk = tuple[Shard | _Tokens, int]  # where it is, and its first token there


def _val_chunks(corpus: Corpus, count: int, chunk_tokens: int) -> list[Chunk]:
    """Up to `count` chunks of one corpus."""
    chunks: list[Chunk] = []
    for shard in map(corpus.open, corpus.val):
        fitting = min((len(shard) - 1) // chunk_tokens, count - len(chunks))
        if fitting > 0:
            shard.find(corpus.bos_token, corpus.vocab_size, stop=fitting * chunk_tokens + 1)
            chunks += [(shard, i * chunk_tokens) for i in range(fitting)]
    return chunks


def _val_chunks_without(corpus: Corpus, seen: Sequence[Span], count: int, chunk_tokens: int) -> list[Chunk]:
    """Up to `count` chunks of one corpus, of its documents but those that were `seen`."""
    kept: list[np.ndarray] = []
    for path in corpus.val:
        shard, at = corpus.open(path), 0
        gone = sorted((start, stop) for name, start, stop in seen if name == path.name)
        for start, stop in [*gone, (len(shard), len(shard))]:
            wanted = count * chunk_tokens + 1 - sum(map(len, kept))
            kept.append(shard.take_ids(at, max(min(start, at + wanted), at), corpus.vocab_size))
            at = stop
    tokens = np.concatenate(kept)
    source = _Tokens(tokens)
    return [(source, i * chunk_tokens) for i in range(min((len(tokens) - 1) // chunk_tokens, count))]


# ---------------------------------------------------------------------------------------------------------------------
# What several corpora share

Span = tuple[str, int, int]  # of a document: its shard's name, its first token (the BOS), the one behind its last
_VERSION = 1  # of what is kept about overlaps


def trained_elsewhere(mixture: Mixture) -> list[list[Span]]:
    """For each part, the documents of its validation that stand in the training text of another part.

    Documents are compared as a whole, by hash; one that goes on in the next shard counts as two, and is found only if the
    other part cuts it at the same place. That is one document at most for each end of a shard. All training text is read
    for it once; the answer is kept in the cache folder, by the fingerprints.
    """
    key = hashlib.sha256(repr((_VERSION, [part.fingerprint for part in mixture.parts])).encode()).hexdigest()
    try:
        kept = cache_folder() / "overlaps" / f"{key}.json"
        known = read_json(kept, "delete it")
        if len(known) != len(mixture.parts):
            raise ValueError
        return [[(str(name), int(start), int(stop)) for name, start, stop in spans] for spans in known]
    except (UserError, TypeError, ValueError):
        found = [_trained_elsewhere(mixture, number) for number in range(len(mixture.parts))]
    with contextlib.suppress(UserError):  # it would save time, no more
        write_whole(cache_folder() / "overlaps" / f"{key}.json", json.dumps(found))
    return found


def _trained_elsewhere(mixture: Mixture, number: int) -> list[Span]:
    own = mixture.parts[number]
    spans: dict[bytes, list[Span]] = {}
    for path in own.val:
        for start, stop, digest in _documents(own, path, None):
            spans.setdefault(digest, []).append((path.name, start, stop))
    sizes = np.array(sorted({stop - start for found in spans.values() for _, start, stop in found}))
    found: set[bytes] = set()
    for part in mixture.parts:
        if part.fingerprint != own.fingerprint:
            for path in part.train:
                found.update(digest for _, _, digest in _documents(part, path, sizes) if digest in spans)
    return sorted(span for digest in found for span in spans[digest])


def _documents(corpus: Corpus, path: Path, sizes: np.ndarray | None) -> Iterator[tuple[int, int, bytes]]:
    """Start, end and hash of every document in a shard that has a token, or only of those that have one of these sizes."""
    shard = corpus.open(path)
    starts = shard.find(corpus.bos_token, corpus.vocab_size)
    stops = np.append(starts[1:], len(shard))
    alike = stops - starts > 1 if sizes is None else np.isin(stops - starts, sizes)
    starts, stops = starts[alike], stops[alike]
    for start, stop in zip(starts.tolist(), stops.tolist()):
        yield start, stop, hashlib.blake2b(shard.take(start, stop).tobytes(), digest_size=16).digest()
