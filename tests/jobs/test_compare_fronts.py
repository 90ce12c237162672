"""Accuracy and cost of rows of several models, and their chart."""

import itertools
import re

import pytest

from ssmcompress.jobs.fronts import COLUMNS, gigaflops, list_front, milliseconds, place_rows
from ssmcompress.jobs.methods import METHODS, find_group, is_reconstructed
from ssmcompress.jobs.pareto import GREY, MARKERS, draw_models, draw_pareto, plot_models, plot_pareto
from ssmcompress.tasks import CLASSIFICATION


def row(model, method, gflops, top1, ms=None, share=None, **others):
    figures = {"top1": top1, "agreement": None if method == "dense" else 90.0, "kl": 0.1}
    cost = {"flops": {"full": gflops}, "flops_share": 0.5, "latency_ms": ms, "latency_share": share}
    return {"model": model, "method": method, "ratio": 0.3, **figures, **cost, **others}


ROWS = [
    row("a", "dense", 2.0, 80.0, 20.0, 1.01),
    row("a", "naive", 1.0, 70.0, 12.0, 0.6),
    row("a", "clip, aligned", 1.0, 75.0, 15.0, 0.75),
    row("b", "dense", 1.0, 74.0, 12.5, 0.99),
    row("b", "naive", 0.5, 71.0, 30.0, 2.4),
]


def placed(rows):
    return {(r["model"], r["method"]): r for r in place_rows(rows, CLASSIFICATION)}


def test_a_row_is_on_the_front_if_no_row_of_any_model_that_costs_as_much_is_better():
    found = placed(ROWS)
    on_front = {key for key, r in found.items() if r["flops_front"]}
    assert on_front == {("b", "naive"), ("a", "clip, aligned"), ("a", "dense")}
    assert {key for key, r in found.items() if r["latency_front"]} == {
        ("a", "naive"), ("b", "dense"), ("a", "clip, aligned"), ("a", "dense"),
    }  # fmt: skip


def test_the_distance_is_to_the_best_row_that_costs_at_most_as_much():
    found = placed(ROWS)
    assert found["a", "naive"]["flops_points"] == -5.0
    assert found["a", "naive"]["flops_best"] == {"model": "a", "method": "clip, aligned", "ratio": 0.3}
    assert found["b", "dense"]["flops_points"] == -1.0
    assert found["b", "naive"]["latency_points"] == -9.0
    assert found["b", "naive"]["latency_best"]["method"] == "dense"
    assert found["a", "dense"]["latency_points"] == 0.0


def test_speed_is_in_images_a_second_and_relative_to_the_own_dense_model():
    found = placed(ROWS)
    assert found["b", "naive"]["images_per_second"] == pytest.approx(1000 / 30)
    assert found["b", "naive"]["speed_up"] == pytest.approx(1 / 2.4)
    assert found["b", "dense"]["speed_up"] == 1.0


def test_a_row_that_was_timed_on_a_busy_machine_is_not_taken_for_a_slow_one():
    """Its dense model, timed in alternation, was slowed down by the same factor."""
    quiet = [row("a", "dense", 2.0, 80.0, 20.0, 1.0), row("b", "dense", 2.0, 70.0, 15.0, 1.0)]
    busy = row("a", "naive", 1.0, 75.0, 24.0, 0.6)
    found = placed([*quiet, busy])
    assert found["a", "naive"]["quiet_ms"] == pytest.approx(12)
    assert found["a", "naive"]["images_per_second"] == pytest.approx(1000 / 12)
    assert found["a", "naive"]["latency_front"]
    assert found["b", "dense"]["latency_best"] == {"model": "a", "method": "naive", "ratio": 0.3}


def test_rows_that_coincide_are_both_on_the_front_and_a_dearer_one_as_good_is_not():
    rows = [row("a", "x", 1.0, 70.0), row("b", "y", 1.0, 70.0), row("a", "z", 1.5, 70.0)]
    found = placed(rows)
    assert [found[key]["flops_front"] for key in (("a", "x"), ("b", "y"), ("a", "z"))] == [True, True, False]
    assert found["a", "z"]["flops_points"] == 0.0
    assert [r["method"] for r in list_front(rows, gigaflops, CLASSIFICATION, True)] == ["x"]


def test_what_was_not_measured_has_no_place():
    failed = {"model": "a", "method": "search", "ratio": 0.3, "images": None, "failed": "cannot reach 10.0%"}
    found = placed([*ROWS[:1], failed, row("b", "naive", 1.0, 70.0)])
    assert [found["a", "search"][key] for key in COLUMNS] == [None] * len(COLUMNS)
    assert found["b", "naive"]["latency_front"] is found["b", "naive"]["images_per_second"] is None
    assert found["b", "naive"]["flops_front"] is True


