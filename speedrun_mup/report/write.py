"""A report as files: report.html, report.md, and a picture of each figure."""

from __future__ import annotations

from pathlib import Path

from speedrun_mup.core.errors import ConfigError
from speedrun_mup.report.contents import Report
from speedrun_mup.report.markdown import to_markdown
from speedrun_mup.report.page import to_html
from speedrun_mup.report.png import draw


def write_report(report: Report, out: Path) -> list[Path]:
    """Write all files into the folder `out`; returns them, the page first. Raises ConfigError if that is impossible."""
    page, text = out / "report.html", out / "report.md"
    pictures = [out / f"{figure.name}.png" for figure in report.figures]
    try:
        out.mkdir(parents=True, exist_ok=True)
        page.write_text(to_html(report), encoding="utf-8")
        text.write_text(to_markdown(report), encoding="utf-8")
        for figure, picture in zip(report.figures, pictures):
            draw(figure, picture)
    except OSError as fault:
        raise ConfigError(f"{out} cannot be written ({fault.strerror}); choose another --out") from None
    return [page, text, *pictures]
