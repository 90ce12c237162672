"""Fine-tuning as a job: from a pruned model and images to a folder with the improved model and its report."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from .. import processes
from ..compression.finetune.state import remove_state
from ..compression.search.sensitivity import SENSITIVITY_FILE
from ..data.batches import Batches
from ..data.masks import describe_empty, has_labelled_pixel
from ..errors import InputError, SsmCompressError
from ..extras import require_extra
from ..models.base import TokenModel
from ..models.inputs import check_model
from ..models.learnt import learnt_from
from ..models.records import MadeBy, list_own_steps
from ..models.saved import versions
from ..progress import line, note
from .finetune_run import FinetuneOptions, FinetuneTarget, describe_run, find_finished, is_interrupted, sign_run
from .folder import write_folder
from .images import TrainingImages, split_training_images
from .measuring import measure_models, name_columns
from .pipeline import Context, run_steps
from .report import make_report, read_report
from .requests import DataOptions, MeasureOptions
from .steps import Finetune
from .trim_sizes import TRIMMED


def finetune_folder(
    model: TokenModel,
    output: str | Path | FinetuneTarget,
    options: FinetuneOptions = FinetuneOptions(),
    data: DataOptions = DataOptions(),
    measure: MeasureOptions = MeasureOptions(),
    *,
    dense: TokenModel | None = None,
) -> dict[str, Any]:
    """Fine-tune a pruned model and write a folder with the best and the last weights; return its report.

    Args:
        model: pruned.
        output: the folder to write. During the run, the state is in a file next to it, `OUTPUT.training.pt`.
        data: `data` to train on, `eval_data` to evaluate on; without `eval_data`, a tenth of `data` is held out.
        dense: the teacher (unless `options` disable it), and the baseline of the report; None: train on labels only.

    Raises:
        InputError: data, model or output that cannot be used.
        SsmCompressError: the loss is not finite.
        KeyboardInterrupt: after the state has been saved.
    """
    target = output if isinstance(output, FinetuneTarget) else FinetuneTarget(Path(output))
    check_model(model)
    if model.plan is None:
        raise InputError("the model prunes nothing; fine-tuning is for pruned models: run prune first")
    options.recipe.check_task(model.task)
    model.check_views(measure.views)
    if data.data is None:
        raise InputError("fine-tuning needs training images: give `data`")
    require_extra("finetune")
    if target.resume:
        run = describe_run(model, options, data, dense)
        if is_interrupted(target, run):
            target = replace(target, force=True)  # the interrupted run was allowed to write the folder
        elif (finished := find_finished(model, target, run, data)) is not None:
            line(f"{target.path} is finished")
            return finished
    earlier = read_earlier(target.inside)
    return tune_folder(model, target, options, data, measure, dense=dense, earlier=earlier)


def tune_folder(
    model: TokenModel,
    target: FinetuneTarget,
    options: FinetuneOptions,
    data: DataOptions,
    measure: MeasureOptions,
    *,
    dense: TokenModel | None,
    earlier: Mapping[str, Any],
    name: str | None = None,
) -> dict[str, Any]:
    """Run the step `Finetune` on a model, evaluate it, and write the folder; return its report.

    Args:
        earlier: the report of `model`, {} if there is none.
        name: column name of `model` in the report; None: named after the last step applied to it.
    """
    target.prepare(data)
    images = split_training_images(model, data)
    if dense is None or not options.teacher:
        images = check_masks(images)
    training, together = images.training, processes.count() > 1
    warn_about_classes(training, model.config.num_classes)
    # Before the training, so that images changed during the run are not recorded as the training images.
    measured_on = None if data.eval_data is None else images.measured.source
    run = describe_run(model, options, data, dense) | sign_run(training.source, measured_on, data)
    context = Context(
        dense,
        training=training,
        held_out=images.held_out,
        seed=data.seed,
        distributed=together,
        command=target.command,
        state=target.state,
        resume=target.resume,
    )
    with _logger(options.tensorboard) as context.log:
        snapshots = run_steps([Finetune(options.recipe, options.teacher)], context, start=model)
    columns = name_columns(dense, {name or snapshot_name(model): model, **snapshots})
    measured = measure_models(columns, images.measured, measure, together)
    tuned = measured.models["pruned"]
    tuned.made_by = MadeBy(target.command, versions())
    tuned.add_record(replace(tuned.find_record("finetuning"), run=run))
    sections = {name: earlier.get(name) for name in ("calibration", "reconstruction")}
    sections |= {"search": earlier["search"]} if "search" in earlier else {}
    sections["calibration"] = sections["calibration"] or {"name": None, "images": 0, "unreadable": []}
    sections["finetuning"] = {**asdict(tuned.find_record("finetuning")), "unreadable": training.unreadable_names()}
    files = dict(context.files)
    if target.inside is not None and (sensitivity := target.inside / SENSITIVITY_FILE).is_file():
        files[SENSITIVITY_FILE] = sensitivity.read_bytes()
    sections["files"] = sorted(files)
    overlap = learnt_from(tuned).count(measured.images)
    report = make_report(measured, overlap, sections, target.command, earlier)
    write_folder(replace(target, force=target.may_replace), measured, report, files)
    if processes.is_main():
        remove_state(target.state)
    return report


def snapshot_name(model: TokenModel) -> str:
    """Return the name in reports of a model that is about to be fine-tuned."""
    done = {step.kind: step for step in list_own_steps(model.steps)}
    if "finetuning" in done:
        return "before"
    if "reconstruction" in done and done["reconstruction"].kept:
        return "reconstructed"
    if not model.plan.stages:
        return TRIMMED
    return "aligned" if model.plan.alignment.conv or model.plan.alignment.scan else "naive"


def check_masks(images: TrainingImages) -> TrainingImages:
    """Return the training images for training on labels only; unlabelled held-out images are removed.

    Raises:
        InputError: no pixel of the training images has a label, or a mask cannot be used.
    """
    training, held_out = images.training, images.held_out
    empty, name = training.source.empty_masks > 0, training.source.name
    if not training.reads_masks and not empty:
        return images
    if empty or not has_labelled_pixel(training.source, training.index):
        raise InputError(
            f"{name}: {describe_empty(len(training.index))} to learn from, and there is no dense model to learn from: "
            f"give images with labels, or a teacher"
        )
    if held_out is None or has_labelled_pixel(held_out.source, index := held_out.all_indices()):
        return images
    note(f"{name}: {describe_empty(len(index))} that were held out to choose the epoch; the last epoch is used")
    return replace(images, held_out=None)


def warn_about_classes(training: Batches, num_classes: int) -> None:
    """Warn about classes of the model that no training image has; masks are not read for this."""
    labels = training.source.labels
    if labels is None:
        return
    missing = sorted(set(range(num_classes)) - {labels[i] for i in training.index})
    if missing:
        names = training.source.classes
        shown = ", ".join(names[i] if names else str(i) for i in missing[:5]) + (", ..." if len(missing) > 5 else "")
        classes = f"{len(missing)} class{'es' if len(missing) > 1 else ''}"
        note(f"no training images for {classes}: {shown}")


def read_earlier(folder: Path | None) -> dict[str, Any]:
    """Return the report of the model to be fine-tuned, {} if there is none."""
    try:
        # Converted to text, since a model on the Hub is also given as a path.
        return read_report(folder.as_posix())[1] if folder is not None else {}
    except SsmCompressError:
        return {}


@contextmanager
def _logger(folder: str | None) -> Iterator[Callable[[dict[str, float], int], None] | None]:
    """Yield a function that logs metrics to TensorBoard in the main process; None without a folder."""
    if folder is None or not processes.is_main():
        yield None
        return
    require_extra("tensorboard")
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(folder)
    try:
        yield lambda figures, step: [writer.add_scalar(name, value, step) for name, value in figures.items()] and None
    finally:
        writer.close()
