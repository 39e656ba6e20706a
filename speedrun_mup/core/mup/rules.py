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


class Role(enum.Enum):
    """Which sides of a parameter grow with width."""

    INPUT = "input"  # finite -> width: embeddings, value embeddings, biases, gains
    HIDDEN = "hidden"  # width -> width
    OUTPUT = "output"  # width -> finite: readouts
    SCALAR = "scalar"  # nothing grows


@dataclass(frozen=True)
class Power:
    """A factor m_in**fan_in * m_out**fan_out of the width multipliers of a parameter's two sides."""

    fan_in: float = 0.0
    fan_out: float = 0.0

    def __call__(self, m_in: float, m_out: float) -> float:
        """The factor itself; exactly 1.0 at m_in = m_out = 1."""
        return m_in**self.fan_in * m_out**self.fan_out

    def __mul__(self, other: Power) -> Power:
        return Power(self.fan_in + other.fan_in, self.fan_out + other.fan_out)

    def inverse(self) -> Power:
        """The power whose product with this one is 1."""
        return Power(-self.fan_in, -self.fan_out)


ONE = Power()


@dataclass(frozen=True)
class Step:
    """How one optimizer's learning rate and epsilon scale."""

    lr: Power = ONE
    eps: Power = ONE


@dataclass(frozen=True)
class Rule:
    """One row: init std, multiplier on the activation that leaves the parameter, and a Step per optimizer that may own it."""

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

    weight_decay: "independent" keeps lr * weight_decay constant (for optimizers that decay by that product), "coupled"
    keeps weight_decay constant. lr_by_group: extra LR powers for named parameter groups, for the exponents on which the
    literature disagrees.
    """

    name: str
    rules: Mapping[Role, Rule]
    weight_decay: str = "independent"
    lr_by_group: Mapping[str, Power] = field(default_factory=dict)

    def factors(self, role: Role, m_in: float, m_out: float, optimizer: str, group: str = "") -> Factors:
        """The factors for a parameter of this role and width multipliers under `optimizer` (adam, sgd or muon).

        Raises ValueError for an optimizer that must not own the role.
        """
        rule = self.rules[role]
        if optimizer not in ("adam", "sgd", "muon"):
            raise ValueError(f"optimizer {optimizer!r} has no rule; choose adam, sgd or muon")
        step: Step | None = getattr(rule, optimizer)
        if step is None:
            raise ValueError(f"{optimizer} must not own {role.value} parameters: use adam or sgd for them")
        lr = step.lr * self.lr_by_group.get(group, ONE)
        decay = lr.inverse() if self.weight_decay == "independent" else ONE
        return Factors(*(power(m_in, m_out) for power in (rule.init, rule.forward, lr, step.eps, decay)))


IN, OUT = Power(fan_in=1.0), Power(fan_out=1.0)
PER_IN, PER_OUT = IN.inverse(), OUT.inverse()
ROOT_PER_IN = Power(fan_in=-0.5)
SPECTRAL = Power(fan_in=-0.5, fan_out=0.5)

_SP = {
    Role.INPUT: Rule(),
    Role.HIDDEN: Rule(init=ROOT_PER_IN, muon=Step()),
    Role.OUTPUT: Rule(init=ROOT_PER_IN),
    Role.SCALAR: Rule(),
}

_MUP = {
    Role.INPUT: Rule(adam=Step(eps=PER_OUT), sgd=Step(lr=OUT)),
    Role.HIDDEN: Rule(
        init=ROOT_PER_IN,
        adam=Step(lr=PER_IN, eps=PER_OUT),
        sgd=Step(lr=OUT * PER_IN),
        muon=Step(lr=SPECTRAL),
    ),
    Role.OUTPUT: Rule(forward=PER_IN, adam=Step(eps=PER_IN), sgd=Step(lr=IN)),
    Role.SCALAR: Rule(),
}


def mup(
    embed_lr: float = 0.0, value_embed_lr: float = 0.0, head: float = 1.0, weight_decay: str = "independent"
) -> Parametrization:
    """muP. The three exponents are those the literature disagrees on; docs/mup.md argues for the defaults.

    embed_lr, value_embed_lr: powers of the width multiplier on those learning rates. head: the logits are divided by
    m**head; 1 is muP (full alignment), 1/2 is what the record's sqrt(d) amounts to.
    """
    rules = dict(_MUP)
    rules[Role.OUTPUT] = replace(_MUP[Role.OUTPUT], forward=Power(fan_in=-head), adam=Step(eps=Power(fan_in=-head)))
    groups = {"embed": Power(fan_out=embed_lr), "value_embed": Power(fan_out=value_embed_lr)}
    return Parametrization("mup", rules, weight_decay, {name: power for name, power in groups.items() if power != ONE})


def _changed(name: str, role: Role, **columns: object) -> Parametrization:
    """muP with some columns of one row replaced: a control that must fail."""
    return Parametrization(name, _MUP | {role: replace(_MUP[role], **columns)})  # type: ignore[arg-type]


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
        _changed("muon-over-m", Role.HIDDEN, muon=Step(lr=PER_IN)),
        _changed("muon-sqrt-m", Role.HIDDEN, muon=Step(lr=Power(fan_in=0.5))),
        _changed("adam-constant", Role.HIDDEN, adam=Step(eps=PER_OUT)),
        _changed("head-sqrt", Role.OUTPUT, forward=ROOT_PER_IN),
    )
}
