"""Progress reports: the library calls these functions, which do nothing until a front end is set."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TypeVar

T = TypeVar("T")


class FrontEnd:
    """The interface of a front end; this base class shows nothing."""

    def track(self, items: Iterable[T], what: str, total: int, done: int = 0) -> Iterable[T]:
        """Iterate over `items` and show how many of them are done."""
        return items

    def status(self, text: str) -> None:
        """Show `text` next to the current progress bar."""

    def line(self, text: str) -> None:
        """Print `text` so that it stays on the screen."""


_silent = FrontEnd()
_front_end: ContextVar[FrontEnd] = ContextVar("ssmcompress_front_end", default=_silent)


def track(items: Iterable[T], what: str, total: int, done: int = 0) -> Iterable[T]:
    """Iterate over `items` and show progress.

    Args:
        items: the remaining items. what: a description of the work.
        total: the number of items in all. done: how many of them were finished before these.
    """
    return _front_end.get().track(items, what, total, done)


def status(text: str) -> None:
    """Show `text` next to the current progress bar."""
    _front_end.get().status(text)


def line(text: str) -> None:
    """Print a line that stays on the screen."""
    _front_end.get().line(text)


@contextmanager
def use_front_end(front_end: FrontEnd) -> Iterator[None]:
    """Send all progress in the body of the with statement to `front_end`."""
    token = _front_end.set(front_end)
    try:
        yield
    finally:
        _front_end.reset(token)
