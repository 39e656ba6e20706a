"""The sweep: what is run, that nothing is lost or done twice whoever dies, and where the grid goes."""

import csv
import dataclasses
import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from contextlib import closing
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from faults.harness import repeats
from hypothesis import given, settings
from hypothesis import strategies as st

from speedrun_mup import config
from speedrun_mup.cli import main
from speedrun_mup.config import TrainConfig, make_config, swept_settings
from speedrun_mup.config_file import to_json
from speedrun_mup.core.errors import ConfigError
from speedrun_mup.core.model import GPT, GPTConfig
from speedrun_mup.core.model.attention import may_attend
from speedrun_mup.core.mup import PARAMETRIZATIONS, Role
from speedrun_mup.data.corpus import find_corpus
from speedrun_mup.files import write_whole
from speedrun_mup.sweep import (
    ARMS,
    RAY_LISTENS,
    Arm,
    CostModel,
    Failure,
    LocalEngine,
    RayEngine,
    RunResult,
    Sweep,
    measure_sweep,
    pick_arms,
    points_of,
    propose_points,
    read_curves,
    read_definition,
    read_results,
    run_one,
    run_safely,
    run_sweep,
    visible_gpus,
    write_csv,
)
from speedrun_mup.sweep.folder import RESULTS
from speedrun_mup.sweep.result import in_bits_per_byte
from speedrun_mup.training import train
from speedrun_mup.training.flops import flops_per_token, run_flops
from speedrun_mup.training.run_folder import FolderLock
from speedrun_mup.training.schedules import window_blocks
from speedrun_mup.training.tracking import read_metrics
from speedrun_mup.transfer import Axes, TransferError, Verdict, read_points

GRID = (-3.0, -2.0, -1.0, 0.0, 1.0, 2.0, 3.0)


def result_of(cell, loss, seconds=1.0):
    """A finished cell without any training."""
    bad = not math.isfinite(loss)
    curve = np.linspace(4.85, 3.0 if bad else loss, cell.cfg.iterations).round(6).tolist()
    return RunResult(
        *(cell.id, cell.arm, dict(cell.sizes), cell.log2_factor, cell.seed),
        *(
            loss,
            loss + 0.1,
            bad,
            "said so" if bad else "",
            curve,
            seconds,
            seconds,
            cell.flops,
            cell.corpus,
            cell.vocab_size,
        ),
        config={"iterations": cell.cfg.iterations},
        made_with={"source_sha256": "0", "torch": "2", "device": "none"},
    )


class FakeEngine:
    """Yields what `loss_of(cell)` says: a number, or a Failure."""

    def __init__(self, loss_of, workers=1):
        self.loss_of, self.workers, self.ran = loss_of, workers, []

    def run(self, cells, scratch):
        for cell in cells:
            self.ran.append(cell)
            loss = self.loss_of(cell)
            yield cell, loss if isinstance(loss, Failure) else result_of(cell, loss)

    def close(self):
        pass


class InlineEngine:
    """Trains cells one after another in this process."""

    workers = 1

    def run(self, cells, scratch):
        for cell in cells:
            yield cell, run_safely(cell, scratch)

    def close(self):
        pass


def bowl(drift=0.0, noise=0.002, optimum=0.2, cliff=math.inf):
    """cell -> loss: a parabola in octaves whose optimum drifts from width 32 on, per arm if `drift` is a dict."""

    def loss_of(cell):
        slope = drift[cell.arm] if isinstance(drift, dict) else drift
        u = cell.log2_factor - optimum - slope * math.log2(cell.size / 32)
        luck = random.Random(cell.id).gauss(0, noise) + 0.02 * cell.seed
        return 2.5 + 4 * cell.size**-0.5 + 0.03 * u * u + luck if u < cliff else math.nan

    return loss_of


def quietly(sweep, out, engine, **options):
    return run_sweep(sweep, out, engine, progress=False, **options)


@pytest.fixture
def small(tiny):
    """small(**changes): a sweep of tiny runs over two widths."""

    def make(base=None, **changes):
        return Sweep(tiny(**(base or {})), **({"sizes": (32, 64), "log2_factors": (-1, 0, 1), "seeds": (0,)} | changes))

    return make


@pytest.fixture(scope="module")
def corpus(cache_folder):
    return find_corpus("synthetic")[0]


# ---------------------------------------------------------------------------------------------------------------------
# Cells and their cost
# ---------------------------------------------------------------------------------------------------------------------


def cell_of(sweep, corpus, arm="mup", width=64, log2_factor=0.0, seed=0):
    return sweep.run_spec(ARMS[arm], width, log2_factor, seed, corpus)


def test_a_cell_is_its_arm_width_rate_and_seed_and_nothing_else(small, corpus):
    cell = cell_of(small(), corpus, "adam-sp", 32, -1.5, 7)
    plain = cell_of(small(), corpus).cfg
    differ = {key for key in vars(plain) if vars(plain)[key] != vars(cell.cfg)[key]}
    assert differ == {"parametrization", "matrix_optimizer", "matrix_lr", "lr_scale", "seed", "width"}
    assert (cell.cfg.width, cell.cfg.seed, cell.cfg.lr_scale) == (32, 7, 2**-1.5)
    assert not cell.cfg.save and cell.cfg.val_every == 0


def test_the_knob_may_be_one_learning_rate(small, corpus):
    cell = cell_of(small(axes=Axes("width", "matrix_lr")), corpus, "adam-mup", log2_factor=2)
    assert cell.cfg.matrix_lr == 4 * ARMS["adam-mup"].settings["matrix_lr"] and cell.cfg.lr_scale == 1


def test_ids_ignore_where_a_cell_runs_and_see_what_it_computes(small, corpus):
    known = cell_of(small(), corpus).id
    for name, value in {
        "out": "x",
        "device": "auto",
        "micro_batches_per_forward": 1,
        "attention": "dense",
        "val_every": 1,
    }.items():
        assert cell_of(small(base={name: value}), corpus).id == known, name
    others = [
        *(
            cell_of(small(base=change), corpus).id
            for change in ({"iterations": 7}, {"base_width": 64}, {"cooldown": 0.5})
        ),
        *(cell_of(small(), corpus, arm).id for arm in ARMS if arm != "mup"),
        cell_of(small(), corpus, width=32).id,
        cell_of(small(), corpus, log2_factor=0.5).id,
        cell_of(small(), corpus, seed=1).id,
        cell_of(small(), dataclasses.replace(corpus, fingerprint="another")).id,
    ]
    assert len({known, *others}) == 1 + len(others)


def test_record_26_takes_the_flops_that_its_specification_counts():
    """Between 727 MF (matrices alone) and 779 MF (window, no document mask) per token, and 5.0 to 5.4e17 in all."""
    record = TrainConfig()
    assert 727.3e6 < flops_per_token(record, 50257) < 779e6
    assert flops_per_token(record, 50257) == pytest.approx(727.3e6 + 51.7e6, rel=1e-3)
    assert run_flops(record, 50257) == pytest.approx(5.36e17, rel=0.01)


@pytest.mark.parametrize("width", [32, 96])
def test_flops_are_those_of_the_model_and_of_the_mask_rule(tiny, width):
    cfg = tiny(width=width, n_layer=8, micro_batch_tokens=256, window_tokens=160, iterations=9)
    model = GPT(GPTConfig(65, 0, 8, width, 32, 16, 32))
    parameters = model.named_parameters()
    matrices = sum(p.numel() for name, p in parameters if p.ndim > 1 and "embed" not in name and "lambdas" not in name)
    t, doc, keys = torch.arange(256), torch.zeros(256), 0.0
    for step in range(9):
        window = window_blocks(step / 9, 160, 32)
        for layer, block in enumerate(model.blocks):
            if block.attn is not None:
                reach = window if model.cfg.has_long_window(layer) else window // 2
                keys += may_attend(t[:, None], t, doc[:, None], doc, reach, 32).sum().item() / 256 / 9
    assert flops_per_token(cfg, 65) == pytest.approx(6 * matrices + 12 * width * keys, rel=1e-12)


