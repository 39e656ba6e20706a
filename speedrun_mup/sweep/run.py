"""Run a sweep: what is missing, round after round, within a budget, until the grid needs nothing more."""

from __future__ import annotations

import itertools
import math
import sys
import time
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from speedrun_mup.config import TrainConfig
from speedrun_mup.files import printable
from speedrun_mup.sweep.any_sweep import AnyRun, AnySweep
from speedrun_mup.sweep.cost import CostModel
from speedrun_mup.sweep.engines import Engine
from speedrun_mup.sweep.folder import (
    RESULT,
    RUNS,
    check_and_record,
    note_failed,
    open_folder,
    read_results,
    replace_file,
)
from speedrun_mup.sweep.grid import propose_points
from speedrun_mup.sweep.ignored import ignored
from speedrun_mup.sweep.measure import made_differently
from speedrun_mup.sweep.result import Failure, Place, RunResult, mean_losses, place_of
from speedrun_mup.training.flops import run_flops
from speedrun_mup.training.signals import signals_interrupt
from speedrun_mup.training.tracking import clock
from speedrun_mup.transfer import Axes
from speedrun_mup.transfer.axes import told_sizes

ATTEMPTS = 3  # a run that fails is tried again twice


@dataclass(frozen=True)
class SweepResult:
    """What a call of `run_sweep` leaves.

    Args:
        results: Every finished run of the folder, also of earlier calls.
        ran: Runs finished by this call.
        failed: Run -> reason, after ATTEMPTS.
        left: Wanted runs that neither finished nor failed.
        stopped: By a signal.
        ignored: What is varied and a program does not seem to use, a sentence each.
        used_up: Nothing but the budget of FLOPs, which has no room for any of those left, is in the way.
    """

    out: Path
    axes: Axes
    results: tuple[RunResult, ...]
    ran: int
    failed: dict[str, str]
    left: int
    stopped: bool
    seconds: float
    used_up: bool
    ignored: tuple[str, ...] = ()

    @property
    def complete(self) -> bool:
        """Whether nothing is left to run."""
        return not self.left and not self.failed

    @property
    def flops(self) -> float:
        """Of all finished runs."""
        return sum(result.flops for result in self.results)

    def cost(self, target: TrainConfig, vocab_size: int) -> float:
        """FLOPs of all finished runs over those of the run that need not be tuned then."""
        return self.flops / run_flops(target, vocab_size)

    def summary(self) -> str:
        """Counts and cost, and a table of mean losses for each arm."""
        diverged = sum(result.diverged for result in self.results)
        worked = clock(sum(result.seconds for result in self.results))
        lines = [
            f"{self.out}: {len(self.results)} runs done ({self.ran} now, in {clock(self.seconds)}), "
            f"{diverged} diverged, {len(self.failed)} failed, {self.left} left",
            f"cost: {f'{self.flops:.3g} FLOPs, ' if self.flops else ''}{worked} of one worker's time",
            *(f"failed: {run}: {why}" for run, why in self.failed.items()),
        ]
        lines += [f"warning: {doubt.text}" for doubt in made_differently(self.results, self.axes)]
        lines += [f"warning: {line}" for line in self.ignored]
        if self.used_up:
            lines.append(f"FLOP budget exhausted, {self.left} runs left; raise --budget to continue")
        elif self.left:
            lines.append("rerun the command to resume")
        return "\n".join([*lines, *_tables(self.results)])


def _tables(results: Sequence[RunResult]) -> Iterator[str]:
    """Mean validation loss, a table per arm: sizes down, factors across."""
    for arm in dict.fromkeys(result.arm for result in results):
        means = mean_losses(result for result in results if result.arm == arm)
        grid = sorted({at for _, _, at in means})
        unit = next(result.unit for result in results if result.arm == arm)
        rows = {result.place: told_sizes(result.sizes) for result in results if result.arm == arm}
        wide = max(12, *(len(told) + 2 for told in rows.values()))
        yield ""
        yield f"{arm:<{wide}}" + "".join(f"{_at(at, unit):>10}" for at in grid)
        for place, told in sorted(rows.items()):
            losses = (means.get((arm, place, at)) for at in grid)
            shown = ("" if loss is None else "diverged" if math.isnan(loss) else f"{loss:.4f}" for loss in losses)
            yield f"{told:<{wide}}" + "".join(f"{text:>10}" for text in shown)


