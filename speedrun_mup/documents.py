"""Documents from files, folders, standard input and Hugging Face datasets: one at a time, always in the same order."""

from __future__ import annotations

import contextlib
import gzip
import importlib
import io
import itertools
import json
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from speedrun_mup.core.errors import ConfigError, UserError, in_a_line

STDIN, HUB = "-", "hf://"
FORMATS = (".txt", ".md", ".jsonl", ".parquet")
COMPRESSIONS = (".gz", ".zst")
_LONGEST_LINE = 8  # passages


class SourceError(UserError):
    """Text that cannot be read: a missing or damaged file, a record without the field, a dataset out of reach."""

    exit_code = 3


@dataclass(frozen=True)
class Source:
    """One file, standard input ("-") or one dataset ("hf://..."). size: bytes, 0 if unknown. changed: time, in ns."""

    name: str
    size: int = 0
    changed: int = 0


def format_of(name: str) -> str:
    """The format of a file, such as ".jsonl", by its name without the compression; "" where that does not tell."""
    path = Path(name)
    return Path(path.stem).suffix if path.suffix in COMPRESSIONS else path.suffix


class Position(NamedTuple):
    """How far reading has come: the source that is being read, and how many of its documents are done."""

    source: int = 0
    documents: int = 0


START = Position()


def find_sources(paths: Sequence[str]) -> list[Source]:
    """The sources that `paths` name, in their order; a folder stands for its text files, sorted, hidden ones left out.

    SourceError for a path that is missing, a file of another kind, or a folder without any text.
    """
    sources = []
    for path in paths:
        if path == STDIN or path.startswith(HUB):
            sources.append(Source(path))
        elif os.path.isdir(path):
            inside = sorted(file for file in Path(path).rglob("*") if _is_text(file.relative_to(path)))
            if not inside:
                raise SourceError(f"{path}: no {', '.join(FORMATS)} file (or {'/'.join(COMPRESSIONS)} of one) in there")
            sources += [_file(file) for file in inside if file.is_file()]
        else:
            sources.append(_file(Path(path)))
    return sources


def _is_text(path: Path) -> bool:
    return not any(part.startswith(".") for part in path.parts) and format_of(path.name) in FORMATS


def _file(path: Path) -> Source:
    try:
        found = path.stat()
    except OSError as fault:
        raise SourceError(f"{path}: cannot read: {fault.strerror}; check the path") from None
    source = Source(str(path), found.st_size, found.st_mtime_ns)
    if format_of(source.name) not in FORMATS:
        raise SourceError(f"{path}: not a {', '.join(FORMATS)} file (or {'/'.join(COMPRESSIONS)} of one); rename it")
    return source


def split_passages(lines: Iterable[str], chars: int) -> Iterator[str]:
    """Cut a text, given as lines, at the first blank line after `chars` characters, or the first line end after 4 chars.

    A document longer than T is trained on only up to T. The files of Python's library have 17 kB on average: as
    documents, they would leave 6 % of the bytes in use at T = 1024 and 10 % at 2048, where passages of 512 leave 66 %
    and 80 % (Python 3.11.7). Such passages have 849 bytes on average; FineWeb's documents have 690 tokens.
    """
    passage: list[str] = []
    size = 0
    for line in lines:
        passage.append(line)
        size += len(line)
        if size >= 4 * chars or (size >= chars and not line.strip()):
            yield "".join(passage)
            passage, size = [], 0
    if passage:
        yield "".join(passage)


