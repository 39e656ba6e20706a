"""Token shards on disk: the file format, and a corpus of such files. Needs no torch.

A shard is a file of uint16 tokens behind a 1024-byte header (modded-nanogpt's format).
"""

from __future__ import annotations

import bisect
import contextlib
import hashlib
import itertools
import json
import os
import threading
import weakref
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from speedrun_mup.core.errors import ConfigError, UserError
from speedrun_mup.data.bound import Check, Identity
from speedrun_mup.files import FolderLock, open_regular, printable, write_whole

MAGIC, VERSION = 20240520, 1
HEADER_BYTES = 256 * 4  # int32 little-endian: magic, version, token count, zeros
MAX_TOKENS = 2**31 - 1  # the count is an int32
MANIFEST = "corpus.json"
MIXTURE_PERIOD = 1000  # micro-batches, in which every part of a mixture has had its share exactly
TOKENIZER_FILE = "tokenizer.json"  # next to the manifest, where ids are not bytes
UNFINISHED = ".unfinished"  # where text is made into shards, before they and the manifest move to its parent

_SCAN_TOKENS = 2**20  # 2 MiB of tokens at a time stay in the cache


class ShardError(UserError):
    """A token file or a corpus folder that is missing, damaged, too small or does not fit its vocabulary."""

    exit_code = 3


# ---------------------------------------------------------------------------------------------------------------------
# One file


@contextlib.contextmanager
def sole_writer(directory: Path) -> Iterator[None]:
    """Make `directory` and keep other writers out of it until done, or until this process ends, however it ends.

    Clears away what a writer that was killed left of files that were not whole. ConfigError if another one is at work,
    or for an OSError, here or in the work done meanwhile.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with contextlib.closing(FolderLock(directory, "--out")):
            for leftover in directory.glob(".*.tmp"):
                leftover.unlink()
            yield
    except OSError as fault:
        raise ConfigError(
            f"{directory}: cannot write: {fault.strerror or fault}; free some space or choose another --out"
        ) from None


def shard_header(tokens: int) -> bytes:
    """The first 1024 bytes of a shard of so many tokens."""
    header = np.zeros(256, "<i4")
    header[:3] = MAGIC, VERSION, tokens
    return header.tobytes()


def write_shard(path: Path, tokens: Sequence[int] | np.ndarray) -> None:
    """Write integers (n,), 0 < n < 2**31, each from 0 to 65535, as one shard. The file appears whole or not at all.

    Raises ShardError rather than wrap an id that needs more than 16 bits.
    """
    ids = np.asarray(tokens)
    if ids.ndim != 1 or ids.dtype.kind not in "iu":
        raise ShardError(f"{path}: a shard holds one row of integers, not {ids.dtype} of shape {ids.shape}")
    if not 0 < len(ids) <= MAX_TOKENS:
        raise ShardError(f"{path}: a shard holds from 1 to {MAX_TOKENS:,} tokens, not {len(ids):,}; split the corpus")
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high > 65535:
        raise ShardError(
            f"{path}: token id {low if low < 0 else high} does not fit in 16 bits; use a vocabulary <= 65536"
        )

    parts: list[Any] = [shard_header(len(ids)), np.ascontiguousarray(ids, "<u2").data]
    write_whole(path, parts, "free some space or choose another folder", ShardError)


_LOOKS_LIKE = (
    (b"version https://git-lfs", "a git-lfs pointer; run `git lfs pull`"),
    (b"<", "an HTML or XML page; download the shard again"),
    (b"\x1f\x8b", "a gzip file; decompress it"),
    (b"\x28\xb5\x2f\xfd", "a zstd file; decompress it"),
    (b"PK", "a zip file or a torch checkpoint; extract it"),
    (b"PAR1", "a parquet file; tokenize it first"),
    (b"\x93NUMPY", "a .npy array; rewrite it with speedrun_mup.data.shards.write_shard"),
    (MAGIC.to_bytes(4, "big"), "a big-endian shard; rewrite it with speedrun_mup.data.shards.write_shard"),
    ((20240801).to_bytes(4, "little"), "a llm.c shard of 32-bit tokens; tokenize with a vocabulary <= 65536"),
)


def _check_header(path: Path, head: bytes, size: int) -> None:
    """Raise ShardError unless a file of `size` bytes that starts with `head` is one well-formed shard."""
    if size == 0:
        raise ShardError(f"{path}: an empty file, expected a token shard; fetch or write it again")
    if not head.startswith(MAGIC.to_bytes(4, "little")):
        kind = next((kind for start, kind in _LOOKS_LIKE if head.lstrip().startswith(start)), "no token shard at all")
        raise ShardError(f"{path}: starts with {head[:8]!r}, expected magic number {MAGIC}: it looks like {kind}")
    if size < HEADER_BYTES:
        raise ShardError(f"{path}: {size} bytes, but a header has {HEADER_BYTES}: a truncated download; fetch it again")
    version, tokens = (int(number) for number in np.frombuffer(head, "<i4", count=2, offset=4))
    if version != VERSION:
        raise ShardError(f"{path}: shard version {version}, expected {VERSION}; rewrite it as 16-bit tokens")
    if tokens <= 0:
        raise ShardError(f"{path}: its header counts {tokens} tokens, expected at least 1; fetch or write it again")
    expected = HEADER_BYTES + 2 * tokens
    if size != expected:
        cause = "a truncated download" if size < expected else "bytes were appended or the header is damaged"
        raise ShardError(
            f"{path}: {size:,} bytes, expected {expected:,} for {tokens:,} tokens: {cause}; fetch it again"
        )


class _Handle:
    """An open file that is closed when it is no longer read."""

    def __init__(self, path: Path):
        file = open_regular(path)
        self.number = file.fileno()
        weakref.finalize(self, file.close)


class _OpenFiles:
    """The files of the shards that were read last. The one that waited longest is closed, so that any number can be read."""

    def __init__(self, most: int):
        self._most = most
        self._lock = threading.Lock()
        self._recent: OrderedDict[int, weakref.ref[Shard]] = OrderedDict()

    def handle(self, shard: Shard) -> _Handle:
        """The shard's open file; opened again if it was closed meanwhile."""
        with self._lock:
            handle = shard.handle = shard.handle or shard.open()
            self._recent[id(shard)] = weakref.ref(shard)
            self._recent.move_to_end(id(shard))
            while len(self._recent) > self._most:
                _, oldest = self._recent.popitem(last=False)
                if (closing := oldest()) is not None:
                    closing.handle = None
            return handle


