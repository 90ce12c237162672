"""Comparison of several models: each has its own methods and folder, and one table combines all rows.

The models are loaded one at a time: first to check whether they can be compared, which takes seconds, then to be
measured, which can take hours.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..data.signature import compare_signatures, sign_images
from ..errors import BudgetError, InputError
from ..evaluation.flops import flops
from ..evaluation.latency import latency_settings
from ..evaluation.timings import describe_load
from ..files import read_text, write_file
from ..hub_names import parse_hub_name
from ..models.base import TokenModel
from ..models.inputs import check_dense
from ..models.saved import versions
from ..progress import line, note
from ..tasks import Task, find_task
from .compare import (
    CHART_FILES,
    FORMAT_VERSION,
    RESULT_FILE,
    TABLE_FILE,
    Comparison,
    check_alone,
    list_levels,
)
from .compare_rows import check_row, list_figures, select_measured, to_csv
from .fronts import COLUMNS, has_labels, place_rows, time_dense
from .images import CalibrationImages, choose_images
from .measuring import describe_views
from .methods import check_names, choose_methods, list_obstacles
from .pareto import draw_models
from .requests import CompareRequest

MODELS_CHARTS_EVERY = 60.0  # seconds; the charts of 224 rows take 3
LONGEST_NAME = 120  # maximum length of the default folder's name
# Maximum ratio of the dense model's latency next to one row to that next to another row, before latencies of several
# models are doubted: on an idle machine, medians of 9 rounds differ by a few percent.
DRIFT = 1.2


@dataclass(frozen=True)
class Candidate:
    """A model to compare.

    Attributes:
        name: its name in the table and of its folder. load: function that loads the model; it is called twice.
    """

    name: str
    load: Callable[[], TokenModel]


@dataclass(frozen=True)
class Survey:
    """Information about a model before it is measured.

    Attributes:
        about: its entry in compare.json. flops: GFLOPs of the dense model, by convention.
        task: what its outputs mean. classes: of its head.
        image_shape: (channels, height, width) of its images, (channels, frames, height, width) of videos.
        methods: names of the methods to compare.
    """

    about: dict[str, Any]
    flops: dict[str, float]
    task: Task
    classes: int
    image_shape: tuple[int | None, ...]
    methods: tuple[str, ...]

    @property
    def name(self) -> str:
        """The name of the model."""
        return self.about["name"]


def name_models(paths: Sequence[str | Path]) -> list[str]:
    """Return a distinct name for each checkpoint: its file name without the suffix, or its folder name.

    Duplicate names are prefixed with the parent folder; if they are still equal, a number is appended.

    Raises:
        InputError: a model is given twice.
    """
    models = [_identify(path) for path in paths]
    for number, model in enumerate(models):
        if model in models[:number]:
            raise InputError(f"{paths[number]} is given twice: expected different models")
    keys = [name.casefold() for _, _, name in models]  # some file systems are case-insensitive
    names = [
        f"{parent}-{name}" if keys.count(key) > 1 and parent else name
        for (_, parent, name), key in zip(models, keys, strict=True)
    ]
    used = {RESULT_FILE, TABLE_FILE, *CHART_FILES, ".", ".."}
    for number, name in enumerate(names):
        tries = (name if count == 1 else f"{name}-{count}" for count in range(1, len(names) + 2))
        names[number] = next(one for one in tries if one.casefold() not in used)
        used.add(names[number].casefold())
    return names


def _identify(path: str | Path) -> tuple[str, str, str]:
    """Return (identity, parent, name) of a model; the parent of a model on the Hub is its owner."""
    if (hub := parse_hub_name(path)) is not None:
        return str(hub), hub.repository.partition("/")[0], hub.title
    resolved = Path(path).resolve()
    return str(resolved), resolved.parent.name, resolved.name if resolved.is_dir() else resolved.stem


def name_folder(names: Sequence[str]) -> Path:
    """Return the default folder for a comparison of the models with these names."""
    joined = "+".join(names)
    return Path("compared", joined if len(joined) <= LONGEST_NAME else f"{names[0]}+{len(names) - 1}-others")


def compare_models(
    candidates: Sequence[Candidate],
    request: CompareRequest,
    folder: str | Path,
    *,
    command: str = "",
    force: bool = False,
    choose: Callable[[TokenModel], CalibrationImages] | None = None,
) -> dict[str, Any]:
    """Compare methods on several dense models with the same task and classes, on the same images.

    The folder gets a subfolder for each model, which is a complete comparison of that model, and files with the rows
    of all models. An interrupted comparison is resumed, and models can be added to it.

    Args:
        folder: output folder. command: recorded as the command that created it. force: overwrite the rows of an earlier
            comparison. choose: function from a model to the images for calibration and evaluation; None: chosen
            according to `request.data`.

    Returns:
        The whole comparison, a JSON object: `models` and `rows`, each with its `model`.

    Raises:
        InputError: models, images or a folder that cannot be used. BudgetError: a level out of a model's reach.
    """
    check_names(request.methods)
    check_alone()
    comparison = ModelsComparison(Path(folder), request, command, force, choose)
    return comparison.run(candidates)


class ModelsComparison:
    """Rows of several models, stored in one folder."""

    def __init__(
        self,
        folder: Path,
        request: CompareRequest,
        command: str,
        force: bool,
        choose: Callable[[TokenModel], CalibrationImages] | None,
    ):
        self.folder, self.request, self.command, self.force = folder, request, command, force
        self.choose = choose or (lambda model: choose_images(model, request.data))
        self.surveys: list[Survey] = []
        self.settings: dict[str, Any] = {}
        self.rows: dict[str, list[dict[str, Any]]] = {}
        self.warnings: dict[str, list[str]] = {}
        self.latency: dict[str, Any] | None = None
        self._drawn_at = time.monotonic()

    @property
    def task(self) -> Task:
        """The task of all models."""
        return self.surveys[0].task

    def run(self, candidates: Sequence[Candidate]) -> dict[str, Any]:
        """Survey each model, then measure each; return the whole comparison, a JSON object."""
        earlier = self._read_earlier([candidate.name for candidate in candidates])
        for candidate in candidates:
            self._add(candidate)
        for method in self.request.methods or ():
            if all(method in survey.about["left_out"] for survey in self.surveys):
                raise InputError(f"method {method!r} {self.surveys[0].about['left_out'][method]}: no model has it")
        self.rows = {name: earlier.get(name, []) for name in (survey.name for survey in self.surveys)}
        self.write()  # so that the comparison can be recognised if it is interrupted from now on
        for number, candidate in enumerate(candidates, 1):
            line(f"model {number} of {len(candidates)}: {candidate.name}")
            self._measure(candidate, self.surveys[number - 1])
        self.write(draw=True)
        return self.to_dict()

    def _read_earlier(self, names: Sequence[str]) -> dict[str, list[dict[str, Any]]]:
        """Return the rows of an earlier run, by model; those whose folder no longer exists are measured again."""
        file = self.folder / RESULT_FILE
        if not file.exists():
            if self.folder.exists() and (not self.folder.is_dir() or any(self.folder.iterdir())):
                raise InputError(f"{self.folder} exists but has no {RESULT_FILE}; choose another output")
            return {}
        try:
            value = json.loads(read_text(file))
            if "models" not in value:
                dict(value["settings"])
                raise InputError(f"{file} is a comparison of one model; choose another output")
            task, rows = find_task(value["task"]), {about["name"]: [] for about in value["models"]}
            for row in value["rows"]:
                check_row(row, task)
                rows[row["model"]].append(row)
        except InputError:
            raise
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise InputError(f"{file}: not a comparison of ssmcompress ({type(error).__name__} {error})") from error
        if self.force:
            return {}
        if missing := [name for name in rows if name not in names]:
            raise InputError(
                f"{file} also has {', '.join(missing)}; give that model too, choose another output, or pass "
                "`force=True` to start over"
            )
        return rows

    def _add(self, candidate: Candidate) -> None:
        """Survey a model, and check that it can be compared with the previous ones.

        Raises:
            InputError: it cannot; the message says what differs. BudgetError: a level is out of its reach.
        """
        model = candidate.load()
        with _naming(candidate.name):
            check_dense(model)
            model.check_views(self.request.measure.views)
            levels = list_levels(model, self.request)
            survey = survey_model(candidate.name, model, self.request)
            if self.surveys:
                self._check_like(self.surveys[0], survey)
            images = self.choose(model)
            if images.source.stand_in or images.measured.source.stand_in:
                raise InputError(
                    "comparing several models needs labels, which sample photographs do not have; give `data`"
                )
        content = {"calibration": sign_images(images.calibration), "data": sign_images(images.measured)}
        if not self.surveys:
            self.settings = {
                "calibration": {"name": images.source.name, "images": images.count},
                "data": {"name": images.measured.source.name, "images": len(images.measured.index)},
                "seed": self.request.data.seed,
                "dtype": self.request.measure.dtype,
                "levels": [level.asked or level.ratio for level in levels],
                "timing": self._describe_timing(model),
                "pictures": images.measured.pictures,
                **describe_views(model, self.request.measure),
                "content": content,
            }
        for key, use in (("calibration", "calibrated"), ("data", "measured")):
            if difference := compare_signatures(self.settings["content"][key], content[key]):
                advice = "; give `data`" if self.request.data.data is None else ""
                raise InputError(
                    f"{self.surveys[0].name} and {candidate.name} would be {use} on different images "
                    f"({difference}){advice}"
                )
        self.surveys.append(survey)

    def _describe_timing(self, model: TokenModel) -> dict[str, Any] | None:
        device = next(model.parameters()).device
        return latency_settings(device) if self.request.measure.latency else None

    def _check_like(self, first: Survey, other: Survey) -> None:
        """Raise an InputError unless two models can be compared."""
        if first.task is not other.task:
            raise InputError(f"a model for {other.task.title}, and {first.name} is for {first.task.title}")
        if first.classes != other.classes:
            raise InputError(
                f"{other.classes} classes, and {first.name} has {first.classes}: expected models with the same classes"
            )
        if len(first.image_shape) != len(other.image_shape):
            ours, theirs = ("images" if len(survey.image_shape) == 3 else "videos" for survey in (other, first))
            raise InputError(f"a model that takes {ours}, and {first.name} takes {theirs}")
        if not self.settings["pictures"] and first.image_shape != other.image_shape:
            ours, theirs = ("x".join(map(str, survey.image_shape)) for survey in (other, first))
            raise InputError(
                f"the images are prepared already, for {first.name} ({theirs}), and this model takes {ours}: give "
                "pictures, which each model prepares for itself"
            )

    def _measure(self, candidate: Candidate, survey: Survey) -> None:
        """Measure the missing rows of a model."""
        model = candidate.load()
        with _naming(candidate.name):
            levels, methods = list_levels(model, self.request), choose_methods(model, survey.methods)
            images = self.choose(model)
            folder = self.folder / candidate.name
            comparison = Comparison(model, folder, self.request, self.command, self.force, images)
            if comparison.settings["content"] != self.settings["content"]:
                raise InputError("the images have changed since the comparison was started: start it again")
            self._take(
                candidate.name, comparison.run(levels, methods, lambda value: self._go_on(candidate.name, value))
            )

    def _go_on(self, name: str, value: Mapping[str, Any]) -> None:
        self._take(name, value)
        self.write()

    def _take(self, name: str, value: Mapping[str, Any]) -> None:
        """Add the results of one model so far."""
        self.rows[name], self.warnings[name] = value["rows"], value["warnings"]
        if (latency := value["latency"]) is not None:
            loads = [v["load"] for v in (latency, self.latency or {}) if v.get("load") is not None]
            self.latency = {**latency, **describe_load(max(loads, default=None))}

    def list_rows(self) -> list[dict[str, Any]]:
        """Return the rows of all models, with their rank at equal cost."""
        return place_rows([{"model": name, **row} for name, found in self.rows.items() for row in found], self.task)

    def list_warnings(self, rows: Sequence[Mapping[str, Any]]) -> list[str]:
        """Return the warnings about each model, and about the comparison between models."""
        lines = [f"{name}: {text}" for name, found in self.warnings.items() for text in found]
        if rows and not has_labels(rows, self.task):
            lines.append("no labels: each model is compared with its own dense model, and not with the other models")
        for name in self.rows:
            dense = time_dense([row for row in rows if row["model"] == name])
            if dense and max(dense) > DRIFT * min(dense):
                lines.append(
                    f"{name}: its dense model took {min(dense):.3g} to {max(dense):.3g} ms next to its rows: the "
                    "machine was not quiet, and latencies are relative to the shortest of these"
                )
        return lines

    def to_dict(self) -> dict[str, Any]:
        """Return the comparison so far as a JSON object."""
        rows = self.list_rows()
        return {
            "format_version": FORMAT_VERSION,
            "task": self.task.name,
            "models": [{**survey.about, "dense": self._describe_dense(survey, rows)} for survey in self.surveys],
            "settings": self.settings,
            "rows": rows,
            "warnings": self.list_warnings(rows),
            "latency": self.latency,
            "command": self.command,
            "versions": versions(),
        }

    def _describe_dense(self, survey: Survey, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Return the figures of a dense model; None for those not measured yet."""
        dense = (row for row in rows if row["model"] == survey.name and row["method"] == "dense")
        row: Mapping[str, Any] = next(dense, {})
        names = [figure.name for figure in list_figures(self.task) if not figure.compared]
        measured = {name: row.get(name) for name in (*names, "latency_ms", "quiet_ms", "images_per_second")}
        return {"flops": survey.flops, **measured}

    def write(self, draw: bool = False) -> None:
        """Write the rows so far, and the charts every minute or on request."""
        self.folder.mkdir(parents=True, exist_ok=True)
        value = self.to_dict()
        files = {TABLE_FILE: to_csv(value["rows"], self.task, before=("model",), after=COLUMNS).encode()}
        rows = select_measured(value["rows"])
        if rows and (draw or time.monotonic() - self._drawn_at > MODELS_CHARTS_EVERY):
            charts = draw_models(rows, self.task, [name.rpartition(".")[2] for name in CHART_FILES])
            files |= dict(zip(CHART_FILES, charts.values(), strict=True))
            self._drawn_at = time.monotonic()
        files[RESULT_FILE] = json.dumps(value, indent=2).encode() + b"\n"
        for name, content in files.items():
            write_file(self.folder / name, content, force=True)


def survey_model(name: str, model: TokenModel, request: CompareRequest) -> Survey:
    """Return the information about a model before it is measured; log which requested methods it does not support."""
    left_out = list_obstacles(model, request.methods or ())
    for method, why in left_out.items():
        note(f"{name}: left out {method!r}, which {why}")
    names = None if request.methods is None else [method for method in request.methods if method not in left_out]
    methods = choose_methods(model, names, search=request.search, reconstruct=request.reconstruct)
    about = {
        "name": name,
        "folder": name,
        "architecture": model.architecture,
        "source": {"path": model.source.path, "sha256": model.source.sha256} if model.source is not None else None,
        "image_size": list(model.config.image_size),
        "depth": len(model.blocks),
        "tokens": model.length,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "stages": list(request.stages or model.default_stages()),
        "methods": [method.name for method in methods],
        "left_out": left_out,
    }
    shape, names = model.image_shape, tuple(method.name for method in methods)
    return Survey(about, flops(model), model.task, model.config.num_classes, shape, names)


@contextmanager
def _naming(name: str) -> Iterator[None]:
    """Prefix error messages raised in the body with the name of a model."""
    try:
        yield
    except (InputError, BudgetError) as error:
        raise type(error)(f"{name}: {error}") from error
