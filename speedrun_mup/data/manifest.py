"""The manifest, corpus.json, that says what a folder of shards holds; and FineWeb's folders, which have none."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path

import numpy as np

from speedrun_mup.data.shards import (
    MANIFEST,
    TOKENIZER_FILE,
    UNFINISHED,
    Corpus,
    Shard,
    ShardError,
    ShardFacts,
    digest_of,
    file_sha256,
)
from speedrun_mup.files import printable, read_json, write_whole

MANIFEST_VERSION = 2
GPT2_VOCAB, GPT2_BOS = 50257, 50256  # of the FineWeb shards


def fingerprint_of(
    tokenizer: str, vocab_size: int, bos_token: int, train: Mapping[str, ShardFacts], val: Mapping[str, ShardFacts]
) -> str:
    """What a manifest's fingerprint must be: it covers the vocabulary and the name and SHA-256 of every shard."""
    parts = {"train": train, "val": val}
    hashes = [(part, name, facts.sha256) for part, shards in parts.items() for name, facts in shards.items()]
    return digest_of([tokenizer, vocab_size, bos_token, hashes])


def write_manifest(
    directory: Path,
    *,
    tokenizer: str,
    vocab_size: int,
    bos_token: int,
    train: Mapping[str, ShardFacts],
    val: Mapping[str, ShardFacts],
    source: str,
    recipe: str = "",
    order: str = "",
    tally: Mapping[str, int] | None = None,
) -> Corpus:
    """Describe the shards `train` and `val` (by file name inside `directory`) in corpus.json, and open the result."""
    parts = {"train": train, "val": val}
    saved = directory / TOKENIZER_FILE
    manifest = {
        "version": MANIFEST_VERSION,
        "source": source,
        "recipe": recipe,
        "tokenizer": tokenizer,
        "tokenizer_sha256": file_sha256(saved) if saved.exists() else "",
        "vocab_size": vocab_size,
        "bos_token": bos_token,
        "fingerprint": fingerprint_of(tokenizer, vocab_size, bos_token, train, val),
        **({"order": order} if order else {}),
        **({"tally": dict(tally)} if tally else {}),
        **{part: {name: asdict(facts) for name, facts in shards.items()} for part, shards in parts.items()},
    }
    text = json.dumps(manifest, indent=2, allow_nan=False) + "\n"
    write_whole(directory / MANIFEST, text, "free some space or choose another folder", ShardError)
    return open_corpus(directory)


