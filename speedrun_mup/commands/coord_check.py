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


def run(argv: Sequence[str]) -> int:
    """Check how every update scales with width, against controls that must fail. Exit code 0 only for PASS."""
    parser = new_parser("speedrun-mup coord-check", run.__doc__ or "")
    check_group = parser.add_argument_group("check")
    check_group.add_argument("--widths", **several(int), default=[64, 128, 256, 512], metavar="W", help="%(default)s")
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
    check = {name: flags.pop(name) for name in ("widths", "steps", "seeds", "tokens")}
    cfg = make_config(flags.pop("preset"), {"parametrization": "mup"} | flags)  # muP, unless flags name other rules

    folder = Path(cfg.out) / (cfg.name or "coord-check")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as fault:
        raise ConfigError(f"{folder} cannot be made ({fault.strerror}); choose another with --out") from None

    from speedrun_mup.coord_check import CheckVerdict, gpt_coord_check

    print(rules_in_force(cfg), flush=True)
    result = gpt_coord_check(cfg, **check, progress=cfg.progress)
    print(result.summary())
    write_whole(folder / "coord-check.json", result.to_json() + "\n", "choose another with --out")
    print(f"numbers  {printable(folder / 'coord-check.json')}")
    result.plot(folder / "coord-check.png")
    print(f"picture  {printable(folder / 'coord-check.png')}")
    return 0 if result.verdict is CheckVerdict.PASS else 1
