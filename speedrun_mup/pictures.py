"""Pictures, drawn where nothing of the user's matplotlib settings can break them, and written whole.

with picture(path, size=(7, 4.2)) as figure:
    figure.subplots().set_title(plain(name))
"""

from __future__ import annotations

import contextlib
import functools
import io
import os
import sys
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from speedrun_mup.core.errors import UserError, in_a_line
from speedrun_mup.files import printable, write_whole

COLORS = 256  # of a PNG
_STYLE: dict[Any, Any] = {
    "font.size": 8.5,
    "axes.titlesize": 8.5,
    "xtick.labelsize": 7.5,
    "ytick.labelsize": 7.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.7,
    "axes.grid": True,
    "grid.color": "#e8e8e8",
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "savefig.dpi": 200,
}
_BOXES = "Last Resort"  # comes with matplotlib and has a box for every character there is
_NAMED_FONTS = (
    "Noto Sans CJK",
    "Noto Sans",
    "Source Han",
    "WenQuanYi",
    "Droid Sans Fallback",
    "Unifont",
    "FreeS",
    "Arial",
)
_STAMPS = {".svg": ("Date",), ".pdf": ("CreationDate", "Creator", "Producer"), ".png": ("Software",)}


class PictureError(UserError):
    """A picture that cannot be drawn or written. Everything else can still be reported."""


def plain(text: object, most: int = 80) -> str:
    """A name as matplotlib is to show it: on one line, and with its dollar signs, which would begin a formula.

    Args:
        text: anything; `str` of it is shown.
        most: characters to keep.
    """
    return printable(text, most).replace("$", r"\$")


@contextlib.contextmanager
def picture(path: Path, size: tuple[float, float], style: Mapping[str, Any] | None = None) -> Iterator[Any]:
    """A matplotlib figure to draw on, which is written to `path` when the block ends.

    The same figure gives the same bytes. The backend, the style and matplotlibrc of the user are left out of it.
    Characters for which no font is installed are shown as escapes.

    Args:
        path: its suffix names the format: .svg or .pdf, else it is PNG.
        size: width and height in inches.
        style: settings of matplotlib, on top of this project's own.

    Raises:
        PictureError: in one line, for any fault of drawing or writing.
    """
    try:
        with _own_settings(style or {}), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from matplotlib.figure import Figure

            figure = Figure(figsize=size, layout="constrained")
            yield figure
            _find_fonts(figure)
            buffer = io.BytesIO()
            kind = path.suffix.lower() if path.suffix.lower() in _STAMPS else ".png"
            figure.savefig(buffer, format=kind[1:], metadata={name: None for name in _STAMPS.get(kind, ())})
            content = _with_few_colors(buffer) if kind == ".png" else buffer.getvalue()
    except UserError:
        raise
    except Exception as fault:  # of matplotlib, its fonts, its caches: whatever it is, it is about a picture only
        raise PictureError(
            f"{printable(path)} cannot be drawn ({printable(in_a_line(fault))}); all else is there"
        ) from fault
    write_whole(path, content, "all else is there; make room to have it", PictureError)


def _with_few_colors(png: io.BytesIO) -> bytes:
    """The same picture with a palette, a third of the size."""
    from PIL import Image  # which matplotlib writes PNG with

    small = io.BytesIO()
    Image.open(png).convert("RGB").quantize(COLORS, dither=Image.Dither.NONE).save(small, "png", optimize=True)
    return small.getvalue()


@contextlib.contextmanager
def _own_settings(style: Mapping[str, Any]) -> Iterator[None]:
    """matplotlib with its defaults, this project's style and `style`, also where MPLBACKEND names nothing that it knows."""
    matplotlib = sys.modules.get("matplotlib") or _import_matplotlib()
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update({"svg.hashsalt": "speedrun-mup"} | _STYLE | dict(style))
        yield


def _import_matplotlib() -> Any:
    """matplotlib looks at MPLBACKEND when it is imported, and fails if that is no backend of its own."""
    backend = os.environ.pop("MPLBACKEND", None)
    try:
        import matplotlib
    finally:
        if backend is not None:
            os.environ["MPLBACKEND"] = backend
    if backend is not None:
        with contextlib.suppress(ValueError):
            matplotlib.rcParams["backend"] = backend
    return matplotlib


def _find_fonts(figure: Any) -> None:
    """Give every text whose characters the default font lacks a font that has them, or escapes."""
    from matplotlib.font_manager import findfont
    from matplotlib.text import Text

    default = findfont("DejaVu Sans")
    for text in figure.findobj(Text):
        lacking = {c for c in text.get_text() if ord(c) > 127 and ord(c) not in _characters(default)}
        if not lacking:
            continue
        family = _family_with(frozenset(lacking))
        if family:
            text.set_fontfamily(["DejaVu Sans", family])
        else:
            text.set_text("".join(_escaped(text.get_text(), lacking)))


def _escaped(text: str, lacking: set[str]) -> Iterator[str]:
    for character in text:
        yield character.encode("ascii", "backslashreplace").decode() if character in lacking else character


@functools.cache
def _characters(font: str) -> frozenset[int]:
    """The code points that a font file has."""
    from matplotlib.ft2font import FT2Font

    return frozenset(FT2Font(font).get_charmap())


@functools.cache
def _family_with(characters: frozenset[str]) -> str | None:
    """An installed font that has all these characters; those that are known to have many are looked at first."""
    from matplotlib.font_manager import fontManager

    wanted = {ord(character) for character in characters}
    fonts = (font for font in fontManager.ttflist if not font.name.startswith(_BOXES))
    for font in sorted(fonts, key=lambda font: _rank(font.name)):
        with contextlib.suppress(Exception):  # a damaged font file is no font
            if wanted <= _characters(font.fname):
                return str(font.name)
    return None


def _rank(name: str) -> int:
    return next((place for place, known in enumerate(_NAMED_FONTS) if name.startswith(known)), len(_NAMED_FONTS))