def _at(log2_factor: float, unit: float) -> str:
    """A column's head: a factor, or what it comes to where that is known."""
    return f"2^{log2_factor:g}" if unit == 1 else f"{unit * 2.0**log2_factor:.4g}"


def run_sweep(
    sweep: AnySweep,
    out: Path,
    engine: Engine,
    *,
    budget_minutes: float | None = None,
    budget_flops: float | None = None,
    progress: bool = True,
    part: tuple[int, int] = (0, 0),
) -> SweepResult:
    """Run what is missing of `sweep` in the folder `out`, round after round until the grid needs nothing more.

    SIGINT, SIGTERM and SIGUSR1 stop it: what is under way is given up, what is finished stays.

    Args:
        sweep: What to run.
        out: The folder, made if need be.
        engine: Where to run it.
        budget_minutes: For this call; no run is begun that would end later, as far as is known.
        budget_flops: For all runs of the folder together.
        progress: Whether to show it.
        part: (runs before this sweep, about how many in all), if it is part of more.

    Raises:
        ConfigError: If `out` is in use, cannot be written, or holds runs of another base.
    """
    data = sweep.check()
    began = time.monotonic()
    stopped = False
    with open_folder(out) as scratch, closing(_Progress(progress, *part)) as shown:
        data = check_and_record(sweep, out, data)
        deadline = math.inf if budget_minutes is None else began + 60 * budget_minutes
        shown.say(f"seeds draw the {sweep.seeds_draw()}")
        runner = _SweepRunner(out, scratch, engine, shown, deadline, math.inf if budget_flops is None else budget_flops)
        if other := _of_other_code(runner.done.values(), sweep.source()):
            shown.say(other)
        keys = itertools.product((arm.name for arm in sweep.arms), sweep.places)
        points = {key: set(map(float, sweep.log2_factors)) for key in keys}
        if sweep.adaptive:  # where an earlier call refined the grid, new seeds follow
            points = {key: points[key] | set(losses) for key, losses in runner.curves(points).items()}
        try:
            with signals_interrupt():
                while runner.run(sweep.run_specs(points, data)) and sweep.adaptive:
                    curves = runner.curves(points)
                    more = {
                        key: points[key] | propose_points(curves[key], sweep.log2_factors, sweep.refine)
                        for key in points
                    }
                    if more == points:
                        break
                    points = more
        except KeyboardInterrupt as stop:
            stopped = True
            shown.say(f"stopped by {stop}; {len(runner.done)} runs are finished, rerun the command to resume")
        wanted = sweep.run_specs(points, data)
        left = [spec for spec in wanted if spec.id not in runner.done and str(spec) not in runner.failed]
        note_failed(out, (spec for spec in wanted if str(spec) in runner.failed))
        results = tuple(sorted(runner.done.values(), key=place_of))
        used_up = bool(left) and not stopped and not runner.failed and not any(map(runner.pays_for, left))
        took = time.monotonic() - began
        unused = tuple(ignored(results, sweep.axes.hyperparameter) if sweep.trainer else ())
        return SweepResult(
            out, sweep.axes, results, runner.ran, runner.failed, len(left), stopped, took, used_up, unused
        )


def _of_other_code(results: Iterable[RunResult], mine: str) -> str:
    """A line about results that other code made than what runs now, or nothing. mine: a hash of that."""
    others = Counter(hashed for result in results if (hashed := result.made_with.get("source_sha256", mine)) != mine)
    if not others:
        return ""
    made = ", ".join(f"{printable(name, 12)} ({count})" for name, count in others.most_common(3))
    return f"{others.total()} runs here were made by other code, {made}; this is {printable(mine, 12)}: the verdict will say so"


