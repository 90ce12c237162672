"""The library as users of Python type it: names of folders, loaders of any kind, and errors that name arguments."""

from __future__ import annotations

import ast
import importlib.resources
import json
import re
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import images_of, make_vim
from PIL import Image
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

import ssmcompress
from ssmcompress.data.images import Images
from ssmcompress.errors import InputError
from ssmcompress.evaluation.measure import compute_logits, measure
from ssmcompress.models.inputs import as_batches, to_batches

IMAGES, LABELS = images_of(make_vim(), 10), torch.arange(10)


@pytest.fixture
def pruned(vim):
    return ssmcompress.prune(vim, ratio=0.4)


# --------------------------------------------------------------------------------------------------- public names


def test_public_names_are_what_type_checkers_and_dir_see():
    tree = ast.parse(Path(ssmcompress.__file__).read_text(encoding="utf-8"))
    block = next(node for node in tree.body if isinstance(node, ast.If))
    imported = {alias.name for node in block.body for alias in node.names}
    assert imported == set(ssmcompress._HOME)
    assert set(ssmcompress.__all__) == imported | {"__version__"}
    assert dir(ssmcompress) == ssmcompress.__all__
    wanted = {"open_images", "Batches", "search", "compare", "flops", "InputError"}
    assert wanted <= set(ssmcompress.__all__)
    for name in ssmcompress.__all__:
        assert getattr(ssmcompress, name) is not None


