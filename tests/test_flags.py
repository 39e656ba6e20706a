"""Flags and commands as other programs call them, numbers as people write them, and paths at home."""

import argparse
import importlib
from pathlib import Path

import pytest

from speedrun_mup import synonyms
from speedrun_mup.cli import COMMANDS, main
from speedrun_mup.commands.train import train_parser
from speedrun_mup.core.errors import ConfigError
from speedrun_mup.flags import LARGEST, count, new_parser, parse, several, whole_number
from speedrun_mup.synonyms import FLAGS, command_meaning, flag_meaning

HERE = [flag for action in train_parser()._actions for flag in action.option_strings]
ANSWERS = {  # what people type -> the flag that the answer names, or that there is none
    "--steps": "--iterations",
    "--max_steps": "--iterations",
    "--max-iters": "--iterations",
    "--lr": "--matrix-lr",
    "--learning_rate": "--lr-scale is a factor",
    "--batch-size": "tokens, not sequences",
    "--per_device_train_batch_size": "--micro-batch-tokens",
    "--gradient_accumulation_steps": "--micro-batches",
    "--depth": "--n-layer",
    "--num_hidden_layers": "--n-layer",
    "--n_embd": "--width",
    "--d-model": "--width",
    "--num-attention-heads": "--head-dim",
    "--seq-len": "--micro-batch-tokens",
    "--context": "--window-tokens",
    "--max-length": "--micro-batch-tokens",
    "--dropout": "there is none",
    "--wandb": "--track wandb",
    "--report_to": "--track wandb",
    "--num-train-epochs": "--iterations",
    "--gpus": "torchrun",
    "--num_workers": "there is none",
    "--dataset": "--data",
    "--output-dir": "--out",
    "--save_steps": "--save-every",
    "--eval-every": "--val-every",
    "--fp16": "--dtype",
    "--bf16": "--dtype",
    "--warmup-steps": "there is none",
    "--wd": "--weight-decay",
    "--beta1": "--adam-beta1",
    "--log_dir": "--out",
    "--max_grad_norm": "there is none",
    "--resume_from_checkpoint": "--resume",
    "--no-wandb": "--track",
    "--use-amp": "--dtype",
    "-o": "--out",
    "--vocab-size": "--tokenizer",
    "--n_layer": "did you mean --n-layer?",
    "--widht": "did you mean --width?",
    "--gate": "did you mean --attention-gate or --gate-lr or --gate-optimizer?",
    "--zzz": "see --help",
}


@pytest.mark.parametrize("asked", ANSWERS)
def test_flags_of_other_programs_are_answered_by_their_meaning(asked, capsys):
    assert main(["train", asked, "3"]) == 2
    told = capsys.readouterr().err
    assert told.startswith(f"error: unknown argument {asked}; ") and told.count("\n") == 1
    assert ANSWERS[asked] in told


def test_every_answer_names_flags_that_exist():
    parsers = {}

    def remember(parser, argv):
        parsers[parser.prog] = {flag for action in parser._actions for flag in action.option_strings}
        raise ConfigError("seen")

    with pytest.MonkeyPatch.context() as patch:
        for name in COMMANDS:
            module = importlib.import_module(f"speedrun_mup.commands.{name.replace('-', '_')}")
            patch.setattr(module, "parse", remember)
            parts = ("run_text", "run_fineweb", "run_inspect") if name == "data" else ()
            for command in (module.run, *(getattr(module, part) for part in parts)):
                with pytest.raises(ConfigError, match="seen"):
                    command([])
    every = set().union(*parsers.values()) | {"--nproc_per_node=8"}  # torchrun's own
    for entry in FLAGS:
        wanted = set(entry.flags.split())
        assert wanted <= every, f"no command has {wanted - every}"
        for word in entry.answer.replace(",", " ").replace(";", " ").replace(":", " ").split():
            assert not word.startswith("--") or word in every, f"{entry.answer}: no command has {word}"
    assert len(parsers) == len(COMMANDS) + 3


