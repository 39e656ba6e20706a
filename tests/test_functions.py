"""sweep, plan and transfer as functions, on functions that compute a loss in no time."""

import functools
import json
import math
import random
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import speedrun_mup
from speedrun_mup import plan, sweep, transfer
from speedrun_mup.core.errors import ConfigError
from speedrun_mup.files import FolderLock
from speedrun_mup.plan import NoPlanFits
from speedrun_mup.sweep.function import curve_of
from speedrun_mup.transfer import TransferError, TransferResult

DATA = Path(__file__).parent / "data"
RATES = [0.0025, 0.005, 0.01, 0.02, 0.04]
WIDTHS = {"width": [64, 128, 256]}


def bowl(width, lr, seed, drift=0.0):
    """The best rate is 0.01 at width 64, and 2**drift times that for every doubling."""
    noise = random.Random(f"{width} {lr} {seed}").gauss(0, 0.002)
    doublings = math.log2(width / 64)
    return 3 - 0.2 * doublings + 0.05 * (math.log2(lr / 0.01) - drift * doublings) ** 2 + noise


quiet = functools.partial(sweep, seeds=2, adaptive=False, progress=False)


@pytest.mark.slow
def test_a_sweep_of_a_function_gives_the_verdict_of_its_table(tmp_path):
    swept = quiet(bowl, WIDTHS, lr=RATES, out=tmp_path / "s")
    assert swept.complete and len(swept.rows()) == 30
    for row in swept.rows():
        assert row["loss"] == bowl(row["width"], row["lr"], row["seed"]) and row["lr"] in RATES
    result = swept.transfer()
    assert isinstance(result, TransferResult) and result.verdict == "PASS" and "verdict: PASS" in result.summary()
    assert result.arms["run"].drift.value == pytest.approx(0, abs=0.05)
    by_path, by_rows = transfer(tmp_path / "s"), transfer(swept.rows())
    by_csv = transfer(tmp_path / "s" / "runs.csv")
    assert by_path.arms["run"].drift.value == by_csv.arms["run"].drift.value == by_rows.arms["run"].drift.value


def test_a_frame_of_pandas(tmp_path):
    pytest.importorskip("pandas")
    swept = quiet(bowl, WIDTHS, lr=RATES, out=tmp_path / "s")
    frame = swept.frame()
    assert list(frame.columns) == ["arm", "width", "lr", "seed", "loss", "diverged", "seconds", "curve"]
    renamed = frame.rename(columns={"width": "n_embd", "loss": "val/loss"})
    result = transfer(renamed)
    assert (
        result.verdict == "PASS"
        and "width is the column n_embd, loss is the column val/loss; --columns" in result.notes[0]
    )


@pytest.mark.slow
def test_an_arm_that_is_wrong_on_purpose_fails(tmp_path):
    arms = {"mup": bowl, "sp": functools.partial(bowl, drift=-1.0)}
    rates = [0.01 * 2.0**k for k in range(-4, 4)]
    swept = quiet(arms, WIDTHS, lr=rates, out=tmp_path / "s", controls={"sp": -1})
    result = swept.transfer()
    assert result.verdict == "PASS" and result.arms["sp"].predicted == -1
    assert any("control sp failed as predicted" in reason for reason in result.reasons)
    assert transfer(swept.rows(), controls={"sp": -1}).verdict == "PASS"


def test_the_same_call_again_makes_only_what_is_missing(tmp_path):
    called = []

    def run(width, lr, seed):
        called.append((width, lr, seed))
        if len(called) == 7:
            raise KeyboardInterrupt("SIGINT")
        return bowl(width, lr, seed)

    first = quiet(run, WIDTHS, lr=RATES, out=tmp_path / "s")
    assert first.result.stopped and not first.complete and len(first.rows()) == 6
    assert quiet(run, WIDTHS, lr=RATES, out=tmp_path / "s").complete and len(called) == 31
    more = quiet(run, WIDTHS, lr=[*RATES, 0.08], seeds=[0, 1, 2], out=tmp_path / "s")
    assert more.complete and len(called) == 31 + 54 - 30 and len(set(called)) == 54
    with pytest.raises(ConfigError, match="set was .*, is"):
        quiet(bowl, WIDTHS, lr=RATES, out=tmp_path / "s", drift=0.1)


