"""Base classes of the models: embed(images) -> Tokens, blocks, readout(Tokens), with pruners between blocks."""

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
from ..pruning.alignment import Alignment
from ..pruning.importance import normalize_rms
from ..pruning.plan import Plan, token_counts
from ..pruning.tokens import Tokens
from .families import StateDict
from .learnt import LearntFrom
from .precision import cast, check_images, find_weight
from .records import MadeBy, Record, Source
from .statements import Statements

# Bytes of activations that the ops of a layer exchange for a chunk: 20 images of a Vim-tiny at 224 px, 5 of a Vim-base.
CHUNK_BYTES = 1 << 26


class Expected(NamedTuple):
    """An option of published code: the values that a model computes, and what these mean, for messages."""

    values: tuple[Any, ...]
    meaning: str


class Decision(NamedTuple):
    """The result of one stage: the candidate positions, their scores, both (batch, tokens), and the kept positions."""

    candidates: Tensor
    scores: Tensor
    kept: Tensor


def low_rank(width: int, rank: int, device: torch.device | str | None = None) -> nn.Sequential:
    """Return a linear map (width) -> (width) of the given rank, without bias, as two float32 layers."""
    options = {"bias": False, "device": device or "cpu", "dtype": torch.float32}
    return nn.Sequential(*(skip_init(nn.Linear, *side, **options) for side in ((width, rank), (rank, width))))


class Block(nn.Module, abc.ABC):
    """One layer, from Tokens to Tokens; it aligns its ops to the positions of the tokens.

    Attributes:
        residual_scale: factor of the projection when it is added to the residual stream.
    """

    residual_scale: ClassVar[float] = 1.0

    @property
    @abc.abstractmethod
    def refitted(self) -> tuple[tuple[str, ...], ...]:
        """Names of the linear layers that reconstruction refits, in groups in the order in which they run.

        Layers of one group do not feed each other. The last group is the projection into the residual stream:
        features out = features in + residual_scale * projection. Empty if the layer has no such projection.
        """

    @abc.abstractmethod
    def forward(self, tokens: Tokens, metric: str | None = None) -> Tokens:
        """Return the tokens after this layer, with scores of `metric` unless it is None."""

    @abc.abstractmethod
    def deltas(self, tokens: Tokens) -> Tensor:
        """Return delta after softplus (deltas, batch, kept, d_inner), as this layer uses it, one for each dt_proj."""

    @abc.abstractmethod
    def bias_delta(self) -> Tensor:
        """Return the delta (deltas, d_inner) of a position without input: softplus of the bias."""

    @abc.abstractmethod
    def set_gap_delta(self, delta: Tensor) -> None:
        """Set the delta (deltas, d_inner) with which pruned positions decay the state."""


