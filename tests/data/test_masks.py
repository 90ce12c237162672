"""Images with masks: matching masks to images, the meaning of their values, and invalid masks."""

import io
import tarfile

import numpy as np
import pytest
import torch
from conftest import write_image
from datasets import Array2D, ClassLabel, Dataset, Features, Value
from datasets import Image as ImageFeature
from PIL import Image
from test_folders import Recorder

from ssmcompress import processes
from ssmcompress.data import Batches, masks, open_images
from ssmcompress.data.any_batches import AnyBatches, in_chunks
from ssmcompress.data.content import hash_contents
from ssmcompress.data.dense import DensePreprocessing
from ssmcompress.data.find import check_name, find_images
from ssmcompress.data.items import InputSpec
from ssmcompress.data.signature import compare_signatures, sign_images
from ssmcompress.data.tables import read_dataset
from ssmcompress.errors import InputError
from ssmcompress.progress import use_front_end
from ssmcompress.tasks import SEGMENTATION

SIZE = (6, 8)
TRANSFORM = DensePreprocessing((0.5,) * 3, (0.5,) * 3).transform()
DENSE = InputSpec((3, None, None), task=SEGMENTATION)


@pytest.fixture
def lines():
    recorder = Recorder()
    with use_front_end(recorder):
        yield recorder.lines


def open_masks(name, classes=9, **others):
    return open_images(name, classes, task=SEGMENTATION, **others)


def mask_of(seed=0, size=SIZE, high=9):
    return np.random.default_rng(seed).integers(0, high, size, dtype=np.uint8)


def write_mask(path, pixels, mode="L"):
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(pixels)
    if mode == "P":
        image = Image.frombytes("P", image.size, pixels.tobytes())
        image.putpalette(np.random.default_rng(0).integers(0, 256, 768, dtype=np.uint8).tobytes())
    image.save(path)


def write_pairs(root, *names, size=SIZE, high=9):
    """Images `names`, such as "a.jpg" or "train/a.jpg", in images/, and their masks in annotations/."""
    for i, name in enumerate(names):
        write_image(root / "images" / name, i, size)
        write_mask((root / "annotations" / name).with_suffix(".png"), mask_of(i, size, high))
    return root


def write_ade(root):
    names = [
        f"{split}/ADE_{short}_{i:08}.jpg"
        for split, short in (("training", "train"), ("validation", "val"))
        for i in (1, 2)
    ]
    write_pairs(root, *names, high=151)
    rows = "\n".join(f"{i}\t0.1\t10\t2\tclass {i}, other name" for i in range(1, 151))
    (root / "objectInfo150.txt").write_text(f"Idx\tRatio\tTrain\tVal\tName\n{rows}\n")
    (root / "sceneCategories.txt").write_text("ADE_train_00000001 airport_terminal\n")
    return root


def refused(name, message, classes=9, **others):
    with pytest.raises(InputError, match=message) as error:
        list(Batches(open_masks(name, classes, **others), TRANSFORM))
    assert "\n" not in str(error.value)


# ------------------------------------------------------------------------------------------------------- folders


def test_each_image_has_the_mask_of_its_name(tmp_path, lines):
    names = ["b.jpg", "a.png", "city/c.JPEG", "city/a.webp"]
    write_pairs(tmp_path, *names)
    images = open_masks(tmp_path)
    assert (len(images), images.labels, images.labelled, images.classes) == (4, None, True, None)
    for i in range(4):
        place = next(k for k, name in enumerate(names) if images.describe(i).endswith(f"images/{name}"))
        assert np.array_equal(images.masks(i), mask_of(place))
        assert images.masks(i).dtype == np.uint8
    assert lines == []


