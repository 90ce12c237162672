"""Base classes of the models: embed(images) -> Tokens, blocks, readout(Tokens), with pruners between blocks."""

from __future__ import annotations

import abc
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils import skip_init

from ..data.clips import VideoTransform, Views
from ..data.dense import DensePreprocessing
from ..data.find import find_images
from ..data.images import Images
from ..data.transforms import Preprocessing
from ..errors import InputError, OptionError
from ..openmp import one_thread
from ..ops import SCORES, ScanPath, selective_scan
from ..ops.selective_scan import Expander
from ..progress import note
from ..pruning.alignment import Alignment
from ..pruning.importance import IMPORTANCES, normalize_rms
from ..pruning.plan import FILLS, Plan, default_stages
from ..pruning.tokens import Tokens
from ..tasks import CLASSIFICATION, SEGMENTATION, Task
from .class_corrections import choose_segments
from .families import StateDict
from .features import FeatureModel, NamePatterns
from .learnt import LearntFrom
from .precision import cast, check_images, find_weight
from .pretrained import PretrainedModel
from .records import MadeBy, Record, Source
from .sections import SectionedModel
from .sizes import LayeredConfig, LayerSize, Origin, ScanReading
from .statements import Statements

# Bytes of activations that the ops of a layer exchange for a chunk: 20 images of a Vim-tiny at 224 px, 5 of a Vim-base.
CHUNK_BYTES = 1 << 26
# Most clips of a video, and most crops.
MOST_VIEWS = 64
# Bytes of activations of a batch up to which two threads are not faster than one. The bundled model, two cores, batch 1
# (1.0 MB), 2, 3 and 4: one thread takes 5.3, 7.6, 9.9 and 17 ms, two take 5.5, 7.6, 10.4 and 15 ms.
ONE_THREAD_BYTES = 2 << 20


class Expected(NamedTuple):
    """An option of published code: the values that a model computes, and what these mean, for messages."""

    values: tuple[Any, ...]
    meaning: str


class LayerRun(NamedTuple):
    """A layer as it was run: its number, from 1, the tokens before and after it, and the decision of its stage.

    `before` are the tokens that it is run on, which `TokenModel.enter` returned.
    """

    layer: int
    before: Tokens
    after: Tokens
    decision: Decision | None


class Decision(NamedTuple):
    """The result of one stage: the candidate positions, their scores, both (batch, tokens), and the kept positions."""

    candidates: Tensor
    scores: Tensor
    kept: Tensor


def low_rank(
    inputs: int, rank: int, outputs: int | None = None, device: torch.device | str | None = None
) -> nn.Sequential:
    """Return a linear map (inputs) -> (outputs) of the given rank, without bias, as two float32 layers.

    Args:
        outputs: None: as many as inputs.
    """
    outputs = inputs if outputs is None else outputs
    options = {"bias": False, "device": device or "cpu", "dtype": torch.float32}
    return nn.Sequential(*(skip_init(nn.Linear, *side, **options) for side in ((inputs, rank), (rank, outputs))))


class Block(nn.Module, abc.ABC):
    """One layer, from Tokens to Tokens; it aligns its ops to the positions of the tokens.

    A layer can have two parts that add to the residual stream, as attention and an MLP: `begin` and `end`. Then tokens
    are dropped between the two.

    Attributes:
        residual_scale: factor of the projection when it is added to the residual stream, one or one for each feature.
        scores: names of the scores of tokens that `begin` can compute.
        end_projection: name of the linear layer whose result `end` adds to the residual stream, times `end_scale`; None
            if the layer has no second part.
    """

    residual_scale: float | Tensor = 1.0
    scores: frozenset[str] = frozenset()
    end_projection: ClassVar[str | None] = None
    end_scale: float | Tensor = 1.0

    @property
    @abc.abstractmethod
    def refitted(self) -> tuple[tuple[str, ...], ...]:
        """Names of the linear layers of `begin` that reconstruction refits, in groups in the order in which they run.

        Layers of one group do not feed each other. The last group is the projection into the residual stream:
        features out = features in + residual_scale * projection. Empty if the layer has no such projection.
        """

    @abc.abstractmethod
    def begin(self, tokens: Tokens, metric: str | None = None, protected_only: bool = False) -> Tokens:
        """Return the tokens at the place of a stage, with scores of `metric` unless it is None.

        Args:
            protected_only: compute only the protected tokens that are read out, which are then the only ones left.
        """

    def end(self, tokens: Tokens) -> Tokens:
        """Return the tokens after the layer, from those after its stage."""
        return tokens

    def forward(
        self, tokens: Tokens, metric: str | None = None, protected_only: bool = False, part: str | None = None
    ) -> Tokens:
        """Return the tokens after the layer without a stage, or after one of its parts.

        Args:
            part: "begin" or "end"; None: both. Others as for `begin`.
        """
        tokens = tokens if part == "end" else self.begin(tokens, metric, protected_only)
        return tokens if part == "begin" else self.end(tokens)


