"""Progress of long work: the library calls these functions, which are silent until a front end replaces them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TypeVar

T = TypeVar("T")


class FrontEnd:
    """Shows progress; this one shows nothing."""

    def track(self, items: Iterable[T], what: str, total: int, done: int = 0) -> Iterable[T]:
        """`items`, shown as they pass."""
        return items

    def status(self, text: str) -> None:
        """What is to be seen beside the bar that runs."""

    def line(self, text: str) -> None:
        """What is worth keeping on the screen."""


_silent = FrontEnd()
_front_end: ContextVar[FrontEnd] = ContextVar("ssmcompress_front_end", default=_silent)


def track(items: Iterable[T], what: str, total: int, done: int = 0) -> Iterable[T]:
    """`items`, shown as they pass: `what` is being done, `total` of them, of which `done` were before these."""
    return _front_end.get().track(items, what, total, done)


def status(text: str) -> None:
    """Tell how what is being tracked stands."""
    _front_end.get().status(text)


def line(text: str) -> None:
    """Tell what happened, once."""
    _front_end.get().line(text)


@contextmanager
def shown_by(front_end: FrontEnd) -> Iterator[None]:
    """Send everything inside the `with` block through `front_end`."""
    token = _front_end.set(front_end)
    try:
        yield
    finally:
        _front_end.reset(token)
