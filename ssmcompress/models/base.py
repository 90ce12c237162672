"""Base classes of the models: embed(images) -> Tokens, blocks, readout(Tokens), with pruners between blocks."""

from __future__ import annotations

import abc
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from ..data.dense import DensePreprocessing
from ..data.transforms import Preprocessing
from ..errors import InputError
from ..pruning.alignment import Alignment
from ..pruning.importance import IMPORTANCES
from ..pruning.plan import FILLS, Plan, default_stages
from ..pruning.tokens import Tokens
from ..tasks import CLASSIFICATION, Task
from .class_corrections import choose_segments
from .families import StateDict
from .features import FeatureModel, NamePatterns
from .image_input import InputModel
from .learnt import LearntFrom
from .precision import cast
from .pretrained import PretrainedModel
from .records import MadeBy, Record, Source
from .running import RunningModel
from .sections import SectionedModel
from .sizes import LayeredConfig, LayerSize, Origin
from .statements import Statements


class Expected(NamedTuple):
    """An option of published code: the values that a model computes, and what these mean, for messages."""

    values: tuple[Any, ...]
    meaning: str


class TokenModel(SectionedModel, InputModel, RunningModel, FeatureModel, PretrainedModel, abc.ABC):
    """A vision state-space model that can drop tokens between its blocks.

    Attributes:
        config: the architecture, a frozen dataclass.
        task: what its outputs mean.
        classes, palette: names of the classes, and a colour (red, green, blue) for each, if its file has them; else
            None. They are read for segmentation.
        reduce_zero_label: whether masks count its classes from 1, as it was told; None: as the data says.
        pruners: TokenPruner by layer ("5": after the fifth), outside the blocks so that published parameter names do
            not change.
        corrections: linear maps of low rank by layer, also outside the blocks. Each maps the mean of the tokens pruned
            so far to a vector that is added to all kept tokens after that layer. Reconstruction creates them.
        class_corrections: `ClassCorrection` by layer, outside the blocks too, for the protected token alone.
        readout_correction: a linear map of low rank from a summary of all tokens to a correction of the logits, where
            a mean over tokens is read out; else None.
        fitted_segments: the segments of the corrections in the file that it was loaded from; None: there were none.
        plan: the plan that `prune` applied, None for a dense model.
        preprocessing, source: the preparation of images and the file that the model comes from; set by `load`.
        made_by: the command and versions that pruned it.
        steps: a record of each later step that changed its weights, in order, one for each kind.
        learnt: the images that it was learnt from since it was dense; None: as `learnt_from` has it.
        origin: the dense model that it was trimmed from, or None; a trimmed model has a plan, which may be empty.
    """

    architecture: ClassVar[str]
    # What files call it or its backbone, entries of `FAMILY_NAMES`, besides the name of the architecture.
    families: ClassVar[tuple[str, ...]] = ()
    config_class: ClassVar[type[Any]]
    task: ClassVar[Task] = CLASSIFICATION
    # A few parameter names that identify the architecture, for messages.
    telling_keys: ClassVar[tuple[str, ...]]
    # Options of the published code that the weights do not show, with what this model computes.
    expected_options: ClassVar[Mapping[str, Expected]] = {}
    # Fields of the configuration that weights do not show, which `complete_config` reads from what is said.
    hidden_options: ClassVar[tuple[str, ...]] = ()
    # Parts of the names of parameters that other models have in addition, with what they mean.
    foreign_keys: ClassVar[Mapping[str, str]] = {}
    # Patterns of parameters with two dimensions that are no matrices, to which weight decay does not apply.
    no_weight_decay: ClassVar[NamePatterns] = NamePatterns(["*pos_embed"])
    # Whether the model reads out a mean over tokens, to which `Alignment.pool` applies.
    pools: bool = False
    # Whether the model reads out protected tokens alone, and its blocks take `protected_only`.
    reads_protected: bool = False
    # Number of output levels, at which every position is needed, also those of dropped tokens
    # (`ssmcompress.models.level_maps`); 0: none, the tokens after the last layer alone are read.
    levels: int = 0
    # Whether the levels are what the model reads out; if not, its later layers process them.
    reads_levels: ClassVar[bool] = False

    def __init__(self, config: Any):
        super().__init__()
        self.config = config
        self.pruners = nn.ModuleDict()
        self.corrections = nn.ModuleDict()
        self.class_corrections = nn.ModuleDict()
        self.readout_correction: nn.Sequential | None = None
        self.fitted_segments: int | None = None
        self.alignment = Alignment()
        self.plan: Plan | None = None
        self.classes: tuple[str, ...] | None = None
        self.palette: tuple[tuple[int, int, int], ...] | None = None
        self.reduce_zero_label: bool | None = None
        self.preprocessing: Preprocessing | DensePreprocessing | None = None
        self.source: Source | None = None
        self.made_by = MadeBy()
        self.steps: tuple[Record, ...] = ()
        self.learnt: LearntFrom | None = None
        self.origin: Origin | None = None

    @property
    def dense_config(self) -> Any:
        """The configuration of the dense model that this one was made from, or is."""
        return self.origin.config if self.origin is not None else self.config

    def mark_compressed(self) -> None:
        """Make a dense model a compressed one that drops no tokens, and remember the sizes of its layers, if any."""
        if self.plan is None:
            self.plan = Plan((), gap="bias")
        if self.origin is None and isinstance(self.config, LayeredConfig):
            self.origin = Origin(self.config, tuple(range(1, len(self.blocks) + 1)))

    def read_sizes(self) -> None:
        """Set the sizes in `config` to those that the blocks have."""
        sizes = {i: LayerSize(b.d_inner, b.d_state, b.directions) for i, b in enumerate(self.blocks, 1)}
        self.config = self.config.with_layers(sizes)

    @property
    def droppable_layers(self) -> tuple[int, ...]:
        """The layers, from 1, that `drop_layers` may remove."""
        return tuple(range(1, len(self.blocks) + 1))

    def drop_layers(self, layers: Sequence[int]) -> None:
        """Remove layers (from 1), in place; `mark_compressed` must have been called, and nothing be pruned."""
        numbers = [number for number in range(1, len(self.blocks) + 1) if number not in layers]
        self.config = self.config.with_layers({number: self.config.layers[number - 1] for number in numbers})
        for layer in sorted(layers, reverse=True):
            del self.blocks[layer - 1]
        kept = tuple(number for layer, number in enumerate(self.origin.layers, 1) if layer not in layers)
        self.origin = self.origin._replace(layers=kept)
        self.read_sizes()

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
    def has_own_size(cls, state: StateDict) -> bool:
        """Return whether weights that it recognises have a size that only this architecture is published in."""
        return False

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
    def complete_config(cls, config: Any, said: Statements, image_size: tuple[int, int] | None) -> Any:
        """Return the configuration with what weights do not show, but is said.

        Args:
            image_size: (height, width) that the caller asks for, or None.

        Raises:
            InputError: what is said does not fit the weights.
        """
        return config

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

    def publish(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return weights, named as here, under their published names: the reverse of `infer_config`."""
        return state

    @property
    @abc.abstractmethod
    def blocks(self) -> nn.ModuleList: ...

    @property
    @abc.abstractmethod
    def classifier(self) -> nn.Module:
        """The layer that computes the logits: a linear one, or of a segmentation model a 1x1 convolution."""

    @property
    def d_model(self) -> int:
        """The width of the residual stream."""
        return self.config.d_model

    @property
    def key_width(self) -> int:
        """The width of the keys by which tokens are merged (`Tokens.keys`)."""
        return self.d_model

    @property
    def length(self) -> int:
        """The number of tokens of an image of `config.image_size` before any pruning: its patches, and others."""
        return self.config.patches

    @property
    def protected(self) -> int | None:
        """The position of the token that is never pruned, or the first one of them, or None."""
        return None

    @property
    def protected_count(self) -> int:
        """The number of tokens that are never pruned; they follow each other."""
        return 0 if self.protected is None else 1

    @property
    def patch_positions(self) -> Tensor:
        """The position (rows, columns) of each patch of the image grid."""
        return torch.arange(self.length, device="cpu").view(self.config.grid)

    def patch_positions_at(self, layer: int) -> Tensor:
        """Return `patch_positions` on the grid of a layer, from 1."""
        return self.patch_positions

    @abc.abstractmethod
    def embed(self, images: Tensor) -> Tokens:
        """Return the tokens of images (batch, *`image_shape`), with the model's alignment."""

    @abc.abstractmethod
    def readout(self, tokens: Tokens) -> Tensor:
        """Compute the logits (batch, classes)."""

    @property
    def segments(self) -> int:
        """The number of equal parts of the positions in which corrections are told of all tokens.

        For images of another size than the corrections were fitted on it stays the same.
        """
        return self.fitted_segments or choose_segments(self.length, self.d_model)

    def correct_logits(self, logits: Tensor, tokens: Tokens) -> Tensor:
        """Return the logits (batch, classes) of the tokens that are left, with the correction of them, if any."""
        return self.add_correction(logits, self.dropped_sums(tokens).summary)

    def add_correction(self, logits: Tensor, summary: Tensor | None) -> Tensor:
        """Return the logits (batch, classes), corrected by a summary of all tokens if the model has a correction."""
        if self.readout_correction is None:
            return logits
        return logits + self.readout_correction(cast(summary, self.readout_correction[0]))

    @classmethod
    @abc.abstractmethod
    def count_flops(cls, config: Any, counts: Sequence[int], convention: str, as_run: bool = True) -> dict[str, int]:
        """Return the FLOPs of one image by part; see `ssmcompress.evaluation.flops`.

        Args:
            config: sizes of the model. counts: its `token_counts`. convention: "full" or "paper".
            as_run: count what is executed here, in `full`; else what the published code executes, as `paper` always
                does, which computes every token of the last layer.
        """

    @property
    def is_residual(self) -> bool:
        """Whether a layer's result is what its projection adds to the residual stream, as reconstruction takes it."""
        return True

    def count_level_maps(self) -> int:
        """Return the FLOPs of the maps of output levels for one image."""
        return 0

    def bound_level_maps(self, stages: Sequence[int]) -> int:
        """Return the most FLOPs that maps of output levels can take for pruning after layers `stages`."""
        return 0

    def flops_by_part(self, counts: Sequence[int], convention: str, as_run: bool = True) -> dict[str, int]:
        """Return `count_flops` of this model's sizes."""
        return self.count_flops(self.config, counts, convention, as_run)

    @abc.abstractmethod
    def matrix_products(self) -> list[tuple[int, Tensor]]:
        """Return (rows, weight (outputs, inputs)) of each matrix product of one image, in order, after pruning."""

    @abc.abstractmethod
    def activation_bytes(self, size: int = 4) -> int:
        """Return the bytes of one image's activations in the first layer, or in the stem if that is more.

        Args:
            size: bytes of a number outside the residual stream and its norm, which are float32: 2 under autocast.
        """

    @property
    def importances(self) -> tuple[str, ...]:
        """The metrics by which tokens can be ranked after any layer."""
        computed = frozenset.intersection(*(block.scores for block in self.blocks))
        return tuple(name for name, metric in IMPORTANCES.items() if metric.block_metric in (None, *computed))

    @property
    def default_importance(self) -> str:
        """The metric by which tokens are ranked where none is asked for."""
        ranking = [name for name in self.importances if IMPORTANCES[name].ranks]
        return next(name for name in ("clip", *ranking) if name in ranking)

    def default_stages(self) -> tuple[int, ...]:
        """Return the layers, from 1, that have a stage where none are asked for."""
        return default_stages(len(self.blocks))

    @property
    def drops_inside(self) -> bool:
        """Whether tokens are dropped inside a layer, so that the last one can have a stage, too."""
        return self.blocks[-1].end_projection is not None

    def check_plan(self, plan: Plan) -> Plan:
        """Return a plan for the model as it is, or raise an InputError if the model cannot be pruned by it."""
        if plan.reenter and not self.reads_levels:
            raise InputError("`reenter` is for models that read out every position, such as segmentation models")
        plan.validate(len(self.blocks), self.drops_inside)
        for stage in plan.stages:
            self.check_importance(stage.importance, stage.after)
        if plan.fill != FILLS[0] and not self.levels:
            raise InputError(
                f"`fill` {plan.fill!r} says what is read of dropped tokens, and this {self.architecture} reads nothing "
                f"of them: leave it out"
            )
        return plan

    def check_importance(self, name: str, layer: int) -> None:
        """Raise an InputError unless tokens can be ranked by this metric after a layer, from 1."""
        score, block = IMPORTANCES[name].block_metric, self.blocks[layer - 1]
        if score is not None and score not in block.scores:
            others = ", ".join(metric for metric in self.importances if IMPORTANCES[metric].ranks) or "nothing else"
            raise InputError(f"importance {name!r}: layer {layer} of a {self.architecture} has none; expected {others}")
