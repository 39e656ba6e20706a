"""What a report begins with: the learning rate to use, the loss to expect, what was measured; and what was trained."""

from __future__ import annotations

import shlex
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from speedrun_mup.config import TrainConfig
from speedrun_mup.core.optimizers import OPTIMIZERS
from speedrun_mup.explain import explain
from speedrun_mup.plan import Comparison, Prediction
from speedrun_mup.report.contents import Table
from speedrun_mup.report.figures import main_arm
from speedrun_mup.report.programs import facts_of_programs
from speedrun_mup.report.words import arm_words, within
from speedrun_mup.sweep import RunResult, read_definition, size_names, times, tuned_flag
from speedrun_mup.sweep.folder import place_in
from speedrun_mup.sweep.result import RESULT, RUNS, in_bits_per_byte
from speedrun_mup.training.tracking import CONFIG, attempts
from speedrun_mup.transfer import ArmResult, SizeFit, TransferError, TransferResult, loss_forecast, with_article

FEW_LENGTHS = 6  # of runs, that are told one by one
SHOWN = 16  # characters of a version or hash
MADE_WITH = (
    ("speedrun-mup", "speedrun_mup"),
    ("commit", "revision"),
    ("source", "source_sha256"),
    ("torch", "torch"),
    ("device", "device"),
)


@dataclass(frozen=True)
class Measured:
    """All that a report is about.

    Args:
        swept: Whether `source` is a sweep's folder, not a table.
        run: Folder of the finished target run, if it was given.
        factors: Whether rates are factors on what was tuned.
        target: What a plan was made for.
    """

    source: Path
    result: TransferResult
    swept: bool
    factors: bool
    runs: Sequence[RunResult] = ()
    target: TrainConfig | None = None
    prediction: Prediction | None = None
    comparison: Comparison | None = None
    run: Path | None = None

    @property
    def own(self) -> bool:
        """Whether this package's model was swept."""
        return self.swept and self.factors

    @property
    def largest(self) -> RunResult:
        """A run of the largest model of the arm that the report is about."""
        name = main_arm(self.result).arm
        return max((run for run in self.runs if run.arm == name), key=lambda run: (run.size, not run.diverged))


def answer(seen: Measured) -> list[str]:
    """The rate to use, the loss to expect and what came of it, a line each."""
    return list(_of_plan(seen, seen.prediction) if seen.prediction else _of_sweep(seen))


def _of_plan(seen: Measured, forecast: Prediction) -> Iterator[str]:
    (slow, fast), (low, high) = forecast.lr_scale_interval, forecast.loss_interval
    yield (
        f"At width {forecast.width} use `--lr-scale {forecast.lr_scale:.4g}` (90 % interval {slow:.4g} to {fast:.4g}): all "
        f"learning rates times {forecast.lr_scale:.4g}."
    )
    yield (
        f"Expect a validation loss of {forecast.loss:.4f} nats per token (90 % interval {low:.4f} to {high:.4f})"
        f"{_in_bytes(seen, forecast.loss)}."
    )
    if seen.comparison is None:
        yield "Measured: nothing yet. Train the target, then give its folder with `--target`."
        return
    yield f"Measured: {seen.comparison.measured:.4f}; {'; '.join(filter(None, (seen.comparison.miss, forecast.wide)))}."
    if abs(seen.comparison.log2_factor) > 0.01:
        yield f"That run was trained with {2**seen.comparison.log2_factor:.3g} times the rate above."


def _of_sweep(seen: Measured) -> Iterator[str]:
    arm, axes = main_arm(seen.result), seen.result.axes
    whose = f" with {arm_words(arm.arm)}" if len(seen.result.arms) > 1 else ""
    base = next((fit for fit in arm.usable if fit.size == arm.base_size), None)
    if base is None:
        base_place = axes.at(arm.base_size)
        yield f"No {axes.label} can be named yet{whose}: {base_place}, where it would be tuned, has no clear best one."
    elif seen.result.verdict == "PASS":
        reach = f"{arm.fits[-1].place}, the {axes.scale.largest} here"
        yield f"Use {_setting(seen, arm, base)}{whose}: the best of {base.place}, which holds up to {reach}."
    else:
        yield f"Best at {base.place}{whose}: {_setting(seen, arm, base)}. {_beyond(seen, arm)}"
        own = (f"{fit.place}: {_setting(seen, arm, fit)}" for fit in arm.usable if fit is not base)
        yield f"Best of the other {axes.plural}: " + ("; ".join(own) or "not known") + "."
    if arm.usable:
        largest = arm.usable[-1]
        unit = " nats per token" if seen.own else ""  # a table or another program does not say
        loss = arm.best_loss(largest)
        bits = _in_bytes(seen, loss.value)
        yield f"Loss at {largest.place} with its best {axes.label}: {within(loss)}{unit}{bits}."
        yield _expected(seen, arm, 2 * largest.size)


