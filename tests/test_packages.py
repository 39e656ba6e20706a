"""Packages that are missing, or whose name something else has: one line, never a wrong module."""

import subprocess
import sys
from pathlib import Path

import pytest

from speedrun_mup import packages
from speedrun_mup.core.errors import ConfigError
from speedrun_mup.packages import import_extra, import_package


def load(name: str, needed: str = "Thing") -> None:
    import_extra(name, needed, "this test", "data")


def test_one_line_for_each_way_to_be_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "shadow_folder").mkdir()
    (tmp_path / "shadow_file.py").write_text("")
    (tmp_path / "broken.py").write_text("raise OSError('libx.so: cannot open\\nmore')")
    (tmp_path / "needs_more.py").write_text("import not_there_either")
    (tmp_path / "right.py").write_text("Thing = 1")
    load("right")
    for name, words in {
        "not_there": "this test needs not_there, which is not installed; pip install 'speedrun-mup[data]'",
        "not_there.at_all": "needs not_there, which is not installed",
        "shadow_folder": f"{tmp_path / 'shadow_folder'} has its name and is not it; rename that",
        "shadow_folder.inner": f"{tmp_path / 'shadow_folder'} has its name and is not it; rename that",
        "shadow_file": f"{tmp_path / 'shadow_file.py'} has its name and is not it",
        "broken": "cannot be imported (OSError: libx.so: cannot open)",
        "needs_more": "cannot be imported (No module named 'not_there_either')",
    }.items():
        with pytest.raises(ConfigError) as error:
            load(name)
        assert words in str(error.value) and "\n" not in str(error.value) and "pip install" in str(error.value)
    with pytest.raises(ImportError, match="a folder without a package in it"):
        import_package("shadow_folder")


@pytest.mark.parametrize("name", ["tokenizers", "datasets", "rustbpe", "tiktoken", "pyarrow"])
def test_folder_in_the_working_folder_does_not_pass_for_a_package(tmp_path: Path, name: str) -> None:
    """As where the package is not installed: without site-packages."""
    (tmp_path / name).mkdir()
    root = Path(packages.__file__).parents[1]
    command = f"import sys; sys.path.append({str(root)!r}); from speedrun_mup.packages import import_extra\n"
    command += f"import_extra({name!r}, 'Tokenizer', 'this', 'data')"
    done = subprocess.run(
        [sys.executable, "-S", "-c", command], cwd=tmp_path, capture_output=True, text=True, timeout=60
    )
    assert "has its name and is not it" in done.stderr.splitlines()[-1]
