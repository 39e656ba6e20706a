"""Sweeps, plans and verdicts from Python, for any function that trains: `from speedrun_mup import sweep, plan, transfer`.

    def run(width, lr, seed):
        ...
        return loss                      # or a list of losses, or pairs (step, loss)

    swept = sweep(run, axes={"width": [64, 128, 256]}, lr=[0.001, 0.002, 0.004, 0.008], out="sweeps/mine")
    print(swept.transfer(controls={}))   # the verdict, with text and numbers
    swept.frame()                        # a table of pandas

These are what the packages of the same names do when they are called.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from speedrun_mup.core.errors import ConfigError
from speedrun_mup.files import printable

if TYPE_CHECKING:
    from speedrun_mup.plan.function import FunctionPlan
    from speedrun_mup.sweep import SweepResult
    from speedrun_mup.transfer import SurfaceResult, TransferResult

Run = Callable[..., Any]
Drift = float | Mapping[str, float]  # per doubling of the one size, or of each
ENGINES = ("local", "process", "ray")
ONLY_ARM = "run"  # what the arm of a lone function is called


@dataclass(frozen=True)
class Swept:
    """A sweep's folder after a call of `sweep`. result: counts, failed runs and what is left."""

    result: SweepResult

    @property
    def out(self) -> Path:
        """The folder."""
        return self.result.out

    @property
    def complete(self) -> bool:
        """Whether nothing is left to run and nothing failed."""
        return self.result.complete

    @property
    def failed(self) -> dict[str, str]:
        """Run -> why it failed, in a line."""
        return self.result.failed

    def rows(self) -> list[dict[str, Any]]:
        """The finished runs of the folder: arm, sizes, hyperparameter, seed, loss (nan if diverged), diverged, seconds, curve."""
        tuned = self.result.axes.hyperparameter
        return [
            {
                "arm": run.arm,
                **run.sizes,
                tuned: float(f"{run.value:.12g}"),
                "seed": run.seed,
                "loss": math.nan if run.diverged else run.loss,
                "diverged": run.diverged,
                "seconds": run.seconds,
                "curve": run.curve,
            }
            for run in self.result.results
        ]

    def frame(self) -> Any:
        """The same as a table of pandas. Raises ConfigError without that package."""
        try:
            import pandas
        except ImportError:
            raise ConfigError("a frame needs pandas: pip install pandas; without it there is .rows()") from None
        return pandas.DataFrame(self.rows())

    def transfer(self, **options: Any) -> TransferResult | SurfaceResult:
        """The verdict on this sweep; see `transfer`."""
        return transfer(self.out, **options)

    def __str__(self) -> str:
        return self.result.summary()

    __repr__ = __str__


def sweep(
    run: Run | Mapping[str, Run],
    axes: Mapping[str, Iterable[int]],
    *,
    seeds: int | Sequence[int] = 3,
    out: str | Path | None = None,
    engine: str = "local",
    workers: int | None = None,
    adaptive: bool = True,
    refine: bool = True,
    loss: str = "last",
    initial_loss: float | None = None,
    controls: Mapping[str, Drift] | None = None,
    cost: Callable[..., float] | None = None,
    budget_minutes: float | None = None,
    progress: bool = True,
    **arguments: Any,
) -> Swept:
    """Call a function at every size, value of a hyperparameter and seed, and keep what came of it in a folder.

    The folder is that of `speedrun-mup sweep`: the same call again makes what is missing, a larger one adds to it, and
    `speedrun-mup transfer` and `report` read it. A run that returns nan, or ends above where its curve began, has diverged; one
    that raises has failed, in one line, and the rest goes on. It is tried again by the next call.

    Args:
        run: Called as run(width=64, lr=0.01, seed=0). Returns the loss, a list of losses, or pairs (step, loss). Several
            functions by name are arms, to be compared.
        axes: Name of a size -> its values: {"width": [64, 128, 256]}. Of several sizes all combinations are run.
        seeds: How many, or which.
        out: The folder; by default one in sweeps/ with the function's name.
        engine: "local" runs in this process, one after the other; "process" in worker processes of this machine, which must be
            able to import the function; "ray" on a Ray cluster.
        workers: Runs at a time of "process" and "ray"; by default one per GPU, or per core.
        adaptive: Extend the grid where the best value is at its edge.
        refine: Where it is not, add half steps around the best; else one point on its better side.
        loss: What stands for a run that returns a curve, "last" or "min".
        initial_loss: A run that ends at or above it has diverged; by default the first value of its own curve.
        controls: Arms that are wrong on purpose -> the drift that they must show, log2 per doubling of the size.
        cost: Of one run, in any unit, with the same arguments; the expensive ones then begin first.
        budget_minutes: For this call.
        progress: Whether to show it.
        arguments: The hyperparameter with its values, lr=[0.001, 0.002, 0.004], and plain values for all runs.

    Returns:
        The runs, with `.frame()`, `.transfer()` and `.failed`.

    Raises:
        ConfigError: For what no run can have, and for a folder that holds another sweep.
    """
    from speedrun_mup.sweep import run_sweep, write_csv

    made = _sweep_of(run, axes, seeds, (adaptive, refine), loss, initial_loss, controls, cost, arguments)
    folder = Path(out) if out is not None else Path("sweeps") / _default_name(run)
    with closing(_engine(engine, workers, made.functions)) as where:
        result = run_sweep(made, folder, where, budget_minutes=budget_minutes, progress=progress)
    write_csv(folder, folder / "runs.csv")
    return Swept(result)


