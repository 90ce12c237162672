"""Rows after fine-tuning: the models of the rows without training, each trained with the same short recipe."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import ssmcompress
from ssmcompress.compression.finetune.state import StateFile, remove_state
from ssmcompress.data.batches import sample_indices
from ssmcompress.files import MODEL_FILE
from ssmcompress.models import TokenModel
from ssmcompress.progress import line

from .rows import DENSE, find_kept, identify, name_row, read_rows
from .settings import Settings, read, write
from .subjects import Subject

# Recipe of the best row, where it differs from the defaults. The row has lost so little accuracy that labels and large
# steps move it away from the dense model. The Vim of the small-scale setup (84.66 % top-1, dense 85.04) had after two
# epochs: with the defaults 84.50 (60,000 images), with this learning rate alone 84.54 (6,000), with both settings
# 84.80, and with 5e-4 and the teacher 84.70.
BEST = {"lr": 2e-4, "teacher": 1.0}


class Run(NamedTuple):
    """Fine-tuning of the model in `folder` (None: the dense one) on `count` images (None: all).

    Its figures are stored in `file` under `key`, together with what they depend on, `of`.
    """

    file: Path
    key: str
    folder: Path | None
    count: int | None
    of: dict[str, Any]
    recipe: ssmcompress.Recipe


def read_tuned(name: str, settings: Settings, kind: str = "tuned") -> dict[str, Any]:
    """Return the figures of a model after fine-tuning, by row name, for the rows that have not changed.

    Args:
        kind: "tuned", or "best" for fine-tuning on all images.
    """
    found = read(settings.file_of(kind, name))
    return {key: value for key, value in found.items() if value.get("of") == identify_run(name, settings, key, kind)}


def identify_run(name: str, settings: Settings, key: str, kind: str) -> dict[str, Any]:
    """Return what the figures of a row after fine-tuning depend on."""
    if kind == "tuned":
        return identify(name, settings, key, tune_images=settings.tune_images, epochs=settings.tune_epochs)
    return identify(name, settings, key, best_images=settings.best_images, epochs=settings.tune_epochs, recipe=BEST)


def tune_rows(subject: Subject, settings: Settings) -> None:
    """Fine-tune and evaluate the first seed's models at the main share of the FLOPs that were not fine-tuned yet.

    The dense model is fine-tuned as well, to separate its gain from the effect of a method.
    """
    file = settings.file_of("tuned", subject.name)
    done = read_tuned(subject.name, settings)
    dense = subject.load(settings.device)
    work: list[tuple[str, Path | None]] = [(DENSE, None), *find_kept(subject.name, settings, settings.share)]
    for number, (key, folder) in enumerate(work, 1):
        if key in done:
            continue
        line(f"{subject.name}: fine-tuning {key}, {number} of {len(work)}")
        of = identify_run(subject.name, settings, key, "tuned")
        recipe = ssmcompress.Recipe(epochs=settings.tune_epochs)
        tune(dense, subject, settings, Run(file, key, folder, settings.tune_images, of, recipe))


def tune_best(subject: Subject, settings: Settings) -> None:
    """Fine-tune the best classifier of the first seed at the main share of the FLOPs on all training images.

    Only for models that are in all tables, since this takes many times the images of a row.
    """
    if not subject.whole:
        return
    file = settings.file_of("best", subject.name)
    key = find_best(read_rows(subject.name, settings.seeds[0], settings), settings.share)
    if key is None or key in read_tuned(subject.name, settings, "best"):
        return
    line(f"{subject.name}: fine-tuning {key} on all images")
    dense = subject.load(settings.device)
    folder = dict(find_kept(subject.name, settings))[key]
    of = identify_run(subject.name, settings, key, "best")
    recipe = ssmcompress.Recipe(epochs=settings.tune_epochs, **BEST)
    tune(dense, subject, settings, Run(file, key, folder, settings.best_images, of, recipe))


def find_best(rows: Iterable[dict[str, Any]], share: float) -> str | None:
    """Return the name of the most accurate row of a classifier at a share of the FLOPs; None if there is none."""
    measured = [row for row in rows if row["share"] == share and row.get("top1") is not None]
    best = max(measured, key=lambda row: row["top1"], default=None)
    return None if best is None else name_row(best["method"], share)


def tune(dense: TokenModel, subject: Subject, settings: Settings, run: Run) -> None:
    """Fine-tune a model and store its figures; an interrupted run is resumed.

    A model with smaller images has no teacher, since the dense model does not accept its images.
    """
    model = ssmcompress.load(run.folder, device=settings.device) if run.folder else ssmcompress.prune(dense, ratio=0.0)
    images = dense.find_images(subject.training)
    index, _ = sample_indices(len(images), run.count or len(images), settings.seeds[0])
    batches = ssmcompress.Batches(images, model.transform(), index, settings.batch_size, settings.workers)
    teacher = dense if model.dense_config == dense.config else None
    # The name includes everything that may differ between runs of the script, so a state is never mixed up.
    state = run.file.parent / f"{subject.name}-{run.key}-{len(index)}-{settings.tune_epochs}-{settings.seeds[0]}.pt"
    begins_with = run.folder / MODEL_FILE if run.folder else subject.checkpoint
    if state.exists() and state.stat().st_mtime < begins_with.stat().st_mtime:
        remove_state(state)  # it belongs to an outdated model
    tuned = ssmcompress.finetune(
        model, batches, dense=teacher, recipe=run.recipe, seed=settings.seeds[0], state=StateFile(state, resume=True)
    )
    test = dense.find_images(subject.test)
    every = range(len(test))
    result = ssmcompress.evaluate(
        tuned.model, ssmcompress.Batches(test, model.transform(), every, settings.batch_size, settings.workers)
    )
    figures = {
        "of": run.of,
        "figures": dict(result.figures),
        "teacher": teacher is not None,
        "images": len(index),
        "epochs": settings.tune_epochs,
    }
    write(run.file, read(run.file) | {run.key: figures})
    remove_state(state)
