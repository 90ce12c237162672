"""Rows without training: each method on each model, with several choices of calibration images."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import ssmcompress
from ssmcompress.evaluation.flops import share_of_whole
from ssmcompress.files import sha256
from ssmcompress.jobs.compare import RESULT_FILE, Comparison, list_levels
from ssmcompress.jobs.compare_axes import IMAGE
from ssmcompress.jobs.methods import METHODS, Level, Method, choose_methods, list_obstacles
from ssmcompress.jobs.requests import CompareRequest, DataOptions, MeasureOptions
from ssmcompress.models import TokenModel
from ssmcompress.models.saved import WEIGHTS_FILE
from ssmcompress.progress import line
from ssmcompress.pruning.importance import IMPORTANCES
from ssmcompress.tasks import SEGMENTATION

from .methods import list_names
from .settings import Settings, read
from .subjects import Subject

DENSE = "dense"
# Settings of a comparison that other figures of its models depend on as well.
COMMON = ("weights", "image_size", "preprocessing", "content", "seed")


class KeptComparison(Comparison):
    """A comparison at one share of the FLOPs that also saves the model of each row for the later parts.

    Attributes:
        share: of the FLOPs. same: rows of another seed with identical results, by method and share.
    """

    share = 1.0
    same: Mapping[tuple[str, float], dict[str, Any]] = MappingProxyType({})

    def build(self, method: Method, level: Level) -> TokenModel:
        model = super().build(method, level)
        ssmcompress.save(model, self.folder / "models" / name_row(method.name, self.share), force=True)
        return model

    def row(self, method: Method | None, level: Level) -> dict[str, Any]:
        key = (method.name, self.share) if method else (DENSE, 1.0)
        return self.same.get(key) or super().row(method, level) | {"share": key[1]}


def depends_on_seed(name: str) -> bool:
    """Return whether the model of a method depends on the calibration images or on random choices."""
    if name == DENSE:
        return False
    method = next(method for method in METHODS if method.name == name)
    metric = IMPORTANCES[method.importance]
    fitted = method.reconstructed or method.searched or method.mapped or method.alignment.scan or metric.probe
    return fitted or metric.draw or method.axis not in (None, IMAGE)


def name_row(method: str, share: float) -> str:
    """Return the name of a row, which is also the name of its model folder."""
    return f"{re.sub('[^a-z0-9]+', '-', method.lower())}-{100 * share:g}"


def measure_rows(subject: Subject, settings: Settings) -> None:
    """Measure all missing rows of a model with every seed."""
    model = subject.load(settings.device)
    for seed in settings.seeds:
        data = DataOptions(
            subject.training, subject.test, settings.samples, seed, settings.batch_size, settings.workers
        )
        request = CompareRequest(data=data, measure=MeasureOptions(latency=False))
        folder = settings.rows_of(subject.name, seed)
        try:
            comparison = KeptComparison(model, folder, request, settings.command, force=False)
        except ssmcompress.InputError as error:
            advice = f"remove {folder} to measure its rows again, or use another --cache"
            raise ssmcompress.InputError(f"{error}. Here: {advice}") from error
        if not comparison.measured.source.labelled:
            raise ssmcompress.InputError(f"{subject.test} has no labels, so there is nothing to measure")
        if seed != settings.seeds[0]:
            first = read_rows(subject.name, settings.seeds[0], settings)
            comparison.same = {(r["method"], r["share"]): r for r in first if not depends_on_seed(r["method"])}
        for share in settings.shares:
            names = list_names(model.task.name, share == settings.share, subject.whole)
            obstacles = list_obstacles(model, names)
            comparison.share = share
            methods = choose_methods(model, [name for name in names if name not in obstacles])
            comparison.run(find_levels(model, request, share) if methods else [], methods)


def find_levels(model: TokenModel, request: CompareRequest, share: float) -> list[Level]:
    """Return the level of a share of the FLOPs; for a segmentation model with neck and head, of its backbone's FLOPs.

    Logs a line if dropping tokens at the default layers does not reach it.
    """
    asked = share_of_whole(model, share) if model.task is SEGMENTATION else share
    try:
        return list_levels(model, replace(request, flops=(asked,)))
    except ssmcompress.BudgetError as error:
        line(f"{share:.0%} of the FLOPs is skipped: {error}")
        return []


def read_rows(name: str, seed: int, settings: Settings) -> list[dict[str, Any]]:
    """Return the rows of a model measured so far with a seed, the dense model first."""
    return read(settings.rows_of(name, seed) / RESULT_FILE).get("rows", [])


def find_kept(name: str, settings: Settings, share: float | None = None) -> Iterator[tuple[str, Path]]:
    """Yield name and model folder of each row of the first seed that is within reach; optionally at one share only."""
    seed = settings.seeds[0]
    for row in read_rows(name, seed, settings):
        key = name_row(row["method"], row["share"])
        if row["method"] != DENSE and not row.get("failed") and share in (None, row["share"]):
            yield key, settings.rows_of(name, seed) / "models" / key


def identify(name: str, settings: Settings, key: str, **more: Any) -> dict[str, Any]:
    """Return, as a JSON object, what figures of a row's model of the first seed depend on.

    Figures stored with a different value are outdated: they belong to another model, other images or other options.

    Args:
        name: of the dense model. key: name of the row. more: options that the figures depend on.
    """
    folder = settings.rows_of(name, settings.seeds[0])
    compared = read(folder / RESULT_FILE).get("settings", {})
    model = None if key == DENSE else digest(folder / "models" / key / WEIGHTS_FILE)
    return {"rows": {k: compared.get(k) for k in COMMON}, "model": model, **more}


def digest(file: Path) -> str | None:
    """Return the SHA-256 of a file; None if there is none."""
    return _digest(file, file.stat().st_mtime_ns) if file.exists() else None


@functools.cache
def _digest(file: Path, changed: int) -> str:
    return sha256(file)
