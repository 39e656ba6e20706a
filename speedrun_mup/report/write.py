"""A report as files: report.html, report.md, and a picture of each figure."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

from speedrun_mup.core.errors import ConfigError, UserError
from speedrun_mup.files import printable, write_whole
from speedrun_mup.report.contents import Report
from speedrun_mup.report.markdown import to_markdown
from speedrun_mup.report.page import to_html
from speedrun_mup.report.png import draw


def write_report(report: Report, out: Path, complain: Callable[[str], None] | None = None) -> list[Path]:
    """Write all files into the folder `out`, each whole or not at all; returns those written, the page first.

    Args:
        report: what to write.
        out: the folder, made if need be.
        complain: called with a line for each file that cannot be written; what can be written is written.

    Raises:
        UserError: in one line, for the first file that cannot be written, unless there is `complain`.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as fault:
        raise ConfigError(f"{printable(out)} cannot be written ({fault.strerror}); choose another --out") from None
    works: list[tuple[Path, Callable[[Path], None]]] = [
        (out / "report.html", lambda path: write_whole(path, to_html(report))),
        (out / "report.md", lambda path: write_whole(path, to_markdown(report))),
    ]
    works += [(out / f"{figure.name}.png", functools.partial(draw, figure)) for figure in report.figures]
    written = []
    for path, work in works:
        try:
            work(path)
            written.append(path)
        except UserError as fault:
            if complain is None:
                raise
            complain(str(fault))
    return written