@pytest.mark.parametrize("arm", [arm for arm in ARMS.values() if arm.predicted], ids=lambda arm: arm.name)
def test_predicted_drifts_undo_the_rule_tables_error(arm):
    """Twice the width: hidden matrices learn 2**error times too fast, and the best rate moves by -error octaves."""
    optimizer = arm.settings["matrix_optimizer"]
    wrong, right = (PARAMETRIZATIONS[name] for name in (arm.settings["parametrization"], "mup"))
    error = math.log2(wrong.factors(Role.HIDDEN, 2, 2, optimizer).lr / right.factors(Role.HIDDEN, 2, 2, optimizer).lr)
    assert arm.predicted == pytest.approx(-error)


def test_impossible_sweeps_are_refused_in_one_line(small, tiny, tmp_path):
    for changes, fault in [
        ({"seeds": ()}, "seeds=: name at least one"),
        ({"sizes": (32, 64, 32)}, "widths=32,64,32: .* none twice"),
        ({"axes": Axes("width", "momentum")}, "cannot be swept"),
        ({"axes": Axes("width", "weight_decay")}, "weight_decay=0 stays 0 under any factor; give --weight-decay"),
        ({"axes": Axes("width", "gate_lr")}, "'gate_lr' cannot be swept in arm mup: .* give --attention-gate"),
        ({"seeds": range(101)}, "101 seeds: give at most 100"),
    ]:
        with pytest.raises(ConfigError, match=fault):
            small(**changes)
    base, axes = dataclasses.replace(tiny(), matrix_eps=1e-8), Axes("width", "matrix_eps")
    assert Sweep(base, (32, 64), (ARMS["adam-mup"],), axes=axes)
    with pytest.raises(ConfigError, match="cannot be swept in arm mup: matrix_eps has no effect on muon"):
        Sweep(base, (32, 64), (ARMS["adam-mup"], ARMS["mup"]), axes=axes)
    with pytest.raises(ConfigError, match="base-width"):
        Sweep(dataclasses.replace(tiny(), base_width=None), (32, 64))
    with pytest.raises(ConfigError, match="width=40 is not a multiple"):
        quietly(small(sizes=(40,)), tmp_path / "s", FakeEngine(bowl()))
    with pytest.raises(ConfigError, match="choose from mup, record26"):
        pick_arms(["mup", "mupp"])


# ---------------------------------------------------------------------------------------------------------------------
# The grid
# ---------------------------------------------------------------------------------------------------------------------


def grown(loss_at, grid=GRID):
    """All points that the rule asks for, one round after another, with their losses."""
    losses = {at: loss_at(at) for at in grid}
    for _ in range(30):
        new = propose_points(losses, grid)
        if not new:
            return losses
        losses |= {at: loss_at(at) for at in new}
    raise AssertionError("the grid does not stop growing")


@given(st.floats(-4.7, 4.7), st.floats(0.001, 1.0), st.floats(0, 0.9))
@settings(deadline=None, max_examples=60)
def test_a_bowl_ends_with_half_octaves_on_both_sides_of_its_minimum(optimum, curvature, skew):
    losses = grown(lambda at: 3 + curvature * (at - optimum) ** 2 * (1 + skew * math.tanh(at - optimum)))
    best = min(losses, key=losses.get)
    assert abs(best - optimum) < 0.6
    assert {best - 1, best - 0.5, best + 0.5, best + 1} <= set(losses)
    assert len(losses) <= len(GRID) + 10


def test_the_first_rounds_by_hand():
    grid = (-1.0, 0.0, 1.0)
    assert propose_points({-1: 3.0, 0: 2.0, 1: 2.5}, grid) == {-0.5, 0.5}
    assert propose_points({-1: 1.0, 0: 2.0, 1: 2.5}, grid) == {-2}
    assert propose_points({-1: 3.0, 0: 2.0, 1: 1.5}, grid) == {2}
    assert propose_points({-1: 3.0, 0: 2.0, 1: math.nan}, grid) == {-0.5, 0.5}  # next to the cliff: what is before it
    assert propose_points({-1: math.nan, 0: math.nan, 1: math.nan}, grid) == {-2}
    assert propose_points({at: -at for at in range(-1, 5)}, grid) == set()  # three octaves further is far enough
    assert propose_points({at: at for at in range(-4, 2)}, grid) == set()


def test_without_refinement_the_grid_gets_one_point_on_the_better_side():
    assert propose_points({-1: 3, 0: 2, 1: 1}, (-1, 0, 1), refine=False) == {2}
    assert propose_points({-1: 3, 0: 2, 1: 1, 2: 2}, (-1, 0, 1), refine=False) == set()
    assert propose_points({-1: 3, 0: 1, 1: 2}, (-1, 0, 1), refine=False) == {2}
    assert propose_points({-1: 2, 0: 1, 1: 3}, (-1, 0, 1), refine=False) == {-2}
    assert propose_points({-1: 2, 0: 1, 1: math.nan}, (-1, 0, 1), refine=False) == {0.5}  # next to the cliff
    for at_half in (0.5, 2.0, math.nan):
        assert propose_points({-1: 2, 0: 1, 0.5: at_half, 1: math.nan}, (-1, 0, 1), refine=False) == set()
    assert propose_points({-2: 3, -1: 2, 0: 1, 1: 3}, (-1, 0, 1), refine=False) == set()


def test_no_point_beyond_a_cliff_is_tried():
    losses = grown(lambda at: 3 + (at - 1) ** 2 if at < 1.5 else math.nan)
    assert set(losses) == set(GRID) | {-0.5, 0.5, 1.5} and math.isnan(losses[1.5])


@pytest.mark.slow
def test_rounds_extend_refine_and_stop(small, tmp_path):
    engine = FakeEngine(bowl({"mup": 0.0, "adam-sp": -3.0}))
    sweep = small(arms=pick_arms(["mup", "adam-sp"]), log2_factors=GRID, seeds=(0, 1))
    result = quietly(sweep, tmp_path / "s", engine)
    assert result.complete and result.ran == len(engine.ran) == len(result.results)
    seen = {}
    for cell in result.results:
        seen.setdefault((cell.arm, cell.size), set()).add(cell.log2_factor)
    assert seen["mup", 64] == set(GRID) | {-1.5, -0.5, 0.5, 1.5}
    assert min(seen["adam-sp", 64]) == -4 and -3.5 in seen["adam-sp", 64]
    assert (
        Counter((c.arm, c.size, c.log2_factor) for c in result.results).most_common()[-1][1] == 2
    )  # all seeds everywhere
    fixed = quietly(dataclasses.replace(sweep, adaptive=False), tmp_path / "t", FakeEngine(bowl()))
    assert len(fixed.results) == 2 * 2 * 7 * 2


def test_the_longest_cells_come_first(small, tmp_path):
    engine = FakeEngine(bowl())
    quietly(small(), tmp_path / "s", engine)
    widths = [cell.size for cell in engine.ran][:6]
    assert widths == [64, 64, 64, 32, 32, 32]


# ---------------------------------------------------------------------------------------------------------------------
# Folder, resumption, failures, budgets
# ---------------------------------------------------------------------------------------------------------------------


def test_a_finished_sweep_runs_nothing_again(small, tmp_path):
    first = quietly(small(), tmp_path / "s", FakeEngine(bowl()))
    stamps = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("result.json")}
    again = quietly(small(), tmp_path / "s", FakeEngine(lambda cell: pytest.fail("ran again")))
    assert again.ran == 0 and again.results == first.results
    assert stamps == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("result.json")}


def test_an_interrupted_sweep_does_the_rest(small, tmp_path):
    def stop(cell):
        if len(engine.ran) == 4:
            raise KeyboardInterrupt
        return 3.0

    engine = FakeEngine(stop)
    result = quietly(small(adaptive=False), tmp_path / "s", engine)
    assert result.stopped and (result.ran, result.left) == (3, 3) and "rerun the command" in result.summary()
    rest = FakeEngine(bowl())
    assert quietly(small(adaptive=False), tmp_path / "s", rest).complete
    assert len(rest.ran) == 3