def test_importing_the_package_imports_nothing_large():
    code = "import ssmcompress, sys; print([m for m in ('torch', 'numpy', 'timm', 'datasets') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_package_says_that_it_is_typed():
    assert importlib.resources.files("ssmcompress").joinpath("py.typed").is_file()
    text = (Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8")
    assert '"py.typed"' in text.partition("[tool.setuptools.package-data]")[2].partition("[tool.pytest")[0]


@pytest.mark.parametrize("name", [n for n in ssmcompress.__all__ if n[0].islower() and n != "ops"])
def test_public_functions_annotate_every_argument(name):
    function = getattr(ssmcompress, name)
    code = function.__code__
    arguments = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
    assert set(arguments) | {"return"} <= set(function.__annotations__)


# ----------------------------------------------------------------------------------------- names of images, loaders


def test_a_folder_is_named_wherever_images_are_taken(vim, class_folders):
    folder = str(class_folders)
    plan = ssmcompress.calibrate(vim, folder, ratio=0.4)
    assert (plan.calibration.images, plan.calibration.name) == (20, folder)
    pruned = ssmcompress.prune(vim, plan)
    rebuilt = ssmcompress.reconstruct(pruned, vim, class_folders)
    assert (rebuilt.find_record("reconstruction").name, rebuilt.find_record("reconstruction").images) == (folder, 20)
    result = ssmcompress.evaluate(rebuilt, folder, dense=vim)
    assert (result.images, result.labelled) == (20, True)
    recipe = ssmcompress.Recipe(epochs=1, batch_size=10)
    tuned = ssmcompress.finetune(pruned, folder, dense=vim, recipe=recipe, held_out=folder).model
    assert tuned.find_record("finetuning").held_out == 20


def test_images_and_names_are_what_batches_of_them_are(vim, class_folders):
    images = ssmcompress.open_images(class_folders, num_classes=10)
    batches = ssmcompress.Batches(images, vim.transform(), batch_size=7)
    expected = ssmcompress.evaluate(vim, batches)
    assert ssmcompress.evaluate(vim, images) == ssmcompress.evaluate(vim, str(class_folders)) == expected


def test_unreadable_images_of_a_named_folder_are_warned_about_once(vim, class_folders):
    (class_folders / "class3" / "0.png").write_bytes(b"not an image")
    with pytest.warns(UserWarning, match=r"left out 1 unreadable images: .*class3/0.png") as warned:
        plan = ssmcompress.calibrate(vim, class_folders)
    assert plan.calibration.images == 19
    assert sum("unreadable" in str(warning.message) for warning in warned) == 1


class Pairs(Dataset):
    """Single images with labels, by number only."""

    def __init__(self, transform=None):
        self.transform = transform

    def __len__(self):
        return len(IMAGES)

    def __getitem__(self, i):
        image = IMAGES[i]
        return (self.transform(image) if self.transform else image), int(LABELS[i])


class Stream(IterableDataset):
    def __iter__(self):
        return iter(zip(IMAGES, LABELS.tolist(), strict=True))


def named(image="pixel_values", label="labels"):
    return [{image: IMAGES[i : i + 4], label: LABELS[i : i + 4], "idx": [0]} for i in (0, 4, 8)]


PARTS = list(zip(IMAGES.split(4), LABELS.split(4), strict=True))
KINDS = {
    "tensors and labels": lambda: (IMAGES, LABELS),
    "tensors and a list of labels": lambda: (IMAGES, LABELS.tolist()),
    "lists of two": lambda: [[a, b] for a, b in PARTS],
    "triples": lambda: [(a, b, torch.zeros(len(a))) for a, b in PARTS],
    "int32 labels": lambda: [(a, b.int()) for a, b in PARTS],
    "uint8 labels": lambda: [(a, b.to(torch.uint8)) for a, b in PARTS],
    "lists of labels": lambda: [(a, b.tolist()) for a, b in PARTS],
    "numpy": lambda: [(a.numpy(), b.numpy().astype(np.uint16)) for a, b in PARTS],
    "float64 and double": lambda: [(a.double(), b) for a, b in PARTS],
    "dicts": named,
    "dicts with other names": lambda: named("image", "Label"),
    "a generator": lambda: (part for part in PARTS),
    "an iterator of a loader": lambda: iter(DataLoader(Pairs(), 4)),
    "a loader": lambda: DataLoader(Pairs(), 4),
    "a loader of a tensor data set": lambda: DataLoader(TensorDataset(IMAGES, LABELS), 3),
    "a loader that shuffles": lambda: DataLoader(Pairs(), 3, shuffle=True),
    "a loader of lists of pairs": lambda: DataLoader(Pairs(), 4, collate_fn=list),
    "a data set": Pairs,
    "a subset": lambda: torch.utils.data.Subset(Pairs(), list(range(10))),
    "a stream": Stream,
    "a loader of a stream": lambda: DataLoader(Stream(), 4),
    "single images": lambda: list(zip(IMAGES, LABELS, strict=True)),
}


@pytest.mark.parametrize("kind", KINDS)
def test_labelled_data_of_every_kind_is_measured_alike(vim, kind):
    expected = ssmcompress.evaluate(vim, [(IMAGES, LABELS)])
    found = ssmcompress.evaluate(vim, KINDS[kind]())
    assert (found.images, found.labelled, found.top1, found.top5) == (10, True, expected.top1, expected.top5)
    assert found.loss == pytest.approx(expected.loss, abs=1e-5)


@pytest.mark.parametrize("kind", [*KINDS, "images alone", "batches alone", "one-tuples", "lists of single images"])
def test_any_data_calibrates_alike(vim, kind):
    more = {
        "images alone": IMAGES,
        "batches alone": IMAGES.numpy(),
        "one-tuples": DataLoader(TensorDataset(IMAGES), 4),
        "lists of single images": [list(part) for part in IMAGES.split(4)],
    }
    expected = ssmcompress.calibrate(vim, IMAGES).calibration
    found = ssmcompress.calibrate(vim, KINDS[kind]() if kind in KINDS else more[kind]).calibration
    assert (found.images, found.name) == (10, "images")
    for ours, theirs in zip(found.gap_deltas, expected.gap_deltas, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_labels_that_are_not_needed_may_be_anything(vim, pruned):
    data = [(IMAGES, torch.rand(10, 10)), (IMAGES + 1, ["a"] * 10)]
    assert ssmcompress.calibrate(vim, data).calibration.images == 20
    assert ssmcompress.reconstruct(pruned, vim, data).find_record("reconstruction").images == 20


def pictures(count=6):
    pixels = np.random.default_rng(0).integers(0, 256, (count, 20, 20, 3), dtype=np.uint8)
    return [Image.fromarray(value) for value in pixels]


@pytest.mark.parametrize("form", ["alone", "pairs", "dicts", "a batch of pictures"])
def test_pictures_are_prepared_by_the_model(vim, form):
    data = {
        "alone": pictures(),
        "pairs": [(picture, 1) for picture in pictures()],
        "dicts": [{"image": picture, "label": 1} for picture in pictures()],
        "a batch of pictures": [{"image": pictures(), "label": [1] * 6}],
    }[form]
    expected = torch.stack([vim.transform()(picture) for picture in pictures()])
    (batch,) = as_batches(vim, data, labelled=True)
    assert torch.equal(batch.images, expected)
    assert (batch.labels is None) == (form == "alone")


def test_a_data_set_of_datasets_is_read_as_its_file_is(vim):
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(10)})
    table = datasets.Dataset.from_dict({"image": pictures(), "label": list(range(6))}, features=features)
    assert ssmcompress.evaluate(vim, table).images == 6
    assert ssmcompress.evaluate(vim, table).labelled
    prepared = table.with_transform(
        lambda rows: {"pixel_values": [vim.transform()(p) for p in rows["image"]], "labels": rows["label"]}
    )
    assert ssmcompress.evaluate(vim, prepared) == ssmcompress.evaluate(vim, table)
    assert ssmcompress.evaluate(vim, DataLoader(prepared, 4)) == ssmcompress.evaluate(vim, table)
    with pytest.raises(InputError, match="several datasets: train, test; pass one"):
        ssmcompress.evaluate(vim, datasets.DatasetDict({"train": table, "test": table}))


