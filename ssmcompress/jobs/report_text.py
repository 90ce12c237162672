"""Text of a report: table rows, notes, a web page and a model card."""

from __future__ import annotations

import base64
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from ..data.clips import Views
from ..errors import escape_control
from ..evaluation.timings import is_busy, quartiles_overlap
from ..tasks import find_task
from .report_axes import AXES_FILE, format_axes, format_tried, list_search_notes, list_trim_notes
from .report_steps import list_input_notes, list_repair_notes, list_stage_notes

PICTURE_FILE, SEGMENTS_FILE = "kept_tokens.png", "segments.png"
UNKNOWN_IMAGES = "the model has no record of the images that it was made with"
Report = Mapping[str, Any]


def format_rows(report: Report) -> list[tuple[str, list[str]]]:
    """Return the table: (quantity, a cell for each of `columns`)."""
    models = [report[name] for name in list_columns(report)]
    agreement, task = report.get("agreement") or {}, find_task(report.get("task"))

    def line(key: str, form: str) -> list[str]:
        return [_cell(model.get(key), form) for model in models]

    table = [
        *((figure.title, line(figure.report_key, figure.form)) for figure in task.figures_of(compared=False)),
        *_flops_rows(models, report, "full"),
        *_flops_rows(models, report, "paper"),
        *_flops_rows(models, report, "full", "flops_backbone"),
        ("latency, batch 1", line("latency_ms", "{:.1f} ms")),
        ("  speed-up", [*[""] * (len(models) - 1), _speed_up(report.get("latency") or {})]),
        ("parameters", line("params", "{:,}")),
    ]
    blank = [""] * (len(models) - 1)
    for figure in task.figures_of(compared=True):
        table.append((figure.title, [*blank, _cell(agreement.get(figure.report_key), figure.form)]))
    return [(name, cells) for name, cells in table if any(cell not in ("", "-") for cell in cells)]


def list_columns(report: Report) -> list[str]:
    """Return the models that a report compares, ending with the one that it is about.

    `input` is the compressed model that was pruned further, `naive` the pruned one without alignment, `aligned` the
    one with the original weights, `reconstructed` the one with refitted weights before fine-tuning, `before` a model
    that had already been fine-tuned, `trimmed` one without states, channels, layers or directions before
    reconstruction; other steps have their own names.
    """
    names = [name for name, value in report.items() if isinstance(value, dict) and isinstance(value.get("flops"), dict)]
    return [*(name for name in names if name != "pruned"), "pruned"] if "pruned" in names else names


def format_fits(report: Report) -> tuple[list[str], list[tuple[str, list[str]]]]:
    """Return a table of the errors after reconstruction: (refitted maps, (layer, a cell for each map) for each layer).

    A cell contains the relative error of a map on held-out images, before and after.
    """
    layers: dict[str, dict[str, str]] = {}
    for fit in (report.get("reconstruction") or {}).get("fits", ()):
        layer, _, name = fit["weight"].rpartition(", " if ", " in fit["weight"] else ".")
        layers.setdefault(layer or name, {})[name] = f"{fit['before']:.1%} -> {fit['after']:.1%}"
    names = list(dict.fromkeys(name for cells in layers.values() for name in cells))
    return names, [(layer, [cells.get(name, "") for name in names]) for layer, cells in layers.items()]


def _list_assumed(used: Mapping[str, Any]) -> list[str]:
    """Return which preprocessing values were assumed: all, or those in the list `assumed`."""
    every = used["assumed"] is True
    names = [name for name in ("mean", "std") if every or name in used["assumed"]]
    parts = [f"{name} {','.join(f'{value:g}' for value in used[name])}" for name in names]
    if every and "crop_pct" in used:
        parts.append(f"crop {used['crop_pct']:g}, {used['interpolation']}")
    elif every:
        parts.append(f"shorter side {used['short_side']}" if used.get("short_side") else "not resized")
    return parts