@pytest.mark.slow
def test_more_of_the_same_sweep_may_be_asked_for(small, tmp_path):
    out = tmp_path / "s"
    quietly(small(), out, FakeEngine(bowl()))
    before = {cell.id for cell in read_results(out)}
    more = FakeEngine(bowl())
    quietly(small(sizes=(32, 96), seeds=(0, 1), arms=pick_arms(["mup", "adam-sp"])), out, more)
    assert before and not before & {cell.id for cell in more.ran}
    seeds = Counter((c.arm, c.size, c.log2_factor) for c in read_results(out) if c.size != 64)
    assert set(seeds.values()) == {2}  # where the first call refined, the second seed follows
    assert set(read_definition(out)["arms"]) == {"mup", "adam-sp"} and len(read_definition(out)["asked"]) == 2
    quietly(small(), out, FakeEngine(bowl()))
    assert len(read_definition(out)["asked"]) == 2


@pytest.mark.parametrize(
    "changes, fault",
    [
        ({"base": {"iterations": 7}}, "iterations was 6, is 7"),
        ({"axes": Axes("width", "matrix_lr")}, "hyperparameter was lr_scale, is matrix_lr"),
        ({"arms": (Arm("mup", {"parametrization": "sp"}),)}, "arm mup was another"),
        ({"base": {"data": "embedded"}}, "corpus was"),
    ],
)
def test_another_sweep_in_the_folder_is_refused_in_one_line(small, tmp_path, changes, fault):
    quietly(small(), tmp_path / "s", FakeEngine(bowl()))
    before = (tmp_path / "s" / "sweep.json").read_text()
    with pytest.raises(ConfigError, match=f"holds another sweep: .*{fault}") as refused:
        quietly(small(**changes), tmp_path / "s", FakeEngine(bowl()))
    assert "\n" not in str(refused.value)
    assert (tmp_path / "s" / "sweep.json").read_text() == before


@pytest.mark.slow
def test_a_setting_that_every_arm_fixes_may_be_given_too(small, tmp_path):
    """The same runs, whether --matrix-optimizer says again what --arms says, or not."""
    arms = pick_arms(["normuon-mup", "normuon-sp"])
    sweep = small(base={"base_width": 64}, arms=arms, seeds=(0,), log2_factors=(0.0,))
    again = dataclasses.replace(sweep, base=dataclasses.replace(sweep.base, matrix_optimizer="normuon"))
    quietly(sweep, tmp_path / "s", FakeEngine(bowl()))
    before = (tmp_path / "s" / "sweep.json").read_text()
    engine = FakeEngine(bowl())
    quietly(again, tmp_path / "s", engine)
    assert (tmp_path / "s" / "sweep.json").read_text() == before and not engine.ran
    with pytest.raises(ConfigError, match="matrix_lr was 0.05, is 0.1"):
        quietly(dataclasses.replace(again, base=dataclasses.replace(again.base, matrix_lr=0.1)), tmp_path / "s", engine)


def test_two_sweeps_cannot_share_a_folder(small, tmp_path):
    (tmp_path / "s").mkdir()
    with closing(FolderLock(tmp_path / "s")), pytest.raises(ConfigError, match="in use by process"):
        quietly(small(), tmp_path / "s", FakeEngine(bowl()))


def test_leftovers_of_killed_cells_are_removed(small, tmp_path):
    out = tmp_path / "s"
    quietly(small(), out, FakeEngine(bowl()))
    killed = out / "cells" / read_results(out)[0].id
    (killed / "result.json").rename(killed / ".result.json.part")
    (out / "running" / "abc-1").mkdir(parents=True)
    engine = FakeEngine(lambda cell: math.nan if (out / "running" / "abc-1").exists() else bowl()(cell))
    result = quietly(small(), out, engine)
    assert result.ran == 1 and not any(cell.diverged for cell in result.results)
    assert {path.name for path in out.iterdir()} == {".lock", "sweep.json", "cells"}
    assert all([entry.name for entry in folder.iterdir()] == ["result.json"] for folder in (out / "cells").iterdir())


def test_a_failing_cell_is_tried_three_times_then_listed(small, tmp_path, capsys):
    def loss_of(cell):
        tries[str(cell)] += 1
        if cell.size == 32 and cell.log2_factor == 0:
            return Failure("no luck")
        return Failure("first time") if tries[str(cell)] == 1 and cell.log2_factor == 1 else bowl()(cell)

    tries = Counter()
    result = run_sweep(small(), tmp_path / "s", FakeEngine(loss_of))
    assert result.failed == {"mup width 32 2^0 seed 0": "no luck"} and not result.complete and result.left == 0
    assert tries["mup width 32 2^0 seed 0"] == 3 and tries["mup width 64 2^1 seed 0"] == 2
    assert "failed: mup width 32 2^0 seed 0: no luck" in result.summary()
    assert capsys.readouterr().out.count("no luck") == 1
    assert quietly(small(adaptive=False), tmp_path / "s", FakeEngine(bowl())).complete


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_file_is_there_whole_or_not_at_all(tmp_path, monkeypatch, call):
    path = tmp_path / "folder" / "result.json"
    write_whole(path, "old")

    def die(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, call, die)
    with pytest.raises(KeyboardInterrupt):
        write_whole(path, "new, and longer")
    assert path.read_text() == "old"


def test_a_full_disk_is_told_in_one_line(small, tmp_path, monkeypatch):
    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ConfigError, match=r"cannot be written \(No space left on device\); make room"):
        quietly(small(), tmp_path / "s", FakeEngine(bowl()))
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="choose another --out"):
        quietly(small(), tmp_path / "file", FakeEngine(bowl()))


def test_a_damaged_result_is_named(small, tmp_path):
    quietly(small(), tmp_path / "s", FakeEngine(bowl()))
    path = next((tmp_path / "s").rglob("result.json"))
    for text in (path.read_text()[:40], "[]", json.dumps(json.loads(path.read_text()) | {"schema": 0})):
        path.write_text(text)
        with pytest.raises(ConfigError, match=f"{path}.*delete it"):
            read_results(tmp_path / "s")


@pytest.mark.slow
def test_a_budget_of_flops_is_kept_over_all_calls(small, tmp_path):
    sweep = small(log2_factors=GRID, seeds=(0, 1))
    full = quietly(sweep, tmp_path / "whole", FakeEngine(bowl()))
    whole = full.flops
    assert full.cost(sweep.base, 65) == whole / run_flops(sweep.base, 65) > 10
    for share in (0.3, 0.6):
        result = quietly(sweep, tmp_path / "s", FakeEngine(bowl()), budget_flops=share * whole)
        assert result.left > 0 and not result.complete
        assert 0.9 * share * whole < result.flops <= share * whole and result.used_up
        assert "FLOP budget exhausted" in result.summary() and "rerun the command" not in result.summary()
    assert quietly(sweep, tmp_path / "s", FakeEngine(bowl())).complete


def test_only_what_was_computed_counts_against_a_budget_of_flops(small, tmp_path, corpus):
    """A cell that fails is charged nothing, one that diverges for the steps that it took."""
    sweep, tried = small(log2_factors=(0.0, 1.0), adaptive=False, sizes=(32,), seeds=(0,)), Counter()
    each = cell_of(sweep, corpus, width=32).flops

    class Engine(FakeEngine):
        def run(self, cells, scratch):
            for cell in cells:
                tried[cell.log2_factor] += 1
                if tried[cell.log2_factor] == 1:
                    yield cell, Failure("no luck")
                else:
                    yield cell, dataclasses.replace(result_of(cell, math.nan), flops=0.25 * cell.flops)

    result = quietly(sweep, tmp_path / "s", Engine(None), budget_flops=1.3 * each)
    assert result.complete and result.flops == pytest.approx(0.5 * each) and not result.used_up


def test_a_budget_of_minutes_is_kept_by_what_is_known_of_the_pace(small, tmp_path, monkeypatch):
    """A cell of width 64 takes 100 s and one of width 32 takes 25; nothing may end after 5 minutes."""
    now = [0.0]

    class Clockwork(FakeEngine):
        def run(self, cells, scratch):
            for cell in cells:
                self.ran.append(cell)
                seconds = 25 * (cell.size / 32) ** 2
                now[0] += seconds
                yield cell, result_of(cell, 3.0, seconds)

    monkeypatch.setattr("speedrun_mup.sweep.run.time", SimpleNamespace(monotonic=lambda: now[0]))
    engine = Clockwork(None)
    result = quietly(small(log2_factors=GRID, adaptive=False), tmp_path / "s", engine, budget_minutes=5)
    assert now[0] <= 300 and now[0] > 275 and result.left > 0
    assert engine.ran[0].size == 32  # the first only teaches the pace


