"""The rows of a comparison as JSON and CSV, and the settings that all rows of a folder share."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ..compression.trim.trims import Trims
from ..data.signature import compare_signatures
from ..tasks import Figure, Task
from .methods import Level, Method

# Settings that must be equal to resume a comparison, and their names in messages.
SETTINGS = {
    "weights": "other weights",
    "image_size": "another image size",
    "preprocessing": "other preprocessing",
    "stages": "other stages",
    "gap": "another gap source",
    "seed": "another seed",
    "dtype": "another dtype",
}


def describe_differences(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Describe the differences between the settings of two comparisons; images are compared by content, not by name."""
    unknown = [key.replace("_", " ") for key in SETTINGS if key not in then]
    found = [f"an older version of ssmcompress, which did not record {', '.join(unknown)}"] if unknown else []
    changed = [key for key in SETTINGS if key in then and then[key] != now[key]]
    if "weights" in changed and {"image_size", "preprocessing"} & {*changed}:
        changed.remove("weights")  # included in the fingerprint
    found += [SETTINGS[key] for key in changed]
    if None not in (old := then.get("timing"), new := now["timing"]) and old != new:
        found.append(f"latency on {old['device']} with {old['threads']} threads")
    if then.get("views") != now.get("views"):  # only videos have views
        found.append("other views of each video")
    recorded = then.get("content") or {}
    for key, use in (("calibration", "calibrate"), ("data", "measure")):
        if difference := compare_signatures(recorded.get(key, {}), now["content"][key]):
            found.append(f"other images to {use} on ({difference})")
    return found


def list_figures(task: Task) -> tuple[Figure, ...]:
    """Return the figures of a task that a comparison has columns for."""
    return tuple(figure for figure in task.figures if figure.column)


def check_row(row: dict[str, Any], task: Task) -> None:
    """Validate a row read from a file.

    Raises:
        KeyError, TypeError, ValueError: it is not a row; InputError is a ValueError.
    """
    if not isinstance(row["method"], str) or isinstance(row["ratio"], bool):
        raise TypeError("a row without a method and a ratio")
    float(row["ratio"]), float(row.get("budget", 0))
    if row.get("failed"):
        return
    for name in (*(figure.name for figure in list_figures(task)), "flops_share", "latency_ms", "latency_share"):
        if row[name] is not None:
            float(row[name])
    float(row["flops"]["full"]), int(row["images"])
    for stage in row["stages"]:
        int(stage["after"]), float(stage["ratio"]), str(stage["importance"])
    Trims.from_dict(row.get("trims", {}))
    for side in row.get("image_size", ()):
        int(side)


def is_row_of(row: Mapping[str, Any], method: Method | None, level: Level) -> bool:
    """Return whether a row was measured for a method (None: the dense model) at a level.

    Levels with different budgets may have the same ratio of tokens. Rows of older files have no budget.
    """
    if method is None:
        return row["method"] == "dense"
    same = row["method"] == method.name and row["ratio"] == level.ratio
    return same and math.isclose(row.get("budget", level.budget), level.budget, abs_tol=1e-9)


def rename_rows(rows: list[dict[str, Any]], version: int | None) -> list[dict[str, Any]]:
    """Return rows from a file of this format version, with the current names of the methods.

    Before version 2, "smaller image" had a refitted classifier.
    """
    if version != 1:
        return rows
    return [
        {**row, "method": "smaller image, reconstructed"} if row["method"] == "smaller image" else row for row in rows
    ]


def select_measured(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the rows of methods that reached their level."""
    return [row for row in rows if not row.get("failed")]


def to_csv(rows: Iterable[dict[str, Any]], task: Task, before: Sequence[str] = (), after: Sequence[str] = ()) -> str:
    """Format each row as a line: its figures and cost, images, stages, errors, trims and image size.

    Args:
        before, after: keys of the rows that become columns before and after these.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    figures = [figure.name for figure in list_figures(task)]
    columns = [*before, "method", "ratio", "flops_full", "flops_share", *figures, "latency_ms", "latency_share"]
    writer.writerow([*columns, "images", "stages", "failed", "trims", "image_size", *after])
    for row in rows:
        values = {**row, "flops_full": (row.get("flops") or {}).get("full")}
        stages = " ".join(f"{s['after']}:{s['ratio']:.4f}:{s['importance']}" for s in row.get("stages", ()))
        size = "x".join(str(side) for side in row.get("image_size", ()))
        more = [row["images"], stages, row.get("failed"), _format_trims(row.get("trims", {})), size]
        writer.writerow([*(values.get(column) for column in columns), *more, *(row.get(column) for column in after)])
    return text.getvalue()


def _format_trims(trims: Mapping[str, Any]) -> str:
    """Return trims in one cell: "states:2 channels:64,64,32 layers:3,5 directions:4/1"."""
    cells = []
    for axis, value in trims.items():
        if axis == "directions":
            numbers = [f"{layer}/{'+'.join(map(str, paths))}" for layer, paths in value.items()]
        else:
            numbers = [str(number) for number in (value if isinstance(value, list) else [value])]
        same = axis in ("states", "channels") and len(set(numbers)) == 1
        cells.append(f"{axis}:{','.join(numbers[:1] if same else numbers)}")
    return " ".join(cells)
