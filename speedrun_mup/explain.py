"""What the rules come to: every parameter of a model, its scaling, its values at base and here, and which rule did what.

Nothing is computed here: the model declares, the rule table scales, and `param_groups` hands out, as in training.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

from speedrun_mup.config import TrainConfig
from speedrun_mup.core import mup
from speedrun_mup.core.model import declarations
from speedrun_mup.core.mup.depth_rules import DepthRule
from speedrun_mup.core.mup.run_rules import RunRule, RunScaling
from speedrun_mup.core.optimizers import OPTIMIZERS, param_groups
from speedrun_mup.files import strict_json
from speedrun_mup.scaling import WITHOUT_BASES, run_scaling
from speedrun_mup.training.build import tuned_values
from speedrun_mup.training.model_config import Vocabulary, model_config


@dataclass(frozen=True)
class EffectiveValues:
    """What a parameter gets at one size of model and run. None is what its optimizer has none of, or its own default."""

    init_std: float
    forward: float
    lr: float
    eps: float | None
    weight_decay: float
    beta1: float | None = None
    beta2: float | None = None


@dataclass(frozen=True)
class ParameterRow:
    """One parameter.

    infshape: a (base, actual) pair per dimension; they differ where it grows with width. depth: where it stands to the
    residual stream. lr_factors: what each rule multiplies its learning rate by, by the axis: width, depth, batch, tokens.
    """

    name: str
    shape: tuple[int, ...]
    role: str
    infshape: tuple[tuple[int, int], ...]
    optimizer: str
    base: EffectiveValues
    here: EffectiveValues
    depth: str = ""
    lr_factors: tuple[tuple[str, float], ...] = ()


def explain(cfg: TrainConfig, vocab_size: int = 50257) -> list[ParameterRow]:
    """A row for every parameter of the model that `cfg` describes, in the model's order. Allocates no weights."""
    here = replace(cfg, base_width=cfg.tuned_width)
    at_base = replace(here, width=cfg.tuned_width, **WITHOUT_BASES)
    values, base = _values(here, vocab_size), _values(at_base, vocab_size)
    table, run = model_config(here, Vocabulary(vocab_size)).rules, run_scaling(cfg)
    return [
        ParameterRow(
            name,
            spec.shape,
            spec.role.value,
            tuple(zip(spec.base_shape, spec.shape)),
            optimizer,
            base[name][2],
            mine,
            spec.depth_role.value,
            _lr_factors(spec, OPTIMIZERS[optimizer].kind, table, run),
        )
        for name, (spec, optimizer, mine) in values.items()
    ]


def _lr_factors(
    spec: mup.ParamSpec, kind: mup.Update, table: mup.Parametrization, run: RunScaling
) -> tuple[tuple[str, float], ...]:
    """What each axis multiplies a learning rate by; those by 1 are left out."""
    found = {
        "width": replace(spec, m_depth=1.0).factors(table, kind).lr,
        "depth": spec.m_depth ** table.depth.exponents(spec.depth_role).rate(kind.is_relative),
        **run.lr_factors(kind),
    }
    return tuple((axis, factor) for axis, factor in found.items() if not math.isclose(factor, 1))


def _values(here: TrainConfig, vocab_size: int) -> dict[str, tuple[mup.ParamSpec, str, EffectiveValues]]:
    """Spec, optimizer and values of every parameter."""
    model = declarations(model_config(here, Vocabulary(vocab_size)))
    rules = model.cfg.rules
    groups = {}
    for optimizer, members in param_groups(model, rules, tuned_values(here), run_scaling(here)).items():
        for group in members:
            (named,) = group["params"]
            groups[named[0]] = optimizer, group
    found = {}
    for name, _, spec in mup.named_specs(model):
        optimizer, group = groups[name]
        forward = rules.forward(spec)
        betas = group.get("betas") or (group.get("beta1"), group.get("beta2"))
        values = EffectiveValues(
            spec.init_std(rules), forward, group["lr"], group.get("eps"), group["weight_decay"], *betas
        )
        found[name] = spec, optimizer, values
    return found


