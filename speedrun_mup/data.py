"""Token shards on disk, and the batches that training and validation take from them.

A shard is a file of uint16 tokens behind a 1024-byte header (modded-nanogpt's format). Training batches are aligned to
documents as in modded-nanogpt's record 26: each sequence starts at a BOS token, and the tokens between the end of a
sequence and the next BOS are skipped. Which tokens a micro-batch holds depends only on the shards, the seed and its
global index, so the order is the same on 1 GPU and on 8, and resuming needs no state but the step.
"""

# T tokens of a micro-batch, N micro-batches of a step, C tokens of a validation chunk

from __future__ import annotations

import bisect
import contextlib
import hashlib
import json
import mmap
import os
import secrets
import stat
import threading
from collections import deque
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
import torch
from torch import Tensor

from speedrun_mup.core.utils import ConfigError, UserError, seed_for

MAGIC, VERSION = 20240520, 1
HEADER_BYTES = 256 * 4  # int32 little-endian: magic, version, token count, zeros
MAX_TOKENS = 2**31 - 1  # the count is an int32
MANIFEST, MANIFEST_VERSION = "corpus.json", 1
GPT2_VOCAB, GPT2_BOS = 50257, 50256  # of the FineWeb shards

_SCAN_TOKENS = 2**20  # 2 MiB of tokens at a time stay in the cache

Batch = tuple[Tensor, Tensor]  # inputs (T,) int32 and targets (T,) int64: the same tokens, one place further


class ShardError(UserError):
    """A token file or a corpus folder that is missing, damaged, too small or does not fit its vocabulary."""

    exit_code = 3


# ---------------------------------------------------------------------------------------------------------------------
# One file


