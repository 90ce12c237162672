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
    speed_up_interval,
    system_load,
    within_noise,
)
from ssmcompress.jobs.benchmark import list_doubts
from ssmcompress.jobs.report_text import _latency_notes, _overlap_note, list_load_notes
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
    """Each round is slower than the previous one by far more than the difference of the models."""
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


@pytest.mark.parametrize(
    ("rounds", "low", "high"), [(6, 1, 6), (7, 1, 7), (8, 1, 8), (9, 2, 8), (11, 2, 10), (12, 3, 10), (31, 10, 22)]
)
def test_the_interval_is_that_of_the_sign_test(rounds, low, high):
    """The ranks of the table of the sign test, of ratios that are their own ranks."""
    ratios = [float(i + 1) for i in range(rounds)]
    assert speed_up_interval(ratios[::-1], [1.0] * rounds) == [low, high]


def test_too_few_rounds_have_no_interval():
    assert speed_up_interval([2.0] * 5, [1.0] * 5) is None
    assert speed_up_interval([2.0] * 6, [1.0] * 6) == [2.0, 2.0]


def test_the_interval_is_of_pairs_and_holds_the_ratio_of_the_medians():
    """The machine becomes four times slower: ratios of the rounds do not show it, the ratio of the medians may."""
    slow = [10, 10, 10, 10, 20, 40, 40, 40, 40]
    fast = [10, 10, 10, 10, 10, 40, 40, 40, 40]
    found = Timings({"slow": slow, "fast": fast}).compare("slow", "fast")
    assert found["speed_up"] == 2
    assert found["speed_up_interval"] == [1, 2]
    assert speed_up_interval(fast, slow) == [0.5, 1]
    drifting = [10.0 * 1.3**i for i in range(9)]
    assert speed_up_interval([1.5 * ms for ms in drifting], drifting) == pytest.approx([1.5, 1.5])


@pytest.mark.parametrize("rounds", [7, 9, 15])
def test_the_interval_holds_the_true_speed_up_as_often_as_it_says(rounds):
    """Lognormal noise, shared and individual."""
    draw = torch.Generator().manual_seed(0)
    held, runs = 0, 1000
    for _ in range(runs):
        shared, *own = 0.15 * torch.randn(3, rounds, generator=draw, dtype=torch.float64)
        slow, fast = (factor * (shared + noise / 3).exp() for factor, noise in zip((12, 10), own, strict=True))
        low, high = speed_up_interval(slow.tolist(), fast.tolist())
        held += low <= 1.2 <= high
    assert at_most(held, runs, 0.95) > 0.01
    assert held < runs


def test_a_report_has_the_interval_among_its_notes():
    about = {"device": "x86_64", "threads": 1, "repeats": 9}
    compared = Timings({"dense": [9.0, 10.0, 11.0] * 3, "pruned": [4.5, 5.0, 5.0] * 3}).compare("dense", "pruned")
    assert compared["speed_up_interval"] == pytest.approx([2, 2.2])
    notes = _latency_notes({"latency": {**about, **compared}})
    assert "speed-up 2.00x; with 95 % confidence 2.00x to 2.20x" in notes
    few = Timings({"dense": [9.0] * 5, "pruned": [4.5] * 5}).compare("dense", "pruned")
    earlier = {"speed_up": 2.0, "speed_up_quartiles": [1.9, 2.1], "within_noise": False}
    for figures in (few, earlier):
        assert not any("confidence" in note for note in _latency_notes({"latency": {**about, **figures}}))


def test_an_interval_that_holds_1_is_a_warning_for_each_model_and_batch(capsys):
    def row(model, batch, faster, low, high, noise=False):
        figures = dict.fromkeys(("ms", "ms_low", "ms_high", "images_per_second", "peak_mb", "activations_mb"), 1.0)
        figures |= {"times_faster": faster, "times_faster_low": low, "times_faster_high": high, "within_noise": noise}
        figures["times_fewer_flops"] = 1.25
        return {"model": model, "batch": batch, **figures, "products_ms": None, "times_products": None}

    rows = [
        row("a", 1, 1.0, 1.0, 1.0),
        row("b", 1, 1.5, 1.4, 1.6),
        row("c", 1, 0.9, 0.8, 0.99),
        row("a", 8, 1.0, 1.0, 1.0),
        row("b", 8, 1.02, 0.97, 1.08, True),
        row("c", 8, 0.99, 0.99, 1.02),
    ]
    warnings = list_doubts(rows, 9)
    assert [line.split(": ")[0] for line in warnings] == [
        "the speed-up of b at batch 8 is 1.02 (0.97 to 1.08)",
        "the speed-up of c at batch 8 is 0.99 (0.99 to 1.02)",
    ]
    about = settings(torch.device("cpu"), torch.float32, 9)
    show_benchmark({"models": rows, "settings": about, "warnings": warnings}, False)
    shown = capsys.readouterr().out
    assert "warning: the speed-up of b at batch 8 is 1.02 (0.97 to 1.08): it may be noise" in shown
    table = " ".join(shown.split("faster: than")[0].split())
    assert "1.50x 1.40-1.60 1.25x" in table
    assert "~1.02x 0.97-1.08" in table
    assert "~0.99x 0.99-1.02" in table


def test_a_machine_that_became_busy_during_the_timing_is_noted():
    assert list_load_notes({"load": 0.5, "load_after": 2.4, "cores": 2}) == []
    for before, after in ((0.5, 4.25), (4.25, 0.5)):
        (note,) = list_load_notes({"load": before, "load_after": after, "cores": 2})
        assert f"with a load of {before:g} before and {after:g} after on 2 cores" in note
    (note,) = list_load_notes({"load": 4.25, "cores": 2})
    assert "with a load of 4.25 on 2 cores" in note


def test_the_benchmark_marks_a_difference_that_it_cannot_judge(vim, capsys):
    rows = benchmark({"a": vim, "b": vim}, batch_sizes=(1,), repeats=2)
    assert [row["within_noise"] for row in rows] == [False, None]
    assert (rows[1]["times_faster_low"], rows[1]["times_faster_high"]) == (None, None)
    result = {"models": rows, "warnings": list_doubts(rows, 2)}
    show_benchmark({**result, "settings": settings(torch.device("cpu"), torch.float32, 2)}, False)
    shown = capsys.readouterr().out
    assert "?: too few rounds to say so" in " ".join(shown.split())
    assert shown.count("warning: ") == 1
    assert "warning: 2 rounds are too few to tell a speed-up from noise" in shown
    assert "use 6 or more" in shown
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
    """Two cores, one of them used by processes that have ended, such as image decoders."""
    start = os.times_result((5.0, 1.0, 0.0, 0.0, 1000.0))
    now = os.times_result((5.0 + 0.9 * seconds, 1.0 + 0.1 * seconds, seconds, 0.0, 1000.0 + seconds))
    monkeypatch.setattr(timings, "_start", start)
    monkeypatch.setattr(os, "times", lambda: now)
    assert timings.own_load() == pytest.approx(load, abs=0.005)
