"""Progress of long work: the library calls `track`, which is silent until a front end replaces it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TypeVar

T = TypeVar("T")
Tracker = Callable[[Iterable, str, int], Iterable]

_tracker: ContextVar[Tracker] = ContextVar("ssmcompress_tracker", default=lambda items, what, total: items)


def track(items: Iterable[T], what: str, total: int) -> Iterable[T]:
    """`items`, shown as they pass: `what` is being done, `total` of them."""
    return _tracker.get()(items, what, total)


@contextmanager
def tracked_by(tracker: Tracker) -> Iterator[None]:
    """Send everything tracked inside the `with` block through `tracker`."""
    token = _tracker.set(tracker)
    try:
        yield
    finally:
        _tracker.reset(token)
