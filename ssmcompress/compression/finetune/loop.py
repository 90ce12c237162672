"""Fine-tuning of a pruned model: steps, evaluation after each epoch, and a state that a killed run goes on from.

The dense model is the teacher, on the very images that the pruned one sees; labels join in where there are any. Norms
are left as they are unless the recipe says otherwise, and so are the statistics of batch norms in any case: the model
is in eval mode throughout, so one process and several compute the same.
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ... import processes
from ...data.batches import Batches
from ...errors import InputError, SsmCompressError
from ...evaluation.measure import autocast, measure
from ...models.base import TokenModel
from ...models.records import Finetuning
from ...ops import gather_tokens
from ...progress import line, status, track
from .examples import Examples, Part
from .losses import objective, teacher_weight
from .recipe import Recipe
from .state import read_state, write_state

# Parameters of two dimensions that are no matrices, and so do not decay.
UNDECAYED = ("*A_log", "*A_b_log", "*pos_embed", "*cls_token", "*direction_Bs")
# Writing the state may take one in so many seconds of a run, and is done every few seconds at most.
SAVE_SHARE, SAVE_EVERY = 50, 5.0


class Finetuned(NamedTuple):
    """The model with the weights that did best on the images held out, and the one with the last ones."""

    model: TokenModel
    last: TokenModel


class Student(nn.Module):
    """A model that also gives what it reads out of, so that one forward serves the whole objective."""

    def __init__(self, model: TokenModel):
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(logits (batch, classes), last features (batch, kept, d_model), their positions (batch, kept))."""
        tokens, _ = self.model.encode(images)
        return self.model.readout(tokens), tokens.features, tokens.explicit_positions()


def finetune(
    pruned: TokenModel,
    training: Batches,
    *,
    dense: TokenModel | None = None,
    recipe: Recipe = Recipe(),  # noqa: B008 (frozen)
    held_out: Any = None,
    seed: int = 0,
    state: Path | None = None,
    resume: bool = False,
    log: Callable[[dict[str, float], int], None] | None = None,
) -> Finetuned:
    """Train a copy of a pruned model; the arguments are left as they are.

    In a `torch.distributed` group every process makes this call with the same arguments; a step's images are divided
    among them. The result depends neither on their number nor, but for rounding, on `recipe.accumulate`.

    Args:
        pruned: on the device to train on.
        training: the images; how they are batched is the recipe's.
        dense: the teacher; None: the labels alone.
        held_out: batches that choose the best epoch, as `evaluate` takes them, a process's share of them in each; None:
            the last epoch is taken.
        seed: of the order of the images and of their augmentation.
        state: file to keep the state of the run in; None: none is kept. Once the result is safe, it can go.
        resume: go on from that file, if it is there; the state of a run with another model, recipe, seed or data set is
            refused.
        log: called with figures by name and the step, in the first process.

    Returns:
        Both models with a record of kind "finetuning" in their `steps`.

    Raises:
        InputError: nothing to learn from, too few images, or a state of another run.
        SsmCompressError: values that are not finite; the state is the last one that was good.
        KeyboardInterrupt: SIGINT or SIGTERM came; the state is that after the last whole step.
    """
    if pruned.plan is None:
        raise InputError("the model prunes nothing; fine-tuning is for pruned models: run prune first")
    if dense is not None and pruned.config != dense.config:
        raise InputError("the pruned and the dense model differ in architecture or image size")
    if dense is None and training.source.labels is None:
        raise InputError(
            f"{training.source.name} has no labels, and there is no dense model to learn from: give either"
        )
    run = _Run(pruned, training, dense, recipe, held_out, seed, state)
    if resume and state is not None and state.exists():
        run.restore()
    else:
        run.begin()
    try:
        with _stop_requests() as stopped:
            run.train(stopped, log)
    finally:
        run.close()
    return run.result()


