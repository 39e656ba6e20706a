"""A run's model in other programs' formats, by name, and back. Needs no torch until one is written."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from speedrun_mup.core.registry import Registry
from speedrun_mup.files import printable


@dataclass(frozen=True)
class Request:
    """What `speedrun-mup export` is asked for.

    folder: the run's, or that of one of its checkpoints. out: where to; nothing is there yet. step: of another checkpoint
    than the newest intact one. data: the corpus that the run was trained on, if it has moved. fold: put muP's multipliers
    into the weights, where another program would have to know them.
    """

    folder: Path
    out: Path
    step: int | None = None
    data: str | None = None
    fold: bool = True


def step_of(folder: Path, checkpoint: Path) -> str:
    """The words for a checkpoint of a run."""
    return f"step {int(checkpoint.name.removeprefix('step-'))} of {printable(folder)}"


# name -> a function that writes `request.out` as a whole, and returns lines for the user: what was written, how to use it.
FORMATS: Registry[Callable[[Request], str]] = Registry(
    "format",
    {
        "hf": f"{__name__}.hf.write:write_hf",
        "pt": f"{__name__}.record:write_pt",
        "dcp": f"{__name__}.dcp:write_dcp",
    },
)
ROOM = "make room, or name another place"  # what to do where nothing can be written
ABOUT = {
    "hf": "a folder that Hugging Face's transformers loads without this package",
    "pt": "one file, as modded-nanogpt saves it",
    "dcp": "a folder of torch.distributed.checkpoint",
}
