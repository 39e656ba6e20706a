"""Records of bytes put in the order of their keys, in bounded memory: sorted pieces on disk, then merged (external sorting).

A piece is a file that is written once, whole; its size and SHA-256 are kept by its writer, which also says when it must
be on the disk. In it are n keys, ascending (uint64), n ends of records (int64), n tags (16 bytes each), then the records, all
in the order of the keys.
"""

from __future__ import annotations

import hashlib
import itertools
import os
from collections.abc import Iterator, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from speedrun_mup.files import new_file, open_regular

TAG_BYTES = 16
_HEAD_BYTES = 8 + 8 + TAG_BYTES  # of a record: key, end and tag
_SAMPLES = 16  # keys that a block's bounds are judged by


@dataclass(frozen=True)
class PieceFacts:
    """What is known of a piece. records: how many. size: bytes of the file. sha256: of the file."""

    records: int
    size: int
    sha256: str


@dataclass(frozen=True)
class Piece:
    """One file of sorted records. It is opened for each read: a merge of thousands needs no thousands of open files."""

    path: Path
    facts: PieceFacts

    def sync(self) -> None:
        """Bring it to the disk. OSError if that fails."""
        with open(self.path, "rb") as file:
            os.fsync(file.fileno())

    def is_whole(self) -> bool:
        """Whether the file holds, to the last bit, what was written."""
        try:
            with open_regular(self.path) as file:
                same_size = os.fstat(file.fileno()).st_size == self.facts.size
                return same_size and hashlib.file_digest(file, "sha256").hexdigest() == self.facts.sha256
        except OSError:
            return False

    def keys(self, start: int, stop: int) -> np.ndarray:
        """Keys of the records from `start` to `stop`, ascending."""
        return np.frombuffer(self._read(8 * start, 8 * (stop - start)), "<u8")

    def ends(self, start: int, stop: int) -> np.ndarray:
        """Where these records end in the piece's data, in bytes."""
        return np.frombuffer(self._read(8 * (self.facts.records + start), 8 * (stop - start)), "<i8")

    def bounds(self, start: int, stop: int) -> np.ndarray:
        """Where record `start` begins, and where it and all others before `stop` end."""
        return self.ends(start - 1, stop) if start else np.concatenate([[0], self.ends(0, stop)])

    def tags(self) -> Iterator[bytes]:
        """The tag of every record."""
        step = 2**16
        for start in range(0, self.facts.records, step):
            count = min(step, self.facts.records - start)
            data = self._read(16 * self.facts.records + TAG_BYTES * start, TAG_BYTES * count)
            yield from (data[at : at + TAG_BYTES] for at in range(0, len(data), TAG_BYTES))

    def records(self, start: int, stop: int) -> tuple[np.ndarray, list[memoryview]]:
        """Sizes and bytes of the records from `start` to `stop`, in one read."""
        bounds = self.bounds(start, stop)
        begin, cuts = int(bounds[0]), (bounds - bounds[0]).tolist()
        view = memoryview(self._read(_HEAD_BYTES * self.facts.records + begin, cuts[-1]))
        return np.diff(bounds), [view[a:b] for a, b in itertools.pairwise(cuts)]

    def _read(self, at: int, size: int) -> bytes:
        with open(self.path, "rb", buffering=0) as file:
            file.seek(at)
            data = file.read(size)
            while len(data) < size:  # one call gives 2 GiB at most
                more = file.read(size - len(data))
                if not more:
                    raise OSError(0, "it was cut while it was read", str(self.path))
                data += more
        return data


def write_piece(path: Path, keys: np.ndarray, tags: Sequence[bytes], records: Sequence[bytes | memoryview]) -> Piece:
    """Write records with a key (uint64) and a tag each as one piece, which is not synced. OSError if that fails."""
    order = np.argsort(keys, kind="stable")
    places = order.tolist()
    ends = np.cumsum(np.fromiter(map(len, records), np.int64, len(records))[order])
    head = keys[order].astype("<u8").tobytes() + ends.astype("<i8").tobytes() + b"".join([tags[k] for k in places])
    data = b"".join([records[k] for k in places])
    digest = hashlib.sha256(head)
    digest.update(data)
    with new_file(path) as file:
        file.write(head)
        file.write(data)
    return Piece(path, PieceFacts(len(records), len(head) + len(data), digest.hexdigest()))