class _Run:
    """A run: the model, its optimiser, and where they stand."""

    def __init__(self, pruned, training, dense, recipe, held_out, seed, state):
        from accelerate import Accelerator
        from timm.optim import param_groups_weight_decay
        from timm.scheduler import CosineLRScheduler

        self.device = next(pruned.parameters()).device
        self.recipe, self.seed, self.state, self.training = recipe, seed, state, training
        self.dense, self.held_out = dense, held_out
        self.examples = Examples(pruned, training, recipe, seed, (processes.index(), processes.count()))
        self.model = copy.deepcopy(pruned).eval()
        for module in self.model.modules():
            if isinstance(module, (nn.LayerNorm, nn.RMSNorm, nn.modules.batchnorm._BatchNorm)):
                module.requires_grad_(recipe.norms)
        self.targets = {name: pruner.ratio for name, pruner in self.model.pruners.items()}
        self.steps = recipe.epochs * self.examples.steps
        groups = param_groups_weight_decay(self.model, recipe.weight_decay, no_weight_decay_list=UNDECAYED)
        lr = recipe.scaled_lr(self.examples.batch_size)
        optimizer = torch.optim.AdamW(groups, lr=lr, betas=(0.9, recipe.beta2))
        self.schedule = CosineLRScheduler(
            optimizer,
            self.steps,
            lr_min=recipe.min_lr,
            warmup_t=round(recipe.warmup * self.steps),
            warmup_lr_init=recipe.warmup_lr,
            t_in_epochs=False,
        )
        self.accelerator = Accelerator(cpu=self.device.type == "cpu")
        self.student, self.optimizer = self.accelerator.prepare(Student(self.model), optimizer)
        self.average = None
        if recipe.ema:
            from timm.utils import ModelEmaV3

            self.average = ModelEmaV3(self.model, recipe.ema, use_warmup=True)
        self.dtype = torch.bfloat16 if _takes_bfloat16(recipe.dtype, self.device) else torch.float32
        self.step, self.seconds = 0, 0.0
        self.history: list[dict[str, Any]] = []
        self.sums = _Sums()
        self.best: dict[str, Tensor] | None = None
        self.score, self.best_epoch, self.best_averaged = math.inf, 0, False
        self.about = {
            "data": training.source.name,
            "images": len(training.index),
            "seed": seed,
            "recipe": asdict(recipe),
            "model": fingerprint(pruned),
            "teacher": fingerprint(dense) if dense is not None else None,
        }
        self.saved_at = self.moved_on = time.perf_counter()
        self.save_takes = 0.0

    # ----------------------------------------------------------------------------------------------------- training

    def train(self, stopped: Callable[[], bool], log: Callable[[dict[str, float], int], None] | None) -> None:
        """All steps that are left."""
        log = log if log is not None and processes.is_main() else lambda figures, step: None
        with closing(self._steps()) as steps:
            for parts in track(steps, "fine-tuning", self.steps, self.step):
                self.take_step(parts)
                self.sums.seconds += self._clock()
                if not (self.sums.finite and math.isfinite(self.sums.total)):
                    self._give_up()
                self.step += 1
                figures = self.sums.figures() | {"lr": self.optimizer.param_groups[0]["lr"]}
                status(self.sums.text())
                log(figures, self.step)
                whole = self.step % self.examples.steps == 0
                if whole:
                    self.end_epoch(figures)
                    self._clock()
                    if held := self.history[-1]["held_out"]:
                        log({f"held_out/{name}": value for name, value in held.items() if value is not None}, self.step)
                stop = self._any(stopped())
                if stop or whole or self._due():
                    self.save()
                if stop:
                    raise KeyboardInterrupt

    def _steps(self) -> Iterator[list[Part]]:
        self._clock()
        while self.step < self.steps:
            yield from self.examples.of_epoch(*divmod(self.step, self.examples.steps))

    def _clock(self) -> float:
        """Seconds since the last call, which count as part of the run."""
        now = time.perf_counter()
        passed, self.moved_on = now - self.moved_on, now
        self.seconds += passed
        return passed

    def take_step(self, parts: list[Part]) -> None:
        """One optimiser step on this process's parts of a batch."""
        self.schedule.step_update(self.step)
        self._ramp(self.step)
        self.optimizer.zero_grad(set_to_none=True)
        sums = torch.zeros(4, dtype=torch.float64)  # loss, right, images, values that are not finite
        for number, part in enumerate(parts):
            last = number + 1 == len(parts)
            with nullcontext() if last else self.accelerator.no_sync(self.student):
                losses, right = self._losses(part)
                # The processes' gradients are averaged: of sums over the whole batch, that is their mean.
                self.accelerator.backward(losses.sum() * processes.count() / self.examples.batch_size)
            loss = losses.detach().sum().double().cpu()
            sums += torch.stack(
                [loss, right.cpu().double(), torch.tensor(float(len(losses))), (~loss.isfinite()).double()]
            )
        processes.all_reduce_sum(sums)
        self.sums.add(*sums.tolist())
        if not self.sums.finite:
            return
        if self.recipe.clip_grad:
            norm = self.accelerator.clip_grad_norm_(self.model.parameters(), self.recipe.clip_grad)
            if not norm.isfinite():  # all processes have the same gradients
                self.sums.finite = False
                return
        self.optimizer.step()
        if self.average is not None:
            self.average.update(self.model, self.step)

    def _losses(self, part: Part) -> tuple[Tensor, Tensor]:
        """(images,) what each adds to the objective, and how many get the class that most speaks for."""
        images = part.images.to(self.device)
        targets = None if part.targets is None else part.targets.to(self.device)
        teacher = teacher_features = None
        weighs = teacher_weight(self.recipe, self.dense is not None, targets is not None) > 0
        with autocast(self.device, self.dtype):
            if self.dense is not None and (weighs or self.recipe.features):
                with torch.no_grad():
                    tokens, _ = self.dense.encode(images)
                    teacher, teacher_features = self.dense.readout(tokens), tokens.features
            logits, features, positions = self.student(images)
        if teacher is not None and self.recipe.features:
            teacher_features = gather_tokens(teacher_features, positions)
        else:
            features = teacher_features = None
        losses = objective(self.recipe, logits, targets, teacher, features, teacher_features)
        wanted = teacher if targets is None else targets
        return losses, (logits.detach().argmax(1) == wanted.argmax(1)).sum()

    def _ramp(self, step: int | None) -> None:
        """Set the pruning ratios for a step; None: their targets."""
        length = self.recipe.ramp * self.steps
        share = 1.0 if step is None or step >= length else step / length
        for name, pruner in self.model.pruners.items():
            pruner.ratio = share * self.targets[name]

    # -------------------------------------------------------------------------------------------- after each epoch

    def end_epoch(self, figures: dict[str, float]) -> None:
        """Measure on the images held out, and keep the weights if they do best there."""
        epoch = self.step // self.examples.steps
        candidates = {"weights": self.model} | ({"average": self.average.module} if self.average is not None else {})
        name, held = self._consider(candidates, epoch)
        entry = {"epoch": epoch, "step": self.step, **figures, "held_out": held, "averaged": name == "average"}
        self.history.append(entry | {"seconds": round(self.seconds, 2)})
        told = [self.sums.text()]
        if held:
            told += [f"held out: top-1 {held['top1']:.2f} %"] if held["labelled"] else []
            told += [f"same class as dense {held['agreement']:.2f} %"] if held["agreement"] is not None else []
        told.append(f"{self.seconds / self.step * (self.steps - self.step) / 60:.0f} min left")
        line(f"epoch {epoch} of {self.recipe.epochs}: {', '.join(told)}")
        self.sums = _Sums()

    def begin(self) -> None:
        """What the run begins with is a candidate too: whatever becomes of it, the model is no worse for it."""
        if self.held_out is not None:
            self._consider({"weights": self.model}, 0)

    def _consider(self, candidates: dict[str, TokenModel], epoch: int) -> tuple[str, dict[str, Any] | None]:
        """(name, what was measured) of the best candidate, whose weights are kept if none was better before."""
        self._ramp(None)
        measured: dict[str, dict[str, Any]] = {}
        if self.held_out is not None:
            models = candidates | ({"dense": self.dense} if self.dense is not None else {})
            found = measure(models, self.held_out, distributed=processes.count() > 1)
            measured = {name: asdict(found[name]) for name in candidates}
        scores = {name: self._score(measured.get(name)) for name in candidates}
        name = min(scores, key=scores.__getitem__)
        if scores[name] < self.score or self.best is None or self.held_out is None:
            self.score, self.best_epoch, self.best_averaged = scores[name], epoch, name == "average"
            self.best = {k: v.detach().cpu().clone() for k, v in candidates[name].state_dict().items()}
        return name, measured.get(name)

    def _score(self, found: dict[str, Any] | None) -> float:
        """What the recipe makes small, on images held out as they are; the epoch with the least is the best."""
        if found is None:
            return -math.inf
        weight = teacher_weight(self.recipe, self.dense is not None, self.training.source.labels is not None)
        score = (weight * found["kl"] if weight else 0.0) + ((1 - weight) * found["loss"] if weight < 1 else 0.0)
        return score if math.isfinite(score) else math.inf

    # ---------------------------------------------------------------------------------------------------- the state

    def save(self) -> None:
        """Keep the state; the first process does."""
        if self.state is not None and processes.is_main():
            begun = time.perf_counter()
            run = {
                "step": self.step,
                "history": self.history,
                "sums": asdict(self.sums),
                "about": self.about,
                "best": [self.score, self.best_epoch, self.best_averaged],
                "seconds": self.seconds,
            }
            entries = {
                "model": self.model.state_dict(),
                "best": self.best,
                "model_ema": self.average.module.state_dict() if self.average is not None else None,
                "optimizer": self.optimizer.state_dict(),
                "run": run,
            }
            write_state(self.state, self.model, entries)
            self.save_takes = time.perf_counter() - begun
        self.saved_at = time.perf_counter()

    def _due(self) -> bool:
        return time.perf_counter() - self.saved_at > max(SAVE_EVERY, SAVE_SHARE * self.save_takes)

    def restore(self) -> None:
        """Go on from the state in the file."""
        content = read_state(self.state)
        run = content["run"]
        if (found := run.get("about")) != self.about:
            names = sorted(k for k in {*found, *self.about} if found.get(k) != self.about.get(k))
            old, new = ({k: about.get(k) for k in names} for about in (found, self.about))
            if isinstance(old.get("recipe"), dict) and isinstance(new.get("recipe"), dict):
                same = {k for k in old["recipe"] if old["recipe"][k] == new["recipe"].get(k)}
                old["recipe"], new["recipe"] = (
                    {k: v for k, v in recipe.items() if k not in same} for recipe in (old["recipe"], new["recipe"])
                )
            raise InputError(f"{self.state} is of another run, with {old} for {new}; `force=True` starts afresh")
        try:
            self.model.load_state_dict(content["model"])
            self.optimizer.load_state_dict(content["optimizer"])
            if self.average is not None:
                self.average.module.load_state_dict(content["model_ema"])
            self.best, self.step, self.seconds = content["best"], run["step"], run["seconds"]
            self.history, self.sums = list(run["history"]), _Sums(**run["sums"])
            self.score, self.best_epoch, self.best_averaged = run["best"]
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise InputError(
                f"{self.state}: damaged ({type(error).__name__} {error}); remove it to start afresh"
            ) from error
        line(f"going on after step {self.step} of {self.steps}")

    def _give_up(self) -> None:
        kept = f"; the last good state is in {self.state}" if self.state is not None and self.state.exists() else ""
        kept += ", loadable as a model" if kept else ""
        raise SsmCompressError(
            f"the loss is not finite at step {self.step + 1} of {self.steps}{kept}; try a lower lr (now "
            f"{self.recipe.lr:g} for {self.recipe.lr_images} images) or clip_grad, and start afresh"
        )

    def _any(self, value: bool) -> bool:
        """Whether it holds in any process."""
        total = torch.tensor(float(value))
        processes.all_reduce_sum(total)
        return bool(total)

    def close(self) -> None:
        """Let go of the accelerator's references, so that the models can be."""
        self.accelerator.free_memory()

    def result(self) -> Finetuned:
        """The models, once all steps are done; the state is no longer needed."""
        self._ramp(None)
        self.model.requires_grad_(True)
        record = Finetuning(
            name=self.training.source.name,
            images=len(self.training.index),
            held_out=(self.history[-1]["held_out"] or {}).get("images", 0),
            labels=self.training.source.labels is not None,
            teacher=self.dense is not None,
            recipe={**asdict(self.recipe), "batch_size": self.examples.batch_size},
            seed=self.seed,
            steps=self.steps,
            epoch=self.best_epoch,
            averaged=self.best_averaged,
            seconds=round(self.seconds, 2),
            processes=processes.count(),
            history=tuple(self.history),
        )
        self.model.add_record(record)
        best = copy.deepcopy(self.model)
        best.load_state_dict(self.best)
        return Finetuned(best, self.model)