@pytest.mark.parametrize("name", ["{}:validation", "{}:val", "{}/images/validation", "{}/images:validation"])
def test_ade20k_is_known_by_its_names(tmp_path, lines, name):
    root = write_ade(tmp_path / "ADEChallengeData2016")
    images = open_masks(name.format(root), 150)
    assert [images.describe(i).rpartition("/")[2] for i in range(2)] == ["ADE_val_00000001.jpg", "ADE_val_00000002.jpg"]
    raw = mask_of(2, high=151)
    assert np.array_equal(images.masks(0), np.where(raw == 0, 255, raw - 1))
    assert images.classes[:2] == ("class 1, other name", "class 2, other name")
    assert len(images.classes) == 150
    assert ["`reduce_zero_label` is on" in line for line in lines] == [True]


def test_ade20k_says_which_split(tmp_path):
    root = write_ade(tmp_path / "ADEChallengeData2016")
    with pytest.raises(InputError, match=r"several splits \(training, validation\).*such as .*2016:validation"):
        open_masks(root, 150)
    assert len(open_masks(f"{tmp_path}:training", 150)) == 2
    with pytest.raises(InputError, match="no split test"):
        open_masks(f"{root}:test", 150)
    check_name(f"{root}:validation")
    with pytest.raises(InputError, match="annotations holds masks; name the images, .*images"):
        open_masks(root / "annotations")


def test_labels_of_other_data_are_shifted_only_if_asked(tmp_path, lines):
    write_pairs(tmp_path, "a.jpg", high=10)
    write_mask(tmp_path / "annotations" / "a.png", np.array([[0, 1], [9, 255]], np.uint8))
    write_image(tmp_path / "images" / "a.jpg", 0, (2, 2))
    assert open_masks(tmp_path, 10).masks(0).tolist() == [[0, 1], [9, 255]]
    assert open_masks(tmp_path, 9, reduce_zero_label=True).masks(0).tolist() == [[255, 0], [8, 255]]
    refused(tmp_path, r"a.png: label 9 in 1 pixel: the model has classes 0 to 8.*`reduce_zero_label` shifts")
    refused(tmp_path, r"label 9 in 1 pixel: the model has 8 classes, labels 1 to 8 since", 8, reduce_zero_label=True)
    root = write_ade(tmp_path / "ade")
    assert np.array_equal(open_masks(f"{root}:val", 151, reduce_zero_label=False).masks(0), mask_of(2, high=151))
    assert lines == []


def test_splits_may_hold_the_pair_of_folders(tmp_path):
    write_pairs(tmp_path / "train", "a.jpg")
    write_pairs(tmp_path / "val", "a.jpg", "b.jpg")
    assert [len(open_masks(f"{tmp_path}:{split}")) for split in ("train", "validation")] == [1, 2]
    with pytest.raises(InputError, match="several splits"):
        open_masks(tmp_path)


def test_images_without_a_mask_are_an_error_and_masks_without_an_image_are_told(tmp_path, lines):
    names = [f"{i:02}.jpg" for i in range(20)]
    write_pairs(tmp_path, *names)
    for i in (3, 4, 5):
        (tmp_path / "annotations" / f"{i:02}.png").unlink()
    refused(tmp_path, r"3 of 20 images have no mask in annotations/ \(03.jpg, 04.jpg, 05.jpg\)$")
    write_image(tmp_path / "annotations" / "03.jpg", 0, SIZE)
    refused(tmp_path, r"expected .png files, found 03.jpg")
    for i in (3, 4, 5):
        (tmp_path / "images" / f"{i:02}.jpg").unlink()
    write_mask(tmp_path / "annotations" / "30.png", mask_of())
    assert len(open_masks(tmp_path)) == 17
    assert any("1 of 18 masks have no image and are not used (30.png)" in line for line in lines)
    assert any("left out 1 .jpg file (03.jpg)" in line for line in lines)
    write_image(tmp_path / "images" / "00.png", 0, SIZE)
    refused(tmp_path, "00.jpg and 00.png have the same mask 00.png")


