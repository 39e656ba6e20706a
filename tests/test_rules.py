"""The rule table: its kinds of update, and what needs none."""

import dataclasses
import subprocess
import sys

import pytest

from speedrun_mup.core import mup
from speedrun_mup.core.mup import PARAMETRIZATIONS, Exponents, Role, Rule, Update, UpdateScaling

HIDDEN = mup.ParamSpec(Role.HIDDEN, (16, 16), (64, 64), ("out", "in"), m_depth=2.0)


@pytest.mark.parametrize("kind", Update)
def test_a_kind_of_update_is_also_called_by_its_value_and_by_its_best_known_optimizer(kind):
    best_known = {Update.GRADIENT: "sgd", Update.ENTRYWISE: "adam", Update.SPECTRAL: "muon"}
    best_known |= {Update.RELATIVE_ENTRYWISE: "adamh", Update.RELATIVE_SPECTRAL: "muonh"}
    flat = dataclasses.replace(HIDDEN, m_depth=1.0)
    table = PARAMETRIZATIONS["mup"]
    assert flat.factors(table, kind) == flat.factors(table, kind.value) == flat.factors(table, best_known[kind])


@pytest.mark.parametrize("name", ["normuon", "", "Adam", None, 3])
def test_what_is_no_kind_of_update_is_refused_in_a_line(name):
    with pytest.raises(mup.NoRuleError, match="is not a kind of update; choose gradient, entrywise, spectral"):
        HIDDEN.factors(PARAMETRIZATIONS["mup"], name)


@pytest.mark.parametrize("table", PARAMETRIZATIONS.values(), ids=PARAMETRIZATIONS)
@pytest.mark.parametrize("role", Role)
def test_init_and_forward_are_those_of_every_kind_of_update(table, role):
    spec = mup.ParamSpec(role, (16, 16), (64, 32), ("out", "in"))
    for kind in Update:
        if table.rules[role].scaling(kind):
            factors = spec.factors(table, kind)
            assert (factors.init, factors.forward) == (table.init(spec), table.forward(spec))


def test_init_feels_the_depth():
    assert PARAMETRIZATIONS["mup"].init(HIDDEN) == 1 / 2 / 2  # 1/sqrt(m_in), 1/m_depth


@pytest.mark.parametrize("column", ["gradient", "spectral"])
def test_eps_belongs_to_entrywise_updates(column):
    scaling = UpdateScaling(eps=Exponents(fan_in=1.0))
    Rule(entrywise=scaling)
    with pytest.raises(mup.NoRuleError, match="only an entrywise update has an eps"):
        Rule(**{column: scaling})


def test_the_first_names_of_the_columns_still_import():
    assert (mup.Power, mup.Step, mup.Factors) == (mup.Exponents, mup.UpdateScaling, mup.Multipliers)


def test_every_name_is_there_before_and_after_torch_is_imported():
    for package in ("speedrun_mup.core.mup", "speedrun_mup.core.optimizers"):
        code = (
            f"import sys, {package} as it; early = 'torch' in sys.modules; scope = {{}}\n"
            f"exec('from {package} import *', scope); names = set(dir(it))\n"
            "print(early, names <= scope.keys(), all(getattr(it, name) is scope[name] for name in names), len(names) > 15)"
        )
        told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
        assert told.split() == ["False", "True", "True", "True"]
    with pytest.raises(AttributeError, match="MuLion"):
        mup.MuLion  # noqa: B018
