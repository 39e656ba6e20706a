"""How training scales with depth: rules as data, next to the rule table, which knows of width only.

A parameter says where it stands to the residual stream (`DepthRole`), a rule says how each such place scales with
m_depth = layers / base layers (`DepthRule`). No forward pass has a multiplier for it: a factor on what a branch adds is a
factor on the branch's last matrix, so on its start and on its learning rate. At base depth every factor is exactly 1.

Imports no torch.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, replace

from speedrun_mup.core.errors import ConfigError


class DepthRole(enum.Enum):
    """Where a parameter stands to the residual stream: what more layers mean to it."""

    OUTSIDE = "outside"  # before or behind all layers: embeddings, readout
    BRANCH = "branch"  # inside a layer's branch: q, k, v, the first matrix of an MLP, gates
    WRITES = "writes"  # the last matrix of a branch, whose product is added to the stream
    SKIP = "skip"  # weighs an earlier layer's output, which is added to the stream
    STREAM = "stream"  # multiplies the stream itself, or x0, in every layer


@dataclass(frozen=True)
class DepthExponents:
    """Exponents of m_depth for one place. decay: of the weight decay, before it follows the learning rate."""

    init: float = 0.0
    lr: float = 0.0
    eps: float = 0.0
    decay: float = 0.0

    def rate(self, is_relative: bool) -> float:
        """Of the learning rate, which for an update relative to the parameter has the init's factor already."""
        return self.lr - self.init if is_relative else self.lr


@dataclass(frozen=True)
class DepthRule:
    """One row: exponents of m_depth = layers / base layers.

    Args:
        name: as --depth-rule takes it.
        branch: of the factor on what a branch adds to the stream.
        lr: of learning rates inside branches, next to that factor.
        outside_lr: of learning rates of embeddings and readout.
        skip: of the factor on an earlier layer's output; there are as many of them as layers, all alike in the beginning.
        stream_lr: of learning rates of coefficients that act on the stream in every layer, so that their changes add up.
        source: where it is from.
        grade: how well it is supported: A several independent groups at large scale, B one careful study, C one recipe.
    """

    name: str
    branch: float = 0.0
    lr: float = 0.0
    outside_lr: float = 0.0
    skip: float = 0.0
    stream_lr: float = 0.0
    source: str = ""
    grade: str = ""

    def exponents(self, role: DepthRole) -> DepthExponents:
        """Those of one place. A branch's factor is in its last matrix, and all gradients inside shrink with it."""
        return {
            DepthRole.OUTSIDE: DepthExponents(lr=self.outside_lr),
            DepthRole.BRANCH: DepthExponents(lr=self.lr, eps=self.branch),
            DepthRole.WRITES: DepthExponents(self.branch, self.branch + self.lr, decay=-self.branch),
            DepthRole.SKIP: DepthExponents(self.skip, self.skip + self.lr, decay=-self.skip),
            DepthRole.STREAM: DepthExponents(lr=self.stream_lr),
        }[role]

    def changed(self, branch: float | None, lr: float | None) -> DepthRule:
        """This rule with exponents of the user's own; None leaves one as it is."""
        return replace(self, branch=self.branch if branch is None else branch, lr=self.lr if lr is None else lr)


# Skips and stream coefficients are ours, for both rules alike: neither source has a U-net or x0 mixing. Unit skips alone
# weigh early layers the more, the more layers there are; a coefficient on the stream in each of L layers compounds.
_STREAM = {"skip": -1.0, "stream_lr": -1.0}
DEPTH_RULES: dict[str, DepthRule] = {
    rule.name: rule
    for rule in (
        DepthRule("none", source="the record: nothing changes with depth", grade="C"),
        DepthRule(
            "completep",
            branch=-1.0,
            **_STREAM,
            source="Dey et al., CompleteP, arXiv 2505.01618; with Muon Qiu et al., arXiv 2512.05620",
            grade="B",
        ),
        DepthRule(
            "hyperp",
            branch=-0.5,
            lr=-0.5,
            outside_lr=-0.5,
            **_STREAM,
            source="HyperP, arXiv 2603.28743 (MuonH and Adam)",
            grade="B",
        ),
    )
}
NO_DEPTH_RULE, COMPLETEP = DEPTH_RULES["none"], DEPTH_RULES["completep"]


def depth_rule(name: str) -> DepthRule:
    """The rule of this name. Raises ConfigError if there is none."""
    if name not in DEPTH_RULES:
        raise ConfigError(f"depth_rule={name!r} is unknown; choose {', '.join(DEPTH_RULES)}")
    return DEPTH_RULES[name]
