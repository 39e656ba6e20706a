"""The documentation site: every page has a place, and the citation its version. `make docs` checks links and docstrings."""

import re
from pathlib import Path

import pytest

import speedrun_mup

ROOT = Path(__file__).parent.parent
INDEX = ROOT / "docs" / "index.md"
FOLDERS = (".", "reference", "tutorials")
PAGES = sorted(path for folder in FOLDERS for path in (ROOT / "docs" / folder).glob("*.md") if path != INDEX)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_page_has_a_place_in_the_site(page):
    entries = re.findall(r"^[\w./-]+$", INDEX.read_text(), re.MULTILINE)
    assert str(page.relative_to(INDEX.parent).with_suffix("")) in entries


def test_the_citation_names_this_version():
    (version,) = re.findall(r"^version: (.+)$", (ROOT / "CITATION.cff").read_text(), re.MULTILINE)
    assert version == speedrun_mup.__version__
