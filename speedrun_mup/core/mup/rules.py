"""The rule table: how every quantity of training scales with width, for each role a parameter can play.

A parametrization is a table: a row for each role, a column for each kind of update (not for each optimizer). The standard
parametrization is another such table, and so is every deliberately wrong one that the coordinate check uses as a control.
At base width every factor is exactly 1, so all of them are the same model there, bit for bit. A table has a depth rule,
see depth_rules.py.

Sources: Yang et al., Tensor Programs V (arXiv 2203.03466), Tables 3 and 8, for entrywise updates and gradients; Yang,
Simon and Bernstein (arXiv 2310.17813) for the spectral condition; Everett et al. (arXiv 2407.05872) for Adam's eps.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Protocol

from speedrun_mup.core.errors import ConfigError
from speedrun_mup.core.mup.depth_rules import COMPLETEP, NO_DEPTH_RULE, DepthExponents, DepthRole, DepthRule


class NoRuleError(ConfigError, ValueError):
    """The table has no rule for this: a kind of update that must not own a role, an unknown kind or regime."""


class Role(enum.Enum):
    """Which sides of a parameter grow with width."""

    INPUT = "input"  # finite -> width: embeddings, value embeddings, biases, gains
    HIDDEN = "hidden"  # width -> width
    OUTPUT = "output"  # width -> finite: readouts
    SCALAR = "scalar"  # nothing grows


class Update(enum.Enum):
    """How the size of an optimizer's update depends on the gradient. Update("adam") is its kind, likewise sgd and muon."""

    GRADIENT = "gradient"  # proportional to it: SGD
    ENTRYWISE = "entrywise"  # each entry about 1, whatever its gradient: Adam, Lion, signSGD
    SPECTRAL = "spectral"  # all singular values about 1: Muon, NorMuon, Scion
    # Directions of the two, of a length that is a share of the parameter's own norm
    RELATIVE_ENTRYWISE = "relative entrywise"  # AdamH
    RELATIVE_SPECTRAL = "relative spectral"  # MuonH

    @property
    def is_relative(self) -> bool:
        """Whether its size follows the parameter's, so that what scales the init scales it too."""
        return self in (Update.RELATIVE_ENTRYWISE, Update.RELATIVE_SPECTRAL)

    @classmethod
    def _missing_(cls, value: object) -> Update:
        best_known = {"sgd": cls.GRADIENT, "adam": cls.ENTRYWISE, "muon": cls.SPECTRAL}
        best_known |= {"adamh": cls.RELATIVE_ENTRYWISE, "muonh": cls.RELATIVE_SPECTRAL}
        if not isinstance(value, str) or value not in best_known:
            raise NoRuleError(f"{value!r} is not a kind of update; choose {', '.join(kind.value for kind in cls)}")
        return best_known[value]


@dataclass(frozen=True)
class Exponents:
    """A factor m_in**fan_in * m_out**fan_out * m_depth**depth of a parameter's width and depth multipliers."""

    fan_in: float = 0.0
    fan_out: float = 0.0
    depth: float = 0.0

    def __call__(self, m_in: float, m_out: float, m_depth: float = 1.0) -> float:
        """The factor itself; exactly 1.0 at m_in = m_out = m_depth = 1."""
        return m_in**self.fan_in * m_out**self.fan_out * m_depth**self.depth

    def __mul__(self, other: Exponents) -> Exponents:
        return Exponents(self.fan_in + other.fan_in, self.fan_out + other.fan_out, self.depth + other.depth)

    def inverse(self) -> Exponents:
        """The exponents of 1 over this factor."""
        return Exponents(-self.fan_in, -self.fan_out, -self.depth)


ONE = Exponents()


@dataclass(frozen=True)
class UpdateScaling:
    """How the learning rate of one kind of update scales, and the epsilon of an entrywise one."""

    lr: Exponents = ONE
    eps: Exponents = ONE


@dataclass(frozen=True)
class Rule:
    """One row: init std, multiplier on the activation that leaves the parameter, scaling of each kind of update."""

    init: Exponents = ONE
    forward: Exponents = ONE
    gradient: UpdateScaling = UpdateScaling()
    entrywise: UpdateScaling = UpdateScaling()
    spectral: UpdateScaling | None = None  # None: an orthogonalized update makes no sense for this role
    relative_entrywise: UpdateScaling | None = None  # None: what may begin at zero has no norm to take a share of
    relative_spectral: UpdateScaling | None = None

    def __post_init__(self) -> None:
        if any(scaling and scaling.eps != ONE for scaling in (self.gradient, self.spectral, self.relative_spectral)):
            raise NoRuleError("only an entrywise update has an eps")

    def scaling(self, update: Update) -> UpdateScaling | None:
        """The column of this kind of update."""
        return getattr(self, update.name.lower())