def _beyond(seen: Measured, arm: ArmResult) -> str:
    """Whether the best value of the base size is one for the others, where the verdict over all arms is no PASS."""
    if arm.verdict == "PASS":
        return f"By itself this arm is a PASS; the whole is {seen.result.verdict}, for the reasons below."
    held = "does not hold" if seen.result.verdict == "FAIL" else "is not known to hold"
    return f"It {held} at other {arm.axes.plural}."


def _expected(seen: Measured, arm: ArmResult, size: int) -> str:
    axes, unknown = (
        arm.axes,
        f"What to expect of {with_article(arm.axes.scale.larger)} {arm.axes.scale.noun} is not known",
    )
    if doubts := [doubt.kind for doubt in seen.result.doubts if doubt.arm in (None, arm.arm)]:
        return f"{unknown}: there are doubts about these runs ({', '.join(doubts)}), see below."
    try:
        loss = loss_forecast(arm, size).loss
    except TransferError as fault:
        return f"{unknown}: {fault}."
    bits = _in_bytes(seen, loss.value)
    return f"Expect {within(loss)}{bits} at {axes.at(size)}, twice that; nothing so large was trained here."


def _in_bytes(seen: Measured, loss: float) -> str:
    """The same in bits per byte, which compare between tokenizers; nothing where tokens do not stand for bytes."""
    bits = in_bits_per_byte(loss, seen.runs)
    return "" if bits is None else f", about {bits:.3f} bits per byte"


def _setting(seen: Measured, arm: ArmResult, fit: SizeFit) -> str:
    """The best of one size: a flag to paste, or a number for a reader's own code."""
    value, error = 2**fit.optimum, 2 ** (1.645 * fit.optimum_se)
    told = f"{with_article(arm.axes.label)} of {value:.4g}"
    if seen.factors:
        told += " times what was tuned"
    if seen.swept:
        flag, unit = tuned_flag(read_definition(seen.source), arm.arm)
        value *= unit
        told = f"`{flag} {value:.4g}`"
    return told if error != error else f"{told} (90 % interval {value / error:.4g} to {value * error:.4g})"


def rates(seen: Measured) -> Table | None:
    """What the answer's flag comes to: the learning rates that each optimizer gets, at base width and at the widest."""
    if not seen.own or not seen.runs or not seen.result.axes.is_rate:
        return None
    largest, arm = seen.largest, main_arm(seen.result)
    cfg = largest.settings
    base = next((fit for fit in arm.usable if fit.size == arm.base_size), None)
    if seen.target and seen.prediction:
        cfg = replace(seen.target, lr_scale=seen.prediction.lr_scale, parametrization=cfg.parametrization)
    elif base is None:
        return None
    else:
        cfg = times(cfg, seen.result.axes.hyperparameter, 2**base.optimum / largest.factor)
    return rate_table(cfg, largest.vocabulary)


def rate_table(cfg: TrainConfig, vocabulary: int) -> Table:
    """The learning rates of a run with the settings `cfg`, alike ones in one row, at base width and at its own."""
    alike: dict[tuple[str, float, float], list[str]] = {}
    for row in explain(cfg, vocabulary):
        name = [part for part in row.name.split(".") if part != "weight" and not part.isdigit()][-1]
        names = alike.setdefault((row.optimizer, row.base.lr, row.here.lr), [])
        names += [name] if name not in names else []
    header = [
        "parameters",
        "optimizer",
        f"learning rate at width {cfg.tuned_width}",
        f"at width {cfg.width}",
    ]
    title = "What each group of parameters gets, at the peak of the schedule:"
    return Table(header, [[", ".join(names), *_told(key)] for key, names in alike.items()], title)


def _told(key: tuple[str, float, float]) -> tuple[str, str, str]:
    optimizer, base, here = key
    return _label(optimizer), f"{base:.4g}", f"{here:.4g}"


def _label(optimizer: str) -> str:
    return OPTIMIZERS[optimizer].label if optimizer in OPTIMIZERS else optimizer


def facts(seen: Measured, command: Sequence[str]) -> list[tuple[str, str]]:
    """What was trained, on what, when and by what; name and value. command: what asked for the report."""
    told = _facts_of_runs(seen) if seen.runs else _facts_of_table(seen)
    return [*told, *target_facts(seen.run, command)]


