"""mup.explain: what muP comes to for every parameter of a model, as a table."""

from __future__ import annotations

from torch import nn

from speedrun_mup.core.mup.compat.layer import MuReadout
from speedrun_mup.core.mup.rules import PARAMETRIZATIONS, NoRuleError, Parametrization, Update
from speedrun_mup.core.mup.spec import ParamSpec, main_place, named_specs, places, starred

_COLUMNS = ("parameter", "role", "at base", "here", "start", "forward", "adam lr", "adam eps", "muon lr", "sgd lr")


def explain(model: nn.Module, parametrization: Parametrization = PARAMETRIZATIONS["mup"]) -> str:
    """A table of every parameter's role, sizes and factors, with the factors of the forward pass below.

    Parameters of one name in all layers share a row. Factors multiply the values tuned at base size.

    Raises:
        UndeclaredParameterError: for a model that is not in muP.
    """
    rows: dict[tuple[str, ...], int] = {}
    owners = places(model)
    for name, p, spec in named_specs(model):
        place = main_place(owners[id(p)])
        readout = isinstance(place.module, MuReadout) if place else False
        row = (starred(name), *_row(spec, readout, parametrization))
        rows[row] = rows.get(row, 0) + 1
    shown = [(f"{row[0]} ({count})" if count > 1 else row[0], *row[1:]) for row, count in rows.items()]
    widths = [max(len(row[i]) for row in [_COLUMNS, *shown]) for i in range(len(_COLUMNS))]
    lines = ["  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths)).rstrip() for row in [_COLUMNS, *shown]]
    return "\n".join([*lines, *_forward(model)])


def _row(spec: ParamSpec, readout: bool, table: Parametrization) -> tuple[str, ...]:
    def sizes(shape: tuple[int, ...]) -> str:
        return " x ".join(map(str, shape)) or "one number"

    adam, numbers = spec.factors(table, Update.ENTRYWISE), []
    for kind in (Update.SPECTRAL, Update.GRADIENT):
        try:
            numbers.append(f"{spec.factors(table, kind).lr:.4g}")
        except NoRuleError:
            numbers.append("-")
    forward = f"{adam.forward:.4g}" if readout or adam.forward == 1 else f"{adam.forward:.4g} (yours)"
    factors = (f"{adam.init:.4g}", forward, f"{adam.lr:.4g}", f"{adam.eps:.4g}", *numbers)
    return (spec.role.value, sizes(spec.base_shape), sizes(spec.shape), *factors)


def _forward(model: nn.Module) -> list[str]:
    """A line for each kind of module with a factor that is no parameter's."""
    lines: dict[str, None] = {}
    for name, module in model.named_modules():
        own = vars(module)
        if "mup_scale" in own:
            attribute, before, _ = own["mup_scale"]
            lines[f"{starred(name)}.{attribute} is {own[attribute]:.4g} instead of {before:.4g}: heads widen"] = None
        if "mup_factor" in own:
            factor = own["mup_factor"][0]
            part = f" (the first {factor.first} entries: queries of heads that widen)" if factor.first else ""
            what = "reads" if factor.reads else "puts out"
            lines[f"what {starred(name)} {what} is multiplied by {factor.factor:.4g}{part}"] = None
        if isinstance(module, MuReadout):
            lines[f"what {starred(name)} reads is multiplied by {module.multiplier:.4g}: the readout"] = None
    return list(lines)