@dataclass(frozen=True)
class Multipliers:
    """The numbers that a rule gives for one parameter: multiply the values tuned at base width by these."""

    init: float
    forward: float
    lr: float
    eps: float
    weight_decay: float


class Sized(Protocol):
    """What a rule needs to know of a parameter; a ParamSpec is one."""

    @property
    def role(self) -> Role:
        """Which sides grow."""

    @property
    def m_in(self) -> float:
        """Width multiplier of the input side."""

    @property
    def m_out(self) -> float:
        """Width multiplier of the output side."""

    @property
    def m_depth(self) -> float:
        """Depth multiplier."""

    @property
    def depth_role(self) -> DepthRole:
        """Where it stands to the residual stream."""


@dataclass(frozen=True)
class Parametrization:
    """A named rule table.

    weight_decay: one of WEIGHT_DECAY_REGIMES. lr_by_group: extra exponents of the learning rate for named parameter
    groups, on which the literature disagrees. depth: how parameters with an m_depth scale with it.
    """

    name: str
    rules: Mapping[Role, Rule]
    weight_decay: str = "independent"
    lr_by_group: Mapping[str, Exponents] = field(default_factory=dict)
    depth: DepthRule = NO_DEPTH_RULE

    def __post_init__(self) -> None:
        if self.weight_decay not in WEIGHT_DECAY_REGIMES:
            raise NoRuleError(
                f"weight_decay={self.weight_decay!r} is not a regime; choose {' or '.join(WEIGHT_DECAY_REGIMES)}"
            )

    def init(self, parameter: Sized) -> float:
        """What to multiply the init std at base width by."""
        width = self.rules[parameter.role].init(parameter.m_in, parameter.m_out)
        return width * self.depth_init(parameter)

    def depth_init(self, parameter: Sized) -> float:
        """The part of it that is due to depth, which constants follow as well."""
        return parameter.m_depth ** self.depth.exponents(parameter.depth_role).init

    def forward(self, parameter: Sized) -> float:
        """What to multiply the activation that leaves the parameter by."""
        return self.rules[parameter.role].forward(parameter.m_in, parameter.m_out, parameter.m_depth)

    def factors(
        self,
        role: Role,
        m_in: float,
        m_out: float,
        update: Update | str,
        group: str = "",
        m_depth: float = 1.0,
        depth_role: DepthRole | None = None,
    ) -> Multipliers:
        """All numbers for a parameter of this role and these multipliers.

        Args:
            role: which sides grow.
            m_in, m_out: width multipliers of the two sides.
            update: the kind of update, by name too ("spectral" or "muon").
            group: learning-rate group, for `lr_by_group`.
            m_depth: depth multiplier.
            depth_role: where it stands to the residual stream; None: USUAL_DEPTH_ROLES by its role.

        Raises:
            NoRuleError: a kind of update that must not own the role, or a combination without a known rule.
        """
        kind, rule = Update(update), self.rules[role]
        scaling = rule.scaling(kind)
        if scaling is None:
            raise NoRuleError(f"a {kind.value} update must not own {role.value} parameters: use adam for them")
        if kind is Update.GRADIENT and m_depth != 1:
            raise NoRuleError("a gradient update has no depth rule (it is not scale-invariant); use adam or muon")
        depth = self.depth.exponents(depth_role or USUAL_DEPTH_ROLES[role])
        lr = scaling.lr * self.lr_by_group.get(group, ONE) * of_depth(depth.rate(kind.is_relative))
        init, eps = rule.init * of_depth(depth.init), scaling.eps * of_depth(depth.eps)
        columns = (init, rule.forward, lr, eps, self._decay(role, lr, kind, depth))
        return Multipliers(*(exponents(m_in, m_out, m_depth) for exponents in columns))

    def _decay(self, role: Role, lr: Exponents, kind: Update, depth: DepthExponents) -> Exponents:
        if self.weight_decay == "independent":
            return lr.inverse()
        if self.weight_decay == "compute-optimal":
            return lr.inverse() * PER_WIDTH[role]
        if self.weight_decay == "steady-state" and role is Role.HIDDEN:
            if kind is not Update.ENTRYWISE:
                raise NoRuleError(f"weight_decay='steady-state' is derived for adam, not for a {kind.value} update")
            return ROOT_IN * of_depth(depth.decay)
        return of_depth(depth.decay)


def of_depth(exponent: float) -> Exponents:
    """m_depth**exponent."""
    return Exponents(depth=exponent)


