"""Tokens and seconds until the laptop preset reaches the loss at which a well-tuned GPT-2 of the same size ends.

    python benchmarks/time_to_loss.py            # about half an hour on 2 quiet cores; writes results/time_to_loss.md
    python benchmarks/time_to_loss.py --quick    # a smoke run: 16 steps, two learning rates, nothing written

GPT-2 (Hugging Face, AdamW) trains on FACTOR times the preset's tokens, once for every learning rate of a grid that is
widened until its best is inside. Both see the same micro-batches in the same order and are validated on the same
chunks, none longer than a training sequence. The two train in one process, interleaved, so what else the machine does
falls on both alike; seconds are of training only. Needs the extra `bench`.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from benchmarks.common import circumstances, publish, seconds, table
from benchmarks.opponent import Opponent
from speedrun_mup.config import TrainConfig, make_config
from speedrun_mup.core.model import GPT
from speedrun_mup.data.batches import Batch, TrainBatches
from speedrun_mup.data.corpus import find_corpus
from speedrun_mup.data.validation import ValBatches
from speedrun_mup.training import train
from speedrun_mup.training.tracking import read_metrics

FACTOR = 3  # GPT-2's tokens for one of ours
LEARNING_RATES = (1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2)
SEEDS = 3
VAL_TOKENS, VALIDATIONS = 65_536, 32


@dataclass(frozen=True)
class Point:
    """Validation loss after so many training tokens and seconds."""

    tokens: int
    train_s: float
    loss: float


class Gpt2Run:
    """GPT-2 on the data of `cfg`, FACTOR times as long, a few steps at a time."""

    def __init__(self, cfg: TrainConfig, lr: float):
        self.cfg, self.lr, self.train_s = cfg, lr, 0.0
        self.corpus, _ = find_corpus(cfg.data)
        self.opponent = Opponent(cfg, self.corpus, FACTOR * cfg.iterations, lr, cfg.seed)
        self.stream = TrainBatches(self.corpus, cfg.micro_batch_tokens, cfg.micro_batches, cfg.seed).stream(0, 0, 1)

    def advance(self) -> None:
        """FACTOR steps, timed."""
        for micro_batches in (next(self.stream) for _ in range(FACTOR)):
            self.train_s += seconds(lambda batch=micro_batches: self.opponent.step(batch))

    @torch.no_grad()
    def end(self) -> Point:
        """Validate on the chunks that our run uses."""
        self.stream.close()
        chunks = ValBatches(self.corpus, self.cfg.val_tokens, self.cfg.val_chunk_tokens)
        groups = (
            [chunks[i] for i in range(first, min(first + self.cfg.micro_batches, len(chunks)))]
            for first in range(0, len(chunks), self.cfg.micro_batches)
        )
        loss = sum(self.opponent.loss(group).item() * len(group) for group in groups) / len(chunks)
        return Point(FACTOR * self.cfg.schedule.tokens, self.train_s, loss)


def train_both(cfg: TrainConfig, lr: float) -> tuple[list[Point], Point]:
    """Our run as `train` does it, GPT-2 advancing before each step: our validations and GPT-2's end."""
    gpt2 = Gpt2Run(cfg, lr)
    lent = [0.0]  # seconds inside our step that were GPT-2's, up to each step

    def observe(step: int, model: GPT, micro_batches: list[Batch]) -> None:
        lent.append(lent[-1] + seconds(gpt2.advance))

    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        result = train(replace(cfg, out=folder), observe)
        records = [record for record in read_metrics(result.folder) if record["kind"] == "val"]
    ours = [Point(cfg.schedule.tokens_before(r["step"]), r["train_s"] - lent[r["step"]], r["loss"]) for r in records]
    return ours, gpt2.end()


def train_gpt2(cfg: TrainConfig, lr: float) -> Point:
    """GPT-2 alone."""
    gpt2 = Gpt2Run(cfg, lr)
    for _ in range(cfg.iterations):
        gpt2.advance()
    return gpt2.end()


