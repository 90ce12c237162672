"""Rows of a comparison that trim axes other than tokens, and rows of smaller images."""

import csv
import json
from collections.abc import Sequence
from dataclasses import replace
from tempfile import TemporaryDirectory

import pytest
import torch
from conftest import images_of, make_plain_mamba, make_vim, make_vit, make_vmamba

import ssmcompress
from ssmcompress.compression.smaller_image import choose_image_size, refit_classifier, resize_batches, shrink_image
from ssmcompress.compression.trim.trims import Trims
from ssmcompress.data.batches import Batches
from ssmcompress.errors import InputError
from ssmcompress.evaluation.flops import flops, flops_of, remaining_share
from ssmcompress.jobs.compare import compare_methods
from ssmcompress.jobs.compare_axes import AxisModels, choose_trims
from ssmcompress.jobs.images import CalibrationImages, choose_images
from ssmcompress.jobs.methods import METHODS, choose_methods, make_levels
from ssmcompress.jobs.requests import CompareRequest, DataOptions, MeasureOptions
from ssmcompress.models.inputs import to_batches
from ssmcompress.tasks import CLASSIFICATION

AXIS_METHODS = [method.name for method in METHODS if method.axis is not None]
TRIMMING = [method.name for method in METHODS if method.axis not in (None, "image")]


def no_ranking() -> Sequence[int]:
    raise AssertionError("only layers are measured")


def axis_models(model, images, tmp_path) -> AxisModels:
    batches = to_batches(model, images)
    chosen = CalibrationImages(batches, batches, len(images))
    return AxisModels(model, chosen, DataOptions(), "calibrated", tmp_path / "sensitivity.json")


# ------------------------------------------------------------------------------------------------- the trims of a level


@pytest.mark.parametrize("make", [make_vim, make_plain_mamba])
def test_an_axis_alone_is_trimmed_as_little_as_its_level_allows(make):
    model = make(d_model=24, d_state=8)
    for axis, step, most in (("states", 1, 8), ("channels", 8, 48)):
        for count in range(most - step, 0, -step):
            share = flops_of(model, choose_config(model, axis, count))
            assert getattr(choose_trims(model, axis, share, no_ranking), axis) == count
            assert getattr(choose_trims(model, axis, share + 1e-6, no_ranking), axis) == count
            if count > step:
                assert getattr(choose_trims(model, axis, share - 1e-6, no_ranking), axis) == count - step


def choose_config(model, axis, count):
    sizes = [
        size._replace(**{{"states": "d_state", "channels": "d_inner"}[axis]: count}) for size in model.config.layers
    ]
    return model.config.with_layers(dict(enumerate(sizes, 1)))


def test_an_axis_says_how_far_it_goes(vim):
    for axis, least in (("states", "5[0-9].[0-9]%"), ("channels", "2[0-9].[0-9]%"), ("layers", "1[0-9].[0-9]%")):
        with pytest.raises(InputError, match=f"cannot reach 1.0%: {axis} leave {least} at least"):
            choose_trims(vim, axis, 0.01, lambda: (1, 2, 3, 4))


@pytest.mark.parametrize("make", [make_vim, make_plain_mamba])
def test_the_layers_that_matter_least_are_dropped_first(make, tmp_path):
    model = make()
    with torch.no_grad():
        for layer in (2, 3):  # they add nothing to the residual stream
            projection = model.blocks[layer - 1].get_submodule(model.blocks[layer - 1].channel_maps[1])
            for parameter in projection.parameters():
                parameter.zero_()
    models = axis_models(model, images_of(model, 24), tmp_path)
    base, without = (flops_of(model, config) for config in (model.config, Trims(layers=(2,)).apply_to(model.config)))
    for count in (1, 2):
        small = models.build("layers", base - (count - 0.5) * (base - without))
        assert len(small.blocks) == 4 - count
        assert set(small.find_record("layers").values["layers"]) <= {2, 3}
        torch.testing.assert_close(small(images_of(model)), model(images_of(model)), atol=1e-3, rtol=1e-3)


# -------------------------------------------------------------------------------------------------------- image sizes


