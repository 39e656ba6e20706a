"""`speedrun-mup completion`."""

from __future__ import annotations

import contextlib
import io
import re
from collections.abc import Sequence

from speedrun_mup.flags import new_parser, parse

PARTS = {"data": ("text", "fineweb", "inspect")}  # commands of commands
Flags = dict[str, list[str]]  # flag -> the values that it takes, if they are known


def run(argv: Sequence[str]) -> int:
    """Print completion for a shell: commands, flags, and values where a flag has a few."""
    parser = new_parser("speedrun-mup completion", run.__doc__ or "")
    parser.add_argument(
        "shell",
        choices=tuple(SHELLS),
        help='bash: eval "$(speedrun-mup completion bash)"; fish: speedrun-mup completion fish | source',
    )
    print(SHELLS[parse(parser, argv).shell](every_flag()), end="")
    return 0


def every_flag() -> dict[str, Flags]:
    """Command, or command and part -> its flags, as its --help lists them."""
    from speedrun_mup.cli import COMMANDS

    found = {name: flags_of(name) for name in COMMANDS}
    return found | {f"{name} {part}": flags_of(name, part) for name, parts in PARTS.items() for part in parts}


def flags_of(*command: str) -> Flags:
    """The flags that the help of a command lists."""
    from speedrun_mup.cli import main

    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit):
        main([*command, "--help"])
    flags: Flags = {}
    for line in re.findall(r"^  (-.*)", printed.getvalue(), re.MULTILINE):
        for flag, values in re.findall(r"(?<![\w-])(--[\w-]+)(?: \{([^}]*)\})?", line.split("   ")[0]):
            flags[flag] = [value for value in values.split(",") if value]
    return flags


def _bash(commands: dict[str, Flags]) -> str:
    """A function that bash and zsh call; where it offers nothing they offer files."""
    tops = [name for name in commands if " " not in name]
    lines = ["_speedrun_mup() {", "  local cur=${COMP_WORDS[COMP_CWORD]} prev=${COMP_WORDS[COMP_CWORD-1]} words="]
    lines += ["  local command=${COMP_WORDS[1]}", '  case "$command ${COMP_WORDS[2]}" in']
    lines += [f'    "{name}") command="{name}" ;;' for name in commands if " " in name]
    lines += ["  esac", '  if [ "$COMP_CWORD" -eq 1 ]; then', f'    words="{" ".join([*tops, "help"])}"', "  else"]
    lines += ['    case "$command $prev" in']
    for name, flags in commands.items():
        lines += [f'      "{name} {flag}") words="{" ".join(values)}" ;;' for flag, values in flags.items() if values]
    lines += [f'      "help help") words="{" ".join(tops)}" ;;']
    lines += [f'      "{name} {name}") words="{" ".join(parts)}" ;;' for name, parts in PARTS.items()]
    lines += [f'      "completion completion") words="{" ".join(SHELLS)}" ;;', "      *) case $cur in -*)"]
    lines += ['        case "$command" in']
    lines += [f'          "{name}") words="{" ".join(flags)}" ;;' for name, flags in commands.items()]
    lines += ["        esac ;;", "      esac ;;", "    esac", "  fi"]
    lines += ['  COMPREPLY=($(compgen -W "$words" -- "$cur"))', "}"]
    return "\n".join([*lines, "complete -o default -F _speedrun_mup speedrun-mup", ""])


def _zsh(commands: dict[str, Flags]) -> str:
    """The same, by zsh's layer for bash's functions."""
    return f"autoload -U +X compinit bashcompinit\ncompinit\nbashcompinit\n{_bash(commands)}"


def _fish(commands: dict[str, Flags]) -> str:
    """One line for each command and flag."""
    from speedrun_mup.cli import COMMANDS

    first = "complete -c speedrun-mup -n __fish_use_subcommand"
    lines = [f"{first} -f -a {name} -d {_quoted(about)}" for name, about in COMMANDS.items()]
    words = {name: parts for name, parts in PARTS.items()} | {"completion": tuple(SHELLS), "help": tuple(COMMANDS)}
    for name, parts in words.items():
        seen = _quoted(f"__fish_seen_subcommand_from {name}; and not __fish_seen_subcommand_from {' '.join(parts)}")
        lines.append(f"complete -c speedrun-mup -n {seen} -f -a {_quoted(' '.join(parts))}")
    for name, flags in commands.items():
        seen = _quoted("; and ".join(f"__fish_seen_subcommand_from {word}" for word in name.split()))
        for flag, values in flags.items():
            more = f" -x -a {_quoted(' '.join(values))}" if values else ""
            lines.append(f"complete -c speedrun-mup -n {seen} -l {flag[2:]}{more}")
    return "\n".join([*lines, ""])


def _quoted(text: str) -> str:
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"


SHELLS = {"bash": _bash, "zsh": _zsh, "fish": _fish}
