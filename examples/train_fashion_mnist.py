"""Train a small Vim, the one that comes with the package, or a small PlainMamba on Fashion-MNIST, on a CPU.

    apt-get install dataset-fashion-mnist        # Debian; or --idx, any folder with the four original files
    python examples/train_fashion_mnist.py vim_fashion_mnist.pth
    python examples/train_fashion_mnist.py plain_mamba_fashion_mnist.pth --architecture plain_mamba

A Vim gets the images as they are, 28 x 28 pixels in patches of 2 x 2; a PlainMamba gets them resized to 112 x 112, for
its patches are 16 x 16. The checkpoint is in the official format of its architecture and is written every few minutes;
the same command goes on from it, and a run in pieces gives the same model as a run in one. A finished run goes on, too,
with more --epochs. After each epoch a line with the accuracy on the test images goes to standard output and to the
checkpoint's "history". `examples/make_bundled_model.py` makes the folder of the bundled model.
"""

import argparse
import json
import os
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from fashion_mnist import FOLDER, MEAN, STD, read
from timm.scheduler import CosineLRScheduler
from torch import Tensor, nn

from ssmcompress.models import TokenModel
from ssmcompress.models.plain_mamba import PlainMamba, PlainMambaConfig
from ssmcompress.models.vim import VimConfig, VisionMamba

SHIFT = 2  # pixels that a crop may be off by
SAVE_EVERY = 180  # seconds


def load(folder: Path, split: str) -> tuple[Tensor, Tensor]:
    """(normalised images (n, 1, 28, 28), labels (n,)) of "train" or "t10k"."""
    pixels, labels = read(folder, split)
    images = (pixels[:, None] / np.float32(255) - np.float32(MEAN)) / np.float32(STD)
    return torch.from_numpy(images), torch.from_numpy(labels.astype(np.int64))


def augmented(images: Tensor, shift: int, generator: torch.Generator) -> Tensor:
    """Each image shifted by up to `shift` pixels, half of them mirrored."""
    count, _, height, width = images.shape
    padded = F.pad(images, [shift] * 4, value=-MEAN / STD)
    corner = torch.randint(2 * shift + 1, (2, count, 1), generator=generator)
    rows, columns = corner[0] + torch.arange(height), corner[1] + torch.arange(width)
    columns = torch.where(torch.rand(count, 1, generator=generator) < 0.5, columns, columns.flip(1))
    return padded[torch.arange(count)[:, None, None], 0, rows[:, :, None], columns[:, None]][:, None]


