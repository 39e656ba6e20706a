"""The coordinate check of models that are not ours, by name: right ones pass, each wrong one fails."""

import sys

import pytest
import torch
from torch import nn

from speedrun_mup.cli import main
from speedrun_mup.coord_check import CheckVerdict, CoordCheckError, Subject, foreign_coord_check, load_subject
from speedrun_mup.coord_check.foreign import random_walks
from speedrun_mup.coord_check.results import FOREIGN, NARROW, SlopeRow
from speedrun_mup.core import mup
from speedrun_mup.core.mup.anymodel.forward import drop_factors
from tests.helpers.foreign_models import GPT, VOCAB, GPTConfig, Recurrent, loss_of

WIDTHS = (16, 32, 64)


def nano(width, wide_heads=True):
    return GPT(GPTConfig(n_embd=width, n_head=2 if wide_heads else width // 8, n_layer=1))


def adapted(width):
    return mup.adapt(nano(width), 16, build=nano)


def plain_adam(width):
    model = adapted(width)
    return model, torch.optim.AdamW(model.parameters(), lr=3e-3)


def torch_scale(width):
    model = adapted(width)
    for module in model.modules():
        drop_factors(module)
    return model


def loud_readout(width):
    model = adapted(width)
    model.lm_head.output_mult = model.lm_head.width_mult()
    return model


def own_start(width):
    return mup.adapt(nano(width), 16, build=nano, init="keep")


def check(build, **options):
    subject = Subject(build, random_walks(VOCAB), loss_of)
    return foreign_coord_check(subject, WIDTHS, seeds=1, steps=4, progress=False, **options)


@pytest.mark.slow
@pytest.mark.parametrize("build", [adapted, nano, Recurrent])
def test_what_adapt_makes_passes_whoever_calls_it(build):
    result = check(build)
    assert result.verdict is CheckVerdict.PASS, result.summary()


WRONG = {
    plain_adam: "update of h.*.c_attn.weight",
    torch_scale: "activation of h.*.scores.bound",
    loud_readout: "init of wte.weight (readout)",
    own_start: "init of h.*.mlp.c_fc.weight",
}


@pytest.mark.slow
@pytest.mark.parametrize("build", WRONG)
def test_a_model_that_is_wrong_in_one_thing_fails_there(build):
    result = check(build)
    assert result.verdict is CheckVerdict.FAIL
    failed = {f"{row.quantity} of {row.kind}" for row in result.arm.rows if row.verdict is CheckVerdict.FAIL}
    assert WRONG[build] in failed, failed


@pytest.mark.slow
def test_limits_lie_between_right_and_wrong_and_the_summary_states_the_error():
    assert FOREIGN.judge(-0.5) is FOREIGN.judge(0.3) is CheckVerdict.FAIL
    assert FOREIGN.judge(-0.3) is FOREIGN.judge(0.2) is CheckVerdict.PASS
    subject = Subject(adapted, random_walks(VOCAB), loss_of)
    result = foreign_coord_check(subject, WIDTHS, seeds=2, steps=4, progress=False)
    assert result.arm.noise > 0 and 0 <= result.chance_of_another <= 1
    (line,) = (line for line in result.summary().splitlines() if line.startswith("error: "))
    assert line.endswith(f"one moves a slope by {result.arm.noise:.2f}")


MODULE = """
from torch import nn
from tests.helpers.foreign_models import Recurrent, loss_of as loss, tokens

def data():
    return [tokens(8, 8, seed) for seed in range(7)]

def broken(width):
    raise ValueError(f"no width {width}")
"""


@pytest.fixture
def module(tmp_path, monkeypatch):
    (tmp_path / "my_models.py").write_text(MODULE)
    sys.modules.pop("my_models", None)  # of another test
    (tmp_path / "no_data.py").write_text("from tests.helpers.foreign_models import Recurrent")
    monkeypatch.chdir(tmp_path)


@pytest.mark.slow
def test_the_command_has_a_verdict_and_an_exit_code(module, capsys):
    words = ["--widths", "16,32,64", "--seeds", "1", "--steps", "4", "--no-progress"]
    assert main(["coord-check", "my_models:Recurrent", *words]) == 0
    printed = capsys.readouterr().out
    assert "coordinate check of my_models:Recurrent: widths 16, 32, 64" in printed and "verdict: PASS" in printed


@pytest.mark.parametrize(
    "named, says",
    [
        ("nowhere:build", "cannot import nowhere"),
        ("my_models", "my_models has no function ''"),
        ("my_models:model", "my_models has no function 'model', but loss"),
        ("my_models:broken", "cannot build width 32 (ValueError: no width 32)"),
        ("no_data:Recurrent", "needs a function `data`"),
    ],
)
def test_what_cannot_be_checked_is_one_line(module, capsys, named, says):
    assert main(["coord-check", named]) == 2
    said = capsys.readouterr().err.strip()
    assert says in said and "\n" not in said and "Traceback" not in said


def test_an_optimizer_of_the_module_is_taken(module, tmp_path):
    (tmp_path / "with_optimizer.py").write_text(MODULE + "\ndef optimizer(model):\n    return 'taken'\n")
    assert load_subject("with_optimizer:Recurrent").optimizer(nn.Linear(1, 1)) == "taken"
    with pytest.raises(CoordCheckError, match="cannot import"):
        load_subject("with_optimizer.nothing:build")


def through_a_few(width, rank=None):
    """A matrix whose smaller side grows from 2, as the low rank of Mamba's step sizes does."""
    torch.manual_seed(0)

    class LowRank(nn.Module):
        def __init__(self, width):
            super().__init__()
            self.embed, self.down = nn.Embedding(VOCAB, width), nn.Linear(width, rank or width // 8, bias=False)
            self.up, self.head = nn.Linear(rank or width // 8, width, bias=False), nn.Linear(width, VOCAB)

        def forward(self, x):
            return self.head(self.up(self.down(self.embed(x))))

    return LowRank(width)


@pytest.mark.slow
def test_only_matrices_whose_small_side_grows_may_learn_less_in_wider_models():
    rows = {row.kind: row.slack for row in check(through_a_few).arm.rows if row.quantity == "update"}
    assert rows["up.weight"] == rows["down.weight"] == NARROW and not rows["head.weight"] and not rows["embed.weight"]
    fixed = Subject(
        lambda width: mup.adapt(
            through_a_few(width, 4), 16, build=lambda width: through_a_few(width, 4), roles={"down.weight": "hidden"}
        ),
        random_walks(VOCAB),
        loss_of,
    )
    found = foreign_coord_check(fixed, WIDTHS, seeds=1, steps=4, progress=False)
    assert not any(row.slack for row in found.arm.rows)


def test_slack_is_below_the_prediction_only_and_no_more_than_it_says():
    rows = [SlopeRow("update", "w", None, 1, slope, 0.0, None, slack=0.25) for slope in (-0.7, -0.4, -0.1, 0.3)]
    assert [row.deviation for row in rows] == pytest.approx([-0.45, -0.15, 0.0, 0.3])
    assert [FOREIGN.judge(row.deviation).value for row in rows] == ["FAIL", "PASS", "PASS", "FAIL"]
