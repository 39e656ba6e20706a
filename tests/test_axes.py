"""Transfer of any hyperparameter over any size axis, end to end: every number is right, and so is every label."""

import dataclasses
import json
import math
import random
import re

import numpy as np
import pytest
from test_sweep import FakeEngine

from speedrun_mup.cli import main
from speedrun_mup.config import computed_settings
from speedrun_mup.core.errors import ConfigError
from speedrun_mup.core.mup import Update
from speedrun_mup.report.markdown import to_markdown
from speedrun_mup.report.sections import make_report
from speedrun_mup.scaling import run_scaling
from speedrun_mup.sweep import (
    Sweep,
    grid_of,
    measure_sweep,
    pick_arms,
    read_definition,
    read_results,
    run_sweep,
    times,
    write_csv,
)
from speedrun_mup.sweep.spec import tuned_settings
from speedrun_mup.transfer import (
    SIZES,
    Axes,
    Point,
    SizeAxis,
    TransferError,
    Verdict,
    measure_transfer,
    read_points,
    read_table,
)
from speedrun_mup.transfer import loss_forecast as forecast_of
from speedrun_mup.transfer.axes import sized
from speedrun_mup.transfer.points import along, relative_to_rule

OPTIMUM = 2.0**-6.8
FOREIGN = r"(?i)\bwid(th|ths|er|est)\b|narrowest|\blearning|\brates?\b|\blr\b|knob"  # words of other axes


def table(path, size="n_layer", hyperparameter="init_std", drift=0.0, sizes=(4, 8, 16, 32), extra=""):
    """A CSV of two arms: `mup`, whose optimum drifts by `drift` per doubling from OPTIMUM on, and `sp`, by -1."""
    rng = np.random.default_rng(0)
    lines = [f"arm,{size},{hyperparameter},seed,loss{',extra' * bool(extra)}"]
    for arm, slope in (("mup", drift), ("sp", -1.0)):
        for j, value in enumerate(sizes):
            for seed in range(3):
                shift = 0.02 * rng.standard_normal()
                for k in range(-12, -2):
                    u = k - np.log2(OPTIMUM) - slope * j
                    loss = 3.0 + 1.5 * 2.0 ** (-j / 2) + 0.02 * u * u + shift + 0.003 * rng.standard_normal()
                    lines.append(f"{arm},{value},{2.0**k},{seed},{loss:.6f}{extra}")
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.mark.slow
@pytest.mark.parametrize(("drift", "verdict"), [(0.0, "PASS"), (0.5, "FAIL")])
def test_a_hyperparameter_over_depth_from_a_table_to_the_report(tmp_path, capsys, drift, verdict):
    """Not a rate, not width: verdict, forecast, JSON, report and the command that it names."""
    source = table(tmp_path / "runs.csv", drift=drift)
    words = [str(source), "--size", "n_layer", "--hyperparameter", "init_std", "--controls", "sp=-1"]
    assert main(["transfer", *words, "--predict", "64"]) == (verdict == "FAIL")
    told = capsys.readouterr().out
    assert f"verdict: {verdict}" in told and "arm mup, hyperparameter init_std" in told
    assert re.search(r"^ n_layer seeds", told, re.M) and "forecast\n- mup: n_layer 64: loss " in told
    assert not re.search(FOREIGN, told)
    main(["transfer", *words, "--predict", "64", "--json"])
    result = json.loads(capsys.readouterr().out)
    assert result["axes"] == {"size": "n_layer", "hyperparameter": "init_std"}
    arm, forecast = result["arms"]["mup"], result["forecasts"]["mup"]
    assert arm["drift"]["value"] == pytest.approx(drift, abs=0.04) and arm["base_size"] == 4
    assert [entry["size"] for entry in arm["sizes"]] == [4, 8, 16, 32]
    assert arm["sizes"][0]["optimum_log2_value"] == pytest.approx(np.log2(OPTIMUM), abs=0.15)
    assert forecast["size"] == 64 and forecast["log2_value"]["value"] == pytest.approx(-6.8 + 4 * drift, abs=0.3)
    assert forecast["loss"]["value"] == pytest.approx(3.0 + 1.5 / 4, abs=0.1)
    assert main(["report", *words, "--out", str(tmp_path / "report")]) == 0
    for page in ("report.md", "report.html"):
        text = (tmp_path / "report" / page).read_text()
        text = text[text.find("<body>") : text.rfind("<script>")] if page.endswith("html") else text  # figures too
        text = re.sub(r"learning rates with n_layer|one learning rate whatever", "", text)  # what muP and sp are
        assert not re.search(FOREIGN, text), (page, re.search(FOREIGN, text))
    text = (tmp_path / "report" / "report.md").read_text()
    assert "## Loss against init_std" in text and "## Drift of the best init_std" in text
    deeper = "stays where it is as the model gets deeper" if verdict == "PASS" else "does not hold for deeper models"
    assert f"{verdict}: the best init_std {deeper}" in text and "in log2 per doubling of n_layer" in text
    assert "regret at the deepest" in text and "- Values of n_layer: 4, 8, 16, 32" in text
    (named,) = re.findall("`speedrun-mup (transfer .*?)`", text)
    capsys.readouterr()
    assert main(named.replace("N_LAYER", "64").replace("SIZE", "64").split()) == (verdict == "FAIL")
    assert "n_layer 64: loss" in capsys.readouterr().out


