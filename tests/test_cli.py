import dataclasses
import os
import runpy
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import TINY
from faults.harness import fork, wait
from faults.torchrun import until

from speedrun_mup import __version__
from speedrun_mup.cli import COMMANDS, main, usage
from speedrun_mup.commands import demo, train
from speedrun_mup.commands.sweep import budget_of
from speedrun_mup.commands.train import config_from_flags
from speedrun_mup.config import make_config
from speedrun_mup.config_file import to_json
from speedrun_mup.core.errors import ConfigError
from speedrun_mup.core.utils import World
from speedrun_mup.training.run import Run
from speedrun_mup.training.run_folder import saved_config

ROOT = Path(__file__).parent.parent
LEAN = ((-2.0, -1.0, 0.0, 1.0), ())  # wide enough for models so small that it need not be extended


def as_flags(settings):
    for name, value in settings.items():
        flag = "--" + name.replace("_", "-")
        yield from (
            [flag if value else flag.replace("--", "--no-", 1)] if isinstance(value, bool) else [flag, str(value)]
        )


def test_every_command_is_listed_and_helps(capsys):
    assert main([]) == 0 and all(name in usage() for name in COMMANDS)
    assert main(["--version"]) == 0 and capsys.readouterr().out.endswith(f"speedrun-mup {__version__}\n")
    for name in COMMANDS:
        capsys.readouterr()
        with pytest.raises(SystemExit) as leaving:
            main([name, "--help"])
        assert leaving.value.code == 0 and "usage" in capsys.readouterr().out


@pytest.mark.slow
def test_a_reader_that_goes_away_is_no_error():
    words = [sys.executable, "-m", "speedrun_mup", "explain", "--json"]
    with subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as run:
        run.stdout.close()
        assert run.stderr.read() == ""
    assert run.returncode == 128 + signal.SIGPIPE


@pytest.mark.slow
def test_train_tells_where_everything_is(tmp_path, capsys):
    assert main(["train", *as_flags(TINY), "--out", str(tmp_path), "--name", "a"]) == 0
    told = capsys.readouterr().out
    for line in ("validation loss", "checkpoint  ", "loss curve  ", "metrics     "):
        assert line in told
    assert (tmp_path / "a" / "loss.png").exists()
    assert "expect about" not in told and "speedrun-mup sample" not in told  # synthetic tokens are no text


@pytest.mark.parametrize("preset, tokenizer", [("laptop", "byte"), ("record26", "gpt2")])
def test_a_preset_says_what_loss_to_expect_from_its_own_tokens(preset, tokenizer):
    assert "expect about" in train._expected(make_config(preset, {"seed": 3, "out": "x"}), tokenizer)
    assert train._expected(make_config(preset, {"seed": 3}), "synthetic") == ""
    assert train._expected(make_config(preset, {"matrix_lr": 0.1}), tokenizer) == ""


@pytest.mark.slow
def test_resume_takes_the_run_s_own_settings(tmp_path, capsys):
    assert main(["train", *as_flags(TINY | {"matrix_lr": 0.03}), "--out", str(tmp_path), "--name", "a"]) == 0
    cfg = config_from_flags({"preset": "auto", "resume": str(tmp_path / "a")})
    assert dataclasses.replace(cfg, resume=None) == saved_config(tmp_path / "a") and cfg.matrix_lr == 0.03
    assert main(["train", "--resume", str(tmp_path / "a"), "--width", "96"]) == 4
    assert "width was 64, is 96" in capsys.readouterr().err


