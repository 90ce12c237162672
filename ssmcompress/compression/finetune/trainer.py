"""The model in training with its optimiser, for single steps of fine-tuning."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ... import processes
from ...evaluation.measure import autocast
from ...extras import require_extra
from ...models.base import TokenModel
from ...tasks import Task
from .examples import MicroBatch
from .losses import objective, teacher_weight
from .recipe import Recipe


class Student(nn.Module):
    """Wraps a model to also return its last features, so that one forward pass is enough for the whole objective."""

    def __init__(self, model: TokenModel):
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the result of `readout`, the last features (batch, kept, d_model) and their positions."""
        tokens, _ = self.model.encode(images)
        return self.model.readout(tokens), tokens.features, tokens.explicit_positions()


class StepResult(NamedTuple):
    """Sums over the images of a step (loss, accuracy, images), and whether the loss and the gradients are finite."""

    loss: float
    right: float
    images: float
    finite: bool


@dataclass
class EpochSums:
    """Sums over the steps of an epoch so far."""

    total: float = 0.0
    right: float = 0.0
    images: float = 0.0
    seconds: float = 0.0
    finite: bool = True

    def add(self, step: StepResult) -> None:
        """Add a step; the caller adds its seconds."""
        self.total, self.right, self.images = self.total + step.loss, self.right + step.right, self.images + step.images
        self.finite = self.finite and step.finite

    def figures(self, task: Task) -> dict[str, float]:
        """Return the metrics on the augmented images, by name."""
        rate = self.images / self.seconds
        accuracy = 100 * self.right / self.images
        return {"loss": self.total / self.images, task.hits: accuracy, "images_per_second": rate}

    def text(self, task: Task) -> str:
        """Format the metrics for a progress line."""
        figures, name = self.figures(task), task.figure(task.hits).title
        accuracy, rate = figures[task.hits], figures["images_per_second"]
        return f"loss {figures['loss']:.4f}, {name} {accuracy:.1f} %, {rate:.0f} images/s"


