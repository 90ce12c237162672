"""Verification that an ONNX file gives the same results as its model, and localisation of differences."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ..data.batches import Batch, Batches
from ..data.images import Images
from ..errors import InputError, VerificationError, raise_if_out_of_memory
from ..extras import require_extra
from ..files import check_regular
from ..models.base import TokenModel
from ..models.inputs import check_model
from ..models.modes import runs_in_eval_mode
from ..models.precision import to_float32
from ..models.running import Decision
from ..progress import track
from ..tasks import CLASSIFICATION, SEGMENTATION
from .graph import FEATURES_PREFIX, KEPT_PREFIX, add_outputs, find_values
from .runtime import METADATA_KEY, find_provider, open_session, read_session, run

if TYPE_CHECKING:
    import onnx

ATOL = 1e-4
VERIFY_IMAGES = 36  # four batches of 8, one of 3 and one of 1
# Largest accepted difference of a layer's features, relative to the largest feature; rounding gives 1e-6.
FEATURES_RTOL = 1e-4
# Percent of pixels that must get the same class in segmentation. Their logits are also held to `atol`, but among
# millions of pixels, some have two classes that are equal up to rounding.
LEAST_SAME_PIXELS = 99.0
# Maximum number of logits of a batch of 8 images, 128 MB: 150 classes at 160 x 160 pixels.
BATCH_LOGITS = 1 << 25


@dataclass(frozen=True)
class Verification:
    """The result of comparing an ONNX file with its model.

    Attributes:
        images: number of images run through both. data: name of their dataset.
        max_difference: the largest difference of a logit over the images with the same kept tokens.
        top1_agreement: percent of all images, or of their pixels, with the same predicted class.
        ties: names of images with different kept tokens because two scores are equal up to rounding.
        mismatches: names of images with different kept tokens for any other reason.
        atol: the largest allowed max_difference.
        stages: for each stage the layer that it comes `after`, its number of `kept` tokens, and the number of images
            for which these are the `same`; None: the file does not name its stages.
        weights: names of the model's weights that have different values in the file; None: no weight in the file has
            the name of a model weight.
        first_layer: the first layer (1-based) after which the features differ; 0: none; None: not determined.
        rounding: `max_difference` and `top1_agreement` between the model and the model with weights rounded as in the
            file, with which the file is compared; None: the file rounds no weight.
        task: name of the model's task; for "segmentation", classes refer to pixels.
    """

    images: int
    data: str
    max_difference: float
    top1_agreement: float
    ties: list[str]
    mismatches: list[str]
    atol: float
    stages: list[dict[str, int]] | None = None
    weights: list[str] | None = None
    first_layer: int | None = None
    rounding: dict[str, float] | None = None
    task: str = CLASSIFICATION.name

    @property
    def passed(self) -> bool:
        """Whether the file gives the same results as the model; a NaN also fails."""
        ties = 100 * len(self.ties) / self.images  # their classes may differ
        least = 100 - ties if self.task == CLASSIFICATION.name else LEAST_SAME_PIXELS
        same = self.max_difference <= self.atol and self.top1_agreement >= least - 1e-9
        return same and not self.mismatches and not self.weights and len(self.ties) < self.images


@runs_in_eval_mode
def verify_onnx(
    model: TokenModel,
    graph: onnx.ModelProto | str | Path,
    *,
    data: str | Path | None = None,
    atol: float = ATOL,
    provider: str = "cpu",
) -> Verification:
    """Compare an ONNX file with its model: weight by weight, and onnxruntime with torch on real images.

    Images are run in batches of 8, 3 and 1, or of 3 and 1 if they have many logits. If the file stores weights as
    float16, the model's weights are rounded in the same way before the comparison. Sessions use the options recommended
    in the file's metadata.

    Args:
        data: images, see `open_images`; None: those named by the model, else photographs.
        provider: onnxruntime's execution provider, for example "cpu" or "cuda".

    Raises:
        VerificationError: they differ by more than `atol`, in a class, in the kept tokens, or in a weight; in
            segmentation, at most 1 % of the pixels may get a different class.
        InputError: it is not an ONNX file, belongs to another kind of model, or has invalid session options.
    """
    require_extra("onnx")
    if not 0 <= atol < float("inf"):
        raise InputError(f"atol {atol}: expected a number from 0")
    check_model(model)
    model = to_float32(model)
    images = model.find_images(data)
    file = _OnnxFile(graph, model, find_provider(provider))
    device = next(model.parameters()).device
    reference, weights = compare_weights(model, file.weights())
    reference = reference.to(device)
    comparison = _Comparison(model, file.kept)
    batches = _make_batches(images, model)
    for batch in track(batches, "verifying", len(batches)):
        with torch.no_grad():
            expected, decisions = reference.trace(batch.images.to(device))
            original = expected if reference is model else model(batch.images.to(device))
        logits, *kept = run(file.session, file.outputs, batch.images.numpy())
        if logits.shape != tuple(expected.shape):
            raise InputError(f"the ONNX file gives logits {logits.shape}, the model {tuple(expected.shape)}")
        names = [images.describe(index) for index in batch.index]
        comparison.add(logits, _to_numpy(expected), _to_numpy(original), decisions, kept, names)
    result = comparison.result(images.name, atol, weights, rounded=reference is not model)
    if not result.passed:
        result = replace(result, first_layer=_find_first_layer(reference, file, batch.images, device))
        raise VerificationError(_describe_failure(result), result)
    return result


class _OnnxFile:
    """A session of an ONNX file that outputs the logits and the kept tokens; `open` creates sessions with others."""

    def __init__(self, source: onnx.ModelProto | str | Path, model: TokenModel, provider: str):
        import onnx

        self.folder, self.provider = "", provider
        if isinstance(source, onnx.ModelProto):
            self.graph = source
        else:
            self.graph, self.folder = read_graph(source), str(Path(source).absolute().parent)
        metadata = {entry.key: entry.value for entry in self.graph.metadata_props}
        self.recommended = read_session(metadata.get(METADATA_KEY))
        stages = [f"{KEPT_PREFIX}{layer}" for layer in model.pruners]
        self.kept = stages if {*find_values(self.graph, KEPT_PREFIX)}.issuperset(stages) else []
        self.session = self.open(self.kept)
        self.outputs = [self.session.get_outputs()[0].name, *self.kept]

    def open(self, names: Sequence[str]) -> Any:
        """Open a session whose outputs are the logits and the named values."""
        import onnx

        graph = onnx.ModelProto()
        graph.CopyFrom(self.graph)
        del graph.graph.output[1:]
        add_outputs(graph, names)
        return open_session(graph.SerializeToString(), self.provider, self.folder, self.recommended)

    def weights(self) -> Iterator[tuple[str, np.ndarray]]:
        """Yield the name and value of each weight in the file."""
        import onnx

        for tensor in self.graph.graph.initializer:
            try:
                yield tensor.name, onnx.numpy_helper.to_array(tensor, base_dir=self.folder)
            except Exception as error:  # a file is missing, too short, outside the folder, or of unknown type
                raise_if_out_of_memory(error)
                raise InputError(f"cannot read the weight {tensor.name} of the ONNX file ({error})") from error


def read_graph(file: str | Path) -> onnx.ModelProto:
    """Read an ONNX file without its external data; InputError for any other file."""
    import onnx

    try:
        check_regular(Path(file))
        graph = onnx.load(file, load_external_data=False, format="protobuf")
    except OSError as error:
        raise_if_out_of_memory(error)
        raise InputError(f"cannot read {file}: {error.strerror or error}") from error
    except Exception as error:  # protobuf's own error type
        raise_if_out_of_memory(error)
        raise InputError(f"{file}: not an ONNX file") from error
    if not graph.graph.node:
        raise InputError(f"{file}: not an ONNX file")
    return graph


def compare_weights(
    model: TokenModel, weights: Iterable[tuple[str, np.ndarray]]
) -> tuple[TokenModel, list[str] | None]:
    """Round the model's weights as in the file, and compare them with the weights of the file.

    Returns:
        The model with rounded weights, or `model` itself if the file rounds none. The names of weights that still
        differ, or None if no weight in the file has the name of a model weight.
    """
    state = {name: tensor.detach().cpu().float() for name, tensor in model.state_dict().items()}
    rounded, differing, matches = {}, [], 0
    for name, theirs in weights:
        if name not in state:
            continue
        matches += 1
        ours = state[name]
        if theirs.dtype == np.float16:
            ours = rounded[name] = ours.half().float()
        if tuple(ours.shape) != theirs.shape or not np.array_equal(ours.numpy(), theirs):
            differing.append(name)
    for name in state.keys() - rounded.keys():  # the exporter deduplicates equal tensors
        if any(torch.equal(state[name], state[twin]) for twin in [*rounded] if state[twin].shape == state[name].shape):
            rounded[name] = state[name].half().float()
    if rounded:
        model = copy.deepcopy(model)
        model.load_state_dict({**model.state_dict(), **rounded})
    return model, differing if matches else None


class _Comparison:
    """Accumulates the results of a `Verification` over batches."""

    def __init__(self, model: TokenModel, kept: Sequence[str]):
        self.kept, self.task = kept, model.task
        self.max_difference, self.same, self.count = 0.0, 0.0, 0
        self.max_rounding, self.same_rounded = 0.0, 0.0
        self.ties: list[str] = []
        self.mismatches: list[str] = []
        self.stages = [{"after": int(layer), "kept": 0, "same": 0} for layer in model.pruners]

    def add(self, logits, expected, original, decisions: list[Decision], kept, names: Sequence[str]) -> None:
        """Add a batch: logits (images, classes, ...) of file, rounded model and model, and the kept tokens."""
        for row, name in enumerate(names):
            self.count += 1
            self.same += self._agreement(expected[row], logits[row])
            self.same_rounded += self._agreement(expected[row], original[row])
            self.max_rounding = float(np.maximum(self.max_rounding, np.abs(original[row] - expected[row]).max()))
            verdict = compare_kept(decisions, kept, row) if self.kept else "same"
            if verdict == "same":
                difference = float(np.abs(logits[row] - expected[row]).max())
                self.max_difference = float(np.maximum(self.max_difference, difference))  # np.maximum keeps a NaN
            else:
                (self.ties if verdict == "tie" else self.mismatches).append(name)
            for stage, decision, theirs in zip(self.stages, decisions, kept if self.kept else (), strict=False):
                stage["kept"] = theirs.shape[1]
                stage["same"] += int(set(decision.kept[row].tolist()) == set(theirs[row].tolist()))

    def _agreement(self, ours: np.ndarray, theirs: np.ndarray) -> float:
        """Return the share of an image's decisions on which two outputs agree."""
        return float(self.task.agreement(torch.from_numpy(ours)[None], torch.from_numpy(theirs)[None]))

    def result(self, data: str, atol: float, weights: list[str] | None, rounded: bool) -> Verification:
        """Return the result over all batches; `rounded`: whether the file rounds weights."""
        rounding = {
            "max_difference": self.max_rounding,
            "top1_agreement": 100 * self.same_rounded / self.count,
        }
        return Verification(
            images=self.count,
            data=data,
            max_difference=self.max_difference,
            top1_agreement=100 * self.same / self.count,
            ties=self.ties,
            mismatches=self.mismatches,
            atol=atol,
            stages=self.stages if self.kept or not self.stages else None,
            weights=weights,
            rounding=rounding if rounded else None,
            task=self.task.name,
        )


