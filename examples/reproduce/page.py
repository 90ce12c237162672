"""The page with all tables, in Markdown, of what has been measured so far."""

from __future__ import annotations

import os
import platform
import statistics
import textwrap
from collections.abc import Callable, Iterable, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import torch

from ssmcompress.files import write_file

from .chart import draw_chart
from .figure import copy_figure
from .found import TITLES, Found, find, list_methods
from .methods import CLASSIFIERS, HALVES, IMPORTANCES, SEGMENTERS, WITH_AND_WITHOUT
from .rows import DENSE, name_row
from .settings import MADE, Settings, read, write
from .speed import images_per_second
from .subjects import Subject

MISSING = "–"
# What stands between these lines of an earlier page is written by hand, and kept.
NOTES = ("<!-- notes, kept when the page is written again -->", "<!-- end of notes -->")


def write_page(output: Path, subjects: Sequence[Subject], settings: Settings) -> None:
    """Write the page and its figure, and all that it has as JSON into the cache; the notes of an earlier page stay."""
    found = [f for f in (find(subject, settings) for subject in subjects) if DENSE in f.rows]
    output.parent.mkdir(parents=True, exist_ok=True)
    tables = [section(found, settings) for section in SECTIONS]
    parts = [describe_run(settings), read_notes(output), chart(found, output, settings), *tables]
    parts.append(draw(found, output, settings))
    parts += [describe_cost(found, read(settings.cache / MADE))]
    text = "\n\n".join(part for part in parts if part) + "\n"
    write_file(output, text.encode(), force=True)
    write(settings.cache / "results.json", {f.name: vars(f) for f in found})


