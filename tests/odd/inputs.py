"""The inputs: odd values of every flag, damaged files of every kind, odd text, tables and surroundings."""

from __future__ import annotations

import csv
import gzip
import io
import json
import os
import random
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path

from odd.harness import Case, Outcome, attempt, refused

TINY = [
    *("--data", "synthetic", "--device", "cpu", "--head-dim", "16", "--block-size", "32", "--window-tokens", "96"),
    *("--micro-batch-tokens", "128", "--micro-batches", "2", "--val-tokens", "1024", "--val-chunk-tokens", "256"),
    *("--width", "32", "--preset", "laptop"),
]
RUN = ["--iterations", "6", "--val-every", "0", "--save-every", "2"]
SWEEP = [
    "--widths",
    "16",
    "32",
    "64",
    "--octaves",
    "-1",
    "0",
    "1",
    "--seeds",
    "2",
    "--iterations",
    "3",
    "--workers",
    "1",
]


class Materials:
    """A run, a sweep, a corpus, a text and a table that are right, for the cases to damage copies of."""

    def __init__(self, folder: Path, table: Path):
        self.folder, self.table = folder, table
        text = "\n\n".join(f"Paragraph {n}: " + "the quick brown fox jumps. " * 12 for n in range(400))
        (folder / "text.txt").write_text(text)
        done = {
            "text": ["data", "text", str(folder / "text.txt"), "--tokenizer", "byte", "--out", str(folder / "corpus")],
            "run": ["train", *TINY, *RUN, "--data", str(folder / "corpus"), "--out", str(folder), "--name", "run"],
            "sweep": ["sweep", *_without(TINY, "--width"), *SWEEP, "--no-adaptive", "--out", str(folder / "sweep")],
        }
        for name, words in done.items():
            outcome, fault = attempt(Case("materials", name, words), folder / "work" / name)
            if fault or outcome.code != 0:
                raise RuntimeError(f"{name} cannot be made: {fault} {outcome.said}")
        losses = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
        self.losses = [(row["step"], row["loss"]) for row in losses if row["kind"] == "train"]


def _without(words: list[str], flag: str) -> list[str]:
    at = words.index(flag)
    return words[:at] + words[at + 2 :]


def everything(materials: Materials, seed: int) -> list[Case]:
    """All cases, in an order drawn by `seed`."""
    dice = random.Random(seed)
    makers = (_flags, _run_files, _sweep_files, _corpus_files, _tables, _texts, _surroundings)
    cases = [case for maker in makers for case in maker(materials, dice)]
    dice.shuffle(cases)
    return cases


# ---------------------------------------------------------------------------------------------------------------------
# Flags

IMPOSSIBLE = {
    "INT": ["-1", "nan", "1e400", "9" * 22, "1.5", "", "0x10", "-0.0001", "ten", "1 000", "--"],
    "FLOAT": ["nan", "", "1,5x", "fast", "0x1p3x", "1e", "--"],
    "CHOICE": ["nonsense", "", "\x1b[31mred", "a\nb"],
    "STR": ["", " "],
}
COUNTS = {"--steps", "--seeds", "--widths", "--workers", "--n", "--vocab", "--predict", "--base-size"}  # 0 is none
ANY_TEXT = {"--prompt"}  # also none
DOUBTFUL = {
    "INT": ["0", "1", "3", "٣", "1e1", "1_0"],
    "FLOAT": ["inf", "-1", "1e999", "0", "-0.0", "1e-320", "1e30"],
    "STR": ["\x1b[31mred", "a\nb", "../../x", "x" * 5000, "/dev/zero", "$a$b", "é漢字", "nan", "~", "-"],
}
BASES = {
    "train": [*TINY, "--iterations", "2", "--out", "runs"],
    "explain": ["--preset", "laptop"],
    "bench": [*TINY, "--steps", "1"],
    "doctor": [*TINY],
    "plan": [*TINY, "--iterations", "2", "--budget", "1h"],
    "sweep": [
        *_without(TINY, "--width"),
        *SWEEP[:4],
        "--octaves",
        "0",
        "--seeds",
        "1",
        "--iterations",
        "1",
        "--out",
        "s",
    ],
    "coord-check": [
        *("--data", "synthetic", "--head-dim", "16", "--block-size", "32", "--window-tokens", "96"),
        *("--widths", "16", "32", "--steps", "1", "--seeds", "1", "--tokens", "32", "--out", "o"),
    ],
    "sample": ["{run}", "--device", "cpu", "--max-new-tokens", "2"],
    "eval": ["{run}", "--device", "cpu", "--tokens", "256"],
    "export": ["{run}", "o", "--to", "pt"],
    "import": ["{text}", "--out", "o"],
    "transfer": ["{table}"],
    "report": ["{table}", "--out", "o"],
    "data text": ["{text}", "--out", "o", "--tokenizer", "byte"],
    "data fineweb": ["--tokens", "1M", "--out", "o"],
    "data inspect": ["{corpus}"],
}


