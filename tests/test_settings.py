"""What a declaration of a setting says: which commands take it, what it means for a resume and for the hash of a run."""

import dataclasses
import importlib
import json
import pickle
from pathlib import Path

import pytest
from helpers.commands import parsers

from speedrun_mup import config
from speedrun_mup.cli import COMMANDS, main
from speedrun_mup.commands.train import train_parser
from speedrun_mup.config import (
    GROUPS,
    TrainConfig,
    add_param_group,
    add_setting,
    build,
    computed_settings,
    config_of,
    hashed_settings,
    known_settings,
    make_config,
    settings,
    swept_settings,
)
from speedrun_mup.config_file import from_json, to_json
from speedrun_mup.core.errors import ConfigError
from speedrun_mup.editions import FIRST_HASHED, FORMER
from speedrun_mup.flags import OF_COMMANDS, parse
from speedrun_mup.param_groups import ParamGroup
from speedrun_mup.settings import FRACTION, flag_of, setting, settings_of
from speedrun_mup.sweep import RunSpec
from speedrun_mup.training.build import tuned_values
from speedrun_mup.training.checkpoint import CheckpointError
from speedrun_mup.training.load import load_run
from speedrun_mup.training.run import train
from speedrun_mup.training.run_folder import saved_config

FREE_AT_FIRST = {  # on resume, in the first edition
    *("out", "name", "resume", "init_from", "save", "save_every", "keep_last", "keep_every", "track", "progress"),
    *("val_every", "on_nonfinite", "timeout_s", "device", "attention", "compile", "kernel_warmup"),
    *("micro_batches_per_forward",),
    *("data", "tokenizer"),
    "sample_every",  # came later
}


def test_every_setting_says_what_it_affects():
    assert set(settings()) == {field.name for field in dataclasses.fields(TrainConfig)}
    for name, meta in settings().items():
        assert meta.affects in ("result", "speed", "storage", "display"), name
        assert meta.group in GROUPS, name


def test_a_setting_cannot_be_declared_without_saying_so():
    with pytest.raises(TypeError, match="affects"):
        setting("model", "help", 1)

    @dataclasses.dataclass(frozen=True)
    class Forgotten(TrainConfig):
        dropout: float = 0.0

    with pytest.raises(TypeError, match=r"Forgotten\.dropout: declare it with setting"):
        settings_of(Forgotten)


def test_what_a_resume_may_change_is_what_it_always_was():
    assert {name for name, meta in settings().items() if not meta.must_match} == FREE_AT_FIRST
    assert {name for name, meta in settings().items() if meta.lasts} == {"iterations", "data", "tokenizer"}


AT_FIRST = {  # ids of the first edition, for a corpus and a vocabulary that are nobody's
    "029d04de3a168186": make_config("laptop", {"base_width": 64}),
    "a0bd0d8d64dacf34": make_config("record26", {}),
    "17b8a1ba1757f754": dataclasses.replace(
        make_config(
            "laptop",
            {
                "strict": True,
                "pack": 2,
                "lr_floor": 0.2,
                "micro_batch": "auto",
                "scalar_eps": 1e-4,
                "hidden_optimizer": "adam",
                "matrix_lr": 0.05,
                "on_nonfinite": "skip",
                "val_chunk_tokens": 2048,
            },
        ),
        momentum_start=0.8,  # which Adam does not read
    ),
}


@pytest.mark.parametrize("id", AT_FIRST)
def test_a_run_keeps_its_hash_over_editions(id):
    cfg = AT_FIRST[id]
    assert RunSpec("mup", {"width": cfg.width}, 0.0, 0, cfg, "f" * 64, 256).id == id


def test_a_hash_tells_what_a_run_computes_and_nothing_else():
    cfg = make_config("laptop", {})
    moved = dataclasses.replace(cfg, out="elsewhere", save_every=3, track="wandb", device="cpu", data="/there")
    assert hashed_settings(moved) == hashed_settings(cfg)
    for name in computed_settings(cfg):
        other = {"width": 256, "parametrization": "sp", "init_from": "runs/x", "epochs": 3, "fp8": True}.get(name)
        if other is not None:
            assert hashed_settings(dataclasses.replace(cfg, **{name: other})) != hashed_settings(cfg), name
    assert set(hashed_settings(cfg)) >= FIRST_HASHED


def test_a_setting_that_is_newer_than_a_folder_has_its_default_there():
    saved = {name: value for name, value in vars(make_config("laptop", {})).items() if name != "data_order"}
    assert known_settings(saved)["data_order"] == "record" and known_settings(saved)["width"] == 128
    assert "data_order" not in hashed_settings(make_config("record26", {}))