def test_the_pace_of_the_nearest_width_counts(small, corpus):
    results = [result_of(cell_of(small(), corpus, width=width), 3.0, seconds=width) for width in (32, 64)]
    narrow, wide = results
    pace = CostModel(dataclasses.replace(result, train_s=result.seconds - 5) for result in results)
    assert pace.known and not CostModel().known and CostModel().seconds(32, 1.0) == 0
    assert pace.seconds(32, narrow.flops) == pytest.approx(32) and pace.seconds(64, wide.flops) == pytest.approx(64)
    assert pace.seconds(128, 4 * wide.flops) == pytest.approx(5 + 4 * 59)
    assert pace.flops_per_s(256) == pytest.approx(wide.flops / 59)
    with pytest.raises(ConfigError, match="no run has finished"):
        CostModel().flops_per_s(1)


# ---------------------------------------------------------------------------------------------------------------------
# What the estimator gets
# ---------------------------------------------------------------------------------------------------------------------


def same(a, b):
    """Runs, with nan equal to nan."""
    return [repr(run) for run in a] == [repr(run) for run in b]


@pytest.mark.slow
def test_the_table_survives_the_round_trip_through_csv(small, tmp_path):
    sweep = small(log2_factors=GRID, seeds=(0, 1), arms=pick_arms(["mup", "muon-over-m"]))
    quietly(sweep, tmp_path / "s", FakeEngine(bowl(cliff=1.7)))
    write_csv(tmp_path / "s", tmp_path / "sweep.csv")
    runs = points_of(read_results(tmp_path / "s"))
    assert same(read_points(tmp_path / "sweep.csv"), runs)
    assert any(math.isnan(run.loss) for run in runs) and {run.arm for run in runs} == {"mup", "muon-over-m"}
    with open(tmp_path / "sweep.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert tuple(rows[0]) == ("arm", "width", "lr", "log2_lr", *RESULTS)
    assert all((row["loss"] == "nan") == bool(int(row["diverged"])) for row in rows)
    assert all(float(row["train_loss"]) == float(row["loss"]) + 0.1 for row in rows if row["loss"] != "nan")


@pytest.mark.slow
def test_the_knob_may_be_no_learning_rate(small, corpus, tmp_path):
    """It is told by its name, in the table too; arms with a wrong learning rate are neither controls nor tested then."""
    base = {"base_width": 64, "weight_decay": 0.1}
    arms = pick_arms(["mup", "adam-sp"])
    sweep = small(
        base=base, sizes=(32, 64, 128), log2_factors=GRID, seeds=(0, 1), arms=arms, axes=Axes("width", "weight_decay")
    )
    assert cell_of(sweep, corpus, log2_factor=2).cfg.weight_decay == pytest.approx(0.4)
    quietly(sweep, tmp_path / "s", FakeEngine(bowl({"mup": 0.0, "adam-sp": 0.5})))
    result = measure_sweep(tmp_path / "s")
    assert result.axes.hyperparameter == "weight_decay_factor" and all(
        arm.predicted is None for arm in result.arms.values()
    )
    assert result.arms["adam-sp"].drift.value == pytest.approx(0.5, abs=0.1) and result.verdict is Verdict.PASS
    write_csv(tmp_path / "s", tmp_path / "table.csv")
    assert same(
        read_points(tmp_path / "table.csv", Axes(hyperparameter="weight_decay_factor")),
        points_of(read_results(tmp_path / "s")),
    )
    with pytest.raises(TransferError, match="no column lr"):
        read_points(tmp_path / "table.csv")


@pytest.mark.slow
def test_a_planted_drift_comes_out_of_the_folder(small, tmp_path):
    arms = pick_arms(["mup", "adam-sp", "record26"])
    sweep = small(base={"base_width": 64}, sizes=(32, 64, 128), log2_factors=GRID, seeds=(0, 1, 2), arms=arms)
    quietly(sweep, tmp_path / "s", FakeEngine(bowl({"mup": 0.0, "adam-sp": -0.9, "record26": 0.5})))
    result = measure_sweep(tmp_path / "s", ["mup", "adam-sp"])
    assert result.verdict is Verdict.PASS, result.summary()
    assert result.arms["adam-sp"].predicted == -1.0
    assert result.arms["adam-sp"].drift.value == pytest.approx(-0.9, abs=0.1)
    assert result.arms["mup"].base_size == 64 and result.arms["mup"].larger is not None
    assert measure_sweep(tmp_path / "s").verdict is Verdict.FAIL  # record26 is under test too, and drifts
    with pytest.raises(ConfigError, match="no arm adam-mup; it has"):
        measure_sweep(tmp_path / "s", ["adam-mup"])


def test_training_curves_of_diverged_runs_end_in_nan(small, tmp_path):
    out = tmp_path / "s"
    quietly(small(), out, FakeEngine(bowl()))
    path = next(out.rglob("result.json"))
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | {"curve": content["curve"][:2], "diverged": True, "loss": None}))
    curves = read_curves(out)
    assert len(curves) == len(read_results(out)) and {curve.shape for curve in curves.values()} == {(6, 2)}
    short = curves[content["arm"], content["sizes"]["width"], 2.0 ** content["log2_factor"], content["seed"]]
    assert short[:, 0].tolist() == [0, 1, 2, 3, 4, 5]
    assert np.isfinite(short[:2, 1]).all() and np.isnan(short[2:, 1]).all()


# ---------------------------------------------------------------------------------------------------------------------
# Whether the runs are what was asked for
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def finished(small, tmp_path):
    """A sweep of three widths and two arms that passes, and its folder."""
    arms = pick_arms(["mup", "adam-sp"])
    sweep = small(base={"base_width": 64}, sizes=(32, 64, 128), log2_factors=GRID, seeds=(0, 1), arms=arms)
    engine = FakeEngine(bowl({"mup": 0.0, "adam-sp": -0.9}))
    quietly(sweep, tmp_path / "s", engine)
    assert measure_sweep(tmp_path / "s").verdict is Verdict.PASS
    return sweep, tmp_path / "s", engine


def drop(out, chosen):
    """Remove the results that `chosen` picks; how many."""
    gone = [result for result in read_results(out) if chosen(result)]
    for result in gone:
        (out / "cells" / result.id / "result.json").unlink()
    return len(gone)


@pytest.mark.slow
@pytest.mark.parametrize("arm", ["mup", "adam-sp"])
def test_missing_runs_are_counted_and_named_and_nothing_passes(finished, arm, capsys):
    sweep, out, engine = finished
    whole = sum(result.arm == arm for result in read_results(out))
    gone = drop(out, lambda result: result.arm == arm and result.seed == 1 and result.log2_factor in (-1.5, 1, 2))
    result = measure_sweep(out)
    assert result.verdict is Verdict.INCONCLUSIVE and result.arms[arm].verdict is Verdict.INCONCLUSIVE
    said = f"arm {arm}: {gone} of the {whole} runs asked for are missing or failed: width 32 2^"
    assert result.reasons[0].startswith(said) and f"and {gone - 3} more" in result.reasons[0], result.reasons[0]
    assert measure_sweep(out, accept=["missing"]).verdict is Verdict.PASS
    assert main(["transfer", str(out)]) == 1 and main(["transfer", str(out), "--accept", "missing"]) == 0
    assert capsys.readouterr().out.count(said.partition(": ")[2]) == 3  # of the arm, of all; then as a note
    quietly(sweep, out, engine)
    assert measure_sweep(out).verdict is Verdict.PASS


@pytest.mark.slow
@pytest.mark.parametrize("gone", [{"mup"}, {"mup", "adam-sp"}])
def test_a_sweep_without_a_run_to_judge_says_how_to_get_one(finished, gone, capsys):
    out = finished[1]
    assert drop(out, lambda result: result.arm in gone)
    for command in ("transfer", "report"):
        assert main([command, str(out)]) == 2
        said = capsys.readouterr().err
        assert "no run of mup is finished; run the sweep's own command again" in said and said.count("\n") == 1


