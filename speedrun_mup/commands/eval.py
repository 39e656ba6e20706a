"""`speedrun-mup eval`."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence

from speedrun_mup.commands.sample import run_parser
from speedrun_mup.flags import count, parse


def run(argv: Sequence[str]) -> int:
    """Measure how well a trained model predicts text: loss, perplexity and bits per byte, with standard errors."""
    parser = run_parser("speedrun-mup eval", run.__doc__ or "")
    parser.add_argument(
        "--data",
        help="a corpus as in training, or a text file, a folder of them, or - (the run's own validation split)",
    )
    parser.add_argument(
        "--tokens", type=count, metavar="N", help="at most (all of --data; of the run's own split, its --val-tokens)"
    )
    parser.add_argument("--run-data", help="the corpus that it was trained on, if it has moved")
    parser.add_argument("--json", action="store_true", help="as JSON")
    flags = vars(parse(parser, argv))
    data, tokens, own, as_json = (flags.pop(name) for name in ("data", "tokens", "run_data", "json"))

    from speedrun_mup.training.load import load_run

    found = load_run(**flags, data=own).evaluate(data, tokens)
    print(json.dumps(dataclasses.asdict(found), indent=1, allow_nan=False) if as_json else found.summary())
    return 0
