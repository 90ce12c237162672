"""The layers of a PlainMamba: patches, and four continuous scans over a grid of them with a 2-D convolution.

arXiv 2403.17695; used by `plain_mamba` and `plain_mamba_upernet`. The weights were trained with three quirks of the
published code, so these layers reproduce them, each marked by a comment: the order of delta, B and C, the bias of
delta, and D.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import InputError
from ..ops import ScanPath, grid_conv2d, scan_paths
from ..ops.orders import invert_order
from ..ops.selective_scan import Expander, step_size
from ..pruning.tokens import Tokens
from .blocks import TrimmableBlock, read_state
from .precision import LayerNorm, cast, embed_patches, factorise, find_bias, widen
from .reading import Shapes, layer_sizes
from .sizes import (
    LayeredConfig,
    LayerSize,
    PerLayer,
    ScanReading,
    compact,
    slice_depthwise,
    slice_linear,
    slice_parameter,
)

STEM_STRIDE = 2
# Quirk: the published code adds the bias of delta in dt_proj, and again in the scan.
BIASES = 2


@dataclass(frozen=True)
class PlainMambaConfig(LayeredConfig):
    """Sizes of a PlainMamba; all except `image_size` and `directions` can be inferred from its weights.

    Attributes:
        d_inner, d_state: one number for all layers, or one for each.
        directions: the snakes, 0 to 3, that each layer scans; None: all four in all layers.
        stem_width, stem_depth: channels of the stem, and number of 3x3 convolutions after its first one.
        patch_size: side of a patch in pixels. stride: distance between patches, the same.
        window: kernel size of the convolution on the grid.
        dw_layers: 0-based layers that end in a depthwise convolution. dw_window: its kernel size.
    """

    PATHS: ClassVar[tuple[int, ...]] = (0, 1, 2, 3)

    d_model: int
    depth: int
    d_inner: PerLayer
    d_state: PerLayer
    dt_rank: int
    window: int
    dw_layers: tuple[int, ...]
    dw_window: int
    stem_width: int
    stem_depth: int
    stem_window: int
    in_chans: int
    num_classes: int
    patch_size: int
    stride: int
    image_size: tuple[int, int]
    directions: tuple[tuple[int, ...], ...] | None = None

    def with_layers(self, sizes: Mapping[int, LayerSize]) -> PlainMambaConfig:
        with_conv = tuple(layer for layer, number in enumerate(sizes) if number - 1 in self.dw_layers)
        dw_window = self.dw_window if with_conv else 0
        return replace(super().with_layers(sizes), dw_layers=with_conv, dw_window=dw_window)

    @property
    def stem_grid(self) -> tuple[int, int]:
        """The output size of the stem, (rows, columns): one for every second pixel."""
        height, width = self.image_size
        return -(-height // STEM_STRIDE), -(-width // STEM_STRIDE)

    @property
    def grid(self) -> tuple[int, int]:
        """The size of the patch grid, (rows, columns)."""
        rows, columns = (side // (self.patch_size // STEM_STRIDE) for side in self.stem_grid)
        return rows, columns


class PatchEmbed(nn.Module):
    """Images (batch, channels, height, width) -> patches (batch, d_model, rows, columns)."""

    def __init__(self, c: PlainMambaConfig):
        super().__init__()
        width, side = c.stem_width, c.patch_size // STEM_STRIDE
        first = nn.Conv2d(c.in_chans, width, c.stem_window, STEM_STRIDE, c.stem_window // 2, bias=False)
        self.stem = nn.Sequential(first, nn.BatchNorm2d(width), nn.ReLU())
        self.convs = nn.Sequential()
        for _ in range(c.stem_depth):
            conv = nn.Conv2d(width, width, 3, padding=1, bias=False)
            self.convs.extend([conv, nn.BatchNorm2d(width), nn.ReLU()])
        self.projection = nn.Conv2d(width, c.d_model, side, stride=side)

    def products(self, c: PlainMambaConfig) -> list[tuple[int, Tensor]]:
        """Return the matrix products (rows, weight) for one image."""
        stem = [layer for layer in (*self.stem, *self.convs) if isinstance(layer, nn.Conv2d)]
        products = [(math.prod(c.stem_grid), conv.weight.flatten(1)) for conv in stem]
        return [*products, (c.patches, self.projection.weight.flatten(1))]

    def forward(self, images: Tensor) -> Tensor:
        return embed_patches(self.projection, self.convs(self.stem(images)))


class PlainMambaMixer(nn.Module):
    """The four scans of a layer along snakes over the grid, summed and gated."""

    def __init__(self, c: PlainMambaConfig, size: LayerSize):
        super().__init__()
        E, N, self.directions = size
        self.grid, self.dt_rank = c.grid, c.dt_rank
        self.in_proj = nn.Linear(c.d_model, 2 * E)
        self.conv2d = nn.Conv2d(E, E, c.window, padding=c.window // 2, groups=E)
        self.x_proj = nn.Linear(E, c.dt_rank + 2 * N, bias=False)
        self.dt_proj = nn.Linear(c.dt_rank, E)
        self.A_log = nn.Parameter(torch.arange(1, N + 1).log().expand(E, -1).clone())
        self.D = nn.Parameter(torch.ones(E))
        self.direction_Bs = nn.Parameter(torch.zeros(5, N))  # one row for each kind of step, see `snakes`
        self.out_proj = nn.Linear(E, c.d_model)
        self.register_buffer("gap_delta", None)  # (1, d_inner) after an earlier layer is pruned

    @property
    def split(self) -> list[int]:
        """The output sizes of x_proj: rank of delta, B and C."""
        return [self.dt_rank, self.d_state, self.d_state]

    @property
    def d_inner(self) -> int:
        return self.A_log.shape[0]

    @property
    def d_state(self) -> int:
        return self.A_log.shape[1]

    def delta_bias(self) -> Tensor:
        """Return the bias (d_inner,) of delta."""
        return BIASES * find_bias(self.dt_proj)

    def paths(self, x: Tensor, tokens: Tokens) -> Iterator[ScanPath]:
        """Yield the scan inputs of each path, including delta, computed from x (batch, kept, d_inner)."""
        return map(Expander(), self.paths_by_parameters(x, tokens))

    def paths_by_parameters(self, x: Tensor, tokens: Tokens) -> Iterator[ScanPath]:
        """Yield the scan inputs of each path, where possible with a low-rank factor of delta instead of delta."""
        u = conv_on_grid(x, self.conv2d, tokens, self.grid, "silu")
        dt, B, C = self.x_proj(u).split(self.split, dim=-1)
        (delta, weight, bias), A_log = factorise(self.dt_proj, dt, BIASES), self.A_log
        for path in (tokens.paths[number] for number in self.directions):
            gap = None if path.gaps is None or not tokens.alignment.scan else (path.gaps, self.gap_delta[0])
            # Quirk: only u follows the path, while delta, B and C stay in raster order. That is how `order` works.
            path_B = B + F.embedding(path.labels, self.direction_Bs).to(B.dtype)
            # Quirk: D u is added once for each path, so four times.
            yield ScanPath(u, delta, A_log, path_B, C, self.D, bias, gap, False, path.order, weight, log_A=True)

    def products(self, count: int) -> list[tuple[int, Tensor]]:
        """Return the matrix products (rows, weight) for one image of `count` tokens."""
        return [(count, layer.weight) for layer in (self.in_proj, self.x_proj, self.dt_proj, self.out_proj)]

    def forward(self, features: Tensor, tokens: Tokens, metric: str | None) -> tuple[Tensor, Tensor | None]:
        """Return the projected sum of all paths (batch, kept, d_model) and, given a metric, scores (batch, kept)."""
        x, z = self.in_proj(features).chunk(2, dim=-1)
        y, scores = scan_paths(self.paths_by_parameters(x, tokens), z, delta_softplus=True, score=metric)
        return self.out_proj(y), scores

    # ------------------------------------------------------------------------------------------------- trimming

    def read_scans(self, features: Tensor, tokens: Tokens) -> list[ScanReading]:
        """Return the internal values of the scans, which share their parameters, computed from normalised features."""
        x, z = self.in_proj(features).chunk(2, dim=-1)
        paths = list(self.paths(x, tokens))
        u, readers = paths[0].u, []
        for path in paths:
            # C at step t comes from the t-th token in raster order, not from the token visited at that step.
            steps = invert_order(path.order)
            readers.append(u[:, steps] if steps.ndim == 1 else u.gather(1, steps[..., None].expand_as(u)))
        return [ScanReading(partial(read_state, paths), readers, u, F.silu(z), len(paths))]

    def cut_states(self, index: Sequence[Tensor], weights: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Keep the states `index[0]`, with new rows of C and a new D."""
        (kept,), ((C, D),) = index, weights
        dt, B, _ = self.x_proj.weight.detach().split(self.split)
        rows = torch.cat([dt, B[kept.to(B.device)], C.to(dt)])
        self.x_proj = slice_linear(self.x_proj, rows=torch.arange(len(rows)))
        self.x_proj.weight.data.copy_(rows)
        self.D.data.copy_(D)
        self.A_log = slice_parameter(self.A_log, columns=kept)
        self.direction_Bs = slice_parameter(self.direction_Bs, columns=kept)

    def cut_channels(self, index: Tensor) -> None:
        """Keep the channels `index`, ascending."""
        self.in_proj = slice_linear(self.in_proj, rows=torch.cat([index, index + self.d_inner]))
        self.conv2d = slice_depthwise(self.conv2d, index)
        self.x_proj = slice_linear(self.x_proj, columns=index)
        self.dt_proj = slice_linear(self.dt_proj, rows=index)
        self.D = slice_parameter(self.D, rows=index)
        self.out_proj = slice_linear(self.out_proj, columns=index)
        self.A_log = slice_parameter(self.A_log, rows=index)

    def keep_directions(self, directions: tuple[int, ...]) -> None:
        """Keep some of the paths, which have no parameters of their own."""
        self.directions = directions


