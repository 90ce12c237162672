"""Altered copies of images to fit on: mirrored at random and shifted by a few pixels, as prepared tensors."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

# The largest shift is one in SHIFT of the side: 2 pixels of 28, 16 of 224.
SHIFT = 14


def make_copies(images: Tensor, generator: torch.Generator) -> Tensor:
    """Return a copy of each image (images, C, H, W), mirrored with a probability of a half and shifted.

    The border is repeated where the shift leaves nothing. The draws come from `generator`, a CPU generator.
    """
    height, width = images.shape[-2:]
    down, right = height // SHIFT, width // SHIFT
    padded = F.pad(images.float(), (right, right, down, down), mode="replicate").to(images.dtype)
    copies = []
    for image in padded:
        mirrored = bool(torch.rand((), generator=generator) < 0.5)
        top = int(torch.randint(2 * down + 1, (), generator=generator))
        left = int(torch.randint(2 * right + 1, (), generator=generator))
        copy = image[:, top : top + height, left : left + width]
        copies.append(copy.flip(-1) if mirrored else copy)
    return torch.stack(copies)
