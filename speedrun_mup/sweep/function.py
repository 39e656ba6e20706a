"""Sweeps whose runs are calls of a Python function: `def run(width, lr, seed): ... return loss`."""

from __future__ import annotations

import functools
import hashlib
import inspect
import json
import math
import numbers
import platform
import re
import sys
import time
import traceback
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from dataclasses import dataclass
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any, ClassVar

from speedrun_mup.core.errors import ConfigError, Diverged, UserError, in_a_line
from speedrun_mup.files import printable, write_whole
from speedrun_mup.sweep.any_sweep import AnyRun, AnySweep, run_safely
from speedrun_mup.sweep.arms import Arm
from speedrun_mup.sweep.command.metric import Curve
from speedrun_mup.sweep.command.run import LOGS
from speedrun_mup.sweep.engines import Outcome
from speedrun_mup.sweep.result import SCHEMA, Failure, RunResult
from speedrun_mup.transfer.axes import Sizes, told_sizes

FUNCTION = "function"  # setting of an arm
UNIT = (
    2.0**-10
)  # the hyperparameter where a factor is 1, in every sweep of functions, so that a folder may grow by any values
LAST, MIN = "last", "min"


@dataclass(frozen=True)
class Calls:
    """What the calls of a sweep have in common.

    Args:
        constants: Further arguments, plain values.
        loss: What stands for a run that returns a curve: its last value, or its lowest.
        initial_loss: A run that ends at or above it has diverged; None: the first value of its curve.
        cost: Of a run, in any unit, as a function of the same arguments; None if nobody knows.
    """

    constants: Mapping[str, Any]
    loss: str = LAST
    initial_loss: float | None = None
    cost: Callable[..., float] | None = None


@dataclass(frozen=True)
class FunctionRun(AnyRun):
    """One call.

    Args:
        function: What is called.
        arguments: By name.
        calls: What it has in common with others.
        tuned: The hyperparameter.
        price: What it costs, 0 where nobody knows.
    """

    function: Callable[..., Any]
    arguments: Mapping[str, Any]
    calls: Calls
    tuned: str
    price: float

    def __str__(self) -> str:
        return f"{self.arm} {told_sizes(self.sizes)} {self.tuned} {self.arguments[self.tuned]:.6g} seed {self.seed}"

    @functools.cached_property
    def id(self) -> str:
        """16 hex digits, the same wherever it runs: a hash of its arm and its arguments."""
        what = [SCHEMA, FUNCTION, self.arm, self.arguments, self.seed, self.calls.loss]
        return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:16]

    @functools.cached_property
    def flops(self) -> float:
        """What training it takes; 0 where that is not known."""
        return self.price

    def run(self, scratch: Path) -> RunResult | Failure:
        """Call the function. What it raises is a Failure of one line, with the traceback in a log of the sweep's folder."""
        began, loss, curve, reason = time.perf_counter(), math.nan, Curve(), ""
        source = source_of(self.function)
        try:
            curve = curve_of(self.function(**self.arguments))
            loss = min(curve.losses) if self.calls.loss == MIN and math.isfinite(curve.losses[-1]) else curve.losses[-1]
            reason = self._divergence(loss, curve)
        except (Diverged, FloatingPointError) as fault:
            reason = in_a_line(fault)
        except Exception as fault:
            return Failure(self._told(fault, scratch.parent), again=False)
        took = time.perf_counter() - began
        return RunResult(
            id=self.id,
            arm=self.arm,
            sizes=dict(self.sizes),
            log2_factor=self.log2_factor,
            seed=self.seed,
            loss=loss if math.isfinite(loss) else math.nan,
            train_loss=math.nan,
            diverged=bool(reason),
            reason=reason,
            curve=curve.losses,
            seconds=took,
            train_s=took,
            flops=self.price,
            corpus="",
            vocab_size=None,
            config={"iterations": len(curve.losses), **self.arguments},
            made_with={"source_sha256": source, "platform": platform.platform(), "host": platform.node()},
            unit=self.arguments[self.tuned] / 2.0**self.log2_factor,
            steps=curve.steps,
        )

    def _divergence(self, loss: float, curve: Curve) -> str:
        """Why the run has diverged; nothing if it has not."""
        if not math.isfinite(loss):
            return f"its last loss is {loss}"
        begin = self.calls.initial_loss
        if begin is None:
            begin = next((value for value in curve.losses[:-1] if math.isfinite(value)), math.inf)
        return "" if curve.losses[-1] < begin else f"ended at a loss of {curve.losses[-1]:.4f}, began at {begin:.4f}"

    def _told(self, fault: Exception, out: Path) -> str:
        """A fault in a line, with its place; the whole traceback goes to a log."""
        log = out / LOGS / f"{re.sub(r'[^A-Za-z0-9._=+-]', '_', str(self))[:120]}-{self.id[:6]}.txt"
        write_whole(log, "".join(traceback.format_exception(fault)))
        place = traceback.extract_tb(fault.__traceback__)[-1]
        text = str(fault) if isinstance(fault, UserError) else in_a_line(fault)
        return f"{printable(text)} (line {place.lineno} of {Path(place.filename).name}); traceback: {printable(log)}"


