"""Comparison of methods on one model and its images: every row runs the same code with another list of steps.

A row is the plan of a method (`ssmcompress.jobs.methods`), applied by the steps of the method and compared with the
dense model's logits. Rows of one level leave the same FLOPs, up to rounding down to whole tokens, states, channels,
layers or patches. All shares are of the FLOPs of the dense model as published, at its own image size.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from .. import processes
from ..compression.calibrate import gap_deltas
from ..compression.saliency import fit_probes
from ..compression.smaller_image import resize_batches
from ..compression.trim.trims import find_trims
from ..data.batches import Batches
from ..data.signature import sign_images
from ..errors import BudgetError, InputError
from ..evaluation.flops import flops
from ..evaluation.latency import latency_settings, time_models
from ..evaluation.measure import Logits, compute_logits, measure, run_in
from ..evaluation.timings import Timings, describe_load
from ..files import read_text, write_file
from ..models.base import TokenModel
from ..models.fingerprint import fingerprint
from ..models.inputs import check_dense
from ..models.learnt import count_common
from ..models.saved import versions
from ..progress import line, track
from ..pruning.plan import Calibration, Plan
from ..tasks import Evaluation
from .compare_axes import AxisModels
from .compare_rows import (
    check_row,
    describe_differences,
    is_row_of,
    list_figures,
    rename_rows,
    select_measured,
    to_csv,
)
from .doubts import Subject, doubt_accuracy
from .images import CalibrationImages, choose_images
from .measuring import add_views, describe_views
from .methods import Level, Method, choose_methods, make_levels, ratio_for_flops, stages_for_level
from .pareto import draw_pareto
from .pipeline import Context, run_steps
from .prune import mark_unchanged
from .report_text import describe_overlap
from .requests import CompareRequest
from .search import SearchRequest, search_plan

# 2: the row "smaller image" keeps the classifier; "smaller image, reconstructed" is what it was before.
FORMAT_VERSION = 2
NOT_COMPARABLE = "prepared images cannot be compared with pictures"
CHARTS_EVERY = 10.0  # seconds
RESULT_FILE, TABLE_FILE, CHART_FILES = "compare.json", "compare.csv", ("pareto.png", "pareto.svg")


def compare_methods(
    model: TokenModel,
    request: CompareRequest,
    folder: str | Path,
    *,
    command: str = "",
    force: bool = False,
    images: CalibrationImages | None = None,
) -> dict[str, Any]:
    """Compare methods on a dense model, row by row, in a folder from which an interrupted comparison can be resumed.

    Args:
        folder: output folder. command: recorded as the command that created it. force: overwrite the rows of an earlier
            comparison. images: images for calibration and evaluation; None: chosen according to `request.data`.

    Returns:
        The whole comparison, a JSON object.

    Raises:
        InputError: a pruned model, images or a folder that cannot be used.
    """
    check_dense(model)
    model.check_views(request.measure.views)
    methods = choose_methods(model, request.methods, search=request.search, reconstruct=request.reconstruct)
    check_alone()
    levels = list_levels(model, request)
    comparison = Comparison(model, Path(folder), request, command, force, images)
    return comparison.run(levels, methods)


def check_alone() -> None:
    """Raise an InputError if there are several processes."""
    if processes.count() > 1:
        raise InputError("compare runs in one process: start it without a launcher")


def list_levels(model: TokenModel, request: CompareRequest) -> list[Level]:
    """Return the levels of a comparison for a model.

    Raises:
        BudgetError: FLOPs that it cannot reach. InputError: a layer that it does not have.
    """
    if request.flops is None:
        return make_levels(model, request.stages, request.ratios)
    ratios = [ratio_for_flops(model, request.stages, share) for share in request.flops]
    levels = make_levels(model, request.stages, ratios)
    return [replace(level, asked=share) for level, share in zip(levels, request.flops, strict=True)]


class Comparison:
    """Rows of methods and levels on the same images, saved to a folder row by row."""

    def __init__(
        self,
        model: TokenModel,
        folder: Path,
        request: CompareRequest,
        command: str,
        force: bool,
        images: CalibrationImages | None = None,
    ):
        self.model, self.folder, self.request, self.stages = model, folder, request, request.stages
        self.task = model.task
        self.data, self.options = request.data, request.measure
        self.images = images or choose_images(model, request.data)
        self.calibration, self.measured = self.images.calibration, self.images.measured
        self.settings = {
            "model": {"sha256": model.source.sha256 if model.source else None, "depth": len(model.blocks)},
            "weights": fingerprint(model),
            "image_size": list(model.config.image_size),
            "calibration": {"name": self.calibration.source.name, "images": len(self.calibration.index)},
            "data": {"name": self.measured.source.name, "images": len(self.measured.index)},
            "stages": list(request.stages or model.default_stages()),
            "gap": self.images.gap_source(request.gap),
            "seed": request.data.seed,
            "dtype": request.measure.dtype,
            "preprocessing": {k: v for k, v in model.preprocessing.to_dict().items() if k != "assumed"},
        }
        device = next(model.parameters()).device
        self.settings |= describe_views(model, request.measure)
        self.settings["timing"] = latency_settings(device) if request.measure.latency else None
        self.settings["content"] = {
            "calibration": sign_images(self.calibration),
            "data": sign_images(self.measured),
        }
        self.command = command
        self._overlap: int | None = None
        self.rows: list[dict[str, Any]] = self._read_rows(force)
        self._drawn_at = 0.0
        self._load: float | None = None
        self._dense: Logits | None = None
        self._image: Tensor | None = None
        self._deltas: tuple[Tensor, ...] | None = None
        self._probes: tuple[Tensor, ...] | None = None
        sensitivity = folder / "sensitivity-axes.json"
        self._axes = AxisModels(model, self.images, request.data, self.settings["gap"], sensitivity)

    def _read_rows(self, force: bool) -> list[dict[str, Any]]:
        """Read the rows of an earlier run of the same comparison."""
        file = self.folder / RESULT_FILE
        if not file.exists():
            if self.folder.exists() and (not self.folder.is_dir() or any(self.folder.iterdir())):
                raise InputError(f"{self.folder} exists but has no {RESULT_FILE}; choose another output")
            return []
        try:
            value = json.loads(read_text(file))
            several = "models" in value
            settings, rows = dict(value["settings"]), rename_rows(value["rows"], value.get("format_version"))
            differences = [] if force or several else describe_differences(settings, self.settings)
            for row in rows:
                check_row(row, self.task)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise InputError(f"{file}: not a comparison of ssmcompress ({type(error).__name__} {error})") from error
        if several:
            raise InputError(f"{file} is a comparison of several models; choose another output, or a folder in it")
        if force:
            for earlier in self.folder.glob("sensitivity*.json"):  # of the run that is replaced
                earlier.unlink()
            return []
        if differences:
            raise InputError(
                f"{file} was made with {', '.join(differences)}; choose another output, or pass `force=True` to "
                "start over"
            )
        self._overlap = value.get("overlap")
        if rows:
            line(f"{len(rows)} rows are already done")
        return rows

    def run(
        self,
        levels: Sequence[Level],
        methods: Sequence[Method],
        after_each: Callable[[dict[str, Any]], None] = lambda value: None,
    ) -> dict[str, Any]:
        """Measure the missing rows, writing after each; return the whole comparison, a JSON object.

        Args:
            after_each: called with the comparison so far after each measured row.
        """
        work: list[tuple[Method | None, Level]] = [(None, Level(0.0, 1.0))]
        work += [(method, level) for level in levels for method in methods]
        work = [(m, level) for m, level in work if not any(is_row_of(row, m, level) for row in self.rows)]
        for method, level in track(work, "comparing", len(work)):
            self.rows.append(self.row(method, level))
            self.write()
            after_each(self.to_dict())
        self.write(charts=True)
        return self.to_dict()

    def row(self, method: Method | None, level: Level) -> dict[str, Any]:
        """Measure one method at one level; None: the dense model."""
        begin = time.perf_counter()
        row: dict[str, Any] = {"method": method.name if method else "dense", "ratio": level.ratio}
        row |= {"budget": level.budget} if method else {}
        try:
            model = self.build(method, level) if method else self.model
        except (InputError, BudgetError) as error:  # the method does not support this; the others may
            return {**row, "images": None, "failed": str(error)}
        result, times, cost = self.evaluate(model), self.time(model), flops(model)
        figures = {
            figure.name: result.figures[figure.name] if method or not figure.compared else None
            for figure in list_figures(self.task)
        }
        row |= {
            "images": result.images,
            **figures,
            "flops": cost,
            "flops_share": cost["full"] / flops(self.model)["full"],
            "latency_ms": times.median("row") if times else None,
            "latency_quartiles_ms": times.quartiles("row") if times else None,
            "latency_share": times.median("row") / times.median("dense") if times else None,
            "latency_within_noise": times.within_noise("dense", "row") if times and method else None,
            "stages": [stage.to_dict() for stage in model.plan.stages] if model.plan else [],
            "seconds": round(time.perf_counter() - begin, 2),
        }
        if trims := find_trims(model.steps).to_dict():
            row["trims"] = trims
        if not self._has_dense_size(model):
            row["image_size"] = list(model.config.image_size)
        return row

    def build(self, method: Method, level: Level) -> TokenModel:
        """Return the model of a row."""
        if method.axis is not None:
            return self._axes.build(method.axis, level.budget, method.reconstructed)
        plan = self.plan(method, level)
        if (method.reconstructed or method.mapped) and self.calibration.source.stand_in:
            raise InputError("reconstruction needs images of your own")
        if not plan.stages:  # the model is already within the budget of a search
            return mark_unchanged(self.model)
        plan = replace(plan, calibration=self.calibrate(plan))
        context = Context(self.model, self.calibration, seed=self.data.seed)
        *_, model = run_steps(method.steps(plan), context, keep=()).values()
        return model

    def plan(self, method: Method, level: Level) -> Plan:
        """Return the plan with which a method reaches a level."""
        gap = self.settings["gap"] if method.alignment.scan else "bias"
        if method.searched and level.ratio > 0:
            file = self.sensitivity_file(method)
            earlier = str(file) if file.is_file() else None
            request = SearchRequest(flops=level.flops, alignment=method.alignment, sensitivity=earlier)
            options = {"gap": self.settings["gap"], "reconstruct": method.reconstructed}
            result = search_plan(self.model, request, self.images, self.data, **options)
            write_file(file, result.sensitivity.to_json().encode(), force=True)
            return replace(result.plan, gap=gap)
        stages = stages_for_level(method, self.model, level, self.stages)
        return self.model.check_plan(Plan(stages, method.alignment, gap, self.data.seed))

    def sensitivity_file(self, method: Method) -> Path:
        """Return the file in which the search of a method saves its measurements."""
        return self.folder / f"sensitivity{'-reconstructed' if method.reconstructed else ''}.json"

    def calibrate(self, plan: Plan) -> Calibration:
        """Return the mean deltas and, for plans that need them, the probes; both are computed once for all rows."""
        if self._deltas is None:
            self._deltas = gap_deltas(self.model, self.calibration, self.settings["gap"])
        if self._probes is None and plan.probed_layers:
            self._probes = fit_probes(self.model, self.calibration, range(1, len(self.model.blocks)))
        name, images = self.settings["calibration"]["name"], self.settings["calibration"]["images"]
        return Calibration(name, images, self._deltas, probes=self._probes or ())

    def evaluate(self, model: TokenModel) -> Evaluation:
        if self.model.reads_levels:  # outputs per pixel are too large to store
            models = {"dense": self.model, "row": model}
            return measure(models, self.measured, dtype=self.options.torch_dtype)["row"]
        if self._dense is None:
            viewed = add_views(self.model, self.measured, self.options)
            self._dense = compute_logits(self.model, viewed, self.options.torch_dtype)
        dense = self._dense if self._has_dense_size(model) else _InOrder(self._dense.values, self._dense.samples)
        models, images = {"dense": dense, "row": model}, add_views(model, self._images_for(model), self.options)
        result = measure(models, images, dtype=self.options.torch_dtype)["row"]
        if result.images != len(dense.values):
            raise InputError("the images cannot be read a second time")
        return result

    def _has_dense_size(self, model: TokenModel) -> bool:
        """Return whether a model takes images of the dense model's size."""
        return model.config.image_size == self.model.config.image_size

    def _images_for(self, model: TokenModel) -> Batches:
        """Return the evaluation images at the model's input size."""
        return self.measured if self._has_dense_size(model) else resize_batches(self.measured, self.model, model)

    def time(self, model: TokenModel) -> Timings | None:
        """Time this model and the dense one at batch size 1, interleaved."""
        if not self.options.latency:
            return None
        if self._image is None:
            self._image = next(iter(self.measured)).images[:1].to(next(model.parameters()).device)
        dtype = self.options.torch_dtype
        run = run_in(model, dtype)
        if not self._has_dense_size(model):
            image = next(iter(self._images_for(model))).images[:1].to(self._image.device)
            run = _WithImage(run, image)
        times = time_models({"dense": run_in(self.model, dtype), "row": run}, self._image)
        if times.load is not None:
            self._load = max(times.load, self._load or 0.0)
        return times

    def warnings(self) -> list[str]:
        """Return warnings if the dense model is at chance, or if calibration and evaluation images may overlap."""
        dense = next((row for row in self.rows if row["method"] == "dense"), None)
        subject = Subject.of(self.model, self.measured.source, len(self.measured.index))
        comparable = self.calibration.pictures == self.measured.pictures
        overlap = self._overlap or 0 if comparable else None
        shared = describe_overlap({"images": len(self.measured.index), "overlap": overlap}, NOT_COMPARABLE)
        figures = {figure.name: dense[figure.name] for figure in list_figures(self.task)} if dense else {}
        result = Evaluation(dense["images"], True, **figures) if dense else None
        doubts = doubt_accuracy("the dense model", result, subject)
        return [*doubts, shared.removeprefix("warning: ")] if shared else doubts

    def _count_overlap(self) -> int | None:
        """Return how many evaluation images were used for calibration; None before both were read."""
        if self.calibration.digests.any() and self.measured.digests.any():
            self._overlap = count_common(self.calibration, self.measured)
        return self._overlap

    def to_dict(self) -> dict[str, Any]:
        device = next(self.model.parameters()).device
        return {
            "format_version": FORMAT_VERSION,
            "task": self.task.name,
            "settings": self.settings,
            "overlap": self._count_overlap(),
            "rows": self.rows,
            "warnings": self.warnings(),
            "latency": {**latency_settings(device), **describe_load(self._load)} if self.options.latency else None,
            "command": self.command,
            "versions": versions(),
        }

    def write(self, charts: bool = False) -> None:
        """Write the rows so far; charts take 0.3 s, so they are written every few seconds or on request."""
        self.folder.mkdir(parents=True, exist_ok=True)
        files = {TABLE_FILE: to_csv(self.rows, self.task).encode()}
        if charts or (len(self.rows) > 1 and time.monotonic() - self._drawn_at > CHARTS_EVERY):
            rows = select_measured(self.rows)
            files |= {name: draw_pareto(rows, name.rpartition(".")[2], self.task) for name in CHART_FILES}
            self._drawn_at = time.monotonic()
        files[RESULT_FILE] = json.dumps(self.to_dict(), indent=2).encode() + b"\n"
        for name, content in files.items():
            write_file(self.folder / name, content, force=True)


@dataclass(frozen=True)
class _InOrder(Logits):
    """Logits matched by order, for images that cannot be identified because they come at another size."""

    def of(self, images: Tensor, start: int) -> Tensor:
        return self.values[start : start + len(images)]


class _WithImage(nn.Module):
    """A model that is run on a fixed image of its own size, regardless of its input."""

    def __init__(self, model: nn.Module, image: Tensor):
        super().__init__()
        self.model, self.image = model, image

    def forward(self, _: Tensor) -> Tensor:
        return self.model(self.image)
