"""The report of a compression as JSON: its sections, and reading it back."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..data.batches import Batches
from ..data.content import different, hash_contents
from ..errors import InputError
from ..evaluation.flops import backbone_flops, dense_flops, flops, flops_as_run, flops_by_part, flops_of
from ..evaluation.latency import latency_settings
from ..evaluation.timings import Timings, describe_load
from ..files import WEB_PAGE, check_target, read_text, write_file
from ..hub_names import HubName, parse_hub_name
from ..models.base import TokenModel
from ..models.hub import fetch, fetch_files, title_of
from ..models.records import INPUT, list_own_steps
from ..models.saved import CONFIG_FILE, versions
from ..models.state_dict import read_metadata
from ..progress import note
from ..pruning.plan import Calibration
from ..tasks import Evaluation
from . import report_text as text
from .doubts import Subject, doubt_calibration, doubt_reconstruction, find_doubts
from .measuring import Measured, describe_views
from .report_charts import SENSITIVITY_FILES, draw_charts, link_attention
from .report_refits import add_measured, describe_learning
from .trim_sizes import describe_dense, describe_trims

if TYPE_CHECKING:
    import torch

    from ..export.onnx import Exported

REPORT_FILE = "report.json"
SHOWN = (*text.PICTURES, *SENSITIVITY_FILES)  # files used by the web page, in addition to the report
WANTED = "expected a folder that `ssmcompress prune` wrote, or a .safetensors file that was exported from it"


def make_report(
    measured: Measured,
    overlap: int | None,
    sections: Mapping[str, Any],
    command: str,
    earlier: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Return the report of `measured.models["pruned"]`, a JSON object.

    Args:
        overlap: number of evaluation images that were also used for training or fitting; None: unknown.
        sections: further sections: `calibration`, `reconstruction` and those of other steps.
        earlier: the report of the model that this one was made from: its columns are copied if `measures_the_same`.
    """
    pruned, result = measured.models["pruned"], measured.results["pruned"]
    blocks = {
        name: describe_model(name, model, measured) if model is not None else describe_missing(pruned)
        for name, model in measured.models.items()
    }
    data = describe_data(measured.images, result, overlap)
    about = {
        "content": hash_contents(measured.images.digests, measured.images.content_labels()),
        "dtype": measured.options.dtype,
        "preprocessing": pruned.preprocessing.to_dict(),
        **describe_views(pruned, measured.options),
    }
    if earlier and measures_the_same(earlier, about):
        blocks = {name: earlier[name] for name in text.list_columns(earlier) if name != "pruned"} | blocks
    device = next(pruned.parameters()).device
    subject = Subject.of(pruned, measured.images.source, result.images)
    if "reconstruction" in sections:
        sections = {**sections, "reconstruction": add_measured(sections["reconstruction"], measured)}
    return {
        "data": data,
        "content": about["content"],
        **blocks,
        "task": pruned.task.name,
        "agreement": pruned.task.describe(result, compared=True),
        "warnings": [
            *find_doubts(subject, measured.results.get("dense"), result),
            *doubt_calibration(sections.get("calibration") or {}),
            *doubt_reconstruction(sections.get("reconstruction") or {}),
        ],
        "stages": list_stages(pruned),
        "alignment": describe_alignment(pruned),
        **({"made_from": made_from.values} if (made_from := pruned.find_record(INPUT)) is not None else {}),
        "plan": pruned.plan.to_dict(tensors=False),
        "trims": describe_trims(pruned),
        "preprocessing": about["preprocessing"],
        **sections,
        "dtype": about["dtype"],
        **({"views": about["views"]} if "views" in about else {}),
        **describe_wide(measured),
        "latency": describe_latency(measured.timings, device) if measured.timings else None,
        "command": command,
        "versions": versions(),
    }


def describe_wide(measured: Measured) -> dict[str, Any]:
    """Describe the models in float32, as `float32`, if they were evaluated in another dtype.

    `agreement` of each compares the model in that dtype with itself in float32.
    """
    task = measured.models["pruned"].task
    columns = {
        name: {**task.describe(wide, compared=False), "agreement": task.describe(narrow, compared=True)}
        for name, (wide, narrow) in measured.wide.items()
    }
    return {"float32": columns} if columns else {}


