"""Corpora that need no download: what they hold, where they are kept, and how one is found by name."""

import dataclasses
import hashlib
import os
import shutil
import sys
import sysconfig
import threading
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from speedrun_mup.core.errors import ConfigError
from speedrun_mup.data import corpus as module
from speedrun_mup.data.batches import TrainBatches
from speedrun_mup.data.corpus import FINEWEB_COMMAND, cache_folder, embedded_corpus, find_corpus, write_synthetic
from speedrun_mup.data.documents import split_passages
from speedrun_mup.data.manifest import GPT2_BOS, open_corpus
from speedrun_mup.data.shards import Corpus, Mixture, ShardError, read_shard, write_shard
from speedrun_mup.data.tokenizers import BpeTokenizer, load_tokenizer
from speedrun_mup.data.validation import ValBatches

TEXT = "def área(x):\n    return 'naïve 漢字 🎲', x\n\x00\r\n"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder of the test's own."""
    monkeypatch.setenv("SPEEDRUN_MUP_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small stand-in for the standard library, large enough to be taken for one."""
    root = tmp_path / "library"
    rng = np.random.default_rng(0)
    words = ["for", "x", "in", "range", "(", ")", ":", "return", "spam", "eggs", "=", "+", "naïve"]
    for i in range(60):
        path = root / f"package{i % 7}" / f"module{i}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = [" ".join(rng.choice(words, 8)) for _ in range(80 + i)]
        path.write_text("".join(f"{line}\n" + "\n" * (j % 5 == 0) for j, line in enumerate(lines)))
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(root))
    monkeypatch.setattr(module, "_SMALLEST_LIBRARY_CHARS", 100_000)
    monkeypatch.setattr(module, "_VAL_CHARS", 20_000)
    return root


def passages(text: str) -> list[str]:
    return list(split_passages(text.splitlines(True), 512))


def documents(corpus: Corpus, part: str) -> list[str]:
    """The passages of one part, as text."""
    (path,) = getattr(corpus, part)
    text = load_tokenizer(corpus).decode(read_shard(path).tolist())
    assert text.startswith("<|bos|>")
    return text.split("<|bos|>")[1:]


# --- The embedded corpus ---


@pytest.mark.slow
def test_embedded_corpus_of_this_python() -> None:
    corpus = embedded_corpus()
    train, val = read_shard(corpus.train[0]), read_shard(corpus.val[0])
    assert len(train) > 5_000_000 and len(val) > 2**19
    assert load_tokenizer(corpus).decode(train[:10_000].tolist()).count("<|bos|>") > 5
    assert corpus.tokenizer == "byte" and corpus.vocab_size == 257 and corpus.bos_token == 256
    assert f"Python {sys.version.split()[0]}" in corpus.source
    usage = TrainBatches(corpus, 2048, 8, seed=0).usage()
    assert usage.used > 0.75 * (usage.used + usage.skipped)
    assert len(ValBatches(corpus, 2**19, 2**16)) == 8


@pytest.mark.slow
def test_parts_are_whole_files_and_all_of_them(library: Path) -> None:
    corpus = embedded_corpus()
    parts = {part: set(documents(corpus, part)) for part in ("train", "val")}
    texts = [path.read_text() for path in library.rglob("*.py")]
    where = {text: {part for part, held in parts.items() if set(passages(text)) <= held} for text in texts}
    assert all(len(found) == 1 for found in where.values())
    val = [text for text, found in where.items() if found == {"val"}]
    assert len(val) >= 0.05 * len(texts) and 20_000 <= sum(map(len, val)) < 30_000
    hashes = {text: hashlib.sha256(text.encode()).digest() for text in texts}
    assert max(hashes[text] for text in val) < min(hashes[text] for text in texts if text not in val)
    assert {passage for text in texts for passage in passages(text)} == parts["train"] | parts["val"]


@pytest.mark.slow
def test_passage_of_both_parts_is_for_validation_only(library: Path) -> None:
    """Every file begins with the same licence, long enough to be a passage of its own."""
    licence = "".join(f"# line {i} of a licence that everybody copies\n" for i in range(20)) + "\n"
    for path in library.rglob("*.py"):
        path.write_text(licence + path.read_text())
    corpus = embedded_corpus()
    train, val = (set(documents(corpus, part)) for part in ("train", "val"))
    (shared,) = (passage for passage in train | val if "everybody copies" in passage)
    assert shared in val and not train & val