def format_notes(report: Report) -> list[str]:
    """Return sentences about the evaluation images and how the model was compressed."""
    data, calibration, alignment = report["data"], report.get("calibration") or {}, report["alignment"]
    lines = [f"warning: {text}" for text in report.get("warnings") or ()]
    lines += [*list_input_notes(report), *list_trim_notes(report), *list_stage_notes(report)]
    if data["labelled"]:
        lines.append(f"accuracy measured on {data['images']} images of {data['name']}")
    else:
        lines.append(
            f"accuracy was not measured: no labels in {data['name']}; agreement with the dense model on "
            f"{data['images']} images"
        )
    lines += [*list_view_notes(report), *_list_wide_notes(report)]
    if (used := report.get("preprocessing") or {}).get("assumed"):
        lines.append(f"preprocessing was assumed: {', '.join(_list_assumed(used))}")
    skipped = [*data.get("unreadable", ()), *calibration.get("unreadable", ())]
    unnamed = sum(block.get("unreadable_images") or 0 for block in (data, calibration))  # in a published report
    if skipped or unnamed:
        names = f" ({', '.join(skipped[:3])})" if skipped else ""
        lines.append(f"{len(skipped) + unnamed} unreadable images were skipped{names}")
    if overlap := describe_overlap(data):
        lines.append(overlap)
    if calibration.get("images") and report["stages"]:
        use = "calibrated" if alignment.get("gap") == "calibrated" else "kept tokens counted"
        lines.append(f"{use} on {calibration['images']} images of {calibration['name']}")
    lines += list_repair_notes(report)
    if onnx := report.get("onnx"):
        lines.append(
            f"ONNX ({onnx['file']}): opset {onnx['opset']}, {onnx['dtype']} weights, scan as {onnx['scan']}; largest "
            f"difference {onnx['max_difference']:.2g} on {onnx['images']} images, {onnx['top1_agreement']:.1f}% in the "
            "same class"
        )
        rows = [row for row in onnx.get("latency") or () if (row["by"], row["batch"]) == ("onnxruntime", 1)]
        if rows:
            listed = [f"{row['model']} {row['ms']:.1f}{_spread(row)}" for row in rows]
            lines.append(f"latency of onnxruntime at batch 1: {', '.join(listed)} ms{_overlap_note(rows)}")
            lines += list_load_notes(onnx.get("latency_settings") or {})
    return lines + list_flops_notes(report) + list_search_notes(report) + _latency_notes(report)


def list_view_notes(value: Mapping[str, Any]) -> list[str]:
    """Return a sentence about the clips and crops of each video that were evaluated; empty for images.

    Args:
        value: a report or an evaluation of one model, with `views` if it takes videos.
    """
    if (views := Views.from_json(value.get("views"))) is None:
        return []
    averaged = ", the mean of their probabilities" if views.count > 1 else ""
    return [f"view of each video: {views.describe()}{averaged}"]


def _list_wide_notes(report: Report) -> list[str]:
    """Return a comparison with the models in float32, if they were evaluated in another dtype."""
    task, dtype = find_task(report.get("task")), report.get("dtype")
    quality, likeness = (task.figure(name) for name in (task.quality, task.likeness))
    notes = []
    for column, wide in (report.get("float32") or {}).items():
        same = wide["agreement"].get(likeness.report_key)
        if same is None:
            continue
        before, after = wide.get(quality.report_key), (report.get(column) or {}).get(quality.report_key)
        figures = ""
        if before is not None and after is not None:
            figures = f"{quality.title} {quality.form.format(before)} ({dtype}: {quality.form.format(after)}), "
        notes.append(f"the {column} model in float32: {figures}and {likeness.form.format(same)} the same in {dtype}")
    return notes


def list_flops_notes(report: Report) -> list[str]:
    """Return a sentence about the dense model's FLOPs in this implementation, if the published code takes more."""
    published, ours = report["dense"]["flops"]["full"], report["dense"].get("flops_as_run")
    return [] if ours is None else [describe_flops_as_run(published, ours, "the dense model")]


def describe_flops_as_run(published: float, ours: float, name: str) -> str:
    """Describe the GFLOPs of this implementation compared with those of the published code, as a sentence."""
    return (
        f"{name} takes {ours:.4g} GFLOPs as it is run here ({ours / published - 1:+.1%}): its last layer is computed "
        "for the class token alone"
    )


def _latency_notes(report: Report) -> list[str]:
    """Return sentences about how latency was measured, its spread, and whether the figures are reliable."""
    if not (timing := report.get("latency")):
        return []
    spread = [
        f"{name} {low:.1f}-{high:.1f} ms"
        for name in ("dense", "pruned")
        for low, high in [(report.get(name) or {}).get("latency_quartiles_ms") or (None, None)]
        if low is not None
    ]
    line = f"latency on {timing['device']}, {timing['threads']} threads, {report.get('dtype', 'float32')}"
    lines = [line + (f"; quartiles of {timing['repeats']} rounds: {', '.join(spread)}" if spread else "")]
    if interval := timing.get("speed_up_interval"):
        low, high = interval
        lines.append(f"speed-up {timing['speed_up']:.2f}x; with 95 % confidence {low:.2f}x to {high:.2f}x")
    if timing.get("within_noise"):
        lines.append("the difference in latency is within the noise: the rounds do not tell which model is faster")
    return lines + list_load_notes(timing)


def list_load_notes(timing: Mapping[str, Any]) -> list[str]:
    """Return warnings about the machine load during a measurement with `load` and `cores`.

    `load` was taken before it and `load_after`, which not all measurements have, after it.
    """
    cores, loads = timing.get("cores"), [timing.get("load"), timing.get("load_after")]
    if not any(is_busy(load, cores) for load in loads):
        return []
    before, after = (None if load is None else f"{load:g}" for load in loads)
    seen = f"{before} before and {after} after" if before and after else before or after
    return [f"the machine was busy when the models were timed, with a load of {seen} on {cores} cores: times vary"]


def _speed_up(timing: Mapping[str, Any]) -> str:
    """Return how many times faster the pruned model is, with a tilde if that is within the noise."""
    value = timing.get("speed_up")
    return "" if value is None else f"{'~' if timing.get('within_noise') else ''}{value:.2f}x"


