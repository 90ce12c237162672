"""Fine-tuning as a job: a pruned model and images in, a folder with the better model and its report out."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from .. import processes
from ..compression.finetune.loop import finetune
from ..compression.finetune.recipe import Recipe
from ..compression.finetune.state import remove_state
from ..compression.search.sensitivity import SENSITIVITY_FILE
from ..data.batches import Batches, sample_indices
from ..data.find import open_images
from ..errors import InputError
from ..evaluation.measure import measure
from ..files import check_target
from ..models.base import TokenModel
from ..models.checkpoint import CONFIG_FILE, serialise, versions
from ..models.records import MadeBy
from ..progress import line
from . import report as reports
from .pictures import history_chart
from .prune import Setup, apart, write_measured

# Of the images to learn from, one in so many chooses the best epoch, at most so many; fewer than the least choose none.
HELD_OUT_SHARE, HELD_OUT_MOST, HELD_OUT_LEAST = 20, 1024, 32
LAST_FILE = "last.safetensors"


def state_file(output: Path) -> Path:
    """Where the state of the run that is to write the folder `output` is kept."""
    return output.with_name(f"{output.name}.training.pt")


def finetune_folder(
    model: TokenModel,
    output: str | Path,
    setup: Setup,
    *,
    dense: TokenModel | None = None,
    inside: Path | None = None,
    resume: bool = False,
    force: bool = False,
    command: str = "",
) -> dict[str, Any]:
    """Fine-tune a pruned model and write a folder with the best and the last weights; returns the report in it.

    Args:
        model: pruned.
        output: the folder to write. While the run lasts, its state is in the file `state_file(output)`.
        setup: with `data` to learn from, `eval_data` to measure on (else a tenth of `data` is kept for that) and the
            `recipe`.
        dense: the teacher (unless `setup` wants none), and what the report compares with; None: the labels alone.
        inside: the folder that `model` was read from; it may be `output`, which is then replaced, with `force` or
            `resume`.
        resume: go on from the state, if there is one; a finished run is done at once.
        force: replace `output` if ssmcompress wrote it, and start afresh whatever state there is.
        command: recorded as how it was made.

    Raises:
        InputError: data, model or output that cannot be used.
        SsmCompressError: the loss is not finite.
        KeyboardInterrupt: after the state was saved.
    """
    output, recipe, state = Path(output), setup.recipe or Recipe(), state_file(Path(output))
    if model.plan is None:
        raise InputError("the model prunes nothing; fine-tuning is for pruned models: run prune first")
    if setup.data is None:
        raise InputError("fine-tuning needs images to learn from: give `data`")
    if resume and (report := finished(output, setup, recipe)) is not None:
        if processes.is_main():
            remove_state(state)
        line(f"{output} is finished")
        return report
    goes_on_inside = resume and inside is not None and output.exists() and output.resolve() == inside.resolve()
    may_replace = force or goes_on_inside
    if processes.is_main():
        check_target(output, may_replace, [setup.data, setup.eval_data])
        if state.exists() and not resume:
            if not force:
                raise InputError(
                    f"{state} holds the state of an interrupted run: `resume=True` goes on, `force=True` starts afresh"
                )
            remove_state(state)
    training, held_out, measured = split(model, setup)
    warn_about_classes(training, model.config.num_classes)
    teacher = dense if setup.teacher else None
    options = {"dense": teacher, "recipe": recipe, "held_out": held_out, "seed": setup.seed}
    try:
        with _logger(setup.tensorboard) as log:
            best, last = finetune(model, training, state=state, resume=resume, log=log, **options)
    except KeyboardInterrupt:
        if state.exists():
            line(
                f"the state is in {state}: `ssmcompress finetune {inside or 'MODEL'} ... -o {output} --resume` goes on"
            )
        raise
    models = {"dense": dense, before(model): model, "pruned": best}
    there = {name: one for name, one in models.items() if one is not None}
    results = measure(there, measured, dtype=setup.dtype, distributed=processes.count() > 1)
    for images in (measured, training):
        images.sync()
    for tuned in (best, last):
        tuned.made_by = MadeBy(command, versions())
    earlier = _earlier_report(inside)
    about = {name: earlier.get(name) for name in ("calibration", "reconstruction")}
    about |= {"search": earlier["search"]} if "search" in earlier else {}
    about["calibration"] = about["calibration"] or {"name": None, "images": 0, "unreadable": []}
    record = best.find_record("finetuning")
    about["finetuning"] = {**asdict(record), "unreadable": training.unreadable_names()}
    overlap = _overlap(training, measured, setup, earlier)
    extra = {LAST_FILE: serialise(last), reports.HISTORY_FILE: history_chart(record)}
    if inside is not None and (measured_before := Path(inside) / SENSITIVITY_FILE).is_file():
        extra[SENSITIVITY_FILE] = measured_before.read_bytes()
    report = write_measured(
        models,
        results,
        measured,
        overlap,
        about,
        output,
        setup,
        command=command,
        force=may_replace,
        extra=extra,
        earlier=earlier,
    )
    if processes.is_main():
        remove_state(state)
    return report


def _overlap(training: Batches, measured: Batches, setup: Setup, earlier: Mapping[str, Any]) -> int | None:
    """How many of the measured images something was learnt from; None where that is not known.

    Images are told apart by the name of their data set. What an earlier command drew to calibrate on is not known.
    """
    if setup.eval_data is not None and training.source.name == measured.source.name:
        return len(measured.digests)
    name, images = measured.source.name, len(measured.digests)
    before, calibrated = earlier.get("data", {}), (earlier.get("calibration") or {}).get("name")
    if (before.get("name"), before.get("images")) == (name, images):
        return before.get("overlap")
    return None if calibrated == name else 0


def before(model: TokenModel) -> str:
    """What reports call a model that is fine-tuned next."""
    if model.find_record("finetuning") is not None:
        return "before"
    if (refit := model.find_record("reconstruction")) is not None and refit.kept:
        return "reconstructed"
    return "aligned" if model.plan.alignment.conv or model.plan.alignment.scan else "naive"


def split(model: TokenModel, setup: Setup) -> tuple[Batches, Batches | None, Batches]:
    """Images to learn from, to choose the epoch by (or None), and to measure on: the last two a process's share."""
    images = open_images(setup.data, model.config.num_classes)
    if setup.eval_data is None:
        if len(images) < 3:
            raise InputError(
                f"{images.name} has {len(images)} images: expected two to learn from and one to measure on"
            )
        others, (learnt, rest) = images, apart(len(images), setup.seed)
    else:
        others = open_images(setup.eval_data, model.config.num_classes)
        learnt, rest = list(range(len(images))), range(len(others))
    count = min(HELD_OUT_MOST, len(learnt) // HELD_OUT_SHARE)
    held, chosen = sample_indices(len(learnt), count if count >= HELD_OUT_LEAST else 0, setup.seed)
    options = setup.batch_size, setup.workers
    return (
        Batches(images, model.transform(), [learnt[i] for i in chosen], *options),
        Batches(images, model.transform(), processes.shard([learnt[i] for i in held]), *options) if held else None,
        Batches(others, model.transform(), processes.shard(rest), *options),
    )


def warn_about_classes(training: Batches, num_classes: int) -> None:
    """Say which of the model's classes no image to learn from has."""
    labels = training.source.labels
    if labels is None:
        return
    missing = sorted(set(range(num_classes)) - {labels[i] for i in training.index})
    if missing:
        names = training.source.classes
        shown = ", ".join(names[i] if names else str(i) for i in missing[:5]) + (", ..." if len(missing) > 5 else "")
        line(f"no image of {len(missing)} classes to learn from: {shown}")


def finished(output: Path, setup: Setup, recipe: Recipe) -> dict[str, Any] | None:
    """The report of a folder that this very run has written, None if it has not; InputError if another run has."""
    try:
        done = json.loads((output / CONFIG_FILE).read_text(encoding="utf-8"))["pruning"]["finetuning"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    if done is None:
        return None
    wanted = asdict(recipe) | {"seed": setup.seed, "data": setup.data}
    found = dict(done.get("recipe", {})) | {"seed": done.get("seed"), "data": done.get("name")}
    # Of fewer images than a batch, a step takes them all.
    wanted["batch_size"] = min(wanted["batch_size"], found.get("batch_size", 0))
    if differences := [name for name in wanted if found.get(name) != wanted[name]]:
        told = ", ".join(f"{name} {found.get(name)!r} for {wanted[name]!r}" for name in differences[:3])
        raise InputError(f"{output} holds another fine-tuned model, with {told}; choose another output or `force=True`")
    return reports.read(output)[1]


def _earlier_report(folder: Path | None) -> dict[str, Any]:
    """The report of the model that was fine-tuned, {} where it has none."""
    try:
        return reports.read(folder)[1] if folder is not None else {}
    except InputError:
        return {}


@contextmanager
def _logger(folder: str | None) -> Iterator[Callable[[dict[str, float], int], None] | None]:
    """Writes figures for TensorBoard, in the first process."""
    if folder is None or not processes.is_main():
        yield None
        return
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise InputError(
            "`tensorboard` needs the package tensorboard: pip install 'ssmcompress[tensorboard]'"
        ) from error
    writer = SummaryWriter(folder)
    try:
        yield lambda figures, step: [writer.add_scalar(name, value, step) for name, value in figures.items()] and None
    finally:
        writer.close()