def _write_atomically(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Let `write` fill a file beside `path`, flush it to the disk, then rename it to `path`. Raises ShardError."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    try:
        with open(temporary, "xb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as fault:
        raise ShardError(f"{path}: cannot write: {fault.strerror}; free some space or choose another folder") from None
    finally:
        with contextlib.suppress(OSError):  # it is gone, unless something failed
            temporary.unlink()


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
    header = np.zeros(256, "<i4")
    header[:3] = MAGIC, VERSION, len(ids)

    def write(file: BinaryIO) -> None:
        file.write(header.data)
        file.write(np.ascontiguousarray(ids, "<u2").data)

    _write_atomically(path, write)


_LOOKS_LIKE = (
    (b"version https://git-lfs", "a git-lfs pointer; run `git lfs pull`"),
    (b"<", "an HTML or XML page; download the shard again"),
    (b"\x1f\x8b", "a gzip file; decompress it"),
    (b"\x28\xb5\x2f\xfd", "a zstd file; decompress it"),
    (b"PK", "a zip file or a torch checkpoint; extract it"),
    (b"PAR1", "a parquet file; tokenize it first"),
    (b"\x93NUMPY", "a .npy array; rewrite it with speedrun_mup.data.write_shard"),
    (MAGIC.to_bytes(4, "big"), "a big-endian shard; rewrite it with speedrun_mup.data.write_shard"),
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


class Shard:
    """One shard file, checked and mapped read-only. `tokens` (n,) uint16 is the file itself, not a copy.

    A mapped file that shrinks kills the process that touches it (SIGBUS), so read through `take`, which looks first.
    Raises ShardError naming the file, what was found, what was expected and the likely cause.
    """

    def __init__(self, path: Path):
        try:
            if not stat.S_ISREG(os.stat(path).st_mode):  # opening a pipe would wait for ever
                raise ShardError(f"{path}: not a file, expected a token shard")
            with open(path, "rb") as file:
                size = os.fstat(file.fileno()).st_size
                _check_header(path, file.read(HEADER_BYTES), size)
                self._map = mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ)
        except OSError as fault:
            raise ShardError(f"{path}: cannot read: {fault.strerror}; check the path and its permissions") from None
        except ValueError:  # the file shrank between the check and the mapping
            raise ShardError(f"{path}: its size changes while it is read; wait for the download to end") from None
        self.path = path
        self.tokens = np.frombuffer(self._map, "<u2", offset=HEADER_BYTES)

    def __len__(self) -> int:
        return len(self.tokens)

    def take(self, start: int, stop: int) -> np.ndarray:
        """tokens[start:stop] as a view, after checking that the file still has its size."""
        if (size := self._map.size()) != len(self._map):
            raise ShardError(
                f"{self.path}: was {len(self._map):,} bytes, is now {size:,}; do not change it during a run"
            )
        return self.tokens[start:stop]

    def find(self, token: int, vocab_size: int, stop: int | None = None) -> np.ndarray:
        """Where `token` occurs in tokens[:stop]: ascending int64. ShardError at the first id that is >= vocab_size."""
        stop = len(self) if stop is None else stop
        found = []
        for start in range(0, stop, _SCAN_TOKENS):
            block = self.take(start, min(start + _SCAN_TOKENS, stop))
            if block.max() >= vocab_size:
                at = int(np.argmax(block >= vocab_size))
                raise ShardError(
                    f"{self.path}: token id {block[at]} at offset {start + at:,}, but the vocabulary has {vocab_size} "
                    "entries; the shard belongs to another tokenizer or is damaged"
                )
            found.append(np.flatnonzero(block == token) + start)
        return np.concatenate(found)


def read_shard(path: Path) -> np.ndarray:
    """Tokens of one shard: (n,) uint16, n < 2**31. Mapped, not copied. Raises ShardError (file, fault, cause)."""
    return Shard(path).tokens


# ---------------------------------------------------------------------------------------------------------------------
# A folder of files


@dataclass(frozen=True)
class Corpus:
    """A folder of shards and what is needed to train on it.

    tokenizer: "byte", "bpe:1024", "gpt2", ...; its ids are below `vocab_size`, and `bos_token` opens every document.
    fingerprint: equal only for equal tokens, so that runs on different data are never compared. source: for reports.
    """

    directory: Path
    tokenizer: str
    vocab_size: int
    bos_token: int
    fingerprint: str
    train: tuple[Path, ...]
    val: tuple[Path, ...]
    source: str


def _digest(*parts: object) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _file_digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_manifest(
    directory: Path, *, tokenizer: str, vocab_size: int, bos_token: int, train: list[str], val: list[str], source: str
) -> Corpus:
    """Describe the shards `train` and `val` (file names inside `directory`) in its corpus.json, and open the result.

    The fingerprint covers the vocabulary and the name and SHA-256 of every shard.
    """
    split = {"train": train, "val": val}
    lengths = {part: {name: len(Shard(directory / name)) for name in names} for part, names in split.items()}
    hashes = [(part, name, _file_digest(directory / name)) for part, names in split.items() for name in names]
    manifest = {
        "version": MANIFEST_VERSION,
        "source": source,
        "tokenizer": tokenizer,
        "vocab_size": vocab_size,
        "bos_token": bos_token,
        "fingerprint": _digest(tokenizer, vocab_size, bos_token, hashes),
        **lengths,
    }
    text = json.dumps(manifest, indent=2, allow_nan=False) + "\n"
    _write_atomically(directory / MANIFEST, lambda file: file.write(text.encode()))
    return open_corpus(directory)


def open_corpus(directory: Path) -> Corpus:
    """The corpus in `directory`: by its corpus.json, or by upstream's FineWeb names (GPT-2 tokens) where there is none.

    Every shard's header is checked. FineWeb's fingerprint covers names and sizes only. Raises ShardError.
    """
    if not directory.is_dir():
        raise ShardError(f"{directory}: no such folder; write or download a corpus there first")
    manifest = directory / MANIFEST
    return _open_manifest(manifest) if manifest.exists() else _open_fineweb(directory)


_MANIFEST_FIELDS = {
    "source": str,
    "tokenizer": str,
    "vocab_size": int,
    "bos_token": int,
    "fingerprint": str,
    "train": dict,  # file name: number of tokens
    "val": dict,
}


def _open_manifest(path: Path) -> Corpus:
    def fault(text: str) -> ShardError:
        return ShardError(f"{path}: {text}; delete this folder and prepare the corpus again")

    try:
        manifest = json.loads(path.read_bytes())
    except OSError as error:
        raise ShardError(f"{path}: cannot read: {error.strerror}; check its permissions") from None
    except (ValueError, RecursionError):
        raise fault("not JSON") from None
    found = manifest.get("version") if isinstance(manifest, dict) else None
    if found != MANIFEST_VERSION:
        raise fault(f"manifest version {found}, expected {MANIFEST_VERSION}")
    for key, kind in _MANIFEST_FIELDS.items():
        if type(manifest.get(key)) is not kind:
            raise fault(f"{key} is {manifest.get(key)!r:.40}, expected {kind.__name__}")
    vocab_size, bos_token = manifest["vocab_size"], manifest["bos_token"]
    if not 0 <= bos_token < vocab_size <= 65536:
        raise fault(f"bos_token {bos_token}, vocab_size {vocab_size}; expected 0 <= bos_token < vocab_size <= 65536")
    for part in "train", "val":
        if not manifest[part]:
            raise fault(f"lists no {part} shard")
        for name, tokens in manifest[part].items():
            if Path(name).name != name:
                raise fault(f"lists {name!r:.80}, which is not a plain file name")
            if (held := len(Shard(path.parent / name))) != tokens:
                raise fault(f"{name} holds {held:,} tokens, not {tokens}")
    return Corpus(
        directory=path.parent,
        tokenizer=manifest["tokenizer"],
        vocab_size=vocab_size,
        bos_token=bos_token,
        fingerprint=manifest["fingerprint"],
        train=tuple(path.parent / name for name in manifest["train"]),
        val=tuple(path.parent / name for name in manifest["val"]),
        source=manifest["source"],
    )


def _open_fineweb(directory: Path) -> Corpus:
    fetch = "download some with `python scripts/data/fineweb.py --tokens 900M`"
    train, val = (tuple(sorted(directory.glob(f"*_{part}_*.bin"))) for part in ("train", "val"))
    for part, shards in ("train", train), ("val", val):
        if not shards:
            raise ShardError(f"{directory}: no {MANIFEST} and no *_{part}_*.bin shard; {fetch}")
    sizes = [(path.name, len(Shard(path))) for path in (*train, *val)]
    return Corpus(
        directory=directory,
        tokenizer="gpt2",
        vocab_size=GPT2_VOCAB,
        bos_token=GPT2_BOS,
        fingerprint=_digest("gpt2", GPT2_VOCAB, GPT2_BOS, sizes),
        train=train,
        val=val,
        source=f"FineWeb shards in {directory}",
    )


# ---------------------------------------------------------------------------------------------------------------------
# Batches


def _to_batch(tokens: np.ndarray) -> Batch:
    """T + 1 tokens as inputs (T,) int32 and targets (T,) int64."""
    return torch.from_numpy(tokens[:-1].astype(np.int32)), torch.from_numpy(tokens[1:].astype(np.int64))


def find_steps(bos: np.ndarray, shard_tokens: int, T: int, N: int) -> np.ndarray:
    """Where the micro-batches of every step that a shard holds start: (steps, N) int64, from its BOS positions (d,).

    The next micro-batch starts at the first BOS that is at least T tokens after the last one's start. A step is taken
    only while more than 2 N T + 1 tokens remain after its position, which is 0 for the first step (record 26's rule).
    """
    following = np.searchsorted(bos, bos + T).tolist()
    chain, at = [], 0
    while at < len(bos):
        chain.append(at)
        at = following[at]
    starts = bos[chain]
    steps = max(len(starts) - 1, 0) // N  # the last start is followed by no BOS that far away
    position = starts[: steps * N : N].copy()
    position[:1] = 0
    steps = int(np.count_nonzero(position + 2 * N * T + 1 < shard_tokens))
    return starts[: steps * N].reshape(steps, N)


class Usage(NamedTuple):
    """What one epoch trains on: `used` = steps * N * T tokens; `skipped` ones lie between sequences or end a shard."""

    steps: int
    used: int
    skipped: int


class TrainBatches:
    """Document-aligned micro-batches of T tokens, N to a step, in an order that depends on nothing but the seed.

    Epoch 0 visits the steps in file order, as record 26 does; epoch e > 0 in an order drawn from (seed, e). `epochs`
    None repeats for ever. Shards are opened, checked against the vocabulary and indexed when a step first needs them.
    Raises ShardError for a bad shard, or when the corpus does not hold even one step.
    """

    def __init__(
        self, corpus: Corpus, micro_batch_tokens: int, micro_batches: int, seed: int, epochs: int | None = None
    ):
        self.corpus, self.T, self.N, self.seed, self.epochs = corpus, micro_batch_tokens, micro_batches, seed, epochs
        self._shards: list[Shard] = []
        self._starts: list[np.ndarray] = []  # per shard (steps, N)
        self._ends: list[int] = []  # per shard: steps of the epoch up to its end
        self._order: tuple[int, np.ndarray] | None = None  # the last shuffled epoch and its order
        self._lock = threading.Lock()  # the trainer and its prefetching thread both index
        self._locate(0)

    @property
    def steps_per_epoch(self) -> int:
        """Steps in one pass over the corpus. Indexes every shard."""
        with self._lock:
            while self._index_next_shard():
                pass
        return self._ends[-1]

    def usage(self) -> Usage:
        """How many tokens one epoch uses and skips. Indexes every shard."""
        used = self.steps_per_epoch * self.N * self.T
        return Usage(self.steps_per_epoch, used, sum(len(shard) for shard in self._shards) - used)

    def epoch_of(self, step: int) -> int:
        """Which epoch `step` lies in, from 0. ShardError if the data has run out by then."""
        return self._locate(step)[0]

    def place(self, index: int) -> tuple[str, int]:
        """The shard's name and the first token in it of micro-batch `index` = step * N + i of the whole run."""
        number, start = self._place(index)
        return self._shards[number].path.name, start

    def micro_batch(self, index: int) -> Batch:
        """Micro-batch `index` of the whole run: inputs (T,) int32 and targets (T,) int64."""
        number, start = self._place(index)
        return _to_batch(self._shards[number].take(start, start + self.T + 1))

    def stream(self, start_step: int, rank: int, size: int, depth: int = 2) -> Generator[list[Batch], None, None]:
        """For every step from `start_step` on, this rank's contiguous N / size micro-batches, read `depth` steps ahead.

        Reading happens in a thread that ends with the iterator; its errors surface at the step that they belong to.
        Raises ConfigError if N is not a multiple of `size`.
        """
        if self.N % size:
            fits = ", ".join(str(n) for n in range(1, self.N + 1) if self.N % n == 0)
            raise ConfigError(f"{self.N} micro-batches cannot be shared by {size} processes; start one of {fits}")
        share = self.N // size
        return self._prefetch(start_step, range(rank * share, (rank + 1) * share), depth)

    def _place(self, index: int) -> tuple[int, int]:
        step, i = divmod(index, self.N)
        _, number, row = self._locate(step)
        return number, int(self._starts[number][row, i])

    def _load(self, step: int, share: range) -> list[Batch]:
        return [self.micro_batch(step * self.N + i) for i in share]

    def _prefetch(self, start_step: int, share: range, depth: int) -> Generator[list[Batch], None, None]:
        pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="batches")
        try:
            ahead: deque[Future[list[Batch]]] = deque()
            for step in count(start_step):
                ahead.append(pool.submit(self._load, step, share))
                if len(ahead) > depth:
                    yield ahead.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)

    def _locate(self, step: int) -> tuple[int, int, int]:
        """The epoch of `step`, the number of the shard that holds it, and the step's row in that shard's index."""
        if step < 0:
            raise IndexError(f"step {step} is before the first")
        with self._lock:
            while (not self._ends or step >= self._ends[-1]) and self._index_next_shard():
                pass
            total = self._ends[-1]
            if total == 0:
                tokens, wanted = sum(len(shard) for shard in self._shards), 2 * self.N * self.T + 1
                raise ShardError(
                    f"{self.corpus.directory}: {tokens:,} train tokens in {len(self._shards)} shard(s) hold no step: "
                    f"one of {self.N} x {self.T} needs a shard of more than {wanted:,}; lower the batch or add data"
                )
            epoch, row = divmod(step, total)
            if self.epochs is not None and epoch >= self.epochs:
                raise ShardError(
                    f"{self.corpus.directory}: the data ends after {self.epochs} epoch(s) of {total:,} steps, but step "
                    f"{step:,} (from 0) was asked for; train fewer steps, allow more epochs or add shards"
                )
            if epoch > 0:
                row = int(self._shuffled(epoch, total)[row])
        number = bisect.bisect_right(self._ends, row)
        return epoch, number, row - (self._ends[number - 1] if number else 0)

    def _index_next_shard(self) -> bool:
        """Open, check and index one more shard. False if there is none left."""
        if len(self._shards) == len(self.corpus.train):
            return False
        shard = Shard(self.corpus.train[len(self._shards)])
        bos = shard.find(self.corpus.bos_token, self.corpus.vocab_size)
        if len(bos) == 0:
            raise ShardError(
                f"{shard.path}: none of its {len(shard):,} tokens is the BOS token {self.corpus.bos_token}, so no "
                "document starts in it; write BOS before every document"
            )
        starts = find_steps(bos, len(shard), self.T, self.N)
        self._shards.append(shard)
        self._starts.append(starts)
        self._ends.append((self._ends[-1] if self._ends else 0) + len(starts))
        return True

    def _shuffled(self, epoch: int, total: int) -> np.ndarray:
        """The order (total,) of the steps in `epoch`, by raw PCG64 draws: NumPy's permutation() may change some day."""
        if self._order is None or self._order[0] != epoch:
            draws = np.random.PCG64(seed_for(self.seed, "epoch", epoch)).random_raw(total)
            self._order = epoch, np.argsort(draws, kind="stable")
        return self._order[1]


