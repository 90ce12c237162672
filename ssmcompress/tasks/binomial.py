"""Tail probabilities of the binomial distribution, for significance tests."""

from __future__ import annotations

import math


def at_most(successes: int, trials: int, probability: float) -> float:
    """Return the probability of at most `successes` in `trials` independent trials.

    Args:
        probability: of a success in one trial, above 0 and below 1.
    """
    log_yes, log_no = math.log(probability), math.log1p(-probability)
    terms = (
        math.lgamma(trials + 1) - math.lgamma(k + 1) - math.lgamma(trials - k + 1) + k * log_yes + (trials - k) * log_no
        for k in range(min(successes, trials) + 1)
    )
    return min(1.0, math.fsum(map(math.exp, terms)))


def at_least(successes: int, trials: int, probability: float) -> float:
    """Return the probability of at least `successes` in `trials` independent trials."""
    return at_most(trials - successes, trials, 1 - probability)


def sign_test(first: int, second: int) -> float:
    """Return the two-sided p-value of a sign test in which `first` pairs have one sign and `second` the other."""
    return min(1.0, 2 * at_most(min(first, second), first + second, 0.5))
