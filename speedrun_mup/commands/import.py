"""`speedrun-mup import`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from speedrun_mup.flags import new_parser, parse
from speedrun_mup.setting_flags import add_settings


def run(argv: Sequence[str]) -> int:
    """Make a run's folder of a .pt file: modded-nanogpt's own (record 26), or one that `export --to pt` wrote."""
    parser = new_parser("speedrun-mup import", run.__doc__ or "")
    parser.add_argument("file", metavar="FILE.pt", type=Path, help='{"model": state_dict}; no code in it is executed')
    parser.add_argument("--out", type=Path, required=True, metavar="RUN", help="the folder to make, such as runs/NAME")
    parser.add_argument(
        "--tokenizer",
        help="gpt2, byte, a tokenizer.json or a prepared corpus (gpt2 or byte, by the size of the vocabulary)",
    )
    parser.add_argument("--bos", help="the token of a tokenizer.json that opens a document")
    add_settings(
        parser,
        groups=("techniques",),
        plus=("head_dim", "block_size", "window_tokens", "iterations", "base_width", "parametrization"),
    )
    flags = vars(parse(parser, argv))
    file, out, tokenizer, bos = (flags.pop(name) for name in ("file", "out", "tokenizer", "bos"))

    from speedrun_mup.export.imported import import_run

    import_run(file, out, flags, tokenizer, bos)
    return 0
