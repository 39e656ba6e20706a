"""Sweeps of any command: what is started, which loss is read, and that nothing outlives a sweep or is lost with it."""

import contextlib
import dataclasses
import json
import math
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from speedrun_mup.cli import main
from speedrun_mup.core.errors import ConfigError
from speedrun_mup.report.sections import make_report
from speedrun_mup.sweep import (
    Arm,
    CommandSweep,
    Failure,
    Metric,
    Program,
    measure_sweep,
    measure_sweep_surface,
    read_curves,
    read_definition,
    read_results,
    run_safely,
    run_sweep,
)
from speedrun_mup.sweep.command.formulas import Formulas
from speedrun_mup.sweep.command.metric import Curve, NoMetric
from speedrun_mup.sweep.command.template import Template
from speedrun_mup.sweep.ignored import ignored
from speedrun_mup.sweep_flags import with_file
from speedrun_mup.transfer import Axes, Verdict

# A trainer that knows nothing of this package and takes milliseconds. `how` says what goes wrong, if anything.
FAKE = """
import math, os, random, sys, time
width, lr, seed, out, how = int(sys.argv[1]), float(sys.argv[2]), int(sys.argv[3]), sys.argv[4], sys.argv[5]
if how == "silent": sys.exit()
if how == "crash": print("no such file: corpus.bin"); sys.exit(3)
if how == "diverge": sys.exit(42)
if how == "hang": print("waiting", flush=True); time.sleep(60)
final = 2.5 + 4 * width**-0.5 + 0.03 * (math.log2(lr) + 9) ** 2
final += random.Random(" ".join(sys.argv[1:4] + sys.argv[6:7])).gauss(0, 0.001) + 0.02 * seed
begin = final - 1 if how == "rise" else final + 1
print(f"step 0: train loss 9.9, val loss {begin:.4f}")
print(f"step 100: train loss 9.9, val loss {'nan' if how == 'nan' else format(final, '.4f')}")
with open(os.path.join(out, "kept.txt"), "w") as file: file.write(" ".join(sys.argv[1:]))
if how == "nan-then-crash": print("step 200: train loss nan, val loss nan"); sys.exit(1)
"""
PATTERN = "step {step}: .* val loss {loss}"
COMMAND = f"{sys.executable} -I -S fake.py {{width}} {{lr}} {{seed}} {{out}} {{how}}"
GRID = (-2.0, -1.0, 0.0, 1.0, 2.0)


class InlineEngine:
    """Makes runs one after another in this process."""

    workers = 1

    def __init__(self):
        self.ran = []

    def run(self, specs, scratch):
        for spec in specs:
            self.ran.append(spec)
            yield spec, run_safely(spec, scratch)

    def close(self):
        pass


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """Stands in a folder with fake.py in it."""
    (tmp_path / "fake.py").write_text(FAKE)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def inside(fake, monkeypatch):
    """The same, but fake.py runs in this process, which takes no time."""
    code = compile(FAKE, "fake.py", "exec")

    def run(words, folder, log, timeout):
        monkeypatch.setattr(sys, "argv", words[words.index("fake.py") :])
        with open(log, "w") as file, contextlib.redirect_stdout(file):
            exec(code, {})
        return 0

    monkeypatch.setattr("speedrun_mup.sweep.command.run.run_and_keep", run)
    return fake


def sweep_of(command=COMMAND, how="well", widths=(32, 64), grid=(0.0, 1.0), seeds=(0,), arms=None, **options):
    command = command.replace("{how}", how)
    arms = arms or {"run": command}
    names = {field.name for field in dataclasses.fields(Program)}
    about = {name: options.pop(name) for name in [*options] if name in names}
    formulas = {"lr": options.pop("lr", "0.001")} | about.pop("formulas", {})
    program = Program(about.pop("metric", Metric(PATTERN)), formulas, folder=str(Path.cwd()), **about)
    arms = tuple(Arm(name, {"command": text}) for name, text in arms.items())
    axes, options = Axes("width", "lr"), {"adaptive": False} | options
    return CommandSweep(program, widths, arms, grid, seeds, axes, **options)