def curve_of(told: Any) -> Curve:
    """What a function returned: a loss, losses of steps 0, 1, 2, ..., or pairs of step and loss.

    Numbers of numpy and torch will do. Raises ConfigError for anything else.
    """
    told = told.tolist() if hasattr(told, "tolist") else told
    if isinstance(told, numbers.Real) and not isinstance(told, bool):
        return Curve([0], [float(told)])
    try:
        points = [entry.tolist() if hasattr(entry, "tolist") else entry for entry in told]
        if points and all(isinstance(entry, numbers.Real) for entry in points):
            return Curve.of((step, float(loss)) for step, loss in enumerate(points))
        curve = Curve.of((int(step), float(loss)) for step, loss in points)
        if curve.losses:
            return curve
    except (TypeError, ValueError, OverflowError):
        pass
    shown = printable(repr(told), 60)
    raise ConfigError(f"it returned {shown}; return the loss as a number, a list of losses, or of pairs (step, loss)")


def source_of(function: Callable[..., Any]) -> str:
    """A hash of a function's own code; of what it calls nothing is known."""
    while isinstance(function, functools.partial):
        function = function.func
    try:
        text = inspect.getsource(function)
    except Exception:  # of code without a file there is none, or something else in its place
        code = getattr(function, "__code__", None)
        text = code.co_code.hex() + repr(code.co_names) if code else name_of(function)
    return hashlib.sha256(text.encode()).hexdigest()


def name_of(function: Callable[..., Any]) -> str:
    """How a function is called, for a reader and for the sweep's folder."""
    while isinstance(function, functools.partial):
        function = function.func
    return printable(getattr(function, "__qualname__", type(function).__qualname__), 100)


