"""Create the model folder bundled with the package: a small trained Vim and 2,000 labelled test images.

    apt-get install dataset-fashion-mnist        # Debian; or any copy of the four original files
    python examples/train_fashion_mnist.py vim_fashion_mnist.pth
    python examples/make_bundled_model.py vim_fashion_mnist.pth ssmcompress/assets/vim-fashion-mnist

Fashion-MNIST is by Zalando SE, MIT licence; the folder's LICENSE carries its notice.
"""

import argparse
import json
from dataclasses import replace
from pathlib import Path

from datasets import ClassLabel, Dataset, Features, Image
from fashion_mnist import CLASSES, FOLDER, MEAN, STD, read
from PIL import Image as Pictures

import ssmcompress


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("output", type=Path)
    parser.add_argument("--idx", type=Path, default=FOLDER)
    parser.add_argument("--split", default="t10k", help="t10k or train")
    parser.add_argument("--images", type=int, default=2000, help="number of images, taken from the start")
    parser.add_argument("--data-only", action="store_true", help="write only the images, to OUTPUT as a file")
    args = parser.parse_args()

    pixels, labels = (values[: args.images] for values in read(args.idx, args.split))
    table = Dataset.from_dict(
        {"image": [Pictures.fromarray(p) for p in pixels], "label": labels.tolist()},
        features=Features({"image": Image(), "label": ClassLabel(names=CLASSES)}),
    )
    if args.data_only:
        table.to_parquet(args.output)
        return

    model = ssmcompress.load(args.checkpoint)
    model.preprocessing = model.preprocessing.changed(mean=(MEAN,), std=(STD,), crop_pct=1.0)
    model.source = replace(model.source, data="images.parquet")
    ssmcompress.save(model, args.output, force=True)
    table.to_parquet(args.output / "images.parquet")
    print(json.dumps({p.name: p.stat().st_size for p in args.output.iterdir()}))


if __name__ == "__main__":
    main()
