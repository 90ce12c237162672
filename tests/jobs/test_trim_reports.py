"""Reports of trimmed models: text, tables and charts."""

import io

import pytest
import torch
from conftest import make_vim
from PIL import Image

import ssmcompress
from ssmcompress.compression.trim.layers import drop_directions, drop_layers
from ssmcompress.compression.trim.states import trim_states
from ssmcompress.compression.trim.trims import Trims
from ssmcompress.jobs.charts import draw_axes
from ssmcompress.jobs.prune import preview
from ssmcompress.jobs.report_axes import (
    FEW_LAYERS,
    format_axes,
    format_tried,
    format_trims,
    list_search_notes,
    list_trim_notes,
)
from ssmcompress.jobs.trim_sizes import describe_sizes, describe_trims
from ssmcompress.models.rewrite import make_plan

DENSE = {"states": 8, "channels": 128, "directions": 2, "layers": 6}


@pytest.mark.parametrize(("trims", "words"), [
    ({}, ""),
    ({"states": 3}, "3 of 8 states"),
    ({"states": [3, 3], "channels": [96, 96]}, "3 of 8 states, 96 of 128 channels"),
    ({"states": 3, "layers": [4]}, "3 of 8 states, without layer 4 of 6"),
    ({"states": [3, 1, 2]}, "1 to 3 of 8 states (3, 1, 2 by layer)"),
    ({"layers": [2, 5]}, "without layers 2, 5 of 6"),
    ({"directions": {"4": [1]}}, "layer 4 without scan direction 1"),
])  # fmt: skip
def test_trims_in_words(trims, words):
    assert format_trims({**trims, "dense": DENSE}) == words


def test_without_the_sizes_of_the_dense_model_they_are_left_out():
    assert format_trims({"states": 3, "layers": [4]}) == "3 states, without layer 4"


def test_the_images_of_each_axis():
    fitted = {"states": {"name": "a", "images": 128}, "channels": {"name": "a", "images": 256}}
    report = {"stages": [], "trims": {"states": 3, "channels": 96, "dense": DENSE, "fitted_on": fitted}}
    assert list_trim_notes(report)[1] == "trimmed: states on 128 and channels on 256 images of a"
    fitted["channels"]["images"] = 128
    assert list_trim_notes(report)[1] == "states and channels trimmed on 128 images of a"


def test_a_model_from_which_nothing_was_taken():
    assert list_trim_notes({"stages": [], "trims": {}}) == ["nothing was dropped or trimmed: the model runs as it is"]
    assert list_trim_notes({"stages": [{}], "trims": {}}) == []


def test_the_section_is_what_the_steps_did_and_is_read_as_trims():
    model = make_vim()
    images = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    trimmed = trim_states(drop_layers(drop_directions(model, {1: [1]}), [3]), 2, images, name="few")
    section = describe_trims(trimmed)
    assert section["dense"] == {"states": 4, "channels": 32, "directions": 2, "layers": 4}
    assert section["fitted_on"] == {"states": {"name": "few", "images": 4}}
    assert Trims.from_dict(section) == Trims(2, None, (3,), ((1, (1,)),))
    assert describe_sizes(trimmed.config) == {"states": 2, "channels": 32, "directions": [1, 2, 2], "layers": 3}
    assert describe_trims(model) == {}


def test_a_preview_has_the_sizes_of_the_dense_model():
    model = make_vim()
    value = preview(model, make_plan(model, stages=(2,)), Trims(states=2))
    assert value["trims"] == {"states": 2, "dense": value["dense"]["sizes"]}
    assert value["dense"]["sizes"] == {"states": 4, "channels": 32, "directions": 2, "layers": 4}
    assert value["dense"]["flops_as_run"] < value["dense"]["flops"]["full"]


def searched(**changes):
    layers = [{"axis": "layers", "trims": {"layers": [n]}, "flops": 0.8, "loss": 0.01 * (10 - n)} for n in range(1, 11)]
    stages = [{"after": 2, "ratio": 0.5, "importance": "l2"}, {"after": 3, "ratio": 0.2, "importance": "l2"}]
    search = {
        "asked": {"flops": 0.5, "latency": None, "max_drop": None},
        "reachable": {"flops": 0.1},
        "data": {"name": "few", "images": 48},
        "axes": [
            {"axis": "states", "trims": {"states": 2}, "flops": 0.6, "loss": -1e-5},
            *layers,
            {"axis": "tokens", "stages": stages, "flops": 0.7, "loss": 0.5},
        ],
        "loss": 0.002, "flops": 0.49, "latency": None, "drop": None,
        "tried": [
            {"trims": {"states": 2}, "stages": stages[:1], "flops": 0.49, "loss": 0.002, "expected": 0.01},
            {"trims": {}, "stages": stages, "flops": 0.5, "loss": 0.5, "expected": 0.4},
        ],
    }  # fmt: skip
    return {"search": {**search, **changes}, "dense": {"flops": {"full": 1.0}, "sizes": DENSE}}


