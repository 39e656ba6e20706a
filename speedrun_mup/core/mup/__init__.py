"""muP: roles, the rule table, and what a parameter is."""

from speedrun_mup.core.mup.rules import PARAMETRIZATIONS, Factors, Parametrization, Power, Role, Rule, Step, mup
from speedrun_mup.core.mup.spec import ParamSpec, UndeclaredParameterError, declare, named_specs

__all__ = [
    "PARAMETRIZATIONS",
    "Factors",
    "ParamSpec",
    "Parametrization",
    "Power",
    "Role",
    "Rule",
    "Step",
    "UndeclaredParameterError",
    "declare",
    "mup",
    "named_specs",
]
