"""Small corpora of random documents, and a reader of the shard format that shares no code with ours."""

from pathlib import Path

import numpy as np
import pytest

from speedrun_mup.data.manifest import write_manifest
from speedrun_mup.data.shards import Corpus, ShardError, ShardFacts, measure_shard, write_shard

BOS, VOCAB = 50, 51


def documents(tokens: int, mean: int, seed: int = 0) -> np.ndarray:
    """Random documents, BOS before each, cut at `tokens`."""
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, BOS, tokens)
    ids[np.cumsum(rng.integers(1, 2 * mean, tokens)).clip(max=tokens - 1)] = BOS
    ids[0] = BOS
    return ids


def make_corpus(directory: Path, train: list[np.ndarray], val: list[np.ndarray] | None = None) -> Corpus:
    directory.mkdir(exist_ok=True)
    facts: dict[str, dict[str, ShardFacts]] = {"train": {}, "val": {}}
    for part, shards in ("train", train), ("val", val or [documents(100, 10)]):
        for number, tokens in enumerate(shards):
            path = directory / f"{part}_{number:06d}.bin"
            write_shard(path, tokens)
            facts[part][path.name] = measure_shard(path, 65536, BOS)
    return write_manifest(directory, tokenizer="test", vocab_size=VOCAB, bos_token=BOS, source="a test", **facts)


def one_line(error: pytest.ExceptionInfo[ShardError], *words: object) -> None:
    text = str(error.value)
    assert "\n" not in text and error.value.exit_code == 3
    for word in words:
        assert str(word) in text, text


def naive_read(path: Path) -> list[int]:
    """The tokens of a shard, read with numpy alone."""
    raw = path.read_bytes()
    header = np.frombuffer(raw[:1024], "<i4")
    assert header[:2].tolist() == [20240520, 1] and not header[3:].any()
    tokens = np.frombuffer(raw[1024:], "<u2")
    assert len(tokens) == header[2]
    return tokens.tolist()
