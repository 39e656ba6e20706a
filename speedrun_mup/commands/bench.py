"""`speedrun-mup bench`."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence

from speedrun_mup.commands.train import config_from_flags
from speedrun_mup.core.errors import ConfigError
from speedrun_mup.flags import count, new_parser, parse
from speedrun_mup.setting_flags import add_preset, add_settings

STEPS = 28  # of training that are measured, by default


def run(argv: Sequence[str]) -> int:
    """Measure a training step: time by phase, tokens/s, MFU and the device's own ceilings, peak memory."""
    began = time.perf_counter()
    parser = new_parser("speedrun-mup bench", run.__doc__ or "")
    parser.add_argument("--steps", type=count, help=f"steps, over which the window grows fully; {STEPS}")
    parser.add_argument("--profile", action="store_true", help="also list the most expensive ops of one step")
    parser.add_argument(
        "--generate", action="store_true", help="measure writing text instead: tokens/s, time to the first token"
    )
    parser.add_argument("--json", action="store_true", help="as JSON")
    add_preset(parser)
    add_settings(
        parser,
        groups=("scaling", "model", "techniques", "batch", "training", "optimizer", "momentum", "data", "device"),
        plus=("seed", "fit_memory", "batch_schedule"),
    )
    flags = vars(parse(parser, argv))
    steps, profiled, generate, as_json = (flags.pop(name) for name in ("steps", "profile", "generate", "json"))
    if generate and (steps is not None or profiled):
        raise ConfigError(
            f"{'--profile' if steps is None else '--steps'} is about training steps; leave out --generate"
        )
    steps = STEPS if steps is None else steps
    cfg = config_from_flags(flags)

    if generate:
        from speedrun_mup.bench_generate import bench_generation

        written = bench_generation(cfg)
        print(written.to_json() if as_json else written.summary())
        return 0

    import contextlib
    import sys

    from speedrun_mup.bench import bench

    with contextlib.redirect_stdout(sys.stderr):  # a run's own messages are not part of the JSON
        result = bench(cfg, steps, began, profiled)
    if os.environ.get("RANK", "0") == "0":
        print(result.to_json() if as_json else result.summary())
    return 0
