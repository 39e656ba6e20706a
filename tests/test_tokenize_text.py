"""Text to a corpus: the right tokens, the same bytes whatever the workers or interruptions, nothing half done."""

import dataclasses
import hashlib
import io
import itertools
import json
import os
import re
import subprocess
import sys
import tracemalloc
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from helpers import kill_tokenize
from helpers.small_corpus import naive_read

import speedrun_mup
from speedrun_mup.cli import main
from speedrun_mup.config import PRESETS, TrainConfig
from speedrun_mup.core.errors import ConfigError
from speedrun_mup.data.batches import TrainBatches, train_batches
from speedrun_mup.data.manifest import open_corpus
from speedrun_mup.data.shards import Corpus, ShardError, write_shard
from speedrun_mup.data.sources import SourceError, find_sources
from speedrun_mup.data.tokenize_text import (
    ORDERS,
    TextSettings,
    chunks,
    encode,
    progress,
    run,
    shard_writer,
    tokenize_text,
)
from speedrun_mup.data.tokenize_text.job import Job
from speedrun_mup.data.tokenize_text.tokenizer import training_text
from speedrun_mup.data.tokenizers import find_tokenizer, load_tokenizer
from speedrun_mup.data.validation import ValBatches

TEXTS = [f"document {i}: " + "spam and naïve eggs, " * (i % 17) for i in range(400)]
BYTES = TextSettings(tokenizer="byte", val_share=0.1, shard_tokens=20_000)
GIVEN = dataclasses.replace(BYTES, order="given")


def records(texts: list[str]) -> str:
    return "".join(json.dumps({"text": text}) + "\n" for text in texts)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.jsonl"
    path.write_text(records([*TEXTS[:100], "", *TEXTS[100:], "", *TEXTS[:50]]))
    return path


def expected(texts: list[str], val: bool) -> list[list[int]]:
    """Documents of one part as byte ids with BOS, by the rule as docs/data.md has it."""

    def share(text: str) -> float:
        return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=16).digest()[:8], "big") / 2**64

    return [[256, *text.encode()] for text in texts if text and (share(text) < 0.1) == val]


def shuffled(texts: list[str], seed: int = 0) -> list[str]:
    """Texts in the order that docs/data.md says, in plain whole numbers."""

    def mixed(x: int) -> int:
        x = (x + 0x9E3779B97F4A7C15) % 2**64
        x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        x = (x ^ x >> 27) * 0x94D049BB133111EB % 2**64
        return x ^ x >> 31

    def key(number: int) -> int:
        half = hashlib.blake2b(texts[number].encode(), digest_size=16).digest()[8:]
        return mixed(mixed((int.from_bytes(half, "little") + mixed(seed)) % 2**64) + number + 1)

    return [texts[number] for number in sorted(range(len(texts)), key=key)]


def held(corpus: Corpus, part: str) -> list[list[int]]:
    return [naive_read(path) for path in getattr(corpus, part)]


def flat(rows: list[list[int]]) -> list[int]:
    return list(itertools.chain.from_iterable(rows))


def decoded(corpus: Corpus, part: str) -> list[str]:
    text = bytes(min(id, 255) for id in flat(held(corpus, part)))
    return [one.decode() for one in text.split(b"\xff")[1:]]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


ALL = [*TEXTS[:100], "", *TEXTS[100:], "", *TEXTS[:50]]


@pytest.mark.parametrize("order", ["given", 0, 1])
def test_every_document_once_in_order(text: Path, tmp_path: Path, order: str | int) -> None:
    settings = GIVEN if order == "given" else dataclasses.replace(BYTES, shuffle_seed=order)
    corpus = tokenize_text([str(text)], tmp_path / "out", settings)
    assert corpus.order == ("given" if order == "given" else f"shuffled by seed {order}")
    for part in "train", "val":
        in_order = ALL if order == "given" else shuffled(ALL, int(order))
        documents = expected(in_order, part == "val")
        shards = held(corpus, part)
        assert flat(shards) == flat(documents)
        assert all(shard[0] == 256 and len(shard) >= 20_000 for shard in shards[:-1]) and shards[-1][0] == 256
        facts = [corpus.facts[path.name] for path in getattr(corpus, part)]
        assert sum(each.documents for each in facts) == len(documents) > 20
        assert [each.tokens for each in facts] == [len(shard) for shard in shards]
    assert len(corpus.train) > 3 and (corpus.tokenizer, corpus.vocab_size, corpus.bos_token) == ("byte", 257, 256)
    assert sorted(contents(tmp_path / "out")) == sorted(["corpus.json", *corpus.facts])
    assert len(TrainBatches(corpus, 64, 2, seed=0).micro_batch(0)[0]) == len(ValBatches(corpus, 64, 64)[0][0]) == 64


