"""Options of the training and evaluation images, and how they are read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from ..inputs import check_inputs
from ..options import HARDWARE, IMAGES, option
from ..values import Precision, parse_views

if TYPE_CHECKING:
    from ...jobs.requests import DataOptions, MeasureOptions


Data = Annotated[
    str | None,
    option(
        IMAGES,
        help="Folder of images, videos or class folders, parquet, arrow, tar or npz file, folder:split or hub:split.",
    ),
]


@dataclass(frozen=True)
class Batching:
    """How images are read."""

    batch_size: Annotated[int, option(HARDWARE, min=1, help="Batch size; does not change results.")] = 64
    workers: Annotated[
        int, option(HARDWARE, min=0, help="Processes that decode images; 0: decode in the main process.")
    ] = 0
    reduce_zero_label: Annotated[
        bool | None,
        option(
            IMAGES,
            "--reduce-zero-label/--no-reduce-zero-label",
            help="In masks, 0 means no class and classes start at 1. Default: as the data says, else off.",
        ),
    ] = None


@dataclass(frozen=True)
class Measure(Batching):
    """How models are run for evaluation."""

    dtype: Annotated[
        Precision,
        option(HARDWARE, help="Precision of measurements; with bfloat16, reports also have the figures in float32."),
    ] = Precision.float32
    views: Annotated[
        str | None,
        option(
            IMAGES,
            metavar="CLIPSxCROPS",
            help="Videos: average over CLIPSxCROPS views, such as 4x3. Default: 1x1, one clip and its centre crop.",
        ),
    ] = None

    def options(self, latency: bool = True) -> MeasureOptions:
        """Return the options as the library takes them."""
        from ...jobs.requests import MeasureOptions

        return MeasureOptions(self.dtype.value, latency, parse_views(self.views))


@dataclass(frozen=True)
class TrainingImages:
    """Images to train and evaluate on."""

    data: Data = None
    eval_data: Annotated[
        str | None, option(IMAGES, help="Images to measure on. Default: held-out images of --data.")
    ] = None
    seed: Annotated[
        int,
        option(IMAGES, min=0, max=2**31 - 1, help="Seed for sampling images and for every other random choice."),
    ] = 0

    def check(self, model: str) -> None:
        """Check the names of these images and of their model before anything is loaded.

        Raises:
            InputError: a name cannot be valid.
        """
        check_inputs(model, {"--data": self.data, "--eval-data": self.eval_data})

    def options(self, batching: Batching) -> DataOptions:
        """Return the options as the library takes them."""
        from ...jobs.requests import SAMPLES, DataOptions

        samples = getattr(self, "samples", SAMPLES)
        reading = (batching.batch_size, batching.workers, batching.reduce_zero_label)
        return DataOptions(self.data, self.eval_data, samples, self.seed, *reading)


@dataclass(frozen=True)
class Images(TrainingImages):
    """Images for calibration, training and evaluation."""

    samples: Annotated[
        int, option(IMAGES, min=1, help="Number of images to calibrate and reconstruct on, at most half of --data.")
    ] = 1024