_OPEN = _OpenFiles(most=64)


class Shard:
    """One shard file of uint16 tokens, checked. Its file is open while it is among those that were read last.

    It is read, not mapped: a mapped file that is cut kills the process that touches it (SIGBUS), however short a time ago
    its size was right. Raises ShardError naming the file, what was found, what was expected and the likely cause.

    Args:
        path: of the file.
        sha256: that it must have, if anybody knows. A large file is hashed in the background while it is read; what is
            read after it was found to be wrong is a ShardError.
    """

    def __init__(self, path: Path, sha256: str = ""):
        self.path = path
        self.handle: _Handle | None = None
        self._known: tuple[int, ...] | None = None  # which file it was, when it was first opened
        handle = _OPEN.handle(self)
        self._check: Check | None = None
        if sha256:
            self._check = Check(path, Identity.of(os.fstat(handle.number)), sha256, self._wrong)
            self.confirm(wait=False)

    def _wrong(self, found: str) -> ShardError:
        return ShardError(
            f"{printable(self.path)}: not what the manifest says: its SHA-256 is {found:.40}; prepare or fetch it again"
        )

    def confirm(self, wait: bool = True) -> None:
        """ShardError if the file is known not to be the one that its SHA-256 belongs to. wait: until it is known."""
        if self._check and self._check.verdict(wait):
            self._check = None

    def open(self) -> _Handle:
        """Open the file and check its header; ShardError if it is not the one that was opened before."""
        try:
            handle = _Handle(self.path)
            facts = os.fstat(handle.number)
            _check_header(self.path, os.pread(handle.number, HEADER_BYTES, 0), facts.st_size)
        except OSError as fault:
            raise ShardError(
                f"{printable(self.path)}: cannot read: {fault.strerror}; check the path and its permissions"
            ) from None
        except ValueError as fault:
            raise ShardError(f"{printable(self.path)}: cannot read: {fault}; check the path") from None
        found = facts.st_dev, facts.st_ino, facts.st_size, facts.st_mtime_ns
        if self._known not in (None, found):
            raise ShardError(f"{printable(self.path)}: was replaced or changed; do not change it during a run")
        self._known, self._size = found, facts.st_size
        return handle

    def __len__(self) -> int:
        return (self._size - HEADER_BYTES) // 2

    def take(self, start: int, stop: int) -> np.ndarray:
        """A copy of tokens start to stop. ShardError if the file has another size than it had when it was opened."""
        if self._check:
            self.confirm(wait=False)
        handle = _OPEN.handle(self)
        data = os.pread(handle.number, 2 * (stop - start), HEADER_BYTES + 2 * start)
        size = os.fstat(handle.number).st_size
        if size != self._size or len(data) != 2 * (stop - start):
            raise ShardError(
                f"{printable(self.path)}: was {self._size:,} bytes, is now {size:,}; do not change it during a run"
            )
        return np.frombuffer(data, "<u2")

    def take_ids(self, start: int, stop: int, vocab_size: int) -> np.ndarray:
        """`take`, checked: ShardError at the first id that is >= vocab_size."""
        block = self.take(start, stop)
        if block.max(initial=0) >= vocab_size:
            at = int(np.argmax(block >= vocab_size))
            raise ShardError(
                f"{self.path}: token id {block[at]} at offset {start + at:,}, but the vocabulary has {vocab_size} "
                "entries; the shard belongs to another tokenizer or is damaged"
            )
        return block

    def find(self, token: int, vocab_size: int, stop: int | None = None) -> np.ndarray:
        """Where `token` occurs in tokens[:stop]: ascending int64. ShardError at the first id that is >= vocab_size."""
        stop = len(self) if stop is None else min(stop, len(self))
        found = []
        for start in range(0, stop, _SCAN_TOKENS):
            block = self.take_ids(start, min(start + _SCAN_TOKENS, stop), vocab_size)
            found.append(np.flatnonzero(block == token) + start)
        return np.concatenate(found)


