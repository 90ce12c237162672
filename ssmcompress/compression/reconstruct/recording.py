"""Recording the inputs and outputs of submodules while a model runs, and finding their names."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch import Tensor, nn


@contextmanager
def record(module: nn.Module, names: Iterable[str]) -> Iterator[dict[str, tuple[Tensor, Tensor]]]:
    """Record the last input and output of linear layers of `module`, by name, in the body of the with statement."""
    records: dict[str, tuple[Tensor, Tensor]] = {}

    def write(name: str):
        return lambda layer, inputs, output: records.update({name: (inputs[0], output)})

    hooks = [module.get_submodule(name).register_forward_hook(write(name)) for name in names]
    try:
        yield records
    finally:
        for hook in hooks:
            hook.remove()


def find_name(model: nn.Module, part: nn.Module) -> str:
    """Return the name of a module in a model that contains it."""
    return next(name for name, module in model.named_modules() if module is part)
