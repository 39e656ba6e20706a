"""`speedrun-mup transfer`, and how a sweep is named on the command line."""

from __future__ import annotations

import argparse
import math
import shlex
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from speedrun_mup.core.errors import ConfigError
from speedrun_mup.flags import count, new_parser, parse
from speedrun_mup.setting_flags import add_renamed_flag

if TYPE_CHECKING:
    from speedrun_mup.transfer import Axes, Forecast, TransferResult

AXES = ("size", "hyperparameter")  # flags that name them
# Flags of `add_source`.
_ASKED = ("size", "hyperparameter", "columns", "controls", "tested", "base_size", "sigma", "initial_loss", "accept")


def run(argv: Sequence[str]) -> int:
    """Judge whether the best learning rate, or another hyperparameter, stays put with width, or another size.

    It reads a sweep or a table of yours. The exit code is 0 for PASS.
    """
    parser = new_parser("speedrun-mup transfer", run.__doc__ or "")
    add_source(parser)
    parser.add_argument(
        "--predict", type=int, metavar="SIZE", help="also the best rate and the loss to expect at this size"
    )
    parser.add_argument("--json", action="store_true", help="all numbers, as JSON")
    arguments = parse(parser, argv)
    result = measure(arguments)
    _check_size(arguments.predict, result.axes)
    forecasts = _forecasts(result, arguments.predict, arguments.tested) if arguments.predict else None
    if arguments.json:
        told = {name: one if isinstance(one, str) else one.to_dict() for name, one in (forecasts or {}).items()}
        print(result.to_json(told if forecasts is not None else None))
    else:
        print(result.summary())
    if forecasts and not arguments.json:
        print("\nforecast")
        print("\n".join(f"- {name}: {_told(arguments.source, name, forecast)}" for name, forecast in forecasts.items()))
    return 0 if result.verdict == "PASS" else 1


def _check_size(predict: int | None, axes: Axes) -> None:
    """Raises ConfigError for a size that nothing can have."""
    from speedrun_mup.transfer import with_article

    if predict is not None and not 1 <= predict <= axes.scale.most:
        raise ConfigError(f"--predict {predict:.20g}: give {with_article(axes.size)}, such as 1024")


def _forecasts(result: TransferResult, size: int, tested: Collection[str] | None) -> dict[str, Forecast | str]:
    """Of every arm under test; or the sentence that says why it does not bear one."""
    from speedrun_mup.transfer import TransferError, loss_forecast

    forecasts: dict[str, Forecast | str] = {}
    for name, arm in result.arms.items():
        if arm.predicted is None and (not tested or name in tested):
            try:
                forecasts[name] = loss_forecast(arm, size)
            except TransferError as fault:
                forecasts[name] = f"none; {fault}"
    return forecasts


def _told(source: Path, arm: str, forecast: Forecast | str) -> str:
    """A forecast for a terminal; of a sweep it gives the setting as a flag to paste."""
    if isinstance(forecast, str) or not source.is_dir():
        return str(forecast)
    from speedrun_mup.sweep import read_definition, read_results, tuned_flag
    from speedrun_mup.sweep.result import in_bits_per_byte

    bits = in_bits_per_byte(forecast.loss.value, read_results(source))
    told = forecast.told(*tuned_flag(read_definition(source), arm))
    return told if bits is None else f"{told}; the loss is about {bits:.3f} bits per byte"


def command_for(arguments: argparse.Namespace, *more: str) -> str:
    """The `speedrun-mup transfer` that measures the same, and `more`, for a shell."""
    words = ["speedrun-mup", "transfer", str(arguments.source)]
    for name in _ASKED:
        value = getattr(arguments, name)
        if value not in (None, "", (), []):
            words += [f"--{name.replace('_', '-')}", *(map(str, value) if isinstance(value, list) else [str(value)])]
    return shlex.join([*words, *more])


