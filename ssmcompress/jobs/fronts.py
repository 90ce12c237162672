"""Ranking of the rows in a comparison of several models: the best row at the same FLOPs and at the same latency."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ..tasks import Task

# Keys that `place_rows` adds to rows and that are columns of the CSV file.
COLUMNS = (
    "quiet_ms", "images_per_second", "speed_up", "flops_front", "flops_points", "latency_front", "latency_points",
)  # fmt: skip


def place_rows(rows: Sequence[Mapping[str, Any]], task: Task) -> list[dict[str, Any]]:
    """Return rows of several models with their cost in time and their rank at equal cost.

    Args:
        rows: each with `model`, `method`, `ratio`, the figures of the task, `flops`, `latency_ms` and `latency_share`.

    Returns:
        Copies of the rows with `speed_up`, relative to the row's own dense model; `quiet_ms`, the latency computed from
        it and from the shortest time of this dense model next to any of its rows; `images_per_second`, from `quiet_ms`;
        and for each cost, `flops` and `latency`: `flops_front`, whether no row of at most the same cost is better, and
        no cheaper one equally good; `flops_points`, the difference in points of the task's quality to the best row of
        at most the same cost, 0 or below; and `flops_best`, the `model`, `method` and `ratio` of that row. All are None
        if the cost or the quality was not measured.

        Without labels, the quality is the similarity to the own dense model, and only rows of one model are compared.
    """
    rows, labelled = _add_speed(rows), has_labels(rows, task)
    groups = [rows]
    if not labelled:
        names = dict.fromkeys(row["model"] for row in rows)
        groups = [[row for row in rows if row["model"] == name] for name in names]
    placed: dict[int, dict[str, Any]] = {id(row): {} for row in rows}
    for cost, get in (("flops", gigaflops), ("latency", milliseconds)):
        for group in groups:
            for row, place in zip(group, _place(group, get, task, labelled), strict=True):
                placed[id(row)] |= {f"{cost}_{key}": value for key, value in place.items()}
    return [{**row, **placed[id(row)]} for row in rows]


def has_labels(rows: Sequence[Mapping[str, Any]], task: Task) -> bool:
    """Return whether rows were evaluated with labels, not only by their similarity to the dense model."""
    return any(row.get(task.quality) is not None for row in rows)


def read_quality(row: Mapping[str, Any], task: Task, labelled: bool) -> float | None:
    """Return the quality of a row in percent, without labels its similarity to the dense model; None: not measured."""
    if row.get("failed"):
        return None
    if labelled:
        return row.get(task.quality)
    return 100.0 if row["method"] == "dense" else row.get(task.likeness)


def gigaflops(row: Mapping[str, Any]) -> float | None:
    """Return the GFLOPs (`full`) of a row, None if it failed."""
    return (row.get("flops") or {}).get("full")


def milliseconds(row: Mapping[str, Any]) -> float | None:
    """Return the latency of a row of `place_rows` at batch size 1; None if it was not timed."""
    return row.get("quiet_ms")


def time_dense(rows: Sequence[Mapping[str, Any]]) -> list[float]:
    """Return the latencies of the dense model in milliseconds, measured next to each row."""
    pairs = ((row.get("latency_ms"), row.get("latency_share")) for row in rows)
    return [latency / share for latency, share in pairs if latency and share]


def _add_speed(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return rows with `quiet_ms`, `images_per_second` and `speed_up`.

    Other load on the machine slows down a row and the dense model timed next to it equally, so their ratio is reliable
    and makes rows comparable that were timed at different moments: on a machine with twice as many processes as cores,
    a dense model took 6 to 15 ms next to the rows of one comparison.
    """
    quiet: dict[str, float | None] = {}
    for name in dict.fromkeys(row["model"] for row in rows):
        quiet[name] = min(time_dense([row for row in rows if row["model"] == name]), default=None)
    found = []
    for row in rows:
        share = row.get("latency_share") or None
        share = 1.0 if share and row["method"] == "dense" else share
        latency = quiet[row["model"]] * share if share and quiet[row["model"]] else None
        speed = {"quiet_ms": latency, "images_per_second": latency and 1e3 / latency, "speed_up": share and 1 / share}
        found.append({**row, **speed})
    return found


def _place(
    rows: Sequence[Mapping[str, Any]], cost_of: Callable[[Mapping[str, Any]], float | None], task: Task, labelled: bool
) -> list[dict[str, Any]]:
    """Return for each row `front`, `points` and `best` at its cost."""
    values = [(cost_of(row), read_quality(row, task, labelled)) for row in rows]
    places: list[dict[str, Any]] = [{"front": None, "points": None, "best": None} for _ in rows]
    known = [number for number, pair in enumerate(values) if None not in pair]
    best: int | None = None
    for number in sorted(known, key=lambda n: (values[n][0], -values[n][1])):
        cost, quality = values[number]
        if best is None or quality > values[best][1]:
            best = number
        name = {key: rows[best][key] for key in ("model", "method", "ratio")}
        front = (cost, quality) == values[best]  # two rows may be equal
        places[number] = {"front": front, "points": quality - values[best][1], "best": name}
    return places


def list_front(
    rows: Sequence[Mapping[str, Any]], cost_of: Callable[[Mapping[str, Any]], float | None], task: Task, labelled: bool
) -> list[Mapping[str, Any]]:
    """Return the rows on the Pareto front in order of cost; of equal ones the first."""
    found: dict[tuple[float, float], Mapping[str, Any]] = {}
    for row, place in zip(rows, _place(rows, cost_of, task, labelled), strict=True):
        if place["front"]:
            found.setdefault((cost_of(row), read_quality(row, task, labelled)), row)
    return [found[point] for point in sorted(found)]