def _sweep_of(
    run: Run | Mapping[str, Run],
    axes: Mapping[str, Iterable[int]],
    seeds: int | Sequence[int],
    grid: tuple[bool, bool],
    loss: str,
    initial_loss: float | None,
    controls: Mapping[str, Drift] | None,
    cost: Callable[..., float] | None,
    arguments: Mapping[str, Any],
) -> Any:
    """The `FunctionSweep` that a call of `sweep` asks for. Raises ConfigError."""
    from speedrun_mup.sweep import Arm, grid_of
    from speedrun_mup.sweep.function import FUNCTION, Calls, FunctionSweep, log2_factor, name_of
    from speedrun_mup.transfer import Axes

    functions = dict(run) if isinstance(run, Mapping) else {ONLY_ARM: run}
    if not functions or not all(map(callable, functions.values())):
        raise ConfigError("run: give a function, or several by name: {'mup': run_mup, 'sp': run_sp}")
    sizes = _sizes(axes)
    tuned, values, constants = _hyperparameter(arguments)
    if loss not in ("last", "min"):
        raise ConfigError(f"loss={loss!r}: give 'last' or 'min', what of a curve stands for the run")
    first = next(iter(sizes))
    return FunctionSweep(
        Calls(constants, loss, initial_loss, cost),
        grid_of(sizes),
        tuple(Arm(name, {FUNCTION: name_of(one)}) for name, one in functions.items()),
        tuple(log2_factor(value) for value in values),
        _seeds(seeds),
        Axes(first, tuned),
        *grid,
        functions=functions,
        controls={arm: _over(drift, first) for arm, drift in (controls or {}).items()},
        values=values,
    )


def _sizes(axes: Mapping[str, Iterable[int]]) -> dict[str, list[int]]:
    """Size -> values. Raises ConfigError for none, and for what is no size."""
    if not isinstance(axes, Mapping) or not axes:
        raise ConfigError("axes: give the sizes to run at, such as axes={'width': [64, 128, 256]}")
    sizes = {}
    for name, values in axes.items():
        found = [values] if isinstance(values, int) else list(values)
        if not found or not all(type(value := _plain(one)) is int and value > 0 for one in found):
            raise ConfigError(f"axes: {name}={printable(found, 60)}: give whole numbers above zero")
        sizes[name] = [_plain(one) for one in found]
    return sizes


def _plain(value: Any) -> Any:
    """A number of numpy or torch as one of Python's."""
    return value.item() if hasattr(value, "item") else value


def _seeds(seeds: int | Sequence[int]) -> tuple[int, ...]:
    found = tuple(range(seeds)) if isinstance(seeds, int) else tuple(_plain(seed) for seed in seeds)
    if not found or not all(type(seed) is int for seed in found):
        raise ConfigError(f"seeds={printable(seeds, 60)}: give how many, 1 or more, or the seeds themselves")
    return found