_NUMBERS = {
    "INT": "INT W N STEPS STEP SEEDS TOKENS VOCAB CHARS SIZE MAX_NEW_TOKENS TOP_K SEED",
    "FLOAT": "FLOAT K SHARE NATS TEMPERATURE TOP_P",
}
KINDS = {word: kind for kind, words in _NUMBERS.items() for word in words.split()}  # what --help calls a value


def flags_of(command: str) -> Iterator[tuple[str, str]]:
    """(flag, kind of its value) of a command, from its own parser's help."""
    from contextlib import redirect_stdout, suppress

    from speedrun_mup.cli import main

    said = io.StringIO()
    with redirect_stdout(said), suppress(SystemExit):
        main([*command.split(), "--help"])
    for flag, value in re.findall(r"^  (--[a-z0-9-]+)(?:, --[a-z0-9-]+)*(?: (\S+))?(?=\s|$)", said.getvalue(), re.M):
        if not value or flag == "--help":
            continue
        yield flag, "CHOICE" if value.startswith("{") else KINDS.get(value.rstrip(","), "STR")


def _flags(materials: Materials, dice: random.Random) -> Iterator[Case]:
    names = {
        "table": str(materials.table),
        "text": str(materials.folder / "text.txt"),
        "corpus": str(materials.folder / "corpus"),
        "run": str(materials.folder / "run"),
    }
    for command, base in BASES.items():
        words = [word.format(**names) if word.startswith("{") else word for word in base]
        for flag, kind in flags_of(command):
            impossible = IMPOSSIBLE[kind] + ["0"] * (flag in COUNTS)
            if flag in ANY_TEXT:
                impossible = []
            for value in impossible:
                yield Case(
                    f"flags of {command}",
                    f"{flag} {value!r:.30}",
                    [*command.split(), *words, flag, value],
                    judge=refused,
                )
            for value in DOUBTFUL.get(kind, []):
                yield Case(f"flags of {command}", f"{flag} {value!r:.30}", [*command.split(), *words, flag, value])
        for words_ in (["--pack", "1", "--micro-batches-per-forward", "1"], ["--mup", "--parametrization", "mup"]):
            name = "two names of one flag"
            yield Case(f"flags of {command}", name, [*command.split(), *words, *words_], judge=refused)
        for word in ("--no-such-flag", "-x", "---", "=", "--width=", "\x1b[2J", "--mup=yes", "--help=me"):
            yield Case(f"flags of {command}", repr(word), [*command.split(), *words, word], judge=refused)


# ---------------------------------------------------------------------------------------------------------------------
# Damage

