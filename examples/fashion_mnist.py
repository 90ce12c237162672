"""Read Fashion-MNIST from its four original files, as in Debian's package dataset-fashion-mnist."""

import gzip
from pathlib import Path

import numpy as np

FOLDER = Path("/usr/share/datasets/fashion-mnist")
CLASSES = ["T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"]
# Mean and standard deviation of the training pixels, scaled to 0..1.
MEAN, STD = 0.2860, 0.3530


def read(folder: Path, split: str) -> tuple[np.ndarray, np.ndarray]:
    """Return (images (n, 28, 28), labels (n,)), both uint8, of "train" or "t10k".

    Raises:
        SystemExit: the files do not exist.
    """
    if not (folder / f"{split}-images-idx3-ubyte.gz").exists():
        raise SystemExit(f"{folder} has no Fashion-MNIST: install Debian's dataset-fashion-mnist, or pass --idx")
    with gzip.open(folder / f"{split}-images-idx3-ubyte.gz") as file:
        pixels = np.frombuffer(file.read(), np.uint8, offset=16).reshape(-1, 28, 28)
    with gzip.open(folder / f"{split}-labels-idx1-ubyte.gz") as file:
        return pixels, np.frombuffer(file.read(), np.uint8, offset=8)
