"""Tokens per second of our training step on a CPU against Hugging Face's GPT-2 with AdamW, and where our time goes.

    python benchmarks/cpu_speed.py            # three widths; writes results/cpu_speed.md
    python benchmarks/cpu_speed.py --quick    # a smoke run: one width, a few steps, nothing written

Both models train in one process on the same micro-batches, interleaved step by step; so what else the machine does
falls on both alike. Our step is all of `train`: the wait for data, forward, backward, the finiteness check, Muon, Adam,
the metrics file. Needs the extra `bench`.
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

from benchmarks.common import circumstances, publish, quantile, seconds, table, with_spread
from benchmarks.opponent import Opponent
from speedrun_mup.config import TrainConfig, make_config
from speedrun_mup.core.model import GPT
from speedrun_mup.data.batches import Batch
from speedrun_mup.data.corpus import find_corpus
from speedrun_mup.training import train

SQUARE = 1024  # side of the square matmul that stands for what the machine can do
PROFILED = 4  # steps in the middle of the run, left out of the timing
MATMULS = {"aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm"}
SETTINGS = {
    "base_width": 64,
    "parametrization": "mup",
    "data": "embedded",
    "device": "cpu",
    "val_every": 0,
    "val_tokens": 4096,
    "save": False,
    "progress": False,
}


@dataclass
class Race:
    """Times of both models, taken from inside `train` through its observer; the lists have one entry per measured step.

    profiled: steps in a row that are profiled instead.
    """

    cfg: TrainConfig
    profiled: range
    ours_s: list[float] = field(default_factory=list)
    theirs_s: list[float] = field(default_factory=list)
    square_s: list[float] = field(default_factory=list)
    own_s: list[float] = field(default_factory=list)
    resumed: float = 0.0

    def __post_init__(self) -> None:
        self.opponent = Opponent(self.cfg, find_corpus("embedded")[0], self.cfg.iterations)
        self.square = torch.randn(SQUARE, SQUARE)
        self.rows = torch.randn(self.cfg.schedule.at(0).tokens, self.cfg.width)
        self.matrix = torch.randn(self.cfg.width, 4 * self.cfg.width)
        self.profiler = profile(activities=[ProfilerActivity.CPU], with_flops=True)

    def observe(self, step: int, model: GPT, micro_batches: list[Batch]) -> None:
        """Between two of our steps: note how long the last one took, then let the others run."""
        elapsed, done = time.perf_counter() - self.resumed, step - 1
        if done in self.profiled:
            if done == self.profiled[-1]:
                self.profiler.stop()
        elif done < 1:  # warming up
            self.opponent.step(micro_batches)
        else:
            self.ours_s.append(elapsed)
            self.theirs_s.append(seconds(lambda: self.opponent.step(micro_batches)))
            self.square_s.append(seconds(lambda: self.square @ self.square))
            self.own_s.append(seconds(lambda: self.rows @ self.matrix))
        if step == self.profiled[0]:
            self.profiler.start()
        self.resumed = time.perf_counter()


def race(width: int, steps: int) -> Race:
    """Train both at `width` for `steps` measured steps, while our attention window grows as in a whole run."""
    with tempfile.TemporaryDirectory() as folder:
        cfg = make_config("laptop", SETTINGS | {"width": width, "iterations": steps + PROFILED + 2, "out": folder})
        found = Race(cfg, profiled=range(steps // 2, steps // 2 + PROFILED))
        with contextlib.redirect_stdout(io.StringIO()):
            train(cfg, found.observe)
    return found


def speed_row(run: Race) -> list[str]:
    """Width, both models' tokens per second, and the paired ratio."""
    ratios = [theirs / ours for ours, theirs in zip(run.ours_s, run.theirs_s)]
    rates = [f"{run.cfg.schedule.at(0).tokens / quantile(times, 0.5):,.0f}" for times in (run.ours_s, run.theirs_s)]
    return [str(run.cfg.width), *rates, with_spread(ratios), str(len(ratios))]


def profile_of(run: Race) -> tuple[float, float, list[list[str]]]:
    """GFLOP of a step's matmuls, the seconds spent in them, and rows of the most expensive operations."""
    operations = sorted(run.profiler.key_averages(), key=lambda entry: -entry.self_cpu_time_total)
    total_us = sum(entry.self_cpu_time_total for entry in operations)
    matmuls = [entry for entry in operations if entry.key in MATMULS]
    gflop, matmul_us = (
        sum(entry.flops for entry in matmuls) / 1e9,
        sum(entry.self_cpu_time_total for entry in matmuls),
    )
    rows = [
        [f"`{entry.key}`", f"{entry.count / PROFILED:.0f}", f"{entry.self_cpu_time_total / PROFILED / 1e3:.1f}"]
        + [f"{entry.self_cpu_time_total / total_us:.1%}"]
        for entry in operations[:12]
    ]
    return gflop / PROFILED, matmul_us / PROFILED / 1e6, rows


def ceiling_row(run: Race) -> list[str]:
    """Width, both ceilings, what our matmuls reach and what the whole step reaches, in GFLOP/s and as shares."""
    square = [2 * SQUARE**3 / s / 1e9 for s in run.square_s]
    own = [2 * run.rows.numel() * run.matrix.size(1) / s / 1e9 for s in run.own_s]
    gflop, matmul_s, _ = profile_of(run)
    ceiling, inside, whole = quantile(square, 0.5), gflop / matmul_s, gflop / quantile(run.ours_s, 0.5)
    return [
        *(str(run.cfg.width), with_spread(square, 0), with_spread(own, 0), f"{gflop:.1f}"),
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
        f"Both: {cfg.n_layer} layers, heads of {cfg.head_dim}, bytes of Python source, {cfg.schedule.at(0).tokens:,} tokens a "
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
