"""The layers of Vim and related models: patch embedding, and bidirectional scans over the patches in raster order.

arXiv 2401.09417; used by `vim`, `video_mamba` and `vim_upernet`. Parameter names are those of the published checkpoints
(`bimambav2`, `div2`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops import ScanPath, causal_conv1d, gather_tokens, scan_paths
from ..ops.selective_scan import step_size
from ..pruning.alignment import ScanOrder
from ..pruning.tokens import Tokens
from .blocks import TrimmableBlock, read_state
from .families import StateDict
from .precision import RMSNorm, factorise, find_bias, project_rows
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

EPSILON = 1e-5
FORTH_AND_BACK = (ScanOrder(), ScanOrder(reverse=True))


@dataclass(frozen=True)
class VimConfig(LayeredConfig):
    """Sizes of a Vim; all except `stride` and `image_size` can be inferred from its weights.

    Attributes:
        d_inner, d_state: one number for all layers, or one for each.
        directions: the scans of each layer, 0 forward and 1 backward; None: both in all layers.
        residual_scale: factor of the projected sum of both scans when it is added to the residual stream.
    """

    PATHS: ClassVar[tuple[int, ...]] = (0, 1)
    residual_scale: ClassVar[float] = 0.5  # the mean of the two

    d_model: int
    depth: int
    d_inner: PerLayer
    d_state: PerLayer
    dt_rank: int
    d_conv: int
    in_chans: int
    num_classes: int
    patch_size: tuple[int, int]
    stride: int
    image_size: tuple[int, int]
    directions: tuple[tuple[int, ...], ...] | None = None

    @property
    def grid(self) -> tuple[int, int]:
        """The size of the patch grid, (rows, columns)."""
        (height, width), (ph, pw) = self.image_size, self.patch_size
        return (height - ph) // self.stride + 1, (width - pw) // self.stride + 1

    @property
    def window(self) -> tuple[int, ...]:
        """The sides of a patch, (height, width)."""
        return self.patch_size

    @property
    def steps(self) -> tuple[int, ...]:
        """The steps between patches along the sides of `window`."""
        return self.stride, self.stride


CONVOLUTIONS = {2: nn.Conv2d, 3: nn.Conv3d}  # by the number of sides of a patch


class PatchEmbed(nn.Module):
    def __init__(self, c: VimConfig):
        super().__init__()
        self.proj = CONVOLUTIONS[len(c.window)](c.in_chans, c.d_model, c.window, stride=c.steps)


# Names of the parameters of the forward and of the backward path: conv, x_proj, dt_proj, A_log, D.
PARAMETERS = (
    ("conv1d", "x_proj", "dt_proj", "A_log", "D"),
    ("conv1d_b", "x_proj_b", "dt_proj_b", "A_b_log", "D_b"),
)


class VimMixer(nn.Module):
    """The two scans of a layer, forward and backward over the same tokens, each gated, then added and projected."""

    def __init__(self, c: VimConfig, size: LayerSize):
        super().__init__()
        self.dt_rank, self.directions = c.dt_rank, size.directions
        E, N = size.d_inner, size.d_state
        self.in_proj = nn.Linear(c.d_model, 2 * E, bias=False)
        self.out_proj = nn.Linear(E, c.d_model, bias=False)
        steps = torch.arange(1, N + 1).log().expand(E, -1)
        for path in size.directions:
            conv, x_proj, dt_proj, A_log, D = PARAMETERS[path]
            setattr(self, conv, nn.Conv1d(E, E, c.d_conv, groups=E))
            setattr(self, x_proj, nn.Linear(E, c.dt_rank + 2 * N, bias=False))
            setattr(self, dt_proj, nn.Linear(c.dt_rank, E))
            setattr(self, D, nn.Parameter(torch.ones(E)))
            setattr(self, A_log, nn.Parameter(steps.clone()))
        self.register_buffer("gap_delta", None)  # (paths, d_inner) after an earlier layer is pruned

    @property
    def d_inner(self) -> int:
        return self.parameters_of(self.directions[0])[3].shape[0]

    @property
    def d_state(self) -> int:
        return self.parameters_of(self.directions[0])[3].shape[1]

    @property
    def split(self) -> list[int]:
        """The output sizes of x_proj: rank of delta, B and C."""
        states = self.d_state
        return [self.dt_rank, states, states]

    def parameters_of(self, path: int):
        """Return the parameters of the forward (0) or the backward path (1): conv, x_proj, dt_proj, A_log, D."""
        conv, x_proj, dt_proj, A_log, D = PARAMETERS[path]
        own, modules = self._parameters, self._modules  # getattr on a module takes ten times as long
        return (
            modules[conv], modules[x_proj], modules[dt_proj],
            own[A_log] if A_log in own else getattr(self, A_log), own[D] if D in own else getattr(self, D),
        )  # fmt: skip

    def scan_path(self, x: Tensor, tokens: Tokens, path: int) -> ScanPath:
        """Compute the scan inputs of a path, including delta, from x (batch, kept, d_inner)."""
        return self.scan_parameters(x, tokens, path).expanded()

    def scan_parameters(self, x: Tensor, tokens: Tokens, path: int) -> ScanPath:
        """Compute the scan inputs of a path from x, where possible with a low-rank factor of delta instead of delta."""
        conv, x_proj, dt_proj, A_log, D = self.parameters_of(path)
        positions = tokens.positions if tokens.alignment.conv else None
        reverse, gaps = tokens.paths[path].reverse, tokens.paths[path].gaps
        u = causal_conv1d(x, conv.weight, conv.bias, positions, reverse=reverse)
        dt, B, C = torch.split_with_sizes(x_proj(u), self.split, dim=-1)
        aligned = gaps is not None and tokens.alignment.scan
        gap = (gaps, self.gap_delta[self.directions.index(path)]) if aligned else None
        delta, weight, bias = factorise(dt_proj, dt)
        return ScanPath(u, delta, A_log, B, C, D, bias, gap, reverse, None, weight, log_A=True)

    def deltas(self, x: Tensor, tokens: Tokens) -> Tensor:
        """Return delta after bias and softplus (paths, batch, kept, d_inner), from x (batch, kept, d_inner)."""
        paths = (self.scan_path(x, tokens, path) for path in self.directions)
        return torch.stack([step_size(path, delta_softplus=True) for path in paths])

    def forward(self, features: Tensor, tokens: Tokens, metric: str | None) -> tuple[Tensor, Tensor | None]:
        """Return the projected sum of both paths (batch, kept, d_model) and, given a metric, scores (batch, kept)."""
        x, z = self.in_proj(features).chunk(2, dim=-1)
        # The paths are computed in sequence, so that the second reuses the cached memory of the first. The score uses
        # only the backward path, which therefore comes first: on the first bundled model (2, 4, 6 at 0.3, 2,000 images)
        # it gave 65.2 % top-1, and the sum of both paths 59.9.
        paths = (self.scan_parameters(x, tokens, path) for path in reversed(self.directions))
        y, scores = scan_paths(paths, z, delta_softplus=True, score=metric, scored=1)
        return self.out_proj(y), scores

    def forward_protected(self, features: Tensor, tokens: Tokens) -> Tensor:
        """Return the projected sum of both paths (batch, 1, d_model) at the protected token only.

        The forward path runs up to that token and the backward path back to it, kept + 1 steps in total; the gate and
        the projection are computed for one token. See `span_to_protected` for batches.
        """
        index = tokens.protected_index()
        channels = self.in_proj.out_features // 2
        x = project_rows(self.in_proj, features, slice(None, channels))
        z = project_rows(self.in_proj, gather_tokens(features, index[:, None]), slice(channels, None))
        y = None
        for path in reversed(self.directions):
            part, start = tokens.span_to_protected(tokens.paths[path].reverse)
            inputs = self.scan_parameters(x[:, start : start + part.features.shape[1]], part, path)
            scanned, _ = scan_paths([inputs], None, delta_softplus=True)
            scanned = gather_tokens(scanned, index[:, None] - start)
            y = scanned if y is None else y + scanned
        return self.out_proj(y * F.silu(z))

    def products(self, count: int) -> list[tuple[int, Tensor]]:
        """Return the matrix products (rows, weight) of `forward`, for one image of `count` tokens."""
        inner = [layer for path in reversed(self.directions) for layer in self.parameters_of(path)[1:3]]
        return [(count, layer.weight) for layer in (self.in_proj, *inner, self.out_proj)]

    def last_products(self, count: int, spans: Sequence[int]) -> list[tuple[int, Tensor]]:
        """Return the matrix products (rows, weight) of `forward_protected`, for one image of `count` tokens.

        Args:
            spans: steps of the forward and backward path up to the protected token, from `count_spans`.
        """
        x, z = self.in_proj.weight.chunk(2)
        inner = [(spans[path], layer.weight) for path in self.directions for layer in self.parameters_of(path)[1:3]]
        return [(count, x), (1, z), *inner, (1, self.out_proj.weight)]

    # ------------------------------------------------------------------------------------------------- trimming

    def read_scans(self, features: Tensor, tokens: Tokens) -> list[ScanReading]:
        """Return the internal values of each direction, computed from normalised features (batch, kept, d_model)."""
        x, z = self.in_proj(features).chunk(2, dim=-1)
        gate, readings = F.silu(z), []
        for path in self.directions:
            inputs = self.scan_path(x, tokens, path)
            readings.append(ScanReading(partial(read_state, [inputs]), [inputs.u], inputs.u, gate, 1))
        return readings

    def cut_states(self, index: Sequence[Tensor], weights: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Keep the states `index` of each direction, with new rows of C and a new D."""
        for path, kept, (C, D) in zip(self.directions, index, weights, strict=True):
            _, x_proj, _, A_log, old = self.parameters_of(path)
            # Not `split`: the first direction has already been cut when the second one is.
            dt, B, _ = x_proj.weight.detach().split([self.dt_rank, A_log.shape[1], A_log.shape[1]])
            rows = torch.cat([dt, B[kept.to(B.device)], C.to(dt)])
            new = slice_linear(x_proj, rows=torch.arange(len(rows)))
            new.weight.data.copy_(rows)
            old.data.copy_(D)
            setattr(self, PARAMETERS[path][1], new)
            setattr(self, PARAMETERS[path][3], slice_parameter(A_log, columns=kept))

    def cut_channels(self, index: Tensor) -> None:
        """Keep the channels `index`, ascending."""
        self.in_proj = slice_linear(self.in_proj, rows=torch.cat([index, index + self.d_inner]))
        self.out_proj = slice_linear(self.out_proj, columns=index)
        for path in self.directions:
            conv, x_proj, dt_proj, A_log, D = self.parameters_of(path)
            sliced = (
                slice_depthwise(conv, index),
                slice_linear(x_proj, columns=index),
                slice_linear(dt_proj, rows=index),
                slice_parameter(A_log, rows=index),
                slice_parameter(D, rows=index),
            )
            for name, value in zip(PARAMETERS[path], sliced, strict=True):
                setattr(self, name, value)

    def keep_directions(self, directions: tuple[int, ...]) -> None:
        """Keep some of the paths."""
        for path in set(self.directions) - set(directions):
            for name in PARAMETERS[path]:
                delattr(self, name)
        self.directions = directions


