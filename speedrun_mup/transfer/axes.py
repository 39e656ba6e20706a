"""The two axes of a measurement: the size that is scaled, and the hyperparameter whose optimum is looked for.

Everything that a reader sees takes its words from here, so that a new axis is one entry of `SIZES`.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class SizeAxis:
    """A size that models or runs are scaled in, and the words for it.

    Args:
        name: Its setting, and its column in a table.
        larger: What the one of two models that has more of it is; largest, smaller and smallest go with it.
        plural: Several values of it; else "values of NAME".
        meaning: A sentence or two for a reader who does not know it.
        also: What other programs call it.
        most: The largest value that is believed.
    """

    name: str
    larger: str = "larger"
    largest: str = "largest"
    smaller: str = "smaller"
    smallest: str = "smallest"
    plural: str = ""
    meaning: str = "What the models or runs here are scaled in."
    also: tuple[str, ...] = ()
    most: int = 2**31


WIDTH_ELSEWHERE = (
    "n_embd",
    "d_model",
    "hidden_size",
    "hidden_dim",
    "embed_dim",
    "embedding_dim",
    "model_dim",
    "n_embed",
    "dim",
)
SIZES: dict[str, SizeAxis] = {
    axis.name: axis
    for axis in (
        SizeAxis(
            *("width", "wider", "widest", "narrower", "narrowest", "widths"),
            meaning="Size of the vectors that run through the model (d_model). Narrow models are cheap, wide ones are good.",
            also=WIDTH_ELSEWHERE,
        ),
        SizeAxis(
            *("n_layer", "deeper", "deepest", "shallower", "shallowest"),
            meaning="Number of layers, the depth of the model. Shallow models are cheap, deep ones are good.",
            also=("depth", "n_layers", "num_layers", "layers", "num_hidden_layers"),
        ),
        SizeAxis(
            "batch_tokens",
            meaning="Tokens of one optimizer step.",
            also=("batch", "batch_size", "global_batch_size"),
            most=2**53,
        ),
        SizeAxis(
            *("tokens", "longer", "longest", "shorter", "shortest"),
            meaning="Tokens of a whole run, its horizon.",
            also=("train_tokens", "num_tokens"),
            most=2**53,
        ),
    )
}


def with_article(name: str) -> str:
    """The name of an axis after "a" or "an"."""
    return f"{'an' if name[:1] in set('aeiou') else 'a'} {name}"


RATE = "lr"  # a table's column of learning rates, whichever they are


@dataclass(frozen=True)
class Axes:
    """What was scaled and what was tuned, by name, with the words for both.

    Args:
        size: One of `SIZES`, or any other name, which gets plain words.
        hyperparameter: "lr", "lr_scale" or NAME_lr for a learning rate or a factor on some; any other name for itself.
    """

    size: str = "width"
    hyperparameter: str = RATE

    @property
    def scale(self) -> SizeAxis:
        """The size axis with its words."""
        return SIZES.get(self.size) or SizeAxis(self.size)

    @property
    def plural(self) -> str:
        """Several sizes, for a reader: "widths", "values of n_layer"."""
        return self.scale.plural or f"values of {self.size}"

    @property
    def is_rate(self) -> bool:
        """Whether the hyperparameter is a learning rate, or a factor on some."""
        return self.hyperparameter in (RATE, "lr_scale") or self.hyperparameter.endswith("_lr")

    @property
    def label(self) -> str:
        """The hyperparameter for a reader: "learning rate" for all that are one, else its own name."""
        return "learning rate" if self.is_rate else self.hyperparameter

    @property
    def values(self) -> str:
        """Several values of the hyperparameter, for a reader."""
        return "learning rates" if self.is_rate else f"values of {self.hyperparameter}"

    @property
    def plain_values(self) -> str:
        """The same in the middle of a sentence about them."""
        return "rates" if self.is_rate else "values"

    @property
    def short(self) -> str:
        """The hyperparameter in a list of settings or the header of a table."""
        return RATE if self.is_rate else self.hyperparameter

    def at(self, size: int) -> str:
        """One place on the size axis: "width 64"."""
        return f"{self.size} {size}"
