"""Does the best learning rate of Hugging Face's Llama stay put from width 32 to 256? docs/experiments/llama.md.

    python benchmarks/llama_transfer.py --workers 2             # what is missing of docs/experiments/llama/runs.csv
    python benchmarks/llama_transfer.py --arms adamw-mup        # of one arm
    python benchmarks/llama_transfer.py --minutes 50            # begin no run that would end later
    speedrun-mup transfer docs/experiments/llama/runs.csv --controls adamw-sp=-1 --tested adamw-mup muon-mup --base-size 64

Every run is on one thread. A finished run is a line of the table, so that a killed command continues where it was.
"""

from __future__ import annotations

import argparse
import csv
import math
import statistics
import sys
import time
import warnings
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)]

import torch  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from speedrun_mup.core import mup  # noqa: E402
from speedrun_mup.core.seeds import generator, seed_for  # noqa: E402
from speedrun_mup.data.corpus import embedded_corpus  # noqa: E402
from speedrun_mup.data.shards import read_shard  # noqa: E402
from speedrun_mup.sweep import propose_points  # noqa: E402

WIDTHS, BASE, SEEDS = (32, 64, 128, 256), 64, (0, 1, 2)
WARMUP, STD = 0.25, 0.1  # of the steps; of every matrix at width 64
OCTAVES = (-2.0, -1.0, 0.0, 1.0, 2.0)
STEPS, SEQUENCES, LENGTH, VAL_SEQUENCES = 192, 8, 128, 128
# Arm -> the optimizer, whether the model is adapted, and the rates of AdamW and Muon at factor 1: the middle of the grid.
ARMS = {
    "adamw-mup": ("adamw", True, 2.0**-7, None),
    "adamw-sp": ("adamw", False, 2.0**-7, None),
    "muon-mup": ("muon+adamw", True, 2.0**-6, 2.0**-5),
    "muon-sp": ("muon+adamw", False, 2.0**-6, 2.0**-5),
}
COLUMNS = ("arm", "width", "lr", "seed", "loss", "train_loss", "seconds")


class Run(NamedTuple):
    """One of the table. octave: log2 of the factor on all rates."""

    arm: str
    width: int
    octave: float
    seed: int


def llama(width: int) -> nn.Module:
    """Two layers; heads of 16, of which keys and values have two at every width; Hugging Face's own start."""
    from transformers import LlamaConfig, LlamaForCausalLM

    heads = {"num_attention_heads": width // 16, "num_key_value_heads": 2}
    sizes = {"hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": 2, "vocab_size": 257}
    tokens = {"pad_token_id": None, "bos_token_id": 256, "eos_token_id": 256}
    return LlamaForCausalLM(
        LlamaConfig(max_position_embeddings=LENGTH, use_cache=False, initializer_range=STD, **heads, **sizes, **tokens)
    )


def unadapted(model: nn.Module, rate: float, muon_rate: float | None) -> torch.optim.Optimizer:
    """torch's optimizers with one rate for all widths; Muon for the matrices of the layers."""
    options: dict[str, Any] = {"betas": (0.9, 0.95), "weight_decay": 0.0}
    if muon_rate is None:
        return torch.optim.AdamW(model.parameters(), lr=rate, **options)
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and ".layers." in name]
    others = [p for name, p in model.named_parameters() if p.ndim != 2 or ".layers." not in name]
    muon = torch.optim.Muon(matrices, lr=muon_rate, weight_decay=0.0)
    return mup.Combined(muon, torch.optim.AdamW(others, lr=rate, **options))


def build(run: Run) -> tuple[nn.Module, torch.optim.Optimizer]:
    """The model and its optimizer. At width 64 an arm and its unadapted twin are the same, bit for bit."""
    torch.manual_seed(seed_for(run.seed, "llama", run.width))
    kind, adapted, rate, muon_rate = ARMS[run.arm]
    model, factor = llama(run.width), 2.0**run.octave
    rate, muon_rate = rate * factor, muon_rate and muon_rate * factor
    if not adapted:
        return model, unadapted(model, rate, muon_rate)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it says what follows the width: heads and the feed-forward size
        mup.adapt(model, {"hidden_size": BASE, "num_key_value_heads": 2})
    muon = {"weight_decay": 0.0} if muon_rate else None
    options: dict[str, Any] = {"betas": (0.9, 0.95), "weight_decay": 0.0}
    return model, mup.optimizer(model, lr=rate, optimizer=kind, muon_lr=muon_rate, muon=muon, **options)


@cache
def corpus(part: str) -> Tensor:
    """Its tokens: bytes of this Python's standard library."""
    found = embedded_corpus()
    (path,) = found.train if part == "train" else found.val
    return torch.from_numpy(read_shard(path).astype("int64"))


