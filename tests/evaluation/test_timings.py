"""Repeated timings: quartiles, paired differences, and a busy machine."""

import os

import pytest
import torch

from ssmcompress.cli.tables import show_benchmark
from ssmcompress.evaluation import timings
from ssmcompress.evaluation.latency import benchmark, settings, time_models
from ssmcompress.evaluation.timings import (
    Timings,
    is_busy,
    quartiles,
    quartiles_overlap,
    system_load,
    within_noise,
)
from ssmcompress.jobs.report_text import _overlap_note
from ssmcompress.tasks.binomial import at_least, at_most, sign_test


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


def test_too_few_rounds_say_nothing():
    """Five rounds of one sign have a probability of 6 %, so not even a tenfold difference would be one."""
    assert within_noise([100.0] * 5, [10.0] * 5) is None
    assert Timings({"a": [100.0], "b": [10.0]}).compare("a", "b")["within_noise"] is None
    assert within_noise([100.0] * 6, [10.0] * 6) is False


def test_the_benchmark_marks_a_difference_that_it_cannot_judge(vim, capsys):
    rows = benchmark({"a": vim, "b": vim}, batch_sizes=(1,), repeats=2)
    assert [row["within_noise"] for row in rows] == [False, None]
    show_benchmark({"models": rows, "settings": settings(torch.device("cpu"), torch.float32, 2)}, False)
    shown = capsys.readouterr().out
    assert "?: fewer than 6 --repeats do not tell" in shown
    assert "~" not in shown.split("faster: than")[0]
    assert f"?{rows[1]['times_faster']:.2f}x" in shown


def test_ranges_that_touch_overlap():
    assert quartiles_overlap((1, 2), (2, 3))
    assert quartiles_overlap((1, 9), (3, 4))
    assert not quartiles_overlap((1, 2), (2.5, 3))
    assert not quartiles_overlap((2.5, 3), (1, 2))


@pytest.mark.parametrize(("low", "high", "said"), [(2.1, 3.0, ""), (1.9, 3.0, "; the difference is within the noise")])
def test_rows_of_an_onnx_file_are_apart_if_their_quartiles_are(low, high, said):
    rows = [{"ms": 1.5, "ms_low": 1.0, "ms_high": 2.0}, {"ms": 2.5, "ms_low": low, "ms_high": high}]
    assert _overlap_note(rows) == said
    assert _overlap_note(rows[::-1]) == said
    assert _overlap_note([{"ms": 1.0}, {"ms": 2.0}]) == ""


def test_timings_have_the_load_from_before_they_were_taken(vim, images, monkeypatch):
    monkeypatch.setattr("ssmcompress.evaluation.latency.system_load", lambda: 1.25)
    assert time_models({"a": vim}, images[:1]).load == 1.25


def test_medians_and_quartiles():
    values = Timings({"a": [4.0, 1.0, 2.0, 3.0, 100.0]})
    assert (values.median("a"), values.quartiles("a")) == (3.0, [2.0, 4.0])
    assert quartiles([7.0]) == [7.0, 7.0]


def test_the_load_of_a_machine(monkeypatch):
    monkeypatch.setattr(os, "getloadavg", lambda: (3.256, 1.0, 1.0), raising=False)
    monkeypatch.setattr(timings, "own_load", lambda: 0.0)
    assert system_load() == 3.26
    assert timings.describe_load(3.26) == {"load": 3.26, "cores": os.cpu_count()}
    monkeypatch.setattr(timings, "own_load", lambda: 2.0)
    assert system_load() == 1.26
    monkeypatch.setattr(timings, "own_load", lambda: 4.0)
    assert system_load() == 0
    assert is_busy(3.26, 2)
    assert not is_busy(2.2, 2)  # what this process does alone
    assert not is_busy(None, 2)
    monkeypatch.delattr(os, "getloadavg")
    assert system_load() is None


@pytest.mark.parametrize(("seconds", "load"), [(0, 0), (6, 0.19), (60, 1.26), (3600, 2.0)])
def test_the_load_of_this_command_is_the_cpu_time_that_it_took(monkeypatch, seconds, load):
    """Two cores, one of them in processes that have ended, as those that decode images."""
    start = os.times_result((5.0, 1.0, 0.0, 0.0, 1000.0))
    now = os.times_result((5.0 + 0.9 * seconds, 1.0 + 0.1 * seconds, seconds, 0.0, 1000.0 + seconds))
    monkeypatch.setattr(timings, "_start", start)
    monkeypatch.setattr(os, "times", lambda: now)
    assert timings.own_load() == pytest.approx(load, abs=0.005)
