"""Repeated timings: quartiles, paired differences, and a busy machine."""

import os

import pytest

from ssmcompress.evaluation import timings
from ssmcompress.evaluation.binomial import at_least, at_most, sign_test
from ssmcompress.evaluation.timings import Timings, is_busy, quartiles, system_load, within_noise


def test_tails_of_the_binomial_distribution():
    assert at_most(1, 3, 0.5) == pytest.approx(0.5)
    assert at_least(2, 4, 0.25) == pytest.approx(67 / 256)
    assert at_least(0, 7, 0.3) == pytest.approx(1)
    assert at_most(50_000, 50_000, 0.001) == pytest.approx(1)
    assert sign_test(9, 0) == pytest.approx(2 / 512)
    assert sign_test(4, 4) == 1


@pytest.mark.parametrize(("faster", "noise"), [(9, False), (8, False), (7, True), (4, True), (1, False), (0, False)])
def test_a_difference_is_one_if_nearly_all_rounds_agree(faster, noise):
    dense = [10.0] * 9
    pruned = [9.0] * faster + [11.0] * (9 - faster)
    assert within_noise(dense, pruned) is noise


def test_rounds_are_compared_in_pairs_so_that_drift_does_not_hide_a_difference():
    """Each round is slower than the one before by far more than the models differ."""
    dense = [10.0 * 1.3**i for i in range(9)]
    found = Timings({"dense": dense, "pruned": [0.98 * ms for ms in dense]}).compare("dense", "pruned")
    assert not found["within_noise"]
    assert found["speed_up"] == pytest.approx(1 / 0.98)
    assert found["speed_up_quartiles"] == pytest.approx([1 / 0.98] * 2)


def test_a_model_compared_with_itself_is_within_the_noise():
    times = [10.0, 10.5, 9.9, 10.1, 10.0, 10.2, 9.8, 10.0, 11.0]
    assert Timings({"a": times, "b": times}).within_noise("a", "b")
    assert Timings({"a": times, "b": times[1:] + times[:1]}).within_noise("a", "b")
    assert within_noise([2.0] * 5, [1.0] * 5)  # five rounds cannot tell


def test_medians_and_quartiles():
    values = Timings({"a": [4.0, 1.0, 2.0, 3.0, 100.0]})
    assert (values.median("a"), values.quartiles("a")) == (3.0, [2.0, 4.0])
    assert quartiles([7.0]) == [7.0, 7.0]


def test_the_load_of_a_machine(monkeypatch):
    monkeypatch.setattr(os, "getloadavg", lambda: (3.256, 1.0, 1.0), raising=False)
    assert system_load() == 3.26
    assert timings.describe_load(3.26) == {"load": 3.26, "cores": os.cpu_count()}
    assert is_busy(3.26, 2)
    assert not is_busy(2.2, 2)  # what this process does alone
    assert not is_busy(None, 2)
    monkeypatch.delattr(os, "getloadavg")
    assert system_load() is None