def test_the_largest_image_within_the_level_is_chosen():
    for model, sizes in (
        (make_vim(image=(32, 32)), [(side, side) for side in range(32, 0, -4)]),
        (make_plain_mamba(), [(side, side) for side in (64, 48, 32, 16)]),
        (make_vim(image=(16, 32)), [(16, 32), (12, 24), (8, 16), (4, 8)]),
        (make_vim(image=(18, 18), stride=2), [(side, side) for side in range(18, 2, -2)]),
    ):
        found, share = [], 1.0
        for _ in sizes:
            found.append(choose_image_size(model, share))
            small = ssmcompress.load(model, image_size=found[-1])
            small.mark_compressed()  # counted as run
            reached = flops(small)["full"] / flops(model)["full"]
            assert reached <= share
            share = reached - 1e-9
        with pytest.raises(InputError, match=f"cannot reach {share:.1%}: a smaller image leaves {share:.1%} at least"):
            choose_image_size(model, share)
        assert found == sizes


@pytest.mark.parametrize("make", [make_vim, make_plain_mamba])
def test_a_smaller_image_changes_the_position_embedding_alone(make):
    model = make()
    size = choose_image_size(model, 0.7)
    small, plain = shrink_image(model, size), ssmcompress.load(model, image_size=size)
    assert (small.config.image_size, small.length < model.length) == (size, True)
    assert all(torch.equal(value, plain.state_dict()[name]) for name, value in small.state_dict().items())
    changed = {name for name, value in model.state_dict().items() if value.shape != small.state_dict()[name].shape}
    assert all("pos_embed" in name for name in changed)


@pytest.mark.parametrize("make", [make_vim, make_plain_mamba, make_vit, make_vmamba])
def test_a_model_of_smaller_images_is_saved_and_loaded(make, tmp_path):
    model = make()
    small = shrink_image(model, choose_image_size(model, 0.7))
    loaded = ssmcompress.load(ssmcompress.save(small, tmp_path / "small"))
    assert loaded.plan is not None
    assert torch.equal(loaded(images_of(small)), small(images_of(small)))


@pytest.mark.parametrize("make", [make_vim, make_plain_mamba])
def test_the_classifier_of_a_smaller_image_is_refitted_to_the_dense_logits(make):
    model = make()
    size = choose_image_size(model, 0.7)
    images = torch.nn.functional.avg_pool2d(images_of(model, 400), 3, 1, 1)
    fitted, others = to_batches(model, images[:300]), to_batches(model, images[300:])
    small = shrink_image(model, size, fitted)
    plain = ssmcompress.load(model, image_size=size)
    assert (small.config.image_size, small.token_counts()[0]) == (size, small.length)
    same = {name for name, value in small.state_dict().items() if torch.equal(value, plain.state_dict()[name])}
    classifier = next(name for name, module in model.named_modules() if module is model.classifier)
    assert set(small.state_dict()) - same == {f"{classifier}.weight", f"{classifier}.bias"}
    resized = torch.cat([batch.images for batch in resize_batches(others, model, small)])
    assert resized.shape[2:] == size
    with torch.no_grad():
        dense = model(images[300:])
        before, after = (float(CLASSIFICATION.distance(dense, m(resized)).sum()) for m in (plain, small))
    assert after < 0.8 * before


def test_an_image_of_the_same_size_leaves_the_classifier_as_it_is(vim, images):
    copy = ssmcompress.load(vim)
    copy.preprocessing = vim.preprocessing
    refit_classifier(copy, vim, to_batches(vim, images))
    assert torch.equal(copy.classifier.weight, vim.classifier.weight)
    with pytest.raises(InputError, match="1 different image to refit the classifier on"):
        shrink_image(vim, (8, 8), to_batches(vim, images[:1].expand(4, -1, -1, -1)))


def test_pictures_are_prepared_for_the_smaller_size_and_tensors_resized(vim, class_folders):
    pictures = choose_images(vim, DataOptions(data=str(class_folders))).measured
    small = ssmcompress.load(vim, image_size=8)
    small.preprocessing = vim.preprocessing
    prepared = next(iter(resize_batches(pictures, vim, small)))
    first = pictures.source.read(pictures.index[0])
    assert torch.equal(prepared.images[0], small.transform()(first))
    assert prepared.index == next(iter(pictures)).index
    # With a custom transform, its resulting tensor is resized.
    transform = vim.transform()
    own = Batches(pictures.source, lambda picture: 0 * transform(picture) + 7, pictures.index)
    for batches in (own, to_batches(vim, torch.full((3, 3, 16, 16), 7.0))):
        resized = next(iter(resize_batches(batches, vim, small))).images
        assert resized.shape[1:] == (3, 8, 8)
        torch.testing.assert_close(resized, torch.full_like(resized, 7.0))