def flags_of(command, monkeypatch):
    """The flags that a command takes."""
    module, seen = importlib.import_module(f"speedrun_mup.commands.{command.replace('-', '_')}"), []

    def parse(parser, argv):
        seen.extend(flag for action in parser._actions for flag in action.option_strings)
        raise ConfigError("seen")

    monkeypatch.setattr(module, "parse", parse)
    with pytest.raises(ConfigError, match="seen"):
        module.run([])
    return set(seen)


def test_every_command_that_makes_a_model_takes_what_changes_it(monkeypatch):
    techniques = {flag_of(name) for name, meta in settings().items() if meta.group == "techniques"}
    assert "--attention-gate" in techniques
    for command in ("train", "doctor", "bench", "plan", "sweep", "explain", "coord-check"):
        assert techniques <= flags_of(command, monkeypatch), command


def test_commands_take_only_what_they_use(monkeypatch):
    train = flags_of("train", monkeypatch)
    assert {flag_of(name) for name in settings()} <= train  # also those that `--help` does not show
    stored = {flag_of(name) for name, meta in settings().items() if meta.affects in ("storage", "display")}
    stored -= {"--data", "--tokenizer", "--val-every", "--progress"}
    for command in set(COMMANDS) - {"train", "doctor", "data"}:
        taken = flags_of(command, monkeypatch) & stored
        assert taken <= {"--out"} | ({"--name"} if command == "coord-check" else set()), command
    assert flags_of("explain", monkeypatch).isdisjoint({"--seed", "--data", "--momentum", "--orthogonalizer"})
    assert flags_of("coord-check", monkeypatch).isdisjoint({"--width", "--device", "--cooldown", "--compile"})
    assert flags_of("sweep", monkeypatch).isdisjoint({"--width", "--seed", "--val-every"})


TAKES = {"coord-check": ["--widths", "64"], "sweep": ["--widths", "64"]}  # what these cannot do without


@pytest.mark.parametrize("command", ["train", "doctor", "bench", "plan", "explain", "sweep", "coord-check"])
@pytest.mark.parametrize("given", [["--base-width", "32"], ["--mup"], ["--parametrization", "sp"]])
def test_a_base_width_or_a_rule_table_alone_means_the_same_everywhere(command, given, monkeypatch):
    seen = []

    def record(*asked):
        seen.append(make_config(*asked))
        raise ConfigError("seen")

    name = "train" if command in ("doctor", "bench") else command.replace("-", "_")
    monkeypatch.setattr(importlib.import_module(f"speedrun_mup.commands.{name}"), "make_config", record)
    assert main([command, "--preset", "laptop", *TAKES.get(command, ["--width", "256"]), *given]) == 2
    table = "sp" if "sp" in given else "mup"
    assert [(cfg.parametrization, cfg.base_width) for cfg in seen] == [(table, 32 if "32" in given else 64)]


def test_settings_survive_json_with_all_their_names():
    cfg = make_config("laptop", {"epochs": 2})
    assert json.loads(json.dumps(vars(cfg))) == {name: getattr(cfg, name) for name in settings()}


@pytest.fixture
def plug_in(monkeypatch):
    """What a program outside the package adds: a setting and a group of parameters, an entry each."""
    monkeypatch.setattr(config, "_in_force", TrainConfig)
    smoothing = setting("training", "label smoothing", 0.0, affects="result", valid=(FRACTION,))
    add_setting("label_smoothing", float, smoothing)
    add_param_group("bigram", ParamGroup("bigram embedding", lr=0.3))


def test_what_is_added_from_outside_has_flags(plug_in, capsys, monkeypatch):
    line = ["--label-smoothing", "0.1", "--bigram-lr", "0.2", "--bigram-beta1", "0.7"]
    assert vars(parse(train_parser(), line)) == {
        "preset": "auto",
        "label_smoothing": 0.1,
        "bigram_lr": 0.2,
        "bigram_beta1": 0.7,
    }
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    shown = capsys.readouterr().out
    assert "label smoothing (0.0)" in shown and "bigram embedding (0.3)" in shown and "gate, bigram)" in shown
    assert main(["train", "--label-smoothing", "2"]) == 2
    assert capsys.readouterr().err == "error: label_smoothing=2.0 must be in [0, 1]\n"
    for command in ("bench", "plan", "sweep"):
        assert {"--bigram-lr", "--label-smoothing"} <= flags_of(command, monkeypatch), command
    explained = flags_of("explain", monkeypatch)
    assert "--bigram-lr" in explained and "--label-smoothing" not in explained


