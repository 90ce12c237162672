"""Results of `visualize`: the models, the images, metrics over all of them, and the folder."""

import io
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from command_line import call, call_json, refused
from conftest import images_of, make_plain_mamba, make_vim, make_vit, write_class_folders, write_image
from PIL import Image
from segmenters import make_vim_upernet, write_scenes

import ssmcompress
from ssmcompress.compression.trim.layers import drop_layers
from ssmcompress.errors import InputError
from ssmcompress.files import MODEL_FILE, check_target
from ssmcompress.jobs.attention_pictures import (
    ImageView,
    ModelView,
    StageView,
    choose_colours,
    draw_image,
    draw_summary,
    paint_map,
)
from ssmcompress.jobs.shown import WRONG, choose_shown
from ssmcompress.jobs.survey import MapOptions, Prediction, Survey, attend_all, correlate
from ssmcompress.jobs.variants import list_variants, match_layers
from ssmcompress.jobs.visualize import VisualizeRequest, name_layers, visualize
from ssmcompress.pruning.alignment import UNALIGNED, Alignment
from ssmcompress.pruning.plan import Plan, Stage


class TestVariants:
    def test_naive_and_aligned_are_the_dense_weights_with_the_plan(self):
        dense = make_vim()
        plan = ssmcompress.calibrate(dense, images_of(dense, 6), ratio=0.4, stages=(1, 2), importance="saliency")
        pruned = ssmcompress.prune(dense, plan)
        reconstructed = ssmcompress.reconstruct(pruned, dense, images_of(dense, 16))
        variants = list_variants(reconstructed, dense)
        assert list(variants) == ["dense", "naive", "aligned", "reconstructed"]
        assert variants["reconstructed"] is reconstructed
        images = images_of(dense, 4, seed=2)
        naive = ssmcompress.prune(dense, replace(plan, alignment=UNALIGNED))
        assert torch.equal(variants["naive"](images), naive(images))
        assert torch.equal(variants["aligned"](images), pruned(images))

    def test_of_a_file(self, tmp_path):
        dense = make_vim()
        plan = ssmcompress.calibrate(dense, images_of(dense, 6), ratio=0.4, stages=(1,), importance="saliency")
        pruned = ssmcompress.prune(dense, plan)
        loaded = ssmcompress.load(ssmcompress.save(pruned, tmp_path / "pruned"))
        variants = list_variants(loaded, dense)
        assert list(variants) == ["dense", "naive", "aligned"]
        images = images_of(dense, 4)
        assert torch.equal(variants["aligned"](images), pruned(images))

    def test_without_alignment(self):
        dense = make_vim()
        assert list(list_variants(ssmcompress.prune(dense, ratio=0.3, alignment=False), dense)) == ["dense", "naive"]

    def test_attention_has_nothing_to_align(self):
        dense = make_vit()
        assert list(list_variants(ssmcompress.prune(dense, ratio=0.3), dense)) == ["dense", "naive"]

    def test_without_the_dense_model(self):
        assert list(list_variants(ssmcompress.prune(make_vim(), ratio=0.3), None)) == ["pruned"]

    def test_dense_alone(self):
        assert list(list_variants(make_vim(), None)) == ["dense"]

    def test_trimmed(self):
        dense = make_vim()
        smaller = drop_layers(dense, [2])
        assert list(list_variants(smaller, dense)) == ["dense", "pruned"]
        # Layer 3 of the dense model is the second one now.
        assert match_layers(smaller, (2, 3)) == (2,)
        with pytest.raises(InputError, match="the model no longer has layers 2: expected some of 1, 3, 4"):
            match_layers(smaller, (2,))


class TestCorrelation:
    def test_is_pearson_on_the_patches_that_count(self):
        generator = torch.Generator().manual_seed(0)
        maps, others = torch.randn(2, 3, 4, 5, generator=generator)
        where = torch.rand(3, 4, 5, generator=generator) < 0.6
        expected = [np.corrcoef(a[w].numpy(), b[w].numpy())[0, 1] for a, b, w in zip(maps, others, where, strict=True)]
        assert correlate(maps, others, where) == pytest.approx(expected, abs=1e-9)

    def test_is_none_where_it_is_not_defined(self):
        maps = torch.rand(2, 4, 4)
        where = torch.zeros(2, 4, 4, dtype=torch.bool)
        where[0, 0, :2] = True
        where[1] = True
        maps[1] = 0.5
        assert correlate(maps, torch.rand(2, 4, 4), where) == [None, None]

    def test_of_a_model_with_itself(self):
        model = make_vim()
        found = attend_all({"a": model, "b": model}, images_of(model), MapOptions((3, 4), "row"))
        assert correlate(found["a"].maps, found["b"].maps) == pytest.approx([1.0] * 5)


