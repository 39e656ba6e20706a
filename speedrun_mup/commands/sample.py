"""`speedrun-mup sample`."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from speedrun_mup.core.errors import ConfigError
from speedrun_mup.files import SMALL
from speedrun_mup.flags import Parser, count, new_parser, parse, verbatim
from speedrun_mup.sample.sampling import Sampling
from speedrun_mup.settings import flag_of, settings_of

MOST = 10_000  # samples, each with a cache of its own

if TYPE_CHECKING:
    from speedrun_mup.sample.writer import Writer


def run(argv: Sequence[str]) -> int:
    """Write text with a trained model: it continues a prompt, and ends with the document or after --max-new-tokens."""
    parser = run_parser("speedrun-mup sample", run.__doc__ or "")
    parser.stray = "give a prompt as --prompt"
    parser.add_argument(
        "--prompt",
        type=verbatim,
        default="",
        help="what the text begins with; - reads it from standard input (a new document)",
    )
    parser.add_argument("--n", type=count, default=1, help="samples, side by side; %(default)s")
    parser.add_argument(
        "--chat", action="store_true", help="read prompts from the terminal, a line each; the text continues with each"
    )
    group = parser.add_argument_group("sampling")
    for field in dataclasses.fields(Sampling):
        about = f"{settings_of(Sampling)[field.name].help}; %(default)s"
        group.add_argument(flag_of(field.name), type=type(field.default), default=field.default, help=about)
    parser.add_argument("--data", dest="run_data", help=argparse.SUPPRESS)  # its former name
    flags = vars(parse(parser, argv))
    loading = {name: flags.pop(name) for name in ("folder", "step", "device")} | {"data": flags.pop("run_data")}
    prompt, n, chat = (flags.pop(name) for name in ("prompt", "n", "chat"))
    if n > MOST:
        raise ConfigError(
            f"--n {n} is more than one command writes; give at most {MOST:,}, and another --seed for more"
        )
    if chat and (prompt or n > 1):
        raise ConfigError("--chat reads its prompts from the terminal, for one text; leave out --prompt and --n")
    sampling = Sampling(**flags)
    prompt = standard_input() if prompt == "-" else prompt

    from speedrun_mup.training.load import load_run

    writer = load_run(**loading).writer
    if chat:
        for answer in writer.chat(_lines(), sampling):
            show(answer)
            print(flush=True)
    else:
        show(in_turn(writer, prompt, n, sampling))
    return 0


def standard_input() -> str:
    """The text that comes in, to its end, without the line break that ends it."""
    if sys.stdin is None:
        raise ConfigError("--prompt - needs standard input, which is closed")
    text = sys.stdin.read(SMALL + 1)
    if len(text) > SMALL:
        raise ConfigError(
            f"the prompt has more than {SMALL:,} characters; give its end, of which the model sees a window"
        )
    return text.removesuffix("\n")


def run_parser(prog: str, about: str, device: bool = True) -> Parser:
    """The flags of a command that takes a run. device: whether it computes with it."""
    parser = new_parser(prog, about)
    parser.add_argument("folder", metavar="RUN", help="a run's folder, or that of one of its checkpoints")
    parser.add_argument("--checkpoint", dest="step", type=int, metavar="STEP", help="of this step (the newest)")
    parser.add_argument("--run-data", metavar="DIR", help="the corpus that it was trained on, if it has moved")
    if device:
        parser.add_argument("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto", help="%(default)s")
    return parser


def in_turn(writer: Writer, prompt: str, n: int, sampling: Sampling) -> Iterator[str]:
    """`n` samples, each after its prompt: the first as it comes, the others, drawn in parallel, when those before are done."""
    writer.ids_of(prompt)  # raises before any of it is shown
    waiting = ["" if n == 1 else f"{chr(10) * (number > 0)}--- sample {number + 1} ---\n" for number in range(n)]
    waiting = [head + prompt for head in waiting]
    yield waiting[0]
    waiting[0] = ""
    for number, piece in writer.stream([prompt] * n, sampling):
        if number == 0:
            yield piece
        else:
            waiting[number] += piece
    yield from waiting
    yield "\n"


def show(pieces: Iterable[str]) -> None:
    """Print text as it comes."""
    for piece in pieces:
        print(piece, end="", flush=True)  # which a closed stdout, None, is no fault of


def _lines() -> Iterator[str]:
    """The lines that are typed, until Ctrl-D."""
    while True:
        if sys.stdin is None:
            raise ConfigError("--chat needs standard input, which is closed")
        if sys.stdin.isatty():
            show(["> "])
        line = sys.stdin.readline()
        if not line:
            return
        yield line.rstrip("\n")
