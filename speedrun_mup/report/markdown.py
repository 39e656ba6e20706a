"""A report as Markdown, next to its pictures."""

from __future__ import annotations

import re
import urllib.parse
from collections.abc import Iterator, Sequence

from speedrun_mup.files import printable
from speedrun_mup.report.contents import Report, Table

# Our own `code`, in which nothing that HTML or Markdown would act on can stand; everything else is foreign text.
_CODE = re.compile(r"(?<![`\\])`([^`<>\[\]&|\\]+)`(?!`)")
_ACTIVE = re.compile(r"[\\`*\[\]<>&|~$]|(?<!\w)_|_(?!\w)|(?<=[\]!])\(|(?<=:)//")
_BEGINS = re.compile(r"^(?:(?=[+-] |#+ |[=-]+$)|(\d+)(?=[.)] ))")
_ENTITIES = {"<": "&lt;", ">": "&gt;", "&": "&amp;", "//": "&#47;/"}


def to_markdown(report: Report) -> str:
    """The text of the file; pictures have the names that `png.draw` gets."""
    return "\n".join(_lines(report)) + "\n"


def escape(text: str) -> str:
    """Text of which no part acts as Markdown or HTML, on one line; short code in backticks stays code."""
    line = printable(" ".join(text.split()), most=100_000)
    parts, end = [], 0
    for code in _CODE.finditer(line):
        parts += [_inactive(line[end : code.start()]), code[0]]
        end = code.end()
    return _BEGINS.sub(r"\1\\", "".join([*parts, _inactive(line[end:])]))


def _inactive(text: str) -> str:
    return _ACTIVE.sub(lambda found: _ENTITIES.get(found[0], "\\" + found[0]), text)


def _lines(report: Report) -> Iterator[str]:
    yield f"# {escape(f'{report.title}: {report.headline}')}"
    yield ""
    yield from (f"{escape(line)}\n" for line in report.answer)
    if report.rates:
        yield from _table(report.rates)
        yield ""
    yield f"**{escape(report.meaning)}**\n" if report.meaning else ""
    yield from (f"- {escape(reason)}" for reason in report.reasons)
    if report.facts:
        place = (
            f"[docs/transfer.md]({urllib.parse.quote(report.guide)})"
            if report.guide
            else "`docs/transfer.md` of a checkout"
        )
        yield "\n## What was trained\n"
        yield from (f"- {escape(name)}: {escape(value)}" for name, value in report.facts)
        yield f"\nHow all this is measured, and when not to trust it: {place}."
    for section in report.sections:
        yield f"\n## {escape(section.title)}"
        for paragraph in section.text:
            yield f"\n{escape(paragraph)}"
        for figure in section.figures:
            caption = escape(figure.caption)
            yield f"\n![{caption}]({figure.name}.png)\n\n*{caption}*"
        for table in section.tables:
            yield ""
            yield from _table(table)
    yield from _words(report)


def _words(report: Report) -> Iterator[str]:
    if report.terms:
        yield "\n## Words used here\n"
        yield from (f"- **{escape(term)}**: {escape(told)}" for term, told in report.terms.items())


def _table(table: Table) -> Iterator[str]:
    if table.title:
        yield f"{table.title}\n"
    yield _row(table.header)
    yield "| " + " | ".join(["---"] * len(table.header)) + " |"
    yield from map(_row, table.rows)


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(map(escape, cells)) + " |"
