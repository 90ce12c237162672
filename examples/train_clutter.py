r"""Train a small classifier on the images of make_clutter.py, on a CPU: a Vim, a PlainMamba or a DeiT.

    python examples/make_clutter.py classification train train80.parquet --images 60000 --side 80
    python examples/make_clutter.py classification test test80.parquet --images 2000 --side 80
    python examples/make_clutter.py classification train train.parquet --images 60000
    python examples/make_clutter.py classification test test.parquet --images 5000
    python examples/train_clutter.py small.pth train80.parquet test80.parquet --architecture plain_mamba --epochs 6
    python examples/train_clutter.py plain_mamba.pth train.parquet test.parquet --architecture plain_mamba \
        --start small.pth --epochs 2 --lr 1e-3

The models have 12 layers and 8 x 8 patches, 196 of them in an image of 112 pixels. A step on images of 80 pixels, with
garments of the same size, takes half the time; --start initialises the model with the weights of such a run, with the
position embedding resized. A Vim and a DeiT learn faster with --patch-loss and --teacher, for example a PlainMamba;
with --masks, each patch is trained to predict the class as far as it shows the garment (token labels as in
arXiv 2104.10858, from masks). The options used for each model are in examples/reproduce/clutter.py.

The checkpoint is in the official format of its architecture and is saved every few minutes. The same command resumes
from it, and an interrupted run gives the same model as an uninterrupted one. After each epoch a line with the accuracy
on the test images is printed and added to the checkpoint's "history".
"""

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from datasets import Dataset
from small_models import ARCHITECTURES, CLASSES, Sizes, config_of
from torch import Tensor, nn
from training_loop import Training, add_options, measure_top1, normalise, shift_and_mirror, train

import ssmcompress
from ssmcompress.progress import track

PATCH = 8
BATCH = 250  # batch size of a teacher
PATCH_LOSS = "weight of a second loss, of the mean of the patches instead of the class token (as in arXiv 2104.10858)"
MASKS = (
    "an .npz file of make_clutter.py: the second loss is then computed per patch, with a uniform target for background"
)
TEACHER = (
    "checkpoints of models for these images: half of each target is then their mean prediction instead of the label"
)
LEFT_OUT = ("checkpoint", "training", "test", "steps")  # not stored with the settings in the checkpoint
# Default widths; they give the three about the same FLOPs: 0.122, 0.126 and 0.112 billion.
WIDTHS = {"vim": 64, "plain_mamba": 48, "deit": 48}


def load(file: Path) -> tuple[Tensor, Tensor]:
    """Load (images (n, 3, side, side) uint8, labels (n,)) from a table of make_clutter.py."""
    table = Dataset.from_parquet(str(file))
    images = np.stack([np.asarray(image) for image in table["image"]])
    return torch.from_numpy(images).permute(0, 3, 1, 2), torch.tensor(table["label"])


def classify(model: nn.Module, images: Tensor, patches: bool) -> tuple[Tensor, Tensor | None]:
    """Return the logits of images and, if `patches`, the logits of each patch, (n, patches, classes).

    The mean of the patch logits equals the classifier applied to the mean of all patches.
    """
    if not patches:
        return model(images), None
    features = model.forward_features(images)  # the class token comes first
    return model.forward_head(features), model.head(features[:, 1:])


@torch.inference_mode()
def make_targets(
    labels: Tensor, smoothing: float, predictions: Sequence[Tensor] = (), classes: int = CLASSES
) -> Tensor:
    """Return target probabilities (n, classes): smoothed labels, averaged with the `predictions` if there are any."""
    targets = F.one_hot(labels, classes).float() * (1 - smoothing)
    targets += smoothing / classes
    return (targets + torch.stack(predictions).mean(0)) / 2 if predictions else targets


def make_patch_targets(targets: Tensor, masks: Tensor, patch: int = PATCH) -> Tensor:
    """Return patch targets (n, patches, classes): the image's target, weighted by how much of the object a patch shows.

    The rest of the weight is uniform over all classes.

    Args:
        targets: of the images (n, classes). masks: 1 where a pixel shows the object (n, 1, side, side).
    """
    shares = F.avg_pool2d(masks.float(), patch).flatten(1)[..., None]
    return shares * targets[:, None] + (1 - shares) / targets.shape[1]


def read_masks(file: Path, labels: Tensor, side: int) -> Tensor:
    """Return the masks (n, side, side / 8) uint8, one bit per pixel, of images with these labels and side.

    Raises:
        SystemExit: the masks belong to other images.
    """
    with np.load(file) as content:
        masks, found = content["masks"], content["labels"]
    if masks.shape[1] != side or not np.array_equal(found, labels):
        raise SystemExit(
            f"{file} does not belong to these images: labels or side differ. Create both with the same seed and side"
        )
    return torch.from_numpy(masks)