def test_options_in_order_and_layers_by_what_they_lose():
    _, rows = format_axes(searched())
    assert [name for name, _ in rows][:3] == ["states: 2 of 8", "layers: without 10", "layers: without 9"]
    assert rows[-1] == ("tokens: 50, 40 % after layers 2, 3", ["70.0%", "0.50000"])
    assert len(rows) == 12


def test_a_short_table_says_how_many_layers_it_leaves_out():
    _, rows = format_axes(searched(), whole=False)
    names = [name for name, _ in rows]
    assert sum(name.startswith("layers: without") for name in names) == FEW_LAYERS
    assert "layers: 4 others lose more for what they save" in names


def test_layers_are_ranked_by_what_they_save_of_the_model_as_it_is_run():
    """The last layer of a model that reads its class token costs less here than another one."""
    options = [
        {"axis": "layers", "trims": {"layers": [n]}, "flops": flops, "loss": loss}
        for n, flops, loss in ((1, 0.8, 0.02), (2, 0.88, 0.011))
    ]
    report = searched(axes=options)
    assert [name for name, _ in format_axes(report)[1]] == ["layers: without 2", "layers: without 1"]
    report["dense"]["flops_as_run"] = 0.9
    assert [name for name, _ in format_axes(report)[1]] == ["layers: without 1", "layers: without 2"]


def test_what_was_tried():
    _, rows = format_tried(searched())
    assert rows == [
        ("2 states, tokens 50 % after layer 2 (chosen)", ["49.0%", "0.00200", "0.01000"]),
        ("tokens 50, 40 % after layers 2, 3", ["50.0%", "0.50000", "0.40000"]),
    ]


def test_a_loss_in_points_that_was_asked_for_and_found():
    asked = {"flops": None, "latency": None, "max_drop": 1.0}
    for labels, what in ((True, "points of top-1"), (False, "% of the dense model's classes")):
        drop = {"points": 0.625, "images": 160, "labels": labels}
        assert list_search_notes(searched(asked=asked, drop=drop))[-1] == (
            f"requested: at most 1 {what} lost; 0.62 lost on 160 images"
        )


def test_a_search_over_tokens_alone_has_no_tables():
    report = {"search": {"tried": [{"loss": 1}], "asked": {}}}
    assert format_axes(report)[1] == format_tried(report)[1] == list_search_notes(report) == []


@pytest.mark.parametrize("changes", [{}, {"tried": []}, {"axes": searched()["search"]["axes"][:1], "loss": 0.0}])
def test_the_chart_is_drawn_whatever_the_losses(changes):
    with Image.open(io.BytesIO(draw_axes(searched(**changes)["search"]))) as picture:
        assert min(picture.size) > 300


def test_layers_alone_need_no_images(class_folders, tmp_path):
    """A folder whose model only lost a layer: one column before repair, no picture of tokens, no chart."""
    from ssmcompress.jobs.prune import CompressOptions, FoundPlan, compress
    from ssmcompress.jobs.requests import DataOptions, MeasureOptions
    from ssmcompress.pruning.plan import Plan

    options = CompressOptions(DataOptions(data=str(class_folders)), MeasureOptions(latency=False))
    found = FoundPlan(Plan(()), trims=Trims(layers=(2,), directions=((1, (0,)),)))
    report = compress(make_vim(), Plan(()), tmp_path / "m", options, found=found)
    assert [name for name, value in report.items() if isinstance(value, dict) and "top5" in value] == [
        "dense", "trimmed", "pruned",
    ]  # fmt: skip
    assert "fitted_on" not in report["trims"]
    assert not list((tmp_path / "m").glob("*.png"))
    assert "![" not in (tmp_path / "m" / "README.md").read_text()
    assert ssmcompress.load(tmp_path / "m").origin.layers == (1, 3, 4)