MUTATIONS: dict[str, Callable[[bytes, random.Random], bytes]] = {
    "empty": lambda text, dice: b"",
    "cut": lambda text, dice: text[: dice.randrange(max(len(text), 1))],
    "one byte changed": lambda text, dice: _changed(text, dice),
    "a line twice": lambda text, dice: _line_twice(text, dice),
    "zeros": lambda text, dice: bytes(len(text)),
    "random bytes": lambda text, dice: dice.randbytes(200),
    "deeply nested": lambda text, dice: b"[" * 200_000,
    "null": lambda text, dice: b"null",
    "a list": lambda text, dice: b"[1, 2]",
    "a number": lambda text, dice: b"7",
    "a text": lambda text, dice: b'"text"',
    "an empty object": lambda text, dice: b"{}",
    "values are null": lambda text, dice: re.sub(rb'(": )[^,\n{\[]+', rb"\1null", text),
    "values are texts": lambda text, dice: re.sub(rb'(": )[^,\n{\["]+', rb'\1"x"', text),
    "values are lists": lambda text, dice: re.sub(rb'(": )[^,\n{\["]+', rb"\1[1]", text),
    "numbers of 400 digits": lambda text, dice: re.sub(rb'(": )-?[0-9.e+-]+', rb"\g<1>" + b"9" * 400, text),
    "numbers are negative": lambda text, dice: re.sub(rb'(": )([0-9])', rb"\1-\2", text),
    "a key fewer": lambda text, dice: re.sub(rb'"\w+": [^,{\[\]}]+, ?\n?', b"", text, count=1),
    "escape sequences": lambda text, dice: re.sub(rb'": "', b'": "\\\\u001b[31m', text),
}


def _changed(text: bytes, dice: random.Random) -> bytes:
    if not text:
        return b"\0"
    at = dice.randrange(len(text))
    return text[:at] + bytes([text[at] ^ 1 << dice.randrange(8)]) + text[at + 1 :]


def _line_twice(text: bytes, dice: random.Random) -> bytes:
    lines = text.splitlines(True) or [b"x"]
    at = dice.randrange(len(lines))
    return b"".join(lines[: at + 1] + lines[at:])


def _special(path: Path, what: str) -> None:
    path.unlink(missing_ok=True)
    {
        "a FIFO": lambda: os.mkfifo(path),
        "a folder": path.mkdir,
        "a link to nothing": lambda: path.symlink_to("nothing"),
        "a link to /dev/zero": lambda: path.symlink_to("/dev/zero"),
        "a link to itself": lambda: path.symlink_to(path.name),
        "missing": lambda: None,
    }[what]()


SPECIAL = ("a FIFO", "a folder", "a link to nothing", "a link to /dev/zero", "a link to itself", "missing")


def _damaged(folder: Path, source: Path, name: str, damage: str, seed: int) -> None:
    """A copy of `source` called by its name in `folder`, with the file `name` damaged."""
    copy = folder / source.name
    shutil.copytree(source, copy)
    path = copy / name
    if damage in SPECIAL:
        _special(path, damage)
    else:
        path.write_bytes(MUTATIONS[damage](path.read_bytes(), random.Random(seed)))


def _damages(name: str, dice: random.Random) -> Iterator[tuple[str, int]]:
    few = name.endswith((".safetensors", ".bin", ".txt", ".lock"))
    for damage in ("empty", "cut", "one byte changed", "zeros", "random bytes") if few else MUTATIONS:
        yield damage, dice.randrange(2**32)
    yield from ((damage, 0) for damage in SPECIAL)


def _files_of(folder: Path) -> list[str]:
    names = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    return [name for name in names if not name.endswith((".png", ".html"))]


def _run_files(materials: Materials, dice: random.Random) -> Iterator[Case]:
    """Every file of a run's folder, damaged, for every command that reads one."""
    source = materials.folder / "run"
    commands = {
        "doctor": ["doctor", "run"],
        "resume": ["train", "--resume", "run"],
        "resume auto": ["train", *TINY, *RUN, "--resume", "auto", "--out", "."],
        "extend": ["train", "--resume", "run", "--iterations", "8"],
        "sample": ["sample", "run", *BASES["sample"][1:]],
        "eval": ["eval", "run", *BASES["eval"][1:]],
        "export": ["export", "run", *BASES["export"][1:]],
    }
    judges = {"extend": partial(_same_losses, materials.losses)}
    for name in _files_of(source):
        for damage, seed in _damages(name, dice):
            which = dice.choice(sorted(commands))
            judge = refused if (name, damage) == ("config.json", "a key fewer") else judges.get(which)
            yield Case(
                "files of a run",
                f"{name} is {damage}, {which}",
                commands[which],
                partial(_damaged, source=source, name=name, damage=damage, seed=seed),
                judge or (lambda outcome: ""),
            )


