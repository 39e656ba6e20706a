"""`speedrun-mup coord-check`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from speedrun_mup.config import PRESETS, make_config
from speedrun_mup.core.errors import ConfigError
from speedrun_mup.files import printable, write_whole
from speedrun_mup.flags import count, new_parser, parse, several
from speedrun_mup.scaling import SCALING_SETTINGS, rules_in_force
from speedrun_mup.setting_flags import add_settings

USUAL = {"width": [64, 128, 256, 512], "n_layer": [6, 12, 24]}


def run(argv: Sequence[str]) -> int:
    """Check how every update scales with width or depth, against controls that must fail. Exit code 0 only for PASS."""
    parser = new_parser("speedrun-mup coord-check", run.__doc__ or "")
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

    folder = Path(cfg.out) / (cfg.name or "coord-check")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as fault:
        raise ConfigError(f"{folder} cannot be made ({fault.strerror}); choose another with --out") from None

    from speedrun_mup.coord_check import CheckVerdict, gpt_coord_check

    print(rules_in_force(cfg), flush=True)
    result = gpt_coord_check(cfg, sizes, axis=axis, **check, progress=cfg.progress)
    print(result.summary())
    write_whole(folder / "coord-check.json", result.to_json() + "\n", "choose another with --out")
    print(f"numbers  {printable(folder / 'coord-check.json')}")
    result.plot(folder / "coord-check.png")
    print(f"picture  {printable(folder / 'coord-check.png')}")
    return 0 if result.verdict is CheckVerdict.PASS else 1


def _sizes(widths: list[int] | None, axis: str | None, values: list[int] | None) -> tuple[str, list[int]]:
    """The axis and the sizes along it. Raises ConfigError for contradictions."""
    if widths is not None and (axis, values) != (None, None):
        raise ConfigError("--widths is short for --axis width --values; give the one or the other")
    if values is not None and axis is None:
        raise ConfigError("--values are of an --axis: width or n_layer")
    axis = axis or "width"
    return axis, widths or values or USUAL[axis]