class ValBatches:
    """Validation in contiguous chunks of C tokens, not aligned to documents: chunk i of a shard starts at token i * C.

    There are val_tokens // C chunks, fewer if the shards end before: `len()` tells. Split the indices over ranks as you
    like: a chunk is the same on any number of them. Raises ShardError if the shards do not hold one chunk.
    """

    def __init__(self, corpus: Corpus, val_tokens: int, chunk_tokens: int):
        self.chunk_tokens = chunk_tokens
        self._chunks: list[tuple[Shard, int]] = []
        for shard in map(Shard, corpus.val):
            chunks = min((len(shard) - 1) // chunk_tokens, val_tokens // chunk_tokens - len(self._chunks))
            if chunks > 0:
                shard.find(corpus.bos_token, corpus.vocab_size, stop=chunks * chunk_tokens + 1)
                self._chunks += [(shard, i * chunk_tokens) for i in range(chunks)]
        if not self._chunks:
            raise ShardError(
                f"{corpus.directory}: no chunk of {chunk_tokens:,} + 1 tokens fits in val_tokens={val_tokens:,} and "
                "the val shards; lower the chunk's size or use more validation data"
            )

    def __len__(self) -> int:
        return len(self._chunks)

    def __getitem__(self, i: int) -> Batch:
        shard, start = self._chunks[i]
        return _to_batch(shard.take(start, start + self.chunk_tokens + 1))
