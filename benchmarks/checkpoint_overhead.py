"""What a checkpoint costs training: steps that save in the background against steps that do not, in pairs.

The laptop preset on the embedded corpus, two runs of one seed in one process, which take their turns in random order.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import random
import tempfile
from contextlib import ExitStack, closing
from itertools import count
from pathlib import Path

from common import circumstances, publish, seconds, table, with_spread

from speedrun_mup.config import make_config
from speedrun_mup.core.utils import World
from speedrun_mup.training.run import Run

BLOCK = 10  # steps, of which the first saves
BLOCKS = 30
CEILING = 1.05


class Taker:
    """A run that is stepped from outside."""

    def __init__(self, run: Run):
        self.run, self.numbers = run, count()
        self.stream = run.passes.batches.stream(0, 0, 1)

    def step(self, save: str) -> None:
        """One training step, as the loop takes it. save: no, aside (in the background) or now."""
        run, number = self.run, next(self.numbers)
        check = run.recovery.check(number, run.passes.accumulate_gradients(next(self.stream), number), stop=False)
        run.set_schedule(number)
        for optimizer in run.optimizers:
            optimizer.step(check.is_finite)
        run.model.zero_grad(set_to_none=True)
        run.recovery.pending.clear()
        run.recovery.poll_checkpoint()
        if save != "no":
            run.save(number + 1, last=save == "now")

    def block(self, save: str) -> tuple[float, float]:
        """Seconds of a step that saves, and of a whole block that begins with it and ends with the checkpoint durable."""
        first = seconds(lambda: self.step(save))
        rest = seconds(
            lambda: [self.step("no") for _ in range(BLOCK - 1)] and self.run.recovery.poll_checkpoint(wait=True)
        )
        return first, first + rest


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="3 blocks of each kind, no result file")
    parser.add_argument("--seed", type=int, default=0, help="of the order; %(default)s")
    flags = parser.parse_args()
    rng, ratios = random.Random(flags.seed), {save: ([], []) for save in ("aside", "now")}
    with tempfile.TemporaryDirectory() as out, ExitStack() as stack, contextlib.redirect_stdout(io.StringIO()):
        settings = {"data": "embedded", "device": "cpu", "progress": False, "out": out}
        takers = {
            save: Taker(stack.enter_context(closing(Run(make_config("laptop", settings | {"name": save}), World()))))
            for save in ("no", "aside", "now")
        }
        for number in range(3 if flags.quick else BLOCKS + 1):
            order = rng.sample(sorted(takers), 3)
            took = {save: takers[save].block(save) for save in order}
            if number:  # the first warms up
                for save, (steps, blocks) in ratios.items():
                    steps.append(took[save][0] / took["no"][0])
                    blocks.append(took[save][1] / took["no"][1])
        size = sum(file.stat().st_size for file in max(Path(out, "aside", "checkpoints").glob("step-*")).iterdir())
        for taker in takers.values():
            taker.stream.close()
    rows = [
        ("in the background", with_spread(ratios["aside"][0], 3), with_spread(ratios["aside"][1], 3)),
        ("at once", with_spread(ratios["now"][0], 3), with_spread(ratios["now"][1], 3)),
    ]
    text = (
        f"Time over that of the same steps without a save, median and middle 80 % of {len(ratios['aside'][0])} pairs. A "
        f"checkpoint has {size / 1e6:,.1f} MB. The goal is at most {CEILING} for a step that saves in the background; "
        f"a block of {BLOCK} steps holds one save, and ends when it is durable."
    )
    result = table(("the save", "a step that saves", f"a block of {BLOCK} steps"), rows)
    if flags.quick:
        print(f"{text}\n\n{result}")
    else:
        publish("checkpoint_overhead", ["# What a checkpoint costs training", text, result, circumstances()])


if __name__ == "__main__":
    main()