def batch(part: str, sequences: int, *purpose: object, seed: int = 0) -> Tensor:
    """(sequences, LENGTH + 1) at random places."""
    tokens = corpus(part)
    starts = torch.randint(len(tokens) - LENGTH, (sequences, 1), generator=generator(seed, part, *purpose))
    return tokens[starts + torch.arange(LENGTH + 1)]


def loss_of(model: nn.Module, tokens: Tensor) -> Tensor:
    """Cross-entropy of the next token, in nats."""
    logits = model(input_ids=tokens[:, :-1]).logits
    return nn.functional.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten())


def train(run: Run, steps: int = STEPS) -> dict[str, Any]:
    """The line of the table that this run makes. Seeds draw the start and the order of the data."""
    torch.set_num_threads(1)
    began, (model, optimizer) = time.monotonic(), build(run)
    shape = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / (WARMUP * steps), 1.0, (steps - step) / (0.5 * steps))
    )
    last: list[float] = []
    for step in range(steps):
        optimizer.zero_grad()
        loss = loss_of(model, batch("train", SEQUENCES, step, seed=run.seed))
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        shape.step()
        last = [*last, loss.item()][-16:]
        if not math.isfinite(last[-1]):
            break
    with torch.no_grad():
        parts = batch("val", VAL_SEQUENCES).split(16)
        val = statistics.fmean(loss_of(model, part).item() for part in parts)
    seconds = round(time.monotonic() - began, 1)
    found = [round(x, 5) if math.isfinite(x) else math.nan for x in (val, statistics.fmean(last))]
    return dict(zip(COLUMNS, (run.arm, run.width, 2.0**run.octave, run.seed, *found, seconds)))


def read(path: Path) -> dict[Run, dict[str, str]]:
    """The runs of the table."""
    if not path.exists():
        return {}
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    return {Run(row["arm"], int(row["width"]), math.log2(float(row["lr"])), int(row["seed"])): row for row in rows}


def missing(done: dict[Run, dict[str, str]], arms: list[str], widths: list[int], seeds: list[int]) -> Iterator[Run]:
    """What is to be run next, narrow first: the grid, then what extends it where the lowest mean loss is at its end."""
    for arm, width in ((arm, width) for width in widths for arm in arms):
        grid = [Run(arm, width, octave, seed) for octave in OCTAVES for seed in seeds]
        if all(run in done for run in grid):
            losses = defaultdict(list)
            for run, row in done.items():
                if (run.arm, run.width) == (arm, width):
                    losses[run.octave].append(float(row["loss"]))
            means = {
                octave: math.inf if any(map(math.isnan, some)) else statistics.fmean(some)
                for octave, some in losses.items()
            }
            grid = [
                Run(arm, width, octave, seed)
                for octave in {*means, *propose_points(means, OCTAVES, False)}
                for seed in seeds
            ]
        yield from sorted(run for run in grid if run not in done)


def sweep(path: Path, options: argparse.Namespace) -> int:
    """Run what is missing, one run a worker; how many runs are left."""
    path.parent.mkdir(parents=True, exist_ok=True)
    done, began = read(path), time.monotonic()
    if not done:
        path.write_text(",".join(COLUMNS) + "\n")
    under_way: dict[Future[dict[str, Any]], Run] = {}
    corpus("train")  # written into the cache once, before there are workers
    with ProcessPoolExecutor(options.workers, get_context("spawn")) as pool, path.open("a", newline="") as file:
        while True:
            late = options.minutes is not None and time.monotonic() - began > 60 * options.minutes
            left = [
                run
                for run in missing(done, options.arms, options.widths, options.seeds)
                if run not in under_way.values()
            ]
            while left and len(under_way) < options.workers and not late:
                run = left.pop(0)
                under_way[pool.submit(train, run)] = run
            if not under_way:
                return len(left)
            for future in wait(under_way, return_when=FIRST_COMPLETED).done:
                run, row = under_way.pop(future), future.result()
                done[run] = {key: str(value) for key, value in row.items()}
                csv.DictWriter(file, COLUMNS).writerow(row)
                file.flush()
                told = f"{run.arm} width {run.width} 2^{run.octave:g} seed {run.seed}: {row['loss']}"
                print(f"{time.monotonic() - began:6.0f} s  {told}", flush=True)


def main() -> int:
    """Exit code 0 if nothing is left to run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "experiments" / "llama" / "runs.csv")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--widths", nargs="+", type=int, default=list(WIDTHS))
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS))
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--minutes", type=float)
    options = parser.parse_args()
    left = sweep(options.out, options)
    print(f"{left} runs left" if left else "nothing left to run")
    return int(left > 0)


if __name__ == "__main__":
    raise SystemExit(main())