def _same_losses(before: list[tuple[int, float]], outcome: Outcome) -> str:
    """A run that goes on from a damaged folder either says so or has the losses that it had."""
    del before  # the schedule of an extended run is its own; what it must not do is start from nothing without a word
    if outcome.code == 0 and "resumed from" not in outcome.out and "no checkpoint" not in outcome.said:
        return "silent: goes on from nothing without a word"
    return ""


def _sweep_files(materials: Materials, dice: random.Random) -> Iterator[Case]:
    """Every kind of file of a sweep's folder, damaged, for `transfer`, `report` and `sweep` itself."""
    source = materials.folder / "sweep"
    results = [name for name in _files_of(source) if name.endswith("result.json")]
    for name in ["sweep.json", dice.choice(results), dice.choice(results)]:
        for damage, seed in _damages(name, dice):
            words = dice.choice([["transfer", "sweep"], ["report", "sweep"], ["transfer", "sweep", "--json"]])
            prepare = partial(_damaged, source=source, name=name, damage=damage, seed=seed)
            yield Case("files of a sweep", f"{name} is {damage}", words, prepare)


def _corpus_files(materials: Materials, dice: random.Random) -> Iterator[Case]:
    """Every file of a corpus, damaged, for `inspect` and `train`. One that differs from its manifest is never trained on."""
    source = materials.folder / "corpus"
    train = ["train", *_without(TINY, "--data"), "--data", "corpus", "--iterations", "2", "--out", "r"]
    for name in _files_of(source):
        for damage, seed in _damages(name, dice):
            must_fail = name.endswith(".bin") and damage not in ("a link to itself",)
            for words in ["data", "inspect", "corpus"], train:
                prepare = partial(_damaged, source=source, name=name, damage=damage, seed=seed)
                judge = refused if must_fail else (lambda outcome: "")
                yield Case("files of a corpus", f"{name} is {damage}, {words[0]}", words, prepare, judge)


# ---------------------------------------------------------------------------------------------------------------------
# Tables

Rows = list[dict[str, str]]


def nearly(at: dict[tuple[str, str, str], str], row: dict[str, str]) -> str:
    """The loss of the same run with seed 0, with another last digit for each seed."""
    loss = at.get((row["width"], row["lr"], "0"), row["loss"])
    with suppress(ValueError):
        loss = f"{float(loss) + 1e-6 * int(row['seed']):.7f}"
    return loss


