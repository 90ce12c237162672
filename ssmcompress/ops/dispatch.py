"""Which implementation of an op runs: named in the call, forced for a block of code, or chosen by device."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from functools import cache
from importlib import import_module
from types import ModuleType

import torch
from torch import Tensor

# A backend is a module with these functions: the public ops with the same arguments in the same order, all given.
# It may also have `scan_paths`, which else is made of its `selective_scan`.
FUNCTIONS = ("causal_conv1d", "grid_conv2d", "rms_norm", "selective_scan", "gather_tokens", "topk_tokens")
BACKENDS: dict[str, str | ModuleType] = {
    "reference": "ssmcompress.ops.reference",
    "cpu": "ssmcompress.ops.compiled",
    "triton": "ssmcompress.ops.triton",
}

_logger = logging.getLogger("ssmcompress")
_forced: ContextVar[str | None] = ContextVar("ssmcompress_ops_backend", default=None)


def register_backend(name: str, module: str | ModuleType) -> None:
    """Add a backend, or replace one, under a name that `use_backend` and `backend=` take.

    Args:
        module: a module with the functions in `FUNCTIONS`, or its dotted name, to be imported when it is first used.
            What it does not compute itself it may take from `ssmcompress.ops.reference`.

    Raises:
        ValueError: functions are missing.
    """
    if isinstance(module, ModuleType):
        _check(name, module)
    BACKENDS[name] = module
    _loaded.pop(name, None)


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Force every op inside the `with` block that names no backend itself onto `name`."""
    _registered(name)
    token = _forced.set(name)
    try:
        yield
    finally:
        _forced.reset(token)


def select(backend: str | None, *activations: Tensor | None) -> ModuleType:
    """The module that runs an op on these: `backend`, else the forced one, else the best there is for them."""
    name = backend or _forced.get() or best_backend(*activations)
    _load(name)
    return _loaded[name]


_loaded: dict[str, ModuleType] = {}


@torch.compiler.assume_constant_result
def _load(name: str) -> bool:
    """Put the module of a backend into `_loaded`, where torch.compile can follow to it: an import, it cannot."""
    if name not in _loaded:
        module = _registered(name)
        if isinstance(module, str):
            module = import_module(module)
            _check(name, module)
        _loaded[name] = module
    return True


def _check(name: str, module: ModuleType) -> None:
    if missing := [function for function in FUNCTIONS if not hasattr(module, function)]:
        raise ValueError(f"backend {name!r}: the module {module.__name__} has no {', '.join(missing)}")


def best_backend(*activations: Tensor | None) -> str:
    """The fastest backend that works here for tensors of these devices and dtypes."""
    given = [t for t in activations if t is not None]
    devices = {t.device.type for t in given}
    # float64 is for the reference: there is nothing faster that is as exact.
    if len(devices) == 1 and all(t.dtype in _COMPILED for t in given):
        backend = _BEST.get(devices.pop(), "reference")
        if backend == "reference" or _works(backend):
            return backend
    return "reference"


_COMPILED = (torch.float32, torch.bfloat16, torch.float16)
_BEST = {"cpu": "cpu", "cuda": "triton"}


@torch.compiler.assume_constant_result
def _works(backend: str) -> bool:
    return _try(backend)


@cache
def _try(backend: str) -> bool:
    package = {"cpu": "numba", "triton": "triton"}[backend]
    try:
        import_module(package)
        if backend == "triton":
            _load(backend)
            _loaded[backend].check_driver()
    except Exception as error:  # numba itself raises more than ImportError, for a numpy it does not know, say
        _logger.warning("%s cannot be used (%s): the ops run in plain torch, many times slower", package, error)
        return False
    return True


def full_precision(device: torch.device) -> AbstractContextManager:
    """No autocast inside an op: products of hundreds of decays do not survive bfloat16."""
    if torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()  # an autocast block, even an idle one, doubles the time of torch.export


def _registered(name: str) -> str | ModuleType:
    if name not in BACKENDS:
        raise ValueError(f"unknown backend {name!r}; there are {', '.join(BACKENDS)}")
    return BACKENDS[name]