def test_workers_do_not_matter(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for workers, chunk in (1, 2**19), (4, 700), (3, 5000):
        monkeypatch.setattr(chunks, "CHUNK_CHARS", chunk)
        tokenize_text([str(text)], tmp_path / f"out{workers}", BYTES, workers)
    assert contents(tmp_path / "out1") == contents(tmp_path / "out4") == contents(tmp_path / "out3")


def test_duplicates_are_dropped_on_request(text: Path, tmp_path: Path) -> None:
    corpus = tokenize_text([str(text), str(text)], tmp_path / "out", dataclasses.replace(GIVEN, drop_duplicates=True))
    assert flat(held(corpus, "train")) == flat(expected(TEXTS, val=False))
    assert corpus.tally == {"empty": 4, "duplicate": 500, "mended": 0, "bad": 0, "files": 0}


def test_half_a_surrogate_pair(tmp_path: Path) -> None:
    """JSON can spell it and UTF-8 cannot."""
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a\\ud800b"}\n\n{"text": "\\ud83d\\ude00"}\n' + records(TEXTS))
    corpus = tokenize_text([str(path)], tmp_path / "out", dataclasses.replace(BYTES, val_share=0.5))
    documents = "".join(map(chr, flat(held(corpus, "train") + held(corpus, "val")))).split(chr(256))
    assert {"a?b", "\U0001f600".encode().decode("latin-1")} <= set(documents)
    assert corpus.tally == {"empty": 0, "duplicate": 0, "mended": 1, "bad": 0, "files": 0}


def breaking_at(monkeypatch: pytest.MonkeyPatch, owner: object, name: str, left: list[int]) -> None:
    """Raise KeyboardInterrupt in place of the `left[0]`-th call of a method."""
    real = getattr(owner, name)

    def call(*arguments: object, **more: object) -> object:
        left[0] -= 1
        if left[0] == 0:
            raise KeyboardInterrupt
        return real(*arguments, **more)

    monkeypatch.setattr(owner, name, call)


@pytest.mark.slow
@pytest.mark.parametrize("settings", [BYTES, GIVEN, dataclasses.replace(BYTES, drop_duplicates=True)])
@pytest.mark.parametrize("place", ["chunk", "piece", "note", "shard"])
def test_broken_off_anywhere(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: TextSettings, place: str
) -> None:
    """Stopped before each third of the steps of one kind in turn, and gone on with: the same bytes."""
    tokenize_text([str(text)], tmp_path / "whole", settings)
    monkeypatch.setattr(progress, "COMMIT_EVERY_S", 0)
    monkeypatch.setattr(chunks, "CHUNK_CHARS", 2000)
    owner = {
        "chunk": encode.PieceWriter,
        "piece": progress,
        "note": progress.Progress,
        "shard": shard_writer.ShardWriter,
    }[place]
    name = {"chunk": "add", "piece": "write_piece", "note": "save", "shard": "finish"}[place]
    left = [0]
    breaking_at(monkeypatch, owner, name, left)
    starts = 0
    while not (tmp_path / "out" / "corpus.json").exists():
        starts, left[0] = starts + 1, 3
        assert starts < 100
        try:
            tokenize_text([str(text)], tmp_path / "out", settings)
        except KeyboardInterrupt:
            assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [".unfinished"]
    assert starts > 2 and contents(tmp_path / "out") == contents(tmp_path / "whole")


@pytest.mark.slow
def test_killed_and_started_again(tmp_path: Path) -> None:
    assert kill_tokenize.compare(tmp_path, kills=2, seed=0, documents=3000) == 2


def test_other_text_or_settings_are_not_mixed_in(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(encode.PieceWriter, "add", stop)
        tokenize_text([str(text)], tmp_path / "out", BYTES)
    other = dataclasses.replace(BYTES, val_share=0.2)
    with pytest.raises(ConfigError, match=r"out.\.unfinished comes from other text or settings"):
        tokenize_text([str(text)], tmp_path / "out", other)
    first = tokenize_text([str(text)], tmp_path / "out", BYTES)
    with monkeypatch.context() as patch:
        patch.setattr(encode.PieceWriter, "add", stop)
        assert tokenize_text([str(text)], tmp_path / "out", BYTES) == first  # there already
    with pytest.raises(ConfigError, match="out comes from other text or settings"):
        tokenize_text([str(text)], tmp_path / "out", other)
    os.utime(text, (1, 1))
    with pytest.raises(ConfigError, match="out comes from other text or settings"):
        tokenize_text([str(text)], tmp_path / "out", BYTES)


def test_folder_that_holds_something_else(text: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is not empty"):
        tokenize_text([str(text)], tmp_path, BYTES)
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="file is not empty"):
        tokenize_text([str(text)], tmp_path / "file", BYTES)
    with pytest.raises(ConfigError, match="cannot write"):
        tokenize_text([str(text)], tmp_path / "file" / "out", BYTES)


@pytest.mark.parametrize("tokenizer", ["byte", "train:300"])
def test_one_document_cannot_be_both(tmp_path: Path, tokenizer: str) -> None:
    (tmp_path / "a.jsonl").write_text(records(["only this"] * 2))
    with pytest.raises(ConfigError, match="one document, or copies of one"):
        tokenize_text([str(tmp_path)], tmp_path / "out", dataclasses.replace(BYTES, tokenizer=tokenizer))
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]


@pytest.mark.parametrize("share", [1e-9, 1 - 1e-9])
@pytest.mark.parametrize("order", ["given", "shuffled"])
def test_each_part_has_a_document(
    tmp_path: Path, share: float, order: str, monkeypatch: pytest.MonkeyPatch, text: Path
) -> None:
    """Those with the 16 smallest hashes are for validation, the one with the largest for training, in all their copies."""
    monkeypatch.setattr(chunks, "CHUNK_CHARS", 500)
    monkeypatch.setattr(progress, "COMMIT_EVERY_S", 0)
    texts = [f"document {i}" for i in range(200)]
    by_hash = sorted(texts, key=lambda text: hashlib.blake2b(text.encode(), digest_size=16).digest())
    every = [*texts, by_hash[0], by_hash[-1], by_hash[0], by_hash[-1]]
    text.write_text(records(every))
    settings = dataclasses.replace(BYTES, val_share=share, order=order)
    corpus = tokenize_text([str(text)], tmp_path / "out", settings)
    few, many, rare = ("val", "train", by_hash[:16]) if share < 0.5 else ("train", "val", by_hash[-1:])
    in_order = every if order == "given" else shuffled(every)
    assert decoded(corpus, few) == [one for one in in_order if one in rare]
    assert decoded(corpus, many) == [one for one in in_order if one not in rare]


@pytest.mark.parametrize("tokenizer", ["byte", "train:300"])
@pytest.mark.parametrize("count, fewest", [(2, 1), (9, 1), (10, 2), (79, 15), (80, 16), (200, 16)])
def test_validation_of_a_small_text(tmp_path: Path, count: int, fewest: int, tokenizer: str) -> None:
    """16 documents, but no more than a fifth; the rule counts different ones, and what the share takes belongs to them."""
    texts = sorted(TEXTS[:count], key=lambda text: hashlib.blake2b(text.encode(), digest_size=16).digest())
    (tmp_path / "a.jsonl").write_text(records(texts[::-1] * 3))
    below = sum(
        int.from_bytes(hashlib.blake2b(text.encode(), digest_size=16).digest()[:8], "big") / 2**64 < 0.04
        for text in texts
    )
    settings = dataclasses.replace(BYTES, val_share=0.04, tokenizer=tokenizer)
    if tokenizer == "byte":
        corpus = tokenize_text([str(tmp_path / "a.jsonl")], tmp_path / "out", settings)
        assert sorted(decoded(corpus, "val")) == sorted(texts[: max(fewest, below)] * 3)
        assert set(decoded(corpus, "train")) == set(texts[max(fewest, below) :])
    else:
        trained_on = set(training_text(job_of(tmp_path / "a.jsonl", settings), hashlib.sha256()))
        assert trained_on == set(texts[max(fewest, below) :])


@pytest.mark.slow
def test_a_share_of_nothing_is_a_part_of_every_larger_one(tmp_path: Path, text: Path) -> None:
    vals = [
        set(
            decoded(
                tokenize_text([str(text)], tmp_path / str(share), dataclasses.replace(BYTES, val_share=share)), "val"
            )
        )
        for share in (1e-12, 0.01, 0.999, 1 - 1e-12)
    ]
    assert len(vals[0]) == 16 and len(vals[-1]) == len(TEXTS) - 1
    assert all(smaller <= larger for smaller, larger in itertools.pairwise(vals))


@pytest.mark.slow
def test_breaking_off_does_not_matter_where_a_part_is_empty(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor that the text grows by documents with smaller hashes meanwhile."""
    settings = dataclasses.replace(BYTES, val_share=1e-9)
    monkeypatch.setattr(progress, "COMMIT_EVERY_S", 0)
    monkeypatch.setattr(chunks, "CHUNK_CHARS", 2000)
    for name in "finish", "add":
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            breaking_at(patch, shard_writer.ShardWriter, name, [2])
            tokenize_text([str(text)], tmp_path / name, settings)
    tokenize_text([str(text)], tmp_path / "finish", settings)
    tokenize_text([str(text)], tmp_path / "whole", settings)
    assert contents(tmp_path / "finish") == contents(tmp_path / "whole")
    texts = [f"more {i}" for i in range(3000)]
    text.write_text(text.read_text() + records(texts))
    corpus = tokenize_text([str(text)], tmp_path / "add", settings)
    smallest = sorted([*TEXTS, *texts], key=lambda text: hashlib.blake2b(text.encode(), digest_size=16).digest())[:16]
    assert set(decoded(corpus, "val")) == set(smallest) and set(smallest) & set(texts) and set(smallest) & set(TEXTS)


def test_tokenizer_is_not_trained_on_the_document_for_validation(tmp_path: Path) -> None:
    pytest.importorskip("tiktoken")
    pytest.importorskip("rustbpe")
    settings = dataclasses.replace(BYTES, tokenizer="train:300", val_share=1e-9)
    texts = sorted(TEXTS[:40], key=lambda text: hashlib.blake2b(text.encode(), digest_size=16).digest())
    for name, some in ("a", TEXTS[:40]), ("b", texts[1:]):
        (tmp_path / f"{name}.jsonl").write_text(records([*some, *some]))
    seen = [set(training_text(job_of(tmp_path / f"{name}.jsonl", settings), hashlib.sha256())) for name in "ab"]
    assert seen == [set(texts[8:]), set(texts[1 + 7 :])]  # a fifth of 40 and of 39
    corpus = tokenize_text([str(tmp_path / "a.jsonl")], tmp_path / "out", settings)
    val = load_tokenizer(corpus).decode(flat(held(corpus, "val"))).split("<|bos|>")[1:]
    assert sorted(val) == sorted(texts[:8] * 2)
    all_val = dataclasses.replace(settings, val_share=1 - 1e-9)
    assert list(training_text(job_of(tmp_path / "a.jsonl", all_val), hashlib.sha256())) == [texts[-1]]


def job_of(path: Path, settings: TextSettings) -> Job:
    return Job((str(path),), tuple(find_sources([str(path)]).sources), settings, 0, 1, False, False)


def test_no_text_at_all(tmp_path: Path) -> None:
    (tmp_path / "a.txt").touch()
    (tmp_path / "b.jsonl").write_text(records(["", ""]))
    with pytest.raises(SourceError, match=", b.jsonl, 0.0 MB: no text in there"):
        tokenize_text([str(tmp_path)], tmp_path / "out", BYTES)
    assert not (tmp_path / "out").exists()


def test_fault_in_the_text_keeps_what_is_done(text: Path, tmp_path: Path) -> None:
    bad = tmp_path / "z.jsonl"
    bad.write_text('{"text": 1}\n')
    with pytest.raises(SourceError, match="z.jsonl:1"):
        tokenize_text([str(text), str(bad)], tmp_path / "out", BYTES)
    assert [path.name for path in (tmp_path / "out").iterdir()] == [".unfinished"]
    assert len(list((tmp_path / "out" / ".unfinished").glob("*.piece"))) == 2


def test_trained_tokenizer(text: Path, tmp_path: Path) -> None:
    pytest.importorskip("tiktoken")
    pytest.importorskip("rustbpe")
    settings = dataclasses.replace(GIVEN, tokenizer="train:300")
    corpus = tokenize_text([str(text)], tmp_path / "out", settings)
    assert (corpus.tokenizer, corpus.vocab_size, corpus.bos_token) == ("bpe:300", 300, 299)
    tokenizer = load_tokenizer(corpus)
    decoded = tokenizer.decode(flat(held(corpus, "val")))
    assert decoded == "".join("<|bos|>" + bytes(ids[1:]).decode() for ids in expected([*TEXTS, *TEXTS[:50]], val=True))
    again = tokenize_text([str(text)], tmp_path / "again", dataclasses.replace(GIVEN, tokenizer=str(tmp_path / "out")))
    assert (again.fingerprint, again.tokenizer_sha256) == (corpus.fingerprint, corpus.tokenizer_sha256)
    with pytest.raises(ConfigError, match="reads the text twice"):
        tokenize_text(["-"], tmp_path / "stdin", settings)


@pytest.mark.parametrize(
    "change, word",
    [({"val_share": 0.0}, "val_share"), ({"val_share": 1.0}, "val_share"), ({"shard_tokens": 0}, "shard_tokens")]
    + [({"shard_tokens": 2**31}, "shard_tokens"), ({"passage_chars": -1}, "passage_chars")],
)
def test_impossible_settings(change: dict[str, float], word: str) -> None:
    with pytest.raises(ConfigError, match=word):
        TextSettings(**change)  # type: ignore[arg-type]


@pytest.mark.slow
def test_memory_does_not_grow_with_the_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second text is three times as long."""
    monkeypatch.setattr(chunks, "CHUNK_CHARS", 10_000)
    monkeypatch.setattr(encode, "PIECE_BYTES", 100_000)
    peaks = []
    for size in 2, 6:
        path = tmp_path / f"{size}.txt"
        path.write_text("".join(f"{i} " * 100 + "\n\n" for i in range(2500 * size)))
        tracemalloc.start()
        tokenize_text([str(path)], tmp_path / f"out{size}", TextSettings(tokenizer="byte"), workers=2)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.3 * peaks[0]


# --- The commands ---


def test_text_command(text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--tokenizer", "byte", "--val-share", "0.1", "--shard-tokens", "20000", "--workers", "2"]
    assert main(["data", "text", str(text), "--out", str(tmp_path / "out"), *flags]) == 0
    said = capsys.readouterr().out
    tokenize_text([str(text)], tmp_path / "same", BYTES)
    assert contents(tmp_path / "out") == contents(tmp_path / "same")
    assert f"\ntokenizer byte, vocabulary 257; train with --data {tmp_path / 'out'}\n" in said
    assert "\nleft out as empty: 2\n" in said
    assert main(["data", "text", str(tmp_path / "missing.txt"), "--out", "x"]) == 3
    assert capsys.readouterr().err.count("\n") == 1


def test_text_command_on_a_source_tree(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tree, out = tmp_path / "tree", tmp_path / "out"
    for number in range(60):
        (tree / f"part{number % 3}").mkdir(parents=True, exist_ok=True)
        for suffix in ".py", ".C", ".pyc":
            (tree / f"part{number % 3}" / f"{number}{suffix}").write_text(f"{suffix} {number}\n")
    command = ["data", "text", str(tree), "--out", str(out), "--tokenizer", "byte"]
    assert main(command) == 3
    said = capsys.readouterr().err
    assert "in there; left out: 60 *.c, 60 *.py, 60 *.pyc; --suffix reads" in said and said.count("\n") == 1
    assert main([*command, "--suffix", "src"]) == 2 and "put paths before --suffix" in capsys.readouterr().err
    assert not out.exists()
    assert main([*command, "--suffix", ".py,.c"]) == 0
    said = capsys.readouterr().out
    assert said.startswith("left out: 60 *.pyc; --suffix reads")
    assert "\nvalidation has 13.3 % of the documents, not 1 %: " in said and "--val-share" in said
    corpus = open_corpus(out)
    assert len(decoded(corpus, "train")) == 104 and len(decoded(corpus, "val")) == 16
    whole = contents(out)
    assert main([*command, "--suffix", ".c", "*.py", ".py"]) == 0 and contents(out) == whole


def test_vocabulary_that_the_text_is_too_short_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The advice is a flag that does it, with the same folder."""
    pytest.importorskip("tiktoken")
    pytest.importorskip("rustbpe")
    (tmp_path / "a.log").write_text("some line of a log\n" * 300 + "and another\n" * 300)
    command = ["data", "text", str(tmp_path / "a.log"), "--passage", "100", "--out", str(tmp_path / "out")]
    assert main([*command, "--tokenizer", "train:4096"]) == 2
    advice = re.search(
        r"tokenizer=train:4096 is too large for this text; try (train:\d+)$", capsys.readouterr().err.strip()
    )
    assert advice and main([*command, "--tokenizer", advice[1]]) == 0
    assert f"tokenizer bpe:{advice[1][6:]}, vocabulary {advice[1][6:]};" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["book", "log", "tree"])
def test_an_epoch_of_the_laptop_preset_uses_own_text(tmp_path: Path, kind: str) -> None:
    """By the tokens of its sequences, counted: at least 90 % of those of the training text come up in one epoch."""
    random = np.random.default_rng(0)
    words = ["".join(map(chr, random.integers(97, 123, length))) for length in random.integers(2, 9, 500)]
    lines = [" ".join(random.choice(words, 12)) + "\n" for _ in range(3000)]
    given = {
        "book": ("book.txt", "".join(line + "\n" * (number % 40 == 0) for number, line in enumerate(lines))),
        "log": (
            "dpkg.log",
            "".join(f"2024-05-01 12:{k // 60 % 60:02}:{k % 60:02} {line}" for k, line in enumerate(lines)),
        ),
    }
    if kind == "tree":
        for k in range(150):
            path = tmp_path / "tree" / f"{k % 7}" / f"{k}.py"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("".join(lines[17 * k : 17 * k + k % 60]))
        asked = [str(tmp_path / "tree"), "--suffix", ".py"]
    else:
        name, content = given[kind]
        (tmp_path / name).write_text(content)
        asked = [str(tmp_path / name)]
    assert main(["data", "text", *asked, "--out", str(tmp_path / "out"), "--tokenizer", "byte"]) == 0
    corpus, cfg = open_corpus(tmp_path / "out"), TrainConfig(**PRESETS["laptop"].settings)
    T, tokens = cfg.micro_batch_tokens, flat(held(corpus, "train"))
    batches = train_batches(corpus, T, cfg.micro_batches, cfg.seed, order=cfg.data_order)
    seen = Counter(id for k in range(len(tokens) // T) for id in batches.micro_batch(k)[0].tolist())
    there = Counter(tokens)
    used = sum(min(seen[id], count) for id, count in there.items()) / len(tokens)
    assert used >= 0.9 and batches.usage().share >= 0.9 and len(decoded(corpus, "val")) >= 16
    assert ValBatches(corpus, T, T)[0][0].numel() == T


@pytest.mark.slow
def test_text_script_reads_standard_input(tmp_path: Path) -> None:
    script = Path(speedrun_mup.__file__).parents[1] / "scripts" / "data" / "text.py"
    command = [sys.executable, script, "-", "--out", "out", "--tokenizer", "byte", "--val-share", "0.3"]
    prose = "".join(f"sentence {i} of some prose\n\n" for i in range(300))
    done = subprocess.run(command, cwd=tmp_path, input=prose, text=True, capture_output=True, timeout=300)
    assert (done.returncode, done.stderr) == (0, "")
    corpus = open_corpus(tmp_path / "out")
    read = flat(held(corpus, "train") + held(corpus, "val"))
    assert sorted(bytes(id for id in read if id < 256)) == sorted(prose.encode())


@pytest.fixture
def pipe(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Sets what standard input holds."""

    def put(text: str) -> None:
        stream = io.TextIOWrapper(io.BufferedReader(io.BytesIO(text.encode())))  # type: ignore[arg-type]
        monkeypatch.setattr(sys, "stdin", stream)

    return put


def test_standard_input_is_never_taken_for_done(
    tmp_path: Path, pipe: Callable[[str], None], capsys: pytest.CaptureFixture[str]
) -> None:
    pipe(records(TEXTS))
    tokenize_text(["-"], tmp_path / "out", BYTES)
    before = contents(tmp_path / "out")
    for texts in TEXTS, TEXTS[:50]:
        pipe(records(texts))
        flags = ["--tokenizer", "byte", "--val-share", "0.1", "--shard-tokens", "20000"]
        assert main(["data", "text", "-", "--out", str(tmp_path / "out"), *flags]) == 2
        said = capsys.readouterr()
        assert "standard input cannot be resumed; choose a new --out" in said.err and said.err.count("\n") == 1
    assert contents(tmp_path / "out") == before


@pytest.mark.slow
@pytest.mark.parametrize("drop_duplicates", [False, True])
def test_standard_input_is_never_gone_on_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pipe: Callable[[str], None], drop_duplicates: bool
) -> None:
    """Broken off after a note of progress, it would lose documents or splice two texts."""
    settings = dataclasses.replace(GIVEN, drop_duplicates=drop_duplicates)
    monkeypatch.setattr(progress, "COMMIT_EVERY_S", 0)
    monkeypatch.setattr(chunks, "CHUNK_CHARS", 2000)
    left = [5]
    breaking_at(monkeypatch, encode.PieceWriter, "add", left)
    pipe(records(TEXTS))
    with pytest.raises(KeyboardInterrupt):
        tokenize_text(["-"], tmp_path / "out", settings)
    before = contents(tmp_path / "out" / ".unfinished")
    pipe(records(TEXTS))
    with pytest.raises(ConfigError, match=r"progress\.json exists, and standard input cannot be resumed"):
        tokenize_text(["-"], tmp_path / "out", settings)
    assert contents(tmp_path / "out" / ".unfinished") == before and sys.stdin.read() == records(TEXTS)
    pipe(records(TEXTS))
    left[0] = 0
    corpus = tokenize_text(["-"], tmp_path / "new", settings)
    assert flat(held(corpus, "train")) == flat(expected(TEXTS, val=False))


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--workers", "0"], "workers=0 must be at least 1"),
        (["--workers", "-1"], "workers=-1 must be at least 1"),
        (["--bos", "NOPE"], "tokenizer=byte has a BOS token of its own; leave out --bos NOPE"),
        (["--bos", "NOPE", "--tokenizer", "train:300"], "tokenizer=train:300 has a BOS token of its own"),
        (["--tokenizer", "bite"], "tokenizer=bite: choose gpt2"),
    ],
)
def test_refused_before_anything_is_written(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str], words: str
) -> None:
    assert main(["data", "text", str(text), "--out", str(tmp_path / "out"), "--tokenizer", "byte", *flags]) == 2
    said = capsys.readouterr().err
    assert words in said and said.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["text.jsonl"]


