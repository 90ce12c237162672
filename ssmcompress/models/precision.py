"""Layers for models of any dtype: float32, float64, and `half()`, `bfloat16()` and quantised copies.

The residual stream, the sums of the norms and the hidden states of the scans are float32, or float64 in a float64
model. The weights, and the activations between linear layers, have the dtype of the model.
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
    """Convert x to float32, unless it is float64."""
    return x.to(accumulation_dtype(x.dtype))


def cast(x: Tensor, layer: nn.Module) -> Tensor:
    """Convert x to the dtype of a layer's weight; x is unchanged if the layer has no floating-point weight tensor."""
    weight = find_weight(layer)
    return x if weight is None or weight.dtype == x.dtype or not weight.is_floating_point() else x.to(weight.dtype)


def find_weight(layer: nn.Module) -> Tensor | None:
    """Return the weight of a layer; None for a quantised layer, whose `weight` is a method."""
    weight = getattr(layer, "weight", None)
    return weight if isinstance(weight, Tensor) else None


def find_bias(layer: nn.Module) -> Tensor:
    """Return the bias of a layer, also of a quantised layer, whose `bias` is a method."""
    return layer.bias() if callable(layer.bias) else layer.bias


def factorise(linear: nn.Module, x: Tensor, times: int = 1) -> tuple[Tensor, Tensor | None, Tensor]:
    """Return (x, weight, bias) such that the output of a linear layer is x weight^T + bias.

    A layer other than nn.Linear, for example a quantised layer or an adapter, is applied here, including its bias: then
    x is its output, and the weight is None.

    Args:
        times: the total number of times that the bias is to be added.
    """
    if type(linear) is nn.Linear:
        return x, linear.weight, linear.bias if times == 1 else times * linear.bias
    return linear(x), None, (times - 1) * find_bias(linear)


def project_rows(linear: nn.Module, x: Tensor, rows: slice) -> Tensor:
    """Return some of the outputs of a linear layer; layers other than nn.Linear compute all outputs first."""
    if type(linear) is nn.Linear:
        return F.linear(x, linear.weight[rows], None if linear.bias is None else linear.bias[rows])
    return linear(x)[..., rows]


def embed_patches(projection: nn.Conv2d | nn.Conv3d, images: Tensor) -> Tensor:
    """Embed images (batch, channels, height, width) as patches (batch, d_model, rows, columns) by a convolution.

    Videos (batch, channels, frames, height, width) become patches (batch, d_model, times, rows, columns).

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
    """Raise an InputError if layers of a model are quantised: their packed weights support only a forward pass."""
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
    """Return a copy of a model with the weights of its layers' matrix products in `dtype`.

    Run it under autocast to `dtype`, which then need not convert these weights, or the outputs of norms before scans,
    in each forward pass. The patch embedding, the readout and everything but matrix products are unchanged. For
    float32, and for a quantised model, the model itself is returned.
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
    """Raise an InputError unless `images` are valid inputs of a model.

    Args:
        shape: (channels, height, width) of an image, or (channels, frames, height, width) of a video; None entries: any
            number of pixels.
        weight: a weight with the dtype and device of the model; None: a quantised model, float32 on the CPU.
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
