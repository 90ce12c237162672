"""What every model here is: embed(images) -> Tokens, blocks, readout(Tokens), with pruners between blocks."""

from __future__ import annotations

import abc
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils import skip_init

from ..data.find import find_images
from ..data.images import Images
from ..data.transforms import Preprocessing
from ..errors import InputError
from ..ops.dispatch import full_precision
from ..pruning.alignment import Alignment
from ..pruning.plan import Plan, token_counts
from ..pruning.tokens import Tokens
from .records import MadeBy, Record, Source

StateDict = Mapping[str, Tensor]
# Bytes that the ops of a layer may hand to each other for a chunk: 20 images of a Vim-tiny at 224 px, 5 of a Vim-base.
CHUNK_BYTES = 1 << 26


class Decision(NamedTuple):
    """What one stage did: the positions it chose from, their scores, both (batch, tokens), and those it kept."""

    candidates: Tensor
    scores: Tensor
    kept: Tensor


def low_rank(width: int, rank: int, device: torch.device | str | None = None) -> nn.Sequential:
    """A linear map (width) -> (width) of a rank, without bias."""
    sides = ((width, rank), (rank, width))
    return nn.Sequential(*(skip_init(nn.Linear, *side, bias=False, device=device or "cpu") for side in sides))


def embed_patches(projection: nn.Conv2d, images: Tensor) -> Tensor:
    """Patches (batch, d_model, rows, columns) of images (batch, channels, height, width), by a convolution.

    On a CPU it runs in float32 under autocast too: on processors with AMX, torch 2.14's bfloat16 convolution of 4 to 24
    channels with windows of 4 to 16 pixels is wrong by as much as its result. It is less than 2 % of a Vim's FLOPs.
    """
    if images.device.type != "cpu":
        return projection(images)
    with full_precision(images.device):
        return projection(images.to(projection.weight.dtype))


class Block(nn.Module, abc.ABC):
    """One layer: Tokens in, Tokens out; aligns by itself to tokens that carry positions.

    Attributes:
        residual_scale: what the projection into the residual stream is multiplied by there.
    """

    residual_scale: ClassVar[float] = 1.0

    @property
    @abc.abstractmethod
    def refitted(self) -> tuple[tuple[str, ...], ...]:
        """Its linear layers that reconstruction refits, by name, in groups in the order in which they run.

        Those of a group do not feed each other. The last group is the projection into the residual stream:
        features out = features in + residual_scale * projection. Empty where a layer has no such projection.
        """

    @abc.abstractmethod
    def forward(self, tokens: Tokens, metric: str | None = None) -> Tokens:
        """The tokens after this layer, with scores of `metric` where one is named."""

    @abc.abstractmethod
    def deltas(self, tokens: Tokens) -> Tensor:
        """(deltas, batch, kept, d_inner) delta after softplus that this layer would use: one for each dt_proj."""

    @abc.abstractmethod
    def bias_delta(self) -> Tensor:
        """(deltas, d_inner) delta of a position that brings no input, softplus of the bias."""

    @abc.abstractmethod
    def set_gap_delta(self, delta: Tensor) -> None:
        """Set the delta (deltas, d_inner) that pruned positions decay the state by."""


