"""How every command reads its flags: strictly, in one line per mistake, with numbers, lists and paths as people write them.

Imports nothing heavy, so that `--help` and a misspelt flag answer at once.
"""

from __future__ import annotations

import argparse
import itertools
import os
import re
import typing
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from speedrun_mup.core.errors import ConfigError

LARGEST = 2**53  # whole numbers up to here survive JSON, CSV and float64 in every reader
# Flags that a command has next to those of settings.
_OF_COMMANDS = (
    "--adaptive --arm --arms --axes --axis --batch-tokens --budget --controls --design --diverged-exit "
    "--dry-run --engine --flops --generate --help --hold --hyperparameter --initial-loss --json --keep --knob "
    "--metric --metric-file --octaves --params --preset --priors --profile --run --seeds --set --shell "
    "--smallest --steps --target --techniques --timeout --tokens --values --vocab --widths --workers"
)
OF_COMMANDS = frozenset(flag[2:].replace("-", "_") for flag in _OF_COMMANDS.split())
_UNITS = {"k": 1_000, "K": 1_000, "M": 1_000_000, "B": 1_000_000_000}


def whole_number(text: str) -> int:
    """A whole number as people write it: 1000, 10_000, 1e3, 10k, 2.5M.

    Raises ArgumentTypeError for anything else, and for numbers beyond 2^53.
    """
    from decimal import Decimal

    unit = _UNITS.get(text[-1:], 1)
    try:
        number = Decimal(text[:-1] if unit > 1 else text) * unit
        finite = number.is_finite()
    except ArithmeticError:
        finite = False
    if not finite or (number.adjusted() < 20 and number != int(number)):
        shown = text if len(text) <= 40 else f"{text[:40]}..."
        raise argparse.ArgumentTypeError(
            f"invalid int value: {shown!r}; give a whole number, such as 1000, 10_000, 1e3 or 10k"
        )
    if number.adjusted() >= 20 or abs(number) > LARGEST:
        raise argparse.ArgumentTypeError(f"{number:.3g} is too large; the largest whole number is 2^53")
    return int(number)


def count(text: str) -> int:
    """A whole number that is at least 1, for a flag that says how many."""
    number = whole_number(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"it must be at least 1, not {number}")
    return number


def verbatim(text: str) -> str:
    """Any text, also an empty one, which is no value for other flags."""
    return text


def several(kind: Callable[[str], Any]) -> dict[str, Any]:
    """Options of add_argument for a flag that takes one value or more, apart by spaces or commas: --widths 32,64."""
    read = whole_number if kind is int else kind

    def values(text: str) -> list[Any]:
        return [read(part) for part in text.split(",") if part.strip()]

    values.__name__ = kind.__name__  # argparse names it in its messages
    return {"nargs": "+", "type": values, "action": _Flat}


class _Flat(argparse.Action):
    """Stores a list of lists as one list."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        flat = [value for part in values for value in part]
        if not flat:
            raise argparse.ArgumentError(self, "expected at least one value")
        setattr(namespace, self.dest, flat)


class Parser(argparse.ArgumentParser):
    """See `new_parser`."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.elsewhere: set[str] = set()  # flags of other commands, without effect in this one
        self.stray = "flags begin with --"  # what to do with a word that belongs to no flag
        self.register("type", int, whole_number)
        self._negative_number_matcher = re.compile(r"^-[\d.]")  # -1e-3, -1,0,1 and -5m are values, not flags

    def _get_values(self, action: argparse.Action, words: list[str]) -> Any:
        """The value of an argument. An empty name or path is what an unset variable of a shell leaves."""
        if action.type in (None, str, Path) and any(not word.strip() for word in words):
            raise argparse.ArgumentError(action, "it is empty; give a value, or leave it out if there is a default")
        return super()._get_values(action, words)

    def is_unknown(self, word: str) -> bool:
        """Whether `word` looks like a flag and is none of this command's."""
        value = len(word) < 2 or word[0] != "-" or " " in word or self._negative_number_matcher.match(word)
        return not value and word.split("=")[0] not in self._option_string_actions

    def error(self, message: str) -> typing.NoReturn:
        """Leave with one line instead of the usage text."""
        raise ConfigError(message)


