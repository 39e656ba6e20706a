"""speedrun-mup: the modded-nanogpt speedrun recipe, made width-transferable.

run = speedrun_mup.load_run("runs/NAME")
run.model, run.tokenizer, run.generate("def main"), run.evaluate("notes.txt"), run.metrics

surface = speedrun_mup.fit_surface("runs.csv", sizes=["width", "n_layer", "tokens"])
surface["tokens"].drift, surface.predict({"width": 1024, "n_layer": 24, "tokens": 2**31})

swept = speedrun_mup.sweep(run, axes={"width": [64, 128, 256]}, lr=[0.001, 0.002, 0.004])  # run(width, lr, seed) -> loss
speedrun_mup.plan(run, target=1024, lr=0.002), speedrun_mup.transfer(swept), speedrun_mup.transfer("wandb/")
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from speedrun_mup.functions import plan as plan
    from speedrun_mup.functions import sweep as sweep
    from speedrun_mup.functions import transfer as transfer
    from speedrun_mup.training.load import load_run as load_run
    from speedrun_mup.transfer import fit_surface as fit_surface

__version__ = "0.1.0"
_CALLABLE = ("plan", "sweep", "transfer")  # packages that are functions too
_HOMES = {"load_run": "speedrun_mup.training.load", "fit_surface": "speedrun_mup.transfer"}


def __getattr__(name: str) -> Any:  # what needs torch is imported when it is asked for
    from importlib import import_module

    if name in _CALLABLE:
        return import_module(f"{__name__}.{name}")
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
