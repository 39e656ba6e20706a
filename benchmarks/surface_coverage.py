"""Do the intervals of runs over several sizes hold what they promise, and do wrong rules fail?

python benchmarks/surface_coverage.py --repeats 200 --publish

Plants exponents, optima, losses and noise, anew each time, on one to four axes, at the places that a plan takes (one and two
doublings along each size, one along each pair), measures them, and counts: planted drifts, best rates and losses inside their
90 % intervals, inside the places' range and up to four doublings beyond; right rules that pass; rules off by 0.5 per doubling,
as the controls are, and by 0.35, that fail.
"""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from common import circumstances, publish, table  # noqa: E402
from helpers.surfaces import BASE, World, design  # noqa: E402

from speedrun_mup.transfer import Known, TransferError, Verdict, fit_surface  # noqa: E402

AXES = (("width",), ("width", "tokens"), ("width", "batch_tokens", "tokens"), tuple(BASE))
FAR = {"width": 4, "n_layer": 3, "batch_tokens": 3, "tokens": 4}  # doublings above the base, of which two were run
NEAR = {"width": 2, "n_layer": 1, "batch_tokens": 1, "tokens": 2}
ROWS = (
    ("drift of each axis", "drift"),
    ("best value, inside the places", "value near"),
    ("best value, beyond them", "value far"),
    ("loss, inside the places", "loss near"),
    ("loss, beyond them", "loss far"),
    ("right rule passes", "right"),
    ("rule off by 0.5 fails", "wrong"),
    ("rule off by 0.35 fails", "less wrong"),
)


def once(names: tuple[str, ...], seed: int, sigma: float, found: dict[str, list[float]]) -> None:
    """One world, measured; what held goes into `found`."""
    rng = np.random.default_rng([seed, len(names)])
    world = World.drawn(names, rng, sigma=sigma, offset=2 * sigma)
    runs = list(world.runs(design(names), rng))
    signs = {name: rng.choice([-1.0, 1.0]) for name in names}
    try:
        surface = fit_surface(runs, names, known=Known(world.drifts, follow=frozenset(names)), resamples=400, seed=seed)
    except TransferError:
        found["refused"].append(1.0)
        return
    found["refused"].append(0.0)
    for name in names:
        low, high = surface[name].drift.interval()
        found["drift"].append(low <= world.drifts[name] <= high)
        found["right"].append(surface[name].verdict is Verdict.PASS)
    for key, off in (("wrong", 0.5), ("less wrong", 0.35)):
        rule = {name: drift + off * signs[name] for name, drift in world.drifts.items()}
        mistaken = fit_surface(runs, names, known=Known(rule), resamples=400, seed=seed)
        found[key] += [mistaken[name].verdict is Verdict.FAIL for name in names]
    for where, place in (("near", NEAR), ("far", FAR)):
        at = {name: place[name] for name in names}
        forecast = surface.predict({name: BASE[name] * 2**j for name, j in at.items()})
        (low, high), best = forecast.log2_value.interval(), world.best(at)
        found[f"value {where}"].append(low <= best <= high)
        found[f"value width {where}"].append(high - low)
        (low, high), loss = forecast.loss.interval(), world.loss(at)
        found[f"loss {where}"].append(
            low <= loss + math.hypot(world.sigma, world.offset) * rng.standard_normal() <= high
        )
        found[f"loss width {where}"].append(high - low)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=200)
    parser.add_argument(
        "--sigma", type=float, default=0.005, help="of one run, nats; seeds shift whole curves by twice that"
    )
    parser.add_argument("--publish", action="store_true")
    arguments = parser.parse_args()
    columns = []
    for names in AXES:
        found: dict[str, list[float]] = {key: [] for key in ("refused", *(key for _, key in ROWS))}
        for where in ("near", "far"):
            found |= {f"value width {where}": [], f"loss width {where}": []}
        for seed in range(arguments.repeats):
            once(names, seed, arguments.sigma, found)
        columns.append(found)
        print(len(names), {key: round(float(np.mean(found[key])), 3) for _, key in ROWS}, flush=True)
    rows = [[text, *(f"{np.mean(found[key]):.1%}" for found in columns)] for text, key in ROWS]
    for what, unit in (("value", "log2"), ("loss", "nats")):
        for where, told in (("near", "inside"), ("far", "beyond")):
            widths = [f"{np.median(found[f'{what} width {where}']):.2f}" for found in columns]
            rows.append([f"interval of the {what} {told}, median width, {unit}", *widths])
    rows.append(["tables without an answer", *(f"{np.mean(found['refused']):.1%}" for found in columns)])
    header = ["", *(f"{len(names)} {'axis' if len(names) == 1 else 'axes'}" for names in AXES)]
    text = table(header, rows)
    print(text)
    if arguments.publish:
        places = ", ".join(str(len(design(names))) for names in AXES)
        about = (
            f"{arguments.repeats} simulated tables for each number of axes, at {places} places, "
            f"five values and two seeds at each, noise {arguments.sigma:g} nats and twice that between seeds. Exponents of the "
            "best value -0.5 to 0.5, of the loss 0.1 to 0.9, curvature 0.015 to 0.04 nats, effects that add up to effects that "
            "multiply. The ceiling is 90 % inside intervals of 90 %, and 100 % of the verdicts."
        )
        publish("surface_coverage", ["# Coverage of intervals over several sizes", about, text, circumstances()])


if __name__ == "__main__":
    main()