@pytest.mark.slow
def test_the_same_numbers_on_other_axes_give_the_same_result(tmp_path):
    """Only the words depend on the axes."""
    plain = measure_transfer(read_points(table(tmp_path / "a.csv", "width", "lr")), controls={"sp": -1.0})
    axes = Axes("n_layer", "lr")
    other = measure_transfer(
        read_points(table(tmp_path / "b.csv", "n_layer", "lr"), axes), axes=axes, controls={"sp": -1.0}
    )
    assert plain.arms["mup"].drift.draws.tolist() == other.arms["mup"].drift.draws.tolist()
    one, two = (forecast_of(result.arms["mup"], 64) for result in (plain, other))
    assert one.loss.draws.tolist() == two.loss.draws.tolist()
    told = other.summary() + str(two)
    for ours, theirs in {"values of n_layer": "widths", "n_layer": "width", "deeper": "wider", "n^": "w^"}.items():
        told = told.replace(ours, theirs)
    assert re.sub(" +", " ", told) == re.sub(" +", " ", plain.summary() + str(one))


def test_a_point_may_have_several_sizes_of_which_one_is_measured(tmp_path):
    """The others must be alike, in a table and from Python; the same table serves either axis."""
    grid = [(width, depth) for width in (64, 128, 256) for depth in (4, 8, 16)]
    rng = np.random.default_rng(1)
    points = [
        Point({"width": w, "n_layer": n}, 2.0**k, s, 3 + 8 / w + 2 / n + 0.03 * k * k + 0.003 * rng.standard_normal())
        for w, n in grid
        for k in range(-3, 4)
        for s in range(2)
    ]
    for size, other in (("width", "n_layer"), ("n_layer", "width")):
        some = [point for point in points if point.sizes[other] == (4 if other == "n_layer" else 64)]
        assert measure_transfer(some, axes=Axes(size)).verdict is Verdict.PASS
    with pytest.raises(TransferError, match="two runs of arm runs, width 64"):
        measure_transfer(points)
    diagonal = [point for point in points if point.sizes["width"] == 16 * point.sizes["n_layer"]]
    result = measure_transfer(diagonal)
    assert result.verdict is Verdict.INCONCLUSIVE and "n_layer has 3 values in these runs" in result.reasons[0]
    assert measure_transfer(diagonal, accept=["n_layer"]).verdict is Verdict.PASS
    lines = [f"{p.sizes['width']},{p.sizes['n_layer']},{p.value},{p.seed},{p.loss}" for p in diagonal]
    (tmp_path / "both.csv").write_text("\n".join(["width,n_layer,lr,seed,loss", *lines]))
    assert read_points(tmp_path / "both.csv", Axes("n_layer"))[0].sizes == {"width": 64, "n_layer": 4}
    with pytest.raises(TransferError, match="a run without a tokens; it has width, n_layer"):
        measure_transfer(points, axes=Axes("tokens"))


@pytest.mark.slow
def test_a_size_axis_is_one_entry(tmp_path, capsys, monkeypatch):
    """Added from here: its words, what other programs call it, and how large it may be."""
    experts = SizeAxis(
        *("experts", "sparser", "sparsest", "denser", "densest"),
        meaning="Number of experts of each layer.",
        also=("num_experts",),
        most=4096,
    )
    monkeypatch.setitem(SIZES, experts.name, experts)
    source = table(tmp_path / "runs.csv", "config.num_experts", "lr")
    words = ["transfer", str(source), "--size", "experts", "--controls", "sp=-1"]
    assert main(words) == 0 and "note: experts is the column config.num_experts; --columns" in capsys.readouterr().out
    words += ["--columns", "experts=config.num_experts"]
    assert main(words) == 0 and re.search("^ experts seeds", capsys.readouterr().out, re.M)
    assert main([*words, "--predict", "5000"]) == 2 and "--predict 5000: give an experts" in capsys.readouterr().err
    assert main(["report", *words[1:], "--out", str(tmp_path / "report")]) == 0
    text = (tmp_path / "report" / "report.md").read_text()
    assert "as the model gets sparser" in text and "**experts**: Number of experts of each layer." in text
    assert not re.search("wid(th|er|est)", text)


