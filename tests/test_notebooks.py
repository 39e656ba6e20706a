"""The notebooks of the tutorials: current, and what a notebook has to be."""

import json
import re

import pytest

from scripts.notebooks import PAGES, notebook

EVERY = sorted(PAGES.glob("*.md"))


@pytest.mark.parametrize("page", EVERY, ids=lambda page: page.stem)
def test_a_notebook_is_that_of_its_page(page):
    made = page.with_suffix(".ipynb")
    assert made.read_text() == notebook(page.read_text()), "run python scripts/notebooks.py"


def test_there_are_five_and_none_without_a_page():
    assert len(EVERY) == 5 and {path.stem for path in PAGES.glob("*.ipynb")} == {page.stem for page in EVERY}


def test_text_commands_and_files_become_cells_in_their_order():
    page = "# A\n\n<!-- not run: pip install: a reason -->\n```\npip install x\n```\n\n```python\n# a.py\nprint(1)\n```\nEnd.\n"
    made = json.loads(notebook(page))
    assert [cell["cell_type"] for cell in made["cells"]] == ["markdown", "code", "code", "markdown"]
    sources = ["".join(cell["source"]) for cell in made["cells"]]
    assert sources == ["# A", "%%bash\npip install x", "%%writefile a.py\nprint(1)", "End."]
    assert all(re.fullmatch(r"[\w-]{1,64}", cell["id"]) for cell in made["cells"])
    assert made["nbformat"] == 4 and made["nbformat_minor"] >= 5 and made["cells"][1]["outputs"] == []


@pytest.mark.parametrize("page", EVERY, ids=lambda page: page.stem)
def test_every_block_of_a_page_is_in_its_notebook(page):
    code = [cell for cell in json.loads(notebook(page.read_text()))["cells"] if cell["cell_type"] == "code"]
    assert len(code) == page.read_text().count("\n```") // 2 > 0