class _SweepRunner:
    """What one call has done so far, and what it may still spend. done: id -> result, of all runs in the folder."""

    def __init__(
        self, out: Path, scratch: Path, engine: Engine, shown: _Progress, deadline: float, budget_flops: float
    ):
        self.out, self.scratch, self.engine, self.shown = out, scratch, engine, shown
        self.deadline, self.budget_flops = deadline, budget_flops
        self.done = {result.id: result for result in read_results(out)}
        self.cost_model = CostModel(self.done.values())
        self.spent = sum(result.flops for result in self.done.values())
        self.ran = 0
        self.tries: Counter[str] = Counter()
        self.failed: dict[str, str] = {}
        self.waiting: list[AnyRun] = []

    def curves(self, points: Collection[tuple[str, Place]]) -> dict[tuple[str, Place], dict[float, float]]:
        """(arm, place) -> log2 factor -> mean loss of the finished runs, for those in `points`."""
        curves: dict[tuple[str, Place], dict[float, float]] = {key: {} for key in points}
        for (arm, place, at), loss in mean_losses(self.done.values()).items():
            if (arm, place) in curves:
                curves[arm, place][at] = loss
        return curves

    def run(self, specs: Sequence[AnyRun]) -> bool:
        """Make those runs of `specs` that are not done, failed ones up to ATTEMPTS times; False if the budget ended it."""
        while todo := [spec for spec in specs if spec.id not in self.done and self.tries[spec.id] < ATTEMPTS]:
            self.waiting = sorted(todo, key=lambda spec: (-spec.flops, -math.prod(spec.place)))
            self.shown.expect(len(self.waiting))
            with closing(self.engine.run(self._affordable(), self.scratch)) as outcomes:
                for spec, outcome in outcomes:
                    self.tries[spec.id] += 1
                    self._note(spec, outcome)
            if self.waiting:
                return False
        return True

    def _affordable(self) -> Iterator[AnyRun]:
        """Take waiting runs, longest first, as long as one fits the budget; with unknown cost, the shortest first."""
        while fitting := [spec for spec in self.waiting if self._fits(spec)]:
            spec = fitting[0 if self.cost_model.known or self.deadline == math.inf else -1]
            self.waiting.remove(spec)
            self.spent += spec.flops
            yield spec

    def _fits(self, spec: AnyRun) -> bool:
        return time.monotonic() + self.cost_model.seconds(spec.sizes, spec.flops) <= self.deadline and self.pays_for(
            spec
        )

    def pays_for(self, spec: AnyRun) -> bool:
        """Whether the budget of FLOPs has room for `spec`."""
        return self.spent + spec.flops <= self.budget_flops

    def _note(self, spec: AnyRun, outcome: RunResult | Failure) -> None:
        """Keep a result; say a failure once."""
        name = str(spec)
        self.spent += (0.0 if isinstance(outcome, Failure) else outcome.flops) - spec.flops
        if isinstance(outcome, Failure):
            what = "failed"
            if not outcome.again:
                self.tries[spec.id] = ATTEMPTS
            if name not in self.failed:
                more = f"; it will be tried {ATTEMPTS} times" if outcome.again else ""
                self.shown.say(f"{name}: {outcome.why}{more}")
            self.failed[name] = outcome.why
        else:
            what = "diverged" if outcome.diverged else f"loss {outcome.loss:.4f}"
            replace_file(self.out / RUNS / spec.id / RESULT, outcome.to_json() + "\n")
            self.done[spec.id] = outcome
            self.failed.pop(name, None)
            self.cost_model.learn(outcome)
            self.ran += 1
        left = sum(self.cost_model.seconds(spec.sizes, spec.flops) for spec in self.waiting)
        self.shown.finished(f"{name}: {what}, {clock(left / self.engine.workers)} left")


class _Progress:
    """A bar on a terminal, a line per run elsewhere. before, about: runs over already, and all that are expected, if known."""

    def __init__(self, show: bool, before: int = 0, about: int = 0):
        self._plain = show and not sys.stderr.isatty()
        self._bar = tqdm(total=about, initial=before, unit="run", disable=not show or self._plain, dynamic_ncols=True)
        self._show, self._about, self._total, self._count = show, about, about, before

    def expect(self, runs: int) -> None:
        """So many runs more."""
        self._total = max(self._count + runs, self._about)
        self._bar.total = self._total
        self._bar.refresh()

    def finished(self, text: str) -> None:
        """One run more is over."""
        self._count += 1
        self._bar.set_postfix_str(text)
        self._bar.update()
        if self._plain:
            place = f"run {self._count} of about {self._total}" if self._about else f"{self._count}/{self._total}"
            print(f"{place}  {text}", flush=True)

    def say(self, text: str) -> None:
        """A line that stays."""
        if self._show:
            self._bar.clear()
            print(text, flush=True)

    def close(self) -> None:
        """Leave the terminal in order."""
        self._bar.close()
