"""Several sizes in `transfer`: tables, controls, doubts, forecasts, and what is refused."""

import csv
import dataclasses
import json

import numpy as np
import pytest
from helpers.surfaces import BASE, World, design

import speedrun_mup
from speedrun_mup.cli import main
from speedrun_mup.transfer import TransferError, Verdict, measure_surface

NAMES = ("width", "tokens")
RIGHT = World({"width": 0.0, "tokens": -0.3})
WRONG = World({"width": -1.0, "tokens": -0.3}, optimum=0.3)


def runs_of(world, arm="runs", rng=0):
    points = world.runs(design(NAMES), np.random.default_rng(rng))
    return [dataclasses.replace(point, arm=arm) for point in points]


def write(path, points, names=NAMES):
    with path.open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["arm", *names, "lr", "seed", "loss"])
        rows.writerows([p.arm, *(p.sizes[name] for name in names), p.value, p.seed, p.loss] for p in points)
    return str(path)


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    points = [*runs_of(RIGHT, "mup"), *runs_of(WRONG, "sp", rng=1)]
    return write(tmp_path_factory.mktemp("table") / "runs.csv", points)


SIZES = ["--size", "width", "--size", "tokens"]


@pytest.mark.slow
def test_several_sizes_print_a_drift_and_a_verdict_for_each(table, capsys):
    rule = ["--predicted", "tokens=-0.3", "--controls", "sp:width=-1"]
    assert main(["transfer", table, *SIZES, *rule, "--predict", "width=1024,tokens=1M"]) == 0
    told = capsys.readouterr().out
    assert "verdict: PASS" in told and "control sp failed on width as predicted (-1)" in told
    assert "forecast of arm mup, width 1024, tokens 1000000: loss" in told and "width by 2 above" in told
    assert "forecast of arm sp" not in told
    assert main(["transfer", table, *SIZES, "--controls", "sp:width=-1"]) == 1  # tokens drift
    assert "tokens: FAIL, drift -0." in capsys.readouterr().out
    assert main(["transfer", table, *SIZES, *rule[:2], "--controls", "sp:width=1"]) == 1
    assert "control sp did not fail on width as predicted" in capsys.readouterr().out
    main(["transfer", table, *SIZES, *rule, "--predict", "width=1024,tokens=1M", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert found["arms"]["mup"]["sizes"]["tokens"]["predicted_drift"] == -0.3
    assert found["forecasts"]["mup"]["doublings_outside"]["width"] == 2


@pytest.mark.parametrize(
    ("arguments", "fault"),
    [
        ([*SIZES, "--predict", "1024"], "give every size once, --predict width=...,tokens=..."),
        ([*SIZES, "--predict", "width=1024,tokens=many"], "give a whole number"),
        ([*SIZES, "--controls", "sp=-1"], "say on which size, such as sp:width=-1"),
        ([*SIZES, "--controls", "sp:depth=-1"], "depth is no size here; there are width, tokens"),
        ([*SIZES, "--controls", "gone:width=-1"], "arm gone was not run"),
        ([*SIZES, "--predicted", "depth=-1"], "predicted drift of depth: no such size here"),
        ([*SIZES, "--base-size", "64"], "count from the smallest of each"),
        (["--size", "width", "--size", "n_layer"], "no column n_layer in the header"),
        (["--size", "width", "--predicted", "width=0"], "it is for several sizes"),
        (["--size", "width", "--size", "lr"], "size and hyperparameter are both lr"),
    ],
)
def test_bad_input_gets_one_line(table, arguments, fault, capsys):
    assert main(["transfer", table, *arguments]) > 1
    told = capsys.readouterr().err.strip()
    assert fault in told and "\n" not in told, told


def test_the_report_looks_along_one_size(table, capsys):
    assert main(["report", table, *SIZES]) > 1
    assert "give one here; speedrun-mup transfer takes several" in capsys.readouterr().err


def test_a_run_that_is_there_twice_is_refused(tmp_path, capsys):
    points = runs_of(RIGHT)
    assert main(["transfer", write(tmp_path / "twice.csv", [*points, points[0]]), *SIZES]) > 1
    assert "width 64, tokens 65536, lr 0.25, seed 0 is there twice" in capsys.readouterr().err


def test_another_size_that_varies_is_a_doubt_until_it_is_accepted():
    points = [
        dataclasses.replace(point, sizes={**point.sizes, "batch_tokens": 1024 * (1 + (point.sizes["width"] > 64))})
        for point in runs_of(World({"width": 0.0, "tokens": 0.0}))
    ]
    doubtful = measure_surface(points, NAMES, resamples=100)
    assert doubtful.verdict is Verdict.INCONCLUSIVE and "batch_tokens has 2 values" in doubtful.reasons[0]
    accepted = measure_surface(points, NAMES, resamples=100, accept=["batch_tokens"])
    assert accepted.verdict is Verdict.PASS and accepted.notes[0].startswith("accepted: batch_tokens")


@pytest.mark.slow
def test_python_takes_any_table(table):
    pandas = pytest.importorskip("pandas")
    frame = pandas.read_csv(table)
    by_path = speedrun_mup.fit_surface(table, NAMES, arm="mup", resamples=100)
    by_frame = speedrun_mup.fit_surface(frame[frame.arm == "mup"], NAMES, resamples=100)
    by_rows = speedrun_mup.fit_surface(frame[frame.arm == "mup"].to_dict("records"), NAMES, resamples=100)
    assert by_path["tokens"].drift.value == pytest.approx(-0.3, abs=0.05)
    for other in (by_frame, by_rows):
        assert other["tokens"].drift.value == pytest.approx(by_path["tokens"].drift.value, abs=1e-9)
    for wrong, fault in [
        ([{"width": 64}], "row 1: no tokens"),
        ([{"width": 64, "tokens": 10, "lr": 1, "loss": "high"}], "row 1, loss: 'high' is no number"),
        ([{"width": 64, "tokens": 1.5, "lr": 1, "loss": 2.0}], "row 1, tokens: 1.5 is no whole number above zero"),
        ([{"width": 64, "tokens": 10, "lr": 0, "loss": 2.0}], "row 1, lr: 0.0 is not above zero"),
    ]:
        with pytest.raises(TransferError, match=fault):
            speedrun_mup.fit_surface(wrong, NAMES)
    with pytest.raises(TransferError, match="a surface of 2 arms"):
        speedrun_mup.fit_surface(table, NAMES)
    with pytest.raises(TransferError, match="arm gone was not run; there are mup, sp"):
        speedrun_mup.fit_surface(table, NAMES, arm="gone")
    assert set(BASE) >= set(NAMES)
