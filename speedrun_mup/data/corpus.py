"""Where a corpus comes from: FineWeb shards on disk, this Python's own standard library, or a small synthetic language.

The last two need no download. They are written on first use into a cache folder ($SPEEDRUN_MUP_CACHE, else
$XDG_CACHE_HOME/speedrun-mup, else ~/.cache/speedrun-mup) and found there afterwards.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import re
import secrets
import shutil
import sysconfig
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import torch

from speedrun_mup.core.errors import ConfigError
from speedrun_mup.core.seeds import seed_for
from speedrun_mup.data.bound import cache_folder
from speedrun_mup.data.documents import split_passages
from speedrun_mup.data.manifest import open_corpus, write_manifest
from speedrun_mup.data.shards import MANIFEST, Corpus, ShardError, measure_shard, mix, write_shard
from speedrun_mup.data.tokenizers import BpeTokenizer, ByteTokenizer, Tokenizer
from speedrun_mup.files import printable

FINEWEB_COMMAND = "speedrun-mup data fineweb --tokens 900M"

_RECIPE = 3  # raise it when the embedded or synthetic tokens change, so that older caches are left alone


# ---------------------------------------------------------------------------------------------------------------------
# The embedded corpus

_PASSAGE_CHARS = 512
_VAL_SHARE, _VAL_CHARS = 0.05, 600_000  # of the files, and no less text than this
_SMALLEST_LIBRARY_CHARS = 5_000_000
_EXCLUDED_FOLDERS = r"tests?|testing|idle_test|(site|dist)-packages|__pycache__|config-.*"
_EXCLUDED_FILES = r"(_sysconfigdata|sitecustomize|usercustomize).*"


def _read_sources(root: Path) -> dict[str, str]:
    """The UTF-8 Python files below `root` by relative path, sorted; no tests, nothing generated per machine."""
    files = {}
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [name for name in subfolders if not re.fullmatch(_EXCLUDED_FOLDERS, name)]
        for name in names:
            if name.endswith(".py") and not re.fullmatch(_EXCLUDED_FILES, name):
                path = Path(folder, name)
                with contextlib.suppress(UnicodeDecodeError):
                    files[path.relative_to(root).as_posix()] = path.read_bytes().decode()
    return dict(sorted(files.items()))


def _embedded_sources() -> tuple[dict[str, str], str]:
    """The files of the embedded corpus and a description. PyTorch's sources where Python came without its own."""
    name = f"the standard library of Python {platform.python_version()}"
    files = _read_sources(Path(sysconfig.get_path("stdlib")))
    if _chars(files) < _SMALLEST_LIBRARY_CHARS:
        name = (
            f"the sources of PyTorch {torch.__version__} (NOTICE: this Python came without the sources of its library)"
        )
        files = _read_sources(Path(torch.__file__).parent)
    if _chars(files) < _SMALLEST_LIBRARY_CHARS:
        raise ShardError("neither this Python nor PyTorch came with .py files to train on; use a folder of .bin shards")
    return files, f"{name}, {len(files):,} files, {_chars(files) / 1e6:.1f} MB"


def _chars(files: dict[str, str]) -> int:
    return sum(map(len, files.values()))


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _split(texts: Iterable[str]) -> dict[str, list[str]]:
    """Train and val passages. A file's hash decides on its part, a passage's on its place; equal ones come once, and one
    that stands in files of both parts is for validation only.

    The hash order is a fixed shuffle. Splitting by file order instead shifts the val loss by 0.16 nats.
    """
    by_hash = sorted(set(texts) - {""}, key=_sha256)
    val, chars = 0, 0
    while val < _VAL_SHARE * len(by_hash) or chars < _VAL_CHARS:
        chars += len(by_hash[val])
        val += 1
    parts = {"train": by_hash[val:], "val": by_hash[:val]}

    def passages(texts: Iterable[str]) -> set[str]:
        return {passage for text in texts for passage in split_passages(text.splitlines(True), _PASSAGE_CHARS)}

    held = {part: passages(texts) for part, texts in parts.items()}
    held["train"] -= held["val"]
    return {part: sorted(found, key=_sha256) for part, found in held.items()}


