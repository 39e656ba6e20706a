"""How a setting is declared, once: default, help, valid values, and what it affects. Its flag and its checks follow from that.

Imports no torch, so that `--help` and a misspelt flag answer at once.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import os
import sys
import types
import typing
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from speedrun_mup.flags import Parser

Affects = Literal["result", "speed", "storage", "display"]
OnResume = Literal["fixed", "free", "lasting"]


@dataclass(frozen=True)
class Valid:
    """A condition on a value, and its words after "must be"."""

    text: str
    holds: Callable[[Any], bool]


def at_least(limit: int) -> Valid:
    """value >= limit."""
    return Valid(f"at least {limit}", lambda value: value >= limit)


def at_most(limit: int) -> Valid:
    """value <= limit."""
    shown = f"2^{limit.bit_length() - 1}" if limit > 10_000 else str(limit)
    return Valid(f"at most {shown}", lambda value: value <= limit)


POSITIVE = Valid("positive and finite", lambda value: 0 < value < float("inf"))
NOT_NEGATIVE = Valid("finite and at least 0", lambda value: 0 <= value < float("inf"))
BELOW_ONE = Valid("in [0, 1)", lambda value: 0 <= value < 1)
FRACTION = Valid("in [0, 1]", lambda value: 0 <= value <= 1)


@dataclass(frozen=True)
class Setting:
    """What is known of a setting besides its name, type and default. See `setting`."""

    group: str
    help: str
    affects: Affects
    on_resume: OnResume
    choices: Collection[str]
    shorthand: Mapping[str, str]
    valid: tuple[Valid, ...]
    shown: bool
    fitted: bool

    @property
    def is_result(self) -> bool:
        """Whether another value makes another run: it is part of the hash of a run in a sweep."""
        return self.affects == "result"

    @property
    def must_match(self) -> bool:
        """Whether a run can only be resumed with the value that it began with."""
        return self.is_result and self.on_resume != "free"

    @property
    def lasts(self) -> bool:
        """Whether a run keeps what a resume changed: config.json is told."""
        return self.on_resume == "lasting"


def setting(
    group: str,
    help: str,
    default: Any,
    *,
    affects: Affects,
    on_resume: OnResume | None = None,
    choices: Collection[str] = (),
    shorthand: Mapping[str, str] | None = None,
    valid: Sequence[Valid] = (),
    shown: bool = True,
    fitted: bool = False,
) -> Any:
    """A field of TrainConfig.

    Args:
        group: the part of `--help` that its flag is in, by which commands say what they take.
        help: without the default, which is added.
        default: what it was before there was this setting, so that old runs and hashes stay what they were.
        affects: "result": what a run computes; it must match on resume and is part of a run's hash in a sweep.
            "speed": where and how fast; "storage": where files are and which are kept; "display": what is shown.
        on_resume: "free": a resume may change it although it affects the result; "lasting": a resume may change it, and
            what it changed stays in config.json.
        choices: the values that a text may have; a registry is asked anew each time, so that it may grow.
        shorthand: further flags, each with its value, such as {"--mup": "mup"}.
        valid: conditions on a value that is not None.
        shown: whether `--help` has its flag.
        fitted: whether --fit-memory decides on it.

    Returns:
        The dataclass field.
    """
    usual: OnResume = "fixed" if affects == "result" else "free"
    meta = Setting(
        group, help, affects, on_resume or usual, choices, dict(shorthand or {}), tuple(valid), shown, fitted
    )
    return dataclasses.field(default=default, metadata={"setting": meta})


@dataclass(frozen=True)
class Former:
    """A flag, or name in a config.json, of the edition before.

    Attributes:
        setting: what it is called now; a flag that has no successor keeps its setting's name.
        values: what its values are now, if they were others.
    """

    setting: str
    values: Mapping[Any, Any] | None = None


@functools.cache
def settings_of(kind: Any) -> dict[str, Setting]:
    """The settings that the dataclass `kind` declares, by name. TypeError for a field that is not made by `setting`."""
    bare = [field.name for field in dataclasses.fields(kind) if "setting" not in field.metadata]
    if bare:
        raise TypeError(f"{kind.__name__}.{bare[0]}: declare it with setting(..., affects=...)")
    return {field.name: field.metadata["setting"] for field in dataclasses.fields(kind)}


def problems(values: Any) -> list[str]:
    """What is wrong with the values of a dataclass of settings, each by itself, in words."""
    found = []
    for name, meta in settings_of(values.__class__).items():
        value = getattr(values, name)
        if meta.choices and value is not None and value not in meta.choices:
            found.append(f"{name}={value!r} is not one of {', '.join(meta.choices)}")
        if value is not None:
            found += [f"{name}={value} must be {valid.text}" for valid in meta.valid if not valid.holds(value)]
    return found


def flag_of(name: str) -> str:
    """base_width -> --base-width."""
    return "--" + name.replace("_", "-")


@functools.cache
def value_types(kind: type) -> dict[str, tuple[type, bool]]:
    """The type of each setting, and whether it may be None."""
    return {
        name: (next(one for one in typing.get_args(hint) if one is not types.NoneType), True)
        if isinstance(hint, types.UnionType)
        else (hint, False)
        for name, hint in typing.get_type_hints(kind).items()
    }


def add_flags(
    parser: Parser, kind: type, names: Iterable[str], shown: Mapping[str, str], former: Mapping[str, Former]
) -> None:
    """Give `parser` a flag for each of `names`, by group. A flag that is not given leaves no trace in the namespace.

    Args:
        parser: told the flags of the other settings of `kind`, which have no effect in this command.
        kind: a dataclass of settings.
        names: of the settings that the command takes.
        shown: the default of each in words, for `--help`.
        former: flags of the edition before, which work with a note.
    """
    groups: dict[str, Any] = {}
    taken = set(names)
    for name, entry in former.items():
        if entry.setting in taken:
            _add_former_flag(parser, name, entry, value_types(kind)[entry.setting][0])
        else:
            parser.elsewhere.add(flag_of(name))
    for name, meta in settings_of(kind).items():
        if name not in taken:
            parser.elsewhere |= {flag_of(name), *meta.shorthand}
            continue
        if name in former:
            continue
        if meta.group not in groups:
            groups[meta.group] = parser.add_argument_group(meta.group)
        text = meta.help if "(default" in meta.help else f"{meta.help} ({shown[name]})"
        text = text.replace("%", "%%") if meta.shown else argparse.SUPPRESS
        _add_flag(groups[meta.group], name, meta, value_types(kind)[name][0], text)


def _add_flag(group: Any, name: str, meta: Setting, kind: type, text: str) -> None:
    options: dict[str, Any] = {"dest": name, "default": argparse.SUPPRESS}
    if meta.shorthand:
        group = group.add_mutually_exclusive_group()
    if kind is bool:
        group.add_argument(flag_of(name), action=argparse.BooleanOptionalAction, help=text, **options)
    else:
        values: dict[str, Any] = {"type": kind, "metavar": kind.__name__.upper()}
        group.add_argument(
            flag_of(name), help=text, **options, **({"choices": meta.choices} if meta.choices else values)
        )
    for flag, value in meta.shorthand.items():
        group.add_argument(flag, action="store_const", const=value, help=f"= {flag_of(name)} {value}", **options)


class _Noted(argparse.Action):
    """Stores a value as it is called now, and says so on stderr."""

    instead, now = "", dict[Any, Any]()

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        if os.environ.get("RANK", "0") == "0":
            print(f"note: {option_string} works for one more release; {self.instead}", file=sys.stderr)
        if self.nargs == 0:
            values = not str(option_string).startswith("--no-")
        setattr(namespace, self.dest, self.now.get(values, values))


def _add_former_flag(parser: Parser, name: str, entry: Former, kind: type) -> None:
    options: dict[str, Any] = {"type": kind}
    flags = [flag_of(name)]
    if entry.values:
        options = {"choices": tuple(entry.values)}
    elif kind is bool:
        options, flags = {"nargs": 0}, [*flags, flag_of(f"no_{name}")]
    quiet: dict[str, Any] = {"default": argparse.SUPPRESS, "help": argparse.SUPPRESS}
    action: Any = parser.add_argument(*flags, action=_Noted, dest=entry.setting, **quiet, **options)
    renamed = name != entry.setting
    action.instead = f"it is now {flag_of(entry.setting)}" if renamed else f"set {name} from Python"
    action.now = entry.values or {}
