"""What changes from step to step: learning rate, momentum, attention window, batch, sequence length. `Schedule` has it all.

A run is divided into stages (`Stage`); within one the batch stays the same. BATCH_SCHEDULES are lists of stages with a
name. The curves of record 26 (learning rate, momentum, window) run across the stages.
"""

from __future__ import annotations

import functools
import math
import re
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, NamedTuple

from speedrun_mup.core.errors import ConfigError


def lr_factor(progress: float, cooldown: float, floor: float, peak: float = 1.0) -> float:
    """`peak`, then linear decay over the last `cooldown` fraction down to `floor`; no warmup. Record 26: 0.45, 0.10."""
    if progress < 1 - cooldown:
        return peak
    left = (1 - progress) / cooldown if cooldown > 0 else 0.0
    return peak * left + floor * (1 - left)


def muon_momentum(step: int, warmup_steps: int, start: float, final: float) -> float:
    """Linear warmup in absolute steps, as in record 26 (0.85 to 0.95 over 300), whatever the length of the run."""
    return final if step >= warmup_steps else start + (final - start) * step / warmup_steps


def window_blocks(progress: float, final_tokens: int, block_size: int) -> int:
    """Blocks in the long attention window: final_tokens * progress, rounded up to blocks, at least 1.

    Record 26 (1728 tokens, blocks of 128) goes from 1 to 14 blocks: 1792 tokens, a little past its nominal length.
    """
    return max(1, math.ceil(final_tokens * progress / block_size))


@dataclass(frozen=True)
class Stage:
    """A part of a run.

    Args:
        fraction: of the run's steps; those of all stages add up to 1.
        micro_batches: of a step, over all ranks.
        lr_factor: on all learning rates.
        sequence_tokens: a micro-batch is cut into sequences of so many tokens; None: it is one.
        window: the long attention window, in blocks; None: it grows with the run, as in record 26.
        loss_weights: of predicting the next token, the one after it, ...; GPT predicts the next one only.

    Raises:
        ConfigError: for a number that no stage can have.
    """

    fraction: Fraction
    micro_batches: int
    lr_factor: float = 1.0
    sequence_tokens: int | None = None
    window: int | None = None
    loss_weights: tuple[float, ...] = (1.0,)

    def __post_init__(self) -> None:
        for name in (
            "micro_batches",
            "sequence_tokens",
            "window",
        ):  # how many micro-batches: `Schedule` knows the stage
            value, counted = getattr(self, name), name == "micro_batches"
            if not (value is None and not counted) and not (type(value) is int and (counted or value >= 1)):
                half = "; divide with //" if isinstance(value, float) else ""
                raise ConfigError(f"a stage's {name}={value!r} must be a whole number, at least 1{half}")


class AtStep(NamedTuple):
    """What a schedule says about one step.

    window: in blocks; tokens: of the step, over all ranks; decay_factor: on weight decay, next to that of the rate.
    """

    lr_factor: float
    momentum: float
    window: int
    micro_batches: int
    sequence_tokens: int
    loss_weights: tuple[float, ...]
    tokens: int
    decay_factor: float = 1.0


