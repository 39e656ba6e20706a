"""A report as one HTML file that needs nothing else: text and tables are HTML, page.js draws figures from a block of JSON."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from html import escape
from pathlib import Path

from speedrun_mup.files import strict_json
from speedrun_mup.report.contents import Report, Section, Table

DIGITS = 6  # of a number on the page
SHORT = 34  # characters
LONG = 12  # rows; longer tables are folded
VERDICTS = ("PASS", "WARN", "FAIL", "INCONCLUSIVE")
_HERE = Path(__file__).parent
_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'">
<title>{title}</title>
<style>
{css}</style>
</head>
<body>
{body}
<script type="application/json" id="report">{data}</script>
<script>
{js}</script>
</body>
</html>
"""


def to_html(report: Report) -> str:
    """The text of the file."""
    drawn = {"title": report.title, "switches": report.switches, "figures": list(map(asdict, report.figures))}
    data = strict_json(drawn, digits=DIGITS)
    return _PAGE.format(
        title=escape(f"{report.title}: {report.headline}"),
        css=(_HERE / "page.css").read_text(encoding="utf-8"),
        body="\n".join(_body(report, _Text(report.terms))),
        data=data.replace("<", "\\u003c"),
        js=(_HERE / "page.js").read_text(encoding="utf-8"),
    )


class _Text:
    """Text as HTML: what stands between backticks is code, and a term explains itself where a section first uses it."""

    def __init__(self, terms: Mapping[str, str]):
        self._seen: set[str] = set()
        self._terms = {term.lower(): (term, told) for term, told in terms.items()}
        names = "|".join(map(re.escape, sorted(terms, key=len, reverse=True)))
        self._pattern = re.compile(rf"(?<![\w-])({names})(s?)(?![\w-])", re.IGNORECASE) if terms else None

    def __call__(self, text: str) -> str:
        """A paragraph."""
        parts = text.replace("+-", "\N{PLUS-MINUS SIGN}").split("`")
        return "".join(_code(part) if place % 2 else self._explained(part) for place, part in enumerate(parts))

    def _explained(self, text: str) -> str:
        if not self._pattern:
            return escape(text)
        told, end = [], 0
        for found in self._pattern.finditer(text):
            term, meaning = self._terms[found[1].lower()]
            if term not in self._seen and (found[1] == term or not term.isupper()):
                self._seen.add(term)
                link = f'<a class="term" href="#{_anchor(term)}" title="{escape(meaning)}">{escape(found[0])}</a>'
                told += [escape(text[end : found.start()]), link]
                end = found.end()
        return "".join([*told, escape(text[end:])])


def _code(text: str) -> str:
    """Words in spans of their own, so that a line does not break at the hyphens of a flag."""
    return f"<code>{' '.join(f'<span>{escape(word)}</span>' for word in text.split(' '))}</code>"


def _anchor(term: str) -> str:
    return "term-" + term.lower().replace(" ", "-")


def _body(report: Report, text: _Text) -> Iterator[str]:
    color = report.verdict if report.headline == report.verdict else "WARN"
    yield f'<h1>{escape(report.title)} <span class="verdict {color}">{escape(report.headline)}</span></h1>'
    yield '<div class="top">\n<main>'
    yield from (f'<p class="lead">{text(line)}</p>' for line in report.answer[:1])
    yield from (f"<p>{text(line)}</p>" for line in report.answer[1:])
    if report.rates:
        yield from _table(report.rates, text)
    yield f"<p><strong>{text(report.meaning)}</strong></p>" if report.meaning else ""
    yield f"<ul>{''.join(f'<li>{text(reason)}</li>' for reason in report.reasons)}</ul>"
    yield "</main>"
    if report.terms:
        words = (
            f'<dt id="{_anchor(term)}">{escape(term)}</dt><dd>{escape(told)}</dd>'
            for term, told in report.terms.items()
        )
        yield f"<aside><details open><summary>Words used here</summary><dl>{''.join(words)}</dl></details></aside>"
    yield "</div>"
    if report.facts:
        text = _Text(report.terms)
        rows = (f"<dt>{escape(name)}</dt><dd>{text(value)}</dd>" for name, value in report.facts)
        yield f'<div><h2>What was trained</h2><dl class="facts">{"".join(rows)}</dl>{_guide(report)}</div>'
    yield "<nav></nav>\n<noscript>Figures need JavaScript. They are also pictures next to this page.</noscript>"
    for section in report.sections:
        yield from _section(section, _Text(report.terms))


def _guide(report: Report) -> str:
    name = "docs/transfer.md"
    place = f'<a href="{escape(report.guide)}">{name}</a>' if report.guide else f"<code>{name}</code> of a checkout"
    return f"<p>How all this is measured, and when not to trust it: {place}.</p>"


def _section(section: Section, text: _Text) -> Iterator[str]:
    yield f"<section><h2>{escape(section.title)}</h2>"
    yield from (f"<p>{text(paragraph)}</p>" for paragraph in section.text)
    for figure in section.figures:
        yield f'<figure id="{escape(figure.name)}"><figcaption>{text(figure.caption)}</figcaption></figure>'
    for table in section.tables:
        yield from _table(table, text)
    yield "</section>"


def _table(table: Table, text: _Text) -> Iterator[str]:
    folded = len(table.rows) > LONG
    if folded:
        yield f"<details><summary>{len(table.rows)} rows: {escape(', '.join(table.header))}</summary>"
    head = "".join(f'<th scope="col">{text(title)}</th>' for title in table.header)
    rows = "".join(f"<tr>{''.join(map(_cell, row))}</tr>" for row in table.rows)
    label = escape(", ".join(table.header))
    yield f'<div class="table" tabindex="0" role="region" aria-label="{label}"><table>'
    yield f"<caption>{text(table.title)}</caption>" if table.title else ""
    yield f"<thead><tr>{head}</tr></thead>"
    yield f"<tbody>{rows}</tbody></table></div>" + "</details>" * folded


def _cell(cell: str) -> str:
    """A cell; a short one stays on one line, since a table may be wider than its page, and scrolls."""
    word = cell.split(" ")[0]
    names = ("short" if len(cell) <= SHORT else "long") + f" {word}" * (word in VERDICTS)
    return f'<td class="{names}">{escape(cell)}</td>'
