"""muP: roles, the rule table, what a parameter is; and a library with microsoft/mup's names (docs/mup-library.md).

The rule tables need no torch, so that `--help` can list their names; the other names are imported when they are asked for.
"""

from typing import TYPE_CHECKING

from speedrun_mup.core.mup.rules import PARAMETRIZATIONS as PARAMETRIZATIONS

if TYPE_CHECKING:
    from speedrun_mup.core.mup.library import *  # noqa: F403
else:
    from speedrun_mup.core.registry import names_of

    __getattr__, __dir__ = names_of("speedrun_mup.core.mup.library")
