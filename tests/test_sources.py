"""Tables in every dialect, and logs of other programs: files that these wrote are in tests/data/logs."""

import contextlib
import gzip
import json
import math
import random
import shutil
import sqlite3
import struct
import time
from pathlib import Path

import pytest

from speedrun_mup.cli import main
from speedrun_mup.transfer import Axes, Point, TransferError, measure_transfer, read_points, read_table
from speedrun_mup.transfer.sources import FORMATS, is_sweep
from speedrun_mup.transfer.sources.logs import Curve
from speedrun_mup.transfer.sources.tensorboard import _masked_checksum, read_events
from speedrun_mup.transfer.sources.wire import Damaged, fields

LOGS = Path(__file__).parent / "data" / "logs"
RATES, WIDTHS = (0.0025, 0.005, 0.01, 0.02, 0.04), (64, 128, 256)
NAMES = "w{width}-lr{lr}-s{seed}"


def loss(width, lr, seed, step=2):
    """What the runs in tests/data/logs logged at steps 0, 1 and 2."""
    if (width, lr) == (256, 0.04):
        return math.nan if step == 2 else 5.0
    noise = random.Random(f"{width} {lr} {seed}").gauss(0, 0.002)
    return 3 - 0.2 * math.log2(width / 64) + 0.05 * math.log2(lr / 0.01) ** 2 + 0.3 * (2 - step) + noise


CELLS = [(width, lr, seed) for width in WIDTHS for lr in RATES for seed in (0, 1)]


def found_in(table):
    """(width, lr, seed) -> loss, nan as None."""
    return {
        (run.sizes["width"], run.value, run.seed): None if math.isnan(run.loss) else run.loss for run in table.points
    }


def expected(cells=CELLS, digits=15):
    losses = {cell: loss(*cell) for cell in cells}
    return {cell: None if math.isnan(one) else pytest.approx(one, rel=10.0**-digits) for cell, one in losses.items()}


# ---- logs of other programs -----------------------------------------------------------------------------------------


@pytest.fixture
def unpacked(tmp_path):
    """A file or folder of tests/data/logs, with what is compressed there as it was."""

    def unpack(name):
        if (LOGS / f"{name}.gz").exists():
            (tmp_path / name).write_bytes(gzip.decompress((LOGS / f"{name}.gz").read_bytes()))
            return tmp_path / name
        return LOGS / name

    return unpack


LOGGED = {
    "wandb": ({}, 15, "runs of W&B"),
    "tensorboard": ({"names": NAMES}, 6, "TensorBoard event files"),
    "optuna.db": ({}, 15, "trials of Optuna"),
    "optuna.csv": ({}, 15, None),
    "trackio-widths.db": ({}, 15, "runs of trackio"),
    "lightning": ({}, 15, "runs of Lightning"),
}


@pytest.mark.parametrize("name", LOGGED)
def test_logs_are_read_as_their_program_wrote_them(name, unpacked):
    how, digits, words = LOGGED[name]
    table = read_table(unpacked(name), **how)
    pruned = [cell for cell in CELLS if math.isnan(loss(*cell))] if name.startswith("optuna") else []
    assert found_in(table) == expected([cell for cell in CELLS if cell not in pruned], digits)
    assert [doubt.kind for doubt in table.doubts] == ["missing"] * bool(pruned)
    assert words is None or table.notes[0] == f"read as {words}: 30 runs; the loss of a run is its last value"
    longest = 9 if digits < 9 else 20  # single precision in its shortest form, which tells copies from rounding
    assert all(len(repr(run.loss)) <= longest for run in table.points)
    assert measure_transfer(table.points).verdict == "PASS"


