"""`speedrun-mup report`."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from speedrun_mup.commands.transfer import add_source, command_for, is_sweep, measure
from speedrun_mup.core.errors import ConfigError
from speedrun_mup.files import own_folder, printable
from speedrun_mup.flags import new_parser, parse

if TYPE_CHECKING:
    from speedrun_mup.report.contents import Report

GUIDE = "docs/transfer.md"


def run(argv: Sequence[str]) -> int:
    """Write a page, pictures and a summary of a sweep, or of a table of yours."""
    parser = new_parser("speedrun-mup report", run.__doc__ or "")
    add_source(parser)
    parser.add_argument(
        "--coord-check", type=Path, nargs="+", default=[], metavar="JSON", help="what speedrun-mup coord-check wrote"
    )
    parser.add_argument("--target", type=Path, metavar="RUN", help="folder of the finished run that was planned")
    parser.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        help="for the files; default: report in a sweep's folder, NAME-report next to a table",
    )
    arguments = parse(parser, argv)

    if arguments.source.is_dir() and _is_joint(arguments.source):
        return _joint(arguments, ["speedrun-mup", "report", *argv])
    from speedrun_mup.report.sections import make_report

    result = measure(arguments)
    source = arguments.source
    beside = source / "report" if is_sweep(source) else source.with_name(f"{source.resolve().stem}-report")
    out = arguments.out or own_output_folder(beside)
    command = ["speedrun-mup", "report", *argv]
    again = command_for(arguments, "--predict", result.axes.size.upper())
    report = make_report(source, result, arguments.coord_check, arguments.target, command, _guide(out), again)
    return _write(report, out, [f"verdict: {result.verdict}", *(f"- {reason}" for reason in result.reasons)])


def _is_joint(folder: Path) -> bool:
    from speedrun_mup.plan import is_joint

    return is_joint(folder)


def _joint(arguments: argparse.Namespace, command: Sequence[str]) -> int:
    """The report on a plan over several sizes. Returns the exit code."""
    from speedrun_mup.plan import compare_joint, read_joint_prediction
    from speedrun_mup.report.several import make_joint_report

    source = arguments.source
    told = read_joint_prediction(source).summary().splitlines()
    told += compare_joint(source, arguments.target).summary().splitlines() if arguments.target else []
    out = arguments.out or own_output_folder(source / "report")
    report = make_joint_report(source, arguments.coord_check, arguments.target, command, _guide(out))
    return _write(report, out, told[2:])


def _write(report: Report, out: Path, more: Sequence[str]) -> int:
    """Write the files, print the answer, `more` and where the files are. Returns the exit code."""
    from speedrun_mup.report.write import write_report

    faults: list[str] = []
    written = write_report(report, out, faults.append)
    for line in (*(line.replace("`", "") for line in report.answer), *more):
        print(line)
    for path in sorted(written, key=lambda path: list(_LABELS).index(path.suffix)):
        browser = f", for any browser: {path.resolve().as_uri()}" if path.suffix == ".html" else ""
        print(f"{_LABELS[path.suffix]:<8} {printable(path)}{browser}")
    if faults:
        more_faults = f" ({len(faults) - 1} more of the files have failed, too)" if len(faults) > 1 else ""
        print(f"error: {faults[0]}{more_faults}", file=sys.stderr)
    return int(bool(faults))


_LABELS = {".png": "picture", ".md": "summary", ".html": "page"}


def own_output_folder(folder: Path) -> Path:
    """Make a folder for output inside one that may be anybody's. ConfigError if a link stands in its place."""
    try:
        own_folder(folder)
    except OSError as fault:
        raise ConfigError(f"{printable(folder)} cannot be written ({fault.strerror}); choose another --out") from None
    return folder


def _guide(out: Path) -> str | None:
    """The documentation as seen from `out`, if both lie in one checkout, so that the link holds wherever that goes."""
    checkout = Path(__file__).resolve().parents[2]
    guide, folder = checkout / GUIDE, out.resolve()
    return os.path.relpath(guide, folder) if guide.exists() and folder.is_relative_to(checkout) else None