class Trainer:
    """A copy of a pruned model with its optimiser, schedule and moving average of the weights.

    The model stays in eval mode, so batch norm statistics do not change, and the result does not depend on the number
    of processes.

    Args:
        pruned: the model, on the device to train on. dense: the teacher, or None.
        batch_size: images per step, over all processes. steps: number of steps in the whole run.
    """

    def __init__(self, pruned: TokenModel, dense: TokenModel | None, recipe: Recipe, batch_size: int, steps: int):
        require_extra("finetune")
        from accelerate import Accelerator
        from timm.optim import param_groups_weight_decay
        from timm.scheduler import CosineLRScheduler

        self.device = next(pruned.parameters()).device
        self.dense, self.recipe, self.batch_size, self.steps = dense, recipe, batch_size, steps
        self.model = copy.deepcopy(pruned).eval()
        for module in self.model.modules():
            if isinstance(module, (nn.LayerNorm, nn.RMSNorm, nn.modules.batchnorm._BatchNorm)):
                module.requires_grad_(recipe.norms)
        self.ratios = {name: pruner.ratio for name, pruner in self.model.pruners.items()}
        self.least = self._find_least_ratios()
        groups = param_groups_weight_decay(
            self.model, recipe.weight_decay, no_weight_decay_list=self.model.no_weight_decay
        )
        optimizer = torch.optim.AdamW(groups, lr=recipe.scaled_lr(batch_size), betas=(0.9, recipe.beta2))
        self.schedule = CosineLRScheduler(
            optimizer,
            steps,
            lr_min=recipe.min_lr,
            warmup_t=round(recipe.warmup * steps),
            warmup_lr_init=recipe.warmup_lr,
            t_in_epochs=False,
        )
        self.accelerator = Accelerator(cpu=self.device.type == "cpu")
        self.student, self.optimizer = self.accelerator.prepare(Student(self.model), optimizer)
        self.average = None
        if recipe.ema:
            from timm.utils import ModelEmaV3

            self.average = ModelEmaV3(self.model, recipe.ema, use_warmup=True)
        self.dtype = torch.bfloat16 if _uses_bfloat16(recipe.dtype, self.device) else torch.float32

    def take_step(self, parts: list[MicroBatch], step: int) -> StepResult:
        """Take one optimiser step on this process's micro-batches; skip it if a value is not finite."""
        self.schedule.step_update(step)
        self.set_ratios(step)
        self.optimizer.zero_grad(set_to_none=True)
        sums = torch.zeros(4, dtype=torch.float64)  # loss, correct classes, images, values that are not finite
        for number, part in enumerate(parts):
            last = number + 1 == len(parts)
            with nullcontext() if last else self.accelerator.no_sync(self.student):
                losses, right = self._compute_losses(part)
                # Gradients are averaged over processes, so this factor yields the mean over the whole batch.
                self.accelerator.backward(losses.sum() * processes.count() / self.batch_size)
            loss = losses.detach().sum().double().cpu()
            sums += torch.stack(
                [loss, right.cpu().double(), torch.tensor(float(len(losses))), (~loss.isfinite()).double()]
            )
        processes.all_reduce_sum(sums)
        loss, right, images, broken = sums.tolist()
        result = StepResult(loss, right, images, finite=not broken)
        if not result.finite:
            return result
        if self.recipe.clip_grad:
            norm = self.accelerator.clip_grad_norm_(self.model.parameters(), self.recipe.clip_grad)
            if not norm.isfinite():  # all processes have the same gradients
                return result._replace(finite=False)
        self.optimizer.step()
        if self.average is not None:
            self.average.update(self.model, step)
        return result

    def _compute_losses(self, part: MicroBatch) -> tuple[Tensor, Tensor]:
        """Return the objective of each image, (images,), and the sum of their accuracies."""
        images = part.images.to(self.device)
        targets = None if part.targets is None else part.targets.to(self.device)
        teacher = teacher_features = None
        distils = teacher_weight(self.recipe, self.dense is not None, targets is not None) > 0
        with autocast(self.device, self.dtype):
            if self.dense is not None and (distils or self.recipe.features):
                with torch.no_grad():
                    tokens, _ = self.dense.encode(images)
                    teacher, teacher_features = self.dense.readout(tokens), tokens.features
            logits, features, positions = self.student(images)
        if teacher is None or not self.recipe.features:
            features = teacher_features = None
        task = self.model.task
        losses = objective(task, self.recipe, logits, targets, teacher, features, teacher_features, positions)
        logits = logits.detach()
        right = task.agreement(teacher, logits) if targets is None else task.accuracy(logits, targets)
        return losses, right.sum()

    def set_ratios(self, step: int | None) -> None:
        """Set the pruning ratios of a step, which increase over the recipe's ramp; None: the final ratios."""
        length = self.recipe.ramp * self.steps
        share = 1.0 if step is None or step >= length else step / length
        for name, pruner in self.model.pruners.items():
            pruner.ratio = max(share * self.ratios[name], self.least[name])

    def _find_least_ratios(self) -> dict[str, float]:
        """Return the minimum ratio of each stage during a ramp: one token in models with output levels, else zero.

        A level may have a map for each stage that drops tokens, so a stage that drops tokens at the end must do so from
        the start.
        """
        counts = self.model.token_counts() if self.model.levels else None
        return {
            name: min(ratio, 1 / counts[self.model.count_index(int(name))]) if counts is not None else 0.0
            for name, ratio in self.ratios.items()
        }

    def candidates(self) -> dict[str, TokenModel]:
        """Return the candidate models with final ratios: the weights, and their moving average if there is one."""
        self.set_ratios(None)
        return {"weights": self.model} | ({"average": self.average.module} if self.average is not None else {})

    def close(self) -> None:
        """Release the accelerator's references to the models."""
        self.accelerator.free_memory()


def _uses_bfloat16(dtype: str, device: torch.device) -> bool:
    if dtype == "auto":
        return device.type == "cuda" and torch.cuda.is_bf16_supported()
    return dtype == "bfloat16"
