"""User-facing errors, each with its exit code. Imports nothing, so that `--help` stays fast."""


class UserError(Exception):
    """An error that the user can fix. Its text is one line: what, where, how to fix it. `exit_code` is the process's."""

    exit_code = 1


def in_a_line(fault: BaseException, most: int = 160) -> str:
    """The kind of a fault that is not ours, and up to `most` characters of the first line of what it says."""
    said = str(fault).strip().partition("\n")[0][:most]
    return f"{type(fault).__name__}: {said}" if said else type(fault).__name__


class ConfigError(UserError):
    """An unknown or impossible setting."""

    exit_code = 2


class Diverged(UserError):
    """Training diverged: its numbers are not finite, its weights exploded, or its loss ended above where it began."""

    exit_code = 5


class NonFiniteError(Diverged):
    """The loss or a gradient stopped being a number."""


class Stopped(UserError):
    """The run was asked to stop before it had anything to save."""

    exit_code = 75  # EX_TEMPFAIL: a scheduler should start the command again


class OutOfMemory(UserError):
    """The machine or the GPU has no memory left for a step."""

    exit_code = 6


class CollectiveError(UserError):
    """Ranks lost each other or disagree."""

    exit_code = 6
