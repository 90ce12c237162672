"""Selection of video frames: evenly spaced, or drawn at random from equal parts."""

from __future__ import annotations

import torch


def sample_frames(length: int, frames: int, offset: tuple[int, int] = (1, 2)) -> list[int]:
    """Return the indices of `frames` frames evenly spaced over a video of `length` frames.

    The video is divided into `frames` equal parts, and the frame at offset a/b of each part t is taken:
    floor((t + a/b) length / frames). The default is the centre of each part. Frames of shorter videos are repeated.

    Args:
        offset: (a, b), with 0 <= a < b.
    """
    a, b = offset
    return [(t * b + a) * length // (frames * b) for t in range(frames)]


def draw_frames(length: int, frames: int) -> list[int]:
    """Return frame indices as `sample_frames` does, but at a random position in each part, by torch's generator."""
    return [min(length - 1, int((t + share) * length / frames)) for t, share in enumerate(torch.rand(frames).tolist())]
