"""Visualisation of pruning: attention maps, kept tokens, and a web page to explore them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import processes
from ..data.batches import Batches, sample_indices
from ..errors import InputError
from ..evaluation.attention_maps import METHODS, Attention, check_method, choose_layers, describe_reader
from ..files import ATTENTION, VISUALIZED, check_target, is_model_folder, new_folder
from ..hub_names import name_model
from ..models.base import TokenModel
from ..models.running import Decision
from ..models.saved import versions
from ..progress import track
from ..tasks import SEGMENTATION
from .attention_pictures import ImageView, ModelView, StageView, draw_image, draw_summary, encode_url, to_grid
from .explore_page import render_page
from .frames import find_grid
from .images import make_batches
from .pictures import draw_segments, show_pixels
from .requests import DataOptions
from .shown import Choice, choose_shown, read_shown
from .survey import MapOptions, Prediction, Survey, attend_all, run_survey
from .variants import DENSE, check_alike, list_variants, match_layers, number_layers

FORMAT_VERSION = 1
PAGE_FILE = "index.html"
SHOWN, SURVEYED = 8, 1000  # images, by default


@dataclass(frozen=True)
class VisualizeRequest:
    """The request of a visualisation.

    Attributes:
        data: the images; only `data.data` is read. images: number of images drawn. survey: maximum number of images for
            the figures, drawn at random.
        layers: layers of the maps, numbered as in the dense model; None: from 5/8 of the depth on. method: of the maps.
    """

    data: DataOptions = DataOptions()
    images: int = SHOWN
    survey: int = SURVEYED
    layers: tuple[int, ...] | None = None
    method: str = "row"

    def check(self) -> None:
        """Check the request before the model is loaded.

        Raises:
            InputError: an invalid number or method.
        """
        for name, value in (("images", self.images), ("survey", self.survey)):
            if value < 1:
                raise InputError(f"`{name}` {value}: expected at least 1")
        if self.method not in METHODS:
            raise InputError(f"`method` {self.method!r}: expected one of {', '.join(METHODS)}")


def default_folder(model: str) -> Path:
    """Return the default folder for pictures of a model: inside the model's folder, if ssmcompress wrote it."""
    path = Path(model)
    if path.is_dir() and is_model_folder(path):
        return path / ATTENTION
    return Path("visualized", name_model(model))


def visualize(
    model: TokenModel,
    request: VisualizeRequest,
    folder: str | Path,
    *,
    dense: TokenModel | None = None,
    title: str | None = None,
    command: str = "",
    force: bool = False,
) -> dict[str, Any]:
    """Show the effect of pruning a model on images, as pictures, a web page and JSON in a folder.

    Args:
        model: dense or compressed. dense: the model that it was made from; None: unavailable, or `model` is dense.
        folder: output folder. force: replace it if ssmcompress wrote it. title: name of the model; None: that of the
            folder. command: recorded as the command that created it.

    Returns:
        The JSON object written to the folder.

    Raises:
        InputError: images, layers, a method or a folder that cannot be used.
    """
    request.check()
    folder = Path(folder)
    if processes.count() > 1:
        raise InputError("visualize runs in one process: start it without a launcher")
    if model.plan is None and dense is not None:
        raise InputError("`dense`: the model is dense itself; leave it out, or pass the compressed model")
    variants = list_variants(model, dense)
    check_alike(variants)
    options = MapOptions(choose_layers(model.dense_config.depth, request.layers), request.method)
    for variant in variants.values():
        check_method(variant, request.method)
        match_layers(variant, options.layers)
    inputs = [request.data.data, *(m.source.path for m in variants.values() if m.source is not None)]
    check_target(folder, force, inputs, folder=VISUALIZED)
    images = model.find_images(request.data.data, reduce_zero_label=request.data.reduce_zero_label)
    index, _ = sample_indices(len(images), request.survey, request.data.seed)
    batches = make_batches(model, images, index, request.data, fixed=True)
    survey = run_survey(variants, batches, options)
    choice = choose_shown(survey, request.images, request.data.seed)
    views, pairs = view_images(variants, batches, survey, choice, options)
    value = {
        "format_version": FORMAT_VERSION,
        "command": command,
        "versions": versions(),
        "title": title or folder.resolve().name,
        **describe(model, variants, survey, options),
        "judged": describe_accuracy(model, images.labelled),
        "data": {
            "name": images.name,
            "images": len(survey.index),
            "labelled": images.labelled,
            "unreadable": [name_image(batches, index) for index in sorted(batches.unreadable)],
        },
        "rule": choice.rule,
        "groups": dict(choice.groups),
        "images": [describe_image(view) for view in views],
    }
    files = draw_files(variants, views, pairs, survey, value)
    value["files"] = sorted([*files, PAGE_FILE, VISUALIZED])
    pictures = [
        {**shown, "picture": encode_url(view.photo)} for shown, view in zip(value["images"], views, strict=True)
    ]
    page = {**value, "images": pictures, "data": {**value["data"], "name": Path(images.name).name}}
    unseen = ("command", "versions", "files")
    files[PAGE_FILE] = render_page({k: v for k, v in page.items() if k not in unseen}).encode(errors="replace")
    files[VISUALIZED] = json.dumps(value, indent=1, allow_nan=False).encode() + b"\n"
    with new_folder(folder, force, VISUALIZED) as workplace:
        for name, content in files.items():
            (workplace / name).write_bytes(content)
    return value


