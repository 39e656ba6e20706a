"""Runs in a folder of runs."""

from pathlib import Path

from speedrun_mup.training.run_folder import claim_unfinished


def newest_unfinished(out: Path) -> Path | None:
    """The run folder in `out` that `--resume auto` would take."""
    lock = claim_unfinished(out)
    if lock is None:
        return None
    lock.close()
    return lock.folder
