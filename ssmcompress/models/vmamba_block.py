"""The layers of a VMamba: four scans over a patch grid with a convolution, then an MLP; and stem and downsampling.

arXiv 2401.10166, the second version (`v05_noz` of MzeroMiko/VMamba): no gate, no bias in convolutions and projections.
Module names are those of the published checkpoints; the matrices of the four paths, a single tensor there, are one
linear layer here (`VMamba.infer_config`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops import SCORES, ScanPath, gather_tokens, grid_conv2d, scan_paths
from ..ops.selective_scan import step_size
from ..pruning.tokens import Tokens
from .blocks import ScanBlock
from .precision import LayerNorm, cast, embed_patches, widen
from .sizes import ModelConfig, Section

EPSILON = 1e-5
PATHS = 4
Size = tuple[int, int]


@dataclass(frozen=True)
class VMambaConfig(ModelConfig):
    """Sizes of a VMamba; all except `image_size` can be inferred from its weights.

    The lists have one entry for each section (layers on a grid of one size), which the authors call stage.

    Attributes:
        widths, depths: d_model, and number of layers. d_inner, dt_rank, mlp_dim: sizes of each of these layers.
        stem_width: channels between the two convolutions of the stem.
        window: kernel size of the convolution on the grid.
        stride: pixels between the tokens of the first section.
    """

    widths: tuple[int, ...]
    depths: tuple[int, ...]
    d_inner: tuple[int, ...]
    dt_rank: tuple[int, ...]
    mlp_dim: tuple[int, ...]
    d_state: int
    stem_width: int
    window: int
    in_chans: int
    num_classes: int
    stride: int
    image_size: Size

    @property
    def depth(self) -> int:
        """The number of layers of all sections."""
        return sum(self.depths)

    @property
    def d_model(self) -> int:
        """The width of the last section, which is read out."""
        return self.widths[-1]

    @property
    def stem_grid(self) -> Size:
        """The output size of the first convolution, (rows, columns)."""
        return halve(self.image_size)

    @property
    def grids(self) -> list[Size]:
        """The grid size of each section, (rows, columns)."""
        grids = [halve(self.stem_grid)]
        for _ in self.depths[1:]:
            grids.append(halve(grids[-1]))
        return grids

    @property
    def grid(self) -> Size:
        """The grid size of the first section, (rows, columns)."""
        return self.grids[0]

    def sections(self, others: int = 0) -> tuple[Section, ...]:
        """Return the layers of each section with the size of its grid; all tokens are patches."""
        found, first = [], 1
        for (rows, columns), width, depth in zip(self.grids, self.widths, self.depths, strict=True):
            found.append(Section(first, first + depth - 1, rows * columns, width))
            first += depth
        return tuple(found)

    def to_dict(self) -> dict[str, Any]:
        """Return the configuration as a JSON object, including the width and depth derived from the sections."""
        return {"d_model": self.d_model, "depth": self.depth, **super().to_dict()}


def halve(size: Size) -> Size:
    """Return the size of the output of a 3x3 convolution with stride 2 and padding 1."""
    return (size[0] + 1) // 2, (size[1] + 1) // 2


def make_paths(rows: int, columns: int) -> Tensor:
    """Return the positions (4, rows * columns) in the order of each path over a grid.

    They go row by row, column by column, and both in reverse.
    """
    # Explicitly on the CPU, because the model is built on the meta device.
    places = torch.arange(rows * columns, device="cpu").view(rows, columns)
    by_row, by_column = places.flatten(), places.t().flatten()
    return torch.stack([by_row, by_column, by_row.flip(0), by_column.flip(0)])


class Stem(nn.ModuleDict):
    """Images (batch, channels, height, width) -> patches (batch, width, rows, columns), a quarter of each side."""

    def __init__(self, c: VMambaConfig):
        width = c.widths[0]
        super().__init__(
            {
                "0": nn.Conv2d(c.in_chans, c.stem_width, 3, stride=2, padding=1),
                "2": LayerNorm(c.stem_width, eps=EPSILON),
                "5": nn.Conv2d(c.stem_width, width, 3, stride=2, padding=1),
                "7": LayerNorm(width, eps=EPSILON),
            }
        )

    def forward(self, images: Tensor) -> Tensor:
        x = F.gelu(norm_channels(self["2"], embed_patches(self["0"], images)))
        return norm_channels(self["7"], embed_patches(self["5"], x))


class Downsample(nn.ModuleDict):
    """Maps (batch, width, rows, columns) -> maps of half the size and the width of the next section."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__(
            {
                "1": nn.Conv2d(inputs, outputs, 3, stride=2, padding=1),
                "3": LayerNorm(outputs, eps=EPSILON),
            }
        )

    def forward(self, x: Tensor) -> Tensor:
        return norm_channels(self["3"], embed_patches(self["1"], x))