def test_the_lowest_value_of_a_curve_if_asked():
    """In these runs the last is the lowest, so the lowest of a curve that rises is looked at too."""
    lowest = read_table(LOGS / "tensorboard", names=NAMES, loss="min")
    assert found_in(lowest) == expected(digits=6)  # a run that ended in nan has diverged, whatever it was before
    assert "the loss of a run is its lowest value" in lowest.notes[0]
    curve = Curve.of([(0, 3.0), (2, 2.5), (1, 2.0)])
    assert (curve.loss("last"), curve.loss("min"), curve.step) == (2.5, 2.0, 2)
    assert math.isnan(Curve.of([(0, 3.0), (1, math.nan)]).loss("min"))


def test_a_trainer_logs_two_losses_and_its_rate(tmp_path):
    source = LOGS / "trainer"
    with pytest.raises(
        TransferError,
        match="give --columns width=hidden_size,lr=peak/learning_rate,loss=eval_loss; loss may be any of eval_loss, loss$",
    ):
        read_table(source)
    with pytest.raises(TransferError, match="is there twice; if their names hold the seed, give .* --names"):
        read_table(source, columns={"loss": "eval_loss"})
    table = read_table(source, columns={"loss": "eval_loss"}, names="w{}-lr{}-s{seed}")
    assert (
        "width is the column hidden_size, lr is the column peak/learning_rate; --columns says otherwise" in table.notes
    )
    state = json.loads((source / "w16-lr0.004-s1" / "checkpoint-16" / "trainer_state.json").read_text())
    last = [record["eval_loss"] for record in state["log_history"] if "eval_loss" in record][-1]
    (run,) = [run for run in table.points if (run.sizes["width"], run.value, run.seed) == (16, 0.004, 1)]
    assert run.loss == last and len(table.points) == 24


def test_ray_comes_before_the_event_files_that_it_writes_too():
    table = read_table(LOGS / "ray")
    cells = [cell for cell in CELLS if cell[0] < 256 and 0.005 <= cell[1] <= 0.02]
    assert found_in(table) == expected(cells)
    assert "also there: TensorBoard event files; --format tensorboard reads these" in table.notes
    events = read_table(LOGS / "ray", form="tensorboard", columns={"loss": "ray/tune/val_loss"})
    assert found_in(events) == expected(cells, 6)


def test_settings_of_hparams_belong_to_the_run_around_them():
    table = read_table(LOGS / "tensorboard-hparams")
    assert found_in(table) == expected([(64, 0.0025, 0), (64, 0.0025, 1)], 6)
    assert "columns not used: opt, steps" in table.notes


def test_a_trial_that_failed_does_not_count(tmp_path):
    shutil.copytree(LOGS / "ray", tmp_path / "ray")
    folder = next((tmp_path / "ray" / "widths").glob("train_*"))
    (folder / "error.txt").write_text("Traceback")
    (doubt,) = read_table(tmp_path / "ray").doubts
    assert doubt.kind == "missing" and doubt.text.startswith(
        f"1 of 12 runs do not count: run widths/{folder.name} is failed"
    )


def test_curves_of_any_program_in_a_folder_for_each_run(tmp_path):
    """JSON lines or CSV, settings in a file beside or in names; a run that is shorter than others is a doubt."""
    for width, lr, seed in CELLS:
        folder = tmp_path / "runs" / f"seed={seed},lr={lr}" / f"{width}"
        folder.mkdir(parents=True)
        (folder / "config.json").write_text(json.dumps({"model": {"n_embd": width}, "layers": [1, 2]}))
        records = [
            {"step": k, "split": s, "loss": loss(width, lr, seed, k) + (s == "train")}
            for k in range(3)
            for s in ("train", "val")
        ]
        (folder / "log.jsonl").write_text("\n".join(map(json.dumps, records)) + '\n{"step": 3, "lo')
    table = read_table(tmp_path / "runs", columns={"loss": "val/loss"})
    assert found_in(table) == expected() and not table.doubts
    (folder / "log.jsonl").write_text(json.dumps({"step": 0, "val/loss": 2.5, "train/loss": 3.0}))
    assert [doubt.kind for doubt in read_table(tmp_path / "runs", columns={"loss": "val/loss"}).doubts] == ["steps"]
    (folder / "log.jsonl").write_text(json.dumps({"step": 0, "train/loss": 3.0}))
    (doubt,) = read_table(tmp_path / "runs", columns={"loss": "val/loss"}).doubts
    assert "1 of 30 runs do not count: run seed=1,lr=0.04/256 has no val/loss; finish them" in doubt.text