def widened(rates: tuple[float, ...], found: dict[float, Point]) -> Iterator[float]:
    """`rates`, then factors of two beyond whichever end is the best so far; reads what the caller puts in `found`."""
    yield from rates
    while (best := min(found, key=lambda lr: found[lr].loss)) in (min(found), max(found)):
        yield best * 2 if best == max(found) else best / 2


def passing(points: list[Point], target: float) -> Point | None:
    """The first validation at or below `target`."""
    return next((point for point in points if point.loss <= target), None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="16 steps, two learning rates, one seed, no result file")
    quick = parser.parse_args().quick
    settings = {"parametrization": "mup", "data": "embedded", "device": "cpu", "save": False, "progress": False}
    preset = make_config("laptop", settings)
    if quick:
        preset = replace(preset, iterations=16)
    base = replace(
        preset,
        val_tokens=4096 if quick else VAL_TOKENS,
        val_chunk_tokens=preset.micro_batch_tokens,
        val_every=max(1, preset.iterations // VALIDATIONS),
    )
    ours: list[list[Point]] = []
    gpt2: dict[float, Point] = {}
    for lr in LEARNING_RATES[2:4] if quick else widened(LEARNING_RATES, gpt2):
        if len(ours) < (1 if quick else SEEDS):
            points, gpt2[lr] = train_both(replace(base, seed=len(ours)), lr)
            ours.append(points)
            print(f"ours, seed {len(ours) - 1}: {points[-1]}", flush=True)
        else:
            gpt2[lr] = train_gpt2(base, lr)
        print(f"GPT-2, learning rate {lr}: {gpt2[lr]}", flush=True)

    best = min(gpt2, key=lambda lr: gpt2[lr].loss)
    target, budget = gpt2[best], FACTOR * preset.schedule.tokens
    # GPT-2's step takes as long at any learning rate; ours are paired with the runs next to them.
    pairs = list(zip(ours, gpt2.values()))
    rows = []
    for seed, (points, beside) in enumerate(pairs):
        passed, end = passing(points, target.loss), points[-1]
        reached = (
            [f"{passed.tokens:,}", f"{passed.train_s:.1f}", f"{budget / passed.tokens:.2f}"]
            + [f"{beside.train_s / passed.train_s:.2f}"]
            if passed
            else ["never", "never", "-", "-"]
        )
        rows.append([seed, *reached, f"{beside.train_s:.1f}", f"{end.loss:.4f}", f"{end.train_s:.1f}"])
    sections = [
        "# Tokens and seconds to GPT-2's loss",
        circumstances(),
        f"Target: validation loss {target.loss:.4f}, where GPT-2 of width {preset.width} ends after {budget:,} tokens, "
        f"{FACTOR} times those of our preset, at its best learning rate, {best:g}. Validation: {base.val_tokens:,} "
        f"tokens in chunks of {base.val_chunk_tokens}, so no model sees more context than in training. Both: "
        f"{preset.n_layer} layers, heads of {preset.head_dim}, {preset.schedule.at(0).tokens:,} tokens a step as "
        f"{preset.micro_batches} sequences. GPT-2: AdamW, betas 0.9 and 0.95, weight decay 0.1, clipping at 1, 5 % "
        "linear warmup, linear decay to 0. Ours: the laptop preset with muP, as it is, with its own schedule and length.",
        "## Our preset",
        f"Tokens and seconds of the first of every {base.val_every} steps' validations that is at or below the target; "
        "`fewer` and `faster` are GPT-2's whole budget over these, seconds against the GPT-2 that trained interleaved "
        "with it at that seed.",
        table(
            ["seed", "tokens", "seconds", "times fewer tokens", "times faster", "GPT-2's seconds"]
            + ["our loss at the end", "our seconds at the end"],
            rows,
        ),
        "## GPT-2's learning rate",
        table(
            ["learning rate", "validation loss at the end", "seconds"],
            [[f"{lr:g}", f"{gpt2[lr].loss:.4f}", f"{gpt2[lr].train_s:.1f}"] for lr in sorted(gpt2)],
        ),
    ]
    if quick:
        print("\n\n".join(sections))
    else:
        publish("time_to_loss", sections)


if __name__ == "__main__":
    main()
