"""A fine-tuning run: its options and target, and whether an existing state or folder belongs to it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .. import processes
from ..compression.finetune.recipe import Recipe
from ..compression.finetune.state import describe_differences, is_state_of, remove_state
from ..compression.remember import check_results, remove_results
from ..data.batches import Batches, skip_picture
from ..data.images import Images
from ..data.signature import sign_images
from ..errors import InputError
from ..files import MODEL_FILE, check_target, read_text
from ..models.base import TokenModel
from ..models.fingerprint import fingerprint
from ..models.saved import CONFIG_FILE
from ..progress import note
from .folder import Target
from .images import open_for
from .report import read_report
from .requests import DataOptions


@dataclass(frozen=True)
class FinetuneOptions:
    """Options of fine-tuning.

    Attributes:
        recipe: all training settings. teacher: whether the dense model is the teacher.
        tensorboard: folder to log to for TensorBoard, or None.
    """

    recipe: Recipe = Recipe()
    teacher: bool = True
    tensorboard: str | None = None


@dataclass(frozen=True)
class FinetuneTarget(Target):
    """The folder to write, and how to treat existing content.

    Attributes:
        inside: folder that the model was loaded from; fine-tuning may replace it with `force` or `resume`.
        resume: continue from the state of an interrupted run, if there is one; a finished run returns immediately.
    """

    resume: bool = False

    @property
    def state(self) -> Path:
        """The file that holds the state during the run."""
        path = self.path if self.path.name else self.path.resolve()  # "." has no name
        return path.with_name(f"{path.name}.training.pt")

    @property
    def results(self) -> Path:
        """The file that holds results of a search and a reconstruction during the run."""
        return self.state.with_name(self.state.name.removesuffix(".training.pt") + ".results")

    def prepare_results(self) -> None:
        """Check for results of an interrupted run before the long work; `force` removes them.

        Raises:
            InputError: there are some, and neither `resume` nor `force` is set; or it contains something else.
        """
        if not processes.is_main() or not self.results.exists():
            return
        check_results(self.results)
        if self.resume:
            if processes.count() > 1:
                note(f"{self.results} is ignored with several processes; it is kept until one process resumes the run")
            return
        if not self.force:
            raise InputError(
                f"{self.results} holds results of an interrupted run: `resume=True` continues it, `force=True` "
                "starts over"
            )
        remove_results(self.results)

    @property
    def may_replace(self) -> bool:
        """Whether an existing folder may be replaced."""
        return self.force or (self.resume and self.in_place)

    @property
    def in_place(self) -> bool:
        """Whether the folder is the one that the model was loaded from."""
        return self.inside is not None and self.path.exists() and self.path.resolve() == self.inside.resolve()

    def prepare(self, data: DataOptions) -> None:
        """Check the folder and the state before the long work; `force` removes an old state.

        Raises:
            InputError: the folder cannot be written, or there is a state and neither `resume` nor `force` is set.
        """
        if not processes.is_main():
            return
        check_target(self.path, self.may_replace, [data.data, data.eval_data], folder=MODEL_FILE)
        if self.state.exists() and not self.resume:
            if not self.force:
                raise InputError(
                    f"{self.state} holds the state of an interrupted run: `resume=True` continues it, `force=True` "
                    "starts over"
                )
            remove_state(self.state)


def is_interrupted(target: FinetuneTarget, run: Mapping[str, Any]) -> bool:
    """Return whether `run` (`describe_run`) left a state, except one from being killed while writing the folder.

    Raises:
        InputError: the file is not a state.
    """
    if not is_state_of(target.state, _select_training(run)):
        return False
    written = target.path / CONFIG_FILE
    # A folder newer than the state may belong to another run. In place, the state started from the model in the folder.
    return target.in_place or not written.exists() or written.stat().st_mtime <= target.state.stat().st_mtime


def find_finished(
    model: TokenModel, target: FinetuneTarget, run: Mapping[str, Any], data: DataOptions
) -> dict[str, Any] | None:
    """Return the report of a folder written by this same run; None if it contains no fine-tuned model.

    A state of that run, left over if it was killed while writing the folder, is removed.

    Args:
        run: the current one (`describe_run`).

    Raises:
        InputError: the folder was written by another run.
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
        raise InputError(f"{target.path} holds a fine-tuned model without a record of what it was made from; {way_out}")
    measured = None if data.eval_data is None else open_for(model, data.eval_data, data)
    expected = {**run, **sign_run(open_for(model, data.data, data), measured, data)}
    if target.in_place:  # the initial model of the run was replaced by its result
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
    """Return a JSON object for `describe_differences` with the inputs of a fine-tuned folder, except the images.

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
    """Return the part of `describe_run` that a state depends on; a dense model that is not the teacher is excluded."""
    return {name: value for name, value in run.items() if name != "dense"}


def sign_run(images: Images, measured: Images | None, data: DataOptions) -> dict[str, Any]:
    """Return a JSON object that identifies the images of a fine-tuned folder; they are read by all processes.

    Args:
        images: the training images, all that `data` names. measured: the images of `eval_data`.
    """
    return {"images": _sign(images, data), "eval_images": None if measured is None else _sign(measured, data)}


def _sign(images: Images, data: DataOptions) -> dict[str, Any]:
    return sign_images(Batches(images, skip_picture, None, data.batch_size, data.workers))
