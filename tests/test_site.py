"""The documentation site: every page has a place, and the citation its version. `make docs` checks links and docstrings."""

import inspect
import re
from pathlib import Path

import pytest

import speedrun_mup
from speedrun_mup import functions
from speedrun_mup.core import mup

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


def shown(name: str, thing: object, page: str) -> bool:
    """Whether the reference has the name: by a docstring of its own, or in a table of the page."""
    made_up = inspect.isclass(thing) and (thing.__doc__ or "").startswith(f"{name}(")  # by dataclass
    own = "__doc__" in vars(thing) if inspect.isclass(thing) else inspect.isroutine(thing)
    return bool(own and thing.__doc__ and not made_up) or f"`{name}`" in page


def test_every_public_name_is_in_the_reference():
    page = (ROOT / "docs" / "reference" / "python.md").read_text()
    for library in ("speedrun_mup.core.mup.library", "speedrun_mup.functions"):
        assert f".. automodule:: {library}\n   :members:" in page
    missing = [name for name in dir(mup) if not shown(name, getattr(mup, name), page)]
    missing += [name for name in speedrun_mup._CALLABLE if not shown(name, getattr(functions, name), page)]
    functions_shown = re.findall(r"autofunction:: [\w.]+\.(\w+)", page)
    missing += [name for name in speedrun_mup._HOMES if name not in functions_shown]
    assert not missing, f"give these a docstring, or a line in docs/reference/python.md: {missing}"
    assert not shown("mup_of_nothing", object(), page)
