"""Text of any kind to a corpus of shards: parallel, in constant memory, resumable, and always with the same bytes.

The work is done in a folder inside the one asked for, and what is whole moves out of it at the end, the manifest last. First
the text is read, and its tokens are written as sorted pieces (`external_sort`); then the pieces are merged into shards. From
time to time progress.json notes them with their hashes, after they were synced. A process that dies is started again with
the same command: it believes the note as far as the hashes and the text bear it out, and goes on from there. The order
and the part of a document depend on its text, its number and the seed alone, so the result is the same byte for byte.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import itertools
import json
import math
import os
import shutil
import sys
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from tqdm import tqdm

from speedrun_mup.core.errors import ConfigError, UserError, in_a_line
from speedrun_mup.data.documents import (
    LARGEST_PASSAGE,
    START,
    STDIN,
    Document,
    DocumentReader,
    Position,
    Source,
    SourceError,
    find_sources,
)
from speedrun_mup.data.external_sort import Block, Merge, Piece, PieceFacts, split_piece, write_piece
from speedrun_mup.data.shards import (
    MANIFEST,
    TOKENIZER_FILE,
    UNFINISHED,
    Corpus,
    ShardFacts,
    file_sha256,
    open_corpus,
    shard_header,
    sole_writer,
    write_manifest,
)
from speedrun_mup.data.tokenizers import (
    BpeTokenizer,
    Tokenizer,
    find_tokenizer,
    panics_as_faults,
    read_tokenizer,
    trained_vocab_size,
)
from speedrun_mup.files import new_file, printable, read_json, sync_folder, write_whole

PROGRESS, SOURCES = "progress.json", "sources.json"
PARTS = ("train", "val")
ORDERS = ("shuffled", "given")
COMMIT_EVERY_S = 10.0
MOST_WORKERS = 1024
FEWEST_VAL, _MOST_OF = 16, 5  # documents for validation whatever the share, but no more than one in so many for that
_CHUNK_CHARS, _CHUNK_DOCUMENTS = 2**19, 1000  # what one thread encodes at a time
_PIECE_BYTES = 2**24  # of tokens that are sorted in memory
_BLOCK_BYTES, _SLICE_BYTES = 2**22, 2**14  # of tokens that are merged at a time, at least; and from each piece, if many
_TRAINING_CHARS = 50_000_000  # of text, from its start, for train:N
_NAMED = 20  # bad documents, each with a line of its own
_NOT_FOREIGN = ("lost+found",)  # what an empty folder may hold, beside hidden files


@dataclass(frozen=True)
class TextSettings:
    """What decides on the shards. tokenizer: gpt2, byte, train:N, or a file or folder that holds one.

    bos: the document-opening token of a Hugging Face tokenizer that does not say. field: of records. passage_chars: text
    files are cut into documents of about this size, 0 not at all; None is 512 for bytes and 2048 for other tokenizers,
    about 512 tokens either way. val_share: of the documents, chosen by their hash. shard_tokens: where a shard ends.
    drop_duplicates: keep the first of equal documents; takes about 100 bytes of memory per document. order: shuffled, by
    the documents' hashes and `shuffle_seed`, or given. suffixes: of files in folders that are plain text, too.
    """

    tokenizer: str = "gpt2"
    bos: str | None = None
    field: str = "text"
    passage_chars: int | None = None
    val_share: float = 0.01
    shard_tokens: int = 100_000_000
    drop_duplicates: bool = False
    order: str = "shuffled"
    shuffle_seed: int = 0
    suffixes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        passage = self.passage_chars
        problems = [
            f"{name}={printable(getattr(self, name), 40)} must be {what}"
            for name, ok, what in (
                ("passage_chars", passage is None or 0 <= passage <= LARGEST_PASSAGE, f"from 0 to {LARGEST_PASSAGE}"),
                ("val_share", 0 < self.val_share < 1, "between 0 and 1"),
                ("shard_tokens", 0 < self.shard_tokens <= 2**30, f"from 1 to {2**30}"),
                ("order", self.order in ORDERS, f"one of {', '.join(ORDERS)}"),
                ("shuffle_seed", 0 <= self.shuffle_seed < 2**63, "from 0 to 2^63 - 1"),
            )
            if not ok
        ]
        if problems:
            raise ConfigError("; ".join(problems))

    @property
    def passage(self) -> int:
        """Characters of a passage, 0 for whole files."""
        if self.passage_chars is None:
            return 512 if self.tokenizer == "byte" else 2048
        return self.passage_chars


def tokenize_text(
    paths: Sequence[str],
    out: Path,
    settings: TextSettings,
    workers: int | None = None,
    progress: bool = False,
    skip_bad: bool = False,
) -> Corpus:
    """Write the documents of `paths` into `out` as a corpus. Goes on where a killed process stopped.

    Returns at once if `out` already holds just this, which of standard input nobody can tell: it needs a new `out`.

    Args:
        paths: files, folders, "-" for standard input, hf://OWNER/NAME/CONFIG.
        out: a folder that is empty or not there yet; a mount point, the working folder and a link to a folder will do.
        settings: what decides on the shards.
        workers: threads; None is one per core.
        progress: show bars.
        skip_bad: name and count documents that cannot be read or encoded, and leave them out, instead of raising.

    Raises:
        ConfigError, SourceError, ShardError: what is done is kept.
    """
    workers = os.cpu_count() or 1 if workers is None else workers
    if not 1 <= workers <= MOST_WORKERS:
        raise ConfigError(f"workers={workers} must be at least 1, and at most {MOST_WORKERS}")
    found = find_sources(paths, out, skip_bad, settings.suffixes)
    sources = found.sources
    if found.left_out:
        print(f"left out: {found.told()}")
    job = _Job(tuple(paths), tuple(sources), settings, found.left_out.total(), workers, progress, skip_bad)
    if (done := _done_before(out, job)) is not None:
        return done
    if (former := Path(f"{out}.unfinished") / PROGRESS).exists():
        print(f"{printable(former.parent)} was begun by an earlier version, and is not gone on with; delete it")
    made = not out.exists()
    tokenizer = _ready_tokenizer(sources, settings)
    with sole_writer(out / UNFINISHED):
        if (done := _done_before(out, job)) is not None:  # by a process that ended just now
            return done
        try:
            if not (out / UNFINISHED / MANIFEST).exists():
                _write_corpus(job, out / UNFINISHED, tokenizer)
            corpus = _move_out(out)
        except _NothingToKeep as fault:
            shutil.rmtree(out / UNFINISHED)
            if made:
                with contextlib.suppress(OSError):
                    out.rmdir()
            raise fault.reason from None
    return corpus


@dataclass(frozen=True)
class _Job:
    """What was asked for."""

    paths: tuple[str, ...]
    sources: tuple[Source, ...]
    settings: TextSettings
    files_left_out: int
    workers: int
    progress: bool
    skip_bad: bool

    @property
    def identity(self) -> str:
        """Equal for the same command on the same or on mended text. A tokenizer in a file or a folder counts by its bytes."""
        path = Path(self.settings.tokenizer)
        path = path / TOKENIZER_FILE if path.is_dir() else path
        digest = file_sha256(path) if path.is_file() else ""
        return _digest([self.paths, dataclasses.asdict(self.settings), digest])

    @property
    def recipe(self) -> str:
        """Equal for equal sources and settings."""
        return _digest([self.identity, [dataclasses.astuple(source) for source in self.sources]])

    def reader(self, start: Position = START) -> DocumentReader:
        """Reads the documents from `start` on."""
        return DocumentReader(self.sources, self.settings.field, self.settings.passage, start, self.skip_bad)


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


class _NothingToKeep(Exception):
    """The text has nothing for a corpus; what was begun goes away."""

    def __init__(self, reason: UserError):
        self.reason = reason


def _done_before(out: Path, job: _Job) -> Corpus | None:
    """The corpus that was asked for, if `out` holds it. ConfigError if `out` cannot be written or holds something else."""
    unfinished = out / UNFINISHED
    try:
        if "\0" in str(out):
            raise ValueError("a name with a null byte")
        if unfinished.is_symlink():
            raise ConfigError(f"{printable(unfinished)} is a link; delete it")
        begun = unfinished.exists()
        if any(source.name == STDIN for source in job.sources):
            for there in out / MANIFEST, unfinished / PROGRESS:
                if there.exists():
                    raise ConfigError(
                        f"{printable(there)} exists, and standard input cannot be resumed; choose a new --out"
                    )
        if (out / MANIFEST).exists():
            corpus = open_corpus(out)
            if corpus.recipe != job.recipe:
                raise _other(out) if corpus.order else _older(out)
            if begun:
                shutil.rmtree(unfinished, ignore_errors=True)
            return corpus
        if (unfinished / MANIFEST).exists():
            if _manifest(unfinished)["recipe"] != job.recipe:
                raise _other(out)
        elif out.is_symlink() and not out.exists():
            raise ConfigError(f"{printable(out)} is a link to nothing; choose another --out")
        elif out.exists():
            foreign = [] if not out.is_dir() else sorted(set(os.listdir(out)) - set(_NOT_FOREIGN))
            foreign = [name for name in foreign if not name.startswith(".")]
            if foreign or not out.is_dir():
                what = f" (there is {printable(foreign[0], 60)})" if foreign else ""
                raise ConfigError(f"{printable(out)} is not empty{what}; choose another --out, or delete it")
    except (OSError, ValueError) as fault:
        raise ConfigError(
            f"{printable(out)}: cannot write: {getattr(fault, 'strerror', None) or fault}; choose another --out"
        ) from None
    return None


def _manifest(directory: Path) -> dict[str, Any]:
    """What the manifest of a corpus says that waits to be moved."""
    advice = f"delete {printable(directory)} and start again"
    manifest = read_json(directory / MANIFEST, advice)
    parts = [manifest.get(part) for part in PARTS] if isinstance(manifest, dict) else [None]
    if not all(isinstance(part, dict) for part in parts) or not isinstance(manifest.get("recipe"), str):
        raise ConfigError(f"{printable(directory / MANIFEST)} is no manifest; {advice}")
    return manifest


def _move_out(out: Path) -> Corpus:
    """Move what is whole from the folder of the unfinished into `out`, the manifest last."""
    unfinished = out / UNFINISHED
    manifest = _manifest(unfinished)
    for name in [*(name for part in PARTS for name in manifest[part]), TOKENIZER_FILE]:
        if Path(name).name == name and (unfinished / name).exists():
            (unfinished / name).replace(out / name)
    sync_folder(out)
    (unfinished / MANIFEST).replace(out / MANIFEST)
    sync_folder(out)
    shutil.rmtree(unfinished, ignore_errors=True)
    return open_corpus(out)


def _older(directory: Path) -> ConfigError:
    return ConfigError(
        f"{printable(directory)} holds a corpus of another kind or of an earlier version; train on it as it is, choose "
        "another --out, or delete it"
    )


def _other(directory: Path) -> ConfigError:
    return ConfigError(f"{printable(directory)} comes from other text or settings; choose another --out, or delete it")


def _no_text(sources: Sequence[Source]) -> SourceError:
    return SourceError(f"{_describe(sources)}: no text in there, but empty or bad documents at most; check the paths")


def _write_corpus(job: _Job, directory: Path, tokenizer: Tokenizer | None) -> None:
    """Everything but moving it out: read, sort, and write shards and manifest."""
    work = _Work.restore(directory, job)
    if tokenizer:
        tokenizer.save(directory)
    else:
        tokenizer = _trained_tokenizer(job, work)
    work.note()
    write_whole(directory / SOURCES, json.dumps([dataclasses.astuple(source) for source in job.sources]))
    try:
        if not work.is_read:
            _read(job, work, tokenizer)
        for part, pieces in _split(job, work).items():
            _write_shards(job, work, part, pieces, tokenizer)
    except BaseException:
        with contextlib.suppress(OSError, UserError):  # what stopped the work is what matters
            work.note()
        raise
    write_manifest(
        directory,
        tokenizer=tokenizer.name,
        vocab_size=tokenizer.vocab_size,
        bos_token=tokenizer.bos_token,
        source=_describe(job.sources),
        recipe=job.recipe,
        order="given" if job.settings.order == "given" else f"shuffled by seed {job.settings.shuffle_seed}",
        tally=work.steps[-1].tally._asdict() | {"files": job.files_left_out},
        **{part: work.facts(part) for part in PARTS},
    )


def _split(job: _Job, work: _Work) -> dict[str, list[Piece]]:
    """The pieces of every part. The documents with the `_Smallest` hashes are for validation and the one with the largest
    for training, whatever the share."""
    pieces = {part: work.pieces(part) for part in PARTS}
    there = [part for part in PARTS if pieces[part]]
    if not there:
        raise _NothingToKeep(_no_text(job.sources))
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
        raise _NothingToKeep(_one_document())
    return pieces


def _tags(pieces: Sequence[Piece]) -> Iterator[bytes]:
    return (tag for piece in pieces for tag in piece.tags())


def _smallest_in_train(pieces: Mapping[str, Sequence[Piece]]) -> set[bytes]:
    """The hashes of the documents that the share left to training and that are for validation all the same."""
    smallest, there = _Smallest(), set()
    for tag in _tags(pieces["val"]):
        smallest.take(tag)
        there.add(tag)
        if len(there) == FEWEST_VAL:
            return set()
    for tag in _tags(pieces["train"]):
        smallest.take(tag)
    return smallest.chosen() - there


class _Smallest:
    """The documents with the smallest hashes, which are for validation whatever the share.

    They are FEWEST_VAL, but one in _MOST_OF different documents at most, and one at least. As the share takes those with
    the smallest hashes, too, a validation is a part of every larger one.
    """

    def __init__(self) -> None:
        self._held: dict[bytes, _Document | None] = {}
        self._distinct: set[bytes] = set()  # no more of them than matter

    def take(self, digest: bytes, document: _Document | None = None) -> _Document | None:
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

    def rest(self) -> list[_Document]:
        """The documents that were held back in vain."""
        chosen = self.chosen()
        return [document for digest, document in self._held.items() if document and digest not in chosen]


def _one_document() -> ConfigError:
    return ConfigError(
        "the text is one document, or copies of one; training and validation need one each: give more text (--suffix "
        "reads more files of a folder), or cut text files with a smaller --passage"
    )


def _describe(sources: Sequence[Source]) -> str:
    names = ", ".join(printable(Path(source.name).name if source.size else source.name, 60) for source in sources[:3])
    more = f" and {len(sources) - 3:,} more" if len(sources) > 3 else ""
    return f"{names}{more}, {sum(source.size for source in sources) / 1e6:,.1f} MB"


def _ready_tokenizer(sources: Sequence[Source], settings: TextSettings) -> Tokenizer | None:
    """The tokenizer, or None if it is to be trained. What cannot be is told here, before anything is written."""
    if trained_vocab_size(settings.tokenizer) is None:
        return find_tokenizer(settings.tokenizer, settings.bos)
    if settings.bos is not None:
        raise ConfigError(
            f"tokenizer={settings.tokenizer} has a BOS token of its own; leave out --bos {printable(settings.bos)}"
        )
    if any(source.name == STDIN for source in sources):
        raise ConfigError(f"tokenizer={settings.tokenizer} reads the text twice; write standard input to a file first")
    return None


def _trained_tokenizer(job: _Job, work: _Work) -> Tokenizer:
    """The tokenizer for train:N, trained and saved in the folder, where it is found as long as its text is the same."""
    path = work.directory / TOKENIZER_FILE
    if path.exists() and work.trained_on and (not work.text_changed or work.trained_on == _training_digest(job)):
        return read_tokenizer(path)
    work.forget(0)
    digest = hashlib.sha256()
    vocab_size = int(job.settings.tokenizer.removeprefix("train:"))
    texts = _training_text(job, digest)
    first = next(texts)  # here, because its faults are ours, not the trainer's
    try:
        tokenizer = BpeTokenizer.train(itertools.chain([first], texts), vocab_size)
    except ConfigError as fault:
        raise ConfigError(str(fault).replace("bpe:", "train:")) from None  # as the flag has it here
    tokenizer.save(work.directory)
    work.trained_on = digest.hexdigest()
    return tokenizer


def _training_text(job: _Job, digest: Any) -> Iterator[str]:
    """The first documents of the train part, as `_split` makes it; `digest` is updated with their hashes."""
    left, smallest = _TRAINING_CHARS, _Smallest()
    largest: _Document | None = None

    def given(document: _Document) -> str:
        nonlocal left
        digest.update(document.digest)
        left -= len(document.text)
        return document.text

    for chunk in _chunks(iter(job.reader()), Step(), job.settings, set(), is_told=False):
        for document in chunk.documents:
            largest = document if largest is None or document.digest > largest.digest else largest
            other = smallest.take(document.digest, document)  # the smallest are held back, until there are smaller ones
            if other and not other.is_val:
                yield given(other)
        if left <= 0:
            return
    if largest is None:
        raise _NothingToKeep(_no_text(job.sources))
    if largest.digest in smallest.chosen():
        raise _NothingToKeep(_one_document())
    for document in smallest.rest():
        if not document.is_val:
            yield given(document)
    if largest.is_val and left == _TRAINING_CHARS:
        yield given(largest)


def _training_digest(job: _Job) -> str:
    digest = hashlib.sha256()
    deque(_training_text(job, digest), maxlen=0)
    return digest.hexdigest()


# ---------------------------------------------------------------------------------------------------------------------
# What is done already


class Tally(NamedTuple):
    """Documents that do not come out as they went in: left out because empty, duplicate or bad, or mended (`_hashed`)."""

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
    tally: Tally = Tally()
    pieces: Mapping[str, PieceFacts] = {}


@dataclass
class _Work:
    """What is done in a folder, as progress.json has it.

    is_read: the text is at its end. text_changed: since it was read. trained_on: a hash of the text that the tokenizer
    comes from. shards: the finished ones of every part, with the documents in each.
    """

    directory: Path
    identity: str
    steps: list[Step] = field(default_factory=list)
    is_read: bool = False
    text_changed: bool = False
    trained_on: str = ""
    shards: dict[str, dict[str, tuple[ShardFacts, int]]] = field(default_factory=lambda: {part: {} for part in PARTS})
    _synced: int = 0  # how many steps have their pieces on the disk
    _noted_at: float = -math.inf

    def note_in_time(self) -> None:
        """Write down how far it is, unless that was done some seconds ago."""
        if time.monotonic() - self._noted_at >= COMMIT_EVERY_S:
            self.note()

    def note(self) -> None:
        """Bring the pieces to the disk, then write down how far it is. Shards must be on the disk already."""
        for number in range(self._synced, len(self.steps)):
            for part, facts in self.steps[number].pieces.items():
                Piece(self._piece(number, part), facts).sync()
        self._synced = len(self.steps)
        noted = {
            "identity": self.identity,
            "is_read": self.is_read,
            "trained_on": self.trained_on,
            "steps": [
                [*step[:-1], {part: dataclasses.asdict(facts) for part, facts in step.pieces.items()}]
                for step in self.steps
            ],
            "shards": {
                part: {name: [dataclasses.asdict(facts), documents] for name, (facts, documents) in shards.items()}
                for part, shards in self.shards.items()
            },
        }
        sync_folder(self.directory)
        write_whole(self.directory / PROGRESS, json.dumps({"noted": noted, "sha256": _digest(noted)}))
        self._noted_at = time.monotonic()

    @classmethod
    def restore(cls, directory: Path, job: _Job) -> _Work:
        """What was noted, as far as its files are whole and the text before the note is the same.

        ConfigError if another command began this folder.
        """
        work = cls(directory, job.identity)
        if (directory / PROGRESS).exists():
            try:
                saved = read_json(directory / PROGRESS, "", most=2**31)
                if saved["sha256"] != _digest(saved["noted"]):
                    raise ValueError
                work._take(saved["noted"])
            except (UserError, KeyError, TypeError, ValueError, AttributeError):
                print(f"{printable(directory / PROGRESS)} is damaged; starting from the beginning")
                work = cls(directory, job.identity)
        if work.identity != job.identity:
            raise _other(directory)
        work._believe(job)
        kept = {piece.path.name for part in PARTS for piece in work.pieces(part)}
        for path in directory.glob("*.piece"):
            if path.name not in kept:
                path.unlink()
        return work

    def _take(self, noted: Any) -> None:
        self.identity, self.is_read, self.trained_on = (
            str(noted["identity"]),
            noted["is_read"] is True,
            noted["trained_on"],
        )
        for end, documents, chain, tally, pieces in noted["steps"]:
            facts = {part: PieceFacts(**piece) for part, piece in pieces.items()}
            self.steps.append(
                Step(Position(*map(int, end)), int(documents), int(chain), Tally(*map(int, tally)), facts)
            )
        self._synced = len(self.steps)
        for part in PARTS:
            for name, (facts, documents) in noted["shards"][part].items():
                self.shards[part][name] = ShardFacts(**facts), int(documents)

    def _believe(self, job: _Job) -> None:
        """Forget what does not hold: from the first source that changed, or the first file that is not whole."""
        try:
            noted = [Source(*source) for source in read_json(self.directory / SOURCES, "", most=2**31)]
        except (UserError, TypeError):
            noted = []
        same = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(noted, job.sources)))
        self.text_changed = not same == len(noted) == len(job.sources)
        before = [step for step in self.steps if step.end <= Position(same, 2**62)]
        if self.text_changed and self.steps:
            print(f"the text has changed from its source {same + 1:,} on; reading that again")
        self.forget(len(before), even_if_read=self.text_changed)
        for number, step in enumerate(self.steps):
            if not all(Piece(self._piece(number, part), facts).is_whole() for part, facts in step.pieces.items()):
                print(
                    f"{printable(self.directory)}: damaged after document {self._documents_at(number):,}; reading on there"
                )
                self.forget(number)
                break
        for part in PARTS:
            for number, (name, (facts, _)) in enumerate(list(self.shards[part].items())):
                path = self.directory / name
                if not path.is_file() or file_sha256(path) != facts.sha256:
                    self.shards[part] = dict(list(self.shards[part].items())[:number])
                    break

    def forget(self, steps: int, even_if_read: bool = True) -> None:
        """Take back all but the first `steps`, and with them the shards, which hold something of each."""
        if steps < len(self.steps) or (even_if_read and self.is_read):
            self.is_read, self.shards = False, {part: {} for part in PARTS}
        del self.steps[steps:]
        self._synced = min(self._synced, steps)

    def _documents_at(self, number: int) -> int:
        return self.steps[number - 1].documents if number else 0

    def _piece(self, number: int, part: str) -> Path:
        return self.directory / f"{part}_{number:06d}.piece"

    def pieces(self, part: str) -> list[Piece]:
        """The pieces of a part, in the order of the text."""
        return [
            Piece(self._piece(number, part), step.pieces[part])
            for number, step in enumerate(self.steps)
            if part in step.pieces
        ]

    def facts(self, part: str) -> dict[str, ShardFacts]:
        """Of all finished shards of a part."""
        return {name: facts for name, (facts, _) in self.shards[part].items()}

    def add(self, read: Sequence[_Encoded], settings: TextSettings, is_end: bool) -> None:
        """Write what was read as pieces, and note it."""
        pieces = {}
        for part in PARTS:
            rows = [row for one in read for row in one.rows if row.is_val == (part == "val")]
            if rows:
                _, digests, numbers, records = zip(*rows)
                path = self._piece(len(self.steps), part)
                pieces[part] = write_piece(path, _keys(digests, numbers, settings), digests, records).facts
        if read:
            last = read[-1].chunk
            self.steps.append(Step(last.end, last.read, last.chain, read[-1].tally, pieces))
        self.is_read = is_end
        self.note_in_time()


# ---------------------------------------------------------------------------------------------------------------------
# From documents to ids


class _Document(NamedTuple):
    """A document that is to be encoded. number: among all that were read."""

    text: str
    digest: bytes
    number: int
    place: str
    is_val: bool


class Chunk(NamedTuple):
    """Some documents in a row, and how far reading had come after them: see `Step`."""

    documents: list[_Document]
    end: Position
    read: int
    chain: int
    tally: Tally


def _chunks(
    documents: Iterator[Document], after: Step, settings: TextSettings, seen: set[bytes], is_told: bool = True
) -> Iterator[Chunk]:
    """The documents that are neither empty nor bad nor duplicates of those in `seen`, in chunks.

    A fault that stops reading is raised after a chunk with what was before it.
    """
    empty, duplicate, mended, bad = after.tally
    position, read, chain = after.end, after.documents, after.chain
    kept: list[_Document] = []
    given, chars, most = read, 0, settings.val_share * 2**64

    def chunk() -> Chunk:
        return Chunk(kept, position, read, chain, Tally(empty, duplicate, mended, bad))

    try:
        for end, raw, place, fault in documents:
            text, digest = _hashed(raw)
            start = int.from_bytes(digest[:8])
            chain = _chained(chain if end.source == position.source else 0, start) if end.documents else 0
            position, read = end, read + 1
            if fault:
                bad += 1
                if is_told:
                    _name_bad(f"{place}: {fault}", bad)
            elif not text or digest in seen:
                empty, duplicate = empty + (not text), duplicate + bool(text)
            else:
                mended += text != raw
                if settings.drop_duplicates:
                    seen.add(digest)
                kept.append(_Document(text, digest, read, place, start < most))
                chars += len(text)
            if chars >= _CHUNK_CHARS or len(kept) >= _CHUNK_DOCUMENTS:
                yield chunk()
                kept, chars, given = [], 0, read
    except UserError:
        if read > given:
            yield chunk()
        raise
    if read > given:
        yield chunk()


def _chained(chain: int, digest: int) -> int:
    """A hash of a row of documents, from that of all but the last, and the last one's."""
    return (chain * 0x9E3779B97F4A7C15 + digest + 1) % 2**64


