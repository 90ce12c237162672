"""Statistics of repeated timings: medians, quartiles, significance of a difference, and how busy the machine was.

Models to compare are timed in the same rounds, once per round. A disturbance then affects both, so times within a round
are compared: a two-sided sign test over the rounds decides whether one model is faster. Of the 9 rounds of a report, 8
must have the same sign. Fewer than `LEAST_ROUNDS` can never be significant. The same test gives an interval for the
speed-up, `speed_up_interval`.
"""

from __future__ import annotations

import math
import os
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..tasks.binomial import at_most, sign_test

SIGNIFICANT, LEAST_ROUNDS = 0.05, 6
# Part of this process's load that `own_load` misses: it may fill all cores, and the average then slightly exceeds their
# number.
OWN_LOAD = 0.5
LOAD_SECONDS = 60.0  # time constant of the system's load average
_start = os.times()


@dataclass(frozen=True)
class Timings:
    """Times of several models that were run in the same rounds.

    Attributes:
        rounds: by name, milliseconds of each round.
        load: other processes that wanted a core, averaged over the previous minute; None if unknown to the system.
    """

    rounds: Mapping[str, Sequence[float]]
    load: float | None = None

    def median(self, name: str) -> float:
        """Return the median milliseconds of a model."""
        return statistics.median(self.rounds[name])

    def quartiles(self, name: str) -> list[float]:
        """Return the lower and the upper quartile of a model's milliseconds."""
        return quartiles(self.rounds[name])

    def compare(self, slow: str, fast: str) -> dict[str, Any]:
        """Return how many times faster one model is than another, as a JSON value.

        Returns:
            `speed_up`, the ratio of the medians; `speed_up_quartiles` of the ratios by round; `speed_up_interval`, the
            95 % interval, or None; and `within_noise`.
        """
        return {
            "speed_up": self.median(slow) / self.median(fast),
            "speed_up_quartiles": quartiles(_ratios(self.rounds[slow], self.rounds[fast])),
            "speed_up_interval": speed_up_interval(self.rounds[slow], self.rounds[fast]),
            "within_noise": self.within_noise(slow, fast),
        }

    def within_noise(self, one: str, other: str) -> bool | None:
        """Return whether the rounds do not show which of two models is faster; None: there are too few rounds."""
        return within_noise(self.rounds[one], self.rounds[other])


def quartiles(values: Sequence[float]) -> list[float]:
    """Return the lower and the upper quartile."""
    if len(values) < 2:
        return [values[0], values[0]]
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return [low, high]


def within_noise(one: Sequence[float], other: Sequence[float]) -> bool | None:
    """Return whether a sign test over paired times finds no difference at 5 %; None: too few pairs for the test."""
    pairs = list(zip(one, other, strict=True))
    if len(pairs) < LEAST_ROUNDS:
        return None
    return sign_test(sum(a < b for a, b in pairs), sum(a > b for a, b in pairs)) >= SIGNIFICANT


def speed_up_interval(slow: Sequence[float], fast: Sequence[float]) -> list[float] | None:
    """Return the 95 % interval of how many times faster one model is than another; None: there are too few rounds.

    It is the interval of the sign test for the median of the ratios by round: from the lowest to the highest ratio for
    6 to 8 rounds, from the second lowest to the second highest for 9 to 11, and so on. It is widened to include the
    ratio of the medians, which is the figure that is shown.

    In a simulation of noise shared by the models of a round and of noise of their own (lognormal; also with drift,
    with spikes, and with more noise in one of them; 2,000 runs or more of each), it contained the true speed-up in 98 %
    of the runs of 7 rounds and in 96 % of those of 9. A bootstrap of the median of the ratios did so in 87 to 90 % and
    in 91 to 95 %. A bootstrap of the ratio of the medians did so in 93 to 95 % and in 95 to 98 %, but is wider if noise
    is shared: 1.3 times at 9 rounds, 1.5 times at 15. All are too narrow if a model's own noise persists from one round
    to the next: with a correlation of 0.5, this one contained it in 90 % at 7 rounds and in 83 % at 9. In 405
    measurements of one model against itself (batch 1, 12 ms, on two shared cores with a load of 3 to 5), this one
    contained 1 in 98 % at 7 rounds, 95 % at 9 and 95 % at 15.
    """
    ratios = sorted(_ratios(slow, fast))
    if len(ratios) < LEAST_ROUNDS:
        return None
    # Number of ratios outside the interval on either side: the most that are not significant in the test.
    outside = next(k for k in range(len(ratios)) if 2 * at_most(k + 1, len(ratios), 0.5) >= SIGNIFICANT)
    ratio = statistics.median(slow) / statistics.median(fast)
    return [min(ratios[outside], ratio), max(ratios[-1 - outside], ratio)]


def _ratios(slow: Sequence[float], fast: Sequence[float]) -> list[float]:
    """Return how many times faster the second model was in each round."""
    return [a / b for a, b in zip(slow, fast, strict=True)]


def quartiles_overlap(one: Sequence[float], other: Sequence[float]) -> bool:
    """Return whether two interquartile ranges overlap, for timings without known rounds."""
    return one[0] <= other[1] and other[0] <= one[1]


def own_load() -> float:
    """Return how much this process and its ended child processes contribute to the load average of the last minute.

    It is computed from their CPU time, assuming that it was spread evenly since this module was imported.
    """
    now = os.times()
    seconds = now.elapsed - _start.elapsed
    if seconds <= 0:
        return 0.0
    return (sum(now[:4]) - sum(_start[:4])) / seconds * -math.expm1(-seconds / LOAD_SECONDS)


def system_load() -> float | None:
    """Return the load average of the last minute minus `own_load`, or None if the system does not provide one."""
    try:
        return round(max(0.0, os.getloadavg()[0] - own_load()), 2)
    except (OSError, AttributeError):  # Windows has no such function
        return None


def describe_load(load: float | None) -> dict[str, Any]:
    """Return `load` and the number of `cores` of the machine, as a JSON value."""
    return {"load": load, "cores": os.cpu_count()}


def is_busy(load: float | None, cores: int | None) -> bool:
    """Return whether more processes compete for a core than there are cores."""
    return load is not None and cores is not None and load > cores + OWN_LOAD
