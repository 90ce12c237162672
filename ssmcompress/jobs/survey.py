"""The effect of pruning on a set of images: predictions, attention maps and kept patches of models, for each image."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..data.batches import Batches
from ..evaluation.attention_maps import Attention, attend
from ..models.base import TokenModel
from ..progress import track
from ..tasks import SEGMENTATION
from .frames import count_times, tile_frames
from .variants import DENSE, match_layers

LEAST_PATCHES = 3  # minimum number of patches for a correlation


@dataclass(frozen=True)
class MapOptions:
    """Options of the maps: layers of the dense model, from 1, and a method of `ssmcompress.attention_maps`."""

    layers: tuple[int, ...]
    method: str


@dataclass(frozen=True)
class Prediction:
    """The prediction of a model for an image.

    Attributes:
        label: the class; None for segmentation. probability: of this class, 0..1; for segmentation the share of correct
            pixels, without masks the share of pixels with the dense model's class; None: unknown.
        right: whether the class is correct, or without labels equal to the dense model's; None: unknown.
        correlation: of the map with that of the dense model, on the patches kept by this model; None: undefined.
        correlation_all: the same on all patches, with 0 for dropped ones.
    """

    label: int | None
    probability: float | None
    right: bool | None
    correlation: float | None
    correlation_all: float | None


@dataclass
class Survey:
    """Predictions of models on a set of images.

    Attributes:
        index: of each image, in its source. labels: of each image; None: unlabelled.
        predictions: of each model, by name, for each image. kept: by name, the share of the images (rows, columns) in
            which a patch is kept by the last stage.
    """

    index: list[int] = field(default_factory=list)
    labels: list[int] | None = None
    predictions: dict[str, list[Prediction]] = field(default_factory=dict)
    kept: dict[str, np.ndarray] = field(default_factory=dict)

    @property
    def labelled(self) -> bool:
        """Whether images have labels."""
        return self.labels is not None


def run_survey(variants: Mapping[str, TokenModel], images: Batches, options: MapOptions) -> Survey:
    """Run models on images and compare their maps with those of the one named `DENSE`, if it is there."""
    survey = Survey(predictions={name: [] for name in variants})
    sums: dict[str, Tensor] = {}
    for batch in track(images, "attention maps", len(images)):
        survey.index += batch.index
        found = attend_all(variants, batch.images, options)
        if batch.labels is not None and batch.labels.ndim == 1:
            survey.labels = [*(survey.labels or []), *batch.labels.tolist()]
        for name, attention in found.items():
            survey.predictions[name] += _judge(variants[name], attention, found.get(DENSE), batch.labels)
            kept = find_kept(attention).double().sum(0)
            sums[name] = kept + sums[name] if name in sums else kept
    survey.kept = {name: (kept / max(1, len(survey.index))).cpu().numpy() for name, kept in sums.items()}
    return survey


def attend_all(variants: Mapping[str, TokenModel], images: Tensor, options: MapOptions) -> dict[str, Attention]:
    """Return the results of each model for prepared images (batch, channels, height, width), with maps by the options.

    The maps of the frames of a video are arranged like the frames in its picture.
    """
    found = {}
    for name, model in variants.items():
        device = next(model.parameters()).device
        attention = attend(model, images.to(device), match_layers(model, options.layers), options.method)
        times = count_times(model)
        maps, kept = (tile_frames(values, times) for values in (attention.maps, attention.kept))
        places = [tile_frames(grid, times) for grid in attention.places]
        found[name] = replace(attention, maps=maps, kept=kept, places=places)
    return found


def find_kept(found: Attention) -> Tensor:
    """Return which patches the last stage keeps, (batch, rows, columns) bool; all of them if there is no stage."""
    if not found.decisions:
        return torch.ones_like(found.kept)
    return torch.stack([torch.isin(found.places[-1], kept) for kept in found.decisions[-1].kept])


def _judge(model: TokenModel, found: Attention, dense: Attention | None, labels: Tensor | None) -> list[Prediction]:
    """Return the predictions of a model for a batch."""
    compared = dense is not None and dense is not found
    near = correlate(found.maps, dense.maps, found.kept) if compared else [None] * len(found.maps)
    whole = correlate(found.maps, dense.maps) if compared else [None] * len(found.maps)
    outputs = found.outputs.float()
    if model.task.name == SEGMENTATION.name:
        if labels is not None:
            outputs = F.interpolate(outputs, size=labels.shape[-2:], mode="bilinear", align_corners=False)
            shares = model.task.accuracy(outputs.cpu(), labels).tolist()
        elif compared:
            shares = model.task.agreement(dense.outputs.float(), outputs).tolist()
        else:
            shares = [None] * len(outputs)
        rows = [(None, share, None) for share in shares]
    else:
        chances, classes = outputs.softmax(-1).max(-1)
        wanted = labels if labels is not None else dense.outputs.argmax(-1) if compared else None
        rights = [None] * len(classes) if wanted is None else (classes.cpu() == wanted.cpu()).tolist()
        rows = list(zip(classes.tolist(), chances.tolist(), rights, strict=True))
    return [Prediction(*row, *both) for row, both in zip(rows, zip(near, whole, strict=True), strict=True)]


def correlate(maps: Tensor, others: Tensor, where: Tensor | None = None) -> list[float | None]:
    """Return the correlation (Pearson) of maps (batch, rows, columns) with others, image by image.

    Args:
        where: (batch, rows, columns) bool, the patches that count; None: all.

    Returns:
        None for an image with fewer than LEAST_PATCHES patches, or the same value at all of them.
    """
    result: list[float | None] = []
    for image in range(len(maps)):
        x, y = (m[image].double().flatten().cpu() for m in (maps, others))
        if where is not None:
            x, y = (v[where[image].flatten().cpu()] for v in (x, y))
        if len(x) < LEAST_PATCHES or not (spread := float(x.std() * y.std())) > 0:
            result.append(None)
            continue
        covariance = float(((x - x.mean()) * (y - y.mean())).sum() / (len(x) - 1))
        result.append(max(-1.0, min(1.0, covariance / spread)))
    return result
