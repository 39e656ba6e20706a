"""The rule table: how every quantity of training scales with width, for each role a parameter can play.

A parametrization is a table with one row per role. The standard parametrization is another such table, and so is every
deliberately wrong one that the coordinate check uses as a control. At base width every factor is exactly 1, so all of
them are the same model there, bit for bit.

Sources: Yang et al., Tensor Programs V (arXiv 2203.03466), Tables 3 and 8, for Adam and SGD; Yang, Simon and Bernstein
(arXiv 2310.17813) for the spectral condition that gives Muon's row; Everett et al. (arXiv 2407.05872) for Adam's eps.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from speedrun_mup.core.errors import ConfigError


class NoRuleError(ConfigError, ValueError):
    """The table has no rule for this: an optimizer that must not own a role, an unknown optimizer or regime."""


class Role(enum.Enum):
    """Which sides of a parameter grow with width."""

    INPUT = "input"  # finite -> width: embeddings, value embeddings, biases, gains
    HIDDEN = "hidden"  # width -> width
    OUTPUT = "output"  # width -> finite: readouts
    SCALAR = "scalar"  # nothing grows


@dataclass(frozen=True)
class Power:
    """A factor m_in**fan_in * m_out**fan_out * m_depth**depth of a parameter's width and depth multipliers."""

    fan_in: float = 0.0
    fan_out: float = 0.0
    depth: float = 0.0

    def __call__(self, m_in: float, m_out: float, m_depth: float = 1.0) -> float:
        """The factor itself; exactly 1.0 at m_in = m_out = m_depth = 1."""
        return m_in**self.fan_in * m_out**self.fan_out * m_depth**self.depth

    def __mul__(self, other: Power) -> Power:
        return Power(self.fan_in + other.fan_in, self.fan_out + other.fan_out, self.depth + other.depth)

    def inverse(self) -> Power:
        """The power whose product with this one is 1."""
        return Power(-self.fan_in, -self.fan_out, -self.depth)


ONE = Power()


@dataclass(frozen=True)
class Step:
    """How one optimizer's learning rate and epsilon scale."""

    lr: Power = ONE
    eps: Power = ONE


@dataclass(frozen=True)
class Rule:
    """One row: init std, multiplier on the activation that leaves the parameter, Step per optimizer that may own it."""

    init: Power = ONE
    forward: Power = ONE
    adam: Step = Step()
    sgd: Step = Step()
    muon: Step | None = None  # None: an orthogonalized update makes no sense for this role


@dataclass(frozen=True)
class Factors:
    """The numbers that a rule gives for one parameter: multiply the values tuned at base width by these."""

    init: float
    forward: float
    lr: float
    eps: float
    weight_decay: float


@dataclass(frozen=True)
class Parametrization:
    """A named rule table.

    weight_decay: one of WEIGHT_DECAY_REGIMES. lr_by_group: extra LR powers for named parameter groups, for the
    exponents on which the literature disagrees.
    """

    name: str
    rules: Mapping[Role, Rule]
    weight_decay: str = "independent"
    lr_by_group: Mapping[str, Power] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.weight_decay not in WEIGHT_DECAY_REGIMES:
            raise NoRuleError(
                f"weight_decay={self.weight_decay!r} is not a regime; choose {' or '.join(WEIGHT_DECAY_REGIMES)}"
            )

    def factors(
        self, role: Role, m_in: float, m_out: float, optimizer: str, group: str = "", m_depth: float = 1.0
    ) -> Factors:
        """The factors for a parameter of this role and these multipliers under `optimizer` (adam, sgd or muon).

        Raises NoRuleError for an optimizer that must not own the role, and for a combination without a known rule.
        """
        rule = self.rules[role]
        if optimizer not in ("adam", "sgd", "muon"):
            raise NoRuleError(f"optimizer {optimizer!r} has no rule; choose adam, sgd or muon")
        step: Step | None = getattr(rule, optimizer)
        if step is None:
            raise NoRuleError(f"{optimizer} must not own {role.value} parameters: use adam or sgd for them")
        if optimizer == "sgd" and m_depth != 1:
            raise NoRuleError("sgd has no depth rule (it is not scale-invariant); use adam or muon")
        lr = step.lr * self.lr_by_group.get(group, ONE)
        decay = self._decay(role, lr, optimizer)
        return Factors(*(power(m_in, m_out, m_depth) for power in (rule.init, rule.forward, lr, step.eps, decay)))

    def _decay(self, role: Role, lr: Power, optimizer: str) -> Power:
        if self.weight_decay == "independent":
            return lr.inverse()
        if self.weight_decay == "compute-optimal":
            return lr.inverse() * PER_WIDTH[role]
        if self.weight_decay == "steady-state" and role is Role.HIDDEN:
            if optimizer != "adam":
                raise NoRuleError(f"weight_decay='steady-state' is derived for adam, not for {optimizer}")
            return ROOT_IN
        return ONE


