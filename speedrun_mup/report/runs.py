"""Pictures of finished runs."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path

from speedrun_mup.tracking import read_metrics


def plot_loss_curve(folders: Sequence[Path], out: Path) -> Path:
    """Draw training and validation loss of the runs in `folders` against tokens, as a PNG. Returns `out`."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.2), dpi=150, layout="constrained")
    for number, folder in enumerate(folders):
        records = [r for r in read_metrics(folder) if r["loss"] is not None]  # null: was not finite
        train = [r for r in records if r["kind"] == "train"]
        tokens_at = {0: 0} | {r["step"] + 1: r["tokens"] for r in train}
        val = [r for r in records if r["kind"] == "val" and r["step"] in tokens_at]
        colour = f"C{number}"
        losses = [r["loss"] for r in train]
        axes.plot([r["tokens"] for r in train], losses, color=colour, alpha=0.25, linewidth=0.8)
        axes.plot([r["tokens"] for r in train], _smooth(losses), color=colour, linewidth=1.5, label="train (smoothed)")
        axes.plot(
            [tokens_at[r["step"]] for r in val],
            [r["loss"] for r in val],
            "o",
            color=colour,
            markersize=5,
            label="validation",
        )
        for record in val[-1:]:
            axes.annotate(
                f"{record['loss']:.3f}",
                (tokens_at[record["step"]], record["loss"]),
                textcoords="offset points",
                xytext=(-4, 9),
                ha="right",
            )
        axes.set_title(folder.name, fontsize=9)
    axes.set(xlabel="tokens", ylabel="loss (nats per token)")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
    figure.savefig(out)
    plt.close(figure)
    return out


def _smooth(values: Sequence[float]) -> list[float]:
    """Means over windows about each value: an eighth of what came before to either side, so that the steep start is kept."""
    sums = [0.0, *itertools.accumulate(values)]
    reach = [min(at // 8, len(values) - 1 - at) for at in range(len(values))]
    return [(sums[at + by + 1] - sums[at - by]) / (2 * by + 1) for at, by in enumerate(reach)]