def embedded_corpus(tokenizer: str = "byte") -> Corpus:
    """The running Python's own standard library, without its tests: about 12 MB of text that is always available.

    tokenizer: "byte" (vocabulary 257) or "bpe:V" (V ids in all, trained on the train part). Another Python version has
    other files, which its fingerprint shows. Raises ConfigError for an unknown tokenizer or an unwritable cache folder.
    """
    matched = re.fullmatch(r"byte|bpe:(\d{1,5})", tokenizer)
    vocab_size = int(matched[1] or 257) if matched else 0
    if not 257 <= vocab_size <= 65536:
        raise ConfigError(f"tokenizer={tokenizer}: choose byte, or bpe:V with V from 257 to 65536, such as bpe:1024")
    files, source = _embedded_sources()

    def build(directory: Path) -> None:
        passages = _split(files.values())
        coder: Tokenizer = ByteTokenizer()
        if tokenizer != "byte":
            coder = BpeTokenizer.train(passages["train"], vocab_size)
            coder.save(directory)
        for part in "train", "val":
            write_shard(directory / f"{part}_000000.bin", coder.encode_documents(passages[part]))
        _describe(directory, tokenizer, coder.vocab_size, coder.bos_token, source)

    key = _sha256(json.dumps([_RECIPE, [(path, _sha256(text)) for path, text in files.items()]]))
    return _cached(f"embedded-{tokenizer.replace(':', '')}-{key[:12]}", build)


def _describe(directory: Path, tokenizer: str, vocab_size: int, bos_token: int, source: str) -> Corpus:
    """The manifest of a corpus of one train and one val shard."""
    names = {part: f"{part}_000000.bin" for part in ("train", "val")}
    train, val = ({name: measure_shard(directory / name, vocab_size, bos_token)} for name in names.values())
    return write_manifest(
        directory, tokenizer=tokenizer, vocab_size=vocab_size, bos_token=bos_token, train=train, val=val, source=source
    )


# ---------------------------------------------------------------------------------------------------------------------
# The synthetic corpus

_SYMBOLS, _TOPICS = 64, 4


def write_synthetic(directory: Path, train_tokens: int = 400_000, val_tokens: int = 50_000, seed: int = 0) -> Corpus:
    """A small language with something to learn, written into `directory`: the same bytes on every machine and version.

    Each document has one of four topics, and each topic its own order of likely successors of every symbol; the chance
    of the r-th falls as 1 / r**2. So a model gains from the last token, and more from working out the topic. Documents
    have 16 to 1,039 tokens, 272 on average.
    """
    directory.mkdir(parents=True, exist_ok=True)
    draws = np.random.PCG64(seed_for(seed, "synthetic", "language")).random_raw(_TOPICS * _SYMBOLS * _SYMBOLS)
    successors = np.argsort(draws.reshape(_TOPICS, _SYMBOLS, _SYMBOLS), axis=-1, kind="stable").tolist()
    for part, tokens in ("train", train_tokens), ("val", val_tokens):
        draws = np.random.PCG64(seed_for(seed, "synthetic", part)).random_raw(tokens)
        write_shard(directory / f"{part}_000000.bin", _speak(successors, draws))
    return _describe(directory, "synthetic", _SYMBOLS + 1, _SYMBOLS, f"synthetic language, seed {seed}")


