"""Text of any kind to a corpus of shards: parallel, in constant memory, resumable, and always with the same bytes.

The corpus grows in a folder beside the one asked for, OUT.unfinished, and takes its name only when it is whole. Every few
seconds the shards are flushed and progress.json notes how far they and the sources have come. A process that dies is
started again with the same command: it cuts the shards back to that note and reads on from there. Since a document's
tokens, part and place depend on nothing but the documents before it, the result is the same byte for byte.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import os
import shutil
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from tqdm import tqdm

from speedrun_mup.core.errors import ConfigError
from speedrun_mup.documents import START, STDIN, DocumentReader, Position, Source, SourceError, find_sources
from speedrun_mup.shards import (
    HEADER_BYTES,
    MANIFEST,
    TOKENIZER_FILE,
    Corpus,
    ShardFacts,
    file_sha256,
    measure_shard,
    open_corpus,
    shard_header,
    sole_writer,
    write_atomically,
    write_manifest,
)
from speedrun_mup.tokenizers import BpeTokenizer, Tokenizer, find_tokenizer, read_tokenizer, trained_vocab_size

PROGRESS = "progress.json"
COMMIT_EVERY_S = 5.0
_CHUNK_CHARS, _CHUNK_DOCUMENTS = 2**19, 1000  # what one thread encodes at a time
_TRAINING_CHARS = 50_000_000  # of text, from its start, for train:N


@dataclass(frozen=True)
class TextSettings:
    """What decides on the shards. tokenizer: gpt2, byte, train:N, or a file or folder that holds one.

    bos: the document-opening token of a Hugging Face tokenizer that does not say. field: of records. passage_chars: text
    files are cut into documents of about this size, 0 not at all; None is 512 for bytes and 2048 for other tokenizers,
    about 512 tokens either way. val_share: of the documents, chosen by their hash. shard_tokens: where a shard ends.
    drop_duplicates: keep the first of equal documents; takes about 100 bytes of memory per document.
    """

    tokenizer: str = "gpt2"
    bos: str | None = None
    field: str = "text"
    passage_chars: int | None = None
    val_share: float = 0.01
    shard_tokens: int = 100_000_000
    drop_duplicates: bool = False

    def __post_init__(self) -> None:
        problems = [
            f"{name}={getattr(self, name)} must be {what}"
            for name, ok, what in (
                ("passage_chars", self.passage_chars is None or self.passage_chars >= 0, "at least 0"),
                ("val_share", 0 < self.val_share < 1, "between 0 and 1"),
                ("shard_tokens", 0 < self.shard_tokens <= 2**30, f"from 1 to {2**30}"),
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
    paths: Sequence[str], out: Path, settings: TextSettings, workers: int | None = None, progress: bool = False
) -> Corpus:
    """Write the documents of `paths` into `out` as a corpus. Goes on where a killed process stopped.

    paths: files, folders, "-" for standard input, hf://OWNER/NAME/CONFIG. workers: threads; None is one per core.
    Returns at once if `out` already holds just this, which of standard input nobody can tell: it needs a new `out`.
    Raises ConfigError, SourceError, ShardError; what is done is kept.
    """
    workers = os.cpu_count() or 1 if workers is None else workers
    if workers < 1:
        raise ConfigError(f"workers={workers} must be at least 1")
    sources = find_sources(paths)
    recipe = _recipe(sources, settings)
    unfinished = out.with_name(out.name + ".unfinished")
    if _reads_stdin(sources):
        for there in out / MANIFEST, unfinished:
            if there.exists():
                raise ConfigError(f"{there} exists, and standard input cannot be resumed; choose a new --out")
    if (out / MANIFEST).exists():
        corpus = open_corpus(out)
        if corpus.recipe == recipe:
            return corpus
        raise _other(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{out} is not empty; choose another --out, or delete it")
    tokenizer = _ready_tokenizer(sources, settings)
    with sole_writer(unfinished):
        if not (unfinished / MANIFEST).exists():
            _write_corpus(sources, unfinished, recipe, settings, tokenizer, workers, progress)
        elif open_corpus(unfinished).recipe != recipe:
            raise _other(unfinished)
        (unfinished / PROGRESS).unlink(missing_ok=True)
        unfinished.rename(out)
    (out / ".lock").unlink(missing_ok=True)
    return open_corpus(out)


def _other(directory: Path) -> ConfigError:
    return ConfigError(f"{directory} comes from other text or settings; choose another --out, or delete it")


def _no_text(sources: Sequence[Source]) -> SourceError:
    return SourceError(f"{_describe(sources)}: no text in there, but empty documents at most; check the paths")


def _reads_stdin(sources: Sequence[Source]) -> bool:
    return any(source.name == STDIN for source in sources)


def _recipe(sources: Sequence[Source], settings: TextSettings) -> str:
    """Equal for equal sources and settings. A tokenizer in a file or a folder counts by its bytes."""
    path = Path(settings.tokenizer)
    path = path / TOKENIZER_FILE if path.is_dir() else path
    digest = file_sha256(path) if path.is_file() else ""
    parts = [[dataclasses.astuple(source) for source in sources], dataclasses.asdict(settings), digest]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _write_corpus(
    sources: Sequence[Source],
    directory: Path,
    recipe: str,
    settings: TextSettings,
    tokenizer: Tokenizer | None,
    workers: int,
    progress: bool,
) -> None:
    start, parts, tally = _restore(directory, recipe)
    _commit(directory, recipe, start, parts, tally)
    if tokenizer:
        tokenizer.save(directory)
    else:
        tokenizer = _trained_tokenizer(sources, directory, settings)
    writers = {part: PartWriter(directory, part, tokenizer, settings.shard_tokens, parts[part]) for part in parts}
    reader = DocumentReader(sources, settings.field, settings.passage, start)
    total = sum(source.size for source in sources)
    bar = tqdm(total=total or None, unit="B", unit_scale=True, disable=not progress, initial=reader.bytes_read)
    committed = time.monotonic()
    with bar, closing(writers["train"]), closing(writers["val"]):
        for chunk, encoded in _encode_in_order(_chunks(reader, start, settings, tally), tokenizer, workers):
            tally = chunk.tally
            for ids, is_val in zip(encoded, chunk.is_val):
                writers["val" if is_val else "train"].add(ids)
            bar.update(reader.bytes_read - bar.n)
            bar.set_postfix_str(
                f"{sum(state.total_tokens for state in parts.values()) / 1e6:.1f}M tokens", refresh=False
            )
            if time.monotonic() - committed > COMMIT_EVERY_S:
                for writer in writers.values():
                    writer.flush()
                _commit(directory, recipe, chunk.end, parts, tally)
                committed = time.monotonic()
        facts = {part: writer.finish() for part, writer in writers.items()}
    for part, shards in facts.items():
        if not shards:
            shutil.rmtree(directory)
            if not any(facts.values()):
                raise _no_text(sources)
            raise ConfigError(f"no document fell into the {part} part; give more text, or another --val-share")
    write_manifest(
        directory,
        tokenizer=tokenizer.name,
        vocab_size=tokenizer.vocab_size,
        bos_token=tokenizer.bos_token,
        source=_describe(sources),
        recipe=recipe,
        tally=tally._asdict(),
        **facts,
    )


def _describe(sources: Sequence[Source]) -> str:
    names = ", ".join(Path(source.name).name if source.size else source.name for source in sources[:3])
    more = f" and {len(sources) - 3:,} more" if len(sources) > 3 else ""
    return f"{names}{more}, {sum(source.size for source in sources) / 1e6:,.1f} MB"


def _ready_tokenizer(sources: Sequence[Source], settings: TextSettings) -> Tokenizer | None:
    """The tokenizer, or None if it is to be trained. What cannot be is told here, before anything is written."""
    if trained_vocab_size(settings.tokenizer) is None:
        return find_tokenizer(settings.tokenizer, settings.bos)
    if settings.bos is not None:
        raise ConfigError(f"tokenizer={settings.tokenizer} has a BOS token of its own; leave out --bos {settings.bos}")
    if _reads_stdin(sources):
        raise ConfigError(f"tokenizer={settings.tokenizer} reads the text twice; write standard input to a file first")
    return None


def _trained_tokenizer(sources: Sequence[Source], directory: Path, settings: TextSettings) -> Tokenizer:
    """The tokenizer for train:N, trained and saved in `directory`, where it is found the next time."""
    if (directory / TOKENIZER_FILE).exists():
        return read_tokenizer(directory / TOKENIZER_FILE)
    vocab_size = int(settings.tokenizer.removeprefix("train:"))
    texts = _training_text(sources, settings)
    first = next(texts, None)
    if first is None:
        shutil.rmtree(directory)
        raise _no_text(sources)
    tokenizer = BpeTokenizer.train(itertools.chain([first], texts), vocab_size)
    tokenizer.save(directory)
    return tokenizer


def _training_text(sources: Sequence[Source], settings: TextSettings) -> Iterator[str]:
    """The first documents of the train part."""
    left = _TRAINING_CHARS
    for chunk in _chunks(DocumentReader(sources, settings.field, settings.passage), START, settings, Tally()):
        for text, is_val in zip(chunk.texts, chunk.is_val):
            if not is_val:
                yield text
                left -= len(text)
        if left <= 0:
            return


# ---------------------------------------------------------------------------------------------------------------------
# From documents to ids


class Tally(NamedTuple):
    """Documents that do not come out as they went in: left out because empty or duplicate, or mended (`_mended`)."""

    empty: int = 0
    duplicate: int = 0
    mended: int = 0


class Chunk(NamedTuple):
    """Some documents in a row, where reading them ended, and the tally of all documents up to there."""

    texts: list[str]
    is_val: list[bool]
    end: Position
    tally: Tally


def _chunks(reader: DocumentReader, start: Position, settings: TextSettings, tally: Tally) -> Iterator[Chunk]:
    """Documents from `start` on, where the tally is `tally`, without empty ones, in chunks.

    To know duplicates, it reads the documents before `start` again, which costs no encoding.
    """
    seen: set[bytes] = set()
    if settings.drop_duplicates and start > START:
        for position, text in DocumentReader(reader.sources, reader.field, reader.passage_chars):
            if position > start:
                break
            seen.add(_hash(_mended(text)))
    chunk, chars, position = Chunk([], [], start, tally), 0, start
    empty, duplicate, mended = tally
    for position, raw in reader:
        text = _mended(raw)
        digest = _hash(text)
        if not text or digest in seen:
            empty, duplicate = empty + (not text), duplicate + bool(text)
            continue
        mended += text != raw
        if settings.drop_duplicates:
            seen.add(digest)
        chunk.texts.append(text)
        chunk.is_val.append(int.from_bytes(digest[:8]) < settings.val_share * 2**64)
        chars += len(text)
        if chars >= _CHUNK_CHARS or len(chunk.texts) >= _CHUNK_DOCUMENTS:
            yield chunk._replace(end=position, tally=Tally(empty, duplicate, mended))
            chunk, chars = Chunk([], [], position, tally), 0
    yield chunk._replace(end=position, tally=Tally(empty, duplicate, mended))


def _mended(text: str) -> str:
    """`text` with "?" for every half of a surrogate pair, which JSON can spell and UTF-8 cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode(errors="replace").decode()
    return text