@pytest.mark.slow
def test_the_same_command_with_auto_sizes_goes_on_with_those_that_it_found(tiny, capsys):
    """The batch was 4 x 128 tokens; taking one of two sizes from the flags again would make it 8 x 128."""
    Run(
        tiny(name="a", micro_batch_tokens=64, micro_batches=8, micro_batches_per_forward=1, val_chunk_tokens=64),
        World(),
    ).close()
    flags = {"preset": "laptop", "out": tiny().out, "resume": "auto", "fit_memory": True, "micro_batch_tokens": 128}
    capsys.readouterr()
    cfg = config_from_flags(dict(flags))
    assert (cfg.micro_batches_per_forward, cfg.micro_batch_tokens, cfg.micro_batches, cfg.val_chunk_tokens) == (
        1,
        64,
        8,
        64,
    )
    assert train.train_and_report(cfg).finished
    told = capsys.readouterr().out
    assert (
        "keeps what it found at its start: micro_batch_tokens=64, micro_batches=8, micro_batches_per_forward=1, val_chunk_"
        in told
    )
    Run(tiny(name="b", micro_batch_tokens=64, micro_batches=8), World()).close()
    capsys.readouterr()
    assert config_from_flags(flags | {"micro_batch_tokens": 64}).micro_batches == 8 and not capsys.readouterr().out


@pytest.mark.slow
def test_resume_auto_takes_the_unfinished_run_or_starts_anew(tmp_path, capsys):
    fresh = config_from_flags({"preset": "laptop", "resume": "auto", "out": str(tmp_path)})
    assert fresh.resume is None and "no unfinished run" in capsys.readouterr().out
    (tmp_path / "done").mkdir()
    (tmp_path / "done" / "config.json").write_text(to_json(fresh))
    (tmp_path / "done" / "status.json").write_text('{"status": "finished", "why": null}')
    assert config_from_flags({"preset": "laptop", "resume": "auto", "out": str(tmp_path)}).resume is None
    told = capsys.readouterr().out
    assert f"the newest run there is finished: --resume {tmp_path / 'done'} --iterations N makes it longer\n" in told


@pytest.mark.slow
def test_another_base_width_than_the_presets_is_told(capsys):
    config_from_flags({"preset": "laptop", "base_width": 768, "width": 1536})
    told = "note: the learning rates of preset laptop were tuned at width 64, not at --base-width 768\n"
    assert capsys.readouterr().out == told
    for flags in ({"base_width": 64}, {"parametrization": "mup"}, {"base_width": 768, "matrix_lr": 0.1}):
        config_from_flags({"preset": "laptop", **flags})
        assert not capsys.readouterr().out


def test_tokens_that_the_presets_rates_were_not_tuned_on_are_told(capsys, monkeypatch):
    corpus = SimpleNamespace(tokenizer="bpe:1024", vocab_size=1024)
    monkeypatch.setattr("speedrun_mup.data.corpus.find_corpus", lambda data, tokenizer: (corpus, None))
    config_from_flags({"preset": "laptop", "data": "mine"})
    told = capsys.readouterr().out
    assert (
        told.count("\n") == 1 and "were tuned on byte tokens, not on bpe:1024 ones with a vocabulary of 1,024" in told
    )
    for flags in ({"lr_scale": 0.22, "data": "mine"}, {"data": "synthetic"}):
        config_from_flags({"preset": "laptop", **flags})
        assert not capsys.readouterr().out
    corpus.tokenizer = "byte"
    config_from_flags({"preset": "laptop", "data": "mine"})
    assert not capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("run_id", ["6f1c", "none"])  # torchrun's word for no id
def test_a_restart_by_torchrun_resumes_the_run_that_this_torchrun_started(tiny, monkeypatch, run_id):
    out, flags = Path(tiny().out), {"preset": "laptop", "out": tiny().out}
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", run_id)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    with monkeypatch.context() as elsewhere:
        elsewhere.setenv("TORCHELASTIC_RUN_ID", "another")
        Run(tiny(name="theirs before"), World()).close()
    assert config_from_flags(dict(flags)).resume is None
    Run(tiny(name="ours"), World()).close()
    with monkeypatch.context() as elsewhere:
        elsewhere.setenv("TORCHELASTIC_RUN_ID", "another")
        Run(tiny(name="theirs"), World()).close()
    os.utime(out / "ours" / "config.json", (0, 0))
    for extra in ({}, {"resume": "auto"}, {"name": "ours"}):
        assert config_from_flags(flags | extra).resume == str(out / "ours")
    assert config_from_flags(flags | {"resume": str(out / "theirs"), "preset": "auto"}).resume == str(out / "theirs")


