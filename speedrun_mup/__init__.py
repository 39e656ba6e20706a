"""speedrun-mup: the modded-nanogpt speedrun recipe, made width-transferable.

run = speedrun_mup.load_run("runs/NAME")
run.model, run.tokenizer, run.generate("def main"), run.evaluate("notes.txt"), run.metrics
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from speedrun_mup.training.load import load_run as load_run

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:  # what needs torch is imported when it is asked for
    if name != "load_run":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from speedrun_mup.training.load import load_run

    return load_run
