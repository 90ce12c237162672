"""Images per second of the models of all rows, timed in turn."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import torch

import ssmcompress
from ssmcompress.evaluation.latency import settings as timing_settings
from ssmcompress.evaluation.latency import time_calls
from ssmcompress.models import TokenModel
from ssmcompress.progress import line

from .machine import describe_machine
from .rows import DENSE, find_kept, identify
from .settings import Settings, read, write
from .subjects import Subject

BATCHES = (1, 8)
REPEATS = 9
# Models that are timed in turn. With more, their timings would be too far apart to see the same machine load.
AT_ONCE = 8


def time_rows(subject: Subject, settings: Settings) -> None:
    """Time the models of the first seed's rows not timed yet, in groups that each include the dense model.

    Groups are timed minutes apart, and other load on the machine slows down a whole group. A row's speed is therefore
    the dense model's speed in the fastest group, times the ratio of their medians within the row's group.
    """
    file = settings.file_of("speed", subject.name)
    found = read_speed(subject.name, settings) or {"of": identify_speed(subject.name, settings)}
    rows = found.setdefault("rows", {})
    dense = subject.load(settings.device)
    work = [(key, folder) for key, folder in find_kept(subject.name, settings) if key not in rows]
    for start in range(0, len(work), AT_ONCE):
        group = work[start : start + AT_ONCE]
        line(f"{subject.name}: timing {start + len(group)} of {len(work)} models")
        models = {DENSE: dense} | {key: ssmcompress.load(folder, device=settings.device) for key, folder in group}
        times = [time_models(models, batch, torch.device(settings.device)) for batch in BATCHES]
        for key, _ in group:
            rows[key] = {str(batch): part for batch, part in zip(BATCHES, (t[key] for t in times), strict=True)}
            rows[key]["of"] = identify(subject.name, settings, key)
        for batch, part in zip(BATCHES, times, strict=True):
            found[str(batch)] = min(part[DENSE]["ms"], found.get(str(batch), float("inf")))
        found["settings"] = timing_settings(torch.device(settings.device), torch.float32, REPEATS)
        write(file, found)


def read_speed(name: str, settings: Settings) -> dict[str, Any]:
    """Return the timings of a model on this device with this number of threads, for the rows that have not changed."""
    found = read(settings.file_of("speed", name))
    if found.get("of") != identify_speed(name, settings):
        return {}
    rows = {k: value for k, value in found["rows"].items() if value.get("of") == identify(name, settings, k)}
    return found | {"rows": rows}


def identify_speed(name: str, settings: Settings) -> dict[str, Any]:
    """Return what the times of all rows depend on."""
    device = torch.device(settings.device)
    model = torch.cuda.get_device_name(device) if device.type == "cuda" else describe_machine()
    threads = None if device.type == "cuda" else torch.get_num_threads()
    return identify(name, settings, DENSE, device=model, threads=threads, torch=torch.__version__)


@torch.inference_mode()
def time_models(models: dict[str, TokenModel], batch: int, device: torch.device) -> dict[str, dict[str, float]]:
    """Return for each model the median milliseconds per batch, and the ratio to the first model's."""

    def call(model: TokenModel) -> Callable[[], Any]:
        shape = (batch, model.config.in_chans, *model.config.image_size)
        images = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device)
        return lambda: model(images)

    times = time_calls({key: call(model) for key, model in models.items()}, device, REPEATS)
    first = next(iter(times.values()))
    return {
        key: {"ms": statistics.median(values), "share": statistics.median(values) / statistics.median(first)}
        for key, values in times.items()
    }


def images_per_second(found: dict[str, Any], key: str, batch: int) -> float | None:
    """Return the images per second of a row, or of the dense model; None: it was not timed."""
    dense = found.get(str(batch))
    if dense is None:
        return None
    share = 1.0 if key == DENSE else found["rows"].get(key, {}).get(str(batch), {}).get("share")
    return None if share is None else 1e3 * batch / (dense * share)
