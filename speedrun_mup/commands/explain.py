"""`speedrun-mup explain`."""

from __future__ import annotations

from collections.abc import Sequence

from speedrun_mup.commands.train import other_base
from speedrun_mup.config import PRESETS, make_config
from speedrun_mup.flags import count, new_parser, parse
from speedrun_mup.scaling import rules_in_force
from speedrun_mup.setting_flags import add_settings

SIZES = ("n_layer", "head_dim", "micro_batches", "micro_batch_tokens", "iterations", "adam_beta1", "adam_beta2")


def run(argv: Sequence[str]) -> int:
    """Print what the rules come to for every parameter: role, shape, init, multiplier, LR, eps, decay, at base and here."""
    parser = new_parser("speedrun-mup explain", run.__doc__ or "")
    parser.add_argument(
        "--preset", choices=tuple(PRESETS), default="record26", help="preset for all settings not given; %(default)s"
    )
    parser.add_argument("--vocab", type=count, default=50257, help="of the tokenizer; %(default)s")
    parser.add_argument("--json", action="store_true", help="as JSON")
    add_settings(parser, groups=("scaling", "techniques", "optimizer"), plus=SIZES)
    flags = vars(parse(parser, argv))
    vocab, as_json = flags.pop("vocab"), flags.pop("json")
    preset = flags.pop("preset")
    cfg = make_config(preset, flags)

    from speedrun_mup.explain import explain, rules_of_run, table, to_json

    rows = explain(cfg, vocab)
    about = [f"preset: {preset} (train without --preset takes the one that fits the device)", rules_in_force(cfg)]
    about += [note for note in [other_base(preset, cfg, flags)] if note]
    print(to_json(rows) if as_json else "\n".join([*about, *rules_of_run(cfg), table(rows)]))
    return 0
