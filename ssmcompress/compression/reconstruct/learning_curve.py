"""What the refits of a reconstruction say about its number of images: too few, or enough.

A refit is measured on held-out images, fitted on all of the others and on half of them (`Fit.half`). The error of
several refits is the geometric mean of their errors, each a share of the power of its target: these differ by orders of
magnitude between maps, and the mean of their ratios is not that of the worst map. A model learns more from more images
by a power law (Hestness et al., arXiv 1712.00409), so twice the images are expected to change the error by the factor
that the second half has brought. The law 1/n of least squares, by which the second half of what it brought is still to
come, was too low: on two plans of the bundled model see docs/figures.md.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from ...models.records import Fit

# Fewer images than these say nothing: a fifth of them is held out, and two choose no ridge.
LEAST_IMAGES = 16
# Of the gain that all images bring, half of them must bring this share, or there are too few.
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