def add_source(parser: argparse.ArgumentParser) -> None:
    """The flags that say what was measured."""
    parser.add_argument(
        "source",
        type=Path,
        metavar="FOLDER|CSV",
        help="of a sweep; or a table: width,lr,loss and, if any, seed and arm",
    )
    parser.add_argument(
        "--size", metavar="NAME", help="column of the table that takes width's place: n_layer, tokens or any other"
    )
    parser.add_argument(
        "--hyperparameter",
        metavar="NAME",
        help="column of the table that takes lr's place, above zero",
    )
    add_renamed_flag(parser, "--knob", "--hyperparameter")
    parser.add_argument(
        "--columns",
        metavar="width=NAME,...",
        help="what the table calls its columns: width=n_embd,lr=learning_rate,loss=val/loss; also seed and arm",
    )
    parser.add_argument(
        "--controls",
        metavar="ARM=DRIFT,...",
        help="arms of the table built to fail, with the drift (log2 per doubling of the size) that they must show: sp=-1",
    )
    parser.add_argument(
        "--tested", nargs="+", metavar="ARM", help="arms that the verdict is about (default: all but the controls)"
    )
    parser.add_argument(
        "--base-size",
        "--base-width",
        type=count,
        metavar="SIZE",
        help="where the hyperparameter is tuned, for the regret (default: the sweep's; the smallest of a table)",
    )
    parser.add_argument(
        "--sigma",
        type=float,
        metavar="NATS",
        help="of the loss between seeds; only if every run of the table has one seed",
    )
    parser.add_argument(
        "--initial-loss",
        type=float,
        metavar="NATS",
        help="a run that ends at or above it has diverged (default: far above the lowest loss)",
    )
    parser.add_argument(
        "--accept",
        nargs="+",
        default=(),
        metavar="DOUBT",
        help="judge although the runs differ in this, or are missing: what the verdict names, such as missing or torch",
    )


def measure(arguments: argparse.Namespace) -> TransferResult:
    """What `add_source` names, measured. Raises ConfigError, TransferError."""
    from speedrun_mup.transfer import Axes, measure_transfer, read_table

    source = arguments.source
    options: dict[str, Any] = {name: getattr(arguments, name) for name in ("sigma", "tested", "accept", "initial_loss")}
    if arguments.base_size is not None:
        options["base_size"] = arguments.base_size
    controls = _controls(arguments.controls or "")
    if not source.is_dir():
        named = {name: value.strip().lower() for name in AXES if (value := getattr(arguments, name))}
        table = read_table(source, Axes(**named), _columns(arguments.columns or ""))
        options |= {"doubts": table.doubts, "notes": table.notes}
        return measure_transfer(table.points, controls=controls, axes=table.axes, **options)
    if arguments.columns:
        raise ConfigError(f"--columns {arguments.columns}: {source} is a sweep, which has no columns; leave it out")
    for name in AXES:
        if given := getattr(arguments, name):
            raise ConfigError(f"--{name} {given}: {source} is a sweep, which knows its axes; leave it out")
    if controls:
        raise ConfigError(
            f"--controls {arguments.controls}: {source} is a sweep, which knows its controls; leave it out"
        )
    from speedrun_mup.sweep import measure_sweep  # needs torch, which a table does not

    return measure_sweep(source, **options)


def _columns(text: str) -> dict[str, str]:
    """meaning -> column, from width=NAME,lr=NAME."""
    pairs = [part.partition("=") for part in text.split(",") if part]
    columns = {role.strip().lower(): name.strip() for role, _, name in pairs}
    if len(columns) < len(pairs) or not all(role and name for role, name in columns.items()):
        raise ConfigError(f"--columns {text}: give width=NAME,lr=NAME,loss=NAME, each once; also seed and arm")
    return columns


def _controls(text: str) -> dict[str, float]:
    """arm -> predicted drift, from ARM=DRIFT,ARM=DRIFT."""
    try:
        pairs = [part.rsplit("=", 1) for part in text.split(",") if part]
        drifts = {name.strip(): float(drift) for name, drift in pairs}
    except ValueError:
        raise ConfigError(f"--controls {text}: give ARM=DRIFT,..., for instance sp=-1") from None
    if len(drifts) < len(pairs) or not all(map(math.isfinite, drifts.values())):
        raise ConfigError(f"--controls {text}: give every arm once, with a finite drift")
    return drifts