def test_without_labels_only_rows_of_one_model_are_compared():
    """Agreement is with each model's own dense model: 95 % of one is not better than 90 % of another."""
    shares = None, 90, 95, None, 80
    rows = [{**r, "top1": None, "agreement": agreement} for r, agreement in zip(ROWS, shares, strict=True)]
    found = placed(rows)
    assert found["b", "naive"]["latency_best"] == {"model": "b", "method": "dense", "ratio": 0.3}
    assert found["b", "naive"]["latency_points"] == -20.0
    assert found["a", "naive"]["flops_best"]["model"] == "a"
    assert found["b", "dense"]["flops_front"] is True


# ------------------------------------------------------------------------------------------------------------- charts


def many_rows(latency=True):
    rows = []
    for number, model in enumerate(("one", "two", "three")):
        full = 1.0 + number
        rows.append(row(model, "dense", full, 75.0 + number, 10 * full if latency else None, 1.0))
        for index, method in enumerate(m.name for m in METHODS if not m.of_levels):
            share, top1 = 0.5 + 0.013 * index, 50 + (17 * index + 5 * number) % 24
            rows.append(row(model, method, full * share, top1, 10 * full * share if latency else None, share))
    return place_rows([r if latency else {**r, "latency_share": None} for r in rows], CLASSIFICATION)


def test_a_chart_has_a_panel_for_flops_and_one_for_latency_where_it_was_measured():
    assert [axes.get_xlabel() for axes in plot_models(many_rows(), CLASSIFICATION).axes] == [
        "GFLOPs of one image (full)", "latency at batch 1, ms",
    ]  # fmt: skip
    (only,) = plot_models(many_rows(latency=False), CLASSIFICATION).axes
    assert only.get_ylabel() == "top-1, %"


def test_the_line_of_the_front_has_steps():
    """Between two rows nothing was measured: the line stays at the cheaper one until the next."""
    axes = plot_models(many_rows(), CLASSIFICATION).axes[0]
    (line,) = (line for line in axes.lines if line.get_drawstyle().startswith("steps"))
    assert line.get_drawstyle() == "steps-post"
    front = list_front(many_rows(), gigaflops, CLASSIFICATION, True)
    assert line.get_xydata().tolist() == [[r["flops"]["full"], r["top1"]] for r in front]


def test_rows_of_the_front_and_dense_models_have_labels_that_do_not_overlap():
    figure = plot_models(many_rows(), CLASSIFICATION)
    for axes, cost in zip(figure.axes, (gigaflops, milliseconds), strict=True):
        front = list_front(many_rows(), cost, CLASSIFICATION, True)
        names = [text.get_text() for text in axes.texts]
        assert {f"{model}, dense" for model in ("one", "two", "three")} <= set(names)
        others = [r["method"].removesuffix(", reconstructed") for r in front if r["method"] != "dense"]
        assert sorted(names) == sorted([*others, *(f"{model}, dense" for model in ("one", "two", "three"))])
        boxes = [text.get_window_extent() for text in axes.texts]
        assert not [1 for one, other in itertools.combinations(boxes, 2) if one.overlaps(other)]
        inside = axes.get_window_extent()
        assert all(inside.contains(*box.min) and inside.contains(*box.max) for box in boxes)


@pytest.mark.parametrize("count", [2, 6, 12])
def test_labels_of_points_that_almost_coincide_do_not_overlap(count):
    """Overlapping labels are moved apart; those without space are omitted."""
    close = [row("one", f"method {n}", 1.0 + 1e-4 * n, 70.0 + 1e-3 * n) for n in range(count)]
    (axes,) = plot_models([row("one", "dense", 2.0, 80.0), row("one", "poor", 0.5, 30.0), *close], CLASSIFICATION).axes
    boxes = [text.get_window_extent() for text in axes.texts]
    assert len(boxes) == count + 2
    assert not [1 for one, other in itertools.combinations(boxes, 2) if one.overlaps(other)]


def test_points_that_others_beat_are_pale_and_each_model_has_a_colour():
    axes = plot_models(many_rows(), CLASSIFICATION).axes[0]
    front = {
        (r["flops"]["full"], r["top1"])
        for r in many_rows()
        if r["method"] == "dense" or r in list_front(many_rows(), gigaflops, CLASSIFICATION, True)
    }
    points = [line for line in axes.lines if len(line.get_xydata()) == 1]
    assert len(points) == len(many_rows())
    for line in points:
        assert (line.get_alpha() == 1) == (tuple(line.get_xydata()[0]) in front)
    stars = [line for line in points if line.get_marker() == "*"]
    assert len({line.get_markerfacecolor() for line in stars}) == 3


