"""Ends of a run that are no bug: `vdit.main` prints their line and exits with their status."""


class UserError(ValueError):
    """A wrong input: says on one line what was given, what is allowed, and where."""

    status = 2


class Diverged(RuntimeError):
    """Loss or state became NaN or infinite; the line names the last good checkpoint."""

    status = 1


class Interrupted(RuntimeError):
    """A signal asked to stop; the work is saved and the same command continues."""

    status = 143


EXPECTED = (UserError, Diverged, Interrupted)
