"""Fine-tuning of a pruned model: steps, evaluation after each epoch, and a state to resume a killed run.

The dense model is the teacher, on the same images that the pruned model gets; labels are used as well if there are any.
Norm layers are not trained unless the recipe says so.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from ... import processes
from ...data.batches import Batches
from ...data.images import Images
from ...data.signature import sign_images
from ...errors import InputError, SsmCompressError, raise_if_out_of_memory
from ...models.base import TokenModel
from ...models.fingerprint import fingerprint
from ...models.inputs import as_batches, check_classes, check_model, open_training
from ...models.learnt import add_learnt, find_batches
from ...models.modes import runs_in_eval_mode
from ...models.records import Finetuning
from ...progress import line, status, track
from .best import BestWeights
from .examples import Examples, MicroBatch
from .losses import teacher_weight
from .recipe import Recipe
from .signals import catch_stop_requests
from .state import StateFile, check_same_run, read_state, write_state
from .trainer import EpochSums, Trainer

# Writing the state may take one in SAVE_SHARE seconds of a run, and happens at most every SAVE_EVERY seconds.
SAVE_SHARE, SAVE_EVERY = 50, 5.0


class Finetuned(NamedTuple):
    """The model with the best weights on the held-out images, and the model with the last weights."""

    model: TokenModel
    last: TokenModel


@runs_in_eval_mode
def finetune(
    pruned: TokenModel,
    training: Batches | Images | str | Path,
    *,
    dense: TokenModel | None = None,
    recipe: Recipe = Recipe(),
    held_out: Any = None,
    seed: int = 0,
    state: StateFile | str | Path | None = None,
    log: Callable[[dict[str, float], int], None] | None = None,
) -> Finetuned:
    """Train a copy of a pruned model; the arguments are not changed.

    In a `torch.distributed` group every process makes this call with the same arguments, and the images of a step are
    divided among them. The result does not depend on their number nor, except for rounding, on `recipe.accumulate`.

    Args:
        pruned: the model, on the device to train on.
        training: a folder or another name accepted by `ssmcompress.open_images`, `Images` or `Batches`. The recipe
            defines batching and augmentation, so a DataLoader or a tensor is rejected.
        dense: the teacher; None: only the labels are used.
        held_out: batches to select the best epoch, as for `evaluate`, sharded over the processes; None: the last epoch
            is used.
        seed: seed of the order and the augmentation of the images.
        state: file for the state of the run; None: no state is saved. `StateFile(path, resume=True)` resumes from the
            state in the file, if there is one.
        log: called in the main process with a dict of metrics and the step.

    Returns:
        Both models with a record of kind "finetuning" in their `steps`.

    Raises:
        InputError: there are neither labels nor a teacher, too few images, or the state is from another run.
        SsmCompressError: values are not finite; the state file keeps the last valid state.
        KeyboardInterrupt: after SIGINT or SIGTERM; the state file has the state after the last complete step.
    """
    check_model(pruned, "pruned")
    if dense is not None:
        check_model(dense, "dense")
    if pruned.plan is None:
        raise InputError("the model prunes nothing; fine-tuning is for pruned models: run prune first")
    if dense is not None and pruned.dense_config != dense.config:
        raise InputError("the pruned and the dense model differ in architecture or image size")
    if dense is not None:
        check_classes(pruned, dense)
    training = open_training(pruned, training)
    if held_out is not None:
        held_out = as_batches(pruned, held_out, labelled=True)
    if dense is None and not training.source.labelled:
        raise InputError(
            f"{training.source.name} has no labels, and there is no dense model to learn from: give images with "
            "labels, or a teacher (`dense`, and not `teacher=False`)"
        )
    if isinstance(state, (str, Path)):
        state = StateFile(Path(state))
    run = _Run(pruned, training, dense, recipe, held_out, seed, state.path if state is not None else None)
    if state is not None and state.resume and state.path.exists():
        run.restore()
    else:
        run.begin()
    try:
        with catch_stop_requests() as stop_requested:
            run.train(stop_requested, log)
    finally:
        run.trainer.close()
    return run.result()


class _Run:
    """A fine-tuning run: the trainer, the images, the best weights, the history, and the current step."""

    def __init__(self, pruned, training, dense, recipe, held_out, seed, path):
        self.training, self.dense, self.recipe, self.seed, self.path = training, dense, recipe, seed, path
        self.task = pruned.task
        self.examples = Examples(pruned, training, recipe, seed, (processes.index(), processes.count()))
        self.steps = recipe.epochs * self.examples.steps
        self.trainer = Trainer(pruned, dense, recipe, self.examples.batch_size, self.steps)
        weight = teacher_weight(recipe, dense is not None, training.source.labelled)
        self.best = BestWeights(held_out, dense, weight)
        self.step, self.seconds = 0, 0.0
        self.history: list[dict[str, Any]] = []
        self.sums = EpochSums()
        self.about = self._identify(pruned) if path is not None else {}
        self.saved_at = self.clock_at = time.perf_counter()
        self.save_seconds = 0.0

    def _identify(self, pruned: TokenModel) -> dict[str, Any]:
        """Return what identifies this run for `describe_differences`; held-out tensors are not included."""
        held_out = find_batches(self.best.held_out)
        return {
            "recipe": asdict(self.recipe),
            "seed": self.seed,
            "model": fingerprint(pruned),
            "teacher": fingerprint(self.dense) if self.dense is not None else None,
            "images": sign_images(self.training),
            "held_out": sign_images(held_out) if held_out is not None else None,
        }

    def begin(self) -> None:
        """Score the initial weights, so that the result is never worse than the input."""
        if self.best.held_out is not None:
            self.best.update({"weights": self.trainer.candidates()["weights"]}, 0)

    def train(self, stop_requested: Callable[[], bool], log: Callable[[dict[str, float], int], None] | None) -> None:
        """Take all remaining steps."""
        log = log if log is not None and processes.is_main() else lambda figures, step: None
        with closing(self._steps()) as steps:
            for parts in track(steps, "fine-tuning", self.steps, self.step):
                self.sums.add(self.trainer.take_step(parts, self.step))
                self.sums.seconds += self._clock()
                if not (self.sums.finite and math.isfinite(self.sums.total)):
                    self._fail_not_finite()
                self.step += 1
                figures = self.sums.figures(self.task) | {"lr": self.trainer.optimizer.param_groups[0]["lr"]}
                status(self.sums.text(self.task))
                log(figures, self.step)
                epoch_done = self.step % self.examples.steps == 0
                if epoch_done:
                    self.end_epoch(figures)
                    self._clock()
                    if held := self.history[-1]["held_out"]:
                        log({f"held_out/{name}": value for name, value in held.items() if value is not None}, self.step)
                stop = self._any_process(stop_requested())
                if stop or epoch_done or self._save_is_due():
                    self.save()
                if stop:
                    raise KeyboardInterrupt

    def _steps(self) -> Iterator[list[MicroBatch]]:
        """Yield this process's micro-batches of each remaining step."""
        self._clock()
        while self.step < self.steps:
            yield from self.examples.iterate_epoch(*divmod(self.step, self.examples.steps))

    def _clock(self) -> float:
        """Return the seconds since the last call, and add them to the total of the run."""
        now = time.perf_counter()
        seconds, self.clock_at = now - self.clock_at, now
        self.seconds += seconds
        return seconds

    def end_epoch(self, figures: dict[str, float]) -> None:
        """Evaluate on the held-out images, keep the weights if they are the best so far, and extend the history."""
        epoch = self.step // self.examples.steps
        name, held = self.best.update(self.trainer.candidates(), epoch)
        entry = {"epoch": epoch, "step": self.step, **figures, "held_out": held, "averaged": name == "average"}
        self.history.append(entry | {"seconds": round(self.seconds, 2)})
        texts = [self.sums.text(self.task)]
        if held:
            quality, likeness = (self.task.figure(name) for name in (self.task.quality, self.task.likeness))
            for prefix, figure in (("held out: ", quality), ("", likeness)):
                if held[figure.name] is not None:
                    texts.append(f"{prefix}{figure.title} {figure.form.format(held[figure.name])}")
        texts.append(f"{self.seconds / self.step * (self.steps - self.step) / 60:.0f} min left")
        line(f"epoch {epoch} of {self.recipe.epochs}: {', '.join(texts)}")
        self.sums = EpochSums()

    def save(self) -> None:
        """Write the state, in the main process."""
        if self.path is not None and processes.is_main():
            begin = time.perf_counter()
            run = {
                "step": self.step,
                "history": self.history,
                "sums": asdict(self.sums),
                "about": self.about,
                "best": [self.best.score, self.best.epoch, self.best.averaged],
                "seconds": self.seconds,
            }
            average = self.trainer.average
            entries = {
                "model": self.trainer.model.state_dict(),
                "best": self.best.weights,
                "model_ema": average.module.state_dict() if average is not None else None,
                "optimizer": self.trainer.optimizer.state_dict(),
                "run": run,
                "digests": torch.from_numpy(self.training.digests[self._index()].view(np.int64)),
            }
            write_state(self.path, self.trainer.model, entries)
            self.save_seconds = time.perf_counter() - begin
        self.saved_at = time.perf_counter()

    def _index(self) -> list[int]:
        """Return the indices of the training images, in the order of their digests in the state."""
        return sorted(self.training.index)

    def _save_is_due(self) -> bool:
        return time.perf_counter() - self.saved_at > max(SAVE_EVERY, SAVE_SHARE * self.save_seconds)

    def restore(self) -> None:
        """Load the state from the file to resume the run."""
        content = read_state(self.path)
        run, best = content["run"], self.best
        check_same_run(self.path, run.get("about"), self.about)
        try:
            self.trainer.model.load_state_dict(content["model"])
            self.trainer.optimizer.load_state_dict(content["optimizer"])
            if self.trainer.average is not None:
                self.trainer.average.module.load_state_dict(content["model_ema"])
            best.weights, self.step, self.seconds = content["best"], run["step"], run["seconds"]
            self.history, self.sums = list(run["history"]), EpochSums(**run["sums"])
            best.score, best.epoch, best.averaged = run["best"]
            if (digests := content.get("digests")) is not None:
                self.training.digests[self._index()] = digests.numpy().view(np.uint64)
        except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            raise_if_out_of_memory(error)
            raise InputError(
                f"{self.path}: damaged ({type(error).__name__} {error}); remove it to start over"
            ) from error
        line(f"resuming after step {self.step} of {self.steps}")

    def _fail_not_finite(self) -> None:
        kept = f"; the last good state is in {self.path}" if self.path is not None and self.path.exists() else ""
        kept += ", loadable as a model" if kept else ""
        raise SsmCompressError(
            f"the loss is not finite at step {self.step + 1} of {self.steps}{kept}; try a lower lr (now "
            f"{self.recipe.lr:g} for {self.recipe.lr_images} images) or clip_grad, and start over"
        )

    def _any_process(self, value: bool) -> bool:
        """Return whether `value` is true in any process."""
        total = torch.tensor(float(value))
        processes.all_reduce_sum(total)
        return bool(total)

    def result(self) -> Finetuned:
        """Return the models after the last step."""
        model = self.trainer.candidates()["weights"].requires_grad_(True)
        record = Finetuning(
            name=self.training.source.name,
            images=len(self.training.index),
            held_out=(self.history[-1]["held_out"] or {}).get("images", 0),
            labels=self.training.source.labelled,
            teacher=self.dense is not None,
            recipe={**asdict(self.recipe), "batch_size": self.examples.batch_size},
            seed=self.seed,
            steps=self.steps,
            epoch=self.best.epoch,
            averaged=self.best.averaged,
            seconds=round(self.seconds, 2),
            processes=processes.count(),
            history=tuple(self.history),
        )
        model.add_record(record)
        add_learnt(model, self._read_images())
        best = copy.deepcopy(model)
        best.load_state_dict(self.best.weights)
        return Finetuned(best, model)

    def _read_images(self) -> list[Any]:
        """Return the images used to train and select the weights, read by all processes."""
        # Images that were in no step, and images that other processes had read before this run was resumed.
        self.training.read_rest()
        held_out = self.best.held_out
        if (batches := find_batches(held_out)) is not None:
            batches.sync()
        return [self.training] if held_out is None else [self.training, held_out]
