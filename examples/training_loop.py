"""Shared parts of the training scripts: weight initialisation, and a loop that can be resumed.

A batch depends only on the seed and the step, so an interrupted run gives the same model as an uninterrupted one.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from timm.scheduler import CosineLRScheduler
from torch import Tensor, nn

from ssmcompress.data.transforms import IMAGENET_MEAN, IMAGENET_STD
from ssmcompress.models import TokenModel

SAVE_EVERY = 180  # seconds
OPTIMIZERS = ("adamw", "muon")
OPTIMIZER = "muon: Muon for the large matrices, AdamW for the rest; default: %(default)s"


class Training(NamedTuple):
    """A model to be trained and its data.

    Attributes:
        model: in training mode. images: number of training images.
        loss: function from indices (batch,) of images, an epoch and a generator to the loss of the batch.
        measure: function that returns metrics on test images. weights: checkpoint key of the weights.
        settings: stored in the checkpoint. fixed: settings that must be unchanged to resume a run.
        describe: function from a step to additional entries of the checkpoint.
    """

    model: nn.Module
    images: int
    loss: Callable[[Tensor, int, torch.Generator], Tensor]
    measure: Callable[[], dict[str, float]]
    weights: str
    settings: dict[str, Any]
    fixed: tuple[str, ...]
    describe: Callable[[int], dict[str, Any]]


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of every training script except sizes, epochs, batch size and learning rate."""
    parser.add_argument("checkpoint", type=Path, help="checkpoint to write; resumed from if it exists")
    parser.add_argument("--d-model", type=int, default=64)
    parser.add_argument("--d-state", type=int, default=8)
    parser.add_argument("--weight-decay", type=float, default=0.05)
    parser.add_argument("--optimizer", choices=OPTIMIZERS, default="adamw", help=OPTIMIZER)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, help="stop after this many more steps")


def initialise(model: TokenModel, dt_projs: Callable[[nn.Module], Iterable], mixers: list) -> None:
    """Initialise what all models share: step sizes spread over 0.001 to 0.1, small output weights.

    `dt_projs` returns, for a mixer, the modules with a weight (d_inner, dt_rank) and a bias (d_inner,).
    """
    nn.init.trunc_normal_(model.classifier.weight, std=0.02)
    nn.init.zeros_(model.classifier.bias)
    for mixer in mixers:
        mixer.out_proj.weight.data /= len(mixers) ** 0.5
        for dt_proj in dt_projs(mixer):
            d_inner, dt_rank = dt_proj.weight.shape
            nn.init.uniform_(dt_proj.weight, -(dt_rank**-0.5), dt_rank**-0.5)
            delta = torch.exp(torch.empty(d_inner).uniform_(np.log(1e-3), np.log(1e-1)))
            dt_proj.bias.data.copy_(delta + torch.log(-torch.expm1(-delta)))  # softplus of this is delta


def normalise(images: Tensor) -> Tensor:
    """Normalise images (n, 3, height, width) uint8 as for ImageNet models."""
    mean, std = (torch.tensor(values)[:, None, None] for values in (IMAGENET_MEAN, IMAGENET_STD))
    return (images.float() / 255 - mean) / std


def shift_and_mirror(images: Tensor, shift: int, fill: float, generator: torch.Generator) -> Tensor:
    """Shift each image (n, channels, height, width) by up to `shift` pixels, and flip about half of them.

    Pixels from outside are `fill`.
    """
    count, _, height, width = images.shape
    padded = F.pad(images, [shift] * 4, value=fill)
    corner = torch.randint(2 * shift + 1, (2, count, 1), generator=generator)
    rows, columns = corner[0] + torch.arange(height), corner[1] + torch.arange(width)
    columns = torch.where(torch.rand(count, 1, generator=generator) < 0.5, columns, columns.flip(1))
    chosen = padded.movedim(1, -1)[torch.arange(count)[:, None, None], rows[:, :, None], columns[:, None]]
    return chosen.movedim(-1, 1).contiguous()


@torch.inference_mode()
def measure_top1(model: nn.Module, prepare: Callable[[Tensor], Tensor], images: Tensor, labels: Tensor) -> float:
    """Return the top-1 accuracy in percent; `prepare` converts a batch of images to model input."""
    right = 0
    for x, y in zip(images.split(250), labels.split(250), strict=True):
        right += (model(prepare(x)).argmax(1) == y).sum().item()
    return 100 * right / len(labels)


