"""Vision Mamba (Vim, hustvl): bidirectional scans over a raster of patches, with a class token in the middle.

arXiv 2401.09417; module and parameter names are those of the published checkpoints (`bimambav2`,
`final_pool_mean`, `abs_pos_embed`, `with_midclstok`, `div2`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import InputError
from ..ops import ScanPath, causal_conv1d, gather_tokens, scan_paths
from ..ops.selective_scan import step_size
from ..progress import note
from ..pruning.alignment import ScanOrder
from ..pruning.tokens import Tokens
from .base import Expected, ScanBlock, StateDict, TokenModel, read_state
from .precision import RMSNorm, embed_patches, find_bias, project, project_rows, widen
from .reading import Shapes, infer_grid, layer_sizes, resize_grid
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
from .statements import Statements

EPSILON = 1e-5
# (d_model, depth) of VideoMamba-M, which no published Vim has, and of VideoMamba-B, whose weights are published as an
# entry of a checkpoint, as a Vim's are.
VIDEO_MAMBA_M, VIDEO_MAMBA_B = (576, 32), (768, 24)
SAME_NAMES = "the weights of a Vim or of a VideoMamba, which have the same names and shapes"
FORTH_AND_BACK = (ScanOrder(), ScanOrder(reverse=True))


@dataclass(frozen=True)
class VimConfig(LayeredConfig):
    """Sizes of a Vim; all except `stride` and `image_size` follow from its weights.

    Attributes:
        d_inner, d_state: one number for all layers, or one for each.
        directions: for each layer the scans that it has, 0 forward and 1 backward; None: both in all layers.
    """

    PATHS: ClassVar[tuple[int, ...]] = (0, 1)

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
        """The patches in (rows, columns)."""
        (height, width), (ph, pw) = self.image_size, self.patch_size
        return (height - ph) // self.stride + 1, (width - pw) // self.stride + 1

    @property
    def patches(self) -> int:
        return self.grid[0] * self.grid[1]


class PatchEmbed(nn.Module):
    def __init__(self, c: VimConfig):
        super().__init__()
        self.proj = nn.Conv2d(c.in_chans, c.d_model, c.patch_size, stride=c.stride)


# Names of the parameters of the forward and of the backward path: conv, x_proj, dt_proj, A_log, D.
PARAMETERS = (
    ("conv1d", "x_proj", "dt_proj", "A_log", "D"),
    ("conv1d_b", "x_proj_b", "dt_proj_b", "A_b_log", "D_b"),
)


class VimMixer(nn.Module):
    """The two scans of a layer, forward and backward over the same tokens, each gated, then averaged.

    A layer that has lost one of them keeps the factor of the average.
    """

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
        """The outputs of x_proj: delta's rank, B and C."""
        return [self.dt_rank, self.d_state, self.d_state]

    def parameters_of(self, path: int):
        """Return the parameters of the forward (0) or the backward path (1): conv, x_proj, dt_proj, A_log, D."""
        return tuple(getattr(self, name) for name in PARAMETERS[path])

    def scan_path(self, x: Tensor, tokens: Tokens, path: int) -> ScanPath:
        """Compute the inputs of the scan of a path from x (batch, kept, d_inner)."""
        conv, x_proj, dt_proj, A_log, D = self.parameters_of(path)
        positions = tokens.positions if tokens.alignment.conv else None
        reverse, gaps = tokens.paths[path].reverse, tokens.paths[path].gaps
        u = causal_conv1d(x, conv.weight, conv.bias, positions, reverse=reverse)
        dt, B, C = x_proj(u).split(self.split, dim=-1)
        aligned = gaps is not None and tokens.alignment.scan
        gap = (gaps, self.gap_delta[self.directions.index(path)]) if aligned else None
        (delta, bias), A = project(dt_proj, dt), -torch.exp(widen(A_log))
        return ScanPath(u, delta, A, B, C, D, bias, gap, reverse)

    def deltas(self, x: Tensor, tokens: Tokens) -> Tensor:
        """Return delta after bias and softplus (paths, batch, kept, d_inner), from x (batch, kept, d_inner)."""
        paths = (self.scan_path(x, tokens, path) for path in self.directions)
        return torch.stack([step_size(path, delta_softplus=True) for path in paths])

    def forward(self, features: Tensor, tokens: Tokens, metric: str | None) -> tuple[Tensor, Tensor | None]:
        """Return the projected sum of both paths (batch, kept, d_model) and, given a metric, scores (batch, kept)."""
        x, z = self.in_proj(features).chunk(2, dim=-1)
        # The paths are computed one after the other, so that the second reuses the memory of the first from cache. The
        # score uses only the backward path, which therefore comes first: on the first bundled model (2, 4, 6 at 0.3,
        # 2,000 images) it gave 65.2 % top-1, and the sum of both paths 59.9.
        paths = (self.scan_path(x, tokens, path) for path in reversed(self.directions))
        y, scores = scan_paths(paths, z, delta_softplus=True, score=metric, scored=1)
        return self.out_proj(y), scores

    def forward_protected(self, features: Tensor, tokens: Tokens) -> Tensor:
        """Return the projected sum of both paths (batch, 1, d_model) at the protected token alone.

        The forward path runs up to that token and the backward path back to it, which together are kept + 1 steps; the
        gate and the projection are computed for one token. See `span_to_protected` for batches.
        """
        index = tokens.protected_index()
        channels = self.in_proj.out_features // 2
        x = project_rows(self.in_proj, features, slice(None, channels))
        z = project_rows(self.in_proj, gather_tokens(features, index[:, None]), slice(channels, None))
        y = None
        for path in reversed(self.directions):
            part, start = tokens.span_to_protected(tokens.paths[path].reverse)
            inputs = self.scan_path(x[:, start : start + part.features.shape[1]], part, path)
            scanned, _ = scan_paths([inputs], None, delta_softplus=True)
            scanned = gather_tokens(scanned, index[:, None] - start)
            y = scanned if y is None else y + scanned
        return self.out_proj(y * F.silu(z))

    def last_products(self, count: int) -> list[tuple[int, Tensor]]:
        """Return the matrix products (rows, weight) of `forward_protected`, for one image of `count` tokens."""
        x, z = self.in_proj.weight.chunk(2)
        products, left = [(count, x), (1, z)], (count + 1) * len(self.directions) // 2
        for number, path in enumerate(self.directions, 1):
            steps = left // (len(self.directions) + 1 - number)
            products += [(steps, layer.weight) for layer in self.parameters_of(path)[1:3]]
            left -= steps
        return [*products, (1, self.out_proj.weight)]

    # ------------------------------------------------------------------------------------------------- trimming

    def read_scans(self, features: Tensor, tokens: Tokens) -> list[ScanReading]:
        """Return the inner values of each direction, from normalised features (batch, kept, d_model)."""
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
            # Not `split`: the first direction is cut already when the second one is.
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