def test_a_run_that_raises_fails_in_a_line_and_the_rest_goes_on(tmp_path, capsys):
    broken, called = True, []

    def run(width, lr, seed):
        called.append((width, lr, seed))
        if broken and (width, lr, seed) == (128, 0.01, 1):
            raise ValueError("no room\nleft")
        return bowl(width, lr, seed)

    swept = quiet(run, WIDTHS, lr=RATES, out=tmp_path / "s", progress=True)
    assert len(swept.rows()) == 29 and not swept.complete and len(called) == 30
    ((name, why),) = swept.failed.items()
    assert name == "run width 128 lr 0.01 seed 1" and why.startswith("ValueError: no room (line ") and "\n" not in why
    assert 'raise ValueError("no room\\nleft")' in Path(why.rpartition("traceback: ")[2]).read_text()
    assert capsys.readouterr().out.count("no room") == 1
    assert swept.transfer().verdict == "INCONCLUSIVE"
    assert swept.transfer(accept=["missing"]).verdict == "PASS"
    broken = False
    assert quiet(run, WIDTHS, lr=RATES, out=tmp_path / "s").complete  # it is fixed, and tried again
    with pytest.raises(ConfigError, match="arm run was another"):
        quiet(bowl, WIDTHS, lr=RATES, out=tmp_path / "s")


def test_divergence_is_a_result(tmp_path):
    def run(width, lr, seed):
        if lr > 0.03:
            return [3.0, math.nan]
        if lr > 0.015:
            raise FloatingPointError("overflow")
        return [2.0, 2.5] if lr < 0.003 else [(0, 4.0), (10, bowl(width, lr, seed))]

    rows = quiet(run, WIDTHS, lr=RATES, out=tmp_path / "s").rows()
    assert {row["lr"] for row in rows if row["diverged"]} == {0.0025, 0.02, 0.04}
    assert all(math.isnan(row["loss"]) for row in rows if row["diverged"]) and len(rows) == 30
    assert next(row for row in rows if row["lr"] == 0.01)["curve"][0] == 4.0


def test_a_function_gets_the_values_as_they_were_written(tmp_path):
    rates = [math.pi / 1000, 1 / 300]
    swept = quiet(lambda width, lr, seed: float(lr in rates) + width, WIDTHS, lr=rates, seeds=1, out=tmp_path / "s")
    assert {row["loss"] - row["width"] for row in swept.rows()} == {1.0}


def test_the_lowest_value_of_a_curve_if_asked(tmp_path):
    def run(width, lr):
        return [4.0, 2.0, 3.0]

    for loss, told in (("last", 3.0), ("min", 2.0)):
        swept = quiet(run, WIDTHS, lr=[0.01], seeds=1, loss=loss, out=tmp_path / loss)
        assert [row["loss"] for row in swept.rows()] == [told] * 3


@pytest.mark.slow
def test_the_grid_grows_where_the_best_is_at_its_edge(tmp_path):
    swept = sweep(bowl, WIDTHS, lr=[0.001, 0.002], seeds=1, out=tmp_path / "s", progress=False)
    rates = sorted({row["lr"] for row in swept.rows() if row["width"] == 64})
    assert {0.001, 0.002, 0.004, 0.008, 0.016} < {*rates} and any(0.009 < rate < 0.015 for rate in rates)
    swept = sweep(bowl, WIDTHS, lr=[0.00125 * 2**k for k in range(7)], seeds=1, out=tmp_path / "t", progress=False)
    assert len(swept.rows()) == 3 * (7 + 4)
    assert not any("grid still grows" in note for note in swept.transfer(sigma=0.002).notes)


@pytest.mark.slow
def test_several_sizes_at_once(tmp_path):
    def run(width, n_layer, lr, seed):
        return bowl(width, lr, f"{seed} {n_layer}") - 0.1 * math.log2(n_layer)

    swept = quiet(run, {"width": [64, 128, 256], "n_layer": [2, 4, 8]}, lr=RATES, out=tmp_path / "s")
    result = swept.transfer()
    assert result.verdict == transfer(swept.rows(), sizes=["width", "n_layer"]).verdict == "PASS"
    assert transfer(tmp_path / "s", sizes="n_layer").axes.size == "n_layer"


