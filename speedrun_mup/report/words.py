"""The words of a report: what each term means, what each arm is, and what a verdict says."""

from __future__ import annotations

from speedrun_mup.transfer import Estimate, TransferResult, WiderIsBetter, knob_name

TERMS = {
    "width": "Size of the vectors that run through the model (d_model). Narrow models are cheap, wide ones are good.",
    "base width": "The width that the learning rates were tuned at. There every factor of muP is 1.",
    "muP": "Maximal update parametrization: rules that scale initialisation, forward pass and learning rates with width, "
    "so that what was tuned on a narrow model holds for a wide one.",
    "standard parametrization": "What most code does: initialisation by fan-in, one learning rate whatever the width.",
    "arm": "One way to scale with width: a set of rules and an optimizer. All arms share data, steps and seeds.",
    "control": "An arm with a rule that is wrong on purpose. Its best rate must drift; if it did not, this measurement "
    "could not have noticed a mistake, and nothing here would count.",
    "learning rate": "A rate here is a factor on what was tuned at the base width, unless it says otherwise; 1 is as tuned.",
    "octave": "A factor of two: +1 octave is twice, \N{MINUS SIGN}1 is half, 0.25 is 1.19 times.",
    "drift": "How far the best rate moves with each doubling of width, in octaves. 0: it stays, and the rate transfers.",
    "loss": "Mean cross-entropy per token on text that the model was not trained on. Lower is better.",
    "nat": "Unit of the loss (natural logarithm). 0.01 nats less is a perplexity 1 % lower.",
    "regret": "Loss given away at the widest model if it takes the base width's best rate instead of its own.",
    "interval": "Of 90 % here: in nine of ten such measurements it holds the true value, as far as noise between seeds goes.",
    "seed": "Number that fixes what is random. Runs that differ in their seed only show how large the noise is.",
    "sd": "Standard deviation: how far single runs lie from their mean, as a rule of thumb two times out of three.",
    "curvature": "How steeply the loss rises beside the best rate, in nats per octave squared.",
    "diverged": "A run whose loss was no number, or ended above where it began. The learning rate was too high.",
    "FLOPs": "Floating-point operations, the usual measure of what training costs.",
    "PASS": "The best rate stays where it is, surely enough, and keeping it costs next to nothing.",
    "FAIL": "The best rate moves, or keeping it costs loss, by more than noise explains.",
    "INCONCLUSIVE": "These runs cannot tell. The reasons say what is missing.",
}

# What a stranger's table does not tell is not told of it.
TERMS_OF_TABLE = TERMS | {
    "base width": "The width whose best rate is held against that of the widest: the narrowest, unless another was named.",
    "arm": "One way to scale with width: a set of rules and an optimizer. Runs of one should differ in nothing else than "
    "width, rate and seed.",
    "learning rate": "As it stands in the table.",
    "loss": "As it stands in the table, taken for nats. Lower is better.",
    "diverged": "A run whose loss was no number, or far above all others. The learning rate was too high.",
}

ARM_WORDS = {
    "mup": "muP",
    "adam-mup": "muP (Adam)",
    "sp": "Standard parametrization",
    "adam-sp": "Standard parametrization (Adam)",
    "record26": "Record 26's own rules",
    "muon-sqrt-m": "muP, but for Muon's rate times sqrt(m)",
    "muon-over-m": "muP, but for Muon's rate over m",
}


def arm_words(name: str) -> str:
    """An arm by what it is, if it is one of ours, else by its name."""
    return ARM_WORDS.get(name, name)


def verdict_words(result: TransferResult) -> str:
    """A verdict as a sentence."""
    knob, limit = knob_name(result.knob), result.thresholds.equivalence
    still = f"up to \N{PLUS-MINUS SIGN}{limit:g} octaves per doubling of width count as standing still"
    told = {
        "PASS": f"PASS: the best {knob} stays where it is as the model gets wider ({still}).",
        "FAIL": f"FAIL: the best {knob} does not hold for wider models ({still}); tune it anew for each width.",
        "INCONCLUSIVE": f"INCONCLUSIVE: these runs do not show whether the best {knob} holds for wider models.",
    }
    return told[result.verdict.value]


def wider_words(wider: WiderIsBetter | None, most: float) -> str:
    """Whether the wider model had the lower loss, for a reader; `most` is the share of exceptions that is allowed."""
    if wider is None:
        return "not known"
    better = f"at {1 - wider.share:.1%} of the steps"
    return {
        "PASS": f"yes, {better} (PASS from {1 - most:.0%})",
        "FAIL": f"no, only {better} (FAIL below {1 - most:.0%})",
        "INCONCLUSIVE": f"unsure: {better}, and noise may explain the rest",
    }[wider.verdict.value]


def within(estimate: Estimate, form: str = "{:.4f}") -> str:
    """A value with its 90 % interval, as far as that is known, for a sentence."""
    low, high = estimate.interval()
    told = form.format(estimate.value)
    if low == low:  # else not a number: the noise is unknown
        told += f" (90 % interval {form.format(low)} to {form.format(high)})"
    return told.replace("-", "\N{MINUS SIGN}")
