"""Faults that the user can mend, each with the exit code of the process. Imports nothing, so that flags answer at once."""


class UserError(Exception):
    """A fault that the user can mend. Its text is one line: what, where, how to fix it. `exit_code` is the process's."""

    exit_code = 1


class ConfigError(UserError):
    """An unknown or impossible setting."""

    exit_code = 2


class NonFiniteError(UserError):
    """The loss or a gradient stopped being a number."""

    exit_code = 5


class OutOfMemory(UserError):
    """The machine or the GPU has no memory left for a step."""

    exit_code = 6


class CollectiveError(UserError):
    """Ranks lost each other or disagree."""

    exit_code = 6
