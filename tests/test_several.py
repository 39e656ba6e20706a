"""The report on a plan over several sizes: what it shows of each, before and after the target ran."""

import numpy as np
import pytest
from test_joint import TARGET, WORLD, PlantedEngine

from speedrun_mup.cli import main
from speedrun_mup.plan import (
    Budget,
    JointComparison,
    choose_joint_plan,
    predict_joint,
    run_joint_plan,
    save_joint_plan,
)
from speedrun_mup.report import several
from speedrun_mup.report.several import make_joint_report

NAMES = ("width", "tokens")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("plan") / "mine"
    plan = choose_joint_plan(TARGET, NAMES, Budget(share=0.2))
    save_joint_plan(plan, out, Budget(share=0.2))
    engine = PlantedEngine(plan.places[0])
    assert run_joint_plan(plan, out, engine).complete
    predict_joint(out)
    return out


@pytest.fixture
def measured(monkeypatch, folder):
    """A target that ran, 0.01 above what was predicted."""

    def compare(out, run):
        prediction = several.read_joint_prediction(out)
        return JointComparison(prediction, prediction.loss + 0.01, 1.1 * prediction.lr_scale, 0.05)

    monkeypatch.setattr(several, "compare_joint", compare)
    monkeypatch.setattr(several, "target_facts", lambda run, command: [])
    return make_joint_report(folder, target=folder)


@pytest.mark.slow
def test_there_is_a_panel_for_each_size_from_the_base_to_the_target(folder):
    report = make_joint_report(folder)
    plan, _ = several.read_joint_plan(folder)
    rates, losses = report.sections[0].figures
    for figure in (rates, losses):
        assert [panel.title.split("\n")[0].split(":")[0] for panel in figure.panels] == list(NAMES)
        for panel, name in zip(figure.panels, NAMES, strict=True):
            line = next(mark for mark in panel.marks if mark.kind == "line")
            assert line.x[-1] == pytest.approx(plan.sizes[name] / plan.places[0][name])
            points = next(mark for mark in panel.marks if mark.name == "proxy")
            assert len(points.x) == len(plan.places) == len(points.notes)
    slope = np.polyfit(np.log2(rates.panels[1].marks[1].x), np.log2(rates.panels[1].marks[1].y), 1)[0]
    assert slope == pytest.approx(WORLD.drifts["tokens"], abs=0.1)


@pytest.mark.slow
def test_what_the_other_sizes_do_is_taken_off_each_point(folder):
    """With little noise, points of one size lie on the line of their panel whatever their other sizes are."""
    for figure, tolerance in zip(make_joint_report(folder).sections[0].figures, (0.25, 0.03), strict=True):
        for panel in figure.panels:
            line = next(mark for mark in panel.marks if mark.kind == "line")
            points = next(mark for mark in panel.marks if mark.name == "proxy")
            scale = np.log2 if figure.y.scale == "log" else np.asarray
            expected = np.interp(np.log2(points.x), np.log2(line.x), scale(line.y))
            assert np.abs(scale(points.y) - expected).max() < tolerance


@pytest.mark.slow
def test_the_verdict_is_about_sizes_with_a_rule(folder):
    report = make_joint_report(folder)
    assert (
        report.verdict == "PASS"
        and "over width" in report.meaning
        and "No rule is in force for tokens" in report.meaning
    )
    assert [row[5] for row in report.sections[0].tables[0].rows] == ["PASS", "none: followed"]


@pytest.mark.slow
def test_the_answer_comes_first_and_says_what_the_target_did(folder, measured):
    assert make_joint_report(folder).answer[0].startswith("At width 256, tokens 2097152 use `--lr-scale ")
    assert "nothing yet" in make_joint_report(folder).answer[2]
    assert (
        "missed by +0.0100 nats; inside" in measured.answer[2]
        and "2^+0.14 times the predicted one" in measured.answer[3]
    )
    for panel in measured.sections[0].figures[1].panels:
        square, diamond = (
            next(mark for mark in panel.marks if mark.name == name) for name in ("predicted", "measured")
        )
        assert diamond.y[0] - square.y[0] == pytest.approx(0.01) and diamond.x == pytest.approx(square.x)


@pytest.mark.slow
def test_the_command_writes_the_page(folder, tmp_path, capsys):
    assert main(["report", str(folder), "--out", str(tmp_path)]) == 0
    told = capsys.readouterr().out
    assert "use --lr-scale" in told and "page " in told and "tokens: drift -0." in told
    assert (tmp_path / "rate-by-size.png").stat().st_size > 5000 and (tmp_path / "loss-curves-width.png").exists()
    assert "Size by size" in (tmp_path / "report.html").read_text()
