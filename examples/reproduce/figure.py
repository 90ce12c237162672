"""Figure: attention maps of the dense, the plainly pruned and the aligned model on the same images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from PIL import Image

import ssmcompress
from ssmcompress.jobs.requests import DataOptions
from ssmcompress.jobs.visualize import VisualizeRequest, visualize

from .rows import identify, name_row
from .settings import Settings, read, write
from .subjects import Subject

METHOD = "clip, aligned"
IMAGES = 3


def find_figure(name: str, settings: Settings) -> Path:
    """Return the folder of the attention maps of a model."""
    return settings.cache / "figure" / name


def draw_figure(subject: Subject, settings: Settings) -> None:
    """Draw the maps of a model unless they are already drawn; skip it if the aligned model has no row yet."""
    folder = find_figure(subject.name, settings)
    kept = settings.rows_of(subject.name, settings.seeds[0]) / "models" / name_row(METHOD, settings.share)
    if is_drawn(subject.name, settings) or not kept.exists():
        return
    dense = subject.load(settings.device)
    request = VisualizeRequest(DataOptions(data=subject.test), IMAGES, settings.reason_images)
    model = ssmcompress.load(kept, device=settings.device)
    visualize(model, request, folder, dense=dense, title=subject.name, command=settings.command, force=True)
    write(settings.file_of("figure", subject.name), {"of": identify_figure(subject.name, settings)})


def is_drawn(name: str, settings: Settings) -> bool:
    """Return whether the attention maps of a model are drawn and its row has not changed since."""
    drawn = read(settings.file_of("figure", name))
    return find_figure(name, settings).exists() and drawn.get("of") == identify_figure(name, settings)


def identify_figure(name: str, settings: Settings) -> dict[str, Any]:
    """Return what the attention maps of a model depend on."""
    return identify(name, settings, name_row(METHOD, settings.share), images=IMAGES, of_images=settings.reason_images)


def copy_figure(name: str, settings: Settings, target: Path) -> bool:
    """Stack the pictures of a model vertically in a PNG file; return whether there are any."""
    files = sorted(find_figure(name, settings).glob("attention-*.png"))
    if not files or not is_drawn(name, settings):
        return False
    pictures = [Image.open(file).convert("RGB") for file in files]
    whole = Image.new("RGB", (max(p.width for p in pictures), sum(p.height for p in pictures)), "white")
    top = 0
    for picture in pictures:
        whole.paste(picture, (0, top))
        top += picture.height
    whole.quantize(256).save(target, optimize=True)
    return True
