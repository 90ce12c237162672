"""Library messages prepared for display in a terminal."""

from __future__ import annotations

import re
from collections.abc import Callable
from contextvars import ContextVar

from ..errors import escape_control

LONGEST_WORD = 400  # characters

# Converts argument names in library messages to options: `force=True` becomes --force.
name_options: ContextVar[Callable[[str], str]] = ContextVar("ssmcompress_name_options", default=str)


def readable(message: str) -> str:
    """Return a message with option names, without control characters, and with very long words shortened."""
    text = escape_control(name_options.get()(message))
    return re.sub(
        rf"\S{{{LONGEST_WORD + 1},}}", lambda m: f"{m.group()[: LONGEST_WORD // 2]}...{m.group()[-20:]}", text
    )