def _spread(row: Mapping[str, Any]) -> str:
    """Return the quartiles of a row of timings, if it has any."""
    return f" ({row['ms_low']:.1f}-{row['ms_high']:.1f})" if "ms_low" in row else ""


def _overlap_note(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return a note if the first and the last row of timings do not differ significantly, by their quartiles."""
    first, last = rows[0], rows[-1]
    if first is last or "ms_low" not in first or "ms_low" not in last:
        return ""
    overlap = quartiles_overlap(*((row["ms_low"], row["ms_high"]) for row in (first, last)))
    return "; the difference is within the noise" if overlap else ""


def describe_overlap(data: Mapping[str, Any], reason: str = UNKNOWN_IMAGES) -> str | None:
    """Describe how many evaluation images were trained on, as a sentence; None if there were none.

    Args:
        data: `images` and `overlap`, which is None if unknown. reason: why it is unknown.
    """
    overlap, images = data.get("overlap", 0), data["images"]
    if overlap is None:
        return f"how many of the {images} measured images were used for calibration or training is not known: {reason}"
    if overlap == images:
        used = f"all {images} measured images were used for calibration or training"
        return f"warning: {used}: the figures say nothing about other images"
    return f"{overlap} of the {images} measured images were also used for calibration or training" if overlap else None


# The pictures in the folder of a model, and their names in the templates.
PICTURES = {PICTURE_FILE: "picture", SEGMENTS_FILE: "segments", AXES_FILE: "chart"}


def render_html(
    report: Report,
    title: str,
    pictures: Mapping[str, bytes],
    charts: Mapping[str, Any] | None = None,
    notes: Sequence[str] = (),
    attention: str | None = None,
) -> str:
    """Return a self-contained web page with embedded pictures.

    Args:
        pictures: the available ones of `PICTURES`, by file name.
        charts: the available ones of `report_charts`, by name. notes: further notes on the page.
        attention: relative address of the page of attention maps; None: there is none.
    """
    inside = {file: base64.b64encode(content).decode() for file, content in pictures.items()}
    images = {name: inside.get(file) for file, name in PICTURES.items()}
    further = {"charts": charts or {}, "more_notes": notes, "attention": attention}
    return _render("report.html", report, title=title, **further, **images)


def render_card(report: Report, title: str, pictures: Collection[str]) -> str:
    """Return the README.md of a compressed model's folder, with links to its pictures, given by file name."""
    links = {name: file if file in pictures else None for file, name in PICTURES.items()}
    return _render("card.md", report, whole=False, title=title, **links)


def _render(template: str, report: Report, whole: bool = True, **values: Any) -> str:
    from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape

    environment = Environment(
        loader=PackageLoader("ssmcompress.jobs"),
        autoescape=select_autoescape(["html"]),
        undefined=StrictUndefined,
        finalize=lambda value: type(value)(escape_control(value)) if isinstance(value, str) else value,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["code"] = _mark_code
    environment.filters["markdown"] = _escape_markdown
    return environment.get_template(template).render(
        report=report,
        columns=list_columns(report),
        rows=format_rows(report),
        notes=format_notes(report),
        fits=format_fits(report),
        axes=format_axes(report, whole),
        tried=format_tried(report),
        **values,
    )


def _mark_code(text: str) -> Any:
    """Escape a text for a web page, and mark names in backticks as code."""
    from markupsafe import Markup, escape

    parts = text.split("`")
    if len(parts) % 2 == 0:  # an unpaired backtick, as in a file name, is an ordinary character
        return escape(text)
    return Markup("").join(Markup("<code>{}</code>").format(p) if i % 2 else escape(p) for i, p in enumerate(parts))


def _escape_markdown(text: str) -> str:
    """Return a text as one line in which names of files make no Markdown or HTML, except in backticks."""
    parts = re.sub(r"\s+", " ", text).split("`")
    paired = len(parts) % 2 == 1
    return "`".join(p if i % 2 and paired else re.sub(r"([\\<>\[\]|*#])", r"\\\1", p) for i, p in enumerate(parts))


def _cell(value: Any, form: str) -> str:
    return "-" if value is None else form.format(value)


def _flops_rows(
    models: Sequence[Report], report: Report, convention: str, key: str = "flops"
) -> list[tuple[str, list[str]]]:
    """Return rows of GFLOPs by a convention, with their difference from the dense model.

    Args:
        key: "flops", or "flops_backbone", which only segmentation models have.
    """
    dense = (report["dense"].get(key) or {}).get(convention) if key != "flops" else report["dense"][key][convention]
    if dense is None:
        return []
    values = [model[key][convention] if model.get(key) else None for model in models]
    changes = ["" if value in (None, dense) else f"{value / dense - 1:+.1%}" for value in values]
    name = f"GFLOPs, {convention}" if key == "flops" else "GFLOPs of the backbone"
    return [(name, [_cell(value, "{:.4g}") for value in values]), ("  compared to dense", changes)]