@pytest.mark.slow
def test_points_that_the_grid_still_grows_by_are_said(finished):
    """Nobody asked for them; but of those that were begun, all seeds are wanted."""
    _, out, _ = finished
    assert measure_sweep(out).notes == ()
    drop(
        out,
        lambda result: (
            result.arm == "mup" and result.log2_factor % 1 and (result.size, result.log2_factor) != (32, 0.5)
        ),
    )
    result = measure_sweep(out)
    assert not result.doubts and result.notes == ("the grid still grows by 11 points: run the same sweep again",)
    drop(out, lambda result: (result.arm, result.size, result.log2_factor, result.seed) == ("mup", 32, 0.5, 1))
    assert "mup: 1 of the " in measure_sweep(out).reasons[0]


@pytest.mark.slow
def test_points_that_a_grid_grew_by_and_that_failed_for_all_seeds_are_missing(small, tmp_path):
    """They are in no request and have no curve, so the folder has to remember them; until they are run."""

    def loss_of(cell):
        return Failure("no luck") if cell.size == 64 and cell.log2_factor == 0.5 else bowl()(cell)

    sweep, out = small(base={"base_width": 32}, sizes=(32, 64, 128), log2_factors=GRID, seeds=(0, 1)), tmp_path / "s"
    assert len(quietly(sweep, out, FakeEngine(loss_of)).failed) == 2
    result = measure_sweep(out)
    assert (
        result.verdict is Verdict.INCONCLUSIVE and "width 64 2^0.5 seed 0, width 64 2^0.5 seed 1" in result.reasons[0]
    )
    quietly(sweep, out, FakeEngine(loss_of))
    assert len(read_definition(out)["failed"]) == 2
    assert quietly(sweep, out, FakeEngine(bowl())).complete
    assert not measure_sweep(out).doubts and measure_sweep(out).verdict is Verdict.PASS


@pytest.mark.slow
def test_a_folder_that_knows_the_corpus_by_its_former_fingerprint_goes_on(small, tmp_path, monkeypatch):
    """Its runs keep their ids, so that nothing is there twice; data that are not the same are refused as before."""

    def found(fingerprint, former):
        real = find_corpus("synthetic", "byte")[0]
        known = dataclasses.replace(real, fingerprint=fingerprint, former_fingerprint=former)
        for place in ("spec", "one_run"):
            monkeypatch.setattr(f"speedrun_mup.sweep.{place}.find_corpus", lambda *_: (known, ""))

    found("former", "")
    quietly(small(), tmp_path / "s", FakeEngine(bowl()))
    before = {result.id for result in read_results(tmp_path / "s")}
    found("new", "former")
    never = FakeEngine(lambda cell: pytest.fail("ran again"))
    assert quietly(small(), tmp_path / "s", never).ran == 0
    more = FakeEngine(bowl())
    quietly(small(seeds=(0, 1)), tmp_path / "s", more)
    assert {cell.corpus for cell in more.ran} == {"former"} and before < {r.id for r in read_results(tmp_path / "s")}
    assert not isinstance(run_safely(more.ran[0], tmp_path), Failure)
    found("new", "another")
    with pytest.raises(ConfigError, match="corpus was former, is new"):
        quietly(small(), tmp_path / "s", never)


@pytest.mark.slow
def test_more_seeds_at_one_width_leave_nothing_missing(small, tmp_path):
    """Several requests in one folder, as a plan makes them."""
    out, engine = tmp_path / "s", FakeEngine(bowl())
    for widths, seeds in (((32,), (0, 1, 2)), ((64, 128), (0, 1)), ((128,), (5,))):
        quietly(small(base={"base_width": 32}, sizes=widths, log2_factors=GRID, seeds=seeds), out, engine)
    result = measure_sweep(out)
    assert not result.doubts and result.verdict is Verdict.PASS, result.summary()


@pytest.mark.slow
@pytest.mark.parametrize("what", ["source_sha256", "torch", "device", "dtype"])
def test_runs_that_were_made_differently_are_named_and_nothing_passes(finished, what, tmp_path, capsys):
    _, out, _ = finished
    for path in out.glob("cells/*/result.json"):
        content = json.loads(path.read_text())
        other = {what: "new\x1b[2J"} if content["sizes"]["width"] == 128 else {what: "old"}
        path.write_text(json.dumps(content | {"made_with": content["made_with"] | other}))
    result = measure_sweep(out)
    said = f"2 different {what} made these runs: old ("
    assert result.verdict is Verdict.INCONCLUSIVE and result.reasons[0].startswith(said)
    assert "at width 32, 64); new\\x1b[2J (" in result.reasons[0] and f"--accept {what}" in result.reasons[0]
    assert measure_sweep(out, accept=[what]).verdict is Verdict.PASS
    write_csv(out, tmp_path / "runs.csv")  # the table says it too
    controls = ["--controls", "adam-sp=-1"]
    assert main(["transfer", str(tmp_path / "runs.csv"), *controls]) == 1 and said in capsys.readouterr().out


def test_a_sweep_that_goes_on_under_other_code_says_so(small, tmp_path, monkeypatch, capsys):
    quietly(small(), tmp_path / "s", FakeEngine(bowl()))
    monkeypatch.setattr("speedrun_mup.sweep.spec.source_sha256", lambda: "0")
    run_sweep(small(), tmp_path / "s", FakeEngine(bowl()))
    assert "made by other code" not in capsys.readouterr().out
    monkeypatch.setattr("speedrun_mup.sweep.spec.source_sha256", lambda: "f" * 64)
    run_sweep(small(), tmp_path / "s", FakeEngine(bowl()))
    assert "10 runs here were made by other code, 0 (10); this is fffffffff...: the verdict" in capsys.readouterr().out


def test_what_seeds_draw_is_said(small, tmp_path, capsys):
    run_sweep(small(base={"data_order": "record"}), tmp_path / "record", FakeEngine(bowl()))
    assert "seeds draw the initialisation; the data keep the record's order" in capsys.readouterr().out
    run_sweep(small(base={"data_order": "shuffled"}), tmp_path / "shuffled", FakeEngine(bowl()))
    assert "seeds draw the initialisation and the order of the data" in capsys.readouterr().out


@pytest.mark.parametrize(("preset", "known"), [("record26", "80dcb3c15a6e3252"), ("laptop", "f3eb0a26b39b18bc")])
def test_an_id_is_what_it_was_when_the_first_results_were_made(preset, known):
    """A setting that came later has no part in an id where it says what those runs did; else old folders are lost."""
    cfg = make_config(preset, {"base_width": 64, "data": "embedded", "data_order": "record"})
    if preset == "laptop":
        cfg = dataclasses.replace(cfg, width=128)
    corpus = SimpleNamespace(data="x", fingerprint="f", vocab_size=257)
    assert Sweep(cfg, (64, 128), pick_arms(["adam-sp"])).run_spec(ARMS["adam-sp"], 128, -1.5, 2, corpus).id == known


def test_a_folder_from_before_a_setting_goes_on(small, tmp_path):
    quietly(small(base={"data_order": "record"}), tmp_path / "s", FakeEngine(bowl()))
    path = tmp_path / "s" / "sweep.json"
    content = json.loads(path.read_text())
    assert content["base"].pop("data_order") == "record"
    path.write_text(json.dumps(content))
    never = FakeEngine(lambda cell: pytest.fail("ran again"))
    assert quietly(small(base={"data_order": "record"}), tmp_path / "s", never).ran == 0
    with pytest.raises(ConfigError, match="data_order was record, is shuffled"):
        quietly(small(base={"data_order": "shuffled"}), tmp_path / "s", never)