def _hash(text: str) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


def _encode_in_order(
    chunks: Iterable[Chunk], tokenizer: Tokenizer, workers: int
) -> Iterator[tuple[Chunk, list[np.ndarray]]]:
    """Every chunk with its documents' ids, in order; `workers` threads encode, and few chunks wait at any time."""
    pool = ThreadPoolExecutor(workers, thread_name_prefix="tokenize")
    try:
        waiting: deque[tuple[Chunk, Future[list[np.ndarray]]]] = deque()
        for chunk in chunks:
            waiting.append((chunk, pool.submit(tokenizer.encode_batch, chunk.texts)))
            if len(waiting) > 2 * workers:
                done, encoded = waiting.popleft()
                yield done, encoded.result()
        for done, encoded in waiting:
            yield done, encoded.result()
    finally:
        pool.shutdown(cancel_futures=True)


# ---------------------------------------------------------------------------------------------------------------------
# From ids to shards


@dataclass
class PartState:
    """How far one part has come: finished shards, and tokens and documents of the one that grows."""

    finished: dict[str, ShardFacts] = field(default_factory=dict)
    tokens: int = 0

    @property
    def total_tokens(self) -> int:
        """Tokens up to here, over all shards."""
        return self.tokens + sum(facts.tokens for facts in self.finished.values())