class TokenModel(nn.Module, abc.ABC):
    """A vision state-space classifier that can drop tokens between its blocks.

    Attributes:
        config: the architecture, a frozen dataclass.
        pruners: TokenPruner by layer ("5": after the fifth), outside the blocks so that published parameter names do
            not change.
        corrections: linear maps of low rank by layer, also outside the blocks. Each maps the mean of the tokens pruned
            so far to a vector that is added to all kept tokens after that layer. Reconstruction creates them.
        plan: the plan that `prune` applied, None for a dense model.
        preprocessing, source: the preparation of images and the file that the model comes from; set by `load`.
        made_by: the command and versions that pruned it.
        steps: a record of each later step that changed its weights, in order, one for each kind.
        learnt: the images that it was learnt from since it was dense; None: as `learnt_from` has it.
    """

    architecture: ClassVar[str]
    # A few parameter names that identify the architecture, for messages.
    telling_keys: ClassVar[tuple[str, ...]]
    # Options of the published code that the weights do not show, with what this model computes.
    expected_options: ClassVar[Mapping[str, Expected]] = {}
    # Beginnings of parameter names that other models have in addition, with what they mean.
    foreign_keys: ClassVar[Mapping[str, str]] = {}
    # Patterns of parameters with two dimensions that are no matrices, to which weight decay does not apply.
    no_weight_decay: ClassVar[tuple[str, ...]] = ("*pos_embed",)
    # Whether the model reads out a mean over tokens, to which `Alignment.pool` applies.
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
        self.learnt: LearntFrom | None = None

    def add_record(self, record: Record) -> None:
        """Append the record of a step; it replaces an earlier one of the same kind."""
        self.steps = (*(step for step in self.steps if step.kind != record.kind), record)

    def find_record(self, kind: str) -> Any:
        """Return the record of this kind ("reconstruction", "finetuning", ...), or None."""
        return next((step for step in self.steps if step.kind == kind), None)

    @classmethod
    @abc.abstractmethod
    def recognises(cls, state: StateDict) -> bool:
        """Return whether these parameter names are those of this architecture."""

    @classmethod
    @abc.abstractmethod
    def infer_config(
        cls,
        state: StateDict,
        image_size: tuple[int, int] | None,
        stride: int | None,
        trained_size: tuple[int, int] | None,
    ) -> tuple[Any, dict[str, Tensor]]:
        """Infer (config, state dict fitted to its image size) from names and shapes; InputError if that fails."""

    @classmethod
    def check_identity(cls, config: Any, said: Statements) -> None:
        """Check that weights of these sizes, of which `said` is said, are this architecture's.

        Raises:
            InputError: they are another architecture's, or may be.
        """

    @classmethod
    def infer_stride(cls, state: StateDict, side: int) -> int | None:
        """Return the only patch stride with which images of `side` pixels have the model's patches, or None."""
        return None

    @property
    @abc.abstractmethod
    def blocks(self) -> nn.ModuleList: ...

    @property
    @abc.abstractmethod
    def classifier(self) -> nn.Linear:
        """The linear layer that computes the logits."""

    @property
    def d_model(self) -> int:
        """The width of the residual stream."""
        return self.config.d_model

    @property
    @abc.abstractmethod
    def length(self) -> int:
        """The number of tokens before any pruning."""

    @property
    @abc.abstractmethod
    def protected(self) -> int | None:
        """The position of the token that is never pruned, or None."""

    @property
    @abc.abstractmethod
    def patch_positions(self) -> Tensor:
        """The position (rows, columns) of each patch of the image grid."""

    @abc.abstractmethod
    def embed(self, images: Tensor) -> Tokens:
        """Return the tokens of images (batch, channels, height, width), with the model's alignment."""

    @abc.abstractmethod
    def readout(self, tokens: Tokens) -> Tensor:
        """Compute the logits (batch, classes)."""

    def check(self, images: Tensor) -> None:
        """Raise an InputError unless the images have the shape, dtype and device that the model takes."""
        check_images(images, (self.config.in_chans, *self.config.image_size), find_weight(self.classifier))

    def transform(self) -> Callable[[Any], Tensor]:
        """Return a function from a PIL image, in any mode, to the model's input (channels, height, width) float32."""
        return self.preprocessing.transform(self.config.image_size)

    def find_images(self, data: str | Path | None = None) -> Images:
        """Return the images to use with the model: `data`, else those that its folder names, else sample photographs.

        Raises:
            InputError: as `ssmcompress.data.open_images`.
        """
        recorded = self.source.data if self.source is not None else None
        return find_images(data, self.config.image_size, self.config.num_classes, recorded)

    def chunk_size(self) -> int:
        """Return the number of images in a chunk of fixed size; it depends only on the model."""
        return max(1, min(32, CHUNK_BYTES // self.activation_bytes()))

    def memory(self, features: Tensor) -> Tensor:
        """Return the values (batch, tokens, d_model) to remember of pruned tokens: features with a mean square of 1."""
        return normalize_rms(features)

    @abc.abstractmethod
    def flops_by_part(self, counts: Sequence[int], convention: str) -> dict[str, int]:
        """Return the FLOPs of one image by part, given `token_counts`; see `ssmcompress.evaluation.flops`."""

    @abc.abstractmethod
    def matrix_products(self) -> list[tuple[int, Tensor]]:
        """Return (rows, weight (outputs, inputs)) of each matrix product of one image, in order, after pruning."""

    @abc.abstractmethod
    def activation_bytes(self, size: int = 4) -> int:
        """Return the bytes of one image's activations in the first layer, or in the stem if that is more.

        Args:
            size: bytes of a number outside the residual stream and its norm, which are float32: 2 under autocast.
        """

    def token_counts(self) -> list[int]:
        """Return the number of tokens that each layer processes, and last the number read out (depth + 1 values)."""
        stages = self.plan.stages if self.plan else ()
        return token_counts(len(self.blocks), self.length, stages, self.protected is not None)

    def forward(self, images: Tensor) -> Tensor:
        """Compute the logits (batch, classes) of images (batch, channels, height, width)."""
        return self.trace(images)[0]

    def trace(self, images: Tensor) -> tuple[Tensor, list[Decision]]:
        """Compute the logits (batch, classes); return them and the decision of each stage."""
        tokens, decisions = self.encode(images)
        return self.readout(tokens), decisions

    def encode(self, images: Tensor) -> tuple[Tokens, list[Decision]]:
        """Return the tokens after the last layer, which are read out, and the decision of each stage."""
        tokens = self.embed(images)
        decisions = []
        for layer in range(1, len(self.blocks) + 1):
            tokens, decision = self.step(layer, tokens)
            decisions += [decision] if decision else []
        return tokens, decisions

    def step(self, layer: int, tokens: Tokens) -> tuple[Tokens, Decision | None]:
        """Run a layer (from 1) and the stage after it, if any; return the tokens and the decision of the stage."""
        name = str(layer)
        pruner = self.pruners[name] if name in self.pruners else None
        tokens = self.blocks[layer - 1](tokens, metric=pruner.block_metric if pruner else None)
        if name in self.corrections:
            linear = self.corrections[name]
            first = linear[0] if isinstance(linear, nn.Sequential) else linear
            correction = linear(cast(tokens.pruned_mean(), first))
            tokens = tokens.updated(tokens.features + correction[:, None], tokens.scores)
        if pruner is None:
            return tokens, None
        kept = pruner(tokens)
        if tokens.alignment.pool or any(int(later) > layer for later in self.corrections):
            kept = kept.with_pruned_sum(tokens, self.memory)
        return kept, Decision(tokens.explicit_positions(), pruner.scores(tokens), kept.positions)