# ----------------------------------------------------------------------------------- order, repetition, augmentation


def test_a_shuffled_or_augmented_loader_does_not_mix_up_images(vim):
    """Agreement of a model with itself is 100 % only if both get the same images."""
    torch.manual_seed(0)
    noisy = DataLoader(Pairs(lambda image: image + torch.randn(3, 1, 1)), 3, shuffle=True)
    result = ssmcompress.evaluate(vim, noisy, dense=vim)
    assert (result.agreement, result.kl) == (100.0, 0.0)
    pruned = ssmcompress.prune(vim, ssmcompress.calibrate(vim, noisy, ratio=0.4, importance="saliency"))
    record = ssmcompress.reconstruct(pruned, vim, noisy).find_record("reconstruction")
    assert record.images == 10
    assert record.kl_after <= record.kl_before or not record.kept


@pytest.mark.parametrize("change", [lambda images: images.flip(0), lambda images: images + 0.1])
def test_logits_of_an_earlier_pass_are_not_compared_with_other_images(vim, pruned, change):
    earlier = compute_logits(vim, [IMAGES[:5], IMAGES[5:]])
    expected = measure({"dense": vim, "row": pruned}, IMAGES)["row"]
    found = measure({"dense": earlier, "row": pruned}, [IMAGES[:5], IMAGES[5:]])["row"]
    assert (found.agreement, found.images) == (expected.agreement, 10)
    assert found.kl == pytest.approx(expected.kl, abs=1e-6)
    with pytest.raises(InputError, match="differ from the first pass: use a loader that neither shuffles nor augments"):
        measure({"dense": earlier, "row": pruned}, change(IMAGES))
    with pytest.raises(InputError, match="differ from the first pass"):
        measure({"dense": earlier, "row": pruned}, [IMAGES, IMAGES])


def test_an_iterator_is_evaluated_without_being_kept(vim, monkeypatch):
    monkeypatch.setattr("ssmcompress.data.any_batches.KEPT_BYTES", 1)
    assert ssmcompress.evaluate(vim, (part for part in IMAGES.split(2))).images == 10
    with pytest.raises(InputError, match=r"GiB of images, which have to be in memory .* pass a folder"):
        ssmcompress.calibrate(vim, (IMAGES for _ in iter(int, 1)))  # infinite


class Once:
    """Has a length, but yields its batches only once, like tqdm around a generator."""

    def __init__(self):
        self.batches = iter(IMAGES.split(5))

    def __len__(self):
        return 2

    def __iter__(self):
        yield from self.batches