@pytest.mark.slow
def test_passages_are_shuffled(library: Path) -> None:
    held = documents(embedded_corpus(), "train")
    origin = {p: path.parent.name for path in library.rglob("*.py") for p in passages(path.read_text())}
    switches = sum(origin[a] != origin[b] for a, b in pairwise(held))
    assert switches > 0.7 * len(held)  # in file order: 60 switches
    assert held == sorted(held, key=lambda text: hashlib.sha256(text.encode()).digest())


@pytest.mark.slow
def test_tests_and_generated_files_are_left_out(library: Path) -> None:
    before = embedded_corpus().fingerprint
    for name in (
        "test/a.py",
        "json/tests/a.py",
        "idlelib/idle_test/a.py",
        "site-packages/x/a.py",
        "__pycache__/a.py",
        "config-3.11/a.py",
        "_sysconfigdata__linux.py",
        "sitecustomize.py",
        "readme.txt",
    ):
        (library / name).parent.mkdir(parents=True, exist_ok=True)
        (library / name).write_text("secret = 1\n")
    (library / "latin.py").write_bytes(b"# caf\xe9\n")
    (library / "empty.py").write_text("")
    (library / "copy.py").write_bytes((library / "package0" / "module0.py").read_bytes())
    assert embedded_corpus().fingerprint == before
    (library / "testimony.py").write_text("secret = 1\n")
    assert embedded_corpus().fingerprint != before


@pytest.mark.slow
def test_fingerprint_does_not_depend_on_the_place(
    library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = embedded_corpus()
    shutil.copytree(library, tmp_path / "elsewhere")
    shutil.rmtree(cache_folder())
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path / "elsewhere"))
    assert embedded_corpus() == before


@pytest.mark.slow
def test_python_without_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, library: Path) -> None:
    (tmp_path / "nothing").mkdir()
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path / "nothing"))
    monkeypatch.setattr(module.torch, "__file__", str(library / "__init__.py"))
    corpus, line = find_corpus("embedded")
    assert "PyTorch" in corpus.source and "NOTICE" in line
    monkeypatch.setattr(module.torch, "__file__", str(tmp_path / "nothing" / "__init__.py"))
    with pytest.raises(ShardError, match=r"use a folder of \.bin shards"):
        embedded_corpus()


# --- Tokenizers ---


@pytest.mark.slow
def test_bpe(library: Path) -> None:
    pytest.importorskip("tiktoken")
    pytest.importorskip("rustbpe")
    corpus = embedded_corpus("bpe:300")
    assert (corpus.tokenizer, corpus.vocab_size, corpus.bos_token) == ("bpe:300", 300, 299)
    tokenizer = load_tokenizer(corpus)
    assert isinstance(tokenizer, BpeTokenizer) and (tokenizer.vocab_size, tokenizer.bos_token) == (300, 299)
    ids = tokenizer.encode(TEXT + "<|bos|>")
    assert max(ids) < 299 and tokenizer.decode(ids) == TEXT + "<|bos|>"
    assert len(read_shard(corpus.train[0])) < 0.5 * len(read_shard(embedded_corpus("byte").train[0]))
    assert set(documents(corpus, "val")) == set(documents(embedded_corpus(), "val"))
    shutil.rmtree(cache_folder())
    assert embedded_corpus("bpe:300").fingerprint == corpus.fingerprint
    with pytest.raises(ConfigError, match=r"too large for this text; try bpe:\d+$"):
        embedded_corpus("bpe:60000")
    (corpus.directory / "tokenizer.json").write_text("[]")
    with pytest.raises(ShardError, match=r"tokenizer\.json"):
        load_tokenizer(corpus)


@pytest.mark.slow
def test_bpe_without_its_packages(library: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "rustbpe", None)
    with pytest.raises(ConfigError, match=r"rustbpe.*pip install 'speedrun-mup\[data\]'$"):
        embedded_corpus("bpe:300")
    assert list(cache.iterdir()) == []


@pytest.mark.parametrize("name", ["", "bytes", "bpe", "bpe:", "bpe:256", "bpe:65537", "bpe:1e3", "bpe:-5", "gpt2"])
def test_unknown_tokenizer(name: str) -> None:
    with pytest.raises(ConfigError, match="choose byte, or bpe:V"):
        embedded_corpus(name)


