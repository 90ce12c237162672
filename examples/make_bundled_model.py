"""Make the model folder that comes with the package: a small trained Vim and 2,000 labelled test images.

    apt-get install dataset-fashion-mnist        # Debian; or any copy of the four original files
    python examples/train_fashion_mnist.py vim_fashion_mnist.pth
    python examples/make_bundled_model.py vim_fashion_mnist.pth ssmcompress/assets/vim-fashion-mnist

Fashion-MNIST is by Zalando SE, MIT licence; the folder's LICENSE carries its notice.
"""

import argparse
import gzip
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
from datasets import ClassLabel, Dataset, Features, Image
from PIL import Image as Pictures

import ssmcompress

CLASSES = ["T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"]


def read_idx(file: Path, header: int) -> np.ndarray:
    """The bytes of an idx file after its header (16 bytes for images, 8 for labels)."""
    return np.frombuffer(gzip.decompress(file.read_bytes()), np.uint8, offset=header)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("output", type=Path)
    parser.add_argument("--idx", type=Path, default=Path("/usr/share/datasets/fashion-mnist"))
    parser.add_argument("--split", default="t10k", help="t10k or train")
    parser.add_argument("--images", type=int, default=2000, help="the first so many")
    parser.add_argument("--data-only", action="store_true", help="write only the images, to the file OUTPUT")
    args = parser.parse_args()

    pixels = read_idx(args.idx / f"{args.split}-images-idx3-ubyte.gz", 16).reshape(-1, 28, 28)[: args.images]
    labels = read_idx(args.idx / f"{args.split}-labels-idx1-ubyte.gz", 8)[: args.images]
    table = Dataset.from_dict(
        {"image": [Pictures.fromarray(p) for p in pixels], "label": labels.tolist()},
        features=Features({"image": Image(), "label": ClassLabel(names=CLASSES)}),
    )
    if args.data_only:
        table.to_parquet(args.output)
        return

    model = ssmcompress.load(args.checkpoint)
    model.preprocessing = model.preprocessing.changed(mean=(0.2860,), std=(0.3530,), crop_pct=1.0)
    model.source = replace(model.source, data="images.parquet")
    ssmcompress.save(model, args.output, force=True)
    table.to_parquet(args.output / "images.parquet")
    print(json.dumps({p.name: p.stat().st_size for p in args.output.iterdir()}))


if __name__ == "__main__":
    main()
