import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from speedrun_mup.cli import main
from speedrun_mup.commands.train import train_parser
from speedrun_mup.config import (
    PRESETS,
    config_of,
    make_config,
    settings,
)
from speedrun_mup.config_file import from_json, to_json
from speedrun_mup.core import mup
from speedrun_mup.core.errors import ConfigError
from speedrun_mup.editions import FORMER
from speedrun_mup.flags import parse
from speedrun_mup.param_groups import RATES
from speedrun_mup.scaling import rules_in_force
from speedrun_mup.settings import flag_of
from speedrun_mup.sweep.arms import pick_arms


def flags(line: str) -> dict:
    parsed = vars(parse(train_parser(), line.split()))
    parsed.pop("preset")
    return parsed


def test_the_promised_commands_mean_what_they_say():
    plain = make_config("record26", flags("--width 768 --iterations 1750"))
    assert plain == make_config("record26", {}) and plain.parametrization == "record26"
    wide = make_config("record26", flags("--mup --width 1024 --base-width 768 --iterations 1750"))
    assert (wide.parametrization, wide.width, wide.base_width, wide.iterations) == ("mup", 1024, 768, 1750)
    assert make_config("record26", flags("--mup --width 1024 --base-width 768")).iterations == 1750
    last = make_config(
        "record26", flags("--mup --width 1024 --base-width 768 --iterations 1750 --seed 42 --no-compile")
    )
    assert (last.seed, last.compile) == (42, False)


RULES = {  # flags -> rule table and base width, of (laptop, record26)
    "": (("record26", None), ("record26", None)),
    "--width 1024": (("record26", None), ("record26", None)),
    "--mup --width 1024": (("mup", 64), ("mup", 768)),
    "--parametrization sp --width 1024": (("sp", 64), ("sp", 768)),
    "--base-width 256 --width 1024": (("mup", 256), ("mup", 256)),
    "--mup --base-width 256": (("mup", 256), ("mup", 256)),
    "--parametrization record26 --base-width 256": (("record26", 256), ("record26", 256)),
}


@pytest.mark.parametrize("line", RULES)
def test_flags_and_not_the_preset_decide_on_the_rules(line):
    made = [make_config(preset, flags(line)) for preset in ("laptop", "record26")]
    assert tuple((cfg.parametrization, cfg.base_width) for cfg in made) == RULES[line]


def test_a_run_says_its_rules():
    said = {line: rules_in_force(make_config("record26", flags(line))) for line in RULES}
    assert said[""] == said["--width 1024"] == "rules: the record's own (no muP; --mup switches it on)"
    assert said["--mup --width 1024"] == "rules: muP from base width 768"
    assert said["--parametrization sp --width 1024"] == "rules: sp from base width 768"
    own = rules_in_force(make_config("record26", flags("--mup")))
    assert own == "rules: muP from base width 768, the width of this model: every factor is 1"


def test_the_record26_preset_is_the_record():
    cfg = make_config("record26", {})
    assert cfg.schedule.at(0).tokens == 393_216 and cfg.iterations == 1750 and cfg.n_layer == 12 and cfg.head_dim == 128
    assert (cfg.matrix_lr, cfg.embed_lr, cfg.head_lr, cfg.scalar_lr) == (0.05, 0.6, 0.22, 0.04)
    assert (cfg.adam_beta1, cfg.adam_beta2, cfg.adam_eps, cfg.weight_decay) == (0.8, 0.95, 1e-10, 0)
    assert (cfg.cooldown, cfg.final_lr_frac, cfg.momentum_start, cfg.momentum, cfg.momentum_warmup) == (
        0.45,
        0.1,
        0.85,
        0.95,
        300,
    )
    assert (cfg.val_tokens, cfg.val_chunk_tokens, cfg.val_every) == (10_485_760, 262_144, 125)


