"""Exceptions and warnings with messages for users: what was found, what was expected and how to proceed.

The command line prints the message as one line on stderr and exits with `exit_code`. A message names arguments of the
library in backticks (`samples`, `force=True`); the command line shows its own options instead (--samples, --force).
"""

import difflib
import errno
from collections.abc import Iterable
from typing import Any


class SsmCompressError(Exception):
    """Base class of all errors that this package raises deliberately; by itself, a runtime failure."""

    exit_code = 1


class InputError(SsmCompressError, ValueError):
    """Raised for a file, an option or a value that cannot be used."""

    exit_code = 2


class OptionError(InputError):
    """Raised for a loading option that is not supported by models of this architecture."""


class BudgetError(SsmCompressError):
    """Raised for a FLOPs budget outside the range that the stages can reach."""

    exit_code = 3


class SsmCompressWarning(UserWarning):
    """Category of the warnings of this package: assumptions, omissions and possible improvements."""


class VerificationError(SsmCompressError):
    """Raised when the outputs of an exported file differ from the model's; `result` contains the differences."""

    exit_code = 4

    def __init__(self, message: str, result: Any = None):
        super().__init__(message)
        self.result = result


def suggest(name: str, known: Iterable[str]) -> str:
    """Return "; did you mean ...?" with the most similar of the known names, "" if none is similar."""
    close = difflib.get_close_matches(name, list(known), 1)
    return f"; did you mean {close[0]}?" if close else ""


NOT_FINITE = "the model's values are not finite on these images: check its weights, and `mean` and `std`"


def escape_control(text: str) -> str:
    """Escape control characters in a text: a file name may contain sequences that a terminal would execute."""
    return "".join(c if c.isprintable() or c in "\n\t" else f"\\x{ord(c):02x}" for c in text)


# Error texts of allocators: torch's on CPUs (Linux, Windows), CUDA's and cuBLAS', C++ (onnxruntime), and torch's if the
# system killed a process that decodes images.
OUT_OF_MEMORY = (
    "out of memory", "can't allocate memory", "cannot allocate memory", "not enough memory",
    "failed to allocate memory", "bad_alloc", "alloc_failed", "out of shared memory", "killed by signal: killed",
)  # fmt: skip


def is_out_of_memory(error: Exception) -> bool:
    """Return whether an error says that memory could not be allocated, on any device and in any library."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return any(text in str(error).lower() for text in OUT_OF_MEMORY)


def raise_if_out_of_memory(error: Exception) -> None:
    """Re-raise an error if it says that memory could not be allocated.

    Readers call it for an error that they would otherwise report as a damaged file. An OSError or RuntimeError of a
    library becomes a MemoryError, because callers interpret those as damage as well.
    """
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        raise error
    if is_out_of_memory(error):
        raise MemoryError(str(error)) from error