def test_a_split_without_masks_counts_as_unlabelled(tmp_path, lines):
    write_pairs(tmp_path, "train/a.jpg")
    write_image(tmp_path / "images" / "test" / "a.jpg", 0, SIZE)
    images = open_masks(f"{tmp_path}:test")
    assert (len(images), images.labelled) == (1, False)
    assert "there is no folder annotations/test/" in lines[0]


@pytest.mark.parametrize("mode", ["P", "L", "1", "I;16"])
def test_values_of_one_channel_are_class_numbers(tmp_path, mode):
    write_image(tmp_path / "images" / "a.jpg", 0, SIZE)
    pixels = mask_of(high=2 if mode == "1" else 9)
    kind = {"1": bool, "I;16": np.uint16}.get(mode, np.uint8)
    path = tmp_path / "annotations" / "a.png"
    write_mask(path, pixels.astype(kind), mode)
    with Image.open(path) as image:
        assert image.mode == mode
    assert np.array_equal(open_masks(tmp_path).masks(0), pixels)


def break_mask(root, name, kind):
    path = root / "annotations" / f"{name}.png"
    if kind == "channels":
        write_image(path, 0, SIZE)
    elif kind == "alpha":
        write_image(path, 0, SIZE, mode="LA")
    elif kind == "size":
        write_mask(path, mask_of(size=(6, 9)))
    elif kind == "text":
        path.write_text("no picture")
    else:
        path.write_bytes(path.read_bytes()[:-30])


BROKEN = [
    ("channels", r"a.*a mask of 3 channels \(RGB\): expected one channel of class numbers; .*full ADE20K"),
    ("alpha", r"a mask of 2 channels \(LA\)"),
    ("size", r"height x width 6 x 9, the image 6 x 8"),
]
COUNTED = {
    "channels": "2 of 3 masks",
    "alpha": "2 of 3 masks",
    "size": "2 of 3 masks differ in size from their image",
}


@pytest.mark.parametrize(("kind", "message"), BROKEN)
def test_masks_that_cannot_be_used_are_counted_when_opened(tmp_path, kind, message):
    write_pairs(tmp_path, "a.jpg", "b.jpg", "c.jpg")
    for name in "ac":
        break_mask(tmp_path, name, kind)
    with pytest.raises(InputError, match=message) as error:
        open_masks(tmp_path)
    assert COUNTED[kind] in str(error.value)
    assert "a.png" in str(error.value)
    assert "c.png" in str(error.value)


def test_unreadable_masks_are_counted_when_opened(tmp_path):
    write_pairs(tmp_path, "a.jpg", "b.jpg", "c.jpg")
    for name in "ac":
        break_mask(tmp_path, name, "text")
    with pytest.raises(InputError, match=r"2 of 3 masks cannot be read \(a.png, c.png\)"):
        open_masks(tmp_path)


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize(
    ("kind", "message"), [*BROKEN, ("text", "a.png: unreadable mask"), ("cut", "a.png: unreadable")]
)
def test_masks_of_large_data_are_checked_when_they_are_read(tmp_path, monkeypatch, kind, message, workers):
    monkeypatch.setattr(masks, "HEADERS", 0)
    write_pairs(tmp_path, "a.jpg")
    break_mask(tmp_path, "a", kind)
    batches = Batches(open_masks(tmp_path), TRANSFORM, workers=workers)
    with pytest.raises(InputError, match=message) as error:
        list(batches)
    assert "\n" not in str(error.value)
    assert str(tmp_path / "annotations") in str(error.value) or str(tmp_path / "images") in str(error.value)


# -------------------------------------------------------------------------------------------------------- tables


