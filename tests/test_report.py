"""Reports: the figures, and the three ways to write them down."""

import dataclasses
import json
import math
import random
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY
from helpers.browser import Browser, find_browser
from PIL import Image
from test_transfer import control, sweep
from torch import nn

from speedrun_mup.cli import main
from speedrun_mup.commands.report import _guide
from speedrun_mup.config import computed_settings, make_config
from speedrun_mup.coord_check import coord_check
from speedrun_mup.core import mup
from speedrun_mup.core.errors import ConfigError
from speedrun_mup.pictures import PictureError
from speedrun_mup.plan import compare, make_plan, predict, read_plan
from speedrun_mup.report import figures, png
from speedrun_mup.report.checks import check_figure
from speedrun_mup.report.contents import Axis, Figure, Key, Mark, Panel, Report, Section, Table
from speedrun_mup.report.markdown import escape, to_markdown
from speedrun_mup.report.page import to_html
from speedrun_mup.report.runs import smooth
from speedrun_mup.report.sections import make_report
from speedrun_mup.report.words import terms
from speedrun_mup.report.write import write_report
from speedrun_mup.sweep import (
    RunResult,
    Sweep,
    measure_sweep,
    pick_arms,
    read_results,
    run_sweep,
)
from speedrun_mup.training import train
from speedrun_mup.training.flops import run_flops
from speedrun_mup.transfer import Axes, Doubt, Point, TransferError, measure_transfer, read_points

PUBLISHED = Path(__file__).parent.parent / "docs" / "experiments" / "width-transfer" / "all"
CSV = Path(__file__).parent / "data" / "transfer_sweep.csv"


@pytest.fixture(scope="module")
def result():
    """Two arms, one of them a control with a cliff and a lone seed."""
    runs = sweep(seeds=(0, 1), grid=range(-2, 3)) + control(-1.0, seeds=(0,), grid=range(-2, 3), cliff=1.5)
    return measure_transfer(runs, controls={"sp": -1.0}, resamples=100)


class PlantedEngine:
    """Trains nothing: a bowl whose optimum stays in mup and falls by an octave per doubling in adam-sp."""

    workers = 1

    def run(self, cells, scratch):
        for cell in cells:
            u = cell.log2_factor - 0.3 + (cell.arm == "adam-sp") * math.log2(cell.size / 32)
            loss = 2.5 + 4 * cell.size**-0.5 + 0.03 * u * u + random.Random(cell.id).gauss(0, 0.002) + 0.01 * cell.seed
            bad = u > 3.2
            curve = np.linspace(4.85, loss, cell.cfg.iterations)[: 3 if bad else None].round(6).tolist()
            loss = math.nan if bad else loss
            done = (loss, loss, bad, "nan" * bad, curve, 2.0, 1.0, cell.flops * len(curve) / cell.cfg.iterations)
            made_with = {"speedrun_mup": "1", "source_sha256": "0" * 64, "torch": "2", "device": "none"}
            place = (cell.id, cell.arm, dict(cell.sizes), cell.log2_factor, cell.seed)
            yield cell, RunResult(*place, *done, cell.corpus, cell.vocab_size, computed_settings(cell.cfg), made_with)

    def close(self):
        pass


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    """The folder of a planned sweep with a control, and the folder of the target run that it predicted."""
    out = tmp_path_factory.mktemp("report") / "swept"
    target = make_config("laptop", TINY | {"width": 128, "out": str(out.parent / "runs"), "save": False})
    plan = make_plan(target, out, PlantedEngine(), budget_flops=1e15)
    base = plan.sweeps[0].base
    both = Sweep(base, (16, 32, 64), pick_arms(["adam-sp", "mup"]), seeds=(0, 1))
    assert run_sweep(both, out, PlantedEngine(), progress=False).complete
    predict(out)
    return out, train(dataclasses.replace(target, name="target")).folder


@pytest.fixture(scope="module")
def check_file(tmp_path_factory):
    """What a coordinate check of a very small network wrote, with one control."""

    def plain(width):
        return nn.Sequential(nn.Linear(8, width), nn.ReLU(), nn.Linear(width, width), mup.MuReadout(width, 4))

    def build_model(width):
        return mup.set_base_shapes(plain(width), plain(16), delta=plain(32))

    x = torch.randn(5, 64, 8, generator=torch.Generator().manual_seed(0))
    check = coord_check(
        build_model,
        widths=[16, 32, 64],
        data=zip(x, x[..., :4].argmax(dim=-1)),
        loss=lambda model, batch: nn.functional.cross_entropy(model(batch[0]), batch[1]),
        optimizer=lambda model: mup.MuAdam(model, lr=0.003),
    )
    path = tmp_path_factory.mktemp("check") / "small" / "coord-check.json"
    path.parent.mkdir()
    path.write_text(check.to_json())
    return path


@pytest.fixture(scope="module")
def whole(swept, check_file):
    """A report with everything in it."""
    out, run = swept
    return make_report(out, measure_sweep(out), [check_file], run)


