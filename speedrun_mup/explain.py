"""What the rule table comes to: every parameter of a model, its scaling, and its values at base width and at this one.

Nothing is computed here: the model declares, the rule table scales, and `param_groups` hands out, as in training.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

from speedrun_mup.config import TrainConfig
from speedrun_mup.core import mup
from speedrun_mup.core.model import declarations
from speedrun_mup.core.optimizers import param_groups
from speedrun_mup.files import strict_json
from speedrun_mup.training.build import tuned_values
from speedrun_mup.training.model_config import Vocabulary, model_config


@dataclass(frozen=True)
class Values:
    """What a parameter gets at one width. eps is None where its optimizer has none."""

    init_std: float
    forward: float
    lr: float
    eps: float | None
    weight_decay: float


@dataclass(frozen=True)
class ParameterRow:
    """One parameter. infshape: a (base, actual) pair per dimension; they differ where it grows with width."""

    name: str
    shape: tuple[int, ...]
    role: str
    infshape: tuple[tuple[int, int], ...]
    optimizer: str
    base: Values
    here: Values


def explain(cfg: TrainConfig, vocab_size: int = 50257) -> list[ParameterRow]:
    """A row for every parameter of the model that `cfg` describes, in the model's order. Allocates no weights."""
    base_width = cfg.tuned_width
    here, base = (_values(cfg, width, base_width, vocab_size) for width in (cfg.width, base_width))
    return [
        ParameterRow(
            name, spec.shape, spec.role.value, tuple(zip(spec.base_shape, spec.shape)), optimizer, base[name][2], values
        )
        for name, (spec, optimizer, values) in here.items()
    ]


def _values(
    cfg: TrainConfig, width: int, base_width: int, vocab_size: int
) -> dict[str, tuple[mup.ParamSpec, str, Values]]:
    """Spec, optimizer and values of every parameter at `width`."""
    here = replace(cfg, width=width, base_width=base_width)
    model = declarations(model_config(here, Vocabulary(vocab_size)))
    rules = model.cfg.rules
    groups = {}
    for optimizer, members in param_groups(model, rules, tuned_values(cfg)).items():
        for group in members:
            (named,) = group["params"]
            groups[named[0]] = optimizer, group
    found = {}
    for name, _, spec in mup.named_specs(model):
        optimizer, group = groups[name]
        forward = rules.forward(spec)
        values = Values(spec.init_std(rules), forward, group["lr"], group.get("eps"), group["weight_decay"])
        found[name] = spec, optimizer, values
    return found


def to_json(rows: Sequence[ParameterRow]) -> str:
    """The rows as strict JSON."""
    return strict_json([asdict(row) for row in rows], indent=1)


def table(rows: Sequence[ParameterRow]) -> str:
    """The rows for a terminal: "base -> here" where a value changes with width, one value where it does not.

    Parameters of the same name in several layers that agree in everything share a line: blocks.{0-5}.mlp.c_fc.weight.
    """
    lines = [
        ("parameter", "shape", "role", "InfShape", "init std", "forward", "optimizer", "LR", "eps", "weight decay")
    ]
    for name, row in _merged(rows):
        pairs = zip(asdict(row.base).values(), asdict(row.here).values())
        init, forward, lr, eps, decay = (_arrow(base, here) for base, here in pairs)
        grows = ", ".join(str(here) if base == here else f"{base}->{here}" for base, here in row.infshape)
        lines.append((name, str(row.shape), row.role, f"({grows})", init, forward, row.optimizer, lr, eps, decay))
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in lines)


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
