"""A report for people: table rows, notes, a web page and a model card."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import escape_control
from ..evaluation.timings import is_busy, quartiles_overlap

PICTURE_FILE = "kept_tokens.png"
UNKNOWN_IMAGES = "the model does not say what it was made on"
Report = Mapping[str, Any]


def format_rows(report: Report) -> list[tuple[str, list[str]]]:
    """The table: (quantity, a cell for each of `columns`)."""
    models = [report[name] for name in list_columns(report)]
    agreement = report.get("agreement") or {}

    def line(key: str, form: str) -> list[str]:
        return [_cell(model.get(key), form) for model in models]

    table = [
        ("top-1", line("top1", "{:.2f} %")),
        ("top-5", line("top5", "{:.2f} %")),
        *_flops_rows(models, report, "full"),
        *_flops_rows(models, report, "paper"),
        ("latency, batch 1", line("latency_ms", "{:.1f} ms")),
        ("  speed-up", [*[""] * (len(models) - 1), _speed_up(report.get("latency") or {})]),
        ("parameters", line("params", "{:,}")),
    ]
    blank = [""] * (len(models) - 1)
    table.append(("same class as dense", [*blank, _cell(agreement.get("top1"), "{:.2f} %")]))
    table.append(("KL from dense", [*blank, _cell(agreement.get("kl"), "{:.4f} nats")]))
    return [(name, cells) for name, cells in table if any(cell not in ("", "-") for cell in cells)]


def list_columns(report: Report) -> list[str]:
    """The models that a report compares, the last of them the one that it is about.

    `naive` is the pruned one without alignment, `aligned` with the old weights, `reconstructed` with refitted ones
    before it was fine-tuned, `before` one that had been fine-tuned already; other steps have names of their own.
    """
    names = [name for name, value in report.items() if isinstance(value, dict) and isinstance(value.get("flops"), dict)]
    return [*(name for name in names if name != "pruned"), "pruned"] if "pruned" in names else names


def format_fits(report: Report) -> tuple[list[str], list[tuple[str, list[str]]]]:
    """What reconstruction left, a table: (the maps it refits in a layer, (layer, a cell for each of them) for each).

    A cell holds the share that a map misses of what it should give, on held-out images, before and after.
    """
    layers: dict[str, dict[str, str]] = {}
    for fit in (report.get("reconstruction") or {}).get("fits", ()):
        layer, _, name = fit["weight"].rpartition(".")
        layers.setdefault(layer or name, {})[name] = f"{fit['before']:.1%} -> {fit['after']:.1%}"
    names = list(dict.fromkeys(name for cells in layers.values() for name in cells))
    return names, [(layer, [cells.get(name, "") for name in names]) for layer, cells in layers.items()]


def format_notes(report: Report) -> list[str]:
    """What the figures were measured on, and how the model was pruned, in sentences."""
    data, calibration, alignment = report["data"], report.get("calibration") or {}, report["alignment"]
    stages = "; ".join(f"{s['kept']} of {s['of']} tokens after layer {s['after']}" for s in report["stages"])
    metrics = ", ".join(sorted({s["importance"] for s in report["stages"]}))
    aligned = [name for name in ("conv", "scan") if alignment.get(name)]
    lines = [f"warning: {text}" for text in report.get("warnings") or ()]
    lines += [
        f"kept: {stages} (importance {metrics})",
        f"alignment: {' and '.join(aligned) or 'none'}"
        + (f", gap deltas {alignment['gap']}" if alignment.get("scan") else "")
        + (", pruned tokens as last seen in the mean that is read out" if alignment.get("pool") else ""),
    ]
    if data["labelled"]:
        lines.append(f"accuracy measured on {data['images']} images of {data['name']}")
    else:
        lines.append(
            f"accuracy was not measured: no labels in {data['name']}; agreement with the dense model on "
            f"{data['images']} images"
        )
    if (used := report.get("preprocessing") or {}).get("assumed"):
        mean, std = (",".join(f"{value:g}" for value in used[name]) for name in ("mean", "std"))
        how = f"mean {mean}, std {std}, crop {used['crop_pct']:g}, {used['interpolation']}"
        lines.append(f"preprocessing was assumed: {how}")
    if skipped := [*data.get("unreadable", ()), *calibration.get("unreadable", ())]:
        lines.append(f"{len(skipped)} unreadable images were skipped ({', '.join(skipped[:3])})")
    if overlap := describe_overlap(data):
        lines.append(overlap)
    if calibration.get("images"):
        use = "calibrated" if alignment.get("gap") == "calibrated" else "kept tokens counted"
        lines.append(f"{use} on {calibration['images']} images of {calibration['name']}")
    if refit := report.get("reconstruction"):
        new = sum(bool(fit["ridges"]) for fit in refit["fits"])
        lines.append(
            f"reconstruction: {new} of {len(refit['fits'])} weights refitted on {refit['images']} images of "
            f"{refit['name']} in {refit['seconds']:.0f} s; KL from dense on the {refit['held_out']} held out "
            f"{refit['kl_before']:.4f} -> {refit['kl_after']:.4f} nats"
            + ("" if refit["kept"] else ", no closer: the old weights were kept")
        )
    if tuned := report.get("finetuning"):
        lines.append(_finetuning_note(tuned))
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
    return lines + _latency_notes(report)


def _latency_notes(report: Report) -> list[str]:
    """How latency was measured, with its spread, and whether the figures can be trusted."""
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
    if timing.get("within_noise"):
        lines.append("the difference in latency is within the noise: the rounds do not tell which model is faster")
    return lines + list_load_notes(timing)


def list_load_notes(timing: Mapping[str, Any]) -> list[str]:
    """What there is to say about how busy the machine was during a measurement with `load` and `cores`."""
    load, cores = timing.get("load"), timing.get("cores")
    if not is_busy(load, cores):
        return []
    return [f"the machine was busy when the models were timed, with a load of {load:g} on {cores} cores: times vary"]


def _speed_up(timing: Mapping[str, Any]) -> str:
    """How many times faster the pruned model is; with a tilde, if that is within the noise."""
    value = timing.get("speed_up")
    return "" if value is None else f"{'~' if timing.get('within_noise') else ''}{value:.2f}x"


def _spread(row: Mapping[str, Any]) -> str:
    """The quartiles of a row of timings, where it has any."""
    return f" ({row['ms_low']:.1f}-{row['ms_high']:.1f})" if "ms_low" in row else ""


def _overlap_note(rows: Sequence[Mapping[str, Any]]) -> str:
    """Whether the first and the last of rows of timings differ by no more than their quartiles allow."""
    first, last = rows[0], rows[-1]
    if first is last or "ms_low" not in first or "ms_low" not in last:
        return ""
    overlap = quartiles_overlap(*((row["ms_low"], row["ms_high"]) for row in (first, last)))
    return "; the difference is within the noise" if overlap else ""


def describe_overlap(data: Mapping[str, Any], reason: str = UNKNOWN_IMAGES) -> str | None:
    """How many of the measured images were learnt from, as a sentence; None if none were.

    Args:
        data: `images` and `overlap`, which is None if it is not known. reason: why it is not.
    """
    overlap, images = data.get("overlap", 0), data["images"]
    if overlap is None:
        return f"how many of the {images} measured images were calibrated on or learnt from is not known: {reason}"
    if overlap == images:
        return f"warning: all {images} measured images were learnt from: the figures say nothing about other images"
    return f"{overlap} of the {images} measured images were also calibrated on or learnt from" if overlap else None


def _finetuning_note(tuned: Mapping[str, Any]) -> str:
    teachers = [name for name in ("labels", "teacher") if tuned[name]]
    choice = f" of epoch {tuned['epoch']}" if tuned["held_out"] else " of the last epoch"
    choice = choice if tuned["epoch"] else " as before, for those of no epoch did better"
    choice += ", averaged" if tuned["averaged"] else ""
    choice += f", chosen on {tuned['held_out']} others" if tuned["held_out"] else ""
    return (
        f"fine-tuned for {tuned['recipe']['epochs']} epochs on {tuned['images']} images of {tuned['name']} by "
        f"{' and '.join(teachers)}, {tuned['steps']} steps of {tuned['recipe']['batch_size']} images in "
        f"{tuned['seconds']:.0f} s; weights{choice}"
    )


def render_html(report: Report, title: str, picture: bytes | None) -> str:
    """A web page that stands alone, the picture of kept tokens inside it."""
    image = base64.b64encode(picture).decode() if picture else None
    return _render("report.html", report, title=title, picture=image)


def render_card(report: Report, title: str, picture: bool) -> str:
    """The README.md of a compressed model's folder."""
    return _render("card.md", report, title=title, picture=PICTURE_FILE if picture else None)