def _tables(materials: Materials, dice: random.Random) -> Iterator[Case]:
    with open(materials.table, newline="") as file:
        rows = [{name.lower(): value for name, value in row.items()} for row in csv.DictReader(file)]
    honest = [row for row in rows if row.get("arm", "") == rows[0].get("arm", "")]
    narrow = min({row["width"] for row in honest}, key=int)

    def with_(change: Callable[[dict[str, str]], dict[str, str]]) -> Rows:
        return [change(dict(row)) for row in honest]

    at = {(row["width"], row["lr"], row["seed"]): row["loss"] for row in honest}
    copies = {
        "widths are copies": with_(lambda row: row | {"loss": at.get((narrow, row["lr"], row["seed"]), row["loss"])}),
        "seeds are copies": with_(lambda row: row | {"loss": at.get((row["width"], row["lr"], "0"), row["loss"])}),
        "seeds are copies up to rounding": with_(lambda row: row | {"loss": nearly(at, row)}),
        "one width": [row for row in honest if row["width"] == narrow],
        "all losses equal": with_(lambda row: row | {"loss": "2.5"}),
        "all losses nan": with_(lambda row: row | {"loss": "nan"}),
        "no rows": [],
        "every row twice": honest + honest,
    }
    bad_cells = {
        "lr": ["0", "-1", "nan", "inf", "", "fast", "1e400", "\x1b[31m"],
        "width": ["0", "-64", "nan", "", "9" * 400, "64.5", "1e2000"],
        "loss": ["", "abc", "--", "1e999x", "\x00"],
        "seed": ["", "x", "1.5"],
    }
    for command in ["transfer", "t.csv"], ["report", "t.csv", "--out", "o"]:
        for name, content in copies.items():
            judge = refused if command[0] == "transfer" else (lambda outcome: "")
            yield Case("tables", name, command, partial(_write_rows, rows=content, names=list(honest[0])), judge)
        for column, values in bad_cells.items():
            for value in values:
                content = [dict(row) for row in honest]
                dice.choice(content)[column] = value
                yield Case(
                    "tables",
                    f"a {column} of {value!r:.20}",
                    command,
                    partial(_write_rows, rows=content, names=list(honest[0])),
                    refused,
                )
        for column in ("width", "lr", "loss"):
            names = [name for name in honest[0] if name != column]
            yield Case(
                "tables", f"no column {column}", command, partial(_write_rows, rows=honest, names=names), refused
            )
        raw = materials.table.read_bytes()
        for damage in ("empty", "zeros", "random bytes", "deeply nested", "null"):
            changed = MUTATIONS[damage](raw, dice)
            yield Case(
                "tables", damage, command, lambda folder, text=changed: (folder / "t.csv").write_bytes(text), refused
            )
        for damage in ("cut", "one byte changed", "a line twice"):
            changed = MUTATIONS[damage](raw, dice)
            yield Case("tables", damage, command, lambda folder, text=changed: (folder / "t.csv").write_bytes(text))
        for special in SPECIAL:
            yield Case(
                "tables",
                f"the table is {special}",
                command,
                lambda folder, what=special: _special(folder / "t.csv", what),
                refused,
            )