def _name_bad(what: str, number: int) -> None:
    if number <= _NAMED:
        more = "; more are counted only" if number == _NAMED else ""
        tqdm.write(f"left out: {what}{more}", file=sys.stdout)


def _hashed(text: str) -> tuple[str, bytes]:
    """`text` with "?" for every half of a surrogate pair, which JSON can spell and UTF-8 cannot; and its BLAKE2b-128."""
    try:
        encoded = text.encode()
    except UnicodeEncodeError:
        encoded = text.encode(errors="replace")
        text = encoded.decode()
    return text, hashlib.blake2b(encoded, digest_size=16).digest()


def _keys(digests: Sequence[bytes], numbers: Sequence[int], settings: TextSettings) -> np.ndarray:
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


class _Row(NamedTuple):
    """A document whose tokens are known: `ids` are the bytes of them all, BOS first."""

    is_val: bool
    digest: bytes
    number: int
    ids: memoryview


class _Encoded(NamedTuple):
    """A chunk whose documents have become ids. tally: with those that could not, as bad."""

    chunk: Chunk
    rows: list[_Row]
    tally: Tally


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


def _read(job: _Job, work: _Work, tokenizer: Tokenizer) -> None:
    """Bring the rest of the text to the disk as sorted pieces."""
    reader, documents = _go_on(job, work)
    after = work.steps[-1] if work.steps else Step()
    seen = (
        {tag for part in PARTS for piece in work.pieces(part) for tag in piece.tags()}
        if (job.settings.drop_duplicates)
        else set()
    )
    total = sum(source.size for source in job.sources)
    bar = tqdm(total=total or None, unit="B", unit_scale=True, disable=not job.progress, initial=reader.bytes_read)
    encoded_badly, tokens = 0, 0
    with bar, _Writer(work, job.settings) as writer:
        chunks = _chunks(documents, after, job.settings, seen)
        bad_before = after.tally.bad
        for chunk, encoded in _encode_in_order(chunks, tokenizer, job.workers):
            rows = []
            for document, ids in zip(chunk.documents, encoded):
                if isinstance(ids, memoryview):
                    rows.append(_Row(document.is_val, document.digest, document.number, ids))
                    tokens += len(ids) // 2
                    continue
                fault = f"{document.place}: {tokenizer.name} cannot encode this document ({ids})"
                if not job.skip_bad:
                    raise SourceError(f"{fault}; mend it, or leave such documents out with --on-bad-document skip")
                encoded_badly += 1
                _name_bad(fault, bad_before + encoded_badly)
            tally = chunk.tally._replace(bad=chunk.tally.bad + encoded_badly)
            writer.add(_Encoded(chunk._replace(documents=[]), rows, tally))
            bar.update(reader.bytes_read - bar.n)
            bar.set_postfix_str(f"{tokens / 1e6:.1f}M tokens", refresh=False)
        writer.finish()


