"""Documents in chunks: hashed, counted, without those that are empty, bad or there already."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from speedrun_mup.core.errors import UserError
from speedrun_mup.data.documents import START, Document, Position
from speedrun_mup.data.external_sort import PieceFacts
from speedrun_mup.data.tokenize_text.job import TextSettings

CHUNK_CHARS, CHUNK_DOCUMENTS = 2**19, 1000  # what one thread encodes at a time
_NAMED = 20  # bad documents, each with a line of its own


class Counts(NamedTuple):
    """Documents that do not come out as they went in: left out because empty, duplicate or bad, or repaired (`hashed`)."""

    empty: int = 0
    duplicate: int = 0
    mended: int = 0
    bad: int = 0


class Step(NamedTuple):
    """A stretch of the text that is on the disk as pieces, and what is known of the text up to its end.

    end: the position after it. documents: how many were read up to there, of all kinds. chain: a hash of those of the
    source in which it ends. pieces: by part.
    """

    end: Position = START
    documents: int = 0
    chain: int = 0
    tally: Counts = Counts()
    pieces: Mapping[str, PieceFacts] = {}


class NewDocument(NamedTuple):
    """A document that is to be encoded. number: among all that were read."""

    text: str
    digest: bytes
    number: int
    place: str
    is_val: bool


class Chunk(NamedTuple):
    """Some documents in a row, and how far reading had come after them: see `Step`."""

    documents: list[NewDocument]
    end: Position
    read: int
    chain: int
    tally: Counts


def chunks_of(
    documents: Iterator[Document], after: Step, settings: TextSettings, seen: set[bytes], is_told: bool = True
) -> Iterator[Chunk]:
    """The documents that are neither empty nor bad nor duplicates of those in `seen`, in chunks.

    A fault that stops reading is raised after a chunk with what was before it.
    """
    empty, duplicate, mended, bad = after.tally
    position, read, chain = after.end, after.documents, after.chain
    kept: list[NewDocument] = []
    given, chars, most = read, 0, settings.val_share * 2**64

    def chunk() -> Chunk:
        return Chunk(kept, position, read, chain, Counts(empty, duplicate, mended, bad))

    try:
        for end, raw, place, fault in documents:
            text, digest = hashed(raw)
            start = int.from_bytes(digest[:8])
            chain = chained(chain if end.source == position.source else 0, start) if end.documents else 0
            position, read = end, read + 1
            if fault:
                bad += 1
                if is_told:
                    name_bad(f"{place}: {fault}", bad)
            elif not text or digest in seen:
                empty, duplicate = empty + (not text), duplicate + bool(text)
            else:
                mended += text != raw
                if settings.drop_duplicates:
                    seen.add(digest)
                kept.append(NewDocument(text, digest, read, place, start < most))
                chars += len(text)
            if chars >= CHUNK_CHARS or len(kept) >= CHUNK_DOCUMENTS:
                yield chunk()
                kept, chars, given = [], 0, read
    except UserError:
        if read > given:
            yield chunk()
        raise
    if read > given:
        yield chunk()


def chained(chain: int, digest: int) -> int:
    """A hash of a row of documents, from that of all but the last, and the last one's."""
    return (chain * 0x9E3779B97F4A7C15 + digest + 1) % 2**64


def name_bad(what: str, number: int) -> None:
    """Print why a document is left out, unless many were before it. number: of bad documents, this one included."""
    if number <= _NAMED:
        more = "; more are counted only" if number == _NAMED else ""
        tqdm.write(f"left out: {what}{more}", file=sys.stdout)


def hashed(text: str) -> tuple[str, bytes]:
    """`text` with "?" for every half of a surrogate pair, which JSON can spell and UTF-8 cannot; and its BLAKE2b-128."""
    try:
        encoded = text.encode()
    except UnicodeEncodeError:
        encoded = text.encode(errors="replace")
        text = encoded.decode()
    return text, hashlib.blake2b(encoded, digest_size=16).digest()


def sort_keys(digests: Sequence[bytes], numbers: Sequence[int], settings: TextSettings) -> np.ndarray:
    """What documents are sorted by: their numbers, or hashes of text, number and seed.

    The number keeps equal documents apart, which would otherwise all come in a row.
    """
    given = np.array(numbers, np.uint64)
    if settings.order == "given":
        return given
    halves = np.frombuffer(b"".join(digests), "<u8").reshape(-1, 2)
    return _mixed(_mixed(halves[:, 1] + _mixed(np.array([settings.shuffle_seed], np.uint64))) + given)


def _mixed(x: np.ndarray) -> np.ndarray:
    """64 bits from 64 bits, well mixed: the finalizer of SplitMix64 (Steele, Lea and Flood, 2014)."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


class Row(NamedTuple):
    """A document whose tokens are known: `ids` are the bytes of them all, BOS first."""

    is_val: bool
    digest: bytes
    number: int
    ids: memoryview


class Encoded(NamedTuple):
    """A chunk whose documents have become ids. tally: with those that could not, as bad."""

    chunk: Chunk
    rows: list[Row]
    tally: Counts