# How the weight decay handed to an optimizer that decays by lr * weight_decay follows width:
#   independent      lr * weight_decay constant: the rule at a fixed number of tokens (Kosson et al., arXiv 2510.19093)
#   coupled          weight_decay constant
#   compute-optimal  lr * weight_decay as 1/width: tokens grow with the model (Qiu et al., arXiv 2512.05620)
#   steady-state     AdamW only: sqrt(width) on hidden matrices, constant elsewhere (Fan et al., arXiv 2510.15262)
WEIGHT_DECAY_REGIMES = ("independent", "coupled", "compute-optimal", "steady-state")

IN, OUT = Power(fan_in=1.0), Power(fan_out=1.0)
PER_IN, PER_OUT, PER_DEPTH = IN.inverse(), OUT.inverse(), Power(depth=-1.0)
ROOT_IN, ROOT_PER_IN = Power(fan_in=0.5), Power(fan_in=-0.5)
SPECTRAL = Power(fan_in=-0.5, fan_out=0.5)
PER_WIDTH = {Role.INPUT: PER_OUT, Role.HIDDEN: PER_IN, Role.OUTPUT: PER_IN, Role.SCALAR: ONE}

_SP = {
    Role.INPUT: Rule(),
    Role.HIDDEN: Rule(init=ROOT_PER_IN, muon=Step()),
    Role.OUTPUT: Rule(init=ROOT_PER_IN),
    Role.SCALAR: Rule(),
}

# The powers of depth act on parameters with an m_depth only: those that write a residual branch into the stream, whose
# 1/depth then needs no multiplier in the forward pass (Dey et al., CompleteP, arXiv 2505.01618), and residual scalars.
_MUP_BUT_READOUT = {
    Role.INPUT: Rule(adam=Step(eps=PER_OUT), sgd=Step(lr=OUT)),
    Role.HIDDEN: Rule(
        init=ROOT_PER_IN * PER_DEPTH,
        adam=Step(lr=PER_IN * PER_DEPTH, eps=PER_OUT),
        sgd=Step(lr=OUT * PER_IN),
        muon=Step(lr=SPECTRAL * PER_DEPTH),
    ),
    Role.SCALAR: Rule(adam=Step(lr=PER_DEPTH)),
}


def mup(
    embed_lr: float = 0.0, value_embed_lr: float = 0.0, head: float = 1.0, weight_decay: str = "independent"
) -> Parametrization:
    """muP. The three exponents are those the literature disagrees on; docs/mup.md argues for the defaults.

    embed_lr, value_embed_lr: powers of the width multiplier on those learning rates. head: the logits are divided by
    m**head; 1 is muP (full alignment), 1/2 is what the record's sqrt(d) amounts to.
    """
    logits = Power(fan_in=-head)  # whose gradients Adam's eps has to follow
    rules = _MUP_BUT_READOUT | {Role.OUTPUT: Rule(forward=logits, adam=Step(eps=logits), sgd=Step(lr=IN))}
    groups = {"embed": Power(fan_out=embed_lr), "value_embed": Power(fan_out=value_embed_lr)}
    return Parametrization("mup", rules, weight_decay, {name: power for name, power in groups.items() if power != ONE})


def _changed(name: str, role: Role, **columns: object) -> Parametrization:
    """muP with some columns of one row replaced: a control that must fail."""
    rules = mup().rules
    return Parametrization(name, {**rules, role: replace(rules[role], **columns)})  # type: ignore[arg-type]


PARAMETRIZATIONS: dict[str, Parametrization] = {
    table.name: table
    for table in (
        mup(),
        # Standard: initialise by fan-in, scale nothing else.
        Parametrization("sp", _SP, weight_decay="coupled"),
        # Record 26 as published: standard, with logits divided by sqrt(width), which is half of muP's correction.
        Parametrization(
            "record26", _SP | {Role.OUTPUT: Rule(init=ROOT_PER_IN, forward=ROOT_PER_IN)}, weight_decay="coupled"
        ),
        # Controls: muP with one exponent wrong.
        _changed("muon-over-m", Role.HIDDEN, muon=Step(lr=PER_IN * PER_DEPTH)),
        _changed("muon-sqrt-m", Role.HIDDEN, muon=Step(lr=ROOT_IN * PER_DEPTH)),
        _changed("adam-constant", Role.HIDDEN, adam=Step(lr=PER_DEPTH, eps=PER_OUT)),
        _changed("head-sqrt", Role.OUTPUT, forward=ROOT_PER_IN),
    )
}