def quietly(sweep, out="s", engine=None):
    return run_sweep(sweep, Path(out), engine or InlineEngine(), progress=False)


# ---------------------------------------------------------------------------------------------------------------------
# Placeholders
# ---------------------------------------------------------------------------------------------------------------------


def test_values_stay_inside_their_words_and_a_shell_gets_them_quoted():
    template = Template("prog --name='a {x} b' {x}.txt {{x}} --f={f:.2e}")
    nasty = "1; touch spilt; $HOME 'q' `touch spilt`"
    assert template.filled({"x": nasty, "f": 0.001}) == [
        *("prog", f"--name=a {nasty} b", f"{nasty}.txt", "{x}", "--f=1.00e-03"),
    ]
    shell = Template("printf %s {x} | cat", shell=True)
    assert subprocess.run(shell.filled({"x": nasty}), capture_output=True, text=True).stdout == nasty
    assert template.names == {"x", "f"}


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("", "give a command"),
        ("python train.py '--lr={lr}", "no closing quotation"),
        ("python train.py {width", "a brace without its pair"),
        ('prog {"lr": 1}', "write {{ or }}"),
        ("prog '{\"lr\": 1}'", "write {{ and }} for braces"),
        ("prog {lr.__class__}", "is none"),
        ("prog {lr!r}", "is none"),
        ("prog {0}", "is none"),
        ("CUDA=1 prog {lr}", "write env CUDA=1"),
        ("cd x && prog {lr}", "add --shell"),
        ("prog {lr} > log", "add --shell"),
        ("prog {lr} | tee log", "add --shell"),
        ("prog {lr}; prog", "add --shell"),
        ("prog $HOME/x {lr}", "add --shell"),
    ],
)
def test_a_command_that_cannot_be_one_is_refused(text, fault):
    with pytest.raises(ConfigError, match=f"^--run.*{re.escape(fault)}[^\n]*$"):
        Template(text)


def test_what_a_shell_would_read_may_be_quoted():
    assert Template("prog 'a;b' '$x' \"<3\" {lr}").filled({"lr": 1}) == ["prog", "a;b", "$x", "<3", "1"]


def test_formulas_use_sizes_and_one_another():
    formulas = Formulas(
        {"n_head": "max(1, width//64)", "params": "12*n_layer*width**2 + 1", "tokens": "20*params", "lr": "1e-3"}
    )
    given = {"width": 256, "n_layer": 2}
    assert (formulas.value("n_head", given), formulas.value("tokens", given)) == (4, 20 * (12 * 2 * 256**2 + 1))
    assert formulas.value("lr", {}) == 1e-3 and formulas.value("width", given) == 256
    assert formulas.uses("tokens") == {"n_layer", "width"} and formulas.all_used("tokens") == {
        "n_layer",
        "width",
        "params",
    }


@pytest.mark.parametrize(
    ("texts", "fault"),
    [
        ({"x": "width//0"}, "no value at width 8"),
        ({"x": "10**10**10"}, "no value"),
        ({"x": "9**9**9**9"}, "no value"),
        ({"x": "(-8)**0.5"}, "no value"),
        ({"x": "widht//2"}, "widht is not known; there are width, x"),
        ({"x": "x+1"}, "it uses itself"),
        ({"x": "y", "y": "x"}, "it uses itself, through y"),
        ({"x": "openwebtext.bin"}, "text that all runs share belongs into the command"),
        ({"x": "__import__('os')"}, "text that all runs share"),
        ({"x": "[1]"}, "text that all runs share"),
        ({"x": "True"}, "text that all runs share"),
        ({"a-b": "1"}, "with a name of letters"),
    ],
)
def test_a_formula_that_is_none_is_refused(texts, fault):
    with pytest.raises(ConfigError, match=f"^--set .*{re.escape(fault)}[^\n]*$"):
        Formulas(texts).value(next(iter(texts)), {"width": 8})


