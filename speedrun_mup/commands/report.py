"""`speedrun-mup report`."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from speedrun_mup.commands.transfer import add_source, measure
from speedrun_mup.flags import new_parser, parse

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
        help="for the files; default: report in a sweep's folder, NAME-report beside a table",
    )
    arguments = parse(parser, argv)

    from speedrun_mup.report.sections import make_report
    from speedrun_mup.report.write import write_report

    result = measure(arguments)
    source = arguments.source
    beside = source / "report" if source.is_dir() else source.with_name(f"{source.stem}-report")
    out = arguments.out or beside
    command = ["speedrun-mup", "report", *argv]
    report = make_report(source, result, arguments.coord_check, arguments.target, command, _guide(out))
    page, text, *pictures = write_report(report, out)
    for line in report.answer:
        print(line.replace("`", ""))
    print(f"verdict: {result.verdict}")
    for reason in result.reasons:
        print(f"- {reason}")
    for picture in pictures:
        print(f"picture  {picture}")
    print(f"summary  {text}")
    print(f"page     {page}, for any browser: {page.resolve().as_uri()}")
    return 0


def _guide(out: Path) -> str | None:
    """The documentation as seen from `out`, if both lie in one checkout, so that the link holds wherever that goes."""
    checkout = Path(__file__).resolve().parents[2]
    guide, folder = checkout / GUIDE, out.resolve()
    return os.path.relpath(guide, folder) if guide.exists() and folder.is_relative_to(checkout) else None