def new_parser(prog: str, description: str) -> Parser:
    """A parser that raises ConfigError, accepts no abbreviations and prints readable help."""
    return Parser(
        prog=prog,
        description=description,
        allow_abbrev=False,
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=34, width=118),
    )


def parse(parser: Parser, argv: Sequence[str]) -> argparse.Namespace:
    """Parse strictly: ConfigError for anything unknown, with the flag that does what was meant. ~ is the home folder."""
    unknown = next(
        (word for word in itertools.takewhile(lambda word: word != "--", argv) if parser.is_unknown(word)), None
    )
    if unknown is None:  # else what it meant matters more than what is missing
        _check_spelled_once(parser, argv)
        arguments, rest = parser.parse_known_args(argv)
        unknown = rest[0] if rest else None
    if unknown is not None:
        shown = repr(unknown) if " " in unknown else unknown
        raise ConfigError(f"unknown argument {shown}{_advice(parser, unknown.split('=')[0])}")
    for name, value in vars(arguments).items():
        setattr(arguments, name, [_at_home(each) for each in value] if isinstance(value, list) else _at_home(value))
    return arguments


def _check_spelled_once(parser: Parser, argv: Sequence[str]) -> None:
    """Raise ConfigError for two flags that set the same thing: an old name and the new one, or --mup and its long form.

    The same flag again is no fault: the last one counts, so that a script can add to a command line.
    """
    spelled: dict[str, str] = {}
    for word in itertools.takewhile(lambda word: word != "--", argv):
        flag = word.split("=")[0]
        if action := parser._option_string_actions.get(flag):
            before = spelled.setdefault(action.dest, flag)
            if before.replace("--no-", "--", 1) != flag.replace("--no-", "--", 1):
                raise ConfigError(f"{before} and {flag} set the same thing; leave out one of them")


def _advice(parser: Parser, asked: str) -> str:
    """What to type instead of `asked`: by its meaning, else by its spelling."""
    flags = [flag for action in parser._actions for flag in action.option_strings]
    spelled = "--" + asked.lstrip("-").lower().replace("_", "-")
    if spelled in flags:
        return f"; did you mean {spelled}?"
    if not asked.startswith("-"):
        return f"; {parser.stray}, see --help"
    from speedrun_mup.synonyms import flag_meaning

    if meaning := flag_meaning(asked, flags):
        return f"; {meaning}"
    elsewhere = "; it is a flag of speedrun-mup train and has no effect here" if spelled in parser.elsewhere else ""
    if not elsewhere and (meaning := flag_meaning(asked)):
        elsewhere = f"; not in this command; elsewhere: {meaning}"
    import difflib

    longer = [flag for flag in flags if len(asked) > 2 and flag.startswith(f"{asked}-")]
    ending = [flag for flag in flags if len(asked) > 2 and flag.endswith(asked[1:])]
    close = difflib.get_close_matches(spelled, flags, n=1, cutoff=0.9 if elsewhere else 0.6)
    near = [*ending, *longer][:3] if longer else close or ending[:3]
    return f"; did you mean {' or '.join(near)}?" if near else elsewhere or "; see --help"


def _at_home(value: Any) -> Any:
    """A path that begins with ~, or a list of them after commas, with the home folder in its place."""
    if not isinstance(value, (str, Path)) or not re.search(r"(^|,)~(?=/|$)", str(value)):
        return value
    home = os.path.expanduser("~")
    if home == "~":
        raise ConfigError(f"{value}: this user has no home folder, so ~ means nothing; write the whole path")
    return type(value)(re.sub(r"(^|,)~(?=/|$)", lambda found: found[1] + home, str(value)))
