"""How busy a sweep keeps the machine: the time of its cells run one by one, against the time that all workers had.

    python benchmarks/sweep_throughput.py            # about six minutes on 2 cores; writes results/sweep_throughput.md
    python benchmarks/sweep_throughput.py --quick    # a few short cells, nothing written

1 would mean that nothing is lost: no worker waits, starting one costs nothing, and cells side by side do not slow each
other. Lost in the last round is the time in which the queue is empty and one worker still runs.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from contextlib import closing
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from benchmarks.common import circumstances, publish, table
from speedrun_mup.config import make_config
from speedrun_mup.data.corpus import find_corpus
from speedrun_mup.sweep import LocalEngine, Sweep, run_one, run_sweep


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="4 runs of 5 steps, no result file")
    quick = parser.parse_args().quick
    torch.set_num_threads(1)
    settings = {"data": "embedded", "device": "cpu", "progress": False, "val_tokens": 32_768, "micro_batches": 4}
    base = make_config("laptop", settings | {"base_width": 64, "iterations": 5 if quick else 96})
    widths, octaves, seeds = (32, 64), (-1.0, 0.0, 1.0), (0,) if quick else (0, 1, 2)
    sweep = Sweep(base, widths, log2_factors=octaves, seeds=seeds, adaptive=False)
    corpus, _ = find_corpus(base.data, base.tokenizer)
    cells = sweep.run_specs({(arm.name, (width,)): octaves for arm in sweep.arms for width in widths}, corpus)
    with tempfile.TemporaryDirectory() as out:
        began = time.perf_counter()
        for cell in cells:
            run_one(cell, Path(out) / "single")
        single = time.perf_counter() - began
        with closing(LocalEngine(device="cpu")) as engine:
            result = run_sweep(sweep, Path(out) / "sweep", engine, progress=False)
            workers = engine.workers
    share = single / (workers * result.seconds)
    header = ["cells", "one by one, s", "workers", "sweep, s", "share of the machine kept busy"]
    text = table(header, [[len(cells), f"{single:.1f}", workers, f"{result.seconds:.1f}", f"{share:.1%}"]])
    if quick:
        print(text)
    else:
        publish("sweep_throughput", ["# How busy a sweep keeps the machine", circumstances(), text])


if __name__ == "__main__":
    main()
