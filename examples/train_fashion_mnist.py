"""Train a small model on Fashion-MNIST, on a CPU: the Vim that comes with the package, a PlainMamba, VMamba or DeiT.

    apt-get install dataset-fashion-mnist        # Debian; or --idx, any folder with the four original files
    python examples/train_fashion_mnist.py vim_fashion_mnist.pth
    python examples/train_fashion_mnist.py plain_mamba_fashion_mnist.pth --architecture plain_mamba
    python examples/train_fashion_mnist.py vmamba_fashion_mnist.pth --architecture vmamba --epochs 8 --plain-epochs 1
    python examples/train_fashion_mnist.py deit_fashion_mnist.pth --architecture deit

A Vim and a DeiT get the original images, 28 x 28 pixels in 2 x 2 patches. A PlainMamba gets them resized to 112 x 112,
since its patches are 16 x 16, and a VMamba to 80 x 80, which gives its four sections 20 x 20, 10 x 10, 5 x 5 and 3 x 3
tokens. The DeiT is timm's VisionTransformer. The checkpoint is in the official format of its architecture, except for
the names of a VMamba's parameters, and is saved every few minutes. The same command resumes from it, and an interrupted
run gives the same model as an uninterrupted one; a finished run can be continued with more --epochs. After each epoch a
line with the accuracy on the test images is printed and added to the checkpoint's "history".
`examples/make_bundled_model.py` creates the folder of the bundled model.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from fashion_mnist import FOLDER, MEAN, STD, read
from small_models import ARCHITECTURES, Sizes, config_of
from torch import Tensor
from training_loop import Training, add_options, measure_top1, shift_and_mirror, train

SHIFT = 2  # maximum shift of a random crop, in pixels
# Image size and patch size of each architecture.
SIDES = {"vim": (28, 2), "plain_mamba": (112, 16), "vmamba": (80, 4), "deit": (28, 2)}


def load(folder: Path, split: str) -> tuple[Tensor, Tensor]:
    """Load (normalised images (n, 1, 28, 28), labels (n,)) of "train" or "t10k"."""
    pixels, labels = read(folder, split)
    images = (pixels[:, None] / np.float32(255) - np.float32(MEAN)) / np.float32(STD)
    return torch.from_numpy(images), torch.from_numpy(labels.astype(np.int64))


def resized(images: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize images as pillow does, since the evaluation transform uses it."""
    if images.shape[2:] == size:
        return images
    return F.interpolate(images, size, mode="bicubic", antialias=True)


def parse() -> argparse.Namespace:
    """Parse the command line and fill in the default width and depth."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser)
    parser.add_argument("--idx", type=Path, default=FOLDER)
    parser.add_argument("--architecture", choices=ARCHITECTURES, default="vim")
    parser.add_argument(
        "--depth", type=int, help="default: 6 for a Vim, 8 for a PlainMamba, 12 for a DeiT, 5 in the third section"
    )
    parser.add_argument("--epochs", type=int, default=7)
    parser.add_argument("--plain-epochs", type=int, default=0, help="number of final epochs without shifts")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--label-smoothing", type=float, default=0.1)
    parser.set_defaults(d_model=None, d_state=None)  # 64 and 8; 32 for a DeiT, 16 and 1 for a VMamba
    args = parser.parse_args()
    args.d_model = args.d_model or ARCHITECTURES[args.architecture].d_model
    args.d_state = args.d_state or ARCHITECTURES[args.architecture].d_state
    args.depth = args.depth or ARCHITECTURES[args.architecture].depth
    return args


def main() -> None:
    args = parse()
    architecture = ARCHITECTURES[args.architecture]
    images, labels = load(args.idx, "train")
    test = load(args.idx, "t10k")
    torch.manual_seed(args.seed)
    side, patch = SIDES[args.architecture]
    model = architecture.make(Sizes(args.d_model, args.depth, args.d_state, channels=1, side=side, patch=patch))

    def prepare(chosen: Tensor) -> Tensor:
        return resized(chosen, (side, side))

    def loss(chosen: Tensor, epoch: int, generator: torch.Generator) -> Tensor:
        shift = SHIFT if epoch < args.epochs - args.plain_epochs else 0
        batch = shift_and_mirror(images[chosen], shift, -MEAN / STD, generator)
        return F.cross_entropy(model(prepare(batch)), labels[chosen], label_smoothing=args.label_smoothing)

    training = Training(
        model,
        len(images),
        loss,
        measure=lambda: {"top1": measure_top1(model, prepare, *test)},
        weights=architecture.weights,
        settings={k: v for k, v in vars(args).items() if k not in ("checkpoint", "idx", "steps")},
        fixed=("architecture", "d_model", "depth", "d_state", "batch_size", "optimizer", "seed"),
        describe=lambda step: {"config": config_of(model)},
    )
    train(training, args)


if __name__ == "__main__":
    main()
