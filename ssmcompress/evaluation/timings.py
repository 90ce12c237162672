"""What repeated timings say: medians, quartiles, whether a difference is more than noise, and how busy the machine was.

Models that are compared are timed in the same rounds, each once a round. A disturbance then hits both, so the times of
a round are compared with each other: a two-sided sign test over the rounds says whether one model is faster. Of the 9
rounds of a report, 8 must have the same sign. Fewer than `LEAST_ROUNDS` cannot say it, whatever the times are. How much
faster it is has an interval by the same test, `speed_up_interval`.
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
# What `own_load` misses of this process: it may fill all cores, and then the average exceeds their number a bit.
OWN_LOAD = 0.5
LOAD_SECONDS = 60.0  # time constant of the system's load average
_start = os.times()


@dataclass(frozen=True)
class Timings:
    """Times of several models that were run in the same rounds.

    Attributes:
        rounds: by name, milliseconds of each round.
        load: other processes that wanted a core, averaged over the minute before; None where the system does not say.
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
        """Return whether the rounds do not tell which of two models is faster; None: there are too few to say so."""
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
    6 to 8 rounds, from the second lowest to the second highest for 9 to 11, and so on. It is widened to hold the ratio
    of the medians, which is the figure that is shown.

    In a simulation of noise that the models of a round share and of noise of their own (lognormal; also with drift,
    with spikes, and with more noise in one of them; 2,000 runs or more of each), it held the true speed-up in 98 % of
    the runs of 7 rounds and in 96 % of those of 9. A bootstrap of the median of the ratios did so in 87 to 90 % and in
    91 to 95 %. A bootstrap of the ratio of the medians did so in 93 to 95 % and in 95 to 98 %, but is wider if noise is
    shared: 1.3 times at 9 rounds, 1.5 times at 15. All are too narrow if a model's own noise lasts from one round into
    the next: with a correlation of 0.5, this one held it in 90 % at 7 rounds and in 83 % at 9. In 405 measurements of
    one model next to itself (batch 1, 12 ms, on two shared cores with a load of 3 to 5), this one held 1 in 98 % at 7
    rounds, 95 % at 9 and 95 % at 15.
    """
    ratios = sorted(_ratios(slow, fast))
    if len(ratios) < LEAST_ROUNDS:
        return None
    # Outside of the interval on either side: the most ratios that are still too few for the test.
    outside = next(k for k in range(len(ratios)) if 2 * at_most(k + 1, len(ratios), 0.5) >= SIGNIFICANT)
    ratio = statistics.median(slow) / statistics.median(fast)
    return [min(ratios[outside], ratio), max(ratios[-1 - outside], ratio)]


def _ratios(slow: Sequence[float], fast: Sequence[float]) -> list[float]:
    """Return how many times faster the second model was in each round."""
    return [a / b for a, b in zip(slow, fast, strict=True)]


def quartiles_overlap(one: Sequence[float], other: Sequence[float]) -> bool:
    """Return whether two ranges, each from a lower to an upper quartile, overlap, where rounds are not known."""
    return one[0] <= other[1] and other[0] <= one[1]


def own_load() -> float:
    """Return what this process and those that it has ended contribute to the load average of the last minute.

    It is taken from their CPU time, as if that had been spread evenly since this module was imported.
    """
    now = os.times()
    seconds = now.elapsed - _start.elapsed
    if seconds <= 0:
        return 0.0
    return (sum(now[:4]) - sum(_start[:4])) / seconds * -math.expm1(-seconds / LOAD_SECONDS)


def system_load() -> float | None:
    """Return the load average of the last minute without `own_load`, or None on a system that has none."""
    try:
        return round(max(0.0, os.getloadavg()[0] - own_load()), 2)
    except (OSError, AttributeError):  # Windows has no such function
        return None


def describe_load(load: float | None) -> dict[str, Any]:
    """Return `load` and the number of `cores` of the machine, as a JSON value."""
    return {"load": load, "cores": os.cpu_count()}


def is_busy(load: float | None, cores: int | None) -> bool:
    """Return whether more processes wanted a core than there are cores."""
    return load is not None and cores is not None and load > cores + OWN_LOAD
