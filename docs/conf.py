"""The documentation site: Sphinx reads the Markdown pages where they are. `make docs` builds it, strict and offline."""

import contextlib
import io
import re
import sys
from pathlib import Path
from typing import Any

from docutils import nodes
from docutils.parsers.rst import Directive

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from speedrun_mup import __version__  # noqa: E402
from speedrun_mup.cli import COMMANDS, main  # noqa: E402

project = "speedrun-mup"
author = "the speedrun-mup authors"
release = __version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
# The pages link to each other, to results and to source files as a reader of the repository sees them; so the root of the
# documentation is the root of the repository.
root_doc = "docs/index"
include_patterns = ["docs/**", "CONTRIBUTING.md", "benchmarks/results/*.md"]
source_suffix = {".md": "markdown"}

myst_heading_anchors = 3
myst_enable_extensions = ["dollarmath"]
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_preserve_defaults = True

html_theme = "furo"
html_title = "speedrun-mup"
html_static_path = ["static"]
html_css_files = ["site.css"]
html_show_sourcelink = False
html_copy_source = False


class CommandHelp(Directive):
    """`{command-help}`: one section for every command, with what its --help prints."""

    def run(self) -> list[Any]:
        """The sections."""
        return [self._section(name, about) for name, about in COMMANDS.items()]

    def _section(self, name: str, about: str) -> Any:
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit):
            main([name, "--help"])
        section = nodes.section(ids=[name], names=[name])
        text = nodes.literal_block(printed.getvalue(), printed.getvalue(), language="text")
        section += [nodes.title(text=name), nodes.paragraph(text=f"{about[0].upper()}{about[1:]}."), text]
        return section


def as_plain_text(app: Any, what: str, name: str, obj: object, options: object, lines: list[str]) -> None:
    """Docstrings are plain text: names end with underscores and stars are stars; a module's is shown as it stands."""
    if what == "module":
        lines[:] = ["::", "", *(f"    {line}" for line in lines), ""]
    else:
        lines[:] = [re.sub(r"(?<=\w)_(?!\w)", r"\\_", line.replace("*", r"\*")) for line in lines]
        lines[:] = [re.sub(r"`+([^`]+)`+", r"``\1``\\ ", line) for line in lines]


def setup(app: Any) -> None:
    """Called by Sphinx."""
    app.add_directive("command-help", CommandHelp)
    app.connect("autodoc-process-docstring", as_plain_text, priority=0)  # before napoleon
