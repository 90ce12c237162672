"""Which frames of a video are taken: evenly spaced, or drawn at random from equal parts."""

from __future__ import annotations

import torch


def sample_frames(length: int, frames: int, offset: tuple[int, int] = (1, 2)) -> list[int]:
    """Return the numbers of `frames` frames evenly spaced over a video of `length` frames.

    The video is cut into `frames` equal parts, and of part t the frame at an offset a/b of the part is taken:
    floor((t + a/b) length / frames). The default is the centre of each part. A video with fewer frames repeats some.

    Args:
        offset: (a, b), with 0 <= a < b.
    """
    a, b = offset
    return [(t * b + a) * length // (frames * b) for t in range(frames)]


def draw_frames(length: int, frames: int) -> list[int]:
    """Return the numbers of frames as `sample_frames`, each at a random place in its part, by torch's generator."""
    return [min(length - 1, int((t + share) * length / frames)) for t, share in enumerate(torch.rand(frames).tolist())]