def test_axes_that_are_other_columns_are_refused(tmp_path, capsys):
    source = str(table(tmp_path / "runs.csv"))
    for flag, name in (("--size", "loss"), ("--hyperparameter", "arm")):
        assert main(["transfer", source, flag, name]) == 3
        told = capsys.readouterr().err
        assert f"{flag[2:]} {name} is a column with another meaning" in told and told.count("\n") == 1
    for flag, name in (("--size", "lr"), ("--hyperparameter", "width")):
        assert main(["transfer", source, flag, name]) == 3
        assert f"size and hyperparameter are both {name}; name a column for each" in capsys.readouterr().err
    assert main(["transfer", source, "--knob", "arm"]) == 3
    told = capsys.readouterr().err
    assert (
        "note: --knob works for one more release; it is now --hyperparameter\n" in told
        and "hyperparameter arm is" in told
    )
    assert main(["transfer", source, "--size", "depth"]) == 3
    assert "no column depth, lr in the header" in capsys.readouterr().err


class PlantedEngine(FakeEngine):
    """Trains nothing, and says what was computed."""

    def run(self, specs, scratch):
        for spec, result in super().run(specs, scratch):
            yield spec, dataclasses.replace(result, config=computed_settings(spec.cfg))


@pytest.mark.slow
def test_a_sweep_may_be_over_another_size_axis(tiny, tmp_path, capsys):
    """Folder, table, measurement and report carry the axis; the runs are at different depths of one width."""

    def loss_of(spec):
        depth = math.log2(spec.sizes["n_layer"] / 6)
        luck = random.Random(spec.id).gauss(0, 0.002) + 0.01 * spec.seed
        return 2.5 + 4 * spec.cfg.n_layer**-0.5 + 0.03 * (spec.log2_factor - 0.2 - 0.5 * depth) ** 2 + luck

    axes, out = Axes("n_layer", "lr_scale"), tmp_path / "s"
    sweep = Sweep(tiny(), (6, 12, 24), log2_factors=(-3, -2, -1, 0, 1, 2, 3), seeds=(0, 1), axes=axes)
    result = run_sweep(sweep, out, PlantedEngine(loss_of), progress=False)
    assert result.complete and "n_layer 12" in result.summary() and "width" not in result.summary()
    assert {run.sizes["n_layer"] for run in read_results(out)} == {run.config["n_layer"] for run in read_results(out)}
    assert {run.config["width"] for run in read_results(out)} == {64}
    assert read_definition(out)["base"]["size"] == "n_layer" and read_definition(out)["base"]["width"] == 64
    arm = measure_sweep(out).arms["mup"]
    assert arm.drift.value == pytest.approx(0.5, abs=0.05) and arm.verdict is Verdict.FAIL
    assert arm.larger is not None and "deeper is better" in str(arm.larger)
    write_csv(out, tmp_path / "runs.csv")
    points = read_points(tmp_path / "runs.csv", Axes("n_layer"))
    assert len(points) == len(read_results(out)) and points[0].sizes == {"n_layer": 6}
    assert main(["report", str(out)]) == 0
    text = (out / "report" / "report.md").read_text()
    assert "by the n_layer of that run" in text and "is the deeper model the better one?" in text
    with pytest.raises(ConfigError, match="holds another sweep: size was n_layer, is width"):
        run_sweep(Sweep(tiny(), (32, 64)), out, PlantedEngine(loss_of), progress=False)


@pytest.mark.slow
@pytest.mark.parametrize(("size", "sizes", "judged"), [("n_layer", (6, 12, 24), False), ("width", (32, 64, 128), True)])
def test_a_drift_predicted_for_width_says_nothing_about_another_size(tiny, tmp_path, size, sizes, judged):
    """Both arms are flat: over width the control did not fail, over depth it is no control."""

    def loss_of(spec):
        luck = random.Random(spec.id).gauss(0, 0.002) + 0.01 * spec.seed
        return 2.5 + 4 * spec.size**-0.5 + 0.03 * (spec.log2_factor - 0.2) ** 2 + luck

    options = {"arms": pick_arms(["adam-mup", "adam-sp"]), "seeds": (0, 1), "axes": Axes(size, "lr_scale")}
    run_sweep(Sweep(tiny(), sizes, **options), tmp_path / "s", PlantedEngine(loss_of), progress=False)
    result = measure_sweep(tmp_path / "s")
    assert (result.arms["adam-sp"].predicted == -1.0) is judged
    assert result.verdict is (Verdict.INCONCLUSIVE if judged else Verdict.PASS), result.reasons
    assert ("control adam-sp did not fail as predicted" in " ".join(result.reasons)) is judged


