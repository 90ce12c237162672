"""The charts of a report's web page: their content, and charts omitted for lack of data."""

import html
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from command_line import call_json
from conftest import make_vim, make_vmamba

from ssmcompress.compression.search.sensitivity import SENSITIVITY_FILE, Sensitivity
from ssmcompress.errors import InputError
from ssmcompress.evaluation.flops import flops_by_part
from ssmcompress.jobs.report import describe_missing, read_report, write_page
from ssmcompress.jobs.report_charts import (
    find_best,
    link_attention,
    list_fits,
    list_parts,
    list_points,
    plot_fits,
    plot_parts,
    plot_quality,
    plot_sensitivity,
)
from ssmcompress.jobs.report_text import render_card
from ssmcompress.models.rewrite import prune
from ssmcompress.pruning.alignment import Alignment

CHARTS = ("quality", "parts", "fits", "sensitivity")


def model(top1, gflops, parts=None):
    return {"top1": top1, "top5": top1, "flops": {"full": gflops, "paper": gflops}, "params": 9, "latency_ms": None} | (
        {"flops_by_part": parts} if parts else {}
    )


def make_report(**changes):
    fits = [
        {"weight": f"layers.{layer}.mixer.{name}", "ridges": [1.0], "before": 0.1 * (layer + 1), "after": 0.05}
        for layer in range(3)
        for name in ("x_proj", "out_proj")
    ]
    return {
        "data": {"name": "few", "images": 10, "labelled": True, "overlap": 0, "unreadable": []},
        "dense": model(90.0, 2.0, {"scan": 1.5, "head": 0.5}),
        "naive": model(70.0, 1.0),
        "pruned": model(85.0, 1.25, {"scan": 0.7, "head": 0.5, "corrections": 0.05}),
        "agreement": {"top1": 93.0, "kl": 0.1},
        "stages": [{"after": 2, "kept": 8, "of": 17, "importance": "clip"}],
        "alignment": {"conv": True, "scan": True, "gap": "calibrated"},
        "reconstruction": {
            "name": "few", "images": 8, "held_out": 2, "kl_before": 0.2, "kl_after": 0.1, "kept": True, "fits": fits,
            "seconds": 1.0, "correction_ranks": {}, "class_correction_ranks": {},
        },
        "command": "ssmcompress prune x", "versions": {"ssmcompress": "0"}, **changes,
    }  # fmt: skip


def make_sensitivity(metrics=("clip", "l2"), name="few"):
    values = [[[0.1, 0.5, 2.0], [0.2, 0.4, 3.0]], [[0.01, 0.0, 0.3], [0.02, 0.05, 0.2]]]
    loss = torch.tensor(values, dtype=torch.float64)
    about = {"depth": 4, "length": 20, "weights": None}, {"name": name, "images": 48}
    return Sensitivity(*about, "kl", True, Alignment(), "calibrated", (1, 3), metrics, (18, 10, 2), loss)


def write(folder: Path, report, sensitivity=None) -> str:
    """The page of a report in a folder, with a sensitivity beside it."""
    folder.mkdir(exist_ok=True)
    (folder / "report.json").write_text(json.dumps(report))
    if sensitivity is not None:
        (folder / SENSITIVITY_FILE).write_text(sensitivity)
    _, content = read_report(folder)
    write_page(content, folder, folder.parent / "page.html", True)
    return (folder.parent / "page.html").read_text()


def charts_in(page: str) -> list[str]:
    return [name for name in CHARTS if f' id="{name}-' in page]


def test_names_of_files_are_plain_text_in_the_card():
    report = make_report()
    report["data"]["unreadable"] = ["a <img src=x> [x](javascript:f()) | b.png", "new\n\n# Heading\nx.png"]
    lines = render_card(report, "m", ()).splitlines()
    line = next(line for line in lines if "a \\<img" in line)
    assert r"a \<img src=x\> \[x\](javascript:f()) \| b.png, new \# Heading x.png" in line
    assert not any(line.startswith("# Heading") for line in lines)


def test_a_page_has_a_chart_for_all_that_there_are_data_for(tmp_path):
    page = write(tmp_path / "m", make_report(), make_sensitivity().to_json())
    assert charts_in(page) == list(CHARTS)
    assert page.count("<svg ") == page.count("<figure>") == page.count("<figcaption>") == 4
    for label in re.findall(r'<svg [^>]*role="img" aria-label="([^"]*)"', page):
        assert len(label) > 40
    # Of parts and sensitivities the numbers are in no other table.
    assert page.count("<details>") == 2
    assert "<td>corrections</td><td>0</td><td>0.05</td>" in page
    assert "<td>3</td><td>0.01 clip</td><td>0 clip</td><td>0.2 l2</td>" in page