# ---------------------------------------------------------------------------------------------------------------------
# Flags
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (
            "--parametrization sp --matrix-optimizer adam",
            "arm mup fixes parametrization at mup; leave .* --arms adam-sp",
        ),
        ("--parametrization sp", "or choose among --arms adam-sp"),
        ("--mup --arms mup,adam-sp", "arm adam-sp fixes parametrization at sp; leave --parametrization out"),
        ("--matrix-optimizer adam", "arm mup fixes matrix_optimizer at muon; .* --arms adam-mup adam-sp"),
        ("--parametrization head-sqrt", "leave --parametrization out, or choose among --arms head-sqrt\n"),
        (
            "--matrix-optimizer normuon --arms mup adam-sp",
            "arm mup fixes matrix_optimizer at muon; leave .*, or choose among --arms normuon-mup normuon-sp\n",
        ),
        ("--matrix-optimizer normuon --matrix-lr 0.1 --arms adam-sp", "or choose among --arms normuon-sp\n"),
        ("--arms muon-mup", "arm 'muon-mup' is called mup here: an arm without an optimizer in its name has Muon"),
        (
            "--matrix-lr 0.02 --arms mup adam-mup",
            "arm adam-mup fixes matrix_lr at 0.008; .* --hyperparameter matrix_lr, or choose .* mup",
        ),
        ("--hyperparameter gate_lr", "gate_lr has no effect without attention_gate; .* give --attention-gate"),
        (
            "--matrix-eps 0.1",
            "matrix_eps has no effect on muon; leave it out, or choose adam or adamh with --matrix-optimizer",
        ),
        ("--arms adam-mup --momentum 0.3", "momentum has no effect on adam"),
        ("--width 64", "--widths"),
        ("--seed 1", "--seeds"),
        ("--keep-every 5", "has no effect here"),
        ("--init-from x", "unknown argument --init-from"),
        ("--seeds 0", "--seeds 0 is no run; give how many, 1 or more, or the seeds themselves"),
        ("--seeds 9007199254740991", "seeds: give at most 100"),
        ("--seeds 1,1", "none twice"),
        ("--octaves=-1,0,1e99", "error: --octaves=1e\\+99 must be from"),
        ("--workers 1000000000", "must be at most 1024"),
        ("--widths 6400000000000000000000", "too large"),
    ],
)
def test_flags_that_a_sweep_cannot_follow_are_one_line(flags, told, tmp_path, capsys, cache_folder):
    common = ["--widths", "32", "64", "--data", "synthetic", "--out", str(tmp_path / "s")]
    assert main(["sweep", *common, *flags.split()]) == 2
    said = capsys.readouterr().err
    assert re.search(told, said) and said.count("\n") == 1 and said.startswith("error: "), said
    assert not (tmp_path / "s").exists()


def test_help_lists_every_hyperparameter_that_a_sweep_takes(capsys):
    with pytest.raises(SystemExit):
        main(["sweep", "--help"])
    _, _, told = " ".join(capsys.readouterr().out.split()).partition("--hyperparameter NAME one of ")
    assert told.partition("; ")[0].split(", ") == swept_settings()


def test_flags_that_agree_with_the_arms_are_followed(tmp_path, monkeypatch, cache_folder):
    """And one number of seeds counts them, several name them."""
    asked = []
    monkeypatch.setattr("speedrun_mup.sweep.run_sweep", lambda sweep, *rest, **options: asked.append(sweep) or 1 / 0)
    common = ["sweep", "--widths", "32,64", "--octaves", "-1,0,1", "--data", "synthetic", "--out", str(tmp_path / "s")]
    for more in (["--mup", "--matrix-lr", "0.1"], ["--seeds", "2"], ["--seeds", "3,7"]):
        with pytest.raises(ZeroDivisionError):
            main([*common, *more])
    assert asked[0].base.matrix_lr == 0.1 and asked[0].sizes == (32, 64) and asked[0].log2_factors == (-1, 0, 1)
    assert [sweep.seeds for sweep in asked] == [(0, 1, 2), (0, 1), (3, 7)]


# ---------------------------------------------------------------------------------------------------------------------
# Folders from somebody else
# ---------------------------------------------------------------------------------------------------------------------


def test_a_strange_result_is_one_line(small, tmp_path):
    out = tmp_path / "s"
    quietly(small(), out, FakeEngine(bowl()))
    path = sorted(out.glob("cells/*/result.json"))[0]
    content = json.loads(path.read_text())
    strange = [
        {"sizes": {"width": "64"}},
        {"sizes": {"width": -1}},
        {"sizes": {"width": 10**40}},
        {"sizes": {}},
        {"sizes": 64},
        {"vocab_size": "257"},
        {"log2_factor": 1e9},
        {"log2_factor": None},
        {"seed": 1.5},
        {"seconds": "x"},
        {"diverged": "no"},
        {"made_with": {"torch": 2}},
        {"made_with": None},
        {"config": {"iterations": 10**18}},
        {"curve": [1.0] * 99},
        {"curve": [[]]},
        {"arm": "a\nb"},
        {"id": "another"},
    ]
    texts = [json.dumps(content | change) for change in strange] + ["[" * 10**5, "\x00", "null", '{"schema": 1}']
    for text in texts:
        path.write_text(text)
        with pytest.raises(ConfigError, match=f"^{path} is .*; delete it[^\n]*$"):
            measure_sweep(out)
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(ConfigError, match="it is a FIFO, not a regular file"):
        read_results(out)
    with pytest.raises(ConfigError, match="it is a FIFO, not a regular file"):
        quietly(small(), out, FakeEngine(bowl()))


def test_a_strange_definition_is_one_line(small, tmp_path):
    out = tmp_path / "s"
    quietly(small(), out, FakeEngine(bowl()))
    path = out / "sweep.json"
    good = json.loads(path.read_text())
    strange = [
        good | {"base": good["base"] | {"hyperparameter": "nonsense"}},
        good | {"base": good["base"] | {"base_width": "64"}},
        good | {"arms": {"a\x1b[2J": good["arms"]["mup"]}},
        good | {"arms": {"mup": {"settings": {}, "predicted": "x"}}},
        good
        | {
            "asked": [{"sizes": list(range(1000)), "seeds": list(range(1000)), "log2_factors": [0, 1], "arms": ["mup"]}]
        },
        good | {"asked": [{"sizes": 3}]},
        good | {"asked": 1},
        [],
    ]
    for content in [*map(json.dumps, strange), "[" * 10**5]:
        path.write_text(content)
        with pytest.raises(ConfigError, match="sweep.json is missing or damaged; give the folder of a sweep"):
            measure_sweep(out)


@pytest.mark.parametrize("linked", ["cells", "running", "one cell", "result.json", "sweep.json", ".lock"])
def test_links_in_a_received_folder_are_not_followed(small, tmp_path, linked, corpus):
    """What they point to, a file or a folder of ours, stays as it is."""
    out, ours = tmp_path / "s", tmp_path / "ours"
    quietly(small(log2_factors=(0, 1)), out, FakeEngine(bowl()))
    ours.mkdir()
    (ours / "result.json").write_text("precious")
    (ours / "file").write_text("precious")
    cell = out / "cells" / read_results(out)[0].id
    target = {"one cell": cell, "result.json": cell / "result.json"}.get(linked, out / linked)
    text = target.read_text() if target.is_file() else ""
    shutil.rmtree(target) if target.is_dir() else target.unlink(missing_ok=True)
    if linked == "one cell":
        (ours / "result.json").unlink()
    if linked == "sweep.json":
        (ours / "file").write_text(text)
    before = {path: path.read_bytes() for path in ours.rglob("*")}
    target.symlink_to(ours if linked in ("cells", "running", "one cell") else ours / "file")
    try:
        quietly(small(log2_factors=(0, 1, 2)), out, FakeEngine(bowl()))
    except ConfigError as fault:
        assert "\n" not in str(fault)
    assert {path: path.read_bytes() for path in ours.rglob("*")} == before


def test_the_table_is_replaced_whole(small, tmp_path, monkeypatch):
    quietly(small(), tmp_path / "s", FakeEngine(bowl()))
    path = tmp_path / "s" / "runs.csv"
    write_csv(tmp_path / "s", path)
    before = path.read_text()

    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ConfigError, match="runs.csv cannot be written"):
        write_csv(tmp_path / "s", path)
    assert path.read_text() == before and before.count("\n") == 1 + len(read_results(tmp_path / "s"))
    assert [entry.name for entry in path.parent.iterdir() if entry.name.endswith(".tmp")] == []


def test_cells_of_different_code_are_told_apart(small, tmp_path):
    result = quietly(small(), tmp_path / "s", FakeEngine(bowl()))
    assert "warning" not in result.summary()
    other = dataclasses.replace(result.results[0], made_with={"source_sha256": "1", "torch": "2", "device": "none"})
    mixed = dataclasses.replace(result, results=(other, *result.results[1:]))
    assert "2 different source_sha256" in mixed.summary() and "different torch" not in mixed.summary()


