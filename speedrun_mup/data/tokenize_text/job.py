"""What `tokenize_text` is asked for: settings, and the sources they are applied to."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

from speedrun_mup.core.errors import ConfigError
from speedrun_mup.data.documents import START, DocumentReader, Position
from speedrun_mup.data.shards import TOKENIZER_FILE, digest_of, file_sha256
from speedrun_mup.data.sources import LARGEST_PASSAGE, Source
from speedrun_mup.files import printable

PARTS = ("train", "val")
ORDERS = ("shuffled", "given")


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


@dataclass(frozen=True)
class Job:
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
        """Equal for the same command on the same or on corrected text. A tokenizer in a file or a folder counts by its bytes."""
        path = Path(self.settings.tokenizer)
        path = path / TOKENIZER_FILE if path.is_dir() else path
        digest = file_sha256(path) if path.is_file() else ""
        return digest_of([self.paths, dataclasses.asdict(self.settings), digest])

    @property
    def recipe(self) -> str:
        """Equal for equal sources and settings."""
        return digest_of([self.identity, [dataclasses.astuple(source) for source in self.sources]])

    def reader(self, start: Position = START) -> DocumentReader:
        """Reads the documents from `start` on."""
        return DocumentReader(self.sources, self.settings.field, self.settings.passage, start, self.skip_bad)


def other_corpus(directory: Path) -> ConfigError:
    """That a folder holds something else than what was asked for."""
    return ConfigError(f"{printable(directory)} comes from other text or settings; choose another --out, or delete it")
