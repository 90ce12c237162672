"""Registration of kernels as torch.library operators, for torch.compile, torch.export and autograd."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor


def operator(
    schema: str,
    kernel: Callable[..., Any],
    devices: Iterable[str],
    fake: Callable[..., Any],
    backward: Callable[..., Any] | None = None,
    save: Callable[..., None] | None = None,
) -> Callable[..., Any]:
    """Define the operator `ssmcompress::<schema>` and return it.

    It uses the low-level functions, because torch.library.custom_op takes 15 us more for each of a forward's hundred
    calls.

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
    return getattr(torch.ops.ssmcompress, name.partition("::")[2]).default


def conv_operator(
    name: str, forward: Callable[..., Tensor], backward: Callable[..., list[Tensor]], devices: Iterable[str]
) -> Callable[..., Tensor]:
    """Define a causal convolution as the operator `name`.

    Its inputs are x (batch, length, channels), weight (channels, width), bias (channels,) and positions (batch, length)
    int64. `backward` returns the gradients of x, weight and bias; the last is empty if there is no bias.
    """
    inputs = "Tensor x, Tensor weight, Tensor? bias, Tensor? positions, bool silu, bool reverse"
    gradients = operator(
        f"{name}_backward(Tensor dy, {inputs}) -> Tensor[]",
        backward,
        devices,
        lambda dy, x, weight, bias, *others: [empty_like(t, x) for t in (x, weight, bias)],
    )

    def save(ctx, inputs, output) -> None:
        *tensors, silu, reverse = inputs
        ctx.save_for_backward(*tensors)
        ctx.flags = silu, reverse

    def apply_gradients(ctx, dy):
        tensors = ctx.saved_tensors
        dx, dweight, dbias = gradients(dy, *tensors, *ctx.flags)
        return dx, dweight, None if tensors[2] is None else dbias, None, None, None

    return operator(
        f"{name}({inputs}) -> Tensor", forward, devices, lambda x, *others: empty_like(x, x), apply_gradients, save
    )


def grid_conv_operator(name: str, forward: Callable[..., Tensor], devices: Iterable[str]) -> Callable[..., Tensor]:
    """Define a convolution on a grid as the operator `name`, without gradient.

    Its inputs are x (batch, length, channels), weight (channels, 1, height, width), bias (channels,) and positions
    (batch, length) int64.
    """
    inputs = "Tensor x, Tensor weight, Tensor? bias, Tensor positions, int rows, int columns, bool silu"
    return operator(f"{name}({inputs}) -> Tensor", forward, devices, lambda x, *others: empty_like(x, x))


def wants_gradient(*tensors: Tensor | None) -> bool:
    """Return whether autograd would record an op on these tensors."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def empty_like(like: Tensor | None, of: Tensor) -> Tensor:
    """Return a dense tensor of the shape and dtype of `like`, or an empty one like `of` if `like` is None."""
    return of.new_empty(0) if like is None else torch.empty(like.shape, dtype=like.dtype, device=like.device)


def _no_gradients(ctx, *gradients):
    raise NotImplementedError("compiled ops have no second derivative; backend='reference' has")
