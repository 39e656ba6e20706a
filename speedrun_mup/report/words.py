"""The words of a report: what each term means, what each arm is, and what a verdict says."""

from __future__ import annotations

from speedrun_mup.transfer import Axes, Estimate, LargerIsBetter, TransferResult

# {size}, {larger}, {largest}, {smallest}: words of the size axis; {label}: of the hyperparameter.
_TERMS = {
    "base {size}": "The {size} that the {label} was tuned at. There every factor of muP is 1.",
    "muP": "Maximal update parametrization: rules that scale initialisation, forward pass and learning rates with {size}, "
    "so that what was tuned on a small model holds for a large one.",
    "standard parametrization": "What most code does: initialisation by fan-in, one learning rate whatever the {size}.",
    "arm": "One parametrization: rules for scaling with {size}, and an optimizer. All arms share data, steps and seeds.",
    "control": "An arm with a rule that is wrong on purpose. Its best {label} must drift; if it did not, this measurement "
    "could not have noticed a mistake, and nothing here would count.",
    "{label}": "Here a factor on what was tuned at the base {size}, unless it says otherwise; 1 is as tuned.",
    "log2": "Values are compared by their logarithm to base 2: +1 is twice, \N{MINUS SIGN}1 is half, 0.25 is 1.19 times.",
    "drift": "How far log2 of the best {label} moves with each doubling of {size}. 0: it stays, and transfers.",
    "loss": "Mean cross-entropy per token on text that the model was not trained on. Lower is better.",
    "nat": "Unit of the loss (natural logarithm). 0.01 nats less is a perplexity 1 % lower.",
    "regret": "Loss given away by the {largest} {noun} if it takes the best {label} of the base {size} instead of its own.",
    "interval": "Of 90 % here: in nine of ten such measurements it holds the true value, as far as noise between seeds goes.",
    "seed": "Number that fixes what is random. Runs that differ in their seed only show how large the noise is.",
    "sd": "Standard deviation: how far single runs lie from their mean, as a rule of thumb two times out of three.",
    "curvature": "How steeply the loss rises on either side of the best {label}, in nats per log2 squared.",
    "diverged": "A run whose loss was not finite, or ended above where it began. The {label} was too high.",
    "FLOPs": "Floating-point operations, the usual measure of what training costs.",
    "PASS": "The best {label} stays where it is, with enough certainty, and keeping it costs next to nothing.",
    "FAIL": "The best {label} moves, or keeping it costs loss, by more than noise explains.",
    "INCONCLUSIVE": "These runs do not decide it. The reasons say what is missing.",
}

# Nothing is claimed that a foreign table does not say.
_TERMS_OF_TABLE = _TERMS | {
    "base {size}": "The {size} whose best {label} is held against that of the {largest}: the {smallest}, unless another was "
    "named.",
    "arm": "One parametrization: rules for scaling with {size}, and an optimizer. Runs of one should differ in nothing else than "
    "{size}, {label} and seed.",
    "{label}": "As it stands in the table.",
    "loss": "As it stands in the table, taken for nats. Lower is better.",
    "diverged": "A run whose loss was not finite, or far above all others. The {label} was too high.",
}


def terms(axes: Axes, factors: bool) -> dict[str, str]:
    """Term -> what it means, for the axes of a report. factors: whether a value is a factor on what was tuned."""
    words = {name: getattr(axes.scale, name) for name in ("larger", "largest", "smallest", "noun")}
    words |= {"size": axes.size, "label": axes.label}
    told = _TERMS if factors else _TERMS_OF_TABLE
    return {axes.size: axes.scale.meaning} | {term.format(**words): text.format(**words) for term, text in told.items()}


ARM_WORDS = {
    "mup": "muP",
    "adam-mup": "muP (Adam)",
    "sp": "Standard parametrization",
    "adam-sp": "Standard parametrization (Adam)",
    "record26": "Record 26's own rules",
    "muon-sqrt-m": "muP, except Muon's rate times sqrt(m)",
    "muon-over-m": "muP, except Muon's rate over m",
}


def arm_words(name: str) -> str:
    """An arm by what it is, if it is one of ours, else by its name."""
    return ARM_WORDS.get(name, name)


def verdict_words(result: TransferResult) -> str:
    """A verdict as a sentence."""
    axes, limit = result.axes, result.thresholds.equivalence
    best, larger, noun = f"the best {axes.label}", axes.scale.larger, axes.scale.noun
    several = f"{larger} {noun}{'es' if noun.endswith('ch') else 's'}"
    still = f"up to \N{PLUS-MINUS SIGN}{limit:g} in log2 per doubling of {axes.size} count as no drift"
    told = {
        "PASS": f"PASS: {best} stays where it is as the {noun} gets {larger} ({still}).",
        "FAIL": f"FAIL: {best} does not hold for {several} ({still}); tune it again for each {axes.size}.",
        "INCONCLUSIVE": f"INCONCLUSIVE: these runs do not show whether {best} holds for {several}.",
    }
    return told[result.verdict.value]


def larger_words(larger: LargerIsBetter | None, most: float) -> str:
    """Whether the larger model had the lower loss, for a reader; `most` is the share of exceptions that is allowed."""
    if larger is None:
        return "not known"
    better = f"at {1 - larger.share:.1%} of the steps"
    return {
        "PASS": f"yes, {better} (PASS from {1 - most:.0%})",
        "FAIL": f"no, only {better} (FAIL below {1 - most:.0%})",
        "INCONCLUSIVE": f"unsure: {better}, and noise may explain the rest",
    }[larger.verdict.value]


def within(estimate: Estimate, form: str = "{:.4f}") -> str:
    """A value with its 90 % interval, as far as that is known, for a sentence."""
    low, high = estimate.interval()
    told = form.format(estimate.value)
    if low == low:  # else not a number: the noise is unknown
        told += f" (90 % interval {form.format(low)} to {form.format(high)})"
    return told.replace("-", "\N{MINUS SIGN}")
