"""The words that CONTRIBUTING.md asks not to write, looked for wherever users read."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

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
NAME = re.compile(r"--[\w-]+|\b[\w.]*[_./][\w./]*\b")  # flags, identifiers and paths keep their names


def wrong_words(text: str) -> list[str]:
    """The words of `text` that users should not read, each with what surrounds it."""
    text = NAME.sub("", text)
    return [" ".join(text[max(0, hit.start() - 30) : hit.end() + 20].split()) for hit in WRONG.finditer(text)]


@pytest.mark.parametrize("page", [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))], ids=lambda p: p.name)
def test_pages_use_the_words_of_the_field(page):
    assert not wrong_words(CODE.sub("", page.read_text())), page