@pytest.mark.slow
def test_picture_that_cannot_be_written(text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Below a file, and where a folder has the default name: root may write into read-only ones. All else is told."""
    tokenize_text([str(text)], tmp_path / "out", BYTES)
    assert main(["data", "inspect", str(tmp_path / "out"), "--picture", str(tmp_path / "a.txt")]) == 0
    assert (tmp_path / "a.txt").read_bytes().startswith(b"\x89PNG")
    (tmp_path / "out" / "document-lengths.png").mkdir()
    capsys.readouterr()
    for flags, why in (["--picture", str(tmp_path / "a.txt" / "x.png")], "File exists"), ([], "Is a directory"):
        assert main(["data", "inspect", str(tmp_path / "out"), *flags]) == 1
        said = capsys.readouterr()
        assert f"cannot be written ({why}); all else is there" in said.err and said.err.count("\n") == 1
        assert "all right" in said.out


@pytest.mark.slow
def test_inspect_command(text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    corpus = tokenize_text([str(text)], tmp_path / "out", GIVEN)
    command = ["data", "inspect", str(tmp_path / "out"), "--documents", "2"]
    assert main(command) == 0
    said = capsys.readouterr().out
    documents = [ids[1:] for ids in expected(ALL, val=False)]
    assert f"{len(documents):,} for training" in said and f"longest {max(map(len, documents)):,}" in said
    assert f"[{len(documents[0]):,} tokens] {TEXTS[0]}" in said and "all right" in said
    assert (tmp_path / "out" / "document-lengths.png").read_bytes().startswith(b"\x89PNG")
    raw = bytearray(corpus.train[1].read_bytes())
    raw[5000] ^= 1
    corpus.train[1].write_bytes(raw)
    assert main(command) == 3
    said = capsys.readouterr()
    assert "train_000001.bin: not what the manifest says" in said.err and said.err.count("\n") == 1
    raw[5001] = 77
    corpus.train[1].write_bytes(raw)
    assert main(command) == 3
    assert "the vocabulary has 257" in capsys.readouterr().err
    manifest = tmp_path / "out" / "corpus.json"
    manifest.write_text(manifest.read_text().replace(corpus.fingerprint, "0" * 64))
    assert main(command) == 3
    assert "2 fault(s)" in capsys.readouterr().err
    corpus.train[1].write_bytes(raw[:-2])
    assert main(command) == 3
    assert "truncated" in capsys.readouterr().err


@pytest.mark.slow
def test_inspect_what_upstream_wrote(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("speedrun_mup.data.inspect_corpus.load_tokenizer", lambda _: pytest.fail("not needed"))
    for name in "fineweb_train_000001.bin", "fineweb_val_000000.bin":
        write_shard(tmp_path / name, [50256, *range(100), 50256, 5])
    assert main(["data", "inspect", str(tmp_path), "--picture", str(tmp_path / "a.png"), "--documents", "0"]) == 0
    assert "there is no manifest with hashes: all right" in capsys.readouterr().out
    assert main(["data", "inspect", str(tmp_path / "missing")]) == ShardError.exit_code
    assert main(["data"]) == 2 and main(["data", "nothing"]) == 2


# --- Order and split ---


@pytest.mark.slow
def test_a_smaller_validation_is_a_part_of_a_larger_one(text: Path, tmp_path: Path) -> None:
    """Whatever the order and its seed; and equal documents are on one side."""
    vals = []
    for number, (share, seed) in enumerate([(0.05, 0), (0.2, 3), (0.5, 4)]):
        settings = dataclasses.replace(BYTES, val_share=share, shuffle_seed=seed)
        corpus = tokenize_text([str(text)], tmp_path / f"out{number}", settings)
        val, train = set(decoded(corpus, "val")), set(decoded(corpus, "train"))
        assert not val & train and val | train == set(TEXTS)
        vals.append(val)
    assert 0 < len(vals[0]) < len(vals[1]) < len(vals[2]) and vals[0] < vals[1] < vals[2]


def test_files_and_copies_are_scattered(tmp_path: Path) -> None:
    """A run over the first tenth sees all files, and equal documents do not come in a row."""
    for number in range(10):
        same = [f"the same in all {i}" for i in range(20)]
        (tmp_path / f"{number}.jsonl").write_text(
            records([*same, *(f"file {number}, document {i}" for i in range(200))])
        )
    documents = decoded(tokenize_text([str(tmp_path)], tmp_path / "out", BYTES), "train")
    first = documents[: len(documents) // 10]
    assert {document[:6] for document in first} >= {f"file {number}" for number in range(10)}
    in_a_row = sum(one == next_ for one, next_ in itertools.pairwise(documents))
    assert in_a_row < 5


# --- Bad documents ---


@pytest.mark.slow
def test_text_that_the_tokenizer_gives_up_on_is_encoded_in_pieces(tmp_path: Path) -> None:
    pytest.importorskip("tiktoken")
    pytest.importorskip("rustbpe")
    texts = [*TEXTS, " " * 1_500_000, "a\u00a0" + "\t" * 1_200_000]
    (tmp_path / "a.jsonl").write_text(records(texts))
    settings = dataclasses.replace(GIVEN, tokenizer="train:300", shard_tokens=10**8)
    corpus = tokenize_text([str(tmp_path / "a.jsonl")], tmp_path / "out", settings)
    ids = [flat(held(corpus, part)) for part in ("train", "val")]
    found = [load_tokenizer(corpus).decode(row).split("<|bos|>")[1:] for row in ids]
    assert sorted(found[0] + found[1]) == sorted(texts)


class PanicException(BaseException):
    """As PyO3 raises it."""


def break_encoding(monkeypatch: pytest.MonkeyPatch, word: str) -> None:
    real = find_tokenizer("byte").encode_array

    def encode_array(self: object, text: str) -> object:
        if word in text:
            raise PanicException("regex match failed: StackOverflow\nstack backtrace")
        return real(text)

    monkeypatch.setattr("speedrun_mup.data.tokenizers.ByteTokenizer.encode_array", encode_array)


@pytest.mark.parametrize("workers", [1, 3])
def test_document_that_cannot_be_encoded(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], workers: int
) -> None:
    break_encoding(monkeypatch, "document 113:")
    command = ["data", "text", str(text), "--out", str(tmp_path / "out"), "--tokenizer", "byte", "--val-share", "0.1"]
    command += ["--workers", str(workers), "--order", "given"]
    assert main(command) == 3
    said = capsys.readouterr().err
    assert "text.jsonl:115: byte cannot encode this document (ValueError: PanicException: regex match" in said
    assert "--on-bad-document skip" in said and said.count("\n") == 1
    assert main([*command, "--on-bad-document", "skip"]) == 0
    said = capsys.readouterr()
    assert (
        "left out: " in said.out and "text.jsonl:115" in said.out and "left out as bad: 1" in said.out and not said.err
    )
    documents = decoded(open_corpus(tmp_path / "out"), "train") + decoded(open_corpus(tmp_path / "out"), "val")
    assert sorted(documents) == sorted([one for one in [*TEXTS, *TEXTS[:50]] if "document 113:" not in one])


def test_skipped_documents_are_counted_and_the_first_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = records(TEXTS).splitlines(True)
    (tmp_path / "a.jsonl").write_text("".join(line + '{"text": 5}\n' * (i % 4 == 0) for i, line in enumerate(lines)))
    (tmp_path / "b.txt.gz").write_bytes(b"no gzip")
    (tmp_path / "c.jsonl").write_text(records(["the last"]))
    settings = dataclasses.replace(GIVEN, val_share=0.1)
    corpus = tokenize_text([str(tmp_path)], tmp_path / "out", settings, skip_bad=True)
    assert corpus.tally["bad"] == 101 and flat(held(corpus, "train")) == flat(expected([*TEXTS, "the last"], val=False))
    told = capsys.readouterr().out.splitlines()
    assert len(told) == 20 and "a.jsonl:2: field 'text' is int" in told[0] and "counted only" in told[-1]


def test_mended_text_is_gone_on_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only what had not been read is read for the first time; the result is that of the mended text alone."""
    monkeypatch.setattr(chunks, "CHUNK_CHARS", 2000)
    lines = records(TEXTS).splitlines(True)
    (tmp_path / "a.jsonl").write_text("".join(lines[:100]))
    path, settings = tmp_path / "b.jsonl", dataclasses.replace(BYTES, drop_duplicates=True)
    path.write_text("".join([*lines[100:350], '{"text": null}\n', *lines[350:]]))
    with pytest.raises(SourceError, match=r"b\.jsonl:251: field 'text' is NoneType"):
        tokenize_text([str(tmp_path)], tmp_path / "out", settings)
    encoded: list[str] = []
    real = encode._encode

    def recorded(chunk: chunks.Chunk, tokenizer: object) -> object:
        encoded.extend(document.text for document in chunk.documents)
        return real(chunk, tokenizer)  # type: ignore[arg-type]

    monkeypatch.setattr(encode, "_encode", recorded)
    path.write_text("".join([*lines[100:350], json.dumps({"text": "mended"}) + "\n", *lines[350:]]))
    tokenize_text([str(tmp_path)], tmp_path / "out", settings)
    assert encoded == ["mended", *TEXTS[350:]]
    tokenize_text([str(tmp_path)], tmp_path / "other" / "out", settings)
    assert shards(tmp_path / "out") == shards(tmp_path / "other" / "out")


def shards(folder: Path) -> dict[str, bytes]:
    return {name: content for name, content in contents(folder).items() if name.endswith(".bin")}


CHANGES = {
    "nothing": (350, lambda lines: lines),
    "what was read": (100, lambda lines: [lines[1], *lines[1:]]),
    "the middle": (100, lambda lines: [*lines[:150], lines[0], *lines[151:]]),
    "shorter": (100, lambda lines: lines[:20]),
    "longer": (350, lambda lines: [*lines, *lines]),
}


@pytest.mark.slow
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("order", ORDERS)
def test_changed_text_is_read_again_from_the_change_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str, order: str
) -> None:
    """Broken off with b.jsonl read, whatever became of it then: the result is that of the text as it is now."""
    monkeypatch.setattr(chunks, "CHUNK_CHARS", 2000)
    monkeypatch.setattr(progress, "COMMIT_EVERY_S", 0)
    lines, settings = records(TEXTS).splitlines(True), dataclasses.replace(BYTES, order=order)
    for name, some in ("a", lines[:100]), ("b", lines[100:350]), ("c", lines[350:]):
        (tmp_path / f"{name}.jsonl").write_text("".join(some))
    left = [0]
    breaking_at(monkeypatch, shard_writer.ShardWriter, "finish", left)
    left[0] = 2
    with pytest.raises(KeyboardInterrupt):
        tokenize_text([str(tmp_path)], tmp_path / "out", settings)
    kept, changed = CHANGES[change]
    (tmp_path / "b.jsonl").write_text("".join(changed(lines[100:350])))  # type: ignore[no-untyped-call]
    read: list[int] = []
    monkeypatch.setattr(
        encode, "_encode", lambda *pair, real=encode._encode: (read.append(len(pair[0].documents)), real(*pair))[1]
    )
    tokenize_text([str(tmp_path)], tmp_path / "out", settings)
    assert sum(read) <= len(TEXTS) + 250 - kept + 60  # 60: the chunk that is cut by the change
    tokenize_text([str(tmp_path)], tmp_path / "other" / "out", settings)
    assert shards(tmp_path / "out") == shards(tmp_path / "other" / "out")


