"""`speedrun-mup data fineweb`, `data text` and `data inspect`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from speedrun_mup.core.errors import ConfigError, UserError
from speedrun_mup.data.sources import suffix
from speedrun_mup.files import printable
from speedrun_mup.flags import Parser, new_parser, parse, several
from speedrun_mup.synonyms import DATA_COMMANDS, command_meaning

if TYPE_CHECKING:
    from speedrun_mup.data.shards import Corpus

FINEWEB_FOLDERS = {"10B": "data/fineweb10B", "100B": "data/fineweb100B", "edu": "data/finewebedu10B"}


def run(argv: Sequence[str]) -> int:
    """Get text ready to train on, or look into a folder of shards."""
    commands = {"fineweb": run_fineweb, "text": run_text, "inspect": run_inspect}
    parser = new_parser("speedrun-mup data", run.__doc__ or "")
    about = "; ".join(f"{name}: {command.__doc__}" for name, command in commands.items())
    parser.add_argument("command", choices=tuple(commands), help=f"{about} data COMMAND --help shows its flags")
    if argv and not argv[0].startswith("-") and argv[0] not in commands:
        raise ConfigError(f"unknown command data {argv[0]}; {command_meaning(argv[0], commands, DATA_COMMANDS)}")
    return commands[parse(parser, argv[:1]).command](argv[1:])


def run_fineweb(argv: Sequence[str]) -> int:
    """Download FineWeb's ready-made GPT-2 shards from the Hugging Face hub, checked. A killed download resumes."""
    parser = new_parser("speedrun-mup data fineweb", run_fineweb.__doc__ or "")
    parser.add_argument(
        "--tokens", default="900M", metavar="N", help="to have for training, in whole shards of 100M; %(default)s"
    )
    parser.add_argument(
        "--dataset",
        choices=tuple(FINEWEB_FOLDERS),
        default="10B",
        help="FineWeb's samples, or FineWeb-Edu; %(default)s",
    )
    folders = ", ".join(FINEWEB_FOLDERS.values())
    parser.add_argument("--out", type=Path, metavar="DIR", help=f"folder to write (default: {folders})")
    parser.add_argument(
        "--revision", default="main", metavar="REV", help="branch, tag or commit on the hub; %(default)s"
    )
    parser.add_argument("--workers", type=int, default=4, metavar="N", help="downloads at a time; %(default)s")
    flags = vars(parse(parser, argv))

    from speedrun_mup.data.fineweb import download_fineweb, parse_tokens

    out = flags.pop("out") or Path(FINEWEB_FOLDERS[flags["dataset"]])
    corpus = download_fineweb(parse_tokens(flags.pop("tokens")), out, progress=sys.stderr.isatty(), **flags)
    print_parts(corpus)
    print(f"train on them with --data {out}")
    return 0


def run_text(argv: Sequence[str]) -> int:
    """Turn files, folders, standard input or Hugging Face datasets into shards. A killed run resumes where it was."""
    flags = vars(parse(_text_parser(), argv))
    paths, out, workers = flags.pop("paths"), flags.pop("out"), flags.pop("workers")
    skip_bad = flags.pop("on_bad_document") == "skip"

    from speedrun_mup.data.batches import uses
    from speedrun_mup.data.tokenize_text import TextSettings, tokenize_text

    settings = TextSettings(**flags | {"suffixes": tuple(sorted(set(flags["suffixes"])))})
    corpus = tokenize_text(paths, out, settings, workers, progress=sys.stderr.isatty(), skip_bad=skip_bad)
    print_parts(corpus)
    if share := _other_share(corpus, settings.val_share):
        print(share)
    told = [f"{text}: {corpus.tally[why]:,}" for why, text in _TALLY.items() if corpus.tally.get(why)]
    if told:
        print("; ".join(told))
    print(f"order: {corpus.order}")
    for preset, use in uses(corpus).items():
        print(f"use in preset {preset}: {use}")
    print(f"tokenizer {corpus.tokenizer}, vocabulary {corpus.vocab_size:,}; train with --data {printable(out)}")
    return 0


