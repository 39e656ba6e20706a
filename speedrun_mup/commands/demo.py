"""`speedrun-mup demo`, which is also `make demo`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from speedrun_mup.commands import coord_check, plan, report, sample
from speedrun_mup.commands.train import STOPPED_BY_SIGNAL, train_and_report
from speedrun_mup.flags import new_parser, parse

FOLDER = Path("runs/demo")
CHECK = ["--data", "embedded", "--widths", "32", "64", "128", "256", "--seeds", "1"]
TARGET = ["--width", "256", "--base-width", "64", "--mup", "--head-dim", "16", "--batch-tokens", "1024"]
TARGET += ["--tokens", "131072", "--data", "embedded", "--val-tokens", "32768", "--val-every", "0"]
TARGET += ["--device", "cpu"]  # one small run per core at a time; on a GPU it would be one per GPU
PROXIES = ["--axes", "width", "tokens", "--priors", "published"]  # it is known how the rate moves with the length
TEXT = ["--device", "cpu", "--prompt", "def read(", "--max-new-tokens", "160"]
BUDGET = "65%"  # of so small a target run; a real one costs a few percent


def run(argv: Sequence[str]) -> int:
    """The main job, small: check the rules, tune on narrow models, train a wider one once, see if the forecast held."""
    parse(new_parser("speedrun-mup demo", run.__doc__ or ""), argv)
    print("1/4  Are the rules right? A coordinate check, with four controls that must fail.")
    code = coord_check.run([*CHECK, "--out", str(FOLDER), "--name", "coord-check"])
    if code:
        return code
    print("\n2/4  Tune on narrow and short runs: widths 16 to 64, 64 steps, for a target of width 256 and 128 steps.")
    proxies = FOLDER / "plan"
    code = plan.run([*TARGET, *PROXIES, "--budget", BUDGET, "--run", "--out", str(proxies)])
    if code:
        return code

    from speedrun_mup.plan import recommended_config

    print("\n3/4  Train the wide model once, with the learning rate that the narrow ones chose.")
    result = train_and_report(recommended_config(proxies))
    if not result.finished:
        return STOPPED_BY_SIGNAL
    print("\n4/4  How far off is it?")
    checked = str(FOLDER / "coord-check" / "coord-check.json")
    code = report.run([str(proxies), "--coord-check", checked, "--target", str(result.folder)])
    if not code:
        print("\nText from the wide model, after so little training (more: speedrun-mup sample RUN):\n")
        code = sample.run([str(result.folder), *TEXT])
    return code
