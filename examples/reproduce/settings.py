"""Settings shared by all rows, and the location of their files."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ssmcompress.files import write_file

MADE = "made.json"  # in the cache: the commands that created images and models


@dataclass(frozen=True)
class Settings:
    """How rows are measured.

    Attributes:
        cache: folder of everything that is kept. seeds: each selects different calibration images; the models of the
            first one are fine-tuned and timed.
        share: of the dense model's FLOPs, in tables 1, 2 and 4. further: other shares, for table 3.
        samples: number of images for calibration, search and refitting.
        tune_images, tune_epochs: of fine-tuning. best_images: number of images for the best row; None: all.
        reason_images: number of images that the explanations are measured on.
        command: the command line of this run.
    """

    cache: Path
    seeds: tuple[int, ...] = (0, 1, 2)
    share: float = 0.6
    further: tuple[float, ...] = (0.75, 0.5)
    samples: int = 1024
    tune_images: int = 2000
    tune_epochs: int = 2
    best_images: int | None = None
    reason_images: int = 1000
    device: str = "cpu"
    batch_size: int = 64
    workers: int = 0
    command: str = ""

    @property
    def shares(self) -> list[float]:
        """All shares of the FLOPs, the largest first."""
        return sorted({self.share, *self.further}, reverse=True)

    def rows_of(self, name: str, seed: int) -> Path:
        """Return the folder with the rows of a model without training."""
        return self.cache / "rows" / f"{name}-seed{seed}"

    def file_of(self, kind: str, name: str) -> Path:
        """Return the file with a model's figures of a kind: the name of a part, or "cost"."""
        return self.cache / kind / f"{name}.json"


def read(file: Path) -> dict[str, Any]:
    """Return the JSON object in a file; an empty one if the file does not exist."""
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}


def write(file: Path, value: dict[str, Any]) -> None:
    """Write a JSON object, overwriting the file."""
    file.parent.mkdir(parents=True, exist_ok=True)
    write_file(file, json.dumps(value, indent=1).encode() + b"\n", force=True)
