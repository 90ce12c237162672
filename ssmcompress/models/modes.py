"""Evaluation mode for functions that run models which their caller may be training."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor, nn

P = ParamSpec("P")
T = TypeVar("T")


@contextmanager
def eval_mode(*models: nn.Module) -> Iterator[None]:
    """Put models into evaluation mode within the body of the with, and restore the mode of each of their modules."""
    modes = {module: module.training for model in models for module in model.modules()}
    try:
        for module in modes:
            module.training = False
        yield
    finally:
        for module, training in modes.items():
            module.training = training


def runs_in_eval_mode(function: Callable[P, T]) -> Callable[P, T]:
    """Decorate a function so that the models among its arguments are in evaluation mode while it runs.

    In training mode, batch norms would normalise by the batch and overwrite the running statistics of the caller's
    model, and results would depend on the batch size.

    Within `torch.inference_mode`, it is left while the function runs, because gradients of a loss are needed inside;
    functions that need none do not record them.
    """

    @functools.wraps(function)
    def run(*args: P.args, **options: P.kwargs) -> T:
        models = [model for value in (*args, *options.values()) for model in _find_models(value)]
        with eval_mode(*models):
            if not torch.is_inference_mode_enabled():
                return function(*args, **options)
            with torch.inference_mode(False), torch.no_grad():
                return function(*map(_make_normal, args), **{k: _make_normal(v) for k, v in options.items()})

    return run


def _make_normal(value: Any) -> Any:
    """Return a tensor, or the tensors in a tuple or list, as one that gradients can be recorded for."""
    if isinstance(value, Tensor):
        return value.clone() if value.is_inference() else value
    return type(value)(map(_make_normal, value)) if type(value) in (tuple, list) else value


def _find_models(value: Any) -> list[nn.Module]:
    """Return the models that an argument is or contains."""
    values = value.values() if isinstance(value, Mapping) else value if isinstance(value, (list, tuple)) else [value]
    return [model for model in values if isinstance(model, nn.Module)]
