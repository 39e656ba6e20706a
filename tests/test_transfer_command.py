import json
import re
import shlex
from pathlib import Path

import pytest

from speedrun_mup.cli import main
from speedrun_mup.report.figures import loss_curves
from speedrun_mup.transfer import measure_transfer
from speedrun_mup.transfer.table import read_table

TABLE = str(Path(__file__).parent / "data" / "transfer_sweep.csv")


@pytest.mark.slow
def test_the_exit_code_is_the_verdict(capsys):
    assert main(["transfer", TABLE, "--controls", "adam-const=-1"]) == 0
    assert "verdict: PASS" in capsys.readouterr().out
    assert main(["transfer", TABLE]) == 1
    assert "verdict: FAIL" in capsys.readouterr().out
    assert main(["transfer", TABLE, "--controls", "adam-const=1"]) == 1
    assert "did not fail as predicted" in capsys.readouterr().out


def test_json_is_all_that_is_printed(capsys):
    main(["transfer", TABLE, "--controls", "adam-const=-1", "--json"])
    assert json.loads(capsys.readouterr().out)["arms"]["adam-const"]["predicted_drift"] == -1


@pytest.mark.slow
def test_the_base_width_is_the_narrowest_or_the_one_that_is_named(capsys):
    regrets = {}
    for named in ([], ["--base-width", "256"], ["--base-width", "512"]):
        main(["transfer", TABLE, "--controls", "adam-const=-1", "--json", *named])
        arm = json.loads(capsys.readouterr().out)["arms"]["adam-const"]
        regrets[arm["base_size"]] = arm["regret"]["value"]
    assert list(regrets) == [128, 256, 512] and regrets[128] > regrets[256] > regrets[512] == 0


def test_sigma_replaces_a_second_seed(tmp_path, capsys):
    lone = tmp_path / "lone.csv"
    rows = Path(TABLE).read_text().splitlines()
    lone.write_text("\n".join([rows[0], *(row for row in rows[1:] if row.split(",")[3] == "0")]))
    assert main(["transfer", str(lone), "--controls", "adam-const=-1"]) == 1
    assert "the noise is unknown" in (told := capsys.readouterr().out) and "such as --sigma 0.005" in told
    assert main(["transfer", str(lone), "--controls", "adam-const=-1", "--sigma", "0.005"]) == 0


@pytest.mark.parametrize(
    ("arguments", "fault"),
    [
        (["nowhere.csv"], "nowhere.csv: cannot be read"),
        (["."], "sweep.json is missing"),
        ([".", "--controls", "a=-1"], "a sweep, which knows its controls; leave it out"),
        ([TABLE, "--controls", "adam-const"], "give ARM=DRIFT,..., for instance sp=-1"),
        ([TABLE, "--controls", "sp=-1"], "control 'sp' is not among the arms"),
        ([TABLE, "--controls", "sp=nan"], "give every arm once, with a finite drift"),
        ([TABLE, "--controls", "sp=-1,sp=-2"], "give every arm once, with a finite drift"),
        ([TABLE, "--sigma", "0.5"], "--sigma 0.5: runs with several seeds already give the noise; leave it out"),
        ([TABLE, "--base-width", "100"], "--base-size 100: was not run in arm"),
        ([TABLE, "--control", "sp=-1"], "did you mean --controls?"),
        ([TABLE, "--hyperparameter", "dropout"], "no column dropout in the header (arm,width,lr,seed,loss,minutes)"),
        ([TABLE, "--hyperparameter", "Loss"], "hyperparameter loss is a column with another meaning"),
        ([TABLE, "--size", ""], "argument --size: it is empty; give a value"),
        ([TABLE, "--columns", ""], "argument --columns: it is empty; give a value"),
        (["", "--size", "width"], "argument FOLDER|CSV: it is empty; give a value"),
        ([TABLE, "--predict", "0"], "--predict 0: give a width"),
        ([TABLE, "--predict", "9" * 50], "the largest whole number is 2^53"),
        ([TABLE, "--predict", "9" * 15], "give a width, such as 1024"),
    ],
)
def test_wrong_arguments_are_one_line(arguments, fault, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["transfer", *arguments]) > 1
    told = capsys.readouterr().err
    assert fault in told and told.count("\n") == 1 and told.startswith("error: ")


@pytest.mark.slow
def test_a_wider_run_is_predicted(capsys):
    command = ["transfer", TABLE, "--controls", "adam-const=-1", "--predict", "1024"]
    main(command)
    told = capsys.readouterr().out
    tested, _, forecast = told.partition("\nforecast\n")
    assert "verdict: " in tested and forecast.count("width 1024: loss ") == 1 and "adam-const" not in forecast
    main([*command, "--json"])
    (values,) = json.loads(capsys.readouterr().out)["forecasts"].values()
    low, high = values["loss"]["interval_90"]
    assert values["size"] == 1024 and low < values["loss"]["value"] < high
    assert f"loss {values['loss']['value']:.4f} (90 % {low:.4f} to {high:.4f})" in forecast