def survey_of(verdicts: dict[str, list[bool | None]], labelled: bool = True) -> Survey:
    size = len(next(iter(verdicts.values())))
    predictions = {name: [Prediction(1, 0.5, right, None, None) for right in found] for name, found in verdicts.items()}
    return Survey(list(range(100, 100 + size)), [1] * size if labelled else None, predictions)


class TestChoice:
    def test_takes_of_each_group_in_turn(self):
        survey = survey_of(
            {
                "dense": [True] * 90 + [False] * 10,
                "naive": [False] * 10 + [True] * 90,
                "aligned": [True] * 5 + [False] * 5 + [True] * 90,
                "reconstructed": [True] * 100,
            }
        )
        choice = choose_shown(survey, 6, seed=0)
        groups = [group for _, group in choice.rows]
        assert groups == [
            *["naive wrong, aligned right"] * 2,
            *["naive and aligned wrong"] * 2,
            *["naive and aligned right"] * 2,
        ]
        assert [5 <= row < 10 for row, group in choice.rows if group == "naive and aligned wrong"] == [True] * 2
        assert choice.groups == {
            "naive wrong, aligned right": 5,
            "naive and aligned wrong": 5,
            "naive and aligned right": 80,
            WRONG: 10,
        }
        assert "aligned right: 5 images" in choice.rule

    def test_does_not_depend_on_how_good_a_map_looks(self):
        verdicts = {"dense": [True] * 50, "naive": [False, True] * 25, "aligned": [True] * 50}
        plain, changed = survey_of(verdicts), survey_of(verdicts)
        changed.predictions["aligned"] = [
            replace(row, correlation=i / 50) for i, row in enumerate(changed.predictions["aligned"])
        ]
        assert choose_shown(plain, 6, seed=3) == choose_shown(changed, 6, seed=3)
        assert choose_shown(plain, 6, seed=3).rows != choose_shown(plain, 6, seed=4).rows

    def test_images_that_the_dense_model_gets_wrong_come_last(self):
        survey = survey_of({"dense": [False] * 5 + [True], "naive": [False] * 6})
        assert [group for _, group in choose_shown(survey, 3, seed=0).rows] == ["naive wrong", WRONG, WRONG]

    def test_unlabelled(self):
        survey = survey_of({"dense": [None] * 4, "naive": [True, False, True, True]}, labelled=False)
        choice = choose_shown(survey, 4, seed=0)
        assert sorted(group for _, group in choice.rows) == ["naive right"] * 3 + ["naive wrong"]

    def test_dense_alone(self):
        survey = survey_of({"dense": [True, False, True, True]})
        assert {group for _, group in choose_shown(survey, 9, seed=0).rows} == {"dense right", "dense wrong"}

    def test_segmentation_is_spread_over_the_order(self):
        survey = survey_of({"dense": [None] * 5, "naive": [None] * 5})
        shares = [0.5, 0.9, 0.1, 0.3, 0.7]
        survey.predictions["naive"] = [Prediction(None, share, None, None, None) for share in shares]
        assert [shares[row] for row, _ in choose_shown(survey, 3, seed=0).rows] == [0.1, 0.5, 0.9]


def view_of(kept: np.ndarray, values: np.ndarray) -> ModelView:
    stage = StageView(kept, values)
    return ModelView(Prediction(0, 0.9, True, 0.5, 0.4), "a $x_1$ 90%", values, kept, [stage])


