"""Tokens per second of our training step on a CPU against Hugging Face's GPT-2 with AdamW, and where our time goes.

    python benchmarks/cpu_speed.py            # three widths; writes results/cpu_speed.md
    python benchmarks/cpu_speed.py --quick    # a smoke run: one width, a few steps, nothing written

Both models train in one process on the same micro-batches, turn about, step by step; so what else the machine does
falls on both alike. Our step is all of `train`: the wait for data, forward, backward, the finiteness check, Muon, Adam,
the metrics file. Needs `pip install transformers`.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.common import Opponent, circumstances, publish, quantile, seconds, table, with_spread
from speedrun_mup.config import TrainConfig, make_config
from speedrun_mup.core.model import GPT
from speedrun_mup.corpus import find_corpus
from speedrun_mup.data import Batch
from speedrun_mup.training import train

SQUARE = 1024  # side of the square matmul that stands for what the machine can do
MATMULS = {"aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm"}
SETTINGS = {
    "base_width": 64,
    "parametrization": "mup",
    "data": "embedded",
    "device": "cpu",
    "val_every": 0,
    "val_tokens": 4096,
    "progress": False,
}


@dataclass
class Race:
    """Times of both models, taken from inside `train` through its observer; all lists have one entry per step."""

    cfg: TrainConfig
    profiled_step: int
    ours_s: list[float] = field(default_factory=list)
    theirs_s: list[float] = field(default_factory=list)
    square_s: list[float] = field(default_factory=list)
    own_s: list[float] = field(default_factory=list)
    resumed: float = 0.0

    def __post_init__(self) -> None:
        self.opponent = Opponent(self.cfg, find_corpus("embedded")[0], self.cfg.iterations)
        self.square = torch.randn(SQUARE, SQUARE)
        self.rows = torch.randn(self.cfg.batch_tokens, self.cfg.width)
        self.matrix = torch.randn(self.cfg.width, 4 * self.cfg.width)
        self.profiler = profile(activities=[ProfilerActivity.CPU], with_flops=True)

    def observe(self, step: int, model: GPT, micro_batches: list[Batch]) -> None:
        """Between two of our steps: note how long the last one took, then let the others run."""
        elapsed = time.perf_counter() - self.resumed
        if step == self.profiled_step + 1:
            self.profiler.stop()
        elif step > 1:  # step 0 warms up
            self.ours_s.append(elapsed)
            self.theirs_s.append(seconds(lambda: self.opponent.step(micro_batches)))
            self.square_s.append(seconds(lambda: self.square @ self.square))
            self.own_s.append(seconds(lambda: self.rows @ self.matrix))
        else:
            self.opponent.step(micro_batches)
        if step == self.profiled_step:
            self.profiler.start()
        self.resumed = time.perf_counter()


def race(width: int, steps: int) -> Race:
    """Train both at `width` for `steps` measured steps, while our attention window grows as in a whole run."""
    with tempfile.TemporaryDirectory() as folder:
        cfg = make_config("laptop", SETTINGS | {"width": width, "iterations": steps + 3, "out": folder})
        found = Race(cfg, profiled_step=steps // 2)
        with contextlib.redirect_stdout(io.StringIO()):
            train(cfg, found.observe)
    return found


def speed_row(run: Race) -> list[str]:
    """Width, both models' tokens per second, and the paired ratio."""
    ratios = [theirs / ours for ours, theirs in zip(run.ours_s, run.theirs_s)]
    rates = [f"{run.cfg.batch_tokens / quantile(times, 0.5):,.0f}" for times in (run.ours_s, run.theirs_s)]
    return [str(run.cfg.width), *rates, with_spread(ratios), str(len(ratios))]


def profile_of(run: Race) -> tuple[float, float, list[list[str]]]:
    """FLOPs of the profiled step's matmuls, the seconds spent in them, and the ten most expensive operations."""
    operations = sorted(run.profiler.key_averages(), key=lambda entry: -entry.self_cpu_time_total)
    total_s = sum(entry.self_cpu_time_total for entry in operations)
    matmuls = [entry for entry in operations if entry.key in MATMULS]
    flops, matmul_s = sum(entry.flops for entry in matmuls), sum(entry.self_cpu_time_total for entry in matmuls) / 1e6
    rows = [
        [f"`{entry.key}`", str(entry.count), f"{entry.self_cpu_time_total / 1e3:.1f}"]
        + [f"{entry.self_cpu_time_total / total_s:.1%}"]
        for entry in operations[:12]
    ]
    return flops, matmul_s, rows


def ceiling_row(run: Race) -> list[str]:
    """Width, both ceilings, what our matmuls reach and what the whole step reaches, in GFLOP/s and as shares."""
    square = [2 * SQUARE**3 / s / 1e9 for s in run.square_s]
    own = [2 * run.rows.numel() * run.matrix.size(1) / s / 1e9 for s in run.own_s]
    flops, matmul_s, _ = profile_of(run)
    ceiling, step_s = quantile(square, 0.5), quantile(run.ours_s, 0.5)
    inside, whole = flops / matmul_s / 1e9, flops / step_s / 1e9
    return [
        *(str(run.cfg.width), with_spread(square, 0), with_spread(own, 0), f"{flops / 1e9:.1f}"),
        *(f"{inside:.0f}", f"{inside / ceiling:.0%}", f"{whole:.0f}", f"{whole / ceiling:.0%}"),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one width, a few steps, no result file")
    quick = parser.parse_args().quick
    widths, steps = ([64], 4) if quick else ([64, 128, 256], 30)
    runs = []
    for width in widths:
        runs.append(race(width, steps))
        print(f"width {width}: {speed_row(runs[-1])[3]} times GPT-2's tokens/s", flush=True)
    cfg = runs[0].cfg
    sections = [
        "# Training speed on a CPU",
        circumstances(),
        "## Tokens per second against Hugging Face's GPT-2",
        f"Both: {cfg.n_layer} layers, heads of {cfg.head_dim}, bytes of Python source, {cfg.batch_tokens:,} tokens a "
        f"step as {cfg.micro_batches} sequences of {cfg.micro_batch_tokens}, float32, one forward pass a step. GPT-2: "
        "scaled dot product attention, no dropout, AdamW, gradient clipping. Ours: Muon and Adam, attention window "
        "growing over the run as in training. Ratio of speeds (above 1: ours is faster): median and middle 80 % of "
        "paired steps.",
        table(["width", "ours, tokens/s", "GPT-2, tokens/s", "ratio", "steps"], [speed_row(run) for run in runs]),
        "## Matmul ceiling",
        f"Ceilings: float32 matmuls timed between the steps, square of side {SQUARE}, and the model's largest, "
        "(tokens, width) x (width, 4 width); median and middle 80 %. FLOPs of a step count all weight matmuls, forward "
        "and backward, and Muon's Newton-Schulz, but not the products inside attention. `inside` divides them by the "
        "time spent in those matmuls, `step` by the whole step; shares are of the square ceiling.",
        table(
            ["width", "square, GFLOP/s", "own shape, GFLOP/s", "GFLOP a step"]
            + ["inside, GFLOP/s", "share", "step, GFLOP/s", "share"],
            [ceiling_row(run) for run in runs],
        ),
    ]
    for run in runs:
        sections += [
            f"## Where a step of width {run.cfg.width} goes",
            table(["operation", "calls", "ms", "share"], profile_of(run)[2]),
        ]
    if quick:
        print("\n\n".join(sections))
    else:
        publish("cpu_speed", sections)


if __name__ == "__main__":
    main()
