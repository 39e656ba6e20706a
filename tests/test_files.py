import enum
import json
import math
import os
import socket
import stat
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from speedrun_mup import files
from speedrun_mup.core.errors import ConfigError


def test_names_lose_everything_that_moves_a_cursor():
    shown = files.printable("a\x1b[31m\n\x9b\u202eb\ud800é漢")
    assert shown == "a\\x1b[31m\\x0a\\x9b\\u202eb\\ud800é漢"
    assert files.printable("x" * 1000, most=50) == "x" * 47 + "..."
    assert files.without_escapes("a\tb\r\n\x1b]0;t\x07") == "a\tb\r\n\\x1b]0;t\\x07"


def special_files(folder: Path):
    os.mkfifo(folder / "fifo")
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(folder / "socket"))
    listener.close()
    (folder / "folder").mkdir()
    (folder / "zero").symlink_to("/dev/zero")
    return [folder / name for name in ("fifo", "socket", "folder", "zero")]


def test_special_files_are_refused_in_one_line_and_without_waiting(tmp_path):
    for path in special_files(tmp_path):
        with pytest.raises(ConfigError, match="cannot be read") as caught:
            files.read_json(path, "remove it")
        assert "\n" not in str(caught.value)
        with pytest.raises(OSError):
            files.open_to_append(path)


@pytest.mark.parametrize("content", [b"{", b"\xff\xfe", b"[" * 100_000, b"1" * 5000])
def test_damaged_json_is_one_line(tmp_path, content):
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(ConfigError, match="is not JSON; mend it"):
        files.read_json(tmp_path / "a.json", "mend it")


def test_a_small_file_is_bounded(tmp_path):
    (tmp_path / "a").write_bytes(b"1234")
    assert files.read_bytes(tmp_path / "a", most=4) == b"1234"
    with pytest.raises(OSError, match="more than 3 bytes"):
        files.read_bytes(tmp_path / "a", most=3)


def test_a_link_is_replaced_and_not_followed(tmp_path):
    (tmp_path / "victim").write_text("precious")
    link = tmp_path / "out.json"
    link.symlink_to(tmp_path / "victim")
    with pytest.raises(OSError, match="symbolic link"):
        files.open_to_append(link)
    files.write_whole(link, "new")
    assert (tmp_path / "victim").read_text() == "precious"
    assert link.read_text() == "new" and not link.is_symlink()
    (tmp_path / "sub").symlink_to(tmp_path)
    with pytest.raises(OSError, match="symbolic link"):
        files.own_folder(tmp_path / "sub")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root makes devices, or could replace one")
def test_no_device_is_replaced(tmp_path):
    device = tmp_path / "zero"
    os.mknod(device, 0o666 | stat.S_IFCHR, os.makedev(1, 5))
    with pytest.raises(ConfigError, match="it is a device, not a regular file.; choose another"):
        files.write_whole(device, "text", "choose another")
    with pytest.raises(OSError, match="it is a device"):
        files.new_file(device)
    assert [entry.name for entry in tmp_path.iterdir()] == ["zero"] and stat.S_ISCHR(device.lstat().st_mode)


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "a"
    path.write_text("old")
    with pytest.raises(ZeroDivisionError), files.whole_file(path) as file:
        file.write(b"half")
        raise ZeroDivisionError
    assert [entry.name for entry in tmp_path.iterdir()] == ["a"] and path.read_text() == "old"


def test_the_content_is_on_the_disk_before_the_rename_and_the_name_after_it(tmp_path, monkeypatch):
    order = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(
        files.os,
        "fsync",
        lambda fd: (order.append("folder" if Path(f"/proc/self/fd/{fd}").is_dir() else "file"), fsync(fd)),
    )
    monkeypatch.setattr(files.os, "replace", lambda a, b: (order.append("rename"), replace(a, b)))
    files.write_whole(tmp_path / "new" / "a", "x")
    assert order == ["file", "rename", "folder"]


PRINT = "import sys; from speedrun_mup.cli import main; sys.exit(main(sys.argv[1:]))"


def run(argument: str, redirect: str, **env: str):
    command = f"exec {sys.executable} -c '{PRINT}' {argument} {redirect}"
    return subprocess.run(["bash", "-c", command], capture_output=True, text=True, env=os.environ | env, timeout=60)


@pytest.mark.slow
def test_output_that_is_lost_is_one_line_and_an_exit_code():
    full = run("--help", "> /dev/full")
    assert full.returncode == 1 and full.stderr.count("\n") == 1 and "No space left" in full.stderr
    closed = run("--help", ">&-")
    assert closed.returncode == 1 and "Traceback" not in closed.stderr
    nothing = run("no-such-command", "<&- >&- 2>&-")
    assert nothing.returncode == 2 and nothing.stdout == nothing.stderr == ""


def test_any_encoding_takes_any_name():
    odd = run("$(printf 'caf\\xc3\\xa9\\033[31m')", "", PYTHONIOENCODING="ascii:strict", PYTHONUTF8="0")
    assert odd.returncode == 2 and "caf\\xe9\\x1b[31m" in odd.stderr and odd.stderr.count("\n") == 1


def test_files_hold_what_was_written(tmp_path):
    files.write_whole(tmp_path / "a.json", json.dumps({"é": 1}))
    assert files.read_json(tmp_path / "a.json", "") == {"é": 1}
    with files.open_to_append(tmp_path / "log") as log:
        log.write("one\n")
    assert files.read_text(tmp_path / "log") == "one\n"


def test_strict_json_has_null_where_no_number_is_finite():
    class Level(enum.StrEnum):
        BAD = "BAD"

    value = {
        "a": np.array([1.0, np.nan]),
        "b": (math.inf, 2),
        "c": Level.BAD,
        "d": "NaN",
        "e": [{"f": -math.inf}],
        "g": 0.1234567,
    }
    told = json.loads(files.strict_json(value), parse_constant=pytest.fail)
    assert told == {"a": [1.0, None], "b": [None, 2], "c": "BAD", "d": "NaN", "e": [{"f": None}], "g": 0.1234567}
    assert files.strict_json({"g": [0.1234567, 2]}, digits=3) == '{"g":[0.123,2]}'


def test_parts_of_a_file_are_written_in_order(tmp_path):
    files.write_whole(tmp_path / "a", [b"head", memoryview(np.array([1, 2], "<u2")).cast("B")])
    assert (tmp_path / "a").read_bytes() == b"head\x01\x00\x02\x00"