@pytest.mark.slow
def test_losses_are_told_in_bits_per_byte_too_where_the_runs_have_them(swept, whole, monkeypatch, capsys):
    out, run = swept
    assert not any("bits per byte" in line for line in whole.answer)
    known = [dataclasses.replace(each, bits_per_byte=1.4 * each.loss) for each in read_results(out)]
    monkeypatch.setattr("speedrun_mup.sweep.measure.read_results", lambda folder: known)
    planned = make_report(out, measure_sweep(out), target=run).answer
    main(["transfer", str(out), "--predict", "128", "--tested", "mup"])
    assert "bits per byte" not in capsys.readouterr().out
    monkeypatch.setattr("speedrun_mup.sweep.read_results", lambda folder: known)
    main(["transfer", str(out), "--predict", "128", "--tested", "mup"])
    assert "; the loss is about " in capsys.readouterr().out
    expected = read_plan(out)[1].loss
    assert any(f"about {1.4 * expected:.3f} bits per byte." in line for line in planned if line.startswith("Expect"))
    (out / "plan.json").rename(out / "plan.old")
    try:
        alone = make_report(out, measure_sweep(out)).answer
    finally:
        (out / "plan.old").rename(out / "plan.json")
    told = [line for line in alone if "bits per byte" in line]
    assert len(told) == 2 and told[0].startswith("Loss at width 64") and told[1].startswith("Expect")


def section(report, title):
    return next(section for section in report.sections if section.title.startswith(title))


# ---- pictures -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("figure", "suffix"), [(figures.loss_curves, "png"), (figures.loss_curves, "svg"), (figures.drift, "png")]
)
def test_pictures_have_the_same_bytes_every_time(tmp_path, result, figure, suffix):
    first, second = tmp_path / f"first.{suffix}", tmp_path / f"second.{suffix}"
    for path in (first, second):
        drawn = figure(result)
        png.draw(drawn[0] if isinstance(drawn, list) else drawn, path)
    assert first.read_bytes() == second.read_bytes() and first.stat().st_size > 5000


@pytest.mark.slow
def test_titles_of_two_lines_and_the_colors_survive_into_the_file(tmp_path, result, monkeypatch):
    titles = []
    monkeypatch.setattr("matplotlib.axes.Axes.set_title", lambda self, text, **style: titles.append(text))
    figure = figures.drift(result)
    png.draw(figure, tmp_path / "drift.png")
    assert titles == [panel.title for panel in figure.panels] and all("\n" in title for title in titles)
    with Image.open(tmp_path / "drift.png") as picture:
        colors = {color for _, color in picture.convert("RGB").getcolors(1 << 20)}
    for wanted in (figures.ARM_COLORS[0][0], figures.ARM_COLORS[1][0]):
        red, green, blue = bytes.fromhex(wanted[1:])
        assert min(abs(r - red) + abs(g - green) + abs(b - blue) for r, g, b in colors) < 12


def test_a_legend_is_as_wide_as_its_picture_and_a_zero_has_no_minus():
    keys = [Key(label, "line") for label in ("width 32", "width 64", "a rather long name of an arm")]
    assert [png._columns(keys, width) for width in (1.0, 3.5, 9.0)] == [1, 2, 3]
    told = figures.signed(-0.004), figures.signed(-0.006), figures.interval_text(None)
    assert told == ("+0.00", "\N{MINUS SIGN}0.01", "unknown")


def test_no_picture_of_nothing():
    with pytest.raises(TransferError, match="for a picture"):
        figures.loss_curves(measure_transfer([Point({"width": 64}, 1.0, 0, 3.0)]))
    with pytest.raises(TransferError, match="no arm has a drift"):
        figures.drift(measure_transfer(sweep(widths=(64,))))


def test_the_curves_of_the_figure_are_those_of_the_measurement(result):
    (figure,) = figures.loss_curves(result)
    assert [panel.title.split("\n")[0] for panel in figure.panels] == ["Standard parametrization", "muP"]
    fit = result.arms["mup"].fits[1]
    marks = [mark for mark in figure.panels[1].marks if mark.tags.get("width") == str(fit.size)]
    seeds, bowl, means, best, _ = marks
    assert len(seeds.x) == fit.table.losses.size
    assert np.allclose(means.y, fit.table.mean) and np.allclose(np.log2(means.x), fit.table.log2_value)
    assert np.allclose(np.log2(best.x), fit.optimum) and best.y[0] == result.arms["mup"].best_loss(fit).value
    assert min(bowl.y) == pytest.approx(float(fit.quadratic.min_loss[0]), abs=1e-4)
    crosses = [mark for mark in figure.panels[0].marks if mark.kind == "cross"]
    assert [np.log2(mark.x).tolist() for mark in crosses] == [
        list(fit.table.diverged) for fit in result.arms["sp"].fits
    ]