def table_of(column="annotation", count=3, high=9, feature=None, **columns):
    pictures = [
        Image.fromarray(np.random.default_rng(i).integers(0, 256, (*SIZE, 3), dtype=np.uint8)) for i in range(count)
    ]
    values = [Image.fromarray(mask_of(i, high=high)) for i in range(count)]
    features = {"image": ImageFeature(), column: feature or ImageFeature()}
    features |= {key: Value("int64") for key in columns}
    if isinstance(feature, Array2D):
        values = [mask_of(i, high=high) for i in range(count)]
    return Dataset.from_dict({"image": pictures, column: values, **columns}, features=Features(features))


@pytest.mark.parametrize("column", ["annotation", "mask", "label", "segmentation"])
def test_columns_of_masks(tmp_path, lines, column):
    table_of(column).to_parquet(tmp_path / "data.parquet")
    images = open_masks(tmp_path / "data.parquet")
    assert [np.array_equal(images.masks(i), mask_of(i)) for i in range(3)] == [True] * 3
    assert images.labels is None
    assert lines == []


@pytest.mark.parametrize("form", ["shards", "bytes", "rows", "saved", "object"])
def test_forms_of_tables(tmp_path, form):
    table = table_of("mask", feature=Array2D(SIZE, "uint8") if form == "rows" else None)
    path = tmp_path / "data"
    path.mkdir()
    if form == "shards":
        table.select([0]).to_parquet(path / "validation-00000-of-00002.parquet")
        table.select([1, 2]).to_parquet(path / "validation-00001-of-00002.parquet")
        table.to_parquet(path / "train-00000-of-00001.parquet")
        path = f"{path}:validation"
    elif form == "bytes":  # no metadata of `datasets`
        raw = table.cast_column("image", ImageFeature(decode=False)).cast_column("mask", ImageFeature(decode=False))
        columns = {key: [row["bytes"] for row in raw[key]] for key in ("image", "mask")}
        Dataset.from_dict(columns).to_parquet(path / "data.parquet")
    elif form == "saved":
        table.save_to_disk(path)
    elif form == "rows":
        table.to_parquet(path / "data.parquet")
    images = read_dataset(table, 9, task=SEGMENTATION) if form == "object" else open_masks(path)
    assert [np.array_equal(images.masks(i), mask_of(i)) for i in range(3)] == [True] * 3


def test_a_class_next_to_a_mask_is_not_read(lines):
    images = read_dataset(table_of("mask", label=[0, 40, 2]), 9, task=SEGMENTATION)
    assert images.labels is None
    assert np.array_equal(images.masks(1), mask_of(1))


def test_ade20k_of_the_hub_is_known_by_its_columns(lines):
    table = table_of(high=151, scene_category=[0, 1, 2])
    raw = mask_of(1, high=151)
    images = read_dataset(table, 150, task=SEGMENTATION)
    assert np.array_equal(images.masks(1), np.where(raw == 0, 255, raw - 1))
    assert "`reduce_zero_label` is on" in lines[0]
    images = read_dataset(table.remove_columns("scene_category"), 150, task=SEGMENTATION, reduce_zero_label=True)
    assert np.array_equal(images.masks(1), np.where(raw == 0, 255, raw - 1))


def test_rows_without_a_mask(lines):
    table = table_of()
    rows = table.cast_column("annotation", ImageFeature(decode=False)).to_dict()
    rows["annotation"][1] = None
    some = Dataset.from_dict(rows, features=table.features)
    with pytest.raises(InputError, match=r"1 of 3 images have no mask in the column annotation \(row 1\)"):
        read_dataset(some, 9, task=SEGMENTATION)
    rows["annotation"] = [None] * 3
    images = read_dataset(Dataset.from_dict(rows, features=table.features), 9, task=SEGMENTATION)
    assert not images.labelled
    assert "the column annotation is empty" in lines[0]


