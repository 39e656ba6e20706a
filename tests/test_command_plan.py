"""Plans whose runs are commands: which runs are made, what they cost, what they predict, and what cannot be meant."""

import shlex
import sys
from pathlib import Path

import pytest
from test_command_sweep import FAKE, PATTERN, InlineEngine

from speedrun_mup.cli import main
from speedrun_mup.plan.command import choose_command_plan
from speedrun_mup.plan.design import NoPlanFits
from speedrun_mup.sweep import Metric, Program, read_results
from speedrun_mup.transfer import Axes

COMMAND = f"{sys.executable} -I -S fake.py {{width}} {{lr}} {{seed}} {{out}} well"
TOLD = ["--metric", PATTERN, "--set", "lr=0.002", "--smallest", "16"]


@pytest.fixture
def fake(tmp_path, monkeypatch) -> Path:
    (tmp_path / "fake.py").write_text(FAKE)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def plan_of(share=0.4, target=512, command=COMMAND, smallest=16, **formulas):
    program = Program(Metric(PATTERN), {"lr": "0.002", **formulas}, folder=str(Path.cwd()))
    return choose_command_plan(command, program, Axes("width", "lr"), target, share, smallest)


def test_it_keeps_its_share_by_the_cost_that_is_told(fake):
    for formulas, power in (({}, 2), ({"flops": "1e6*width**3"}, 3), ({"params": "width**2", "tokens": "50*width"}, 3)):
        plan = plan_of(**formulas)
        runs = [(spec.sizes["width"]) for sweep in plan.sweeps() for spec in specs(sweep)]
        assert sum(width**power for width in runs) / 512**power <= plan.proxies.share <= 0.4
        assert min(runs) >= 16 and max(runs) <= 256 and ("if it grows as width^2" in plan.summary()) == (power == 2)
    with pytest.raises(
        NoPlanFits, match="no plan fits 0.01% of the target's cost: the smallest takes .*%; give"
    ) as told:
        plan_of(0.0001)
    assert plan_of(float(told.value.enough.rstrip("%")) / 100)


def specs(sweep):
    for width in sweep.sizes:
        for at in sweep.log2_factors:
            for seed in sweep.seeds:
                yield sweep.run_spec(sweep.arms[0], width, at, seed, None)


@pytest.mark.slow
def test_it_finds_the_rate_and_the_loss_of_the_target(fake, monkeypatch, capsys):
    """fake.py is best at 2^-9, whatever the width; its loss falls as the root of the width."""
    engines = []

    def inline(*_, **__):
        engines.append(InlineEngine())
        return engines[-1]

    monkeypatch.setattr("speedrun_mup.sweep.open_engine", inline)
    words = ["plan", "--run", COMMAND, *TOLD, "--width", "512", "--budget", "40%", "--out", "p", "--no-progress"]
    assert main(words) == 0
    told = capsys.readouterr().out
    assert "target: width 512" in told and "PASS: width 512: loss 2." in told
    plan = plan_of()
    found = plan.predict(Path("p"))
    low, high = found.forecast.loss.interval()
    assert found.value == pytest.approx(2**-9, rel=0.1) and low < 2.5 + 4 * 512**-0.5 < high
    assert plan.target_command(found.value) in told
    (line,) = (line for line in told.splitlines() if line.startswith("next  "))
    assert shlex.split(line)[4:8] == ["fake.py", "512", f"{found.value:.4g}", "0"]
    seeds = {run.sizes["width"]: set() for run in read_results(Path("p"))}
    for run in read_results(Path("p")):
        seeds[run.sizes["width"]].add(run.seed)
    assert {width: len(some) for width, some in seeds.items()} == dict(zip(plan.proxies.sizes, plan.proxies.seeds))
    made = len(engines[0].ran)
    assert main(words) == 0 and made >= 3 * len(plan.proxies.sizes) and not engines[1].ran


def test_the_commands_of_a_dry_run_are_all_and_none_starts(fake, capsys):
    assert main(["plan", "--run", COMMAND, *TOLD, "--width", "256", "--budget", "50%", "--dry-run"]) == 0
    told = capsys.readouterr()
    plan = plan_of(0.5, 256)
    runs = sum(plan.proxies.seeds) * len(plan.proxies.grid)
    assert told.out.count("fake.py") == told.out.count("\n") == runs and "proxies: widths (seeds)" in told.err
    assert not Path("plans").exists()


@pytest.mark.parametrize(
    ("words", "fault"),
    [
        ("--width 512", "--metric: say where the command's output has its loss"),
        ("--metric x{loss} --width 512", "--set lr=...: say what lr is"),
        ("--metric x{loss} --set lr=1", "say what to plan for: --width 1024, or another size with --target"),
        ("--metric x{loss} --set lr=1 --width 8 --target n=4", "say what to plan for"),
        ("--metric x{loss} --set lr=1 --target n=a", "--target n=a: invalid int value"),
        ("--metric x{loss} --set lr=1 --target 4", "--target 4: "),
        ("--metric x{loss} --set lr=1 --width 16 --smallest 8", "width 16 has 1 halves from 8 up, 3 are needed"),
        ("--metric x{loss} --set lr=1 --width 512 --n-layer 4", "--n-layer is for this package's own model"),
        ("--metric x{loss} --set lr=1 --width 512 --tokens 4k", "--tokens is for this package's own model"),
        ("--metric x{loss} --set lr=1 --width 512 --budget 1h", "is a share of its target's cost; give 10%"),
        ("--metric x{loss} --set lr=1 --target n_layer=64", "nothing gives {width} a value"),
    ],
)
def test_what_cannot_be_meant_is_one_line(fake, words, fault, capsys):
    assert main(["plan", "--run", COMMAND, *words.split()]) == 2
    told = capsys.readouterr().err
    assert fault in told and told.count("\n") == 1


def test_flags_of_a_command_need_one_and_one_that_ignores_seeds_is_refused(fake, capsys):
    assert main(["plan", "--width", "512", "--metric", "x"]) == 2
    assert "--metric: it is for a plan of a command; give --run COMMAND too" in capsys.readouterr().err
    assert main(["plan", "--run", "python fake.py {width} {lr}", *TOLD, "--width", "512"]) == 2
    assert "write {seed} into it" in capsys.readouterr().err
