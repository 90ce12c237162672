"""The proof that an ONNX file computes what a model computes, and where it does not."""

from __future__ import annotations

import copy
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
from ..errors import InputError, VerificationError
from ..models.base import Decision, TokenModel
from ..progress import track
from .graph import FEATURES_PREFIX, KEPT_PREFIX, add_outputs, values_named
from .runtime import provider_named, run, session

if TYPE_CHECKING:
    import onnx

ATOL = 1e-4
VERIFY_IMAGES = 36  # four batches of 8, one of 3 and one of 1
MATERIAL = 1e-4  # of the largest feature: what a layer may differ by; rounding brings 1e-6


@dataclass(frozen=True)
class Verification:
    """How an ONNX file compares with the model it was made from.

    Attributes:
        images: how many were run through both. data: where they came from.
        max_difference: the largest difference of a logit, over the images whose kept tokens are the same.
        top1_agreement: percent of all images given the same class.
        ties: images that kept other tokens because two scores were equal but for rounding, named.
        mismatches: images that kept other tokens for no such reason, named.
        atol: what max_difference was allowed to be.
        stages: for each stage `after` which layer, and for how many images the `kept` tokens are the `same`; None: the
            file does not show its stages.
        weights: names of the model's weights that have other values in the file; None: the file has none of its names.
        first_layer: after which layer, from 1, the file's features differ; 0: none of them; None: not looked for.
        rounding: `max_difference` and `top1_agreement` between the model and the model with the weights as the file
            rounds them, which is what the file is compared with; None: it rounds none.
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

    @property
    def passed(self) -> bool:
        """Whether the file may be trusted: a NaN fails, too."""
        same = self.max_difference <= self.atol and self.top1_agreement == 100
        return same and not self.mismatches and not self.weights and len(self.ties) < self.images


def verify_onnx(
    model: TokenModel,
    graph: onnx.ModelProto | str | Path,
    *,
    data: str | Path | None = None,
    atol: float = ATOL,
    provider: str = "cpu",
) -> Verification:
    """Compare an ONNX file with its model: weight by weight, and in onnxruntime on real images beside torch.

    Images go in batches of 8, of 3 and of 1. Where the file stores weights as float16, the model is compared with the
    same rounding.

    Args:
        data: images, as `open_images` takes them; None: those the model names, else photographs.
        provider: of onnxruntime, "cpu" or "cuda" say.

    Raises:
        VerificationError: they differ by more than `atol`, in a class, in the tokens kept, or in a weight.
        InputError: not an ONNX file, or one of another kind of model.
    """
    if not 0 <= atol < float("inf"):
        raise InputError(f"atol {atol}: expected a number from 0")
    images = model.find_images(data)
    file = _File(graph, model, provider_named(provider))
    device = next(model.parameters()).device
    reference, weights = as_stored(model, file.weights())
    reference = reference.to(device)
    comparison = _Comparison(model, file.kept)
    batches = _batches(images, model)
    for batch in track(batches, "verifying", len(batches)):
        with torch.no_grad():
            expected, decisions = reference.trace(batch.images.to(device))
            original = expected if reference is model else model(batch.images.to(device))
        found, *kept = run(file.session, file.outputs, batch.images.numpy())
        if found.shape != tuple(expected.shape):
            raise InputError(f"the ONNX file gives logits {found.shape}, the model {tuple(expected.shape)}")
        names = [images.describe(index) for index in batch.index]
        comparison.add(found, _numpy(expected), _numpy(original), decisions, kept, names)
    result = comparison.result(images.name, atol, weights, rounded=reference is not model)
    if not result.passed:
        first = _first_layer(reference, file, batch.images, device)
        result = replace(result, first_layer=first)
        raise VerificationError(_complaint(result), result)
    return result


class _File:
    """An ONNX file in a session that gives the kept tokens beside the logits, and the features in another."""

    def __init__(self, source: onnx.ModelProto | str | Path, model: TokenModel, provider: str):
        import onnx

        self.folder, self.provider = "", provider
        if isinstance(source, onnx.ModelProto):
            self.graph = source
        else:
            self.graph, self.folder = read_graph(source), str(Path(source).absolute().parent)
        stages = [f"{KEPT_PREFIX}{layer}" for layer in model.pruners]
        there = {*values_named(self.graph, KEPT_PREFIX)}
        self.kept = stages if there.issuperset(stages) else []
        self.session = self.opened(self.kept)
        self.outputs = [self.session.get_outputs()[0].name, *self.kept]

    def opened(self, names: Sequence[str]) -> Any:
        """A session with these values as outputs, too."""
        import onnx

        graph = onnx.ModelProto()
        graph.CopyFrom(self.graph)
        del graph.graph.output[1:]
        add_outputs(graph, names)
        return session(graph.SerializeToString(), self.provider, weights=self.folder)

    def weights(self) -> Iterator[tuple[str, np.ndarray]]:
        """Each weight of the file, one at a time."""
        import onnx

        for tensor in self.graph.graph.initializer:
            try:
                yield tensor.name, onnx.numpy_helper.to_array(tensor, base_dir=self.folder)
            except Exception as error:  # missing, too short, outside of the folder, or of no known type
                raise InputError(f"cannot read the weight {tensor.name} of the ONNX file ({error})") from error


def read_graph(file: str | Path) -> onnx.ModelProto:
    """An ONNX file, without what it keeps in another file beside it."""
    import onnx

    try:
        graph = onnx.load(file, load_external_data=False, format="protobuf")
    except OSError as error:
        raise InputError(f"cannot read {file}: {error.strerror or error}") from error
    except Exception as error:  # protobuf's own
        raise InputError(f"{file}: not an ONNX file") from error
    if not graph.graph.node:
        raise InputError(f"{file}: not an ONNX file")
    return graph


def as_stored(model: TokenModel, weights: Iterable[tuple[str, np.ndarray]]) -> tuple[TokenModel, list[str] | None]:
    """(the model with the weights that the file rounds rounded, names of weights that differ all the same).

    The model itself where the file rounds none; None for names where the file has no weight of the model's names.
    """
    state = {name: tensor.detach().cpu().float() for name, tensor in model.state_dict().items()}
    rounded, other, known = {}, [], 0
    for name, theirs in weights:
        if name not in state:
            continue
        known += 1
        ours = state[name]
        if theirs.dtype == np.float16:
            ours = rounded[name] = ours.half().float()
        if tuple(ours.shape) != theirs.shape or not np.array_equal(ours.numpy(), theirs):
            other.append(name)
    for name in state.keys() - rounded.keys():  # the exporter keeps one of equal tensors
        if any(torch.equal(state[name], state[twin]) for twin in [*rounded] if state[twin].shape == state[name].shape):
            rounded[name] = state[name].half().float()
    if rounded:
        model = copy.deepcopy(model)
        model.load_state_dict({**model.state_dict(), **rounded})
    return model, other if known else None


class _Comparison:
    """Sums over batches of what becomes a `Verification`."""

    def __init__(self, model: TokenModel, kept: Sequence[str]):
        self.kept = kept
        self.worst, self.same, self.count = 0.0, 0, 0
        self.moved, self.unmoved = 0.0, 0
        self.ties: list[str] = []
        self.mismatches: list[str] = []
        self.stages = [{"after": int(layer), "kept": 0, "same": 0} for layer in model.pruners]

    def add(self, found, expected, original, decisions: list[Decision], kept, names: Sequence[str]) -> None:
        for row, name in enumerate(names):
            self.count += 1
            self.same += int(found[row].argmax() == expected[row].argmax())
            self.unmoved += int(original[row].argmax() == expected[row].argmax())
            self.moved = float(np.maximum(self.moved, np.abs(original[row] - expected[row]).max()))
            verdict = compare_kept(decisions, kept, row) if self.kept else "same"
            if verdict == "same":
                difference = float(np.abs(found[row] - expected[row]).max())
                self.worst = float(np.maximum(self.worst, difference))  # a NaN stays
            else:
                (self.ties if verdict == "tie" else self.mismatches).append(name)
            for stage, decision, theirs in zip(self.stages, decisions, kept if self.kept else (), strict=False):
                stage["kept"] = theirs.shape[1]
                stage["same"] += int(set(decision.kept[row].tolist()) == set(theirs[row].tolist()))

    def result(self, data: str, atol: float, weights: list[str] | None, rounded: bool) -> Verification:
        return Verification(
            images=self.count,
            data=data,
            max_difference=self.worst,
            top1_agreement=100 * self.same / self.count,
            ties=self.ties,
            mismatches=self.mismatches,
            atol=atol,
            stages=self.stages if self.kept or not self.stages else None,
            weights=weights,
            rounding={"max_difference": self.moved, "top1_agreement": 100 * self.unmoved / self.count}
            if rounded
            else None,
        )


def compare_kept(decisions: list[Decision], kept: list[np.ndarray], row: int) -> str:
    """ "same", "tie" or "mismatch" of one image; what follows the first stage that differs is its consequence."""
    for decision, found in zip(decisions, kept, strict=True):
        ours, theirs = set(decision.kept[row].tolist()), set(found[row].tolist())
        if ours != theirs:
            scores = dict(zip(decision.candidates[row].tolist(), decision.scores[row].tolist(), strict=True))
            if not theirs <= set(scores) or len(ours) != len(theirs):
                return "mismatch"
            apart = max(scores[p] for p in ours - theirs) - min(scores[p] for p in theirs - ours)
            scale = max(abs(score) for score in scores.values())
            return "tie" if apart <= 1e-4 * scale else "mismatch"
    return "same"


def _batches(images: Images, model: TokenModel) -> list[Batch]:
    """As many of 8 as there are images for, then of 3, then of 1."""
    chosen = np.unique(np.linspace(0, len(images) - 1, VERIFY_IMAGES).round().astype(int)).tolist()
    (everything,) = Batches(images, model.transform(), chosen, batch_size=len(chosen))
    count = len(everything.index)
    by_eight = 8 * (max(0, count - 4) // 8)
    starts = [*range(0, by_eight, 8), *range(by_eight, count - 1, 3), count - 1, count]
    return [Batch(everything.images[start:end], None, everything.index[start:end]) for start, end in pairwise(starts)]


def _first_layer(model: TokenModel, file: _File, images: Tensor, device: torch.device) -> int | None:
    """After which layer the features differ first; 0 if after none, None if the file does not name them."""
    names = [f"{FEATURES_PREFIX}{layer}" for layer in range(1, len(model.blocks) + 1)]
    if not {*values_named(file.graph, FEATURES_PREFIX)}.issuperset(names):
        return None
    found = run(file.opened(names), names, images.numpy())
    with torch.no_grad():
        tokens = model.embed(images.to(device))
        for layer, theirs in enumerate(found, 1):
            tokens, _ = model.step(layer, tokens)
            ours = _numpy(tokens.features)
            if ours.shape != theirs.shape or not np.abs(ours - theirs).max() <= MATERIAL * np.abs(ours).max():
                return layer
    return 0


def _complaint(result: Verification) -> str:
    """What differs, and where."""
    parts = [
        f"largest difference {result.max_difference:.3g} (allowed {result.atol:g})",
        f"{result.top1_agreement:.1f}% of {result.images} images in the same class",
    ]
    if result.mismatches:
        parts.append(f"{len(result.mismatches)} keep other tokens ({', '.join(result.mismatches[:3])})")
    if result.weights:
        more = f" and {len(result.weights) - 3} more" if len(result.weights) > 3 else ""
        parts.append(f"other values in {', '.join(result.weights[:3])}{more}")
    if result.first_layer is not None:
        where = f"first after layer {result.first_layer}" if result.first_layer else "after no layer, so in the head"
        parts.append(f"features differ {where}")
    return f"the ONNX graph does not compute what the model does: {'; '.join(parts)}"


def _numpy(tensor: Tensor) -> np.ndarray:
    return tensor.detach().float().cpu().numpy()
