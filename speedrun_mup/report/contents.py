"""What a report says, as data: sections of text, tables and figures. `png`, `page` and `markdown` only draw it.

Figures are in units of the reader (a learning rate, not its logarithm), and everything a renderer draws was computed
before: it picks scales and ticks, and what is visible.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

Values = Sequence[float] | NDArray[np.float64]
Color = tuple[str, str]  # on light and on dark ground
GREY: Color = ("#6b6b6b", "#a0a0a0")
ARM_COLORS: tuple[Color, ...] = (  # after Okabe and Ito: distinguishable for everyone
    ("#0072b2", "#4aa8e0"),
    ("#d55e00", "#f08a3c"),
    ("#009e73", "#2fc99c"),
    ("#cc79a7", "#e0a0c4"),
    ("#b88600", "#e6b422"),
    ("#56b4e9", "#a5d8f5"),
    ("#404040", "#d0d0d0"),
)


@dataclass(frozen=True)
class Mark:
    """One thing in a panel: points (x, y), a line through them, a band from low to high, a rule at x, or crosses.

    A cross stands for a value beyond the panel: at x, so many rows below the top as y says. low, high: of points, error
    bars; of a band, its edges. tags: what a reader can switch off, such as {"arm": "mup"}. name and notes (one for each
    point) are shown to a reader who points there; without a name there is nothing to point at. marked: a line that shows
    its points too, each with the symbol.
    """

    kind: str  # points, line, band, rule, cross
    x: Values
    y: Values = ()
    color: Color = GREY
    name: str = ""
    tags: dict[str, str] = field(default_factory=dict)
    low: Values = ()
    high: Values = ()
    symbol: str = "o"  # o, s (square), D (diamond), ^ and v (triangles)
    size: float = 4.0  # diameter of points, thickness of lines; points of 1/72 inch
    opacity: float = 1.0
    dotted: bool = False
    hollow: bool = False
    marked: bool = False
    notes: Sequence[str] = ()


@dataclass(frozen=True)
class Axis:
    """scale: linear, log (ticks at 1, 2, 5) or log2 (ticks at powers of two). limits: else those of what is visible.

    ticks: values that get a tick, and no others. percent: values are shares of one.
    """

    label: str
    scale: str = "linear"
    limits: tuple[float, float] | None = None
    ticks: Sequence[float] = ()
    percent: bool = False


@dataclass(frozen=True)
class Panel:
    """One pair of axes. tags: as of marks, for the whole panel."""

    title: str
    marks: Sequence[Mark]
    tags: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Key:
    """A line of the legend. kind and the rest as of a Mark."""

    label: str
    kind: str
    color: Color = GREY
    symbol: str = "o"
    dotted: bool = False
    hollow: bool = False
    marked: bool = False


@dataclass(frozen=True)
class Choice:
    """What a page shows one at a time: marks whose tag `tag` is the chosen option, at first the first one.

    A picture shows those that are `printed`, a row of panels each; by default the first alone.
    """

    tag: str
    label: str
    options: Sequence[str]
    printed: Sequence[str] = ()


@dataclass(frozen=True)
class Figure:
    """Panels with common axes. name: of its file. size: of one panel, inches."""

    name: str
    caption: str
    x: Axis
    y: Axis
    panels: Sequence[Panel]
    keys: Sequence[Key] = ()
    choice: Choice | None = None
    size: tuple[float, float] = (2.45, 2.4)


@dataclass(frozen=True)
class Table:
    """Rows of cells below a header, and a sentence above both."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    title: str = ""


@dataclass(frozen=True)
class Section:
    """Text, one paragraph an entry; then figures, then tables."""

    title: str
    text: Sequence[str] = ()
    figures: Sequence[Figure] = ()
    tables: Sequence[Table] = ()


@dataclass(frozen=True)
class Report:
    """The whole.

    Args:
        verdict: One word; `meaning` says it in a sentence, and `reasons` are why.
        switches: Tag -> its values that a reader can switch off.
        answer: What a reader came for, the most important line first.
        rates: The learning rates that the answer's flag stands for.
        facts: What was trained, on what, by what; name and value.
        terms: Word -> its explanation, for the words of the field that the report uses.
        guide: Where the documentation lies as seen from the report's folder, else None.
        controlled: Whether an arm with a wrong rule shows that the measurement would have noticed one.
    """

    title: str
    verdict: str
    reasons: Sequence[str]
    sections: Sequence[Section]
    switches: Mapping[str, Sequence[str]]
    meaning: str = ""
    answer: Sequence[str] = ()
    rates: Table | None = None
    facts: Sequence[tuple[str, str]] = ()
    terms: Mapping[str, str] = field(default_factory=dict)
    guide: str | None = None
    controlled: bool = True

    @property
    def headline(self) -> str:
        """The verdict, and what it lacks."""
        return self.verdict if self.controlled or self.verdict != "PASS" else "PASS (without a control)"

    @property
    def figures(self) -> list[Figure]:
        """All figures, in order."""
        return [figure for section in self.sections for figure in section.figures]
