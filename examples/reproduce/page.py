"""The Markdown page with all tables of the results so far."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import torch

from ssmcompress.files import write_file

from .chart import draw_chart
from .figure import copy_figure
from .found import Found, find
from .machine import describe_machine
from .rows import DENSE
from .settings import MADE, Settings, read, write
from .subjects import Subject
from .tables import SECTIONS
from .text import MISSING, show, table, wrap

# Text between these lines is written by hand and kept when the page is rewritten.
NOTES = ("<!-- notes, kept when the page is written again -->", "<!-- end of notes -->")


def write_page(output: Path, subjects: Sequence[Subject], settings: Settings, created: Collection[str] = ()) -> None:
    """Write the page, its figures, and all results as JSON next to it; the notes of an earlier page are kept.

    Args:
        created: names of the images and models that the script creates.
    """
    data = output.with_suffix(".json")
    earlier = read(data)
    everything = (find(subject, settings, earlier.get("models", {})) for subject in subjects)
    found = [f for f in everything if DENSE in f.rows]
    made = earlier.get("made", {}) | read(settings.cache / MADE)
    made = {file: value for file, value in made.items() if file in created}
    output.parent.mkdir(parents=True, exist_ok=True)
    tables = [section(found, settings) for section in SECTIONS]
    parts = [describe_run(found, settings), read_notes(output), chart(found, output, settings), *tables]
    parts.append(draw(found, output, settings))
    parts.append(describe_cost(found, made))
    text = "\n\n".join(part for part in parts if part) + "\n"
    write_file(output, text.encode(), force=True)
    models = {f.name: {key: value for key, value in vars(f).items() if key != "elsewhere"} for f in found}
    write(data, {"models": models, "made": made})


def read_notes(page: Path) -> str:
    """Return the notes of a page with their marker lines; the marker lines alone if there is no page or no notes."""
    begin, end = NOTES
    _, found, rest = (page.read_text(encoding="utf-8") if page.exists() else "").partition(begin)
    notes, closed, _ = rest.partition(end)
    if found and not closed:
        raise SystemExit(f"{page} has no line {end!r} after its notes, so it cannot be written again")
    return f"{begin}\n{notes.strip()}\n{end}" if notes.strip() else f"{begin}\n{end}"


def describe_run(found: Sequence[Found], settings: Settings) -> str:
    """Return the header of the page."""
    here = describe_run_here(settings)
    machines = sorted({value.get("machine", here) for f in found for value in f.cost.values()}) or [here]
    samples = sorted({f.samples for f in found if f.samples is not None}) or [settings.samples]
    images = " or ".join(f"{count:,}" for count in samples)
    paragraphs = (
        f"Written on {date.today()} by `examples/reproduce_tables.py`, except for the notes. Machine: "
        f"{'; and '.join(machines)}. Command:",
        f"""Figures without training: mean over {len(settings.seeds)} choices of the {images} images to calibrate,
        search and refit on, with the smallest and the largest in brackets, and the number of choices measured if not
        all. Fine-tuned: the models of the first choice, after {settings.tune_epochs} epochs of
        {settings.tune_images:,} training images with the default recipe of `finetune`; the dense model was fine-tuned
        in the same way. Models for smaller images learn from labels only, because the dense model does not take their
        images. The methods are described in [compare](compare.md). GFLOPs count what is run (`full`) and what papers
        count (`paper`, [figures](figures.md#cost)). Images per second, at batch sizes 1 and 8: the models of the first
        choice were timed in turn with the dense one, in groups; a figure is the throughput of the dense model in the
        fastest group, divided by the ratio of the two medians. {MISSING}: not measured, or not possible for this
        model.""",
    )
    first, second = map(wrap, paragraphs)
    return f"# The tables of the paper, reproduced\n\n{first}\n\n```bash hours\n{settings.command}\n```\n\n{second}"


def describe_run_here(settings: Settings) -> str:
    """Return the machine, torch version, number of threads and device of this run."""
    threads = torch.get_num_threads()
    used = f"{threads} threads" if threads > 1 else "one thread"
    return f"{describe_machine()}, torch {torch.__version__}, {used}, device {settings.device}"


def chart(found: Sequence[Found], output: Path, settings: Settings) -> str:
    """Draw the chart next to the page and return its section; "" if nothing was measured."""
    picture = draw_chart(found, settings.share)
    if picture is None:
        return ""
    target = output.with_name(f"{output.stem}_methods.png")
    write_file(target, picture, force=True)
    title = f"The methods of tables 1 to 3 at {settings.share:.0%} of the FLOPs, without training and fine-tuned"
    return f"## At a glance\n\n![{title}]({target.name})"


def draw(found: Sequence[Found], output: Path, settings: Settings) -> str:
    """Write the figures next to the page and return their section."""
    parts = []
    for f in found:
        target = output.with_name(f"{output.stem}_attention_{f.name}.png")
        kept = f.elsewhere and target.exists()
        if f.figure == "top1" and (kept or copy_figure(f.name, settings, target)):
            title = f"Attention maps of three images, of {f.name}, dense, pruned and aligned"
            parts.append(f"![{title}]({target.name})\n\n*{f.name}*")
    note = f"""Models at {settings.share:.0%} of the FLOPs ([how to read it](visualize.md)). The images are chosen by a
        rule that does not look at the maps."""
    return "\n\n".join(["## Figures: attention maps", wrap(note), *parts]) if parts else ""


def describe_cost(found: Sequence[Found], made: dict[str, Any]) -> str:
    """Return the time and memory that each part took, and the commands that created images and models."""
    parts = [("making " + file, value) for file, value in made.items()]
    parts += [(f"{f.name}: {part}", value) for f in found for part, value in f.cost.items()]
    if not parts:
        return ""
    rows = [[name, f"{v['seconds'] / 60:.0f}", show(v.get("peak_mb"), "{:,.0f}")] for name, v in parts]
    total = sum(value["seconds"] for _, value in parts) / 3600
    note = f"""{total:.1f} hours in total; some parts were run at the same time. The peak is the peak memory of the
        process so far, so a part that was run after another one has at least its peak."""
    text = f"## Time and memory\n\n{table(['part', 'minutes', 'peak MB'], rows)}\n\n{wrap(note)}"
    if made:
        commands = "\n".join(value["command"] for value in made.values())
        text += "\n\nImages and models are created by these commands; all files are in the cache:\n\n"
        text += f"```bash hours\n{commands}\n```"
    return text