def open_corpus(directory: Path) -> Corpus:
    """The corpus in `directory`: by its corpus.json, or by upstream's FineWeb names (GPT-2 tokens) where there is none.

    Every shard's header is checked. FineWeb's fingerprint covers names, sizes and samples of the tokens. A manifest's is
    computed from its entries, to which the files are bound when they are first read. Raises ShardError.
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
    "tokenizer_sha256": str,
    "recipe": str,
    "train": dict,  # file name: its ShardFacts
    "val": dict,
}


def _open_manifest(path: Path) -> Corpus:
    advice = "delete this folder and prepare the corpus again"

    def fault(text: str) -> ShardError:
        return ShardError(f"{printable(path)}: {text}; {advice}")

    manifest = read_json(path, advice, ShardError)
    found = manifest.get("version") if isinstance(manifest, dict) else None
    if found != MANIFEST_VERSION:
        raise fault(f"manifest version {_shown(found)}, expected {MANIFEST_VERSION}")
    for key, kind in _MANIFEST_FIELDS.items():
        if type(manifest.get(key)) is not kind:
            raise fault(f"{key} is {_shown(manifest.get(key))}, expected {kind.__name__}")
    tally = manifest.get("tally", {})
    if not isinstance(tally, dict) or not all(type(count) is int for count in tally.values()):
        raise fault(f"tally is {_shown(tally)}, expected counts of documents")
    if not isinstance(order := manifest.get("order", ""), str):
        raise fault(f"order is {_shown(order)}, expected text")
    vocab_size, bos_token = manifest["vocab_size"], manifest["bos_token"]
    if not 0 <= bos_token < vocab_size <= 65536:
        raise fault(
            f"bos_token {_shown(bos_token)}, vocab_size {_shown(vocab_size)}; expected 0 <= bos_token < vocab_size <= 65536"
        )
    facts: dict[str, dict[str, ShardFacts]] = {"train": {}, "val": {}}
    for part, listed in facts.items():
        if not manifest[part]:
            raise fault(f"lists no {part} shard")
        for name, entry in manifest[part].items():
            if Path(name).name != name or name == "..":
                raise fault(f"lists {_shown(name)}, which is not a plain file name")
            listed[name] = _facts_of(name, entry, fault)
            if (held := len(Shard(path.parent / name))) != listed[name].tokens:
                raise fault(f"{printable(name)} holds {held:,} tokens, not {_shown(listed[name].tokens)}")
    if twice := facts["train"].keys() & facts["val"]:
        raise fault(f"lists {_shown(min(twice))} for training and for validation")
    told = {key: manifest[key] for key in _MANIFEST_FIELDS if key not in ("train", "val")}
    told["told_fingerprint"] = told["fingerprint"]
    told["fingerprint"] = fingerprint_of(told["tokenizer"], vocab_size, bos_token, facts["train"], facts["val"])
    return Corpus(
        directory=path.parent,
        train=tuple(path.parent / name for name in facts["train"]),
        val=tuple(path.parent / name for name in facts["val"]),
        facts=facts["train"] | facts["val"],
        order=order,
        tally=tally,
        **told,
    )


def _shown(value: object) -> str:
    """A value of a foreign JSON, for a message."""
    try:
        return printable(repr(value), 80)
    except RecursionError:
        return "nested too deeply"


def _facts_of(name: str, entry: object, fault: Callable[[str], ShardError]) -> ShardFacts:
    """What a manifest says about one shard, its types checked."""
    kinds = {"tokens": int, "documents": int, "sha256": str}
    fits = isinstance(entry, dict) and {key: type(value) for key, value in entry.items()} == kinds
    if not isinstance(entry, dict) or not fits or not re.fullmatch("[0-9a-f]{64}", entry["sha256"]):
        raise fault(f"{printable(name)} has {_shown(entry)}, expected tokens, documents and sha256")
    return ShardFacts(**entry)


_SAMPLES, _SAMPLE_BYTES = 8, 4096


def _sample(path: Path) -> tuple[int, str]:
    """The tokens of a shard, and a hash of blocks spread over its file: cheap, and another one in another file."""
    shard = Shard(path)
    tokens, block = len(shard), _SAMPLE_BYTES // 2
    starts = (
        range(0, tokens, block) if tokens <= _SAMPLES * block else np.linspace(0, tokens - block, _SAMPLES, dtype=int)
    )
    digest = hashlib.sha256()
    for start in starts:
        digest.update(shard.take(int(start), min(int(start) + block, tokens)).tobytes())
    return tokens, digest.hexdigest()


def _open_fineweb(directory: Path) -> Corpus:
    fetch = "download some with `speedrun-mup data fineweb --tokens 900M`"
    if (directory / UNFINISHED).exists():
        raise ShardError(f"{printable(directory)}: `data text` did not finish; run the same command again")
    train, val = (tuple(sorted(directory.glob(f"*_{part}_*.bin"))) for part in ("train", "val"))
    for part, shards in ("train", train), ("val", val):
        if not shards:
            raise ShardError(f"{printable(directory)}: no {MANIFEST} and no *_{part}_*.bin shard; {fetch}")
    samples = [(path.name, *_sample(path)) for path in (*train, *val)]
    return Corpus(
        directory=directory,
        tokenizer="gpt2",
        vocab_size=GPT2_VOCAB,
        bos_token=GPT2_BOS,
        fingerprint=digest_of(["gpt2", GPT2_VOCAB, GPT2_BOS, samples]),
        former_fingerprint=digest_of(["gpt2", GPT2_VOCAB, GPT2_BOS, [(name, tokens) for name, tokens, _ in samples]]),
        train=train,
        val=val,
        source=f"FineWeb shards in {directory}",
    )
