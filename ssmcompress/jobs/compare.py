"""Methods beside each other on one model and its images: every row the same code with another setting.

Each row is the plan of a method (`ssmcompress.jobs.methods`) that is calibrated, pruned, reconstructed where asked for, and
measured against the dense model's logits. Rows of one level leave the same FLOPs, or as few less as whole tokens allow.
"""

from __future__ import annotations

import csv
import io
import json
import time
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..compression.calibrate import gap_deltas
from ..compression.reconstruct import reconstruct
from ..compression.saliency import fit_probes
from ..data.batches import Batches
from ..errors import InputError
from ..evaluation.flops import flops
from ..evaluation.latency import latency, latency_settings
from ..evaluation.measure import Evaluation, autocast, measure
from ..files import write_file
from ..models.base import TokenModel
from ..models.checkpoint import versions
from ..models.rewrite import prune
from ..progress import line, track
from ..pruning.plan import Calibration, Plan, default_stages
from .methods import Level, Method, stages_of
from .pictures import pareto_chart
from .prune import Setup, calibration_and_measured, gap_source
from .search import Request, search_plan

FORMAT_VERSION = 1
RESULT_FILE, TABLE_FILE, CHART_FILES = "compare.json", "compare.csv", ("pareto.png", "pareto.svg")


class Comparison:
    """Rows of methods and levels on the same images, kept in a folder row by row."""

    def __init__(
        self, model: TokenModel, folder: Path, setup: Setup, stages: Sequence[int] | None, command: str, force: bool
    ):
        self.model, self.folder, self.setup, self.stages = model, folder, setup, stages
        self.calibration, self.measured = calibration_and_measured(model, setup)
        self.settings = {
            "model": {"sha256": model.source.sha256 if model.source else None, "depth": len(model.blocks)},
            "image_size": list(model.config.image_size),
            "calibration": {"name": self.calibration.source.name, "images": len(self.calibration.index)},
            "data": {"name": self.measured.source.name, "images": len(self.measured.index)},
            "stages": list(stages or default_stages(len(model.blocks))),
            "gap": gap_source(setup, self.calibration.source),
            "seed": setup.seed,
            "dtype": str(setup.dtype).removeprefix("torch."),
            "preprocessing": json.loads(json.dumps(vars(model.preprocessing))),
        }
        self.command = command
        self.rows: list[dict[str, Any]] = self._earlier(force)
        self._dense: Tensor | None = None
        self._image: Tensor | None = None
        self._deltas: tuple[Tensor, ...] | None = None
        self._probes: tuple[Tensor, ...] | None = None

    def _earlier(self, force: bool) -> list[dict[str, Any]]:
        """The rows that an earlier run of the same comparison left."""
        file = self.folder / RESULT_FILE
        if not file.exists():
            if self.folder.exists() and (not self.folder.is_dir() or any(self.folder.iterdir())):
                raise InputError(f"{self.folder} exists and holds no {RESULT_FILE}; choose another output")
            return []
        try:
            value = json.loads(file.read_text(encoding="utf-8"))
            settings, rows = value["settings"], value["rows"]
            known = [(row["method"], float(row["ratio"]), row["images"]) for row in rows]
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise InputError(f"{file}: not a comparison of ssmcompress ({type(error).__name__} {error})") from error
        if force:
            return []
        if settings != self.settings:
            wrong = next(k for k in {**settings, **self.settings} if settings.get(k) != self.settings.get(k))
            raise InputError(
                f"{file} was made with another {wrong}; choose another output, or pass `force=True` to start afresh"
            )
        if known:
            line(f"{len(known)} rows are there already")
        return rows

    def run(self, wanted: Sequence[Level], methods: Sequence[Method]) -> dict[str, Any]:
        """Measure what is not there yet, writing after every row; returns the whole comparison, a JSON value."""
        there = {(row["method"], row["ratio"]) for row in self.rows}
        work: list[tuple[Method | None, Level]] = [(None, Level(0.0, 1.0))]
        work += [(method, level) for level in wanted for method in methods]
        work = [(m, level) for m, level in work if (m.name if m else "dense", level.ratio) not in there]
        for method, level in track(work, "comparing", len(work)):
            self.rows.append(self.row(method, level))
            self.write()
        self.write()
        return self.value()

    def row(self, method: Method | None, level: Level) -> dict[str, Any]:
        """One method at one level; None: the dense model."""
        begun = time.perf_counter()
        row: dict[str, Any] = {"method": method.name if method else "dense", "ratio": level.ratio}
        try:
            model = self.built(method, level) if method else self.model
        except InputError as error:  # this method cannot do that; the others can
            return {**row, "images": None, "failed": str(error)}
        result, times, cost = self.evaluation(model), self.times(model), flops(model)
        return row | {
            "images": result.images,
            "top1": result.top1,
            "agreement": result.agreement if method else None,
            "kl": result.kl if method else None,
            "flops": cost,
            "flops_share": cost["full"] / flops(self.model)["full"],
            "latency_ms": times.get("row"),
            "latency_share": times["row"] / times["dense"] if times else None,
            "stages": [stage.to_dict() for stage in model.plan.stages] if model.plan else [],
            "seconds": round(time.perf_counter() - begun, 2),
        }

    def built(self, method: Method, level: Level) -> TokenModel:
        """The model of a row."""
        plan = self.plan(method, level)
        pruned = prune(self.model, replace(plan, calibration=self.calibrated(plan)))
        if method.reconstructed:
            if self.calibration.source.stand_in:
                raise InputError("reconstruction needs images of yours: give `data`")
            pruned = reconstruct(pruned, self.model, self.calibration, name=self.calibration.source.name)
        return pruned

    def plan(self, method: Method, level: Level) -> Plan:
        gap = self.settings["gap"] if method.alignment.scan else "bias"
        if method.searched and level.ratio > 0:
            request = Request(flops=level.flops, alignment=method.alignment, sensitivity=self.sensitivity(method))
            found = search_plan(self.model, request, replace(self.setup, reconstruct=method.reconstructed))
            write_file(self.sensitivity_file(method), found.sensitivity.to_json().encode(), force=True)
            return replace(found.plan, gap=gap)
        stages = stages_of(method, self.model, level, self.stages)
        return Plan(stages, method.alignment, gap, self.setup.seed).validate(len(self.model.blocks))

    def sensitivity_file(self, method: Method) -> Path:
        return self.folder / f"sensitivity{'-reconstructed' if method.reconstructed else ''}.json"

    def sensitivity(self, method: Method) -> str | None:
        file = self.sensitivity_file(method)
        return str(file) if file.is_file() else None

    def calibrated(self, plan: Plan) -> Calibration:
        """Mean deltas, once for all rows, and probes for those that ask for them."""
        if self._deltas is None:
            self._deltas = gap_deltas(self.model, self.calibration, self.settings["gap"])
        if self._probes is None and any(stage.importance == "saliency" for stage in plan.stages):
            self._probes = fit_probes(self.model, self.calibration, range(1, len(self.model.blocks)))
        name, images = self.settings["calibration"]["name"], self.settings["calibration"]["images"]
        return Calibration(name, images, self._deltas, probes=self._probes or ())

    def evaluation(self, model: TokenModel) -> Evaluation:
        if self._dense is None:
            self._dense = dense_logits(self.model, self.measured, self.setup.dtype)
        return measure({"dense": self._dense, "row": model}, self.measured, dtype=self.setup.dtype)["row"]

    def times(self, model: TokenModel) -> dict[str, float]:
        """Milliseconds of the dense model and of this one at batch 1, interleaved."""
        if not self.setup.measure_latency:
            return {}
        if self._image is None:
            self._image = next(iter(self.measured)).images[:1].to(next(model.parameters()).device)
        with autocast(self._image.device, self.setup.dtype):
            return latency({"dense": self.model, "row": model}, self._image)

    def value(self) -> dict[str, Any]:
        device = next(self.model.parameters()).device
        return {
            "format_version": FORMAT_VERSION,
            "settings": self.settings,
            "rows": self.rows,
            "latency": latency_settings(device) if self.setup.measure_latency else None,
            "command": self.command,
            "versions": versions(),
        }

    def write(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        files = {TABLE_FILE: to_csv(self.rows).encode()}
        files |= {name: pareto_chart(done(self.rows), name.rpartition(".")[2]) for name in CHART_FILES}
        files[RESULT_FILE] = json.dumps(self.value(), indent=2).encode() + b"\n"
        for name, content in files.items():
            write_file(self.folder / name, content, force=True)


@torch.no_grad()
def dense_logits(model: TokenModel, batches: Batches, dtype: torch.dtype) -> Tensor:
    """(images, classes) float32, in the order of the batches."""
    device, found = next(model.parameters()).device, []
    for batch in track(batches, "measuring the dense model", len(batches)):
        with autocast(device, dtype):
            found.append(model(batch.images.to(device)).float().cpu())
    return torch.cat(found)


def done(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows that were measured."""
    return [row for row in rows if not row.get("failed")]


COLUMNS = ("method", "ratio", "flops_full", "flops_share", "top1", "agreement", "kl", "latency_ms", "latency_share")


def to_csv(rows: Iterable[dict[str, Any]]) -> str:
    """One line a row: `COLUMNS`, images and stages."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*COLUMNS, "images", "stages", "failed"])
    for row in rows:
        known = {**row, "flops_full": (row.get("flops") or {}).get("full")}
        stages = " ".join(f"{s['after']}:{s['ratio']:.4f}:{s['importance']}" for s in row.get("stages", ()))
        writer.writerow([*(known.get(column) for column in COLUMNS), row["images"], stages, row.get("failed")])
    return text.getvalue()


def table(rows: Sequence[dict[str, Any]]) -> tuple[list[str], list[tuple[str, list[str]]]]:
    """(header, lines) for a person, by level and then from best to worst."""

    def cell(value: float | None, form: str) -> str:
        return "-" if value is None else form.format(value)

    header = ["", "ratio", "FLOPs left", "top-1", "same class as dense", "KL", "latency", "of dense"]
    labelled = any(row.get("top1") is not None for row in rows)

    def rank(row: dict[str, Any]) -> tuple[float, float]:
        quality = row.get("top1") if labelled else row.get("agreement")
        return row["ratio"], -(100.0 if quality is None and not row.get("failed") else quality or -1.0)

    lines = []
    for row in sorted(rows, key=rank):
        cells = [f"{row['ratio']:g}", cell(row.get("flops_share") and 100 * row["flops_share"], "{:.1f} %")]
        cells += [cell(row.get("top1"), "{:.2f} %"), cell(row.get("agreement"), "{:.2f} %")]
        cells += [cell(row.get("kl"), "{:.4f}"), cell(row.get("latency_ms"), "{:.1f} ms")]
        cells.append(cell(row.get("latency_share") and 100 * row["latency_share"], "{:.0f} %"))
        lines.append((row["method"] + (" (out of reach)" if row.get("failed") else ""), cells))
    return header, lines
