"""Messages of the library as a person at a terminal reads them."""

from __future__ import annotations

import re
from collections.abc import Callable
from contextvars import ContextVar

from ..errors import escape_control

LONGEST_WORD = 400  # characters

# What makes options of the arguments that a message of the library names: `force=True` becomes --force.
name_options: ContextVar[Callable[[str], str]] = ContextVar("ssmcompress_name_options", default=str)


def readable(message: str) -> str:
    """A message with the names of options, without control characters, and without the middle of very long parts."""
    text = escape_control(name_options.get()(message))
    return re.sub(
        rf"\S{{{LONGEST_WORD + 1},}}", lambda m: f"{m.group()[: LONGEST_WORD // 2]}...{m.group()[-20:]}", text
    )
