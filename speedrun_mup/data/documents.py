"""Documents from files, folders, standard input and Hugging Face datasets: one at a time, always in the same order."""

from __future__ import annotations

import codecs
import contextlib
import functools
import gc
import gzip
import io
import itertools
import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from speedrun_mup.core.errors import ConfigError, UserError, in_a_line
from speedrun_mup.data.sources import HUB, SKIP, STDIN, Source, SourceError, format_of
from speedrun_mup.files import open_regular, printable
from speedrun_mup.packages import import_extra

LARGEST_DOCUMENT = 2**26  # bytes of a line of JSON or a value in a table, characters of a text taken whole
_LONGEST_LINE = 8  # passages
_PAGE_BYTES, _SUSPICIOUS = 2**28, 1000  # of a column in parquet: what is never too much, and bytes out of one byte
_HEAD_BYTES = 2**16  # of standard input, in which records show that they are records


class Position(NamedTuple):
    """How far reading has come: the source that is being read, and how many of its documents are done."""

    source: int = 0
    documents: int = 0


START = Position()


class Document(NamedTuple):
    """A document as it was read.

    end: the position after it. place: file and line, for people. fault: why it is no document, and then `text` is "".
    """

    end: Position
    text: str
    place: str
    fault: str = ""


# ---------------------------------------------------------------------------------------------------------------------
# Finding files


# ---------------------------------------------------------------------------------------------------------------------
# Reading them


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
        if size >= chars and (size >= 4 * chars or not line.strip()):
            yield "".join(passage)
            passage, size = [], 0
    if passage:
        yield "".join(passage)


