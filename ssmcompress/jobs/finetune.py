"""Fine-tuning as a job: a pruned model and images in, a folder with the better model and its report out."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from .. import processes
from ..compression.finetune.recipe import Recipe
from ..compression.finetune.state import describe_differences, is_state_of, remove_state
from ..compression.search.sensitivity import SENSITIVITY_FILE
from ..data.batches import Batches, skip_picture
from ..data.find import open_images
from ..data.images import Images
from ..data.signature import sign_images
from ..errors import InputError
from ..files import check_target, read_text
from ..models.base import TokenModel
from ..models.fingerprint import fingerprint
from ..models.inputs import check_model
from ..models.learnt import learnt_from
from ..models.records import MadeBy
from ..models.saved import CONFIG_FILE, versions
from ..progress import line, note
from .folder import Target, write_folder
from .images import split_training_images
from .measuring import measure_models, name_columns
from .pipeline import Context, run_steps
from .report import make_report, read_report
from .requests import DataOptions, MeasureOptions
from .steps import Finetune


@dataclass(frozen=True)
class FinetuneOptions:
    """How to fine-tune.

    Attributes:
        recipe: everything about the training itself. teacher: whether the dense model teaches.
        tensorboard: folder to log to for TensorBoard, or None.
    """

    recipe: Recipe = Recipe()
    teacher: bool = True
    tensorboard: str | None = None


@dataclass(frozen=True)
class FinetuneTarget(Target):
    """The folder to write, and what may be there already.

    Attributes:
        inside: the folder that the model was read from; it may be `path`, which is then replaced, with `force` or
            `resume`.
        resume: continue from the state of an interrupted run, if there is one; a finished run returns at once.
    """

    inside: Path | None = None
    resume: bool = False

    @property
    def state(self) -> Path:
        """Where the state of the run is kept while it lasts."""
        path = self.path if self.path.name else self.path.resolve()  # "." has no name
        return path.with_name(f"{path.name}.training.pt")

    @property
    def may_replace(self) -> bool:
        """Whether a folder that is there may be replaced."""
        return self.force or (self.resume and self.in_place)

    @property
    def in_place(self) -> bool:
        """Whether the folder is the one that the model was read from."""
        return self.inside is not None and self.path.exists() and self.path.resolve() == self.inside.resolve()

    def prepare(self, data: DataOptions) -> None:
        """Check the folder and the state before the long work; with `force`, remove an old state.

        Raises:
            InputError: the folder cannot be written, or there is a state and neither `resume` nor `force`.
        """
        if not processes.is_main():
            return
        check_target(self.path, self.may_replace, [data.data, data.eval_data], folder=True)
        if self.state.exists() and not self.resume:
            if not self.force:
                raise InputError(
                    f"{self.state} holds the state of an interrupted run: `resume=True` goes on, `force=True` starts "
                    f"afresh"
                )
            remove_state(self.state)


def finetune_folder(
    model: TokenModel,
    output: str | Path | FinetuneTarget,
    options: FinetuneOptions = FinetuneOptions(),
    data: DataOptions = DataOptions(),
    measure: MeasureOptions = MeasureOptions(),
    *,
    dense: TokenModel | None = None,
) -> dict[str, Any]:
    """Fine-tune a pruned model and write a folder with the best and the last weights; returns the report in it.

    Args:
        model: pruned.
        output: the folder to write. While the run lasts, its state is in a file next to it, `OUTPUT.training.pt`.
        data: `data` to learn from, `eval_data` to measure on; without the latter, a tenth of `data` is kept for that.
        dense: the teacher (unless `options` want none), and what the report compares with; None: the labels alone.

    Raises:
        InputError: data, model or output that cannot be used.
        SsmCompressError: the loss is not finite.
        KeyboardInterrupt: after the state was saved.
    """
    target = output if isinstance(output, FinetuneTarget) else FinetuneTarget(Path(output))
    check_model(model)
    if model.plan is None:
        raise InputError("the model prunes nothing; fine-tuning is for pruned models: run prune first")
    if data.data is None:
        raise InputError("fine-tuning needs images to learn from: give `data`")
    if target.resume:
        run = describe_run(model, options, data, dense)
        if is_interrupted(target, run):
            target = replace(target, force=True)  # the run that left the state was allowed to write the folder
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
    """Run the step `Finetune` on a model, measure, and write the folder; returns the report in it.

    Args:
        earlier: the report of `model`, {} where it has none.
        name: what the report calls `model`; None: after what was done to it last.
    """
    target.prepare(data)
    images = split_training_images(model, data)
    training, together = images.training, processes.count() > 1
    warn_about_classes(training, model.config.num_classes)
    # Before the training, so that images that change meanwhile are not taken for those that were learnt from.
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
    """What reports call a model that is fine-tuned next."""
    if model.find_record("finetuning") is not None:
        return "before"
    if (refit := model.find_record("reconstruction")) is not None and refit.kept:
        return "reconstructed"
    return "aligned" if model.plan.alignment.conv or model.plan.alignment.scan else "naive"


def warn_about_classes(training: Batches, num_classes: int) -> None:
    """Say which of the model's classes no image to learn from has."""
    labels = training.source.labels
    if labels is None:
        return
    missing = sorted(set(range(num_classes)) - {labels[i] for i in training.index})
    if missing:
        names = training.source.classes
        shown = ", ".join(names[i] if names else str(i) for i in missing[:5]) + (", ..." if len(missing) > 5 else "")
        classes = f"{len(missing)} class{'es' if len(missing) > 1 else ''}"
        note(f"no image to learn from for {classes}: {shown}")


