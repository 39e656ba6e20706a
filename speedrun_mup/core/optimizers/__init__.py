"""Optimizers: the maths of one update, apart from which rank owns what. optimizer.py says how to write one.

OPTIMIZERS and ORTHOGONALIZERS know their names without torch; the other names are imported when they are asked for.
"""

from typing import TYPE_CHECKING

from speedrun_mup.core.optimizers.registry import OPTIMIZERS as OPTIMIZERS
from speedrun_mup.core.optimizers.registry import ORTHOGONALIZERS as ORTHOGONALIZERS

if TYPE_CHECKING:
    from speedrun_mup.core.optimizers.library import *  # noqa: F403
else:
    from speedrun_mup.core.registry import names_of

    __getattr__, __dir__ = names_of("speedrun_mup.core.optimizers.library")