def test_several_columns_of_masks(lines):
    table = table_of("mask")
    columns = {key: table.to_dict()["mask"] for key in ("mask", "segmentation")}
    features = Features({key: ImageFeature() for key in ("image", *columns)})
    table = Dataset.from_dict({"image": table.to_dict()["image"], **columns}, features=features)
    with pytest.raises(InputError, match=r"several columns of masks \(mask, segmentation\); rename"):
        read_dataset(table, 9, task=SEGMENTATION)
    assert read_dataset(table.rename_column("mask", "annotation"), 9, task=SEGMENTATION).labelled
    assert "masks are the column annotation; segmentation not used" in lines[0]


def test_masks_of_tables_are_checked():
    pictures = [Image.new("L", (8, 6)), Image.new("RGB", (8, 6)), Image.new("L", (8, 6), 20)]
    features = Features({"image": ImageFeature(), "annotation": ImageFeature()})
    table = Dataset.from_dict({"image": [Image.new("RGB", (8, 6))] * 3, "annotation": pictures}, features=features)
    with pytest.raises(InputError, match=r"1 of 3 masks \(row 1\) .* 3 channels"):
        read_dataset(table, 9, task=SEGMENTATION)
    with pytest.raises(InputError, match=r"row 1, annotation: label 20 in 48 pixels"):
        list(Batches(read_dataset(table.select([0, 2]), 9, task=SEGMENTATION), TRANSFORM))


# ---------------------------------------------------------------------------------------------------- unlabelled


def test_images_without_masks(tmp_path, lines, class_folders):
    write_image(tmp_path / "flat" / "a.jpg", 0)
    assert (len(open_masks(tmp_path / "flat")), lines) == (1, [])
    images = open_masks(class_folders, 3)
    assert (len(images), images.labelled) == (20, False)
    assert "folders are not read as classes" in lines.pop()
    features = Features({"image": ImageFeature(), "label": ClassLabel(names=["a", "b"])})
    Dataset.from_dict({"image": [Image.new("L", (4, 4))], "label": [1]}, features=features).to_parquet(
        tmp_path / "t.parquet"
    )
    assert not open_masks(tmp_path / "t.parquet").labelled
    assert "none of the columns image, label holds masks" in lines.pop()
    with tarfile.open(tmp_path / "s.tar", "w") as tar:
        data = io.BytesIO()
        Image.new("L", (4, 4)).save(data, "png")
        for name, content in (("a.png", data.getvalue()), ("a.cls", b"700")):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    assert not open_masks(tmp_path / "s.tar").labelled
    assert "labels of whole images are not read" in lines.pop()
    assert find_images(None, (8, 8), 9, task=SEGMENTATION).stand_in


def test_masks_are_for_segmentation(tmp_path):
    write_image(tmp_path / "a.jpg", 0)
    with pytest.raises(
        InputError, match="`reduce_zero_label` is for the masks of semantic segmentation, the task is image"
    ):
        open_images(tmp_path, 9, reduce_zero_label=True)
    with pytest.raises(InputError, match="a model of 300 classes: masks can distinguish 255"):
        open_masks(tmp_path, 300)


# ------------------------------------------------------------------------------------------------------- batches


def write_sizes(root, sizes):
    for i, size in enumerate(sizes):
        write_image(root / "images" / f"{i}.jpg", i, size)
        write_mask(root / "annotations" / f"{i}.png", mask_of(i, size))
    return open_masks(root)


@pytest.mark.parametrize("workers", [0, 2])
def test_consecutive_images_of_the_same_shapes_share_a_batch(tmp_path, workers):
    small, large = (6, 8), (6, 10)
    images = write_sizes(tmp_path, [small] * 3 + [large] * 2 + [small] * 3)
    batches = Batches(images, TRANSFORM, batch_size=2, workers=workers)
    for _ in range(2):
        found = list(batches)
        assert [batch.index for batch in found] == [[0, 1], [2], [3, 4], [5, 6], [7]]
        for batch in found:
            assert batch.images.shape == (len(batch.index), 3, *(large if 3 in batch.index else small))
            assert batch.labels.dtype == torch.uint8
            for i, labels in zip(batch.index, batch.labels, strict=True):
                assert np.array_equal(labels, mask_of(i, labels.shape))


