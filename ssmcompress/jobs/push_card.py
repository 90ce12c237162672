"""The model card of a published model: a header for the Hugging Face Hub, and the card from the folder."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..data.clips import Views
from ..hub_names import HubName
from ..tasks import find_task
from .local_paths import PathRemover
from .push_content import CARD_FILE, Content, find_dataset

METRICS = {"top1": "accuracy", "miou": "mean_iou"}
FRONT_MATTER = re.compile(r"\A---\n.*?\n---\n+", re.DOTALL)
# The note of the card that contains names of images, which are not published.
SKIPPED = re.compile(r"(\d+ unreadable images were skipped) \(.*?\)(?=\n|\Z)", re.DOTALL)


def make_card(folder: Path, content: Content, name: HubName, license_name: str | None, remover: PathRemover) -> str:
    """Return the README.md: a header for the Hub, and the card from the folder, without paths."""
    from huggingface_hub import ModelCardData

    card = folder / CARD_FILE
    body = f"# {name.title}\n\nA vision state-space model, compressed with ssmcompress.\n"
    if card.is_file():
        body = SKIPPED.sub(r"\1", FRONT_MATTER.sub("", card.read_text(encoding="utf-8", errors="replace")))
    results = list_results(content, remover)
    kinds = [str(step.get("kind")) for step in content.config["pruning"].get("steps") or () if isinstance(step, dict)]
    base = {}
    if content.source is not None:
        # The Hub has the relations adapter, merge, quantized and finetune, but none for pruning. A pruned model has its
        # own weights, initialised from the base model, which is what finetune means.
        is_quantised = any("quanti" in kind for kind in kinds)
        base = {
            "base_model": content.source.repository,
            "base_model_relation": "quantized" if is_quantised else "finetune",
        }
    data = find_dataset(content)
    header = ModelCardData(
        license=license_name,
        library_name="ssmcompress",
        pipeline_tag=content.pipeline,
        tags=["ssmcompress", "pruning", "token-pruning", content.config["architecture"]["type"]],
        datasets=[data[0]] if data else None,
        metrics=sorted({result.metric_type for result in results}) or None,
        model_name=name.title,
        eval_results=results or None,
        **base,
    )
    return f"---\n{header.to_yaml()}\n---\n\n{remover.clean_text(body)}"


def list_results(content: Content, remover: PathRemover) -> list[Any]:
    """Return the accuracy from the report as results for the Hub; empty without labels."""
    from huggingface_hub import EvalResult

    measured, data, task = content.report.get("pruned"), content.report.get("data"), find_task(content.task)
    if not isinstance(measured, Mapping) or not isinstance(data, Mapping) or not data.get("labelled"):
        return []
    figure = task.figure(task.quality)
    value = measured.get(figure.report_key)
    if not isinstance(value, (int, float)) or not math.isfinite(value):
        return []
    views = Views.from_json(content.report.get("views"))
    measured_on = f"{data.get('images')} {'images' if views is None else f'videos, {views.describe()}'}"
    known, shown = find_dataset(content), remover.clean_path(str(data.get("name")))
    repository, split = known or (shown, None)
    return [
        EvalResult(
            task_type=content.pipeline,
            dataset_type=repository,
            dataset_name=shown,
            dataset_split=split,
            metric_type=METRICS.get(figure.report_key, figure.report_key),
            metric_name=f"{figure.title}, % ({measured_on})",
            metric_value=round(value, 4),
        )
    ]