def target_facts(run: Path | None, command: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Which run was compared, if any, and when and by what the report was made."""
    if run:
        yield "Target run", _target(run)
    made = time.strftime("%Y-%m-%d")
    yield "Report", f"{made}, by `{shlex.join(command)}`" if command else made


def _facts_of_table(seen: Measured) -> Iterator[tuple[str, str]]:
    fits = [fit for arm in seen.result.arms.values() for fit in arm.fits]
    yield "Runs", f"{sum(int(fit.table.runs.sum()) for fit in fits)} that count, of the table {seen.source.name}"
    yield "Arms", ", ".join(map(_arm, seen.result.arms.values()))
    plural = seen.result.axes.plural
    yield plural[0].upper() + plural[1:], ", ".join(map(str, sorted({fit.size for fit in fits})))
    yield "Model and data", "not in a table of losses"


def _facts_of_runs(seen: Measured) -> Iterator[tuple[str, str]]:
    if not seen.own:
        yield from facts_of_programs(seen.source, seen.runs)
        return
    cfg = seen.largest.settings
    widths = sorted({run.config["width"] for run in seen.runs})
    heads = ", ".join(f"{width} ({width // cfg.head_dim})" for width in widths)
    target = f"; target {seen.target.width} ({seen.target.width // cfg.head_dim})" if seen.target else ""
    layers = ", ".join(map(str, sorted({run.config["n_layer"] for run in seen.runs})))
    yield "Model", f"GPT of record 26: {layers} layers, heads of {cfg.head_dim}; widths (heads) {heads}{target}"
    yield "Arms", f"{', '.join(map(_arm, seen.result.arms.values()))}; base width {cfg.tuned_width}"
    label = _label(cfg.groups["matrix"].optimizer)
    hidden = f"{label} for hidden matrices, Adam for the rest" if label != "Adam" else "Adam for everything"
    yield "Optimizer", f"{hidden} (of {arm_words(seen.largest.arm)})"
    lengths = sorted({(run.settings.schedule.tokens, run.settings.schedule.describe()) for run in seen.runs})
    yield (
        "Tokens",
        "; ".join(f"{tokens:,} a run: {told}" for tokens, told in lengths[:FEW_LENGTHS])
        + (f"; and {len(lengths) - FEW_LENGTHS} more" if len(lengths) > FEW_LENGTHS else ""),
    )
    data = f"{seen.target.data}; " if seen.target else ""
    yield "Data", f"{data}fingerprint {', '.join(sorted({run.corpus[:12] for run in seen.runs}))}"
    bad, seeds = sum(run.diverged for run in seen.runs), len({run.seed for run in seen.runs})
    yield "Runs", f"{len(seen.runs)}, with {seeds} seeds or fewer; {bad} diverged"
    definition = read_definition(seen.source)
    yield "Asked for", "; ".join(_request(asked, size_names(definition)) for asked in definition["asked"])
    yield "Trained", dates_of(seen.source, seen.runs)
    yield "Code", code_of(seen.runs)


def _request(asked: Mapping[str, Any], names: Sequence[str]) -> str:
    """One request to a sweep over the sizes `names`, in the units of its flags."""
    plural = "widths" if names == ("width",) else " x ".join(names)
    sizes = ", ".join(" x ".join(map(str, place_in(size))) for size in asked["sizes"])
    flags = {"log2_factors": "octaves", "seeds": "seeds"}
    told = (f"{flag} {', '.join(f'{value:g}' for value in asked[name])}" for name, flag in flags.items())
    return ", ".join([f"arms {', '.join(asked['arms'])}", f"{plural} {sizes}", *told])


def code_of(runs: Sequence[RunResult]) -> str:
    """What made the runs."""
    return "; ".join(_versions(runs, *pair) for pair in MADE_WITH)


def _versions(runs: Sequence[RunResult], title: str, key: str) -> str:
    """One value, or how many runs each of several made."""
    counts = Counter(_short(run.made_with.get(key, "not known")) for run in runs)
    if len(counts) == 1:
        return f"{title} {next(iter(counts))}"
    return f"{title} " + " and ".join(f"{value} ({count} runs)" for value, count in counts.most_common())


def _short(version: object) -> str:
    """A version or a hash, without the reason for which it is not known."""
    return str(version).split(":")[0][:SHOWN]


def _target(run: Path) -> str:
    """A finished run: its folder's name, its day, and its command as far as it is known."""
    made = (attempts(run) or [{}])[-1]
    command, commit = made.get("command", "not known"), _short(made.get("revision", "not known"))
    return f"{run.resolve().name}, {_day((run / CONFIG).stat().st_mtime)}, by `{command}`, commit {commit}"


def _day(seconds: float) -> str:
    return time.strftime("%Y-%m-%d", time.localtime(seconds))


def _arm(arm: ArmResult) -> str:
    told = arm_words(arm.arm) + ("" if arm_words(arm.arm) == arm.arm else f" `{arm.arm}`")
    return told if arm.predicted is None else f"{told} (control)"


def dates_of(source: Path, runs: Sequence[RunResult]) -> str:
    """First and last day on which a run of the sweep in the folder `source` was finished, by its file."""
    files = [source / RUNS / run.id / RESULT for run in runs]
    days = sorted({_day(path.stat().st_mtime) for path in files if path.exists()})
    return " to ".join(dict.fromkeys([days[0], days[-1]])) if days else "not known"