@dataclass
class _Sums:
    """Over the steps of an epoch so far."""

    total: float = 0.0
    right: float = 0.0
    images: float = 0.0
    seconds: float = 0.0
    finite: bool = True

    def add(self, loss: float, right: float, images: float, broken: float) -> None:
        self.total, self.right, self.images = self.total + loss, self.right + right, self.images + images
        self.finite = self.finite and not broken

    def figures(self) -> dict[str, float]:
        """By name, of the augmented images."""
        rate = self.images / self.seconds
        return {"loss": self.total / self.images, "top1": 100 * self.right / self.images, "images_per_second": rate}

    def text(self) -> str:
        found = self.figures()
        return f"loss {found['loss']:.4f}, top-1 {found['top1']:.1f} %, {found['images_per_second']:.0f} images/s"


def fingerprint(model: TokenModel) -> str:
    """By which the same weights and the same plan are known again."""
    digest = hashlib.sha256(json.dumps(model.plan.to_dict(tensors=False) if model.plan else None).encode())
    for name, value in sorted(model.state_dict().items()):
        digest.update(name.encode() + value.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def _takes_bfloat16(dtype: str, device: torch.device) -> bool:
    if dtype == "auto":
        return device.type == "cuda" and torch.cuda.is_bf16_supported()
    return dtype == "bfloat16"


@contextmanager
def _stop_requests() -> Iterator[Callable[[], bool]]:
    """Whether SIGINT or SIGTERM came in the block; a second one is what it would have been without."""
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.getsignal(number) for number in numbers}
    asked: list[int] = []

    def ask(number: int, frame: Any) -> None:
        asked.append(number)
        signal.signal(number, before[number])

    for number in numbers:
        signal.signal(number, ask)
    try:
        yield lambda: bool(asked)
    finally:
        for number in numbers:
            signal.signal(number, before[number])
