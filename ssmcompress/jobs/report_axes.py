"""Axes in a readable report: what was trimmed, the cost of each axis of a search alone, and what was tried."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ..tasks import find_task

AXES_FILE = "axes.png"
# Number of layers and directions in a short table; a Vim has three for each layer.
FEW_LAYERS = 6
Report = Mapping[str, Any]
Rows = list[tuple[str, list[str]]]


def format_trims(trims: Mapping[str, Any]) -> str:
    """Describe trims in words: "3 of 8 states, 96 of 128 channels, without layer 4"; "" for nothing.

    Args:
        trims: from `describe_trims`; without `dense`, the sizes of the dense model are left out.
    """
    dense, parts = trims.get("dense") or {}, []
    for axis in ("states", "channels"):
        if (kept := trims.get(axis)) is not None:
            of = f" of {_range(dense[axis])}" if axis in dense else ""
            by_layer = f" ({', '.join(f'{n:d}' for n in kept)} by layer)" if _differ(kept) else ""
            parts.append(f"{_range(kept)}{of} {axis}{by_layer}")
    if layers := trims.get("layers"):
        of = f" of {dense['layers']:d}" if "layers" in dense else ""
        parts.append(f"without layer{'s' if len(layers) > 1 else ''} {', '.join(f'{n:d}' for n in layers)}{of}")
    parts += [
        f"layer {layer} without scan direction{'s' if len(paths) > 1 else ''} {', '.join(f'{n:d}' for n in paths)}"
        for layer, paths in (trims.get("directions") or {}).items()
    ]
    return ", ".join(parts)


def list_trim_notes(report: Report) -> list[str]:
    """Return sentences about what was trimmed and on which images; empty if nothing was."""
    trims = report.get("trims") or {}
    if not (what := format_trims(trims)):
        return [] if report["stages"] else ["nothing was dropped or trimmed: the model runs as it is"]
    lines = [f"trimmed: {what}"]
    fitted = trims.get("fitted_on") or {}
    by_name: dict[str, dict[str, int]] = {}
    for axis, images in fitted.items():
        by_name.setdefault(str(images["name"]), {})[axis] = images["images"]
    for name, counts in by_name.items():
        if len(set(counts.values())) == 1:
            lines.append(f"{' and '.join(counts)} trimmed on {next(iter(counts.values())):d} images of {name}")
        else:
            each = " and ".join(f"{axis} on {count:d}" for axis, count in counts.items())
            lines.append(f"trimmed: {each} images of {name}")
    return lines


def has_axes(report: Report) -> bool:
    """Return whether the search of a report measured axes."""
    return bool((report.get("search") or {}).get("axes"))


def format_axes(report: Report, whole: bool = True) -> tuple[list[str], Rows]:
    """Return a table (header, rows) of the FLOPs and the loss of each axis alone; no rows if it was not measured.

    States, channels and tokens are sorted by the number kept, in descending order, layers by their loss relative to
    what they save.

    Args:
        whole: list all layers and directions, not only the first FEW_LAYERS.
    """
    header = ["each axis alone", "FLOPs left", "loss, nats"]
    if not has_axes(report):
        return header, []
    dense = (report.get("dense") or {}).get("sizes") or {}
    axes: dict[str, list[Mapping[str, Any]]] = {}
    cost = _layer_cost(report)
    for option in report["search"]["axes"]:
        axes.setdefault(str(option["axis"]), []).append(option)
    rows: Rows = []
    for axis, options in axes.items():
        options = sorted(options, key=cost if axis == "layers" else lambda option: -option["flops"])
        shown = options if whole or axis != "layers" else options[:FEW_LAYERS]
        rows += [(_name_option(option, dense), [_percent(option["flops"]), _nats(option["loss"])]) for option in shown]
        if len(shown) < len(options):
            rows.append((f"layers: {len(options) - len(shown)} others lose more for what they save", ["", ""]))
    return header, rows


def format_tried(report: Report) -> tuple[list[str], Rows]:
    """Return a table of the combinations run by a search, the chosen one first; empty if only tokens were searched."""
    header = ["combinations run", "FLOPs left", "loss, nats", "expected"]
    tried = report["search"]["tried"] if has_axes(report) else []
    rows = [
        (_name_combination(run), [_percent(run["flops"]), _nats(run["loss"]), _nats(run["expected"])]) for run in tried
    ]
    return header, [
        (f"{name} (chosen)", cells) if number == 0 else (name, cells) for number, (name, cells) in enumerate(rows)
    ]


def list_search_notes(report: Report) -> list[str]:
    """Return sentences about the request and the result of a search over axes."""
    if not has_axes(report):
        return []
    search = report["search"]
    asked, data, axes = search["asked"], search["data"], dict.fromkeys(option["axis"] for option in search["axes"])
    found = f"{_percent(search['flops'])} of the FLOPs at a loss of {_nats(search['loss'])} nats"
    about = f"searched over {', '.join(axes)} on {data['images']} images of {data['name']}"
    if asked.get("max_drop") is not None and (drop := search.get("drop")):
        task = find_task(report.get("task"))
        what = f"points of {task.figure(task.quality).title}" if drop["labels"] else task.lost_likeness
        wish = f"at most {asked['max_drop']:g} {what} lost; {drop['points']:.2f} lost on {drop['images']} images"
    elif asked.get("latency") is not None:
        wish = f"at most {_percent(asked['latency'])} of the latency; {_percent(search['latency'])} before repair"
    elif asked.get("flops") is not None:
        wish = f"at most {_percent(asked['flops'])} of the FLOPs, of which {_percent(search['reachable']['flops'])} "
        wish += "can be reached"
    else:
        return [f"{about}: {found}"]
    return [f"{about}: {found}", f"requested: {wish}"]


def _name_option(option: Mapping[str, Any], dense: Mapping[str, Any]) -> str:
    """Return the name of one way to trim one axis."""
    axis = str(option["axis"])
    if axis == "tokens":
        return f"tokens: {_name_stages(option['stages'])}"
    trims = option["trims"]
    if axis in ("states", "channels"):
        return f"{axis}: {_range(trims[axis])}" + (f" of {_range(dense[axis])}" if axis in dense else "")
    if trims.get("layers"):
        return f"layers: without {', '.join(f'{n:d}' for n in trims['layers'])}"
    return f"layers: {format_trims(trims).removeprefix('layer ')}"


def _name_combination(run: Mapping[str, Any]) -> str:
    """Return the name of a combination that was run."""
    parts = [format_trims(run["trims"])]
    parts += [f"tokens {_name_stages(run['stages'])}"] if run["stages"] else []
    return ", ".join(part for part in parts if part) or "nothing trimmed"


def _name_stages(stages: Sequence[Mapping[str, Any]]) -> str:
    """Return the share of the tokens left after each of several layers, as text."""
    left, shares = 1.0, []
    for stage in stages:
        left *= 1 - stage["ratio"]
        shares.append(f"{100 * left:.0f}")
    layers = ", ".join(f"{stage['after']:d}" for stage in stages)
    return f"{', '.join(shares)} % after layer{'s' if len(stages) > 1 else ''} {layers}"


def _layer_cost(report: Report) -> Callable[[Mapping[str, Any]], float]:
    """Return a function from an option to its loss relative to the FLOPs it saves in this implementation."""
    dense = report["dense"]
    share = dense["flops_as_run"] / dense["flops"]["full"] if "flops_as_run" in dense else 1.0
    return lambda option: max(0.0, option["loss"]) / max(share - option["flops"], 1e-9)


def _differ(counts: int | Sequence[int]) -> bool:
    return not isinstance(counts, int) and len(set(counts)) > 1


def _range(counts: int | Sequence[int]) -> str:
    """Return one number if all layers are equal, otherwise the smallest and the largest."""
    values = [counts] if isinstance(counts, int) else counts
    least, most = min(values), max(values)
    return f"{least:d}" if least == most else f"{least:d} to {most:d}"


def _percent(share: float) -> str:
    return f"{share:.1%}"


def _nats(loss: float) -> str:
    return f"{loss:.5f}"