def test_data_that_is_used_up_after_a_pass_is_said_to_be(vim):
    assert ssmcompress.evaluate(vim, Once()).images == 10
    with pytest.raises(
        InputError, match="in the first pass and none in the second: pass something that can be iterated repeatedly"
    ):
        ssmcompress.calibrate(vim, Once())


def test_an_iterator_of_held_out_images_serves_every_epoch(vim, pruned, class_folders):
    recipe = ssmcompress.Recipe(epochs=2, batch_size=10)
    held = iter([(IMAGES, LABELS)])
    tuned = ssmcompress.finetune(pruned, class_folders, dense=vim, recipe=recipe, held_out=held).model
    assert [entry["held_out"]["images"] for entry in tuned.find_record("finetuning").history] == [10, 10]


# -------------------------------------------------------------------------------------------------- what is refused


def refuse(data, message):
    with pytest.raises(InputError, match=message):
        ssmcompress.evaluate(make_vim(), data)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (LABELS + 1, "label 10: the model has classes 0 to 9"),
        (LABELS - 1, "label -1: the model has classes 0 to 9; leave out the labels"),
        (torch.eye(10), r"labels \(10, 10\) float32: expected class numbers, \(10,\) integers; labels.argmax\(1\)"),
        (torch.eye(10).long(), r"labels \(10, 10\) int64: .*argmax"),
        (LABELS.float(), r"labels \(10,\) float32: expected class numbers"),
        (LABELS[:, None], r"labels \(10, 1\) int64: expected class numbers, \(10,\) integers$"),
        (LABELS > 4, r"labels \(10,\) bool"),
        (LABELS[:9], "9 labels for 10 images"),
        ([str(i) for i in range(10)], r"labels \['0', '1', '2'\]: expected class numbers"),
        (np.array(["cat"] * 10), "an array of <U3: expected numbers"),
        (IMAGES, r"labels \(10, 3, 16, 16\) float32"),
    ],
    ids=lambda value: value[:30] if isinstance(value, str) else "",
)
def test_labels_that_are_no_classes_are_refused(labels, message):
    refuse([(IMAGES, labels)], message)


@pytest.mark.parametrize("labelled", [True, False], ids=["evaluate", "calibrate"])
@pytest.mark.parametrize(
    "data",
    [
        [[IMAGES[:5], IMAGES[5:]]],
        [(IMAGES[:5].numpy(), IMAGES[5:, :, :8, :8].numpy())],
        [[IMAGES[:2], IMAGES[2:4], IMAGES[4:6]]],
        [([IMAGES[:5], IMAGES[5:]], LABELS[:5])],
        [(IMAGES[0], IMAGES[1])],
    ],
    ids=["two views", "another size", "three views", "views and labels", "single images"],
)
def test_a_second_view_is_not_dropped(vim, data, labelled):
    message = r"labels \(.*\) float32: these are images again, .* pass one view of the images, or all as one batch"
    with pytest.raises(InputError, match=message):
        ssmcompress.evaluate(vim, data) if labelled else ssmcompress.calibrate(vim, data)


def test_masks_in_the_place_of_labels_are_no_second_view(vim):
    assert ssmcompress.calibrate(vim, [(IMAGES, IMAGES[:, :1])]).calibration.images == 10


