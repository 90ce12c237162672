"""Which implementation of an op runs: named in the call, forced for a block of code, or chosen by device."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from importlib import import_module
from types import ModuleType

import torch

# Every backend is a module with the public ops, same arguments in the same order.
BACKENDS = {
    "reference": "ssmcompress.ops.reference",
    "onnx": "ssmcompress.ops.onnx",  # not for computing: the form that export writes into a graph
}

_forced: ContextVar[str | None] = ContextVar("ssmcompress_ops_backend", default=None)


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Force every op inside the `with` block that names no backend itself onto `name`."""
    _module_name(name)
    token = _forced.set(name)
    try:
        yield
    finally:
        _forced.reset(token)


def select(backend: str | None) -> ModuleType:
    """The module that runs an op: `backend`, else the forced one, else the reference."""
    return import_module(_module_name(backend or _forced.get() or "reference"))


def full_precision(device: torch.device) -> AbstractContextManager:
    """No autocast inside an op: products of hundreds of decays do not survive bfloat16."""
    if torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()  # an autocast block, even an idle one, doubles the time of torch.export


def _module_name(name: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"unknown backend {name!r}; there are {', '.join(BACKENDS)}")
    return BACKENDS[name]
