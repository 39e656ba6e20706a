import dataclasses
import json

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
    assert c_fc.here.lr == pytest.approx(0.05 / m) and c_fc.here.weight_decay == pytest.approx(0.1 * m)
    assert c_fc.here.eps == pytest.approx(1e-10 / m)


def test_at_base_width_both_columns_agree():
    for row in rows_of(width=768).values():
        assert row.base == row.here


@pytest.mark.parametrize("hidden", ["muon", "adam", "normuon"])
def test_the_table_is_what_training_does(tiny, hidden):
    cfg = tiny(matrix_optimizer=hidden, weight_decay=0.1)
    corpus, _ = find_corpus(cfg.data)
    model = GPT(model_config(cfg, corpus, "blocked", torch.float32), cfg.seed)
    rows = {row.name: row for row in explain(cfg, corpus.vocab_size)}
    told = {name for optimizer in build_optimizers(model, cfg, World()) for name, _, _ in optimizer.named_groups()}
    assert told == set(rows)
    for optimizer in build_optimizers(model, cfg, World()):
        for name, parameter, group in optimizer.named_groups():
            here = rows[name].here
            assert (here.lr, here.eps, here.weight_decay) == (group["lr"], group.get("eps"), group["weight_decay"])
            assert rows[name].shape == tuple(parameter.shape)
            if parameter.numel() > 2000:
                assert parameter.std().item() == pytest.approx(here.init_std, rel=0.05)
    assert model.logit_scale == rows["lm_head.weight"].here.forward / (7.5 * 32**0.5)


def test_the_terminal_table_names_every_parameter_once():
    text = table(list(rows_of().values()))
    assert "blocks.{0-6,8-11}.attn.qkv_w" in text and "blocks.{0-11}.mlp.c_fc.weight" in text
    assert "1 -> 0.375" in text  # the head's multiplier
    assert text.count("\n") < 15


def test_the_command(capsys):
    assert main(["explain", "--width", "2048", "--base-width", "768"]) == 0
    assert "lm_head.weight" in capsys.readouterr().out
    assert main(["explain", "--width", "2048", "--base-width", "768", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert rows[0].keys() == {field.name for field in dataclasses.fields(explain(make_config("record26", {}))[0])}
    assert next(row for row in rows if row["name"] == "lm_head.weight")["here"]["forward"] == 0.375
    for words, fault in (
        (["--width", "100"], "width=100"),
        (["--vocab", "-1"], "--vocab -1 must be at least 1"),
        (["--track", "wandb"], "unknown argument --track"),
        (["--iterations", "3"], "unknown argument --iterations"),
    ):
        assert main(["explain", *words]) == 2
        told = capsys.readouterr().err
        assert fault in told and told.count("\n") == 1
