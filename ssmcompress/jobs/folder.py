"""The folder that a job writes: its name, whether it can be written, and writing it whole or not at all."""

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
        path: where. force: replace it if ssmcompress wrote it. command: recorded as how it was made.
        recipe: content of a file by which the folder can be made again, or what makes it from the report; "": there is
            none.
        inside: the folder that a compressed model was read from, to be pruned further or fine-tuned.
    """

    path: Path
    force: bool = False
    command: str = ""
    recipe: str | Callable[[Mapping[str, Any]], str] = ""
    inside: Path | None = None

    def check(self, model: TokenModel, data: DataOptions) -> None:
        """Find out before the long work whether the folder can be written.

        Raises:
            InputError: it exists, cannot be written, or is or holds what is read.
        """
        inputs = [data.data, data.eval_data, self.inside]
        if model.source is not None:
            inputs += [model.source.path, model.source.data]
        if processes.is_main():
            check_target(self.path, self.force, inputs, folder=MODEL_FILE)


def folder_name(checkpoint: str | Path, choices: Mapping[str, Any]) -> str:
    """The default name of a compressed model: the checkpoint's, then what was chosen: `vim-r0.30-s2-4-6-seed1`.

    Args:
        choices: label -> what was chosen (a text, a number or several), None where nothing was.
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

    There is a picture of kept tokens if the model drops any, one of segments if it is for segmentation, and a chart of
    the axes if a search measured them.

    Only the main process writes. The model then names the images it was measured on as its own, unless they stood in.

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