class VimBlock(ScanBlock):
    residual_scale = 0.5  # the mean of the two paths

    def __init__(self, c: VimConfig, size: LayerSize):
        super().__init__()
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

    def forward(self, tokens: Tokens, metric: str | None = None, protected_only: bool = False) -> Tokens:
        features = self.norm(tokens.features)
        if protected_only:
            update, scores = self.mixer.forward_protected(features, tokens), None
            tokens = tokens.keep(tokens.protected_index()[:, None])
        else:
            update, scores = self.mixer(features, tokens, metric)
        return tokens.updated(torch.add(tokens.features, update, alpha=self.residual_scale), scores)

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


class VisionMamba(TokenModel):
    """Vision Mamba of any size. `forward`: images (B, C, H, W) -> logits (B, classes)."""

    architecture = "vim"
    config_class = VimConfig
    telling_keys = (
        "cls_token",
        "pos_embed",
        "patch_embed.proj.weight",
        "layers.0.mixer.A_b_log",
        "head.weight",
    )

    no_weight_decay = ("*A_log", "*A_b_log", "*pos_embed", "*cls_token")
    reads_protected = True
    # Of hustvl's vim/models_mamba.py; all published models have these values.
    expected_options: ClassVar[Mapping[str, Expected]] = {
        "if_cls_token": Expected((True,), "one class token"),
        "use_double_cls_token": Expected((False,), "one class token"),
        "use_middle_cls_token": Expected((True,), "the class token in the middle of the sequence"),
        "if_divide_out": Expected((True,), "the sum of both scans divided by two"),
        "bimamba_type": Expected(("v2",), "bidirectional blocks of type v2"),
        "if_bimamba": Expected((False,), "bidirectional blocks of type v2"),
        "if_bidirectional": Expected((False,), "both scans in every layer"),
        "if_abs_pos_embed": Expected((True,), "a learnt position embedding"),
        "if_rope": Expected((False,), "no rotary position embedding"),
        "if_rope_residual": Expected((False,), "no rotary position embedding"),
        "final_pool_type": Expected(("mean", "none", None), "the class token as its output"),
        "flip_img_sequences_ratio": Expected((-1, 0), "no random flips of the sequence"),
        "rms_norm": Expected((True,), "RMSNorm"),
        "norm_epsilon": Expected((EPSILON,), f"norms with an epsilon of {EPSILON:g}"),
    }
    foreign_keys: ClassVar[Mapping[str, str]] = {
        "rope.": "rotary position embedding",
        "cls_token_": "several class tokens",
        "temporal_pos_embedding": "a VideoMamba for video",
        "pos_embed_cls": "a Mamba-Reg",
        "fpn": "the neck of a segmentation model",
    }

    def __init__(self, config: VimConfig):
        super().__init__(config)
        c = config
        self.patch_embed = PatchEmbed(c)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, c.d_model))
        self.pos_embed = nn.Parameter(torch.zeros(1, c.patches + 1, c.d_model))
        self.layers = nn.ModuleList(VimBlock(c, size) for size in c.layers)
        self.norm_f = RMSNorm(c.d_model, eps=EPSILON)
        self.head = nn.Linear(c.d_model, c.num_classes)

    @property
    def blocks(self) -> nn.ModuleList:
        return self.layers

    @property
    def classifier(self) -> nn.Linear:
        return self.head

    @property
    def length(self) -> int:
        return self.config.patches + 1

    @property
    def protected(self) -> int:
        return self.config.patches // 2

    @property
    def patch_positions(self) -> Tensor:
        raster = torch.arange(self.config.patches, device="cpu")
        return (raster + (raster >= self.protected)).view(self.config.grid)

    def embed(self, images: Tensor) -> Tokens:
        c = self.config
        self.check(images)
        patches = widen(embed_patches(self.patch_embed.proj, images).flatten(2).transpose(1, 2))
        before, after = patches.split([self.protected, c.patches - self.protected], dim=1)
        tokens = torch.cat([before, self.cls_token.expand(images.shape[0], -1, -1), after], dim=1)
        features = tokens + self.pos_embed
        return Tokens(features, self.length, self.protected, alignment=self.alignment, orders=FORTH_AND_BACK)

    def readout(self, tokens: Tokens) -> Tensor:
        return self.head(self.norm_f(gather_tokens(tokens.features, tokens.protected_index()[:, None])[:, 0]))

    @classmethod
    def count_flops(
        cls, config: VimConfig, counts: Sequence[int], convention: str, as_run: bool = True
    ) -> dict[str, int]:
        """Count one direction only for `paper`, as the papers do, and both for `full`; the gate belongs to the scan."""
        c, R = config, config.dt_rank
        parts = dict.fromkeys(("in_proj", "conv", "x_proj", "dt_proj", "scan", "out_proj"), 0)
        for layer, (tokens, (E, N, directions)) in enumerate(zip(counts[:-1], c.layers, strict=True), 1):
            last = as_run and convention == "full" and layer == c.depth
            # Both scans together take one step more than there are tokens: both include the class token.
            steps = (tokens + 1) * len(directions) // 2 if last else tokens * len(directions)
            read = 1 if last else tokens  # tokens that are gated and projected
            paths = len(directions)
            for part, count in (
                ("conv", (steps + paths * (c.d_conv - 1)) * E * c.d_conv),
                ("x_proj", steps * E * (R + 2 * N)),
                ("dt_proj", steps * R * E),
                ("scan", steps * (9 * E * N + E) + paths * read * E),
            ):
                parts[part] += count if convention == "full" else count // 2
            parts["in_proj"] += (tokens + read) * c.d_model * E
            parts["out_proj"] += read * E * c.d_model
        patches = c.patches * c.d_model * c.in_chans * math.prod(c.patch_size)
        return {"embedding": patches, **parts, "head": c.num_classes * c.d_model}

    def matrix_products(self) -> list[tuple[int, Tensor]]:
        *counts, _ = self.token_counts()
        products = [(self.config.patches, self.patch_embed.proj.weight.flatten(1))]
        for count, block in zip(counts, self.blocks, strict=True):
            m = block.mixer
            if block is self.blocks[-1]:
                products += m.last_products(count)
                continue
            inner = [layer for path in reversed(m.directions) for layer in m.parameters_of(path)[1:3]]
            products += [(count, layer.weight) for layer in (m.in_proj, *inner, m.out_proj)]
        corrections = (*self.corrections.parameters(), *self.class_corrections.parameters())
        products += [(1, weight) for weight in corrections]
        return [*products, (1, self.head.weight)]

    def activation_bytes(self, size: int = 4) -> int:
        c = self.config
        E, N = max(layer.d_inner for layer in c.layers), max(layer.d_state for layer in c.layers)
        path = E + c.dt_rank + 2 * N + E + E  # conv, x_proj, dt_proj, scan
        # Residual stream in and out, norm; x and z of in_proj, both paths, out_proj.
        return self.length * (3 * c.d_model * 4 + (2 * E + 2 * path + c.d_model) * size)

    @classmethod
    def check_identity(cls, config: VimConfig, said: Statements) -> None:
        """Tell a Vim from a VideoMamba, which has its class token in front and does not divide by two."""
        if said.family is not None:
            return
        advice = "give `architecture`: 'vim' if it is a Vim; VideoMamba is not supported yet"
        if config.d_model == VIDEO_MAMBA_M[0] or config.depth == VIDEO_MAMBA_M[1]:
            raise InputError(
                f"{config.depth} layers of width {config.d_model}: the size of VideoMamba-M ({VIDEO_MAMBA_M[1]} layers "
                f"of width {VIDEO_MAMBA_M[0]}), and of no published Vim; {advice}"
            )
        if not said.wrapped or (config.d_model, config.depth) == VIDEO_MAMBA_B:
            raise InputError(f"{SAME_NAMES}, and nothing says which: {advice}")
        note(f"taken for a Vim: {SAME_NAMES}, and nothing says which (see `architecture`)")

    @classmethod
    def infer_stride(cls, state: StateDict, side: int) -> int | None:
        patch, entries = state["patch_embed.proj.weight"].shape[-1], state["pos_embed"].shape[1] - 1
        # Images are filled by patches, as in all published models: else any size near theirs would do.
        fitting = (s for s in range(1, patch + 1) if side >= patch and (side - patch) % s == 0)
        strides = [s for s in fitting if ((side - patch) // s + 1) ** 2 == entries]
        return strides[0] if len(strides) == 1 else None

    @classmethod
    def recognises(cls, state: StateDict) -> bool:
        return "patch_embed.proj.weight" in state and any(k.startswith("layers.0.mixer.") for k in state)

    @classmethod
    def infer_config(
        cls,
        state: StateDict,
        image_size: tuple[int, int] | None,
        stride: int | None,
        trained_size: tuple[int, int] | None,
    ) -> tuple[VimConfig, dict[str, Tensor]]:
        if {"cls_token_head", "cls_token_tail"} <= state.keys():
            raise InputError(
                "a Vim with two class tokens (cls_token_head, cls_token_tail) is not supported: expected one"
            )
        shape = Shapes(state, "Vim", MISSING)
        depth = shape.count("layers.")
        if (count := shape("cls_token", 3)[1]) != 1:
            raise InputError(f"a Vim with {count} class tokens, as in Mamba-Reg, is not supported: expected one")
        d_model, in_chans, *patch_size = shape("patch_embed.proj.weight", 4)
        only_backward = any(f"layers.{layer}.mixer.x_proj.weight" not in state for layer in range(depth))
        names = ("layers.{}.mixer.A_log", "layers.{}.mixer.A_b_log")[: 1 + only_backward]
        sizes = layer_sizes(shape, depth, *names)
        patch = patch_size[0]
        if patch != patch_size[1]:
            raise InputError(f"patches of {tuple(patch_size)} pixels: expected square ones")
        stride = stride or patch
        if stride > patch:
            raise InputError(f"`stride` {stride}: expected at most {patch}, the patch size; more leaves pixels unread")

        def grid_of(size: tuple[int, int]) -> tuple[int, int]:
            return (size[0] - patch) // stride + 1, (size[1] - patch) // stride + 1

        entries = shape("pos_embed", 3)[1] - 1
        advice = f" (and the patch stride, if it is not {patch})"
        trained, image_size = infer_grid(entries, patch, stride, grid_of, image_size, trained_size, advice)
        config = VimConfig(
            d_model=d_model,
            depth=depth,
            d_inner=compact(d_inner for d_inner, _ in sizes),
            d_state=compact(d_state for _, d_state in sizes),
            dt_rank=shape(_either(state, "layers.0.mixer.dt_proj", ".weight"), 2)[1],
            d_conv=shape(_either(state, "layers.0.mixer.conv1d", ".weight"), 3)[2],
            in_chans=in_chans,
            num_classes=shape.head("head.weight", d_model),
            patch_size=tuple(patch_size),
            stride=stride,
            image_size=tuple(image_size),
        )
        fitted = dict(state)
        if state["pos_embed"].shape[2] == d_model:  # a contradiction is reported with the other shapes
            fitted["pos_embed"] = resize_pos_embed(state["pos_embed"], trained, config.grid)
        return config, fitted


def _either(state: StateDict, name: str, end: str = "") -> str:
    """Return a parameter's name on the forward path, or on the backward path where a layer has only that."""
    backward = f"{name}_b{end}"
    return backward if f"{name}{end}" not in state and backward in state else f"{name}{end}"


MISSING = {
    "cls_token": "it has no class token, from which this Vim reads its output, and is not supported",
    "pos_embed": "it has no learnt position embedding, and is not supported",
    "layers.0.mixer.A_b_log": "it scans in one direction only, and is not supported",
}


def resize_pos_embed(table: Tensor, old: tuple[int, int], new: tuple[int, int]) -> Tensor:
    """Interpolate a position embedding (1, 1 + patches, d_model) to another patch grid.

    The entry of the class token, in the middle at patches // 2, does not change.
    """
    middle = (table.shape[1] - 1) // 2
    patches = resize_grid(torch.cat([table[:, :middle], table[:, middle + 1 :]], dim=1), old, new)
    middle_new = patches.shape[1] // 2
    return torch.cat([patches[:, :middle_new], table[:, middle : middle + 1], patches[:, middle_new:]], dim=1)