def test_names_of_rule_tables_and_optimizers_are_told_without_torch():
    code = (
        "import sys; from speedrun_mup.config import TrainConfig, settings_of; made = settings_of(TrainConfig)\n"
        "for name in ('parametrization', 'matrix_optimizer', 'orthogonalizer'): print(*made[name].choices)\n"
        "print('torch' in sys.modules)"
    )
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert [set(line.split()) for line in told.splitlines()] == [
        set(mup.PARAMETRIZATIONS),
        {"muon", "adam", "normuon", "muonh", "adamh", "soap-muon"},
        {"newton-schulz", "newton-schulz-12", "polar-express"},
        {"False"},
    ]


@pytest.mark.parametrize("preset", PRESETS)
def test_config_survives_json(preset):
    cfg = make_config(preset, {"base_width": 256, "width": 512, "epochs": 3})
    assert from_json(to_json(cfg), Path("x")) == cfg


BAD = {
    "--widht 128": "unknown argument --widht; did you mean --width?",
    "--width abc": "invalid int value: 'abc'",
    "--width": "expected one argument",
    "--width 0": "width=0 must be at least 1",
    "--width -64": "width=-64 must be at least 1",
    "--width 200": "width=200 is not a multiple of head_dim=32; try 192 or 224",
    "--mup --width 128 --base-width 100": "base_width=100 is not a multiple of head_dim=32; try 96 or 128",
    "--head-dim 6 --width 120": "head_dim=6 must be a multiple of 4",
    "--n-layer 1": "n_layer=1 must be at least 2 (a layer on each side of the U-net)",
    "--iterations 0": "iterations=0 must be at least 1",
    "--micro-batch-tokens 500": "micro_batch_tokens=500 is not a multiple of block_size=64; try 448",
    "--matrix-lr nan": "matrix_lr=nan must be positive and finite",
    "--matrix-lr inf": "matrix_lr=inf must be positive and finite",
    "--lr-scale -1": "lr_scale=-1.0 must be positive and finite",
    "--adam-beta1 1": "adam_beta1=1.0 must be in [0, 1)",
    "--cooldown 2": "cooldown=2.0 must be in [0, 1]",
    "--keep-last 1": "keep_last=1 must be at least 2",
    "--parametrization pum": "invalid choice: 'pum'",
    "--preset desktop": "invalid choice: 'desktop'",
    "--data /no/such/folder": "/no/such/folder",
    "--tokenizer words": "words",
    "--device tpu": "invalid choice: 'tpu' (choose from ",
    "--device cuda": "device=cuda is not usable here",
    "--attention flex": "attention=flex cannot be used: FlexAttention has no backward on cpu; use --attention blocked",
    "--out /proc/nowhere": "/proc/nowhere",
    "--resume /no/such/run": "/no/such/run",
    "--seed -1": "seed=-1 must be at least 0",
    "--seed 1.5": "invalid int value: '1.5'",
    "--base-width 0": "base_width=0 must be at least 1",
    "--head-dim 0": "head_dim=0 must be at least 1",
    "--n-layer 0": "n_layer=0 must be at least 1",
    "--block-size 0": "block_size=0 must be at least 1",
    "--window-tokens -1": "window_tokens=-1 must be at least 1",
    "--micro-batch-tokens 0": "micro_batch_tokens=0 must be at least 1",
    "--micro-batches 0": "micro_batches=0 must be at least 1",
    "--val-tokens 0": "val_tokens=0 must be at least 1",
    "--val-chunk-tokens 100": "val_chunk_tokens=100 is not a multiple of block_size=64",
    "--val-every -1": "val_every=-1 must be at least 0",
    "--save-every -1": "save_every=-1 must be at least 0",
    "--keep-every -1": "keep_every=-1 must be at least 0",
    "--micro-batches-per-forward -1": "micro_batches_per_forward=-1 must be at least 0",
    "--epochs 0": "epochs=0 must be at least 1",
    "--momentum 1": "momentum=1.0 must be in [0, 1)",
    "--momentum-warmup -1": "momentum_warmup=-1 must be at least 0",
    "--adam-beta2 nan": "adam_beta2=nan must be in [0, 1)",
    "--adam-eps 0": "adam_eps=0.0 must be positive and finite",
    "--embed-lr 0": "embed_lr=0.0 must be positive and finite",
    "--weight-decay nan": "weight_decay=nan must be finite and at least 0",
    "--weight-decay inf": "weight_decay=inf must be finite and at least 0",
    "--final-lr-frac 1.5": "final_lr_frac=1.5 must be in [0, 1]",
    "--matrix-optimizer sgd": "invalid choice: 'sgd'",
    "--on-nonfinite pray": "invalid choice: 'pray'",
    "--dtype float16": "invalid choice: 'float16'",
    "--attention magic": "invalid choice: 'magic'",
    "--track mlflow": "invalid choice: 'mlflow'",
    "--iterations": "expected one argument",
    "--lr-scale high": "invalid float value: 'high'",
    "--name ../x": "name='../x' is not a folder name inside out",
    "--epochs 1 --iterations 100000": "the data ends after 1 epoch(s)",
    "--resmue auto": "did you mean --resume?",
    "--fit-memory maybe": "unknown argument maybe",
    "--width 0 --iterations 0": "width=0 must be at least 1; iterations=0 must be at least 1",
}


