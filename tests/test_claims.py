"""Runs that are not what they claim to be: copies are refused, other doubts make INCONCLUSIVE, honest noise passes."""

import dataclasses
import json
import math
import time

import numpy as np
import pytest

from speedrun_mup.cli import main
from speedrun_mup.transfer import Axes, Point, TransferError, Verdict, measure_transfer, read_points, read_table
from speedrun_mup.transfer.claims import refuse_copies
from speedrun_mup.transfer.fits import LossTable, build_loss_table
from speedrun_mup.transfer.thresholds import Thresholds

WIDTHS = (64, 128, 256)


def honest(rng, sigma=0.004, seeds=3, digits=12, grid=range(-3, 4), arm="mup", offset=0.01):
    """Runs whose optima do not drift."""
    runs = []
    for j, width in enumerate(WIDTHS):
        optimum = rng.uniform(-0.2, 0.2)
        for seed in range(seeds):
            shift = offset * rng.standard_normal()
            for k in grid:
                loss = 3 - 0.1 * j + 0.05 * (k - optimum) ** 2 + shift + sigma * rng.standard_normal()
                runs.append(Point({"width": width}, 2.0**k, seed, round(loss, digits), arm))
    return runs


def refused(runs, noise_known=True):
    """What `refuse_copies` says of the runs of several arms, or nothing."""
    tables = {}
    for arm in {run.arm for run in runs}:
        some = [
            build_loss_table(
                Axes(), width, [run for run in runs if run.arm == arm and run.sizes["width"] == width], math.inf
            )
            for width in WIDTHS
        ]
        tables[arm] = [table for table in some if isinstance(table, LossTable)]
    try:
        refuse_copies(tables, noise_known, Thresholds())
    except TransferError as fault:
        return str(fault)
    return ""