def _text_parser() -> Parser:
    parser = new_parser("speedrun-mup data text", run_text.__doc__ or "")
    parser.add_argument(
        "paths",
        nargs="+",
        metavar="PATH",
        help="files (.jsonl and .parquet hold records, all others plain text; also .gz .zst), folders, - for standard input,"
        " hf://OWNER/NAME/CONFIG",
    )
    parser.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="folder to write; --data DIR trains on it"
    )
    parser.add_argument(
        "--tokenizer",
        default="gpt2",
        metavar="NAME",
        help="gpt2, byte, train:N (byte pairs, N tokens), a tokenizer.json, or a folder of shards that has one; %(default)s",
    )
    parser.add_argument(
        "--suffix",
        **several(suffix),
        dest="suffixes",
        default=[],
        metavar="SUFFIX",
        help="of files in folders to read as plain text, such as .py .c, in addition to .txt .md .jsonl .parquet",
    )
    parser.add_argument("--bos", metavar="TOKEN", help="opens a document, for a tokenizer.json that does not say")
    parser.add_argument("--field", default="text", metavar="NAME", help="of a record that holds the text; %(default)s")
    parser.add_argument(
        "--passage",
        type=int,
        dest="passage_chars",
        metavar="CHARS",
        help="cut plain text at the first blank line after so many characters, 0 not at all; 512 for bytes, else 2048",
    )
    parser.add_argument(
        "--val-share", type=float, default=0.01, metavar="SHARE", help="of the documents, for validation; %(default)s"
    )
    parser.add_argument(
        "--shard-tokens", type=int, default=100_000_000, metavar="TOKENS", help="where a shard ends; %(default)s"
    )
    parser.add_argument("--drop-duplicates", action="store_true", help="keep the first of equal documents")
    parser.add_argument(
        "--order",
        choices=("shuffled", "given"),
        default="shuffled",
        help="of the documents in the shards; in the given one, a short training run sees the first files only; %(default)s",
    )
    parser.add_argument("--shuffle-seed", type=int, default=0, metavar="N", help="another shuffled order; %(default)s")
    parser.add_argument(
        "--on-bad-document",
        choices=("stop", "skip"),
        default="stop",
        help="that cannot be read or encoded: stop (fix it and rerun to resume), or name, count and leave it out;"
        " %(default)s",
    )
    parser.add_argument("--workers", type=int, metavar="N", help="threads (default: one per core)")
    return parser


_TALLY = {
    "empty": "left out as empty",
    "duplicate": "left out as duplicates",
    "bad": "left out as bad",
    "files": "files and folders left out",
    "mended": "documents with half a surrogate pair, now a question mark",
}


def _other_share(corpus: Corpus, asked: float) -> str:
    """A line on validation's share of the documents if it is not about the one asked for."""
    from speedrun_mup.data.tokenize_text import FEWEST_VAL

    val, train = (sum(corpus.facts[path.name].documents for path in paths) for paths in (corpus.val, corpus.train))
    share = val / (val + train)
    if abs(share - asked) <= 0.1 * asked:
        return ""
    told = f"validation has {100 * share:.3g} % of the documents, not {100 * asked:.3g} %"
    return f"{told}: different ones are few, and {FEWEST_VAL} go there if that is no more than a fifth; choose with --val-share"


def print_parts(corpus: Corpus) -> None:
    """A line about each part of a corpus with a manifest."""
    for part in "train", "val":
        facts = [corpus.facts[path.name] for path in getattr(corpus, part)]
        tokens, documents = sum(each.tokens for each in facts), sum(each.documents for each in facts)
        print(f"{part:<6} {tokens:,} tokens, {documents:,} documents, {len(facts)} shard(s)")


def run_inspect(argv: Sequence[str]) -> int:
    """Say what a folder of shards holds, check every byte of it, draw how long its documents are. Exit code 3 for faults."""
    parser = new_parser("speedrun-mup data inspect", run_inspect.__doc__ or "")
    parser.add_argument("directory", type=Path, metavar="DIR", help="folder of shards")
    parser.add_argument("--documents", type=int, default=3, metavar="N", help="to show the beginning of; %(default)s")
    parser.add_argument("--picture", type=Path, metavar="PNG", help="where to draw (default: DIR/document-lengths.png)")
    arguments = parse(parser, argv)

    from speedrun_mup.data.inspect_corpus import first_documents, inspect_corpus
    from speedrun_mup.data.manifest import open_corpus
    from speedrun_mup.data.shards import ShardError

    corpus = open_corpus(arguments.directory)
    found = inspect_corpus(corpus)
    print(found.summary())
    picture, undrawn = arguments.picture or arguments.directory / "document-lengths.png", None
    try:
        print(f"picture      {printable(found.plot(picture))}")
    except UserError as fault:  # the rest can be printed without it
        undrawn = fault
    for text in first_documents(corpus, arguments.documents):
        print(f"\n{text}")
    if found.faults:
        raise ShardError(f"{arguments.directory}: {len(found.faults)} fault(s), the first: {found.faults[0]}")
    if undrawn:
        raise undrawn
    return 0