@pytest.mark.slow
def test_a_folder_of_logs_is_measured_and_reported_by_the_commands(tmp_path, capsys):
    source = tmp_path / "logs"
    shutil.copytree(LOGS / "tensorboard", source)
    words = [str(source), "--names", NAMES, "--loss", "last"]
    assert main(["transfer", *words, "--predict", "512"]) == 0
    told = capsys.readouterr().out
    assert "verdict: PASS" in told and "note: loss is the column loss/val; --columns says otherwise" in told
    assert main(["report", *words]) == 0 and (tmp_path / "logs-report" / "report.html").exists()
    text = (tmp_path / "logs-report" / "report.md").read_text()
    assert f"speedrun-mup transfer {source} --loss last --names '{NAMES}' --predict WIDTH" in text


@pytest.mark.parametrize(
    ("how", "fault"),
    [
        ({"names": "{width}-{width}"}, "give settings between braces, each once"),
        ({"names": "width"}, "give settings between braces, each once"),
        ({"names": "{1}-{width}"}, "give settings between braces, each once"),
        ({"names": "x{width}"}, "--names x{width}: the run w128-lr0.0025-s0 has another name"),
        ({"form": "mlflow"}, f"--format mlflow: give one of {', '.join(FORMATS)}"),
        ({"form": "wandb"}, "--format wandb: no runs of W&B in .*; it has TensorBoard event files"),
        ({}, "no column width, lr, loss in the header"),
    ],
)
def test_what_cannot_be_meant_is_one_line(how, fault):
    with pytest.raises(TransferError, match=fault.replace("{", r"\{")) as told:
        read_table(LOGS / "tensorboard", **how)
    assert "\n" not in str(told.value)


def test_a_sweep_has_no_logs_and_takes_none_of_their_flags(tmp_path, capsys):
    (tmp_path / "sweep.json").write_text("{}")
    (tmp_path / "events.out.tfevents.1").write_bytes(b"")
    assert is_sweep(tmp_path) and not is_sweep(LOGS / "ray")
    assert main(["transfer", str(tmp_path), "--loss", "min"]) == 2
    assert "--loss min: " in (told := capsys.readouterr().err) and "is a sweep, which is no table; leave it out" in told


# ---- damaged logs ---------------------------------------------------------------------------------------------------


DAMAGED = ("wandb", "tensorboard", "optuna.db", "trackio-widths.db", "trainer", "ray", "lightning")


@pytest.mark.parametrize("name", DAMAGED)
def test_whatever_the_bytes_an_error_is_one_line(name, unpacked, tmp_path):
    """Files cut and changed at random places: they are read, or refused in one line."""
    source = unpacked(name)
    files = sorted(path for path in source.rglob("*") if path.is_file())[:4] if source.is_dir() else [source]
    dice = random.Random(0)
    for trial in range(12):
        original = dice.choice(files)
        content = bytearray(original.read_bytes())
        if trial % 3 == 0:
            del content[dice.randrange(len(content)) :]
        for _ in range(trial % 3 * 8):
            content[dice.randrange(len(content))] = dice.randrange(256)
        copy = tmp_path / f"{trial}" / original.parent.name / original.name
        copy.parent.mkdir(parents=True)
        for beside in original.parent.iterdir():
            if beside.is_file() and beside != original:
                shutil.copy(beside, copy.parent)
        copy.write_bytes(content)
        try:
            read_table(copy if source.is_file() else copy.parent, loss="last", columns={"loss": "loss/val"})
        except TransferError as fault:
            assert "\n" not in str(fault) and len(str(fault)) < 600


