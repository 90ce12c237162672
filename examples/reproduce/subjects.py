"""The models in the tables, and the images that they are calibrated, fine-tuned and evaluated on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ssmcompress
from ssmcompress.files import is_model_folder
from ssmcompress.models import TokenModel
from ssmcompress.progress import line
from ssmcompress.tasks import SEGMENTATION

SUFFIXES = (".pth", ".pt", ".bin", ".ckpt", ".safetensors")


@dataclass(frozen=True)
class Subject:
    """A model and its images.

    Attributes:
        name: as shown in the tables. checkpoint: a file or folder that `ssmcompress.load` takes, with `options`.
        training: images for calibration and fine-tuning, as `ssmcompress.open_images` takes them, such as
            `imagenet:train`. test: images for evaluation.
        preprocessing: preprocessing settings that the checkpoint does not record.
        whole: whether the model is included in table 4, and in table 3 at further shares of the FLOPs, and its best
            row is fine-tuned on all images.
        draw: (number of a test image) -> the content of each of its pixels, (height, width) of 0 background,
            1 clutter and 2 the object; None: unknown.
    """

    name: str
    checkpoint: Path
    training: str
    test: str
    options: dict[str, Any] = field(default_factory=dict)
    preprocessing: dict[str, Any] = field(default_factory=dict)
    whole: bool = True
    draw: Callable[[int], Any] | None = None

    def load(self, device: str) -> TokenModel:
        """Return the dense model."""
        model = ssmcompress.load(self.checkpoint, device=device, **self.options)
        if self.preprocessing:
            model.preprocessing = model.preprocessing.changed(**self.preprocessing)
        return model


def find_models(folder: Path) -> list[Path]:
    """Return the checkpoints in a folder: files by their suffix, and folders written by ssmcompress.

    Raises:
        SystemExit: there are none.
    """
    if not folder.is_dir():
        raise SystemExit(f"{folder} is not a folder: --models expects one with checkpoints")
    found = [p for p in sorted(folder.iterdir()) if p.suffix in SUFFIXES or (p.is_dir() and is_model_folder(p))]
    if not found:
        raise SystemExit(f"{folder} has no checkpoint: expected {', '.join(SUFFIXES)} files or model folders")
    return found


def find_subjects(models: Path, imagenet: Path | None, scenes: Path | None) -> list[Subject]:
    """Return the checkpoints in a folder: classifiers with the images of `imagenet`, segmentation models with `scenes`.

    Both are folders with two splits, `train` and `val` or `training` and `validation`. Models without images and files
    that cannot be loaded are skipped with a message.

    Raises:
        SystemExit: there is no checkpoint, or two have the same name without suffix.
    """
    subjects: list[Subject] = []
    for checkpoint in find_models(models):
        try:
            task = ssmcompress.load(checkpoint).task
        except ssmcompress.InputError as error:
            line(f"{checkpoint} is left out: {error}")
            continue
        name = checkpoint.name if checkpoint.is_dir() else checkpoint.stem
        folder = scenes if task is SEGMENTATION else imagenet
        if folder is None:
            line(f"{checkpoint} is left out: a model for {task.name}, and no such images were given")
            continue
        if same := [subject.checkpoint.name for subject in subjects if subject.name == name]:
            raise SystemExit(
                f"{same[0]} and {checkpoint.name} in {models} would have the same name: rename one of them"
            )
        subjects.append(Subject(name, checkpoint, f"{folder}:train", f"{folder}:validation"))
    if not subjects:
        raise SystemExit(f"no checkpoint in {models} can be measured: the lines above say why")
    return subjects