# ---------------------------------------------------------------------------------------------------------------------
# The loss
# ---------------------------------------------------------------------------------------------------------------------


def test_the_last_match_counts_in_any_spelling(tmp_path):
    log = tmp_path / "log.txt"
    log.write_bytes(
        b"step 0: val 4\nstep 500: val \x1b[1m2.5e0\x1b[0m\rstep 500: val 2.25\nbad \xff\nstep 10: val 3.\n"
    )
    loss, curve = Metric("step {step}: val {loss}").read(log)
    assert loss == 3.0 and (curve.steps, curve.losses) == ([0, 10, 500], [4.0, 3.0, 2.25])
    assert Metric("val {loss}").read(log)[1].steps == [0, 1, 2, 3]
    for text, value in (("nan", math.nan), ("NaN", math.nan), ("-inf", -math.inf), (".5", 0.5), ("-1E-3", -1e-3)):
        log.write_text(f"val {text}\n")
        assert Metric(r"va\w{1} {loss}").read(log)[0] == pytest.approx(value, nan_ok=True)
    with pytest.raises(NoMetric, match="no line of its output matches"):
        Metric("test {loss}").read(log)
    assert len(Curve.of((step, 1.0) for step in range(10**5)).steps) <= 2001


@pytest.mark.parametrize(
    ("pattern", "fault"),
    [
        ("val loss", "write {loss} once"),
        ("{loss} {loss}", "write {loss} once"),
        ("{val_loss}", "{val_loss} is unknown"),
        ("({loss}", "no regular expression"),
        ("{loss}?", "it matches nothing at all"),
    ],
)
def test_a_bad_pattern_is_refused(pattern, fault):
    with pytest.raises(ConfigError, match=f"^--metric.*{re.escape(fault)}[^\n]*$"):
        Metric(pattern)


# ---------------------------------------------------------------------------------------------------------------------
# Runs
# ---------------------------------------------------------------------------------------------------------------------


def one(sweep, out="s"):
    """The outcome of its first run."""
    spec = sweep.run_spec(sweep.arms[0], sweep.sized[0], 0.0, 0, None)
    return run_safely(spec, Path(out) / "running")


def test_a_run_keeps_its_loss_its_curve_and_its_log(fake):
    result = one(sweep_of(formulas={"tokens": "10*width", "params": "width**2"}))
    assert (result.loss, result.diverged, result.value) == (pytest.approx(3.25, abs=0.1), False, 0.001)
    assert result.steps == [0, 100] and result.curve == [pytest.approx(result.loss + 1), result.loss]
    assert result.flops == 6 * 32**2 * 320 and result.seconds > 0
    (log,) = (fake / "s" / "logs").iterdir()
    assert log.name.startswith("run-width32-lr0.001-seed0-") and f"val loss {result.loss:.4f}" in log.read_text()
    assert not list((fake / "s" / "running").iterdir()), "what it wrote to {out} is gone"
    kept = one(sweep_of(keep=True), "k")
    (words,) = (fake / "k" / "outputs").glob("*/kept.txt")
    assert kept.id == result.id and words.read_text().split()[:3] == ["32", "0.001", "0"]


@pytest.mark.parametrize(
    ("how", "fault"),
    [
        ("silent", r"no line of its output matches --metric '.*'; it printed nothing; log: s/logs/run-width32-"),
        ("crash", "it ended with exit code 3; it last printed: no such file: corpus.bin; log: "),
        ("hang", r"it did not end within 0m\d\ds \(--timeout\) and was killed; it last printed: waiting; log: "),
    ],
)
def test_a_run_that_fails_says_why_in_a_line_and_is_not_tried_again(fake, how, fault):
    outcome = one(sweep_of(how=how, timeout=1.0 if how == "hang" else 60.0))
    assert isinstance(outcome, Failure) and re.match(fault, outcome.why) and "\n" not in outcome.why
    assert not outcome.again


