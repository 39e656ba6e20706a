"""The `speedrun-mup` command: finds the command's module and runs it. Heavy imports wait until flags are known to be right."""

from __future__ import annotations

import importlib
import os
import signal
import sys
from collections.abc import Sequence

from speedrun_mup import __version__
from speedrun_mup.core.errors import ConfigError, UserError
from speedrun_mup.files import printable
from speedrun_mup.terminal import guarded

COMMANDS = {  # the command's module in `commands` has the same name, and a function run(argv) -> exit code
    "demo": "end-to-end demo: minutes, offline, on a CPU",
    "train": "train a model",
    "data": "prepare text for training: FineWeb, or your own files; inspect a folder of shards",
    "sample": "write text with a trained model, from a prompt or line by line",
    "eval": "how well a trained model predicts text: loss, perplexity, bits per byte",
    "export": "write a trained model in another program's format",
    "import": "make a run of a .pt file of modded-nanogpt's",
    "doctor": "check the environment or a run folder and suggest fixes",
    "bench": "what a training step costs here: time by phase, tokens/s, MFU, memory, and the device's ceilings",
    "explain": "effective init, learning rate, eps and weight decay of every parameter",
    "coord-check": "do updates scale with width as muP says? with controls that must fail",
    "plan": "which small runs a big one needs, what they cost, and what they predict",
    "sweep": "the best learning rate at several widths: many small runs, in parallel, resumable",
    "ablate": "which techniques pay, and does the gain survive width? each added and left out, at its best rate",
    "transfer": "does the best learning rate transfer across width? verdict on a sweep, or on your own table",
    "completion": "completion of commands and flags for bash, zsh or fish",
    "report": "page, pictures and summary of a sweep, or of your own table",
}


def usage() -> str:
    """The list of commands."""
    lines = ["usage: speedrun-mup COMMAND [FLAGS]; speedrun-mup help COMMAND for its flags; speedrun-mup --version", ""]
    return "\n".join([*lines, *(f"  {name:<12} {about}" for name, about in COMMANDS.items())])


# What continues, and keeps its exit code, when its output has no reader any more.
RUNS = ("demo", "train", "plan", "sweep", "ablate")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; a UserError becomes one line on stderr and its exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    runs = arguments[:1] != [] and arguments[0] in RUNS
    try:
        with guarded(keep_going=runs) as terminal:
            code = _run(arguments)
    except BrokenPipeError:  # the reader of our output, such as head, has gone
        return 128 + signal.SIGPIPE
    return code or int(terminal.lost and not runs)


def _run(arguments: list[str]) -> int:
    if arguments[:1] == ["help"]:
        arguments = [*arguments[1:2], "--help"]  # as git and pip do
    if not arguments or arguments[0] in ("-h", "--help"):
        print(usage())
        return 0
    if arguments[0] == "--version":
        print(f"speedrun-mup {__version__}")
        return 0
    name, *rest = arguments
    try:
        if name not in COMMANDS:
            from speedrun_mup.synonyms import command_meaning

            raise ConfigError(f"unknown command {name}; {command_meaning(name, COMMANDS)}")
        # OpenMP reads it when torch is loaded. Threads that wait by spinning take the cores from each other's work as soon
        # as anything else runs on the machine.
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
        module = importlib.import_module(f"speedrun_mup.commands.{name.replace('-', '_')}")
        return module.run(rest)
    except UserError as fault:
        print(f"error: {fault}", file=sys.stderr)
        return fault.exit_code
    except OSError as fault:
        if fault.filename is None:
            raise
        # A path that the system takes for impossible, such as a name that is too long, wherever it was first looked at.
        print(f"error: {printable(fault.filename)}: {fault.strerror}; give another path", file=sys.stderr)
        return ConfigError.exit_code
    except KeyboardInterrupt:
        print("error: interrupted", file=sys.stderr)
        return 130