def _over(drift: Drift, size: str) -> Mapping[str, float]:
    return drift if isinstance(drift, Mapping) else {size: drift}


def _hyperparameter(arguments: Mapping[str, Any]) -> tuple[str, tuple[float, ...], dict[str, Any]]:
    """The one argument with several values, its values in order, and all others. Raises ConfigError."""
    listed = {
        name: value for name, value in arguments.items() if isinstance(value, Iterable) and not isinstance(value, str)
    }
    if len(listed) != 1:
        have = f"; {' and '.join(listed)} have several" if listed else ""
        raise ConfigError(
            f"give one hyperparameter its values, such as lr=[0.001, 0.002, 0.004]{have}; sizes go to axes"
        )
    ((name, given),) = listed.items()
    try:
        values = tuple(sorted(float(value) for value in given))
        good = bool(values) and all(0 < value < math.inf for value in values)
    except (TypeError, ValueError):
        good = False
    if not good:
        raise ConfigError(f"{name}={printable(list(given), 60)}: give numbers above zero")
    return name, values, {key: _plain(value) for key, value in arguments.items() if key != name}


def _default_name(run: Run | Mapping[str, Run]) -> str:
    from speedrun_mup.sweep.function import name_of

    name = "-".join(run) if isinstance(run, Mapping) else name_of(run)
    return "".join(letter if letter.isalnum() or letter in "-_" else "_" for letter in name)[:60]


def _engine(name: str, workers: int | None, functions: Mapping[str, Run]) -> Any:
    from speedrun_mup.sweep import open_engine
    from speedrun_mup.sweep.function import ThisProcess, check_importable

    if name not in ENGINES:
        raise ConfigError(f"engine={name!r} is unknown; choose from {', '.join(ENGINES)}")
    if name == "local":
        if workers not in (None, 1):
            raise ConfigError(f"workers={workers}: engine='local' is this process; give engine='process' for several")
        return ThisProcess()
    if name == "process":
        check_importable(functions.values())
    return open_engine({"process": "local"}.get(name, name), workers, "auto")


def plan(
    run: Run,
    target: int | Mapping[str, int],
    *,
    budget: float | str = "10%",
    cost: Callable[..., float] | None = None,
    smallest: int = 1,
    **arguments: Any,
) -> FunctionPlan:
    """The cheap runs of a function that tune an expensive one. Nothing is run before `.run()`.

    Args:
        run: As in `sweep`.
        target: The size to tune for: 1024, or {"width": 1024} or another axis.
        budget: What the runs may cost, as a share of the target's: 0.1 or "10%".
        cost: Of one run, in any unit, with the same arguments; by default it grows as the square of the size.
        smallest: Size below which no run makes sense.
        arguments: The hyperparameter, by a value near which the best is expected, lr=0.004, or by the values to try,
            lr=[0.001, 0.002, ...]; and plain values for all runs.

    Returns:
        The plan: print it; `.run(out=...)` makes the runs and predicts.

    Raises:
        NoPlanFits: The budget is too small.
        ConfigError: For what no run can have.
    """
    from speedrun_mup.plan.function import choose

    sizes = dict(target) if isinstance(target, Mapping) else {"width": target}
    if len(sizes) != 1 or not all(type(size) is int and size > 1 for size in sizes.values()):
        raise ConfigError(f"target={printable(target, 60)}: give one size as a whole number, such as {{'width': 1024}}")
    ((axis, size),) = sizes.items()
    constants, tuned, values = _planned(arguments)
    return choose(run, axis, size, tuned, values, constants, _share(budget), cost, smallest)


def _planned(arguments: Mapping[str, Any]) -> tuple[dict[str, Any], str, tuple[float, ...]]:
    """Constants, hyperparameter and its values; one value is the middle of a grid that the plan chooses."""
    if any(isinstance(value, Iterable) and not isinstance(value, str) for value in arguments.values()):
        name, values, constants = _hyperparameter(arguments)
        return constants, name, values
    rates = [name for name in arguments if name == "lr" or name.endswith(("_lr", "learning_rate"))]
    if len(rates) != 1:
        raise ConfigError(
            "plan: name what is tuned, by a value near the best one, lr=0.004, or by those to try, lr=[0.002, 0.004]"
        )
    name, values, _ = _hyperparameter({rates[0]: [arguments[rates[0]]]})
    return {key: _plain(value) for key, value in arguments.items() if key != name}, name, values


