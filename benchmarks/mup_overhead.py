"""What muP costs in a training step: the laptop preset with muP against the same model without, step by step in turn.

    python benchmarks/mup_overhead.py            # about six minutes on one core; writes results/mup_overhead.md
    python benchmarks/mup_overhead.py --quick    # a few steps, nothing written

Everything that muP adds is a number computed before training starts: factors in learning rates, eps and initial values,
and another constant where the record divides its logits anyway. So a step should take as long.

Timed is the CPU time of a single thread, which other programs on the machine disturb less than they do wall time. A third
run, without muP again, shows what the comparison is worth: its ratio should be 1.
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

from benchmarks.common import circumstances, publish, quantile, table, with_spread
from speedrun_mup.config import make_config
from speedrun_mup.core.utils import World
from speedrun_mup.training.run import Run

ROUNDS = 150


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="4 rounds, nothing written")
    rounds = 4 if parser.parse_args().quick else ROUNDS
    torch.set_num_threads(1)
    settings = {"data": "embedded", "device": "cpu", "progress": False, "width": 128, "base_width": 64}
    with tempfile.TemporaryDirectory() as out, ExitStack() as stack, contextlib.redirect_stdout(io.StringIO()):

        def opened(name: str, table: str) -> Run:
            cfg = make_config("laptop", settings | {"parametrization": table, "out": out, "name": name})
            return stack.enter_context(closing(Run(cfg, World())))

        runs = [opened("without", "record26"), opened("with", "mup"), opened("again", "record26")]
        stream = runs[0].passes.batches.stream(0, 0, 1)

        def step(run: Run, micro_batches: list, number: int) -> None:
            check = run.recovery.check(number, run.passes.accumulate_gradients(micro_batches, number), stop=False)
            run.set_schedule(number)
            for optimizer in run.optimizers:
                optimizer.step(check.is_finite)
            run.model.zero_grad(set_to_none=True)
            run.process_pending_steps()

        ratios: dict[Run, list[float]] = {run: [] for run in runs[1:]}
        for number in range(rounds + 2):
            batch, took = next(stream), {}
            for run in runs[number % 3 :] + runs[: number % 3]:  # each comes first as often as the others
                began = time.process_time()
                step(run, batch, number)
                took[run] = time.process_time() - began
            for run in runs[1:] if number >= 2 else []:
                ratios[run].append(took[run] / took[runs[0]])
        stream.close()
    rows = []
    for name, values in zip(("with muP", "without, again"), ratios.values()):
        reach = 0.98 / math.sqrt(len(values))  # of a 95 % interval for the median, in quantiles
        low, high = (quantile(values, min(max(0.5 + side * reach, 0), 1)) for side in (-1, 1))
        rows.append([name, with_spread(values, 3), f"{low:.4f} to {high:.4f}"])
    header = ["run", f"CPU seconds of a step over those without, {rounds} rounds (middle 80 %)", "95 % of the median"]
    text = table(header, rows)
    if rounds < ROUNDS:
        print(text)
    else:
        publish("mup_overhead", ["# What muP costs", circumstances(), text])


if __name__ == "__main__":
    main()
