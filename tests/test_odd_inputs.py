"""A sample of odd inputs on every command; benchmarks/odd_inputs.py tries them all."""

import importlib
from dataclasses import replace
from pathlib import Path

import pytest
from odd.harness import HEAVY, Case, attempt, refused
from odd.inputs import Materials, everything

TABLE = Path(__file__).parent / "data" / "transfer_sweep.csv"


def broken(folder):
    raise ZeroDivisionError


@pytest.mark.slow
def test_the_judge_sees_what_it_must_see(tmp_path):
    right = Case("judge", "right", ["--version"])
    assert attempt(right, tmp_path / "right")[1] == ""
    assert attempt(replace(right, prepare=broken), tmp_path / "broken")[1] == "traceback"
    assert attempt(replace(right, judge=refused), tmp_path / "silent")[1].startswith("silent")
    assert attempt(replace(right, prepare=lambda folder: print("\x1b[2J")), tmp_path / "escape")[1].startswith(
        "control"
    )


@pytest.mark.slow
def test_a_sample_of_odd_inputs(tmp_path):
    for name in HEAVY:
        importlib.import_module(f"speedrun_mup.{name}")
    materials = Materials(tmp_path, TABLE)
    cases = everything(materials, seed=1)
    assert len(cases) > 1000
    faults = [(str(case), attempt(case, tmp_path / "cases" / str(n))[1]) for n, case in enumerate(cases[:15])]
    assert not [fault for fault in faults if fault[1]]