def conv_on_grid(
    x: Tensor, conv: nn.Conv2d, tokens: Tokens, grid: tuple[int, int], activation: str | None = None
) -> Tensor:
    """Convolve x (batch, kept, channels) on the grid of the images if it is known, else on the model's `grid`.

    Without alignment, the kept tokens fill the grid from its start.
    """
    grid = grid if tokens.grid is None else tokens.grid
    positions = tokens.positions if tokens.alignment.conv else None
    return grid_conv2d(x, conv.weight, conv.bias, grid=grid, positions=positions, activation=activation)


class PlainMambaBlock(TrimmableBlock):
    def __init__(self, c: PlainMambaConfig, layer: int):
        super().__init__()
        self.norm = LayerNorm(c.d_model, eps=1e-5)
        self.mamba = PlainMambaMixer(c, c.layers[layer])
        self.dw = None
        if layer in c.dw_layers:
            side = c.dw_window
            conv = nn.Conv2d(c.d_model, c.d_model, side, padding=side // 2, groups=c.d_model, bias=False)
            self.dw = nn.Sequential(conv, nn.BatchNorm2d(c.d_model), nn.GELU())

    @property
    def scans(self) -> PlainMambaMixer:
        return self.mamba

    @property
    def channel_maps(self) -> tuple[tuple[str, ...], str]:
        return ("mamba.x_proj",), "mamba.out_proj"

    def read_scans(self, tokens: Tokens) -> list[ScanReading]:
        return self.mamba.read_scans(self.norm(tokens.features), tokens)

    def read_weights(self) -> list[tuple[Tensor, Tensor]]:
        return [(self.mamba.x_proj.weight.detach()[-self.d_state :], self.mamba.D.detach())]

    @property
    def refitted(self) -> tuple[tuple[str, ...], ...]:
        # With `dw`, the residual stream is not a sum with the projection as the last term.
        return () if self.dw is not None else (("mamba.x_proj",), ("mamba.out_proj",))

    def begin(self, tokens: Tokens, metric: str | None = None, protected_only: bool = False) -> Tokens:
        residual, scores = self.mamba(self.norm(tokens.features), tokens, metric)
        features = tokens.features + residual
        if self.dw is not None:
            conv, norm, activation = self.dw
            y = conv_on_grid(features, conv, tokens, self.mamba.grid)
            features = widen(activation(norm(cast(y.transpose(1, 2)[..., None], norm))[..., 0].transpose(1, 2)))
        return tokens.updated(features, scores)

    def deltas(self, tokens: Tokens) -> Tensor:
        x, _ = self.mamba.in_proj(self.norm(tokens.features)).chunk(2, dim=-1)
        return step_size(next(self.mamba.paths(x, tokens)), delta_softplus=True)[None]

    def bias_delta(self) -> Tensor:
        return F.softplus(self.mamba.delta_bias().float())[None]

    def set_gap_delta(self, delta: Tensor) -> None:
        self.mamba.gap_delta = delta


def read_backbone_sizes(shape: Shapes, stride: int | None) -> dict[str, Any]:
    """Return the fields of a `PlainMambaConfig` that follow from its backbone.

    Raises:
        InputError: a tensor is missing or has an unexpected shape, or `stride` differs from that of the patches.
    """
    depth = shape.count("backbone.layers.")
    inner_sizes = layer_sizes(shape, depth, "backbone.layers.{}.mamba.A_log")
    stem = "backbone.patch_embed.stem.0.weight"
    stem_width, in_chans, _, _ = shape(stem, 4)
    d_model, _, side, _ = shape("backbone.patch_embed.projection.weight", 4)
    patch = STEM_STRIDE * side
    if stride not in (None, patch):
        raise InputError(f"stride {stride}: a PlainMamba's patches, {patch} pixels here, do not overlap")
    dw_layers = tuple(i for i in range(depth) if f"backbone.layers.{i}.dw.0.weight" in shape.state)
    return {
        "d_model": d_model,
        "depth": depth,
        "d_inner": compact(d_inner for d_inner, _ in inner_sizes),
        "d_state": compact(d_state for _, d_state in inner_sizes),
        "dt_rank": shape("backbone.layers.0.mamba.dt_proj.weight", 2)[1],
        "window": shape.window("backbone.layers.0.mamba.conv2d.weight"),
        "dw_layers": dw_layers,
        "dw_window": shape.window(f"backbone.layers.{dw_layers[0]}.dw.0.weight") if dw_layers else 0,
        "stem_width": stem_width,
        "stem_depth": -(-shape.count("backbone.patch_embed.convs.") // 3),  # convolution, norm, activation
        "stem_window": shape.window(stem),
        "in_chans": in_chans,
        "patch_size": patch,
        "stride": patch,
    }


def count_layers(c: PlainMambaConfig, counts: Sequence[int], convention: str) -> dict[str, int]:
    """Return the FLOPs of the patch embedding and the layers by part, as in `TokenModel.count_flops`.

    Both conventions count all four directions; only `full` includes the gate, which the papers leave out. A convolution
    on the grid costs exactly all taps of its window for each kept token, see `grid_conv2d`.
    """
    R = c.dt_rank
    stem_weights = c.in_chans * c.stem_window**2 * c.stem_width + c.stem_depth * 9 * c.stem_width**2
    projection = c.patches * c.stem_width * (c.patch_size // STEM_STRIDE) ** 2 * c.d_model
    parts = dict.fromkeys(("in_proj", "conv", "x_proj", "dt_proj", "scan", "out_proj"), 0)
    parts["conv"] = sum(counts[i] for i in c.dw_layers) * c.d_model * c.dw_window**2
    for tokens, (E, N, directions) in zip(counts[:-1], c.layers, strict=True):
        parts["in_proj"] += tokens * c.d_model * 2 * E
        parts["conv"] += tokens * E * c.window**2
        parts["x_proj"] += tokens * E * (R + 2 * N)
        parts["dt_proj"] += tokens * R * E
        parts["scan"] += tokens * (len(directions) * (9 * E * N + E) + (E if convention == "full" else 0))
        parts["out_proj"] += tokens * E * c.d_model
    return {"embedding": math.prod(c.stem_grid) * stem_weights + projection, **parts}


def count_bytes(c: PlainMambaConfig, size: int) -> int:
    """Return the bytes of one image's activations, as in `TokenModel.activation_bytes`."""
    # Residual stream in and out, norm; x and z of in_proj, conv, x_proj, dt_proj, scans, out_proj.
    E, N = max(layer.d_inner for layer in c.layers), max(layer.d_state for layer in c.layers)
    inner = 2 * E + E + c.dt_rank + 2 * N + 4 * N + E + E
    layer = c.patches * (3 * c.d_model * 4 + (inner + c.d_model) * size)
    stem = 2 * math.prod(c.stem_grid) * c.stem_width * size  # input and output of one of its convolutions
    return max(layer, stem)
