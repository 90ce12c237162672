"""Functions of sixteen lanes that the CPU's kernels are built of: accuracy, and values at the ends."""

import numpy as np
import pytest
import torch
from numba import njit, uint64

from ssmcompress.ops import selective_scan
from ssmcompress.ops.cpu import arguments, avx512, lane_functions, vector

AVX512 = pytest.mark.skipif(not avx512.HAS_AVX512, reason="needs AVX-512")
EXP2 = ["exp2_portable", pytest.param("exp2_avx512", marks=AVX512)]
RECIPROCAL = ["reciprocal_portable", pytest.param("reciprocal_avx512", marks=AVX512)]


def apply(name: str, x: np.ndarray) -> np.ndarray:
    """Apply a function of `lane_functions` to an array (numbers,), sixteen at a time."""
    function, wide = getattr(lane_functions, name), uint64(vector.LANES)

    @njit(error_model="numpy")
    def run(x, y):
        for i in range(uint64(0), uint64(x.shape[0]), wide):
            vector.store(y, (i,), wide, function(vector.load(x, (i,), wide)))

    padded = np.zeros(-(-len(x) // vector.LANES) * vector.LANES, np.float32)
    padded[: len(x)] = x
    y = np.empty_like(padded)
    run(padded, y)
    return y[: len(x)]


def error(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.max(np.abs(found - expected) / np.abs(expected)))


@pytest.mark.parametrize("name", EXP2)
def test_exp2(name):
    x = np.linspace(-125, 126, 100_001).astype(np.float32)
    assert error(apply(name, x), np.exp2(x.astype(np.float64))) < 3e-7
    whole = np.arange(-120, 121, dtype=np.float32)
    assert np.array_equal(apply(name, whole), np.exp2(whole))
    # A state that hardly decays must not shrink by rounding, at each of thousands of tokens.
    assert np.array_equal(apply(name, np.float32([0, -0.0, 1e-30, -1e-30, -1e-9])), [1] * 5)
    below, above, nan = apply(name, np.float32([-np.inf, np.inf, np.nan]))
    assert below < 1e-37
    assert above > 1e38
    assert np.isnan(nan)


@pytest.mark.parametrize("name", RECIPROCAL)
def test_reciprocal(name):
    x = np.exp2(np.linspace(-100, 100, 100_001)).astype(np.float32)
    x[::2] *= -1
    assert error(apply(name, x), 1 / x.astype(np.float64)) < 2e-7
    assert np.isnan(apply(name, np.float32([np.nan]))[0])


def test_sigmoid_and_softplus():
    x = np.linspace(-60, 60, 100_001).astype(np.float32)
    wide = x.astype(np.float64)
    assert error(apply("sigmoid", x), 1 / (1 + np.exp(-wide))) < 4e-6
    assert error(apply("softplus", x), np.log1p(np.exp(wide))) < 4e-6
    ends = np.float32([np.inf, -np.inf, 300, -300, np.nan])
    high, low, large, small, nan = apply("sigmoid", ends)
    assert (high, large) == (1, 1)
    assert 0 <= low < 1e-29
    assert 0 <= small < 1e-29
    assert np.isnan(nan)
    high, low, large, small, nan = apply("softplus", ends)
    assert (high, large) == (np.inf, 300)
    assert (low, small) == (0, 0)
    assert np.isnan(nan)


@pytest.mark.skipif(not arguments._HAS_MXCSR, reason="needs a processor of the x86-64 family")
def test_denormal_numbers_are_zero_in_kernels_alone():
    @njit
    def multiply(a, b, product):
        before = arguments.flush_denormals()
        product[1] = a[0] * b[0]
        arguments.restore(before)
        product[0] = a[0] * b[0]

    product, small = np.empty(2, np.float32), np.full(1, 1e-20, np.float32)
    multiply(small, small, product)
    assert product[1] == 0
    assert 0 < product[0] < 2e-40
    x = torch.full((1, 3, 16), 1e-39)
    assert selective_scan(x, x, -torch.ones(16, 2), x[..., :2], x[..., :2], backend="cpu").abs().max() == 0
    assert (torch.full((64,), 1e-20) * 1e-20).min() > 0


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"ENABLE_AVX": 0}, False),
        ({"CPU_NAME": "generic", "CPU_FEATURES": ""}, False),
        ({"CPU_NAME": "nehalem"}, False),
        ({"CPU_FEATURES": "+avx512f,+avx512dq"}, True),
        ({"CPU_FEATURES": "+avx512f,-avx512dq"}, False),
    ],
)
def test_the_settings_of_numba_decide_what_is_compiled(settings, expected, monkeypatch):
    for name, value in settings.items():
        monkeypatch.setattr(avx512.config, name, value)
    assert avx512._compiles_for_avx512() is expected
