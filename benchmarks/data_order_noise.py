"""How much of the noise between seeds is the order of the data, and how much the initialisation?

python benchmarks/data_order_noise.py --width 64 --seeds 16 --out noise --publish

Trains the same model with seeds that fix only the initialisation, only the order, and both, and compares the standard deviations
of the validation loss. A run that is in the folder already is not run again.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import math
from dataclasses import replace
from pathlib import Path
from statistics import stdev
from unittest import mock

from common import circumstances, publish, table

from speedrun_mup.config import TrainConfig, make_config
from speedrun_mup.core.model import GPT
from speedrun_mup.files import write_whole
from speedrun_mup.training import build, train

SEEDS_OF = {  # what varies: (seed of the initialisation, seed of the order)
    "initialisation": lambda seed: (seed, 0),
    "data order": lambda seed: (0, seed),
    "both": lambda seed: (seed, seed),
}


def loss_of(cfg: TrainConfig, init_seed: int, order_seed: int, out: Path) -> float:
    """The validation loss at the end of one run."""
    result = out / f"w{cfg.width}-init{init_seed}-order{order_seed}.json"
    if result.exists():
        return float(json.loads(result.read_text())["loss"])
    cfg = replace(cfg, seed=order_seed, out=str(out / "runs"), name=result.stem, save=False, progress=False)
    model = mock.patch.object(build, "GPT", lambda model_cfg, seed: GPT(model_cfg, init_seed))
    with model, contextlib.redirect_stdout(io.StringIO()):
        loss = train(cfg).val_loss
    write_whole(result, json.dumps({"loss": loss, "config": vars(cfg)}))
    return float(loss)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, nargs="+", default=[64])
    parser.add_argument("--seeds", type=int, default=16)
    parser.add_argument("--out", type=Path, default=Path("noise"))
    parser.add_argument("--publish", action="store_true")
    arguments = parser.parse_args()
    settings = {"parametrization": "mup", "base_width": 64, "iterations": 96, "micro_batches": 4, "val_tokens": 32_768}
    rows = []
    for width in arguments.width:
        cfg = make_config("laptop", settings | {"width": width, "val_every": 0, "data": "embedded"})
        for name, seeds in SEEDS_OF.items():
            losses = [loss_of(cfg, *seeds(seed), arguments.out) for seed in range(arguments.seeds)]
            spread, freedom = stdev(losses), len(losses) - 1
            error = spread / math.sqrt(2 * freedom)
            rows.append([width, name, len(losses), f"{sum(losses) / len(losses):.4f}", f"{spread:.4f} ({error:.4f})"])
            print(*rows[-1], flush=True)
    text = table(["width", "what varies with the seed", "runs", "mean loss", "standard deviation (its error)"], rows)
    if arguments.publish:
        publish("data_order_noise", ["# Noise between seeds: initialisation and data order", text, circumstances()])


if __name__ == "__main__":
    main()