@pytest.mark.parametrize("line", BAD)
def test_bad_flags_cost_one_clear_line(line, capsys, tmp_path, monkeypatch):
    import torch

    if "cuda" in line and torch.cuda.is_available():
        pytest.skip("this machine has CUDA")
    monkeypatch.chdir(tmp_path)
    code = main(["train", "--data", "synthetic", "--preset", "laptop", *line.split()])
    error = capsys.readouterr().err
    assert code in (2, 3, 4) and error.count("\n") == 1 and error.startswith("error: ")
    assert BAD[line] in error
    assert not list(tmp_path.rglob("*.safetensors"))


@pytest.mark.parametrize(
    "value", [{"kernel_warmup": -1}, {"momentum_start": -0.1}, {"timeout_s": 0.0}, {"scalar_eps": 0.0}]
)
def test_settings_without_a_flag_are_checked_as_well(value):
    ((name, number),) = value.items()
    with pytest.raises(ConfigError, match=f"{name}={number} must be "):
        make_config("laptop", value)


FORMER_FLAGS = {  # what it says now
    "--pack 2": ("--micro-batches-per-forward", {"micro_batches_per_forward": 2}),
    "--strict": ("--deterministic", {"deterministic": True}),
    "--no-strict": ("--deterministic", {"deterministic": False}),
    "--micro-batch auto": ("--fit-memory", {"fit_memory": True}),
    "--micro-batch fixed": ("--fit-memory", {"fit_memory": False}),
    "--lr-floor 0.2": ("--final-lr-frac", {"final_lr_frac": 0.2}),
    "--kernel-warmup 3": ("set kernel_warmup from Python", {"kernel_warmup": 3}),
    "--momentum-start 0.5": ("set momentum_start from Python", {"momentum_start": 0.5}),
    "--no-progress": ("set progress from Python", {"progress": False}),
    "--no-save": ("set save from Python", {"save": False}),
    "--hidden-optimizer adam": ("--matrix-optimizer", {"matrix_optimizer": "adam"}),
    "--timeout-s 60": ("set timeout_s from Python", {"timeout_s": 60.0}),
}


@pytest.mark.parametrize("line", FORMER_FLAGS)
def test_a_flag_of_the_edition_before_works_with_a_note(line, capsys, monkeypatch):
    told, asked = FORMER_FLAGS[line]
    assert flags(line) == asked
    note = capsys.readouterr().err
    assert note.startswith(f"note: {line.split()[0]} works for one more release; ") and told in note
    assert note.count("\n") == 1
    monkeypatch.setenv("RANK", "1")
    assert flags(line) == asked and not capsys.readouterr().err


def test_every_former_flag_is_tested():
    flags = {line.split()[0].removeprefix("--").removeprefix("no-").replace("-", "_") for line in FORMER_FLAGS}
    assert flags == set(FORMER)