@dataclass(frozen=True)
class FunctionSweep(AnySweep):
    """Which calls to make: each arm is a function.

    Args:
        base: What all calls have in common.
        functions: Name of an arm -> what it calls.
        controls: Arm -> size axis -> the drift that it must show.
        values: Those of the hyperparameter that were asked for, as they were written.

    Raises:
        ConfigError: For a function that does not take the arguments, or a value that no run can have.
    """

    base: Calls
    functions: Mapping[str, Callable[..., Any]] | None = None
    controls: Mapping[str, Mapping[str, float]] | None = None
    values: tuple[float, ...] = ()

    trainer: ClassVar[str] = FUNCTION

    def __post_init__(self) -> None:
        super().__post_init__()
        names = [*self.size_names, self.axes.hyperparameter]
        if both := {*names, "seed"} & {*self.base.constants}:
            raise ConfigError(f"{min(both)} is given twice: as an axis, and as {self.base.constants[min(both)]!r}")
        if unknown := {*(self.controls or {})} - {arm.name for arm in self.arms}:
            raise ConfigError(
                f"controls: no arm is called {printable(min(unknown))}; there are {', '.join(a.name for a in self.arms)}"
            )
        for name, value in self.base.constants.items():
            if not isinstance(value, bool | int | float | str | None):
                told = f"{name} is {printable(type(value).__name__, 40)}, and only plain values identify a run"
                raise ConfigError(f"{told}; bind it with functools.partial(run, {name}=...)")
        for arm in self.arms:
            self._arguments(arm, self.sized[0], self.log2_factors[0], self.seeds[0])

    @functools.cached_property
    def _exact(self) -> dict[float, float]:
        """Log2 factor -> the value as it was written."""
        return {log2_factor(value): value for value in self.values}

    def _arguments(self, arm: Arm, sizes: Sizes, at: float, seed: int) -> dict[str, Any]:
        """Of one call. Raises ConfigError if the function does not take them."""
        function, tuned = self._function(arm), self.axes.hyperparameter
        value = self._exact.get(at, float(f"{UNIT * 2.0**at:.6g}"))
        arguments = {**self.base.constants, **sizes, tuned: value, "seed": seed}
        try:
            signature = inspect.signature(function)
        except (TypeError, ValueError):  # of some built-in functions nothing is known
            return arguments
        takes = signature.parameters
        if "seed" not in takes and not any(one.kind is one.VAR_KEYWORD for one in takes.values()):
            if len(self.seeds) > 1:
                raise ConfigError(f"{name_of(function)}: it takes no seed; add one to its arguments, or give seeds=1")
            del arguments["seed"]
        try:
            signature.bind(**arguments)
        except TypeError as fault:
            raise ConfigError(f"{name_of(function)}({', '.join(arguments)}): {fault}") from None
        return arguments

    def _function(self, arm: Arm) -> Callable[..., Any]:
        return (self.functions or {})[arm.name]

    @functools.cached_property
    def predicted(self) -> dict[str, dict[str, float]]:
        """See `AnySweep`."""
        return {arm: dict(drifts) for arm, drifts in (self.controls or {}).items()}

    def told(self) -> Iterator[str]:
        """See `AnySweep`."""
        for name in self.size_names:
            yield f"axis: {name} {', '.join(str(value) for value in dict.fromkeys(sizes[name] for sizes in self.sized))}"
        held = ", ".join(f"{name} {value}" for name, value in self.base.constants.items())
        yield f"tuned: {self.axes.hyperparameter}" + (f"; held: {held}" if held else "")

    def check(self) -> None:
        """See `AnySweep`."""

    def definition(self, data: None, known: Mapping[str, Any]) -> dict[str, Any]:
        """See `AnySweep`."""
        held = {name: json.dumps(value) for name, value in self.base.constants.items()}
        return {"set": held, "loss": self.base.loss}

    def seeds_draw(self) -> str:
        """See `AnySweep`."""
        return "initialisation and whatever else the function draws from its seed"

    def source(self) -> str:
        """See `AnySweep`."""
        return source_of(self._function(self.arms[0]))

    def run_spec(self, arm: Arm, sizes: int | Sizes, log2_factor: float, seed: int, data: None) -> FunctionRun:
        """See `AnySweep`."""
        at = dict(sizes) if isinstance(sizes, Mapping) else {self.axes.size: sizes}
        arguments = self._arguments(arm, at, log2_factor, seed)
        price = float(self.base.cost(**arguments)) if self.base.cost else 0.0
        if not 0 <= price < math.inf:
            raise ConfigError(f"cost: {price} at {told_sizes(at)}; return a number above zero")
        call = self._function(arm), arguments, self.base, self.axes.hyperparameter, price
        return FunctionRun(arm.name, at, float(log2_factor), seed, *call)


def log2_factor(value: float) -> float:
    """Where a value of the hyperparameter lies on the grid; rounded, so that a value written differently is one point."""
    return round(math.log2(value / UNIT), 6)


class ThisProcess:
    """An engine (see `Engine`) that makes one run after another in this process, which any function can."""

    workers = 1

    def run(self, specs: Iterator[AnyRun], scratch: Path) -> Generator[Outcome]:
        """See Engine."""
        for spec in specs:
            yield spec, run_safely(spec, scratch)

    def close(self) -> None:
        """See Engine."""


def check_importable(functions: Iterable[Callable[..., Any]]) -> None:
    """ConfigError for a function that a new process could not import by its name."""
    for function in functions:
        main = sys.modules["__main__"]
        lost = getattr(function, "__module__", "") == "__main__" and not hasattr(main, "__file__")
        try:
            ForkingPickler.dumps(function)
        except Exception:
            lost = True
        if lost:
            advice = "write it into a module that you import, or give engine='local', which runs it here"
            raise ConfigError(f"{name_of(function)}: another process cannot import it; {advice}")
