"""One training run: the loop, its schedule, its folder, its checkpoints and what it reports.

`train` and `TrainResult` are found here; they are imported when they are asked for, so that `tracking` and its kin need no torch.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from speedrun_mup.training.run import TrainResult as TrainResult
    from speedrun_mup.training.run import train as train


def __getattr__(name: str) -> Any:
    if name not in ("train", "TrainResult"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from speedrun_mup.training import run

    return getattr(run, name)