class TestPictures:
    def test_dropped_patches_have_no_colour_and_kept_ones_that_of_the_map(self):
        photo = Image.new("RGB", (32, 32), (200, 30, 30))
        kept = np.arange(16).reshape(4, 4) % 2 == 0
        values = np.linspace(0.1, 1, 16).reshape(4, 4)
        picture = np.asarray(paint_map(photo, view_of(kept, values), *choose_colours(0.1, 1.0)), dtype=int)
        spread = picture.max(2) - picture.min(2)
        wide = np.kron(kept, np.ones((56, 56))) > 0
        assert spread[~wide].max() == 0
        assert spread[wide].min() > 30

    def test_scale_of_both_signs_is_around_zero(self):
        norm, _ = choose_colours(-0.5, 0.2)
        assert (norm.vmin, norm.vmax) == (-0.5, 0.5)
        norm, _ = choose_colours(-0.01, 0.2)
        assert (norm.vmin, norm.vmax) == (-0.01, 0.2)

    def test_one_scale_for_all_models_of_an_image(self):
        kept = np.ones((4, 4), bool)
        models = {"dense": view_of(kept, np.full((4, 4), 3.0)), "naive": view_of(kept, np.full((4, 4), -1.0))}
        assert ImageView("x", "", None, Image.new("RGB", (16, 16)), models).scale() == (-1.0, 3.0)

    @pytest.mark.parametrize("name", ["<script>" * 2000, "$\\frac$", "\x1b[31m\n\x00", "衬衫" * 50, ""])
    def test_hostile_names_are_drawn(self, name):
        kept = np.ones((3, 5), bool)
        view = view_of(kept, np.zeros((3, 5)))
        image = ImageView(name, name, name, Image.new("RGB", (50, 30)), {name: replace(view, said=name)})
        drawn = Image.open(io.BytesIO(draw_image(image, ["after layer 1:\n5 of 15 kept"], "row")))
        assert drawn.width < 1500
        assert drawn.height < 1500

    def test_nothing_to_summarise_of_a_dense_model(self):
        survey = survey_of({"dense": [True] * 3})
        survey.kept = {"dense": np.ones((4, 4))}
        assert draw_summary(survey, "row") is None


@pytest.fixture(scope="module")
def shown_once(tmp_path_factory) -> tuple[Path, dict]:
    """A folder that `visualize` wrote of a pruned model, and what it returned."""
    folder = tmp_path_factory.mktemp("visualize")
    dense, images = make_vim(), write_class_folders(folder)
    pruned = ssmcompress.prune(dense, ratio=0.4, stages=(1, 2))
    request = VisualizeRequest(data=replace(VisualizeRequest().data, data=str(images)), images=3)
    return folder / "out", visualize(pruned, request, folder / "out", dense=dense)


class TestFolder:
    def test_has_pictures_a_page_and_json(self, shown_once):
        folder, value = shown_once
        assert sorted(file.name for file in folder.iterdir()) == value["files"]
        assert {"attention-01.png", "attention-03.png", "summary.png", "index.html"} <= {*value["files"]}
        assert json.loads((folder / "visualize.json").read_text()) == value
        for file in folder.glob("*.png"):
            Image.open(file).load()
        page = (folder / "index.html").read_text()
        assert "http:" not in page
        assert "https:" not in page
        assert "data:image/png" in page

    def test_says_what_the_model_does(self, shown_once):
        _, value = shown_once
        assert value["stages"] == [
            {"after": 1, "kept": 11, "of": 17, "importance": "clip"},
            {"after": 2, "kept": 7, "of": 17, "importance": "clip"},
        ]
        for image in value["images"]:
            for name in ("naive", "aligned"):
                shown = image["variants"][name]
                counts = [np.sum(stage["kept"]) for stage in shown["stages"]]
                assert counts == [10, 6]  # patches, without the class token
                first = shown["stages"][0]
                ranks = [rank for row in first["ranks"] for rank in row]
                assert sorted(ranks) == list(range(1, 17))
                kept = [rank for rank, kept in zip(ranks, np.ravel(first["kept"]), strict=True) if kept]
                assert sorted(kept) == list(range(1, 11))
                scores = dict(zip(ranks, np.ravel(first["scores"]), strict=True))
                assert scores[1] == max(scores.values())
                mapped = np.array([[cell is not None for cell in row] for row in shown["map"]])
                assert np.array_equal(mapped, np.array(shown["stages"][1]["kept"]) == 1)

    def test_figures_are_of_all_images(self, shown_once):
        _, value = shown_once
        assert value["data"]["images"] == 20
        figures = {variant["name"]: variant["figures"] for variant in value["variants"]}
        assert figures["dense"]["correlation"] is None
        assert figures["naive"]["correlation_images"] == 20
        assert figures["naive"]["correlation_low"] < figures["naive"]["correlation_high"]
        assert set(value["kept_share"]) == {"naive", "aligned"}
        assert np.mean(value["kept_share"]["naive"]) == pytest.approx(6 / 16, abs=1e-3)

    def test_no_folder_names_of_the_data(self, shown_once):
        folder, value = shown_once
        assert not any(str(folder.parent) in image["name"] for image in value["images"])

    def test_is_not_replaced_without_force(self, shown_once):
        folder, value = shown_once
        dense = make_vim()
        request = VisualizeRequest(data=replace(VisualizeRequest().data, data=str(folder.parent / "images")), images=1)
        with pytest.raises(InputError, match="exists"):
            visualize(dense, request, folder)
        assert json.loads((folder / "visualize.json").read_text()) == value

    def test_does_not_depend_on_the_batch_size(self, tmp_path):
        dense, images = make_vim(), write_class_folders(tmp_path)
        values = []
        for size in (3, 20):
            data = replace(VisualizeRequest().data, data=str(images), batch_size=size)
            pruned = ssmcompress.prune(dense, ratio=0.4, stages=(1, 2))
            request = VisualizeRequest(data=data, images=2)
            values.append(visualize(pruned, request, tmp_path / f"out{size}", dense=dense))
        first, second = ([image["name"] for image in value["images"]] for value in values)
        assert first == second
        first, second = (value["variants"][1]["figures"] for value in values)
        assert first == pytest.approx(second, abs=1e-5)