def compare_kept(decisions: list[Decision], kept: list[np.ndarray], row: int) -> str:
    """Return "same", "tie" or "mismatch" for one image.

    Only the first stage that differs counts: differences in later stages follow from it.
    """
    for decision, positions in zip(decisions, kept, strict=True):
        ours, theirs = set(decision.kept[row].tolist()), set(positions[row].tolist())
        if ours != theirs:
            scores = dict(zip(decision.candidates[row].tolist(), decision.scores[row].tolist(), strict=True))
            if not theirs <= set(scores) or len(ours) != len(theirs):
                return "mismatch"
            difference = max(scores[p] for p in ours - theirs) - min(scores[p] for p in theirs - ours)
            scale = max(abs(score) for score in scores.values())
            return "tie" if difference <= 1e-4 * scale else "mismatch"
    return "same"


def _make_batches(images: Images, model: TokenModel) -> list[Batch]:
    """Read images spread over the dataset, in as many batches of 8 as possible, then of 3, then of 1.

    There are no batches of 8 if 8 images have more than `BATCH_LOGITS`.
    """
    index = np.unique(np.linspace(0, len(images) - 1, VERIFY_IMAGES).round().astype(int)).tolist()
    (batch,) = Batches(images, model.fixed_transform(), index, batch_size=len(index), labelled=False)
    count = len(batch.index)
    by_eight = 8 * (max(0, count - 4) // 8) if takes_batches(model) else 0
    starts = [*range(0, by_eight, 8), *range(by_eight, count - 1, 3), count - 1, count]
    return [Batch(batch.images[start:end], None, batch.index[start:end]) for start, end in pairwise(starts)]


def takes_batches(model: TokenModel) -> bool:
    """Return whether 8 images have at most `BATCH_LOGITS`; in segmentation models they can take a few GB."""
    pixels = math.prod(model.config.image_size) if model.task.name == SEGMENTATION.name else 1
    return 8 * pixels * model.config.num_classes <= BATCH_LOGITS


def _find_first_layer(model: TokenModel, file: _OnnxFile, images: Tensor, device: torch.device) -> int | None:
    """Return the first layer after which the features differ; 0 for none, None if the file does not name them."""
    names = [f"{FEATURES_PREFIX}{layer}" for layer in range(1, len(model.blocks) + 1)]
    if not {*find_values(file.graph, FEATURES_PREFIX)}.issuperset(names):
        return None
    outputs = run(file.open(names), names, images.numpy())
    counts = model.token_counts()
    with torch.no_grad():
        tokens = model.embed(images.to(device))
        for layer, theirs in enumerate(outputs, 1):
            # Files of earlier versions have all tokens of the last layer, newer ones only those that are read out.
            alone = model.shortens_last and layer == len(outputs) and theirs.shape[1] < counts[-1]
            tokens, _ = model.step(layer, model.enter(layer, tokens), protected_only=alone)
            ours = _to_numpy(tokens.features)
            if ours.shape != theirs.shape or not np.abs(ours - theirs).max() <= FEATURES_RTOL * np.abs(ours).max():
                return layer
    return 0


def _describe_failure(result: Verification) -> str:
    """Return the error message: what differs, and where."""
    pixels = result.task == SEGMENTATION.name
    parts = [
        _describe_difference(result),
        f"{result.top1_agreement:.1f}% of {'the pixels of ' * pixels}{result.images} images in the same class",
    ]
    if result.mismatches:
        parts.append(f"{len(result.mismatches)} keep different tokens ({', '.join(result.mismatches[:3])})")
    if result.weights:
        more = f" and {len(result.weights) - 3} more" if len(result.weights) > 3 else ""
        parts.append(f"other values in {', '.join(result.weights[:3])}{more}")
    if result.first_layer is not None:
        where = f"first after layer {result.first_layer}" if result.first_layer else "after no layer, so in the head"
        parts.append(f"features differ {where}")
    return f"the ONNX graph does not compute what the model does: {'; '.join(parts)}"


def _describe_difference(result: Verification) -> str:
    """Describe the difference of the logits, if any can be compared."""
    if len(result.ties) + len(result.mismatches) == result.images:
        return "no image keeps the same tokens, so that logits could be compared"
    return f"largest difference {result.max_difference:.3g} (allowed {result.atol:g})"


def _to_numpy(tensor: Tensor) -> np.ndarray:
    return tensor.detach().float().cpu().numpy()
