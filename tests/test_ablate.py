"""`ablate`: which arms it trains, what it makes of their runs, and the command from end to end, resumed."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest

from speedrun_mup.ablate.design import ALL, BASE, NUDGE, PLACEBO, design_of, techniques_of, told
from speedrun_mup.ablate.measure import measure, summary, to_json
from speedrun_mup.ablate.statistics import Verdict
from speedrun_mup.cli import main
from speedrun_mup.config import make_config
from speedrun_mup.core.errors import ConfigError
from speedrun_mup.sweep import RunResult
from speedrun_mup.techniques import TECHNIQUES

CFG = make_config("laptop", {"parametrization": "mup", "width": 64})
TWO = {"a": {"attention_gate": 12}, "b": {"hidden_init": "track3"}}


def test_techniques_by_name_optimizer_or_setting():
    found = techniques_of(["attention_gate", "muonh", "cooldown=0.6+final_lr_frac=0.2", "cautious-decay"], CFG)
    assert found["attention_gate"] == {"attention_gate": 12}
    assert found["muonh"] == {"matrix_optimizer": "muonh", "hidden_init": "track3", "matrix_lr": 0.018}
    assert found["cooldown=0.6+final_lr_frac=0.2"] == {"cooldown": 0.6, "final_lr_frac": 0.2}
    assert found["cautious-decay"] == {"cautious_decay": True, "weight_decay": 0.1}
    every = techniques_of(["all"], CFG)
    assert set(every) == {name for name, entry in TECHNIQUES.items() if entry.switched_on(name)}
    for made in every.values():
        dataclasses.replace(CFG, **made)  # raises for what cannot be


@pytest.mark.parametrize(
    "names, said",
    [
        (["mudd2"], "--techniques mudd2 is unknown; choose all, attention_gate, .*soap-muon, or any SETTING=VALUE"),
        (["muonh", "muonh"], "--techniques: muonh is there twice"),
        (["muon"], "--techniques muon: the base has it; leave it out"),
        (["cooldown=x"], "cooldown=x should be float"),
    ],
)
def test_what_cannot_be_ablated_is_said_in_a_line(names, said):
    with pytest.raises(ConfigError, match=said):
        techniques_of(names, CFG)


def test_each_is_added_and_left_out_and_the_placebo_does_next_to_nothing():
    design = design_of(TWO, CFG)
    assert [arm.name for arm in design.arms] == [BASE, "with a", "with b", ALL, "without a", "without b", PLACEBO]
    settings = {arm.name: arm.settings for arm in design.arms}
    assert settings[ALL] == TWO["a"] | TWO["b"] and settings["without a"] == TWO["b"] and settings[BASE] == {}
    assert settings[PLACEBO] == {"lr_scale": NUDGE}
    assert design.comparisons[2] == ("a left out", ALL, "without a")
    assert design.comparisons[-1] == (PLACEBO, PLACEBO, BASE)
    assert len(design_of(TWO, CFG, "add").arms) == 4 and len(design_of(TWO, CFG, "leave").arms) == 5
    assert told(design, TWO)[0] == "technique: a: attention_gate 12"
    with pytest.raises(ConfigError, match="a and b both set cooldown, so no arm has all of them; give --design add"):
        design_of({"a": {"cooldown": 0.1}, "b": {"cooldown": 0.2}}, CFG)
    with pytest.raises(ConfigError, match="--design leave needs two techniques; give more, or --design add"):
        design_of({"a": TWO["a"]}, CFG, "leave")


def made_up(design, gains: dict[str, list[float]], widths=(64, 128), seeds=(0, 1, 2), rates=(-1.0, 0.0, 1.0)):
    """Runs whose losses are known: an arm's gain at each width, its best rate at 0, a seed's share, a little noise."""
    runs = []
    for a, arm in enumerate(design.arms):
        for w, width in enumerate(widths):
            for at in rates:
                for seed in seeds:
                    noise = 1e-4 * math.sin(100 * a + 10 * w + 3 * seed + at)
                    loss = 2.0 - 0.1 * w - gains.get(arm.name, [0.0] * 2)[w] + 0.1 * at**2 + 0.05 * seed + noise
                    curve = [loss + 1.0 - 0.1 * step for step in range(11)]
                    made = {"sizes": {"width": width}, "log2_factor": at, "seed": seed, "loss": loss, "curve": curve}
                    rest = {"train_loss": loss, "diverged": False, "reason": "", "seconds": 1.0, "train_s": 2.0}
                    rest |= {"flops": 1e9, "corpus": "", "vocab_size": 5, "config": {}, "made_with": {}}
                    runs.append(RunResult(id=f"{len(runs):016x}", arm=arm.name, **made, **rest))
    return runs


def test_gains_costs_and_verdicts_of_known_runs():
    design = design_of(TWO, CFG)
    gains = {"with a": [0.1, 0.1], "with b": [-0.1, -0.1], ALL: [0.2, 0.1], "without a": [0.1, 0.1]}
    found = measure(made_up(design, gains), design, (64, 128), (0, 1, 2))
    named = dict(zip([each.name for each in found.findings], zip(found.findings, found.costs)))
    a, costs = named["a added"]
    assert [gain.value for gain in a.gains] == pytest.approx([0.1, 0.1], abs=3e-4)
    assert a.verdict is Verdict.HOLDS and named["b added"][0].verdict is Verdict.HURTS
    assert named["a left out"][0].verdict is Verdict.FADES
    assert named[PLACEBO][0].verdict is Verdict.INCONCLUSIVE and found.placebo_holds
    assert (
        costs[0].steps == costs[0].seconds == costs[0].flops == pytest.approx(11 / 10, rel=1e-3)
    )  # 0.1 nats are a step
    assert math.isnan(named["b added"][1][0].steps)
    assert found.rates[BASE] == (0.0, 0.0) and found.at_edge == ()
    lines = summary(found).splitlines()
    assert any(line.startswith("a added") and line.endswith("HOLDS") for line in lines)
    assert json.loads(json.dumps(to_json(found)))["findings"][0]["widths"][1]["width"] == 128


def test_arms_have_their_own_best_rates_and_edges_are_named():
    design = design_of(TWO, CFG, "add")
    runs = [
        dataclasses.replace(run, diverged=run.arm == "with a" and run.log2_factor == 0) for run in made_up(design, {})
    ]
    found = measure(runs, design, (64, 128), (0, 1, 2))
    assert abs(found.rates["with a"][0]) == 1 and ("with a", 64) in found.at_edge and found.rates[BASE] == (0.0, 0.0)
    with pytest.raises(ConfigError, match="arm with b has no run at width 128; rerun the command to finish"):
        measure([r for r in runs if (r.arm, r.size) != ("with b", 128)], design, (64, 128), (0, 1, 2))


def test_a_placebo_with_a_verdict_is_a_warning():
    design = design_of(TWO, CFG, "add")
    found = measure(made_up(design, {PLACEBO: [0.3, 0.3]}), design, (64, 128), (0, 1, 2))
    assert not found.placebo_holds and "warning: the placebo, which does nothing, has a verdict" in summary(found)


TINY = "--data synthetic --base-width 16 --head-dim 16 --n-layer 2 --block-size 32 --window-tokens 32 --iterations 3"
TINY += " --micro-batch-tokens 64 --micro-batches 2 --val-tokens 64 --val-chunk-tokens 64 --workers 1 --no-progress"


@pytest.mark.slow
def test_the_command_trains_resumes_and_reports(tmp_path, capsys):
    words = ["ablate", "--techniques", "cooldown=0.9", "--design", "add", "--widths", "16", "32", "--seeds", "2"]
    words += ["--octaves", "0", "--out", str(tmp_path / "x"), *TINY.split(), "--device", "cpu"]
    assert main(words) == 0
    told = capsys.readouterr().out
    assert "cooldown=0.9 added" in told and "placebo" in told and "INCONCLUSIVE" in told
    left = json.loads((tmp_path / "x" / "ablation.json").read_text())
    assert [finding["name"] for finding in left["findings"]] == ["cooldown=0.9 added", PLACEBO]
    assert main(words) == 0 and ", 0 of them now" in capsys.readouterr().out


def test_bad_flags_are_refused_in_a_line(capsys):
    for more, said in ((["--seeds", "1"], "--seeds: give two at least"), (["--width", "64"], "did you mean --widths?")):
        assert main(["ablate", "--techniques", "muonh", *more]) == 2
        assert said in capsys.readouterr().err