@dataclass(frozen=True)
class Schedule:
    """All stages of a run, and the curves across them. Steps beyond the end are like those of the last stage.

    Args:
        stages: in order.
        iterations: steps of the run.
        micro_batch_tokens: tokens of a micro-batch.
        block_size: of the attention window.
        window_tokens: the long attention window at the end, in stages that do not set one.
        cooldown: the last fraction of the steps, in which the learning rate falls.
        final_lr_frac: where it falls to.
        momentum: Muon's after its warmup, at its start, and how many steps it takes.
        options: techniques that change rates, momentum or loss weights of a step, in this order: what `at` made of the
            stages -> what holds.

    Raises:
        ConfigError: in one line, for stages that no run can have.
    """

    stages: tuple[Stage, ...]
    iterations: int
    micro_batch_tokens: int
    block_size: int
    window_tokens: int
    cooldown: float
    final_lr_frac: float
    momentum: tuple[float, float, int]
    options: tuple[Callable[[int, AtStep, Schedule], AtStep], ...] = ()

    @classmethod
    def of(cls, cfg: Any) -> Schedule:
        """The schedule of a run with the settings `cfg`, a TrainConfig."""
        return cls(
            parse_stages(cfg.batch_schedule, cfg.micro_batches),
            cfg.iterations,
            cfg.micro_batch_tokens,
            cfg.block_size,
            cfg.window_tokens,
            cfg.cooldown,
            cfg.final_lr_frac,
            (cfg.momentum, cfg.momentum_start, cfg.momentum_warmup),
        )

    def __post_init__(self) -> None:
        if problem := next(self._problems(), ""):
            raise ConfigError(f"batch_schedule: {problem}")

    def _problems(self) -> Iterator[str]:
        if not self.stages or sum(stage.fraction for stage in self.stages) != 1:
            shares = " + ".join(str(stage.fraction) for stage in self.stages)
            yield f"the fractions of its stages, {shares or 'none'}, do not add up to 1"
        for number, (stage, begin, end) in enumerate(zip(self.stages, self._begins, self._ends), 1):
            which, sequence = f"stage {number} of {len(self.stages)}", stage.sequence_tokens
            if end <= begin:
                yield f"{which} has no step in iterations={self.iterations}; train longer or with fewer stages"
            if not 1 <= stage.micro_batches <= 2**20:
                yield f"{which} has {stage.micro_batches} micro-batches in a step; take 1 to 2^20"
            if not 0 < stage.lr_factor < math.inf or not all(0 < weight < math.inf for weight in stage.loss_weights):
                yield f"the factors of {which} are not positive and finite"
            if sequence and (self.micro_batch_tokens % sequence or sequence % self.block_size):
                yield (
                    f"{which} has sequences of {sequence} tokens; they must divide micro_batch_tokens="
                    f"{self.micro_batch_tokens} and be multiples of block_size={self.block_size}"
                )
            if len(stage.loss_weights) != 1:
                yield f"{which} weighs {len(stage.loss_weights)} tokens ahead; the model predicts 1"

    @functools.cached_property
    def _ends(self) -> list[int]:
        """The step behind the last of each stage."""
        done, ends = Fraction(0), []
        for stage in self.stages:
            done += stage.fraction
            ends.append(round(done * self.iterations))
        return ends

    @property
    def _begins(self) -> list[int]:
        return [0, *self._ends[:-1]]

    @functools.cached_property
    def _done(self) -> list[int]:
        """Micro-batches of all steps before each stage."""
        done = [0]
        for stage, begin, end in zip(self.stages, self._begins, self._ends):
            done.append(done[-1] + stage.micro_batches * (end - begin))
        return done[:-1]

    def _stage_of(self, step: int) -> int:
        return min(bisect_right(self._ends, step), len(self.stages) - 1)

    def at(self, step: int) -> AtStep:
        """What holds at `step`; at `iterations`, where the run only validates, what its last step came to."""
        stage, progress = self.stages[self._stage_of(step)], step / self.iterations
        final, start, warmup = self.momentum
        now = AtStep(
            lr_factor=lr_factor(progress, self.cooldown, self.final_lr_frac, stage.lr_factor),
            momentum=muon_momentum(step, warmup, start, final),
            window=stage.window or window_blocks(progress, self.window_tokens, self.block_size),
            micro_batches=stage.micro_batches,
            sequence_tokens=stage.sequence_tokens or self.micro_batch_tokens,
            loss_weights=stage.loss_weights,
            tokens=stage.micro_batches * self.micro_batch_tokens,
        )
        for option in self.options:
            now = option(step, now, self)
        return now

    def micro_batches_before(self, step: int) -> int:
        """Micro-batches of all steps before `step`, over all ranks: where the data of `step` begin."""
        stage = self._stage_of(step)
        return self._done[stage] + self.stages[stage].micro_batches * (step - self._begins[stage])

    def tokens_before(self, step: int) -> int:
        """Tokens of all steps before `step`, over all ranks."""
        return self.micro_batches_before(step) * self.micro_batch_tokens

    @property
    def tokens(self) -> int:
        """Tokens of the whole run."""
        return self.tokens_before(self.iterations)

    @property
    def is_constant(self) -> bool:
        """Whether all steps have the same batch."""
        return len({stage.micro_batches for stage in self.stages}) == 1

    @property
    def largest_step(self) -> int:
        """The first step of the most micro-batches."""
        return max(zip(self._begins, self.stages), key=lambda pair: pair[1].micro_batches)[0]

    def widest_step(self, last: int) -> int:
        """The latest step up to `last`, of those with the longest attention window."""
        ends = {last, *(end - 1 for end in self._ends[:-1] if end <= last)}  # within a stage it only grows
        return max(ends, key=lambda step: (self.at(step).window, step))

    @property
    def group(self) -> int:
        """The most micro-batches of which every step takes a whole number: those of a step, if the batch is constant."""
        return math.gcd(*(stage.micro_batches for stage in self.stages))

    def agrees(self, other: Schedule, steps: int) -> bool:
        """Whether the first `steps` steps lie in the same stages as in `other`, which has the same stages."""
        return [min(end, steps) for end in self._ends] == [min(end, steps) for end in other._ends]

    @property
    def widest_window(self) -> int:
        """The longest attention window of the run, in blocks."""
        grown = window_blocks(1.0, self.window_tokens, self.block_size)
        return max(stage.window or grown for stage in self.stages)

    def describe(self) -> str:
        """Steps and tokens, as text."""
        sizes = [f"{stage.micro_batches * self.micro_batch_tokens:,}" for stage in self.stages]
        if self.is_constant:
            return f"{self.iterations} steps of {sizes[0]} tokens"
        parts = ", ".join(f"{size} from step {begin}" for size, begin in zip(sizes, self._begins))
        return f"{self.iterations} steps, {self.tokens:,} tokens: {parts}"