def test_a_config_of_the_edition_before_is_read():
    former = {"pack": 4, "strict": True, "micro_batch": "auto", "lr_floor": 0.2, "hidden_optimizer": "adam"}
    now = {
        "matrix_optimizer": "adam",
        "micro_batches_per_forward": 4,
        "deterministic": True,
        "fit_memory": True,
        "final_lr_frac": 0.2,
    }
    values = vars(make_config("laptop", {}))
    saved = {name: value for name, value in values.items() if name not in now} | former
    assert make_config("laptop", now) == make_config("laptop", former)
    assert from_json(json.dumps(saved), Path("x")) == make_config("laptop", now | {"matrix_lr": saved["matrix_lr"]})


@pytest.mark.parametrize("read", [lambda saved: from_json(json.dumps(saved), Path("x")), config_of])
def test_what_every_edition_saved_must_be_there(read):
    """A missing width was read as 768."""
    saved = vars(make_config("laptop", {}))
    newer = {name: value for name, value in saved.items() if name not in ("attention_gate", "gate_lr")}
    assert read(newer) == make_config("laptop", {})
    for name in ("width", "deterministic", "matrix_optimizer"):
        with pytest.raises(ConfigError, match=f"setting {name} is missing"):
            read({key: value for key, value in saved.items() if key != name})


@pytest.mark.parametrize("read", [lambda saved: from_json(json.dumps(saved), Path("x")), config_of])
def test_a_setting_by_its_old_and_its_new_name_is_refused(read):
    with pytest.raises(ConfigError, match="deterministic and strict are one setting, by its old and its new name"):
        read({**vars(make_config("laptop", {})), "strict": True})
    with pytest.raises(ConfigError, match="pack and micro_batches_per_forward are one setting"):
        make_config("laptop", {"pack": 2, "micro_batches_per_forward": 2})


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{}",
        "[]",
        "{",
        '{"micro_batch": "some"}',
        '{"micro_batch": [1]}',
        '{"width": "128"}',
        '{"nonsense": 1}',
        '{"width": 0}',
        '{"width": 1e99}',
        '{"compile": 1}',
    ],
)
def test_a_corrupt_config_is_one_clear_error(text):
    with pytest.raises(ConfigError, match=r"run/config\.json is not a valid config"):
        from_json(text, Path("run/config.json"))


@pytest.mark.slow
def test_help_answers_within_a_second_without_torch(tmp_path):
    root = Path(__file__).parent.parent
    begun = time.monotonic()
    shown = subprocess.run(
        [sys.executable, "-X", "importtime", root / "train.py", "--help"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        check=True,
    )
    assert "torch" not in shown.stderr and "numpy" not in shown.stderr
    assert time.monotonic() - begun < 5  # 0.1 s alone; this machine may be busy
    for name, meta in settings().items():
        assert ((flag_of(name) + " ") in shown.stdout) == (meta.shown and name not in FORMER), name


def test_no_flag_is_told_twice():
    options = [option for action in train_parser()._actions for option in action.option_strings]
    assert len(options) == len(set(options)) and os.sep not in "".join(options)


def test_another_optimizer_takes_its_own_rate_unless_one_is_given():
    for preset in ("laptop", "record26"):
        for given in ({}, {"matrix_lr": 0.05}):
            cfg = make_config(preset, {"matrix_optimizer": "adam", **given})
            assert cfg.matrix_lr == given.get("matrix_lr", RATES["matrix", "adam"])
        for other in ("muon", "normuon"):
            assert make_config(preset, {"matrix_optimizer": other}).matrix_lr == 0.05
    arms = {arm: pick_arms([arm])[0].settings for arm in ("adam-mup", "adam-adam-constant", "mup", "normuon-mup")}
    have = {arm: settings.get("matrix_lr") for arm, settings in arms.items()}
    assert have == {"adam-mup": 0.008, "adam-adam-constant": 0.008, "mup": None, "normuon-mup": None}
