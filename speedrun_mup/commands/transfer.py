"""`speedrun-mup transfer`, and how a sweep is named on the command line."""

from __future__ import annotations

import argparse
import math
import shlex
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from speedrun_mup.core.errors import ConfigError
from speedrun_mup.files import printable
from speedrun_mup.flags import count, new_parser, parse, whole_number
from speedrun_mup.setting_flags import add_renamed_flag

if TYPE_CHECKING:
    from speedrun_mup.transfer import Axes, Forecast, Known, SurfaceResult, TransferResult

# Flags of `add_source`.
_OF_TABLES = ("columns", "loss", "names", "format")  # how a table or logs are read
_ASKED = ("size", "hyperparameter", *_OF_TABLES, "controls", "tested", "base_size", "sigma", "initial_loss", "accept")


def run(argv: Sequence[str]) -> int:
    """Judge whether the best learning rate, or another hyperparameter, stays put with width, or another size.

    It reads a sweep, a table of yours, or a folder of logs of other programs. The exit code is 0 for PASS.
    """
    parser = new_parser("speedrun-mup transfer", run.__doc__ or "")
    add_source(parser)
    parser.add_argument(
        "--predict",
        metavar="SIZE|NAME=SIZE,...",
        help="also the best rate and the loss to expect at this size, or at width=1024,n_layer=24,tokens=2B",
    )
    parser.add_argument(
        "--predicted",
        metavar="SIZE=DRIFT,...",
        help="of several sizes: the drift that the rule in force gives each, tokens=-0.5 (default: 0)",
    )
    parser.add_argument("--json", action="store_true", help="all numbers, as JSON")
    arguments = parse(parser, argv)
    if len(sizes := sizes_of(arguments)) > 1:
        return _several(arguments, sizes)
    if arguments.predicted:
        raise ConfigError(f"--predicted {arguments.predicted}: it is for several sizes; give each with --size")
    result, target = measure(arguments), arguments.predict and _target(arguments.predict)
    _check_size(target, result.axes)
    forecasts = _forecasts(result, target, arguments.tested) if target else None
    if arguments.json:
        told = {name: one if isinstance(one, str) else one.to_dict() for name, one in (forecasts or {}).items()}
        print(result.to_json(told if forecasts is not None else None))
    else:
        print(result.summary())
    if forecasts and not arguments.json:
        print("\nforecast")
        print("\n".join(f"- {name}: {_told(arguments.source, name, forecast)}" for name, forecast in forecasts.items()))
    return 0 if result.verdict == "PASS" else 1


def _several(arguments: argparse.Namespace, sizes: Sequence[str]) -> int:
    """Runs over several sizes at once: a drift and a verdict for each. Returns the exit code."""
    from speedrun_mup.transfer import Known

    known = Known(predicted=_drifts("predicted", arguments.predicted or "", "tokens=-0.5", "size"))
    result = measure_several(arguments, sizes, known)
    forecasts = result.predict(_place(arguments.predict, sizes)) if arguments.predict else None
    if arguments.json:
        print(result.to_json(forecasts))
    else:
        print(result.summary())
        for name, forecast in (forecasts or {}).items():
            print(f"forecast of arm {name}, {forecast}")
    return 0 if result.verdict == "PASS" else 1


def is_sweep(source: Path) -> bool:
    """Whether a source is a sweep's folder, and no table and no logs of other programs."""
    from speedrun_mup.transfer.sources import is_sweep  # needs numpy, which --help does not

    return is_sweep(source)


def _target(text: str) -> int:
    """The size in a --predict for one axis."""
    try:
        return whole_number(text.partition("=")[2] or text)
    except argparse.ArgumentTypeError as fault:
        raise ConfigError(f"--predict {printable(text, 60)}: {fault}") from None


def _place(text: str, sizes: Sequence[str]) -> dict[str, int]:
    """The place in a --predict for several axes."""
    pairs = [part.partition("=") for part in text.split(",") if part.strip()]
    names = [name.strip().lower() for name, _, _ in pairs]
    if sorted(names) != sorted(sizes):
        such = ",".join(f"{name}=..." for name in sizes)
        raise ConfigError(f"--predict {printable(text, 60)}: give every size once, --predict {such}")
    return {name: _target(value.strip() or "nothing") for name, (_, _, value) in zip(names, pairs, strict=True)}


def sizes_of(arguments: argparse.Namespace) -> list[str]:
    """The sizes that were named, or that the sweep has; none for a table whose size is width."""
    named = [name.strip().lower() for text in arguments.size or [] for name in text.split(",") if name.strip()]
    if is_sweep(arguments.source):
        _check_sweep(arguments)
        from speedrun_mup.sweep import read_definition, size_names  # needs torch, which a table does not

        have = size_names(read_definition(arguments.source))
        if unknown := [name for name in named if name not in have]:
            told = f"{printable(arguments.source)} is a sweep over {', '.join(have)}"
            raise ConfigError(f"--size {printable(unknown[0], 60)}: {told}; name one of these, or leave it out")
        return named or list(have)
    return list(dict.fromkeys(named))


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
    if isinstance(forecast, str) or not is_sweep(source):
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
        help="of a sweep; a table: width,lr,loss and, if any, seed and arm; or logs of W&B, TensorBoard and others",
    )
    parser.add_argument(
        "--size",
        action="append",
        metavar="NAME",
        help="column of the table that takes width's place: n_layer, tokens or any other; again for several at once",
    )
    parser.add_argument(
        "--hyperparameter",
        metavar="NAME",
        help="column of the table that takes lr's place, above zero",
    )
    add_renamed_flag(parser, "--knob", "--hyperparameter")
    _add_reading(parser)
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


