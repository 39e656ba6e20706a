"""Every command in README.md and docs/*.md, as the reader pastes it: run here, or marked in the page with the reason why not.

A mark stands right before the block and names how the command begins:

    <!-- not run: make demo: takes minutes; the same job is run small by test_cli -->

A block of Python that begins with the comment `# NAME.py` is a file that the reader saves, for the commands after it.
"""

import gzip
import importlib
import itertools
import json
import os
import random
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.commands import parsers

from speedrun_mup.cli import COMMANDS, main

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.glob("*.md")), *sorted(DOCS.glob("tutorials/*.md"))]
PROGRAMS = ("make", "git", "pip", "python", "torchrun", "srun", "speedrun-mup")
SCRIPTS = {
    "train.py": ["train"],
    "scripts/train.py": ["train"],
    "scripts/data/fineweb.py": ["data", "fineweb"],
    "scripts/data/text.py": ["data", "text"],
}

# How commands are made short: the first pattern that fits appends its flags, which win over those before them.
SHAPE = "--head-dim 16 --block-size 32 --window-tokens 96 --micro-batch-tokens 128"
SMALL = f"{SHAPE} --micro-batches 2 --iterations 2 --val-tokens 1024 --val-chunk-tokens 256"
CHECK = "--data synthetic --head-dim 16 --block-size 32 --widths 16 32 64 --seeds 1 --tokens 128 --steps 3"
SHORT = (
    (r"^train .*--data ", f"--preset laptop --device cpu --width 64 {SMALL}"),
    (r"^sample", "--max-new-tokens 20"),
    (r"^train .*--resume ", ""),
    (r"^train", f"--preset laptop --device cpu --data synthetic --width 64 {SMALL}"),
    (r"^plan .*--run ", ""),
    (r"^plan .*--preset record26", "--data synthetic --iterations 3"),
    (r"^plan .*--tokens", "--data synthetic"),
    (r"^plan", "--data synthetic --iterations 20 --micro-batches 1 --val-tokens 4096"),
    (
        r"^sweep .*--axis iterations",
        f"--data synthetic {SMALL.replace('--iterations 2', '--values 2 4 8')} --octaves 0 1 --seeds 1 --no-adaptive",
    ),
    (r"^sweep .*(--run|toml)", "--octaves -1 0 1 --seeds 1 --no-adaptive"),
    (r"^sweep", f"--data synthetic {SMALL} --widths 16 32 64 --octaves -1 0 1 --seeds 1 --no-adaptive"),
    (r"^ablate .*z_loss", f"--data synthetic {SMALL} --widths 16 32 --seeds 2 --octaves 0"),
    (r"^ablate", f"--data synthetic {SMALL} --widths 16 32 --seeds 2 --octaves 0 --techniques attention_gate"),
    (r"^coord-check (my_models|llama):", "--widths 32 64 128 --seeds 1 --steps 3 --no-progress"),
    (r"^coord-check .*--axis ", CHECK.replace("--widths 16 32 64", "--base-width 32 --base-layers 2 --values 2 4 8")),
    (r"^coord-check", CHECK),
    (r"^bench", f"--preset laptop --device cpu --data synthetic --width 64 {SHAPE} --micro-batches 1 --steps 2"),
    (r"^doctor( -|$)", "--preset laptop --data synthetic --device cpu"),
    (r"^data text", "--tokenizer byte --val-share 0.2"),
)
MODELS = """
import torch
from torch import nn

def build(width):
    return nn.Sequential(nn.Linear(8, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 4))

def data():
    draw = torch.Generator().manual_seed(0)
    return [(torch.randn(32, 8, generator=draw), torch.randint(4, (32,), generator=draw)) for _ in range(3)]

def loss(model, batch):
    return nn.functional.cross_entropy(model(batch[0]), batch[1])
"""
LOGS = {  # the reader's logs -> tests/data/logs
    "wandb": "wandb",
    "lightning_logs": "lightning",
    "ray_results": "ray",
    "tb_logs": "tensorboard",
    "hf_runs": "trainer",
    "optuna.db": "optuna.db.gz",
    "trackio.db": "trackio-widths.db.gz",
}
ALONE = (
    "coord-check",
    "explain",
    "plan",
)  # need nothing of a page but their settings: the same on many pages runs once
DONE: set[tuple[str, ...]] = set()
VERDICTS = ("transfer", "coord-check")  # 1 is an answer of theirs


