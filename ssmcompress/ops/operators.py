"""Registration of kernels as torch.library operators, for torch.compile, torch.export and autograd."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


def operator(
    schema: str,
    kernel: Callable[..., Any],
    devices: Sequence[str],
    fake: Callable[..., Any],
    backward: Callable[..., Any] | None = None,
    save: Callable[..., None] | None = None,
) -> Callable[..., Any]:
    """Define the operator `ssmcompress::<schema>`, and return a function that calls it.

    The function calls the kernel directly if only the result is needed: for the 15 arguments of a scan, torch's
    dispatcher (15 us) takes longer than a kernel for one small image, and a forward pass has a hundred such calls.

    Args:
        schema: name, arguments and results in torch's schema language.
        kernel: the function that computes it on `devices` ("cpu", "cuda").
        fake: function that returns results of the right shape and dtype for tensors without content.
        backward, save: the gradient functions for torch.library.register_autograd; None: the operator has no gradient,
            and backward raises NotImplementedError.
    """
    name = f"ssmcompress::{schema.partition('(')[0]}"
    torch.library.define(name, schema[schema.index("(") :].replace("\n", " "))
    for device in devices:
        torch.library.impl(name, device)(kernel)
    torch.library.register_fake(name)(fake)
    torch.library.register_autograd(name, backward or _no_gradients, setup_context=save)
    defined = getattr(torch.ops.ssmcompress, name.partition("::")[2]).default

    def call(*arguments):
        return kernel(*arguments) if may_skip_dispatcher(arguments, devices) else defined(*arguments)

    return call


def may_skip_dispatcher(arguments: tuple[Any, ...], devices: Sequence[str] = ("cpu",)) -> bool:
    """Return whether a kernel call may bypass torch's dispatcher.

    This requires plain tensors, all on one of `devices`, no gradients, and no trace, transform, dispatch mode or
    profiler of torch that has to see the call.
    """
    return not torch.compiler.is_compiling() and _wants_only_values(arguments, devices)


def _wants_only_values(arguments: tuple[Any, ...], devices: Sequence[str]) -> bool:
    tracks, on_cpu = torch.is_grad_enabled(), None
    for a in arguments:
        if isinstance(a, Tensor):
            if type(a) not in _PLAIN or (tracks and a.requires_grad):
                return False
            if on_cpu is None:
                on_cpu = a.is_cpu
                if ("cpu" if on_cpu else "cuda") not in devices:
                    return False
            if not (a.is_cpu if on_cpu else a.is_cuda):
                return False
        elif isinstance(a, (list, tuple)) and not _wants_only_values(a, devices):
            return False
    try:
        return not (
            torch._C._len_torch_dispatch_stack()
            or torch._C._functorch.peek_interpreter_stack() is not None
            or torch._C._get_tracing_state() is not None
            or torch.autograd._profiler_enabled()
        )
    except AttributeError:  # a torch version without one of these undocumented functions
        return False


_PLAIN = (Tensor, torch.nn.Parameter)


def conv_operator(
    name: str, forward: Callable[..., Tensor], backward: Callable[..., list[Tensor]], devices: Sequence[str]
) -> Callable[..., Tensor]:
    """Define a causal convolution as the operator `name`.

    Its inputs are x (batch, length, channels), weight (channels, width), bias (channels,) and positions (batch, length)
    int64. `backward` returns the gradients of x, weight and bias; the last is empty if there is no bias.
    """
    inputs = "Tensor x, Tensor weight, Tensor? bias, Tensor? positions, bool silu, bool reverse"
    return _convolution(name, inputs, forward, devices, backward)


def grid_conv_operator(
    name: str,
    forward: Callable[..., Tensor],
    devices: Sequence[str],
    backward: Callable[..., list[Tensor]] | None = None,
) -> Callable[..., Tensor]:
    """Define a convolution on a grid as the operator `name`.

    Its inputs are x (batch, length, channels), weight (channels, 1, height, width), bias (channels,) and positions
    (batch, length) int64. `backward` is as for `conv_operator`; None: there is no gradient.
    """
    inputs = "Tensor x, Tensor weight, Tensor? bias, Tensor positions, int rows, int columns, bool silu"
    return _convolution(name, inputs, forward, devices, backward)


def _convolution(
    name: str,
    inputs: str,
    forward: Callable[..., Tensor],
    devices: Sequence[str],
    backward: Callable[..., list[Tensor]] | None,
) -> Callable[..., Tensor]:
    """Define an operator of x, weight, bias, positions and flags, whose result has the shape and dtype of x."""
    schema = f"{name}({inputs}) -> Tensor"
    if backward is None:
        return operator(schema, forward, devices, lambda x, *others: empty_like(x, x))
    gradients = operator(
        f"{name}_backward(Tensor dy, {inputs}) -> Tensor[]",
        backward,
        devices,
        lambda dy, x, weight, bias, *others: [empty_like(t, x) for t in (x, weight, bias)],
    )

    def save(ctx, inputs, output) -> None:
        ctx.save_for_backward(*inputs[:4])
        ctx.flags = inputs[4:]

    def apply_gradients(ctx, dy):
        tensors = ctx.saved_tensors
        dx, dweight, dbias = gradients(dy, *tensors, *ctx.flags)
        return dx, dweight, None if tensors[2] is None else dbias, None, *[None] * len(ctx.flags)

    return operator(schema, forward, devices, lambda x, *others: empty_like(x, x), apply_gradients, save)


def wants_gradient(*tensors: Tensor | None) -> bool:
    """Return whether autograd would record an op on these tensors."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def empty_like(like: Tensor | None, of: Tensor) -> Tensor:
    """Return a dense tensor of the shape and dtype of `like`, or an empty one like `of` if `like` is None."""
    return of.new_empty(0) if like is None else torch.empty(like.shape, dtype=like.dtype, device=like.device)


def _no_gradients(ctx, *gradients):
    raise NotImplementedError("compiled ops have no second derivative; backend='reference' has")