def peak_memory() -> float | None:
    """Return the peak memory of this process in MB; None where the system does not report it (Windows)."""
    try:
        import resource
    except ImportError:
        return None
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most / 1e6 if sys.platform == "darwin" else most * 1024 / 1e6


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Return parameter groups with weight decay for matrices only: not norms, biases, A or the embeddings."""
    spared = ("A_log", "A_b_log", "A_logs", "dt_projs_bias", "pos_embed", "cls_token", "direction_Bs")
    plain = [p for n, p in model.named_parameters() if p.ndim < 2 or n.endswith(spared)]
    decayed = [p for n, p in model.named_parameters() if p.ndim >= 2 and not n.endswith(spared)]
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]


def make_optimizers(model: nn.Module, args: argparse.Namespace) -> list[torch.optim.Optimizer]:
    """Return the optimizers of a model: AdamW, or Muon for all large matrices and AdamW for the rest.

    Muon (https://kellerjordan.github.io/posts/muon) learns faster. For a DeiT with 12 layers, the class loss after 400
    steps on 80-pixel images of make_clutter.py was 2.23 with AdamW and 1.97 with Muon, whose update takes a tenth of
    the step time. Small matrices, such as the scan parameters and the classifier, are left to AdamW; the step sizes of
    both are comparable (arXiv 2502.16982), so there is one learning rate.

    Args:
        args: optimizer, lr, weight_decay and d_model.

    Raises:
        SystemExit: this version of torch has no Muon.
    """
    groups = parameter_groups(model, args.weight_decay)
    optimizers: list[torch.optim.Optimizer] = []
    if args.optimizer == "muon":
        if not hasattr(torch.optim, "Muon"):
            raise SystemExit(f"--optimizer muon needs torch 2.9 or later, this is {torch.__version__}")
        large = [p for p in groups[0]["params"] if p.ndim == 2 and min(p.shape) >= args.d_model]
        options = {"lr": args.lr, "weight_decay": args.weight_decay, "adjust_lr_fn": "match_rms_adamw"}
        optimizers.append(torch.optim.Muon(large, **options))
        taken = {id(p) for p in large}
        groups[0]["params"] = [p for p in groups[0]["params"] if id(p) not in taken]
    return [*optimizers, torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.98))]


def train(training: Training, args: argparse.Namespace) -> None:
    """Train to the last epoch, or for `args.steps` steps; print the loss, time left and metrics after each epoch.

    The checkpoint also stores the total time of all runs in seconds, and the peak memory of the last one.

    Args:
        args: checkpoint, epochs, batch_size, optimizer, lr, weight_decay, d_model, seed and steps.
    """
    model, weights, settings = training.model, training.weights, training.settings
    optimizers = make_optimizers(model, args)
    per_epoch = training.images // args.batch_size
    last = args.epochs * per_epoch
    warmup = {"warmup_t": per_epoch // 2, "warmup_lr_init": 1e-5}
    schedules = [CosineLRScheduler(each, last, **warmup, t_in_epochs=False) for each in optimizers]
    step, history, seconds = 0, [], 0.0
    if args.checkpoint.exists():
        saved = torch.load(args.checkpoint, weights_only=True)
        if any(saved["settings"].get(name) != settings[name] for name in training.fixed):
            raise SystemExit(f"{args.checkpoint} was made with {saved['settings']}, not {settings}")
        before = saved["settings"]
        changed = [f"{k}={v} (was {before.get(k)})" for k, v in settings.items() if before.get(k) != v]
        if changed and saved["step"] < last:
            print(f"resumed with changed options: {', '.join(changed)}", flush=True)
        model.load_state_dict(saved[weights])
        for optimizer, kept in zip(optimizers, saved["optimizer"], strict=True):
            optimizer.load_state_dict(kept)
        step, history, seconds = saved["step"], saved["history"], saved.get("seconds", 0.0)

    def save() -> None:
        state = {weights: model.state_dict(), "step": step, "history": history}
        state["optimizer"] = [optimizer.state_dict() for optimizer in optimizers]
        state["seconds"] = seconds + time.monotonic() - started
        state["peak_mb"] = peak_memory()
        temporary = args.checkpoint.with_suffix(".tmp")
        torch.save({**state, "settings": settings, **training.describe(step)}, temporary)
        os.replace(temporary, args.checkpoint)

    saved_at = started = time.monotonic()
    first, stop = step, min(last, step + (args.steps or last))
    while step < stop:
        epoch, position = divmod(step, per_epoch)
        order = torch.randperm(training.images, generator=torch.Generator().manual_seed(args.seed + epoch))
        chosen = order[position * args.batch_size : (position + 1) * args.batch_size]
        for schedule in schedules:
            schedule.step_update(step)
        loss = training.loss(chosen, epoch, torch.Generator().manual_seed(args.seed + 1000 * (step + 1)))
        model.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        step += 1
        if step % 20 == 0:
            each = (time.monotonic() - started) / (step - first)
            left = f"{each:.2f} s a step, {each * (last - step) / 60:.0f} min left"
            print(f"step {step}/{last} loss {loss.item():.3f} {left}", flush=True)
        if step % per_epoch == 0:
            model.eval()
            history.append({"epoch": step // per_epoch, "loss": loss.item(), **training.measure()})
            model.train()
            print(json.dumps(history[-1]), flush=True)
        if step == stop or step % per_epoch == 0 or time.monotonic() - saved_at > SAVE_EVERY:
            save()
            saved_at = time.monotonic()