def test_an_event_file_may_end_in_the_middle_of_a_record(tmp_path):
    original = next((LOGS / "tensorboard" / "w64-lr0.01-s0").iterdir())
    (tmp_path / original.name).write_bytes(original.read_bytes()[:-5])
    (run,) = read_events([tmp_path / original.name], tmp_path)
    assert run.curves["loss/val"].step == 1 and run.curves["loss/val"].last == pytest.approx(loss(64, 0.01, 0, 1))


def test_a_record_longer_than_its_file_says_so(tmp_path):
    head = struct.pack("<Q", 2**40)
    path = tmp_path / "events.out.tfevents.1"
    path.write_bytes(head + struct.pack("<I", _masked_checksum(head)) + b"x")
    with pytest.raises(TransferError, match="a record of 1,099,511,627,776 bytes"):
        read_table(path)
    path.write_bytes(head + b"abcdx")
    with pytest.raises(TransferError, match="damaged, or no event file"):
        read_table(path)


@pytest.mark.parametrize("message", [b"\x08", b"\x0a\x05ab", b"\x0b", b"\x08" + b"\xff" * 11, b"\x09abc"])
def test_bytes_that_are_no_message_are_found(message):
    with pytest.raises(Damaged):
        list(fields(message))


def test_a_message_is_its_fields():
    """150 and "testing" are the examples of the format's own documentation."""
    message = b"\x08\x96\x01\x12\x07testing\x1d" + struct.pack("<f", 0.5) + b"\x21" + struct.pack("<d", 0.1)
    assert list(fields(message)) == [(1, 150), (2, b"testing"), (3, 0.5), (4, 0.1)]


def test_settings_without_end_are_refused(tmp_path):
    """YAML can repeat a group within groups; each level here has ten times the groups of the one before, all empty."""
    levels = [
        "a0: &a0 {}",
        *(f"a{n}: &a{n} {{{', '.join(f'k{k}: *a{n - 1}' for k in range(10))}}}" for n in range(1, 11)),
    ]
    (tmp_path / "hparams.yaml").write_text("\n".join(levels))
    (tmp_path / "metrics.csv").write_text("step,val_loss\n0,3\n")
    began = time.process_time()
    with pytest.raises(TransferError, match="more than 20,000 settings in one run"):
        read_table(tmp_path)
    assert time.process_time() - began < 2


def test_a_study_whose_tables_disagree_is_read_as_far_as_they_agree(tmp_path):
    copy = tmp_path / "study.db"
    copy.write_bytes(gzip.decompress((LOGS / "optuna.db.gz").read_bytes()))
    with contextlib.closing(sqlite3.connect(copy)) as database:
        database.execute("PRAGMA foreign_keys = OFF")
        database.execute("UPDATE trial_values SET value = 'x' WHERE trial_id = 1")
        database.execute("DELETE FROM trials WHERE trial_id = 2")
        database.commit()
    table = read_table(copy)
    assert len(table.points) == 27 and sum(math.isnan(run.loss) for run in table.points) == 1


def test_what_is_in_a_log_beside_a_database_counts(tmp_path):
    """trackio's files are in this mode; here the program that writes one is still running."""
    copy = tmp_path / "widths.db"
    copy.write_bytes(gzip.decompress((LOGS / "trackio-widths.db.gz").read_bytes()))
    with contextlib.closing(sqlite3.connect(copy)) as database:
        database.execute("PRAGMA journal_mode = WAL")
        database.execute("""UPDATE metrics SET metrics = '{"val/loss": 9.5}' WHERE step = 2""")
        database.commit()
        assert {run.loss for run in read_table(copy).points} == {9.5}


def test_a_database_is_not_written_next_to(tmp_path):
    copy = tmp_path / "study.db"
    copy.write_bytes(gzip.decompress((LOGS / "optuna.db.gz").read_bytes()))
    read_table(copy)
    assert [path.name for path in tmp_path.iterdir()] == ["study.db"]


# ---- tables in every dialect ----------------------------------------------------------------------------------------

RUNS = [Point({"width": w}, lr, 0, 3.125 + lr, "runs") for w in (64, 128) for lr in (0.001, 0.5)]


