"""The inputs of a model: their shape, preprocessing, and the images that a name stands for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..data.clips import VideoTransform, Views
from ..data.dense import DensePreprocessing
from ..data.find import find_images
from ..data.images import Images
from ..data.transforms import Preprocessing
from ..errors import InputError, OptionError
from ..progress import note
from ..tasks import SEGMENTATION
from .precision import check_images, find_weight

# Bytes of activations of a chunk inside a layer: 20 images for Vim-tiny at 224 px, 5 for Vim-base.
CHUNK_BYTES = 1 << 26
# Maximum number of clips, and of crops, of a video.
MOST_VIEWS = 64


class InputModel(nn.Module):
    """The part of `TokenModel` that prepares its inputs."""

    def check(self, images: Tensor) -> None:
        """Raise an InputError unless the images have the shape, dtype and device that the model expects."""
        check_images(images, self.image_shape, find_weight(self.classifier))

    def resize_frames(self, frames: int) -> None:
        """Change the number of frames of an input, in place; OptionError if inputs are images."""
        raise OptionError(f"`frames`: inputs of this {self.architecture} are images, not videos")

    @property
    def frames(self) -> int | None:
        """The number of frames of an input, or None if inputs are images."""
        return None

    @property
    def input_shape(self) -> tuple[int, ...]:
        """The shape of an input of `config.image_size`: (channels, height, width), with frames second for a video."""
        frames = () if self.frames is None else (self.frames,)
        return (self.config.in_chans, *frames, *self.config.image_size)

    @property
    def image_shape(self) -> tuple[int | None, ...]:
        """The accepted input shape, in the form of `input_shape`; None stands for a side of any length."""
        return self.input_shape

    def default_preprocessing(self) -> Preprocessing | DensePreprocessing:
        """Return the preprocessing that is used if none is given."""
        return Preprocessing.default(self.config.in_chans, self.config.image_size, video=self.frames is not None)

    def read_preprocessing(self, value: Mapping[str, Any]) -> Preprocessing | DensePreprocessing:
        """Read the preprocessing from a configuration; InputError for invalid values."""
        return Preprocessing.from_dict(value, self.config.in_chans)

    def transform(self, views: tuple[int, int] | None = None) -> Callable[[Any], Tensor]:
        """Return a function from a PIL image, in any mode, to the model's input (channels, height, width) float32.

        For a model that takes videos, it is a function from a `Video` to (channels, frames, height, width).

        Args:
            views: numbers of clips and crops of each video, which are then the leading axes of the result (`Views`).

        Raises:
            InputError: views for a model that takes images.
        """
        return self.transform_with(self.preprocessing, views)

    def transform_with(self, preprocessing: Preprocessing, views: tuple[int, int] | None = None) -> Any:
        """Return the transform of `transform` with a different preprocessing."""
        checked = self.check_views(views)
        if self.frames is None:
            return preprocessing.transform(self.config.image_size)
        return VideoTransform(preprocessing, self.config.image_size, self.frames, checked)

    def check_views(self, views: tuple[int, int] | None) -> Views | None:
        """Return the views (clips, crops) of a video; InputError for an image model, or for invalid views."""
        if views is None:
            return None
        if self.frames is None:
            raise InputError("`views` are clips and crops of videos, and the model takes images")
        if min(views) < 1 or max(views) > MOST_VIEWS:
            raise InputError(f"`views` {views[0]}x{views[1]}: expected clips and crops, 1 to {MOST_VIEWS} of each")
        return Views(*views)

    def fixed_transform(self) -> Callable[[Any], Tensor]:
        """Return the transform to the fixed size `config.image_size` that is used for fitting and searching models."""
        return self.transform()

    def find_images(self, data: str | Path | None = None, *, reduce_zero_label: bool | None = None) -> Images:
        """Return the images to use with the model: `data`, else those named in its folder, else sample photographs.

        Args:
            reduce_zero_label: for segmentation, see `ssmcompress.open_images`.

        Raises:
            InputError: as `ssmcompress.data.open_images`.
        """
        recorded = self.source.data if self.source is not None else None
        options = {"task": self.task, "reduce_zero_label": self.label_rule(reduce_zero_label)}
        options["frames"] = self.frames
        return find_images(data, self.config.image_size, self.config.num_classes, recorded, **options)

    def label_rule(self, asked: bool | None = None) -> bool | None:
        """Return whether masks number the classes from 1: `asked`, which is stored, else the stored value."""
        if asked is None and self.reduce_zero_label:
            note("masks count classes from 1, as recorded in the model (`reduce_zero_label`)")
        if asked is not None and self.task is SEGMENTATION:
            self.reduce_zero_label = asked
        return self.reduce_zero_label if asked is None else asked

    def chunk_size(self) -> int:
        """Return the number of images in a fixed-size chunk, which depends only on the model."""
        return max(1, min(32, CHUNK_BYTES // self.activation_bytes()))
