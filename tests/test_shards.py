"""Shards and manifests: only whole, well-formed files pass."""

import ast
import gzip
import hashlib
import inspect
import json
import os
import random
import shutil
import struct
import threading
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from helpers.small_corpus import BOS, VOCAB, documents, make_corpus, naive_read, one_line
from hypothesis import given, settings
from hypothesis import strategies as st

from speedrun_mup.core.errors import ConfigError
from speedrun_mup.data import bound, shards
from speedrun_mup.data.manifest import GPT2_BOS, GPT2_VOCAB, open_corpus
from speedrun_mup.data.shards import (
    Corpus,
    Shard,
    ShardError,
    TokenRow,
    measure_shard,
    mix,
    read_shard,
    sole_writer,
    write_shard,
)
from speedrun_mup.files import printable

FUZZED_FILES = int(os.environ.get("FUZZED_FILES", 2000))
FACTS = {"tokens": 5000, "documents": 1, "sha256": "0" * 64}


@pytest.fixture
def small(tmp_path: Path) -> Corpus:
    """Four shards of random documents, unequal in length."""
    return make_corpus(tmp_path / "small", [documents(n, 40, n) for n in (5000, 3000, 4000, 2500)])


# --- Shards ---


@pytest.mark.slow
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
    with pytest.raises(ShardError, match="cannot be written"):
        write_shard(path / "below_a_file.bin", [1])


def nested(depth: int) -> list[object]:
    """Lists in lists."""
    value: list[object] = []
    for _ in range(depth):
        value = [value]
    return value


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
        one_line(error, printable(path))


def mutated(good: bytes, rng: random.Random) -> bytes:
    """One to four faults: in a header field, anywhere in a byte, at the end."""
    raw = bytearray(good)
    for _ in range(rng.randint(1, 4)):
        action = rng.randrange(6)
        if action == 0:
            raw[rng.randrange(12) % len(raw)] = rng.randrange(256)
        elif action == 1:
            raw[rng.randrange(len(raw))] ^= 1 << rng.randrange(8)
        elif action == 2:
            del raw[rng.randrange(1, len(raw) + 1) :]
        elif action == 3:
            raw += rng.randbytes(rng.randint(1, 64))
        elif action == 4:
            raw[8:12] = struct.pack("<i", rng.choice([0, -1, 2**31 - 1, 499, 501, rng.randrange(2**31)]))
        else:
            at = rng.randrange(len(raw)) & ~1
            raw[at : at + 2] = struct.pack("<H", rng.randrange(VOCAB, 65536))
    return bytes(raw)


@pytest.mark.slow
def test_fuzzed_files(tmp_path: Path) -> None:
    """Any mutation either raises ShardError or leaves a shard as long as its header says; no big allocation."""
    rng = random.Random(0)
    good = header(count=500) + documents(500, 20).astype("<u2").tobytes()
    path, refused, foreign = tmp_path / "a.bin", 0, 0
    tracemalloc.start()
    for _ in range(FUZZED_FILES):
        raw = mutated(good, rng)
        path.write_bytes(raw)
        try:
            tokens = read_shard(path)
        except ShardError as error:
            assert "\n" not in str(error)
            refused += 1
            continue
        assert raw[:8] == good[:8] and len(raw) == 1024 + 2 * len(tokens)
        assert tokens.tobytes() == raw[1024:]
        try:
            assert Shard(path).find(BOS, VOCAB).tolist() == np.flatnonzero(tokens == BOS).tolist()
            assert tokens.max() < VOCAB
        except ShardError as error:
            assert "\n" not in str(error) and tokens.max() >= VOCAB
            foreign += 1
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert FUZZED_FILES / 2 < refused < FUZZED_FILES - foreign and foreign > FUZZED_FILES / 20
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


def test_two_writers_of_one_folder(tmp_path: Path) -> None:
    with (
        sole_writer(tmp_path / "a"),
        pytest.raises(ConfigError, match=f"a is in use by process {os.getpid()}; stop it or"),
        sole_writer(tmp_path / "a"),
    ):
        pass
    (tmp_path / "a" / ".x.bin.1-ab.tmp").write_text("left by a writer that was killed")
    with sole_writer(tmp_path / "a"):  # free again
        assert [path.name for path in (tmp_path / "a").iterdir()] == [".lock"]