# ----------------------------------------------------------------------------------------------------------- the rows


def test_all_axes_are_searched_for_and_what_was_measured_is_kept(tmp_path):
    model, images = make_vim(depth=3), images_of(make_vim(), 40)
    options = {"ratios": [0.3], "methods": ["naive", "all axes"], "output": tmp_path / "rows"}
    _, naive, row = ssmcompress.compare(model, images, **options)["rows"]
    assert row["flops_share"] <= naive["flops_share"] + 1e-9
    assert row.get("trims") or row["stages"]
    assert row["kl"] < naive["kl"]
    measured = json.loads((tmp_path / "rows" / "sensitivity-axes.json").read_text())
    assert {option["axis"] for option in measured["axes"]} == {"states", "channels", "layers"}


@pytest.mark.parametrize("make", [make_vim, make_plain_mamba])
def test_rows_of_other_axes_stay_below_their_level_and_are_kept(make, tmp_path):
    model = make(depth=3, d_model=32, d_state=8)
    images = images_of(model, 40)
    names = [name for name in AXIS_METHODS if name != "all axes"]
    options = {"methods": ["naive", *names], "output": tmp_path / "rows"}
    found = ssmcompress.compare(model, images, ratios=[0.3], **options)
    rows = {row["method"]: row for row in found["rows"]}
    assert list(rows) == ["dense", "naive", *names]
    level = rows["naive"]["flops_share"]
    for name in names:
        row = rows[name]
        assert row["flops_share"] <= level + 1e-9, name
        assert set(rows["naive"]) <= set(row), name
        assert (row["images"], row["kl"] > 0, row["latency_ms"] > 0) == (20, True, True), name
    for axis in ("states", "channels", "layers"):
        row = rows[f"{axis}, reconstructed"]
        assert (list(row["trims"]), row["stages"]) == ([axis], [])
    plain, small = rows["smaller image"], rows["smaller image, reconstructed"]
    assert (plain["image_size"], plain["flops"]) == (small["image_size"], small["flops"])
    assert plain["kl"] != small["kl"]
    assert small["image_size"][0] < model.config.image_size[0]
    assert "trims" not in small
    assert "image_size" not in rows["states, reconstructed"]
    lines = {line["method"]: line for line in csv.DictReader((tmp_path / "rows" / "compare.csv").open())}
    assert lines["states, reconstructed"]["trims"] == f"states:{rows['states, reconstructed']['trims']['states']}"
    assert lines["smaller image, reconstructed"]["image_size"] == "x".join(map(str, small["image_size"]))
    file = tmp_path / "rows" / "compare.json"
    value = json.loads(file.read_text())
    value["rows"] = [{**row, "seconds": -1.0} for row in value["rows"] if row["method"] != small["method"]]
    file.write_text(json.dumps(value))
    again = ssmcompress.compare(model, images, ratios=[0.3], **options)["rows"]
    assert [row["seconds"] == -1.0 for row in again] == [True] * (len(again) - 1) + [False]
    assert {**again[-1], "seconds": 0} | timed(small) == {**small, "seconds": 0}
    value["rows"][3]["trims"] = {"states": "x"}
    file.write_text(json.dumps(value))
    with pytest.raises(InputError, match="not a comparison of ssmcompress"):
        ssmcompress.compare(model, images, ratios=[0.3], **options)


def timed(row):
    return {key: value for key, value in row.items() if key.startswith("latency")}