class VimBlock(TrimmableBlock):
    """One layer.

    A layer that has lost a scan keeps the factor `residual_scale` of the sum of both.

    Attributes:
        keeps_update: whether `update` of the output tokens holds what the layer added to the residual stream.
    """

    keeps_update = False

    def __init__(self, c: VimConfig, size: LayerSize):
        super().__init__()
        self.residual_scale = c.residual_scale
        self.norm = RMSNorm(c.d_model, eps=EPSILON)
        self.mixer = VimMixer(c, size)

    @property
    def scans(self) -> VimMixer:
        return self.mixer

    @property
    def channel_maps(self) -> tuple[tuple[str, ...], str]:
        return tuple(f"mixer.{PARAMETERS[path][1]}" for path in self.mixer.directions), "mixer.out_proj"

    @property
    def refitted(self) -> tuple[tuple[str, ...], ...]:
        inner, projection = self.channel_maps
        return inner, (projection,)

    def begin(self, tokens: Tokens, metric: str | None = None, protected_only: bool = False) -> Tokens:
        features = self.norm(tokens.features)
        if protected_only:
            update, scores = self.mixer.forward_protected(features, tokens), None
            tokens = tokens.keep(tokens.protected_index()[:, None])
        else:
            update, scores = self.mixer(features, tokens, metric)
        features = torch.add(tokens.features, update, alpha=self.residual_scale)
        return tokens.updated(features, scores, self.residual_scale * update if self.keeps_update else None)

    def deltas(self, tokens: Tokens) -> Tensor:
        x, _ = self.mixer.in_proj(self.norm(tokens.features)).chunk(2, dim=-1)
        return self.mixer.deltas(x, tokens)

    def bias_delta(self) -> Tensor:
        projections = [self.mixer.parameters_of(path)[2] for path in self.mixer.directions]
        return F.softplus(torch.stack([find_bias(dt_proj) for dt_proj in projections]).float())

    def set_gap_delta(self, delta: Tensor) -> None:
        self.mixer.gap_delta = delta

    def read_scans(self, tokens: Tokens) -> list[ScanReading]:
        return self.mixer.read_scans(self.norm(tokens.features), tokens)

    def read_weights(self) -> list[tuple[Tensor, Tensor]]:
        sets = []
        for path in self.mixer.directions:
            _, x_proj, _, A_log, D = self.mixer.parameters_of(path)
            sets.append((x_proj.weight.detach()[-A_log.shape[1] :], D.detach()))
        return sets