@torch.no_grad()
def view_images(
    variants: Mapping[str, TokenModel], images: Batches, survey: Survey, choice: Choice, options: MapOptions
) -> tuple[list[ImageView], list[tuple[Tensor, Tensor | None]]]:
    """Return the results of the models for the images to show, and these images with their masks."""
    model = next(iter(variants.values()))
    rows = [row for row, _ in choice.rows]
    pairs = read_shown(images, [survey.index[row] for row in rows])
    names = model.classes or images.source.classes
    views = []
    for (row, group), (image, _) in zip(choice.rows, track(pairs, "pictures", len(pairs)), strict=True):
        found = attend_all(variants, image[None], options)
        models = {
            name: _view_model(variants[name], survey.predictions[name][row], attention, names)
            for name, attention in found.items()
        }
        label = None if survey.labels is None else name_class(survey.labels[row], names)
        views.append(ImageView(name_image(images, survey.index[row]), group, label, show_pixels(model, image), models))
    return views, pairs


def _view_model(model: TokenModel, prediction: Prediction, found: Attention, names: Sequence[str] | None) -> ModelView:
    pairs = zip(found.decisions, found.places, strict=True)
    stages = [_view_stage(decision, places.cpu()) for decision, places in pairs]
    said = say_prediction(prediction, names, model.task.name == SEGMENTATION.name)
    return ModelView(prediction, said, found.maps[0].cpu().numpy(), found.kept[0].cpu().numpy(), stages)


def _view_stage(decision: Decision, patches: Tensor) -> StageView:
    """Return what a stage does with one image, given its patches (rows, columns)."""
    candidates, scores, kept = (part[0].cpu() for part in decision)
    length = max(int(candidates.max()), int(patches.max())) + 1  # fused tokens have the highest numbers
    values = torch.full((length,), torch.nan, dtype=torch.float64)
    values[candidates] = scores.double()
    return StageView(torch.isin(patches, kept).numpy(), values[patches].numpy())


def name_image(images: Batches, index: int) -> str:
    """Return the name of an image in its dataset, without the dataset's folder."""
    name, described = images.source.name, images.source.describe(index)
    return described.replace(name, Path(name).name, 1) if described.startswith(name) else described


def name_class(label: int, names: Sequence[str] | None) -> str:
    """Return the name of a class, or its number if it has no name."""
    return str(names[label]) if names is not None and label < len(names) else f"class {label}"


def say_prediction(prediction: Prediction, names: Sequence[str] | None, segments: bool) -> str:
    """Return a prediction as text: the class with its probability, or a share of pixels."""
    if prediction.label is not None:
        return f"{name_class(prediction.label, names)} {prediction.probability:.0%}"
    if segments and prediction.probability is not None:
        return f"{prediction.probability:.1%} of the pixels"
    return ""


def describe(
    model: TokenModel, variants: Mapping[str, TokenModel], survey: Survey, options: MapOptions
) -> dict[str, Any]:
    """Return a description of the images and models, and the figures over all images, as JSON values."""
    numbers, stages = number_layers(model), model.plan.stages if model.plan is not None else ()
    return {
        "architecture": model.architecture,
        "task": model.task.name,
        "method": options.method,
        "layers": list(options.layers),
        "reader": describe_reader(model),
        "grid": list(find_grid(model)),
        "stages": [
            # Layers are numbered as in the dense model, like those of the maps.
            {
                "after": numbers[s.after - 1],
                "kept": kept,
                "of": model.section_of(s.after).length,
                "importance": s.importance,
            }
            for s, kept in zip(stages, model.kept_counts(), strict=True)
        ],
        "variants": [
            {"name": name, "layers": list_mapped(variant, options), "figures": summarise(survey.predictions[name])}
            for name, variant in variants.items()
        ],
        "spread": "25 % to 75 %",
        "kept_share": {name: to_grid(kept, digits=4) for name, kept in survey.kept.items() if name != DENSE},
    }


