import errno
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from speedrun_mup import pictures
from speedrun_mup.pictures import PictureError, picture, plain


def draw(path: Path, title="a title"):
    with picture(path, (2, 1.5)) as figure:
        figure.subplots().set_title(title)
    return path.read_bytes()


@pytest.mark.slow
def test_the_same_picture_is_the_same_bytes(tmp_path):
    for kind in ("png", "svg", "pdf"):
        assert draw(tmp_path / f"a.{kind}") == draw(tmp_path / f"b.{kind}")
    for name in ("plain", "a.odd"):
        assert draw(tmp_path / name).startswith(b"\x89PNG")


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["$WIDTH__lr$LR", "a$b_$c", r"\$x$", "$$", "a\x1b[31m\nb", "_mine", "{x}^2", "%s", "\\frac"]
)
def test_any_name_can_be_a_title(name, tmp_path):
    assert draw(tmp_path / "a.png", plain(name)) != draw(tmp_path / "b.png", "")
    assert plain("a$b_$c") == r"a\$b_\$c" and plain("x\ny") == "x\\x0ay"


def test_the_text_is_shown_as_it_is_and_not_as_a_formula(tmp_path):
    svg = {"svg.fonttype": "none"}
    with picture(tmp_path / "a.svg", (2, 1.5), svg) as figure:
        figure.text(0.1, 0.5, plain("w$WIDTH__lr$LR"))
    assert "w$WIDTH__lr$LR" in (tmp_path / "a.svg").read_text()


def test_characters_without_a_font_are_escapes_and_no_boxes(tmp_path, monkeypatch):
    monkeypatch.setattr(pictures, "_family_with", lambda characters: None)
    with warnings.catch_warnings(), picture(tmp_path / "a.svg", (2, 1.5), {"svg.fonttype": "none"}) as figure:
        warnings.simplefilter("error")
        figure.text(0.1, 0.5, plain("宽度 é"))
    assert "\\u5bbd\\u5ea6 é" in (tmp_path / "a.svg").read_text()


def test_a_font_that_has_the_characters_is_found():
    from matplotlib.font_manager import findfont

    family = pictures._family_with(frozenset("∫α"))
    assert family and {ord("∫"), ord("α")} <= pictures._characters(findfont(family))


@pytest.mark.slow
def test_faults_of_drawing_and_writing_are_one_line(tmp_path, monkeypatch):
    why = r"a.png cannot be drawn \(ZeroDivisionError: two\); "
    with pytest.raises(PictureError, match=why) as caught, picture(tmp_path / "a.png", (2, 1.5)):
        raise ZeroDivisionError("two\nlines")
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())

    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    draw(tmp_path / "a.png")
    before = (tmp_path / "a.png").read_bytes()
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(PictureError, match=r"a.png cannot be written \(No space left on device\)"):
        draw(tmp_path / "a.png", "another")
    assert (tmp_path / "a.png").read_bytes() == before and len(list(tmp_path.iterdir())) == 1


@pytest.mark.slow
def test_a_link_is_replaced_and_not_followed(tmp_path):
    (tmp_path / "victim").write_text("precious")
    (tmp_path / "a.png").symlink_to(tmp_path / "victim")
    assert draw(tmp_path / "a.png").startswith(b"\x89PNG") and (tmp_path / "victim").read_text() == "precious"


PROGRAM = """
import sys
from pathlib import Path
from speedrun_mup.pictures import picture, plain
with picture(Path(sys.argv[1]), (2, 1.5)) as figure:
    figure.subplots().set_title(plain('w$WIDTH__lr$LR'))
"""


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["module://matplotlib_inline.backend_inline", "no-such-backend", "TkAgg"])
def test_no_setting_of_the_user_s_matplotlib_breaks_a_picture(backend, tmp_path):
    (tmp_path / "matplotlibrc").write_text(
        "text.usetex: True\nfont.family: no-such-font\nbackend: Qt5Agg\nsavefig.dpi: 1\n"
    )
    env = os.environ | {"MPLBACKEND": backend, "MPLCONFIGDIR": str(tmp_path)}
    words = [sys.executable, "-c", PROGRAM, str(tmp_path / "a.png")]
    done = subprocess.run(words, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and done.stderr.count("Traceback") == 0, done.stderr
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_a_font_of_boxes_is_no_font(monkeypatch):
    from matplotlib.font_manager import fontManager

    boxes = [font for font in fontManager.ttflist if font.name.startswith("Last Resort")]
    if not boxes:
        pytest.skip("this matplotlib has none")
    monkeypatch.setattr(fontManager, "ttflist", boxes)
    pictures._family_with.cache_clear()
    assert pictures._family_with(frozenset("\u5b66")) is None
    pictures._family_with.cache_clear()
