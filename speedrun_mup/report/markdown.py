"""A report as Markdown, beside its pictures."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from speedrun_mup.report.contents import Report, Table


def to_markdown(report: Report) -> str:
    """The text of the file; pictures are named as `png.draw` is told to name them."""
    return "\n".join(_lines(report)) + "\n"


def _lines(report: Report) -> Iterator[str]:
    yield f"# {report.title}: {report.verdict}"
    yield ""
    yield from (f"{line}\n" for line in report.answer)
    if report.rates:
        yield from _table(report.rates)
        yield ""
    yield f"**{report.meaning}**\n" if report.meaning else ""
    yield from (f"- {reason}" for reason in report.reasons)
    if report.facts:
        place = f"[docs/transfer.md]({report.guide})" if report.guide else "`docs/transfer.md` of a checkout"
        yield "\n## What was trained\n"
        yield from (f"- {name}: {value}" for name, value in report.facts)
        yield f"\nHow all this is measured, and when not to trust it: {place}."
    for section in report.sections:
        yield f"\n## {section.title}"
        for paragraph in section.text:
            yield f"\n{paragraph}"
        for figure in section.figures:
            yield f"\n![{figure.caption}]({figure.name}.png)\n\n*{figure.caption}*"
        for table in section.tables:
            yield ""
            yield from _table(table)
    yield from _words(report)


def _words(report: Report) -> Iterator[str]:
    if report.terms:
        yield "\n## Words used here\n"
        yield from (f"- **{term}**: {told}" for term, told in report.terms.items())


def _table(table: Table) -> Iterator[str]:
    if table.title:
        yield f"{table.title}\n"
    yield _row(table.header)
    yield _row(["---"] * len(table.header))
    yield from map(_row, table.rows)


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