def read_shard(path: Path) -> np.ndarray:
    """Tokens of one shard, to look at: (n,) uint16, n < 2**31. Mapped, not copied. Raises ShardError as `Shard` does."""
    return np.memmap(path, "<u2", "r", HEADER_BYTES, len(Shard(path)))


# ---------------------------------------------------------------------------------------------------------------------
# A folder of files


@dataclass(frozen=True)
class ShardFacts:
    """What a manifest says about one shard: its tokens, the documents that start in it, the SHA-256 of its file."""

    tokens: int
    documents: int
    sha256: str


def measure_shard(path: Path, vocab_size: int, bos_token: int) -> ShardFacts:
    """Read a whole shard: header, every id, every byte. ShardError for a damaged file or an id >= vocab_size."""
    shard = Shard(path)
    documents = len(shard.find(bos_token, vocab_size))
    return ShardFacts(len(shard), documents, file_sha256(path))


@dataclass(frozen=True)
class Corpus:
    """A folder of shards and what is needed to train on it.

    tokenizer: "byte", "bpe:1024", "gpt2", ...; its ids are below `vocab_size`, and `bos_token` opens every document.
    tokenizer_sha256: of its tokenizer.json, "" without one. fingerprint: equal only for equal tokens, so that runs on
    different data are never compared. source: for reports. recipe: of sources and settings, "" where it cannot be repeated.
    order: of its documents, "" where it is unknown. facts: of every shard by file name; FineWeb's without a manifest have
    none. tally: how many documents of the text were left out or repaired, by reason; empty where it was not counted.
    former_fingerprint: what earlier versions gave it. told_fingerprint: what its manifest gives, which is not trusted.
    """

    directory: Path
    tokenizer: str
    vocab_size: int
    bos_token: int
    fingerprint: str
    train: tuple[Path, ...]
    val: tuple[Path, ...]
    source: str
    tokenizer_sha256: str = ""
    recipe: str = ""
    order: str = ""
    facts: Mapping[str, ShardFacts] = field(default_factory=dict)
    tally: Mapping[str, int] = field(default_factory=dict)
    former_fingerprint: str = ""
    told_fingerprint: str = field(default="", compare=False)

    def is_known_as(self, fingerprint: str) -> bool:
        """Whether a fingerprint that was written down earlier, maybe by an earlier version, is that of these tokens."""
        return fingerprint in {self.fingerprint, self.former_fingerprint} - {""}

    @property
    def data(self) -> str:
        """What --data takes to find this corpus from any folder."""
        return str(self.directory.resolve())

    def open(self, path: Path) -> Shard:
        """One of its shards, bound to what the manifest says about it, if there is one. Raises ShardError."""
        told = self.facts.get(path.name)
        shard = Shard(path, told.sha256 if told else "")
        if told and len(shard) != told.tokens:
            raise ShardError(f"{printable(path)}: holds {len(shard):,} tokens, not {told.tokens:,}; prepare it again")
        return shard

    def tokens_in(self, path: Path) -> int:
        """How many tokens one of its shards holds, by the manifest, else by the file's size."""
        if facts := self.facts.get(path.name):
            return facts.tokens
        try:
            return (path.stat().st_size - HEADER_BYTES) // 2
        except OSError as fault:
            raise ShardError(f"{printable(path)}: cannot read: {fault.strerror}; fetch or write it again") from None


