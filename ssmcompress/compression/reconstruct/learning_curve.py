"""What the refits of a reconstruction say about its number of images: too few, or enough.

A refit is measured on held-out images, fitted on all of the others and on half of them (`Fit.half`). The error of
several refits is the geometric mean of their errors, each a share of the power of its target, so that no single map
decides: with 64 images, one map of 17 made the arithmetic mean of half of the images 78 % higher, the geometric one 29.

Twice the images are expected to change the error by the factor that the second half has brought. In eleven doublings
of 32 to 1,024 images (two plans of the bundled model) this was -10 % on average, as was the change on other images. The
law 1/n of least squares would have been -5 %: with more images the ridges become smaller, too.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from ...models.records import Fit

# Fewer images than these say nothing: a fifth of them is held out, and two choose no ridge.
LEAST_IMAGES = 16
# Of the gain that all images bring, half of them must bring this share, or there are too few. On two plans of the
# bundled model, half brought 3 to 74 % in five of six cases with 32 to 128 images, where twice as many made 2 to 9 %
# more of the images agree with the dense model, and 78 to 93 % in all others, where they made 1 to 4 %.
LEAST_GAIN = 0.75


@dataclass(frozen=True)
class LearningCurve:
    """The error of refits on held-out images, by the images that they are fitted on.

    Attributes:
        refits: the number of refits. before, half, after: geometric mean of their errors with the old weights, with
            those of half of the images, and with the new ones; shares of the targets' power.
    """

    refits: int
    before: float
    half: float
    after: float

    @property
    def twice(self) -> float:
        """The error that is expected with twice the images; never more than `after`."""
        return self.after * min(1.0, self.after / self.half)

    @property
    def half_gain(self) -> float:
        """The share of the gain of all images that half of them bring."""
        return (self.before - self.half) / (self.before - self.after)

    @property
    def is_starved(self) -> bool:
        """Whether the images are too few."""
        return self.half_gain < LEAST_GAIN


def learning_curve(fits: Iterable[Fit], images: int) -> LearningCurve | None:
    """Return what the refits of a reconstruction say about its `images`; None: too few of them, or nothing measured."""
    errors = [(fit.before, fit.half, fit.after) for fit in fits if fit.half is not None and fit.half > 0 < fit.after]
    if images < LEAST_IMAGES or not errors:
        return None
    means = (math.exp(sum(map(math.log, each)) / len(errors)) for each in zip(*errors, strict=True))
    return LearningCurve(len(errors), *means)
