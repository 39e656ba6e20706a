"""Runs in SQLite files: studies of Optuna, projects of trackio.

A file is copied before it is opened, with its write-ahead log, so that nothing is written next to it.
"""

from __future__ import annotations

import contextlib
import json
import math
import shutil
import sqlite3
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from speedrun_mup.files import open_regular, printable
from speedrun_mup.transfer.points import TransferError
from speedrun_mup.transfer.sources.logs import LoggedRun, cell_of, flat

MAGIC = b"SQLite format 3\0"
MOST_BYTES, MOST_ROWS, MOST_WORK = 256 * 2**20, 2_000_000, 2_000  # the last in millions of SQLite's instructions
_OPTUNA, _TRACKIO = {"trials", "trial_params", "trial_values"}, {"metrics", "configs"}


def is_optuna(path: Path) -> bool:
    """Whether a file is Optuna's storage."""
    return _is_database(path) and _tables(path) >= _OPTUNA


def is_trackio(path: Path) -> bool:
    """Whether a file is a project of trackio."""
    return _is_database(path) and _tables(path) >= _TRACKIO


def _is_database(path: Path) -> bool:
    try:
        with open_regular(path) as file:
            return file.read(len(MAGIC)) == MAGIC
    except OSError:
        return False


def _tables(path: Path) -> set[str]:
    with _opened(path) as rows:
        return {name for (name,) in rows("SELECT name FROM sqlite_master WHERE type = 'table'")}


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """A function that yields the rows of a query. TransferError for a file that is damaged, too large, or endless to read."""
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        try:
            for name in (path.name, f"{path.name}-wal"):
                if name == path.name or path.with_name(name).is_file():
                    with open_regular(path.with_name(name)) as file, open(Path(folder) / name, "wb") as copy:
                        if file.seek(0, 2) > MOST_BYTES:
                            raise TransferError(f"{printable(path)}: holds more than {MOST_BYTES:,} bytes")
                        file.seek(0)
                        shutil.copyfileobj(file, copy)
            database = stack.enter_context(contextlib.closing(sqlite3.connect(Path(folder) / path.name)))
            database.execute("PRAGMA trusted_schema = OFF")
            work = iter(range(MOST_WORK))
            database.set_progress_handler(lambda: next(work, None) is None, 10**6)

            def rows(query: str) -> Iterator[tuple[Any, ...]]:
                for number, row in enumerate(database.execute(query)):
                    if number == MOST_ROWS:
                        raise TransferError(f"{printable(path)}: more than {MOST_ROWS:,} rows")
                    yield row

            yield rows
        except (OSError, sqlite3.Error, UnicodeError) as fault:
            raise TransferError(f"{printable(path)}: cannot be read ({printable(str(fault), 80)})") from None


def read_optuna(files: Sequence[Path], root: Path) -> Iterator[LoggedRun]:
    """Trials of Optuna's studies, by its tables; the loss is what they call value."""
    for path in files:
        with _opened(path) as rows:
            studies = dict(rows("SELECT study_id, study_name FROM studies"))
            trials: dict[int, LoggedRun] = {}
            for trial, number, study, state in rows("SELECT trial_id, number, study_id, state FROM trials"):
                name = f"{cell_of(studies.get(study))} trial {number}"
                trials[trial] = LoggedRun(name, {"study": cell_of(studies.get(study))}, state=cell_of(state))
            query = "SELECT trial_id, param_name, param_value, distribution_json FROM trial_params"
            for trial, name, value, distribution in (row for row in rows(query) if row[0] in trials):
                trials[trial].settings[str(name)] = _parameter(value, distribution)
            with contextlib.suppress(sqlite3.OperationalError):  # older storages have no such table
                query = "SELECT trial_id, key, value_json FROM trial_user_attributes"
                for trial, name, text in (row for row in rows(query) if row[0] in trials):
                    trials[trial].settings.setdefault(str(name), cell_of(_plain(text)))
            kinds = {"INF_POS": math.inf, "INF_NEG": -math.inf}
            query = "SELECT trial_id, objective, value, value_type FROM trial_values"
            for trial, objective, value, kind in (row for row in rows(query) if row[0] in trials):
                finite = kind == "FINITE" and isinstance(value, int | float)
                number = float(value) if finite else kinds.get(kind, math.nan)
                trials[trial].add("value" if not objective else f"value_{objective}", -math.inf, number)
        yield from trials.values()


def _parameter(value: Any, distribution: Any) -> str:
    """A parameter as Optuna means it: of a choice the number is its place, whole numbers are kept as floats."""
    kind = _plain(distribution)
    try:
        attributes = kind["attributes"]
        if kind["name"] == "CategoricalDistribution":
            return cell_of(attributes["choices"][int(value)])
        return cell_of(int(value)) if kind["name"].startswith("Int") else cell_of(value)
    except (TypeError, KeyError, ValueError, IndexError, AttributeError, OverflowError):
        return cell_of(value)


def _plain(text: Any) -> Any:
    try:
        return json.loads(text)
    except (TypeError, ValueError, RecursionError):
        return None


def read_trackio(files: Sequence[Path], root: Path) -> Iterator[LoggedRun]:
    """Runs of trackio's projects."""
    for path in files:
        with _opened(path) as rows:
            columns = {row[1] for row in rows("PRAGMA table_info(metrics)")}
            key = "run_id" if "run_id" in columns else "run_name"  # editions before run_id knew runs by name
            runs: dict[str, LoggedRun] = {}
            for run, name, config in rows(f"SELECT {key}, run_name, config FROM configs"):
                runs[run] = LoggedRun(str(name))
                runs[run].settings = {k: v for k, v in flat(_plain(config)) if not k.startswith("_")}
            for run, name, step, values in rows(f"SELECT {key}, run_name, step, metrics FROM metrics ORDER BY id"):
                one = runs.setdefault(run, LoggedRun(str(name)))
                record = _plain(values)
                if isinstance(record, dict):
                    one.log(record | {"_step": step}, 0)
        yield from runs.values()
