"""`speedrun-mup coord-check`."""

from __future__ import annotations

from argparse import BooleanOptionalAction
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from speedrun_mup.config import PRESETS, make_config
from speedrun_mup.core.errors import ConfigError
from speedrun_mup.files import printable, write_whole
from speedrun_mup.flags import count, new_parser, parse, several
from speedrun_mup.scaling import SCALING_SETTINGS, rules_in_force
from speedrun_mup.setting_flags import add_settings

if TYPE_CHECKING:
    from speedrun_mup.coord_check import CoordCheck

USUAL = {"width": [64, 128, 256, 512], "n_layer": [6, 12, 24]}


def run(argv: Sequence[str]) -> int:
    """Check how every update scales with width or depth, against controls that must fail. Exit code 0 only for PASS."""
    if argv and not argv[0].startswith("-"):
        return _check_model(argv)
    parser = new_parser("speedrun-mup coord-check", f"{run.__doc__} {_OF_A_MODEL}")
    check_group = parser.add_argument_group("check")
    check_group.add_argument(
        "--widths", **several(int), metavar="W", help="the same as --axis width --values W; 64 to 512"
    )
    check_group.add_argument(
        "--axis",
        choices=("width", "n_layer"),
        help="the size that is scaled; along n_layer, the width is the base width",
    )
    check_group.add_argument("--values", **several(int), metavar="V", help="of the --axis")
    check_group.add_argument("--steps", type=count, default=6, help="optimizer steps; %(default)s")
    check_group.add_argument("--seeds", type=count, default=2, help="runs per width; %(default)s")
    check_group.add_argument(
        "--tokens", type=count, default=512, help="of a step, at least the widest width; %(default)s"
    )
    check_group.add_argument(
        "--preset", choices=tuple(PRESETS), default="laptop", help="preset for all settings not given"
    )
    # A check has its own widths and steps, a constant learning rate, and runs on the CPU in float32.
    add_settings(
        parser,
        groups=("model", "techniques", "optimizer", "momentum", "display"),
        plus=(
            "base_width",
            "parametrization",
            *SCALING_SETTINGS,
            "seed",
            "data",
            "tokenizer",
            "data_order",
            "out",
            "name",
        ),
    )
    flags = vars(parse(parser, argv))
    axis, sizes = _sizes(*(flags.pop(name) for name in ("widths", "axis", "values")))
    check = {name: flags.pop(name) for name in ("steps", "seeds", "tokens")}
    usual = {"parametrization": "mup"} | ({"depth_rule": "completep"} if axis == "n_layer" else {})
    if axis in flags:
        raise ConfigError(f"--{axis.replace('_', '-')} is what is scaled; leave it out, or give --values")
    cfg = make_config(flags.pop("preset"), usual | flags)  # muP, unless flags name other rules

    folder = _folder(Path(cfg.out) / (cfg.name or "coord-check"))

    from speedrun_mup.coord_check import gpt_coord_check

    print(rules_in_force(cfg), flush=True)
    return _report(gpt_coord_check(cfg, sizes, axis=axis, **check, progress=cfg.progress), folder)


_OF_A_MODEL = (
    "A model of yours: speedrun-mup coord-check MODULE:FUNCTION, from width to the model or to (model, optimizer); "
    "speedrun-mup coord-check MODULE:FUNCTION --help lists its flags."
)


def _check_model(argv: Sequence[str]) -> int:
    """Check a model of yours: package.module:function, a function from width to the model, or to (model, optimizer).

    Functions `data` (batches) and `loss` (model, batch) next to it say what it is trained on; a language model of Hugging
    Face's needs neither. A model that is not in muP is adapted first. Exit code 0 only for PASS.
    """
    parser = new_parser("speedrun-mup coord-check", _check_model.__doc__ or "")
    parser.add_argument("model", metavar="MODULE:FUNCTION", help="from width to a model, or to (model, optimizer)")
    parser.add_argument("--widths", **several(int), default=[32, 64, 128, 256], metavar="W", help="%(default)s")
    parser.add_argument("--base", type=count, help="base width, for a model not in muP (default: the narrowest)")
    parser.add_argument(
        "--lr", type=float, default=3e-3, help="at base width, without an optimizer of yours; %(default)s"
    )
    parser.add_argument("--optimizer", default="adamw", help="adamw, adam, sgd or muon+adamw; %(default)s")
    parser.add_argument("--muon-lr", type=float, help="of Muon's matrices at base width, for muon+adamw")
    parser.add_argument("--steps", type=count, default=6, help="optimizer steps; %(default)s")
    parser.add_argument("--seeds", type=count, default=2, help="runs per width; %(default)s")
    parser.add_argument("--out", default="runs", help="folder of the results; %(default)s")
    parser.add_argument("--name", default="coord-check", help="folder in it; %(default)s")
    parser.add_argument("--progress", action=BooleanOptionalAction, default=True, help="show a progress bar")
    flags = vars(parse(parser, argv))
    folder = _folder(Path(flags.pop("out")) / flags.pop("name"))

    from speedrun_mup.coord_check import foreign_coord_check, load_subject

    return _report(foreign_coord_check(load_subject(flags.pop("model")), **flags), folder)


def _folder(folder: Path) -> Path:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as fault:
        raise ConfigError(f"{folder} cannot be made ({fault.strerror}); choose another with --out") from None
    return folder


def _report(result: CoordCheck, folder: Path) -> int:
    """Print the outcome, write numbers and picture into `folder`, and return the exit code."""
    print(result.summary())
    write_whole(folder / "coord-check.json", result.to_json() + "\n", "choose another with --out")
    print(f"numbers  {printable(folder / 'coord-check.json')}")
    result.plot(folder / "coord-check.png")
    print(f"picture  {printable(folder / 'coord-check.png')}")
    return 0 if result.verdict == "PASS" else 1


def _sizes(widths: list[int] | None, axis: str | None, values: list[int] | None) -> tuple[str, list[int]]:
    """The axis and the sizes along it. Raises ConfigError for contradictions."""
    if widths is not None and (axis, values) != (None, None):
        raise ConfigError("--widths is short for --axis width --values; give the one or the other")
    if values is not None and axis is None:
        raise ConfigError("--values are of an --axis: width or n_layer")
    axis = axis or "width"
    return axis, widths or values or USUAL[axis]