def test_charts_are_images_of_the_kinds_that_are_asked_for():
    found = draw_models(many_rows(latency=False), CLASSIFICATION, ["png", "svg"])
    assert found["png"][:4] == b"\x89PNG"
    assert re.search(rb"<svg .*one, dense", found["svg"], flags=re.DOTALL)


def rows_of_one(count=40):
    """Rows of one model as `compare` has them: no `model`, costs as shares of the dense FLOPs."""
    names = [m.name for m in METHODS if not m.of_levels]
    rows = [row("", "dense", 1.0, 80.0, flops_share=1.0)]
    for number in range(count):
        share, top1 = 0.4 + 0.013 * number, 40 + (17 * number) % 38
        rows.append(row("", names[number % len(names)], share, top1, flops_share=share))
    return [{key: value for key, value in r.items() if key != "model"} for r in rows]


def front_of_one(rows):
    return list_front([{**r, "model": ""} for r in rows], lambda r: 100 * r["flops_share"], CLASSIFICATION, True)


def test_a_chart_of_one_model_has_labels_at_the_front_and_the_dense_model_alone():
    rows = rows_of_one()
    front = front_of_one(rows)
    assert 3 < len(front) < 20
    (axes,) = plot_pareto(rows, CLASSIFICATION).axes
    expected = [(r["method"].removesuffix(", reconstructed"), 100 * r["flops_share"], r["top1"]) for r in front]
    assert sorted((t.get_text(), *t.xy) for t in axes.texts) == sorted(expected)
    boxes = [text.get_window_extent() for text in axes.texts]
    assert not [1 for one, other in itertools.combinations(boxes, 2) if one.overlaps(other)]
    poor = [{**r, "top1": 10.0} if r["method"] == "dense" else r for r in rows]
    assert "dense" in [t.get_text() for t in plot_pareto(poor, CLASSIFICATION).axes[0].texts]


def test_a_chart_of_one_model_draws_steps_and_no_line_through_what_nobody_measured():
    rows = rows_of_one()
    (axes,) = plot_pareto(rows, CLASSIFICATION).axes
    lines = [line for line in axes.lines if len(line.get_xydata()) > 2]
    (line,) = lines
    assert line.get_drawstyle() == "steps-post"
    assert line.get_xydata().tolist() == [[100 * r["flops_share"], r["top1"]] for r in front_of_one(rows)]


def test_in_a_chart_of_one_model_what_others_beat_is_grey_and_markers_tell_the_methods():
    rows = rows_of_one()
    front = {(100 * r["flops_share"], r["top1"]) for r in front_of_one(rows)}
    (axes,) = plot_pareto(rows, CLASSIFICATION).axes
    points = {tuple(line.get_xydata()[0]): line for line in axes.lines if len(line.get_xydata()) == 1}
    assert len(points) == len(rows)
    for r in rows[1:]:
        place = 100 * r["flops_share"], r["top1"]
        assert points[place].get_marker() == MARKERS[find_group(r["method"])]
        assert (points[place].get_markeredgecolor() == GREY) == (place not in front)
        assert (points[place].get_markerfacecolor() == "white") == (not is_reconstructed(r["method"]))
    assert points[100.0, 80.0].get_marker() == MARKERS["dense"]


def test_without_labels_a_chart_of_one_model_is_of_the_agreement():
    rows = [{**r, "top1": None, "agreement": None if r["method"] == "dense" else r["top1"]} for r in rows_of_one(6)]
    (axes,) = plot_pareto(rows, CLASSIFICATION).axes
    assert [100.0, 100.0] in [line.get_xydata()[0].tolist() for line in axes.lines]
    assert axes.get_ylabel() == "same class as dense, %"


@pytest.mark.parametrize("rows", [[], rows_of_one(0), rows_of_one(1)])
def test_a_chart_of_few_rows_is_drawn(rows):
    assert draw_pareto(rows, "png", CLASSIFICATION)[:4] == b"\x89PNG"


def test_names_of_models_are_no_formulas():
    rows = [{**r, "model": {"one": r"a$\frac$b", "two": "天空"}.get(r["model"], r["model"])} for r in many_rows()]
    found = draw_models(rows, CLASSIFICATION, ["png", "svg"])
    assert rb"a$\frac$b, dense" in found["svg"]