def is_interrupted(target: FinetuneTarget, run: Mapping[str, Any]) -> bool:
    """Whether there is a state of `run` (`describe_run`), and not because it was ended while it wrote the folder.

    Raises:
        InputError: the file is no state.
    """
    if not is_state_of(target.state, _select_training(run)):
        return False
    written = target.path / CONFIG_FILE
    # A folder that is newer than the state may be another's. In place, the state began with the model that is there.
    return target.in_place or not written.exists() or written.stat().st_mtime <= target.state.stat().st_mtime


def find_finished(
    model: TokenModel, target: FinetuneTarget, run: Mapping[str, Any], data: DataOptions
) -> dict[str, Any] | None:
    """The report of a folder that this very run has written, None if it holds no fine-tuned model.

    A state of that run, which is left over if it was ended while it wrote the folder, is removed.

    Args:
        run: the present one (`describe_run`).

    Raises:
        InputError: another run has written it.
    """
    try:
        record = json.loads(read_text(target.path / CONFIG_FILE))["pruning"]["finetuning"]
        written = None if record is None else record.get("run")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    if record is None:
        return None
    way_out = "choose another output or `force=True`"
    if not isinstance(written, dict):
        raise InputError(f"{target.path} holds a fine-tuned model that does not say what it was made from; {way_out}")
    classes = model.config.num_classes
    measured = None if data.eval_data is None else open_images(data.eval_data, classes)
    expected = {**run, **sign_run(open_images(data.data, classes), measured, data)}
    if target.in_place:  # the model that the run began with was replaced by its result
        del expected["model"]
    if differences := describe_differences(written, expected):
        raise InputError(f"{target.path} holds another fine-tuned model, with {', '.join(differences)}; {way_out}")
    report = read_report(target.path)[1]
    if processes.is_main() and is_state_of(target.state, _select_training({**run, "model": written.get("model")})):
        remove_state(target.state)
    return report


def describe_run(
    model: TokenModel, options: FinetuneOptions, data: DataOptions, dense: TokenModel | None
) -> dict[str, Any]:
    """What a fine-tuned folder is made from, apart from the images, for `describe_differences`: a JSON object.

    Args:
        model: the model to start from.
    """
    known = None if dense is None else fingerprint(dense)
    return {
        "recipe": asdict(options.recipe),
        "seed": data.seed,
        "model": fingerprint(model),
        "dense": known,
        "teacher": known if options.teacher else None,
    }


def _select_training(run: Mapping[str, Any]) -> dict[str, Any]:
    """What of `describe_run` a state is bound to: a dense model that does not teach is not in it."""
    return {name: value for name, value in run.items() if name != "dense"}


def sign_run(images: Images, measured: Images | None, data: DataOptions) -> dict[str, Any]:
    """What images a fine-tuned folder is made from, a JSON object; read by all processes.

    Args:
        images: those to learn from, all that `data` names. measured: those of `eval_data`.
    """
    return {"images": _sign(images, data), "eval_images": None if measured is None else _sign(measured, data)}


def _sign(images: Images, data: DataOptions) -> dict[str, Any]:
    return sign_images(Batches(images, skip_picture, None, data.batch_size, data.workers))


def read_earlier(folder: Path | None) -> dict[str, Any]:
    """The report of the model that is fine-tuned, {} where it has none."""
    try:
        return read_report(folder)[1] if folder is not None else {}
    except InputError:
        return {}


@contextmanager
def _logger(folder: str | None) -> Iterator[Callable[[dict[str, float], int], None] | None]:
    """A function that writes figures for TensorBoard, in the main process; None without a folder."""
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