def _write_rows(folder: Path, rows: Rows, names: list[str]) -> None:
    with open(folder / "t.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, names, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)


# ---------------------------------------------------------------------------------------------------------------------
# Texts


def _texts(materials: Materials, dice: random.Random) -> Iterator[Case]:
    """Odd sources for `data text`. What is not in the corpus must have been said."""
    good = "".join(f"Paragraph {n} of a right text, with {n * n} words of its own.\n\n" for n in range(5000))
    files: dict[str, tuple[dict[str, bytes], bool]] = {  # name: content; whether all of it must arrive
        "a byte order mark": ({"a.txt": b"\xef\xbb\xbf" + good.encode()}, True),
        "UTF-16": ({"a.txt": good.encode("utf-16")}, False),
        "Latin-1": ({"a.txt": (good + "é").encode("latin-1")}, False),
        "no line ends": ({"a.txt": " ".join(f"word{n}" for n in range(50_000)).encode()}, True),
        "a million spaces": ({"a.txt": good.encode() + b" " * 1_000_000}, True),
        "NUL bytes": ({"a.txt": good.encode() + b"\0" * 1000}, True),
        "empty": ({"a.txt": b""}, False),
        "only blank lines": ({"a.txt": b"\n" * 5000}, False),
        "a short file": ({"a.txt": b"x"}, False),
        "capital suffixes": ({"A.TXT": good.encode(), "b.Jsonl": json.dumps({"text": good}).encode()}, True),
        "records without the field": ({"a.jsonl": b'{"txt": "a"}\n' * 50}, False),
        "a null": ({"a.jsonl": json.dumps({"text": good}).encode() + b'\n{"text": null}\n'}, False),
        "a broken line": ({"a.jsonl": json.dumps({"text": good}).encode() + b'\n{"text": "a\n'}, False),
        "deep nesting": ({"a.jsonl": b"[" * 200_000}, False),
        "lone surrogates": ({"a.jsonl": b'{"text": "\\ud800 and more"}\n' * 2000}, False),
        "a broken gzip": ({"a.txt.gz": gzip.compress(good.encode())[:-20]}, False),
        "no gzip": ({"a.txt.gz": good.encode()}, False),
        "a gzip bomb": ({"a.txt.gz": gzip.compress(bytes(200_000_000))}, False),
        "no parquet": ({"a.parquet": good.encode()}, False),
        "unknown suffixes": ({"a.docx": b"x", "b.txt": good.encode()}, False),
        "hidden files": ({".a.txt": good.encode(), "b.txt": good.encode()}, False),
        "names with line ends": ({"a\nb.txt": good.encode(), "\x1b[31m.txt": good.encode()}, True),
    }
    for name, (content, whole) in files.items():
        for words in [], ["--on-bad-document", "skip"]:
            yield Case(
                "texts",
                f"{name} {' '.join(words)}",
                ["data", "text", "in", "--out", "o", "--tokenizer", "byte", "--workers", "1", *words],
                partial(_write_files, content=content),
                partial(_all_arrived, names=list(content), whole=whole),
            )
    for what in SPECIAL:
        if what != "missing":
            yield Case(
                "texts",
                f"beside a file, {what}",
                ["data", "text", "in", "--out", "o", "--tokenizer", "byte"],
                partial(_write_files, content={"a.txt": good.encode()}, special=what),
            )
    for out in (".", "/", "in", "in/a.txt", "/dev/null", "/proc/x", "", "x" * 300):
        yield Case(
            "texts",
            f"--out {out!r:.20}",
            ["data", "text", "in", "--out", out, "--tokenizer", "byte"],
            partial(_write_files, content={"a.txt": good.encode()}),
            (lambda outcome: "") if out == "." else refused,
        )


def _write_files(folder: Path, content: dict[str, bytes], special: str = "") -> None:
    (folder / "in").mkdir()
    for name, text in content.items():
        (folder / "in" / name).write_bytes(text)
    if special:
        _special(folder / "in" / "b.txt", special)


def _all_arrived(outcome: Outcome, names: list[str], whole: bool) -> str:
    if whole and outcome.code != 0:
        return f"refused, though it is right: {outcome.err.strip()[:200]}"
    return ""


# ---------------------------------------------------------------------------------------------------------------------
# Surroundings


def _surroundings(materials: Materials, dice: random.Random) -> Iterator[Case]:
    """Environments that are odd, for commands that work in ordinary ones."""
    train = ["train", *TINY, "--iterations", "2", "--out", "r"]
    environments: dict[str, dict[str, str | None]] = {
        "no HOME": {"HOME": None},
        "a cache that cannot be written": {"SPEEDRUN_MUP_CACHE": "/proc/x"},
        "a cache that is a file": {"SPEEDRUN_MUP_CACHE": "/etc/hostname"},
        "RANK is no number": {"RANK": "x"},
        "RANK beyond WORLD_SIZE": {"RANK": "3", "WORLD_SIZE": "2"},
        "WORLD_SIZE alone": {"WORLD_SIZE": "2"},
        "MPLBACKEND of a notebook": {"MPLBACKEND": "module://matplotlib_inline.backend_inline"},
        "MPLBACKEND that is not there": {"MPLBACKEND": "nonsense"},
        "COLUMNS=1": {"COLUMNS": "1"},
        "COLUMNS=x": {"COLUMNS": "x"},
        "TMPDIR that is not there": {"TMPDIR": "/no/such"},
        "no PATH": {"PATH": ""},
        "TERM=dumb": {"TERM": "dumb"},
    }
    commands = {
        "train": train,
        "explain": ["explain", "--preset", "laptop"],
        "doctor": ["doctor", *TINY],
        "transfer": ["transfer", str(materials.table)],
        "report": ["report", str(materials.table), "--out", "o"],
    }
    for name, env in environments.items():
        for command, words in commands.items():
            yield Case("surroundings", f"{name}, {command}", words, env=env)
    for track in ("tensorboard", "wandb", "trackio"):
        yield Case("surroundings", f"--track {track}", [*train, "--track", track], env={"WANDB_MODE": "offline"})
    for special in SPECIAL[:5]:
        for command, words in commands.items():
            if command in ("train", "report"):
                out = words[-1]
                yield Case(
                    "surroundings",
                    f"--out is {special}, {command}",
                    words,
                    lambda folder, what=special, at=out: _special(folder / at, what),
                )