def unpack(masks: Tensor) -> Tensor:
    """Unpack masks of `read_masks` to (n, 1, side, side) of 0 and 1."""
    return torch.from_numpy(np.unpackbits(masks.numpy(), axis=2))[:, None]


def move(images: Tensor, masks: Tensor | None, generator: torch.Generator) -> tuple[Tensor, Tensor | None]:
    """Randomly shift and flip images (n, 3, side, side), and their masks (n, 1, side, side) in the same way."""
    together = images if masks is None else torch.cat([images, masks], 1)
    together = shift_and_mirror(together, PATCH // 2, 0, generator)
    return together[:, :3], None if masks is None else together[:, 3:]


@torch.inference_mode()
def predict(teacher: Path, training: Path, images: Tensor) -> Tensor:
    """Return a model's probabilities (n, classes) for all images; they are cached in a file next to the model."""
    file = teacher.with_name(f"{teacher.stem}-on-{training.stem}.pt")
    if file.exists() and file.stat().st_mtime > teacher.stat().st_mtime:
        return torch.load(file, weights_only=True)
    model = ssmcompress.load(teacher, image_size=tuple(images.shape[-2:]))
    parts = images.split(BATCH)
    found = torch.cat(
        [model(normalise(part)).softmax(1) for part in track(parts, "computing teacher predictions", len(parts))]
    )
    temporary = file.with_suffix(".tmp")
    torch.save(found, temporary)
    os.replace(temporary, file)
    return found


def name_files(value: Any) -> Any:
    """Return an option as the checkpoint stores it, with paths as text."""
    if isinstance(value, list):
        return [name_files(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def parse() -> argparse.Namespace:
    """Parse the command line and fill in the default width."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser)
    parser.add_argument("training", type=Path, help="a .parquet file of make_clutter.py")
    parser.add_argument("test", type=Path, help="a .parquet file of make_clutter.py, of images of the same size")
    parser.add_argument("--architecture", choices=WIDTHS, default="vim")
    parser.add_argument("--depth", type=int, default=12)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--label-smoothing", type=float, default=0.1)
    parser.add_argument("--patch-loss", type=float, default=0.0, help=PATCH_LOSS)
    parser.add_argument("--masks", type=Path, help=MASKS)
    parser.add_argument("--teacher", type=Path, nargs="+", default=[], help=TEACHER)
    parser.add_argument("--start", type=Path, help="checkpoint of the same sizes to initialise a new run from")
    parser.set_defaults(d_model=None)
    args = parser.parse_args()
    args.d_model = args.d_model or WIDTHS[args.architecture]
    if args.patch_loss and args.architecture == "plain_mamba":
        parser.error("--patch-loss is for models with a class token: a PlainMamba reads the mean of its patches anyway")
    if args.masks and not args.patch_loss:
        parser.error("--masks needs --patch-loss, the weight of the loss that uses them")
    return args


def main() -> None:
    args = parse()
    architecture = ARCHITECTURES[args.architecture]
    images, labels = load(args.training)
    test = load(args.test)
    predictions = [predict(teacher, args.training, images) for teacher in args.teacher]
    targets = make_targets(labels, args.label_smoothing, predictions)
    side = images.shape[-1]
    masks = read_masks(args.masks, labels, side) if args.masks else None
    torch.manual_seed(args.seed)
    model = architecture.make(Sizes(args.d_model, args.depth, args.d_state, channels=3, side=side, patch=PATCH))
    if args.start is not None:
        start = ssmcompress.load(args.start, architecture=architecture.name, image_size=(side, side))
        model.load_state_dict(start.state_dict())

    def loss(chosen: Tensor, epoch: int, generator: torch.Generator) -> Tensor:
        target = targets[chosen]
        batch, shown = move(images[chosen], None if masks is None else unpack(masks[chosen]), generator)
        logits, of_patches = classify(model, normalise(batch), args.patch_loss > 0)
        total = F.cross_entropy(logits, target)
        if of_patches is not None and shown is not None:
            of_each = make_patch_targets(target, shown)
            total += args.patch_loss * F.cross_entropy(of_patches.flatten(0, 1), of_each.flatten(0, 1))
        elif of_patches is not None:
            total += args.patch_loss * F.cross_entropy(of_patches.mean(1), target)
        return total

    training = Training(
        model,
        len(images),
        loss,
        measure=lambda: {"top1": measure_top1(model, normalise, *test)},
        weights=architecture.weights,
        settings={k: name_files(v) for k, v in vars(args).items() if k not in LEFT_OUT},
        fixed=("architecture", "d_model", "depth", "d_state", "batch_size", "optimizer", "seed"),
        describe=lambda step: {"config": config_of(model)},
    )
    train(training, args)


if __name__ == "__main__":
    main()
