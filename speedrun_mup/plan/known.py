"""What a plan over several sizes knows before its runs: priors that were given, and those that our own experiments give."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from speedrun_mup.config import TrainConfig
from speedrun_mup.core.errors import ConfigError
from speedrun_mup.core.mup.rules import Update
from speedrun_mup.scaling import run_scaling
from speedrun_mup.transfer import Known, Prior
from speedrun_mup.transfer.axes import size_axis
from speedrun_mup.transfer.published import BY_DATA_ORDER, LENGTH, LENGTH_DRIFT

Priors = Mapping[str, Mapping[str, Sequence[float]]]


def known_in(values: Priors, names: Sequence[str]) -> Known:
    """Priors from JSON, mean and standard deviation: {"drift": {"tokens": [-0.33, 0.05]}, "loss": {"width": [0.6, 0.2]}}."""
    try:
        kinds = {
            kind: {name: Prior(float(mean), float(sd)) for name, (mean, sd) in some.items()}
            for kind, some in values.items()
        }
        given = [prior for some in kinds.values() for prior in some.values()]
        good = set(kinds) <= {"drift", "loss"} and all(
            0 < prior.sd < float("inf") and abs(prior.mean) < float("inf") for prior in given
        )
    except (AttributeError, TypeError, ValueError):
        good = False
    if not good:
        raise ConfigError(
            'priors: give {"drift": {"tokens": [-0.33, 0.05]}, "loss": {...}}: mean and standard deviation'
        )
    known = Known(priors=kinds.get("drift", {}), loss_priors=kinds.get("loss", {}))
    known.check(names)
    return known


def published_priors(target: TrainConfig, names: Sequence[str]) -> dict[str, Any]:
    """What docs/experiments measured of the sizes `names`, as `known_in` reads it: today that of the length of a run.

    The drift is that beyond the rule in force: a rule with the same exponent leaves 0. ConfigError if nothing is known of them.
    """
    if "tokens" not in names:
        raise ConfigError("--priors published: only the tokens of a run are known so far; add tokens to --axes")
    rule = run_scaling(target).tokens.lr
    mean = LENGTH_DRIFT.mean - (rule[Update.ENTRYWISE] + rule.get(Update.SPECTRAL, 0.0)) / 2
    return {"drift": {"tokens": [mean, LENGTH_DRIFT.sd]}, "loss": {"tokens": [LENGTH.mean, LENGTH.sd]}}


def what_is_known(target: TrainConfig, priors: Priors, names: Sequence[str]) -> Known:
    """Priors that were given, and of what none was given, the noise and exponents of the same recipe's earlier sweeps."""
    known, earlier = known_in(priors, names), BY_DATA_ORDER[target.data_order]
    laws = {name: prior for name, prior in earlier.exponents.items() if name in names} | dict(known.loss_priors)
    noise = (earlier.noise, earlier.freedom)
    return replace(known, follow=frozenset(without_rule(target, names)), noise=noise, loss_priors=laws)


def without_rule(target: TrainConfig, names: Sequence[str]) -> list[str]:
    """The sizes for which no rule is in force: the best rate is followed as measured there."""
    return [name for name in names if name != "width" and not getattr(target, size_axis(name).base_setting, None)]