@pytest.mark.slow
def test_tokenizer_is_trained_again_if_its_text_changed(tmp_path: Path) -> None:
    pytest.importorskip("tiktoken")
    pytest.importorskip("rustbpe")
    settings = dataclasses.replace(BYTES, tokenizer="train:300")
    (tmp_path / "a.jsonl").write_text(records(TEXTS) + "{")
    with pytest.raises(SourceError, match=r"a\.jsonl:401"):
        tokenize_text([str(tmp_path)], tmp_path / "out", settings)
    with pytest.raises(SourceError, match=r"a\.jsonl:401"):
        (tmp_path / "b.jsonl").write_text(records(["b" * 99] * 99))
        tokenize_text([str(tmp_path)], tmp_path / "out", settings)
    (tmp_path / "a.jsonl").write_text(records(TEXTS) + records(["something else: zebra zebra"] * 500))
    for out in tmp_path / "out", tmp_path / "other" / "out":
        tokenize_text([str(tmp_path)], out, settings)
    assert contents(tmp_path / "out")["tokenizer.json"] == contents(tmp_path / "other" / "out")["tokenizer.json"]
    assert shards(tmp_path / "out") == shards(tmp_path / "other" / "out")


# --- What a power cut or a disk leaves ---


@pytest.fixture
def broken_off(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of unfinished work, broken off after the first shard; `whole` beside it is the right result."""
    monkeypatch.setattr(chunks, "CHUNK_CHARS", 2000)
    monkeypatch.setattr(progress, "COMMIT_EVERY_S", 0)
    tokenize_text([str(text)], tmp_path / "whole", BYTES)
    left = [2]
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        breaking_at(patch, shard_writer.ShardWriter, "finish", left)
        tokenize_text([str(text)], tmp_path / "out", BYTES)
    return tmp_path / "out" / ".unfinished"


DAMAGES = {
    "shard zeroed": ("train_000000.bin", lambda content: bytes(len(content))),
    "shard cut": ("train_000000.bin", lambda content: content[:5000]),
    "piece zeroed": ("train_000003.piece", lambda content: bytes(len(content))),
    "piece cut": ("val_000007.piece", lambda content: content[:-1]),
    "piece empty": ("train_000000.piece", lambda content: b""),
    "note cut": ("progress.json", lambda content: content[:100]),
    "note empty": ("progress.json", lambda content: b""),
    "note deep": ("progress.json", lambda content: b"[" * 100_000),
    "note null": ("progress.json", lambda content: b"null"),
    "note of other types": ("progress.json", lambda content: content.replace(b'"steps": [', b'"steps": [5, ')),
    "note of other numbers": ("progress.json", lambda content: content.replace(b'"records": ', b'"records": 1')),
    "sources cut": ("sources.json", lambda content: content[:-5]),
    "sources of another kind": ("sources.json", lambda content: b'{"a": 1}'),
}


@pytest.mark.slow
@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_never_trusted(text: Path, broken_off: Path, damage: str, capsys: pytest.CaptureFixture[str]) -> None:
    name, change = DAMAGES[damage]
    path = broken_off / name
    path.write_bytes(change(path.read_bytes()))  # type: ignore[no-untyped-call]
    tokenize_text([str(text)], broken_off.parent, BYTES)
    assert contents(broken_off.parent) == contents(broken_off.parents[1] / "whole")
    assert capsys.readouterr().out.count("\n") == (0 if "shard" in damage else 1)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["train_000002.piece", "train_000000.bin", "progress.json"])
def test_file_that_is_gone(text: Path, broken_off: Path, name: str) -> None:
    (broken_off / name).unlink()
    tokenize_text([str(text)], broken_off.parent, BYTES)
    assert contents(broken_off.parent) == contents(broken_off.parents[1] / "whole")


def test_all_is_on_the_disk_before_the_note_that_promises_it(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the order of syncs: a kill does not lose what the kernel holds."""
    synced: set[str] = set()
    real, checked = os.fsync, 0
    monkeypatch.setattr(os, "fsync", lambda file: (synced.add(os.readlink(f"/proc/self/fd/{file}")), real(file))[1])
    write = progress.write_whole

    def write_whole(path: Path, content: str) -> None:
        nonlocal checked
        if path.name == "progress.json":
            noted = json.loads(content)["noted"]
            for number, step in enumerate(noted["steps"]):
                for part in step[-1]:
                    assert str(path.parent / f"{part}_{number:06d}.piece") in synced and str(path.parent) in synced
                    checked += 1
            for part in "train", "val":
                assert all(str(path.parent / name) in synced for name in noted["shards"][part])
                checked += len(noted["shards"][part])
        write(path, content)

    monkeypatch.setattr(progress, "write_whole", write_whole)
    monkeypatch.setattr(chunks, "CHUNK_CHARS", 20_000)
    monkeypatch.setattr(progress, "COMMIT_EVERY_S", 0)
    out = tmp_path / "out"
    tokenize_text([str(text)], out, BYTES)
    assert checked > 20 and str(out) in synced


@pytest.mark.slow
def test_pieces_are_synced_with_notes_only(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One note at the start, one when the work is broken off; what was read by then is on the disk, and kept."""
    synced: list[str] = []
    real = os.fsync
    monkeypatch.setattr(os, "fsync", lambda file: (synced.append(os.readlink(f"/proc/self/fd/{file}")), real(file))[1])
    monkeypatch.setattr(encode, "PIECE_BYTES", 2000)
    monkeypatch.setattr(chunks, "CHUNK_CHARS", 2000)
    tokenize_text([str(text)], tmp_path / "whole", BYTES)
    assert not [path for path in synced if path.endswith(".piece")]
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        breaking_at(patch, shard_writer.ShardWriter, "finish", [2])
        tokenize_text([str(text)], tmp_path / "out", BYTES)
    pieces = {str(path) for path in (tmp_path / "out" / ".unfinished").glob("*.piece")}
    assert len(pieces) > 20 and pieces <= set(synced)
    monkeypatch.setattr(run, "read_text", None)  # nothing is read again
    tokenize_text([str(text)], tmp_path / "out", BYTES)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


@pytest.mark.slow
def test_disk_that_is_full_leaves_no_hole(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenize_text([str(text)], tmp_path / "whole", BYTES)
    monkeypatch.setattr(chunks, "CHUNK_CHARS", 2000)
    monkeypatch.setattr(progress, "COMMIT_EVERY_S", 0)
    real, left = progress.write_piece, 9

    def write_piece(path: Path, *rest: object) -> object:
        nonlocal left
        left -= 1
        if left == 0:
            path.write_bytes(b"half")
            raise OSError(28, "No space left on device")
        return real(path, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(progress, "write_piece", write_piece)
    with pytest.raises(ConfigError, match="cannot write: No space left on device"):
        tokenize_text([str(text)], tmp_path / "out", BYTES)
    tokenize_text([str(text)], tmp_path / "out", BYTES)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


@pytest.mark.parametrize("at", range(1, 9))
def test_broken_off_while_moving_out(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int) -> None:
    tokenize_text([str(text)], tmp_path / "whole", BYTES)
    real, left = Path.replace, at

    def replace(self: Path, target: Path) -> Path:
        nonlocal left
        left -= 1
        if left == 0:
            raise KeyboardInterrupt
        return real(self, target)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Path, "replace", replace)
        tokenize_text([str(text)], tmp_path / "out", BYTES)
        raise KeyboardInterrupt  # there were fewer
    tokenize_text([str(text)], tmp_path / "out", BYTES)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


# --- Where it is written ---


def test_out_that_is_the_working_folder_or_a_link(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = contents_of_corpus(tokenize_text([str(text)], tmp_path / "whole", BYTES))
    for name, out in ("here", "."), ("there", ""), ("inside/out", "../out"):
        (tmp_path / name).mkdir(parents=True)
        monkeypatch.chdir(tmp_path / name)
        assert contents_of_corpus(tokenize_text([str(text)], Path(out), BYTES)) == whole
        assert (tmp_path / name / "corpus.json").exists()
    (tmp_path / "disk" / "lost+found").mkdir(parents=True)
    (tmp_path / "disk" / ".keep").touch()
    (tmp_path / "link").symlink_to("disk")
    assert contents_of_corpus(tokenize_text([str(text)], tmp_path / "link", BYTES)) == whole
    assert (tmp_path / "link").is_symlink() and (tmp_path / "disk" / "corpus.json").exists()


def contents_of_corpus(corpus: Corpus) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (*corpus.train, *corpus.val)}


def test_out_that_will_not_do_is_refused_before_the_work(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "_write_corpus", lambda *_: pytest.fail("worked"))
    (tmp_path / "nothing").symlink_to("nowhere")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "file").touch()
    os.mkfifo(tmp_path / "fifo")
    for out, words in {
        "nothing": "is a link to nothing",
        "loop": "link",
        "file": "is not empty",
        "fifo": "is not empty",
        "file/out": "cannot write",
        ".": r"is not empty \(there is ",
        "/": r"is not empty \(there is ",
        "nul\0": "cannot write",
        "x" * 300: "cannot write",
        "/proc/out": "cannot write",
    }.items():
        with pytest.raises(ConfigError, match=words) as error:
            tokenize_text([str(text)], tmp_path / out, BYTES)
        assert "\n" not in str(error.value)


def test_out_that_is_a_mount_point(text: Path, tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    mount = ["mount", "-t", "tmpfs", "none", str(tmp_path / "disk")]
    if os.getuid() or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("may not mount")
    try:
        corpus = tokenize_text([str(text)], tmp_path / "disk", BYTES)
        assert len(corpus.train) > 3 and sorted(contents(tmp_path / "disk")) == sorted(["corpus.json", *corpus.facts])
    finally:
        subprocess.run(["umount", str(tmp_path / "disk")], check=True)


LEFT = (".lock", "sources.json", "progress.json", "train_000000.bin", "train_000000.piece", "val_000000.piece")


@pytest.mark.parametrize("name", LEFT)
def test_nothing_in_a_received_folder_is_followed_or_waited_for(text: Path, tmp_path: Path, name: str) -> None:
    precious = tmp_path / "precious"
    precious.write_text("precious")
    for out in tmp_path / "link", tmp_path / "fifo":
        (out / ".unfinished").mkdir(parents=True)
    (tmp_path / "link" / ".unfinished" / name).symlink_to(precious)
    os.mkfifo(tmp_path / "fifo" / ".unfinished" / name)
    for out in tmp_path / "link", tmp_path / "fifo":
        if name == ".lock":
            with pytest.raises(ConfigError, match="cannot write: it is a (symbolic link|FIFO), not a regular file"):
                tokenize_text([str(text)], out, BYTES)
        else:
            tokenize_text([str(text)], out, BYTES)
    assert precious.read_text() == "precious"


def test_unfinished_folder_that_is_a_link(text: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / ".unfinished").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ConfigError, match="unfinished is a link; delete it"):
        tokenize_text([str(text)], tmp_path / "out", BYTES)
    assert not list((tmp_path / "elsewhere").iterdir())


@pytest.mark.slow
def test_what_an_earlier_version_left(text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It made no order, and worked in a folder beside the one asked for."""
    former = tmp_path / "out.unfinished"
    former.mkdir()
    (former / "progress.json").write_text(json.dumps({"recipe": "0", "position": [0, 5], "parts": {}}))
    tokenize_text([str(text)], tmp_path / "out", BYTES)
    assert capsys.readouterr().out == f"{former} was begun by an earlier version, and cannot be resumed; delete it\n"
    manifest = json.loads((tmp_path / "out" / "corpus.json").read_text())
    del manifest["order"], manifest["tally"]
    (tmp_path / "out" / "corpus.json").write_text(json.dumps(manifest | {"recipe": "0" * 64}))
    with pytest.raises(ConfigError, match="of an earlier version; train on it as it is"):
        tokenize_text([str(text)], tmp_path / "out", BYTES)
    assert main(["data", "inspect", str(tmp_path / "out"), "--documents", "0"]) == 0
    (tmp_path / "out" / "corpus.json").unlink()
    (tmp_path / "out" / ".unfinished").mkdir()
    with pytest.raises(ShardError, match="`data text` did not finish; run the same command again"):
        open_corpus(tmp_path / "out")


def test_out_inside_the_text(text: Path, tmp_path: Path) -> None:
    corpus = tokenize_text([str(tmp_path)], tmp_path / "out", BYTES)
    assert corpus.tally["files"] == 0
    assert tokenize_text([str(tmp_path)], tmp_path / "out", BYTES) == corpus  # its own files are no text


def test_names_that_are_not_utf8(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / os.fsdecode(b"caf\xe9")
    folder.mkdir()
    (folder / os.fsdecode(b"\xff\x1b[31m.jsonl")).write_text(records(TEXTS))
    (folder / os.fsdecode(b"\xff.png")).touch()
    command = ["data", "text", str(folder), "--out", str(folder / "out"), "--tokenizer", "byte", "--val-share", "0.1"]
    assert main(command) == 0
    said = capsys.readouterr()
    assert said.out.encode() and said.out.replace("\n", "").isprintable() and "left out: 1 *.png" in said.out
    assert open_corpus(folder / "out").source.isprintable()