WRITERS = {
    "log.csv": ("step,val/loss,lr\n0,4.5,1\n100,{loss},1\n", "val/loss"),
    "log.jsonl": ('{"step": 0, "eval": {"loss": 4.5}}\n{"step": 100, "eval": {"loss": {loss}}}\n', "eval/loss"),
    "trainer_state.json": (
        '{"log_history": [{"step": 0, "eval_loss": 4.5}, {"step": 100, "eval_loss": {loss}}]}',
        "eval_loss",
    ),
    "notes.txt": ("step 0 loss 4.5\nstep 100 loss {loss}\n", "step {step} loss {loss}"),
}


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("loss", [3.25, 5.0, math.nan])
def test_the_loss_may_be_in_a_file(inside, monkeypatch, name, loss):
    content, metric = WRITERS[name]

    def run(words, folder, log, timeout):
        log.write_text("nothing here\n")
        text = "NaN" if math.isnan(loss) else str(loss)
        (Path(words[-1]) / name).write_text(content.replace("{loss}", text))
        return 0

    monkeypatch.setattr("speedrun_mup.sweep.command.run.run_and_keep", run)
    sweep = sweep_of("prog {width} {lr} {out}", metric=Metric(metric, f"{{out}}/{name}"))
    result = one(sweep)
    assert result.diverged == (loss != 3.25) and result.steps == [0, 100] and result.curve[0] == 4.5
    assert result.diverged or result.loss == 3.25
    for other, fault in (
        (Metric("val_los", f"{{out}}/{name}"), "there is "),
        (Metric(metric, "{out}/none.csv"), "none.csv is not there; it last printed: nothing here; log: "),
    ):
        if not (name == "notes.txt" and other.is_name):
            assert fault in one(sweep_of("prog {width} {lr} {out}", metric=other)).why
    with pytest.raises(ConfigError, match="all runs would write this file"):
        sweep_of("prog {width} {lr} {out}", metric=Metric(metric, name))


def test_a_file_of_an_earlier_run_does_not_count(inside, monkeypatch):
    old = inside / "32-0.001.csv"
    old.write_text(WRITERS["log.csv"][0].replace("{loss}", "3"))
    os.utime(old, (1e9, 1e9))
    monkeypatch.setattr("speedrun_mup.sweep.command.run.run_and_keep", lambda *_: 0)
    sweep = sweep_of("prog {width} {lr}", metric=Metric("val/loss", "{width}-{lr}.csv"))
    assert "32-0.001.csv was not written by this run" in one(sweep).why


@pytest.mark.parametrize(
    ("how", "options", "reason"),
    [
        ("nan", {}, "its last loss is nan"),
        ("nan-then-crash", {}, "its last loss is nan, then it ended with exit code 1"),
        ("diverge", {"diverged_exits": (42,)}, "it ended with exit code 42, which says so"),
        ("rise", {}, "ended at a loss of 3"),
        ("well", {"initial_loss": 3.0}, "ended at a loss of 3"),
    ],
)
def test_divergence_is_a_result(fake, how, options, reason):
    result = one(sweep_of(how=how, **options))
    assert result.diverged and result.reason.startswith(reason)
    assert not one(sweep_of(initial_loss=9.0)).diverged


def test_a_program_that_is_not_there_and_one_that_was_killed(fake):
    assert "exit code 127: a program was not found" in one(sweep_of("sh -c 'exec nonesuch {width} {lr}'")).why
    killed = one(sweep_of("sh -c 'kill -9 $$ {width} {lr}'", shell=False))
    assert "exit code 137 (SIGKILL, perhaps for lack of memory)" in killed.why and killed.again
    with pytest.raises(ConfigError, match="^--run: there is no program nonesuch$"):
        quietly(sweep_of("nonesuch {width} {lr}"))
    with pytest.raises(ConfigError, match="^--run: there is no program fake.py; write python before it$"):
        quietly(sweep_of("fake.py {width} {lr}"))


