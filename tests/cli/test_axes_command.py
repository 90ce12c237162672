"""`prune --flops` over several axes, and the output of `report` and `inspect` for its result."""

import json
import re
from pathlib import Path

import pytest
import torch
from command_line import call, call_json
from conftest import make_plain_mamba, make_vim, write_image
from PIL import Image

TRIMS = ("--axes", "states,channels", "--no-latency", "--samples", 40, "--search-images", 16)


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with a checkpoint, images, and `small`, which `prune` trimmed to half of the FLOPs."""
    root = tmp_path_factory.mktemp("axes")
    torch.save({"model": make_vim(d_model=24).state_dict()}, root / "model.pt")
    for i in range(40):
        write_image(root / "images" / f"class{i % 10}" / f"{i}.png", seed=i)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        result = call("prune", "model.pt", "--flops", "55%", "--data", "images", "--eval-data", "images", *TRIMS,
                      "-o", "small")  # fmt: skip
    (root / "shown.txt").write_text(result.stdout)
    return root


@pytest.fixture(autouse=True)
def in_this_folder(place, monkeypatch):
    monkeypatch.chdir(place)
    monkeypatch.setenv("COLUMNS", "80")


def report() -> dict:
    return json.loads(Path("small/report.json").read_text())


def test_a_trimmed_model_is_described_by_what_was_trimmed():
    trims = report()["trims"]
    assert trims["dense"] == {"states": 4, "channels": 48, "directions": 2, "layers": 4}
    shown = Path("shown.txt").read_text()
    assert re.search(r"trimmed: (\d of 4 states|\d+ of 48 channels)", shown)
    assert "images of images" in shown
    assert all(images["name"] == "images" for images in trims["fitted_on"].values())
    for absent in ("kept:", "importance", "alignment:", "kept tokens counted"):
        assert absent not in shown


def test_the_column_before_repair_is_called_trimmed():
    columns = Path("shown.txt").read_text().splitlines()[0].split()
    assert columns == ["dense", "trimmed", "pruned"]
    assert report()["trimmed"]["params"] == report()["pruned"]["params"] < report()["dense"]["params"]


def test_the_table_of_the_axes_is_whole_in_80_columns():
    found, shown = report(), call("report", "small").stdout
    assert shown == Path("shown.txt").read_text()
    tables = shown[shown.index("each axis alone") :]
    assert max(map(len, tables.splitlines())) <= 80
    assert "…" not in tables
    rows = {line.strip() for line in tables.splitlines()}
    for option in found["search"]["axes"]:
        kept = option["trims"][option["axis"]]
        of = found["dense"]["sizes"][option["axis"]]
        name = f"{option['axis']}: {kept} of {of}"
        row = next(line for line in rows if line.startswith(f"{name} "))
        assert row.split()[-2:] == [f"{option['flops']:.1%}", f"{option['loss']:.5f}"]
    runs = tables[tables.index("combinations run") :]
    assert runs.count("(chosen)") == 1
    assert f"{found['search']['flops']:.1%}" in next(line for line in runs.splitlines() if "(chosen)" in line)
    assert "requested: at most 55.0% of the FLOPs" in shown


def test_pictures_in_the_folder_are_those_that_its_card_shows():
    card = Path("small/README.md").read_text()
    linked = re.findall(r"!\[.*?\]\((.*?)\)", card)
    assert linked == ["axes.png"]
    assert {file.name for file in Path("small").glob("*.png")} == set(linked)
    with Image.open("small/axes.png") as picture:
        assert min(picture.size) > 300
    assert "drops tokens" not in card
    assert "| each axis alone |" in card
    assert "| combinations run |" in card


def test_the_page_has_the_chart_and_no_broken_picture():
    call("report", "small", "--html", "page.html", "--force")
    page = Path("page.html").read_text()
    sources = re.findall(r'<img [^>]*src="(.*?)"', page)
    assert len(sources) == 1
    assert sources[0].startswith("data:image/png;base64,iVBOR")
    # Figures, FLOPs by part, refitted maps, axes and combinations.
    assert page.count("<table>") == page.count("</table>") == 5
    assert "Kept tokens" not in page


def test_report_as_json_is_the_file_and_a_plan():
    found = call_json("report", "small")
    assert found == report()
    preview = call_json("prune", "model.pt", "--plan", "small/report.json", "--dry-run")
    for axis in ("states", "channels"):
        assert preview["trims"].get(axis) == found["trims"].get(axis)
    assert preview["pruned"]["flops"] == pytest.approx(found["pruned"]["flops"])


def test_a_dry_run_says_what_would_be_trimmed():
    shown = call("prune", "model.pt", "--plan", "small/report.json", "--dry-run").stdout
    assert re.search(r"trimmed: (\d of 4 states|\d+ of 48 channels)", shown)
    options = ("--flops", "55%", "--data", "images", "--eval-data", "images", *TRIMS[:2], *TRIMS[3:])
    shown = call("prune", "model.pt", *options, "--dry-run").stdout
    assert "trimmed: " in shown
    assert "each axis alone" in shown


def test_what_the_dense_model_takes_as_it_is_run():
    found = report()
    ours, published = found["dense"]["flops_as_run"], found["dense"]["flops"]["full"]
    assert ours < published
    assert "flops_as_run" not in found["pruned"]
    assert f"the dense model takes {ours:.4g} GFLOPs as it is run here ({ours / published - 1:+.1%})" in (
        Path("shown.txt").read_text()
    )
    inspected = call_json("inspect", "model.pt")["flops"]
    assert (inspected["full"], inspected["as_run"]) == pytest.approx((published, ours))
    assert "as it is run here" in call("inspect", "model.pt").stdout


def test_a_model_that_reads_a_mean_takes_what_is_published(tmp_path):
    torch.save({"model": make_plain_mamba().state_dict()}, tmp_path / "m.pt")
    options = ("--image-size", 64)
    flops = call_json("inspect", tmp_path / "m.pt", *options)["flops"]
    assert flops["as_run"] == flops["full"]
    assert "as it is run here" not in call("inspect", tmp_path / "m.pt", *options).stdout


def test_inspect_says_what_each_axis_can_reach():
    axes = call_json("inspect", "model.pt")["range"]["axes"]
    assert set(axes) == {"states", "channels", "layers", "tokens", "all"}
    assert 0 < axes["all"] < min(share for axis, share in axes.items() if axis != "all") < 100
    measured = [100 * option["flops"] for option in report()["search"]["axes"] if option["axis"] == "states"]
    assert axes["states"] == pytest.approx(min(measured), abs=0.01)


def test_inspect_of_a_trimmed_folder():
    found = call_json("inspect", "small")
    assert found["trims"] == report()["trims"]
    assert found["range"]["axes"] == {}
    assert "trimmed: " in call("inspect", "small").stdout


def test_fine_tuning_keeps_what_was_trimmed():
    options = ("--data", "images", "--eval-data", "images", "--epochs", 1, "--set", "batch_size=20", "--no-latency")
    found = call_json("finetune", "small", *options, "--no-teacher", "-o", "tuned")
    assert found["trims"] == report()["trims"]
    assert "aligned" not in found
    assert "trimmed: " in call("report", "tuned").stdout