# ---------------------------------------------------------------------------------------------------------------------
# Sizes as axes of a sweep
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("axis", "value", "held", "differ"),
    [
        ("width", 128, None, {"width": 128}),
        ("n_layer", 12, None, {"n_layer": 12}),
        ("batch_tokens", 512, None, {"micro_batches": 4}),
        ("batch_tokens", 512, 2048, {"micro_batches": 4, "iterations": 4}),
        ("tokens", 2048, None, {"iterations": 8}),
        ("iterations", 32, None, {"iterations": 32}),
    ],
)
def test_a_run_of_another_size_differs_in_what_the_axis_changes_and_nothing_else(tiny, axis, value, held, differ):
    base = tiny(micro_batches=2, iterations=16, micro_batch_tokens=128)
    cfg = sized(base, {axis: value}, held)
    assert {name: new for name, new in vars(cfg).items() if new != vars(base).get(name)} == differ
    assert SIZES[axis].of(cfg) == value and (held is None or cfg.schedule.tokens == held)


def test_tokens_follow_the_stages_of_a_batch_schedule(tiny):
    base = tiny(micro_batches=2, iterations=12, micro_batch_tokens=128, batch_schedule="1/2:1,1/2:2")
    assert base.schedule.tokens == 12 * 384
    assert sized(base, {"tokens": 24 * 384}).iterations == 24
    assert sized(base, {"batch_tokens": 512, "tokens": 24 * 384}).iterations == 12


@pytest.mark.parametrize(
    ("sizes", "told"),
    [
        ({"batch_tokens": 100}, "batch_tokens=100 is no multiple of micro_batch_tokens=128; try 128"),
        ({"tokens": 1000}, "tokens=1000 is no whole number of steps of 256 tokens; try 1024"),
        ({"tokens": 1024, "iterations": 8}, "tokens=1024 would be 2048 next to iterations"),
    ],
)
def test_sizes_that_no_run_has_are_refused(tiny, sizes, told):
    with pytest.raises(ConfigError, match=told):
        sized(tiny(micro_batches=2, micro_batch_tokens=128), sizes)


@pytest.mark.parametrize(
    ("tuned", "settings"),
    [
        ("adam_lr", ("embed_lr", "head_lr", "scalar_lr")),
        ("muon_lr", ("matrix_lr",)),
        ("embed_lr+head_lr", ("embed_lr", "head_lr")),
        ("muon_lr+adam_lr", ("matrix_lr", "embed_lr", "head_lr", "scalar_lr")),
    ],
)
def test_a_factor_may_be_on_a_set_of_settings(tiny, tuned, settings):
    base = tiny()
    assert set(tuned_settings(base, tuned)) == set(settings)
    cfg = times(base, tuned, 0.5)
    changed = {name for name, value in vars(cfg).items() if value != vars(base).get(name)}
    assert changed == set(settings) and all(getattr(cfg, name) == getattr(base, name) / 2 for name in changed)
    gated = dataclasses.replace(base, attention_gate=True)
    assert ("gate_lr" in tuned_settings(gated, tuned)) == ("adam_lr" in tuned)


def test_an_optimizer_that_no_group_has_cannot_be_swept(tiny):
    with pytest.raises(ConfigError, match="'muon_lr' cannot be swept in arm adam-mup: none of its groups"):
        Sweep(tiny(), (32, 64), pick_arms(["mup", "adam-mup"]), axes=Axes("width", "muon_lr"))
    with pytest.raises(ConfigError, match="'embed_lr.momentum' cannot be swept"):
        Sweep(tiny(), (32, 64), axes=Axes("width", "embed_lr+momentum"))


def bowl(spec):
    """Planted: the best factor falls by 1/3 octave per doubling of the steps and rises by 1/2 with the batch's."""
    steps, batch = (
        math.log2(SIZES[name].of(spec.cfg) / at) for name, at in (("iterations", 16), ("batch_tokens", 256))
    )
    luck = random.Random(spec.id).gauss(0, 0.001) + 0.01 * spec.seed
    return 2 + spec.cfg.schedule.tokens**-0.3 + 0.03 * (spec.log2_factor + steps / 3 - batch / 2) ** 2 + luck


@pytest.mark.slow
@pytest.mark.parametrize(
    ("axis", "values", "held", "drift"),
    [
        ("batch_tokens", (256, 512, 1024), None, 0.5),
        ("batch_tokens", (256, 512, 1024), 4096, 0.5 + 1 / 3),
        ("tokens", (4096, 8192, 16384), None, -1 / 3),
        ("iterations", (16, 32, 64), None, -1 / 3),
    ],
)
def test_planted_drifts_over_batch_and_length_come_back(tiny, tmp_path, axis, values, held, drift):
    """Through the whole sweep: folder, measurement, table; what is held decides what the drift is."""
    out, axes = tmp_path / "s", Axes(axis, "adam_lr")
    base = tiny(micro_batches=2, iterations=16, micro_batch_tokens=128)
    grid = {"log2_factors": (-1, 0, 1), "seeds": (0, 1), "axes": axes, "held_tokens": held}
    result = run_sweep(Sweep(base, values, **grid), out, PlantedEngine(bowl), progress=False)
    assert result.complete and f"{axis} {values[1]}" in result.summary()
    arm = measure_sweep(out).arms["mup"]
    assert arm.drift.value == pytest.approx(drift, abs=0.04) and arm.larger is None and arm.predicted is None
    again = run_sweep(Sweep(base, values, **grid), out, PlantedEngine(bowl), progress=False)
    assert again.complete and again.ran == 0
    write_csv(out, tmp_path / "runs.csv")
    points = read_points(tmp_path / "runs.csv", axes, {"adam_lr": "lr"})
    assert measure_transfer(points, axes=axes).arms["mup"].drift.value == pytest.approx(arm.drift.value, abs=1e-9)