def test_drift_lines_meet_at_the_base_width_and_have_the_measured_slope(result):
    figure = figures.drift(result)
    marks = [mark for panel in figure.panels for mark in panel.marks]
    for name, arm in result.arms.items():
        (line,) = [mark for mark in marks if mark.kind == "line" and mark.tags["arm"] == name]
        slope, at_zero = np.polyfit(np.log2(line.x), line.y, 1)
        assert slope == pytest.approx(arm.drift.value) and at_zero + slope * math.log2(arm.base_size) == pytest.approx(
            0
        )
    bands = [mark for mark in marks if mark.kind == "band"]
    assert len(bands) == 4 and all((np.asarray(band.low) <= band.high).all() for band in bands)


def test_the_pair_that_a_reader_compares_stands_alone_and_other_arms_behind_it():
    runs = read_points(PUBLISHED / "runs.csv")
    result = measure_transfer(runs, controls={"adam-sp": -1.0}, tested=["mup"], base_size=64, resamples=100)
    report = make_report(PUBLISHED / "runs.csv", result)
    pair, others = report.figures[:2]
    assert (
        pair.x == others.x and pair.x.label == "learning rate (factor)" and "times what was tuned" in report.answer[0]
    )
    assert [panel.title.split("\n")[0] for panel in pair.panels] == ["Standard parametrization (Adam)", "muP"]
    assert [panel.tags["arm"] for panel in others.panels] == ["adam-mup", "record26"]
    lines = [mark for mark in pair.panels[1].marks if mark.marked]
    assert len(lines) == 4 and len({mark.symbol for mark in lines}) == 4 == len({mark.color for mark in lines})
    panels = figures.drift(result).panels
    assert len(panels) == 4 and all(sum(mark.kind == "band" for mark in panel.marks) == 2 for panel in panels)


def test_arms_that_agree_do_not_hide_one_another(result):
    marks = [mark for mark in figures.best_losses(result).panels[0].marks if mark.kind == "points"]
    assert len({mark.x[0] for mark in marks}) == len(marks) and len({mark.symbol for mark in marks}) == 2
    assert all(abs(math.log2(mark.x[0] / float(mark.tags["width"]))) < 0.2 for mark in marks)


def test_a_smoothed_curve_begins_and_stays_among_the_data():
    noise = random.Random(0)
    losses = [2.5 + 3 * math.exp(-step / 15) + noise.gauss(0, 0.05) for step in range(400)]
    smoothed = smooth(losses)
    assert smoothed[0] == losses[0] and abs(smoothed[-1] - 2.5) < 0.03
    assert max(abs(one - 2.5 - 3 * math.exp(-step / 15)) for step, one in enumerate(smoothed)) < 0.2
    assert np.std(np.diff(smoothed[100:300])) < 0.2 * np.std(np.diff(losses[100:300]))


# ---- contents -------------------------------------------------------------------------------------------------------


def test_a_table_gives_a_report_that_says_what_is_absent(tmp_path):
    result = measure_transfer(sweep())
    report = make_report(CSV, result)
    for title, command in (
        ("Training curves", "`speedrun-mup sweep`"),
        ("Cost", "`speedrun-mup sweep`"),
        ("Coordinate check", "`speedrun-mup coord-check`"),
        ("Loss at the best", f"`speedrun-mup transfer {CSV} --predict WIDTH`"),
    ):
        assert command in section(report, title).text[0]
    assert {figure.name for figure in report.figures} == {"loss-curves", "drift", "best-loss"}
    assert report.figures[0].x.label == "learning rate"


def test_a_pass_without_a_control_says_so_in_the_headline(whole):
    lone = make_report(CSV, measure_transfer(sweep()))
    assert lone.verdict == "PASS" and to_markdown(lone).startswith(f"# {CSV.stem}: PASS (without a control)\n")
    assert '<span class="verdict WARN">PASS (without a control)</span>' in to_html(lone)
    assert '<span class="verdict PASS">PASS</span>' in to_html(whole)


@pytest.mark.slow
def test_of_a_strangers_table_only_what_it_tells_is_said(tmp_path, swept):
    """Not that its loss is that of a validation, per token; nor what to expect of widths beyond runs that are not alike."""
    result = measure_transfer(sweep())
    report = make_report(CSV, result)
    use, loss, expect = report.answer
    assert use.startswith("Use a learning rate of ") and "nats" not in loss and loss.startswith("Loss at width ")
    assert expect.startswith("Expect ") and dict(report.facts)["Runs"].endswith(f" that count, of the table {CSV.name}")
    assert (
        report.terms["learning rate"] == "As it stands in the table." and "not trained on" not in report.terms["loss"]
    )
    assert make_report(swept[0], measure_sweep(swept[0])).terms == terms(Axes("width", "lr_scale"), factors=True)
    doubt = Doubt("depth", "depth has 2 values in these runs")
    unknown = make_report(CSV, measure_transfer(sweep(), doubts=[doubt])).answer[-1]
    assert unknown == (
        "What to expect of a wider model is not known: there are doubts about these runs (depth), see below."
    )


def test_one_width_has_no_drift_and_still_a_report():
    report = make_report(CSV, measure_transfer(sweep(widths=(64,))))
    assert "extend the sweep" in section(report, "Drift").text[0] and not section(report, "Drift").figures


