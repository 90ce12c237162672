"""The output folder of a job: its name, whether it can be written, and writing it atomically."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from .. import processes
from ..data.find import absolute_name
from ..files import MODEL_FILE, RECIPE_FILE, check_target
from ..hub_names import name_model
from ..models.base import TokenModel
from ..models.records import Source
from ..models.saved import save
from ..tasks import SEGMENTATION
from .charts import draw_axes
from .measuring import Measured
from .pictures import draw_kept_tokens, draw_segments, read_sample
from .report import REPORT_FILE
from .report_axes import AXES_FILE, has_axes
from .report_text import PICTURE_FILE, SEGMENTS_FILE, render_card
from .requests import DataOptions


@dataclass(frozen=True)
class Target:
    """A folder to write.

    Attributes:
        path: where. force: replace it if ssmcompress wrote it. command: recorded as the command that created it.
        recipe: content of a recipe file, or a function that creates it from the report; "": none.
        inside: the folder of a compressed model that is pruned further or fine-tuned.
    """

    path: Path
    force: bool = False
    command: str = ""
    recipe: str | Callable[[Mapping[str, Any]], str] = ""
    inside: Path | None = None

    def check(self, model: TokenModel, data: DataOptions) -> None:
        """Check whether the folder can be written, before the long work.

        Raises:
            InputError: it exists, cannot be written, or is or contains an input.
        """
        inputs = [data.data, data.eval_data, self.inside]
        if model.source is not None:
            inputs += [model.source.path, model.source.data]
        if processes.is_main():
            check_target(self.path, self.force, inputs, folder=MODEL_FILE)


def folder_name(checkpoint: str | Path, choices: Mapping[str, Any]) -> str:
    """Return the default folder name of a compressed model: `vim-r0.30-s2-4-6-seed1` for a checkpoint `vim`.

    Args:
        choices: label -> value (a text, a number or several), None to omit it.
    """

    def text(value: Any) -> str:
        if isinstance(value, float):
            return f"{value:.2f}" if round(value, 2) == value else f"{value:g}"
        return "-".join(map(text, value)) if isinstance(value, tuple) else str(value)

    return "-".join(
        [name_model(checkpoint), *(label + text(value) for label, value in choices.items() if value is not None)]
    )


def write_folder(
    target: Target, measured: Measured, report: Mapping[str, Any], files: Mapping[str, bytes] | None = None
) -> None:
    """Write the folder of `measured.models["pruned"]`: the model, its report, a model card and pictures.

    The pictures show kept tokens if the model drops any, segments for a segmentation model, and a chart of the axes if
    a search measured them.

    Only the main process writes. The evaluation images become the model's default images, unless they are samples.

    Args:
        files: further files, name -> content.
    """
    if not processes.is_main():
        return
    pruned, source = measured.models["pruned"], measured.images.source
    if not source.stand_in:
        pruned.source = replace(pruned.source or Source("", ""), data=absolute_name(source.name))
    segments = pruned.task.name == SEGMENTATION.name
    images, masks = read_sample(measured.images) if segments else (measured.sample, None)
    pictures = {PICTURE_FILE: draw_kept_tokens(pruned, images)} if pruned.plan.stages else {}
    if segments:
        models = {name: measured.models[name] for name in ("dense", "pruned") if measured.models[name] is not None}
        pictures[SEGMENTS_FILE] = draw_segments(models, images, masks, pruned.classes, pruned.palette)
    pictures |= {AXES_FILE: draw_axes(report["search"])} if has_axes(report) else {}
    card = render_card(report, target.path.name, pictures)
    recipe = target.recipe if isinstance(target.recipe, str) else target.recipe(report)
    content = {
        REPORT_FILE: json.dumps(report, indent=2).encode() + b"\n",
        "README.md": card.encode(errors="replace"),
        **pictures,
        **({RECIPE_FILE: recipe.encode()} if recipe else {}),
        **(files or {}),
    }
    save(pruned, target.path, extra=content, force=target.force)