def test_force_replaces_only_what_visualize_wrote(tmp_path):
    dense, images = make_vim(), write_class_folders(tmp_path)
    request = VisualizeRequest(data=replace(VisualizeRequest().data, data=str(images)), images=1)
    folder = tmp_path / "out"
    visualize(dense, request, folder)
    visualize(dense, request, folder, force=True)
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match=r"notes\.txt"):
        visualize(dense, request, folder, force=True)
    assert (folder / "notes.txt").read_text() == "mine"


def test_force_never_removes_a_model_or_its_neighbours(tmp_path):
    """A folder of another kind is not replaced, regardless of its files, nor one with an unlisted file."""
    dense, images = make_vim(), write_class_folders(tmp_path)
    request = VisualizeRequest(data=replace(VisualizeRequest().data, data=str(images)), images=1)
    pruned = ssmcompress.prune(dense, ratio=0.4)
    model = ssmcompress.save(pruned, tmp_path / "model")
    before = sorted(file.name for file in model.iterdir())
    with pytest.raises(InputError, match="is the folder of a model"):
        visualize(pruned, request, model, dense=dense, force=True)
    assert sorted(file.name for file in model.iterdir()) == before
    # README.md is a file of a model's folder, but not of one with pictures.
    visualize(pruned, request, model / "attention", dense=dense)
    (model / "attention" / "README.md").write_text("mine")
    for write in (
        lambda: visualize(pruned, request, model / "attention", dense=dense, force=True),
        lambda: check_target(model, force=True, folder=MODEL_FILE),
    ):
        with pytest.raises(InputError, match=r"README\.md|attention"):
            write()
    # Pictures are not replaced by a model either.
    out = tmp_path / "out"
    visualize(pruned, request, out, dense=dense)
    with pytest.raises(InputError, match="has pictures of `visualize`"):
        ssmcompress.save(pruned, out, force=True)
    assert (out / "index.html").is_file()


def test_trimmed_models_have_the_layers_of_the_dense_one(tmp_path):
    """Maps of a model without a layer are of the same layers as those of the dense model, and it says which."""
    dense, images = make_vim(depth=6), write_class_folders(tmp_path)
    smaller = ssmcompress.prune(drop_layers(dense, [2, 6]), ratio=0.3, stages=(1, 2))
    data = replace(VisualizeRequest().data, data=str(images))
    value = visualize(smaller, VisualizeRequest(data=data, images=1), tmp_path / "out", dense=dense)
    assert value["layers"] == [4, 5, 6]
    assert [variant["layers"] for variant in value["variants"]] == [[4, 5, 6], [4, 5]]
    assert [stage["after"] for stage in value["stages"]] == [1, 3]
    # The same numbers if the dense model is missing.
    alone = visualize(smaller, VisualizeRequest(data=data, images=1), tmp_path / "alone")
    assert alone["variants"][0]["layers"] == [4, 5]
    with pytest.raises(InputError, match="no longer has layers 2"):
        visualize(smaller, VisualizeRequest(data=data, layers=(2,)), tmp_path / "lost", dense=dense)


def test_kept_share_is_that_of_the_last_stage(tmp_path):
    """It does not depend on the layers of the maps."""
    dense, images = make_vim(), write_class_folders(tmp_path)
    pruned = ssmcompress.prune(dense, ratio=0.5, stages=(2,))
    data = replace(VisualizeRequest().data, data=str(images))
    value = visualize(pruned, VisualizeRequest(data=data, images=1, layers=(1,)), tmp_path / "out", dense=dense)
    assert np.mean(value["kept_share"]["naive"]) == pytest.approx(0.5)
    assert value["images"][0]["variants"]["naive"]["map"][0][0] is not None  # layer 1 has all of them