def test_faults_of_the_disk_are_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(ConfigError, match="file/out: cannot write: Not a directory"),
        sole_writer(tmp_path / "file/out"),
    ):
        pass
    with pytest.raises(ConfigError, match="a: cannot write: No such file"), sole_writer(tmp_path / "a"):
        (tmp_path / "a" / "missing").rename(tmp_path / "b")


def test_measure_shard(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    write_shard(path, [BOS, 1, 2, BOS, 3])
    facts = measure_shard(path, VOCAB, BOS)
    assert (facts.tokens, facts.documents, facts.sha256) == (5, 2, hashlib.sha256(path.read_bytes()).hexdigest())
    with pytest.raises(ShardError, match="id 50 at offset 0"):
        measure_shard(path, 50, 0)


# --- Open files ---


def open_files(below: Path) -> int:
    """How many files below a folder this process holds open."""
    links = Path("/proc/self/fd")
    return sum(str(os.readlink(link)).startswith(str(below)) for link in links.iterdir() if link.is_symlink())


@pytest.mark.slow
def test_any_number_of_shards_can_be_read(tmp_path: Path) -> None:
    for number in range(200):
        write_shard(tmp_path / f"{number}.bin", [number] * 5)
    held = [Shard(tmp_path / f"{number}.bin") for number in range(200)]
    for number in [*range(200), *reversed(range(200)), 0, 199, 0]:
        assert held[number].take(1, 4).tolist() == [number] * 3
        assert 0 < open_files(tmp_path) <= 64
    del held
    assert open_files(tmp_path) == 0


@pytest.mark.slow
def test_threads_share_the_open_files(tmp_path: Path) -> None:
    """Four threads over 100 shards: a file that one of them closes is not another's."""
    for number in range(100):
        write_shard(tmp_path / f"{number}.bin", [number] * 1000)
    held = [Shard(tmp_path / f"{number}.bin") for number in range(100)]

    def read(seed: int) -> bool:
        order = random.Random(seed).choices(range(100), k=2000)
        return all((held[number].take(10, 900) == number).all() for number in order)

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(read, range(4)))


def test_shard_replaced_by_one_of_its_size_and_time(tmp_path: Path) -> None:
    shards = []
    for number in range(70):
        write_shard(tmp_path / f"{number}.bin", [number, 1])
        shards.append(Shard(tmp_path / f"{number}.bin"))
    facts = (tmp_path / "0.bin").stat()
    write_shard(tmp_path / "new", [5, 6])
    os.utime(tmp_path / "new", ns=(facts.st_atime_ns, facts.st_mtime_ns))
    (tmp_path / "new").replace(tmp_path / "0.bin")
    with pytest.raises(ShardError, match="was replaced or changed"):
        shards[0].take(0, 2)


def test_shard_replaced_while_its_file_was_closed(tmp_path: Path) -> None:
    write_shard(tmp_path / "a.bin", [1, 2, 3])
    shard = Shard(tmp_path / "a.bin")
    others = []
    for number in range(64):
        write_shard(tmp_path / f"{number}.bin", [1])
        others.append(Shard(tmp_path / f"{number}.bin"))
    write_shard(tmp_path / "a.bin", [4, 5, 6])
    os.utime(tmp_path / "a.bin", (1, 1))
    with pytest.raises(ShardError) as error:
        shard.take(0, 3)
    one_line(error, "a.bin", "do not change it during a run")


# --- Files bound to their hashes ---


def changed(path: Path, at: int = -2) -> None:
    """Another token in a shard, at the same size and, as the file tells, at the same time."""
    facts = path.stat()
    raw = bytearray(path.read_bytes())
    raw[at] ^= 1
    path.write_bytes(raw)
    os.utime(path, ns=(facts.st_atime_ns, facts.st_mtime_ns))


