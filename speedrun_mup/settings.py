"""How a setting is declared, once: default, help, valid values, and what it affects. Its flag and its checks follow from that.

Imports no torch, so that `--help` and a misspelt flag answer at once.
"""

from __future__ import annotations

import dataclasses
import functools
import keyword
import re
import types
import typing
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, TypeVar

from speedrun_mup.editions import FORMER
from speedrun_mup.flags import OF_COMMANDS

T = TypeVar("T", bound=type)
Affects = Literal["result", "speed", "storage", "display"]
OnResume = Literal["fixed", "free", "lasting"]


class Valid(NamedTuple):
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


class Setting(NamedTuple):
    """What is known of a setting in addition to its name, type and default. See `setting`."""

    group: str
    help: str
    affects: Affects
    on_resume: OnResume
    choices: Collection[str]
    shorthand: Mapping[str, str]
    valid: tuple[Valid, ...]
    shown: bool
    fitted: bool
    param_groups: tuple[str, ...]
    needs: str

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
        """Whether a run keeps what a resume changed: config.json is updated."""
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
    param_groups: tuple[str, ...] = (),
    needs: str = "",
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
        choices: the values that a text may have; a registry is asked again each time, so that it may grow.
        shorthand: further flags, each with its value, such as {"--mup": "mup"}.
        valid: conditions on a value that is not None.
        shown: whether `--help` has its flag.
        fitted: whether --fit-memory decides on it.
        param_groups: the groups of parameters that it is a hyperparameter of; its name begins with the first.
        needs: another setting; where that has its default, this one has no effect.

    Returns:
        The dataclass field.
    """
    usual: OnResume = "fixed" if affects == "result" else "free"
    again = on_resume or usual
    meta = Setting(
        group, help, affects, again, choices, dict(shorthand or {}), tuple(valid), shown, fitted, param_groups, needs
    )
    return dataclasses.field(default=default, metadata={"setting": meta})


def with_settings(config: T, fields: Iterable[tuple[str, Any, Any]]) -> T:
    """Give a class of settings, which is to be a dataclass, more of them: name, type, and what `setting` returned."""
    for name, kind, declared in fields:
        config.__annotations__[name] = kind
        setattr(config, name, declared)
    return config


@functools.cache
def settings_of(kind: Any, order: tuple[str, ...] = ()) -> dict[str, Setting]:
    """The settings that the dataclass `kind` declares, by name; by group where an `order` of groups is given.

    Raises TypeError for a field that is not made by `setting`.
    """
    bare = [field.name for field in dataclasses.fields(kind) if "setting" not in field.metadata]
    if bare:
        raise TypeError(f"{kind.__name__}.{bare[0]}: declare it with setting(..., affects=...)")
    found = {field.name: field.metadata["setting"] for field in dataclasses.fields(kind)}
    return dict(sorted(found.items(), key=lambda item: order.index(item[1].group))) if order else found


def fault_of_new(name: str, declared: Any, kind: Any, groups: Collection[str]) -> str:
    """Why `declared` cannot be added as a setting to the dataclass `kind`, "" if it can. groups: of flags that there are."""
    if not re.fullmatch("[a-z][a-z0-9_]*", name) or keyword.iskeyword(name):
        return "its name must be lower-case letters, digits and _, as that of a variable in Python"
    if name in settings_of(kind):
        return "its name is taken"
    if name in FORMER:
        return "its name is taken, by a setting of an earlier edition"
    if name in OF_COMMANDS or hasattr(kind, name):
        return f"its name is taken, by {'a flag of some commands' if name in OF_COMMANDS else f'cfg.{name}'}"
    meta = getattr(declared, "metadata", {}).get("setting")
    if meta is None:
        return f"{declared!r:.60} is no declaration; give what setting(...) returns"
    return "" if meta.group in groups else f"its group {meta.group!r} is not one of {', '.join(groups)}"


def problems(values: Any) -> list[str]:
    """What is wrong with the values of a dataclass of settings, each by itself, as text."""
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
def value_types(kind: Any) -> dict[str, tuple[type, bool]]:
    """The type of each setting, and whether it may be None."""
    return {
        name: (next(one for one in typing.get_args(hint) if one is not types.NoneType), True)
        if isinstance(hint, types.UnionType)
        else (hint, False)
        for name, hint in typing.get_type_hints(kind).items()
    }