def _add_reading(parser: argparse.ArgumentParser) -> None:
    """The flags that say how a table or logs are read."""
    parser.add_argument(
        "--columns",
        metavar="width=NAME,...",
        help="what the table calls its columns: width=n_embd,lr=learning_rate,loss=val/loss; also seed and arm",
    )
    parser.add_argument(
        "--loss",
        choices=("last", "min"),
        help="of a run that logged several: the last (default for logs), or the lowest; for a table with a row for each step",
    )
    parser.add_argument(
        "--names",
        metavar="PATTERN",
        help="settings that are in the names of logged runs: w{width}-lr{lr}-s{seed}",
    )
    parser.add_argument(
        "--format", metavar="NAME", help="which logs of a folder to read, if it has several: wandb, tensorboard, ..."
    )


def measure(arguments: argparse.Namespace) -> TransferResult:
    """What `add_source` names, measured. Raises ConfigError, TransferError."""
    from speedrun_mup.transfer import Axes, measure_transfer, read_table

    source = arguments.source
    options: dict[str, Any] = {name: getattr(arguments, name) for name in ("sigma", "tested", "accept", "initial_loss")}
    if arguments.base_size is not None:
        options["base_size"] = arguments.base_size
    controls = _drifts("controls", arguments.controls or "", "sp=-1")
    if not is_sweep(source):
        sizes = sizes_of(arguments)
        if len(sizes) > 1:
            raise ConfigError(f"--size {' --size '.join(sizes)}: give one here; speedrun-mup transfer takes several")
        named = dict(zip(("size",), sizes)) | _hyperparameter(arguments)
        table = read_table(source, Axes(**named), **_reading(arguments))
        options |= {"doubts": table.doubts, "notes": table.notes}
        return measure_transfer(table.points, controls=controls, axes=table.axes, **options)
    _check_sweep(arguments)
    from speedrun_mup.sweep import measure_sweep  # needs torch, which a table does not

    sizes = sizes_of(arguments)
    return measure_sweep(source, size=sizes[0] if len(sizes) == 1 else None, **options)


def _reading(arguments: argparse.Namespace) -> dict[str, Any]:
    """How `read_table` is to read a table or logs."""
    of_logs = {"loss": arguments.loss or "", "names": arguments.names or "", "form": arguments.format or ""}
    return {"columns": _columns(arguments.columns or ""), **of_logs}


def _columns(text: str) -> dict[str, str]:
    """meaning -> column, from width=NAME,lr=NAME."""
    pairs = [part.partition("=") for part in text.split(",") if part]
    columns = {role.strip().lower(): name.strip() for role, _, name in pairs}
    if len(columns) < len(pairs) or not all(role and name for role, name in columns.items()):
        raise ConfigError(f"--columns {text}: give width=NAME,lr=NAME,loss=NAME, each once; also seed and arm")
    return columns


def _drifts(flag: str, text: str, such: str, what: str = "arm") -> dict[str, float]:
    """Name of an arm, or `what` else -> drift, from NAME=DRIFT,NAME=DRIFT, such as `such`."""
    try:
        pairs = [part.rsplit("=", 1) for part in text.split(",") if part]
        drifts = {name.strip(): float(drift) for name, drift in pairs}
    except ValueError:
        raise ConfigError(f"--{flag} {text}: give {what.upper()}=DRIFT,..., for instance {such}") from None
    if len(drifts) < len(pairs) or not all(map(math.isfinite, drifts.values())):
        raise ConfigError(f"--{flag} {text}: give every {what} once, with a finite drift")
    return drifts


def _hyperparameter(arguments: argparse.Namespace) -> dict[str, str]:
    given = arguments.hyperparameter
    return {"hyperparameter": given.strip().lower()} if given else {}


def _check_sweep(arguments: argparse.Namespace) -> None:
    """ConfigError for a flag about what a sweep knows by itself."""
    about = dict.fromkeys(_OF_TABLES, "is no table") | {"hyperparameter": "knows its axes"}
    for name, why in (about | {"controls": "knows its controls"}).items():
        if given := getattr(arguments, name):
            raise ConfigError(f"--{name} {given}: {arguments.source} is a sweep, which {why}; leave it out")


def measure_several(arguments: argparse.Namespace, sizes: Sequence[str], known: Known) -> SurfaceResult:
    """What `add_source` names, measured over several sizes. Raises ConfigError, TransferError."""
    from speedrun_mup.transfer import Axes, measure_surface, read_table

    if arguments.base_size is not None:
        raise ConfigError(
            f"--base-size {arguments.base_size}: several sizes count from the smallest of each; leave it out"
        )
    options: dict[str, Any] = {name: getattr(arguments, name) for name in ("sigma", "tested", "accept", "initial_loss")}
    source = arguments.source
    if is_sweep(source):
        _check_sweep(arguments)
        from speedrun_mup.sweep import measure_sweep_surface

        return measure_sweep_surface(source, known=known, **options)
    axes = Axes(sizes[0], **_hyperparameter(arguments))
    table = read_table(source, axes, more=sizes[1:], **_reading(arguments))
    controls: dict[str, dict[str, float]] = {}
    for name, drift in _drifts("controls", arguments.controls or "", "sp:width=-1").items():
        arm, colon, size = name.rpartition(":")
        if not colon:
            raise ConfigError(
                f"--controls {arguments.controls}: say on which size, such as {name}:{sizes[0]}={drift:g}"
            )
        controls.setdefault(arm, {})[size] = drift
    options |= {"doubts": table.doubts, "notes": table.notes, "controls": controls}
    return measure_surface(table.points, sizes, hyperparameter=axes.hyperparameter, known=known, **options)