def test_labels_of_a_module_of_other_code_are_held_against_its_outputs():
    module = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 16 * 16, 4))
    assert ssmcompress.evaluate(module, [(IMAGES, LABELS % 4)]).images == 10
    with pytest.raises(InputError, match="label 9: the model has classes 0 to 3"):
        ssmcompress.evaluate(module, [(IMAGES, LABELS)])
    with pytest.raises(InputError, match="the dense model has 10 classes and the model 4"):
        ssmcompress.evaluate(module, IMAGES, dense=make_vim())
    with pytest.raises(InputError, match="a Sequential does not say how to prepare images: pass batches of tensors"):
        ssmcompress.evaluate(module, "images")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ((IMAGES * 50).to(torch.uint8), r"images are uint8: expected floats, scaled to 0..1 and normalised"),
        ([IMAGES.permute(0, 2, 3, 1)], r"expected \(batch, 3, 16, 16\), channels first: images.permute\(0, 3, 1, 2\)"),
        (IMAGES[0], r"a tensor \(3, 16, 16\): expected images \(count, channels, height, width\)"),
        ([IMAGES[:, :, :8]], r"images \(10, 3, 8, 16\): expected \(batch, 3, 16, 16\); load the model with another"),
        ([IMAGES.flatten(1)], r"images \(10, 768\): expected \(batch, channels, height, width\)"),
        ([], "no images to measure on"),
        (IMAGES[:0], "no images to measure on"),
        (None, "None where images are expected: pass a folder, a tensor"),
        (3, "int where images are expected"),
        (["a.png", "b.png"], r"the data gives 'a.png' where images are expected.*; pass the folder"),
        ([Path("a.png")], r"the data gives 'a.png' where images are expected"),
        ([{"tokens": IMAGES}], "a batch with tokens: expected images under one of the names image"),
        ([{"image": IMAGES, "label": LABELS, "target": LABELS}], "label and target: expected one of them"),
        ([(IMAGES, LABELS), IMAGES], "some batches have labels and others have none"),
        ([(IMAGES[0], 1), IMAGES[1]], "some images have labels and others have none"),
        ([(1, IMAGES)], "the data gives tuple where images are expected"),
        ([np.array([None])], "an array of object: expected numbers"),
        ("no-such-folder", "no data at no-such-folder"),
    ],
    ids=lambda value: value[:30] if isinstance(value, str) else "",
)
def test_data_that_is_no_images_is_refused(data, message):
    refuse(data, message)


def test_grey_images_without_channels_are_told_where_to_add_them():
    with pytest.raises(InputError, match=r"add the channels with images\[:, None\]"):
        ssmcompress.evaluate(make_vim(channels=1), [IMAGES[:, 0]])


@pytest.mark.parametrize(
    ("images", "warns"), [(torch.rand(4, 3, 16, 16), True), (255 * torch.rand(4, 3, 16, 16), True), (IMAGES, False)]
)
def test_images_that_were_not_normalised_are_warned_about(vim, images, warns, recwarn):
    ssmcompress.calibrate(vim, images)
    texts = [str(warning.message) for warning in recwarn if "as if they were not normalised" in str(warning.message)]
    assert len(texts) == warns
    assert all("minus mean (0.485, 0.456, 0.406)" in text for text in texts)


@pytest.mark.parametrize("data", [IMAGES, DataLoader(Pairs(), 4), None], ids=["tensor", "loader", "None"])
def test_training_takes_images_that_it_can_augment(vim, pruned, data):
    with pytest.raises(InputError, match=r"to train on: expected a folder, open_images\(...\) or `Batches`"):
        ssmcompress.finetune(pruned, data, dense=vim)


# ------------------------------------------------------------------------------------------------- models and plans


CALLS = {
    "calibrate": lambda m: ssmcompress.calibrate(m, IMAGES),
    "make_plan": lambda m: ssmcompress.make_plan(m),
    "prune": lambda m: ssmcompress.prune(m, ratio=0.3),
    "evaluate": lambda m: ssmcompress.evaluate(m, IMAGES),
    "evaluate, dense": lambda m: ssmcompress.evaluate(make_vim(), IMAGES, dense=m),
    "reconstruct": lambda m: ssmcompress.reconstruct(m, make_vim(), IMAGES),
    "reconstruct, dense": lambda m: ssmcompress.reconstruct(ssmcompress.prune(make_vim(), ratio=0.3), m, IMAGES),
    "finetune": lambda m: ssmcompress.finetune(m, "images"),
    "flops": lambda m: ssmcompress.flops(m),
    "search": lambda m: ssmcompress.search(m, IMAGES, flops=0.6),
    "compare": lambda m: ssmcompress.compare(m, IMAGES),
    "save": lambda m: ssmcompress.save(m, "nowhere"),
    "export_onnx": lambda m: ssmcompress.export_onnx(m, "nowhere.onnx"),
    "verify_onnx": lambda m: ssmcompress.verify_onnx(m, "nowhere.onnx"),
    "compress": lambda m: ssmcompress.compress(m, ssmcompress.make_plan(make_vim()), "nowhere"),
    "finetune_folder": lambda m: ssmcompress.finetune_folder(m, "nowhere"),
}