class DocumentReader:
    """Iterates over (position after it, document) of `sources` from `start` on, holding one document at a time.

    field: of a record in .jsonl, .parquet and datasets. passage_chars: text files are cut by `split_passages`; 0 takes
    them whole. bytes_read: how far it has come in the files, compressed bytes as they are.
    Raises SourceError naming the file and the line.
    """

    def __init__(self, sources: Sequence[Source], field: str, passage_chars: int, start: Position = START):
        self.sources, self.field, self.passage_chars, self.start = sources, field, passage_chars, start
        self._bytes_before = sum(source.size for source in sources[: start.source])
        self._tell: Callable[[], int] = lambda: 0

    @property
    def bytes_read(self) -> int:
        """Bytes of the files up to here."""
        return self._bytes_before + self._tell()

    def __iter__(self) -> Iterator[tuple[Position, str]]:
        for number in range(self.start.source, len(self.sources)):
            source = self.sources[number]
            done = self.start.documents if number == self.start.source else 0
            try:
                with contextlib.ExitStack() as stack:
                    for text in itertools.islice(self._documents(source.name, stack), done, None):
                        done += 1
                        yield Position(number, done), text
            except UserError:
                raise
            except Exception as fault:  # every format's library has kinds of its own
                reason = in_a_line(fault, 200)
                raise SourceError(
                    f"{source.name}: cannot be read on after {done:,} documents ({reason}); is it whole, and UTF-8?"
                ) from None
            self._tell = lambda: 0
            self._bytes_before += source.size

    def _documents(self, name: str, stack: contextlib.ExitStack) -> Iterator[str]:
        if name.startswith(HUB):
            return self._of_dataset(name)
        if name == STDIN:
            stream: Any = sys.stdin.buffer
            is_jsonl = stream.peek(1)[:1] == b"{"
        else:
            file = stack.enter_context(_opening(name))
            self._tell = file.tell
            if format_of(name) == ".parquet":
                return self._of_parquet(file, name)
            stream, is_jsonl = stack.enter_context(_decompressed(file, name)), format_of(name) == ".jsonl"
        return self._of_jsonl(stream, name) if is_jsonl else self._of_text(stream)

    def _of_text(self, stream: BinaryIO) -> Iterator[str]:
        file = io.TextIOWrapper(stream, encoding="utf-8")
        try:
            if self.passage_chars:
                lines = iter(lambda: file.readline(_LONGEST_LINE * self.passage_chars), "")
                yield from split_passages(lines, self.passage_chars)
            else:
                yield file.read()
        finally:
            file.detach()  # the stream is not ours to close

    def _of_jsonl(self, lines: Iterable[bytes], name: str) -> Iterator[str]:
        for number, line in enumerate(lines, 1):
            if line.strip():
                try:
                    record = json.loads(line)
                except (ValueError, RecursionError):
                    raise SourceError(f"{name}:{number}: not a line of JSON; is the file whole?") from None
                yield self._field_of(record, f"{name}:{number}")

    def _of_parquet(self, file: BinaryIO, name: str) -> Iterator[str]:
        table = _import_extra("pyarrow.parquet").ParquetFile(file)
        columns = table.schema_arrow.names
        if self.field not in columns:
            raise SourceError(
                f"{name}: no column {self.field!r} (found: {', '.join(columns):.200}); choose with --field"
            )
        for batch in table.iter_batches(batch_size=256, columns=[self.field]):
            yield from (self._field_of({self.field: text}, name) for text in batch.column(0).to_pylist())

    def _of_dataset(self, name: str) -> Iterator[str]:
        matched = re.fullmatch(r"hf://([^/]+/[^/]+)(?:/([^/]+))?(?:/([^/]+))?", name)
        if not matched:
            raise ConfigError(
                f"{name}: expected hf://OWNER/NAME, hf://OWNER/NAME/CONFIG or hf://OWNER/NAME/CONFIG/SPLIT"
            )
        repo, config, split = matched.groups()
        rows = _import_extra("datasets").load_dataset(repo, config, split=split or "train", streaming=True)
        yield from (self._field_of(row, name) for row in rows)

    def _field_of(self, record: Any, where: str) -> str:
        if not isinstance(record, dict) or self.field not in record:
            found = ", ".join(map(str, record)) if isinstance(record, dict) else type(record).__name__
            raise SourceError(f"{where}: no field {self.field!r} (found: {found:.200}); choose it with --field")
        text = record[self.field]
        if not isinstance(text, str):
            raise SourceError(f"{where}: field {self.field!r} is {type(text).__name__}, expected text")
        return text


def _opening(name: str) -> BinaryIO:
    try:
        return open(name, "rb")
    except OSError as fault:
        raise SourceError(f"{name}: cannot read: {fault.strerror}; check the path and its permissions") from None


def _decompressed(file: BinaryIO, name: str) -> Any:
    if name.endswith(".gz"):
        return gzip.open(file)
    if name.endswith(".zst"):
        return io.BufferedReader(_import_extra("pyarrow").CompressedInputStream(file, "zstd"), 2**20)
    return file


def _import_extra(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError:
        package = name.partition(".")[0]
        raise ConfigError(
            f"this source needs {package}, which is not installed; pip install 'speedrun-mup[text]'"
        ) from None