def test_an_answer_fits_the_command():
    assert "--octaves" in flag_meaning("--lr", ["--octaves", "--matrix-lr"])
    assert "--workers" in flag_meaning("--gpus", ["--workers"]) and "torchrun" in flag_meaning("--gpus", HERE)
    assert flag_meaning("--batch-size", ["--tokens"]) is None and "--micro-batches" in flag_meaning("--batch-size")
    assert flag_meaning("--nonsense", HERE) is flag_meaning("--nonsense") is None


@pytest.mark.parametrize(
    "words, told",
    [
        (["sweep", "--keep-every", "3"], "it is a flag of speedrun-mup train and has no effect here"),
        (["bench", "--keep-every", "3"], "it is a flag of speedrun-mup train and has no effect here"),
        (
            ["coord-check", "--mup=1", "--track", "wandb"],
            "unknown argument --track; it is a flag of speedrun-mup train",
        ),
        (["eval", "--batch-size=8"], "not in this command; elsewhere: a step takes --micro-batches"),
        (["train", "width=128"], "unknown argument width=128; did you mean --width?"),
        (["train", "--data", "a", "b"], "unknown argument b; flags begin with --"),
        (["plan", "--budget", "-5m"], "--budget -5m: give a time such as 30m"),
        (["explain", "--n-layer", "1e9"], "n_layer=1000000000 must be at most 4096"),
        (["plan", "--width", "1e15", "--budget", "1h"], "width=1000000000000000 must be at most 2^20"),
        (["train", "--data"], "argument --data: expected one argument"),
        (["fit"], "unknown command fit; use train"),
        (["lr_find"], "unknown command lr_find; use plan"),
        (["coordcheck"], "unknown command coordcheck; use coord-check"),
        (["Train"], "unknown command Train; did you mean train?"),
        (["generate"], "unknown command generate; use sample runs/NAME"),
        (["trian"], "unknown command trian; did you mean train?"),
        (["qqq"], "unknown command qqq; choose demo, train"),
        (["data", "tokenize"], "unknown command data tokenize; use text"),
        (["data", "inspekt"], "unknown command data inspekt; did you mean inspect?"),
    ],
)
def test_wrong_words_cost_one_line_that_helps(words, told, capsys):
    assert main(words) == 2
    said = capsys.readouterr().err
    assert told in said and said.count("\n") == 1


def test_meanings_of_commands_lead_to_commands():
    for answer in synonyms.COMMANDS.values():
        first = answer.split()[0].strip(":,")
        assert first in COMMANDS or answer.startswith("none: ")
    assert command_meaning("coord_check", COMMANDS) == "did you mean coord-check?"


def test_help_is_a_command(capsys):
    assert main(["help"]) == 0 and "usage: speedrun-mup COMMAND" in capsys.readouterr().out
    with pytest.raises(SystemExit) as leaving:
        main(["help", "plan"])
    assert leaving.value.code == 0 and "usage: speedrun-mup plan" in capsys.readouterr().out
    assert main(["help", "hlep"]) == 2


@pytest.mark.parametrize(
    "text, number",
    [
        ("1000", 1000),
        ("10_000", 10_000),
        ("1e3", 1000),
        ("1.5e3", 1500),
        ("10k", 10_000),
        ("2.5M", 2_500_000),
        ("-3", -3),
    ]
    + [("1B", 10**9), (str(LARGEST), LARGEST), ("1.0", 1)],
)
def test_whole_numbers_as_people_write_them(text, number):
    assert whole_number(text) == number and type(whole_number(text)) is int


@pytest.mark.parametrize(
    "text",
    [
        "1.5",
        "0x10",
        "nan",
        "inf",
        "-inf",
        "",
        "k",
        "1e",
        "1,000",
        "10kk",
        "1e-3",
        str(LARGEST + 1),
        "9" * 22,
        "9" * 5000,
    ]
    + ["1e99", "1e999999999999999999999", "1e999999999k", "٣x"],
)
def test_whatever_is_no_whole_number_or_too_large_costs_one_short_line(text, capsys):
    with pytest.raises(argparse.ArgumentTypeError):
        whole_number(text)
    for flag in ("--seed", "--iterations", "--micro-batch-tokens"):
        assert main(["train", f"{flag}={text}"]) == 2
        said = capsys.readouterr().err
        assert said.startswith(f"error: argument {flag}: ") and said.count("\n") == 1 and len(said) < 200