class ScanBlock(Block):
    """A layer of scans, whose states decay at pruned positions."""

    scores = frozenset(SCORES)

    @abc.abstractmethod
    def deltas(self, tokens: Tokens) -> Tensor:
        """Return delta after softplus (deltas, batch, kept, d_inner), as this layer uses it, one for each dt_proj."""

    @abc.abstractmethod
    def bias_delta(self) -> Tensor:
        """Return the delta (deltas, d_inner) of a position without input: softplus of the bias."""

    @abc.abstractmethod
    def set_gap_delta(self, delta: Tensor | None) -> None:
        """Set the delta (deltas, d_inner) with which pruned positions decay the state; None: they are not aligned."""

    @property
    @abc.abstractmethod
    def scans(self) -> nn.Module:
        """The module of the scans; it has a buffer `gap_delta`."""


class TrimmableBlock(ScanBlock):
    """A layer of scans that can lose states, channels and directions; see `ssmcompress.compression.trim`.

    Its `scans` also have d_inner, d_state, directions, cut_states, cut_channels and keep_directions.
    """

    @property
    @abc.abstractmethod
    def channel_maps(self) -> tuple[tuple[str, ...], str]:
        """Names of the linear layers that read the channels: those inside, and the projection."""

    @property
    def d_inner(self) -> int:
        """The number of channels."""
        return self.scans.d_inner

    @property
    def d_state(self) -> int:
        """The number of states of each channel."""
        return self.scans.d_state

    @property
    def directions(self) -> tuple[int, ...]:
        """The numbers of the scan paths that the layer has."""
        return self.scans.directions

    @abc.abstractmethod
    def read_scans(self, tokens: Tokens) -> list[ScanReading]:
        """Return the inner values of each set of scan parameters."""

    @abc.abstractmethod
    def read_weights(self) -> list[tuple[Tensor, Tensor]]:
        """Return for each set of scan parameters the rows of C (d_state, d_inner) and D (d_inner,)."""

    def cut_states(self, index: Sequence[Tensor], weights: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Keep some of the states, in place.

        Args:
            index: for each set of scan parameters the states to keep, ascending, as many in all sets.
            weights: for each set the new rows of C (kept, d_inner), and D (d_inner,).
        """
        self.scans.cut_states(index, weights)

    def cut_channels(self, index: Tensor) -> None:
        """Keep the channels `index`, ascending, in place."""
        self.scans.cut_channels(index)
        if self.scans.gap_delta is not None:
            self.scans.gap_delta = self.scans.gap_delta[:, index]

    def drop_directions(self, directions: tuple[int, ...]) -> None:
        """Keep the scan paths `directions`, in place."""
        if self.scans.gap_delta is not None and len(self.scans.gap_delta) == len(self.directions):
            kept = [row for row, path in enumerate(self.directions) if path in directions]
            self.scans.gap_delta = self.scans.gap_delta[kept]
        self.scans.keep_directions(directions)


def read_state(paths: Sequence[ScanPath], state: int) -> list[Tensor]:
    """Return the trajectory (batch, tokens, d_inner) of one state on each scan path, in token order."""
    column, trajectories = slice(state, state + 1), []
    for path in map(Expander(), paths):
        B = path.B[..., column].contiguous()
        options = {name: getattr(path, name) for name in ("delta_bias", "gap", "reverse", "order")}
        inputs = path.u, path.delta, path.A[:, column], B, torch.ones_like(B)
        trajectories.append(selective_scan(*inputs, delta_softplus=True, **options))
    return trajectories


class TokenModel(SectionedModel, FeatureModel, PretrainedModel, abc.ABC):
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
    def frames(self) -> int | None:
        """The number of frames of an input, or None if inputs are images."""
        return None

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

    def check(self, images: Tensor) -> None:
        """Raise an InputError unless the images have the shape, dtype and device that the model takes."""
        check_images(images, self.image_shape, find_weight(self.classifier))

    def resize_frames(self, frames: int) -> None:
        """Change the number of frames of an input, in place; OptionError if inputs are images."""
        raise OptionError(f"`frames`: inputs of this {self.architecture} are images, not videos")

    @property
    def input_shape(self) -> tuple[int, ...]:
        """(channels, height, width) of an input of `config.image_size`; of a video with the frames second."""
        frames = () if self.frames is None else (self.frames,)
        return (self.config.in_chans, *frames, *self.config.image_size)

    @property
    def image_shape(self) -> tuple[int | None, ...]:
        """The shape of every input, as `input_shape` has it; None stands for a side of any length."""
        return self.input_shape

    def default_preprocessing(self) -> Preprocessing | DensePreprocessing:
        """Return the preparation of images where nothing says another one."""
        return Preprocessing.default(self.config.in_chans, self.config.image_size, video=self.frames is not None)

    def read_preprocessing(self, value: Mapping[str, Any]) -> Preprocessing | DensePreprocessing:
        """Return the preparation of images that a configuration describes; InputError for invalid values."""
        return Preprocessing.from_dict(value, self.config.in_chans)

    def transform(self, views: tuple[int, int] | None = None) -> Callable[[Any], Tensor]:
        """Return a function from a PIL image, in any mode, to the model's input (channels, height, width) float32.

        For a model that takes videos, it is a function from a `Video` to (channels, frames, height, width).

        Args:
            views: clips and crops of each video, which the result then has in front of its channels (`Views`).

        Raises:
            InputError: views for a model that takes images.
        """
        return self.transform_with(self.preprocessing, views)

    def transform_with(self, preprocessing: Preprocessing, views: tuple[int, int] | None = None) -> Any:
        """Return the transform that `transform` gives, with another preparation of the images."""
        checked = self.check_views(views)
        if self.frames is None:
            return preprocessing.transform(self.config.image_size)
        return VideoTransform(preprocessing, self.config.image_size, self.frames, checked)

    def check_views(self, views: tuple[int, int] | None) -> Views | None:
        """Return the views (clips, crops) of a video; InputError for a model that takes images, or for no views."""
        if views is None:
            return None
        if self.frames is None:
            raise InputError("`views` are clips and crops of videos, and the model takes images")
        if min(views) < 1 or max(views) > MOST_VIEWS:
            raise InputError(f"`views` {views[0]}x{views[1]}: expected clips and crops, 1 to {MOST_VIEWS} of each")
        return Views(*views)

    def fixed_transform(self) -> Callable[[Any], Tensor]:
        """Return a transform to images of one size, `config.image_size`, by which models are fitted and searched."""
        return self.transform()

    def find_images(self, data: str | Path | None = None, *, reduce_zero_label: bool | None = None) -> Images:
        """Return the images to use with the model: `data`, else those that its folder names, else sample photographs.

        Args:
            reduce_zero_label: for segmentation, as `ssmcompress.open_images` takes it.

        Raises:
            InputError: as `ssmcompress.data.open_images`.
        """
        recorded = self.source.data if self.source is not None else None
        options = {"task": self.task, "reduce_zero_label": self.label_rule(reduce_zero_label)}
        options["frames"] = self.frames
        return find_images(data, self.config.image_size, self.config.num_classes, recorded, **options)

    def chunk_size(self) -> int:
        """Return the number of images in a chunk of fixed size; it depends only on the model."""
        return max(1, min(32, CHUNK_BYTES // self.activation_bytes()))

    def label_rule(self, asked: bool | None = None) -> bool | None:
        """Return whether masks count classes from 1: as `asked`, which is remembered, else as it was told before."""
        if asked is None and self.reduce_zero_label:
            note("masks count classes from 1, as the model remembers it (`reduce_zero_label`)")
        if asked is not None and self.task is SEGMENTATION:
            self.reduce_zero_label = asked
        return self.reduce_zero_label if asked is None else asked

    def memory(self, features: Tensor) -> Tensor:
        """Return the values (batch, tokens, d_model) to remember of pruned tokens: features with a mean square of 1."""
        return normalize_rms(features)

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
            raise InputError("`reenter` is for models that read out every position, as those for segmentation do")
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

    def forward(self, images: Tensor) -> Tensor:
        """Compute the logits (batch, classes) of images (batch, channels, height, width)."""
        if torch.compiler.is_compiling():
            return self.trace(images)[0]
        with one_thread(self._is_small(images)):
            return self.trace(images)[0]

    def _is_small(self, images: Any) -> bool:
        """Return whether a forward is too small for a second thread of the CPU."""
        if not isinstance(images, Tensor) or not images.is_cpu or images.ndim != 1 + len(self.input_shape):
            return False  # what is no batch of images is refused later
        larger = max(1.0, math.prod(images.shape[2:]) / math.prod(self.input_shape[1:]))
        return len(images) * larger * self.activation_bytes() <= ONE_THREAD_BYTES

    def raw_outputs(self, images: Tensor) -> Tensor:
        """Return the outputs (batch, classes, ...) by which the model is compared with another one: the logits.

        Those of a segmentation model are the head's, before they are enlarged to the size of the images.
        """
        return self(images)

    def trace(self, images: Tensor) -> tuple[Tensor, list[Decision]]:
        """Compute the logits (batch, classes); return them and the decision of each stage.

        Where the protected token alone is read out, the last layer is computed for that token only. The logits are
        those of `readout(encode(images)[0])`, up to rounding.
        """
        tokens, decisions = self._run(self.embed(images), len(self.blocks) - self.shortens_last)
        if self.shortens_last:
            last = len(self.blocks)
            tokens, _ = self.step(last, self.enter(last, tokens), protected_only=True)
        return self.readout(tokens), decisions

    @property
    def shortens_last(self) -> bool:
        """Whether the last layer is computed for the tokens alone that are read out: not if a stage is in it."""
        return self.reads_protected and str(len(self.blocks)) not in self.pruners

    def encode(self, images: Tensor) -> tuple[Tokens, list[Decision]]:
        """Return all tokens after the last layer, and the decision of each stage."""
        return self._run(self.embed(images), len(self.blocks))

    def _run(self, tokens: Tokens, layers: int) -> tuple[Tokens, list[Decision]]:
        """Run the first layers and their stages."""
        decisions = []
        for run in self.run_layers(tokens, range(1, layers + 1)):
            tokens = run.after
            decisions += [run.decision] if run.decision else []
        return tokens, decisions

    def run_layers(self, tokens: Tokens, numbers: Iterable[int] | None = None) -> Iterator[LayerRun]:
        """Run layers and their stages one after the other, and yield each.

        Args:
            tokens: those after the layer before the first of these. numbers: of the layers, ascending; None: all.
        """
        for layer in range(1, len(self.blocks) + 1) if numbers is None else numbers:
            before = self.enter(layer, tokens)
            tokens, decision = self.step(layer, before)
            yield LayerRun(layer, before, tokens, decision)

    def observe(self, layer: int, tokens: Tokens) -> Tokens:
        """Return the tokens at the place of the stage of a layer (from 1), with its corrections.

        A model that reads out several layers appends a level here; see `Tokens.levels`.
        """
        return tokens

    def step(self, layer: int, tokens: Tokens, protected_only: bool = False) -> tuple[Tokens, Decision | None]:
        """Run a layer (from 1) and its stage, if any; return the tokens and the decision of the stage.

        Args:
            tokens: those that `enter` returned for the layer.
            protected_only: compute the layer for the tokens alone that are read out.
        """
        tokens, decision = self.begin(layer, tokens, protected_only)
        return self.end(layer, tokens), decision

    def end(self, layer: int, tokens: Tokens) -> Tokens:
        """Run the part of a layer after its stage, if it has one."""
        block = self.blocks[layer - 1]
        return tokens if block.end_projection is None else block(tokens, part="end")

    def enter(self, layer: int, tokens: Tokens) -> Tokens:
        """Return the tokens that a layer (from 1) is run on, from those after the layer before it.

        They are the same, except where all dropped tokens enter again, or where a section begins.
        """
        return tokens.rejoin() if self.plan is not None and self.plan.reenter and self.changes_at(layer) else tokens

    def begin(self, layer: int, tokens: Tokens, protected_only: bool = False) -> tuple[Tokens, Decision | None]:
        """Run the part of a layer before its stage, its corrections and the stage; arguments as for `step`."""
        name = str(layer)
        pruner = self.pruners[name] if name in self.pruners else None
        pruned_mean = tokens.pruned_mean() if name in self.corrections else None
        class_correction = self.class_corrections[name] if name in self.class_corrections else None
        before = class_correction.read(tokens) if class_correction is not None else None
        metric = pruner.block_metric if pruner else None
        tokens = self.blocks[layer - 1](tokens, metric, protected_only, part="begin")
        if name in self.corrections:
            linear = self.corrections[name]
            first = linear[0] if isinstance(linear, nn.Sequential) else linear
            features = tokens.features + linear(cast(pruned_mean, first))[:, None]
        else:
            features = tokens.features
        if class_correction is not None:
            features = class_correction.correct(features, before)
        if features is not tokens.features:
            tokens = tokens.corrected(features)
        tokens = self.observe(layer, tokens)
        if pruner is None:
            return tokens, None
        kept = pruner(tokens)
        summed = self.readout_correction is not None or any(int(key) > layer for key in self.class_corrections)
        if summed:
            kept = kept.with_pruned_segments(tokens, self.segments)
        if tokens.alignment.pool or any(int(key) > layer for key in self.corrections):
            if summed and type(self).memory is TokenModel.memory:  # both sum the same values
                kept = kept.with_sum_of_segments(self.segments)
            else:
                kept = kept.with_pruned_sum(tokens, self.memory)
        return kept, Decision(tokens.explicit_positions(), pruner.scores(tokens), kept.explicit_positions())