# --- The synthetic corpus ---


def test_synthetic_corpus_is_the_same_everywhere() -> None:
    corpus, line = find_corpus("synthetic")
    assert corpus.fingerprint == "3d848ccecf24555a8452a98e5709c0bf5ae549673a61c5ad93259cf90db15c03"
    assert (corpus.tokenizer, corpus.vocab_size, corpus.bos_token) == ("synthetic", 65, 64) and "synthetic" in line
    assert (len(read_shard(corpus.train[0])), len(read_shard(corpus.val[0]))) == (400_000, 50_000)


def test_synthetic_corpus_has_something_to_learn(tmp_path: Path) -> None:
    """The last token tells much about the next one, and the topic tells more."""
    corpus = write_synthetic(tmp_path / "a", 200_000, 1000)
    tokens = read_shard(corpus.train[0]).astype(np.int64)
    starts = np.flatnonzero(tokens == 64)
    lengths = np.diff(starts)
    assert lengths.min() >= 16 and lengths.max() <= 1039 and 240 < lengths.mean() < 300

    def entropy(counts: np.ndarray) -> float:
        """Nats per token, given the row."""
        chance = counts / np.maximum(counts.sum(-1, keepdims=True), 1)
        return float(-(counts * np.log(np.where(chance > 0, chance, 1))).sum() / counts.sum())

    def pairs(tokens: np.ndarray) -> np.ndarray:
        return np.bincount(tokens[:-1] * 65 + tokens[1:], minlength=65 * 65).reshape(65, 65)

    alone = entropy(np.bincount(tokens, minlength=65)[None])
    bigram = entropy(pairs(tokens))
    longest = starts[np.argmax(lengths)]
    same_topic = entropy(sum(pairs(tokens[a:b]) for a, b in _documents_like(tokens, starts, longest)))
    assert alone > 4.0 and bigram < alone - 0.8 and same_topic < bigram - 0.5


def _documents_like(tokens: np.ndarray, starts: np.ndarray, one: int) -> list[tuple[int, int]]:
    """Documents that share the topic of the one at `one`: they take its favourite steps."""
    spans = [(int(a), int(b)) for a, b in pairwise(starts)]
    example = next(tokens[a + 1 : b] for a, b in spans if a == one)
    favourite = np.zeros((65, 65), bool)
    favourite[example[:-1], example[1:]] = True
    return [(a, b) for a, b in spans if favourite[tokens[a + 1 : b - 1], tokens[a + 2 : b]].mean() > 0.5]


def test_synthetic_sizes_and_seeds(tmp_path: Path) -> None:
    first = write_synthetic(tmp_path / "a", 3000, 500)
    again = write_synthetic(tmp_path / "b", 3000, 500)
    other = write_synthetic(tmp_path / "c", 3000, 500, seed=1)
    assert dataclasses.replace(first, directory=again.directory, train=again.train, val=again.val) == again
    assert first.fingerprint != other.fingerprint
    longer = write_synthetic(tmp_path / "d", 4000, 500)
    assert np.array_equal(read_shard(longer.train[0])[:3000], read_shard(first.train[0]))


# --- The cache ---


def test_cache_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert cache_folder() == tmp_path / "cache"
    monkeypatch.setenv("SPEEDRUN_MUP_CACHE", "")
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert cache_folder() == Path("/xdg/speedrun-mup")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/someone")
    assert cache_folder() == Path("/home/someone/.cache/speedrun-mup")