def test_a_sweep_gives_everything(whole):
    assert [figure.name for figure in whole.figures] == [
        "loss-curves", "drift", "best-loss", "training-curves", "cost", "coord-check"
    ]  # fmt: skip
    assert whole.verdict == "PASS" and whole.switches == {"arm": ["mup", "adam-sp"], "width": ["16", "32", "64"]}
    assert whole.figures[0].x.label == "learning rate (factor on all)"
    (numbers,) = section(whole, "In numbers").tables
    assert [row[0] for row in numbers.rows] == ["mup", "adam-sp"] and numbers.rows[1][1].startswith("control, −1.00")


def test_a_forecast_of_a_sweep_gives_a_flag_to_paste(swept, capsys):
    """The same number as the report of it, which multiplies the factor with the setting that it turns."""
    main(["transfer", str(swept[0]), "--predict", "128"])
    (rate,) = re.findall(r"- mup: width 128: .*, --lr-scale (\S+) \(90 %", capsys.readouterr().out)
    _, prediction = read_plan(swept[0])
    assert float(rate) == pytest.approx(prediction.lr_scale, rel=1e-3)


@pytest.mark.slow
def test_a_report_begins_with_what_to_do(swept, whole):
    out, run = swept
    _, prediction = read_plan(out)
    low, high = prediction.loss_interval
    use, expect, measured, rate = whole.answer
    assert f"`--lr-scale {prediction.lr_scale:.4g}`" in use and f"{prediction.lr_scale_interval[0]:.4g} to" in use
    assert f"{prediction.loss:.4f} nats per token (90 % interval {low:.4f} to {high:.4f})" in expect
    comparison = compare(out, run)
    assert (
        measured.startswith(f"Measured: {comparison.measured:.4f}; {comparison.miss}") and "came true" not in measured
    )
    assert f"missed by {comparison.measured - prediction.loss:+.4f} nats; " in measured
    assert f"with {1 / prediction.lr_scale:.3g} times the rate above" in rate
    page, text = to_html(whole), to_markdown(whole)
    assert page.index("--lr-scale") < page.index("stays where it is as") < page.index("<figure")
    assert text.index("--lr-scale") < text.index("stays where it is as") < text.index("![")
    assert "Measured: nothing yet" in make_report(out, measure_sweep(out)).answer[-1]


def test_the_rates_to_use_are_those_that_a_run_with_the_flag_gets(swept, whole):
    out, _ = swept
    target, prediction = read_plan(out)
    (head,) = [row for row in whole.rates.rows if "lm_head" in row[0]]
    assert head[1:] == ["Adam", f"{target.head_lr * prediction.lr_scale:.4g}"] + [head[2]]
    assert whole.rates.header[-1] == f"at width {target.width}"


@pytest.mark.slow
def test_a_report_says_what_was_trained_and_how(swept, whole):
    target, _ = read_plan(swept[0])
    told = dict(make_report(swept[0], measure_sweep(swept[0]), command=["speedrun-mup", "report", "a b"]).facts)
    assert f"{target.n_layer} layers" in told["Model"] and "16 (" in told["Model"] and "Muon" in told["Optimizer"]
    assert told["Tokens"].startswith(f"{target.iterations * target.schedule.at(0).tokens:,} a run")
    assert target.data in told["Data"] and re.match(r"\d{4}-\d\d-\d\d$", told["Trained"])
    assert "speedrun-mup 1;" in told["Code"] and told["Report"].endswith("by `speedrun-mup report 'a b'`")
    assert "Standard parametrization (Adam) `adam-sp` (control)" in told["Arms"]
    assert "widths 16, 32, 64" in told["Asked for"]
    ((name, run),) = set(whole.facts) - set(make_report(swept[0], measure_sweep(swept[0])).facts)
    assert name == "Target run" and run.startswith(f"target, {told['Trained']}, by `") and "commit" in run


def test_a_rate_that_does_not_hold_is_not_recommended():
    result = measure_transfer(control(-1.0, seeds=(0, 1), grid=range(-4, 5)), resamples=100)
    assert result.verdict == "FAIL"
    first, others, *_ = make_report(CSV, result).answer
    assert first.startswith("Best at width") and "does not hold at other widths" in first
    assert all(f"{fit.place}:" in others for fit in result.arms["sp"].usable[1:])


def test_an_arm_that_passes_under_a_verdict_that_does_not_is_told_as_both():
    result = measure_transfer(
        sweep() + [dataclasses.replace(run, arm="two") for run in sweep()], controls={"two": -1.0}
    )
    assert result.verdict == "INCONCLUSIVE" and result.arms["mup"].verdict == "PASS"
    first = make_report(CSV, result).answer[0]
    assert "By itself this arm is a PASS; the whole is INCONCLUSIVE" in first and "with muP" in first


