"""Rows after fine-tuning: the models of the rows without training, each trained by the same short recipe."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import ssmcompress
from ssmcompress.compression.finetune.state import StateFile
from ssmcompress.data.batches import sample_indices
from ssmcompress.models import TokenModel
from ssmcompress.progress import line

from .rows import find_kept
from .settings import Settings, read, write
from .subjects import Subject

DENSE = "dense"


def tune_rows(subject: Subject, settings: Settings) -> None:
    """Fine-tune the models of all rows of the first seed that were not tuned yet, and measure them.

    The dense model is tuned, too: what it gains is not due to a method.
    """
    file = settings.file_of("tuned", subject.name)
    found = read(file)
    dense = subject.load(settings.device)
    work: list[tuple[str, Path | None]] = [(DENSE, None), *find_kept(subject.name, settings)]
    for number, (key, folder) in enumerate(work, 1):
        if key in found:
            continue
        line(f"{subject.name}: fine-tuning {key}, {number} of {len(work)}")
        model = ssmcompress.load(folder, device=settings.device) if folder else ssmcompress.prune(dense, ratio=0.0)
        found[key] = tune(model, dense, subject, settings)
        write(file, found)


def tune(model: TokenModel, dense: TokenModel, subject: Subject, settings: Settings) -> dict[str, Any]:
    """Fine-tune a model and return its figures.

    A model of smaller images has no teacher, for the dense model does not take its images.
    """
    begin = time.monotonic()
    images = dense.find_images(subject.training)
    index, _ = sample_indices(len(images), settings.tune_images, settings.seeds[0])
    batches = ssmcompress.Batches(images, model.transform(), index, settings.batch_size, settings.workers)
    teacher = dense if model.dense_config == dense.config else None
    recipe = ssmcompress.Recipe(epochs=settings.tune_epochs)
    state = StateFile(settings.cache / f"{subject.name}.training.pt", resume=False)
    tuned = ssmcompress.finetune(model, batches, dense=teacher, recipe=recipe, seed=settings.seeds[0], state=state)
    result = ssmcompress.evaluate(tuned.model, subject.test)
    return {
        "figures": dict(result.figures),
        "teacher": teacher is not None,
        "images": len(index),
        "epochs": settings.tune_epochs,
        "seconds": round(time.monotonic() - begin, 1),
    }