def make_vim(d_model: int, depth: int, d_state: int) -> VisionMamba:
    """Weights as the published models start from (Vim and mamba-ssm)."""
    config = VimConfig(
        d_model=d_model, depth=depth, d_inner=2 * d_model, d_state=d_state, dt_rank=-(-d_model // 16), d_conv=4,
        in_chans=1, num_classes=10, patch_size=(2, 2), stride=2, image_size=(28, 28),
    )  # fmt: skip
    model = VisionMamba(config)
    nn.init.trunc_normal_(model.pos_embed, std=0.02)
    nn.init.trunc_normal_(model.cls_token, std=0.02)
    initialise(model, lambda m: (m.dt_proj, m.dt_proj_b), [block.mixer for block in model.blocks])
    return model


def make_plain_mamba(d_model: int, depth: int, d_state: int) -> PlainMamba:
    """A stem of 12 channels where the published models have 64, which would be five sixths of all FLOPs."""
    config = PlainMambaConfig(
        d_model=d_model, depth=depth, d_inner=2 * d_model, d_state=d_state, dt_rank=-(-d_model // 16), window=7,
        dw_layers=(), dw_window=0, stem_width=12, stem_depth=1, stem_window=7, in_chans=1, num_classes=10,
        patch_size=16, stride=16, image_size=(112, 112),
    )  # fmt: skip
    model = PlainMamba(config)
    nn.init.trunc_normal_(model.backbone.pos_embed, std=0.02)
    mixers = [block.mamba for block in model.blocks]
    initialise(model, lambda m: (m.dt_proj,), mixers)
    for mixer in mixers:
        nn.init.trunc_normal_(mixer.direction_Bs, std=0.02)
        mixer.dt_proj.bias.data /= 2  # this architecture adds it twice
    return model


def initialise(model: TokenModel, dt_projs: Callable[[nn.Module], Iterable[nn.Linear]], mixers: list) -> None:
    """What both have alike: step sizes spread over 0.001 to 0.1, small steps of the residual stream."""
    nn.init.trunc_normal_(model.classifier.weight, std=0.02)
    nn.init.zeros_(model.classifier.bias)
    for mixer in mixers:
        mixer.out_proj.weight.data /= len(mixers) ** 0.5
        for dt_proj in dt_projs(mixer):
            d_inner, dt_rank = dt_proj.weight.shape
            nn.init.uniform_(dt_proj.weight, -(dt_rank**-0.5), dt_rank**-0.5)
            delta = torch.exp(torch.empty(d_inner).uniform_(np.log(1e-3), np.log(1e-1)))
            dt_proj.bias.data = delta + torch.log(-torch.expm1(-delta))  # softplus of this is delta


# What makes one, its usual depth, and where its official checkpoints keep the weights.
ARCHITECTURES = {"vim": (make_vim, 6, "model"), "plain_mamba": (make_plain_mamba, 8, "state_dict")}


def resized(images: Tensor, size: tuple[int, int]) -> Tensor:
    """As pillow resizes pictures, which is how the evaluation transform does it."""
    if images.shape[2:] == size:
        return images
    return F.interpolate(images, size, mode="bicubic", antialias=True)


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Decay for matrices only: not for norms, biases, the state matrix A or the embeddings."""
    spared = ("A_log", "A_b_log", "pos_embed", "cls_token", "direction_Bs")
    plain = [p for n, p in model.named_parameters() if p.ndim < 2 or n.endswith(spared)]
    decayed = [p for n, p in model.named_parameters() if p.ndim >= 2 and not n.endswith(spared)]
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]


@torch.inference_mode()
def accuracy(model: TokenModel, images: Tensor, labels: Tensor) -> float:
    """Top-1 in percent."""
    model.eval()
    right = 0
    for x, y in zip(images.split(250), labels.split(250), strict=True):
        right += (model(resized(x, model.config.image_size)).argmax(1) == y).sum().item()
    model.train()
    return 100 * right / len(labels)


def parse() -> argparse.Namespace:
    """The options of the command line, with the depth filled in."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, help="written here; gone on from, if it is there")
    parser.add_argument("--idx", type=Path, default=FOLDER)
    parser.add_argument("--architecture", choices=ARCHITECTURES, default="vim")
    parser.add_argument("--d-model", type=int, default=64)
    parser.add_argument("--depth", type=int, help="default: 6 for a Vim, 8 for a PlainMamba")
    parser.add_argument("--d-state", type=int, default=8)
    parser.add_argument("--epochs", type=int, default=7)
    parser.add_argument("--plain-epochs", type=int, default=0, help="the last so many without shifts")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--weight-decay", type=float, default=0.05)
    parser.add_argument("--label-smoothing", type=float, default=0.1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, help="stop after this many more steps")
    args = parser.parse_args()
    args.depth = args.depth or ARCHITECTURES[args.architecture][1]
    return args


def main() -> None:
    args = parse()
    make, _, weights = ARCHITECTURES[args.architecture]
    images, labels = load(args.idx, "train")
    test = load(args.idx, "t10k")
    torch.manual_seed(args.seed)
    model = make(args.d_model, args.depth, args.d_state)
    optimizer = torch.optim.AdamW(parameter_groups(model, args.weight_decay), lr=args.lr, betas=(0.9, 0.98))
    per_epoch = len(images) // args.batch_size
    last = args.epochs * per_epoch
    schedule = CosineLRScheduler(optimizer, last, warmup_t=per_epoch // 2, warmup_lr_init=1e-5, t_in_epochs=False)
    step, history = 0, []
    settings = {k: v for k, v in vars(args).items() if k not in ("checkpoint", "idx", "steps")}
    if args.checkpoint.exists():
        saved = torch.load(args.checkpoint, weights_only=True)
        fixed = ("architecture", "d_model", "depth", "d_state", "batch_size", "seed")
        if any(saved["settings"].get(k) != settings[k] for k in fixed):
            raise SystemExit(f"{args.checkpoint} was made with {saved['settings']}, not {settings}")
        model.load_state_dict(saved[weights])
        optimizer.load_state_dict(saved["optimizer"])
        step, history = saved["step"], saved["history"]

    def save() -> None:
        state = {weights: model.state_dict(), "optimizer": optimizer.state_dict(), "step": step, "history": history}
        temporary = args.checkpoint.with_suffix(".tmp")
        torch.save({**state, "settings": settings, "config": asdict(model.config)}, temporary)
        os.replace(temporary, args.checkpoint)

    size = model.config.image_size
    saved_at = started = time.monotonic()
    first, stop = step, min(last, step + (args.steps or last))
    while step < stop:
        epoch, position = divmod(step, per_epoch)
        # Drawn from the seed and the step alone, so that a run in pieces sees the same batches.
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(args.seed + epoch))
        chosen = order[position * args.batch_size : (position + 1) * args.batch_size]
        shift = SHIFT if epoch < args.epochs - args.plain_epochs else 0
        batch = augmented(images[chosen], shift, torch.Generator().manual_seed(args.seed + 1000 * (step + 1)))
        schedule.step_update(step)
        loss = F.cross_entropy(model(resized(batch, size)), labels[chosen], label_smoothing=args.label_smoothing)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        step += 1
        if step % 20 == 0:
            each = (time.monotonic() - started) / (step - first)
            left = f"{each:.2f} s a step, {each * (last - step) / 60:.0f} min left"
            print(f"step {step}/{last} loss {loss.item():.3f} {left}", flush=True)
        if step % per_epoch == 0:
            history.append({"epoch": step // per_epoch, "loss": loss.item(), "top1": accuracy(model, *test)})
            print(json.dumps(history[-1]), flush=True)
        if step == stop or step % per_epoch == 0 or time.monotonic() - saved_at > SAVE_EVERY:
            save()
            saved_at = time.monotonic()


if __name__ == "__main__":
    main()