# ---------------------------------------------------------------------------------------------------------------------
# Real training
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_cell_is_a_training_run(small, corpus, tiny, tmp_path):
    cell = cell_of(small(), corpus, log2_factor=1)
    result = run_one(cell, tmp_path / "scratch")
    plain = train(tiny(lr_scale=2.0))
    assert (
        result.loss == plain.val_loss and len(result.curve) == 6 and result.curve[-1] == pytest.approx(plain.train_loss)
    )
    assert result.train_loss == result.curve[-1]  # the last tenth of 6 steps is the last
    assert not result.diverged and result.flops == cell.flops and result.seconds > result.train_s > 0
    assert not list((tmp_path / "scratch").iterdir())
    assert RunResult.from_json(result.to_json(), tmp_path).loss == result.loss


@pytest.mark.slow
def test_bits_per_byte_are_kept_where_the_tokenizer_tells_them(small, corpus, tiny, tmp_path):
    """And what a loss comes to is read off such runs; a result of an earlier edition has none."""
    settings = {"data": "embedded", "iterations": 2}
    text = run_one(cell_of(small(base=settings), find_corpus("embedded")[0], width=32), tmp_path)
    plain = read_metrics(train(tiny(width=32, val_every=0, **settings)).folder)
    none = result_of(cell_of(small(), corpus), 3.0)
    assert none.bits_per_byte is None and text.bits_per_byte == plain[-1]["bits_per_byte"]
    assert RunResult.from_json(text.to_json(), tmp_path).bits_per_byte == text.bits_per_byte
    old = {name: value for name, value in json.loads(text.to_json()).items() if name != "bits_per_byte"}
    assert RunResult.from_json(json.dumps(old), tmp_path).bits_per_byte is None
    assert in_bits_per_byte(2 * text.loss, [none, text]) == pytest.approx(2 * text.bits_per_byte)
    assert in_bits_per_byte(2.0, [none]) is None and in_bits_per_byte(2.0, []) is None
    wrong = json.loads(text.to_json()) | {"bits_per_byte": -1.0}
    with pytest.raises(ConfigError, match="impossible: costs"):
        RunResult.from_json(json.dumps(wrong), tmp_path)


@pytest.mark.slow
def test_a_skipped_step_leaves_a_gap_in_the_curve_and_moves_nothing(small, corpus, tmp_path, monkeypatch):
    cell = cell_of(small(), corpus, width=32)
    whole = run_one(cell, tmp_path)
    for skipped in (0, 2):
        kept = lambda folder, skipped=skipped: [row for row in read_metrics(folder) if row["step"] != skipped]  # noqa: E731
        monkeypatch.setattr("speedrun_mup.sweep.one_run.read_metrics", kept)
        result = run_one(cell, tmp_path)
        assert math.isnan(result.curve[skipped]) and not result.diverged
        assert [loss for loss in result.curve if loss == loss] == whole.curve[:skipped] + whole.curve[skipped + 1 :]
        assert (result.train_loss, result.flops) == (whole.train_loss, whole.flops)


@pytest.mark.slow
def test_divergence_is_a_result(small, tmp_path):
    result = quietly(small(sizes=(32,), log2_factors=(0, 20), adaptive=False), tmp_path / "s", InlineEngine())
    assert result.complete
    fine, lost = result.results
    assert not fine.diverged and lost.diverged and ("not finite" in lost.reason or "ended at" in lost.reason)
    assert math.isnan(points_of(read_results(tmp_path / "s"))[1].loss)


@pytest.mark.slow
@pytest.mark.parametrize("end", [9.0, math.nan])
def test_ending_above_the_initial_loss_is_divergence(small, corpus, tmp_path, monkeypatch, end):
    monkeypatch.setattr("speedrun_mup.sweep.one_run.train", lambda cfg: dataclasses.replace(train(cfg), val_loss=end))
    result = run_one(cell_of(small(), corpus, width=32), tmp_path)
    assert result.diverged and result.reason == f"ended at a loss of {end:.4f}, began at 4.8520"


@pytest.mark.parametrize("octaves", [2000.0, -33.0, math.nan, math.inf])
def test_a_grid_stays_within_numbers(small, octaves):
    with pytest.raises(ConfigError, match="^--octaves=.* must be from -32 to 32: the log2 of a factor on lr_scale$"):
        small(log2_factors=(0.0, octaves))


def test_a_cell_refuses_other_data(small, corpus, tmp_path):
    outcome = run_safely(cell_of(small(), dataclasses.replace(corpus, fingerprint="another")), tmp_path)
    assert isinstance(outcome, Failure) and "not the corpus" in outcome.why


@pytest.mark.slow
def test_an_exception_is_a_failure_in_one_line(small, corpus, tmp_path, monkeypatch):
    monkeypatch.setattr("speedrun_mup.sweep.one_run.train", lambda cfg: [][1])
    assert run_safely(cell_of(small(), corpus), tmp_path) == Failure("IndexError: list index out of range")


def once(results):
    """Whether every cell is there once, and how many there are."""
    places = [(cell.arm, cell.size, cell.log2_factor, cell.seed) for cell in results]
    assert len(set(places)) == len(places)
    return len(places)


def fork_sweep(sweep, out, patience):
    """Sweep in a forked child and SIGKILL it after `patience` seconds; True if it came to its end first."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            code = 0 if quietly(sweep, out, InlineEngine()).complete else 2
        finally:
            os._exit(code)
    deadline = time.monotonic() + patience
    while time.monotonic() < deadline:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            assert os.waitstatus_to_exitcode(status) == 0
            return True
        time.sleep(0.005)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return False


@pytest.mark.slow
@pytest.mark.usefixtures("warm")
def test_a_sweep_killed_at_random_moments_completes_with_every_cell_once(small, corpus, tmp_path):
    sweep, rng, kills, sweeps = small(log2_factors=(0, 1), adaptive=False), random.Random(0), 0, 0
    began = time.monotonic()
    run_one(cell_of(sweep, corpus, width=32), tmp_path / "scratch")
    one = time.monotonic() - began
    while kills < 5:
        out, sweeps, stamps = tmp_path / str(sweeps), sweeps + 1, {}
        while not fork_sweep(sweep, out, one * rng.uniform(0.1, 1.2) if kills < 5 else 600):
            kills += 1
            now = {path: path.stat().st_mtime_ns for path in out.glob("cells/*/result.json")}
            assert stamps.items() <= now.items()  # nothing lost, nothing done twice
            stamps = now
        assert once(read_results(out)) == 4
        assert {path.name for path in out.iterdir()} == {".lock", "sweep.json", "cells"}
        assert sweeps < 10


# ---------------------------------------------------------------------------------------------------------------------
# Engines
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def engine():
    with closing(LocalEngine(2, device="cpu")) as local:
        yield local


def running(out, cells):
    """Process ids of workers that are in the middle of a cell; waits until there are so many."""
    while True:
        found = [int(path.parent.name.rpartition("-")[2]) for path in out.glob("running/*-*/metrics.jsonl")]
        if len(found) >= cells:
            return found
        time.sleep(0.01)


def meanwhile(work):
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    return thread


@pytest.mark.dist
def test_a_worker_killed_in_the_middle_of_a_cell_costs_nothing(small, engine, tmp_path):
    victims = []

    def kill():
        victims.extend(running(tmp_path / "s", 1)[:1])
        os.kill(victims[0], signal.SIGKILL)

    sweep = small(base={"iterations": 12}, log2_factors=(0, 1), adaptive=False)
    killer = meanwhile(kill)
    result = quietly(sweep, tmp_path / "s", engine)
    killer.join()
    assert result.complete and once(result.results) == 4 and victims[0] != os.getpid()
    assert not (tmp_path / "s" / "running").exists()


@pytest.mark.dist
def test_a_setting_that_a_worker_does_not_know_is_one_line(small, corpus, tmp_path, monkeypatch, capfd):
    """As when a script adds it under `if __name__ == "__main__"`, which its workers do not run."""
    monkeypatch.setattr(config, "_in_force", TrainConfig)
    config.add_setting("smoothing", float, config.setting("training", "smoothing", 0.0, affects="result"))
    specs = [cell_of(small(), corpus, seed=seed) for seed in (0, 1)]
    with closing(LocalEngine(1, device="cpu")) as local:
        for _, failure in local.run(iter(specs), tmp_path):
            assert "setting smoothing is unknown here" in failure.why and "\n" not in failure.why
            assert "register it when the module is imported" in failure.why
            assert local._pool[0].process.is_alive()  # it is kept for the next run
    assert "Traceback" not in capfd.readouterr().err


@pytest.mark.dist
def test_a_signal_stops_the_sweep_and_the_same_command_goes_on(small, engine, tmp_path, capsys):
    before = signal.getsignal(signal.SIGTERM)
    sweep = small(base={"iterations": 24}, log2_factors=(0, 1), adaptive=False)
    meanwhile(lambda: running(tmp_path / "s", 1) and os.kill(os.getpid(), signal.SIGTERM))
    result = run_sweep(sweep, tmp_path / "s", engine)
    assert result.stopped and result.left == 4 - result.ran > 0
    assert "stopped by SIGTERM; " in capsys.readouterr().out
    assert signal.getsignal(signal.SIGTERM) is before and not (tmp_path / "s" / "running").exists()
    assert quietly(sweep, tmp_path / "s", engine).complete


def test_gpus_are_counted_from_what_is_visible(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert visible_gpus("auto") == ["0", "1"] and visible_gpus("cpu") == []
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,GPU-7")
    assert visible_gpus("cuda") == ["3", "GPU-7"]
    engine = LocalEngine(4)
    assert [worker.environment["CUDA_VISIBLE_DEVICES"] for worker in engine._pool] == ["3", "GPU-7", "3", "GPU-7"]
    assert LocalEngine().workers == 2
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr("speedrun_mup.sweep.engines.pick_device", lambda device: torch.device("mps"))
    assert LocalEngine().workers == 1  # a Mac has one GPU


COMMAND = """
from contextlib import closing
from pathlib import Path
from speedrun_mup.config_file import from_json
from speedrun_mup.sweep import LocalEngine, Sweep, run_sweep

