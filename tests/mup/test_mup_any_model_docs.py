"""The page for models that know nothing of muP: what it adds to a script is as little as it says, and runs."""

import re
import warnings
from pathlib import Path

import pytest
import torch

from speedrun_mup.core import mup
from tests.helpers.foreign_models import GPT, GPTConfig, Recurrent, loss_of, tokens

DOC = Path(__file__).parents[2] / "docs" / "mup-any-model.md"


def scripts():
    """(lines added, the script before, the script after) of each diff of the page."""
    for diff in re.findall(r"^```diff\n(.*?)^```", DOC.read_text(), flags=re.MULTILINE | re.DOTALL):
        lines = diff.splitlines()
        before, after = ("\n".join(line[1:] for line in lines if line[:1] != sign) for sign in "+-")
        yield sum(line.startswith("+") for line in lines), before, after


def names(tmp_path):
    known = {"GPT": GPT, "GPTConfig": GPTConfig, "Recurrent": Recurrent, "loss_of": loss_of, "tokens": tokens}
    known |= {"batches": [tokens(seed=seed) for seed in range(3)], "torch": torch, "out": str(tmp_path)}
    sizes = {"vocab_size": 32, "num_hidden_layers": 1, "num_key_value_heads": 4}
    return known | {"small": sizes, "rows": [{"input_ids": row, "labels": row} for row in tokens(8)]}


@pytest.mark.slow
@pytest.mark.parametrize("number", range(3))
def test_a_script_gains_three_lines_and_runs_before_and_after(number, tmp_path):
    added, before, after = list(scripts())[number]
    assert added <= 3 and "mup" not in before
    if "transformers" in before:
        pytest.importorskip("transformers")
        pytest.importorskip("accelerate")
    for script in (before, after):
        known = names(tmp_path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            exec(script, known)
    assert {spec.m_in for _, _, spec in mup.named_specs(known["model"])} >= {2.0 if number == 2 else 4.0}
    rates = {group.get("initial_lr", group["lr"]) for group in known["optimizer"].param_groups}  # Trainer's end at 0
    assert len(rates) > 1


def test_the_page_has_every_script():
    assert len(list(scripts())) == 3
