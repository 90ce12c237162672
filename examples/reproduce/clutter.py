"""The small-scale setup: cluttered images, and the models that the training scripts train on them."""

from __future__ import annotations

import functools
import re
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from make_clutter import FOLDER, Clutter
from small_models import ARCHITECTURES

from ssmcompress.progress import line

from .settings import MADE, read, write
from .subjects import Subject

EXAMPLES = Path(__file__).parents[1]
WHOLE = "vim"  # used in all tables and for the best row; the others only in tables 1 and 3, at one share of the FLOPs
AS_IT_IS = {"crop_pct": 1.0}  # images already have the model's input size; the checkpoints do not record this


class Making(NamedTuple):
    """A file in the cache, and the example script and arguments that create it; file names are in braces."""

    file: str
    script: str
    arguments: str


IMAGES = {
    "train80.parquet": "classification train {} --images 60000 --side 80",
    "test80.parquet": "classification test {} --images 2000 --side 80",
    "train80-masks.npz": "masks train {} --images 60000 --side 80",
    "train.parquet": "classification train {} --images 60000",
    "test.parquet": "classification test {} --images 5000",
    "train-masks.npz": "masks train {} --images 60000",
    "scenes-train.parquet": "segmentation train {} --images 16000",
    "scenes-test.parquet": "segmentation test {} --images 1000",
}
# Training runs of the classifiers: image size and options. Each run starts from the weights of the previous one.
TRAININGS = {
    "plain_mamba": {
        "plain_mamba80.pth": ("80", "--epochs 3 --lr 3e-3"),
        "plain_mamba-first.pth": ("", "--epochs 2 --lr 1.5e-3"),
        "plain_mamba.pth": ("", "--epochs 3 --lr 1.5e-3 --seed 10"),
    },
    "vim": {
        "vim80.pth": ("80", "--epochs 6 --lr 4e-3 --patch-loss 1 --masks {train80-masks.npz}"),
        "vim-first.pth": (
            "",
            "--epochs 3 --lr 2e-3 --patch-loss 1 --masks {train-masks.npz} --teacher {plain_mamba-first.pth}",
        ),
        "vim.pth": (
            "",
            "--epochs 6 --lr 2e-3 --seed 10 --patch-loss 1 --masks {train-masks.npz} --teacher {plain_mamba.pth}",
        ),
    },
    "deit": {
        "deit80.pth": (
            "80",
            "--epochs 8 --lr 2e-3 --patch-loss 1 --masks {train80-masks.npz} --teacher {plain_mamba80.pth}",
        ),
        "deit.pth": ("", "--epochs 4 --lr 1e-3 --patch-loss 1 --masks {train-masks.npz} --teacher {plain_mamba.pth}"),
    },
}
ORDER = ("vim", "plain_mamba", "deit")  # of the tables


def list_makings() -> dict[str, Making]:
    """Return the commands that create the files, by file name, in order."""
    makings = [Making(file, "make_clutter", text.replace("{}", f"{{{file}}}")) for file, text in IMAGES.items()]
    for name, runs in TRAININGS.items():
        start = ""
        for file, (side, options) in runs.items():
            images = f"{{train{side}.parquet}} {{test{side}.parquet}}"
            arguments = f"{{{file}}} {images} --architecture {name}{start} --optimizer muon {options}"
            makings.append(Making(file, "train_clutter", arguments))
            start = f" --start {{{file}}}"
    options = "{segmenter.pth} {scenes-train.parquet} {scenes-test.parquet} --backbone {vim.pth} --epochs 5"
    makings.append(Making("segmenter.pth", "train_segmenter", options))
    return {making.file: making for making in makings}


def find_needed(makings: Mapping[str, Making], file: str) -> set[str]:
    """Return the names of all files required to create a file, including the file itself."""
    others = set(re.findall(r"\{(.+?)\}", makings[file].arguments)) - {file}
    return {file}.union(*(find_needed(makings, other) for other in others))


def make_all(cache: Path, only: Sequence[str], idx: Path = FOLDER) -> None:
    """Create the missing files that some models need; an interrupted training run is resumed.

    Args:
        only: names of models. idx: folder with the files of Fashion-MNIST.

    Raises:
        SystemExit: a file cannot be created; its script has printed the reason.
    """
    finished = cache / MADE
    makings = list_makings()
    needed = set().union(*(find_needed(makings, f"{name}.pth") for name in only))
    for file, making in makings.items():
        if file in read(finished) or file not in needed:
            continue
        command = [f"{making.script}.py", *(fill(cache, part) for part in making.arguments.split())]
        if making.script == "make_clutter":
            command += ["--idx", str(idx)]
        line(f"making {file}: {' '.join(command)}")
        begin = time.monotonic()
        try:
            subprocess.run([sys.executable, str(EXAMPLES / command[0]), *command[1:]], check=True)
        except subprocess.CalledProcessError as error:
            raise SystemExit(f"{file} was not created: {command[0]} ended with exit code {error.returncode}") from error
        shown = re.sub(r"[{}]", "", making.arguments)
        value = {"command": f"python examples/{making.script}.py {shown}", "seconds": time.monotonic() - begin}
        if file.endswith(".pth"):  # training may have taken several runs
            saved = torch.load(cache / file, weights_only=True)
            value |= {"seconds": saved["seconds"], "peak_mb": saved["peak_mb"], "history": saved["history"]}
        write(finished, read(finished) | {file: value})


def fill(cache: Path, part: str) -> str:
    """Replace a file name in braces by its path in the cache."""
    return str(cache / part[1:-1]) if part.startswith("{") else part


def list_subjects(cache: Path, idx: Path = FOLDER) -> list[Subject]:
    """Return the models of the small-scale setup; `idx` is the folder with the files of Fashion-MNIST."""

    @functools.cache
    def test_images() -> Clutter:  # reads the photographs, so only when first used
        return Clutter("test", idx, seed=0)

    def draw(number: int) -> np.ndarray:
        return test_images().draw_object(number)[2]

    images = str(cache / "train.parquet"), str(cache / "test.parquet")
    subjects = [
        Subject(
            name,
            cache / f"{name}.pth",
            *images,
            {"architecture": ARCHITECTURES[name].name},
            AS_IT_IS,
            name == WHOLE,
            draw,
        )
        for name in ORDER
    ]
    scenes = str(cache / "scenes-train.parquet"), str(cache / "scenes-test.parquet")
    return [*subjects, Subject("segmenter", cache / "segmenter.pth", *scenes)]
