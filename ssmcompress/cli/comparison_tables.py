"""Comparisons on stdout as tables: methods on one or several models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .tables import column_width, names_width, show_load, show_table, show_views, show_warnings, terminal_width, write

# Columns of several models that are dropped if the table is too wide, in this order. Columns of figures that do not
# determine the ranking are dropped before them, the last ones first.
LEFT_OUT_FIRST = ("ratio", "of dense", "images/s", "speed-up", "at FLOPs", "at ms")
HEADING = " "  # cells of the line with the name of a model


def show_comparison(value: dict[str, Any]) -> None:
    """Print the rows of a comparison."""
    from ..jobs.compare_rows import list_figures
    from ..tasks import find_task

    task = find_task(value.get("task"))
    show_table(*_comparison_table(value["rows"], task))
    explained = "; ".join(figure.explain_column() for figure in list_figures(task) if figure.compared)
    print(f"  {explained}; FLOPs as a share of dense")
    about = value["settings"]
    write(f"  measured on {about['data']['images']} images of {about['data']['name']}")
    show_views(about)
    write(f"  calibrated on {about['calibration']['images']} images of {about['calibration']['name']}")
    if any(row.get("latency_within_noise") for row in value["rows"]):
        print("  ~: the difference in latency is within the noise")
    show_load(value.get("latency") or {})
    show_warnings(value)


def _comparison_table(rows: list[dict[str, Any]], task: Any) -> tuple[list[str], list[tuple[str, list[str]]]]:
    """Return (header, lines), sorted by level and then from best to worst."""

    def cell(value: float | None, form: str) -> str:
        return "-" if value is None else form.format(value)

    figures = [figure for figure in task.figures if figure.column]
    header = ["", "ratio", "FLOPs", *(figure.column for figure in figures), "latency", "of dense"]
    labelled = any(row.get(task.quality) is not None for row in rows)

    def rank(row: dict[str, Any]) -> tuple[float, float]:
        quality = row.get(task.quality if labelled else task.likeness)
        return row["ratio"], -(100.0 if quality is None and not row.get("failed") else quality or -1.0)

    lines = []
    for row in sorted(rows, key=rank):
        cells = [f"{row['ratio']:g}", cell(row.get("flops_share") and 100 * row["flops_share"], "{:.1f} %")]
        cells += [cell(row.get(figure.name), figure.cell_form) for figure in figures]
        cells.append(cell(row.get("latency_ms"), "{:.1f} ms"))
        tilde = "~" if row.get("latency_within_noise") else ""
        cells.append(cell(row.get("latency_share") and 100 * row["latency_share"], tilde + "{:.0f} %"))
        lines.append((row["method"] + (" (out of reach)" if row.get("failed") else ""), cells))
    used = [column for column in range(1, len(header)) if any(cells[column - 1] != "-" for _, cells in lines)]
    lines = [(name, [cells[column - 1] for column in used]) for name, cells in lines]
    return [header[0], *(header[column] for column in used)], lines


@dataclass(frozen=True)
class _Column:
    """A column of figures: its header, and the cell of each row, "-" where nothing was measured."""

    title: str
    cells: list[str]


def show_models(value: Mapping[str, Any]) -> None:
    """Print the rows of a comparison of several models, with a section for each model.

    Columns that do not fit the terminal are dropped in the order of `LEFT_OUT_FIRST`, and a line says which.
    """
    from ..jobs.compare_rows import list_figures
    from ..jobs.fronts import has_labels
    from ..tasks import find_task

    task, rows = find_task(value["task"]), value["rows"]
    ranked = task.quality if has_labels(rows, task) else task.likeness
    ordered: list[dict[str, Any] | None] = []
    names: list[str] = []
    for about in value["models"]:
        size = "x".join(map(str, about["image_size"]))
        names.append(f"{about['name']} ({about['architecture']}, {size})")
        ordered.append(None)
        for row in sorted((row for row in rows if row["model"] == about["name"]), key=lambda row: _rank(row, ranked)):
            names.append("  " + row["method"] + (" (out of reach)" if row.get("failed") else ""))
            ordered.append(row)
    columns = [column for column in _list_columns(ordered, task) if {*column.cells} - {"-", HEADING}]
    others = [figure.column for figure in reversed(list_figures(task)) if figure.name != ranked]
    columns, hidden = _fit_columns(names, columns, (*others, *LEFT_OUT_FIRST))
    lines = [(name, [column.cells[number] for column in columns]) for number, name in enumerate(names)]
    show_table(["", *(column.title for column in columns)], lines)
    explained = "; ".join(figure.explain_column() for figure in list_figures(task) if figure.compared)
    write(f"  {explained}; of dense: share of the FLOPs of its own dense model")
    timed = any(row.get("latency_ms") is not None for row in rows)
    places = "at FLOPs, at ms" if timed else "at FLOPs"
    write(f"  {places}: points to the best row, of any model, that costs at most as much; *: this is the best")
    if timed:
        write("  ms, images/s: at batch 1, from the speed-up over its own dense model; ~: within the noise")
    if hidden:
        write(f"  left out at this width: {', '.join(hidden)}; compare.csv has them")
    about = value["settings"]
    write(f"  measured on {about['data']['images']} images of {about['data']['name']}")
    show_views(about)
    write(f"  calibrated on {about['calibration']['images']} images of {about['calibration']['name']}")
    for model in value["models"]:
        for method, why in model["left_out"].items():
            write(f"  {model['name']}: without {method!r}, which {why}")
    show_load(value.get("latency") or {})
    show_warnings(value)


def _rank(row: Mapping[str, Any], quality: str) -> tuple[float, float]:
    """Return the sort key of a model's row: by level, then by quality, best first; the dense model leads."""
    value = row.get(quality)
    return (-1.0 if row["method"] == "dense" else row["ratio"]), -(value if value is not None else -1.0)


