"""`speedrun-mup doctor`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from speedrun_mup.commands.train import config_from_flags, train_parser
from speedrun_mup.core.errors import ConfigError
from speedrun_mup.files import printable
from speedrun_mup.flags import parse


def run(argv: Sequence[str]) -> int:
    """Check what a run with these flags would find here, or a run's folder, and say what to fix. 1: something is."""
    parser = train_parser("speedrun-mup doctor", run.__doc__ or "")
    parser.add_argument("folder", nargs="?", metavar="RUN", help="a run's folder, as --resume")
    flags = vars(parse(parser, argv))
    if folder := flags.pop("folder"):
        if "resume" in flags:
            raise ConfigError(f"--resume {flags['resume']} and {folder} are two runs; leave out one of them")
        flags["resume"] = folder
    cfg = config_from_flags(flags)

    from speedrun_mup.doctor import Level, examine

    bad = False
    for finding in examine(cfg, Path(cfg.resume) if cfg.resume else None):
        print(
            f"{finding.level.value:<5}{finding.subject:<12}{printable(finding.text, 1000)}", flush=True
        )  # the next may take a while
        if finding.fix:
            print(f"{'':<17}-> {printable(finding.fix, 1000)}")
        bad |= finding.level is Level.BAD
    return int(bad)
