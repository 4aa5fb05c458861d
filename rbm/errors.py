"""Errors that a user can mend: the command line prints them as one line and exits with 2."""


class UserError(Exception):
    """A mistake in what the user gave: a file, a value, a name. The message says what to do."""