class DocumentReader:
    """Iterates over the documents of `sources` from `start` on, holding one at a time.

    field: of a record in .jsonl, .parquet and datasets. passage_chars: text files are cut by `split_passages`; 0 takes
    them whole. skip_bad: yield what is no document with its `fault`, instead of raising. bytes_read: how far it has come
    in the files, compressed bytes as they are. Raises SourceError naming the file and the line.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        field: str,
        passage_chars: int,
        start: Position = START,
        skip_bad: bool = False,
    ):
        self.sources, self.field, self.passage_chars, self.start = sources, field, passage_chars, start
        self.skip_bad = skip_bad
        self._bytes_before = sum(source.size for source in sources[: start.source])
        self._tell: Callable[[], int] = lambda: 0

    @property
    def bytes_read(self) -> int:
        """Bytes of the files up to here."""
        return self._bytes_before + self._tell()

    def __iter__(self) -> Iterator[Document]:
        for number in range(self.start.source, len(self.sources)):
            source = self.sources[number]
            for document in self._of_source(number, self.start.documents if number == self.start.source else 0):
                if document.fault and not self.skip_bad:
                    self._tell = lambda: 0
                    raise SourceError(f"{document.place}: {document.fault}")
                yield document
            self._tell = lambda: 0
            self._bytes_before += source.size

    def _of_source(self, number: int, done: int) -> Iterator[Document]:
        """The documents of one source after the first `done`; damage that ends it comes as the last one."""
        name = self.sources[number].name
        try:
            with contextlib.ExitStack() as stack:
                for place, text, fault in itertools.islice(self._documents(name, stack), done, None):
                    done += 1
                    yield Document(Position(number, done), text, place, fault)
        except ConfigError:
            raise
        except Exception as fault:  # every format's library has kinds of its own
            said = (
                str(fault).removeprefix(f"{printable(name)}: ")
                if isinstance(fault, UserError)
                else (f"cannot be read on after {done:,} documents ({in_a_line(fault, 200)}); is it whole, and UTF-8?")
            )
            self._tell = lambda: 0
            yield Document(Position(number + 1, 0), "", printable(name), said)

    def _documents(self, name: str, stack: contextlib.ExitStack) -> Iterator[tuple[str, str, str]]:
        """Place, text and fault of each; one of the last two is empty."""
        if name.startswith(HUB):
            return self._of_dataset(name)
        if name == STDIN:
            stream, is_jsonl = _with_head(sys.stdin.buffer)
        else:
            file = stack.enter_context(_opening(name))
            self._tell = file.tell
            if format_of(name) == ".parquet":
                return self._of_parquet(file, name)
            stream, is_jsonl = stack.enter_context(_decompressed(file, name)), format_of(name) == ".jsonl"
        if kind := _not_utf8(stream.peek(2)[:64]):
            raise SourceError(f"{printable(name)}: {kind}; write it as UTF-8 (iconv -f utf-16 -t utf-8)")
        return self._of_jsonl(stream, name) if is_jsonl else self._of_text(stream, name)

    def _of_text(self, stream: BinaryIO, name: str) -> Iterator[tuple[str, str, str]]:
        file = io.TextIOWrapper(stream, encoding="utf-8-sig", errors="surrogateescape")
        number, name = 1, printable(name)
        try:
            if self.passage_chars:
                lines = iter(functools.partial(file.readline, _LONGEST_LINE * self.passage_chars), "")
                texts = split_passages(lines, self.passage_chars)
            else:
                texts = iter([file.read(LARGEST_DOCUMENT + 1)])
            for text in texts:
                if len(text) > LARGEST_DOCUMENT:
                    raise SourceError(f"{name}: more than {LARGEST_DOCUMENT:,} characters; cut it, with --passage")
                try:
                    text.isascii() or text.encode()
                    yield f"{name}:{number}", text, ""
                except UnicodeEncodeError as fault:
                    yield f"{name}:{number + text.count(chr(10), 0, fault.start)}", "", f"not UTF-8; fix it, {SKIP}"
                number += text.count("\n")
        finally:
            file.detach()  # the stream is not ours to close

    def _of_jsonl(self, stream: BinaryIO, name: str) -> Iterator[tuple[str, str, str]]:
        name = printable(name)
        for number in itertools.count(1):
            line = stream.readline(LARGEST_DOCUMENT)
            if not line:
                return
            if number == 1:
                line = line.removeprefix(codecs.BOM_UTF8)
            if len(line) == LARGEST_DOCUMENT:
                while line and not line.endswith(b"\n"):
                    line = stream.readline(2**20)
                yield f"{name}:{number}", "", f"a line of more than {LARGEST_DOCUMENT:,} bytes; cut it, {SKIP}"
            elif line.strip():
                yield f"{name}:{number}", *self._of_line(line)

    def _of_line(self, line: bytes) -> tuple[str, str]:
        try:
            record = json.loads(line)
        except UnicodeDecodeError:
            return "", f"not UTF-8; fix it, {SKIP}"
        except (ValueError, RecursionError):
            return "", f"not a line of JSON; is the file whole? Fix it, {SKIP}"
        return self._field_of(record)

    def _of_parquet(self, file: BinaryIO, name: str) -> Iterator[tuple[str, str, str]]:
        parquet = import_extra("pyarrow.parquet", "ParquetFile", "this source", "text")
        name = printable(name)
        table = parquet.ParquetFile(file)
        columns = table.schema_arrow.names
        if self.field not in columns:
            found = printable(", ".join(columns))
            raise SourceError(f"{name}: no column {self.field!r} (found: {found}); choose with --field")
        _refuse_bombs(table.metadata, self.field, name)
        if str(table.schema_arrow.field(self.field).type).removeprefix("large_") == "string":
            # Dictionaries are kept as they are: spelled out, a kilobyte of them can be gigabytes of rows.
            table = parquet.ParquetFile(file, read_dictionary=[self.field], metadata=table.metadata)
        number = 0
        for batch in table.iter_batches(batch_size=256, columns=[self.field]):
            for value in _values(batch.column(0)):
                number += 1
                yield f"{name}, row {number:,}", *self._of_value(value)

    def _of_value(self, value: Any) -> tuple[str, str]:
        """The text of a value as Python has it, or of one of Arrow's scalars, which may be too large to take out."""
        if hasattr(value, "as_py"):
            value = getattr(value, "value", value) if hasattr(value, "dictionary") else value
            if hasattr(value, "as_buffer") and value.is_valid and value.as_buffer().size > LARGEST_DOCUMENT:
                return "", f"more than {LARGEST_DOCUMENT:,} bytes; cut it, {SKIP}"
            try:
                value = value.as_py()
            except UnicodeDecodeError:
                return "", f"not UTF-8; fix it, {SKIP}"
        return self._field_of({self.field: value})

    def _of_dataset(self, name: str) -> Iterator[tuple[str, str, str]]:
        matched = re.fullmatch(r"hf://([^/]+/[^/]+)(?:/([^/]+))?(?:/([^/]+))?", name)
        if not matched:
            raise ConfigError(
                f"{printable(name)}: expected hf://OWNER/NAME, hf://OWNER/NAME/CONFIG or hf://OWNER/NAME/CONFIG/SPLIT"
            )
        repo, config, split = matched.groups()
        datasets = import_extra("datasets", "load_dataset", "this source", "text")
        rows = iter(datasets.load_dataset(repo, config, split=split or "train", streaming=True))
        try:
            for number, row in enumerate(rows, 1):
                yield f"{printable(name)}, row {number:,}", *self._field_of(row)
        finally:  # Arrow aborts the process if its scanner is collected only when Python ends (apache/arrow issue 45214)
            del rows
            gc.collect()

    def _field_of(self, record: Any) -> tuple[str, str]:
        """The text of a record, and why it has none."""
        if not isinstance(record, dict) or self.field not in record:
            found = ", ".join(map(str, record)) if isinstance(record, dict) else type(record).__name__
            return "", f"no field {self.field!r} (found: {printable(found)}); choose it with --field, {SKIP}"
        text = record[self.field]
        if not isinstance(text, str):
            return "", f"field {self.field!r} is {type(text).__name__}, expected text; fix it, {SKIP}"
        return text, ""