def test_what_is_held_is_part_of_the_folder(tiny, tmp_path):
    base = tiny(micro_batches=2, iterations=16, micro_batch_tokens=128)
    grid = {"log2_factors": (-1, 0, 1), "seeds": (0,), "axes": Axes("batch_tokens", "lr_scale"), "adaptive": False}
    for held in (None, 4096):
        sweep = Sweep(base, (256, 512), held_tokens=held, **grid)
        assert run_sweep(sweep, tmp_path / str(held), PlantedEngine(bowl), progress=False).complete
        other = Sweep(base, (256, 512), held_tokens=8192, **grid)
        with pytest.raises(ConfigError, match=f"holds another sweep: .*held_tokens was {held}, is 8192"):
            run_sweep(other, tmp_path / str(held), PlantedEngine(bowl), progress=False)
    told = "; ".join(Sweep(base, (256, 512), held_tokens=4096, **grid).told())
    assert "axis: batch_tokens 256, 512" in told and "n_layer 6, tokens 4096, and all other settings" in told


@pytest.mark.slow
def test_several_axes_and_designed_sets_of_sizes(tiny, tmp_path):
    """A full grid, and a set of sizes that is none, are swept, resumed and written by name."""
    places = grid_of({"width": (32, 64), "n_layer": (6, 8)})
    assert places[1] == {"width": 32, "n_layer": 8} and len(places) == 4
    grid = {"log2_factors": (-1, 0, 1), "seeds": (0,), "axes": Axes("width", "lr_scale"), "adaptive": False}
    for name, sizes in (("grid", places), ("three", places[:3])):
        out = tmp_path / name
        result = run_sweep(Sweep(tiny(), sizes, **grid), out, PlantedEngine(bowl), progress=False)
        assert result.complete and result.ran == 3 * len(sizes) and "width 32, n_layer 8" in result.summary()
        assert [run.sizes for run in read_results(out)][::3] == list(sizes)
        assert all(run.config["n_layer"] == run.sizes["n_layer"] for run in read_results(out))
        assert run_sweep(Sweep(tiny(), sizes, **grid), out, PlantedEngine(bowl), progress=False).ran == 0
        write_csv(out, out / "runs.csv")
        assert (out / "runs.csv").read_text().startswith("arm,width,n_layer,lr,log2_lr,seed,loss")
    for sizes, told in [
        (places[::3], "width and n_layer vary together in these sizes; add one such as width 32 with n_layer 8"),
        (({"width": 32}, {"n_layer": 6}), "give every run the same axes in the same order"),
        ((places[0], places[0]), "none twice"),
        (
            ({"width": 32, "n_head": 2}, {"width": 64, "n_head": 2}),
            "no setting of a run is called n_head; choose width",
        ),
    ]:
        with pytest.raises(ConfigError, match=told):
            Sweep(tiny(), sizes, **grid)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("", "nothing is scaled; give --widths 32 64 128, or another size"),
        ("--axis n_layer", "--axis n_layer: give its values"),
        ("--axis n_layer=6", "one value shows no drift; give two or more"),
        ("--axis n_layer=6 --axis width=32,64", "hold it with --n-layer 6"),
        ("--axis width=64 --axis n_layer=6,8", "hold it with --widths 64"),
        ("--axis n_layer=6,8 --values 3", "there is no --axis without values"),
        ("--axis n_layer --axis width --values 6 8", "there is --axis n_layer and --axis width"),
        ("--axis n_layer=6,8 --axis n-layer=8", "n_layer is there twice"),
        ("--axis n_layer=6,x", "invalid int value: 'x'"),
        ("--axis n_heads=1,2", "no setting of a run is called n_heads; choose width, n_layer, batch_tokens, tokens"),
        ("--axis tokens=1k,2k", "tokens=1000 is no whole number of steps of 2048 tokens; try 2048"),
        ("--axis batch_tokens=1024,2048 --micro-batches 2", "--micro-batches: the sweep is over batch_tokens"),
        ("--axis n_layer=6,8 --hold tokens", "it is for --axis batch_tokens; along n_layer all else stays"),
        ("--axis batch_tokens=1024,2048 --hold width", "give iterations, tokens, or tokens=N"),
        ("--axis iterations=8,16 --iterations 4", "--iterations: the sweep is over iterations"),
        ("--axis iterations=8,16 --axis tokens=4096,8192", "tokens and iterations are one axis"),
    ],
)
def test_sizes_that_make_no_sweep_are_one_line(words, told, tmp_path, capsys, cache_folder):
    assert main(["sweep", *words.split(), "--data", "synthetic", "--out", str(tmp_path / "s")]) == 2
    said = capsys.readouterr().err
    assert told in said and said.count("\n") == 1 and said.startswith("error: "), said


