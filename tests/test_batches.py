"""Batches: record 26's, whatever the world size."""

import dataclasses
import gc
import hashlib
import itertools
import os
import resource
import subprocess
import sys
import threading
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from faults.harness import fork, wait
from helpers.small_corpus import BOS, VOCAB, documents, make_corpus, naive_read, one_line
from hypothesis import given, settings
from hypothesis import strategies as st

from speedrun_mup.core.errors import ConfigError
from speedrun_mup.core.utils import seed_for
from speedrun_mup.data import batches as data
from speedrun_mup.data import bound
from speedrun_mup.data.batches import (
    Batches,
    MixedBatches,
    ShuffledBatches,
    TrainBatches,
    train_batches,
    uses,
)
from speedrun_mup.data.manifest import open_corpus, write_manifest
from speedrun_mup.data.order import MixtureSchedule, Permutation, find_steps, record_order
from speedrun_mup.data.shards import (
    Corpus,
    Mixture,
    Shard,
    ShardError,
    ShardFacts,
    measure_shard,
    mix,
    shard_header,
    write_shard,
)
from speedrun_mup.data.validation import ValBatches, _val_chunks_without, trained_elsewhere


@pytest.fixture
def small(tmp_path: Path) -> Corpus:
    """Four shards of random documents, unequal in length."""
    return make_corpus(tmp_path / "small", [documents(n, 40, n) for n in (5000, 3000, 4000, 2500)])


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


@pytest.mark.slow
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


def stream_digest(corpus: Corpus, size: int, steps: int, order: str = "record") -> str:
    """SHA-256 of the tokens that `size` ranks see together, step by step in rank order."""
    batches = [train_batches(corpus, 64, 8, seed=1, order=order) for _ in range(size)]
    streams = [each.stream(0, rank, size) for rank, each in enumerate(batches)]
    digest = hashlib.sha256()
    for _ in range(steps):
        for stream in streams:
            for inputs, targets in next(stream):
                digest.update(inputs.numpy().tobytes() + targets.numpy().tobytes())
    for stream in streams:
        stream.close()
    return digest.hexdigest()


@pytest.mark.slow
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
    fixed = [0, 10, 4, 3, 7, 1, 9, 11, 6, 5, 2, 8]
    assert record_order(seed=0, epoch=1, steps=12).tolist() == fixed
    batches = TrainBatches(small, 64, 2, seed=0)
    steps = batches.steps_per_epoch
    order = record_order(0, 1, steps).tolist()
    assert [batches.place(2 * (steps + at)) for at in range(steps)] == [batches.place(2 * step) for step in order]


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


@pytest.mark.slow
def test_positions_over_several_scans(tmp_path: Path) -> None:
    tokens = documents(2**21 + 99, 40)
    write_shard(tmp_path / "a.bin", tokens)
    for stop in None, 2**21, 2**20 + 1, 5:
        found = Shard(tmp_path / "a.bin").find(BOS, VOCAB, stop)
        assert np.array_equal(found, np.flatnonzero(tokens[:stop] == BOS))


# --- The shuffled order ---


def cut(corpus: Corpus, T: int) -> list[list[int]]:
    """What the shuffled order must be made of: T + 1 tokens of each sequence of the shards in a row, by naive means."""
    row = [token for path in corpus.train for token in naive_read(path)]
    pieces = [row[start : start + T + 1] for start in range(0, len(row) - T, T)]
    return [piece if piece[0] == BOS else [BOS, *piece[:-1]] for piece in pieces]


def tokens_of(batches: Batches, indices: Iterable[int]) -> list[list[int]]:
    """Inputs and the last target of some micro-batches."""
    pairs = map(batches.micro_batch, indices)
    return [[*inputs.tolist(), int(targets[-1])] for inputs, targets in pairs]


