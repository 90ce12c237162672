"""Markdown elements of a page."""

from __future__ import annotations

import statistics
import textwrap
from collections.abc import Iterable, Sequence

MISSING = "–"


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table in Markdown."""
    lines = [list(header), ["---"] * len(header), *map(list, rows)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def show(value: float | None, form: str = "{:.2f}") -> str:
    """Return a number as text."""
    return MISSING if value is None else form.format(value)


def show_seeds(values: Sequence[float], expected: int | None = None) -> str:
    """Return the mean over seeds, with the smallest and the largest value if they differ.

    Args:
        expected: number of seeds; if there are fewer values, the text says how many.
    """
    if not values:
        return MISSING
    text = f"{statistics.mean(values):.2f}"
    few = f"{len(values)} of {expected}" if expected is not None and len(values) < expected else ""
    least, most = (f"{function(values):.2f}" for function in (min, max))
    spread = "" if least == most else f"{least} to {most}"
    details = "; ".join(detail for detail in (spread, few) if detail)
    return f"{text} ({details})" if details else text


def wrap(text: str) -> str:
    """Wrap a paragraph to lines of at most 120 characters."""
    return textwrap.fill(" ".join(text.split()), 120, break_long_words=False, break_on_hyphens=False)