class TokenRow:
    """The tokens of some shards of a corpus, one shard after the other, as one row. Opens a shard when it is first read."""

    def __init__(self, corpus: Corpus, paths: Sequence[Path]):
        self._corpus, self._paths = corpus, paths
        self._ends = list(itertools.accumulate(map(corpus.tokens_in, paths)))
        self._shards: dict[int, Shard] = {}

    def __len__(self) -> int:
        return self._ends[-1]

    def place(self, at: int) -> tuple[Path, int]:
        """The shard of token `at`, and where in it the token is."""
        number, first = self._locate(at)
        return self._paths[number], at - first

    def take(self, start: int, stop: int) -> np.ndarray:
        """A copy of tokens start to stop. ShardError for a shard that is damaged or belongs to another vocabulary."""
        pieces = []
        while start < stop:
            number, first = self._locate(start)
            until = min(stop, self._ends[number])
            pieces.append(self._shard(number).take_ids(start - first, until - first, self._corpus.vocab_size))
            start = until
        return np.concatenate(pieces)

    def _locate(self, at: int) -> tuple[int, int]:
        """The number of the shard that holds token `at`, and the first token of that shard in the row."""
        number = bisect.bisect_right(self._ends, at)
        return number, self._ends[number - 1] if number else 0

    def confirm(self) -> None:
        """Wait until the shards that were read are known to be what the manifest says. ShardError if one is not."""
        for shard in list(self._shards.values()):
            shard.confirm()

    def _shard(self, number: int) -> Shard:
        if number not in self._shards:
            self._shards[number] = self._corpus.open(self._paths[number])
        return self._shards[number]


@dataclass(frozen=True, kw_only=True)
class Mixture(Corpus):
    """Several corpora of one vocabulary, interleaved in training. shares: of every MIXTURE_PERIOD micro-batches."""

    parts: tuple[Corpus, ...]
    shares: tuple[int, ...]

    @property
    def data(self) -> str:
        """What --data takes to find this mixture from any folder."""
        return ",".join(f"{part.data}:{share / MIXTURE_PERIOD}" for part, share in zip(self.parts, self.shares))


def mix(parts: Sequence[Corpus], weights: Sequence[float]) -> Mixture:
    """A mixture of `parts` by `weights`, which need not sum to 1 and count in steps of a thousandth.

    ShardError if the parts do not have the same tokens; ConfigError for a weight that is not worth a thousandth.
    """
    first = parts[0]
    for part in parts[1:]:
        same = (part.tokenizer, part.vocab_size, part.bos_token) == (first.tokenizer, first.vocab_size, first.bos_token)
        hashes = {first.tokenizer_sha256, part.tokenizer_sha256} - {""}
        if not same or len(hashes) > 1:
            raise ShardError(
                f"{first.directory} ({first.tokenizer}) and {part.directory} ({part.tokenizer}) do not have the same "
                f"vocabulary and cannot be mixed; tokenize one with --tokenizer {first.directory}"
            )
    exact = [weight / sum(weights) * MIXTURE_PERIOD for weight in weights]
    shares = [int(share) for share in exact]
    by_rest = sorted(range(len(exact)), key=lambda k: shares[k] - exact[k])
    for k in by_rest[: MIXTURE_PERIOD - sum(shares)]:
        shares[k] += 1
    if min(shares) < 1:
        raise ConfigError(
            f"{parts[shares.index(min(shares))].directory}: less than a thousandth of the mixture; leave it out"
        )
    return Mixture(
        directory=first.directory,
        tokenizer=first.tokenizer,
        vocab_size=first.vocab_size,
        bos_token=first.bos_token,
        fingerprint=digest_of(["mixture", [(part.fingerprint, share) for part, share in zip(parts, shares)]]),
        former_fingerprint=digest_of(
            ["mixture", [(part.former_fingerprint or part.fingerprint, share) for part, share in zip(parts, shares)]]
        ),
        train=tuple(path for part in parts for path in part.train),
        val=tuple(path for part in parts for path in part.val),
        source=" + ".join(f"{share / MIXTURE_PERIOD:.1%} {part.source}" for part, share in zip(parts, shares)),
        tokenizer_sha256=first.tokenizer_sha256,
        parts=tuple(parts),
        shares=tuple(shares),
    )


def digest_of(value: object) -> str:
    """SHA-256 of a JSON value, in hex."""
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def file_sha256(path: Path) -> str:
    """SHA-256 of a regular file's bytes, in hex. OSError for anything else."""
    with open_regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