@pytest.mark.parametrize("words", [["--preset", "record26"], ["--name", "b"]])
def test_resume_refuses_what_it_would_ignore(words, tiny, capsys):
    Run(tiny(name="a"), World()).close()
    assert main(["train", "--resume", f"{tiny().out}/a", *words]) == 2
    told = capsys.readouterr().err
    assert told.endswith(f"continues that run as it is; leave out {words[0]}\n") and told.count("\n") == 1


def test_resume_of_nothing_is_one_line(tmp_path):
    with pytest.raises(ConfigError, match="holds no run"):
        config_from_flags({"preset": "auto", "resume": str(tmp_path)})


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_saves_and_asks_to_be_started_again(number, tmp_path):
    flags, said = as_flags(TINY | {"iterations": 3000, "progress": True}), tmp_path / "said"

    def life() -> None:
        os.chdir(tmp_path)
        sys.argv, sys.stdout = ["train.py", *flags, "--name", "a"], said.open("w", buffering=1)
        try:
            runpy.run_path(str(ROOT / "train.py"), run_name="__main__")
        except SystemExit as end:
            os._exit(end.code)

    child, metrics = fork(life), tmp_path / "runs" / "a" / "metrics.jsonl"
    until(lambda: metrics.exists() and '"train"' in metrics.read_text())
    os.kill(child, number)
    assert wait(child) == 75
    told = said.read_text()
    assert f"by {number.name}, saved; resume with --resume runs/a" in told
    assert len(list((tmp_path / "runs" / "a" / "checkpoints").glob("step-*"))) == 1


@pytest.mark.slow
def test_sweep_runs_what_is_missing_and_says_what_comes_next(tmp_path, capsys):
    settings = {key: TINY[key] for key in TINY if key not in ("width", "parametrization", "iterations", "val_every")}
    grid = ["--widths", "32", "64", "--octaves", "-1", "0", "--seeds", "1", "--no-adaptive", "--workers", "1"]
    words = ["sweep", *as_flags(settings), "--iterations", "3", *grid, "--out", str(tmp_path / "s")]
    assert main(words) == 0
    told = capsys.readouterr().out
    assert "4 runs done (4 now" in told and "next   speedrun-mup transfer" in told
    assert (tmp_path / "s" / "runs.csv").read_text().count("\n") == 5
    assert main(words) == 0 and "4 runs done (0 now" in capsys.readouterr().out


@pytest.mark.parametrize(
    "words, fault",
    [
        (["--arms", "mop"], "arm 'mop' is unknown"),
        (["--workers", "0"], "workers=0 must be at least 1"),
        (["--budget", "soon"], "--budget soon: give a time such as 30m"),
        (["--budget", "10%"], "in percent is for a plan"),
        (["--seeds", "0"], "--seeds 0 is no run; give how many, 1 or more, or the seeds themselves"),
        (["--lr", "1"], "unknown argument --lr; use --octaves: the factors to try are 2^K"),
        (["--mup", "--parametrization", "sp"], "--mup and --parametrization set the same thing; leave out one of them"),
        (["--hyperparameter", "dropout"], "hyperparameter='dropout' cannot be swept"),
        (["--widths", "64", "x"], "invalid int value: 'x'"),
        (["--width", "64"], "unknown argument --width; did you mean --widths?"),
    ],
)
def test_a_wrong_sweep_is_one_line(words, fault, tmp_path, capsys):
    assert main(["sweep", "--widths", "32", "64", "--out", str(tmp_path / "s"), *words]) == 2
    told = capsys.readouterr().err
    assert fault in told and told.count("\n") == 1 and not (tmp_path / "s").exists()


@pytest.mark.parametrize(
    "text, budget",
    [
        ("90s", {"budget_minutes": 1.5}),
        ("2h", {"budget_minutes": 120.0}),
        ("1e18", {"budget_flops": 1e18}),
        ("10%", {"budget_share": 0.1}),
        (None, {}),
    ],
)
def test_budgets_are_read_with_their_units(text, budget):
    assert budget_of(text) == pytest.approx(budget)


