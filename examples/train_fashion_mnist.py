"""Train a small model on Fashion-MNIST, on a CPU: the Vim that comes with the package, a PlainMamba, VMamba or DeiT.

    apt-get install dataset-fashion-mnist        # Debian; or --idx, any folder with the four original files
    python examples/train_fashion_mnist.py vim_fashion_mnist.pth
    python examples/train_fashion_mnist.py plain_mamba_fashion_mnist.pth --architecture plain_mamba
    python examples/train_fashion_mnist.py vmamba_fashion_mnist.pth --architecture vmamba --epochs 8 --plain-epochs 1
    python examples/train_fashion_mnist.py deit_fashion_mnist.pth --architecture deit

A Vim and a DeiT get the images as they are, 28 x 28 pixels in patches of 2 x 2; a PlainMamba gets them resized to
112 x 112, for its patches are 16 x 16, and a VMamba to 80 x 80, of which its four sections have 20 x 20, 10 x 10, 5 x 5
and 3 x 3 tokens. The DeiT is timm's VisionTransformer. The checkpoint is in the
official format of its architecture, except for the names of a VMamba's parameters, and is written every few minutes;
the same command goes on from it, and a run in pieces gives the same model as a run in one. A finished run goes on, too,
with more --epochs. After each epoch a line with the accuracy on the test images goes to standard output and to the
checkpoint's "history". `examples/make_bundled_model.py` makes the
folder of the bundled model.
"""

import argparse
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from fashion_mnist import FOLDER, MEAN, STD, read
from timm.layers import build_sincos2d_pos_embed
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from training_loop import Training, add_options, initialise, train

from ssmcompress.models.plain_mamba import PlainMamba, PlainMambaConfig
from ssmcompress.models.vim import VimConfig, VisionMamba
from ssmcompress.models.vmamba import VMamba, VMambaConfig

SHIFT = 2  # pixels that a crop may be off by
HEAD_WIDTH = 16  # channels of a head of the DeiT


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


def make_vmamba(d_model: int, depth: int, d_state: int) -> VMamba:
    """Sections of 2, 2, `depth` and 2 layers, d_model to 8 d_model wide; the published models have one state."""
    widths = tuple(d_model * 2**section for section in range(4))
    config = VMambaConfig(
        widths=widths, depths=(2, 2, depth, 2), d_inner=tuple(2 * width for width in widths),
        dt_rank=tuple(-(-width // 16) for width in widths), mlp_dim=tuple(4 * width for width in widths),
        d_state=d_state, stem_width=d_model // 2, window=3, in_chans=1, num_classes=10, stride=4, image_size=(80, 80),
    )  # fmt: skip
    model = VMamba(config)

    def dt_projs(mixer: nn.Module) -> list[SimpleNamespace]:
        paths = zip(mixer.dt_projs_weight.data, mixer.dt_projs_bias.data, strict=True)
        return [SimpleNamespace(weight=weight, bias=bias) for weight, bias in paths]

    initialise(model, dt_projs, [block.op for block in model.blocks])
    return model


def make_deit(d_model: int, depth: int, d_state: int) -> VisionTransformer:
    """A ViT as timm has it, with matrices scaled for few channels and positions of sines and cosines to begin with.

    `d_state` has no meaning for it.
    """
    if d_model % HEAD_WIDTH:
        raise SystemExit(f"--d-model {d_model}: expected a multiple of {HEAD_WIDTH}, the width of a head of the DeiT")
    model = VisionTransformer(
        img_size=28, patch_size=2, in_chans=1, num_classes=10, embed_dim=d_model, depth=depth,
        num_heads=d_model // HEAD_WIDTH, norm_layer=partial(nn.LayerNorm, eps=1e-6), weight_init="jax",
    )  # fmt: skip
    model.pos_embed.data[:, 1:] = build_sincos2d_pos_embed(list(model.patch_embed.grid_size), d_model)
    return model


def config_of(model: nn.Module) -> dict[str, Any]:
    """What the checkpoint says of the model: the number of heads of a DeiT, for one, does not show in its weights."""
    if not isinstance(model, VisionTransformer):
        return asdict(model.config)
    patches = model.patch_embed
    return {
        "d_model": model.embed_dim, "depth": len(model.blocks), "num_heads": model.blocks[0].attn.num_heads,
        "in_chans": model.in_chans, "num_classes": model.num_classes,
        "patch_size": tuple(patches.patch_size), "image_size": tuple(patches.img_size),
    }  # fmt: skip


class Architecture(NamedTuple):
    """What makes a model, its usual width and depth, and where its official checkpoints keep the weights."""

    make: Callable[[int, int, int], nn.Module]
    d_model: int
    depth: int
    weights: str
    d_state: int = 8


ARCHITECTURES = {
    "vim": Architecture(make_vim, 64, 6, "model"),
    "plain_mamba": Architecture(make_plain_mamba, 64, 8, "state_dict"),
    "vmamba": Architecture(make_vmamba, 16, 5, "model", d_state=1),
    "deit": Architecture(make_deit, 32, 12, "model"),
}


def resized(images: Tensor, size: tuple[int, int]) -> Tensor:
    """As pillow resizes pictures, which is how the evaluation transform does it."""
    if images.shape[2:] == size:
        return images
    return F.interpolate(images, size, mode="bicubic", antialias=True)


@torch.inference_mode()
def accuracy(model: nn.Module, size: tuple[int, int], images: Tensor, labels: Tensor) -> float:
    """Top-1 in percent, of a model of images of `size` (height, width)."""
    right = 0
    for x, y in zip(images.split(250), labels.split(250), strict=True):
        right += (model(resized(x, size)).argmax(1) == y).sum().item()
    return 100 * right / len(labels)


def parse() -> argparse.Namespace:
    """The options of the command line, with the width and depth filled in."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser)
    parser.add_argument("--idx", type=Path, default=FOLDER)
    parser.add_argument("--architecture", choices=ARCHITECTURES, default="vim")
    parser.add_argument(
        "--depth", type=int, help="default: 6 for a Vim, 8 for a PlainMamba, 12 for a DeiT, 5 in the third section"
    )
    parser.add_argument("--epochs", type=int, default=7)
    parser.add_argument("--plain-epochs", type=int, default=0, help="the last so many without shifts")
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
    model = architecture.make(args.d_model, args.depth, args.d_state)
    config = config_of(model)

    def loss(chosen: Tensor, epoch: int, generator: torch.Generator) -> Tensor:
        shift = SHIFT if epoch < args.epochs - args.plain_epochs else 0
        batch = resized(augmented(images[chosen], shift, generator), config["image_size"])
        return F.cross_entropy(model(batch), labels[chosen], label_smoothing=args.label_smoothing)

    training = Training(
        model,
        len(images),
        loss,
        measure=lambda: {"top1": accuracy(model, config["image_size"], *test)},
        weights=architecture.weights,
        settings={k: v for k, v in vars(args).items() if k not in ("checkpoint", "idx", "steps")},
        fixed=("architecture", "d_model", "depth", "d_state", "batch_size", "seed"),
        describe=lambda step: {"config": config},
    )
    train(training, args)


if __name__ == "__main__":
    main()