def _share(budget: float | str) -> float:
    try:
        share = float(budget[:-1]) / 100 if isinstance(budget, str) and budget.endswith("%") else float(budget)
    except ValueError:
        share = math.nan
    if not 0 < share < math.inf:
        raise ConfigError(f"budget={budget!r}: give a share of the target's cost, such as '10%' or 0.1")
    return share


def transfer(
    runs: Any,
    *,
    sizes: str | Sequence[str] | None = None,
    hyperparameter: str | None = None,
    columns: Mapping[str, str] | None = None,
    loss: str = "",
    names: str = "",
    form: str = "",
    controls: Mapping[str, Drift] | None = None,
    **options: Any,
) -> TransferResult | SurfaceResult:
    """Does the best value of the hyperparameter stay put as the models grow? The verdict, as `speedrun-mup transfer` has it.

    Args:
        runs: What `sweep` returned; a sweep's folder, a table or logs of another program, by their path; a table of pandas; or
            rows, each a mapping with width, lr, loss and, if any, seed and arm.
        sizes: What was scaled, if not width; several make a verdict for each.
        hyperparameter: What was tuned, if not lr.
        columns: Meaning -> column: {"width": "n_embd", "loss": "val/loss"}.
        loss: Of a run with a curve, "last" or "min".
        names: Pattern of the names of logged runs: "w{width}-lr{lr}".
        form: Which logs of a folder to read.
        controls: Arms that are wrong on purpose -> the drift that they must show.
        options: `tested`, `sigma`, `accept`, `initial_loss`, and for one size `base_size`.

    Returns:
        The verdict: print it for the text; `.verdict`, `.arms` and `.to_json()` have the numbers.

    Raises:
        TransferError, ConfigError: In one line, for runs that cannot be measured.
    """
    from speedrun_mup.transfer import Axes, measure_surface, measure_transfer
    from speedrun_mup.transfer.sources import is_sweep
    from speedrun_mup.transfer.table import read_any

    asked = [sizes] if isinstance(sizes, str) else list(sizes or [])
    runs = runs.out if isinstance(runs, Swept) else runs
    if isinstance(runs, str | Path) and is_sweep(Path(runs)):
        return _of_sweep(Path(runs), asked, {**options, **({"controls": controls} if controls else {})})
    named = {"size": asked[0]} if asked else {}
    axes = Axes(**named, **({"hyperparameter": hyperparameter} if hyperparameter else {}))
    table = read_any(runs, axes, columns, asked[1:], loss=loss, names=names, form=form)
    options = {"doubts": table.doubts, "notes": table.notes, **options}
    known: Any = controls or {}
    if len(asked) > 1:
        over = {arm: _over(drift, asked[0]) for arm, drift in known.items()}
        return measure_surface(table.points, asked, hyperparameter=axes.hyperparameter, controls=over, **options)
    flat = {arm: next(iter(_over(drift, axes.size).values())) for arm, drift in known.items()}
    return measure_transfer(table.points, axes=axes, controls=flat, **options)


def _of_sweep(folder: Path, sizes: Sequence[str], options: Mapping[str, Any]) -> TransferResult | SurfaceResult:
    from speedrun_mup.sweep import measure_sweep, measure_sweep_surface, read_definition, size_names

    if "controls" in options:
        raise ConfigError(f"controls: {printable(folder)} is a sweep, which knows its controls; leave them out")
    have = size_names(read_definition(folder))
    if unknown := [name for name in sizes if name not in have]:
        raise ConfigError(f"sizes: {printable(unknown[0], 60)} is none of {', '.join(have)}, which the sweep has")
    if len(have) > 1 and len(sizes) != 1:
        return measure_sweep_surface(folder, **options)
    return measure_sweep(folder, size=sizes[0] if sizes else None, **options)
