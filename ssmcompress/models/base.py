"""Base class of the models: embed(images) -> Tokens, then blocks with pruners between them, then readout(Tokens)."""

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
    """The values of an option of the published code that a model supports, and their meaning for error messages."""

    values: tuple[Any, ...]
    meaning: str


class TokenModel(SectionedModel, InputModel, RunningModel, FeatureModel, PretrainedModel, abc.ABC):
    """A vision state-space model that can drop tokens between its blocks.

    Attributes:
        config: the architecture, a frozen dataclass.
        task: what the outputs mean.
        classes, palette: the class names and their colours (red, green, blue) if the file has them, else None. They are
            read for segmentation.
        reduce_zero_label: whether masks number the classes from 1, as set by the user; None: as the data says.
        pruners: the TokenPruner of each layer ("5": after the fifth). They are outside the blocks so that published
            parameter names do not change.
        corrections: low-rank linear maps by layer, also outside the blocks. Each maps the mean of the tokens pruned so
            far to a vector that is added to all kept tokens after that layer. Reconstruction creates them.
        class_corrections: the `ClassCorrection` of each layer, also outside the blocks, for the protected token only.
        readout_correction: for models that pool a mean over tokens, a low-rank linear map from a summary of all tokens
            to a correction of the logits; else None.
        fitted_segments: the number of segments of the corrections in the loaded file; None if it had none.
        plan: the plan that `prune` applied; None for a dense model.
        preprocessing, source: the image preprocessing and the file that the model was loaded from; set by `load`.
        made_by: the command and the versions that pruned the model.
        steps: the records of later steps that changed the weights, in order, one for each kind.
        learnt: the images used to compress or train the model since it was dense; None: see `learnt_from`.
        origin: the dense model that this one was trimmed from, or None; a trimmed model has a plan, which may be empty.
    """

    architecture: ClassVar[str]
    # Further names that files use for the model or its backbone (entries of `FAMILY_NAMES`).
    families: ClassVar[tuple[str, ...]] = ()
    config_class: ClassVar[type[Any]]
    task: ClassVar[Task] = CLASSIFICATION
    # A few parameter names that identify the architecture, for messages.
    telling_keys: ClassVar[tuple[str, ...]]
    # Options of the published code that cannot be inferred from the weights, with the supported values.
    expected_options: ClassVar[Mapping[str, Expected]] = {}
    # Fields of the configuration that cannot be inferred from weights; `complete_config` reads them from statements.
    hidden_options: ClassVar[tuple[str, ...]] = ()
    # Substrings of parameter names that only unsupported variants have, with their meaning.
    foreign_keys: ClassVar[Mapping[str, str]] = {}
    # Name patterns of 2-D parameters that are not matrices and are excluded from weight decay.
    no_weight_decay: ClassVar[NamePatterns] = NamePatterns(["*pos_embed"])
    # Whether the model pools a mean over tokens, which `Alignment.pool` affects.
    pools: bool = False
    # Whether the model reads out only the protected tokens; if so, its blocks take `protected_only`.
    reads_protected: bool = False
    # Number of output levels, which need values at all positions, including those of dropped tokens
    # (`ssmcompress.models.level_maps`). 0: none, only the tokens after the last layer are read out.
    levels: int = 0
    # Whether the levels are read out by the head; if not, later layers process them.
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
        """The configuration of the dense model: the one that this model was trimmed from, or its own."""
        return self.origin.config if self.origin is not None else self.config

    def mark_compressed(self) -> None:
        """Turn a dense model into a compressed one that drops no tokens, and record the sizes of its layers, if any."""
        if self.plan is None:
            self.plan = Plan((), gap="bias")
        if self.origin is None and isinstance(self.config, LayeredConfig):
            self.origin = Origin(self.config, tuple(range(1, len(self.blocks) + 1)))

    def read_sizes(self) -> None:
        """Update the sizes in `config` to match the blocks."""
        sizes = {i: LayerSize(b.d_inner, b.d_state, b.directions) for i, b in enumerate(self.blocks, 1)}
        self.config = self.config.with_layers(sizes)

    @property
    def droppable_layers(self) -> tuple[int, ...]:
        """The layers (1-based) that `drop_layers` may remove."""
        return tuple(range(1, len(self.blocks) + 1))

    def drop_layers(self, layers: Sequence[int]) -> None:
        """Remove layers (1-based) in place; call `mark_compressed` first, and only on a model without stages."""
        numbers = [number for number in range(1, len(self.blocks) + 1) if number not in layers]
        self.config = self.config.with_layers({number: self.config.layers[number - 1] for number in numbers})
        for layer in sorted(layers, reverse=True):
            del self.blocks[layer - 1]
        kept = tuple(number for layer, number in enumerate(self.origin.layers, 1) if layer not in layers)
        self.origin = self.origin._replace(layers=kept)
        self.read_sizes()

    def add_record(self, record: Record) -> None:
        """Append the record of a step, replacing an earlier record of the same kind."""
        self.steps = (*(step for step in self.steps if step.kind != record.kind), record)

    def find_record(self, kind: str) -> Any:
        """Return the record of this kind ("reconstruction", "finetuning", ...), or None."""
        return next((step for step in self.steps if step.kind == kind), None)

    @classmethod
    @abc.abstractmethod
    def recognises(cls, state: StateDict) -> bool:
        """Return whether the parameter names belong to this architecture."""

    @classmethod
    def has_own_size(cls, state: StateDict) -> bool:
        """Return whether recognised weights have a size that is published for this architecture only."""
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
        """Infer (config, state dict adapted to its image size) from names and shapes; InputError if that fails."""

    @classmethod
    def complete_config(cls, config: Any, said: Statements, image_size: tuple[int, int] | None) -> Any:
        """Return the configuration, completed by statements about what cannot be inferred from the weights.

        Args:
            image_size: (height, width) requested by the caller, or None.

        Raises:
            InputError: the statements contradict the weights.
        """
        return config

    @classmethod
    def check_identity(cls, config: Any, said: Statements) -> None:
        """Check that weights of these sizes, with the statements `said`, belong to this architecture.

        Raises:
            InputError: they belong, or may belong, to another architecture.
        """

    @classmethod
    def infer_stride(cls, state: StateDict, side: int) -> int | None:
        """Return the patch stride that gives images of `side` pixels the model's patches; None unless it is unique."""
        return None

    def publish(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Rename weights from the names used here to the published ones: the inverse of `infer_config`."""
        return state

    @property
    @abc.abstractmethod
    def blocks(self) -> nn.ModuleList: ...

    @property
    @abc.abstractmethod
    def classifier(self) -> nn.Module:
        """The layer that computes the logits: linear, or a 1x1 convolution in a segmentation model."""

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
        """The number of tokens of an image of `config.image_size` before any pruning: patches and special tokens."""
        return self.config.patches

    @property
    def protected(self) -> int | None:
        """The position of the (first) token that is never pruned, or None."""
        return None

    @property
    def protected_count(self) -> int:
        """The number of tokens that are never pruned; they are consecutive."""
        return 0 if self.protected is None else 1

    @property
    def patch_positions(self) -> Tensor:
        """The position (rows, columns) of each patch of the image grid."""
        return torch.arange(self.length, device="cpu").view(self.config.grid)

    def patch_positions_at(self, layer: int) -> Tensor:
        """Return `patch_positions` on the grid of a layer (1-based)."""
        return self.patch_positions

    @abc.abstractmethod
    def embed(self, images: Tensor) -> Tokens:
        """Return the tokens of images (batch, *`image_shape`), with the model's alignment."""

    @abc.abstractmethod
    def readout(self, tokens: Tokens) -> Tensor:
        """Compute the logits (batch, classes)."""

    @property
    def segments(self) -> int:
        """The number of equal segments of the positions over which tokens are summarised for the corrections.

        It is fixed when the corrections are fitted and does not change with the image size.
        """
        return self.fitted_segments or choose_segments(self.length, self.d_model)

    def correct_logits(self, logits: Tensor, tokens: Tokens) -> Tensor:
        """Return the logits (batch, classes) of the kept tokens, with the correction added if there is one."""
        return self.add_correction(logits, self.dropped_sums(tokens).summary)

    def add_correction(self, logits: Tensor, summary: Tensor | None) -> Tensor:
        """Add the correction computed from a summary of all tokens, if there is one, to the logits (batch, classes)."""
        if self.readout_correction is None:
            return logits
        return logits + self.readout_correction(cast(summary, self.readout_correction[0]))

    @classmethod
    @abc.abstractmethod
    def count_flops(cls, config: Any, counts: Sequence[int], convention: str, as_run: bool = True) -> dict[str, int]:
        """Return the FLOPs of one image by part; see `ssmcompress.evaluation.flops`.

        Args:
            config: sizes of the model. counts: its `token_counts`. convention: "full" or "paper".
            as_run: with "full", count what is executed here. Otherwise, and always with "paper", count what the
                published code executes, which computes every token of the last layer.
        """

    @property
    def is_residual(self) -> bool:
        """Whether each layer only adds its projection to the residual stream, as reconstruction assumes."""
        return True

    def count_level_maps(self) -> int:
        """Return the FLOPs of the maps of output levels for one image."""
        return 0

    def bound_level_maps(self, stages: Sequence[int]) -> int:
        """Return an upper bound of the FLOPs of the maps of output levels for pruning after layers `stages`."""
        return 0

    def flops_by_part(self, counts: Sequence[int], convention: str, as_run: bool = True) -> dict[str, int]:
        """Return `count_flops` for the sizes of this model."""
        return self.count_flops(self.config, counts, convention, as_run)

    @abc.abstractmethod
    def matrix_products(self) -> list[tuple[int, Tensor]]:
        """Return (rows, weight (outputs, inputs)) of each matrix product for one image, in order, after pruning."""

    @abc.abstractmethod
    def activation_bytes(self, size: int = 4) -> int:
        """Return the bytes of one image's activations in the first layer, or in the stem if that needs more.

        Args:
            size: bytes per element outside the residual stream and its norm, which are float32; 2 under autocast.
        """

    @property
    def importances(self) -> tuple[str, ...]:
        """The importance metrics that can rank tokens after any layer."""
        computed = frozenset.intersection(*(block.scores for block in self.blocks))
        return tuple(name for name, metric in IMPORTANCES.items() if metric.block_metric in (None, *computed))

    @property
    def default_importance(self) -> str:
        """The default importance metric."""
        ranking = [name for name in self.importances if IMPORTANCES[name].ranks]
        return next(name for name in ("clip", *ranking) if name in ranking)

    def default_stages(self) -> tuple[int, ...]:
        """Return the layers (1-based) that have a stage by default."""
        return default_stages(len(self.blocks))

    @property
    def drops_inside(self) -> bool:
        """Whether tokens are dropped inside a layer, so that the last layer can also have a stage."""
        return self.blocks[-1].end_projection is not None

    def check_plan(self, plan: Plan) -> Plan:
        """Return a plan adapted to the current model; InputError if the model cannot be pruned by it."""
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
        """Raise an InputError unless this metric can rank tokens after a layer (1-based)."""
        score, block = IMPORTANCES[name].block_metric, self.blocks[layer - 1]
        if score is not None and score not in block.scores:
            others = ", ".join(metric for metric in self.importances if IMPORTANCES[metric].ranks) or "nothing else"
            raise InputError(f"importance {name!r}: layer {layer} of a {self.architecture} has none; expected {others}")