def test_the_command_scales_what_it_names_and_holds_the_rest(monkeypatch, tmp_path, capsys, cache_folder):
    """Where width is no axis, runs have the width that rates were tuned at, unless another is given."""
    asked = []
    monkeypatch.setattr("speedrun_mup.sweep.run_sweep", lambda sweep, *rest, **options: asked.append(sweep) or 1 / 0)
    common = ["sweep", "--data", "synthetic", "--out", str(tmp_path / "s")]
    for words in (
        "--axis iterations --values 64 128",
        "--axis batch_tokens=1024,2048 --hold tokens=16384 --widths 128 --hyperparameter adam_lr",
        "--axis n_layer=6,12 --widths 32 64",
    ):
        with pytest.raises(ZeroDivisionError):
            main([*common, *words.split()])
    long, batch, both = asked
    assert long.base.width == 64 and long.sizes == (64, 128) and long.axes == Axes("iterations", "lr_scale")
    assert batch.base.width == 128 and batch.held_tokens == 16384 and batch.axes.hyperparameter == "adam_lr"
    assert [spec["n_layer"] for spec in both.sized] == [6, 12, 6, 12] and both.size_names == ("width", "n_layer")
    said = capsys.readouterr().out
    assert (
        "axis: iterations 64, 128; no rules for it" in said and "held: width 64, n_layer 6, batch_tokens 2048" in said
    )
    assert (
        "tuned: embed_lr, head_lr, scalar_lr" in said and "axis: width 32, 64; rules from base_width 64 for it" in said
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("axis", "values", "told"),
    [
        ("batch_tokens", (256, 512, 1024), ("as the batch gets larger", "for larger batches")),
        ("iterations", (16, 32, 64), ("as the run gets longer", "for longer runs")),
    ],
)
def test_a_report_speaks_of_runs_and_batches_and_not_of_models(tiny, tmp_path, axis, values, told):
    """Of a factor on all of Adam's rates too, which is no setting of its own."""
    out, base = tmp_path / "s", tiny(micro_batches=2, iterations=16, micro_batch_tokens=128)
    grid = {"seeds": (0, 1), "axes": Axes(axis, "adam_lr"), "log2_factors": (-2, -1, 0, 1, 2), "adaptive": False}
    run_sweep(Sweep(base, values, **grid), out, PlantedEngine(bowl), progress=False)
    text = to_markdown(make_report(out, measure_sweep(out)))
    assert any(words in text for words in told) and not re.search("(larg|wid|long)(er|est) model", text), text
    assert f"arms mup, {axis} {', '.join(map(str, values))}, octaves" in text
    assert text.count("a run: ") == 3 and "`factor on adam_lr " in text


# ---------------------------------------------------------------------------------------------------------------------
# Several sizes, and sizes that follow
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_of_several_axes_one_is_measured_at_each_place_of_the_others(tiny, tmp_path):
    out, base = tmp_path / "s", tiny(micro_batches=2, iterations=16, micro_batch_tokens=128)
    places = [
        *grid_of({"batch_tokens": (256, 512, 1024), "iterations": (16, 32, 64)}),
        {"batch_tokens": 2048, "iterations": 96},
    ]
    grid = {
        "seeds": (0, 1),
        "axes": Axes("batch_tokens", "lr_scale"),
        "log2_factors": (-2, -1, 0, 1, 2),
        "adaptive": False,
    }
    run_sweep(Sweep(base, tuple(places), **grid), out, PlantedEngine(bowl), progress=False)
    for size, other, drift in (("batch_tokens", "iterations", 0.5), ("iterations", "batch_tokens", -1 / 3)):
        result = measure_sweep(out, size=size)
        assert len(result.arms) == 3 and result.axes.size == size  # 2048 tokens and 96 steps stand alone
        for name, arm in result.arms.items():
            assert re.fullmatch(rf"mup, {other} \d+", name) and arm.drift.value == pytest.approx(drift, abs=0.05)
            assert [fit.size for fit in arm.fits] == list({"batch_tokens": (256, 512, 1024)}.get(size, (16, 32, 64)))
    assert measure_sweep(out).axes.size == "batch_tokens"
    assert "mup, batch_tokens 512" in to_markdown(make_report(out, measure_sweep(out, size="iterations")))
    with pytest.raises(
        ConfigError, match="--size width: .* is a sweep over batch_tokens, iterations; name one of these"
    ):
        measure_sweep(out, size="width")