class PartWriter:
    """Writes the shards of one part ("train" or "val"), each ended by the first document that fills it.

    Takes up a shard that has grown to `state.tokens` before, and cuts off what was written after that.
    """

    def __init__(self, directory: Path, part: str, tokenizer: Tokenizer, shard_tokens: int, state: PartState):
        self.directory, self.part, self.shard_tokens, self.state = directory, part, shard_tokens, state
        self._vocab_size, self._bos_token = tokenizer.vocab_size, tokenizer.bos_token
        self._bos = np.array([tokenizer.bos_token], "<u2").tobytes()
        self._file: BinaryIO | None = None
        if state.tokens:
            self._file = open(self._path, "r+b")
            self._file.truncate(HEADER_BYTES + 2 * state.tokens)
            self._file.seek(0, os.SEEK_END)

    @property
    def _path(self) -> Path:
        return self.directory / f"{self.part}_{len(self.state.finished):06d}.bin"

    def add(self, ids: np.ndarray) -> None:
        """Write one document: BOS, then its ids (n,), each below the vocabulary's size."""
        if self._file is None:
            self._file = open(self._path, "wb")
            self._file.write(bytes(HEADER_BYTES))
        self._file.write(self._bos)
        self._file.write(ids.astype("<u2").data)
        self.state.tokens += 1 + len(ids)
        if self.state.tokens >= self.shard_tokens:
            self.finish()

    def flush(self) -> None:
        """Bring everything to the disk."""
        if self._file:
            self._file.flush()
            os.fsync(self._file.fileno())

    def finish(self) -> dict[str, ShardFacts]:
        """End the shard that grows, if there is one; returns what is known of all of them."""
        if self._file:
            self._file.seek(0)
            self._file.write(shard_header(self.state.tokens))
            self.flush()
            self.close()
            self.state.finished[self._path.name] = measure_shard(self._path, self._vocab_size, self._bos_token)
            self.state.tokens = 0
        return self.state.finished

    def close(self) -> None:
        """Let go of the file."""
        if self._file:
            self._file.close()
        self._file = None


def _commit(directory: Path, recipe: str, position: Position, parts: dict[str, PartState], tally: Tally) -> None:
    """Note how far sources and shards have come; what the note promises must be on the disk already."""
    states = {part: dataclasses.asdict(state) for part, state in parts.items()}
    text = json.dumps({"recipe": recipe, "position": position, "parts": states, "tally": tally})
    write_atomically(directory / PROGRESS, lambda file: file.write(text.encode()))


def _restore(directory: Path, recipe: str) -> tuple[Position, dict[str, PartState], Tally]:
    """Where to go on: what `_commit` noted, or the start. ConfigError if other text or settings began this folder."""
    path = directory / PROGRESS
    if not path.exists():
        return START, {"train": PartState(), "val": PartState()}, Tally()
    noted: dict[str, Any] = json.loads(path.read_bytes())
    if noted["recipe"] != recipe:
        raise _other(directory)
    parts = {
        part: PartState({name: ShardFacts(**facts) for name, facts in state["finished"].items()}, state["tokens"])
        for part, state in noted["parts"].items()
    }
    return Position(*noted["position"]), parts, Tally(*noted.get("tally", ()))
