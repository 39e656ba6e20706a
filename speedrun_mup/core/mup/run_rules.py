"""How training scales with the batch and with the tokens of a run: rules of a run, as data, next to those of a parameter.

m is the batch over the base batch, in tokens (at a fixed number of training tokens), or the run's tokens over the base run's
(at a fixed batch). Learning rates follow m**exponent, for each kind of update its own. Weight decay follows so that its
timescale stays the same part of the run: learning rate * decay goes as batch / tokens (Wang and Aitchison, arXiv 2405.13698;
grade B). At base every factor is exactly 1.

Imports no torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

from speedrun_mup.core.errors import ConfigError
from speedrun_mup.core.mup.rules import Update

# What becomes of an optimizer's memory, as beta of a moment:
#   steps    beta: it remembers as many steps
#   tokens   beta**m: it remembers as many tokens, exactly
#   linear   1 - (1 - beta) * m: the same while 1 - beta is small; leaves [0, 1) where it is not
Memory = Literal["steps", "tokens", "linear"]


@dataclass(frozen=True)
class RunRule:
    """One row: how the values of a run follow m.

    Args:
        axis: "batch" or "tokens".
        name: as --batch-rule or --tokens-rule takes it.
        lr: exponent of m in the learning rate, by kind of update.
        beta1, beta2: what becomes of the memory of each moment of an entrywise update. Momentum stays as it is.
        eps: exponent of m in the eps of an entrywise update.
        source: where it is from.
        grade: how well it is supported, for each kind of update that it has a different one for.
    """

    axis: str
    name: str
    lr: Mapping[Update, float]
    beta1: Memory = "steps"
    beta2: Memory = "steps"
    eps: float = 0.0
    source: str = ""
    grade: str = ""

    def changed(self, lr: float | None, spectral_lr: float | None) -> RunRule:
        """This rule with exponents of the user's own: of all learning rates, and of those of spectral updates alone."""
        own = dict(self.lr) if lr is None else dict.fromkeys(Update, lr)
        return replace(self, lr=own if spectral_lr is None else own | {Update.SPECTRAL: spectral_lr})


def _alike(exponent: float) -> dict[Update, float]:
    """Of the kinds of update that rules are known for, whichever the rule."""
    return {Update.ENTRYWISE: exponent, Update.SPECTRAL: exponent}


_SDE = "Malladi et al., arXiv 2205.10287; Complete(d)P, arXiv 2512.22382"
BATCH_RULES: dict[str, RunRule] = {
    rule.name: rule
    for rule in (
        RunRule("batch", "none", dict.fromkeys(Update, 0.0), source="nothing follows the batch", grade="C"),
        RunRule(
            "batch",
            "marin",
            _alike(0.5),
            beta2="tokens",
            source="Delphi and marin; Muon's also in nanochat and ArchScale",
            grade="B; Muon C: assumed everywhere, tested nowhere",
        ),
        RunRule(
            *("batch", "completedp", _alike(0.5), "linear", "linear", -0.5),
            source=f"{_SDE}; for Adam. Muon's rate as in marin",
            grade="B; Muon C",
        ),
    )
}
TOKENS_RULES: dict[str, RunRule] = {
    rule.name: rule
    for rule in (
        RunRule("tokens", "none", dict.fromkeys(Update, 0.0), source="nothing follows the tokens", grade="C"),
        RunRule(
            "tokens",
            "bjorck",
            _alike(-0.32),
            source="Bjorck et al., arXiv 2409.19913 (Adam, measured); HyperP, arXiv 2603.28743 (Muon)",
            grade="B",
        ),
        RunRule(
            *("tokens", "completedp", _alike(-0.5), "linear", "linear", 0.5),
            source=f"{_SDE}; for Adam. Muon's rate alike, by analogy",
            grade="B; Muon C",
        ),
        RunRule(
            "tokens",
            "steplaw",
            {Update.ENTRYWISE: 0.02},
            source="StepLaw, arXiv 2503.04715: D^0.307 with B ~ D^0.571, which leaves this at a fixed batch",
            grade="C, contradicts the others",
        ),
        RunRule(
            "tokens",
            "nanochat",
            _alike(0.19),
            source="karpathy/nanochat: implied by B ~ D^0.383 and LR ~ sqrt(B)",
            grade="C, contradicts the others",
        ),
    )
}


