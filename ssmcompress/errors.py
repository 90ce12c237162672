"""Errors meant for people: each says what was found, what was expected and the way out.

The command line prints the message as one line on stderr and ends with `exit_code`.
"""


class SsmCompressError(Exception):
    """Failed at run time; the base of every error this package raises on purpose."""

    exit_code = 1


class InputError(SsmCompressError, ValueError):
    """A file, an option or a value that cannot be used."""

    exit_code = 2


class BudgetError(SsmCompressError):
    """A FLOPs budget outside what the given stages can reach."""

    exit_code = 3


class VerificationError(SsmCompressError):
    """An exported file that does not compute what the model computes."""

    exit_code = 4
