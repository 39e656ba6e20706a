"""Inspect and verify a shard folder: what it holds, whether every byte of it is right, how long its documents are."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from speedrun_mup.core.errors import UserError
from speedrun_mup.data.batches import uses
from speedrun_mup.data.shards import (
    MAGIC,
    TOKENIZER_FILE,
    VERSION,
    Corpus,
    Shard,
    ShardError,
    ShardFacts,
    file_sha256,
)
from speedrun_mup.data.tokenizers import load_tokenizer
from speedrun_mup.files import printable
from speedrun_mup.pictures import picture, plain

_SHOWN_TOKENS = 120  # of a document


@dataclass(frozen=True)
class Inspection:
    """What `inspect_corpus` found. lengths: tokens of every train document, BOS not counted. faults: one line each.

    uses: what `uses` says, if there is no fault.
    """

    corpus: Corpus
    facts: dict[Path, ShardFacts]
    lengths: np.ndarray
    faults: tuple[str, ...]
    uses: dict[str, str]

    def summary(self) -> str:
        """Everything but the documents themselves, for a terminal."""
        corpus = self.corpus
        lines = [
            f"source       {printable(corpus.source)}",
            f"tokenizer    {printable(corpus.tokenizer)}, vocabulary {corpus.vocab_size:,}, BOS {corpus.bos_token}",
            f"fingerprint  {corpus.fingerprint}",
            f"format       magic {MAGIC}, version {VERSION}, 16-bit ids",
            f"{'shard':<32} {'tokens':>15} {'documents':>12}  sha256",
        ]
        for path, facts in self.facts.items():
            lines.append(f"{path.name:<32} {facts.tokens:>15,} {facts.documents:>12,}  {facts.sha256[:16]}")
        low, middle, high = np.quantile(self.lengths, [0.1, 0.5, 0.9])
        lines.append(
            f"documents    {len(self.lengths):,} for training, of {self.lengths.mean():,.0f} tokens on average; median "
            f"{middle:,.0f}, middle 80 % from {low:,.0f} to {high:,.0f}, longest {self.lengths.max():,}"
        )
        lines += [f"use          preset {preset}: {use}" for preset, use in self.uses.items()]
        checked = (
            "every header, id and hash" if corpus.facts else "every header and id; there is no manifest with hashes"
        )
        lines.append(f"checked      {checked}: {f'{len(self.faults)} fault(s)' if self.faults else 'all right'}")
        return "\n".join(lines + [f"FAULT        {fault}" for fault in self.faults])

    def plot(self, out: Path) -> Path:
        """Draw how long the train documents are, and which share of the tokens they hold, as a PNG. Returns `out`.

        Raises PictureError if it cannot be drawn or written.
        """
        lengths = np.maximum(self.lengths, 1)
        bins = np.geomspace(1, lengths.max() + 1, 60).tolist()
        with picture(out, (7, 4.2)) as figure:
            axes = figure.subplots()
            axes.hist(lengths, bins, weights=np.full(len(lengths), 100 / len(lengths)), alpha=0.6, label="documents")
            axes.hist(
                lengths,
                bins,
                weights=100 * lengths / lengths.sum(),
                histtype="step",
                linewidth=1.5,
                label="their tokens",
            )
            title = plain(self.corpus.directory.name)
            axes.set(xscale="log", xlabel="tokens of a document", ylabel="share in %", title=title)
            axes.legend()
        return out


def inspect_corpus(corpus: Corpus) -> Inspection:
    """Read all of `corpus`: ids against the vocabulary; counts, hashes and fingerprint against its manifest, if any.

    Raises ShardError only if no train document is left to speak of; other faults are collected.
    """
    facts: dict[Path, ShardFacts] = {}
    lengths: list[np.ndarray] = [np.empty(0, np.int64)]
    faults: list[str] = []
    for path in (*corpus.train, *corpus.val):
        try:
            shard = Shard(path)
            starts = shard.find(corpus.bos_token, corpus.vocab_size)
        except ShardError as fault:
            faults.append(str(fault))
            continue
        facts[path] = ShardFacts(len(shard), len(starts), file_sha256(path))
        if corpus.facts.get(path.name, facts[path]) != facts[path]:
            faults.append(f"{path}: not what the manifest says; its bytes have changed: prepare or fetch it again")
        if path in corpus.train:
            lengths.append(np.diff(starts, append=len(shard)) - 1)
    if corpus.facts:
        faults += _manifest_faults(corpus)
    found = np.concatenate(lengths)
    if not len(found):
        raise ShardError(faults[0] if faults else f"{corpus.directory}: no document starts in any train shard")
    return Inspection(corpus, facts, found, tuple(faults), {} if faults else uses(corpus))


def _manifest_faults(corpus: Corpus) -> list[str]:
    faults = []
    if corpus.told_fingerprint != corpus.fingerprint:
        faults.append(f"{corpus.directory}: the manifest's fingerprint is not that of its entries; it was edited")
    saved = corpus.directory / TOKENIZER_FILE
    try:
        found = file_sha256(saved) if saved.exists() else ""
    except OSError as fault:
        found = str(fault.strerror)
    if corpus.tokenizer_sha256 != found:
        faults.append(f"{saved}: missing or changed; prepare the corpus again")
    return faults


def first_documents(corpus: Corpus, count: int) -> list[str]:
    """The beginning of each of the first `count` train documents as text; ids where there is no tokenizer for them."""
    if not count:
        return []  # without looking for a tokenizer, which may be on a hub that cannot be reached
    shard = Shard(corpus.train[0])
    starts = np.flatnonzero(shard.take(0, min(2**24, len(shard))) == corpus.bos_token)[: count + 1].tolist()
    ends = [*starts[1:], len(shard)] if len(starts) <= count else starts[1:]
    try:
        decode = load_tokenizer(corpus).decode
    except UserError as fault:
        note = f" (ids, because: {fault})"
        decode = lambda ids: f"{ids}{note}"  # noqa: E731
    shown = []
    for start, end in zip(starts, ends):
        cut = min(end, start + 1 + _SHOWN_TOKENS)
        text = decode(shard.take(start + 1, cut).tolist())
        shown.append(f"[{end - start - 1:,} tokens] {text}{' ...' if cut < end else ''}")
    return shown