@pytest.mark.parametrize(("changes", "missing"), [
    ({"naive": None, "dense": model(None, 2.0, {"scan": 2.0})}, "quality"),
    ({"dense": model(90.0, 2.0)}, "parts"),
    ({"pruned": model(85.0, 1.25)}, "parts"),
    ({"pruned": model(85.0, 1.25) | {"flops_by_part": "unknown"}}, "parts"),
    ({"pruned": model(85.0, 1.25, {"scan": 1.7e308})}, "parts"),
    ({"pruned": model(85.0, 1.25, {"scan": 10**400})}, "parts"),
    ({"reconstruction": None}, "fits"),
])  # fmt: skip
def test_a_chart_without_data_is_left_out_and_the_others_stay(changes, missing, tmp_path):
    report = {name: value for name, value in make_report(**changes).items() if value is not None or name != "naive"}
    page = write(tmp_path / "m", report, make_sensitivity().to_json())
    assert charts_in(page) == [name for name in CHARTS if name != missing]


def test_a_report_of_an_older_version_has_a_page_without_charts_of_what_it_lacks(tmp_path):
    report = make_report(dense=model(90.0, 2.0), pruned=model(85.0, 1.0), reconstruction=None)
    assert charts_in(write(tmp_path / "m", report)) == ["quality"]


@pytest.mark.parametrize("content", [
    "", "{", "[]", "null", '{"format_version": 99}', make_sensitivity().to_json().replace("0.5", "1e999"),
    make_sensitivity().to_json().replace("0.5", "{}"), make_sensitivity().to_json().replace("0.5", '"x"'),
    re.sub(r'"loss": [^"]*', '"loss": [[[{}]]], ', make_sensitivity().to_json()),
    make_sensitivity().to_json().replace('"layers": [1, 3]', '"layers": [1, 99]'), "[" * 100000,
])  # fmt: skip
def test_a_broken_sensitivity_is_a_note_and_no_failure(content, tmp_path):
    page = write(tmp_path / "m", make_report(), content)
    assert charts_in(page) == ["quality", "parts", "fits"]
    assert "<li>the chart of the sensitivities was not drawn: " in page


def test_a_sensitivity_of_axes_alone_has_no_heat_map(tmp_path):
    value = json.loads(make_sensitivity().to_json()) | {"layers": [], "metrics": [], "kept": [], "loss": []}
    value["axes"] = [{"axis": "states", "trims": {"states": 2}, "flops": 0.6, "loss": 0.1}]
    page = write(tmp_path / "m", make_report(), json.dumps(value))
    assert charts_in(page) == ["quality", "parts", "fits"]
    assert "chart of the sensitivities was not drawn" not in page
    (tmp_path / "m" / "sensitivity-axes.json").write_text(make_sensitivity().to_json())
    assert "sensitivity" in charts_in(write(tmp_path / "m", make_report()))


def test_a_page_stands_alone_and_takes_names_as_text(tmp_path):
    bad = "</text></svg><script>alert(1)</script>\"' onload=x $\\frac$ \x1b[31m 天空"
    report = make_report(**{bad: model(80.0, 1.1)})
    report["pruned"]["flops_by_part"][bad] = 0.3
    report["reconstruction"]["fits"].append({"weight": f"layers.1.{bad}", "ridges": [], "before": 0.2, "after": 0.1})
    page = write(tmp_path / "m", report, make_sensitivity(("clip", bad), bad * 200).to_json())
    assert charts_in(page) == list(CHARTS)
    assert "<script" not in page
    assert "\x1b" not in page
    assert html.escape("</text></svg><script>alert")[:20] in page
    # Neither addresses nor references out of the page; with names of their own, charts do not take parts of others.
    assert not re.search(r"https?:|<!DOCTYPE svg|xmlns|@import|@font-face|<image", page)
    references = re.findall(r"(?:href|src)=\"([^\"]*)\"|url\(([^)]*)\)", page)
    names = re.findall(r' id="([^"]*)"', page)
    assert len(names) == len(set(names))
    for target in (one or other for one, other in references):
        assert target.startswith("data:") or target.removeprefix("#") in names, target


def test_the_page_links_to_the_attention_maps_that_there_are(tmp_path):
    folder = tmp_path / "a folder: 50%"
    assert "Attention maps" not in write(folder, make_report())
    (folder / "attention").mkdir()
    (folder / "attention" / "index.html").write_text("<!doctype html>")
    page = write(folder, make_report())
    assert '<a href="a%20folder%3A%2050%25/attention/index.html">Attention maps and kept tokens</a>' in page
    (tmp_path / "other").mkdir()
    assert link_attention(folder, tmp_path / "other" / "x.html").startswith("../a%20folder")
    assert link_attention(folder, folder / "x.html") == "attention/index.html"
    assert link_attention(tmp_path / "none", folder / "x.html") is None


# ---------------------------------------------------------------------------------------------------------------- data


