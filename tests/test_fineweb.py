"""Downloading FineWeb's shards: from a hub on the loopback, with every fault that we know of."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from helpers.loopback_hub import COMMIT, LoopbackHub
from helpers.small_corpus import naive_read

from speedrun_mup.cli import main
from speedrun_mup.core.errors import ConfigError
from speedrun_mup.data import fineweb as module
from speedrun_mup.data.fineweb import FetchError, download_fineweb, parse_tokens
from speedrun_mup.data.manifest import open_corpus
from speedrun_mup.data.shards import Corpus, shard_header

hub_library = pytest.importorskip("huggingface_hub")
hub_constants = pytest.importorskip("huggingface_hub.constants")

SHARD_TOKENS = 50_000
TRAIN = [f"fineweb_train_{number:06d}.bin" for number in range(1, 6)]
VAL = "fineweb_val_000000.bin"
FILES = {
    name: shard_header(SHARD_TOKENS)
    + np.where(np.arange(SHARD_TOKENS) % 500, np.random.default_rng(number).integers(0, 50256, SHARD_TOKENS), 50256)
    .astype("<u2")
    .tobytes()
    for number, name in enumerate([*TRAIN, VAL])
}


@pytest.fixture(autouse=True)
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[LoopbackHub]:
    monkeypatch.setattr(module, "FIRST_WAIT_S", 0.01)
    monkeypatch.setattr(module, "STALL_S", 0.3)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with LoopbackHub("kjj0/fineweb10B-gpt2", FILES) as server:
        template = hub_constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(hub_constants.ENDPOINT, server.url)
        monkeypatch.setattr(hub_constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(hub_constants, "ENDPOINT", server.url)
        hub_library.close_session()
        yield server
    hub_library.close_session()


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def check_whole(corpus: Corpus, train: int) -> None:
    """Every byte is the hub's, and nothing else is there."""
    assert [path.name for path in corpus.train] == TRAIN[:train] and [path.name for path in corpus.val] == [VAL]
    assert names(corpus.directory) == sorted(["corpus.json", *TRAIN[:train], VAL])
    for path in (*corpus.train, *corpus.val):
        assert path.read_bytes() == FILES[path.name] and len(naive_read(path)) == SHARD_TOKENS


@pytest.mark.slow
def test_as_many_as_asked_for(tmp_path: Path, hub: LoopbackHub, capsys: pytest.CaptureFixture[str]) -> None:
    corpus = download_fineweb(SHARD_TOKENS + 1, tmp_path)
    check_whole(corpus, 2)
    assert (corpus.tokenizer, corpus.vocab_size, corpus.bos_token) == ("gpt2", 50257, 50256)
    assert corpus.recipe == f"kjj0/fineweb10B-gpt2@{COMMIT}"
    assert corpus.facts[VAL].documents == 100
    assert "3 shards" in capsys.readouterr().out
    before = len(hub.requests)
    assert download_fineweb(SHARD_TOKENS + 1, tmp_path) == corpus
    assert all(path.startswith("/api/") for _, path, _ in hub.requests[before:])
    check_whole(download_fineweb(3 * SHARD_TOKENS, tmp_path), 3)
    assert [len(hub.fetches(name)) for name in (*TRAIN[:4], VAL)] == [1, 1, 1, 0, 1]


FAULTS: dict[str, list[int | str]] = {
    "cut": ["cut"],
    "cut twice": ["cut", "cut"],
    "429": [429],
    "500": [500],
    "503 and cut": [503, "cut", 500],
    "short": ["short"],
    "long": ["long"],
    "flip": ["flip"],
    "endless": ["endless"],
    "trickle": ["trickle"],
    "flip after a cut": ["cut", "flip"],
    "cut, then no range": ["cut", "no range"],
}


@pytest.mark.parametrize("kind", FAULTS)
def test_recovers(tmp_path: Path, hub: LoopbackHub, kind: str, capfd: pytest.CaptureFixture[str]) -> None:
    hub.faults[TRAIN[0]] = list(FAULTS[kind])
    check_whole(download_fineweb(SHARD_TOKENS, tmp_path), 1)
    assert not hub.faults[TRAIN[0]] and capfd.readouterr().err == ""


