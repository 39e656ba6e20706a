"""`speedrun-mup demo`, which is also `make demo`."""

from __future__ import annotations

from collections.abc import Sequence

from speedrun_mup.commands import coord_check, train
from speedrun_mup.config import new_parser, parse

CHECK_WIDTHS = (32, 64, 128, 256)


def run(argv: Sequence[str]) -> int:
    """The main job, small: train the laptop preset, then check that its learning rates hold at other widths."""
    parse(new_parser("speedrun-mup demo", run.__doc__ or ""), argv)
    embedded = ["--data", "embedded"]
    widths = ["--widths", *map(str, CHECK_WIDTHS)]
    return train.run(["--preset", "laptop", *embedded]) or coord_check.run([*embedded, *widths, "--seeds", "1"])