def test_what_is_added_from_outside_is_kept_and_hashed(plug_in, tiny):
    usual = make_config("laptop", {"base_width": 64})
    assert (
        RunSpec("mup", {"width": usual.width}, 0.0, 0, usual, "f" * 64, 256).id == "029d04de3a168186"
    )  # as without it
    other = dataclasses.replace(usual, bigram_lr=0.2, label_smoothing=0.1)
    assert from_json(to_json(other), Path("x")) == other != usual
    changed = hashed_settings(other).items() - hashed_settings(usual).items()
    assert changed == {("bigram_lr", 0.2), ("label_smoothing", 0.1)}
    assert "bigram_lr" in swept_settings() and "label_smoothing" not in swept_settings()
    assert pickle.loads(pickle.dumps(other)) == other
    first = from_json(to_json(usual).replace('"bigram_lr": 0.3,', ""), Path("x"))
    assert first == usual  # of a run that was saved without it


def test_a_group_of_parameters_has_its_own_hyperparameters(plug_in):
    cfg = make_config("laptop", {"bigram_lr": 0.2, "bigram_beta1": 0.7, "lr_scale": 2.0, "weight_decay": 0.1})
    assert cfg.groups["bigram"]._asdict() == {
        "optimizer": "adam",
        "lr": 0.4,
        "weight_decay": 0.1,
        "eps": 1e-10,
        "betas": (0.7, 0.95),
    }
    assert cfg.groups["scalar"].eps == 1e-3 and cfg.groups["value_embed"] == cfg.groups["embed"]
    assert tuned_values(cfg)["bigram"].lr == 0.4


@pytest.mark.slow
def test_a_resume_compares_what_is_added_from_outside(plug_in, tiny, capsys):
    folder = train(tiny(iterations=2, label_smoothing=0.1)).folder
    assert json.loads((folder / "config.json").read_text())["label_smoothing"] == 0.1
    assert main(["train", "--resume", str(folder)]) == 0
    assert load_run(folder).config.label_smoothing == saved_config(folder).label_smoothing == 0.1
    assert train(tiny(iterations=1, init_from=str(folder), bigram_lr=0.2)).finished
    for flag, was in (("--label-smoothing", "0.1"), ("--bigram-lr", "0.3")):
        assert main(["train", "--resume", str(folder), flag, "0.2"]) == CheckpointError.exit_code
        said = capsys.readouterr().err
        name = flag.removeprefix("--").replace("-", "_")
        assert f"belongs to another run: {name} was {was}, is 0.2; " in said and said.count("\n") == 1


NO_EFFECT = {  # flags -> what is said
    "--gate-lr 5": "gate_lr has no effect without attention_gate; leave it out, or give --attention-gate",
    "--matrix-eps 0.1": "matrix_eps has no effect on muon; leave it out, or choose adam or adamh with --matrix-optimizer",
    "--matrix-beta1 0.3": "matrix_beta1 has no effect on muon; leave it out, or choose adam or adamh with --matrix-optimizer",
    "--matrix-beta2 0.3": (
        "matrix_beta2 has no effect on muon; leave it out, or choose adam or normuon or adamh with --matrix-optimizer"
    ),
    "--matrix-optimizer adam --momentum 0.3": (
        "momentum has no effect on adam; leave it out, or choose muon or normuon or muonh or soap-muon with --matrix-optimizer"
    ),
    "--matrix-optimizer adam --momentum-warmup 3": (
        "momentum_warmup has no effect on adam; leave it out, or choose muon or normuon or muonh or soap-muon "
        "with --matrix-optimizer"
    ),
    "--embed-eps 1e-9 --head-eps 1e-9 --adam-eps 1e-8": (
        "adam_eps has no effect next to embed_eps, head_eps, scalar_eps; leave it out"
    ),
}
HAS_EFFECT = [
    "--gate-lr 5 --attention-gate 12",
    "--matrix-eps 0.1 --matrix-optimizer adam",
    "--matrix-beta2 0.3 --matrix-optimizer normuon",
    "--momentum 0.3",
    "--matrix-optimizer adam --momentum 0.85",  # what the preset says
    "--gate-lr 0.008",  # the default
    "--adam-eps 1e-8 --weight-decay 0.1 --orthogonalizer polar-express",
]


@pytest.mark.parametrize("line", [*NO_EFFECT, *HAS_EFFECT])
def test_a_hyperparameter_that_nothing_reads_is_refused(line):
    overrides = vars(parse(train_parser(), line.split()))
    overrides.pop("preset")
    if line in HAS_EFFECT:
        assert overrides.items() <= vars(make_config("laptop", overrides)).items()
        return
    with pytest.raises(ConfigError) as fault:
        make_config("laptop", overrides)
    assert str(fault.value) == NO_EFFECT[line]