class TokenModel(nn.Module, abc.ABC):
    """A vision state-space classifier that can drop tokens between its blocks.

    Attributes:
        config: the architecture, a frozen dataclass.
        pruners: TokenPruner by layer ("5": after the fifth), beside the blocks so that published parameter
            names stay as they are.
        corrections: linear maps of low rank by layer, beside the blocks too: what the mean of the tokens pruned so
            far adds to all kept ones after that layer. Reconstruction puts them there.
        plan: what `prune` carried out, None for a dense model.
        preprocessing, source: how images are prepared and which file this is; set by `load`.
        made_by: how it was pruned.
        steps: a record of each later step that changed its weights, in order, one of a kind.
    """

    architecture: ClassVar[str]
    # A few parameter names that tell the architecture, for messages.
    telling_keys: ClassVar[tuple[str, ...]]
    # Whether a mean over tokens is read out, which `Alignment.pool` is about.
    pools: ClassVar[bool] = False

    def __init__(self, config: Any):
        super().__init__()
        self.config = config
        self.pruners = nn.ModuleDict()
        self.corrections = nn.ModuleDict()
        self.alignment = Alignment()
        self.plan: Plan | None = None
        self.preprocessing: Preprocessing | None = None
        self.source: Source | None = None
        self.made_by = MadeBy()
        self.steps: tuple[Record, ...] = ()

    def add_record(self, record: Record) -> None:
        """Append the record of a step; it replaces an earlier one of the same kind."""
        self.steps = (*(step for step in self.steps if step.kind != record.kind), record)

    def find_record(self, kind: str) -> Any:
        """The record of that kind ("reconstruction", "finetuning", ...), or None."""
        return next((step for step in self.steps if step.kind == kind), None)

    @classmethod
    @abc.abstractmethod
    def recognises(cls, state: StateDict) -> bool:
        """Whether these parameter names are this architecture's."""

    @classmethod
    @abc.abstractmethod
    def infer_config(
        cls,
        state: StateDict,
        image_size: tuple[int, int] | None,
        stride: int | None,
        trained_size: tuple[int, int] | None,
    ) -> tuple[Any, dict[str, Tensor]]:
        """(config, state dict fitted to its image size), from names and shapes alone; InputError if it fails."""

    @classmethod
    def stride_of(cls, module: nn.Module) -> int | None:
        """Pixels between the patches of a live module that is this model in someone's own code, where it shows them."""
        return None

    @property
    @abc.abstractmethod
    def blocks(self) -> nn.ModuleList: ...

    @property
    @abc.abstractmethod
    def classifier(self) -> nn.Linear:
        """The layer that the logits come out of."""

    @property
    def d_model(self) -> int:
        """Width of the residual stream."""
        return self.config.d_model

    @property
    @abc.abstractmethod
    def length(self) -> int:
        """Tokens before any pruning."""

    @property
    @abc.abstractmethod
    def protected(self) -> int | None:
        """Position of the token that is never pruned, or None."""

    @property
    @abc.abstractmethod
    def patch_positions(self) -> Tensor:
        """(rows, columns) position of each patch of the image grid."""

    @abc.abstractmethod
    def embed(self, images: Tensor) -> Tokens:
        """Tokens of images (batch, channels, height, width), with the model's alignment."""

    @abc.abstractmethod
    def readout(self, tokens: Tokens) -> Tensor:
        """Logits (batch, classes)."""

    def check(self, images: Tensor) -> None:
        """An InputError for images of another shape than the model takes."""
        expected = self.config.in_chans, *self.config.image_size
        if images.ndim != 4 or tuple(images.shape[1:]) != expected:
            raise InputError(
                f"images {tuple(images.shape)}: expected (batch, {', '.join(map(str, expected))}); load the model with "
                f"another image_size for other images"
            )

    def transform(self) -> Callable[[Any], Tensor]:
        """A function from a PIL image, in any mode, to the model's input (channels, height, width) float32."""
        return self.preprocessing.transform(self.config.image_size)

    def find_images(self, data: str | Path | None = None) -> Images:
        """The images to use with the model: `data`, else those that its folder names, else sample photographs.

        Raises:
            InputError: as `ssmcompress.data.open_images`.
        """
        recorded = self.source.data if self.source is not None else None
        return find_images(data, self.config.image_size, self.config.num_classes, recorded)

    def chunk_size(self) -> int:
        """Images in a chunk, for work in chunks of a fixed size; depends on the model alone."""
        return max(1, min(32, CHUNK_BYTES // self.activation_bytes()))

    def memory(self, features: Tensor) -> Tensor:
        """(batch, tokens, d_model) what is remembered of pruned tokens: their features at a mean square of 1."""
        return features * torch.rsqrt(features.square().mean(-1, keepdim=True) + 1e-5)

    @abc.abstractmethod
    def flops_by_part(self, counts: Sequence[int], convention: str) -> dict[str, int]:
        """FLOPs of one image by part, for the token counts of `token_counts`; see `ssmcompress.evaluation.flops`."""

    @abc.abstractmethod
    def matrix_products(self) -> list[tuple[int, Tensor]]:
        """(rows, weight (outputs, inputs)) of every matrix product of one image, in order, as the model stands."""

    @abc.abstractmethod
    def activation_bytes(self, size: int = 4) -> int:
        """Bytes that the ops of the first layer, or of the stem if that is more, hand to each other, for one image.

        Args:
            size: bytes of a number beside the residual stream and its norm, which are float32: 2 under autocast.
        """

    def token_counts(self) -> list[int]:
        """Tokens that each layer processes, and last those that are read out (depth + 1 values)."""
        stages = self.plan.stages if self.plan else ()
        return token_counts(len(self.blocks), self.length, stages, self.protected is not None)

    def forward(self, images: Tensor) -> Tensor:
        """Logits (batch, classes) of images (batch, channels, height, width)."""
        return self.trace(images)[0]

    def trace(self, images: Tensor) -> tuple[Tensor, list[Decision]]:
        """Logits (batch, classes), and what each stage decided."""
        tokens, decisions = self.encode(images)
        return self.readout(tokens), decisions

    def encode(self, images: Tensor) -> tuple[Tokens, list[Decision]]:
        """The tokens after the last layer, which are read out, and what each stage decided."""
        tokens = self.embed(images)
        decisions = []
        for layer in range(1, len(self.blocks) + 1):
            tokens, decision = self.step(layer, tokens)
            decisions += [decision] if decision else []
        return tokens, decisions

    def step(self, layer: int, tokens: Tokens) -> tuple[Tokens, Decision | None]:
        """The tokens after a layer (from 1) and the stage behind it, if there is one, and what that decided."""
        name = str(layer)
        pruner = self.pruners[name] if name in self.pruners else None
        tokens = self.blocks[layer - 1](tokens, metric=pruner.asks_for if pruner else None)
        if name in self.corrections:
            correction = self.corrections[name](tokens.pruned_mean())
            tokens = tokens.updated(tokens.features + correction[:, None], tokens.scores)
        if pruner is None:
            return tokens, None
        kept = pruner(tokens)
        if tokens.alignment.pool or any(int(later) > layer for later in self.corrections):
            kept = kept.remembering(tokens, self.memory)
        return kept, Decision(tokens.explicit_positions(), pruner.scores(tokens), kept.positions)