def test_a_smaller_image_is_compared_with_the_dense_model_on_the_same_images(vim, class_folders):
    """The metrics of the row against both models on the pictures, each with its own transform."""
    data = {"data": str(class_folders), "eval_data": str(class_folders)}
    row = ssmcompress.compare(vim, **data, ratios=[0.3], methods=["smaller image, reconstructed"])["rows"][-1]
    pictures = choose_images(vim, DataOptions(**data))
    small = shrink_image(vim, tuple(row["image_size"]), pictures.calibration)
    with torch.no_grad():
        dense, ours = (
            torch.cat([m(torch.stack([m.transform()(pictures.measured.source.read(i))])) for i in range(20)])
            for m in (vim, small)
        )
    assert row["agreement"] == pytest.approx(100 * float((dense.argmax(1) == ours.argmax(1)).float().mean()))
    assert row["kl"] == pytest.approx(float(CLASSIFICATION.distance(dense, ours).mean()), abs=1e-5)
    labels = torch.tensor(pictures.measured.source.labels)
    assert row["top1"] == pytest.approx(100 * float((ours.argmax(1) == labels).float().mean()))


def test_rows_that_cannot_be_had_say_why(vim, images, tmp_path):
    found = ssmcompress.compare(vim, images_of(vim, 8), flops=[0.4], methods=AXIS_METHODS)
    failed = {row["method"]: row["failed"] for row in found["rows"] if row.get("failed")}
    assert "cannot reach 40.0%: states leave" in failed["states, reconstructed"]
    assert "4 images to search on: expected at least 16" in failed["all axes"]
    models = axis_models(vim, images, tmp_path)
    models.images = choose_images(vim, DataOptions())  # photographs that come with the package
    with pytest.raises(InputError, match="reconstruction needs images of your own"):
        models.build("states", 0.7)


def test_a_model_that_is_within_the_level_stays_as_it_is(vim, images, tmp_path):
    models = axis_models(vim, images, tmp_path)
    for axis in ("states", "channels", "layers", "all", "image"):
        same = models.build(axis, remaining_share(vim, ()))
        assert torch.equal(same(images), vim(images))


def test_methods_of_other_axes_are_asked_for(vim):
    for search, reconstruct in ((False, False), (True, False), (False, True)):
        names = {m.name for m in choose_methods(vim, None, search=search, reconstruct=reconstruct)}
        assert not names & set(TRIMMING)
        assert "smaller image" in names
        assert ("smaller image, reconstructed" in names) == reconstruct
    assert choose_methods(vim, None, search=True, reconstruct=True) == tuple(
        m for m in METHODS if not m.of_levels and m.importance not in ("attention", "keys")
    )
    assert [m.name for m in choose_methods(vim, AXIS_METHODS)] == AXIS_METHODS


def test_a_smaller_image_needs_no_images_of_ones_own(vim):
    """Sample photographs suffice, as nothing is fitted on them."""
    row = next(row for row in compare_stand_in(vim)["rows"] if row["method"] == "smaller image")
    assert row["image_size"][0] < 16
    assert row["agreement"] is not None


def compare_stand_in(model):
    with TemporaryDirectory() as folder:
        request = CompareRequest(ratios=(0.3,), methods=("smaller image",), measure=MeasureOptions(latency=False))
        return compare_methods(model, request, folder)


def test_a_smaller_image_of_an_older_version_keeps_its_figures_under_the_new_name(vim, tmp_path):
    images, options = images_of(vim, 40), {"ratios": [0.3], "output": tmp_path / "rows"}
    names = ["smaller image", "smaller image, reconstructed"]
    found = ssmcompress.compare(vim, images, methods=names[1:], **options)
    file = tmp_path / "rows" / "compare.json"
    older = {**found, "format_version": 1, "rows": [found["rows"][0], {**found["rows"][1], "method": names[0]}]}
    file.write_text(json.dumps(older))
    again = ssmcompress.compare(vim, images, methods=names, **options)
    assert again["rows"][1] == found["rows"][1]
    assert [row["method"] for row in again["rows"]] == ["dense", names[1], names[0]]
    assert again["rows"][2]["kl"] != again["rows"][1]["kl"]
    assert json.loads(file.read_text())["format_version"] > 1


def test_methods_of_other_axes_may_use_all_of_the_flops_that_are_asked_for(vim):
    """Token counts are integers, so a token plan stays below it."""
    level = make_levels(vim, None, [0.3])[0]
    assert level.budget == level.flops
    assert replace(level, asked=0.75).budget == 0.75


def test_a_search_that_need_not_drop_anything_has_a_row(vim):
    """A ratio so small that no token is dropped."""
    row = ssmcompress.compare(vim, images_of(vim, 8), ratios=[0.01], methods=["search"])["rows"][-1]
    assert (row["agreement"], row["stages"]) == (100.0, [])