@pytest.mark.parametrize("words", [["--path", ""], ["--text", " "], ["--names", ""], ["--names", "a", "", "b"], [""]])
def test_an_empty_value_is_a_fault_of_every_flag(words):
    parser = new_parser("test", "")
    parser.add_argument("--path", type=Path)
    parser.add_argument("--text", default="usual")
    parser.add_argument("--names", nargs="+", type=str)
    parser.add_argument("source", nargs="?")
    assert parse(parser, ["--path", "x", "--names", "a"]).text == "usual"
    with pytest.raises(ConfigError, match=r"^argument .*: it is empty; give a value"):
        parse(parser, words)


@pytest.mark.parametrize("text", ["0", "-1", "-0.0", "1.5", "few"])
def test_a_count_is_at_least_one(text):
    assert count("1") == 1 and count("10k") == 10_000
    with pytest.raises(argparse.ArgumentTypeError):
        count(text)


SAME = [  # two names of one setting
    ["train", "--pack", "2", "--micro-batches-per-forward", "4"],
    ["train", "--strict", "--no-deterministic"],
    ["train", "--no-deterministic", "--no-strict"],
    ["train", "--mup", "--parametrization=sp"],
    ["sweep", "--widths", "32", "--knob", "lr_scale", "--hyperparameter=matrix_lr"],
    ["transfer", "x.csv", "--base-size", "64", "--base-width", "32"],
]


@pytest.mark.parametrize("words", SAME)
def test_two_flags_for_one_thing_are_refused(words, capsys):
    both = [word.split("=")[0] for word in words if word.startswith("--") and word != "--widths"]
    assert main(words) == 2
    said = capsys.readouterr().err.splitlines()
    assert said == [f"error: {both[0]} and {both[1]} set the same thing; leave out one of them"]


def test_the_same_flag_again_adds_to_a_command_line():
    read = parse(train_parser(), ["--width", "64", "--compile", "--no-compile", "--width=128", "--mup", "--mup"])
    assert (read.width, read.compile, read.parametrization) == (128, False, "mup")


@pytest.mark.parametrize("words", [["32", "64"], ["32,64"], ["32,", "64"], ["32", "6.4e1"]])
def test_lists_are_apart_by_spaces_or_commas(words):
    parser = new_parser("test", "")
    parser.add_argument("--widths", **several(int))
    parser.add_argument("--octaves", **several(float), default=[0.0])
    parsed = parse(parser, ["--widths", *words, "--octaves", "-1,0", "-2.5e-1"])
    assert parsed.widths == [32, 64] and parsed.octaves == [-1, 0, -0.25]
    with pytest.raises(ConfigError, match="expected at least one value"):
        parse(parser, ["--widths", ","])
    with pytest.raises(ConfigError, match="invalid float value: '1,x'"):
        parse(parser, ["--octaves", "1,x"])


def test_a_path_may_begin_at_home(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    parser = train_parser()
    read = parse(parser, ["--out=~/runs", "--data=~/a:0.7,~/b:0.3", "--name=a~b", "--resume", "~"])
    assert read.out == f"{tmp_path}/runs" and read.data == f"{tmp_path}/a:0.7,{tmp_path}/b:0.3"
    assert read.name == "a~b" and read.resume == str(tmp_path)
    plain = new_parser("test", "")
    plain.add_argument("--paths", type=Path, nargs="+")
    assert parse(plain, ["--paths", "~/x", "y"]).paths == [tmp_path / "x", Path("y")]


def test_without_a_home_the_sign_for_it_is_refused(monkeypatch):
    monkeypatch.setattr("os.path.expanduser", lambda path: path)  # what it does for a user who is in no list
    with pytest.raises(ConfigError, match="no home folder"):
        parse(train_parser(), ["--out=~/runs"])