@dataclass(frozen=True)
class RunFactors:
    """What the values of one kind of update are multiplied by, and what becomes of its betas."""

    lr: float = 1.0
    eps: float = 1.0
    weight_decay: float = 1.0
    powers: tuple[float, float] = (1.0, 1.0)
    slopes: tuple[float, float] = (1.0, 1.0)
    why: str = ""

    def beta(self, which: int, beta: float) -> float:
        """beta1 (which = 0) or beta2 (1) of this run.

        Raises:
            ConfigError: it would leave [0, 1).
        """
        slope, found = self.slopes[which], beta ** self.powers[which]
        if slope != 1:
            found = 1 - (1 - found) * slope
        if not 0 <= found < 1:
            raise ConfigError(
                f"beta{which + 1}={beta:g} would become {found:.4g} by {self.why}, and must be in [0, 1); choose a rule that "
                "keeps memory in steps or tokens (--batch-rule marin, --tokens-rule bjorck), or a base nearer to this run"
            )
        return found


@dataclass(frozen=True)
class RunScaling:
    """The rules of a run and how far it is from base.

    Args:
        batch, tokens: the rules.
        m_batch, m_tokens: this run's size over the base's; 1 where there is no base.
    """

    batch: RunRule = BATCH_RULES["none"]
    tokens: RunRule = TOKENS_RULES["none"]
    m_batch: float = 1.0
    m_tokens: float = 1.0

    @property
    def parts(self) -> tuple[tuple[RunRule, float, float], ...]:
        """(rule, m, m as it acts on memory) of each axis that is off its base and has a rule."""
        both = ((self.batch, self.m_batch, self.m_batch), (self.tokens, self.m_tokens, 1 / self.m_tokens))
        return tuple(part for part in both if part[1] != 1 and (part[0].name != "none" or any(part[0].lr.values())))

    def lr_factors(self, kind: Update) -> dict[str, float]:
        """What each axis contributes to the learning rates of one kind of update.

        Raises:
            ConfigError: a rule says nothing of this kind.
        """
        found = {}
        for rule, m, _ in self.parts:
            if kind not in rule.lr:
                known = ", ".join(each.value for each in rule.lr)
                raise ConfigError(
                    f"{rule.axis} rule {rule.name} says nothing of {kind.value} updates, only of {known} ones; choose another "
                    f"--{rule.axis}-rule, or give --{rule.axis}-lr-exponent"
                )
            found[rule.axis] = m ** rule.lr[kind]
        return found

    def factors(self, kind: Update) -> RunFactors:
        """All factors for one kind of update. ConfigError as lr_factors."""
        lr, eps, decay = 1.0, 1.0, 1.0
        powers, slopes = [1.0, 1.0], [1.0, 1.0]
        for factor in self.lr_factors(kind).values():
            lr *= factor
        for rule, m, shorter in self.parts:
            decay *= shorter
            if kind is not Update.ENTRYWISE:
                continue  # what is known of memory and eps is of Adam
            eps *= m**rule.eps
            for which, memory in enumerate((rule.beta1, rule.beta2)):
                powers[which] *= shorter if memory == "tokens" else 1
                slopes[which] *= shorter if memory == "linear" else 1
        why = " and ".join(f"{rule.axis} rule {rule.name} at {m:g} times base" for rule, m, _ in self.parts)
        return RunFactors(lr, eps, decay / lr, (powers[0], powers[1]), (slopes[0], slopes[1]), why)


NO_RUN_SCALING = RunScaling()