@pytest.mark.parametrize("call", CALLS)
def test_what_is_no_model_is_refused_with_the_way_to_one(call):
    argument = "dense" if call.endswith("dense") else r"(model|pruned)"
    with pytest.raises(InputError, match=rf"`{argument}` is the name 'model.pt': pass the model, load\('model.pt'\)"):
        CALLS[call]("model.pt")
    with pytest.raises(InputError, match=rf"`{argument}` is a dict: pass load\(...\) of the state dict"):
        CALLS[call](make_vim().state_dict())
    with pytest.raises(InputError, match=rf"`{argument}` is a Tensor: expected a model of ssmcompress.load"):
        CALLS[call](IMAGES)
    if not call.startswith("evaluate"):
        with pytest.raises(InputError, match=rf"`{argument}` is a Linear of other code: pass load"):
            CALLS[call](torch.nn.Linear(2, 2))


def test_pruning_by_a_ratio_is_pruning_by_the_plan_of_it(vim):
    plan = ssmcompress.make_plan(vim, ratio=0.4, stages=(1, 3), importance="l2", alignment=False)
    short = ssmcompress.prune(vim, ratio=0.4, stages=(1, 3), importance="l2", alignment=False)
    assert short.plan == ssmcompress.prune(vim, plan).plan
    assert short.plan.gap == "bias"
    assert ssmcompress.prune(vim).plan.stages == ssmcompress.make_plan(vim).stages
    assert ssmcompress.prune(vim, plan.to_dict()).plan == short.plan
    assert vim.plan is None
    with torch.no_grad():
        assert torch.equal(short(IMAGES), ssmcompress.prune(vim, plan)(IMAGES))


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((0.3,), {}, r"`plan` is 0.3: pass a share of tokens to remove as ratio=0.3"),
        (("plan.json",), {}, r"`plan` is the name 'plan.json': pass the plan, read_plan\('plan.json'\)"),
        (([1, 2],), {}, "`plan` is a list: expected a plan of make_plan"),
        (({"stages": 3},), {}, "not a pruning plan"),
        (
            (ssmcompress.Plan((ssmcompress.Stage(1, 0.3),)),),
            {"ratio": 0.3},
            "`plan` and `ratio`: the plan already sets that",
        ),
        ((), {"ratio": "30%"}, "`ratio` '30%': expected numbers, shares of tokens to remove"),
        ((), {"ratio": 30}, "ratio 30 after layer 1: expected a share"),
        ((), {"ratio": float("nan")}, "ratio nan after layer 1"),
        ((), {"ratio": True}, "ratio True after layer 1"),
        ((), {"ratio": (0.1, 0.2)}, "2 ratios for 3 stages"),
        ((), {"stages": "1,2"}, "`stages` '1,2': expected numbers, layers"),
        ((), {"stages": 2}, "`stages` 2: expected numbers, layers"),
        ((), {"stages": (1.5,)}, "a stage after layer 1.5: expected the number of a layer"),
        ((), {"importance": 3}, "unknown importance 3"),
        ((), {"importance": ["clip"]}, "1 importances for 3 stages: expected one, or one for each stage"),
        ((), {"alignment": "conv"}, "`alignment` 'conv': expected True, False or an Alignment"),
        ((ssmcompress.Plan((1, 0.3)),), {}, r"`stages` of a plan: expected Stage\(after, ratio\) values"),
    ],
)
def test_arguments_of_prune_are_checked_by_name(vim, arguments, options, message):
    with pytest.raises(InputError, match=message):
        ssmcompress.prune(vim, *arguments, **options)


def test_ratios_and_stages_may_be_arrays(vim):
    plan = ssmcompress.make_plan(vim, stages=np.array([1, 3]), ratio=torch.tensor([0.25, 0.5]))
    assert json.loads(json.dumps(plan.to_dict()))["stages"] == [s.to_dict() for s in plan.stages]
    assert [(s.after, s.ratio) for s in plan.stages] == [(1, 0.25), (3, 0.5)]