def _not_utf8(head: bytes) -> str:
    """What the first bytes of a text look like, if not like UTF-8."""
    if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return "UTF-16"
    has_nulls = len(head) >= 8 and not (any(head[::2]) and any(head[1::2]))
    return "a null in every second byte, as in UTF-16" if has_nulls else ""


def _opening(name: str) -> BinaryIO:
    try:
        return open_regular(Path(name))
    except OSError as fault:
        raise SourceError(
            f"{printable(name)}: cannot read: {fault.strerror}; check the path and its permissions, {SKIP}"
        ) from None


def _decompressed(file: BinaryIO, name: str) -> Any:
    if name.lower().endswith(".gz"):
        return gzip.open(file)
    if name.lower().endswith(".zst"):
        arrow = import_extra("pyarrow", "CompressedInputStream", "this source", "text")
        return io.BufferedReader(arrow.CompressedInputStream(file, "zstd"), 2**20)
    return file


def _refuse_bombs(metadata: Any, field: str, name: str) -> None:
    """SourceError for a column that would decode to very much more than it takes: a page is decoded whole."""
    for group in range(metadata.num_row_groups):
        columns = metadata.row_group(group)
        for column in map(columns.column, range(columns.num_columns)):
            if column.path_in_schema == field:
                packed, whole = column.total_compressed_size, column.total_uncompressed_size
                if whole > _PAGE_BYTES and whole > _SUSPICIOUS * packed:
                    raise SourceError(
                        f"{name}: {packed:,} bytes that decode to {whole:,}; if that is right, write it with smaller row groups"
                    )


def _values(column: Any) -> Iterable[Any]:
    """The values of a column of Arrow's: all at once where that is little, else one after the other, as its scalars."""
    if hasattr(column, "dictionary"):
        sizes = import_extra("pyarrow.compute", "binary_length", "this source", "text").binary_length(column.dictionary)
        size = sum(sizes.take(column.indices.drop_null()).to_pylist())
        column = column.dictionary_decode() if size < LARGEST_DOCUMENT else column
    if hasattr(column, "dictionary") or column.nbytes > LARGEST_DOCUMENT:
        return column
    try:
        return column.to_pylist()
    except UnicodeDecodeError:
        return column


class _Rewound(io.RawIOBase):
    """A stream with bytes that were taken from it put back in front."""

    def __init__(self, head: bytes, stream: Any):
        self._head, self._stream = head, stream

    def readable(self) -> bool:
        """It is."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Fill a buffer, or a part of it; 0 at the end."""
        if not self._head:
            return self._stream.readinto1(buffer)
        taken = min(len(buffer), len(self._head))
        buffer[:taken], self._head = self._head[:taken], self._head[taken:]
        return taken


def _with_head(stream: Any) -> tuple[Any, bool]:
    """A stream that may be text or records, and whether it is records: its first line that is not blank starts with "{"."""
    head = b""
    while len(head) < _HEAD_BYTES and not head.removeprefix(codecs.BOM_UTF8).strip():
        line = stream.readline(_HEAD_BYTES)
        if not line:
            break
        head += line
    return io.BufferedReader(_Rewound(head, stream)), head.removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"{")