def _go_on(job: _Job, work: _Work) -> tuple[DocumentReader, Iterator[Document]]:
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
                _, digest = _hashed(document.text)
                chain, count = _chained(chain, int.from_bytes(digest[:8])), count + 1
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


class _Writer:
    """Collects what was encoded, and brings it to the disk as pieces: large enough, or often enough, beside the reading.

    What is collected is kept too when the block is left by an exception, Ctrl-C included.
    """

    def __init__(self, work: _Work, settings: TextSettings):
        self._work, self._settings = work, settings
        self._collected: list[_Encoded] = []
        self._bytes, self._since = 0, time.monotonic()
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="pieces")
        self._writing: Future[None] | None = None
        self._failed = False

    def __enter__(self) -> _Writer:
        return self

    def add(self, encoded: _Encoded) -> None:
        """Take one chunk."""
        self._collected.append(encoded)
        self._bytes += sum(len(row.ids) for row in encoded.rows)
        if self._bytes >= _PIECE_BYTES or time.monotonic() - self._since > COMMIT_EVERY_S:
            self._write(is_end=False)

    def _write(self, is_end: bool) -> None:
        self._wait()
        collected, self._collected, self._bytes, self._since = self._collected, [], 0, time.monotonic()
        self._writing = self._pool.submit(self._add, collected, is_end)

    def _add(self, collected: Sequence[_Encoded], is_end: bool) -> None:
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


# ---------------------------------------------------------------------------------------------------------------------
# From pieces to shards


def _write_shards(job: _Job, work: _Work, part: str, pieces: Sequence[Piece], tokenizer: Tokenizer) -> None:
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

    A shard is begun anew unless it was finished: a part of one is never taken up. Its facts are those of what is written,
    checked before it is, so nothing is read back.
    """

    def __init__(self, work: _Work, part: str, tokenizer: Tokenizer, plan: deque[Planned]):
        self._work, self._part, self._plan = work, part, plan
        self._vocab_size, self._bos_token = tokenizer.vocab_size, tokenizer.bos_token
        self._file: BinaryIO | None = None
        self._sha256, self._left, self._bos_count = hashlib.sha256(), 0, 0

    @property
    def _path(self) -> Path:
        return self._work.directory / f"{self._part}_{len(self._work.shards[self._part]):06d}.bin"

    def add(self, block: Block) -> None:
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
        self._work.note_in_time()

    def close(self) -> None:
        """Let go of the file."""
        if self._file:
            self._file.close()
        self._file = None
