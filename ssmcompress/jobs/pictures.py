"""Pictures: the tokens that a pruned model keeps, what each axis costs, a fine-tuning, and methods compared."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ..models.base import TokenModel
from ..models.records import Finetuning
from ..tasks import Task

SIDE = 168  # pixels of an image in the picture
GAP = 6
PAPER = (255, 255, 255)
PRUNED = (196, 30, 140)  # a colour that is rare in photographs and absent from grey images


@torch.no_grad()
def draw_kept_tokens(model: TokenModel, images: Tensor, rows: int = 4) -> bytes:
    """Draw a PNG with a row for each image: the image, then for each stage what was pruned by then, in colour.

    Args:
        model: pruned. images: (batch, channels, height, width), prepared as for the model; the first `rows`.
    """
    images = images[:rows]
    _, decisions = model.trace(images.to(next(model.parameters()).device))
    kept = [decision.kept.cpu() for decision in decisions]
    height, width = images.shape[2:]
    size = (SIDE, round(SIDE * height / width))
    sheet = Image.new("RGB", ((size[0] + GAP) * (1 + len(kept)) - GAP, (size[1] + GAP) * len(images) - GAP), PAPER)
    for row, image in enumerate(images.cpu()):
        photo = _photo(model, image).resize(size, Image.Resampling.NEAREST)
        for column in range(1 + len(kept)):
            shown = photo
            if column:
                mask = torch.isin(model.patch_positions, kept[column - 1][row])
                dropped = Image.fromarray((~mask).numpy()).resize(size, Image.Resampling.NEAREST)
                shown = photo.copy()
                shown.paste(PRUNED, mask=dropped.convert("L").point(lambda v: 190 if v else 0))
            sheet.paste(shown, (column * (size[0] + GAP), row * (size[1] + GAP)))
    buffer = io.BytesIO()
    sheet.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def draw_axes(search: Mapping[str, Any]) -> bytes:
    """Draw a PNG with the loss over the FLOPs left, a line for each axis alone, and the combinations that were run.

    Layers and directions have a point each, with a line through those that lose least. The chosen combination has a
    star.

    Args:
        search: the section of a report, with `axes`.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    points: dict[str, list[tuple[float, float]]] = {}
    for option in search["axes"]:
        points.setdefault(option["axis"], []).append((100 * option["flops"], option["loss"]))
    tried = [(100 * run["flops"], run["loss"]) for run in search["tried"]]
    chosen = 100 * search["flops"], search["loss"]
    positive = [loss for line in (*points.values(), tried, [chosen]) for _, loss in line if loss > 0]
    floor = min(positive, default=1e-6)  # a loss of zero or less has no place on a logarithmic axis

    def place(line: Sequence[tuple[float, float]]) -> tuple[list[float], list[float]]:
        return [share for share, _ in line], [max(loss, floor) for _, loss in line]

    figure = Figure(figsize=(9, 4.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for number, (axis, line) in enumerate(points.items()):
        style = {"color": f"C{number}", "marker": "osD^"[number % 4], "markersize": 5}
        if axis == "layers":
            axes.plot(*place(line), **style, linestyle="", alpha=0.35)
            line = _least_loss(line)
        axes.plot(*place(sorted(line)), **style, linewidth=1.2, label=f"{axis} alone")
    axes.plot(*place(tried), "x", color="black", alpha=0.6, label="combinations run")
    axes.plot(*place([chosen]), "*", color="black", markersize=15, label=f"chosen: {chosen[0]:.1f} %")
    if (budget := search["asked"].get("flops")) is not None:
        axes.axvline(100 * budget, linestyle=":", color="grey", label="budget")
    axes.set(xlabel="FLOPs left (full), %", ylabel="loss, nats", xlim=(0, 100), yscale="log")
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right upper", fontsize="small")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()


def _least_loss(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points (FLOPs, loss) that no other one beats in both."""
    best: list[tuple[float, float]] = []
    for point in sorted(points):
        if not best or point[1] < best[-1][1]:
            best.append(point)
    return best


def draw_history(finetuning: Finetuning, task: Task) -> bytes:
    """Draw a PNG with the loss of every epoch, and what was measured after it."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    epochs = [entry["epoch"] for entry in finetuning.history]
    held = [entry["held_out"] or {} for entry in finetuning.history]
    figure = Figure(figsize=(8, 3.2), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    left.plot(epochs, [entry["loss"] for entry in finetuning.history], "o-", label="training")
    left.set(xlabel="epoch", ylabel="loss of augmented images")
    hits = task.figure(task.hits)
    accuracies = [entry[hits.name] for entry in finetuning.history]
    right.plot(epochs, accuracies, "o-", label=f"{hits.title}, augmented images")
    for measured in (task.figure(task.quality), task.figure(task.likeness)):
        if any(entry.get(measured.name) is not None for entry in held):
            values = [entry.get(measured.name) for entry in held]
            right.plot(epochs, values, "o-", label=f"{measured.title}, held out")
    right.axvline(finetuning.epoch, linestyle=":", color="grey", label="chosen")
    right.set(xlabel="epoch", ylabel="%")
    right.legend(fontsize="small")
    for axes in (left, right):
        axes.set_xticks(epochs if len(epochs) < 12 else epochs[:: len(epochs) // 10])
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()


def draw_pareto(rows: Sequence[Mapping[str, Any]], kind: str, task: Task) -> bytes:
    """Draw the task's quality, or without labels its likeness to the dense model, over the FLOPs left: a line a method.

    Args:
        rows: those of a comparison, each with `method`, `flops_share` and the figures of the task. kind: png or svg.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    labelled = any(row[task.quality] is not None for row in rows)
    shown = task.figure(task.quality if labelled else task.likeness)
    key = shown.name
    points: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        if row[key] is not None:
            points.setdefault(row["method"], []).append((100 * row["flops_share"], row[key]))
    figure = Figure(figsize=(9, 5.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    best: list[tuple[float, float]] = []
    for point in sorted((p for line in points.values() for p in line), key=lambda p: (p[0], -p[1])):
        if not best or point[1] > best[-1][1]:
            best.append(point)
    if best:
        axes.plot(*zip(*best, strict=True), color="lightgrey", linewidth=6, zorder=0, label="best at its FLOPs")
    for number, (method, line) in enumerate(points.items()):
        style = {
            "marker": "osD^vP*X"[number % 8],
            "color": f"C{number % 10}",
            "linestyle": "-" if number < 10 else "--",
        }
        axes.plot(*zip(*sorted(line), strict=True), **style, label=method, markersize=5, linewidth=1)
    axes.set(xlabel="FLOPs left (full), %", ylabel=f"{shown.title}, {shown.unit}")
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right upper", fontsize="x-small")
    buffer = io.BytesIO()
    figure.savefig(buffer, format=kind, dpi=120, metadata={"Date": None} if kind == "svg" else None)
    return buffer.getvalue()


def _photo(model: TokenModel, image: Tensor) -> Image.Image:
    """Undo the normalisation of an image."""
    mean, std = (torch.tensor(v)[:, None, None] for v in (model.preprocessing.mean, model.preprocessing.std))
    pixels = ((image * std + mean).clamp(0, 1) * 255).round().byte().permute(1, 2, 0)
    return Image.fromarray(pixels.squeeze(2).numpy() if pixels.shape[2] == 1 else pixels.numpy()).convert("RGB")
