"""VideoMamba (OpenGVLab): the layers of a Vim with the class token in front, for images and for videos.

arXiv 2403.06977; module and parameter names are those of the published checkpoints. Both scans of a layer are summed,
whereas a Vim averages them. A checkpoint for images has exactly the same names and shapes as one of a Vim.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import InputError
from ..progress import note
from .base import Expected
from .families import StateDict
from .features import NamePatterns
from .precision import widen
from .reading import Shapes
from .statements import Statements
from .vim_block import VimConfig
from .vim_classifier import PROJECTION, VIDEO_MAMBA_M, VIM_OPTIONS, VimClassifier, has_vim_layers, is_of_video

# Maximum number of frames of a video, as the temporal embedding is allocated; published models have at most 64.
MOST_FRAMES = 4096


@dataclass(frozen=True)
class VideoMambaConfig(VimConfig):
    """Sizes of a VideoMamba; all except `stride` and `image_size` can be inferred from its weights.

    Attributes:
        frames: the number of frames of a video; None: an image model.
        tubelet: the number of frames of a patch in a video model.
    """

    residual_scale: ClassVar[float] = 1.0  # the sum of both scans

    frames: int | None = None
    tubelet: int = 1

    @property
    def frame_grid(self) -> tuple[int, int]:
        return super().grid

    @property
    def grid(self) -> tuple[int, int]:
        """The size of the patch grid, (rows, columns), with later frames below earlier ones."""
        rows, columns = self.frame_grid
        return rows * self.times, columns

    @property
    def times(self) -> int:
        """The number of patches along the time axis."""
        return 1 if self.frames is None else self.frames // self.tubelet

    @property
    def window(self) -> tuple[int, ...]:
        """The sides of a patch, (height, width) or, in a video, (frames, height, width)."""
        return self.patch_size if self.frames is None else (self.tubelet, *self.patch_size)

    @property
    def steps(self) -> tuple[int, ...]:
        return super().steps if self.frames is None else (self.tubelet, *super().steps)


class VideoMamba(VimClassifier):
    """VideoMamba of any size. `forward`: images (B, C, H, W) or videos (B, C, T, H, W) -> logits (B, classes)."""

    architecture, title = "video_mamba", "VideoMamba"
    config_class = VideoMambaConfig
    no_weight_decay = NamePatterns([*VimClassifier.no_weight_decay, "temporal_pos_embedding"])
    # From OpenGVLab's videomamba.py, and the options of Vim's code that give the same model.
    expected_options: ClassVar[Mapping[str, Expected]] = {
        **VIM_OPTIONS,
        "bimamba": Expected((True,), "bidirectional blocks"),
        "use_middle_cls_token": Expected((False,), "the class token in front of the sequence"),
        "if_divide_out": Expected((False,), "the sum of both scans not divided by two"),
    }
    foreign_keys: ClassVar[Mapping[str, str]] = {
        "rope.": "rotary position embedding",
        "clip_": "a model of the pretraining",
        "pos_embed_cls": "a Mamba-Reg",
    }

    def __init__(self, config: VideoMambaConfig):
        super().__init__(config)
        if config.frames is not None:
            self.temporal_pos_embedding = nn.Parameter(torch.zeros(1, config.times, config.d_model))

    @staticmethod
    def place_class_token(patches: int) -> int:
        return 0

    @property
    def frames(self) -> int | None:
        return self.config.frames

    def place_embedding(self) -> Tensor:
        if self.frames is None:
            return self.pos_embed
        token, patches = self.pos_embed[:, :1], self.pos_embed[:, 1:]
        places = patches[:, None] + self.temporal_pos_embedding[:, :, None]  # (1, times, patches of a frame, d_model)
        return torch.cat([token, places.flatten(1, 2)], dim=1)

    def resize_frames(self, frames: int) -> None:
        """Change the number of frames of a video, in place; the temporal embedding is interpolated linearly.

        Raises:
            InputError: the frames do not fill whole patches. OptionError: inputs are images.
        """
        if self.frames is None:
            super().resize_frames(frames)
        tubelet = self.config.tubelet
        if not isinstance(frames, int) or not tubelet <= frames <= MOST_FRAMES or frames % tubelet:
            raise InputError(f"`frames` {frames!r}: expected a multiple of {tubelet}, at most {MOST_FRAMES}")
        self.config, table = replace(self.config, frames=frames), self.temporal_pos_embedding.detach()
        if table.shape[1] != self.config.times:
            resized = F.interpolate(widen(table).transpose(1, 2), self.config.times, mode="linear").transpose(1, 2)
            self.temporal_pos_embedding = nn.Parameter(resized.to(table.dtype).contiguous())

    @classmethod
    def check_identity(cls, config: VideoMambaConfig, said: Statements) -> None:
        """Show a note if image weights, which could belong to a Vim, are taken for a VideoMamba without a statement."""
        if said.family is None and config.frames is None:
            note(
                f"taken for a VideoMamba: its {config.depth} layers of width {config.d_model} are the size of "
                f"VideoMamba-M, and of no published Vim (see `architecture`)"
            )

    @classmethod
    def recognises(cls, state: StateDict) -> bool:
        return has_vim_layers(state)

    @classmethod
    def has_own_size(cls, state: StateDict) -> bool:
        depth = Shapes(state, cls.title).count("layers.")
        return (*state[PROJECTION].shape[:1], depth) == VIDEO_MAMBA_M

    @classmethod
    def read_patches(cls, shape: Shapes) -> dict[str, Any]:
        if not is_of_video(shape.state):
            return super().read_patches(shape)
        d_model, in_chans, tubelet, *patch_size = shape(PROJECTION, 5)
        frames = shape("temporal_pos_embedding", 3)[1] * tubelet
        sizes = {"d_model": d_model, "in_chans": in_chans, "patch_size": tuple(patch_size)}
        return {**sizes, "frames": frames, "tubelet": tubelet}