def read_layer_sizes(shape: Shapes, prefix: str = "") -> dict[str, Any]:
    """Infer the fields of a `VimConfig` that are determined by the layers, whose names start with `prefix`."""
    state, depth = shape.state, shape.count(f"{prefix}layers.")
    only_backward = any(f"{prefix}layers.{layer}.mixer.x_proj.weight" not in state for layer in range(depth))
    names = [f"{prefix}layers.{{}}.mixer.{name}" for name in ("A_log", "A_b_log")[: 1 + only_backward]]
    sizes = layer_sizes(shape, depth, *names)
    return {
        "depth": depth,
        "d_inner": compact(d_inner for d_inner, _ in sizes),
        "d_state": compact(d_state for _, d_state in sizes),
        "dt_rank": shape(_either(state, f"{prefix}layers.0.mixer.dt_proj", ".weight"), 2)[1],
        "d_conv": shape(_either(state, f"{prefix}layers.0.mixer.conv1d", ".weight"), 3)[2],
    }


def _either(state: StateDict, name: str, end: str = "") -> str:
    """Return the name of a parameter on the forward path, or on the backward path if a layer has only that."""
    backward = f"{name}_b{end}"
    return backward if f"{name}{end}" not in state and backward in state else f"{name}{end}"


def count_spans(tokens: int, patches: int, protected: int) -> tuple[int, int]:
    """Return the steps of the forward and backward path needed to reach the protected token; both include it.

    Their sum is the number of tokens plus one. They are exact without pruning and for a token at either end; else they
    assume that an image keeps the same share of the patches on both sides.

    Args:
        tokens: the number of kept tokens, including the protected one. patches: the number of patches without pruning.
        protected: the position of the protected token in the full sequence.
    """
    before = (tokens - 1) * protected // patches
    return before + 1, tokens - before


