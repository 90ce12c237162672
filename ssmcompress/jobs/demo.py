"""The whole chain on a small trained Vim and 2,000 images that come with the package."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..export.onnx import Exported, OnnxOptions, export_onnx
from ..extras import describe_missing, has_extra
from ..models.checkpoint import load
from ..models.rewrite import make_plan
from ..progress import line
from .prune import compress
from .report import record_export

BUNDLED = Path(__file__).parents[1] / "assets" / "vim-fashion-mnist"
DEFAULT_FOLDER = Path("compressed") / f"{BUNDLED.name}-demo"


def run_demo(folder: Path, *, command: str = "", force: bool = False) -> tuple[dict[str, Any], Exported | None]:
    """Prune the bundled model into a folder and export it.

    Returns:
        Its report, and the comparison with onnxruntime; None where the packages for ONNX files are not installed.
    """
    model = load(BUNDLED)
    line(f"pruning 60 % of the tokens after layer 2 of {len(model.blocks)} of a small Vim trained on Fashion-MNIST")
    report = compress(model, make_plan(model, stages=(2,), ratio=0.6), folder, command=command, force=force)
    if not has_extra("onnx"):
        line(f"no ONNX file: {describe_missing('onnx')}")
        return report, None
    line("exporting to ONNX and checking it in onnxruntime")
    file = folder / "model.onnx"
    exported = export_onnx(load(folder), file, OnnxOptions())
    record_export(folder, file, exported)
    return report, exported
