"""The loss of a run: a pattern for what its command printed, of which the last match counts, or a name in a file."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from speedrun_mup.core.errors import ConfigError, UserError
from speedrun_mup.files import printable

MOST_BYTES = 2 * 2**30  # of a log that is read
MOST_POINTS = 2000  # of a curve that is kept
LONGEST = 10_000  # characters of a line that are looked at
_NUMBER = r"[-+]?(?:(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?|nan|NaN|NAN|inf(?:inity)?|Inf(?:inity)?|INF)"
_ESCAPES = re.compile(r"\x1b\[[0-9;?]*[ -/]*[@-~]")
_PLACEHOLDER = re.compile(r"\{([A-Za-z_]\w*)\}")
_KINDS = {"loss": rf"(?P<loss>{_NUMBER})", "step": r"(?P<step>\d+)"}


class NoMetric(UserError):
    """A command ended and its loss is nowhere."""


@dataclass
class Curve:
    """What a run printed of its loss: steps that grow, and the loss at each."""

    steps: list[int] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)

    @staticmethod
    def of(points: Iterable[tuple[int, float]]) -> Curve:
        """Of pairs in any order: of a step that comes twice the later one counts; of very many, some are left out."""
        last = dict(points)
        steps = sorted(last)
        every = max(1, math.ceil(len(steps) / MOST_POINTS))
        kept = sorted({*steps[::every], *steps[-1:]})
        return Curve(kept, [last[step] for step in kept])


@dataclass(frozen=True)
class Metric:
    """Where the loss of a run is.

    Args:
        pattern: A regular expression with {loss}, and {step} if the lines have one, for the lines of a command's output or of
            a text file; braces around another name are refused, {3} and {2,5} are repetitions. Or, without braces, the name
            of the loss in `file`.
        file: What the command writes, with placeholders: a text file for a pattern, else a file or folder for
            `files.read_logged`. None: its output.
    """

    pattern: str
    file: str | None = None

    def __post_init__(self) -> None:
        if self.is_name:
            if "{" in self.pattern.replace("{{", ""):
                raise ConfigError(f"--metric {printable(self.pattern, 100)}: write {{loss}} once where it stands")
            return
        names = _PLACEHOLDER.findall(self.pattern)
        if unknown := [name for name in names if name not in _KINDS]:
            raise ConfigError(
                f"--metric: {{{unknown[0]}}} is unknown; there are {{loss}}, and {{step}} where lines have one"
            )
        if names.count("loss") != 1 or names.count("step") > 1:
            such = "such as 'step {step}: .* val loss {loss}', or name its file with --metric-file"
            raise ConfigError(f"--metric {printable(self.pattern, 100)}: write {{loss}} once where it stands, {such}")
        try:
            found = self.expression.search("")
        except re.error as fault:
            raise ConfigError(f"--metric {printable(self.pattern, 100)}: no regular expression ({fault})") from None
        if found:
            raise ConfigError(f"--metric {printable(self.pattern, 100)}: it matches nothing at all")

    @property
    def is_name(self) -> bool:
        """Whether it is a name in a file, not a pattern."""
        return self.file is not None and "{loss}" not in self.pattern

    @cached_property
    def expression(self) -> re.Pattern[str]:
        """What is searched for in a line."""
        return re.compile(_PLACEHOLDER.sub(lambda found: _KINDS[found[1]], self.pattern))

    def read(self, log: Path) -> tuple[float, Curve]:
        """The last loss in a text, nan and inf included, and all of them.

        Raises:
            NoMetric: Nothing matches.
        """
        found: list[tuple[int, float]] = []
        with open(log, encoding="utf-8", errors="replace", newline=None) as file:
            for line in file.read(MOST_BYTES).splitlines():
                for match in self.expression.finditer(_ESCAPES.sub("", line[:LONGEST])):
                    step = match["step"] if "step" in match.re.groupindex else len(found)
                    found.append((int(step), float(match["loss"])))
        if not found:
            where = printable(log) if self.file is not None else "its output"
            raise NoMetric(f"no line of {where} matches --metric {self.pattern!r}")
        return found[-1][1], Curve.of(found)
