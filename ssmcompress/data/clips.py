"""Clips: frames of a video and crops of them, prepared as one tensor; and views, the clips and crops of one video."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .frames import sample_frames
from .transforms import Preprocessing
from .video import Video


class Views(NamedTuple):
    """The parts of a video whose predictions are averaged: the number of clips, and of crops per clip."""

    clips: int = 1
    crops: int = 1

    @classmethod
    def from_json(cls, value: Any) -> Views | None:
        """Return the views in a JSON object of `_asdict`; None for anything else, as in a report about images."""
        counts = [value.get(name) for name in cls._fields] if isinstance(value, dict) else [None]
        return cls(*counts) if all(type(count) is int and count > 0 for count in counts) else None

    @property
    def count(self) -> int:
        """The number of views."""
        return self.clips * self.crops

    def describe(self) -> str:
        """Return the views as text: "1 clip x centre crop", "4 clips x 3 crops"."""
        crops = "centre crop" if self.crops == 1 else f"{self.crops} crops"
        return f"{self.clips} clip{'s' * (self.clips > 1)} x {crops}"

    def offsets(self) -> list[tuple[int, int]]:
        """Return the offset of each clip within the parts of `sample_frames`: clip c of C is at c / (C + 1)."""
        return [(clip, self.clips + 1) for clip in range(1, self.clips + 1)]


class VideoTransform:
    """A function from a `Video` to one clip, (channels, frames, height, width) float32.

    Each frame is prepared like an image (`Preprocessing.transform`). The video is split into as many equal parts as
    there are frames, and the centre of each part is taken.

    With `views`, the result is (views, channels, frames, height, width), with the crops of the first clip first. Clip c
    of C has the frames at c / (C + 1) of the parts. Crops have the size of the model's input and are evenly spaced
    along the longer side of the resized frame, from end to end; a single one is centred. In VideoMamba's protocol for
    Kinetics-400, 4 x 3, a crop covers the whole shorter side (`--test_num_segment 4 --test_num_crop 3`; there, frames
    are spaced by (length - 1) / frames and rounded twice).

    Args:
        preprocessing: how frames are prepared. size: (height, width). frames: number of frames of a clip.
    """

    def __init__(self, preprocessing: Preprocessing, size: tuple[int, int], frames: int, views: Views | None = None):
        self.frames, self.views = frames, views
        self.prepare = preprocessing.transform_crops(size, 1 if views is None else views.crops)

    def __call__(self, video: Video) -> Tensor:
        offsets = (Views() if self.views is None else self.views).offsets()
        pictures = video.pick(lambda length: [i for o in offsets for i in sample_frames(length, self.frames, o)])
        different = {id(picture): picture for picture in pictures}  # repeated frames are prepared once
        prepared = {key: self.prepare(picture) for key, picture in different.items()}
        chosen = torch.stack([prepared[id(picture)] for picture in pictures])  # (frames of all clips, crops, ...)
        clips = chosen.unflatten(0, (len(offsets), self.frames)).permute(0, 2, 3, 1, 4, 5).flatten(0, 1)
        return clips.contiguous() if self.views is not None else clips[0].contiguous()

    def remark(self, video: Any) -> str | None:
        """Return a note about a video whose frames repeat, which is shown once."""
        if len(video) >= self.frames:
            return None
        return f"some videos have fewer than the {self.frames} frames that the model takes: their frames are repeated"
