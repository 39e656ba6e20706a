import dataclasses
import json
import math

import pytest
import torch

from speedrun_mup.cli import main
from speedrun_mup.config import make_config
from speedrun_mup.core.model import GPT
from speedrun_mup.core.utils import World
from speedrun_mup.data.corpus import find_corpus
from speedrun_mup.explain import explain, table
from speedrun_mup.training.build import build_optimizers
from speedrun_mup.training.model_config import model_config


def rows_of(**changes):
    cfg = make_config(
        "record26", {"width": 2048, "base_width": 768, "parametrization": "mup", "head_dim": 128} | changes
    )
    return {row.name: row for row in explain(cfg)}


def test_the_papers_rules_at_width_2048_from_768():
    rows, m = rows_of(), 2048 / 768
    head, qkv, embed = rows["lm_head.weight"], rows["blocks.0.attn.qkv_w"], rows["embed.weight"]
    assert (head.role, head.optimizer) == ("output", "adam")
    assert head.here.forward == pytest.approx(1 / m) and head.here.lr == head.base.lr == 0.22
    assert qkv.here.lr == qkv.base.lr == 0.05 and qkv.here.eps is None
    assert qkv.base.init_std == pytest.approx(0.5 / 768**0.5) and qkv.here.init_std == pytest.approx(0.5 / 2048**0.5)
    assert embed.here.lr == 0.6 and embed.here.eps == pytest.approx(1e-10 / m) and embed.here.init_std == 1
    assert rows["blocks.0.mlp.c_fc.weight"].base.lr == pytest.approx(0.1)  # tall: sqrt(4)
    assert rows["blocks.0.mlp.c_proj.weight"].here.init_std == 0
    assert embed.infshape == ((50304, 50304), (768, 2048))


def test_adam_s_hidden_rule():
    rows = rows_of(matrix_optimizer="adam", weight_decay=0.1)
    c_fc, m = rows["blocks.3.mlp.c_fc.weight"], 2048 / 768
    assert c_fc.here.lr == pytest.approx(0.008 / m) and c_fc.here.weight_decay == pytest.approx(0.1 * m)
    assert c_fc.here.eps == pytest.approx(1e-10 / m)


def test_at_base_width_both_columns_agree():
    for row in rows_of(width=768).values():
        assert row.base == row.here


SCALED = {"n_layer": 8, "base_layers": 4, "base_batch_tokens": 256, "base_tokens": 1024}


@pytest.mark.parametrize(
    ("hidden", "more"), [("muon", {}), ("adam", {}), ("normuon", {}), ("muon", SCALED), ("adam", SCALED)]
)
def test_the_table_is_what_training_does(tiny, hidden, more):
    cfg = tiny(matrix_optimizer=hidden, weight_decay=0.1, **more)
    corpus, _ = find_corpus(cfg.data)
    model = GPT(model_config(cfg, corpus, "blocked", torch.float32), cfg.seed)
    rows = {row.name: row for row in explain(cfg, corpus.vocab_size)}
    told = {name for optimizer in build_optimizers(model, cfg, World()) for name, _, _ in optimizer.named_groups()}
    assert told == set(rows)
    for optimizer in build_optimizers(model, cfg, World()):
        for name, parameter, group in optimizer.named_groups():
            here = rows[name].here
            assert (here.lr, here.eps, here.weight_decay) == (group["lr"], group.get("eps"), group["weight_decay"])
            assert not group.get("betas") or not more or (here.beta1, here.beta2) == group["betas"]
            product = math.prod(factor for _, factor in rows[name].lr_factors)
            assert here.lr == pytest.approx(rows[name].base.lr * product)
            assert rows[name].shape == tuple(parameter.shape)
            if parameter.numel() > 2000:
                assert parameter.std().item() == pytest.approx(here.init_std, rel=0.05)
    assert model.logit_scale == rows["lm_head.weight"].here.forward / (7.5 * 32**0.5)


def test_the_terminal_table_names_every_parameter_once():
    text = table(list(rows_of().values()))
    assert "blocks.{0-6,8-11}.attn.qkv_w" in text and "blocks.{0-11}.mlp.c_fc.weight" in text
    assert "1 -> 0.375" in text  # the head's multiplier
    assert text.count("\n") < 15


def test_which_rule_did_what_is_told_per_parameter_and_per_run(capsys):
    words = ["explain", "--preset", "laptop", "--base-width", "64", "--n-layer", "12", "--base-layers", "6"]
    batch = ["--base-batch-tokens", "512", "--base-tokens", "409600", "--batch-muon-lr-exponent", "0.25"]
    assert main([*words, *batch, "--json"]) == 0
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)}
    factors = {name: dict(row["lr_factors"]) for name, row in rows.items()}
    assert factors["blocks.3.mlp.c_proj.weight"] == {"depth": 0.5, "batch": 4**0.25}
    assert factors["embed.weight"] == {"batch": 2.0} and rows["blocks.skip_weights"]["depth"] == "skip"
    assert rows["embed.weight"]["here"]["beta2"] == 0.95**4 and rows["embed.weight"]["here"]["beta1"] == 0.8
    assert main([*words, *batch]) == 0
    told = capsys.readouterr().out
    assert "depth   completep: 2 times base; from Dey et al." in told and "batch   marin: 4 times base" in told
    assert "spectral LR x 1.414 (m^0.25)" in told and "depth 0.5, batch 1.414" in told and "0.95 -> 0.8145" in told
    assert "tokens  bjorck: 1 times base" in told and "evidence B" in told
    assert main(words[:5]) == 0
    told = capsys.readouterr().out
    assert "times base" not in told and "LR times" not in told and "beta" not in told


@pytest.mark.slow
def test_the_command(capsys):
    assert main(["explain", "--width", "2048", "--base-width", "768"]) == 0
    told = capsys.readouterr().out
    assert (
        "lm_head.weight" in told
        and told.startswith("preset: record26 (train without --preset takes")
        and "note" not in told
    )
    assert main(["explain", "--preset", "laptop", "--base-width", "768"]) == 0
    note = "note: the learning rates of preset laptop were tuned at width 64, not at --base-width 768"
    assert note in capsys.readouterr().out.splitlines()
    assert main(["explain", "--preset", "laptop", "--base-width", "768", "--lr-scale", "0.1"]) == 0
    assert "note" not in capsys.readouterr().out
    assert main(["explain", "--width", "2048", "--base-width", "768", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert rows[0].keys() == {field.name for field in dataclasses.fields(explain(make_config("record26", {}))[0])}
    assert next(row for row in rows if row["name"] == "lm_head.weight")["here"]["forward"] == 0.375
    for words, fault in (
        (["--width", "100"], "width=100"),
        (["--vocab", "-1"], "argument --vocab: it must be at least 1, not -1"),
        (["--track", "wandb"], "unknown argument --track"),
        (["--cooldown", "0.3"], "unknown argument --cooldown"),
    ):
        assert main(["explain", *words]) == 2
        told = capsys.readouterr().err
        assert fault in told and told.count("\n") == 1