def test_the_points_of_quality_are_the_columns():
    assert list_points(make_report()) == [("dense", 100.0, 90.0), ("naive", 50.0, 70.0), ("pruned", 62.5, 85.0)]
    (axes,) = plot_quality(make_report()).axes
    assert {text.get_text() for text in axes.texts} == {"dense, 90.00 %", "naive, 70.00 %", "pruned, 85.00 %"}
    assert axes.get_ylabel() == "top-1, %"


def test_without_labels_quality_is_the_agreement():
    report = make_report(
        **{name: model(None, cost) for name, cost in (("dense", 2.0), ("naive", 1.0), ("pruned", 1.0))}
    )
    assert list_points(report) == [("dense", 100.0, 100.0), ("pruned", 50.0, 93.0)]
    assert plot_quality(report).axes[0].get_ylabel() == "same class as dense, %"


def test_parts_are_bars_of_the_dense_and_the_pruned_model():
    rows = list_parts(make_report())
    assert rows == [("scan", 1.5, 0.7), ("head", 0.5, 0.5), ("corrections", 0.0, 0.05)]
    (axes,) = plot_parts(make_report()).axes
    dense, pruned = ([bar.get_width() for bar in bars] for bars in axes.containers)
    assert (dense, pruned) == ([1.5, 0.5, 0.0], [0.7, 0.5, 0.05])
    assert [text.get_text() for text in axes.get_yticklabels()] == ["scan", "head", "corrections"]
    assert axes.get_xlabel() == "GFLOPs of one image (full)"
    small = make_report(dense=model(90.0, 0.02, {"scan": 0.02}), pruned=model(90.0, 0.01, {"scan": 0.01}))
    (axes,) = plot_parts(small).axes
    assert axes.get_xlabel() == "MFLOPs of one image (full)"
    assert [bars[0].get_width() for bars in axes.containers] == [20.0, 10.0]


def test_errors_of_refitted_maps_by_layer_before_and_after():
    found = list_fits(make_report())
    assert list(found) == ["x_proj", "out_proj"]
    assert [layer for layer, *_ in found["x_proj"]] == ["0", "1", "2"]
    panels = [axes for axes in plot_fits(make_report()).axes if axes.get_visible()]
    assert [axes.get_title() for axes in panels] == ["x_proj", "out_proj"]
    for axes in panels:
        lines = {line.get_label(): line.get_ydata() for line in axes.lines}
        assert np.allclose(lines["before"], [10, 20, 30])
        assert np.allclose(lines["after"], [5, 5, 5])
    zero = make_report()
    zero["reconstruction"]["fits"][0]["after"] = 0.0  # has no place on a logarithmic axis
    plot_fits(zero).canvas.draw()


def test_the_heat_map_has_the_metric_that_loses_least_in_each_cell():
    loss, best = find_best(make_sensitivity())
    assert loss.tolist() == [[0.1, 0.4, 2.0], [0.01, 0.0, 0.2]]
    assert best.tolist() == [[0, 1, 0], [0, 0, 1]]
    figure = plot_sensitivity(make_sensitivity())
    axes, bar = figure.axes
    (mesh,) = axes.collections
    assert (mesh.norm.vmin, mesh.norm.vmax) == (0.01, 2.0)  # a loss of zero has the colour of the least one
    assert np.allclose(mesh.get_array(), np.clip(loss, 0.01, 2.0).T)
    assert [text.get_text() for text in axes.get_xticklabels()] == ["1", "3"]
    assert [text.get_text() for text in axes.get_yticklabels()] == ["90", "50", "10"]
    assert [text.get_text() for text in bar.get_yticklabels()][::4] == ["0.01", "2"]


def test_a_heat_map_without_positive_losses_is_drawn():
    sensitivity = make_sensitivity()
    sensitivity.loss.fill_(-0.1)
    plot_sensitivity(sensitivity).canvas.draw()


def test_reports_have_the_parts_of_the_flops(checkpoint, class_folders, tmp_path):
    found = call_json("prune", checkpoint, "--data", class_folders, "--no-latency", "--stages", 2, "-o", tmp_path / "m")
    for name in ("dense", "naive", "pruned"):
        assert sum(found[name]["flops_by_part"].values()) == pytest.approx(found[name]["flops"]["full"])
    assert charts_in(write(tmp_path / "m", found)) == ["quality", "parts", "fits"]


@pytest.mark.parametrize("make", [make_vim, make_vmamba])
def test_a_dense_model_that_is_gone_has_the_parts_of_its_flops(make):
    dense = make()
    assert describe_missing(prune(dense, ratio=0.5, stages=[2]))["flops_by_part"] == flops_by_part(dense)


def test_a_report_that_is_none_is_still_refused(tmp_path):
    with pytest.raises(InputError, match="not a report"):
        write(tmp_path / "m", make_report(reconstruction={"fits": [{"weight": 3}]}))
