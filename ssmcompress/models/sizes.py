"""Sizes of layers, which may differ after trimming, and functions that slice layers to trimmed sizes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.nn.utils import skip_init

PerLayer = int | tuple[int, ...]


class LayerSize(NamedTuple):
    """The sizes of one layer: its channels, its states, and the indices of its scan paths."""

    d_inner: int
    d_state: int
    directions: tuple[int, ...]


class Section(NamedTuple):
    """Consecutive layers that process tokens of the same grid.

    Attributes:
        first, last: its first and last layer (1-based). length: number of tokens before any pruning. width: d_model.
    """

    first: int
    last: int
    length: int
    width: int


class ModelConfig:
    """Base class of the configurations of all models, which are frozen dataclasses."""

    d_model: int
    depth: int
    grid: tuple[int, int]

    @property
    def patches(self) -> int:
        """The number of patches of an input."""
        return self.grid[0] * self.grid[1]

    @property
    def frame_grid(self) -> tuple[int, int]:
        """The patch grid of one image, (rows, columns); `grid` stacks the frames of a video vertically."""
        return self.grid

    @property
    def frame_patches(self) -> int:
        """The number of patches of one image, or of one time step of a video."""
        return self.frame_grid[0] * self.frame_grid[1]

    @property
    def layers(self) -> Sequence[Any]:
        """The sizes of each layer, as far as layers can differ."""
        return (None,) * self.depth

    def sections(self, others: int = 0) -> tuple[Section, ...]:
        """Return the groups of layers that process tokens of the same grid; most models have one section.

        Args:
            others: number of tokens that are not patches.
        """
        return (Section(1, self.depth, self.patches + others, self.d_model),)

    def to_dict(self) -> dict[str, Any]:
        """Return the configuration as a JSON object; fields that are None are left out."""
        return {key: value for key, value in asdict(self).items() if value is not None}


class LayeredConfig(ModelConfig):
    """Base class of configurations whose `d_inner` and `d_state` are one number for all layers or one per layer.

    `directions` lists the scan paths of each layer; None if every layer has all `PATHS`.
    """

    PATHS: tuple[int, ...]
    d_inner: PerLayer
    d_state: PerLayer
    directions: tuple[tuple[int, ...], ...] | None

    @property
    def layers(self) -> list[LayerSize]:
        """The sizes of each layer."""
        directions = self.directions or (self.PATHS,) * self.depth
        sizes = zip(spread(self.d_inner, self.depth), spread(self.d_state, self.depth), directions, strict=True)
        return [LayerSize(*size) for size in sizes]

    def with_layers(self, sizes: Mapping[int, LayerSize]) -> LayeredConfig:
        """Return this configuration with only the layers in `sizes` (by 1-based number), resized as given there."""
        directions = tuple(size.directions for size in sizes.values())
        return replace(
            self,
            depth=len(sizes),
            d_inner=compact(size.d_inner for size in sizes.values()),
            d_state=compact(size.d_state for size in sizes.values()),
            directions=None if all(paths == self.PATHS for paths in directions) else directions,
        )


class Origin(NamedTuple):
    """The dense model that a model with fewer states, channels, directions or layers was trimmed from.

    Attributes:
        config: its configuration. layers: the 1-based number in the dense model of each layer of the trimmed model.
    """

    config: Any
    layers: tuple[int, ...]


class ScanReading(NamedTuple):
    """The internal values of one set of scan parameters for a batch, from which C and D can be refitted.

    The output of the set is y_t = (sum over paths p and states n of (C_n . x_p,t) h_p,n,t + times * D u_t) * gate_t.

    Attributes:
        states: function from a state n to its trajectory h_n on each path, (batch, tokens, d_inner), in token order.
        readers: the input x (batch, tokens, d_inner), in token order, of the rows C_n of the projection on each path.
        u: (batch, tokens, d_inner), the input of D. gate: (batch, tokens, d_inner).
        times: number of times that D u is added.
    """

    states: Callable[[int], list[Tensor]]
    readers: list[Tensor]
    u: Tensor
    gate: Tensor
    times: int


def spread(value: int | Sequence[int], depth: int) -> tuple[int, ...]:
    """Return one value for each layer."""
    return (value,) * depth if isinstance(value, int) else tuple(value)


def compact(values: Iterable[int]) -> PerLayer:
    """Return a single value if all layers have the same, else all of them."""
    values = tuple(values)
    return values[0] if len(set(values)) == 1 else values


def slice_linear(linear: nn.Linear, rows: Tensor | None = None, columns: Tensor | None = None) -> nn.Linear:
    """Slice a linear layer to some of its outputs (`rows`) and inputs (`columns`); None keeps all."""
    weight, bias = linear.weight.detach(), linear.bias
    weight = weight if rows is None else weight[rows.to(weight.device)]
    weight = weight if columns is None else weight[:, columns.to(weight.device)]
    options = {"bias": bias is not None, "device": weight.device, "dtype": weight.dtype}
    sliced = skip_init(nn.Linear, weight.shape[1], weight.shape[0], **options)
    sliced.weight.data.copy_(weight)
    if bias is not None:
        sliced.bias.data.copy_(bias.detach() if rows is None else bias.detach()[rows.to(weight.device)])
    return sliced


def slice_depthwise(conv: nn.Conv1d | nn.Conv2d, channels: Tensor) -> nn.Conv1d | nn.Conv2d:
    """Slice a depthwise convolution to some of its channels."""
    weight, count = conv.weight.detach(), len(channels)
    index = channels.to(weight.device)
    options = {"padding": conv.padding, "groups": count, "bias": conv.bias is not None}
    sliced = skip_init(type(conv), count, count, conv.kernel_size, device=weight.device, dtype=weight.dtype, **options)
    sliced.weight.data.copy_(weight[index])
    if conv.bias is not None:
        sliced.bias.data.copy_(conv.bias.detach()[index])
    return sliced


def slice_parameter(parameter: Tensor, rows: Tensor | None = None, columns: Tensor | None = None) -> nn.Parameter:
    """Slice a parameter to some rows (first axis) and columns (last axis); None keeps all."""
    value = parameter.detach()
    value = value if rows is None else value[rows.to(value.device)]
    value = value if columns is None else value[..., columns.to(value.device)]
    return nn.Parameter(value.clone(), requires_grad=parameter.requires_grad)
