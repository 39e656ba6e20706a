"""How text is drawn from a model: settings that need no torch."""

from __future__ import annotations

from dataclasses import dataclass

from speedrun_mup.core.errors import ConfigError
from speedrun_mup.flags import LARGEST
from speedrun_mup.settings import NOT_NEGATIVE, Valid, at_least, at_most, problems, setting


@dataclass(frozen=True)
class Sampling:
    """The settings of drawing tokens. Raises ConfigError for one that is out of range."""

    max_new_tokens: int = setting(
        "sampling", "tokens to write at most", 200, affects="display", valid=(at_most(LARGEST), at_least(1))
    )
    temperature: float = setting(
        "sampling",
        "divides the logits: below 1 favours likely tokens, 0 always takes the likeliest",
        0.8,
        affects="display",
        valid=(NOT_NEGATIVE, Valid("0 or at least 1e-6", lambda value: not 0 < value < 1e-6)),
    )
    top_k: int = setting(
        "sampling",
        "draw from this many of the likeliest tokens; 0 is from all",
        50,
        affects="display",
        valid=(at_most(LARGEST), at_least(0)),
    )
    top_p: float = setting(
        "sampling",
        "of these, from the fewest that together have this probability",
        0.95,
        affects="display",
        valid=(Valid("in (0, 1]", lambda value: 0 < value <= 1),),
    )
    seed: int = setting("sampling", "of the random numbers", 0, affects="display", valid=(at_least(0),))

    def __post_init__(self) -> None:
        if wrong := problems(self):
            raise ConfigError("; ".join(wrong))
