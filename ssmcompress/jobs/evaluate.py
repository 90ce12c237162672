"""Evaluation of a model on images, as JSON."""

from __future__ import annotations

from typing import Any

from .. import processes
from ..evaluation.measure import measure as measure_all
from ..models.base import TokenModel
from ..models.learnt import learnt_from
from .doubts import Subject, find_doubts
from .images import make_batches
from .measuring import add_views, describe_views
from .requests import DataOptions, MeasureOptions


def evaluate_model(
    model: TokenModel, data: DataOptions, measure: MeasureOptions, dense: TokenModel | None = None
) -> dict[str, Any]:
    """Return a JSON object with the figures of the task, `images`, `data`, `warnings`, and, with `dense`, `agreement`.

    Raises:
        InputError: no images, or images of other classes than the model's.
    """
    model.check_views(measure.views)
    images = model.find_images(data.data, reduce_zero_label=data.reduce_zero_label)
    batches = make_batches(model, images, processes.shard(range(len(images))), data)
    together = processes.count() > 1
    models = {"model": model} if dense is None else {"dense": dense, "model": model}
    results = measure_all(models, add_views(model, batches, measure), dtype=measure.torch_dtype, distributed=together)
    result = results["model"]
    batches.sync()
    value: dict[str, Any] = {
        "task": model.task.name,
        **model.task.describe(result, compared=False),
        "images": result.images,
        **describe_views(model, measure),
        "data": {
            "name": images.name,
            "images": result.images,
            "labelled": result.labelled,
            "overlap": None if model.plan is None else learnt_from(model).count(batches),
            "unreadable": batches.unreadable_names(),
        },
        "warnings": find_doubts(Subject.of(model, images, result.images), results.get("dense"), result),
    }
    if dense is not None:
        value["agreement"] = model.task.describe(result, compared=True)
    return value
