"""Kernels as torch.library operators, which torch.compile, torch.export and autograd know."""

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
    """Define `ssmcompress::<schema>` and return it.

    Made by hand: torch.library.custom_op would take 15 us more at each of a forward's hundred calls.

    Args:
        schema: name, arguments and results as torch writes them.
        kernel: what computes it on `devices` ("cpu", "cuda").
        fake: results of the right shape and dtype, of tensors without content.
        backward, save: its gradients, as torch.library.register_autograd takes them; None: it has none, and says so.
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
    """The causal convolution under a name of its own.

    x (batch, length, channels), weight (channels, width), bias (channels,), positions (batch, length) int64. The
    backward gives the gradients of x, weight and bias, without elements where there is no bias.
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

    def upper(ctx, dy):
        tensors = ctx.saved_tensors
        dx, dweight, dbias = gradients(dy, *tensors, *ctx.flags)
        return dx, dweight, None if tensors[2] is None else dbias, None, None, None

    return operator(f"{name}({inputs}) -> Tensor", forward, devices, lambda x, *others: empty_like(x, x), upper, save)


def grid_conv_operator(name: str, forward: Callable[..., Tensor], devices: Iterable[str]) -> Callable[..., Tensor]:
    """The convolution on a grid under a name of its own, without gradient.

    x (batch, length, channels), weight (channels, 1, height, width), bias (channels,), positions (batch, length) int64.
    """
    inputs = "Tensor x, Tensor weight, Tensor? bias, Tensor positions, int rows, int columns, bool silu"
    return operator(f"{name}({inputs}) -> Tensor", forward, devices, lambda x, *others: empty_like(x, x))


def wants_gradient(*tensors: Tensor | None) -> bool:
    """Whether autograd would go through an op on these."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def empty_like(like: Tensor | None, of: Tensor) -> Tensor:
    """A dense tensor of the shape and dtype of `like`; without elements if there is none."""
    return of.new_empty(0) if like is None else torch.empty(like.shape, dtype=like.dtype, device=like.device)


def _no_gradients(ctx, *upper):
    raise NotImplementedError("compiled ops have no second derivative; backend='reference' has")