def commands_of(page: Path):
    """(line, words of the command, reason why it is not run) for each command in a block of the page."""
    marks, fence, used = [], None, set()
    for number, line in enumerate(page.read_text().splitlines(), 1):
        if line.startswith("```"):
            fence = None if fence is not None else line[3:].strip()
            if fence is None:
                unused = [begin for begin, _ in marks if begin not in used]
                assert not unused, f"{page.name}:{number}: nothing in this block begins with {unused}"
                marks, used = [], set()
        elif fence is None and (mark := re.fullmatch(r"<!-- not run: (.+?): (.+) -->", line)):
            marks.append((mark[1], mark[2]))
        elif (fence in ("", "bash", "sh", "console")) or (fence is None and line.startswith("    ")):
            for part in line.split("#")[0].strip().removeprefix("$ ").split(" && "):
                if (part.split() or [""])[0] in PROGRAMS:
                    words = shlex.split(part)
                    reason = next((why for begin, why in marks if part.strip().startswith(begin)), None)
                    used |= {begin for begin, _ in marks if part.strip().startswith(begin)}
                    yield number, words, reason


def files_of(page: Path) -> dict[str, str]:
    """The files that the page asks to save: name -> text."""
    blocks = re.findall(r"^```python\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)
    named = ((re.match(r"# (\w+\.py)\n", block), block) for block in blocks)
    return {name[1]: block for name, block in named if name}


def argv_of(words: list[str]) -> list[str] | None:
    """The words after speedrun-mup, if the command is one of ours."""
    while words and words[0] in ("srun", "torchrun", "python", "-m", "speedrun-mup", "speedrun_mup"):
        skipped, words = words[0], words[1:]
        if skipped == "torchrun":
            while words[0].startswith("-"):
                words = words[1:] if "=" in words[0] else words[2:]
        if skipped in ("speedrun-mup", "speedrun_mup"):
            return words
        if words[0] in SCRIPTS:
            return [*SCRIPTS[words[0]], *words[1:]]
    return None


EVERY = [(page, *command) for page in PAGES for command in commands_of(page)]


def test_there_are_commands_and_those_that_are_not_run_say_why():
    ours = [words for _, _, words, _ in EVERY if argv_of(words)]
    assert len(ours) > 20
    for page, number, words, reason in EVERY:
        known = argv_of(words) or words[:2] == ["python", "benchmarks/reliability.py"] or words[1] in files_of(page)
        assert known or reason, f"{page.name}:{number}: {shlex.join(words)} is neither run nor marked"
        assert reason is None or len(reason) > 10, f"{page.name}:{number}: {reason} is no reason"


class _Parsed(Exception):
    pass


def write_sweep_toml(folder: Path) -> None:
    """The file that the page shows."""
    page = (ROOT / "docs" / "any-trainer.md").read_text()
    (folder / "sweep.toml").write_text(page.split("```toml\n")[1].split("```")[0])


@pytest.fixture
def only_parse(monkeypatch, tmp_path):
    """Commands end where their flags are parsed."""
    monkeypatch.chdir(tmp_path)
    write_sweep_toml(tmp_path)

    def stop(module):
        parse = module.parse

        def parse_and_stop(parser, argv):
            parsed = parse(parser, argv)
            if module.__name__.endswith(".data") and getattr(parsed, "command", None):
                return parsed
            raise _Parsed

        monkeypatch.setattr(module, "parse", parse_and_stop)

    for name in COMMANDS:
        stop(importlib.import_module(f"speedrun_mup.commands.{name.replace('-', '_')}"))


@pytest.mark.slow
def test_every_command_parses_as_it_is_written(only_parse, capsys):
    for page, number, words, _ in EVERY:
        argv = argv_of(words)
        if argv:
            with pytest.raises(_Parsed):
                code = main(argv)
                pytest.fail(f"{page.name}:{number}: {shlex.join(words)}: {code} {capsys.readouterr().err}")


# Flags of torchrun, sbatch, a tutorial and the scripts in benchmarks/, which the pages also name.
FOREIGN = """--nproc_per_node --max-restarts --signals-to-handle --rdzv-id --requeue --signal
--nnodes --rdzv-backend --rdzv-endpoint --nodes --ntasks-per-node --gpus-per-node --open-mode
--z-loss --n_embd --learning_rate --max_iters --seed --out_dir --lr
--from --count --kills --publish --quick --all --no-deps --model --model_args"""


def test_every_flag_that_a_page_names_exists(monkeypatch):
    flags = set(FOREIGN.split())
    for parser in parsers(monkeypatch):
        flags.update(flag for action in parser._actions for flag in action.option_strings)
    for page in PAGES:
        if page.name != "LOG.md":  # which tells of days when flags had other names
            for flag in re.findall(r"(?<![\w-])--[a-z][\w-]*", page.read_text()):
                assert flag in flags, f"{page.name} names {flag}, which no command has"


@pytest.fixture(scope="session")
def texts():
    """Text to make shards from."""
    return "\n\n".join((ROOT / "docs" / name).read_text() for name in ("mup.md", "transfer.md", "reliability.md"))


@pytest.fixture
def workspace(tmp_path, monkeypatch, texts):
    """A folder that looks like a clone, with the reader's own files in it."""
    for name in ("train.py", "scripts", "benchmarks", "tests", "docs"):
        (tmp_path / name).symlink_to(ROOT / name)
    for name in ("notes", "my_texts"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.md").write_text(texts)
    for name in ("books.jsonl.gz", "more.jsonl.gz"):
        lines = [json.dumps({"text": part}) for part in texts.split("\n\n")]
        (tmp_path / name).write_bytes(gzip.compress("\n".join(lines).encode()))
    (tmp_path / "my_models.py").write_text(MODELS)
    sys.modules.pop("my_models", None)  # of another test
    (tmp_path / "my_train.py").symlink_to(ROOT / "tests" / "helpers" / "nano_train.py")
    write_sweep_toml(tmp_path)
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    for name, logs in LOGS.items():
        if logs.endswith(".gz"):
            (tmp_path / name).write_bytes(gzip.decompress((ROOT / "tests" / "data" / "logs" / logs).read_bytes()))
        else:
            (tmp_path / name).symlink_to(ROOT / "tests" / "data" / "logs" / logs)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write_table(path: Path, sizes: list[str], hyperparameter: str) -> None:
    """The reader's own runs: an arm that transfers and one that drifts by an octave per doubling, along each size alone."""
    rows = [f"arm,{','.join(sizes)},{hyperparameter},seed,loss"]
    places, luck = {(0, *[64] * len(sizes))}, random.Random(0)
    for axis in range(len(sizes)):
        places |= {(j, *(64 * 2**j if axis == other else 64 for other in range(len(sizes)))) for j in range(3)}
    for arm, drift in (("mup", 0.0), ("sp", -1.0)):
        for doubling, *values in sorted(places):
            width = ",".join(map(str, values))
            for octave in range(-4, 4):
                for seed in range(3):
                    noise = luck.gauss(0, 0.002)
                    loss = 3 - 0.2 * doubling + 0.05 * (octave - drift * doubling) ** 2 + noise
                    rows.append(f"{arm},{width},{0.01 * 2.0**octave:.8g},{seed},{loss:.6f}")
    path.write_text("\n".join(rows) + "\n")


def short(argv: list[str]) -> list[str]:
    """The command with its short settings."""
    line = " ".join(argv)
    return [*argv, *next((more.split() for pattern, more in SHORT if re.search(pattern, line)), [])]


@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.parametrize(
    "page", sorted({page for page, _, _, reason in EVERY if not reason}), ids=lambda page: page.name
)
def test_the_commands_of_a_page_work_one_after_the_other(page, workspace, capfd, monkeypatch):
    for name, text in files_of(page).items():
        (workspace / name).write_text(text)
        monkeypatch.delitem(sys.modules, name[:-3], raising=False)
    monkeypatch.syspath_prepend(workspace)
    for number, words, reason in commands_of(page):
        if reason:
            continue
        if len(words) == 2 and words[1] in files_of(page):
            runpy.run_path(words[1], run_name="__main__")
            continue
        for name in (word for word in words if word.endswith(".csv") and "{" not in word):
            sizes = [after for word, after in itertools.pairwise(words) if word == "--size"] or ["width"]
            tuned = words[words.index("--hyperparameter") + 1] if "--hyperparameter" in words else "lr"
            write_table(workspace / name, sizes, tuned)
            for pair in words[words.index("--columns") + 1].split(",") if "--columns" in words else ():
                ours, theirs = pair.split("=")
                header, rest = (workspace / name).read_text().split("\n", 1)
                renamed = [theirs if column == ours else column for column in header.split(",")]
                (workspace / name).write_text(",".join(renamed) + "\n" + rest)
        argv = argv_of(words)
        if words[0] == "torchrun":
            program = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "train.py"]
            done = subprocess.run([*program, *short(argv)[1:]], capture_output=True, text=True, timeout=300)
            code, said = done.returncode, done.stdout + done.stderr
        elif argv is None:
            flags = short(words[2:])[len(words[2:]) :] if words[1] in files_of(page) else []
            done = subprocess.run([sys.executable, *words[1:], *flags], capture_output=True, text=True, timeout=300)
            code, said = done.returncode, done.stdout + done.stderr
        elif tuple(argv) in DONE:
            continue
        else:
            code = main(short(argv))
            said = "".join(capfd.readouterr())
            if argv[0] in ALONE and not {"--out", "--run"} & {*argv} and "my_models:build" not in argv:
                DONE.add(tuple(argv))
        assert code in ((0, 1) if argv and argv[0] in VERDICTS else (0,)), f"{page.name}:{number}: {words}\n{said}"
