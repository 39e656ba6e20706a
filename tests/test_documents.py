"""Documents from every kind of source, in order, from any position on; faults in one line."""

import gzip
import importlib.util
import io
import json
import os
import random
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from loopback_hub import LoopbackHub

from speedrun_mup import documents
from speedrun_mup.core.errors import UserError
from speedrun_mup.documents import (
    DocumentReader,
    Position,
    Source,
    SourceError,
    find_sources,
    format_of,
    split_passages,
)

PROSE = "".join(f"line {i} of a text with ümläuts\n" + "\n" * (i % 3 == 0) for i in range(200))
TEXTS = [f"document {i} " + "naïve 漢字 " * i for i in range(30)] + ["", "two\nlines", "\ud83d\ude00"]
TEXTS[-1] = "\U0001f600"


def jsonl(texts: list[str]) -> bytes:
    return b"".join(json.dumps({"id": i, "text": text}).encode() + b"\n" for i, text in enumerate(texts))


def read(*paths: object, field: str = "text", passage: int = 64, start: Position = Position()) -> list[str]:  # noqa: B008
    sources = find_sources([str(path) for path in paths]).sources
    return [document.text for document in DocumentReader(sources, field, passage, start)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """One file of every format that needs no extra package, some of it hidden or of no interest."""
    inside = tmp_path / "texts"
    (inside / "b").mkdir(parents=True)
    (inside / "a.txt").write_text(PROSE)
    (inside / "b" / "c.md").write_text(PROSE[:500])
    (inside / "b" / "d.jsonl").write_bytes(jsonl(TEXTS))
    (inside / "e.jsonl.gz").write_bytes(gzip.compress(jsonl(TEXTS[:5])))
    for name in ".hidden.txt", "picture.png", "b/.git/x.txt":
        (inside / name).parent.mkdir(exist_ok=True)
        (inside / name).write_text("secret")
    return inside


def test_folder_in_order(folder: Path) -> None:
    found = read(folder)
    prose, readme = (list(split_passages(text.splitlines(True), 64)) for text in (PROSE, PROSE[:500]))
    assert found == prose + readme + TEXTS + TEXTS[:5]
    assert "".join(prose) == PROSE and read(folder / "e.jsonl.gz", folder / "a.txt") == TEXTS[:5] + prose
    assert read(folder / "a.txt", passage=0) == [PROSE]


def test_reading_goes_on_from_any_position(folder: Path) -> None:
    sources = find_sources([str(folder)]).sources
    whole = list(DocumentReader(sources, "text", 64))
    total = sum(source.size for source in sources)
    for cut in (0, 1, 5, len(whole) // 2, len(whole) - 1, len(whole)):
        start = whole[cut - 1].end if cut else Position()
        reader = DocumentReader(sources, "text", 64, start)
        assert list(reader) == whole[cut:] and reader.bytes_read == total


def test_parquet_and_zstd(tmp_path: Path) -> None:
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(arrow.table({"n": range(len(TEXTS)), "text": TEXTS}), tmp_path / "a.parquet", row_group_size=7)
    for level in 1, 9:
        with (tmp_path / "b.jsonl.zst").open("ab") as file:  # two frames in one file
            file.write(arrow.Codec("zstd", level).compress(jsonl(TEXTS), asbytes=True))
    assert read(tmp_path / "a.parquet") == TEXTS
    assert read(tmp_path / "b.jsonl.zst") == TEXTS * 2
    assert read(tmp_path / "a.parquet", start=Position(0, 29)) == TEXTS[29:]
    with pytest.raises(SourceError, match=r"a\.parquet: no column 'body' \(found: n, text\)"):
        read(tmp_path / "a.parquet", field="body")
    for path in tmp_path.iterdir():
        path.write_bytes(path.read_bytes()[:-40])
        with pytest.raises(SourceError, match="is it whole") as error:
            read(path)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", [PROSE.encode(), jsonl(TEXTS)], ids=["text", "jsonl"])
def test_standard_input(monkeypatch: pytest.MonkeyPatch, content: bytes) -> None:
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BufferedReader(io.BytesIO(content))))  # type: ignore[arg-type]
    found = read("-")
    assert found == TEXTS if content[:1] == b"{" else "".join(found) == PROSE