@pytest.mark.slow
def test_a_run_that_was_saved_with_one_is_read_and_resumed(tiny, capsys):
    cfg = dataclasses.replace(tiny(iterations=1), gate_lr=5.0, matrix_eps=0.1)
    folder = train(cfg).folder
    assert saved_config(folder).gate_lr == load_run(folder).config.gate_lr == 5.0
    assert main(["train", "--resume", str(folder), "--gate-lr", "5"]) == 0, capsys.readouterr().err


def test_an_arm_of_a_sweep_may_be_what_reads_it():
    arms = [{"matrix_optimizer": "muon"}, {"matrix_optimizer": "adam"}]
    given = {"matrix_beta1": 0.3, "momentum": 0.3}
    assert make_config("laptop", given, arms).matrix_beta1 == 0.3
    for alone, name in ((arms[:1], "matrix_beta1"), (arms[1:], "momentum")):
        with pytest.raises(ConfigError, match=f"{name} has no effect on"):
            make_config("laptop", given, alone)


def test_a_group_that_is_added_may_need_a_setting_too(monkeypatch):
    monkeypatch.setattr(config, "_in_force", TrainConfig)
    add_param_group("router", ParamGroup("router", lr=0.3, needs="attention_gate"))
    with pytest.raises(ConfigError, match="router_lr has no effect without attention_gate"):
        make_config("laptop", {"router_lr": 0.2})
    assert make_config("laptop", {"router_lr": 0.2, "attention_gate": 12}).router_lr == 0.2


@pytest.mark.parametrize("read", [lambda saved: from_json(json.dumps(saved), Path("x")), config_of, build])
def test_an_unknown_setting_has_one_answer(read):
    with pytest.raises(ConfigError, match="setting dropout is unknown here; import what adds it first"):
        read({**vars(make_config("laptop", {})), "dropout": 0.1})


def test_a_process_without_the_addition_says_so(plug_in, tiny, monkeypatch):
    cfg = tiny(label_smoothing=0.1)
    kept = pickle.dumps(cfg)
    monkeypatch.setattr(config, "_in_force", TrainConfig)
    with pytest.raises(ConfigError, match="setting bigram_beta1 is unknown here; import what adds it first"):
        pickle.loads(kept)
    with pytest.raises(ConfigError, match="setting width cannot be added: its name is taken"):
        add_setting("width", int, setting("model", "x", 1, affects="result"))


@pytest.mark.parametrize("value", [{}, [], None, 1e400, "?"])
def test_a_damaged_value_is_kept_for_the_check_that_refuses_it(value):
    assert known_settings({"attention": value, "micro_batch": value})["attention"] == value


OWN = setting("training", "of our own", 0.5, affects="result")
IMPOSSIBLE = {  # names -> why
    "width": "its name is taken",
    "strict": "its name is taken, by a setting of an earlier edition",
    "pack": "its name is taken, by a setting of an earlier edition",
    "preset": "its name is taken, by a flag of some commands",
    "schedule": "its name is taken, by cfg.schedule",
    "groups": "its name is taken, by cfg.groups",
    "tuned_width": "its name is taken, by cfg.tuned_width",
    "a-b": "its name must be lower-case letters",
    "lambda": "its name must be lower-case letters",
    "": "its name must be lower-case letters",
    "_in": "its name must be lower-case letters",
}


@pytest.mark.parametrize("name", IMPOSSIBLE)
def test_a_name_that_no_setting_can_have_is_refused_when_it_is_added(name):
    before = config._in_force
    with pytest.raises(ConfigError, match=f"^setting {name} cannot be added: {IMPOSSIBLE[name]}"):
        add_setting(name, float, OWN)
    assert config._in_force is before


def test_only_a_declaration_is_added_and_a_group_as_a_whole():
    before = config._in_force
    for wrong in (0.5, None, dataclasses.field(default=1)):
        with pytest.raises(ConfigError, match=r"setting own cannot be added: .* is no declaration; give what setting"):
            add_setting("own", float, wrong)
    with pytest.raises(ConfigError, match="its group 'nowhere' is not one of scaling, model"):
        add_setting("own", float, setting("nowhere", "x", 0.5, affects="result"))
    with pytest.raises(ConfigError, match="setting a-b_lr cannot be added"):
        add_param_group("a-b", ParamGroup("x", lr=0.1))
    assert config._in_force is before


def test_the_flags_of_commands_are_names_that_no_setting_can_have(monkeypatch):
    own = {flag_of(name) for name in [*settings(), *FORMER]}
    own |= {flag for meta in settings().values() for flag in meta.shorthand}
    found = set()
    for parser in parsers(monkeypatch):
        flags = {flag.replace("--no-", "--") for action in parser._actions for flag in action.option_strings}
        found |= flags - own - {"-h"} if "--n-layer" in flags else set()
    assert {flag.strip("-").replace("-", "_") for flag in found} == OF_COMMANDS
