"""Layers that work in models of any dtype: float32, float64, and their `half()`, `bfloat16()` and quantised copies.

The residual stream, the sums of the norms and the states of the scans are float32, or float64 in a float64 model. The
weights, and what the linear layers exchange, have the dtype of the model.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import InputError
from ..ops import rms_norm
from ..ops.dispatch import full_precision
from ..ops.reference import accumulation_dtype
from .input_shapes import advise_on_shape, describe_shape, fits_shape

Model = TypeVar("Model", bound=nn.Module)


class RMSNorm(nn.RMSNorm):
    """nn.RMSNorm computed by `ssmcompress.ops.rms_norm`: torch's own takes six passes on a CPU.

    Attributes:
        output_dtype: of the results; None: that of the weight.
    """

    output_dtype: torch.dtype | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Normalise x (..., channels)."""
        return rms_norm(x, self.weight, self.eps, dtype=self.output_dtype or self.weight.dtype)


class LayerNorm(nn.LayerNorm):
    """nn.LayerNorm of inputs that are wider than its weights.

    Attributes:
        output_dtype: of the results; None: that of the weight.
    """

    output_dtype: torch.dtype | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Normalise x (..., channels)."""
        weight, bias = self.weight.to(x.dtype), self.bias.to(x.dtype)
        y = F.layer_norm(x, self.normalized_shape, weight, bias, self.eps)
        return y.to(self.output_dtype or self.weight.dtype)


def widen(x: Tensor) -> Tensor:
    """Return x in float32, or in float64 if it is that."""
    return x.to(accumulation_dtype(x.dtype))


def cast(x: Tensor, layer: nn.Module) -> Tensor:
    """Return x in the dtype of a layer's weight, or x itself if the layer has none that is a tensor of numbers."""
    weight = find_weight(layer)
    return x if weight is None or weight.dtype == x.dtype or not weight.is_floating_point() else x.to(weight.dtype)


def find_weight(layer: nn.Module) -> Tensor | None:
    """Return the weight of a layer, or None: that of a quantised layer is a method."""
    weight = getattr(layer, "weight", None)
    return weight if isinstance(weight, Tensor) else None


def find_bias(layer: nn.Module) -> Tensor:
    """Return the bias of a layer; that of a quantised layer is a method."""
    return layer.bias() if callable(layer.bias) else layer.bias


def factorise(linear: nn.Module, x: Tensor, times: int = 1) -> tuple[Tensor, Tensor | None, Tensor]:
    """Return (x, weight, bias) of a linear layer: its result is x weight^T, and the bias is still to be added to it.

    A layer of any other type than nn.Linear, for example a quantised one or an adapter, adds its bias itself: then x is
    its result, and the weight None.

    Args:
        times: how many times the bias is to be added in total.
    """
    if type(linear) is nn.Linear:
        return x, linear.weight, linear.bias if times == 1 else times * linear.bias
    return linear(x), None, (times - 1) * find_bias(linear)


def project_rows(linear: nn.Module, x: Tensor, rows: slice) -> Tensor:
    """Return some of the outputs of a linear layer; one of any other type than nn.Linear computes all of them."""
    if type(linear) is nn.Linear:
        return F.linear(x, linear.weight[rows], None if linear.bias is None else linear.bias[rows])
    return linear(x)[..., rows]


def embed_patches(projection: nn.Conv2d | nn.Conv3d, images: Tensor) -> Tensor:
    """Embed images (batch, channels, height, width) as patches (batch, d_model, rows, columns) by a convolution.

    Or videos (batch, channels, frames, height, width) as patches (batch, d_model, times, rows, columns).

    On a CPU it runs in float32 or wider, even under autocast and in a bfloat16 model: on processors with AMX, torch
    2.14's bfloat16 convolution of 4 to 24 channels with windows of 4 to 16 pixels has errors as large as its result.
    The convolution is less than 2 % of a Vim's FLOPs.
    """
    if images.device.type != "cpu":
        return projection(images)
    weight, bias = widen(projection.weight), None if projection.bias is None else widen(projection.bias)
    with full_precision(images.device):
        images = images.to(weight.dtype)
        if weight is projection.weight:
            return projection(images)
        convolve = F.conv3d if images.ndim == 5 else F.conv2d
        return convolve(images, weight, bias, projection.stride, projection.padding)


