"""A run of fine-tuning: how and where to, and whether a state or a folder that is there already is of this run."""

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
        inside: a fine-tuning may replace the folder that the model was read from, with `force` or `resume`.
        resume: continue from the state of an interrupted run, if there is one; a finished run returns at once.
    """

    resume: bool = False

    @property
    def state(self) -> Path:
        """Where the state of the run is kept while it lasts."""
        path = self.path if self.path.name else self.path.resolve()  # "." has no name
        return path.with_name(f"{path.name}.training.pt")

    @property
    def results(self) -> Path:
        """Where results of a search and a reconstruction are kept while they last."""
        return self.state.with_name(self.state.name.removesuffix(".training.pt") + ".results")

    def prepare_results(self) -> None:
        """Check for results of an interrupted run before the long work; with `force`, remove them.

        Raises:
            InputError: there are some, and neither `resume` nor `force`; or the folder holds anything else.
        """
        if not processes.is_main() or not self.results.exists():
            return
        check_results(self.results)
        if self.resume:
            if processes.count() > 1:
                note(f"{self.results} is not used by several processes: it stays until one process goes on with it")
            return
        if not self.force:
            raise InputError(
                f"{self.results} holds results of an interrupted run: `resume=True` goes on, `force=True` starts afresh"
            )
        remove_results(self.results)

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
        check_target(self.path, self.may_replace, [data.data, data.eval_data], folder=MODEL_FILE)
        if self.state.exists() and not self.resume:
            if not self.force:
                raise InputError(
                    f"{self.state} holds the state of an interrupted run: `resume=True` goes on, `force=True` starts "
                    f"afresh"
                )
            remove_state(self.state)


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
    measured = None if data.eval_data is None else open_for(model, data.eval_data, data)
    expected = {**run, **sign_run(open_for(model, data.data, data), measured, data)}
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