def test_datasets(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load_dataset(*args: object, **more: object) -> list[dict[str, str]]:
        asked.append((args, more))
        return [{"text": text} for text in TEXTS]

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    assert read("hf://me/mine") == read("hf://me/mine/small") == read("hf://me/mine/small/test") == TEXTS
    assert asked == [
        (("me/mine", config), {"split": split, "streaming": True})
        for config, split in ((None, "train"), ("small", "train"), ("small", "test"))
    ]
    with pytest.raises(UserError, match="expected hf://OWNER/NAME"):
        read("hf://mine")


@pytest.mark.slow
def test_dataset_streamed_from_a_hub(tmp_path: Path) -> None:
    """In a process of its own, because the endpoint is read when huggingface_hub is imported."""
    pytest.importorskip("huggingface_hub")
    if importlib.util.find_spec("datasets") is None:
        pytest.skip("needs datasets")
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    parquet.write_table(arrow.table({"text": TEXTS}), tmp_path / "a.parquet")
    readme = b"---\nconfigs:\n- config_name: small\n  data_files: a.parquet\n---\n"
    files = {"a.parquet": (tmp_path / "a.parquet").read_bytes(), "README.md": readme}
    command = "import json; from speedrun_mup.documents import *; reader = DocumentReader(find_sources(['hf://me/mine/small']).sources,"
    command += " 'text', 0); print(json.dumps([document.text for document in reader]))"
    with LoopbackHub("me/mine", files) as hub:
        known = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "NO_PROXY": "127.0.0.1"}
        root = Path(documents.__file__).parents[1]
        done = subprocess.run(
            [sys.executable, "-c", command], env=os.environ | known, cwd=root, capture_output=True, timeout=300
        )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == TEXTS


def test_passages_join_to_the_text() -> None:
    text = "".join(f"line {i}\n" + "\n" * (i % 9 == 0) for i in range(1000)) + "x" * 5000 + "\n" + "y\n" * 3000 + "end"
    passages = list(split_passages(text.splitlines(True), 512))
    assert "".join(passages) == text and len(passages) > 10
    assert all(len(passage) >= 512 for passage in passages[:-1])
    assert all(len(passage) < 2048 + 5001 for passage in passages)
    assert list(split_passages([], 512)) == [] and list(split_passages(["x"], 512)) == ["x"]


def test_line_without_end_stays_in_bounds(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("x" * 100_000)
    found = read(tmp_path / "a.txt", passage=64)
    assert "".join(found) == "x" * 100_000 and max(map(len, found)) <= 8 * 64


FAULTS = {
    "a.jsonl: not JSON": (b'{"text": "x"}\n{"text": ', r"a\.jsonl:2: not a line of JSON"),
    "a.jsonl: no field": (b'{"text": "x"}\n\n{"body": "x"}\n', r"a\.jsonl:3: no field 'text' \(found: body\)"),
    "a.jsonl: no record": (b"[1]\n", r"a\.jsonl:1: no field 'text' \(found: list\)"),
    "a.jsonl: no text": (b'{"text": 1}\n', r"a\.jsonl:1: field 'text' is int"),
    "a.jsonl: deep": (b"[" * 100_000, r"a\.jsonl:1: not a line of JSON"),
    "a.txt: not UTF-8": (b"tea\nand\ncaf\xe9\n", r"a\.txt:3: not UTF-8"),
    "a.txt.gz: cut": (
        gzip.compress(random.Random(0).randbytes(999).hex().encode())[:-9],
        r"a\.txt\.gz: cannot be read on.*whole",
    ),
    "a.txt.gz: no gzip": (b"hello", r"a\.txt\.gz: cannot be read on"),
    "a.png: other": (b"", r"a\.png: not a \.txt, \.md, \.jsonl, \.parquet file"),
}


@pytest.mark.parametrize("kind", FAULTS)
def test_fault_is_one_line(tmp_path: Path, kind: str) -> None:
    content, words = FAULTS[kind]
    path = tmp_path / kind.partition(":")[0]
    path.write_bytes(content)
    with pytest.raises(SourceError, match=words) as error:
        read(path)
    assert "\n" not in str(error.value) and error.value.exit_code == 3


def test_missing_and_empty(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="No such file"):
        find_sources([str(tmp_path / "missing.txt")])
    with pytest.raises(SourceError, match=r"no \.txt"):
        find_sources([str(tmp_path)])
    (tmp_path / "a.txt").write_text("x")
    (source,) = find_sources([str(tmp_path / "a.txt")]).sources
    assert source == Source(str(tmp_path / "a.txt"), 1, (tmp_path / "a.txt").stat().st_mtime_ns)
    assert [format_of(name) for name in ("a.txt", "a.b.jsonl.gz", "a.zst", "a")] == [".txt", ".jsonl", "", ""]
