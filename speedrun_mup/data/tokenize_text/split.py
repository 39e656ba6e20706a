"""Which documents are for validation, and what a text must hold to have both parts."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from speedrun_mup.core.errors import ConfigError, UserError
from speedrun_mup.data.external_sort import Piece, split_piece
from speedrun_mup.data.sources import Source, SourceError
from speedrun_mup.data.tokenize_text.chunks import NewDocument
from speedrun_mup.data.tokenize_text.job import PARTS, Job
from speedrun_mup.data.tokenize_text.progress import Progress
from speedrun_mup.files import printable

FEWEST_VAL, _MOST_OF = 16, 5  # documents for validation whatever the share, but no more than one in so many for that


class NothingToKeep(Exception):
    """The text has nothing for a corpus; what was begun goes away."""

    def __init__(self, reason: UserError):
        self.reason = reason


def split_parts(job: Job, work: Progress) -> dict[str, list[Piece]]:
    """The pieces of every part. The documents with the `Smallest` hashes are for validation and the one with the largest
    for training, whatever the share."""
    pieces = {part: work.pieces(part) for part in PARTS}
    there = [part for part in PARTS if pieces[part]]
    if not there:
        raise NothingToKeep(no_text(job.sources))
    part, other = there[0], PARTS[there[0] == "train"]
    chosen = {max(_tags(pieces["val"]))} if part == "val" else _smallest_in_train(pieces)
    if chosen:
        paths = [work.directory / f"split_{number:06d}" for number in range(len(pieces[part]))]
        found = [
            split_piece(piece, chosen, path.with_suffix(f".{part}.piece"), path.with_suffix(f".{other}.piece"))
            for piece, path in zip(pieces[part], paths)
        ]
        pieces[part], others = (list(itertools.chain(*some)) for some in zip(*found))
        pieces[other] = pieces[other] + others
    if not pieces["train"] or not pieces["val"]:
        raise NothingToKeep(one_document())
    return pieces


def _tags(pieces: Sequence[Piece]) -> Iterator[bytes]:
    return (tag for piece in pieces for tag in piece.tags())


def _smallest_in_train(pieces: Mapping[str, Sequence[Piece]]) -> set[bytes]:
    """The hashes of the documents that the share left to training and that are for validation all the same."""
    smallest, there = Smallest(), set()
    for tag in _tags(pieces["val"]):
        smallest.take(tag)
        there.add(tag)
        if len(there) == FEWEST_VAL:
            return set()
    for tag in _tags(pieces["train"]):
        smallest.take(tag)
    return smallest.chosen() - there


class Smallest:
    """The documents with the smallest hashes, which are for validation whatever the share.

    They are FEWEST_VAL, but one in _MOST_OF different documents at most, and one at least. As the share takes those with
    the smallest hashes, too, a validation is a part of every larger one.
    """

    def __init__(self) -> None:
        self._held: dict[bytes, NewDocument | None] = {}
        self._distinct: set[bytes] = set()  # no more of them than matter

    def take(self, digest: bytes, document: NewDocument | None = None) -> NewDocument | None:
        """Look at a document; what comes back, it or one from before, is none of the smallest, and no copy of one."""
        if len(self._distinct) < FEWEST_VAL * _MOST_OF:
            self._distinct.add(digest)
        if digest in self._held:
            return None
        if len(self._held) == FEWEST_VAL and digest > max(self._held):
            return document
        self._held[digest] = document
        return self._held.pop(max(self._held)) if len(self._held) > FEWEST_VAL else None

    def chosen(self) -> set[bytes]:
        """The hashes, once all documents were looked at."""
        return set(sorted(self._held)[: max(1, len(self._distinct) // _MOST_OF)])

    def rest(self) -> list[NewDocument]:
        """The documents that were held back in vain."""
        chosen = self.chosen()
        return [document for digest, document in self._held.items() if document and digest not in chosen]


def no_text(sources: Sequence[Source]) -> SourceError:
    """That the sources hold no document at all."""
    return SourceError(f"{describe(sources)}: no text in there, but empty or bad documents at most; check the paths")


def one_document() -> ConfigError:
    """That there is no second document for the other part."""
    return ConfigError(
        "the text is one document, or copies of one; training and validation need one each: give more text (--suffix "
        "reads more files of a folder), or cut text files with a smaller --passage"
    )


def describe(sources: Sequence[Source]) -> str:
    """One line about the sources, for the manifest and for messages."""
    names = ", ".join(printable(Path(source.name).name if source.size else source.name, 60) for source in sources[:3])
    more = f" and {len(sources) - 3:,} more" if len(sources) > 3 else ""
    return f"{names}{more}, {sum(source.size for source in sources) / 1e6:,.1f} MB"