@pytest.mark.slow
@pytest.mark.dist
def test_plan_runs_the_proxies_and_predicts(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("speedrun_mup.plan.design.LEAN", LEAN)
    words = [
        "plan",
        *as_flags(TINY | {"width": 128, "iterations": 24, "base_width": 32, "lr_scale": 2.5, "data_order": "record"}),
        "--out",
        str(tmp_path / "p"),
    ]
    assert main([*words, "--budget", "0.1%"]) == 2 and "of the target run" in capsys.readouterr().err
    assert main([*words, "--budget", "160%", "--run"]) == 0
    told = capsys.readouterr().out
    assert "target: width 128" in told and "use --lr-scale" in told and "--target runs/p-target" in told
    assert main(words) == 0 and "proxies: " in capsys.readouterr().out  # found again, without a budget


@pytest.mark.slow
@pytest.mark.dist
def test_the_demo_ends_with_forecast_and_result(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    small = ["--data", "synthetic", "--head-dim", "16"]
    small += ["--data-order", "record"]  # seeds that differ in initialisation only: less noise for so few runs
    shape = ["--block-size", "32", "--micro-batch-tokens", "128", "--val-tokens", "1024", "--val-chunk-tokens", "256"]
    monkeypatch.setattr(demo, "CHECK", [*small, "--widths", "16", "32", "64", "--seeds", "1", "--tokens", "128"])
    monkeypatch.setattr(demo, "BUDGET", "160%")
    monkeypatch.setattr("speedrun_mup.plan.joint.LEAN", LEAN)
    monkeypatch.setattr("speedrun_mup.plan.joint.FEWEST_STEPS", 8)
    target = ["--width", "128", "--base-width", "32", "--mup", "--iterations", "24", "--lr-scale", "2.5"]
    monkeypatch.setattr(demo, "TARGET", [*target, *small, *shape, "--device", "cpu"])
    written: list[list[str]] = []  # of a synthetic language there is no text; tests/test_load.py has the demo's flags
    monkeypatch.setattr(demo.sample, "run", lambda argv: bool(written.append(argv)))
    assert main(["demo"]) == 0
    assert (Path(written[0][0]) / "checkpoints").is_dir() and written[0][1:] == demo.TEXT
    told = capsys.readouterr().out
    assert "PASS" in told and "use --lr-scale" in told and "validation loss" in told
    assert "predicted" in (tmp_path / "runs" / "demo" / "plan" / "report" / "report.md").read_text()


def test_a_coordinate_check_fails_before_the_work(capsys):
    for words, fault in (
        (["--out", "/dev/null/x"], "/dev/null/x/coord-check cannot be made (Not a directory)"),
        (["--track", "wandb"], "unknown argument --track"),
        (["--save-every", "3"], "unknown argument --save-every"),
    ):
        assert main(["coord-check", "--widths", "1", *words]) == 2
        told = capsys.readouterr().err
        assert fault in told and told.count("\n") == 1


WAIT_POLICY = """
import importlib, os, sys
from speedrun_mup import cli
load = importlib.import_module
def seen(name):
    print(os.environ.get("OMP_WAIT_POLICY"), "torch" in sys.modules, file=sys.stderr)
    raise SystemExit(0)
importlib.import_module = seen
cli.main(["train"])
"""


@pytest.mark.parametrize("users, used", [(None, "PASSIVE"), ("ACTIVE", "ACTIVE")])
def test_openmp_is_told_to_wait_without_spinning_before_torch_is_loaded(users, used):
    environment = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    environment |= {"OMP_WAIT_POLICY": users} if users else {}
    done = subprocess.run([sys.executable, "-c", WAIT_POLICY], env=environment, capture_output=True, text=True)
    assert done.stderr.strip() == f"{used} False"


@pytest.mark.parametrize(
    "words", [["transfer"], ["report"], ["data", "inspect"], ["doctor", "--preset", "laptop", "--out"]]
)
def test_a_path_that_the_system_refuses_is_one_line(words, capsys):
    assert main([*words, "x" * 5000]) in (2, 3)
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "File name too long" in said and len(said) < 500