def split_piece(piece: Piece, chosen: Set[bytes], others: Path, same: Path) -> tuple[list[Piece], list[Piece]]:
    """Make two pieces of one.

    Args:
        piece: what stays as it is.
        chosen: tags of the records that are taken out.
        others: where a piece of the other records is written.
        same: where a piece of the records with these tags is written.

    Returns:
        The pieces of the others and of the same, in lists that are empty where there are no such records.
    """
    count = piece.facts.records
    tags = list(piece.tags())
    if chosen.isdisjoint(tags):
        return [piece], []
    keys, (_, records) = piece.keys(0, count), piece.records(0, count)

    def some(path: Path, which: list[int]) -> list[Piece]:
        return [write_piece(path, keys[which], [tags[k] for k in which], [records[k] for k in which])]

    found = [[k for k in range(count) if (tags[k] in chosen) == wanted] for wanted in (False, True)]
    return some(others, found[0]) if found[0] else [], some(same, found[1])


class SortedBlock(NamedTuple):
    """Some records in the order of their keys: how long each is, in bytes, and all of them in a row."""

    sizes: np.ndarray
    data: bytes


class Merge:
    """The records of several pieces in the order of their keys, equal ones in the order of the pieces.

    block_bytes: about what is read and held at a time.
    """

    def __init__(self, pieces: Sequence[Piece], block_bytes: int):
        self._pieces = pieces
        edges = _edges(pieces, block_bytes)
        # bounds[b, p]: the first record of piece p that belongs to block b or a later one
        self._bounds = np.zeros((len(edges) + 2, len(pieces)), np.int64)
        for number, piece in enumerate(pieces):
            self._bounds[1:-1, number] = np.searchsorted(piece.keys(0, piece.facts.records), edges, side="right")
            self._bounds[-1, number] = piece.facts.records

    def sizes(self, skip: int) -> Iterator[np.ndarray]:
        """How long the records after the first `skip` are, in bytes, block by block, without reading them."""
        for slices, left in self._slices(skip):
            sizes = [np.diff(piece.bounds(start, stop)) for piece, start, stop in slices]
            yield np.concatenate(sizes)[_order(slices)[left:]]

    def blocks(self, skip: int) -> Iterator[SortedBlock]:
        """The records after the first `skip`."""
        for slices, left in self._slices(skip):
            sizes, records = [], []
            for piece, start, stop in slices:
                lengths, views = piece.records(start, stop)
                sizes.append(lengths)
                records += views
            order = _order(slices)[left:]
            yield SortedBlock(np.concatenate(sizes)[order], b"".join([records[k] for k in order.tolist()]))

    def _slices(self, skip: int) -> Iterator[tuple[list[tuple[Piece, int, int]], int]]:
        """What a block has of each piece, and how many of its records are to be left out."""
        for first, last in itertools.pairwise(self._bounds):
            count = int((last - first).sum())
            if count > skip:
                yield [part for part in zip(self._pieces, first.tolist(), last.tolist()) if part[1] < part[2]], skip
            skip = max(0, skip - count)


def _order(slices: Sequence[tuple[Piece, int, int]]) -> np.ndarray:
    return np.argsort(np.concatenate([piece.keys(start, stop) for piece, start, stop in slices]), kind="stable")


def _edges(pieces: Sequence[Piece], block_bytes: int) -> np.ndarray:
    """The last keys of all blocks but the last, judged by the keys at every so-manieth byte of each piece."""
    step = max(1, block_bytes // _SAMPLES)
    samples, carried = [np.zeros(0, np.uint64)], 0
    for piece in pieces:
        ends = piece.ends(0, piece.facts.records) + carried
        samples.append(np.repeat(piece.keys(0, piece.facts.records), np.diff(ends // step, prepend=0)))
        carried = int(ends[-1]) % step
    return np.unique(np.sort(np.concatenate(samples))[_SAMPLES - 1 :: _SAMPLES])
