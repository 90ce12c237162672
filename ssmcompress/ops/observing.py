"""Observing the arguments of a model's scans and attention while it runs, without running them again."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from torch import Tensor


class AttentionCall(NamedTuple):
    """One call of attention: softmax(scale * q k^T + bias) v.

    Attributes:
        queries: (batch, heads, queries, width), of the first tokens. keys: (batch, heads, tokens, width).
        scale: factor of the products. bias: (batch, 1, 1, tokens), or None.
    """

    queries: Tensor
    keys: Tensor
    scale: float
    bias: Tensor | None


# Called with a `ScanCall` of `selective_scan`, or an `AttentionCall`.
Observer = Callable[[Any], None]

# A plain list, which torch.compile can guard. Each observer is stored with the thread whose calls it observes.
_observers: list[tuple[int, Observer]] = []


@contextmanager
def observe(observer: Observer) -> Iterator[None]:
    """Notify `observer` of the calls of this thread in the body of the with statement."""
    entry = threading.get_ident(), observer
    _observers.append(entry)
    try:
        yield
    finally:
        _observers.remove(entry)


def is_observed() -> bool:
    """Return whether the calls of this thread are observed."""
    return bool(_observers) and any(thread == threading.get_ident() for thread, _ in _observers)


def tell(call: Any) -> None:
    """Notify the observers of this thread of a call, a `ScanCall` or an `AttentionCall`."""
    for thread, observer in _observers:
        if thread == threading.get_ident():
            observer(call)
