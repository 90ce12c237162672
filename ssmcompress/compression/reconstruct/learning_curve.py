"""Estimate from the refits of a reconstruction whether its number of images was sufficient.

Each refit is measured on held-out images after fitting on all of the others and on half of them (`Fit.half`). The error
of several refits is the geometric mean of their errors, each relative to the power of its target, so that no single map
dominates: with 64 images, one map of 17 raised the arithmetic mean for half of the images by 78 %, the geometric one by
29 %.

Doubling the images is expected to change the error by the same factor as the second half did. In eleven doublings of 32
to 1,024 images (two plans of the bundled model) this prediction was -10 % on average, as was the change on other
images. The 1/n law of least squares would have predicted -5 %: with more images the ridges also become smaller.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from ...models.records import Fit

# With fewer images there is no estimate: a fifth of them is held out, and two images cannot choose a ridge.
LEAST_IMAGES = 16
# There are too few images if half of them achieve less than this share of the gain of all images. On two plans of the
# bundled model, half achieved 3 to 74 % in five of six cases with 32 to 128 images, where twice as many images raised
# the agreement with the dense model by 2 to 9 %, and 78 to 93 % in all others, where they raised it by 1 to 4 %.
LEAST_GAIN = 0.75


@dataclass(frozen=True)
class LearningCurve:
    """The error of refits on held-out images as a function of the number of images for fitting.

    Attributes:
        refits: the number of refits. before, half, after: geometric mean of their errors with the old weights, with
            weights fitted on half of the images, and with the new weights, relative to the targets' power.
    """

    refits: int
    before: float
    half: float
    after: float

    @property
    def twice(self) -> float:
        """The expected error with twice the images; at most `after`."""
        return self.after * min(1.0, self.after / self.half)

    @property
    def half_gain(self) -> float:
        """The share of the gain of all images that half of them achieve."""
        return (self.before - self.half) / (self.before - self.after)

    @property
    def is_starved(self) -> bool:
        """Whether the images are too few."""
        return self.half_gain < LEAST_GAIN


def learning_curve(fits: Iterable[Fit], images: int) -> LearningCurve | None:
    """Return the learning curve of a reconstruction on `images`; None if there are too few, or nothing was measured."""
    errors = [(fit.before, fit.half, fit.after) for fit in fits if fit.half is not None and fit.half > 0 < fit.after]
    if images < LEAST_IMAGES or not errors:
        return None
    means = (math.exp(sum(map(math.log, each)) / len(errors)) for each in zip(*errors, strict=True))
    return LearningCurve(len(errors), *means)