def test_images_of_one_size_with_masks_of_several_are_apart(tmp_path):
    images = write_sizes(tmp_path, [(6, 8), (12, 16), (12, 16)])
    transform = DensePreprocessing((0.5,) * 3, (0.5,) * 3, short_side=6).transform()
    found = list(Batches(images, transform))
    assert [batch.index for batch in found] == [[0], [1, 2]]
    assert {batch.images.shape[1:] for batch in found} == {(3, 6, 8)}
    cropped = DensePreprocessing((0.5,) * 3, (0.5,) * 3, short_side=6).transform(crop=(6, 6))
    (batch,) = Batches(images, cropped)
    assert (batch.images.shape, batch.labels.shape) == ((3, 3, 6, 6), (3, 6, 6))


def test_unlabelled_images_of_several_sizes(tmp_path):
    for i, size in enumerate([(6, 8), (6, 8), (8, 6)]):
        write_image(tmp_path / f"{i}.jpg", i, size)
    found = list(Batches(open_masks(tmp_path), TRANSFORM))
    assert [(batch.index, batch.labels) for batch in found] == [([0, 1], None), ([2], None)]


def test_unreadable_images_are_skipped_with_their_masks(tmp_path):
    images = write_sizes(tmp_path, [SIZE] * 4)
    (tmp_path / "images" / "1.jpg").write_bytes(b"")
    batches = Batches(open_masks(tmp_path), TRANSFORM, batch_size=2)
    assert [batch.index for batch in batches] == [[0, 2], [3]]
    assert batches.unreadable == {1}
    assert [bool(value) for value in batches.mask_digests] == [True, False, True, True]
    assert len(images) == 4


def test_a_transform_without_pair_leaves_masks_as_they_are(tmp_path):
    images = write_sizes(tmp_path, [SIZE] * 2)
    (batch,) = Batches(images, lambda picture: torch.zeros(3, 4, 4))
    assert (batch.images.shape, batch.labels.shape) == ((2, 3, 4, 4), (2, *SIZE))
    (batch,) = Batches(images, TRANSFORM, labelled=False)
    assert batch.labels is None


def test_processes_share_what_they_read(tmp_path, monkeypatch):
    images = write_sizes(tmp_path, [SIZE] * 4)
    parts = [Batches(images, TRANSFORM, index=[0, 2]), Batches(images, TRANSFORM, index=[1, 3])]
    whole = Batches(images, TRANSFORM)
    for batches in (*parts, whole):
        assert len(list(batches)) == 1
    other = (parts[1].unreadable, parts[1].digests, parts[1].mask_digests)
    monkeypatch.setattr(processes, "all_gather", lambda value: [value, other])
    parts[0].sync()
    assert np.array_equal(parts[0].digests, whole.digests)
    assert np.array_equal(parts[0].content_labels(), whole.content_labels())
    monkeypatch.undo()
    rest = Batches(images, TRANSFORM)
    rest.read_rest()
    assert np.array_equal(rest.mask_digests, whole.mask_digests)


def test_a_change_of_a_mask_changes_what_images_are_known_by(tmp_path):
    def known(root, **others):
        batches = Batches(open_masks(root, **others), TRANSFORM)
        signature = sign_images(batches)
        assert len(list(batches)) == 1
        return signature, hash_contents(batches.digests, batches.content_labels())

    write_sizes(tmp_path / "a", [SIZE] * 3)
    write_sizes(tmp_path / "b", [SIZE] * 3)
    then, content = known(tmp_path / "a")
    assert known(tmp_path / "b") == (then, content)
    write_mask(tmp_path / "b" / "annotations" / "1.png", mask_of(9))
    now, other = known(tmp_path / "b")
    assert compare_signatures(then, now) == "3 images with other labels"
    assert content != other
    assert known(tmp_path / "a", reduce_zero_label=True)[1] != content