def check_not_quantised(model: nn.Module) -> None:
    """Raise an InputError if layers of a model are quantised: their weights are packed, for a forward pass alone."""
    packed = next((name for name, module in model.named_modules() if hasattr(module, "_packed_params")), None)
    if packed is not None:
        raise InputError(
            f"the model is quantised ({packed}) and can only be run: do this with the float32 model, and quantise after"
        )


def to_float32(model: Model) -> Model:
    """Return the model, or a float32 copy if it has weights of another dtype."""
    wide = all(p.dtype == torch.float32 for p in model.parameters())
    return model if wide else copy.deepcopy(model).float()


def narrow_products(model: Model, dtype: torch.dtype) -> Model:
    """Return a copy of a model that holds the weights of its layers' matrix products in `dtype`.

    It is to be run under autocast to `dtype`, which then has less to convert at each forward: neither these weights nor
    the results of norms before scans. What is no matrix product, the patch embedding and the readout stay as they are.
    The model itself is returned for float32, and if it is quantised.
    """
    if dtype == torch.float32 or any(hasattr(module, "_packed_params") for module in model.modules()):
        return model
    narrow = copy.deepcopy(model)
    for block in narrow.blocks:
        for module in block.modules():
            if type(module) is nn.Linear and module.weight.dtype == torch.float32:
                module.weight = nn.Parameter(module.weight.detach().to(dtype), requires_grad=False)
            elif isinstance(module, (RMSNorm, LayerNorm)) and hasattr(block, "scans"):
                module.output_dtype = dtype
    return narrow


def check_images(images: Any, shape: Sequence[int | None], weight: Tensor | None) -> None:
    """Raise an InputError unless `images` can be given to a model.

    Args:
        shape: (channels, height, width) of an image, or (channels, frames, height, width) of a video; None: any number
            of pixels.
        weight: a weight of the model, which has its dtype and device; None: a quantised model, float32 on the CPU.
    """
    size = describe_shape(shape)
    if isinstance(images, torch.fx.Proxy):
        raise InputError("torch.fx cannot trace this model symbolically: use torch.export, or quantize_dynamic")
    if not isinstance(images, Tensor):
        advice = "; use torch.from_numpy(images).float()" if isinstance(images, np.ndarray) else ""
        raise InputError(f"images are a {type(images).__name__}: expected a tensor (batch, {size}){advice}")
    found = tuple(images.shape)
    if not fits_shape(found[1:], shape):
        alone = f"use images[None] for one {'image' if len(shape) == 3 else 'video'}"
        advice = alone if fits_shape(found, shape) else advise_on_shape(found, shape)
        raise InputError(f"images {found}: expected (batch, {size}); {advice}")
    if images.layout != torch.strided:
        raise InputError(f"images are {images.layout}: expected a dense tensor; use images.to_dense()")
    dtype, device = (torch.float32, torch.device("cpu")) if weight is None else (weight.dtype, weight.device)
    if not images.is_floating_point():
        raise InputError(
            f"images are {images.dtype}: expected {dtype}, prepared as model.transform() does, not raw pixels"
        )
    if images.device != device:
        raise InputError(f"images are on {images.device}, the model is on {device}: use images.to({str(device)!r})")
    if images.dtype != dtype and not _is_autocast(device):
        raise InputError(f"images are {images.dtype}, the model is {dtype}: use images.to({dtype})")


def _is_autocast(device: torch.device) -> bool:
    return torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type)