def measures_the_same(earlier: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    """Return whether two reports use the same images and labels, with the same preparation and views, in one dtype."""
    if not isinstance(prepared := earlier.get("preprocessing"), Mapping):
        return False
    one, other = ({k: v for k, v in p.items() if k != "assumed"} for p in (prepared, now["preprocessing"]))
    return one == other and all(earlier.get(name) == now.get(name) for name in ("content", "dtype", "views"))


def describe_model(name: str, model: TokenModel, measured: Measured) -> dict[str, Any]:
    """Describe the model of a column: its figures and its cost.

    `flops_by_part` has the GFLOPs (`full`) of each part, `flops_backbone` those of a segmentation model without its
    neck and head, `flops_as_run` those of this implementation if the published code takes more, and `sizes`, for the
    dense model, the sizes of its layers.
    """
    result, timings = measured.results[name], measured.timings
    timed = timings is not None and name in timings.rounds
    value = {
        **model.task.describe(result, compared=False),
        "flops": flops(model),
        "flops_by_part": flops_by_part(model),
        **describe_as_run(flops(model)["full"], flops_as_run(model)["full"]),
        **({"flops_backbone": backbone} if (backbone := backbone_flops(model)) is not None else {}),
        "params": sum(p.numel() for p in model.parameters()),
        "latency_ms": timings.median(name) if timed else None,
        "latency_quartiles_ms": timings.quartiles(name) if timed else None,
    }
    return {**value, "sizes": describe_dense(model)} if name == "dense" else value


def describe_missing(pruned: TokenModel) -> dict[str, Any]:
    """Describe a dense model that no longer exists."""
    unknown = pruned.task.describe(None, compared=False)
    unknown |= dict.fromkeys(("params", "latency_ms", "latency_quartiles_ms"))
    published, dense = dense_flops(pruned), pruned.dense_config
    share = flops_of(pruned, dense)
    as_run = describe_as_run(published["full"], share * published["full"])
    parts = pruned.count_flops(dense, pruned.counts_for((), config=dense), "full", as_run=False)
    counted = {"flops": published, "flops_by_part": {part: count / 1e9 for part, count in parts.items()}, **as_run}
    return {**unknown, **counted, "sizes": describe_dense(pruned)}


def describe_as_run(published: float, ours: float) -> dict[str, float]:
    """Return `flops_as_run`, the GFLOPs of this implementation, if they differ from those of the published code."""
    return {} if math.isclose(published, ours) else {"flops_as_run": ours}


def describe_latency(timings: Timings, device: torch.device) -> dict[str, Any]:
    """Describe how latency was measured, how busy the machine was, and how much faster the pruned model is."""
    unknown = dict.fromkeys(("speed_up", "speed_up_quartiles", "speed_up_interval", "within_noise"))
    compared = timings.compare("dense", "pruned") if "dense" in timings.rounds else unknown
    return {**latency_settings(device), **describe_load(timings.load), **compared}


def describe_data(measured: Batches, result: Evaluation, overlap: int | None) -> dict[str, Any]:
    return {
        "name": measured.source.name,
        "images": result.images,
        "labelled": result.labelled,
        "overlap": overlap,
        "unreadable": measured.unreadable_names(),
    }


def describe_calibration(model: TokenModel, calibration: Batches) -> dict[str, Any]:
    """Describe the calibration, with the share of images that kept each position at each stage, and its mean score.

    `distinct` is the number of different images, and `classes` how many of the model's classes they include; null
    without labels. `content` is a hash of the images with their labels; null if none was read.

    Args:
        model: calibrated and pruned. calibration: the images, as far as they were read.
    """
    read, labels = np.flatnonzero(calibration.digests), calibration.source.labels
    statistics = model.plan.calibration or Calibration(calibration.source.name, len(calibration.index), ())
    return {
        "name": statistics.name,
        "images": statistics.images,
        "unreadable": calibration.unreadable_names(),
        "distinct": len(different(calibration.digests)),
        "content": hash_contents(calibration.digests, calibration.content_labels()) if len(read) else None,
        "classes": None if labels is None else {"seen": len({labels[i] for i in read}), "of": model.config.num_classes},
        "kept_share": [[round(v, 4) for v in kept.tolist()] for kept in statistics.kept],
        "mean_score": [[round(v, 6) for v in scores.tolist()] for scores in statistics.scores],
    }


def describe_alignment(model: TokenModel) -> dict[str, Any]:
    """Describe what is aligned, with the mean over tokens where the model reads one out."""
    alignment = model.plan.alignment
    block = {"conv": alignment.conv, "scan": alignment.scan, "gap": model.plan.gap if alignment.scan else None}
    return block | ({"pool": alignment.pool} if model.pools else {})


def describe_reconstruction(model: TokenModel, seconds: float) -> dict[str, Any] | None:
    """Describe the reconstruction, with its time in seconds and the ranks of each layer's corrections.

    None if this run did not reconstruct the model, even if it was made from a reconstructed one.
    """
    record = model.find_record("reconstruction")
    if record not in list_own_steps(model.steps):
        return None
    ranks = {layer: correction[0].out_features for layer, correction in model.corrections.items()}
    class_ranks = {layer: correction[0].out_features for layer, correction in model.class_corrections.items()}
    found = {"correction_ranks": ranks, "class_correction_ranks": class_ranks}
    if model.pools:
        readout = model.readout_correction
        found["readout_correction_rank"] = None if readout is None else readout[0].out_features
    return {**record.to_dict(), "learning": describe_learning(record), "seconds": round(seconds, 2), **found}


def list_stages(model: TokenModel) -> list[dict[str, Any]]:
    """Return for each stage of a pruned model its layer, the tokens before and after it, and the metric."""
    counts = model.token_counts()
    found = zip(model.plan.stages, model.kept_counts(), strict=True)
    return [
        {"after": s.after, "kept": kept, "of": counts[model.count_index(s.after)], "importance": s.importance}
        for s, kept in found
    ]


def read_report(model: str | Path | None) -> tuple[Path, dict[str, Any]]:
    """Return (model, its report): a folder with report.json, a .safetensors file with a report, or the newest folder.

    For a model on the Hub, the report is downloaded with the files it shows; the path is in the local cache.
    """
    if model is not None and (hub := parse_hub_name(model)) is not None:
        return _read_path(_fetch_report(hub), str(hub))
    path = Path(model) if model is not None else find_newest()
    return _read_path(path, str(path))


def _fetch_report(name: HubName) -> Path:
    """Download a report with its pictures and measurements, without the weights; or a file that may contain one."""
    return fetch(name).path if name.file is not None else fetch_files(name, (REPORT_FILE, *SHOWN))


def _read_path(path: Path, name: str) -> tuple[Path, dict[str, Any]]:
    """Implement `read_report` for a path; errors use the name given by the user."""
    if path.name == REPORT_FILE and path.is_file():
        path = path.parent
    file = path / REPORT_FILE if path.is_dir() else path
    try:
        content = read_text(file) if path.is_dir() else read_metadata(file)["ssmcompress_report"]
        report = json.loads(content, parse_constant=_no_constant)
    except FileNotFoundError as error:
        missing = f"no {REPORT_FILE} in {name}" if path.is_dir() else f"{name}: no such file or folder"
        raise InputError(f"{missing}: {WANTED}") from error
    except (KeyError, InputError) as error:
        damaged = path.suffix == ".safetensors" and isinstance(error, InputError)
        raise InputError(f"{file} {f'is damaged ({error})' if damaged else 'has no report'}: {WANTED}") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{file}: not a report ({error})") from error
    except OSError as error:
        raise InputError(f"cannot read {file}: {error.strerror or error}") from error
    try:
        text.format_rows(report), text.format_notes(report), text.format_fits(report)
        text.format_axes(report), text.format_tried(report)
        json.dumps(report, allow_nan=False)  # Python reads 1e999 as infinity
    except (KeyError, TypeError, ValueError, AttributeError, ArithmeticError, IndexError) as error:
        raise InputError(f"{file}: not a report of ssmcompress ({type(error).__name__} {error})") from error
    return path, report


def record_export(model: str | Path, file: Path, result: Exported) -> None:
    """Record an ONNX file under `onnx` in the report of its model's folder; do nothing if there is no report.

    A note is shown if the report cannot be written, as in a folder that is read-only.
    """
    folder = Path(model)
    try:
        report = read_report(folder)[1] if folder.is_dir() else None
    except InputError:  # a report is optional
        return
    if report is None:
        return
    inside = _is_in(file, folder)
    report["onnx"] = {"file": file.name if inside else str(file.absolute()), **asdict(result), "passed": result.passed}
    parts = [name for name in (file.name, f"{file.name}.data") if inside and (folder / name).is_file()]
    _write_report(folder, report, parts)


def _is_in(file: Path, folder: Path) -> bool:
    """Return whether a file lies directly in a folder."""
    return file.absolute().parent.resolve() == folder.resolve()


def _write_report(folder: Path, report: dict[str, Any], files: Sequence[str]) -> None:
    """Write the report of a folder, with further names of files that belong to it; show a note if that fails."""
    if files:
        report["files"] = sorted({*report.get("files", ()), *files})
    content = json.dumps(report, indent=2).encode() + b"\n"
    try:
        write_file(folder / REPORT_FILE, content, force=True)
    except InputError as error:
        note(f"the report was not updated: {error}")


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def write_page(report: Mapping[str, Any], model: Path, file: Path, force: bool) -> None:
    """Write the report of a folder or file as a self-contained web page."""
    check_target(file, force, [model], kind=WEB_PAGE)
    pictures = {name: (model / name).read_bytes() for name in text.PICTURES if (model / name).is_file()}
    charts, notes = draw_charts(report, model)
    page = text.render_html(report, title_of(model), pictures, charts, notes, link_attention(model, file))
    write_file(file, page.encode(), force, WEB_PAGE)
    if model.is_dir() and _is_in(file, model):
        _write_report(model, dict(report), [file.name])


def find_newest(root: Path = Path("compressed")) -> Path:
    """Return the most recently written compressed model under `root`."""
    folders = [file.parent for file in root.glob(f"*/{CONFIG_FILE}") if not file.parent.name.startswith(".")]
    if not folders:
        raise InputError(f"no compressed model under {root}/: name one, or run `ssmcompress prune` first")
    return max(folders, key=lambda folder: (folder / CONFIG_FILE).stat().st_mtime_ns)