def test_a_size_with_no_two_alike_in_the_others_cannot_be_measured_by_itself(tiny, tmp_path):
    places = tuple({"width": w, "n_layer": n} for w, n in zip((32, 64, 128, 256), (6, 10, 8, 12)))
    grid = {"seeds": (0,), "log2_factors": (-1, 0, 1), "adaptive": False}
    run_sweep(Sweep(tiny(), places, **grid), tmp_path / "s", PlantedEngine(bowl), progress=False)
    with pytest.raises(ConfigError, match="no two runs differ in width and are alike in n_layer"):
        measure_sweep(tmp_path / "s", size="width")


@pytest.mark.parametrize(
    ("axis", "column", "value", "doubted"),
    [
        ("batch_tokens", "tokens", lambda size: 96 * size, False),
        ("batch_tokens", "steps", lambda size: 2**20 // size, False),
        ("tokens", "iterations", lambda size: size // 1024, False),
        ("iterations", "train_tokens", lambda size: 1024 * size, False),
        ("batch_tokens", "tokens", lambda size: 2**10 * round(size**0.5), True),
        ("batch_tokens", "n_layer", lambda size: size // 256, True),
        ("n_layer", "tokens", lambda size: 1024 * size, True),
        ("width", "n_layer", lambda size: size // 256, True),
    ],
)
def test_what_follows_from_a_size_raises_no_doubt(tmp_path, axis, column, value, doubted):
    """A larger batch means more tokens at as many steps, or fewer steps; what else grows along is another matter."""
    rng, rows = np.random.default_rng(0), []
    for size in (1024, 2048, 4096, 8192):
        for at in range(-2, 3):
            for seed in (0, 1):
                rows.append(
                    (
                        size,
                        2.0**at,
                        seed,
                        3 - math.log(size) / 30 + 0.05 * at**2 + 0.002 * rng.standard_normal(),
                        value(size),
                    )
                )
    lines = [f"{axis},lr,seed,loss,{column}", *(",".join(map(str, row)) for row in rows)]
    (tmp_path / "runs.csv").write_text("\n".join(lines))
    table = read_table(tmp_path / "runs.csv", Axes(axis))
    result = measure_transfer(table.points, axes=table.axes, doubts=table.doubts, notes=table.notes)
    assert bool(result.doubts) is doubted
    assert doubted or f"{column} follows from {axis}" in " ".join(result.notes)
    both = f"measure both: --size {axis} n_layer"
    assert (both in result.reasons[0]) is (column == "n_layer")


def test_a_table_may_have_several_size_columns(tmp_path):
    rows = [(w, n, 2.0**k, 3 + 8 / w + 2 / n + 0.03 * k * k) for w in (64, 128) for n in (4, 8) for k in range(-2, 3)]
    (tmp_path / "runs.csv").write_text(
        "\n".join(["n_embd,n_layer,lr,loss", *(",".join(map(str, row)) for row in rows)])
    )
    points = read_points(tmp_path / "runs.csv", columns={"width": "n_embd"}, more=["n_layer"])
    assert [tuple(point.sizes[name] for name in ("width", "n_layer")) for point in points[::5]] == [
        *zip((64, 64, 128, 128), (4, 8, 4, 8))
    ]
    assert {point.arm for point in along(points, "width", ["width", "n_layer"])} == {
        "runs, n_layer 4",
        "runs, n_layer 8",
    }
    with pytest.raises(TransferError, match="no column tokens in the header"):
        read_points(tmp_path / "runs.csv", columns={"width": "n_embd"}, more=["tokens"])
    with pytest.raises(TransferError, match="width 64, n_layer 4, lr 0.25 is there twice"):
        with open(tmp_path / "runs.csv", "a") as file:
            file.write("\n64,4,0.25,2.9")
        read_points(tmp_path / "runs.csv", columns={"width": "n_embd"}, more=["n_layer"])


@pytest.mark.slow
def test_drift_is_counted_from_what_a_rule_predicts(tmp_path):
    points = read_points(table(tmp_path / "runs.csv", "batch_tokens", "lr", drift=0.5), Axes("batch_tokens"))
    axes = Axes("batch_tokens")
    mine = [point for point in points if point.arm == "mup"]
    assert measure_transfer(mine, axes=axes).verdict is Verdict.FAIL
    right, wrong = (relative_to_rule(mine, {"batch_tokens": drift}, {"batch_tokens": 4}) for drift in (0.5, 1.0))
    assert measure_transfer(right, axes=axes).verdict is Verdict.PASS
    assert measure_transfer(wrong, axes=axes).arms["mup"].drift.value == pytest.approx(-0.5, abs=0.04)


@pytest.mark.parametrize(
    ("names", "fault"),
    [
        (("seed",), "size seed is a column with another meaning"),
        (("width", "arm"), "hyperparameter arm is a column with another meaning"),
        (("",), "the size has no name"),
        (("width", " "), "the hyperparameter has no name"),
        (("lr",), "size and hyperparameter are both lr"),
    ],
)
def test_axes_that_cannot_be_are_refused_where_they_are_made(names, fault):
    with pytest.raises(TransferError, match=fault):
        Axes(*names)


# ---------------------------------------------------------------------------------------------------------------------
# Rules along an axis, and controls that must fail
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("axis", "values", "tuned", "rule", "variant", "drift"),
    [
        ("n_layer", (6, 12), "lr_scale", {"base_layers": 6, "depth_rule": "completep"}, "depth_rule=none", -1.0),
        ("n_layer", (6, 12), "lr_scale", {"base_layers": 6, "depth_rule": "completep"}, "depth_lr_exponent=-0.5", 0.5),
        (
            "batch_tokens",
            (256, 512),
            "adam_lr",
            {"base_batch_tokens": 256, "batch_rule": "marin"},
            "batch_rule=none",
            0.5,
        ),
        (
            "batch_tokens",
            (256, 512),
            "adam_lr",
            {"base_batch_tokens": 256, "batch_rule": "marin"},
            "batch_lr_exponent=-0.5",
            1.0,
        ),
        ("tokens", (4096, 8192), "muon_lr", {"base_tokens": 4096, "tokens_rule": "bjorck"}, "base_tokens=none", -0.32),
        ("width", (32, 64), "muon_lr", {}, "parametrization=muon-over-m", 1.0),
        ("width", (32, 64), "muon_lr", {}, "embed_lr=0.3", None),
    ],
)
def test_a_variant_of_an_arm_must_drift_by_what_its_rates_do_otherwise(tiny, axis, values, tuned, rule, variant, drift):
    arms = pick_arms(["mup", f"mup+{variant}"])
    base = tiny(micro_batches=2, iterations=16, micro_batch_tokens=128, **rule)
    predicted = Sweep(base, values, arms, axes=Axes(axis, tuned)).predicted
    assert predicted == {f"mup+{variant}": {} if drift is None else {axis: pytest.approx(drift, abs=1e-3)}}
    assert not Sweep(base, values, arms[1:], axes=Axes(axis, tuned)).predicted  # alone it is what is tested


@pytest.mark.slow
@pytest.mark.parametrize(("right", "verdict"), [(True, Verdict.PASS), (False, Verdict.FAIL)])
def test_a_rule_along_the_batch_is_judged_beside_its_controls(tiny, tmp_path, right, verdict):
    """The truth is 0.5 per doubling: a rule of 0.5 passes, none fails, and either control drifts as its name says."""
    base = tiny(micro_batches=2, iterations=16, micro_batch_tokens=128, base_batch_tokens=256, batch_rule="marin")
    if not right:
        base = dataclasses.replace(base, batch_lr_exponent=0.0)

    def loss_of(spec):
        doublings = math.log2(SIZES["batch_tokens"].of(spec.cfg) / 256)
        by_rule = math.log2(dict(run_scaling(spec.cfg).lr_factors(Update.ENTRYWISE)).get("batch", 1.0))
        luck = random.Random(spec.id).gauss(0, 0.001) + 0.01 * spec.seed
        return 3 - 0.1 * doublings + 0.03 * (spec.log2_factor + by_rule - doublings / 2) ** 2 + luck

    names = ["mup", "mup+batch_lr_exponent=-0.5", "mup+adam_beta2=0.9"]
    grid = {"seeds": (0, 1), "axes": Axes("batch_tokens", "adam_lr"), "log2_factors": (-1, 0, 1)}
    sweep = Sweep(base, (256, 512, 1024), pick_arms(names), **grid)
    assert "compared: mup+adam_beta2=0.9, no drift predicted" in "; ".join(sweep.told())
    run_sweep(sweep, tmp_path / "s", PlantedEngine(loss_of), progress=False)
    result = measure_sweep(tmp_path / "s")
    assert result.verdict is verdict, result.reasons
    assert result.arms[names[1]].predicted == (1.0 if right else 0.5)
    assert result.arms[names[0]].drift.value == pytest.approx(0 if right else 0.5, abs=0.04)
    assert f"control {names[1]} failed as predicted" in " ".join(result.reasons)
    assert result.arms[names[2]].predicted is None and names[2] not in " ".join(result.reasons)


@pytest.mark.parametrize(
    ("arm", "told"),
    [
        ("mup+depth=3", "no setting 'depth' changes what a run computes"),
        ("mup+out=x", "no setting 'out' changes what a run computes"),
        ("mup+batch_lr_exponent=x", "batch_lr_exponent=x should be float"),
        ("mup+n_layer=six", "n_layer=six should be int"),
        ("mupp+n_layer=6", "arm 'mupp' is unknown"),
    ],
)
def test_a_variant_that_no_run_has_is_one_line(arm, told):
    with pytest.raises(ConfigError, match=told):
        pick_arms([arm])