@pytest.mark.parametrize("T, N", [(64, 2), (96, 5), (1000, 3), (2900, 4)])
def test_an_epoch_is_every_sequence_once(small: Corpus, T: int, N: int) -> None:
    expected = cut(small, T)
    batches = ShuffledBatches(small, T, N, seed=5)
    count = len(expected)
    epochs = [tokens_of(batches, range(epoch * count, (epoch + 1) * count)) for epoch in range(3)]
    assert all(sorted(epoch) == sorted(expected) for epoch in epochs)
    assert batches.usage() == (count // N, count * T, 14_500 - count * T)
    inputs, targets = batches.micro_batch(1)
    assert (inputs.dtype, targets.dtype) == (torch.int32, torch.int64) and inputs[0] == BOS
    assert torch.equal(inputs[1:].long(), targets[:-1])


def test_seed_and_epoch_draw_the_order(small: Corpus) -> None:
    def order(seed: int, epoch: int) -> list[list[int]]:
        batches = ShuffledBatches(small, 64, 2, seed)
        return tokens_of(batches, range(epoch * batches.sequences, (epoch + 1) * batches.sequences))

    orders = [order(seed, epoch) for seed in (0, 1) for epoch in (0, 1)]
    assert all(one != other for one, other in itertools.combinations(orders, 2)) and orders[0] == order(0, 0)
    assert orders[0] != cut(small, 64)


def test_shuffled_order_is_fixed(small: Corpus) -> None:
    """A change here makes resumed runs see other data: it needs a note to users."""
    batches = ShuffledBatches(small, 64, 2, seed=0)
    assert [batches.place(index) for index in (0, 1, 226, 1000)] == [
        ("train_000001.bin", 2872),
        ("train_000001.bin", 2488),
        ("train_000001.bin", 2808),
        ("train_000000.bin", 1920),
    ]
    assert [Permutation(10, 1)(place) for place in range(10)] == [4, 5, 8, 2, 7, 1, 0, 6, 9, 3]


@pytest.mark.slow
def test_shuffled_tokens_do_not_depend_on_the_shards(tmp_path: Path, small: Corpus) -> None:
    whole = np.concatenate([naive_read(path) for path in small.train])
    one = make_corpus(tmp_path / "one", [whole])
    many = make_corpus(tmp_path / "many", np.array_split(whole, 300))
    digests = {stream_digest(corpus, 1, 40, "shuffled") for corpus in (small, one, many)}
    assert len(digests) == 1
    where = {ShuffledBatches(many, 64, 2, 0).place(index) for index in range(200)}
    for name, first in where:
        assert first < 49 and naive_read(many.directory / name)


@pytest.mark.slow
def test_shuffled_tokens_do_not_depend_on_the_world_size_or_a_resume(small: Corpus) -> None:
    assert len({stream_digest(small, size, 70, "shuffled") for size in (1, 2, 4, 8)}) == 1
    whole = tokens_of(train_batches(small, 64, 4, 3, order="shuffled"), range(4 * 130))
    for start in 0, 17, 56, 57, 113:
        steps = itertools.islice(train_batches(small, 64, 4, 3, order="shuffled").stream(start, 0, 1), 5)
        got = [[*inputs.tolist(), int(targets[-1])] for step in steps for inputs, targets in step]
        assert got == whole[4 * start : 4 * (start + 5)]


def test_place_names_the_shard_and_its_first_token(small: Corpus) -> None:
    batches = ShuffledBatches(small, 64, 2, seed=0)
    seen = set()
    for index in range(batches.sequences):
        name, first = batches.place(index)
        seen.add(name)
        held = naive_read(small.directory / name)[first : first + 65]
        held = held if held[0] == BOS else [BOS, *held]
        given = tokens_of(batches, [index])[0]
        assert given[: len(held)] == held[:65]
    assert seen == {path.name for path in small.train}


def test_shuffled_data_ends(small: Corpus) -> None:
    batches = ShuffledBatches(small, 64, 4, seed=0, epochs=2)
    assert batches.sequences == 226
    last = 2 * 226 // 4 - 1
    assert [batches.epoch_of(step) for step in (0, 55, 56, last)] == [0, 0, 1, 1]
    with pytest.raises(ShardError) as error:
        batches.epoch_of(last + 1)
    one_line(error, small.directory, "2 epoch(s) of 56", "fewer steps")
    with pytest.raises(IndexError):
        batches.micro_batch(-1)


def test_shuffled_corpus_too_small(tmp_path: Path) -> None:
    corpus = make_corpus(tmp_path / "a", [documents(129, 10)])
    assert ShuffledBatches(corpus, 64, 2, seed=0).usage() == (1, 128, 1)
    with pytest.raises(ShardError) as error:
        ShuffledBatches(corpus, 64, 3, seed=0)
    one_line(error, "129 train tokens", "3 x 64", "193", "lower")


def test_one_long_document_is_used_whole(tmp_path: Path) -> None:
    book = make_corpus(tmp_path / "book", [np.array([BOS, *([1, 2, 3] * 20_000)])])
    with pytest.raises(ShardError, match="hold no step"):
        TrainBatches(book, 256, 8, seed=0)
    assert ShuffledBatches(book, 256, 8, seed=0).usage().share > 0.99


def test_foreign_id_in_a_sequence(tmp_path: Path) -> None:
    tokens = documents(1000, 40)
    tokens[700] = VOCAB
    batches = ShuffledBatches(make_corpus(tmp_path / "a", [tokens]), 64, 2, seed=0)
    with pytest.raises(ShardError) as error:
        tokens_of(batches, range(batches.sequences))
    one_line(error, "train_000000.bin", f"id {VOCAB} at offset 700")


def test_share_of_the_tokens_is_told(small: Corpus, mixture: Mixture) -> None:
    used = TrainBatches(small, 64, 2, seed=0)
    assert "judged by 1 of 4 shards" in used.describe() and len(used._shards) == 1
    assert f"trains on {used.usage().share:.1%} of" in used.describe() and "judged" not in used.describe()
    assert ShuffledBatches(small, 64, 2, 7).describe() == "shuffled by seed 7; an epoch trains on 99.8% of the tokens"
    text = train_batches(mixture, 64, 2, 0, order="shuffled").describe()
    assert "small: shuffled" in text and "other: shuffled" in text


@pytest.mark.slow
@given(count=st.integers(1, 3000), seed=st.integers(0, 2**63 - 1))
@settings(deadline=None, max_examples=150)
def test_permutation_is_a_bijection(count: int, seed: int) -> None:
    permutation = Permutation(count, seed)
    assert sorted(map(permutation, range(count))) == list(range(count))


@pytest.mark.slow
def test_permutation_of_very_many() -> None:
    count = 10**13 + 7
    permutation = Permutation(count, 3)
    drawn = [permutation(place) for place in range(20_000)]
    assert len(set(drawn)) == 20_000 and min(drawn) < count / 100 and 0.99 * count < max(drawn) < count


def chi_square(observed: np.ndarray) -> float:
    """Deviation from equal counts, in standard deviations of the statistic."""
    expected = observed.sum() / observed.size
    freedom = observed.size - 1
    return float((((observed - expected) ** 2 / expected).sum() - freedom) / (2 * freedom) ** 0.5)


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 3, 7, 10, 50])
def test_every_place_is_equally_likely(count: int) -> None:
    drawn = np.array([[Permutation(count, seed_for(seed))(place) for place in range(count)] for seed in range(2000)])
    seen = np.array([np.bincount(drawn[:, place], minlength=count) for place in range(count)])
    assert chi_square(seen) < 4
    if count > 3:  # where two neighbours come from, as a pair
        steps = np.bincount(((drawn[:, 1:] - drawn[:, :-1]) % count).ravel(), minlength=count)[1:]
        assert chi_square(steps) < 4