def norm_channels(norm: LayerNorm, x: Tensor) -> Tensor:
    """Normalise maps (batch, channels, rows, columns) over their channels."""
    return norm(widen(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class VMambaMixer(nn.Module):
    """The four scans of a layer over the same inputs, summed and normalised.

    Args:
        section: the number of its section, from 0.
    """

    def __init__(self, c: VMambaConfig, section: int):
        super().__init__()
        E, N, R = c.d_inner[section], c.d_state, c.dt_rank[section]
        self.split = [R, N, N]
        self.in_proj = nn.Linear(c.widths[section], E, bias=False)
        self.conv2d = nn.Conv2d(E, E, c.window, padding=c.window // 2, groups=E, bias=False)
        self.x_proj = nn.Linear(E, PATHS * (R + 2 * N), bias=False)
        self.dt_projs_weight = nn.Parameter(torch.zeros(PATHS, E, R))
        self.dt_projs_bias = nn.Parameter(torch.zeros(PATHS, E))
        self.A_logs = nn.Parameter(torch.arange(1, N + 1).log().expand(PATHS * E, -1).clone())
        self.Ds = nn.Parameter(torch.ones(PATHS * E))
        self.out_norm = LayerNorm(E, eps=EPSILON)
        self.out_proj = nn.Linear(E, c.widths[section], bias=False)
        self.register_buffer("gap_delta", None)  # (4, d_inner) after an earlier layer of the section is pruned

    def paths(self, x: Tensor, tokens: Tokens) -> Iterator[ScanPath]:
        """Yield the scan inputs of each path from x (batch, kept, d_inner), with a low-rank factor of delta."""
        positions = tokens.positions if tokens.alignment.conv else None
        u = grid_conv2d(x, self.conv2d.weight, None, grid=tokens.grid, positions=positions, activation="silu")
        projected = self.x_proj(u).chunk(PATHS, dim=-1)
        logs, D = self.A_logs.chunk(PATHS), self.Ds.chunk(PATHS)
        for number, path in enumerate(tokens.paths):
            # u stays in token order, while delta, B and C follow the path.
            order = path.order if path.order.ndim == 2 else path.order.expand(x.shape[0], -1)
            dt, B, C = gather_tokens(projected[number], order).split(self.split, dim=-1)
            aligned = path.gaps is not None and tokens.alignment.scan
            gap = (path.gaps, self.gap_delta[number]) if aligned else None
            weight, bias = self.dt_projs_weight[number], self.dt_projs_bias[number]
            # D u is added once for each path, so four times.
            yield ScanPath(u, dt, logs[number], B, C, D[number], bias, gap, False, path.order, weight, log_A=True)

    def products(self, count: int) -> list[tuple[int, Tensor]]:
        """Return the matrix products (rows, weight) for one image of `count` tokens."""
        linear = [(count, layer.weight) for layer in (self.in_proj, self.x_proj)]
        return [*linear, *((count, weight) for weight in self.dt_projs_weight), (count, self.out_proj.weight)]

    def forward(self, features: Tensor, tokens: Tokens, metric: str | None) -> tuple[Tensor, Tensor | None]:
        """Return the projected sum of all paths (batch, kept, d_model) and, given a metric, scores (batch, kept)."""
        y, scores = scan_paths(self.paths(self.in_proj(features), tokens), delta_softplus=True, score=metric)
        return self.out_proj(cast(self.out_norm(widen(y)), self.out_proj)), scores


class MLP(nn.Module):
    """Tokens (..., width) -> tokens of the same width."""

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class VMambaBlock(ScanBlock):
    """One layer: `begin` runs the scans, `end` the MLP; tokens are dropped between the two.

    Args:
        section: the number of its section, from 0.
    """

    # A delta score would follow the order of each path instead of token order.
    scores = frozenset(SCORES) - {"delta"}
    end_projection: ClassVar[str] = "mlp.fc2"

    def __init__(self, c: VMambaConfig, section: int):
        super().__init__()
        width = c.widths[section]
        self.norm = LayerNorm(width, eps=EPSILON)
        self.op = VMambaMixer(c, section)
        self.norm2 = LayerNorm(width, eps=EPSILON)
        self.mlp = MLP(width, c.mlp_dim[section])

    @property
    def scans(self) -> VMambaMixer:
        return self.op

    @property
    def refitted(self) -> tuple[tuple[str, ...], ...]:
        return (("op.x_proj",), ("op.out_proj",))

    def begin(self, tokens: Tokens, metric: str | None = None, protected_only: bool = False) -> Tokens:
        update, scores = self.op(self.norm(tokens.features), tokens, metric)
        return tokens.updated(tokens.features + update, scores)

    def end(self, tokens: Tokens) -> Tokens:
        return tokens.updated(tokens.features + self.mlp(self.norm2(tokens.features)))

    def deltas(self, tokens: Tokens) -> Tensor:
        paths = self.op.paths(self.op.in_proj(self.norm(tokens.features)), tokens)
        return torch.stack([step_size(path.expanded(), delta_softplus=True) for path in paths])

    def bias_delta(self) -> Tensor:
        return F.softplus(self.op.dt_projs_bias.float())

    def set_gap_delta(self, delta: Tensor | None) -> None:
        self.op.gap_delta = delta


def count_layers(c: VMambaConfig, counts: Sequence[int], convention: str) -> dict[str, int]:
    """Return the FLOPs of everything but the head by part, as in `TokenModel.count_flops`.

    Both conventions count all four directions. A convolution on the grid costs exactly all taps of its window for each
    kept token, see `grid_conv2d`. An MLP is computed for the tokens kept by the stage in its layer.
    """
    if len(counts) != c.depth + len(c.depths):
        raise ValueError(f"{len(counts)} numbers of tokens for {c.depth} layers in {len(c.depths)} sections")
    N, parts = c.d_state, dict.fromkeys(("in_proj", "conv", "x_proj", "dt_proj", "scan", "out_proj", "mlp"), 0)
    place = 0
    for section, depth in enumerate(c.depths):
        C, E, R, H = c.widths[section], c.d_inner[section], c.dt_rank[section], c.mlp_dim[section]
        for tokens, left in zip(counts[place : place + depth], counts[place + 1 : place + depth + 1], strict=True):
            parts["in_proj"] += tokens * C * E
            parts["conv"] += tokens * E * c.window**2
            parts["x_proj"] += tokens * E * PATHS * (R + 2 * N)
            parts["dt_proj"] += tokens * PATHS * R * E
            parts["scan"] += tokens * PATHS * (9 * E * N + E)
            parts["out_proj"] += tokens * E * C
            parts["mlp"] += 2 * left * C * H
        place += depth + 1
    stem = math.prod(c.stem_grid) * c.in_chans * c.stem_width * 9 + c.patches * c.stem_width * c.widths[0] * 9
    pairs = zip(c.grids[1:], c.widths, c.widths[1:], strict=False)
    between = sum(math.prod(grid) * narrow * wide * 9 for grid, narrow, wide in pairs)
    return {"embedding": stem, **parts, "downsampling": between}


def count_bytes(c: VMambaConfig, size: int) -> int:
    """Return the bytes of one image's activations, as in `TokenModel.activation_bytes`."""
    most = 2 * math.prod(c.stem_grid) * c.stem_width * size  # output of a convolution and its norm
    for grid, C, E, R, H in zip(c.grids, c.widths, c.d_inner, c.dt_rank, c.mlp_dim, strict=True):
        # in_proj, conv, x_proj, one path after the other with its delta, and their sum; the MLP.
        scans, mlp = 3 * E + PATHS * (R + 2 * c.d_state) + 2 * E, 2 * H
        most = max(most, math.prod(grid) * (3 * C * 4 + max(scans, mlp) * size))
    return most
