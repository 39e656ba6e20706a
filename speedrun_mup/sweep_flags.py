"""The flags of a sweep of any command, and sweep.toml, which holds flags as a file."""

from __future__ import annotations

import argparse
import tomllib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from speedrun_mup.core.errors import ConfigError
from speedrun_mup.files import printable, read_bytes
from speedrun_mup.flags import several

PROGRAM_FLAGS = (
    "metric",
    "metric_file",
    "set",
    "params",
    "flops",
    "timeout",
    "initial_loss",
    "diverged_exit",
    "shell",
    "keep",
    "dry_run",
)
COMMAND_FLAGS = ("run", "arm", "controls", *PROGRAM_FLAGS)
COMMANDS = "any command, instead of this package's model"  # the group of flags in help texts
ONLY_ARM = "run"  # what the arm of --run is called
_PAIRS = ("set", "arm")  # a flag for each entry: --set NAME=VALUE
_SECONDS = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}


def add_command_flags(parser: argparse.ArgumentParser) -> None:
    """Give `parser` the flags of a sweep whose runs are commands."""
    group = parser.add_argument_group(COMMANDS)
    group.add_argument(
        "--run",
        metavar="COMMAND",
        help="what trains: 'python train.py --n_embd={width} --lr={lr} --seed={seed}'; {NAME} is a size of --axis or "
        "--widths, the hyperparameter, seed, out (a folder of the run's own), or of --set; no shell reads it",
    )
    group.add_argument(
        "--arm", action="append", metavar="NAME=COMMAND", help="the same with a name, to compare several commands"
    )
    group.add_argument(
        "--controls",
        metavar="ARM=DRIFT,...",
        help="arms that are wrong on purpose, with the drift that they must show: sp=-1",
    )
    add_program_flags(group)


def add_program_flags(group: Any) -> None:
    """Give `group` the flags that say what all commands of a sweep or a plan have in common."""
    group.add_argument(
        "--metric",
        metavar="PATTERN",
        help="where its output has the loss: 'step {step}: .* val loss {loss}', a regular expression; the last match counts",
    )
    group.add_argument(
        "--metric-file",
        metavar="PATH",
        help="what it writes below {out}, if the loss is there: CSV, JSONL, TensorBoard, trainer_state.json, or the folder of "
        "one; --metric is then its name, such as val/loss; of a text a pattern",
    )
    group.add_argument(
        "--set",
        action="append",
        metavar="NAME=FORMULA",
        help="value of another placeholder: iterations=500, n_head=width//64; of the hyperparameter where its factor "
        "is 1: lr=0.001",
    )
    group.add_argument(
        "--params", metavar="FORMULA", help="how many parameters: 12*n_layer*width**2; FLOPs are 6*params*tokens"
    )
    group.add_argument("--flops", metavar="FORMULA", help="of a run; else the cost is counted in seconds")
    group.add_argument("--timeout", metavar="TIME", help="kill a run that takes longer, such as 30m")
    group.add_argument(
        "--initial-loss",
        type=float,
        metavar="NATS",
        help="a run that ends at or above it has diverged; else its own first loss",
    )
    group.add_argument(
        "--diverged-exit",
        **several(int),
        default=[],
        metavar="CODE",
        help="exit codes that mean divergence, not failure",
    )
    group.add_argument("--shell", action="store_true", help="have a shell run the commands; values are quoted")
    group.add_argument("--keep", action="store_true", help="keep what runs write to {out}")
    group.add_argument("--dry-run", action="store_true", help="print the commands and start none")


def seconds_of(flag: str, text: str) -> float:
    """A time such as 90s, 30m, 2h or 1d, in seconds. Raises ConfigError."""
    try:
        found = float(text[:-1]) * _SECONDS[text[-1:]]
    except (ValueError, KeyError):
        found = 0.0
    if not 0 < found < float("inf"):
        raise ConfigError(f"--{flag} {printable(text, 40)}: give a time such as 90s, 30m or 2h")
    return found


def pairs_of(flag: str, texts: Sequence[str] | None, such: str) -> dict[str, str]:
    """Name -> text, of a flag that was given as NAME=TEXT, again and again. Raises ConfigError."""
    found: dict[str, str] = {}
    for text in texts or ():
        name, equals, value = text.partition("=")
        name = name.strip()
        if not equals or not name or not value.strip() or name != printable(name, 60):
            raise ConfigError(f"--{flag} {printable(text, 80)}: give {such}")
        if name in found:
            raise ConfigError(f"--{flag} {printable(name, 60)}: it is there twice")
        found[name] = value.strip()
    return found


def with_file(argv: Sequence[str]) -> list[str]:
    """The same arguments, with what a sweep.toml holds in the place of its name, if that comes first.

    Every key is a flag; `set`, `arm`, `axis` and `controls` may be tables. Flags of the command line come after and win.
    """
    if not argv or not argv[0].endswith(".toml"):
        return list(argv)
    path = Path(argv[0])
    try:
        content = tomllib.loads(read_bytes(path).decode())
    except OSError as fault:
        raise ConfigError(f"{printable(path)} cannot be read ({fault.strerror})") from None
    except (ValueError, RecursionError) as fault:
        raise ConfigError(f"{printable(path)} is no TOML: {printable(fault, 100)}") from None
    return [word for key, value in content.items() for word in _words(path, key, value)] + list(argv[1:])


def _words(path: Path, key: str, value: Any) -> Iterator[str]:
    """One entry of a sweep.toml as arguments."""
    flag = "--" + key.replace("_", "-")
    if isinstance(value, dict) and key == "axis":
        for name, sizes in value.items():
            yield f"--axis={name}={','.join(_plain(path, key, size) for size in _listed(sizes))}"
    elif isinstance(value, dict) and key in _PAIRS:
        for name, text in value.items():
            yield f"{flag}={name}={_plain(path, f'{key}.{name}', text)}"
    elif isinstance(value, dict) and key == "controls":
        yield f"{flag}={','.join(f'{name}={_plain(path, key, drift)}' for name, drift in value.items())}"
    elif isinstance(value, bool):
        yield flag if value else f"--no-{key.replace('_', '-')}"
    elif isinstance(value, list) and key in (*_PAIRS, "axis"):
        yield from (f"{flag}={_plain(path, key, text)}" for text in value)
    elif isinstance(value, list):
        yield flag
        yield from (_plain(path, key, part) for part in value)
    else:
        yield f"{flag}={_plain(path, key, value)}"


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _plain(path: Path, key: str, value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        raise ConfigError(f"{printable(path)}: {printable(key, 60)}: give text, a number, or a list of these")
    return str(value)