def written(path, separator=",", mark=".", header="width,lr,seed,loss", quote="", percent=False, encoding="utf-8"):
    def number(value):
        text = f"{value * 100:g}%" if percent else f"{value:g}"
        return f"{quote}{text.replace('.', mark)}{quote}"

    lines = [header.replace(",", separator)]
    for run in RUNS:
        rate, loss = number(run.value), f"{quote}{run.loss:.4f}{quote}".replace(".", mark)
        lines.append(separator.join([str(run.sizes["width"]), rate, "0", loss]))
    path.write_bytes("\r\n".join(lines).encode(encoding))
    return path


@pytest.mark.parametrize(
    "dialect",
    [
        {"separator": ";"},
        {"separator": "\t"},
        {"separator": "|"},
        {"separator": ";", "mark": ","},
        {"separator": "\t", "mark": ",", "encoding": "utf-16"},
        {"quote": '"', "mark": ","},
        {"separator": ";", "quote": "'", "header": "WIDTH,Learning_Rate,Seed,Val/Loss"},
        {"percent": True, "encoding": "utf-8-sig"},
        {"separator": ";", "percent": True, "mark": ","},
        {"header": "config/n_embd,config/lr,config/seed,eval_loss"},
    ],
)
def test_a_table_may_be_in_any_dialect(tmp_path, dialect):
    assert read_points(written(tmp_path / "runs.csv", **dialect)) == RUNS


def test_how_numbers_were_read_is_said(tmp_path):
    notes = read_table(written(tmp_path / "runs.csv", separator=";", percent=True, mark=",")).notes
    assert {"numbers have a decimal comma", "lr is in percent: 1 % is 0.01"} <= {*notes}
    path = written(tmp_path / "excel.csv", separator=";")
    path.write_text("sep=;\n" + path.read_text())
    assert read_points(path) == [Point(run.sizes, run.value, 0, run.loss, "excel") for run in RUNS]
    with pytest.raises(TransferError, match="row 3, column loss"):
        path.write_text("sep=;\nwidth;lr;loss\n64;1;x\n")
        read_points(path)


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        (
            "width;lr;loss\n64;1;3,125\n128;1;2,875\n",
            "column loss: '3,125' may have a decimal comma or a separator of th",
        ),
        (
            "width;lr;loss\n64;0,01;3.5\n128;1;2.5\n",
            "column lr: '0,01' has a comma and .* has a point; write all with a p",
        ),
        ("width;lr;loss\n1.024,5;1;3\n", "column width: '1.024,5' has a separator of thousands; write 1024,5"),
        ("width;lr;loss\n64;1;1,234,567\n", "'1,234,567' has a separator of thousands; write 1234567"),
        ("width;lr;loss\n1'024;1;3\n", '"1\'024" has a separator of thousands; write 1024'),
        ('width,lr,loss\n"1 024",1,3\n', "'1 024' has a separator of thousands; write 1024"),
        ('width,lr,loss\n"1,024",1,3\n', "'1,024' may have a decimal comma or a separator of thousands; write"),
        ("width,lr,loss\n64,1%,3\n64,0.02,3\n", "column lr: some values are in percent; write all alike"),
        ("width,lr,loss\n64%,1,3\n", "column width: '0.64' should be a positive whole number"),
        ("width,lr,loss,val_loss\n,,,\n", "a header but no rows"),
        ("n_embd,lr,val_loss,test_loss\n64,1,3,4\n", "loss may be any of val_loss, test_loss"),
        ("n_embd,d_model,lr,loss\n64,128,1,3\n", "width may be any of n_embd, d_model"),
        ("width,lr,random_seed,rng_seed,loss\n64,1,0,1,3\n", "seed may be any of rng_seed, random_seed"),
        ("head_dim,lr,loss\n64,1,3\n", "no column width in the header"),
        ("width,min_lr,loss\n64,1,3\n", "no column lr in the header"),
        (
            "width,lr,step,loss\n64,1,0,3\n64,1,1,2\n",
            "differs in step: if these are steps of one run, .* --loss last or min",
        ),
    ],
)
def test_what_is_ambiguous_is_refused(tmp_path, text, fault):
    (tmp_path / "runs.csv").write_text(text)
    with pytest.raises(TransferError, match=fault) as told:
        read_points(tmp_path / "runs.csv")
    assert "\n" not in str(told.value)


