"""`speedrun-mup export`."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

from speedrun_mup.commands.sample import run_parser
from speedrun_mup.core.errors import ConfigError
from speedrun_mup.export import ABOUT, FORMATS, Request
from speedrun_mup.files import printable
from speedrun_mup.flags import parse
from speedrun_mup.settings import flag_of

WITHOUT = {"pt": ("run_data",), "dcp": ("multipliers", "run_data")}  # flags that a format does not read


def run(argv: Sequence[str]) -> int:
    """Write a trained model in another program's format."""
    parser = run_parser("speedrun-mup export", run.__doc__ or "", device=False)
    about = "; ".join(f"{name}: {ABOUT.get(name, 'a format of your own')}" for name in FORMATS)
    parser.add_argument("--to", required=True, choices=tuple(FORMATS), help=about)
    parser.add_argument("out", metavar="OUT", type=Path, help="where to; a new file or folder")
    parser.add_argument(
        "--multipliers",
        choices=("fold", "keep"),
        help="put muP's multipliers into the weights, or keep the weights as they are; fold, but dcp keeps them",
    )
    parser.add_argument("--data", dest="run_data", help=argparse.SUPPRESS)  # its former name
    flags = parse(parser, argv)
    if os.path.lexists(flags.out):
        raise ConfigError(f"{printable(flags.out)} exists; name a new one, or remove it")
    for name in WITHOUT.get(flags.to, ()):
        if getattr(flags, name) is not None:
            raise ConfigError(f"{flag_of(name)} changes nothing with --to {flags.to}; leave it out")
    request = Request(Path(flags.folder), flags.out, flags.step, flags.run_data, flags.multipliers != "keep")
    print(FORMATS[flags.to](request))
    return 0