@pytest.mark.slow
def test_second_use_writes_nothing(cache: Path, library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = [find_corpus(name)[0] for name in ("embedded", "synthetic")]
    monkeypatch.setattr(module, "write_shard", None)
    assert [find_corpus(name)[0] for name in ("embedded", "synthetic")] == first
    assert len(list(cache.iterdir())) == 2


def test_two_that_build_at_once(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both have started before either has finished; one wins, both get a whole corpus, nothing is left over."""
    together = threading.Barrier(2, timeout=20)
    found: list[Corpus] = []

    def build(directory: Path) -> None:
        together.wait()
        write_synthetic(directory, 5000, 500)
        together.wait()

    threads = [threading.Thread(target=lambda: found.append(module._cached("x", build))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 2 and found[0] == found[1] and len(read_shard(found[0].train[0])) == 5000
    assert [path.name for path in cache.iterdir()] == ["x"]


def test_build_that_fails_leaves_nothing(cache: Path) -> None:
    def build(directory: Path) -> None:
        write_shard(directory / "train_000000.bin", [1])
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        module._cached("x", build)
    assert list(cache.iterdir()) == []


def test_nothing_looks_finished_before_the_rename(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[bool] = []

    def rename(built: Path, final: Path) -> None:
        seen.append(final.exists())
        raise SystemExit

    monkeypatch.setattr(Path, "rename", rename)
    with pytest.raises(SystemExit):
        find_corpus("synthetic")
    assert seen == [False] and list(cache.iterdir()) == []


def test_unwritable_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SPEEDRUN_MUP_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(ConfigError, match=r"file/cache: cannot write.*set SPEEDRUN_MUP_CACHE") as error:
        find_corpus("synthetic")
    assert "\n" not in str(error.value)


# --- Finding a corpus ---


def write_fineweb(directory: Path) -> Path:
    directory.mkdir(parents=True)
    for name in "fineweb_train_000001.bin", "fineweb_val_000000.bin":
        write_shard(directory / name, [GPT2_BOS, *range(100)])
    return directory


@pytest.mark.slow
def test_auto_without_fineweb(library: Path, tmp_path: Path) -> None:
    corpus, line = find_corpus(fineweb_dir=tmp_path / "fineweb10B")
    assert corpus == embedded_corpus()
    assert corpus.source in line and FINEWEB_COMMAND in line and "\n" not in line


def test_auto_with_fineweb(tmp_path: Path, cache: Path) -> None:
    folder = write_fineweb(tmp_path / "fineweb10B")
    corpus, line = find_corpus(fineweb_dir=folder)
    assert corpus == open_corpus(folder) == find_corpus(str(folder))[0]
    assert "FineWeb" in line and "gpt2" in line and FINEWEB_COMMAND not in line and not cache.exists()


def test_auto_with_half_of_fineweb_does_not_fall_back(tmp_path: Path) -> None:
    folder = write_fineweb(tmp_path / "fineweb10B")
    (folder / "fineweb_val_000000.bin").unlink()
    with pytest.raises(ShardError, match="_val_"):
        find_corpus(fineweb_dir=folder)


@pytest.mark.slow
def test_tokenizer_that_the_shards_do_not_have(tmp_path: Path) -> None:
    folder = write_fineweb(tmp_path / "fineweb10B")
    assert find_corpus(str(folder), tokenizer="gpt2")[0].tokenizer == "gpt2"
    for data in str(folder), "synthetic", "auto":
        with pytest.raises(ConfigError, match="bpe:1024, but"):
            find_corpus(data, tokenizer="bpe:1024", fineweb_dir=folder)


@pytest.mark.slow
def test_mixture(tmp_path: Path) -> None:
    folders = [write_fineweb(tmp_path / name) for name in ("a", "b")]
    corpus, line = find_corpus(f"{folders[0]}:0.7,{folders[1]}:0.3")
    assert isinstance(corpus, Mixture) and corpus.shares == (700, 300) and corpus.vocab_size == 50257
    assert "70.0% FineWeb" in line and find_corpus(corpus.data)[0] == corpus
    for data in f"{folders[0]},{folders[1]}", f"{folders[0]}:1,{folders[1]}:0", f"{folders[0]}:1,", "auto:1,embedded:1":
        with pytest.raises(ConfigError, match="FOLDER:WEIGHT,FOLDER:WEIGHT"):
            find_corpus(data)
    with pytest.raises(ShardError, match="do not have the same vocabulary"):
        find_corpus(f"synthetic:1,{folders[0]}:1")


@pytest.mark.parametrize("data", ["fineweb", "no/such/folder", "", "Embedded"])
def test_unknown_data(data: str) -> None:
    with pytest.raises(ConfigError, match="choose auto, embedded, synthetic or a folder"):
        find_corpus(data)


def test_importing_and_asking_for_the_folder_write_nothing(cache: Path) -> None:
    cache_folder()
    assert not os.path.exists(cache)