def count_layers(c: VimConfig, counts: Sequence[int], convention: str, read: int | None) -> dict[str, int]:
    """Return the FLOPs of the patch embedding and the layers by part, as in `TokenModel.count_flops`.

    `paper` counts one direction only, as the papers do, and `full` both; the gate is part of the scan.

    Args:
        read: the position of the only token for which the last layer is computed; None: all tokens.
    """
    R = c.dt_rank
    parts = dict.fromkeys(("in_proj", "conv", "x_proj", "dt_proj", "scan", "out_proj"), 0)
    for layer, (tokens, (E, N, directions)) in enumerate(zip(counts[:-1], c.layers, strict=True), 1):
        last = read is not None and layer == c.depth
        spans = count_spans(tokens, c.patches, read) if last else (tokens, tokens)
        steps, paths = sum(spans[path] for path in directions), len(directions)
        gated = 1 if last else tokens  # and projected
        for part, count in (
            ("conv", (steps + paths * (c.d_conv - 1)) * E * c.d_conv),
            ("x_proj", steps * E * (R + 2 * N)),
            ("dt_proj", steps * R * E),
            ("scan", steps * (9 * E * N + E) + paths * gated * E),
        ):
            parts[part] += count if convention == "full" else count // 2
        parts["in_proj"] += (tokens + gated) * c.d_model * E
        parts["out_proj"] += gated * E * c.d_model
    return {"embedding": c.patches * c.d_model * c.in_chans * math.prod(c.window), **parts}


def count_layer_bytes(c: VimConfig, size: int) -> int:
    """Return the bytes of the activations of one token in the largest layer; see `TokenModel.activation_bytes`."""
    E, N = max(layer.d_inner for layer in c.layers), max(layer.d_state for layer in c.layers)
    path = E + c.dt_rank + 2 * N + E + E  # conv, x_proj, dt_proj, scan
    # Residual stream in and out, norm; x and z of in_proj, both paths, out_proj.
    return 3 * c.d_model * 4 + (2 * E + 2 * path + c.d_model) * size