def test_a_command_that_ignores_its_death_is_killed_with_all_that_it_started(fake):
    script = (
        "import os, subprocess, time\nsubprocess.Popen(['sleep', '60'])\nprint(os.getpid(), flush=True)\ntime.sleep(60)"
    )
    (fake / "stay.py").write_text(script)
    assert "killed" in one(sweep_of(f"{sys.executable} -I -S stay.py {{width}} {{lr}}", timeout=1.0)).why
    (log,) = (fake / "s" / "logs").iterdir()
    assert _group_is_gone(int(log.read_text()))


def _group_is_gone(group):
    for _ in range(50):
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.05)
    return False


# ---------------------------------------------------------------------------------------------------------------------
# Sweeps
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "fault"),
    [
        (
            {"command": "prog {width} {lr} {rate}"},
            "nothing gives {rate} a value; add --set rate=NUMBER or --axis rate=...",
        ),
        ({"command": "prog {lr}"}, "width varies, and the command has no {width}"),
        ({"command": "prog {width}"}, "lr varies, and the command has no {lr}"),
        ({"command": "prog {width} {lr}", "seeds": (0, 1)}, "no {seed}; write {seed} into it, or give --seeds 1"),
        ({"formulas": {"lr": "0.1/width"}}, "it is tuned, so give a number; for a rule: --hyperparameter factor"),
        ({"formulas": {"lr": "-1"}}, "give a number above zero"),
        ({"formulas": {"width": "3"}}, "its values are those of the sweep"),
        ({"formulas": {"params": "width**2"}}, "say how many --set tokens=..."),
        ({"formulas": {"flops": "0*width"}}, "give a formula above zero"),
        ({"controls": {"sp": {"width": -1.0}}}, "no arm is called that; there are run"),
        ({"widths": (32, 32)}, "name at least one, and none twice"),
        ({"command": "prog {width:q} {lr}"}, "{width:q} does not format 32"),
    ],
)
def test_a_sweep_that_cannot_be_is_refused_before_anything_starts(fake, options, fault):
    with pytest.raises(ConfigError, match=f"{re.escape(fault)}[^\n]*$"):
        quietly(sweep_of(**options))
    assert not (fake / "s").exists()


def test_a_placeholder_may_be_reached_by_a_formula(fake):
    formulas = {"n": "width//2", "rate": "lr*32/width"}
    sweep = sweep_of("prog {n} {rate} {out}", formulas=formulas, grid=(1.0,))
    spec = sweep.run_spec(sweep.arms[0], 64, 1.0, 0, None)
    assert spec.words("o") == ["prog", "32", "0.001", "o"] and str(spec) == "run width 64 lr 0.002 seed 0"


@pytest.mark.slow
def test_a_sweep_grows_refines_resumes_and_is_judged(inside):
    """Rates from 2^-1 to 2^1 times 0.001 where 2^1 is best: the grid grows, then is refined; nothing is run twice."""
    sweep, engine = sweep_of(widths=(32, 64, 128), grid=(-1.0, 0.0, 1.0), adaptive=True), InlineEngine()
    result = quietly(sweep, engine=engine)
    assert result.complete and len(engine.ran) == len({spec.id for spec in engine.ran}) == result.ran > 9
    assert max(run.log2_factor for run in result.results) >= 2 and "0.002" in result.summary()
    never = InlineEngine()
    assert quietly(sweep, engine=never).complete and not never.ran
    measured = measure_sweep(Path("s"), sigma=0.002)
    arm = measured.arms["run"]
    assert arm.verdict is Verdict.PASS and not measured.doubts, measured.summary()
    assert [2**fit.optimum for fit in arm.fits] == [pytest.approx(2**-9, rel=0.1)] * 3, "rates as they are, no factors"
    assert all(curve.shape == (2, 2) for curve in read_curves(Path("s")).values())
    more = InlineEngine()
    quietly(dataclasses.replace(sweep, seeds=(0, 1)), engine=more)
    assert {spec.seed for spec in more.ran} == {1}


