"""Rows without training: each method on each model, with several choices of the images to calibrate on."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import ssmcompress
from ssmcompress.evaluation.flops import share_of_whole
from ssmcompress.jobs.compare import RESULT_FILE, Comparison, list_levels
from ssmcompress.jobs.methods import Level, Method, choose_methods, list_obstacles
from ssmcompress.jobs.requests import CompareRequest, DataOptions, MeasureOptions
from ssmcompress.models import TokenModel
from ssmcompress.progress import line
from ssmcompress.tasks import SEGMENTATION

from .methods import list_names
from .settings import Settings, read
from .subjects import Subject


class KeptComparison(Comparison):
    """A comparison at one share of the FLOPs that also writes the model of each row, for what follows."""

    share = 1.0

    def build(self, method: Method, level: Level) -> TokenModel:
        model = super().build(method, level)
        ssmcompress.save(model, self.folder / "models" / name_row(method.name, self.share), force=True)
        return model

    def row(self, method: Method | None, level: Level) -> dict[str, Any]:
        return super().row(method, level) | {"share": self.share if method else 1.0}


def name_row(method: str, share: float) -> str:
    """Return the name of a row, which is that of the folder of its model."""
    return f"{re.sub('[^a-z0-9]+', '-', method.lower())}-{100 * share:g}"


def measure_rows(subject: Subject, settings: Settings) -> None:
    """Measure all rows of a model that are missing, with every seed."""
    model = subject.load(settings.device)
    for seed in settings.seeds:
        data = DataOptions(
            subject.training, subject.test, settings.samples, seed, settings.batch_size, settings.workers
        )
        request = CompareRequest(data=data, measure=MeasureOptions(latency=False))
        folder = settings.rows_of(subject.name, seed)
        comparison = KeptComparison(model, folder, request, settings.command, force=False)
        for share in settings.shares:
            names = list_names(model.task.name, share == settings.share)
            obstacles = list_obstacles(model, names)
            comparison.share = share
            methods = choose_methods(model, [name for name in names if name not in obstacles])
            comparison.run(find_levels(model, request, share) if methods else [], methods)


def find_levels(model: TokenModel, request: CompareRequest, share: float) -> list[Level]:
    """Return the level of a share of the FLOPs, of a segmentation model's backbone where it has neck and head.

    A line says so where dropping tokens at the default layers does not reach it.
    """
    asked = share_of_whole(model, share) if model.task is SEGMENTATION else share
    try:
        return list_levels(model, replace(request, flops=(asked,)))
    except ssmcompress.BudgetError as error:
        line(f"{share:.0%} of the FLOPs is left out: {error}")
        return []


def read_rows(name: str, seed: int, settings: Settings) -> list[dict[str, Any]]:
    """Return the rows of a model that were measured so far with a seed, the dense model first."""
    return read(settings.rows_of(name, seed) / RESULT_FILE).get("rows", [])


def find_kept(name: str, settings: Settings) -> Iterator[tuple[str, Path]]:
    """Yield name and model folder of each row of the first seed that was not out of reach."""
    seed = settings.seeds[0]
    for row in read_rows(name, seed, settings):
        key = name_row(row["method"], row["share"])
        if row["method"] != "dense" and not row.get("failed"):
            yield key, settings.rows_of(name, seed) / "models" / key
