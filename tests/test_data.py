"""Shards and manifests: only whole, well-formed files pass. Batches: record 26's, whatever the world size."""

import ast
import gc
import gzip
import hashlib
import inspect
import json
import os
import random
import struct
import subprocess
import sys
import threading
import tracemalloc
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from speedrun_mup import data
from speedrun_mup.core.utils import ConfigError
from speedrun_mup.data import (
    GPT2_BOS,
    GPT2_VOCAB,
    Corpus,
    Shard,
    ShardError,
    TrainBatches,
    ValBatches,
    find_steps,
    open_corpus,
    read_shard,
    write_manifest,
    write_shard,
)

BOS, VOCAB = 50, 51
FUZZED_FILES = 2000


def documents(tokens: int, mean: int, seed: int = 0) -> np.ndarray:
    """Random documents, BOS before each, cut at `tokens`."""
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, BOS, tokens)
    ids[np.cumsum(rng.integers(1, 2 * mean, tokens)).clip(max=tokens - 1)] = BOS
    ids[0] = BOS
    return ids


def make_corpus(directory: Path, train: list[np.ndarray], val: list[np.ndarray] | None = None) -> Corpus:
    directory.mkdir(exist_ok=True)
    names: dict[str, list[str]] = {"train": [], "val": []}
    for part, shards in ("train", train), ("val", val or [documents(100, 10)]):
        for number, tokens in enumerate(shards):
            names[part].append(f"{part}_{number:06d}.bin")
            write_shard(directory / names[part][-1], tokens)
    return write_manifest(directory, tokenizer="test", vocab_size=VOCAB, bos_token=BOS, source="a test", **names)


@pytest.fixture
def small(tmp_path: Path) -> Corpus:
    """Four shards of random documents, unequal in length."""
    return make_corpus(tmp_path / "small", [documents(n, 40, n) for n in (5000, 3000, 4000, 2500)])


def one_line(error: pytest.ExceptionInfo[ShardError], *words: object) -> None:
    text = str(error.value)
    assert "\n" not in text and error.value.exit_code == 3
    for word in words:
        assert str(word) in text, text


# --- Shards ---


def naive_read(path: Path) -> list[int]:
    """An independent reader of the format."""
    raw = path.read_bytes()
    magic, version, count = struct.unpack("<iii", raw[:12])
    assert (magic, version) == (20240520, 1) and raw[12:1024] == bytes(1012)
    return list(struct.unpack(f"<{count}H", raw[1024:]))


@given(st.lists(st.integers(0, 65535), min_size=1, max_size=200))
@settings(deadline=None, max_examples=50)
def test_write_then_read(tmp_path_factory: pytest.TempPathFactory, tokens: list[int]) -> None:
    path = tmp_path_factory.mktemp("shard") / "a.bin"
    write_shard(path, tokens)
    assert read_shard(path).tolist() == tokens == naive_read(path)
    assert read_shard(path).dtype == np.uint16
    assert list(path.parent.iterdir()) == [path]