def read_notes(page: Path) -> str:
    """Return the notes in a page, with the lines around them; only these lines if there is no page or it has none."""
    begin, end = NOTES
    _, found, rest = (page.read_text(encoding="utf-8") if page.exists() else "").partition(begin)
    notes, closed, _ = rest.partition(end)
    if found and not closed:
        raise SystemExit(f"{page} has no line {end!r} after its notes, so it cannot be written again")
    return f"{begin}\n{notes.strip()}\n{end}" if notes.strip() else f"{begin}\n{end}"


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table in Markdown."""
    lines = [list(header), ["---"] * len(header), *map(list, rows)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def show(value: float | None, form: str = "{:.2f}") -> str:
    """Return a number as text."""
    return MISSING if value is None else form.format(value)


def show_seeds(values: Sequence[float]) -> str:
    """Return the mean over seeds, with the smallest and the largest value where they differ."""
    if not values:
        return MISSING
    text = f"{statistics.mean(values):.2f}"
    return text if min(values) == max(values) else f"{text} ({min(values):.2f} to {max(values):.2f})"


def wrap(text: str) -> str:
    """Return a paragraph in lines of at most 120 characters."""
    return textwrap.fill(" ".join(text.split()), 120, break_long_words=False, break_on_hyphens=False)


def describe_run(settings: Settings) -> str:
    """Return the head of the page."""
    threads = torch.get_num_threads()
    used = f"{threads} threads" if threads > 1 else "one thread"
    machine = f"{describe_machine()}; torch {torch.__version__}, {used}"
    paragraphs = (
        f"Written on {date.today()} by `examples/reproduce_tables.py`, all but its notes. Machine: {machine}, "
        f"device {settings.device}. Command:",
        f"""Figures without training: mean over {len(settings.seeds)} choices of the {settings.samples:,} images to
        calibrate, search and refit on, in brackets the smallest and the largest. Fine-tuned: the models of the first
        choice, after {settings.tune_epochs} epochs of {settings.tune_images:,} training images with the default recipe
        of `finetune`; the dense model was tuned likewise. Models of smaller images learn from labels alone, for the
        dense model does not take their images. Methods are those of [compare](compare.md). GFLOPs count what is run
        (`full`) and what papers count (`paper`, [figures](figures.md#cost)). Images a second, at batch sizes 1 and 8:
        models of the first choice, timed in turn with the dense one.""",
    )
    first, second = map(wrap, paragraphs)
    return f"# The tables of the paper, reproduced\n\n{first}\n\n```bash hours\n{settings.command}\n```\n\n{second}"


def describe_machine() -> str:
    """Return processor, cores and system."""
    name = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        name = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    return f"{name}, {os.cpu_count()} cores, {platform.system()}"


def main_table(found: Found, names: Iterable[str], share: float) -> str:
    """Return the rows of a model at the main share of the FLOPs."""
    dense, figure = found.dense, TITLES[found.figure]
    others = [] if found.figure == "top1" else [("pixel_accuracy", "pixels")]
    header = ["method", figure, *(title for _, title in others), "lost", "of dense", "GFLOPs full", "paper"]
    header += ["images/s, 1", "8", "fine-tuned"]
    rows = []
    for method, key in [(DENSE, DENSE), *list_methods(found, names, share)]:
        row = next(iter(found.rows[key].values()))
        if row.get("failed"):
            rows.append([method, "out of reach", *[""] * (len(header) - 2)])
            continue
        lost = dense[found.figure] - found.mean(key)
        shares = [r["flops_share"] for r in found.rows[key].values() if not r.get("failed")]
        cells = [show_seeds(found.values(key)), *(show_seeds(found.values(key, name)) for name, _ in others)]
        cells += [show(lost), show(100 * statistics.mean(shares), "{:.1f} %")]
        cells += [show(row["flops"][name], "{:.4f}") for name in ("full", "paper")]
        cells += [show(images_per_second(found.speed, key, batch), "{:.0f}") for batch in (1, 8)]
        rows.append([method, *cells, show(found.tuned_value(key))])
    return f"**{found.name}**, {dense['images']:,} test images:\n\n{table(header, rows)}"


def show_first(found: Sequence[Found], settings: Settings) -> str:
    """Return table 1: classifiers by method."""
    parts = [main_table(f, CLASSIFIERS, settings.share) for f in found if f.figure == "top1"]
    return "\n\n".join([f"## Table 1: methods at {settings.share:.0%} of the FLOPs", *parts]) if parts else ""


def show_best(found: Sequence[Found], settings: Settings) -> str:
    """Return what the best rows of table 1 lose, without training and after fine-tuning on all images."""
    rows = []
    for f in found:
        for key, tuned in f.best.items():
            dense, lost = f.dense["top1"], [f.dense["top1"] - value for value in f.values(key)]
            method = next(iter(f.rows[key].values()))["method"]
            share = next(iter(f.rows[key].values()))["flops_share"]
            rows.append([f.name, show(dense), method, show(100 * share, "{:.1f} %"), show_seeds(lost),
                         f"{tuned['images']:,}", show(dense - tuned["figures"]["top1"])])  # fmt: skip
    header = ["model", "dense", "best row", "FLOPs", "lost without training", "training images", "lost fine-tuned"]
    note = wrap(f"""Points of top-1 that the best row of table 1 loses, and the same model after {settings.tune_epochs}
        epochs of more training images than in the table. What the dense model gains by fine-tuning is in table 1.""")
    return f"## The best rows\n\n{note}\n\n{table(header, rows)}" if rows else ""


def show_second(found: Sequence[Found], settings: Settings) -> str:
    """Return table 2: segmentation models by method."""
    parts = [main_table(f, SEGMENTERS, settings.share) for f in found if f.figure == "miou"]
    title = f"## Table 2: segmentation at {settings.share:.0%} of the backbone's FLOPs"
    return "\n\n".join([title, *parts]) if parts else ""


def show_third(found: Sequence[Found], settings: Settings) -> str:
    """Return table 3: without and with alignment, by share of the FLOPs."""
    rows = []
    for f in found:
        for title, pair in WITH_AND_WITHOUT.items():
            for share in settings.shares:
                without, aligned = (name_row(name, share) for name in pair)
                if f.values(without) and f.values(aligned):
                    row = next(iter(f.rows[aligned].values()))
                    rows.append([
                        f.name, title, show(row["flops"]["full"], "{:.4f}"),
                        show_seeds(f.values(without)), show_seeds(f.values(aligned)),
                        show(f.mean(aligned) - f.mean(without), "{:+.2f}"),
                        show(f.tuned_value(without)), show(f.tuned_value(aligned)),
                        *(show(images_per_second(f.speed, key, 8), "{:.0f}") for key in (without, aligned)),
                    ])  # fmt: skip
    header = ["model", "tokens by", "GFLOPs", "not aligned", "aligned", "difference", "fine-tuned: not", "aligned"]
    header += ["images/s, 8: not", "aligned"]
    return f"## Table 3: with and without alignment\n\n{table(header, rows)}" if rows else ""


def show_fourth(found: Sequence[Found], settings: Settings) -> str:
    """Return table 4: importance metrics, without and with alignment."""
    rows = []
    for f in found:
        for metric, pair in IMPORTANCES.items():
            keys = [name_row(name, settings.share) for name in pair]
            if f.values(keys[0]):
                cells = [show_seeds(f.values(key)) for key in keys]
                rows.append([f.name, metric, *cells, *(show(f.tuned_value(key)) for key in keys)])
        for method, key in list_methods(f, HALVES, settings.share):
            rows.append([f.name, method.removesuffix(" aligned"), "", show_seeds(f.values(key)), "",
                         show(f.tuned_value(key))])  # fmt: skip
    header = ["model", "tokens by", "not aligned", "aligned", "fine-tuned: not", "aligned"]
    title = f"## Table 4: importance metrics at {settings.share:.0%} of the FLOPs"
    return f"{title}\n\n{table(header, rows)}" if rows else ""


def show_reasons(found: Sequence[Found], settings: Settings) -> str:
    """Return what was measured to explain the tables 3 and 4."""
    parts = []
    for f in (f for f in found if f.reasons):
        header = ["tokens by", "none", "conv", "scan", "both", "mean gap"]
        drawn = any("dropped" in r for r in f.reasons.values())
        header += ["of the dropped: background", "clutter", "object"] if drawn else []
        rows = []
        for metric, r in f.reasons.items():
            cells = [show(r["figures"][name]["top1"]) for name in ("none", "conv", "scan", "both")]
            cells.append(show(r["gap"], "{:.1f}"))
            cells += [show(100 * r["dropped"][kind], "{:.0f} %") for kind in r.get("dropped", {})]
            rows.append([metric, *cells])
        if drawn:
            everything = next(r["all"] for r in f.reasons.values() if "all" in r)
            rows.append(["all tokens", *[""] * 5, *(f"{100 * share:.0f} %" for share in everything.values())])
        parts.append(f"**{f.name}**, top-1 by which half is aligned:\n\n{table(header, rows)}")
        parts.append(layer_errors(f))
    text = wrap(
        """Each metric was measured again on fewer images, with the convolution alone aligned, the scan alone, or both.
        The mean gap is the number of dropped tokens between two kept ones. The error of a layer is what it adds to the
        kept tokens, beside what it adds in the dense model to the same tokens, when it gets the features of the dense
        model: squares as a share of those of the dense model, over all kept tokens and at the class token."""
    )
    return "\n\n".join(["## Why", text, *parts]) if parts else ""


def layer_errors(found: Found) -> str:
    """Return the table of the errors of single layers: over all kept tokens, and at the class token if there is one."""
    rows = []
    for metric, r in found.reasons.items():
        layers = list(next(iter(r["errors"].values())))
        for name, errors in r["errors"].items():
            everywhere, own = zip(*errors.values(), strict=True)
            rows.append([metric, name, "all kept", *(show(value, "{:.3f}") for value in everywhere)])
            if own != everywhere:
                rows.append([metric, name, "class token", *(show(value, "{:.3f}") for value in own)])
    header = ["tokens by", "aligned", "error at", *map(str, layers)]
    return f"Errors of single layers of {found.name}:\n\n{table(header, rows)}"


SECTIONS: tuple[Callable[[Sequence[Found], Settings], str], ...] = (
    show_first, show_best, show_second, show_third, show_fourth, show_reasons,
)  # fmt: skip


def chart(found: Sequence[Found], output: Path, settings: Settings) -> str:
    """Draw the tables 1 and 2 next to the page, and return the section with the chart; "" if nothing was measured."""
    picture = draw_chart(found, settings.share)
    if picture is None:
        return ""
    target = output.with_name(f"{output.stem}_methods.png")
    write_file(target, picture, force=True)
    title = f"All methods at {settings.share:.0%} of the FLOPs, without training and fine-tuned"
    return f"## At a glance\n\n![{title}]({target.name})"


def draw(found: Sequence[Found], output: Path, settings: Settings) -> str:
    """Write the figure next to the page, and return the section with it."""
    for f in found:
        target = output.with_name(f"{output.stem}_attention.png")
        if f.figure == "top1" and copy_figure(f.name, settings, target):
            picture = (
                f"![Attention maps of three images, of the dense, the pruned and the aligned model]({target.name})"
            )
            note = f"""*{f.name} at {settings.share:.0%} of the FLOPs ([how to read it](visualize.md)). The images are
            chosen by a rule that does not look at the maps.*"""
            return f"## Figure: attention maps\n\n{picture}\n\n{wrap(note)}"
    return ""


def describe_cost(found: Sequence[Found], made: dict[str, Any]) -> str:
    """Return the time and the memory that each part took, and how images and models were made."""
    parts = [("making " + file, value) for file, value in made.items()]
    parts += [(f"{f.name}: {part}", value) for f in found for part, value in f.cost.items()]
    if not parts:
        return ""
    rows = [[name, f"{v['seconds'] / 60:.0f}", show(v.get("peak_mb"), "{:,.0f}")] for name, v in parts]
    total = sum(value["seconds"] for _, value in parts) / 3600
    text = f"## Time and memory\n\n{table(['part', 'minutes', 'peak MB'], rows)}\n\nIn all {total:.1f} hours."
    if made:
        commands = "\n".join(value["command"] for value in made.values())
        text += " Images and models were made by these commands, with all files in the cache:\n\n"
        text += f"```bash hours\n{commands}\n```"
    return text
