"""Options of the model, and how its file is read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ...errors import InputError
from ..inputs import check_model
from ..options import MODEL_FILE, option
from ..terminal import is_quiet, progress_bars
from ..values import parse_numbers, parse_share, parse_size
from .hardware import Processor

if TYPE_CHECKING:
    from ...models.base import TokenModel
    from ...models.checkpoint import LoadOptions


def model_argument(metavar: str, text: str) -> Any:
    """Return a command-line argument that takes a model."""
    return typer.Argument(metavar=metavar, help=text)


Checkpoint = Annotated[
    str,
    model_argument(
        "CKPT",
        "Dense checkpoint (.pth, .pt, .safetensors), a folder that prune wrote (to drop more tokens), or a Hub name: "
        "owner/name[@rev][:file].",
    ),
]


Model = Annotated[str, model_argument("MODEL", "Checkpoint file, a folder that prune wrote, or a Hub name.")]


MaybeModel = Annotated[
    str | None, model_argument("MODEL", "Folder, file or Hub name. Default: the newest under compressed/.")
]


Dense = Annotated[
    str | None,
    option(
        MODEL_FILE,
        help="Dense model to compare with. Default: the one that MODEL was made from.",
    ),
]


@dataclass(frozen=True)
class Reading:
    """How a model file is read."""

    image_size: Annotated[
        str | None, option(MODEL_FILE, help="Side of the images in pixels, or HEIGHTxWIDTH. Default: as trained.")
    ] = None
    stride: Annotated[
        int | None, option(MODEL_FILE, min=1, help="Step between patches in pixels. Default: the patch size.")
    ] = None
    weights: Annotated[str, option(MODEL_FILE, help="Checkpoint entry to load: model, model_ema or another name.")] = (
        "model"
    )
    architecture: Annotated[
        str | None,
        option(
            MODEL_FILE,
            help="vim, video_mamba, plain_mamba, vmamba or vit, if the weights and the file's metadata do not say.",
        ),
    ] = None
    task: Annotated[
        str | None,
        option(
            MODEL_FILE, help="classification or segmentation: refuse a file for another task. Default: accept either."
        ),
    ] = None
    level: Annotated[
        str | None,
        option(
            MODEL_FILE,
            help="Features that the head of a Vim segmentation model reads, if its file does not say so: hidden, "
            "residual, residual_norm or rope.",
        ),
    ] = None
    num_heads: Annotated[
        int | None,
        option(
            MODEL_FILE, min=1, help="Attention heads of a ViT. Default: as its file says, else its width divided by 64."
        ),
    ] = None
    frames: Annotated[
        int | None, option(MODEL_FILE, min=1, help="Models for videos: frames per video. Default: as trained.")
    ] = None
    unsafe_load: Annotated[
        bool, option(MODEL_FILE, "--unsafe-load", help="Unpickle a file that could run code; only if trusted.")
    ] = False

    def open(self, checkpoint: str, hardware: Processor = Processor()) -> TokenModel:
        """Load the model from a file or folder, on the given hardware.

        Raises:
            InputError: the file cannot be read as a model.
        """
        check_model(checkpoint)
        from ...models.checkpoint import load

        options, device = vars(self.options()), hardware.start()
        with progress_bars(is_quiet()):
            return load(checkpoint, device=device, **options)

    def options(self) -> LoadOptions:
        """Return the options as the library takes them."""
        from ...models.checkpoint import LoadOptions

        size = parse_size(self.image_size)
        names = ("architecture", "task", "level", "num_heads", "frames")
        own = {name: getattr(self, name) for name in names}
        return LoadOptions(size, self.stride, self.weights, self.unsafe_load, **own)

    @property
    def folder_labels(self) -> dict[str, Any]:
        """Return the parts of the default folder name that describe these options: label -> text or None."""
        weights = self.weights if self.weights != "model" else None
        own = {"level-": self.level, "heads": self.num_heads, "frames": self.frames}
        return {"weights-": weights, "image": self.image_size, "stride": self.stride, **own}


@dataclass(frozen=True)
class Load(Reading):
    """How a model file is read, and how images are prepared for it."""

    mean: Annotated[
        str | None, option(MODEL_FILE, help="Normalisation mean, one value or one per channel (0.485,0.456,0.406).")
    ] = None
    std: Annotated[
        str | None, option(MODEL_FILE, help="Normalisation standard deviation, one value or one per channel.")
    ] = None
    crop_pct: Annotated[
        str | None, option(MODEL_FILE, help="Share of the resized side that the centre crop keeps, 0.875 or 87.5%.")
    ] = None
    interpolation: Annotated[str | None, option(MODEL_FILE, help="bicubic, bilinear, nearest or lanczos.")] = None
    short_side: Annotated[
        int | None,
        option(
            MODEL_FILE,
            min=0,
            help="Segmentation: resize images to this shorter side; 0: no resizing. Default: as trained.",
        ),
    ] = None

    def open(self, checkpoint: str, hardware: Processor = Processor()) -> TokenModel:
        """Load the model from a file or folder, on the given hardware, with the preprocessing set by the options.

        Raises:
            InputError: the file cannot be read as a model, or the preprocessing is invalid.
        """
        mean, std = parse_numbers(self.mean, "--mean"), parse_numbers(self.std, "--std")
        crop_pct = parse_share(self.crop_pct, "--crop-pct")
        if crop_pct is not None and not 0 < crop_pct <= 1:
            raise InputError(f"--crop-pct {self.crop_pct}: expected a share above 0, at most 100%")
        model = super().open(checkpoint, hardware)
        changes = {"mean": mean, "std": std, "crop_pct": crop_pct, "interpolation": self.interpolation}
        changes["short_side"] = self.short_side
        model.preprocessing = model.preprocessing.changed(**changes)
        return model
