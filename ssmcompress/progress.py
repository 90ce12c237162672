"""Progress and warnings: without a front end, lines are logged, notes become warnings, and the rest is not shown.

Lines are records of the logger "ssmcompress" (INFO). Warnings have the category `SsmCompressWarning`.
"""

from __future__ import annotations

import logging
import sys
import time
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TypeVar

from .errors import SsmCompressWarning

T = TypeVar("T")
_logger = logging.getLogger("ssmcompress")


class FrontEnd:
    """The interface of a front end; this base class shows no progress, and logs lines to the logger "ssmcompress"."""

    def track(self, items: Iterable[T], what: str, total: int, done: int = 0) -> Iterable[T]:
        """Iterate over `items` and show how many of them are done."""
        return items

    def status(self, text: str) -> None:
        """Show `text` next to the current progress bar."""

    def line(self, text: str) -> None:
        """Print `text` so that it stays on the screen."""
        _logger.info(text)

    def note(self, text: str) -> None:
        """Show a note; without a front end, it becomes a warning, which Python prints by default."""
        if type(self) is FrontEnd:
            warn(text)
        else:
            self.line(text)


class Steps:
    """The loops of `track` recorded by `record_steps`, so that an error message can name the loop that raised it.

    Attributes:
        running: descriptions of the running loops, the innermost last.
        left: the innermost loop that ended early, by an error or a `break`, until another loop continues. Python closes
            the generators of a loop before its caller sees the error, so the loop is then no longer in `running`.
        finished: the last completed loop, None before the first.
    """

    def __init__(self) -> None:
        self.running: list[str] = []
        self.left: str | None = None
        self.finished: str | None = None

    def follow(self, items: Iterable[T], what: str, total: int) -> Iterator[T]:
        """Iterate over `items`, and log the start and end at level DEBUG."""
        self.running.append(what)
        self.left, began, whole = None, time.perf_counter(), False
        _logger.debug("%s: %d to do", what, total)
        try:
            for item in items:
                yield item
                self.left = None
            whole = True
        finally:
            self.running.remove(what)
            if whole:
                self.left, self.finished = None, what
            else:
                self.left = self.left or what
            _logger.debug("%s: %s after %.2f s", what, "done" if whole else "left", time.perf_counter() - began)


_silent = FrontEnd()
_held: ContextVar[dict[str, None] | None] = ContextVar("ssmcompress_notes", default=None)
_front_end: ContextVar[FrontEnd] = ContextVar("ssmcompress_front_end", default=_silent)
_steps: ContextVar[Steps | None] = ContextVar("ssmcompress_steps", default=None)


def track(items: Iterable[T], what: str, total: int, done: int = 0) -> Iterable[T]:
    """Iterate over `items` and show progress.

    Args:
        items: the remaining items. what: a description of the work.
        total: the total number of items. done: how many of them were finished before these.
    """
    shown, steps = _front_end.get().track(items, what, total, done), _steps.get()
    return shown if steps is None else steps.follow(shown, what, total - done)


def status(text: str) -> None:
    """Show `text` next to the current progress bar."""
    _front_end.get().status(text)


def line(text: str) -> None:
    """Print a line that stays on the screen."""
    _front_end.get().line(text)


def note(text: str) -> None:
    """Show, once, an assumption or omission that users should know about to interpret the result.

    A command prints its notes only on success (`hold_notes`), so that they do not precede an error. In Python, a note
    is a warning, and the filters of `warnings` control how often it is shown.
    """
    if (held := _held.get()) is not None:
        if text not in held:
            _logger.debug("note: %s", text)  # not printed by a command that fails
        held[text] = None
        return
    front_end = _front_end.get()
    if type(front_end) is FrontEnd:
        front_end.note(text)
        return
    noted = vars(front_end).setdefault("noted", set())  # stored in the front end, since another one shows it again
    if text not in noted:
        noted.add(text)
        front_end.note(text)


def warn(text: str) -> None:
    """Warn about something the user can change, attributed to the line of the calling code outside this package."""
    level, frame = 2, sys._getframe(1)
    inside = (__name__.partition(".")[0], "torch")  # torch's decorators and modules call this package
    while frame is not None and str(frame.f_globals.get("__name__")).partition(".")[0] in inside:
        level, frame = level + 1, frame.f_back
    warnings.warn(text, SsmCompressWarning, stacklevel=level)


@contextmanager
def hold_notes() -> Iterator[dict[str, None]]:
    """Collect the notes of the with block instead of printing them; yield them as keys, in order."""
    token = _held.set({})
    try:
        yield _held.get()
    finally:
        _held.reset(token)


@contextmanager
def record_steps() -> Iterator[Steps]:
    """Record which loops of `track` run in the body of the with statement."""
    steps = Steps()
    token = _steps.set(steps)
    try:
        yield steps
    finally:
        _steps.reset(token)


@contextmanager
def use_front_end(front_end: FrontEnd) -> Iterator[None]:
    """Send all progress in the body of the with statement to `front_end`."""
    token = _front_end.set(front_end)
    try:
        yield
    finally:
        _front_end.reset(token)
