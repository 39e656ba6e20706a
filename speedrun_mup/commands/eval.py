"""`speedrun-mup eval`."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from speedrun_mup.commands.sample import run_parser
from speedrun_mup.core.errors import ConfigError
from speedrun_mup.data.sources import suffix
from speedrun_mup.files import strict_json
from speedrun_mup.flags import Parser, count, parse, several
from speedrun_mup.packages import import_extra

if TYPE_CHECKING:
    from speedrun_mup.training.load import LoadedRun

TASK_FLAGS = ("tasks_folder", "limit", "num_fewshot")


def run(argv: Sequence[str]) -> int:
    """Measure how well a trained model predicts text: loss, perplexity and bits per byte; or its score on tasks of lm-eval."""
    flags = vars(parse(eval_parser(), argv))
    own, as_json, tasks = (flags.pop(name) for name in ("run_data", "json", "tasks"))
    data, tokens, suffixes = (flags.pop(name) for name in ("data", "tokens", "suffix"))
    wanted = {name: flags.pop(name) for name in TASK_FLAGS}
    if wanted["num_fewshot"] is not None and wanted["num_fewshot"] < 0:
        raise ConfigError(f"--num-fewshot {wanted['num_fewshot']} must be at least 0")
    if tasks and (data is not None or tokens is not None):
        raise ConfigError("--tasks have their own text; leave out --data and --tokens")
    if suffixes and data is None:
        raise ConfigError("--suffix is about a folder of text; give --data")
    if not tasks and (given := [name for name, value in wanted.items() if value is not None]):
        raise ConfigError(f"--{given[0].replace('_', '-')} is about tasks; give --tasks")
    if tasks:
        import_extra("lm_eval", "__version__", "--tasks", "lm-eval")

    from speedrun_mup.training.load import load_run

    loaded = load_run(**flags, data=own)
    if tasks:
        return _run_tasks(loaded, tasks, as_json, wanted)
    found = loaded.evaluate(data, tokens, suffixes or ())
    print(strict_json(dataclasses.asdict(found), indent=1) if as_json else found.summary())
    return 0


def eval_parser() -> Parser:
    """The flags."""
    parser = run_parser("speedrun-mup eval", run.__doc__ or "")
    parser.stray = "give text or a corpus as --data"
    parser.add_argument(
        "--data",
        help="a corpus as in training, or a text file, a folder of them, or - (the run's own validation split)",
    )
    parser.add_argument(
        "--tokens", type=count, metavar="N", help="at most (all of --data; of the run's own split, its --val-tokens)"
    )
    parser.add_argument(
        "--suffix",
        **several(suffix),
        metavar="SUFFIX",
        help="of files in --data to read as plain text too, such as .py .c",
    )
    parser.add_argument("--json", action="store_true", help="as JSON")
    group = parser.add_argument_group("tasks of lm-evaluation-harness (pip install 'speedrun-mup[lm-eval]')")
    group.add_argument(
        "--tasks", **several(str), metavar="TASK", help="such as arc_easy,lambada_openai, instead of text"
    )
    group.add_argument("--tasks-folder", type=Path, metavar="DIR", help="of task files of your own, whose code is run")
    group.add_argument("--limit", type=count, metavar="N", help="questions of each task (all)")
    group.add_argument("--num-fewshot", type=int, metavar="N", help="examples before each question (as the task says)")
    return parser


def _run_tasks(loaded: LoadedRun, tasks: Sequence[str], as_json: bool, wanted: dict[str, Any]) -> int:
    from speedrun_mup.export.lm_eval import evaluate_tasks, table

    found = evaluate_tasks(
        loaded, tasks, folder=wanted["tasks_folder"], limit=wanted["limit"], num_fewshot=wanted["num_fewshot"]
    )
    print(strict_json(found["results"], indent=1) if as_json else table(found))
    return 0
