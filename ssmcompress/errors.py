"""Errors meant for people: each says what was found, what was expected and the way out.

The command line prints the message as one line on stderr and ends with `exit_code`. A message names arguments of the
library in backticks (`samples`, `force=True`); the command line shows its options in their place (--samples, --force).
"""

from typing import Any


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
    """An exported file that does not compute what the model computes; `result` says by how much."""

    exit_code = 4

    def __init__(self, message: str, result: Any = None):
        super().__init__(message)
        self.result = result


NOT_FINITE = "the model's values are not finite on these images: check its weights, and `mean` and `std`"