@pytest.mark.slow
def test_worker_processes_import_the_function(tmp_path):
    """In a script, as a user writes it; a function that they cannot import is refused in a line."""
    (tmp_path / "mine.py").write_text("def run(width, lr, seed):\n    return width / 100 + lr + seed\n")
    (tmp_path / "script.py").write_text(
        "from mine import run\nfrom speedrun_mup import sweep\nif __name__ == '__main__':\n"
        "    print(len(sweep(run, {'width': [64, 128]}, lr=[0.1, 0.2], seeds=1, out='s', engine='process', workers=1,"
        " adaptive=False, progress=False).rows()))\n"
    )
    done = subprocess.run([sys.executable, "script.py"], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and done.stdout.strip() == "4", done.stderr
    with pytest.raises(ConfigError, match="<lambda>: another process cannot import it; write it into a module"):
        quiet(lambda width, lr, seed: 1.0, WIDTHS, lr=RATES, engine="process", out=tmp_path / "t")


@pytest.mark.parametrize(
    ("told", "losses"),
    [
        (2, [2.0]),
        (np.float32(2.5), [2.5]),
        (np.array([3.0, 2.0]), [3.0, 2.0]),
        ([(5, 2.0), (0, 3.0)], [3.0, 2.0]),
        (np.array([[0, 3.0], [5, 2.0]]), [3.0, 2.0]),
        ((loss for loss in (3.0, 2.0)), [3.0, 2.0]),
    ],
)
def test_what_a_function_may_return(told, losses):
    assert curve_of(told).losses == losses


@pytest.mark.parametrize("told", [None, True, "2.0", [], ["a"], {"loss": 2.0}, [(0, 1, 2)], [(math.nan, 2.0)]])
def test_what_a_function_may_not_return(told):
    with pytest.raises(ConfigError, match="^it returned .*; return the loss as a number, a list of losses"):
        curve_of(told)


def no_seed(width, lr):
    return 1.0


@pytest.mark.parametrize(
    ("how", "fault"),
    [
        ({"run": 3}, "run: give a function, or several by name"),
        ({"axes": {}}, "axes: give the sizes to run at"),
        ({"axes": {"width": [0]}}, "axes: width=.0.: give whole numbers above zero"),
        ({"lr": []}, "lr=..: give numbers above zero"),
        ({"lr": [0.1, "x"]}, "lr=.*: give numbers above zero"),
        ({"lr": 0.1}, "give one hyperparameter its values, such as lr="),
        ({"wd": [1, 2]}, "lr and wd have several; sizes go to axes"),
        ({"seeds": 0}, "seeds=0: give how many"),
        ({"loss": "best"}, "loss='best': give 'last' or 'min'"),
        ({"engine": "slurm"}, "engine='slurm' is unknown; choose from local, process, ray"),
        ({"workers": 2}, "workers=2: engine='local' is this process"),
        ({"run": no_seed}, "no_seed: it takes no seed; add one to its arguments, or give seeds=1"),
        ({"batch": 8}, "bowl.*: got an unexpected keyword argument 'batch'"),
        ({"drift": object()}, "drift is object, and only plain values .* functools.partial"),
        ({"axes": {"lr": [1, 2]}}, "size and hyperparameter are both lr"),
        ({"controls": {"sp": -1}}, "controls: no arm is called sp; there are run"),
        ({"cost": lambda **_: -1.0}, "cost: -1.0 at width 64; return a number above zero"),
    ],
)
def test_what_cannot_be_meant_is_one_line(how, fault, tmp_path):
    with pytest.raises((ConfigError, TransferError), match=fault) as told:
        quiet(**({"run": bowl, "axes": WIDTHS, "lr": RATES, "out": tmp_path / "s"} | how))
    assert "\n" not in str(told.value)


def test_a_folder_in_use_is_left_alone(tmp_path):
    quiet(bowl, WIDTHS, lr=RATES, out=tmp_path / "s")
    lock = FolderLock(tmp_path / "s")
    with pytest.raises(ConfigError, match="is in use by process"):
        quiet(bowl, WIDTHS, lr=RATES, out=tmp_path / "s")
    lock.close()


@pytest.mark.slow
def test_verdicts_on_tables_and_logs():
    logs = DATA / "logs" / "tensorboard"
    assert transfer(str(logs), names="w{width}-lr{lr}-s{seed}").verdict == "PASS"
    table = DATA / "transfer_sweep.csv"
    assert transfer(table, controls={"adam-const": -1.0}).verdict == "PASS"
    assert json.loads(transfer(table, controls={"adam-const": -1.0}).to_json())["verdict"] == "PASS"
    for runs, fault in (([3], "runs: give a path, a pandas table"), ([], "a header but no rows|no column")):
        with pytest.raises(TransferError, match=fault):
            transfer(runs)


@pytest.mark.slow
def test_a_plan_keeps_its_budget_and_predicts(tmp_path):
    made = plan(bowl, target=2048, lr=0.008, budget="10%", smallest=32)
    spent = sum(n * len(made.values) * size**2 for size, n in zip(made.proxies.sizes, made.proxies.seeds)) / 2048**2
    assert spent <= made.proxies.share <= 0.1 and min(made.proxies.sizes) >= 32 and 0.008 in made.values
    assert made.proxies.error == min(
        plan(bowl, 2048, lr=0.008, budget=share, smallest=32).proxies.error for share in (0.1, 0.08, 0.05)
    )
    assert str(made).startswith("target: width 2048\nproxies: widths (seeds) ") and "if it grows as width^2" in str(
        made
    )
    found = made.run(out=tmp_path / "p", progress=False)
    low, high = found.forecast.loss.interval()
    assert found.value == pytest.approx(0.01, rel=0.1) and low < bowl(2048, 0.01, 0) < high
    assert found.transfer.verdict == "PASS" and str(found).startswith("PASS: width 2048: loss ")


def test_a_plan_counts_the_cost_that_is_given():
    by_size = plan(bowl, {"width": 1024}, lr=RATES, budget=0.2, cost=lambda width, lr, seed: width)
    assert by_size.values == tuple(RATES) and by_size.proxies.share <= 0.2 and "grows as" not in str(by_size)
    runs = sum(n * len(RATES) * size for size, n in zip(by_size.proxies.sizes, by_size.proxies.seeds))
    assert by_size.proxies.share == pytest.approx(runs / 1024)


@pytest.mark.parametrize(
    ("how", "fault"),
    [
        ({"target": 64, "smallest": 16}, "width 64 has 2 halves from 16 up, 3 are needed; plan for 128"),
        ({"target": {"width": 64, "depth": 2}}, "give one size as a whole number"),
        ({"budget": "lots"}, "budget='lots': give a share of the target's cost"),
        ({"lr": None}, "plan: name what is tuned|lr=.*: give numbers above zero"),
        ({"cost": lambda **_: math.nan}, "cost: nan at width 1024; return a number above zero"),
    ],
)
def test_a_plan_that_cannot_be_made_is_one_line(how, fault):
    with pytest.raises(ConfigError, match=fault):
        plan(**({"run": bowl, "target": 1024, "lr": 0.01} | how))


def test_a_budget_that_is_too_small_says_what_is_enough():
    with pytest.raises(NoPlanFits, match="the smallest takes .*; give ") as told:
        plan(bowl, 1024, lr=0.01, budget="0.0001%")
    assert plan(bowl, 1024, lr=0.01, budget=told.value.enough)


@pytest.mark.slow
def test_the_page_does_what_it_says(tmp_path, monkeypatch, capsys):
    """Its Python, one block after the other."""
    page = (Path(__file__).parent.parent / "docs" / "your-runs.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", page, re.S)
    monkeypatch.chdir(tmp_path)
    names = {"__name__": "page"}
    exec(compile("\n".join(blocks), "docs/your-runs.md", "exec"), names)
    told = capsys.readouterr().out
    assert len(blocks) == 2 and "\nverdict: " in told and "width 1024: loss " in told
    assert names["transfer"]("sweeps/toy").to_json() == names["result"].to_json()


@pytest.mark.slow
def test_the_import_is_light_and_packages_stay_packages():
    code = (
        "import sys, speedrun_mup\nassert not {'torch', 'numpy', 'speedrun_mup.sweep'} & {*sys.modules}\n"
        "from speedrun_mup import transfer\nassert 'torch' not in sys.modules and callable(transfer)\n"
        "from speedrun_mup.transfer import Point\nassert transfer.Point is Point\n"
        "print(transfer.__name__, speedrun_mup.__version__)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == f"speedrun_mup.transfer {speedrun_mup.__version__}", done.stderr
    assert speedrun_mup.sweep is sweep and speedrun_mup.sweep.Sweep