def test_columns_that_hold_the_same_are_one(tmp_path):
    (tmp_path / "runs.csv").write_text("n_embd,hidden_size,lr,max_lr,loss\n64,64.0,1e-3,,3\n128,128,0.001,,2\n")
    table = read_table(tmp_path / "runs.csv")
    assert [run.sizes for run in table.points] == [{"width": 64}, {"width": 128}]
    assert "width is the column n_embd; --columns says otherwise" in table.notes


def test_runs_that_have_not_ended_do_not_count(tmp_path):
    """A tracker exports them with what they had so far; one that ended in nan has diverged."""
    (tmp_path / "runs.csv").write_text(
        "width,lr,State,loss\n64,1,finished,3\n64,2,running,3.5\n64,4,crashed,\n64,8,failed,NaN\n"
    )
    table = read_table(tmp_path / "runs.csv")
    assert [run.value for run in table.points] == [1, 8]
    (doubt,) = table.doubts
    assert doubt.kind == "missing" and "2 of 4 runs do not count: row 3 is running, row 4 is crashed" in doubt.text


@pytest.mark.parametrize("which", ["last", "min"])
def test_a_table_with_a_row_for_each_step(tmp_path, which):
    rows = [f"{w},{lr},{k},{1 + (k - 1) ** 2 + lr}" for w in (64, 128) for lr in (1, 2) for k in (0, 2, 1, 3)]
    (tmp_path / "runs.csv").write_text("\n".join(["width,lr,step,loss", *rows, "128,2,4,"]))
    table = read_table(tmp_path / "runs.csv", loss=which)
    assert [run.loss - run.value for run in table.points] == [5 if which == "last" else 1] * 4 and not table.doubts
    with open(tmp_path / "runs.csv", "a") as file:
        file.write("\n128,2,5,2")
    assert [doubt.kind for doubt in read_table(tmp_path / "runs.csv", loss=which).doubts] == ["steps"]
    with open(tmp_path / "runs.csv", "a") as file:
        file.write("\n128,2,5,2.5")
    with pytest.raises(TransferError, match="row 20: .* is there twice"):
        read_table(tmp_path / "runs.csv", loss=which)
    (tmp_path / "flat.csv").write_text("width,lr,loss\n64,1,3\n")
    with pytest.raises(TransferError, match="--loss .*: .* has no column of steps"):
        read_table(tmp_path / "flat.csv", loss=which)


def test_tables_of_json(tmp_path):
    records = [
        {"config": {"n_embd": run.sizes["width"]}, "lr": run.value, "loss": run.loss, "tags": []} for run in RUNS
    ]
    (tmp_path / "runs.jsonl").write_text("\n".join(map(json.dumps, records)))
    (tmp_path / "runs.json").write_text(json.dumps(records, indent=1))
    assert read_points(tmp_path / "runs.jsonl") == read_points(tmp_path / "runs.json") == RUNS
    (tmp_path / "runs.jsonl").write_text('{"lr": 1}\n[2]\n{"lr": 3}\n')
    with pytest.raises(TransferError, match="row 2: no JSON object"):
        read_points(tmp_path / "runs.jsonl")


def test_other_axes_are_found_by_other_names_too(tmp_path):
    (tmp_path / "runs.csv").write_text("model.num_layers,optim.weight_decay,loss\n2,0.1,3\n4,0.1,2\n")
    points = read_points(tmp_path / "runs.csv", Axes("n_layer", "weight_decay"))
    assert [run.sizes["n_layer"] for run in points] == [2, 4]