def _render(template: str, report: Report, **values: Any) -> str:
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
    return environment.get_template(template).render(
        report=report,
        columns=list_columns(report),
        rows=format_rows(report),
        notes=format_notes(report),
        fits=format_fits(report),
        **values,
    )


def _mark_code(text: str) -> Any:
    """Escape a text for a web page, with names in backticks as code."""
    from markupsafe import Markup, escape

    parts = text.split("`")
    if len(parts) % 2 == 0:  # an odd backtick, of a file's name, is just a character
        return escape(text)
    return Markup("").join(Markup("<code>{}</code>").format(p) if i % 2 else escape(p) for i, p in enumerate(parts))


def _cell(value: Any, form: str) -> str:
    return "-" if value is None else form.format(value)


def _flops_rows(models: Sequence[Report], report: Report, convention: str) -> list[tuple[str, list[str]]]:
    """GFLOPs by a convention, and what they are more or less than those of the dense model."""
    dense = report["dense"]["flops"][convention]
    values = [model["flops"][convention] if model.get("flops") else None for model in models]
    changes = ["" if value in (None, dense) else f"{value / dense - 1:+.1%}" for value in values]
    return [(f"GFLOPs, {convention}", [_cell(value, "{:.4g}") for value in values]), ("  compared to dense", changes)]