def test_calibrate_takes_a_plan_or_options(vim):
    with pytest.raises(InputError, match="`plan` and `ratio`: the plan already sets that"):
        ssmcompress.calibrate(vim, IMAGES, ssmcompress.make_plan(vim), ratio=0.5)
    with pytest.raises(InputError, match="`plan` is 0.5: pass a share of tokens to remove as ratio=0.5"):
        ssmcompress.calibrate(vim, IMAGES, 0.5)


# ------------------------------------------------------------------------------------------- search, compare, flops


@pytest.mark.parametrize("form", ["folder", "loader"])
def test_search_gives_a_plan_within_the_budget_that_prune_takes(vim, class_folders, form):
    data = str(class_folders) if form == "folder" else DataLoader(Pairs(), 4, shuffle=True)
    plan = ssmcompress.search(vim, data, flops=0.8, importance="l2", reconstruct=False)
    assert (plan.gap, plan.calibration.images) == ("calibrated", 20 if form == "folder" else 10)
    pruned = ssmcompress.prune(vim, plan)
    assert 0.5 < ssmcompress.flops(pruned)["full"] / ssmcompress.flops(vim)["full"] <= 0.8


def test_search_says_what_it_needs(vim, pruned):
    with pytest.raises(InputError, match="no budget: give `flops` or `latency`"):
        ssmcompress.search(vim, IMAGES)
    with pytest.raises(InputError, match="`flops` and `latency`: give `flops` or `latency`"):
        ssmcompress.search(vim, IMAGES, flops=0.5, latency=0.5)
    with pytest.raises(InputError, match=r"`flops` '60%': expected a share"):
        ssmcompress.search(vim, IMAGES, flops="60%")
    with pytest.raises(ssmcompress.BudgetError, match="out of reach"):
        ssmcompress.search(vim, IMAGES, flops=0.01)
    with pytest.raises(InputError, match="pruned already; expected the dense model"):
        ssmcompress.search(pruned, IMAGES, flops=0.5)


def test_compare_returns_rows_and_keeps_them_only_where_told(vim, class_folders, tmp_path, in_an_empty_folder):
    methods = ("naive", "clip, aligned")
    found = ssmcompress.compare(vim, str(class_folders), ratios=[0.4], methods=methods)
    assert [row["method"] for row in found["rows"]] == ["dense", *methods]
    assert {row["images"] for row in found["rows"]} == {10}
    assert json.loads(json.dumps(found)) == found
    assert list(Path().iterdir()) == []
    data, held = DataLoader(Pairs(), 4, shuffle=True), (IMAGES, LABELS)
    kept = ssmcompress.compare(vim, data, ratios=[0.4], methods=methods, eval_data=held, output=tmp_path / "rows")
    assert json.loads((tmp_path / "rows" / "compare.json").read_text())["rows"] == kept["rows"]
    assert kept["rows"][0]["top1"] == ssmcompress.evaluate(vim, held).top1
    with pytest.raises(InputError, match=r"`ratios` 0.3: expected several, \[0.3\]"):
        ssmcompress.compare(vim, IMAGES, ratios=0.3)
    with pytest.raises(InputError, match="images has 1 images: expected one to calibrate and one to measure on"):
        ssmcompress.compare(vim, IMAGES[:1])


def test_images_that_are_held_in_memory_are_checked_as_others_are(vim):
    with pytest.raises(InputError, match="label 10: the model has classes 0 to 9"):
        to_batches(vim, (IMAGES, LABELS + 1))
    with pytest.raises(InputError, match="no images in the data"):
        to_batches(vim, [])
    batches = to_batches(vim, (IMAGES, LABELS))
    (batch,) = batches
    assert torch.equal(batch.images, IMAGES)
    assert torch.equal(batch.labels, LABELS)
    assert len(set(batches.digests.tolist())) == 10


# ---------------------------------------------------------------------------------------------------- short to print


