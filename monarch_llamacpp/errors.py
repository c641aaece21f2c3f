"""The failures that a user sees: one line that names the cause and the remedy."""


class MonarchError(Exception):
    """Something failed. The message is one line; the command exits with status 1."""

    exit_status = 1


class UsageError(MonarchError):
    """The command or call was wrong. The command exits with status 2."""

    exit_status = 2
