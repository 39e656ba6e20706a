"""Flags that are made from settings, for the commands that take them."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Collection
from typing import Any

from speedrun_mup.config import GROUPS, defaults, settings, types
from speedrun_mup.editions import FORMER, Former
from speedrun_mup.flags import Parser
from speedrun_mup.presets import PRESETS
from speedrun_mup.settings import Setting, flag_of

_TRAINING = "model techniques batch training optimizer momentum schedule data device"
TRAINING = tuple(_TRAINING.split())  # the groups of flags that a command takes which trains, at widths of its own
NOT_SHOWN = {  # flags of a group of parameters that `--help` does not list, by the group of flags that they are in
    "optimizer": "--GROUP-optimizer, --GROUP-weight-decay and --GROUP-eps",
    "momentum": "--GROUP-beta1 and --GROUP-beta2",
}


def add_settings(parser: Parser, groups: Collection[str] = (), plus: Collection[str] = ()) -> None:
    """Give `parser` one flag per setting that its command takes. A flag that is not given leaves no trace.

    Args:
        parser: the command's; it gets the flags of the other settings, which have no effect in this command.
        groups: taken as a whole, of GROUPS.
        plus: names of single settings.
    """
    unknown = {*groups} - {*GROUPS} | {*plus} - {*settings()}
    if unknown:
        raise ValueError(f"no such settings: {', '.join(sorted(unknown))}")
    taken = [name for name, meta in settings().items() if meta.group in groups or name in plus]
    for name, former in FORMER.items():
        if former.setting in taken:
            _add_former_flag(parser, name, former, types()[former.setting][0])
        else:
            parser.elsewhere.add(flag_of(name))
    usual, sections = defaults(), dict[str, Any]()
    for name, meta in settings().items():
        if name not in taken:
            parser.elsewhere |= {flag_of(name), *meta.shorthand}
        elif name not in FORMER:
            if meta.group not in sections:
                sections[meta.group] = parser.add_argument_group(meta.group, _about(meta.group))
            _add_flag(sections[meta.group], name, meta, types()[name][0], _help(name, meta, usual[name]))


def _about(group: str) -> str | None:
    """What `--help` says about a group of flags."""
    parameters = dict.fromkeys(meta.param_groups[0] for meta in settings().values() if meta.param_groups)
    also = NOT_SHOWN.get(group)
    return also and f"for one group of parameters ({', '.join(parameters)}): also {also}"


def _help(name: str, meta: Setting, usual: Any) -> str:
    """The help text, with the default of each preset."""
    if not meta.shown:
        return argparse.SUPPRESS
    values = {preset: str(recipe.settings.get(name, usual)) for preset, recipe in PRESETS.items()}
    same = len(set(values.values())) == 1
    shown = str(usual) if same else ", ".join(f"{preset}: {value}" for preset, value in values.items())
    return (meta.help if "(default" in meta.help else f"{meta.help} ({shown})").replace("%", "%%")


def add_preset(parser: argparse.ArgumentParser) -> None:
    """The --preset flag."""
    about = "; ".join(f"{name}: {preset.about}" for name, preset in PRESETS.items())
    parser.add_argument(
        "--preset", choices=("auto", *PRESETS), default="auto", help=f"auto is record26 on CUDA, else laptop. {about}"
    )


def _add_flag(group: Any, name: str, meta: Setting, kind: type, text: str) -> None:
    options: dict[str, Any] = {"dest": name, "default": argparse.SUPPRESS}
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


def add_renamed_flag(parser: argparse.ArgumentParser, former: str, flag: str) -> None:
    """A flag of the edition before, which takes a word and works for one more release with a note."""
    quiet: dict[str, Any] = {"default": argparse.SUPPRESS, "help": argparse.SUPPRESS}
    action: Any = parser.add_argument(former, action=_Noted, dest=flag.strip("-").replace("-", "_"), **quiet)
    action.instead = f"it is now {flag}"


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
