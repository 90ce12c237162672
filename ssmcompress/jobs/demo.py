"""The whole workflow on a small trained Vim and 2,000 images that come with the package."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ..export.onnx import Exported, OnnxOptions, export_onnx
from ..extras import describe_missing, has_extra
from ..files import RECIPE_FILE
from ..models.checkpoint import load
from ..models.rewrite import make_plan
from ..progress import line
from .prune import compress
from .prune_request import CompressOptions
from .report import record_export
from .requests import DataOptions

BUNDLED = Path(__file__).parents[1] / "assets" / "vim-fashion-mnist"
DEFAULT_FOLDER = Path("compressed") / f"{BUNDLED.name}-demo"
STAGES, RATIO = (2,), 0.6
SAMPLES = 512  # of 2,000 images; half of them would take about 12 s longer on two cores


def run_demo(
    folder: Path, *, command: str = "", force: bool = False, recipe: Callable[[Mapping[str, Any]], str] | None = None
) -> tuple[dict[str, Any], Exported | None]:
    """Prune the bundled model into a folder and export it.

    Args:
        folder: output folder. command: recorded as the command that created it. force: replace the folder if
            ssmcompress wrote it. recipe: function from the report to the content of a recipe file.

    Returns:
        Its report, and the comparison with onnxruntime; None if the packages for ONNX files are not installed.
    """
    model = load(BUNDLED)
    line(f"pruning 60 % of the tokens after layer 2 of {len(model.blocks)} of a small Vim trained on Fashion-MNIST")
    plan, options = make_plan(model, stages=STAGES, ratio=RATIO), CompressOptions(DataOptions(samples=SAMPLES))
    report = compress(model, plan, folder, options, command=command, force=force)
    if recipe is not None:
        (folder / RECIPE_FILE).write_text(recipe(report), encoding="utf-8")
    if not has_extra("onnx"):
        line(f"no ONNX file: {describe_missing('onnx')}")
        return report, None
    line("exporting to ONNX and checking it in onnxruntime")
    file = folder / "model.onnx"
    exported = export_onnx(load(folder), file, OnnxOptions())
    record_export(folder, file, exported)
    return report, exported