@pytest.mark.slow
def test_permutation_shuffles_well() -> None:
    """Over 20 seeds: fixed points and neighbours that stay neighbours are as rare as by chance, no trend remains."""
    count = 5000
    drawn = np.array([[Permutation(count, seed_for("x", seed))(place) for place in range(count)] for seed in range(20)])
    fixed = (drawn == np.arange(count)).sum()
    beside = (np.abs(np.diff(drawn)) == 1).sum()
    assert 5 <= fixed <= 40 and 18 <= beside <= 70  # 20 and 40 are expected
    correlations = [abs(np.corrcoef(row, np.arange(count))[0, 1]) for row in drawn]
    serial = [abs(np.corrcoef(row[:-1], row[1:])[0, 1]) for row in drawn]
    assert max(correlations + serial) < 5 / count**0.5
    blocks = np.array([np.bincount(row[:250] // 250, minlength=20) for row in drawn]).sum(0)
    assert chi_square(blocks) < 4


def many_small_shards(directory: Path, count: int) -> Corpus:
    """As `make_corpus`, without a wait for the disk after each."""
    directory.mkdir()
    facts: dict[str, dict[str, ShardFacts]] = {"train": {}, "val": {}}
    for part, number in [("train", number) for number in range(count)] + [("val", 0)]:
        path = directory / f"{part}_{number:06d}.bin"
        path.write_bytes(shard_header(1000) + documents(1000, 40, number).astype("<u2").tobytes())
        facts[part][path.name] = measure_shard(path, VOCAB, BOS)
    return write_manifest(directory, tokenizer="test", vocab_size=VOCAB, bos_token=BOS, source="a test", **facts)


@pytest.mark.slow
@pytest.mark.parametrize("order", ["record", "shuffled"])
def test_more_shards_than_files_may_be_open(tmp_path: Path, order: str) -> None:
    corpus = many_small_shards(tmp_path / "many", 300)

    def life() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (128, 128))
        batches = train_batches(open_corpus(corpus.directory), 64, 2, seed=0, order=order)
        steps = batches.usage().steps
        seen = {batches.place(index)[0] for index in range(2 * steps) if len(batches.micro_batch(index)[0]) == 64}
        batches.confirm()
        assert len(seen) > 290

    assert wait(fork(life)) == 0


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


@pytest.mark.slow
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


@pytest.mark.slow
def test_interpreter_exits_with_a_stream_open(small: Corpus) -> None:
    code = f"""
import sys
from pathlib import Path
from speedrun_mup.data.batches import TrainBatches
from speedrun_mup.data.manifest import open_corpus
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


def test_file_cut_while_it_is_read_is_an_error_not_a_signal(small: Corpus) -> None:
    """A thread cuts the shard and mends it, again and again; the reader finds it whole and finds it cut."""
    path = small.train[0]
    size = path.stat().st_size

    def life() -> None:
        shard, over, found = Shard(path), threading.Event(), []

        def wound() -> None:
            while not over.is_set():
                os.truncate(path, 1024)
                os.truncate(path, size)

        thread = threading.Thread(target=wound)
        thread.start()
        while len(found) < 2000 or len(set(found)) < 2:
            try:
                found.append(len(shard.take(0, len(shard)).copy()))
            except ShardError:
                found.append(0)
        over.set()
        thread.join()
        assert set(found) == {0, len(shard)}

    assert wait(fork(life)) == 0


# --- Mixtures ---


@pytest.fixture
def mixture(tmp_path: Path, small: Corpus) -> Mixture:
    """Seven parts of `small` to three of another corpus."""
    other = make_corpus(tmp_path / "other", [documents(3000, 30, 9)], val=[documents(500, 30, 8)])
    return mix([small, other], [7, 3])


@pytest.mark.slow
@given(st.lists(st.integers(1, 1000), min_size=2, max_size=5))
@settings(deadline=None, max_examples=25)
def test_turns_keep_to_the_shares(weights: list[int]) -> None:
    shares = [weight * 1000 // sum(weights) for weight in weights]
    shares[0] += 1000 - sum(shares)
    turns, taken = MixtureSchedule(shares), np.zeros(len(shares), int)
    for turn in range(2100):
        assert turns.taken(turn).tolist() == taken.tolist()
        assert np.abs(taken - turn * np.array(shares) / 1000).max() < len(shares)
        taken[turns.part_of(turn)] += 1
    assert turns.taken(2000).tolist() == [2 * share for share in shares]


def test_mixture_is_its_parts_in_turn(mixture: Mixture) -> None:
    """Against a walk that counts what each part has given."""
    mixed = train_batches(mixture, 64, 4, seed=3)
    assert isinstance(mixed, MixedBatches)
    alone = [TrainBatches(part, 64, 1, seed=3) for part in mixture.parts]
    given, turns = [0, 0], MixtureSchedule(mixture.shares)
    for index in range(400):
        part = turns.part_of(index)
        expected = alone[part].micro_batch(given[part])
        given[part] += 1
        assert all(torch.equal(a, b) for a, b in zip(mixed.micro_batch(index), expected))
    assert given == [280, 120]
    assert mixed.place(0) == ("small/train_000000.bin", 0) and mixed.place(1)[0] == "other/train_000000.bin"


@pytest.mark.slow
def test_mixture_resumes_and_is_shared(mixture: Mixture) -> None:
    assert len({stream_digest(mixture, size, 40) for size in (1, 2, 8)}) == 1
    whole = list(itertools.islice(train_batches(mixture, 64, 4, 0).stream(0, 0, 1), 60))
    rest = list(itertools.islice(train_batches(mixture, 64, 4, 0).stream(37, 0, 1), 23))
    assert [batch[0].tolist() for step in whole[37:] for batch in step] == [b[0].tolist() for s in rest for b in s]


@pytest.mark.slow
def test_shuffled_mixture(mixture: Mixture) -> None:
    mixed = train_batches(mixture, 64, 4, seed=3, order="shuffled")
    alone, given, turns = (
        [ShuffledBatches(part, 64, 1, seed=3) for part in mixture.parts],
        [0, 0],
        MixtureSchedule(mixture.shares),
    )
    for index in range(400):
        part = turns.part_of(index)
        assert tokens_of(mixed, [index]) == tokens_of(alone[part], [given[part]])
        given[part] += 1
    usage = mixed.usage()
    repeats = next(step for step in range(10_000) if turns.taken(4 * (step + 1))[1] > 46)
    assert usage.steps == repeats and mixed.epoch_of(repeats - 1) == 0 and mixed.epoch_of(repeats) == 1
    assert len({stream_digest(mixture, size, 40, "shuffled") for size in (1, 2, 8)}) == 1


def test_epochs_of_a_mixture(mixture: Mixture) -> None:
    sizes = [TrainBatches(part, 64, 1, 0).steps_per_epoch for part in mixture.parts]
    mixed, turns = train_batches(mixture, 64, 4, seed=0), MixtureSchedule(mixture.shares)
    usage = mixed.usage()
    repeats = next(step for step in range(10_000) if (turns.taken(4 * (step + 1)) > sizes).any())
    assert usage.steps == repeats and usage.used == repeats * 4 * 64 and usage.used + usage.skipped == 14_500 + 3000
    assert mixed.epoch_of(repeats - 1) == 0 and mixed.epoch_of(repeats) == 1
    once = train_batches(mixture, 64, 4, seed=0, epochs=1)
    assert len(list(itertools.islice(once.stream(0, 0, 1), repeats))) == repeats
    with pytest.raises(ShardError, match="ends after 1 epoch"):
        once.epoch_of(repeats)


def test_validation_of_a_mixture(mixture: Mixture) -> None:
    val, parts = ValBatches(mixture, 5 * 32, 32), [ValBatches(part, 5 * 32, 32) for part in mixture.parts]
    order = [MixtureSchedule(mixture.shares).part_of(i) for i in range(len(val))]
    assert order.count(0) > order.count(1) > 0
    for i, part in enumerate(order):
        assert torch.equal(val[i][0], parts[part][order[:i].count(part) % len(parts[part])][0])


def test_validation_smaller_than_asked_is_told(small: Corpus) -> None:
    assert ValBatches(small, 90, 30).notes == []
    (note,) = ValBatches(small, 900, 30).notes
    assert "90 tokens" in note and "of the 900 that --val-tokens asks for" in note


def val_corpora(tmp_path: Path, *sizes: int) -> list[Corpus]:
    return [
        make_corpus(tmp_path / f"v{i}", [documents(3000, 40, 10 + i)], val=[documents(size, 40, 20 + i)])
        for i, size in enumerate(sizes)
    ]


def test_part_with_little_validation_keeps_its_weight(tmp_path: Path) -> None:
    big, little = val_corpora(tmp_path, 20_000, 150)
    val = ValBatches(mix([big, little], [1, 1]), 64 * 64, 64)
    own = {tuple(ValBatches(little, 64 * 64, 64)[i][0].tolist()) for i in range(2)}
    took = [tuple(inputs.tolist()) in own for inputs, _ in (val[i] for i in range(len(val)))]
    assert len(val) == 64 and sum(took) == 32
    (note,) = val.notes
    assert f"{little.directory} has 128 of the 2,048 tokens" in note
    both = ValBatches(mix([little, little], [3, 1]), 64 * 64, 64)  # 2 chunks of each, in their weights
    assert len(both) == 7 and any("no more" in note for note in both.notes)


def test_part_without_validation_is_refused(tmp_path: Path) -> None:
    big, tiny = val_corpora(tmp_path, 20_000, 60)
    for parts in [big, tiny], [tiny, big]:
        with pytest.raises(ShardError) as error:
            ValBatches(mix(parts, [9, 1]), 64 * 64, 64)
        one_line(error, tiny.directory, "--val-chunk-tokens")


def split(tokens: np.ndarray) -> list[tuple[int, ...]]:
    """The documents of a shard, each with its BOS."""
    return [tuple(document.tolist()) for document in np.split(tokens, np.flatnonzero(tokens == BOS))[1:]]


def test_documents_that_another_part_trains_on_are_not_validated_on(tmp_path: Path) -> None:
    """Every third document of the second part's validation stands in the first one's training text."""
    val = documents(6000, 40, 7)
    shared = split(val)[::3]
    train = np.concatenate([documents(3000, 40, 1), *map(np.array, shared), documents(500, 40, 2)])
    first = make_corpus(tmp_path / "first", [train[:2000], train[2000:]], val=[documents(4000, 40, 3)])
    second = make_corpus(tmp_path / "second", [documents(3000, 40, 4)], val=[val[:2500], val[2500:]])
    mixture = mix([first, second], [1, 1])
    trained = {each for path in first.train for each in split(np.array(naive_read(path)))}
    told = [each for path in second.val for each in split(np.array(naive_read(path))) if len(each) > 1]
    expected = [each for each in told if each in trained]
    assert len(expected) > 40
    for _ in range(2):  # the second time from what was noted
        seen = trained_elsewhere(mixture)
        held = {path.name: naive_read(path) for path in second.val}
        assert seen[0] == [] and [tuple(held[name][start:stop]) for name, start, stop in seen[1]] == expected
    batches = ValBatches(mixture, 100_000, 50)
    assert f"{len(seen[1])} validation documents of {second.directory} are left out" in batches.notes[0]
    kept = _val_chunks_without(second, seen[1], 1000, 50)
    row = np.concatenate([source.take(start, start + 50) for source, start in kept])
    kept_whole = split(row)[:-1]
    assert len(kept_whole) > 80 and not set(expected) & set(kept_whole)
    total = len(val) - sum(stop - start for _, start, stop in seen[1])
    assert len(row) == (total - 1) // 50 * 50
    assert len(_val_chunks_without(second, seen[1], 3, 50)) == 3


def test_damaged_note_of_an_overlap_is_made_again(mixture: Mixture) -> None:
    assert trained_elsewhere(mixture) == [[], []]
    for text in '[["x"]]', "[]", "{}":
        for note in (bound.cache_folder() / "overlaps").iterdir():
            note.write_text(text)
        assert trained_elsewhere(mixture) == [[], []]


@pytest.mark.parametrize("val", [4096, 4097])
def test_uses_of_a_book(tmp_path: Path, val: int) -> None:
    told = uses(make_corpus(tmp_path / "book", [np.array([BOS, *([1, 2, 3] * 20_000)])], [np.ones(val, int)]))
    assert told["laptop"].startswith("sequences of 256 tokens; order shuffled by seed 0; an epoch trains on 99.8%")
    assert ("too little to validate on: train with a --val-chunk-tokens below 4,096" in told["laptop"]) == (val == 4096)
    assert told["record26"] == "too little text for a step of 8 x 49,152 tokens"


def test_what_cannot_be_mixed(tmp_path: Path, small: Corpus, mixture: Mixture) -> None:
    assert mixture.shares == (700, 300) and mixture.fingerprint != mix([*mixture.parts], [6, 4]).fingerprint
    assert mix([small] * 3, [1, 1, 1]).shares == (334, 333, 333)
    for change in {"tokenizer": "x"}, {"vocab_size": 99}, {"bos_token": 1}:
        with pytest.raises(ShardError, match="do not have the same vocabulary"):
            mix([small, dataclasses.replace(small, **change)], [1, 1])
    one, other = (dataclasses.replace(small, tokenizer_sha256=sha) for sha in ("1", "2"))
    assert mix([small, one], [1, 1]).vocab_size == VOCAB
    with pytest.raises(ShardError, match="do not have the same vocabulary"):
        mix([one, other], [1, 1])
    with pytest.raises(ConfigError, match="less than a thousandth"):
        mix([small, small], [1, 5000])