def test_the_link_to_the_documentation_holds_in_a_checkout_and_is_a_name_elsewhere(tmp_path, whole):
    assert _guide(tmp_path) is None and "docs/transfer.md</code> of a checkout" in to_html(whole).replace(
        "<span>", ""
    ).replace("</span>", "")
    beside = _guide(PUBLISHED)
    assert beside == "../../../transfer.md" and (PUBLISHED / beside).exists()
    linked = dataclasses.replace(whole, guide=beside)
    assert f'href="{beside}"' in to_html(linked) and f"[docs/transfer.md]({beside})" in to_markdown(linked)


@pytest.mark.slow
def test_predicted_stands_beside_measured(swept, whole):
    out, run = swept
    comparison, (_, prediction) = compare(out, run), read_plan(out)
    part = section(whole, "Predicted against measured")
    assert part.text == [*prediction.summary().splitlines(), *comparison.summary().splitlines()]
    marks = {mark.name: mark for mark in part.figures[0].panels[0].marks}
    assert marks["predicted"].y == [prediction.loss] and marks["measured"].y == [comparison.measured]
    assert (marks["predicted"].low[0], marks["predicted"].high[0]) == prediction.loss_interval
    waiting = make_report(out, measure_sweep(out))
    assert "give its folder with `--target`" in section(waiting, "Predicted against measured").text[-1]


def test_cost_is_flops_of_the_sweep_over_those_of_the_target(swept, whole):
    out, _ = swept
    target, _ = read_plan(out)
    cells = read_results(out)
    ratio = sum(cell.flops for cell in cells) / run_flops(target, 65)
    part = section(whole, "Cost")
    assert f"all runs {ratio:.1%}" in part.text[1]
    points = {mark.tags.get("arm"): mark for mark in part.figures[0].panels[0].marks if mark.kind == "points"}
    mine = sum(cell.flops for cell in cells if cell.arm == "mup") / run_flops(target, 65)
    assert f"{ratio:.1f} times as much as the run" in part.text[2] and ratio > 1
    assert points[None].y == [pytest.approx(ratio)] and points["mup"].y == [pytest.approx(mine)]
    assert {row[0] for row in part.tables[0].rows} == {"muP", "Standard parametrization (Adam)", "all runs"}


@pytest.mark.slow
def test_the_vocabulary_is_recorded_and_follows_from_the_flops_where_it_was_not(swept):
    """A result of the first edition, under its own names, is read; its vocabulary is known padded."""
    results = read_results(swept[0])
    assert {result.vocabulary for result in results} == {65} and any(result.diverged for result in results)
    for result in results:
        content = json.loads(result.to_json())
        sizes, factor = content.pop("sizes"), content.pop("log2_factor")
        del content["vocab_size"]
        former = RunResult.from_json(
            json.dumps(content | {"width": sizes["width"], "octaves": factor}), Path("result.json")
        )
        same = [repr((one.sizes, one.log2_factor, one.loss, one.curve)) for one in (former, result)]
        assert same[0] == same[1]
        assert former.vocab_size is None and former.vocabulary == 128


def test_training_curves_show_the_judged_rate_first_and_stop_where_a_run_diverged(swept, whole):
    figure = section(whole, "Training curves").figures[0]
    for panel in figure.panels:
        first = [mark for mark in panel.marks if mark.tags["rate"] == figure.choice.options[0]]
        assert [mark.tags["width"] for mark in first] == ["16", "32", "64"]
    fast = {mark.tags["width"]: len(mark.x) for mark in figure.panels[1].marks if mark.tags["rate"] == "8"}
    assert fast == {"16": 6, "32": 6, "64": 3}


def test_long_training_curves_are_averaged_over_neighbouring_steps():
    curve = np.stack([np.arange(1000.0), np.linspace(5, 3, 1000)], axis=1)
    steps, losses = figures._thin(curve)
    assert 100 < len(steps) <= figures.MOST_STEPS and np.allclose(np.interp(steps, curve[:, 0], curve[:, 1]), losses)


def test_a_check_shows_its_slopes_and_its_controls(check_file, whole):
    told = json.loads(check_file.read_text())
    part = section(whole, "Coordinate check")
    assert part.title.endswith(told["verdict"]) and part.text[0].startswith("small: ")
    judged = [row for row in told["arm"]["rows"] if row["verdict"]]
    assert len(part.tables[0].rows) == len(judged) and len(part.tables[1].rows) == len(told["controls"])
    figure = part.figures[0]
    assert len(figure.panels) == 1 + len(told["controls"]) and figure.choice.options[0] == "updates, t = 6"
    last = [mark for mark in figure.panels[0].marks if mark.tags["what"] == "updates, t = 6"]
    assert len(last) == len([series for series in told["arm"]["series"] if series["quantity"] == "effect"])


