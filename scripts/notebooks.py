"""Write the tutorials as notebooks, docs/tutorials/NAME.ipynb, from their pages: python scripts/notebooks.py."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

PAGES = Path(__file__).parent.parent / "docs" / "tutorials"
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```\n?", re.MULTILINE | re.DOTALL)
MARK = re.compile(r"^<!-- not run: .*? -->\n", re.MULTILINE)
KERNEL = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}


def cell(kind: str, text: str, number: int) -> dict[str, Any]:
    """One cell of a notebook, without outputs.

    Args:
        kind: "markdown" or "code".
        text: what is in it.
        number: its place, of which its id is made.
    """
    made = {"cell_type": kind, "id": f"part-{number}", "metadata": {}, "source": text.strip("\n").splitlines(True)}
    return made | ({"execution_count": None, "outputs": []} if kind == "code" else {})


def source_of(language: str, block: str) -> str:
    """What a block of a page is in a notebook: a file to save, or commands of the shell."""
    if saved := re.match(r"# (\w+\.py)\n", block):
        return f"%%writefile {saved[1]}\n{block[saved.end() :]}"
    return block if language == "python" else f"%%bash\n{block}"


def notebook(page: str) -> str:
    """The notebook of a page, as JSON: its text and its blocks, one after the other."""
    parts, end = [], 0
    page = MARK.sub("", page)
    for block in BLOCK.finditer(page):
        parts += [("markdown", page[end : block.start()]), ("code", source_of(block[1], block[2]))]
        end = block.end()
    parts.append(("markdown", page[end:]))
    cells = [cell(kind, text, number) for number, (kind, text) in enumerate(parts) if text.strip()]
    return json.dumps({"cells": cells, "metadata": KERNEL, "nbformat": 4, "nbformat_minor": 5}, indent=1) + "\n"


def main() -> None:
    """Write all of them."""
    for page in sorted(PAGES.glob("*.md")):
        page.with_suffix(".ipynb").write_text(notebook(page.read_text()))


if __name__ == "__main__":
    main()