def test_segmentation_whose_tokens_enter_again(tmp_path):
    dense = make_vim_upernet()
    write_scenes(tmp_path / "scenes", 3)
    pruned = ssmcompress.prune(dense, Plan((Stage(1, 0.4), Stage(2, 0.4)), gap="bias", reenter=1))
    data = replace(VisualizeRequest().data, data=str(tmp_path / "scenes"))
    value = visualize(pruned, VisualizeRequest(data=data, images=1), tmp_path / "out", dense=dense)
    last = value["images"][0]["variants"]["naive"]
    assert np.mean(value["kept_share"]["naive"]) < 0.5
    assert sum(map(sum, last["stages"][-1]["kept"])) < 0.5 * np.prod(value["grid"])


def test_a_dense_model_has_no_dense_one(tmp_path, class_folders):
    request = VisualizeRequest(data=replace(VisualizeRequest().data, data=str(class_folders)))
    with pytest.raises(InputError, match="dense itself"):
        visualize(make_vim(), request, tmp_path / "out", dense=make_vim(depth=8))


@pytest.mark.parametrize(
    ("layers", "words"),
    [([4], "layer 4"), ([4, 5, 6], "layers 4 to 6"), ([1, 4], "layers 1, 4"), ([3, 4], "layers 3, 4")],
)
def test_layers_in_words(layers, words):
    assert name_layers(layers) == words


@pytest.mark.parametrize("make", [make_plain_mamba, make_vit])
def test_other_architectures(make, tmp_path):
    dense, images = make(), write_class_folders(tmp_path)
    pruned = ssmcompress.prune(dense, ratio=0.4)
    request = VisualizeRequest(data=replace(VisualizeRequest().data, data=str(images)), images=1)
    value = visualize(pruned, request, tmp_path / "out", dense=dense)
    assert "summary.png" in value["files"]


def test_segmentation(tmp_path):
    dense = make_vim_upernet()
    write_scenes(tmp_path / "scenes", 4)
    pruned = ssmcompress.prune(dense, ratio=0.4)
    request = VisualizeRequest(data=replace(VisualizeRequest().data, data=str(tmp_path / "scenes")), images=2)
    value = visualize(pruned, request, tmp_path / "out", dense=dense)
    assert {"attention-02.png", "segments-02.png", "index.html"} <= {*value["files"]}
    assert value["images"][0]["variants"]["naive"]["predicted"].endswith("% of the pixels")


@pytest.mark.usefixtures("in_an_empty_folder")
class TestCommand:
    def test_default_folder_is_inside_that_of_the_model(self, pruned_folder, class_folders):
        value = call_json("visualize", pruned_folder, "--data", class_folders, "--images", 2)
        assert [variant["name"] for variant in value["variants"]][:2] == ["dense", "naive"]
        assert (pruned_folder / "attention" / "index.html").is_file()

    def test_a_model_folder_with_pictures_is_replaced_with_force(self, tmp_path, class_folders):
        dense = make_vim()
        pruned = ssmcompress.prune(dense, ratio=0.4)
        folder = ssmcompress.save(pruned, tmp_path / "pruned")
        request = VisualizeRequest(data=replace(VisualizeRequest().data, data=str(class_folders)), images=1)
        visualize(pruned, request, folder / "attention", dense=dense)
        ssmcompress.save(pruned, folder, force=True)
        assert not (folder / "attention").exists()

    def test_says_what_was_skipped_and_that_nothing_was_measured(self, checkpoint):
        write_image(Path("pictures/a.png"), 1)
        write_image(Path("pictures/b.png"), 2)
        Path("pictures/c.png").write_bytes(b"broken")
        result = call("visualize", checkpoint, "--data", "pictures")
        assert "no labels in pictures" in result.stderr
        assert "skipped 1 unreadable images" in result.stderr
        assert Path("visualized/model/index.html").is_file()

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (["--layers", "9"], "expected one or several numbers from 1 to 4"),
            (["--method", "grad"], "expected one of row, xai, raw, rollout, attribution"),
        ],
    )
    def test_errors_leave_nothing(self, checkpoint, class_folders, options, message):
        assert message in refused("visualize", checkpoint, "--data", class_folders, "-o", "out", *options)


def test_alignment_is_shown_by_its_map():
    """Maps of models with and without alignment differ, with the same tokens left."""
    dense = make_vim()
    pruned = ssmcompress.prune(dense, ratio=0.4, stages=(1,), alignment=Alignment(True, True))
    variants = list_variants(pruned, dense)
    found = attend_all(variants, images_of(dense, 3), MapOptions((2,), "row"))
    assert torch.equal(found["naive"].kept, found["aligned"].kept)
    assert not torch.allclose(found["naive"].maps, found["aligned"].maps)