def test_read_is_a_read_only_map(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    write_shard(path, np.arange(2_000_000) % 65536)
    tracemalloc.start()
    tokens = read_shard(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 100_000 and len(tokens) == 2_000_000
    with pytest.raises(ValueError, match="read-only"):
        tokens[0] = 1


@pytest.mark.parametrize("dtype", ["<u2", ">u2", "<i4", ">i8", "u1"])
def test_write_any_integer_type(tmp_path: Path, dtype: str) -> None:
    write_shard(tmp_path / "a.bin", np.arange(200, dtype=dtype)[::3])
    assert naive_read(tmp_path / "a.bin") == list(range(0, 200, 3))


@pytest.mark.parametrize(
    "tokens, word",
    [
        ([1, 65536], "65536"),
        ([-1, 2], "-1"),
        (np.array([70000], np.uint32), "70000"),
        ([2**70], "integers"),
        ([], "integers"),
        (np.empty(0, np.uint16), "split"),
        ([1.0, 2.0], "float64"),
        (np.zeros((2, 2), np.uint16), "(2, 2)"),
        (np.broadcast_to(np.uint16(1), 2**31), "split"),
    ],
    ids=lambda value: None if isinstance(value, str) else "tokens",
)
def test_write_never_wraps(tmp_path: Path, tokens: object, word: str) -> None:
    with pytest.raises(ShardError) as error:
        write_shard(tmp_path / "a.bin", tokens)  # type: ignore[arg-type]
    one_line(error, "a.bin", word)
    assert list(tmp_path.iterdir()) == []


def test_failed_write_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.bin"
    write_shard(path, [1, 2])
    for call in "fsync", "replace":
        with monkeypatch.context() as patch:
            patch.setattr(os, call, lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
            with pytest.raises(ShardError) as error:
                write_shard(path, [3])
        one_line(error, path, "No space left")
    assert naive_read(path) == [1, 2] and list(tmp_path.iterdir()) == [path]
    with pytest.raises(ShardError, match="cannot write"):
        write_shard(path / "below_a_file.bin", [1])


def header(magic: int = 20240520, version: int = 1, count: int = 3, order: str = "<") -> bytes:
    return struct.pack(f"{order}256i", magic, version, count, *[0] * 253)


BAD_FILES = {
    "empty": (b"", "empty"),
    "one byte": (b"\x01", "no token shard"),
    "magic only": (header()[:4], "truncated"),
    "half a header": (header()[:512], "truncated"),
    "header only": (header(), "truncated"),
    "one token missing": (header() + bytes(4), "truncated"),
    "odd length": (header() + bytes(5), "truncated"),
    "one byte too many": (header() + bytes(7), "appended"),
    "count too small": (header(count=2) + bytes(6), "appended"),
    "count too large": (header(count=4) + bytes(6), "truncated"),
    "count zero": (header(count=0), "counts 0"),
    "count zero, but tokens": (header(count=0) + bytes(6), "counts 0"),
    "count negative": (header(count=-1) + bytes(6), "counts -1"),
    "count largest": (header(count=2**31 - 1) + bytes(6), "4,294,968,318"),
    "magic": (header(magic=20240521) + bytes(6), "no token shard"),
    "big-endian": (header(order=">") + bytes(6), "big-endian"),
    "version 2": (header(version=2) + bytes(6), "version 2"),
    "32-bit tokens": (header(magic=20240801, version=7) + bytes(12), "32-bit"),
    "git-lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n", "git lfs pull"),
    "html": (b"\n<!DOCTYPE html><html>404</html>" + b" " * 2000, "HTML"),
    "gzip": (gzip.compress(header() + bytes(6)), "gzip"),
    "npy": (b"\x93NUMPY\x01\x00" + bytes(2000), ".npy"),
    "zip": (b"PK\x03\x04" + bytes(2000), "zip"),
    "zeros": (bytes(4096), "no token shard"),
}


@pytest.mark.parametrize("kind", BAD_FILES)
def test_bad_file_is_refused(tmp_path: Path, kind: str) -> None:
    content, word = BAD_FILES[kind]
    (tmp_path / "a.bin").write_bytes(content)
    with pytest.raises(ShardError) as error:
        read_shard(tmp_path / "a.bin")
    one_line(error, tmp_path / "a.bin", word)


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in tmp_path / "missing.bin", tmp_path, tmp_path / "pipe", tmp_path / "nul\0":
        with pytest.raises(ShardError) as error:
            read_shard(path)
        one_line(error, path)


def test_fuzzed_files(tmp_path: Path) -> None:
    """Any mutation either raises ShardError or leaves a shard as long as its header says; no big allocation."""
    rng = random.Random(0)
    good = header(count=500) + np.arange(500, dtype="<u2").tobytes()
    path, refused = tmp_path / "a.bin", 0
    tracemalloc.start()
    for _ in range(FUZZED_FILES):
        raw = bytearray(good)
        for _ in range(rng.randint(1, 4)):
            action = rng.randrange(4)
            if action == 0:
                raw[rng.randrange(12) % len(raw)] = rng.randrange(256)
            elif action == 1:
                raw[rng.randrange(len(raw))] ^= 1 << rng.randrange(8)
            elif action == 2:
                del raw[rng.randrange(1, len(raw) + 1) :]
            else:
                raw += rng.randbytes(rng.randint(1, 64))
        path.write_bytes(raw)
        try:
            tokens = read_shard(path)
        except ShardError as error:
            assert "\n" not in str(error)
            refused += 1
        else:
            assert raw[:8] == good[:8] and len(raw) == 1024 + 2 * len(tokens)
            assert tokens.tobytes() == raw[1024:]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert FUZZED_FILES / 2 < refused < FUZZED_FILES
    assert peak < 1_000_000


def test_longest_shard(tmp_path: Path) -> None:
    """A sparse file of 2**31 - 1 tokens: offsets are 64-bit and nothing is read that nobody asked for."""
    path = tmp_path / "a.bin"
    with open(path, "wb") as file:
        file.write(header(count=2**31 - 1))
        file.truncate(1024 + 2 * (2**31 - 1))
        file.seek(-2, os.SEEK_END)
        file.write(b"\x07\x00")
    assert len(read_shard(path)) == 2**31 - 1
    assert Shard(path).take(2**31 - 3, 2**31 - 1).tolist() == [0, 7]


def test_file_that_shrinks_is_an_error_not_a_signal(small: Corpus) -> None:
    batches = TrainBatches(small, 64, 2, seed=0)
    batches.micro_batch(0)
    os.truncate(small.train[0], 2000)
    with pytest.raises(ShardError) as error:
        batches.micro_batch(0)
    one_line(error, small.train[0], "2,000")
    val = ValBatches(small, 64, 16)
    os.truncate(small.val[0], 1100)
    with pytest.raises(ShardError):
        val[0]


def test_checks_survive_python_minus_o() -> None:
    assert not [node for node in ast.walk(ast.parse(inspect.getsource(data))) if isinstance(node, ast.Assert)]


# --- Corpora ---


def test_manifest_round_trip(small: Corpus) -> None:
    assert open_corpus(small.directory) == small
    assert [path.name for path in small.train] == [f"train_{i:06d}.bin" for i in range(4)]
    assert (small.tokenizer, small.vocab_size, small.bos_token, small.source) == ("test", VOCAB, BOS, "a test")


def test_fingerprint_is_of_the_tokens(tmp_path: Path) -> None:
    one, same, other = (make_corpus(tmp_path / str(i), [documents(100, 10, i // 2)]) for i in range(3))
    assert one.fingerprint == same.fingerprint != other.fingerprint


def write_fineweb(directory: Path, val: str = "fineweb_val_000000.bin") -> Path:
    directory.mkdir()
    for name in "fineweb_train_000002.bin", "fineweb_train_000001.bin", val:
        write_shard(directory / name, [GPT2_BOS, *range(100)])
    return directory


def test_upstream_layout(tmp_path: Path) -> None:
    corpus = open_corpus(write_fineweb(tmp_path / "a"))
    assert [path.name for path in corpus.train] == ["fineweb_train_000001.bin", "fineweb_train_000002.bin"]
    assert (corpus.tokenizer, corpus.vocab_size, corpus.bos_token) == ("gpt2", GPT2_VOCAB, GPT2_BOS)
    assert corpus.fingerprint == open_corpus(write_fineweb(tmp_path / "b")).fingerprint
    write_shard(tmp_path / "b" / "fineweb_train_000003.bin", [GPT2_BOS])
    assert corpus.fingerprint != open_corpus(tmp_path / "b").fingerprint


def test_folder_without_shards(tmp_path: Path) -> None:
    with pytest.raises(ShardError) as error:
        open_corpus(tmp_path / "missing")
    one_line(error, "no such folder")
    with pytest.raises(ShardError) as error:
        open_corpus(tmp_path)
    one_line(error, "_train_", "fineweb.py")
    with pytest.raises(ShardError) as error:
        open_corpus(write_fineweb(tmp_path / "a", val="fineweb_other_000000.bin"))
    one_line(error, "_val_", "fineweb.py")


@pytest.mark.parametrize(
    "change, word",
    [
        ({"version": 2}, "version 2"),
        ({"vocab_size": "51"}, "expected int"),
        ({"vocab_size": 70000}, "65536"),
        ({"bos_token": 51}, "bos_token 51"),
        ({"bos_token": True}, "expected int"),
        ({"fingerprint": None}, "expected str"),
        ({"train": ["train_000000.bin"]}, "expected dict"),
        ({"val": {}}, "no val shard"),
        ({"train": {"../train_000000.bin": 5000}}, "plain file name"),
        ({"train": {"/absolute.bin": 5000}}, "plain file name"),
        ({"train": {"train_000000.bin": 4999}}, "5,000 tokens, not 4999"),
        ({"train": {"missing.bin": 5000}}, "No such file"),
        ({"train": {"..": 5000}}, "not a file"),
    ],
)
def test_bad_manifest(small: Corpus, change: dict[str, object], word: str) -> None:
    path = small.directory / "corpus.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ShardError) as error:
        open_corpus(small.directory)
    one_line(error, small.directory, word)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '"x"', "\xff", "[" * 100_000, '{"version": 1}'])
def test_manifest_that_is_none(small: Corpus, text: str) -> None:
    (small.directory / "corpus.json").write_text(text, encoding="latin-1")
    with pytest.raises(ShardError) as error:
        open_corpus(small.directory)
    one_line(error, "corpus.json", "again")


# --- Training batches ---


def upstream_starts(tokens: list[int], bos: int, T: int, N: int) -> tuple[list[list[int]], bool]:
    """Record 26, step by step: starts of each step's N sequences, and whether the last scan found fewer than N."""
    steps, pos, span = [], 0, 2 * N * T
    while pos + span + 1 < len(tokens):
        boundaries = [i for i in range(pos, pos + span) if tokens[i] == bos]
        starts: list[int] = []
        start = boundaries[0] if boundaries else 0
        for boundary in boundaries[1:]:
            if boundary - start >= T:
                starts.append(start)
                start = boundary
            if len(starts) == N:
                pos = boundary
                break
        else:
            return steps, True  # upstream stops the run here
        steps.append(starts)
    return steps, False


@given(
    gaps=st.lists(st.integers(1, 40), min_size=1, max_size=150),
    lead=st.integers(0, 5),
    tail=st.integers(1, 60),
    T=st.integers(1, 30),
    N=st.integers(1, 4),
)
@settings(deadline=None, max_examples=400)
def test_steps_are_upstreams(gaps: list[int], lead: int, tail: int, T: int, N: int) -> None:
    bos = lead + np.cumsum([0, *gaps])
    tokens = np.zeros(int(bos[-1]) + tail, np.int64)
    tokens[bos] = 1
    expected, gave_up = upstream_starts(tokens.tolist(), 1, T, N)
    steps = find_steps(bos, len(tokens), T, N).tolist()
    assert steps[: len(expected)] == expected
    if not gave_up:
        assert len(steps) == len(expected)
    for starts in steps:
        assert all(b - a >= T for a, b in pairwise(starts)) and starts[-1] + T < len(tokens)


def test_batches_are_upstreams_over_shards(small: Corpus) -> None:
    T, N = 96, 3
    expected = []
    for path in small.train:
        tokens = naive_read(path)
        steps, gave_up = upstream_starts(tokens, BOS, T, N)
        assert steps and not gave_up
        expected += [tokens[start : start + T + 1] for starts in steps for start in starts]
    batches = TrainBatches(small, T, N, seed=0, epochs=1)
    assert batches.steps_per_epoch * N == len(expected)
    for index, tokens in enumerate(expected):
        inputs, targets = batches.micro_batch(index)
        assert inputs.tolist() == tokens[:-1] and targets.tolist() == tokens[1:]
        assert (inputs.dtype, targets.dtype) == (torch.int32, torch.int64) and inputs[0] == BOS


def stream_digest(corpus: Corpus, size: int, steps: int) -> str:
    """SHA-256 of the tokens that `size` ranks see together, step by step in rank order."""
    batches = [TrainBatches(corpus, 64, 8, seed=1) for _ in range(size)]
    streams = [each.stream(0, rank, size) for rank, each in enumerate(batches)]
    digest = hashlib.sha256()
    for _ in range(steps):
        for stream in streams:
            for inputs, targets in next(stream):
                digest.update(inputs.numpy().tobytes() + targets.numpy().tobytes())
    for stream in streams:
        stream.close()
    return digest.hexdigest()


def test_tokens_do_not_depend_on_the_world_size(small: Corpus) -> None:
    per_epoch = TrainBatches(small, 64, 8, seed=1).steps_per_epoch
    assert per_epoch >= 8
    assert len({stream_digest(small, size, 2 * per_epoch + 1) for size in (1, 2, 4, 8)}) == 1


def test_any_step_can_be_resumed(small: Corpus) -> None:
    def run(start: int, steps: int) -> list[list[int]]:
        stream = TrainBatches(small, 64, 2, seed=3).stream(start, 0, 1)
        return [inputs.tolist() for _ in range(steps) for inputs, _ in next(stream)]

    per_epoch = TrainBatches(small, 64, 2, seed=3).steps_per_epoch
    whole = run(0, 3 * per_epoch)
    for start in range(0, 3 * per_epoch - 4, 7):
        assert run(start, 4) == whole[2 * start : 2 * (start + 4)]


def test_epochs_visit_the_same_steps_in_another_order(small: Corpus) -> None:
    def epoch(number: int, seed: int) -> list[bytes]:
        batches = TrainBatches(small, 64, 2, seed)
        steps = range(number * batches.steps_per_epoch, (number + 1) * batches.steps_per_epoch)
        assert {batches.epoch_of(step) for step in steps} == {number}
        return [batches.micro_batch(2 * step + i)[0].numpy().tobytes() for step in steps for i in range(2)]

    first, second, third = (epoch(number, seed=0) for number in range(3))
    assert first == epoch(0, seed=9)
    assert second != first and second != third and second != epoch(1, seed=9) and second == epoch(1, seed=0)
    pairs = {(first[i], first[i + 1]) for i in range(0, len(first), 2)}
    assert pairs == {(second[i], second[i + 1]) for i in range(0, len(second), 2)} and len(first) == len(second)


def test_order_of_epochs_is_fixed(small: Corpus) -> None:
    """A change here makes resumed runs see other data: it needs a note to users."""
    assert TrainBatches(small, 64, 2, seed=0)._shuffled(1, 12).tolist() == [0, 10, 4, 3, 7, 1, 9, 11, 6, 5, 2, 8]


def test_data_ends(small: Corpus) -> None:
    batches = TrainBatches(small, 64, 2, seed=0, epochs=2)
    steps = batches.steps_per_epoch
    assert batches.epoch_of(2 * steps - 1) == 1
    with pytest.raises(ShardError) as error:
        batches.micro_batch(2 * 2 * steps)
    one_line(error, small.directory, f"2 epoch(s) of {steps}", "fewer steps")
    stream = batches.stream(2 * steps - 2, 0, 1)
    assert len(next(stream)) == len(next(stream)) == 2  # reading ahead over the end must not cost a step
    with pytest.raises(ShardError, match="fewer steps"):
        next(stream)
    with pytest.raises(IndexError):
        batches.micro_batch(-1)


def test_usage_counts_every_token(small: Corpus) -> None:
    usage = TrainBatches(small, 64, 2, seed=0).usage()
    assert usage.used == usage.steps * 2 * 64 and usage.used + usage.skipped == 5000 + 3000 + 4000 + 2500
    assert usage.used > usage.skipped


def test_shards_are_opened_when_needed(small: Corpus) -> None:
    batches = TrainBatches(small, 64, 2, seed=0)
    assert len(batches._shards) == 1
    small.train[1].write_bytes(b"")
    batches.micro_batch(0)
    with pytest.raises(ShardError) as error:
        batches.usage()
    one_line(error, small.train[1], "empty")


def test_shard_too_short_for_a_step_is_counted_as_skipped(tmp_path: Path) -> None:
    shards = [documents(100, 10), documents(5000, 40), np.array([*range(30), BOS]), documents(5000, 40, 1)]
    batches = TrainBatches(make_corpus(tmp_path / "a", shards), 64, 2, seed=0)
    alone = TrainBatches(make_corpus(tmp_path / "b", shards[1::2]), 64, 2, seed=0)
    assert batches.usage() == alone.usage()._replace(skipped=alone.usage().skipped + 131)
    last = 2 * alone.steps_per_epoch - 1
    assert torch.equal(batches.micro_batch(last)[0], alone.micro_batch(last)[0])


def test_corpus_too_small(tmp_path: Path) -> None:
    with pytest.raises(ShardError) as error:
        TrainBatches(make_corpus(tmp_path / "a", [documents(100, 10)]), 64, 2, seed=0)
    one_line(error, "100 train tokens", "2 x 64", "257", "lower")
    one_document = np.array([BOS] + [1] * 5000)
    with pytest.raises(ShardError, match="hold no step"):
        TrainBatches(make_corpus(tmp_path / "b", [one_document]), 64, 2, seed=0)


def test_shard_without_bos(tmp_path: Path) -> None:
    with pytest.raises(ShardError) as error:
        TrainBatches(make_corpus(tmp_path / "a", [np.ones(5000, int)]), 64, 2, seed=0)
    one_line(error, "train_000000.bin", "5,000", BOS)


@pytest.mark.parametrize("at", [0, 1, 2**20 - 1, 2**20, 2**20 + 12_345, 2**21 - 1])
def test_id_outside_the_vocabulary(tmp_path: Path, at: int) -> None:
    tokens = np.tile(documents(2**11, 40), 2**10)
    tokens[at] = VOCAB
    corpus = make_corpus(tmp_path / "a", [tokens], val=[tokens])
    with pytest.raises(ShardError) as error:
        TrainBatches(corpus, 64, 2, seed=0)
    one_line(error, "train_000000.bin", f"id {VOCAB} at offset {at:,}", f"{VOCAB} entries")
    with pytest.raises(ShardError, match=f"val_000000.bin: token id {VOCAB} at offset {at:,}"):
        ValBatches(corpus, 2**21, 2**21 - 1)


def test_positions_over_several_scans(tmp_path: Path) -> None:
    tokens = documents(2**21 + 99, 40)
    write_shard(tmp_path / "a.bin", tokens)
    for stop in None, 2**21, 2**20 + 1, 5:
        found = Shard(tmp_path / "a.bin").find(BOS, VOCAB, stop)
        assert np.array_equal(found, np.flatnonzero(tokens[:stop] == BOS))


# --- The prefetching thread ---


def test_stream_shares_a_step(small: Corpus) -> None:
    batches = TrainBatches(small, 64, 6, seed=0)
    with pytest.raises(ConfigError) as error:
        batches.stream(0, 0, 4)
    assert "6 micro-batches cannot be shared by 4" in str(error.value) and "1, 2, 3, 6" in str(error.value)
    for rank in range(3):
        got = next(batches.stream(2, rank, 3))
        assert [inputs.tolist() for inputs, _ in got] == [
            batches.micro_batch(2 * 6 + 2 * rank + i)[0].tolist() for i in range(2)
        ]


def prefetching() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("batches")]


def test_thread_ends_with_the_iterator(small: Corpus) -> None:
    batches = TrainBatches(small, 64, 2, seed=0)
    for end in "close", "del":
        stream = batches.stream(0, 0, 1)
        assert not prefetching()  # nothing runs before the first step is asked for
        next(stream)
        assert len(prefetching()) == 1
        if end == "close":
            stream.close()
        del stream
        gc.collect()
        assert not prefetching()


def test_thread_reads_ahead_by_depth(small: Corpus, monkeypatch: pytest.MonkeyPatch) -> None:
    batches, asked = TrainBatches(small, 64, 2, seed=0), []
    real = batches.micro_batch
    monkeypatch.setattr(batches, "micro_batch", lambda index: asked.append(index) or real(index))  # type: ignore
    stream = batches.stream(0, 0, 1, depth=3)
    next(stream)
    stream.close()
    assert asked == list(range(len(asked))) and 2 <= len(asked) <= 2 * 4


def test_error_in_the_thread_reaches_the_consumer(small: Corpus) -> None:
    batches = TrainBatches(small, 64, 2, seed=0)
    steps = len(batches._starts[0])
    small.train[1].write_bytes(b"<html>")
    stream = batches.stream(0, 0, 1)
    for _ in range(steps):
        next(stream)
    with pytest.raises(ShardError, match="HTML"):
        next(stream)
    assert not prefetching()


def test_interpreter_exits_with_a_stream_open(small: Corpus) -> None:
    code = f"""
import sys
from pathlib import Path
from speedrun_mup.data import TrainBatches, open_corpus
stream = TrainBatches(open_corpus(Path({str(small.directory)!r})), 64, 2, seed=0).stream(0, 0, 1)
next(stream)
sys.keep = stream
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, cwd=Path(data.__file__).parents[1]
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


# --- Validation batches ---


def test_val_chunks_are_contiguous(tmp_path: Path) -> None:
    tokens = documents(1000, 40)
    corpus = make_corpus(tmp_path / "a", [tokens], val=[tokens])
    for val_tokens, chunk, expected in (1000, 100, 9), (999, 111, 9), (640, 64, 10), (100, 30, 3), (5000, 333, 3):
        val = ValBatches(corpus, val_tokens, chunk)
        assert len(val) == expected
        for i in range(len(val)):
            inputs, targets = val[i]
            assert inputs.tolist() == tokens[i * chunk : (i + 1) * chunk].tolist()
            assert targets.tolist() == tokens[i * chunk + 1 : (i + 1) * chunk + 1].tolist()
            assert (inputs.dtype, targets.dtype) == (torch.int32, torch.int64)


def test_val_over_several_shards(tmp_path: Path) -> None:
    shards = [documents(n, 40, n) for n in (250, 90, 300)]
    val = ValBatches(make_corpus(tmp_path / "a", [documents(100, 10)], val=shards), 400, 100)
    assert len(val) == 4
    assert val[1][0].tolist() == shards[0][100:200].tolist() and val[3][0].tolist() == shards[2][100:200].tolist()


def test_val_too_small(tmp_path: Path) -> None:
    corpus = make_corpus(tmp_path / "a", [documents(100, 10)], val=[documents(100, 10)])
    for val_tokens, chunk in (900, 100), (50, 60):
        with pytest.raises(ShardError) as error:
            ValBatches(corpus, val_tokens, chunk)
        one_line(error, chunk, val_tokens)