def shown(vim):
    images = Images("images", 60_000, None, None, tuple(range(10)) * 6000, classes=tuple(map(str, range(1000))))
    batches = ssmcompress.Batches(images, None, list(range(60_000)))
    batches.unreadable.update(range(1000))
    plan = ssmcompress.calibrate(vim, IMAGES, importance="saliency")
    rebuilt = ssmcompress.reconstruct(ssmcompress.prune(vim, plan), vim, IMAGES)
    stages = tuple(ssmcompress.Stage(2 * i + 1, 0.1 + i / 100, "similarity", "ordered") for i in range(11))
    records = [rebuilt.find_record("reconstruction"), rebuilt.learnt]
    return [images, batches, plan, plan.calibration, ssmcompress.Plan(stages), *records,
            ssmcompress.evaluate(vim, (IMAGES, LABELS)), ssmcompress.Recipe()]  # fmt: skip


def test_what_is_printed_is_short_and_has_no_tensors(vim):
    for value in shown(vim):
        assert len(repr(value)) < 700, type(value)
        assert "tensor" not in repr(value)
        assert "\n" not in str(value)


def test_a_plan_prints_what_it_does(vim):
    plan = ssmcompress.calibrate(vim, IMAGES, stages=(1, 3), ratio=0.3, name="photos")
    expected = (
        "Plan(remove 0.3 by clip after 1, 3; align conv, scan; gap calibrated, calibrated on 10 images of photos)"
    )
    assert str(plan) == repr(plan) == expected
    mixed = ssmcompress.Plan((ssmcompress.Stage(1, 1 / 3), ssmcompress.Stage(2, 0.5, "l2")))
    assert "0.3333 by clip after 1; 0.5 by l2 after 2" in str(mixed)
    assert "gap open" in str(mixed)


# --------------------------------------------------------------------------------------------------------- messages


def messages(path: Path) -> list[str]:
    """The strings in a module that are not docstrings."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    docstrings = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, documented) and node.body and isinstance(node.body[0], ast.Expr)
    }
    constants = (node for node in ast.walk(tree) if isinstance(node, ast.Constant) and id(node) not in docstrings)
    return [node.value for node in constants if isinstance(node.value, str)]


def test_messages_of_the_library_name_arguments_and_not_options():
    package = Path(ssmcompress.__file__).parent
    modules = [path for path in package.rglob("*.py") if "cli" not in path.relative_to(package).parts]
    assert len(modules) > 50
    found = [(path.name, text) for path in modules for text in messages(path) if re.search(r"(?<![\w-])--[a-z]", text)]
    assert found == []


@pytest.mark.parametrize(
    "numbers",
    [
        {"stages": [np.int64(1), np.int64(3)]},
        {"ratio": np.float32(0.5)},
        {"ratio": np.array(0.5)},
        {"ratio": torch.tensor(0.5)},
        {"ratio": [np.float64(0.5), 0.25], "stages": np.array([1, 2])},
        {"ratio": Fraction(1, 3), "seed": np.int64(3)},
    ],
    ids=str,
)
def test_numbers_of_other_libraries_are_saved_as_numbers(vim, tmp_path, numbers):
    pruned = ssmcompress.prune(vim, **numbers)
    plan = ssmcompress.load(ssmcompress.save(pruned, tmp_path / "m")).plan
    assert plan.stages == pruned.plan.stages
    assert plan.seed == pruned.plan.seed


def test_a_seed_that_is_no_number(vim):
    with pytest.raises(InputError, match="`seed` '3': expected a whole number"):
        ssmcompress.prune(vim, ratio=0.3, seed="3")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m, x: ssmcompress.search(m, x, flops=0.6, stages=2), "`stages` 2: expected numbers"),
        (lambda m, x: ssmcompress.compare(m, x, ratios=["0.3"]), "`ratios` .*expected numbers"),
        (lambda m, x: ssmcompress.compare(m, x, ratios=[]), "`ratios` is empty"),
        (lambda m, x: ssmcompress.compare(m, x, flops=[]), "`flops` is empty"),
    ],
)
def test_arguments_of_jobs_that_are_no_numbers(vim, call, message):
    with pytest.raises(InputError, match=message):
        call(vim, torch.randn(4, 3, 16, 16))