def _speak(successors: list[list[list[int]]], draws: np.ndarray) -> list[int]:
    """One token per 64-bit draw (n,). Integer arithmetic only: floating point may round differently elsewhere."""
    chances = np.cumsum([2**32 // (rank + 1) ** 2 for rank in range(_SYMBOLS)], dtype=np.uint64)
    ranks = np.searchsorted(chances, draws % chances[-1], side="right").tolist()
    tokens: list[int] = []
    left = 0
    for draw, rank in zip(draws.tolist(), ranks):
        if left == 0:
            tokens.append(_SYMBOLS)
            topic, symbol = successors[draw % _TOPICS], 0
            left = 15 + ((draw >> 8 & 0xFFFF) * (draw >> 24 & 0xFFFF) >> 22)
        else:
            symbol = topic[symbol][rank]
            tokens.append(symbol)
            left -= 1
    return tokens


# ---------------------------------------------------------------------------------------------------------------------
# Finding one


def _cached(name: str, build: Callable[[Path], object]) -> Corpus:
    """The corpus called `name` in the cache folder; `build(directory)` writes it if it is not there.

    Built under another name and then renamed: a process that dies leaves nothing that looks finished, and of two that
    build at once the later one takes what the earlier wrote. Raises ConfigError if the folder cannot be written.
    """
    final = cache_folder() / name
    if not final.exists():
        building = final.with_name(f".{name}.{os.getpid()}-{secrets.token_hex(4)}")
        try:
            building.mkdir(parents=True)
            build(building)
            building.rename(final)
        except OSError as fault:
            if not final.exists():
                raise ConfigError(
                    f"{cache_folder()}: cannot write the corpus: {fault.strerror}; "
                    "set SPEEDRUN_MUP_CACHE to a folder that you may write"
                ) from None
        finally:
            shutil.rmtree(building, ignore_errors=True)
    return open_corpus(final)


def find_corpus(
    data: str = "auto", tokenizer: str = "byte", fineweb_dir: Path = Path("data/fineweb10B")
) -> tuple[Corpus, str]:
    """The corpus that `data` names, and one line that says which it is.

    data: "embedded", "synthetic", a folder of shards, several of these with weights ("a:0.7,b:0.3"), or "auto": FineWeb
    if it is in `fineweb_dir`, else embedded.
    tokenizer: of the embedded corpus; shards on disk come with theirs. Raises ConfigError, ShardError.
    """
    hint = ""
    if data == "auto":
        if (fineweb_dir / MANIFEST).exists() or any(fineweb_dir.glob("*.bin")):
            data = str(fineweb_dir)
        else:
            data, hint = "embedded", f"; no FineWeb shards in {fineweb_dir}, download them with: {FINEWEB_COMMAND}"
    if data == "embedded":
        corpus = embedded_corpus(tokenizer)
    elif data == "synthetic":
        corpus = _cached(f"synthetic-{_RECIPE}", write_synthetic)
    elif os.path.isdir(data):
        corpus = open_corpus(Path(data))
    elif "," in data:
        corpus = mix(*zip(*(_weighted(part, tokenizer) for part in data.split(","))))
    else:
        raise ConfigError(f"data={data} is not a folder; choose auto, embedded, synthetic or a folder of .bin shards")
    if tokenizer not in ("byte", corpus.tokenizer):
        raise ConfigError(
            f"tokenizer={tokenizer}, but {corpus.source} holds {corpus.tokenizer} tokens; "
            "leave the tokenizer out, or choose data=embedded"
        )
    return (
        corpus,
        f"data: {printable(corpus.source, 1000)}, {printable(corpus.tokenizer)} tokens, vocabulary {corpus.vocab_size:,}{hint}",
    )


def _weighted(text: str, tokenizer: str) -> tuple[Corpus, float]:
    """The corpus and the weight of "name:weight"."""
    name, _, weight = text.rpartition(":")
    try:
        if name in ("", "auto") or not 0 < float(weight) < float("inf"):
            raise ValueError
    except ValueError:
        raise ConfigError(f"data=...{text}: give several corpora as FOLDER:WEIGHT,FOLDER:WEIGHT") from None
    return find_corpus(name, tokenizer)[0], float(weight)
