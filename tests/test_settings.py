"""What a declaration of a setting says: which commands take it, what it means for a resume and for the hash of a run."""

import dataclasses
import importlib
import json

import pytest

from speedrun_mup.cli import COMMANDS
from speedrun_mup.config import (
    FIRST_HASHED,
    GROUPS,
    TrainConfig,
    computed_settings,
    hashed_settings,
    known_settings,
    make_config,
    settings,
)
from speedrun_mup.core.errors import ConfigError
from speedrun_mup.settings import flag_of, setting, settings_of
from speedrun_mup.sweep.spec import Cell

FREE_AT_FIRST = {  # on resume, in the first edition
    *("out", "name", "resume", "init_from", "save", "save_every", "keep_last", "keep_every", "track", "progress"),
    *("val_every", "on_nonfinite", "timeout_s", "device", "attention", "compile", "kernel_warmup"),
    *("micro_batches_per_forward",),
    *("data", "tokenizer"),
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
    "17b8a1ba1757f754": make_config(
        "laptop",
        {
            "strict": True,
            "pack": 2,
            "lr_floor": 0.2,
            "micro_batch": "auto",
            "scalar_eps": 1e-4,
            "hidden_optimizer": "adam",
            "on_nonfinite": "skip",
            "val_chunk_tokens": 2048,
            "momentum_start": 0.8,
        },
    ),
}


@pytest.mark.parametrize("id", AT_FIRST)
def test_a_run_keeps_its_hash_over_editions(id):
    cfg = AT_FIRST[id]
    assert Cell("mup", cfg.width, 0.0, 0, cfg, "f" * 64, 256).id == id


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


def test_commands_take_only_what_they_use(monkeypatch):
    train = flags_of("train", monkeypatch)
    assert {flag_of(name) for name in settings()} <= train  # also those that `--help` does not show
    stored = {flag_of(name) for name, meta in settings().items() if meta.group == "run"} - {"--val-every"}
    for command in set(COMMANDS) - {"train", "doctor", "data"}:
        taken = flags_of(command, monkeypatch) & stored
        assert taken <= {"--out"} | ({"--name"} if command == "coord-check" else set()), command
    assert flags_of("explain", monkeypatch).isdisjoint({"--seed", "--data", "--momentum", "--iterations"})
    assert flags_of("coord-check", monkeypatch).isdisjoint({"--width", "--device", "--cooldown", "--compile"})
    assert flags_of("sweep", monkeypatch).isdisjoint({"--width", "--seed", "--val-every"})


def test_settings_survive_json_with_all_their_names():
    cfg = make_config("laptop", {"epochs": 2})
    assert json.loads(json.dumps(vars(cfg))) == {name: getattr(cfg, name) for name in settings()}
