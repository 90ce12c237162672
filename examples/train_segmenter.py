"""Train a small UperNet with a Vim backbone on the images of make_clutter.py, on a CPU.

    python examples/make_clutter.py segmentation train seg-train.parquet --images 20000
    python examples/make_clutter.py segmentation test seg-test.parquet --images 1000
    python examples/train_segmenter.py segmenter.pth seg-train.parquet seg-test.parquet
    python examples/train_segmenter.py segmenter.pth seg-train.parquet seg-test.parquet --backbone vim.pth

The last command initialises the layers from a classifier of train_clutter.py. The checkpoint has mmseg's format and is
saved every few minutes. The same command resumes from it, and an interrupted run gives the same model as an
uninterrupted one. After each epoch a line with the mIoU on the test images is printed and added to the checkpoint's
"history".
"""

import argparse
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from datasets import Dataset
from make_clutter import CLASS_NAMES, SIDE
from torch import Tensor, nn
from training_loop import Training, add_options, initialise, normalise, train

import ssmcompress
from ssmcompress.models.vim import VisionMamba
from ssmcompress.models.vim_upernet import VimUperNet, VimUperNetConfig
from ssmcompress.tasks import SEGMENTATION

PATCH = 8
# Configuration that the weights do not show, in the format of mmseg.
CONFIG = """model = dict(
    type='EncoderDecoder',
    backbone=dict(
        type='VisionMambaSeg', img_size={side}, patch_size={patch}, embed_dim={d_model}, depth={depth},
        out_indices={out_indices}, if_cls_token=False, use_residual_as_feature=True, last_layer_process='add',
        if_rope=False),
    decode_head=dict(type='UPerHead', channels={channels}, num_classes={classes}, align_corners=False),
    test_cfg=dict(mode='whole'))
"""


def load(file: Path) -> tuple[Tensor, Tensor]:
    """Load (images (n, 3, 112, 112) uint8, masks (n, 112, 112) uint8) from a table of make_clutter.py."""
    table = Dataset.from_parquet(str(file))
    images = np.empty((len(table), SIDE, SIDE, 3), np.uint8)
    masks = np.empty((len(table), SIDE, SIDE), np.uint8)
    for number, row in enumerate(table):
        images[number], masks[number] = np.asarray(row["image"]), np.asarray(row["annotation"])
    return torch.from_numpy(images).permute(0, 3, 1, 2), torch.from_numpy(masks)


def make_model(d_model: int, depth: int, d_state: int, channels: int) -> VimUperNet:
    """Create a Vim as in train_fashion_mnist.py, without its class token, and a UperNet head."""
    quarters = tuple(depth * part // 4 for part in range(1, 5))
    config = VimUperNetConfig(
        d_model=d_model, depth=depth, d_inner=2 * d_model, d_state=d_state, dt_rank=-(-d_model // 16), d_conv=4,
        in_chans=3, num_classes=len(CLASS_NAMES), patch_size=(PATCH, PATCH), stride=PATCH, image_size=(SIDE, SIDE),
        head_channels=channels, out_layers=quarters, level="residual",
    )  # fmt: skip
    model = VimUperNet(config)
    nn.init.trunc_normal_(model.backbone.pos_embed, std=0.02)
    initialise(model, lambda m: (m.dt_proj, m.dt_proj_b), [block.mixer for block in model.blocks])
    return model


def load_backbone(model: VimUperNet, vim: VisionMamba) -> None:
    """Copy the weights of a Vim to the backbone, without its class token and that token's position embedding."""
    state = {f"backbone.{k}": v for k, v in vim.state_dict().items() if not k.startswith(("head.", "cls_token"))}
    patches = [position for position in range(vim.length) if position != vim.protected]
    state["backbone.pos_embed"] = state["backbone.pos_embed"][:, patches]
    if unknown := model.load_state_dict(state, strict=False).unexpected_keys:
        raise SystemExit(f"--backbone: the segmentation model has no {unknown[0]}")


def augmented(images: Tensor, masks: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Flip half of the images and shift each by up to a patch; pixels from outside are ignored (255)."""
    mirrored = torch.rand(len(images), generator=generator) < 0.5
    images, masks = images.clone(), masks.clone()
    images[mirrored], masks[mirrored] = images[mirrored].flip(3), masks[mirrored].flip(2)
    down, right = torch.randint(2 * PATCH + 1, (2,), generator=generator).tolist()
    images = F.pad(images, [PATCH] * 4, mode="reflect")[..., down : down + SIDE, right : right + SIDE]
    masks = F.pad(masks, [PATCH] * 4, value=255)[..., down : down + SIDE, right : right + SIDE]
    return images, masks


@torch.inference_mode()
def measure(model: VimUperNet, images: Tensor, masks: Tensor) -> dict[str, float]:
    """Evaluate a model on test images."""
    meter = SEGMENTATION.meter(len(CLASS_NAMES))
    for x, y in zip(images.split(50), masks.split(50), strict=True):
        meter.add(model(normalise(x)), y, None)
    result = meter.result()
    return {"miou": result.miou, "pixel_accuracy": result.pixel_accuracy}


def parse() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser)
    parser.add_argument("training", type=Path, help="a .parquet file of make_clutter.py")
    parser.add_argument("test", type=Path, help="a .parquet file of make_clutter.py")
    parser.add_argument("--depth", type=int, default=8)
    parser.add_argument(
        "--backbone", type=Path, help="checkpoint of a Vim to initialise a new run from; determines the sizes"
    )
    parser.add_argument("--channels", type=int, default=32, help="width of the head")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--start", type=Path, help="checkpoint of the same sizes to initialise a new run from")
    args = parser.parse_args()
    if args.backbone is not None:
        sizes = ssmcompress.load(args.backbone, architecture="vim").config
        args.d_model, args.depth, args.d_state = sizes.d_model, sizes.depth, sizes.d_state
    return args


def main() -> None:
    args = parse()
    images, masks = load(args.training)
    test = load(args.test)
    torch.manual_seed(args.seed)
    model = make_model(args.d_model, args.depth, args.d_state, args.channels).train()
    if args.backbone is not None:
        load_backbone(model, ssmcompress.load(args.backbone, architecture="vim"))
    if args.start is not None:
        model.load_state_dict(torch.load(args.start, weights_only=True)["state_dict"])
    text = CONFIG.format(
        side=SIDE, patch=PATCH, d_model=args.d_model, depth=args.depth, channels=args.channels,
        out_indices=[layer - 1 for layer in model.config.out_layers], classes=len(CLASS_NAMES),
    )  # fmt: skip

    def loss(chosen: Tensor, epoch: int, generator: torch.Generator) -> Tensor:
        batch, targets = augmented(images[chosen], masks[chosen], generator)
        return SEGMENTATION.loss(model(normalise(batch)), targets).mean()

    fixed = ("d_model", "depth", "d_state", "channels", "batch_size", "epochs", "optimizer", "seed")
    training = Training(
        model,
        len(images),
        loss,
        measure=lambda: measure(model, *test),
        weights="state_dict",
        settings={name: getattr(args, name) for name in fixed},
        fixed=fixed,
        describe=lambda step: {"meta": {"config": text, "CLASSES": CLASS_NAMES, "iter": step}},
    )
    train(training, args)


if __name__ == "__main__":
    main()
