"""Measured results of a model, for each choice of calibration images."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from types import MappingProxyType
from typing import Any

from ssmcompress.jobs.compare import RESULT_FILE

from .reasons import read_reasons
from .rows import DENSE, name_row, read_rows
from .settings import Settings, read
from .speed import read_speed
from .subjects import Subject
from .tuning import read_tuned

TITLES = {"top1": "top-1", "miou": "mIoU"}


@dataclass(frozen=True)
class Found:
    """Measured results of a model.

    Attributes:
        rows: row name -> its figures by seed, as in `compare.json`.
        samples: number of calibration images; None: there are no rows yet.
        tuned, best, speed, reasons, inputs, cost: see `Settings.file_of`.
        elsewhere: whether all of it was measured with another cache, and is taken from the page that was there.
    """

    name: str
    rows: dict[str, dict[int, dict[str, Any]]]
    samples: int | None
    tuned: dict[str, Any]
    best: dict[str, Any]
    speed: dict[str, Any]
    reasons: dict[str, Any]
    inputs: dict[str, Any]
    cost: dict[str, Any]
    elsewhere: bool = False

    @property
    def dense(self) -> dict[str, Any]:
        """The row of the dense model."""
        return next(iter(self.rows[DENSE].values()))

    @property
    def figure(self) -> str:
        """The main figure: top-1 or mIoU."""
        return "miou" if "miou" in self.dense else "top1"

    def values(self, key: str, figure: str | None = None) -> list[float]:
        """Return a figure of a row, one value per seed; empty if it was not measured or is out of reach."""
        name = figure or self.figure
        rows = self.rows.get(key, {}).values()
        return [row[name] for row in rows if not row.get("failed") and row.get(name) is not None]

    def mean(self, key: str) -> float | None:
        """Return the mean of a row over the seeds."""
        values = self.values(key)
        return statistics.mean(values) if values else None

    def mean_flops(self, key: str, convention: str) -> float:
        """Return the GFLOPs of a measured row, averaged over the seeds."""
        return statistics.mean(row["flops"][convention] for row in self.rows[key].values() if not row.get("failed"))

    def tuned_value(self, key: str) -> float | None:
        """Return the figure of a row after fine-tuning."""
        return self.tuned.get(key, {}).get("figures", {}).get(self.figure)


def find(subject: Subject, settings: Settings, earlier: Mapping[str, Any] = MappingProxyType({})) -> Found:
    """Return the results of a model, skipping those measured with other models, images or options than now.

    A model whose checkpoint does not exist here keeps its results from an earlier page, so that models measured on
    several machines can share a page.

    Args:
        earlier: the results in an earlier page by the names of the models.
    """
    if subject.name in earlier and not subject.checkpoint.exists():
        return take_over(earlier[subject.name])
    rows: dict[str, dict[int, dict[str, Any]]] = {}
    for seed in settings.seeds:
        for row in read_rows(subject.name, seed, settings):
            key = DENSE if row["method"] == DENSE else name_row(row["method"], row["share"])
            rows.setdefault(key, {})[seed] = row
    name = subject.name
    tuned, best = read_tuned(name, settings), read_tuned(name, settings, "best")
    speed = read_speed(name, settings)
    reasons, inputs = (read_reasons(name, settings, kind) for kind in ("reasons", "inputs"))
    compared = read(settings.rows_of(name, settings.seeds[0]) / RESULT_FILE).get("settings", {})
    samples = compared.get("calibration", {}).get("images")
    return Found(name, rows, samples, tuned, best, speed, reasons, inputs, read(settings.file_of("cost", name)))


def take_over(value: Mapping[str, Any]) -> Found:
    """Return the results of a model from the JSON of an earlier page."""
    known = {f.name: value.get(f.name, {}) for f in fields(Found)}
    rows = {key: {int(seed): row for seed, row in seeds.items()} for key, seeds in known["rows"].items()}
    return Found(**known | {"rows": rows, "samples": value.get("samples"), "elsewhere": True})


def list_methods(found: Found, names: Iterable[str], share: float) -> list[tuple[str, str]]:
    """Return (method, row name) of the methods that were measured or are out of reach."""
    return [(name, key) for name in names if (key := name_row(name, share)) in found.rows]
