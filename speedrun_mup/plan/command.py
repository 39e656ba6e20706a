"""Plans for a command: which cheap runs of it tune an expensive one, and what they predict."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from speedrun_mup.core.errors import ConfigError
from speedrun_mup.plan.proxies import Proxies, ProxyPrediction, choose_proxies
from speedrun_mup.sweep import Arm, CommandSweep, Engine, Program, SweepResult, measure_sweep, run_sweep
from speedrun_mup.transfer import Axes, loss_forecast

ARM = "run"


@dataclass(frozen=True)
class CommandPlan:
    """The runs of a command that find the best value for a target most exactly within a budget.

    Args:
        command: What trains, with placeholders.
        program: What all its runs have in common.
        axes: What is scaled and what is tuned.
        target: The size that is tuned for.
        proxies: The smaller sizes, and what they cost.
    """

    command: str
    program: Program
    axes: Axes
    target: int
    proxies: Proxies

    def sweeps(self) -> Iterator[CommandSweep]:
        """The runs, as a sweep for each number of seeds; all belong into one folder."""
        for count in sorted(set(self.proxies.seeds), reverse=True):
            some = [size for size, seeds in zip(self.proxies.sizes, self.proxies.seeds, strict=True) if seeds == count]
            whole = _sweep(self.command, self.program, self.axes, some)
            yield replace(whole, log2_factors=self.proxies.grid, seeds=tuple(range(count)), refine=self.proxies.refine)

    def target_command(self, value: float) -> str:
        """The command of the target, for a shell. value: of the hyperparameter."""
        program = replace(self.program, formulas={**self.program.formulas, self.axes.hyperparameter: f"{value:.4g}"})
        spec = _spec(_sweep(self.command, program, self.axes, [self.target]), self.target)
        return shlex.join(spec.words(f"runs/{self.axes.size}-{self.target}"))

    def summary(self) -> str:
        """For a terminal."""
        tuned, unit = self.axes.hyperparameter, next(self.sweeps()).unit
        grid = ", ".join(f"{unit * 2.0**at:.4g}" for at in self.proxies.grid)
        by = (
            ""
            if {"flops", "params"} & {*self.program.formulas}
            else f", if it grows as {self.axes.size}^2; --params or --flops says it"
        )
        lines = [
            f"target: {self.axes.at(self.target)}",
            f"proxies: {self.axes.plural} (seeds) {self.proxies.told()}; {tuned} {grid}"
            + (", then half steps around the best" if self.proxies.refine else ""),
            f"cost: about {self.proxies.share:.1%} of the target run{by}",
            f"the best {tuned} will be known within a factor of about {2**self.proxies.error:.2f} (standard error)",
        ]
        return "\n".join(lines)

    def run(self, out: Path, engine: Engine, **options: Any) -> SweepResult:
        """Make the runs, in the folder of a sweep. The same call again resumes. options: for `run_sweep`."""
        for sweep in self.sweeps():
            result = run_sweep(sweep, out, engine, **options)
            if not result.complete:
                break
        return result

    def predict(self, out: Path) -> ProxyPrediction:
        """What the runs in `out` say about the target. Raises TransferError where they are too few."""
        result = measure_sweep(out)
        return ProxyPrediction(result, loss_forecast(result.arms[ARM], self.target))


def choose_command_plan(
    command: str, program: Program, axes: Axes, target: int, share: float, smallest: int = 1
) -> CommandPlan:
    """The plan whose best value will be known most exactly at the target, among those within the budget.

    Args:
        command: What trains, with placeholders.
        program: What all its runs have in common; its formulas give the hyperparameter a value near which the best is expected.
        axes: What is scaled and what is tuned.
        target: The size that is tuned for.
        share: The budget, over the target's cost: by the program's formula for FLOPs, else as the square of the size.
        smallest: Size below which no run makes sense.

    Raises:
        NoPlanFits: None is within the budget.
        ConfigError: The target leaves no room for proxies, or the command is none.
    """
    whole = _sweep(command, program, axes, [target])
    if "seed" not in whole.template(whole.arms[0]).names:
        raise ConfigError("--run: proxies have several seeds, and the command has no {seed}; write {seed} into it")

    def price(size: int) -> float:
        return _spec(whole, size).cost or float(size) ** 2

    return CommandPlan(command, program, axes, target, choose_proxies(axes.size, target, price, share, smallest))


def _sweep(command: str, program: Program, axes: Axes, sizes: list[int]) -> CommandSweep:
    return CommandSweep(program, tuple(sizes), (Arm(ARM, {"command": command}),), (0.0,), (0,), axes)


def _spec(sweep: CommandSweep, size: int) -> Any:
    return sweep.run_spec(sweep.arms[0], size, 0.0, 0, None)
