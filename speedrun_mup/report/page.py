"""A report as one HTML file that needs nothing else: page.js draws what page.css styles, from a block of JSON."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from html import escape
from pathlib import Path
from typing import Any

from speedrun_mup.report.contents import Report

DIGITS = 6  # of a number on the page
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
<noscript>This page draws its figures with JavaScript. The same report is beside it, as report.md and pictures.</noscript>
<script type="application/json" id="report">{data}</script>
<script>
{js}</script>
</body>
</html>
"""


def to_html(report: Report) -> str:
    """The text of the file."""
    data = json.dumps(_plain(asdict(report)), allow_nan=False, separators=(",", ":"))
    return _PAGE.format(
        title=escape(f"{report.title}: {report.verdict}"),
        css=(_HERE / "page.css").read_text(encoding="utf-8"),
        data=data.replace("<", "\\u003c"),
        js=(_HERE / "page.js").read_text(encoding="utf-8"),
    )


def _plain(value: Any) -> Any:
    """The same in what strict JSON has: arrays and tuples as lists, numbers rounded, what is not finite as None."""
    if isinstance(value, dict):
        return {key: _plain(entry) for key, entry in value.items()}
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    if isinstance(value, float):
        return float(f"{value:.{DIGITS}g}") if math.isfinite(value) else None
    return value
