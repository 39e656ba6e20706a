"""Sweeps whose runs are commands of the user's."""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
import shlex
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

from speedrun_mup.core.errors import ConfigError
from speedrun_mup.files import printable
from speedrun_mup.sweep.any_sweep import AnySweep
from speedrun_mup.sweep.arms import Arm
from speedrun_mup.sweep.command.formulas import Formulas, Number
from speedrun_mup.sweep.command.run import COMMAND, FLOPS, GIVEN, MOST_SOURCE, PARAMS, CommandRun, Program
from speedrun_mup.sweep.command.template import Template, names_in
from speedrun_mup.sweep.folder import SCRATCH
from speedrun_mup.transfer.axes import Sizes


@dataclass(frozen=True)
class CommandSweep(AnySweep):
    """Which runs of commands to make: each arm is a command, `Arm.settings["command"]`.

    Args:
        base: What they have in common.
        controls: Arm -> size axis -> the drift that it must show.

    Raises:
        ConfigError: For a placeholder that gets no value, an axis that no command reads, or another value that no run can have.
    """

    base: Program
    controls: Mapping[str, Mapping[str, float]] | None = None

    trainer: ClassVar[str] = COMMAND

    def __post_init__(self) -> None:
        super().__post_init__()
        tuned = self.axes.hyperparameter
        if wrong := {*self.size_names, tuned} & {*GIVEN, FLOPS, PARAMS}:
            raise ConfigError(f"{min(wrong)} has another meaning in a command; choose another name for the axis")
        if both := {*self.size_names, *GIVEN} & {*self.base.formulas}:
            raise ConfigError(f"--set {min(both)}: its values are those of the sweep; leave it out")
        if tuned in self.size_names:
            raise ConfigError(f"--hyperparameter {tuned}: it is a size axis; name what is tuned")
        if tuned not in self.base.formulas:
            raise ConfigError(
                f"--set {tuned}=...: say what {tuned} is where its factor is 1, such as --set {tuned}=0.001"
            )
        if self._formulas.uses(tuned):
            told = f"--hyperparameter factor --set factor=1 --set {tuned}='factor*(...)'"
            raise ConfigError(
                f"--set {tuned}={self.base.formulas[tuned]}: it is tuned, so give a number; for a rule: {told}"
            )
        if not self.unit > 0:
            raise ConfigError(
                f"--set {tuned}={self.unit:g}: give a number above zero, which is multiplied by powers of 2"
            )
        if unknown := {*(self.controls or {})} - {arm.name for arm in self.arms}:
            raise ConfigError(
                f"--controls {min(unknown)}: no arm is called that; there are {', '.join(a.name for a in self.arms)}"
            )
        for arm in self.arms:
            self._check_names(arm)
        self._check_file()
        for arm in self.arms:
            self.run_spec(arm, self.sized[0], self.log2_factors[0], self.seeds[0], None).words("out")

    def _check_names(self, arm: Arm) -> None:
        """ConfigError for a placeholder without a value, and for what varies and does not reach the command."""
        command = self.template(arm)
        known = {*self.size_names, *GIVEN, *self.base.formulas}
        if unknown := sorted(command.names - known):
            name = unknown[0]
            fix = f"add --set {name}=NUMBER or --axis {name}=..."
            raise ConfigError(f"{command.what}: nothing gives {{{name}}} a value; {fix}")
        reached = {used for name in command.names for used in self._formulas.uses(name)}
        tuned = self.axes.hyperparameter
        reached |= {tuned} if any(self._leads(name, tuned) for name in command.names) else set()
        several = {"seed"} if len(self.seeds) > 1 else set()
        if lost := [name for name in (*self.size_names, tuned, *several) if name not in reached]:
            fix = f"write {{{lost[0]}}} into it" + (", or give --seeds 1" if lost[0] == "seed" else "")
            raise ConfigError(f"{command.what}: {lost[0]} varies, and the command has no {{{lost[0]}}}; {fix}")

    @functools.cached_property
    def _in_file(self) -> frozenset[str]:
        """The placeholders in the name of the file that has the loss."""
        return names_in(self.base.metric.file or "", "--metric-file")

    def _check_file(self) -> None:
        """ConfigError for a file of losses that several runs would write at once."""
        if unknown := sorted(self._in_file - {*self.size_names, *GIVEN, *self.base.formulas}):
            raise ConfigError(
                f"--metric-file: nothing gives {{{unknown[0]}}} a value; there are out, seed, sizes and --set"
            )
        own = {*self.size_names, self.axes.hyperparameter} | ({"seed"} if len(self.seeds) > 1 else set())
        if (
            self.base.metric.file is not None
            and "out" not in self._in_file
            and (len(self.arms) > 1 or own - self._in_file)
        ):
            raise ConfigError(
                f"--metric-file {printable(self.base.metric.file, 80)}: all runs would write this file; have the command write "
                "below {out}, and name that"
            )

    def _leads(self, name: str, tuned: str) -> bool:
        """Whether a placeholder depends on the hyperparameter."""
        return name == tuned or tuned in self._formulas.all_used(name)

    @functools.cached_property
    def _formulas(self) -> Formulas:
        return Formulas(self.base.formulas)

    @functools.cached_property
    def unit(self) -> float:
        """The hyperparameter where its factor is 1."""
        return float(self._formulas.value(self.axes.hyperparameter, {}))

    @functools.cached_property
    def predicted(self) -> dict[str, dict[str, float]]:
        """See `AnySweep`."""
        return {arm: dict(drifts) for arm, drifts in (self.controls or {}).items()}

    @functools.cached_property
    def program(self) -> Program:
        """What the commands have in common, with the files of code that they name: small ones that are there."""
        words = [part for arm in self.arms for part in shlex.split(arm.settings[COMMAND])]
        found = []
        for word in dict.fromkeys(words):
            path = Path(self.base.folder) / word
            with contextlib.suppress(OSError, ValueError):
                if "{" not in word and path.is_file() and path.stat().st_size <= MOST_SOURCE:
                    found.append(word)
        return replace(self.base, files=tuple(found))

    def template(self, arm: Arm) -> Template:
        """The command of an arm."""
        what = "--run" if len(self.arms) == 1 else f"--arm {printable(arm.name, 60)}"
        return Template(arm.settings[COMMAND], self.base.shell, what)

    def commands(self, out: Path) -> Iterator[str]:
        """The command of every run of the grid, for a shell, a line each. out: the sweep's folder."""
        for arm in self.arms:
            for sizes in self.sized:
                for at, seed in itertools.product(sorted(self.log2_factors), self.seeds):
                    spec = self.run_spec(arm, sizes, at, seed, None)
                    yield shlex.join(spec.words(str((out / SCRATCH / spec.name).resolve())))

    def told(self) -> Iterator[str]:
        """See `AnySweep`."""
        for arm in self.arms:
            yield f"arm {arm.name}: {arm.settings[COMMAND]}"
        for name in self.size_names:
            yield f"axis: {name} {', '.join(str(value) for value in dict.fromkeys(sizes[name] for sizes in self.sized))}"
        others = (f"{name} {text}" for name, text in self.base.formulas.items() if name != self.axes.hyperparameter)
        held = ", ".join(others)
        yield f"tuned: {self.axes.hyperparameter}, {self.unit:g} times powers of 2" + (
            f"; held: {held}" if held else ""
        )
        for name, drifts in self.predicted.items():
            must = ", ".join(f"{drift:+g} per doubling of {axis}" for axis, drift in drifts.items())
            yield f"control: {name}, predicted drift {must}"

    def check(self) -> None:
        """See `AnySweep`."""
        for arm in self.arms:
            self._check_program(self.template(arm))
            for sizes in self.sized:
                self.run_spec(arm, sizes, 0.0, self.seeds[0], None)

    def _check_program(self, command: Template) -> None:
        word = command.words[0]
        if self.base.shell or "{" in word:
            return
        path = Path(self.base.folder) / word if "/" in word else None
        if not (os.access(path, os.X_OK) if path else shutil.which(word)):
            hint = "; write python before it" if word.endswith(".py") else ""
            raise ConfigError(f"{command.what}: there is no program {printable(word)}{hint}")

    def definition(self, data: None, known: Mapping[str, Any]) -> dict[str, Any]:
        """See `AnySweep`."""
        costs = (FLOPS, PARAMS)
        held = {name: text for name, text in self.base.formulas.items() if name not in costs}
        metric = self.base.metric
        file = {} if metric.file is None else {"metric_file": metric.file}
        return {"metric": metric.pattern, **file, "set": held, "shell": self.base.shell}

    def seeds_draw(self) -> str:
        """See `AnySweep`."""
        return "random numbers that the command takes from {seed}"

    def source(self) -> str:
        """See `AnySweep`."""
        return self.program.source()

    def run_spec(self, arm: Arm, sizes: int | Sizes, log2_factor: float, seed: int, data: None) -> CommandRun:
        """See `AnySweep`."""
        at = dict(sizes) if isinstance(sizes, Mapping) else {self.axes.size: sizes}
        tuned = self.unit * 2.0**log2_factor
        given: dict[str, Number] = {**at, "seed": seed, self.axes.hyperparameter: tuned}
        command = self.template(arm)
        names = command.names | self._in_file
        values = {name: self._formulas.value(name, given) for name in sorted(names - {"out"})}
        return CommandRun(
            *(arm.name, at, float(log2_factor), seed, command, self.program, values, self.unit),
            cost=self._cost(given),
            tuned=self.axes.hyperparameter,
        )

    def _cost(self, given: Mapping[str, Number]) -> float:
        """FLOPs of a run; 0 where nobody says so."""
        if FLOPS in self._formulas.trees:
            cost = self._formulas.value(FLOPS, given)
        elif PARAMS in self._formulas.trees:
            if "tokens" not in given and "tokens" not in self._formulas.trees:
                raise ConfigError(
                    "--params: FLOPs are 6 * params * tokens; say how many --set tokens=..., such as iterations*4096"
                )
            cost = 6.0 * self._formulas.value(PARAMS, given) * self._formulas.value("tokens", given)
        else:
            return 0.0
        if not cost > 0:
            raise ConfigError(f"--flops, --params: {cost:g} FLOPs at {_told(given)}; give a formula above zero")
        return float(cost)


def _told(given: Mapping[str, Number]) -> str:
    return ", ".join(f"{name} {value:g}" for name, value in given.items())