@pytest.mark.slow
def test_one_that_fails_costs_itself_only(fake):
    sweep = sweep_of("sh -c 'test {width} = 64 && exit 7; " + COMMAND.replace("{how}", "well") + "'")
    result = quietly(sweep)
    assert {run.sizes["width"] for run in result.results} == {32} and len(result.failed) == 2
    assert (
        "failed: run width 64 lr 0.001 seed 0: it ended with exit code 7; it printed nothing; log: " in result.summary()
    )
    assert len(read_definition(Path("s"))["failed"]) == 2


@pytest.mark.parametrize("name", ["lr", "width", "seed"])
def test_a_program_that_ignores_a_placeholder_is_named(inside, name):
    place = {"lr": "{lr}", "width": "{width}", "seed": "{seed}"}
    fixed = place | {name: {"lr": "0.001", "width": "48", "seed": "0"}[name]}
    command = (
        f"{sys.executable} -I -S fake.py {fixed['width']} {fixed['lr']} {fixed['seed']} {{out}} well - {place[name]}"
    )
    (line,) = quietly(sweep_of(command, seeds=(0, 1))).ignored
    assert line.startswith("the same loss 3.") and line.endswith(f"does the program use {{{name}}}?")
    assert f" at {name} " in line and re.search("and [1-3] more such pairs", line)
    assert not quietly(sweep_of(seeds=(0, 1)), "good").ignored


def test_a_coarse_loss_that_two_runs_share_by_chance_is_no_copy(inside):
    results = quietly(sweep_of(widths=(32,), grid=GRID)).results
    coarse = [dataclasses.replace(run, loss=3.2, curve=[3.2]) for run in results]
    assert not ignored([*coarse[:2], *results[2:]], "lr") and len(ignored(coarse, "lr")) == 1


def test_another_command_pattern_or_trainer_is_another_sweep(inside):
    quietly(sweep_of(grid=(0.0,)))
    for other, fault in (
        (sweep_of(how="rise"), "arm run was another"),
        (sweep_of(metric=Metric("val loss {loss}")), "metric was"),
        (sweep_of(formulas={"iterations": "7"}), "set was"),
    ):
        with pytest.raises(ConfigError, match=f"holds another sweep: .*{fault}"):
            quietly(other)
    assert main(["sweep", "--widths", "32", "64", "128", "--out", "s"]) == 2


@pytest.mark.slow
def test_arms_are_commands_and_a_wrong_one_is_a_control(inside):
    bad = f"{sys.executable} -I -S fake.py {{width}} {{times_width}} {{seed}} {{out}} well"
    sweep = sweep_of(
        arms={"right": COMMAND.replace("{how}", "well"), "wrong": bad},
        formulas={"times_width": "lr*width/32"},
        widths=(32, 64, 128),
        grid=GRID,
        adaptive=True,
        controls={"wrong": {"width": -1.0}},
    )
    assert quietly(sweep).complete
    measured = measure_sweep(Path("s"), sigma=0.002)
    assert measured.verdict is Verdict.PASS, measured.summary()
    assert measured.arms["wrong"].predicted == -1.0 and measured.arms["wrong"].verdict is Verdict.FAIL


# ---------------------------------------------------------------------------------------------------------------------
# The command line
# ---------------------------------------------------------------------------------------------------------------------

ARGS = [
    "sweep",
    "--run",
    COMMAND.replace("{how}", "well"),
    "--metric",
    PATTERN,
    "--set",
    "lr=0.001",
    "--widths",
    "32",
    "64",
]
ARGS += ["--octaves", "0", "1", "--seeds", "1", "--no-adaptive"]