@pytest.mark.slow
def test_the_picture_of_a_check_has_a_row_for_updates_start_and_activations(check_file, tmp_path, monkeypatch):
    """Next to one for each control; every row has a scale of its own, and names what it shows."""
    labels: list[str] = []
    monkeypatch.setattr("matplotlib.axes.Axes.set_ylabel", lambda self, text: labels.append(text))
    drawn: list[tuple[int, int]] = []
    real = png._draw_mark
    monkeypatch.setattr(
        png, "_draw_mark", lambda axes, mark: (drawn.append(axes.get_subplotspec().num1), real(axes, mark))
    )
    told = json.loads(check_file.read_text())
    png.draw(check_figure(told), tmp_path / "a.png")
    assert [text for text in labels if text] == [
        f"rms of {x}" for x in ("updates, t = 6", "W_0 x_0, t = 0", "activations, t = 6")
    ]
    assert set(drawn) == set(range(3 * (1 + len(told["controls"]))))


@pytest.mark.slow
def test_something_else_is_no_check(tmp_path, swept):
    out, _ = swept
    for text in ("{}", "[1]", "not json"):
        (tmp_path / "other.json").write_text(text)
        with pytest.raises(
            ConfigError, match=r"other.json is not a valid result of a coordinate check .*; give a coord-check"
        ):
            make_report(out, measure_sweep(out), [tmp_path / "other.json"])


# ---- files ----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_files_are_the_same_every_time_and_need_nothing_else(whole, tmp_path):
    page, summary, *pictures = write_report(whole, tmp_path / "a")
    assert (page.name, summary.name) == ("report.html", "report.md") and all(path.exists() for path in pictures)
    told = page.read_text(), summary.read_text()
    assert told == (to_html(whole), to_markdown(whole)) and str(tmp_path) not in "".join(told)
    assert not re.search(r"""(?:src|href)=(?!"#term-)|https?://(?!www\.w3\.org/2000/svg)""", told[0])
    assert told[1].startswith("# swept: PASS\n")
    assert re.findall(r"!\[.*\]\((.*)\)", told[1]) == [path.name for path in pictures]


NASTY = "</script><img src=x onerror=alert(1)>|a"


def test_names_from_a_table_stay_text():
    marks = [Mark("points", [1.0], [math.nan], name=NASTY)]
    figure = Figure("f", NASTY, Axis("x"), Axis("y"), [Panel(NASTY, marks)])
    report = Report(NASTY, "PASS", [NASTY], [Section("s", [], [figure], [Table(["a"], [[NASTY]])])], {})
    page = to_html(report)
    assert "<img" not in page and page.count("</script>") == 2
    data = json.loads(re.search(r'id="report">(.*?)</script>', page, re.S)[1])
    assert data["title"] == NASTY and data["figures"][0]["panels"][0]["marks"][0]["y"] == [None]
    text = to_markdown(report)
    assert "| &lt;/script&gt;&lt;img src=x onerror=alert(1)&gt;\\|a |" in text and "<" not in text


@pytest.mark.parametrize(
    "name, shown",
    [
        ("[click](http://evil.example)", r"\[click\]\(http:&#47;/evil.example)"),
        ("![t](x.png)", r"!\[t\]\(x.png)"),
        ("a\n# title\n- b", "a # title - b"),
        ("# title", r"\# title"),
        ("- item", r"\- item"),
        ("1. item", r"1\. item"),
        ("---", r"\---"),
        ("a|b `<b>` &lt;", r"a\|b \`&lt;b&gt;\` &amp;lt;"),
        ("*b* _i_ ~~s~~ $m$", r"\*b\* \_i\_ \~\~s\~\~ \$m\$"),
        ("\x1b[31mred\u202e", r"\\x1b\[31mred\\u202e"),
        ("lr_scale -2 to 3.5", "lr_scale -2 to 3.5"),
        ("use `--lr-scale 1.5`, not ``x``", r"use `--lr-scale 1.5`, not \`\`x\`\`"),
    ],
)
def test_no_name_acts_as_markdown(name, shown):
    assert escape(name) == shown


@pytest.mark.slow
def test_the_command_says_where_everything_is(tmp_path, capsys):
    out = tmp_path / "new" / "out"
    assert main(["report", str(CSV), "--controls", "adam-const=-1", "--out", str(out)]) == 0
    told = capsys.readouterr().out
    assert "verdict: PASS" in told and f"page     {out / 'report.html'}" in told and "file:///" in told
    assert len(list(out.iterdir())) == 5
    (tmp_path / "file").write_text("")
    assert main(["report", str(CSV), "--out", str(tmp_path / "file")]) > 0
    assert "choose another --out" in capsys.readouterr().err


def test_without_a_plan_there_is_nothing_to_compare(swept, capsys):
    assert main(["report", str(CSV), "--target", str(swept[1])]) > 0
    assert "plan.json is missing or damaged; make a plan first" in capsys.readouterr().err


