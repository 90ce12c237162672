"""Stop requests by signal, which a run handles after the current step."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def catch_stop_requests() -> Iterator[Callable[[], bool]]:
    """Catch the first SIGINT or SIGTERM in the body of the with statement; a second one has its usual effect.

    Signals are caught in the main thread only.

    Yields:
        A function that returns whether a signal was caught.
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    numbers = (signal.SIGINT, signal.SIGTERM)
    handlers = {number: signal.getsignal(number) for number in numbers}
    requests: list[int] = []

    def catch(number: int, frame: Any) -> None:
        requests.append(number)
        signal.signal(number, handlers[number])

    for number in numbers:
        signal.signal(number, catch)
    try:
        yield lambda: bool(requests)
    finally:
        for number in numbers:
            signal.signal(number, handlers[number])
