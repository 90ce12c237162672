"""Temporary files with the values of image chunks that a layer-by-layer pass needs between layers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from ...errors import SsmCompressError, raise_if_out_of_memory


class ChunkFiles:
    """Stores values of image chunks, by kind and number, as files in a folder.

    Args:
        folder: an empty folder. device: the device to which values are read.
    """

    def __init__(self, folder: Path, device: torch.device):
        self.folder, self.device = folder, device

    def put(self, kind: str, chunk: int, value: Any) -> None:
        """Write a value of a chunk; SsmCompressError if there is not enough space."""
        try:
            torch.save(value, self.folder / f"{kind}{chunk}")
        except (OSError, RuntimeError) as error:
            raise_if_out_of_memory(error)
            raise SsmCompressError(
                f"cannot keep features in {self.folder}: {error}; use fewer `samples`, or set TMPDIR to a folder with "
                f"more room"
            ) from error

    def get(self, kind: str, chunk: int) -> Any:
        """Read a value of a chunk."""
        return torch.load(self.folder / f"{kind}{chunk}", map_location=self.device, weights_only=True)