# ---- the page in a browser ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    path = find_browser()
    if path is None:
        pytest.skip("no Chromium to open the page with: apt install chromium")
    browser = Browser(path, tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


@pytest.fixture
def page(browser, whole, tmp_path):
    """The page with everything in it, opened; afterwards it must have had nothing to complain about."""
    file = tmp_path / "report.html"
    file.write_text(to_html(whole))
    browser.complaints.clear()
    browser.requests.clear()
    browser.open(file.as_uri())
    yield browser
    assert browser.complaints == [] and browser.requests == [file.as_uri()]
    assert "NaN" not in browser.run("document.body.innerHTML.replace(/<script.*?<\\/script>/gs, '')")


MARKS = "document.querySelectorAll('#{} .mark').length"


def shown(page, figure):
    """How many panels and how many marks of a figure are to be seen."""
    panels = f"[...document.querySelectorAll('#{figure} .panel')].filter((panel) => !panel.hidden).length"
    return page.run(panels), page.run(MARKS.format(figure))


def test_the_page_draws_every_figure_offline(page, whole):
    assert page.run("document.body.dataset.drawn") == str(len(whole.figures))
    for figure in whole.figures:
        panels, marks = shown(page, figure.name)
        assert panels == len(figure.panels) and marks > 0
    assert page.run("document.title") == "swept: PASS" and "PASS" in page.run("document.querySelector('h1').innerText")
    assert page.run("document.querySelectorAll('section').length") == len(whole.sections)


def test_arms_and_widths_can_be_switched_off_and_on(page):
    before = shown(page, "loss-curves")
    page.click("button[data-value='64']")
    panels, marks = shown(page, "loss-curves")
    assert panels == before[0] == 2 and marks < before[1]
    page.click("button[data-value='adam-sp']")
    assert shown(page, "loss-curves")[0] == shown(page, "training-curves")[0] == 1
    assert shown(page, "drift")[1] < before[1]
    page.click("button[data-value='64']")
    page.click("button[data-value='adam-sp']")
    assert shown(page, "loss-curves") == before


def test_axes_change_between_linear_and_logarithmic(page):
    ticks = "[...document.querySelectorAll('#loss-curves svg text')].map((text) => text.textContent).join()"
    assert "20" in page.run(ticks) and "2−1" in page.run(ticks)
    button = "#loss-curves .tools button:nth-of-type({})"
    page.click(button.format(1))
    assert "2−1" not in page.run(ticks) and "8" in page.run(ticks).split(",")
    before = page.run(ticks)
    page.click(button.format(2))
    page.click(button.format(3))
    assert page.run(ticks) != before
    assert page.run("document.querySelector('#drift .tools').innerText") == "log x"  # its shifts may be negative


def test_pointing_at_a_mark_tells_its_numbers(page, swept):
    x, y = page.run(
        "(() => { const marks = [...document.querySelectorAll('#loss-curves .panel:last-child path.mark')];"
        "const diamond = marks.filter((mark) => mark.getAttribute('stroke') === 'var(--ground)').at(-1);"
        "diamond.scrollIntoView({block: 'center'}); const box = diamond.getBoundingClientRect();"
        "return [box.x + box.width / 2, box.y + box.height / 2]; })()"
    )
    tip = "document.getElementById('tip')"
    assert page.run(f"{tip}.hidden")
    page.point(x, y)
    best = measure_sweep(swept[0]).arms["mup"].fits[-1]
    told = page.run(f"{tip}.innerText").splitlines()
    assert told[0] == "muP, width 64: best learning rate" and f"curvature {best.curvature:.4f}" in told[3]
    assert not page.run(f"{tip}.hidden") and page.run("document.querySelectorAll('.ring').length") == 1
    page.point(1, 1)
    assert page.run(f"{tip}.hidden") and page.run("document.querySelectorAll('.ring').length") == 0


def test_the_reader_picks_the_learning_rate_of_training_curves(page, whole):
    choice = section(whole, "Training curves").figures[0].choice
    lines = (
        "[...document.querySelectorAll('#training-curves polyline')].map((line) => line.getAttribute('points')).join()"
    )
    seen = set()
    for option in choice.options[1:]:
        page.run(
            f"(() => {{ const select = document.querySelector('#training-curves select'); select.value = '{option}';"
            "select.dispatchEvent(new Event('change')); })()"
        )
        seen.add(page.run(lines))
    assert len(seen) == len(choice.options) - 1


@pytest.fixture(params=[360, 768, 1400])
def sized(page, request):
    """The page in a window of a phone, a tablet, a desk."""
    page.call(
        "Emulation.setDeviceMetricsOverride",
        width=request.param,
        height=800,
        deviceScaleFactor=1,
        mobile=request.param < 500,
    )
    page.run("new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")
    yield page
    page.call("Emulation.clearDeviceMetricsOverride")


def test_no_window_needs_sideways_scrolling_and_figures_fill_it(sized):
    assert sized.run("document.documentElement.scrollWidth <= innerWidth")
    shares = sized.run(
        "[...document.querySelectorAll('.panels')].map((row) => {"
        "const boxes = [...row.querySelectorAll('.panel:not([hidden])')].map((panel) => panel.getBoundingClientRect());"
        "return Math.max(...boxes.map((box) => box.right)) / document.querySelector('figure').getBoundingClientRect().right;})"
    )
    assert len(shares) == 6 and min(shares) > 0.98


def test_no_label_of_a_figure_lies_over_another(sized):
    overlaps = sized.run(
        "[...document.querySelectorAll('.panel:not([hidden]) svg')].flatMap((svg) => {"
        "const boxes = [...svg.querySelectorAll('text')].map((text) => [text.textContent, text.getBoundingClientRect()]);"
        "const area = svg.getBoundingClientRect();"
        "const cut = boxes.filter(([, box]) => box.left < area.left - 1 || box.bottom > area.bottom + 1);"
        "const apart = (a, b) => a.right <= b.left || b.right <= a.left || a.bottom - 2 <= b.top || b.bottom - 2 <= a.top;"
        "const pairs = boxes.flatMap(([name, a], i) => boxes.slice(i + 1).map(([other, b]) => [name, other, apart(a, b)]));"
        "const over = pairs.filter((pair) => !pair[2]).map((pair) => pair.slice(0, 2).join(' over '));"
        "return [...over, ...cut.map(([name]) => name)];})"
    )
    assert overlaps == []


def test_no_word_of_a_table_is_broken_on_a_phone(page):
    page.call("Emulation.setDeviceMetricsOverride", width=360, height=800, deviceScaleFactor=1, mobile=True)
    broken = page.run(
        "[...document.querySelectorAll('td, th')].flatMap((cell) => {"
        "const walk = document.createTreeWalker(cell, NodeFilter.SHOW_TEXT); const bad = [];"
        "while (walk.nextNode()) for (const found of walk.currentNode.textContent.matchAll(/[A-Za-z0-9.]+/g)) {"
        "const range = document.createRange(); range.setStart(walk.currentNode, found.index);"
        "range.setEnd(walk.currentNode, found.index + found[0].length);"
        "if (range.getClientRects().length > 1) bad.push(found[0]); } return bad; })"
    )
    page.call("Emulation.clearDeviceMetricsOverride")
    assert broken == []


def test_terms_are_explained_under_the_pointer_by_the_keyboard_and_in_print(page):
    ends = (
        "[...document.querySelectorAll('.term')].every((term) => document.querySelector(term.hash)?.tagName === 'DT')"
    )
    assert page.run(ends) and page.run("document.querySelectorAll('.term').length") > 10
    tip = "document.getElementById('tip')"
    page.run("document.querySelector('.term').focus()")
    assert page.run(f"!{tip}.hidden && {tip}.innerText") == terms(Axes(), factors=True)["width"]
    page.run("document.querySelector('.term').blur()")
    assert page.run(f"{tip}.hidden")
    page.run("document.querySelector('aside details').open = false")
    page.run("dispatchEvent(new Event('beforeprint'))")
    assert page.run("document.querySelectorAll('details:not([open])').length") == 0
    page.run("dispatchEvent(new Event('afterprint'))")
    assert not page.run("document.querySelector('aside details').open")


def test_names_from_a_table_stay_text_in_the_browser(browser, tmp_path):
    marks = [Mark("points", [1.0], [2.0], name=NASTY, tags={"arm": NASTY})]
    figure = Figure("f", NASTY, Axis("x"), Axis("y"), [Panel(NASTY, marks)])
    report = Report(NASTY, "PASS", [NASTY], [Section(NASTY, [NASTY], [figure])], {"arm": [NASTY]})
    (tmp_path / "nasty.html").write_text(to_html(report))
    browser.complaints.clear()
    browser.open((tmp_path / "nasty.html").as_uri())
    assert browser.run("document.querySelectorAll('img').length") == 0 and browser.complaints == []
    assert browser.run("document.querySelector('h2').textContent") == NASTY


def test_what_can_be_written_is_written_and_the_rest_is_one_line(tmp_path, capsys, monkeypatch):
    def broken(figure, path):
        raise PictureError(f"{path} cannot be drawn (no reason); all else is there")

    monkeypatch.setattr("speedrun_mup.report.write.draw", broken)
    assert main(["report", str(CSV), "--out", str(tmp_path / "out")]) == 1
    told = capsys.readouterr()
    assert told.err.count("\n") == 1 and "cannot be drawn (no reason)" in told.err and "more of the files" in told.err
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["report.html", "report.md"]
    assert "verdict:" in told.out and "picture" not in told.out


@pytest.mark.slow
def test_a_report_follows_no_link_inside_a_folder_that_may_be_anybody_s(tmp_path, capsys):
    table = tmp_path / "mine.csv"
    shutil.copy(CSV, table)
    victim = tmp_path / "victim"
    victim.mkdir()
    (victim / "report.md").write_text("precious")
    (tmp_path / "mine-report").symlink_to(victim)
    assert main(["report", str(table)]) == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1 and "it is a symbolic link, not a folder" in told
    (tmp_path / "mine-report").unlink()
    (tmp_path / "mine-report").mkdir()
    for name in ("report.md", "report.html", "drift.png"):
        (tmp_path / "mine-report" / name).symlink_to(victim / "report.md")
    assert main(["report", str(table)]) == 0
    assert (victim / "report.md").read_text() == "precious"
    assert not any(path.is_symlink() for path in (tmp_path / "mine-report").iterdir())