@pytest.mark.slow
def test_a_size_below_all_that_were_measured_has_no_forecast(capsys):
    assert main(["transfer", TABLE, "--controls", "adam-const=-1", "--predict", "127"]) == 0
    told = capsys.readouterr().out.partition("\nforecast\n")[2]
    assert told == "- mup: none; width 127 is below the smallest measured, 128; ask for one at or above it\n"
    main(["transfer", TABLE, "--controls", "adam-const=-1", "--predict", "128"])
    assert "- mup: width 128: loss " in capsys.readouterr().out


@pytest.mark.slow
def test_an_arm_without_a_forecast_does_not_silence_the_others(tmp_path, capsys):
    table = tmp_path / "runs.csv"
    lines = Path(TABLE).read_text().splitlines()
    table.write_text("\n".join([*lines, *(f"lone,128,{2.0**-k},0,{4 + k / 10},1" for k in range(4))]) + "\n")
    command = ["transfer", str(table), "--controls", "adam-const=-1", "--predict", "1024"]
    main(command)
    forecast = capsys.readouterr().out.partition("\nforecast\n")[2]
    assert "- mup: width 1024: loss " in forecast and "- lone: none; arm lone: a forecast needs two widths" in forecast
    assert main([*command, "--tested", "mup", "--json"]) == 0
    assert list(json.loads(capsys.readouterr().out)["forecasts"]) == ["mup"]


@pytest.mark.slow
def test_another_hyperparameter_is_told_by_its_name(tmp_path, capsys):
    """The same numbers, under a column of another name; the report's words follow."""
    main(["transfer", TABLE, "--controls", "adam-const=-1", "--predict", "1024"])
    as_lr = capsys.readouterr().out
    table = tmp_path / "decay.csv"
    table.write_text(Path(TABLE).read_text().replace("LR,", "Weight_Decay,", 1))
    knob = ["--hyperparameter", "weight_decay", "--controls", "adam-const=-1"]
    assert main(["transfer", str(table), *knob, "--predict", "1024"]) == 0
    told = capsys.readouterr().out
    assert ", hyperparameter weight_decay" in told and "best lr" not in told and ", weight_decay 0.0" in told
    same = [line.rpartition("width 1024")[2].split("; ")[0] for line in (as_lr, told)]
    assert same[0] == same[1].replace("weight_decay", "lr")
    assert main(["report", str(table), *knob]) == 0
    text = (tmp_path / "decay-report" / "report.md").read_text()
    assert (
        "## Drift of the best weight_decay" in text and "learning rate" not in text.partition("## Words used here")[0]
    )


@pytest.mark.slow
def test_the_command_that_a_report_names_measures_the_same(tmp_path, capsys):
    """It runs as it stands, with all that the report was asked with."""
    table = tmp_path / "my runs.csv"
    lines = Path(TABLE).read_text().splitlines()
    header = lines[0].replace("Width", "n embd")
    table.write_text("\n".join([header, *(row for row in lines[1:] if row.split(",")[3] == "0")]))
    flags = ["--columns", "width=n embd", "--controls", "adam-const=-1", "--sigma", "0.005", "--base-size", "256"]
    assert main(["report", str(table), *flags, "--out", str(tmp_path / "out")]) == 0
    capsys.readouterr()
    (command,) = re.findall("`(speedrun-mup transfer .*?)`", (tmp_path / "out" / "report.md").read_text())
    words = shlex.split(command.replace("WIDTH", "4096"))
    assert words[1:3] == ["transfer", str(table)] and set(flags) <= set(words)
    assert main(words[1:]) == 0 and "width 4096: loss" in capsys.readouterr().out


@pytest.mark.slow
def test_two_tables_in_one_folder_have_a_report_each(tmp_path):
    for name in ("a", "b"):
        (tmp_path / f"{name}.csv").write_text(Path(TABLE).read_text())
        assert main(["report", str(tmp_path / f"{name}.csv"), "--controls", "adam-const=-1"]) == 0
    assert {path.parent.name for path in tmp_path.rglob("report.md")} == {"a-report", "b-report"}


@pytest.mark.slow
def test_the_legend_of_loss_curves_explains_every_mark():
    """The pale fit behind a line, the diamond on it, and hollow ones."""
    table = read_table(TABLE)
    for found, hollow in ((table.points, False), ([point for point in table.points if point.value < 0.03], True)):
        result = measure_transfer(found, controls={"adam-const": -1.0})
        some = [fit for arm in result.arms.values() for fit in arm.fits]
        assert any(fit.problems for fit in some) is hollow
        for figure in loss_curves(result):
            labels = [key.label for key in figure.keys]
            assert {"quadratic fit to its points", "best of a width, by the fit"} <= {*labels}
            assert ("does not count" in labels) is any(mark.hollow for panel in figure.panels for mark in panel.marks)