# ------------------------------------------------------------------------------------------------ what callers pass


def pairs(count=5, size=SIZE):
    images = torch.randn(count, 3, *size, generator=torch.Generator().manual_seed(0))
    return images, torch.from_numpy(np.stack([mask_of(i, size) for i in range(count)]))


@pytest.mark.parametrize("form", ["pair", "loader", "singles", "dicts", "lists", "long", "channel", "numpy"])
def test_masks_in_whatever_callers_pass(form):
    images, labels = pairs()
    data = {
        "pair": lambda: (images, labels),
        "loader": lambda: torch.utils.data.DataLoader(list(zip(images, labels, strict=True)), batch_size=2),
        "singles": lambda: list(zip(images, labels, strict=True)),
        "dicts": lambda: [
            {"pixel_values": images[:3], "labels": labels[:3]},
            {"image": images[3:], "mask": labels[3:]},
        ],
        "lists": lambda: [(images, list(labels))],
        "long": lambda: [(images, labels.long())],
        "channel": lambda: [(images, labels[:, None])],
        "numpy": lambda: [(images.numpy(), labels.numpy())],
    }[form]()
    found = list(AnyBatches(data, DENSE, labelled=True))
    assert torch.equal(torch.cat([batch.images for batch in found]), images)
    assert torch.equal(torch.cat([batch.labels for batch in found]).to(torch.uint8), labels)


def test_single_images_of_several_shapes_are_batches_of_their_own():
    first, second = pairs(3), pairs(2, (6, 10))
    data = [*zip(*first, strict=True), *zip(*second, strict=True)]
    found = list(AnyBatches(data, DENSE, labelled=True))
    assert [tuple(batch.labels.shape) for batch in found] == [(3, 6, 8), (2, 6, 10)]
    assert [len(chunk) for chunk in in_chunks(AnyBatches(data, DENSE), 2)] == [2, 1, 2]
    with pytest.raises(InputError, match=r"images of \(3, 6, 8\) and \(3, 6, 10\): expected one size"):
        AnyBatches(data, DENSE).read_all()


def test_batches_of_a_data_set_are_taken(tmp_path):
    images = write_sizes(tmp_path, [SIZE, SIZE, (8, 8)])
    found = list(AnyBatches(Batches(images, TRANSFORM), DENSE, labelled=True))
    assert [tuple(batch.labels.shape) for batch in found] == [(2, 6, 8), (1, 8, 8)]


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (
            torch.zeros(5, dtype=torch.int64),
            r"masks \(5,\) int64: expected class numbers, \(5, height, width\) integers",
        ),
        (torch.zeros(5, 6, 8), r"masks \(5, 6, 8\) float32: expected class numbers"),
        (torch.zeros(4, 6, 8, dtype=torch.uint8), r"masks \(4, 6, 8\) uint8"),
        (torch.zeros(5, 6, 8, dtype=torch.bool), r"masks \(5, 6, 8\) bool"),
        ("text", "masks str"),
    ],
)
def test_what_is_no_mask(labels, message):
    with pytest.raises(InputError, match=message):
        list(AnyBatches([(pairs()[0], labels)], DENSE, labelled=True))


def test_a_side_of_any_length_leaves_the_channels_fixed():
    with pytest.raises(InputError, match=r"images \(2, 1, 6, 8\): expected \(batch, 3, height, width\)"):
        list(AnyBatches(torch.zeros(2, 1, 6, 8), DENSE))
    with pytest.raises(InputError, match=r"channels first"):
        list(AnyBatches(torch.zeros(2, 6, 8, 3), DENSE))


def test_classifiers_take_no_masks():
    spec = InputSpec()
    with pytest.raises(InputError, match=r"expected class numbers, \(5,\) integers"):
        list(AnyBatches([pairs()], spec, labelled=True))