# Of a parameter that is declared without: what a branch ends with and coefficients are what people give an m_depth.
USUAL_DEPTH_ROLES = {
    Role.INPUT: DepthRole.OUTSIDE,
    Role.HIDDEN: DepthRole.WRITES,
    Role.OUTPUT: DepthRole.OUTSIDE,
    Role.SCALAR: DepthRole.STREAM,
}
# How the weight decay handed to an optimizer that decays by lr * weight_decay follows width:
#   independent      lr * weight_decay constant: the rule at a fixed number of tokens (Kosson et al., arXiv 2510.19093)
#   coupled          weight_decay constant
#   compute-optimal  lr * weight_decay as 1/width: tokens grow with the model (Qiu et al., arXiv 2512.05620)
#   steady-state     AdamW only: sqrt(width) on hidden matrices, constant elsewhere (Fan et al., arXiv 2510.15262)
WEIGHT_DECAY_REGIMES = ("independent", "coupled", "compute-optimal", "steady-state")

IN, OUT = Exponents(fan_in=1.0), Exponents(fan_out=1.0)
PER_IN, PER_OUT = IN.inverse(), OUT.inverse()
ROOT_IN, ROOT_PER_IN = Exponents(fan_in=0.5), Exponents(fan_in=-0.5)
SPECTRAL = Exponents(fan_in=-0.5, fan_out=0.5)
PER_WIDTH = {Role.INPUT: PER_OUT, Role.HIDDEN: PER_IN, Role.OUTPUT: PER_IN, Role.SCALAR: ONE}

_SP = {
    Role.INPUT: Rule(),
    Role.HIDDEN: Rule(
        init=ROOT_PER_IN,
        spectral=UpdateScaling(),
        relative_entrywise=UpdateScaling(),
        relative_spectral=UpdateScaling(),
    ),
    Role.OUTPUT: Rule(init=ROOT_PER_IN),
    Role.SCALAR: Rule(),
}

_MUP_BUT_READOUT = {
    Role.INPUT: Rule(entrywise=UpdateScaling(eps=PER_OUT), gradient=UpdateScaling(lr=OUT)),
    Role.HIDDEN: Rule(
        init=ROOT_PER_IN,
        entrywise=UpdateScaling(lr=PER_IN, eps=PER_OUT),
        gradient=UpdateScaling(lr=OUT * PER_IN),
        spectral=UpdateScaling(lr=SPECTRAL),
        # Times the norm, which grows with sqrt(out): entries of 1 / in again, and singular values of sqrt(out / in) where
        # both sides grow alike
        relative_entrywise=UpdateScaling(lr=ROOT_PER_IN, eps=PER_OUT),
        relative_spectral=UpdateScaling(),
    ),
    Role.SCALAR: Rule(),
}


def mup(
    embed_lr: float = 0.0, value_embed_lr: float = 0.0, head: float = 1.0, weight_decay: str = "independent"
) -> Parametrization:
    """muP. The three exponents are those the literature disagrees on; docs/mup.md argues for the defaults.

    embed_lr, value_embed_lr: exponents of the width multiplier in those learning rates. head: the logits are divided by
    m**head; 1 is muP (full alignment), 1/2 is what the record's sqrt(d) amounts to.
    """
    logits = Exponents(fan_in=-head)  # whose gradients Adam's eps has to follow
    rules = _MUP_BUT_READOUT | {
        Role.OUTPUT: Rule(forward=logits, entrywise=UpdateScaling(eps=logits), gradient=UpdateScaling(lr=IN))
    }
    groups = {"embed": Exponents(fan_out=embed_lr), "value_embed": Exponents(fan_out=value_embed_lr)}
    groups = {name: exponents for name, exponents in groups.items() if exponents != ONE}
    return Parametrization("mup", rules, weight_decay, groups, COMPLETEP)


def _changed(name: str, role: Role, **columns: object) -> Parametrization:
    """muP with some columns of one row replaced: a control that must fail."""
    table = mup()
    wrong = replace(table.rules[role], **columns)  # type: ignore[arg-type]
    return replace(table, name=name, rules={**table.rules, role: wrong})


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
        _changed("muon-over-m", Role.HIDDEN, spectral=UpdateScaling(lr=PER_IN)),
        _changed("muon-sqrt-m", Role.HIDDEN, spectral=UpdateScaling(lr=ROOT_IN)),
        _changed("adam-constant", Role.HIDDEN, entrywise=UpdateScaling(eps=PER_OUT)),
        _changed("muonh-sqrt-m", Role.HIDDEN, relative_spectral=UpdateScaling(lr=ROOT_IN)),
        _changed("adamh-constant", Role.HIDDEN, relative_entrywise=UpdateScaling(eps=PER_OUT)),
        _changed("head-sqrt", Role.OUTPUT, forward=ROOT_PER_IN),
    )
}