def list_mapped(model: TokenModel, options: MapOptions) -> list[int]:
    """Return the layers used for the maps of a model, numbered as in the dense model."""
    numbers = number_layers(model)
    return [numbers[layer - 1] for layer in match_layers(model, options.layers)]


def describe_accuracy(model: TokenModel, labelled: bool) -> str:
    """Describe what the figure `accuracy` is a share of."""
    what = "pixels" if model.task.name == SEGMENTATION.name else "images"
    return f"{what} right" if labelled else f"{what} with the dense model's class"


def summarise(rows: Sequence[Prediction]) -> dict[str, float | None]:
    """Return the figures of a model over all images: accuracy in percent, and correlations of maps."""
    rights = [row.right if row.label is not None else row.probability for row in rows]
    rights = [float(right) for right in rights if right is not None]
    figures: dict[str, float | None] = {"accuracy": 100 * float(np.mean(rights)) if rights else None}
    for key in ("correlation", "correlation_all"):
        values = [getattr(row, key) for row in rows if getattr(row, key) is not None]
        low, high = np.quantile(values, [0.25, 0.75]).tolist() if values else (None, None)
        figures |= {
            key: float(np.mean(values)) if values else None,
            f"{key}_low": low,
            f"{key}_high": high,
            f"{key}_deviation": float(np.std(values)) if values else None,
            f"{key}_images": len(values),
        }
    return figures


def describe_image(view: ImageView) -> dict[str, Any]:
    """Return an image to show, as JSON values."""
    return {
        "name": view.name,
        "group": view.group,
        "label": view.label,
        "scale": list(view.scale()),
        "variants": {name: _describe_model(shown) for name, shown in view.models.items()},
    }


def _describe_model(view: ModelView) -> dict[str, Any]:
    given = asdict(view.prediction)
    probability = given.pop("probability")
    return {
        **given,
        "predicted": view.said.rpartition(" ")[0] if given["label"] is not None else view.said,
        "probability": probability if given["label"] is not None else None,
        "map": to_grid(view.map, view.kept),
        "stages": [_describe_stage(stage) for stage in view.stages],
    }


def _describe_stage(stage: StageView) -> dict[str, Any]:
    ranks = np.full(stage.scores.shape, np.nan)
    known = np.isfinite(stage.scores)
    # Ties are ranked in patch order, which is how stages break ties.
    order = np.argsort(-stage.scores[known], kind="stable")
    places = np.empty(len(order))
    places[order] = np.arange(1, len(order) + 1)
    ranks[known] = places
    return {
        "kept": stage.kept.astype(int).tolist(),
        "scores": to_grid(stage.scores),
        "ranks": [[None if rank is None else int(rank) for rank in row] for row in to_grid(ranks)],
    }


def name_layers(layers: Sequence[int]) -> str:
    """Name layers in words: "layers 4 to 6", "layers 1, 4"."""
    if len(layers) == 1:
        return f"layer {layers[0]}"
    whole = len(layers) > 2 and layers[-1] - layers[0] == len(layers) - 1
    return f"layers {layers[0]} to {layers[-1]}" if whole else f"layers {', '.join(map(str, layers))}"


def draw_files(
    variants: Mapping[str, TokenModel],
    views: Sequence[ImageView],
    pairs: Sequence[tuple[Tensor, Tensor | None]],
    survey: Survey,
    value: Mapping[str, Any],
) -> dict[str, bytes]:
    """Return the pictures by file name: one for each image shown, and one summary of all images."""
    titles = [f"after layer {stage['after']}:\n{stage['kept']} of {stage['of']} kept" for stage in value["stages"]]
    title = f"{value['method']}, {name_layers(value['layers'])}"
    files, model = {}, next(iter(variants.values()))
    for number, (view, (image, mask)) in enumerate(zip(views, pairs, strict=True), 1):
        files[f"attention-{number:02d}.png"] = draw_image(view, titles, title)
        if model.task.name == SEGMENTATION.name:
            masks = None if mask is None else [mask]
            picture = draw_segments(variants, [image], masks, model.classes, model.palette)
            files[f"segments-{number:02d}.png"] = picture
    summary = draw_summary(survey, f"maps of {value['reader']}: {title}")
    return files if summary is None else {**files, "summary.png": summary}