def test_listing_recovers(tmp_path: Path, hub: LoopbackHub) -> None:
    hub.faults["tree"] = [500, 429]
    check_whole(download_fineweb(SHARD_TOKENS, tmp_path), 1)


STOPS: dict[str, tuple[list[int | str], str]] = {
    "404": ([404], r"fineweb_train_000001\.bin: the hub does not have it \(HTTP 404\)"),
    "403": ([403], r"fineweb_train_000001\.bin: the hub does not let us have it \(HTTP 403\); check HF_TOKEN"),
    "500 for ever": ([500] * 5, r"fineweb_train_000001\.bin: cannot be fetched from http://127.*\(HTTP 500\)"),
    "flip for ever": (["flip"] * 5, r"its SHA-256 is not the hub's.*tried 4 times"),
    "short for ever": (["short"] * 20, r"fineweb_train_000001\.bin: cannot be fetched"),
    "long for ever": (["long"] * 20, r"fineweb_train_000001\.bin: cannot be fetched"),
    "endless for ever": (["endless"] * 20, r"000001\.bin: cannot be fetched .*more than the 101,024 bytes that there"),
    "trickle for ever": (["trickle"] * 20, r"000001\.bin: cannot be fetched .*stalled: \d+ bytes in"),
    "around for ever": (["around"] * 200, r"000001\.bin: cannot be fetched .*redirects"),
    "file for ever": (["file"] * 20, r"000001\.bin: cannot be fetched .*protocol"),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", STOPS)
def test_stops_with_one_line(tmp_path: Path, hub: LoopbackHub, kind: str, capfd: pytest.CaptureFixture[str]) -> None:
    faults, words = STOPS[kind]
    hub.faults[TRAIN[0]] = list(faults)
    with pytest.raises(FetchError, match=words) as error:
        download_fineweb(2 * SHARD_TOKENS, tmp_path)
    assert "\n" not in str(error.value) and error.value.exit_code == 3 and capfd.readouterr().err == ""
    assert hub.sent < 2**25  # with what lies in the buffers of four sockets
    assert TRAIN[0] not in names(tmp_path) and "corpus.json" not in names(tmp_path)
    for path in tmp_path.glob("*.bin"):
        assert path.read_bytes() == FILES[path.name]
    hub.faults.clear()
    check_whole(download_fineweb(2 * SHARD_TOKENS, tmp_path), 2)


def listed(name: object = TRAIN[0], size: object = len(FILES[VAL]), oid: object = "0" * 64) -> dict[str, object]:
    return {"type": "file", "path": name, "size": size, "lfs": {"oid": oid, "size": size}}


DAMAGED: dict[str, tuple[object, str]] = {
    "no size": ([listed(size=None)], r"fineweb_train_000001\.bin has size None"),
    "text as size": ([listed(size="12")], "has size '12'"),
    "negative size": ([listed(size=-(10**12))], "has size -10"),
    "huge size": ([listed(size=10**30)], "has size 1000"),
    "path as hash": ([listed(oid="../../etc")], r"has SHA-256 '\.\./\.\./etc'"),
    "twice": ([listed(), listed()], "000001.bin is in it twice"),
    "no list": ({"error": "x"}, "it is not a list"),
    "other things": ([1, None, {}, {"path": 3}], r"has no \*_val_\*\.bin"),
}


@pytest.mark.parametrize("kind", DAMAGED)
def test_damaged_listing(tmp_path: Path, hub: LoopbackHub, kind: str) -> None:
    listing, words = DAMAGED[kind]
    hub.listing = json.dumps(listing).encode()
    with pytest.raises(FetchError, match=words) as error:
        download_fineweb(1, tmp_path / "out")
    assert "\n" not in str(error.value) and not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize(
    "body", [b"[" * 200_000, b"{", b"\xff", b" " * 2**26 + b"[]"], ids=["deep", "cut", "byte", "long"]
)
def test_listing_that_is_no_json(tmp_path: Path, hub: LoopbackHub, body: bytes) -> None:
    hub.listing = body
    with pytest.raises(FetchError, match=r"not JSON|more than the 67,108,864 bytes") as error:
        download_fineweb(1, tmp_path / "out")
    assert "\n" not in str(error.value) and not list(tmp_path.iterdir())


@pytest.mark.parametrize("commit", [None, 5, "", "\x1b]0;x\x07" + COMMIT, "../" * 13 + "x"])
def test_commit_that_is_none(tmp_path: Path, hub: LoopbackHub, commit: object) -> None:
    hub.commit = commit
    with pytest.raises(FetchError, match="its commit is") as error:
        download_fineweb(1, tmp_path / "out")
    assert str(error.value).isprintable() and not list(tmp_path.iterdir())


@pytest.mark.slow
def test_pages(tmp_path: Path, hub: LoopbackHub) -> None:
    """A page that comes again and again, and one on another server, which would get the token."""
    hub.next_page = f"{hub.url}/api/datasets/{hub.repository}/tree/{COMMIT}?cursor=x"
    with pytest.raises(FetchError, match="is in it twice"):
        download_fineweb(1, tmp_path / "out")
    hub.listing = b"[]"
    with pytest.raises(FetchError, match="more than 1,000 pages"):
        download_fineweb(1, tmp_path / "out")
    hub.next_page = "http://127.0.0.2:1/x"
    with pytest.raises(FetchError, match="its next page is on another server"):
        download_fineweb(1, tmp_path / "out")


def test_names_that_lead_out_are_no_shards(tmp_path: Path, hub: LoopbackHub) -> None:
    names_ = (
        "../evil_train_000000.bin",
        "/etc/evil_train_000000.bin",
        "a/../evil_train_000000.bin",
        "..\\evil_train_000000.bin",
    )
    evil = [listed(name) for name in (*names_, "\x1b]0;x\x07\na_train_000000.bin", "..evil_train_000000.bin")]
    hub.listing = json.dumps(hub.tree() + evil).encode()
    check_whole(download_fineweb(1, tmp_path / "out"), 1)
    assert names(tmp_path) == ["out"]


def test_link_in_place_of_a_partial_download(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("precious")
    (tmp_path / "out" / ".download").mkdir(parents=True)
    (tmp_path / "out" / ".download" / TRAIN[0]).symlink_to(tmp_path / "mine")
    os.mkfifo(tmp_path / "out" / ".download" / VAL)
    check_whole(download_fineweb(1, tmp_path / "out"), 1)
    assert (tmp_path / "mine").read_text() == "precious"


def test_shard_with_ids_of_another_vocabulary(tmp_path: Path, hub: LoopbackHub) -> None:
    hub.files[TRAIN[0]] = shard_header(3) + np.array([50256, 50257, 1], "<u2").tobytes()
    with pytest.raises(FetchError, match="id 50257 at offset 1"):
        download_fineweb(1, tmp_path)


@pytest.mark.slow
def test_partial_download_is_gone_on_with(tmp_path: Path, hub: LoopbackHub) -> None:
    """What a killed process left, cut at any byte; too much of it, or other bytes of the same length, do no harm."""
    (tmp_path / ".download").mkdir()
    content = FILES[TRAIN[0]]
    for left in content[:1], content[:512], content[:70_001], content, content + b"more", bytes(50_000):
        (tmp_path / ".download" / TRAIN[0]).write_bytes(left)
        check_whole(download_fineweb(SHARD_TOKENS, tmp_path), 1)
        (tmp_path / TRAIN[0]).unlink()
        (tmp_path / ".download").mkdir()
    assert hub.fetches(TRAIN[0]) == ["bytes=1-", "bytes=512-", "bytes=70001-", None, "bytes=50000-", None]


def test_damaged_shard_is_fetched_again(tmp_path: Path, hub: LoopbackHub, capsys: pytest.CaptureFixture[str]) -> None:
    """Found by its size, or, where no manifest vouches for it, by its bytes."""
    download_fineweb(SHARD_TOKENS, tmp_path)
    (tmp_path / TRAIN[0]).write_bytes(FILES[TRAIN[0]][:-2])
    check_whole(download_fineweb(SHARD_TOKENS, tmp_path), 1)
    (tmp_path / "corpus.json").unlink()
    (tmp_path / TRAIN[0]).write_bytes(FILES[TRAIN[0]][:-2] + b"\0\0")
    check_whole(download_fineweb(SHARD_TOKENS, tmp_path), 1)
    assert "fetching again" in capsys.readouterr().out and len(hub.fetches(VAL)) == 1


def test_revision_and_dataset(tmp_path: Path, hub: LoopbackHub) -> None:
    check_whole(download_fineweb(1, tmp_path / "pinned", revision=COMMIT), 1)
    with pytest.raises(FetchError, match="the hub does not have it"):
        download_fineweb(1, tmp_path / "a", revision="no-such-branch")
    with pytest.raises(FetchError, match=r"kjj0/finewebedu10B-gpt2: the hub does not"):
        download_fineweb(1, tmp_path / "b", dataset="edu")
    with pytest.raises(FetchError, match=r"only 250,000 train tokens; ask for fewer, or for --dataset 100B"):
        download_fineweb(250_001, tmp_path / "c")
    del hub.files[VAL]
    with pytest.raises(FetchError, match="no .*_val_"):
        download_fineweb(1, tmp_path / "d")


def test_token_is_sent(tmp_path: Path, hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_of_the_test")
    download_fineweb(1, tmp_path)
    assert hub.tokens == {"Bearer hf_of_the_test"}


def test_no_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        module.shutil, "disk_usage", lambda path: os.terminal_size((0, 0)) and type("", (), {"free": 9})
    )
    with pytest.raises(FetchError, match="GB are free; make room"):
        download_fineweb(1, tmp_path)


def test_folder_that_cannot_be_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    assert main(["data", "fineweb", "--tokens", "1", "--out", str(tmp_path / "file" / "out")]) == 2
    complained = capsys.readouterr().err
    assert "file/out: cannot write: Not a directory" in complained and complained.count("\n") == 1


@pytest.mark.parametrize("workers", ["0", "-1"])
def test_no_workers(tmp_path: Path, hub: LoopbackHub, workers: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "fineweb", "--tokens", "1", "--out", str(tmp_path / "out"), "--workers", workers]) == 2
    assert capsys.readouterr().err == f"error: workers={workers} must be at least 1\n"
    assert not hub.requests and not (tmp_path / "out").exists()


def run(folder: Path, endpoint: str, **environment: str) -> subprocess.Popen[str]:
    script = Path(module.__file__).parents[2] / "scripts" / "data" / "fineweb.py"
    known = {"HF_ENDPOINT": endpoint, "HF_HOME": str(folder / "home"), "HF_HUB_DISABLE_TELEMETRY": "1"}
    command = [sys.executable, str(script), "--tokens", "100k", "--out", str(folder / "out")]
    return subprocess.Popen(
        command,
        env=os.environ | known | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=folder,
    )


@pytest.mark.slow
def test_killed_and_started_again(tmp_path: Path, hub: LoopbackHub) -> None:
    """SIGKILL while bytes arrive; the endpoint comes from the environment."""
    hub.files = {name: FILES[name] for name in FILES}
    hub.slow_s = 0.3
    process = run(tmp_path, hub.url)
    while not any(hub.fetches(name) for name in FILES):
        assert process.poll() is None
        time.sleep(0.02)
    time.sleep(0.3)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert "corpus.json" not in names(tmp_path / "out")
    hub.slow_s = 0
    process = run(tmp_path, hub.url)
    said, complained = process.communicate(timeout=120)
    assert (process.returncode, complained) == (0, "") and "train  100,000 tokens, 200 documents, 2 shard(s)" in said
    check_whole(open_corpus(tmp_path / "out"), 2)


@pytest.mark.slow
def test_offline_is_one_line(tmp_path: Path) -> None:
    process = run(tmp_path, "http://127.0.0.1:9", HF_HUB_OFFLINE="1")
    said, complained = process.communicate(timeout=120)
    assert process.returncode == 3 and complained.count("\n") == 1 and "asking http://127.0.0.1:9" in said
    assert "--data embedded" in complained and "scripts/data/text.py" in complained


def test_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["data", "fineweb", "--tokens", "0.1M"]) == 0
    assert "--data data/fineweb10B" in capsys.readouterr().out
    check_whole(open_corpus(tmp_path / "data" / "fineweb10B"), 2)
    for text in "", "many", "-5", "0", "1T", "1e9":
        with pytest.raises(ConfigError, match="--tokens"):
            parse_tokens(text)
    assert [parse_tokens(text) for text in ("900M", "1.5b", "20k", "7")] == [900_000_000, 1_500_000_000, 20_000, 7]