def test_a_dry_run_prints_the_commands_and_leaves_nothing(fake, capsys):
    assert main([*ARGS, "--dry-run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4 and not (fake / "sweeps").exists()
    assert shlex.split(lines[1])[4:7] == ["32", "0.002", "0"]


@pytest.mark.parametrize(
    ("more", "fault"),
    [
        (
            ["--iterations", "7"],
            "--iterations is a setting of this package's own model; write it into the command",
        ),
        (["--arms", "mup"], "--arms is for this package's own model; give --arm NAME=COMMAND"),
        (["--arm", "a=prog"], "--run and --arm: give one command"),
        (["--set", "lr=1"], "--set lr: it is there twice"),
        (["--set", "lr"], "--set lr: give NAME=NUMBER"),
        (["--timeout", "5"], "--timeout 5: give a time such as 90s"),
        (["--budget", "1e15"], "nothing says how many a run takes"),
        (["--controls", "run"], "give ARM=DRIFT"),
        (["other.txt"], "a file with flags ends in .toml and comes first"),
    ],
)
def test_bad_flags_are_one_line(fake, capsys, more, fault):
    assert main([*ARGS, *more]) == 2
    assert fault in (said := capsys.readouterr().err) and said.count("\n") == 1
    assert main(["sweep", "--widths", "32", "64", "--metric", "x"]) == 2
    assert "--metric: it is for a sweep of commands; give --run COMMAND too" in capsys.readouterr().err


def test_a_file_holds_the_flags_and_the_command_line_wins(fake, capsys):
    (fake / "sweep.toml").write_text(
        f"run = '{COMMAND.replace('{how}', 'well')}'\nmetric = '{PATTERN}'\nwidths = [32, 64]\noctaves = [-1, 0.5]\n"
        "seeds = 1\nadaptive = false\ndry_run = true\n[set]\nlr = 0.001\n"
    )
    assert main(["sweep", "sweep.toml", "--octaves", "2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[4:6] for line in lines] == [["32", "0.004"], ["64", "0.004"]]
    (fake / "axes.toml").write_text("[axis]\nwidth = [1, 2]\nn_layer = [3, 4]\n[arm]\na = 'x y'\n[controls]\nsp = -1\n")
    assert with_file(["axes.toml"]) == ["--axis=width=1,2", "--axis=n_layer=3,4", "--arm=a=x y", "--controls=sp=-1"]
    for content, fault in (("run = [", "is no TOML"), ("x = 1979-05-27", "x: give text, a number")):
        (fake / "bad.toml").write_text(content)
        assert main(["sweep", "bad.toml"]) == 2 and fault in capsys.readouterr().err
    assert main(["sweep", "none.toml"]) == 2 and "none.toml cannot be read" in capsys.readouterr().err


@pytest.mark.slow
def test_transfer_and_report_read_the_folder(inside, capsys):
    quietly(sweep_of(widths=(32, 64, 128), grid=GRID, seeds=(0, 1)))
    assert main(["transfer", "s", "--predict", "256"]) == 0
    told = capsys.readouterr().out
    assert "verdict: PASS" in told and re.search(r"width 256: loss 2\.7\d+ .*, lr 0\.0019\d*|lr 0\.002", told)
    report = make_report(Path("s"), measure_sweep(Path("s")))
    assert report.answer[0].startswith("Use `lr 0.00") and "nats per token" not in " ".join(report.answer)
    assert dict(report.facts)["Command of run"] == f"`{COMMAND.replace('{how}', 'well')}`" and report.rates is None
    (cost,) = (section for section in report.sections if section.title == "Cost")
    assert cost.tables[0].rows[0][:3] == ["run", "30", "not known"]


@pytest.mark.slow
def test_a_sweep_that_is_killed_loses_nothing_and_each_run_is_made_once(fake):
    """kill -9 in mid-sweep: the command under way dies too, the rest is kept, and the same command line does what is left."""
    note = "with open('begun', 'a') as file: file.write(' '.join(__import__('sys').argv[1:4]) + '\\n')\n"
    (fake / "fake.py").write_text(note + FAKE)
    words = [sys.executable, "-m", "speedrun_mup", *ARGS, "--octaves", "-2,-1,0,1,2", "--seeds", "2", "--workers", "2"]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    folder = fake / "sweeps" / "sweep"
    while len(list(folder.glob("cells/*/result.json"))) < 7 and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    done = {(r.sizes["width"], r.value, r.seed) for r in read_results(folder)}
    assert 7 <= len(done) < 20
    again = subprocess.run(words, capture_output=True, text=True)
    assert again.returncode == 0, again.stdout + again.stderr
    assert len(read_results(folder)) == 20
    lines = (fake / "begun").read_text().splitlines()
    begun = Counter((int(w), float(lr), int(seed)) for w, lr, seed in map(str.split, lines))
    assert len(begun) == 20 and all(begun[place] == 1 for place in done) and begun.total() <= 22
    assert json.loads((folder / "sweep.json").read_text())["base"]["trainer"] == "command"


@pytest.mark.slow
def test_sizes_on_several_axes_and_a_control_on_one_of_them(inside):
    """Layers change the noise only; the control's rate is off along them."""
    commands = {
        "right": f"{sys.executable} -I -S fake.py {{width}} {{lr}} {{seed}} {{out}} well {{n_layer}}",
        "wrong": f"{sys.executable} -I -S fake.py {{width}} {{off}} {{seed}} {{out}} well {{n_layer}}",
    }
    sizes = tuple({"width": width, "n_layer": n} for width, n in ((32, 2), (64, 2), (128, 2), (32, 4), (32, 8)))
    options = {"controls": {"wrong": {"n_layer": -1.0}}, "formulas": {"off": "lr*n_layer/2"}}
    sweep = sweep_of(arms=commands, widths=sizes, grid=GRID, **options)
    assert quietly(sweep).complete and read_definition(Path("s"))["base"]["sizes"] == ["width", "n_layer"]
    result = measure_sweep_surface(Path("s"), sigma=0.002)
    right, wrong = (result.arms[name] for name in ("right", "wrong"))
    assert abs(right["n_layer"].drift.value) < 0.1 and wrong["n_layer"].drift.value == pytest.approx(-1.0, abs=0.1)
    assert result.verdict is not Verdict.FAIL, result.summary()
    along = measure_sweep(Path("s"), size="n_layer", sigma=0.002)
    assert along.arms["wrong, width 32"].predicted == -1.0 and along.arms["right, width 32"].predicted is None


@pytest.mark.slow
@pytest.mark.dist
def test_ray_runs_commands(fake):
    """Workers of Ray start in folders of their own; the commands run where the sweep was started."""
    pytest.importorskip("ray")
    from speedrun_mup.sweep import RayEngine

    with contextlib.closing(RayEngine(2, device="cpu")) as engine:
        result = quietly(sweep_of(grid=(0.0,)), engine=engine)
    assert result.complete and len(list((fake / "s" / "logs").iterdir())) == 2


@pytest.mark.slow
def test_the_small_trainer_of_the_pages_is_swept_and_drifts(tmp_path):
    """Nothing in it knows of this package; a constant rate is too fast for wide models."""
    script = Path(__file__).parent / "helpers" / "nano_train.py"
    assert "speedrun" not in script.read_text().partition('"""\n\nimport')[2]
    command = f"{sys.executable} {script} --n_embd={{width}} --learning_rate={{lr}} --seed={{seed}} --out_dir={{out}}"
    sweep = sweep_of(command, widths=(32, 128), grid=(0.0,), lr="0.03")
    narrow, wide = sorted(quietly(sweep, tmp_path / "s").results, key=lambda run: run.sizes["width"])
    assert narrow.steps == [0, 20, 40, 60] and narrow.loss < 2.0 and wide.loss > narrow.loss + 0.1