# Stages by name, from the --micro-batches of the settings.
BATCH_SCHEDULES: dict[str, Callable[[int], Sequence[Stage]]] = {
    "constant": lambda micro_batches: [Stage(Fraction(1), micro_batches)],
    # Record 46 (modded-nanogpt PR 163): the batch grows by thirds, and the learning rate a little less than with it.
    "record46": lambda micro_batches: [
        Stage(Fraction(1, 3), micro_batches),
        Stage(Fraction(1, 3), 2 * micro_batches, lr_factor=1.51),
        Stage(Fraction(1, 3), 3 * micro_batches, lr_factor=1.93),
    ],
}


def parse_stages(text: str, micro_batches: int) -> tuple[Stage, ...]:
    """The stages of a name in BATCH_SCHEDULES, or of "fraction:batch factor[:learning rate factor], ...".

    Raises:
        ConfigError: in one line, for anything else.
    """
    if text in BATCH_SCHEDULES:
        return tuple(BATCH_SCHEDULES[text](micro_batches))
    stages = []
    for part in text.split(","):
        number = r"\d{1,9}(?:\.\d{1,9})?(?:/0*[1-9]\d{0,8})?"
        found = re.fullmatch(rf"\s*({number}):({number})(?::({number}))?\s*", part)
        if not found:
            raise ConfigError(
                f"batch_schedule={text[:80]!r} is neither {', '.join(BATCH_SCHEDULES)} nor stages such as "
                "1/3:1,1/3:2:1.5,1/3:3:1.9 (fraction of the steps : factor on --micro-batches : factor on the learning rates)"
            )
        fraction, factor, lr = (_fraction(value) for value in found.groups("1"))
        if (factor * micro_batches).denominator != 1:
            raise ConfigError(
                f"batch_schedule={text[:80]!r}: {factor} times micro_batches={micro_batches} is no whole number; give more, "
                "smaller --micro-batches"
            )
        stages.append(Stage(fraction, int(factor * micro_batches), float(lr)))
    return tuple(stages)


def _fraction(text: str) -> Fraction:
    above, _, below = text.partition("/")
    return Fraction(above) / Fraction(below or 1)