# name -> (loss of a run, given the honest losses by place and random numbers; what the refusal names)
DISHONEST = {
    "widths, to the last digit": (lambda run, loss, rng: loss[64, run.log2_value, run.seed], "widths 64, 128, 256"),
    "widths, up to rounding": (
        lambda run, loss, rng: round(loss[64, run.log2_value, run.seed], 4 if run.sizes["width"] > 64 else 12),
        "widths 64, 128, 256",
    ),
    "widths, up to an offset": (
        lambda run, loss, rng: loss[64, run.log2_value, run.seed] - 0.1 * math.log2(run.sizes["width"] / 64),
        "widths 64, 128, 256",
    ),
    "widths, up to jitter": (
        lambda run, loss, rng: loss[64, run.log2_value, run.seed] + 1e-4 * rng.standard_normal(),
        "widths 64, 128, 256",
    ),
    "two of three widths": (
        lambda run, loss, rng: loss[64 if run.sizes["width"] == 256 else run.sizes["width"], run.log2_value, run.seed],
        "widths 64, 256",
    ),
    "widths with other names of seeds": (
        lambda run, loss, rng: loss[64, run.log2_value, (run.seed + (run.sizes["width"] > 64)) % 3],
        "widths 64, 128, 256",
    ),
    "seeds, to the last digit": (lambda run, loss, rng: loss[run.sizes["width"], run.log2_value, 0], "all seeds"),
    "seeds, up to an offset": (
        lambda run, loss, rng: loss[run.sizes["width"], run.log2_value, 0] + 0.01 * run.seed,
        "all seeds",
    ),
    "seeds, up to jitter": (
        lambda run, loss, rng: loss[run.sizes["width"], run.log2_value, 0] + 1e-4 * rng.standard_normal(),
        "all seeds",
    ),
    "seeds, up to a digit here and there": (
        lambda run, loss, rng: round(
            loss[run.sizes["width"], run.log2_value, 0] + 1e-4 * (run.seed == 1 and rng.random() < 0.3), 6
        ),
        "all seeds",
    ),
    "two of three seeds": (
        lambda run, loss, rng: loss[run.sizes["width"], run.log2_value, 0 if run.seed == 1 else run.seed],
        "all seeds",
    ),
    "seeds at one width, up to jitter": (
        lambda run, loss, rng: (
            loss[256, run.log2_value, 0] + 1e-4 * rng.standard_normal()
            if run.sizes["width"] == 256
            else loss[run.sizes["width"], run.log2_value, run.seed]
        ),
        "width 256: seeds",
    ),
    "seeds at one width": (
        lambda run, loss, rng: loss[run.sizes["width"], run.log2_value, 0 if run.sizes["width"] == 256 else run.seed],
        "width 256: seeds",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("digits", [4, 12])
@pytest.mark.parametrize("name", DISHONEST)
def test_copies_are_refused_and_named(name, digits):
    loss_of, named = DISHONEST[name]
    for draw in range(30):
        rng = np.random.default_rng(draw)
        runs = honest(rng, sigma=rng.choice([0.002, 0.004, 0.01]), digits=digits)
        losses = {(run.sizes["width"], run.log2_value, run.seed): run.loss for run in runs}
        fault = refused([dataclasses.replace(run, loss=loss_of(run, losses, rng)) for run in runs])
        assert fault.startswith(named) and "have the same losses" in fault and "reaches the runs" in fault, (
            draw,
            fault,
        )


@pytest.mark.slow
def test_honest_noise_is_not_refused():
    """300 tables of all sizes, and with losses of three digits."""
    rng = np.random.default_rng(0)
    for draw in range(300):
        grid = [range(-2, 3), range(-3, 4), (-2, -1, -0.5, 0, 0.5, 1, 2), (-1, 0, 1, 2)][draw % 4]
        runs = honest(
            rng,
            float(rng.choice([0.001, 0.002, 0.005, 0.01])),
            int(rng.integers(1, 5)),
            int(rng.choice([3, 4, 6, 12])),
            grid,
            offset=float(rng.choice([0.0, 0.005, 0.02])),
        )
        assert not refused(runs), (draw, runs)


def test_copies_in_one_arm_are_named_with_it():
    rng = np.random.default_rng(1)
    good, bad = honest(rng), honest(rng, arm="sp")
    losses = {(run.sizes["width"], run.log2_value): run.loss for run in bad if run.seed == 0}
    copies = [dataclasses.replace(run, loss=losses[run.sizes["width"], run.log2_value]) for run in bad]
    assert refused(good + copies).startswith("arm sp: all seeds have the same losses")
    with pytest.raises(TransferError, match="arm sp: all seeds have the same losses"):
        measure_transfer(good + copies, tested=["mup"])


def test_without_noise_only_equal_widths_are_refused():
    """A verdict cannot follow then, and exact parabolas at an offset are what a test of an estimator is made of."""
    lone = honest(np.random.default_rng(0), sigma=0.0, seeds=1, offset=0.0)
    losses = {run.log2_value: run.loss for run in lone if run.sizes["width"] == 64}
    apart = [dataclasses.replace(run, loss=losses[run.log2_value] - 0.001 * run.sizes["width"]) for run in lone]
    same = [dataclasses.replace(run, loss=losses[run.log2_value]) for run in lone]
    assert not refused(apart, noise_known=False) and refused(apart) and refused(same, noise_known=False)
    assert measure_transfer(apart).verdict is Verdict.INCONCLUSIVE
    with pytest.raises(TransferError, match="widths 64, 128, 256 have the same losses"):
        measure_transfer(apart, sigma=0.005)


def test_widths_that_are_alike_but_for_noise_are_a_note():
    """No copies, so nothing refuses them; but a program that ignores --width gives just these."""
    runs = honest(np.random.default_rng(0))
    assert measure_transfer(runs).notes == ()
    flat = [dataclasses.replace(run, loss=run.loss + 0.1 * WIDTHS.index(run.sizes["width"])) for run in runs]
    (note,) = measure_transfer(flat).notes
    assert note.startswith("arm mup: widths 64 to 256 have the same loss up to noise (") and "reaches the runs" in note
    lone = [run for run in flat if run.seed == 0]
    assert measure_transfer(lone).notes == () and measure_transfer(lone, sigma=0.01).notes


def test_a_run_that_is_there_twice_is_refused():
    runs = honest(np.random.default_rng(0))
    with pytest.raises(TransferError, match="two runs of arm mup, width 64, lr 0.125, seed 0"):
        measure_transfer([*runs, dataclasses.replace(runs[0], loss=2.9)])


# ---- exploded runs --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", [50.0, 1e7, 1e300])
def test_an_exploded_run_has_diverged_though_it_is_finite(loss):
    runs = [
        dataclasses.replace(run, loss=loss * (1 + 0.1 * run.seed))
        if (run.sizes["width"], run.value) == (256, 8.0)
        else run
        for run in honest(np.random.default_rng(0))
    ]
    result = measure_transfer(runs)
    assert result.verdict is Verdict.PASS and result.arms["mup"].fits[-1].table.diverged == (3.0,)
    assert result.notes == ("3 runs ended at a loss of 30.69 or more: counted as diverged",)


def test_where_runs_began_may_be_said(tmp_path, capsys):
    table = write(tmp_path, honest(np.random.default_rng(0)))
    main(["transfer", str(table), "--initial-loss", "3.2", "--json"])
    told = json.loads(capsys.readouterr().out)
    assert told["arms"]["runs"]["sizes"][0]["diverged_log2_value"] and "counted as diverged" in told["notes"][-1]


# ---- tables ---------------------------------------------------------------------------------------------------------


def write(folder, runs, name="runs.csv", header="width,lr,seed,loss", extra=lambda run: ()):
    """A table of runs, with further columns."""
    rows = [",".join(map(str, (run.sizes["width"], run.value, run.seed, run.loss, *extra(run)))) for run in runs]
    (folder / name).write_text("\n".join([header, *rows]) + "\n")
    return folder / name


def test_columns_may_be_called_otherwise(tmp_path, capsys):
    """A W&B export: other names, quotes, more columns than are needed, and no seed."""
    runs = [run for run in honest(np.random.default_rng(0)) if run.seed == 0]
    header = 'n_embd,learning_rate,seq,val/loss,"Name",State,train/loss'
    table = write(tmp_path, runs, header=header, extra=lambda run: (f'"run {run.value}"', "finished", run.loss - 0.1))
    with pytest.raises(TransferError) as fault:
        read_points(table)
    assert str(fault.value).endswith(
        "no column width, lr, loss in the header (n_embd,learning_rate,seq,val/loss,name,state,train/loss); give --columns "
        "width=n_embd,lr=learning_rate,loss=val/loss; loss may be any of val/loss, train/loss"
    )
    columns = ["--columns", "width=n_embd,lr=Learning_Rate,loss=val/loss", "--sigma", "0.004"]
    assert main(["transfer", str(table), *columns]) == 0
    told = capsys.readouterr().out
    assert "note: columns not used: seq, Name, State, train/loss" in told and told.count("\nnote: ") == 1
    assert '. Name ("run 0.125", ' in told and ") differs between runs: harmless if it is only a comment" in told
    assert read_points(table, columns={"width": "n_embd", "lr": "learning_rate", "loss": "val/loss"}) == [
        dataclasses.replace(run, arm="runs") for run in runs
    ]


@pytest.mark.parametrize(
    ("columns", "fault"),
    [
        ("width=n_embd", "no column n_embd in the header"),
        ("loss=lr", "one column for two meanings"),
        ("depth=layers", "columns depth=...: give width, lr, seed, loss, arm"),
        ("width", "give width=NAME,lr=NAME"),
        ("width=width,width=width", "each once"),
    ],
)
def test_wrong_columns_are_one_line(tmp_path, capsys, columns, fault):
    table = write(tmp_path, honest(np.random.default_rng(0)))
    assert main(["transfer", str(table), "--columns", columns]) > 1
    told = capsys.readouterr().err
    assert fault in told and told.count("\n") == 1


def test_a_column_that_splits_a_place_is_named(tmp_path):
    runs = honest(np.random.default_rng(0), seeds=2)
    depth = write(
        tmp_path,
        [dataclasses.replace(run, seed=0) for run in runs],
        header="width,lr,seed,loss,depth,note",
        extra=lambda run: (6 if run.loss in {r.loss for r in runs if r.seed == 0} else 12, "x"),
    )
    with pytest.raises(TransferError, match="there twice, and differs in depth: keep .* --columns arm=depth"):
        read_points(depth)
    assert {run.arm for run in read_points(depth, columns={"arm": "depth"})} == {"6", "12"}
    lone = tmp_path / "lone.csv"
    lone.write_text("width,lr,loss,rng\n64,1,3,0\n64,1,3.1,1\n")
    with pytest.raises(TransferError, match="differs in rng: .*, or say .* --columns seed=NAME"):
        read_points(lone)
    assert [run.seed for run in read_points(lone, columns={"seed": "rng"})] == [0, 1]


@pytest.mark.slow
def test_settings_that_should_be_equal_and_differ_make_inconclusive(tmp_path, capsys):
    runs = honest(np.random.default_rng(0))
    table = write(
        tmp_path,
        runs,
        header="width,lr,seed,loss,steps",
        extra=lambda run: (1000 if run.sizes["width"] < 256 else 500,),
    )
    assert main(["transfer", str(table)]) == 1
    told = capsys.readouterr().out
    assert (
        "verdict: INCONCLUSIVE\n- steps has 2 values in these runs: 1000 (42 of runs at width 64, 128); 500 (21" in told
    )
    assert main(["transfer", str(table), "--accept", "steps"]) == 0
    assert "note: accepted: steps has 2 values" in capsys.readouterr().out
    assert main(["transfer", str(table), "--accept", "depth"]) == 3
    assert "--accept depth: no such doubt about these runs; there is steps" in capsys.readouterr().err
    equal = write(tmp_path, runs, "equal.csv", "width,lr,seed,loss,steps", lambda run: (1000,))
    assert main(["transfer", str(equal)]) == 0


# name of a column -> its cell, given (number of the row, run); and whether the runs can be judged all the same
FURTHER_COLUMNS = {
    # What cannot matter, however it varies.
    "run_id": (lambda n, run: f"x{n}", True),
    "created": (lambda n, run: f"2026-01-01T{n // 60:02}:{n % 60:02}", True),
    "runtime": (lambda n, run: 100 + 3.7 * n, True),
    "_step": (lambda n, run: 999 - n % 2, True),
    "notes": (lambda n, run: ["", "restarted"][n % 2], True),
    "gpu": (lambda n, run: ["A100", "H100"][n % 2], True),
    "num_gpus": (lambda n, run: 1 + n % 4, True),
    "host": (lambda n, run: f"node{n % 5}", True),
    "git_commit": (lambda n, run: f"{n // 20:x}c0ffee", True),
    "path": (lambda n, run: f"/scratch/{n}/out", True),
    "num_params": (lambda n, run: 12 * run.sizes["width"] ** 2, True),
    "n_head": (lambda n, run: run.sizes["width"] // 16, True),
    "batch": (lambda n, run: n, True),  # a number of the run, not a setting
    # One setting in several spellings.
    "device": (lambda n, run: f"cuda:{n % 4}", True),
    "dtype": (lambda n, run: ["bf16", "torch.bfloat16"][n % 2], True),
    "batch_size": (lambda n, run: ["64", "64.0"][n % 2], True),
    "optimizer": (lambda n, run: ["AdamW", "adamw", ""][n % 3], True),
    "data": (lambda n, run: f"/mnt/{n % 3}/fineweb/", True),
    "tokens": (lambda n, run: 1_000_000 + n, True),
    # A rule of width.
    "weight_decay": (lambda n, run: f"{6.4 / run.sizes['width']:.4g}", True),
    "eps": (lambda n, run: 1e-8 * (64 / run.sizes["width"]), True),
    "model/init_std": (lambda n, run: f"{run.sizes['width'] ** -0.5:.3g}", True),
    "min_lr": (lambda n, run: run.value / 10, True),
    # Settings that differ.
    "config/n_layer": (lambda n, run: run.sizes["width"] // 32, False),
    "args.numLayers": (lambda n, run: run.sizes["width"] // 32, False),
    "Max Steps": (lambda n, run: 1000 if run.sizes["width"] < 256 else 1500, False),
    "torch": (lambda n, run: ["2.6.0", "2.7.0"][n % 2], False),
    "precision": (lambda n, run: "fp32" if run.sizes["width"] == 256 else "bf16", False),
    "beta2": (lambda n, run: 0.99 if run.sizes["width"] == 256 else 0.95, False),
    "warmup_steps": (lambda n, run: run.sizes["width"], False),
    "dataset": (lambda n, run: "c4" if run.sizes["width"] == 256 else "fineweb", False),
    "parametrization": (lambda n, run: "mup" if run.sizes["width"] == 256 else "sp", False),
    "adam/weight_decay": (lambda n, run: 0.3 if run.sizes["width"] == 256 else 0.1, False),  # no power of width
    "wd": (lambda n, run: 0.1 * (n % 2), False),
    "epochs": (lambda n, run: "inf" if run.sizes["width"] == 256 else 1, False),
    "iterations": (lambda n, run: "9" * 400 if run.sizes["width"] == 256 else 5, False),
}


@pytest.mark.parametrize("column", FURTHER_COLUMNS)
def test_further_columns_matter_if_they_are_settings(tmp_path, column):
    """An export of a tracker holds many columns: only settings that differ, and follow no rule of width, raise a doubt."""
    cell, fine = FURTHER_COLUMNS[column]
    runs = honest(np.random.default_rng(0))
    numbers = {run: number for number, run in enumerate(runs)}
    table = read_table(
        write(tmp_path, runs, header=f"width,lr,seed,loss,{column}", extra=lambda run: (cell(numbers[run], run),))
    )
    assert [doubt.kind for doubt in table.doubts] == ([] if fine else [column.lower()])
    verdict = measure_transfer(table.points, doubts=table.doubts).verdict
    assert verdict is (Verdict.PASS if fine else Verdict.INCONCLUSIVE)
    rules = [note for note in table.notes if "counted as part of the rule" in note]
    assert len(rules) == (column in ("weight_decay", "eps", "model/init_std"))
    assert not rules or f"{column} goes as width^-" in rules[0]


def test_of_two_columns_with_one_name_both_count(tmp_path):
    runs = honest(np.random.default_rng(0))
    table = write(tmp_path, runs, header="width,lr,seed,loss,depth,depth", extra=lambda run: (run.sizes["width"], 6))
    assert [doubt.kind for doubt in read_table(table).doubts] == ["depth"]


def test_a_diverged_run_may_have_ended_early(tmp_path):
    runs = [
        dataclasses.replace(run, loss=math.nan) if run.value == 8 else run for run in honest(np.random.default_rng(0))
    ]
    short = write(tmp_path, runs, header="width,lr,seed,loss,steps", extra=lambda run: (7 if run.value == 8 else 1000,))
    assert not read_table(short).doubts


def test_arms_may_differ_in_what_they_are_for(tmp_path):
    """Each arm is judged by itself; a setting that differs within one is a doubt about that one."""
    rng = np.random.default_rng(0)
    runs = honest(rng) + honest(rng, arm="adam")

    def table_with(cell):
        header = "width,lr,seed,loss,arm,optimizer"
        return read_table(write(tmp_path, runs, header=header, extra=lambda run: (run.arm, cell(run))))

    apart = table_with(lambda run: "muon" if run.arm == "mup" else "adamw")
    assert not apart.doubts and "arms differ in optimizer: muon (mup), adamw (adam)" in apart.notes
    within = table_with(lambda run: "muon" if (run.arm, run.sizes["width"]) == ("mup", 64) else "adamw")
    assert [(doubt.kind, doubt.arm) for doubt in within.doubts] == [("optimizer", "mup")]


def test_where_another_hyperparameter_was_turned_rates_are_settings(tmp_path):
    runs = honest(np.random.default_rng(0))
    for rates, doubts in (({64: 0.4, 128: 0.2, 256: 0.1}, []), ({64: 0.1, 128: 0.1, 256: 0.3}, ["lr"])):
        rows = "".join(
            f"{run.sizes['width']},{run.value},{run.seed},{run.loss},{rates[run.sizes['width']]}\n" for run in runs
        )
        (tmp_path / "runs.csv").write_text(f"width,decay,seed,loss,lr\n{rows}")
        assert [
            doubt.kind for doubt in read_table(tmp_path / "runs.csv", Axes(hyperparameter="decay")).doubts
        ] == doubts


def test_seeds_may_have_names(tmp_path):
    runs = honest(np.random.default_rng(0))
    rows = "".join(f"{run.sizes['width']},{run.value},seed-{'abc'[run.seed]},{run.loss}\n" for run in runs)
    (tmp_path / "runs.csv").write_text(f"width,lr,seed,loss\n{rows}")
    table = read_table(tmp_path / "runs.csv")
    assert table.points == [dataclasses.replace(run, arm="runs") for run in runs]
    assert "seeds have names: 0 is seed-a, 1 is seed-b, 2 is seed-c" in table.notes


def test_a_loss_that_is_not_in_nats_is_said(tmp_path):
    table = write(tmp_path, honest(np.random.default_rng(0)), header="width,lr,seed,val/perplexity")
    with pytest.raises(TransferError, match="give --columns loss=val/perplexity"):
        read_table(table)
    notes = read_table(table, columns={"loss": "val/perplexity"}).notes
    assert any(note.startswith("the loss is val/perplexity: what is said in nats") for note in notes)


def test_seeds_are_told_apart_to_the_last_digit(tmp_path):
    runs = [dataclasses.replace(run, seed=2**53 + run.seed) for run in honest(np.random.default_rng(0))]
    assert [run.seed for run in read_points(write(tmp_path, runs))] == [run.seed for run in runs]


@pytest.mark.parametrize(
    ("row", "fault"),
    [
        ("64,1,0,3_2", "'3_2' should be a number"),
        ("6400000000000000000000,1,0,3", "should be at most 2147483648"),
        ("1e300,1,0,3", "column width: '1e300' should be a positive whole number"),
        (f"64,1,{'9' * 5000},3", "should be a whole number"),
        ("64,1e308,0,3", "should be from 1e-30 to 1e+30"),
        ("64,1e-320,0,3", "should be from 1e-30 to 1e+30"),
        ("64,1,0,3\x00", "NUL bytes"),
    ],
)
def test_numbers_out_of_range_are_one_line(tmp_path, row, fault):
    (tmp_path / "runs.csv").write_text(f"width,lr,seed,loss\n{row}\n")
    with pytest.raises(TransferError, match="^[^\n]*$") as told:
        read_points(tmp_path / "runs.csv")
    assert fault in str(told.value) and len(str(told.value)) < 400


@pytest.mark.parametrize("arm", ["a" * 101, '"a\nb"', "a\x1b[2Jb", "a\u202eb"])
def test_an_arm_has_a_name_that_can_be_printed(tmp_path, arm):
    (tmp_path / "runs.csv").write_text(f"width,lr,seed,loss,arm\n64,1,0,3,{arm}\n")
    with pytest.raises(TransferError, match="column arm: .* should be a name of at most 100 characters"):
        read_points(tmp_path / "runs.csv")


def test_a_table_that_is_no_file_or_too_large_is_one_line(tmp_path, monkeypatch):
    import os

    os.mkfifo(tmp_path / "pipe.csv")
    with pytest.raises(TransferError, match="it is a FIFO"):
        read_points(tmp_path / "pipe.csv")
    monkeypatch.setattr("speedrun_mup.transfer.table.MOST_BYTES", 1000)
    with pytest.raises(TransferError, match="holds more than 1,000 bytes"):
        read_points(write(tmp_path, honest(np.random.default_rng(0))))


@pytest.mark.slow
def test_many_rows_columns_and_arms_are_fast_or_one_line(tmp_path):
    began = time.process_time()
    seeds = "".join(f"{(64, 128, 256)[n // 20000]},{2.0 ** (n % 20)},{n},{3 + n % 7}\n" for n in range(60_000))
    (tmp_path / "seeds.csv").write_text(f"width,lr,seed,loss\n{seeds}")
    result = measure_transfer(read_table(tmp_path / "seeds.csv").points)
    assert "width 64: its seeds share too few points" in result.reasons[0]
    columns = ",".join(f"c{n}" for n in range(300_000))
    (tmp_path / "columns.csv").write_text(f"width,lr,seed,loss,{columns}\n64,1,0,3\n")
    with pytest.raises(TransferError, match=r"300,004 columns; give a table of at most 10,000$"):
        read_points(tmp_path / "columns.csv")
    arms = [
        Point({"width": width}, 2.0**k, 0, 3 + k * k, f"a{arm}")
        for arm in range(3000)
        for width in WIDTHS
        for k in range(-2, 3)
    ]
    with pytest.raises(TransferError, match="3000 arms with 9000 widths in all; at most 600"):
        measure_transfer(arms)
    assert time.process_time() - began < 10
