"""exp2, reciprocal, sigmoid and softplus of sixteen lanes."""

from __future__ import annotations

import numpy as np
from numba import njit

from .avx512 import HAS_AVX512, estimated_reciprocal, fraction, scaled_by_floor
from .vector import add_exponent, maximum, minimum, minus_magnitude


def _fitted(function, low: float, high: float, degree: int) -> tuple[np.float32, ...]:
    """Return the coefficients, lowest first, of the near-minimax polynomial of `function` on [low, high]."""
    nodes = np.cos((2 * np.arange(1000) + 1) * np.pi / 2000) * (high - low) / 2 + (high + low) / 2
    fit = np.polynomial.Chebyshev.fit(nodes, function(nodes), degree, domain=[low, high])
    return tuple(np.float32(c) for c in fit.convert(kind=np.polynomial.Polynomial).coef)


def _interpolated_exp2() -> tuple[np.float32, ...]:
    """Return the coefficients of q, lowest first, where 1 + f q(f) interpolates 2^f on [0, 1], at 0 and 1 too.

    The nodes are the zeros of the Chebyshev polynomial of degree 6, stretched so that the outermost nodes are the ends
    of the interval. The float32 sum of the coefficients, in the order of Horner's rule, is 1.
    """
    nodes = (1 + np.cos((2 * np.arange(6) + 1) * np.pi / 12) / np.cos(np.pi / 12)) / 2
    _, _, *others = np.linalg.solve(np.vander(nodes, increasing=True), np.exp2(nodes)).astype(np.float32)
    rest = np.float32(0)
    for coefficient in reversed(others):
        rest = coefficient + rest
    return np.float32(1) - rest, *others


LOG2_E = np.float32(np.log2(np.e))
# Adding it to a small number leaves that number, rounded, in the low bits.
_ROUNDER = np.float32(1.5 * 2**23)
# 2^f = 1 + f q(f), so that 2^0 is exactly 1 and a state without decay does not shrink by rounding.
_Q0, _Q1, _Q2, _Q3, _Q4 = _fitted(lambda f: np.expm1(f * np.log(2)) / f, -0.5, 0.5, 4)
# The same for [0, 1], with q(1) = 1: the fraction of a small negative exponent is rounded to 1, and 2^1 2^-1 must be 1.
_F0, _F1, _F2, _F3, _F4 = _interpolated_exp2()
# log(1 + x) = 2 artanh(s), s = x / (2 + x): this is 2 artanh(s) / s in s^2, for x in [0, 1].
_S0, _S1, _S2, _S3, _S4 = _fitted(lambda s2: 2 * np.arctanh(np.sqrt(s2)) / np.sqrt(s2), 0.0, 1 / 9, 4)


@njit
def exp2_portable(v):
    """Return 2^v, accurate to 3e-7 relative, clamped to 2^-125 and 2^127; NaN for the NaN that arithmetic gives."""
    v = minimum(maximum(v, -125.0), 127.0)
    rounded = v + _ROUNDER
    f = v - (rounded - _ROUNDER)
    p = 1.0 + f * (_Q0 + f * (_Q1 + f * (_Q2 + f * (_Q3 + f * _Q4))))
    return add_exponent(p, rounded)


@njit
def exp2_avx512(v):
    """Return 2^v, accurate to 2e-7 relative, in 7 instructions instead of 12: AVX-512 reduces and scales in one each.

    There is no clamping: results below the smallest normal number are denormal or 0, those above the largest are inf.
    """
    f = fraction(v)
    p = 1.0 + f * (_F0 + f * (_F1 + f * (_F2 + f * (_F3 + f * _F4))))
    return scaled_by_floor(p, v)


@njit
def reciprocal_portable(v):
    """Return 1 / v."""
    return 1.0 / v


@njit
def reciprocal_avx512(v):
    """Return 1 / v for normal v with a normal reciprocal, accurate to 2e-7 relative: an estimate of 14 bits, refined.

    A division of sixteen lanes takes 16 cycles, this takes 4.
    """
    estimate = estimated_reciprocal(v)
    return estimate + estimate * (1.0 - v * estimate)


exp2 = exp2_avx512 if HAS_AVX512 else exp2_portable
reciprocal = reciprocal_avx512 if HAS_AVX512 else reciprocal_portable


@njit
def sigmoid(v):
    """Return 1 / (1 + e^-v), accurate to 4e-6 relative on [-60, 60]."""
    return reciprocal(1.0 + exp2(minimum(v * -LOG2_E, 100.0)))


@njit
def softplus(v):
    """Return log(1 + e^v) to 4e-6 relative on [-60, 60], mostly the rounding of v log2(e); v itself from 20 on."""
    x = exp2(minus_magnitude(v) * LOG2_E)
    s = x * reciprocal(2.0 + x)
    s2 = s * s
    return maximum(v, 0.0) + s * (_S0 + s2 * (_S1 + s2 * (_S2 + s2 * (_S3 + s2 * _S4))))
