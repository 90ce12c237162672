"""Progress reports: until a front end is set, lines are logged and the rest is not shown."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TypeVar

T = TypeVar("T")


class FrontEnd:
    """The interface of a front end; this base class shows no progress, and logs lines to the logger "ssmcompress"."""

    def track(self, items: Iterable[T], what: str, total: int, done: int = 0) -> Iterable[T]:
        """Iterate over `items` and show how many of them are done."""
        return items

    def status(self, text: str) -> None:
        """Show `text` next to the current progress bar."""

    def line(self, text: str) -> None:
        """Print `text` so that it stays on the screen."""
        logging.getLogger("ssmcompress").info(text)

    def note(self, text: str) -> None:
        """Show a note; without a front end, it is logged as a warning, which Python prints by default."""
        if type(self) is FrontEnd:
            logging.getLogger("ssmcompress").warning(text)
        else:
            self.line(text)


_silent = FrontEnd()
_held: ContextVar[dict[str, None] | None] = ContextVar("ssmcompress_notes", default=None)
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


def note(text: str) -> None:
    """Say what was assumed or left out, and a user should know of the result: a line, printed once.

    A command prints its notes when it has succeeded (`hold_notes`), so that an error is not preceded by them.
    """
    if (held := _held.get()) is not None:
        held[text] = None
        return
    front_end = _front_end.get()
    noted = vars(front_end).setdefault("noted", set())  # in the front end: another one shows the note again
    if text not in noted:
        noted.add(text)
        front_end.note(text)


@contextmanager
def hold_notes() -> Iterator[dict[str, None]]:
    """Collect the notes of the body of the with statement instead of printing them; yields them as keys, in order."""
    token = _held.set({})
    try:
        yield _held.get()
    finally:
        _held.reset(token)


@contextmanager
def use_front_end(front_end: FrontEnd) -> Iterator[None]:
    """Send all progress in the body of the with statement to `front_end`."""
    token = _front_end.set(front_end)
    try:
        yield
    finally:
        _front_end.reset(token)
