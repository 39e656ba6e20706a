"""The words that CONTRIBUTING.md asks not to write, looked for wherever users read: README, docs, help, messages."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers.commands import parsers

from speedrun_mup.cli import COMMANDS, usage

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "speedrun_mup"

# What not to write -> what to write instead.
WORDS = {
    r"mend(s|ed|ing)?": "fix",
    r"go(es|ing)? on( with)?|went on": "resume, continue",
    r"for ever": "indefinitely",
    r"anew": "again",
    r"at hand": "available",
    r"bowls?": "quadratic fit, loss curve",
    r"parabolas?": "quadratic fit",
    r"cells?": "run",
    r"knobs?": "hyperparameter",
    r"octaves?": "factor of 2, log2",
    r"dear(er|est)?": "expensive",
    r"8-bit": "FP8",
    r"turn(ed|ing)? about|by turns": "interleaved",
    r"signs? of life": "response",
    r"without a word": "silently",
    r"not seen": "not detected",
    r"says? of|said of": "report",
    r"tells?|told": "report, print, show",
    r"beside|besides": "next to, compared with",
    r"who(so)?ever|nobody|somebody": "name the subject",
    r"in words": "leave it out",
    r"as nearly as": "as closely as",
    r"(dead|killed) (life|lives)|a life": "attempt",
    r"carr(y|ies|ied) (it )?out": "run",
    r"laboratory|physics": "tools, core",
    r"business of": "use ... for that",
    r"ways? to scale": "parametrization",
    r"throw-away": "untimed",
    r"come true|came true": "compare prediction and result",
}
WRONG = re.compile(r"\b(?:" + "|".join(WORDS) + r")\b", re.I)
CODE = re.compile(r"```.*?```|`[^`]*`|^    [^\n]*$|\]\([^)]*\)", re.S | re.M)  # of a page: quoted as it is
NAME = re.compile(r"--[\w-]+|\b\w+=|\b[\w.]*[_./][\w./]*\b")  # flags, identifiers and paths keep their names


def wrong_words(text: str) -> list[str]:
    """The words of `text` that users should not read, each with what surrounds it."""
    text = NAME.sub("", text)
    return [" ".join(text[max(0, hit.start() - 30) : hit.end() + 20].split()) for hit in WRONG.finditer(text)]


DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.glob("*.md")), *sorted(DOCS.glob("tutorials/*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_pages_use_the_words_of_the_field(page):
    assert not wrong_words(CODE.sub("", page.read_text())), page


def literals(path: Path) -> Iterator[tuple[int, str]]:
    """Line and text of every string of a module that a user may read: no docstring, no single word that is not in a message."""
    tree = ast.parse(path.read_text())
    scopes = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    first = [node.body[0] for node in ast.walk(tree) if isinstance(node, scopes) and node.body]
    quiet = {id(node.value) for node in first if isinstance(node, ast.Expr)}
    pieces = {id(piece) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for piece in node.values}
    for node in ast.walk(tree):
        if not isinstance(node, ast.Constant) or not isinstance(node.value, str) or id(node) in quiet:
            continue
        if " " in node.value.strip() or id(node) in pieces:
            yield node.lineno, node.value


def test_messages_use_the_words_of_the_field():
    paths = [
        ROOT / "train.py",
        *(ROOT / "scripts").rglob("*.py"),
        *(ROOT / "benchmarks").glob("*.py"),
        *PACKAGE.rglob("*.py"),
    ]
    found = [(path, line, wrong_words(text)) for path in paths for line, text in literals(path)]
    wrong = [f"{path.relative_to(ROOT)}:{line}: {words}" for path, line, words in found if words]
    assert len(found) > 1000 and not wrong, "\n".join(wrong)


def test_help_uses_the_words_of_the_field(monkeypatch):
    helps = [usage(), *(parser.format_help() for parser in parsers(monkeypatch))]
    assert len(helps) > len(COMMANDS)
    for text in helps:
        assert not wrong_words(text), text[:60]
