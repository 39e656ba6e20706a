"""`completion`: what bash offers, that it is what the parsers know, and that help and completion import nothing heavy."""

import argparse
import shutil
import subprocess
import sys

import pytest
from helpers.commands import parsers

from speedrun_mup.cli import COMMANDS, main
from speedrun_mup.commands.completion import every_flag

ASK = """
ask() { COMP_WORDS=(speedrun-mup "$@"); COMP_CWORD=$#; _speedrun_mup; echo "${COMPREPLY[@]}"; }
"""
OFFERS = (
    ("tr", {"train", "transfer"}),
    ("train --pre", {"--preset"}),
    ("train --preset l", {"laptop"}),
    ("data ''", {"text", "fineweb", "inspect"}),
    ("data text --tok", {"--tokenizer"}),
    ("completion ''", {"bash", "zsh", "fish"}),
    ("help co", {"coord-check", "completion"}),
    ("transfer --js", {"--json"}),
    ("transfer ru", set()),  # bash offers files then
)


def script_for(shell, capsys):
    assert main(["completion", shell]) == 0
    return capsys.readouterr().out


@pytest.mark.slow
def test_what_bash_offers(capsys):
    asked = "\n".join(f"ask {words}" for words, _ in OFFERS)
    script = script_for("bash", capsys) + ASK + asked
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, timeout=60)
    assert [set(line.split()) for line in done.stdout.splitlines()] == [offers for _, offers in OFFERS], done.stderr


@pytest.mark.slow
def test_what_fish_offers(capsys):
    if not shutil.which("fish"):
        pytest.skip("needs fish")
    for words, offers in OFFERS[:6]:
        typed = words.replace("''", "")
        ask = f'{script_for("fish", capsys)}\ncomplete -C "speedrun-mup {typed}"'
        said = subprocess.run(["fish", "--no-config", "-c", ask], capture_output=True, text=True, timeout=60).stdout
        assert {line.split("\t")[0] for line in said.splitlines()} == offers


@pytest.mark.slow
def test_it_has_the_flags_and_values_of_every_parser(monkeypatch):
    known = every_flag()
    for parser in parsers(monkeypatch):
        command = parser.prog.removeprefix("speedrun-mup ")
        for action in parser._actions:
            for flag in (flag for flag in action.option_strings if flag.startswith("--")):
                if action.help != argparse.SUPPRESS and command != "coord-check":  # which has a second parser
                    offered = known[command][flag]
                    assert offered == [str(choice) for choice in action.choices or ()], (command, flag)


def test_another_shell_costs_one_line(capsys):
    assert main(["completion", "tcsh"]) == 2
    said = capsys.readouterr()
    assert said.err.startswith("error: ") and said.err.count("\n") == 1 and not said.out


@pytest.mark.slow
def test_help_and_completion_import_nothing_heavy():
    words = [["--help"], ["completion", "bash"], *([name, "--help"] for name in COMMANDS)]
    heavy = {"torch", "numpy", "pandas", "scipy", "matplotlib", "ray", "transformers"}
    program = f"""
import contextlib, sys
from speedrun_mup.cli import main
for words in {words!r}:
    with contextlib.suppress(SystemExit):
        main(words)
sys.exit(", ".join(sorted({heavy!r} & sys.modules.keys())) or None)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
