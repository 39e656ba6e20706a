"""Pictures of finished runs."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from speedrun_mup.pictures import picture, plain
from speedrun_mup.report.contents import ARM_COLORS
from speedrun_mup.training.tracking import read_metrics

DARK = ARM_COLORS[-1][0]


def plot_loss_curve(folders: Sequence[Path], out: Path) -> Path:
    """Draw training and validation loss of the runs in `folders` against tokens, as a PNG. Returns `out`.

    Raises:
        ConfigError: for metrics that cannot be read.
        PictureError: for a picture that cannot be drawn or written.
    """
    with picture(out, (7, 4.2)) as figure:
        from matplotlib.ticker import EngFormatter

        axes = figure.subplots()
        for number, folder in enumerate(folders):
            _plot_run(axes, read_metrics(folder), ARM_COLORS[number % len(ARM_COLORS)][0])
            axes.set_title(plain(folder.name), fontsize=9)
        axes.set(xlabel="tokens", ylabel="loss (nats per token)")
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes.legend()
    return out


def _plot_run(axes: Any, records: Sequence[dict[str, Any]], colour: str) -> None:
    records = [record for record in records if record["loss"] is not None]  # null: was not finite
    train = [record for record in records if record["kind"] == "train"]
    tokens_at = {0: 0} | {record["step"] + 1: record["tokens"] for record in train}
    val = [record for record in records if record["kind"] == "val" and record["step"] in tokens_at]
    tokens, losses = [record["tokens"] for record in train], [record["loss"] for record in train]
    axes.plot(tokens, losses, color=colour, alpha=0.25, linewidth=0.8)
    axes.plot(tokens, smooth(losses), color=colour, linewidth=1.5, label="train (smoothed)")
    places = [tokens_at[record["step"]] for record in val]
    axes.plot(places, [record["loss"] for record in val], "D", color=DARK, markersize=5, label="validation")
    for place, record in zip(places[-1:], val[-1:]):
        near = {"textcoords": "offset points", "xytext": (-4, 9), "ha": "right", "bbox": {"color": "white", "pad": 1}}
        axes.annotate(f"{record['loss']:.3f}", (place, record["loss"]), **near)


def smooth(values: Sequence[float] | NDArray[np.float64]) -> list[float]:
    """Means over windows about each value: an eighth of what came before to either side, so that the steep start is kept."""
    sums, last = [0.0, *itertools.accumulate(values)], len(values)
    windows = ((at - at // 8, min(at + at // 8 + 1, last)) for at in range(last))
    return [(sums[end] - sums[start]) / (end - start) for start, end in windows]
