"""The one exception for what a user gave wrong; `main` prints its line and exits with status 2."""


class UserError(ValueError):
    """A wrong input: says on one line what was given, what is allowed, and where."""