def to_json(rows: Sequence[ParameterRow]) -> str:
    """The rows as strict JSON."""
    return strict_json([asdict(row) for row in rows], indent=1)


def table(rows: Sequence[ParameterRow]) -> str:
    """The rows for a terminal: "base -> here" where a value changes, one value where it does not.

    Parameters of the same name in several layers that agree in everything share a line: blocks.{0-5}.mlp.c_fc.weight. Where
    more than width is scaled, it also says which rule did what to learning rates. Betas are shown if they change.
    """
    merged = _merged(rows)
    beyond = any({axis for axis, _ in row.lr_factors} - {"width"} for _, row in merged)
    changed = [
        beta for beta in ("beta1", "beta2") if any(getattr(row.base, beta) != getattr(row.here, beta) for row in rows)
    ]
    names = ["init_std", "forward", "lr", "eps", "weight_decay", *changed]
    titles = ["init std", "forward", "optimizer", "LR", "eps", "weight decay", *changed]
    lines = [["parameter", "shape", "role", "InfShape", *titles, *(["LR times"] if beyond else [])]]
    for name, row in merged:
        cells = [_arrow(getattr(row.base, each), getattr(row.here, each)) for each in names]
        grows = ", ".join(str(here) if base == here else f"{base}->{here}" for base, here in row.infshape)
        why = ", ".join(f"{axis} {factor:.4g}" for axis, factor in row.lr_factors) or "1"
        line = [name, str(row.shape), row.role, f"({grows})", *cells[:2], row.optimizer, *cells[2:]]
        lines.append(line + ([why] if beyond else []))
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in lines)


def rules_of_run(cfg: TrainConfig) -> list[str]:
    """A line for each axis besides width that this run has a base for: its rule, how far it is, where the rule is from."""
    run = run_scaling(cfg)
    shape = model_config(cfg, Vocabulary(1))
    found = [f"depth   {shape.depth_rule.name}: {shape.m_depth:.4g} times base; {_source(shape.depth_rule)}"]
    for rule, m, based in ((run.batch, run.m_batch, "base_batch_tokens"), (run.tokens, run.m_tokens, "base_tokens")):
        rates = ", ".join(f"{kind.value} LR x {m**exponent:.4g} (m^{exponent:g})" for kind, exponent in rule.lr.items())
        memory = ", ".join(f"{beta} in {getattr(rule, beta)}" for beta in ("beta1", "beta2"))
        told = f"{rule.name}: {m:.4g} times base; {rates}; {memory}; eps x {m**rule.eps:.4g}; {_source(rule)}"
        found += [f"{rule.axis:<7} {told}"] if getattr(cfg, based) else []
    return found if shape.base_layers else found[1:]


def _source(rule: DepthRule | RunRule) -> str:
    return f"from {rule.source} (evidence {rule.grade})"


def _arrow(base: float | None, here: float | None) -> str:
    if base is None or here is None:
        return "-"
    return f"{here:.4g}" if f"{base:.4g}" == f"{here:.4g}" else f"{base:.4g} -> {here:.4g}"


def _merged(rows: Sequence[ParameterRow]) -> list[tuple[str, ParameterRow]]:
    """Rows that differ in nothing but the number of their layer, under one name."""
    alike: dict[ParameterRow, list[tuple[str, str, str]]] = {}
    for row in rows:
        prefix, _, rest = row.name.partition(".")
        number, _, local = rest.partition(".")
        parts = (prefix, number, local) if number.isdigit() else (row.name, "", "")
        alike.setdefault(replace(row, name=f"{parts[0]}/{parts[2]}"), []).append(parts)
    merged = []
    for row, members in alike.items():
        prefix, first, local = members[0]
        numbers = first if len(members) == 1 else "{" + _ranges([int(number) for _, number, _ in members]) + "}"
        merged.append((f"{prefix}.{numbers}.{local}" if first else prefix, row))
    return merged


def _ranges(numbers: Sequence[int]) -> str:
    """[0, 1, 2, 4] -> 0-2,4."""
    spans: list[list[int]] = []
    for number in numbers:
        if spans and spans[-1][1] == number - 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in spans)
