"""What muP costs in a training step: the laptop preset with muP against the same model without, step by step in turn.

    python benchmarks/mup_overhead.py            # about five minutes on one core; writes results/mup_overhead.md
    python benchmarks/mup_overhead.py --quick    # a few steps, nothing written

Everything that muP adds is a number computed before training starts: factors in learning rates, eps and initial values,
and another constant where the record divides its logits anyway. So a step should take as long.

Timed is the CPU time of a single thread, which other programs on the machine disturb less than they do wall time.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import math
import sys
import tempfile
import time
from contextlib import ExitStack, closing
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from benchmarks.common import circumstances, publish, quantile, with_spread
from speedrun_mup.config import make_config
from speedrun_mup.core.utils import World
from speedrun_mup.training import Run

PAIRS = 200


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="4 pairs of steps, no result file")
    pairs = 4 if parser.parse_args().quick else PAIRS
    torch.set_num_threads(1)
    settings = {"data": "embedded", "device": "cpu", "progress": False, "width": 128, "base_width": 64}
    with tempfile.TemporaryDirectory() as out, ExitStack() as stack, contextlib.redirect_stdout(io.StringIO()):

        def opened(name: str) -> Run:
            cfg = make_config("laptop", settings | {"parametrization": name, "out": out, "name": name})
            return stack.enter_context(closing(Run(cfg, World())))

        with_mup, without = opened("mup"), opened("record26")
        stream = with_mup.batches.stream(0, 0, 1)

        def step(run: Run, micro_batches: list, number: int) -> None:
            vote = run.vote(number, run.accumulate_gradients(micro_batches, number), stop=False)
            run.set_schedule(number)
            for optimizer in run.optimizers:
                optimizer.step(vote.good)
            run.model.zero_grad(set_to_none=True)
            run.act_on_votes()

        ratios = []
        for number in range(pairs + 2):
            batch = next(stream)
            order = (with_mup, without) if number % 2 else (without, with_mup)  # neither always comes first
            took = {}
            for run in order:
                began = time.process_time()
                step(run, batch, number)
                took[run] = time.process_time() - began
            if number >= 2:
                ratios.append(took[with_mup] / took[without])
        stream.close()
    reach = 0.98 / math.sqrt(len(ratios))  # of a 95 % interval for the median, in quantiles
    low, high = (quantile(ratios, min(max(0.5 + side * reach, 0), 1)) for side in (-1, 1))
    text = (
        f"CPU seconds of a step with muP over those without, {len(ratios)} pairs: {with_spread(ratios, 3)} (middle 80 %); "
        f"95 % interval of the median {low:.4f} to {high:.4f}."
    )
    if pairs < PAIRS:
        print(text)
    else:
        publish("mup_overhead", ["# What muP costs", circumstances(), text])


if __name__ == "__main__":
    main()