sweep = Sweep(from_json({config!r}, Path("config")), (32, 64), log2_factors=(-1, 0, 1), seeds=range(4), adaptive=False)
with closing(LocalEngine(2)) as engine:
    raise SystemExit(0 if run_sweep(sweep, Path({out!r}), engine).complete else 1)
"""


def alive(process):
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return "State:\tZ" not in Path(f"/proc/{process}/status").read_text()


@pytest.mark.slow
@pytest.mark.dist
def test_kills_of_driver_or_whole_group_lose_nothing(tiny, tmp_path):
    """In every life some cell is under way when the kill comes, and none to two have finished since the last one."""
    out, rng, kills, stamps, most = tmp_path / "s", random.Random(1), 0, {}, repeats(6)
    command = COMMAND.format(config=to_json(tiny()), out=str(out))

    def finished():  # looks into no folder that may vanish
        return {path: path.stat().st_mtime_ns for path in out.glob("cells/*/result.json")}

    while True:
        life = subprocess.Popen([sys.executable, "-c", command], start_new_session=True, stdout=subprocess.DEVNULL)
        enough = len(stamps) + rng.choice((0, 0, 1, 2)) if kills < most else math.inf
        while life.poll() is None and not (len(finished()) >= enough and list(out.glob("running/*-*"))):
            time.sleep(0.02)
        time.sleep(rng.uniform(0, 0.2))
        if life.poll() is not None:
            assert life.returncode == 0
            break
        workers = {int(path.name.rpartition("-")[2]) for path in out.glob("running/*-*")}
        os.killpg(life.pid, signal.SIGKILL) if rng.random() < 0.7 else life.kill()
        life.wait()
        kills += 1
        deadline = time.monotonic() + 20
        while any(map(alive, workers)):
            assert time.monotonic() < deadline, "a worker outlived its parent"
            time.sleep(0.05)
        assert stamps.items() <= finished().items()
        stamps = finished()
    assert once(read_results(out)) == 24 and kills >= most / 2


@pytest.mark.slow
@pytest.mark.dist
def test_ray_runs_a_sweep_and_survives_a_killed_worker(small, tmp_path, monkeypatch):
    pytest.importorskip("ray")
    monkeypatch.setenv("HOME", str(tmp_path))
    sweep = small(base={"iterations": 30}, log2_factors=(0, 1), adaptive=False)
    killer = meanwhile(lambda: os.kill(running(tmp_path / "s", 1)[0], signal.SIGKILL))
    with closing(RayEngine(2, device="cpu")) as engine:
        result = quietly(sweep, tmp_path / "s", engine)
    killer.join()
    assert result.complete and once(result.results) == 4


class FakeRay(ModuleType):
    """Listens where its variable says, as Ray 2.60 does; or everywhere."""

    def __init__(self, heeds=True):
        super().__init__("ray")
        self.heeds, self.calls = heeds, []
        self.util = SimpleNamespace(get_node_ip_address=self.address)

    def address(self):
        return "127.0.0.1" if self.heeds and os.environ.get(RAY_LISTENS) == "0" else "192.0.2.2"

    def init(self, **options):
        self.calls.append(options)

    def shutdown(self):
        self.calls.append("shutdown")

    def cluster_resources(self):
        return {"CPU": 2.0}

    def remote(self, **options):
        return lambda function: function


def test_ray_of_our_own_listens_on_the_loopback_only(monkeypatch):
    for name in (RAY_LISTENS, "RAY_ADDRESS"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setitem(sys.modules, "ray", ray := FakeRay())
    RayEngine(2)
    assert os.environ[RAY_LISTENS] == "0" and ray.calls[0]["include_dashboard"] is False and len(ray.calls) == 1
    monkeypatch.setitem(sys.modules, "ray", deaf := FakeRay(heeds=False))
    with pytest.raises(ConfigError, match=r"Ray listens on 192.0.2.2, .*=1, or use --engine local"):
        RayEngine(2)
    assert deaf.calls[-1] == "shutdown"
    monkeypatch.setenv(RAY_LISTENS, "1")  # told so
    assert RayEngine(2).workers == 2
    monkeypatch.delenv(RAY_LISTENS)
    monkeypatch.setenv("RAY_ADDRESS", "192.0.2.3:6379")  # somebody's cluster has its own rules
    assert RayEngine(2).workers == 2 and deaf.calls[-1] == {"log_to_driver": False} and RAY_LISTENS not in os.environ


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        (
            "RayTaskError",
            r"lacks a setting that another process added \(ConfigError: setting x is unknown here\); install",
        ),
        ("WorkerCrashedError", "WorkerCrashedError: its process or node died"),
    ],
)
def test_a_ray_worker_that_cannot_read_a_run_says_why(small, corpus, tmp_path, fault, said):
    errors = SimpleNamespace(
        RayError=type("RayError", (Exception,), {"cause": ConfigError("setting x is unknown here")})
    )
    errors.RayTaskError = type("RayTaskError", (errors.RayError,), {})
    errors.WorkerCrashedError = type("WorkerCrashedError", (errors.RayError,), {})

    def get(task):
        raise getattr(errors, fault)

    engine = RayEngine.__new__(RayEngine)
    engine.workers, engine._task = 1, SimpleNamespace(remote=lambda *_: "task")
    engine._ray = SimpleNamespace(
        exceptions=errors, get=get, wait=lambda tasks: (tasks, []), cancel=lambda *_, **__: None
    )
    ((_, failure),) = engine.run(iter([cell_of(small(), corpus, "mup")]), tmp_path)
    assert re.search(said, failure.why)


def test_without_ray_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ConfigError, match=r"pip install 'speedrun-mup\[ray\]'"):
        RayEngine()


@pytest.mark.slow
def test_a_script_that_starts_its_sweep_when_it_is_imported_is_told_so(tiny, tmp_path):
    """One line after Python's own message, instead of a failure of every run."""
    script = tmp_path / "script.py"
    script.write_text(f"""
import sys
from pathlib import Path
from speedrun_mup.config_file import from_json
from speedrun_mup.core.errors import ConfigError
from speedrun_mup.sweep import Sweep, open_engine, run_sweep
sweep = Sweep(from_json({to_json(tiny(base_width=32))!r}, Path("config")), (32, 64), log2_factors=(0,), adaptive=False)
try:
    run_sweep(sweep, Path({str(tmp_path / "s")!r}), open_engine("local", 1, "cpu"), progress=False)
except ConfigError as fault:
    sys.exit(f"error: {{fault}}")
""")
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and 'must be under `if __name__ == "__main__":`' in done.stderr.splitlines()[-1]
    assert not list((tmp_path / "s").glob("cells/*/result.json"))