def test_small_shard_is_bound_before_its_first_token(small: Corpus) -> None:
    changed(small.train[1])
    assert len(small.open(small.train[0]))
    with pytest.raises(ShardError) as error:
        small.open(small.train[1])
    one_line(error, small.train[1], "not what the manifest says", "again")
    row = TokenRow(small, small.train)
    assert len(row.take(0, 5000)) == 5000
    with pytest.raises(ShardError, match="not what the manifest says"):
        row.take(4999, 5001)


@pytest.fixture
def background(monkeypatch: pytest.MonkeyPatch) -> Path:
    """Every file is large; where notes about right ones are kept."""
    monkeypatch.setattr(bound, "AT_ONCE", 0)
    monkeypatch.setattr(bound, "_SETTLED_NS", -(10**18))
    folder = bound.cache_folder() / "checked"
    shutil.rmtree(folder, ignore_errors=True)
    return folder


def test_large_shard_is_bound_while_it_is_read(
    small: Corpus, background: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hold, real = threading.Event(), bound.Check.compare
    monkeypatch.setattr(bound.Check, "compare", lambda check: hold.wait() and real(check))
    changed(small.train[0])
    shard = small.open(small.train[0])
    assert len(shard.take(0, 10)) == 10  # nobody knows yet
    hold.set()
    with pytest.raises(ShardError) as error:
        shard.confirm()
    one_line(error, small.train[0], "not what the manifest says")
    with pytest.raises(ShardError, match="not what the manifest says"):
        shard.take(0, 10)
    assert not background.exists()


def test_file_that_was_right_is_hashed_once(small: Corpus, background: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hashed, real = [], bound.Check.compare
    monkeypatch.setattr(bound.Check, "compare", lambda check: (hashed.append(check), real(check)))
    for _ in range(3):
        small.open(small.train[0]).confirm()
    assert len(hashed) == 1 and len(list(background.iterdir())) == 1
    changed(small.train[0])  # the time of its last change of any kind tells
    with pytest.raises(ShardError, match="not what the manifest says"):
        small.open(small.train[0]).confirm()
    assert len(hashed) == 2


def test_file_of_this_moment_is_not_noted(small: Corpus, background: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bound, "_SETTLED_NS", 10**18)
    small.open(small.train[0]).confirm()
    assert not background.exists()


def test_no_home_folder(monkeypatch: pytest.MonkeyPatch, small: Corpus, background: Path) -> None:
    for name in "SPEEDRUN_MUP_CACHE", "XDG_CACHE_HOME", "HOME":
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os, "getuid", lambda: 54321)
    with pytest.raises(ConfigError, match="no home folder; set SPEEDRUN_MUP_CACHE"):
        bound.cache_folder()
    small.open(small.train[0]).confirm()


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


def test_upstream_shard_replaced_by_another_of_its_size(tmp_path: Path) -> None:
    """Long enough that only blocks of it are looked at."""
    directory = write_fineweb(tmp_path / "a")
    path = directory / "fineweb_train_000001.bin"
    tokens = np.random.default_rng(0).integers(0, 50256, 100_000)
    seen = set()
    for shift in range(3):
        write_shard(path, np.roll(tokens, shift))
        corpus = open_corpus(directory)
        assert corpus.is_known_as(corpus.fingerprint) and not corpus.is_known_as("")
        seen.add(corpus.fingerprint)
    assert len(seen) == 3 and corpus == open_corpus(directory)
    sizes = [("fineweb_train_000001.bin", 100_000), ("fineweb_train_000002.bin", 101), ("fineweb_val_000000.bin", 101)]
    former = hashlib.sha256(json.dumps(["gpt2", GPT2_VOCAB, GPT2_BOS, sizes]).encode()).hexdigest()
    assert corpus.is_known_as(former)
    mixture = mix([corpus, corpus], [1, 3])
    assert mixture.is_known_as(mixture.fingerprint) and mixture.former_fingerprint != mixture.fingerprint


def test_fingerprint_in_a_manifest_is_not_believed(small: Corpus) -> None:
    path = small.directory / "corpus.json"
    path.write_text(path.read_text().replace(small.fingerprint, "0" * 64))
    found = open_corpus(small.directory)
    assert found.fingerprint == small.fingerprint and found.told_fingerprint == "0" * 64
    manifest = json.loads(path.read_text())
    manifest["train"]["train_000000.bin"]["sha256"] = "1" * 64
    path.write_text(json.dumps(manifest))
    assert open_corpus(small.directory).fingerprint != small.fingerprint


def test_special_files_in_a_received_folder(small: Corpus) -> None:
    for path in small.train[0], small.directory / "corpus.json":
        kept = path.read_bytes()
        path.unlink()
        os.mkfifo(path)
        with pytest.raises(ShardError) as error:
            open_corpus(small.directory)
        one_line(error, path, "a FIFO, not a regular file")
        path.unlink()
        path.write_bytes(kept)


def test_folder_without_shards(tmp_path: Path) -> None:
    with pytest.raises(ShardError) as error:
        open_corpus(tmp_path / "missing")
    one_line(error, "no such folder")
    with pytest.raises(ShardError) as error:
        open_corpus(tmp_path)
    one_line(error, "_train_", "data fineweb")
    with pytest.raises(ShardError) as error:
        open_corpus(write_fineweb(tmp_path / "a", val="fineweb_other_000000.bin"))
    one_line(error, "_val_", "data fineweb")


@pytest.mark.parametrize(
    "change, word",
    [
        ({"version": 1}, "version 1"),
        ({"vocab_size": "51"}, "expected int"),
        ({"vocab_size": 70000}, "65536"),
        ({"bos_token": 51}, "bos_token 51"),
        ({"bos_token": True}, "expected int"),
        ({"fingerprint": None}, "expected str"),
        ({"tally": {"empty": "many"}}, "expected counts of documents"),
        ({"train": ["train_000000.bin"]}, "expected dict"),
        ({"val": {}}, "no val shard"),
        ({"train": {"../train_000000.bin": 5000}}, "plain file name"),
        ({"train": {"/absolute.bin": 5000}}, "plain file name"),
        ({"train": {"\x1b]0;x\x07/..": 5000}}, "plain file name"),
        ({"train": {"\x1b[2J.bin": FACTS}}, "No such file"),
        ({"train": {"train_000000.bin": FACTS | {"sha256": 5}}}, "expected tokens, documents and sha256"),
        ({"train": {"train_000000.bin": FACTS | {"sha256": "x"}}}, "expected tokens, documents and sha256"),
        ({"train": {"train_000000.bin": FACTS | {"tokens": 5000.0}}}, "expected tokens, documents and sha256"),
        ({"train": {"train_000000.bin": FACTS | {"more": 1}}}, "expected tokens, documents and sha256"),
        ({"train": {"val_000000.bin": FACTS | {"tokens": 100}}}, "for training and for validation"),
        ({"vocab_size": 10**4000}, "1000"),
        ({"tally": nested(600)}, "expected counts of documents"),
        ({"tokenizer": ["\x1b[2J"] * 9}, "expected str"),
        ({"train": {"train_000000.bin": FACTS | {"tokens": 4999}}}, "5,000 tokens, not 4999"),
        ({"train": {"missing.bin": FACTS}}, "No such file"),
        ({"train": {"..": FACTS}}, "plain file name"),
        ({"train": {"train_000000.bin": 5000}}, "expected tokens, documents and sha256"),
        ({"train": {"train_000000.bin": {"tokens": 5000}}}, "expected tokens, documents and sha256"),
    ],
)
def test_bad_manifest(small: Corpus, change: dict[str, object], word: str) -> None:
    path = small.directory / "corpus.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ShardError) as error:
        open_corpus(small.directory)
    one_line(error, small.directory, word)
    assert "\x1b" not in str(error.value)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '"x"', "\xff", "[" * 100_000, '{"version": 1}'])
def test_manifest_that_is_none(small: Corpus, text: str) -> None:
    (small.directory / "corpus.json").write_text(text, encoding="latin-1")
    with pytest.raises(ShardError) as error:
        open_corpus(small.directory)
    one_line(error, "corpus.json", "again")


def test_checks_survive_python_minus_o() -> None:
    assert not [node for node in ast.walk(ast.parse(inspect.getsource(shards))) if isinstance(node, ast.Assert)]
