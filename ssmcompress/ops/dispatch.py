"""Selection of the backend of an op: by argument, by `use_backend`, or by device and dtype."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from functools import cache
from importlib import import_module
from types import ModuleType

import torch
from torch import Tensor

from ..progress import warn

# A backend is a module with these functions: the public ops, called with all arguments in the same order. Optional
# functions are `scan_paths` (default: composed of its `selective_scan`), `scan_parameters`, for paths that are given by
# their parameters (default: they are expanded), `segment_sums` (default: that of the reference), and `rms_norm_to`
# (default: `rms_norm` and a conversion).
FUNCTIONS = ("causal_conv1d", "grid_conv2d", "rms_norm", "selective_scan", "gather_tokens", "topk_tokens")
BACKENDS: dict[str, str | ModuleType] = {
    "reference": "ssmcompress.ops.reference",
    "cpu": "ssmcompress.ops.compiled",
    "triton": "ssmcompress.ops.triton",
}

_override: ContextVar[str | None] = ContextVar("ssmcompress_ops_backend", default=None)


def register_backend(name: str, module: str | ModuleType) -> None:
    """Register or replace a backend under a name for `use_backend` and `backend=`.

    Args:
        module: a module with the functions in `FUNCTIONS`, or its dotted name, which is imported at first use. It may
            import functions that it does not implement from `ssmcompress.ops.reference`.

    Raises:
        ValueError: functions are missing.
    """
    if isinstance(module, ModuleType):
        _check(name, module)
    BACKENDS[name] = module
    _modules.pop(name, None)


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Run every op in the body of the with statement on the backend `name`, unless a call specifies another one."""
    _find_backend(name)
    token = _override.set(name)
    try:
        yield
    finally:
        _override.reset(token)


def select(backend: str | None, *activations: Tensor | None) -> ModuleType:
    """Return the module that runs an op on these tensors: `backend`, the one of `use_backend`, or the fastest."""
    name = backend or _override.get() or best_backend(*activations)
    _load(name)
    return _modules[name]


_modules: dict[str, ModuleType] = {}


@torch.compiler.assume_constant_result
def _load(name: str) -> bool:
    """Import the module of a backend into `_modules` for torch.compile, which cannot trace an import."""
    if name not in _modules:
        module = _find_backend(name)
        if isinstance(module, str):
            module = import_module(module)
            _check(name, module)
        _modules[name] = module
    return True


def _check(name: str, module: ModuleType) -> None:
    if missing := [function for function in FUNCTIONS if not hasattr(module, function)]:
        raise ValueError(f"backend {name!r}: the module {module.__name__} has no {', '.join(missing)}")


def best_backend(*activations: Tensor | None) -> str:
    """Return the name of the fastest backend that works on this machine for tensors of these devices and dtypes."""
    on_cpu = on_gpu = True
    for t in activations:
        if t is None:
            continue
        if t.dtype not in _COMPILED_DTYPES:  # float64 runs on the reference, the only backend that is exact enough
            return "reference"
        on_cpu, on_gpu = on_cpu and t.is_cpu, on_gpu and t.is_cuda
    if on_cpu and _works("cpu"):
        return "cpu"
    return "triton" if on_gpu and _works("triton") else "reference"


_COMPILED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


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
            _modules[backend].check_driver()
    except Exception as error:  # numba raises not only ImportError: a numpy it does not support, for instance
        warn(f"{package} cannot be used ({error}): the ops run in plain torch, many times slower")
        return False
    return True


def full_precision(device: torch.device) -> AbstractContextManager:
    """Disable autocast inside an op: products of hundreds of decays are not accurate enough in bfloat16."""
    kind = device.type
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
        return torch.autocast(kind, enabled=False)
    return nullcontext()  # autocast, even disabled, doubles the time of torch.export


def _find_backend(name: str) -> str | ModuleType:
    """Return a registered backend: its module, or its dotted name if it has not been imported yet."""
    if name not in BACKENDS:
        raise ValueError(f"unknown backend {name!r}; expected one of {', '.join(BACKENDS)}")
    return BACKENDS[name]