def _list_columns(rows: Sequence[Mapping[str, Any] | None], task: Any) -> list[_Column]:
    """Return all columns of the rows; None is a heading, which has no figures."""

    def column(title: str, form: str, find: Any) -> _Column:
        values = [None if row is None else find(row) for row in rows]
        cells = ["-" if value is None else form.format(value) for value in values]
        return _Column(title, [HEADING if row is None else cell for row, cell in zip(rows, cells, strict=True)])

    def share(row: Mapping[str, Any], key: str) -> float | None:
        return None if row.get(key) is None else 100 * row[key]

    figures = {figure.column: figure for figure in task.figures if figure.column}
    columns = [
        column("ratio", "{:.3g}", lambda row: row["ratio"]),
        column("GFLOPs", "{:.3g}", lambda row: (row.get("flops") or {}).get("full")),
        column("of dense", "{:.1f} %", lambda row: share(row, "flops_share")),
        *(column(title, f.cell_form, lambda row, name=f.name: row.get(name)) for title, f in figures.items()),
        column("ms", "{:.1f}", lambda row: row.get("quiet_ms")),
        column("images/s", "{:.1f}", lambda row: row.get("images_per_second")),
        column("speed-up", "{}", _format_speed_up),
        column("at FLOPs", "{}", lambda row: _format_place(row, "flops")),
        column("at ms", "{}", lambda row: _format_place(row, "latency")),
    ]
    return columns


def _format_speed_up(row: Mapping[str, Any]) -> str | None:
    if row.get("speed_up") is None:
        return None
    return ("~" if row.get("latency_within_noise") else "") + f"{row['speed_up']:.2f}x"


def _format_place(row: Mapping[str, Any], cost: str) -> str | None:
    """Return the distance to the best row at this cost, or a star for the best row."""
    points = row.get(f"{cost}_points")
    if points is None:
        return None
    return "*" if row[f"{cost}_front"] else f"{points:.2f}"


def _fit_columns(
    names: Sequence[str], columns: Sequence[_Column], order: Sequence[str]
) -> tuple[list[_Column], list[str]]:
    """Return the columns that fit the terminal next to the names, and the titles of those dropped in this order."""
    kept, hidden = list(columns), []
    for title in order:
        header = ["", *(column.title for column in kept)]
        lines = [(name, [column.cells[number] for column in kept]) for number, name in enumerate(names)]
        width = sum(column_width(header, lines, number) for number in range(1, len(header)))
        if names_width(header, lines, terminal_width()) + width <= terminal_width():
            break
        if title in header:
            kept = [column for column in kept if column.title != title]
            hidden.append(title)
    return kept, hidden
