"""The tokenizer of a text: a ready one, or one that is trained on the beginning of the text itself."""

from __future__ import annotations

import hashlib
import itertools
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any

from speedrun_mup.core.errors import ConfigError
from speedrun_mup.data.shards import TOKENIZER_FILE
from speedrun_mup.data.sources import STDIN, Source
from speedrun_mup.data.tokenize_text.chunks import NewDocument, Step, chunks_of
from speedrun_mup.data.tokenize_text.job import Job, TextSettings
from speedrun_mup.data.tokenize_text.progress import Progress
from speedrun_mup.data.tokenize_text.split import NothingToKeep, Smallest, no_text, one_document
from speedrun_mup.data.tokenizers import BpeTokenizer, Tokenizer, find_tokenizer, read_tokenizer, trained_vocab_size
from speedrun_mup.files import printable

_TRAINING_CHARS = 50_000_000  # of text, from its start, for train:N


def ready_tokenizer(sources: Sequence[Source], settings: TextSettings) -> Tokenizer | None:
    """The tokenizer, or None if it is to be trained. What cannot be is reported here, before anything is written."""
    if trained_vocab_size(settings.tokenizer) is None:
        return find_tokenizer(settings.tokenizer, settings.bos)
    if settings.bos is not None:
        raise ConfigError(
            f"tokenizer={settings.tokenizer} has a BOS token of its own; leave out --bos {printable(settings.bos)}"
        )
    if any(source.name == STDIN for source in sources):
        raise ConfigError(f"tokenizer={settings.tokenizer} reads the text twice; write standard input to a file first")
    return None


def trained_tokenizer(job: Job, work: Progress) -> Tokenizer:
    """The tokenizer for train:N, trained and saved in the folder, where it is found as long as its text is the same."""
    path = work.directory / TOKENIZER_FILE
    if path.exists() and work.trained_on and (not work.text_changed or work.trained_on == _training_digest(job)):
        return read_tokenizer(path)
    work.forget(0)
    digest = hashlib.sha256()
    vocab_size = int(job.settings.tokenizer.removeprefix("train:"))
    texts = training_text(job, digest)
    first = next(texts)  # here, because its faults are ours, not the trainer's
    try:
        tokenizer = BpeTokenizer.train(itertools.chain([first], texts), vocab_size)
    except ConfigError as fault:
        raise ConfigError(str(fault).replace("bpe:", "train:")) from None  # as the flag has it here
    tokenizer.save(work.directory)
    work.trained_on = digest.hexdigest()
    return tokenizer


def training_text(job: Job, digest: Any) -> Iterator[str]:
    """The first documents of the train part, as `split_parts` makes it; `digest` is updated with their hashes."""
    left, smallest = _TRAINING_CHARS, Smallest()
    largest: NewDocument | None = None

    def given(document: NewDocument) -> str:
        nonlocal left
        digest.update(document.digest)
        left -= len(document.text)
        return document.text

    for chunk in chunks_of(iter(job.reader()), Step(), job.settings, set(), is_told=False):
        for document in chunk.documents:
            largest = document if largest is None or document.digest > largest.digest else largest
            other = smallest.take(document.digest, document)  # the smallest are held back, until there are smaller ones
            if other and not other.is_val:
                yield given(other)
        if left <= 0:
            return
    if largest is None:
        raise NothingToKeep(no_text(job.sources))
    if largest.digest in smallest.chosen():
        raise NothingToKeep(one_document())
    for document in smallest.rest():
        if not document.is_val:
            yield given(document)
    if largest.is_val and left == _TRAINING_CHARS:
        yield given(largest)


def _training_digest(job: Job) -> str:
    digest = hashlib.sha256()
    deque(training_text(job, digest), maxlen=0)
    return digest.hexdigest()
