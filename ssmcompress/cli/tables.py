"""Results on stdout as tables or as JSON: reports, timings, verifications."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..errors import VerificationError
from .readable import readable

WIDTH = 80  # columns if stdout is not a terminal
# Minimum width of the column of names; longer names are wrapped if the figures need the space.
MIN_NAMES = 18
PADDING = 2  # characters between two columns


def print_json(value: Any) -> None:
    """Print the single JSON object of --json."""
    print(json.dumps(value, indent=2, allow_nan=False))


def write(line: str) -> None:
    """Print a line of text on stdout."""
    print(readable(line))


def show_table(header: list[str], rows: list[tuple[str, list[str]]]) -> None:
    """Print a table: the first column contains names, the others figures.

    Figures are never truncated: columns that do not fit the width are printed in further tables below, each with the
    names in front.
    """
    from rich.box import SIMPLE
    from rich.console import Console
    from rich.table import Table

    width = terminal_width()
    for columns in _fit(header, rows, width):
        table = Table(box=SIMPLE, pad_edge=False, show_edge=False, padding=(0, 0, 0, 1))
        table.add_column(readable(header[0]), justify="left", overflow="fold")
        for column in columns:
            table.add_column(readable(header[column]), justify="right", no_wrap=True)
        for name, cells in rows:
            shown = [readable(cells[column - 1]) for column in columns]
            if any(shown) or len(columns) == len(header) - 1:  # a row may have figures only in another table
                table.add_row(readable(name), *shown)
        needed = sum(column_width(header, rows, column) for column in columns)
        widest = names_width(header, rows, width) + needed
        # No markup: names of users' folders are shown unchanged.
        console = Console(markup=False, emoji=False, highlight=False, width=max(width, widest))
        console.print(table)


def terminal_width() -> int:
    """Return the width of the terminal, or the value of `COLUMNS`."""
    if not sys.stdout.isatty() and not os.environ.get("COLUMNS", "").isdecimal():
        return WIDTH
    import shutil

    return shutil.get_terminal_size((WIDTH, 24)).columns


def names_width(header: list[str], rows: list[tuple[str, list[str]]], width: int) -> int:
    """Return the width of the column of names: at most half of the total width."""
    return min(max([len(header[0]), *(len(name) for name, _ in rows)]), max(MIN_NAMES, width // 2))


def column_width(header: list[str], rows: list[tuple[str, list[str]]], column: int) -> int:
    """Return the width of a column of figures."""
    return PADDING + max(len(header[column]), *(len(cells[column - 1]) for _, cells in rows), 0)


def _fit(header: list[str], rows: list[tuple[str, list[str]]], width: int) -> list[list[int]]:
    """Group the columns of figures, numbered from 1, so that each group fits the width next to the names."""
    left = width - names_width(header, rows, width)
    groups: list[list[int]] = []
    used = left
    for column in range(1, len(header)):
        needed = column_width(header, rows, column)
        if not groups or used + needed > left:
            groups.append([])
            used = 0
        groups[-1].append(column)
        used += needed
    return groups or [[]]


def show_report(report: dict[str, Any], as_json: bool, verbose: bool = False) -> None:
    """Print a report; with `verbose` also the error of each refitted map, and all layers in the table of axes."""
    from ..jobs import report_text

    if as_json:
        print_json(report)
        return
    show_table(["", *report_text.list_columns(report)], report_text.format_rows(report))
    for note in report_text.format_notes(report):
        write(f"  {note}")
    maps, fits = report_text.format_fits(report)
    if fits and verbose:
        print("\nerror of each refitted map on held-out images, before -> after")
        show_table(["", *maps], fits)
    _show_axes(report, verbose)


def _show_axes(report: dict[str, Any], verbose: bool = False) -> None:
    """Print the cost of each axis alone, and the combinations tried by a search over axes, if there was one."""
    from ..jobs import report_axes

    for header, rows in (report_axes.format_axes(report, whole=verbose), report_axes.format_tried(report)):
        if rows:
            print()
            show_table(header, rows)


def show_preview(value: dict[str, Any], as_json: bool) -> None:
    """Print the effect of a plan."""
    if as_json:
        print_json(value)
        return
    from ..jobs.report_axes import format_trims
    from ..jobs.report_text import list_flops_notes

    if trimmed := format_trims(value.get("trims") or {}):
        write(f"  trimmed: {trimmed}")
    for stage in value["stages"]:
        write(f"  after layer {stage['after']}: {stage['kept']} of {stage['of']} tokens, {stage['importance']}")
    for convention in ("full", "paper"):
        dense, pruned = (value[name]["flops"][convention] for name in ("dense", "pruned"))
        write(f"  GFLOPs ({convention}): {dense:.4g} -> {pruned:.4g} ({pruned / dense - 1:+.1%})")
    for note in list_flops_notes(value):
        write(f"  {note}")
    _show_axes(value)


def show_benchmark(result: dict[str, Any], as_json: bool) -> None:
    """Print timings of models and ops."""
    if as_json:
        print_json(result)
        return
    if models := result.get("models"):
        _show_models(models)
    if ops := result.get("ops"):
        _show_ops(ops)
    s = result["settings"]
    if peers := s.get("peers"):
        image, patch = ("x".join(map(str, peers[key])) for key in ("image_size", "patch_size"))
        write(f"  timm: random weights; images of {image} pixels in patches of {patch} are {peers['tokens']} tokens")
    versions = ", ".join(f"{name} {version}" for name, version in s["versions"].items())
    write(
        f"  {s['device']}, {s['threads']} threads, {s['dtype']}, medians of {s['repeats']} interleaved runs; {versions}"
    )
    show_load(s)
    show_warnings(result)


def _show_models(models: list[dict[str, Any]]) -> None:
    """Print a table of the timed models, and what its columns mean."""
    first, with_reference = models[0]["model"], "reference_ms" in models[0]
    header = ["", "batch", "ms", "quartiles", "images/s", "faster", "95 %", "fewer FLOPs", "products ms"]
    header += ["x products", *(["reference ms", "x reference"] if with_reference else [])]
    rows = []
    for m in models:
        cells = [str(m["batch"]), f"{m['ms']:.1f}", f"{m['ms_low']:.1f}-{m['ms_high']:.1f}"]
        cells += [f"{m['images_per_second']:.1f}", *_speed_up_cells(m, first)]
        cells.append("" if m["model"] == first else _known(m["times_fewer_flops"], "{:.2f}x"))
        cells += [_known(m["products_ms"], "{:.1f}"), _known(m["times_products"], "{:.2f}")]
        if with_reference:
            cells += [_known(m["reference_ms"], "{:.0f}"), _known(m["times_reference"], "{:.1f}")]
        rows.append((m["model"], [*cells, f"{m['peak_mb']:.1f}", _known(m["activations_mb"], "{:.1f}")]))
    show_table([*header, "peak MB", "one layer's MB"], rows)
    print("  faster: than the first model, with its 95 % interval; ~: the difference is within the noise; ?: too few")
    print("  rounds to say so. fewer FLOPs: how many times more the first model takes, as run here. products: the time")
    print("  of the model's matrix products only, and how many times as long the forward takes. peak: peak memory of")
    print("  tensors. one layer's: what the ops of one layer, or of a stem that takes more, pass to each other.")
    if with_reference:
        print("  reference: with the scan in plain torch, and how many times faster the forward is than that.")


def _speed_up_cells(row: dict[str, Any], first: str) -> list[str]:
    """Return the speed-up over the first model, and its interval."""
    low, high = row["times_faster_low"], row["times_faster_high"]
    doubtful = row["model"] != first and low is not None and low <= 1 <= high
    mark = "?" if row["within_noise"] is None else "~" if row["within_noise"] or doubtful else ""
    interval = "" if low is None or row["model"] == first else f"{_ratio(low)}-{_ratio(high)}"
    return [f"{mark}{_ratio(row['times_faster'])}x", interval]


def _ratio(value: float) -> str:
    return f"{value:.2f}" if value >= 0.1 else f"{value:.3f}"


def _known(value: float | None, form: str) -> str:
    return "" if value is None else form.format(value)


def show_load(settings: dict[str, Any]) -> None:
    """Print a note if the machine was busy during a measurement."""
    from ..jobs.report_text import list_load_notes

    for note in list_load_notes(settings):
        write(f"  {note}")


def show_warnings(value: dict[str, Any]) -> None:
    """Print the warnings of a result, below its table."""
    for warning in value.get("warnings") or ():
        write(f"  warning: {warning}")


def _show_ops(ops: list[dict[str, Any]]) -> None:
    """Print a table for each shape and dtype."""
    limits = next((o for o in ops if o["op"] == "limits"), None)
    for case in dict.fromkeys((tuple(o["shape"]), o["dtype"]) for o in ops if o is not limits):
        rows = []
        for o in ops:
            if o is limits or (tuple(o["shape"]), o["dtype"]) != case:
                continue
            cells = [o["by"], f"{o['ms']:.3f}", f"{o['ms_low']:.3f}-{o['ms_high']:.3f}"]
            cells.append(f"{o['ns_per_element']:.4f}" if o["ns_per_element"] is not None else "")
            cells.append(f"{o['times_faster']:.1f}x" if o["times_faster"] is not None else "")
            if limits:
                known = "gb_per_s" in o
                cells += [f"{o[k]:.0f}" if known else "" for k in ("gb_per_s", "gexp_per_s")]
                cells.append(f"{o['times_limit']:.2f}" if known else "")
            rows.append((o["op"], cells))
        header = [f"{'x'.join(map(str, case[0]))}, {case[1]}", "by", "ms", "quartiles", "ns/element", "x reference"]
        show_table([*header, *(["GB/s", "Gexp/s", "x limit"] if limits else [])], rows)
    if limits:
        write(f"  limit: the slower of {limits['gb_per_s']:.0f} GB/s and {limits['gexp_per_s']:.0f} Gexp/s, which this")
        write(
            "  device reached in a copy and in registers. Read, written and taken: each input, result and element once."
        )


@contextmanager
def show_when_it_fails(file: Path, as_json: bool) -> Iterator[None]:
    """Print the figures of a verification that fails in the body, for scripts that use --json."""
    try:
        yield
    except VerificationError as error:
        if as_json and error.result is not None:
            show_verification(error.result, file, as_json)
        raise


def verification_json(result: Any, file: Path) -> dict[str, Any]:
    """Convert a `Verification` or `Exported` to a JSON object."""
    from dataclasses import asdict

    worst = result.max_difference if math.isfinite(result.max_difference) else None
    return {"file": str(file), **asdict(result), "max_difference": worst, "passed": result.passed}


def show_verification(result: Any, file: Path, as_json: bool) -> None:
    """Print how an ONNX file compares with its model."""
    if as_json:
        print_json(verification_json(result, file))
        return
    # Of many pixels, a few always differ because of rounding.
    of_pixels = result.task == "segmentation"
    agreeing, kept = (
        f"{share:.4g}% of the pixels" if of_pixels else f"{share:.1f}%"
        for share in (result.top1_agreement, (result.rounding or {}).get("top1_agreement", 0.0))
    )
    write(
        f"{file}: largest difference {result.max_difference:.2g} (allowed {result.atol:g}), "
        f"{agreeing} in the same class, {result.images} images of {result.data}"
    )
    if result.stages:
        same = ", ".join(
            f"{s['kept']} after layer {s['after']} ({s['same']} of {result.images})" for s in result.stages
        )
        write(f"  the same tokens kept, by stage (images): {same}")
    if result.rounding:
        write(
            f"  float16 weights: logits change by up to {result.rounding['max_difference']:.2g}, {kept} keep their "
            "class"
        )
    if result.ties:
        write(
            f"  {len(result.ties)} images kept other tokens, because scores are equal up to rounding: "
            f"{', '.join(result.ties)}"
        )


def show_export(result: Any, file: Path, as_json: bool) -> None:
    """Print what was written, and how it compares with its model."""
    show_verification(result, file, as_json)
    if as_json:
        return
    write(f"  {result.bytes / 1e6:.1f} MB, opset {result.opset}, {result.dtype} weights, scan as {result.scan}")
    for form, times in result.scan_ms.items():
        write(f"  {form}: {', '.join(f'{ms:.1f} ms at batch {batch}' for batch, ms in times.items())}")
    for form, why in result.refused.items():
        write(f"  not {form}: {why}")
    if result.latency:
        batches = list(dict.fromkeys(row["batch"] for row in result.latency))
        found = {(row["model"], row["by"], row["batch"]): row for row in result.latency}
        lines = [
            (f"{model}, {by}", [_spread(found[model, by, batch]) for batch in batches])
            for model, by in dict.fromkeys((row["model"], row["by"]) for row in result.latency)
        ]
        show_table(["latency in ms (quartiles)", *(f"batch {batch}" for batch in batches)], lines)
        show_load(result.latency_settings)


def _spread(row: dict[str, Any]) -> str:
    """Return a timing with its quartiles."""
    return f"{row['ms']:.1f} ({row['ms_low']:.1f}-{row['ms_high']:.1f})"


def show_inspection(value: dict[str, Any]) -> None:
    """Print the description of a checkpoint."""
    about, flops, span = value["architecture"], value["flops"], value["range"]
    kind, size = "image", "x".join(map(str, about["image_size"]))
    if "frames" in about:
        kind, size = "video", f"{size} of {about['frames']} frames"
    counts = f"{value['tokens'][0]} tokens" + (f", {value['tokens'][-1]} at the end" if value["pruned"] else "")
    write(f"{about['type']}, {about['depth']} layers, {kind}s {size}, {counts}, {value['params']:,} parameters")
    origin = f"written by {value['writer']}" if value["writer"] else "the file does not say what wrote it"
    write(f"{value['task']}; {origin}" + (f"; named by {value['named']}" if value["named"] else ""))
    write(f"commands that take it: {', '.join(value['commands'])}")
    from ..jobs.report_axes import format_trims
    from ..jobs.report_text import describe_flops_as_run

    if trimmed := format_trims(value["trims"]):
        write(f"trimmed: {trimmed}")
    if differing := {name: counts for name, counts in value["sizes"].items() if isinstance(counts, list)}:
        header = ["layer", *map(str, range(1, value["sizes"]["layers"] + 1))]
        show_table(header, [(name, [str(count) for count in counts]) for name, counts in differing.items()])
    full, paper = flops["by_part"], flops["by_part_paper"]
    lines = [(part, [f"{full[part]:.4g}", f"{paper[part]:.4g}"]) for part in full]
    sums = {"backbone": flops.get("backbone"), "total": flops}
    lines += [(name, [f"{sums[name][key]:.4g}" for key in ("full", "paper")]) for name in sums if sums[name]]
    show_table([f"GFLOPs of one {kind}", "full", "paper"], lines)
    if sections := flops.get("by_section"):
        lines = [(_name_section(part), _describe_section(part, flops["full"])) for part in sections]
        show_table(["section", "tokens", "width", "GFLOPs", "share"], lines)
    if span["stages"]:
        write(
            f"  pruning after {','.join(map(str, span['stages']))} leaves {span['min_percent']:.1f}% "
            f"to 100% of the full FLOPs"
        )
    if not math.isclose(flops["full"], flops["as_run"]):
        write(f"  {describe_flops_as_run(flops['full'], flops['as_run'], 'the model')}")
    for key, what in (("axes", "the full FLOPs"), ("axes_backbone", "those of the backbone")):
        if span.get(key):
            ranges = ", ".join(f"{axis} {percent:.1f}%" for axis, percent in span[key].items())
            write(f"  a search leaves at least, of {what}: {ranges}")


def _name_section(section: dict[str, Any]) -> str:
    """Return the layers of a section."""
    first, last = section["first"], section["last"]
    return f"layers {first} to {last}" if last > first else f"layer {first}"


def _describe_section(section: dict[str, Any], whole: float) -> list[str]:
    """Return the tokens and width of a section, its GFLOPs, and their share of the total."""
    spent = section["gflops"]
    return [str(section["length"]), str(section["width"]), f"{spent:.4g}", f"{spent / whole:.0%}"]


def show_views(value: dict[str, Any]) -> None:
    """Print which clips and crops of videos were evaluated."""
    from ..jobs.report_text import list_view_notes

    for text in list_view_notes(value):
        write(f"  {text}")


def show_evaluation(value: dict[str, Any]) -> None:
    """Print the results of an evaluation."""
    from ..tasks import find_task

    sections = {False: value, True: value.get("agreement", {})}
    figures = find_task(value.get("task")).figures
    rows = [(figure, sections[figure.compared].get(figure.report_key)) for figure in figures]
    lines = [(figure.title, [f"{number:.4g} {figure.unit}"]) for figure, number in rows if number is not None]
    if lines:
        show_table(["", "model"], lines)
        write(f"  measured on {value['images']} images of {value['data']['name']}")
    show_views(value)
    show_warnings(value)


def show_visualized(value: dict[str, Any]) -> None:
    """Print how similar the models' maps are to those of the dense model, and how the images were chosen."""
    rows = []
    for variant in value["variants"]:
        figures = variant["figures"]
        accuracy, mean = figures["accuracy"], figures["correlation"]
        spread = "" if mean is None else f"{figures['correlation_low']:.2f} to {figures['correlation_high']:.2f}"
        cells = ["" if accuracy is None else f"{accuracy:.2f} %", "" if mean is None else f"{mean:.3f}", spread]
        rows.append((variant["name"], cells))
    show_table(["", value["judged"], "correlation of maps", "quartiles"], rows)
    data = value["data"]
    write(f"  maps of {value['reader']} ({value['method']}) on {data['images']} images, over the kept patches")
    for variant in value["variants"]:
        if variant["layers"] != value["layers"]:
            write(f"  {variant['name']}: layers {', '.join(map(str, variant['layers']))} only; the others were removed")
    write(f"  drawn: {value['rule']}")
