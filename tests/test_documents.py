"""Documents from every kind of source, in order, from any position on; faults in one line."""

import gzip
import importlib.util
import io
import json
import os
import random
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from helpers.loopback_hub import LoopbackHub

from speedrun_mup.core.errors import UserError
from speedrun_mup.data import documents
from speedrun_mup.data.documents import DocumentReader, Position, split_passages
from speedrun_mup.data.sources import Source, SourceError, find_sources, format_of, suffix

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


@pytest.mark.slow
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
    command = "import json; from speedrun_mup.data.documents import *; from speedrun_mup.data.sources import *; "
    command += "reader = DocumentReader(find_sources(['hf://me/mine/small']).sources,"
    command += " 'text', 0); print(json.dumps([document.text for document in reader]))"
    with LoopbackHub("me/mine", files) as hub:
        known = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "NO_PROXY": "127.0.0.1"}
        root = Path(documents.__file__).parents[2]
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
    "a.png: no text": (b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", r"a\.png:1: not UTF-8"),
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


# --- What a folder holds ---


def test_suffixes_of_any_case_and_what_is_left_out(tmp_path: Path) -> None:
    inside, other = tmp_path / "texts", tmp_path / "other"
    for name in "a.txt", "B.TXT", "c.Jsonl", "D.MD.GZ", "x.png", "y.PNG", "notes", ".hidden/h.txt", "sub/e.md":
        (inside / name).parent.mkdir(parents=True, exist_ok=True)
        (inside / name).touch()
    other.mkdir()
    (other / "secret.txt").touch()
    (inside / "leak.txt").symlink_to(other / "secret.txt")
    (inside / "linked").symlink_to(other)
    (inside / "broken.txt").symlink_to("nowhere")
    (inside / "loop").symlink_to("loop")
    (inside / "sub" / "up").symlink_to("..")  # what is there is found already
    (inside / "again.txt").symlink_to("a.txt")
    (inside / "kept.txt").symlink_to(".hidden/h.txt")  # inside, and not found otherwise
    os.mkfifo(inside / "pipe.txt")
    found = find_sources([str(inside)])
    assert [Path(source.name).relative_to(inside).as_posix() for source in found.sources] == [
        *("B.TXT", "D.MD.GZ", "a.txt", "c.Jsonl", "kept.txt", "sub/e.md")
    ]
    assert dict(found.left_out) == {
        "*.png": 2,
        "without a suffix": 1,
        "that are FIFOs": 1,
        "broken or circular links": 2,
        "links that lead out of the folder": 2,
    }
    told = found.told()
    assert told.startswith("2 *.png, ") and str(inside / "a.txt") not in told and "\n" not in told
    assert "FIFOs (" in told and told.endswith("; --suffix reads more as plain text")
    (other / "f.txt").symlink_to(inside / "a.txt")
    assert len(find_sources([str(inside / "leak.txt"), str(inside / "linked" / "f.txt")]).sources) == 2  # named ones


def test_named_files_of_any_suffix_are_plain_text(tmp_path: Path) -> None:
    for name in "x.log", "Makefile", "a.py.gz", "b.zzz", "c.JSONL":
        content = jsonl(["a record"]) if name == "c.JSONL" else PROSE.encode()
        (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    for name in "x.log", "Makefile", "a.py.gz", "b.zzz":
        assert "".join(read(tmp_path / name)) == PROSE
    assert read(tmp_path / "c.JSONL") == ["a record"]


def test_suffixes_that_folders_are_searched_for_on_request(tmp_path: Path) -> None:
    for name in "a.py", "B.PY", "c.py.gz", "d.c", "e.pyc", "f.txt", "sub/g.py", "Makefile":
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    for suffixes, names in ((), ["f.txt"]), ((".py",), ["B.PY", "a.py", "c.py.gz", "f.txt", "sub/g.py"]):
        found = find_sources([str(tmp_path)], suffixes=suffixes)
        assert [Path(source.name).relative_to(tmp_path).as_posix() for source in found.sources] == names
        assert found.left_out.total() == 8 - len(names)
    assert (
        find_sources([str(tmp_path)], suffixes=[".py", ".c"]).told().startswith("1 without a suffix, 1 *.pyc; --suffix")
    )
    (tmp_path / "f.txt").unlink()
    with pytest.raises(SourceError, match=r"left out: 3 \*\.py, .*1 \*\.py\.gz.*; --suffix reads") as error:
        find_sources([str(tmp_path)])
    assert "\n" not in str(error.value) and "sub" not in str(error.value).partition(" left out: ")[2]


def test_what_several_folders_hold_is_added_up(tmp_path: Path) -> None:
    for name in "a/x.txt", "a/y.py", "b/x.md", "b/y.py", "b/z.py", "one.log":
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    os.mkfifo(tmp_path / "a" / "pipe")
    found = find_sources([str(tmp_path / name) for name in ("b", "one.log", "a")])
    assert [Path(source.name).name for source in found.sources] == ["x.md", "one.log", "x.txt"]
    assert found.told() == f"3 *.py, 1 that are FIFOs ({tmp_path}/a/pipe); --suffix reads more as plain text"


def test_spelling_of_suffixes() -> None:
    assert [suffix(text) for text in (".py", "*.C", ".Jsonl")] == [".py", ".c", ".jsonl"]
    for text in "src", "py", ".", "", "a/b.py", ".gz", "..", ". x":
        with pytest.raises(UserError, match="expected suffixes such as"):
            suffix(text)


def test_folder_that_may_not_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The test runs as root, too, who may read everything."""
    (tmp_path / "closed").mkdir()
    (tmp_path / "a.txt").touch()
    (tmp_path / "b.txt").touch()
    real = os.scandir

    def scandir(path: object) -> object:
        if str(path).endswith("closed"):
            raise PermissionError(13, "Permission denied")
        return real(path)  # type: ignore[call-overload]

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(SourceError, match=r"closed: cannot read: Permission denied.*--on-bad-document skip"):
        find_sources([str(tmp_path)])
    found = find_sources([str(tmp_path)], skip_bad=True)
    assert len(found.sources) == 2 and found.left_out == {"that cannot be read": 1}
    monkeypatch.setattr(os, "access", lambda path, mode: not str(path).endswith("b.txt"))
    with pytest.raises(SourceError, match=r"b\.txt: cannot read|closed: cannot read"):
        find_sources([str(tmp_path)])
    assert len(find_sources([str(tmp_path)], skip_bad=True).sources) == 1


def test_the_folder_to_write_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    for name in "a.txt", "out/b.txt":
        (tmp_path / name).touch()
    (tmp_path / "to-out").symlink_to("out")
    for out in tmp_path / "out", tmp_path / "to-out":
        assert [source.name for source in find_sources([str(tmp_path)], out).sources] == [str(tmp_path / "a.txt")]


@pytest.mark.slow
def test_very_deep_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for _ in range(1200):
        os.mkdir("a")
        os.chdir("a")
    Path("b.txt").write_text("here")
    monkeypatch.chdir(tmp_path)
    (source,) = find_sources(["a"]).sources
    assert source.name == "a/" * 1200 + "b.txt"
    subprocess.run(["rm", "-r", "a"], check=True)  # rmtree recurses


def test_standard_input_that_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", None)
    with pytest.raises(SourceError, match="standard input is closed"):
        find_sources(["-"])


def test_name_that_is_not_utf8(tmp_path: Path) -> None:
    path = tmp_path / os.fsdecode(b"caf\xe9.jsonl")
    path.write_bytes(jsonl(["x"]) + b"{")
    with pytest.raises(SourceError, match="not a line of JSON") as error:
        read(path)
    assert str(error.value).isprintable() and error.value.args[0].encode()


def test_fifo_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.txt")
    with pytest.raises(SourceError, match="it is a FIFO; use - for a stream"):
        find_sources([str(tmp_path / "a.txt")])
    with pytest.raises(SourceError, match="a FIFO, not a regular file"):
        list(DocumentReader([Source(str(tmp_path / "a.txt"))], "text", 64))


# --- What is at the beginning of a stream ---

BOM = b"\xef\xbb\xbf"


@pytest.mark.parametrize(
    "start", [b"", BOM, BOM + b"\n", b"\n", b"\r\n \n" * 50], ids=["", "mark", "both", "blank", "many"]
)
def test_byte_order_marks_and_blank_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, start: bytes) -> None:
    for name in "a.jsonl", "a.jsonl.gz":
        content = start + jsonl(TEXTS)
        (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith("gz") else content)
        assert read(tmp_path / name) == TEXTS
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BufferedReader(io.BytesIO(start + jsonl(TEXTS)))))  # type: ignore[arg-type]
    assert read("-") == TEXTS
    (tmp_path / "a.txt").write_bytes(start + PROSE.encode())
    blank = start.removeprefix(BOM).decode().replace("\r", "")
    assert "".join(read(tmp_path / "a.txt")) == blank + PROSE == "".join(read(tmp_path / "a.txt", passage=0))
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BufferedReader(io.BytesIO(start + PROSE.encode()))))  # type: ignore[arg-type]
    assert "".join(read("-")) == blank + PROSE


class Drops(io.RawIOBase):
    """A pipe whose writer writes one byte at a time."""

    def __init__(self, content: bytes):
        self.content = io.BytesIO(content)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: bytearray) -> int:  # type: ignore[override]
        return self.content.readinto(memoryview(buffer)[:1])


def test_slow_pipe(monkeypatch: pytest.MonkeyPatch) -> None:
    for content, right in (BOM + jsonl(TEXTS), TEXTS), (BOM + PROSE.encode(), [PROSE]):
        monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BufferedReader(Drops(content))))
        assert "".join(read("-")) == "".join(right)


# --- Bad documents ---

BAD: dict[str, tuple[bytes, list[str]]] = {
    "a.jsonl": (
        b'{"text": "one"}\n{"text": \n{"body": "x"}\n[1]\n{"text": null}\n{"text": "\xff"}\n{"text": "two"}\n'
        + b"[" * 10**5,
        [r":2: not a line", r":3: no field", r":4: no field", r":5: .*NoneType", r":6: not UTF-8", r":8: not a line"],
    ),
    "a.txt": (b"one\n\ncaf\xe9\n\nthree\xff\xff\n\ntwo\n", [r":3: not UTF-8", r":5: not UTF-8"]),
    "a.txt.gz": (
        gzip.compress(b"one\n\n" + random.Random(1).randbytes(9999).hex().encode())[:-99],
        [r"gz: cannot be read on"],
    ),
    "b.txt": ("one\n".encode("utf-16"), [r"UTF-16; write it as UTF-8 \(iconv"]),
    "l.txt": ("one line\n".encode("utf-16-le"), [r"a null in every second byte, as in UTF-16; write"]),
    "m.txt": ("one line\n".encode("utf-16-be"), [r"a null in every second byte, as in UTF-16; write"]),
    "n.txt": (bytes(5000), [r"a null in every second byte, as in UTF-16; write"]),
}


NO_UTF8 = ("b.txt", "l.txt", "m.txt", "n.txt")


@pytest.mark.parametrize("name", BAD)
def test_bad_documents_are_named_one_by_one(tmp_path: Path, name: str) -> None:
    content, words = BAD[name]
    (tmp_path / name).write_bytes(content)
    (tmp_path / "z.txt").write_text("last")
    sources = find_sources([str(tmp_path)]).sources
    with pytest.raises(SourceError, match=words[0]):
        list(DocumentReader(sources, "text", 1))
    whole = list(DocumentReader(sources, "text", 1, skip_bad=True))
    told = [f"{document.place}: {document.fault}" for document in whole if document.fault]
    assert len(told) == len(words) and all(re.search(*pair) for pair in zip(words, told))
    good = [document.text.strip() for document in whole if document.text.strip()]
    assert good[-1] == "last" and (name in NO_UTF8 or good[0] == "one") and ("gz" in name or len(good) < 4)
    for cut in range(1, len(whole), 1 + len(whole) // 20):
        assert list(DocumentReader(sources, "text", 1, whole[cut - 1].end, skip_bad=True)) == whole[cut:]


def test_null_in_parquet(tmp_path: Path) -> None:
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    for kind, column in ("plain", arrow.array(["one", None, "two"])), ("ints", arrow.array([1, 2])):
        parquet.write_table(arrow.table({"text": column}), tmp_path / f"{kind}.parquet")
    whole = list(DocumentReader(find_sources([str(tmp_path / "plain.parquet")]).sources, "text", 1, skip_bad=True))
    assert [document.text for document in whole] == ["one", "", "two"] and whole[1].place.endswith(
        "plain.parquet, row 2"
    )
    assert "NoneType" in whole[1].fault
    with pytest.raises(SourceError, match=r"ints\.parquet, row 1: field 'text' is int"):
        read(tmp_path / "ints.parquet")


# --- Bombs ---


def test_line_without_end_is_a_bad_document(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(documents, "LARGEST_DOCUMENT", 1000)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(jsonl(["one"]) + b" " * 10**6 + b"\n" + jsonl(["two"])))
    (tmp_path / "b.txt").write_text("x" * 1001)
    whole = list(DocumentReader(find_sources([str(tmp_path)]).sources, "text", 0, skip_bad=True))
    assert [document.text for document in whole] == ["one", "", "two", ""]
    assert "a line of more than 1,000 bytes" in whole[1].fault and whole[1].place.endswith("a.jsonl.gz:2")
    assert "more than 1,000 characters" in whole[3].fault


@pytest.mark.slow
def test_kilobytes_of_parquet_stay_small(tmp_path: Path) -> None:
    """100 rows of 8 MB that share one entry of a dictionary."""
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    column = arrow.array(["spam and " * 900_000] * 100).dictionary_encode()
    parquet.write_table(arrow.table({"text": column}), tmp_path / "a.parquet", compression="zstd")
    assert (tmp_path / "a.parquet").stat().st_size < 20_000
    command = "import re, sys; from speedrun_mup.data.documents import *; from speedrun_mup.data.sources import *; "
    command += "reader = DocumentReader(find_sources(sys.argv[1:])"
    command += ".sources, 'text', 0); count = sum(1 for document in reader)\n"
    command += "print(count, int(re.search(r'VmHWM:\\s*(\\d+)', open('/proc/self/status').read())[1]) // 1024)"
    root = Path(documents.__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", command, str(tmp_path / "a.parquet")],
        cwd=root,
        capture_output=True,
        text=True,
        timeout=300,
    )
    count, megabytes = map(int, done.stdout.split())
    assert count == 100 and megabytes < 400


def test_page_that_decodes_to_very_much(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    monkeypatch.setattr(documents, "_PAGE_BYTES", 10**6)
    column = arrow.array(["x" * 20_000_000, "y"])
    parquet.write_table(arrow.table({"text": column}), tmp_path / "a.parquet", compression="zstd", use_dictionary=False)
    with pytest.raises(SourceError, match=r"a\.parquet: [\d,]+ bytes that decode to 20,"):
        read(tmp_path / "a.parquet")
