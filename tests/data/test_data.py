"""Images in all supported forms, and invalid images."""

import gzip
import io
import json
import tarfile
import tracemalloc
import warnings

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import timm
import torch
from conftest import BUNDLED, make_vim, write_image
from datasets import ClassLabel, Dataset, Features, Value
from datasets import Image as ImageFeature
from PIL import Image

import ssmcompress
from ssmcompress.data import open_images, photographs
from ssmcompress.data.batches import Batches, sample_indices
from ssmcompress.data.images import Images, decode
from ssmcompress.data.tables import read_hub
from ssmcompress.data.transforms import CROP_MODES, Preprocessing
from ssmcompress.errors import InputError


def test_class_folders_are_labelled_by_sorted_name(class_folders):
    images = open_images(class_folders, 10)
    assert images.labels == tuple(label for label in range(10) for _ in range(2))
    assert images.describe(3).endswith("class1/1.png")


def test_imagenet_folders_are_labelled_by_synset(tmp_path):
    for synset in ("n01443537", "n01440764", "n15075141"):
        write_image(tmp_path / synset / "a.JPEG", 0)
    assert open_images(tmp_path, 1000).labels == (0, 1, 999)
    write_image(tmp_path / "n99999999" / "a.JPEG", 0)
    with pytest.raises(InputError, match="n99999999 is not one of ImageNet-1k's synsets"):
        open_images(tmp_path, 1000)


def test_classes_that_are_not_the_heads_are_an_error(class_folders):
    with pytest.raises(InputError, match="10 classes.*the model has 7 classes"):
        open_images(class_folders, 7)


def test_a_folder_of_images_has_no_labels(tmp_path):
    for i, name in enumerate(("b.jpg", "a.png", "c.webp")):
        write_image(tmp_path / name, i)
    (tmp_path / "notes.txt").write_text("not an image")
    images = open_images(tmp_path, 10)
    assert (len(images), images.labels) == (3, None)


@pytest.mark.parametrize("form", ["parquet", "arrow", "folder", "bytes"])
def test_tables(tmp_path, form):
    pictures = [Image.new("L", (16, 16), color) for color in (0, 100, 200)]
    features = Features({"image": ImageFeature(), "label": ClassLabel(names=[str(i) for i in range(10)])})
    table = Dataset.from_dict({"image": pictures, "label": [0, 9, 4]}, features=features)
    path = tmp_path / "data.parquet"
    if form == "parquet":
        table.to_parquet(path)
    elif form == "arrow":
        table.save_to_disk(tmp_path / "saved")
        path = next((tmp_path / "saved").glob("*.arrow"))
    elif form == "folder":
        (tmp_path / "parts").mkdir()
        table.select([0]).to_parquet(tmp_path / "parts" / "0.parquet")
        table.select([1, 2]).to_parquet(tmp_path / "parts" / "1.parquet")
        path = tmp_path / "parts"
    else:  # no `datasets` metadata: image bytes and whole numbers
        raw = table.cast_column("image", ImageFeature(decode=False))
        Dataset.from_dict({"image": [r["bytes"] for r in raw["image"]], "label": [0, 9, 4]}).to_parquet(path)
    images = open_images(path, 10)
    assert images.labels == (0, 9, 4)
    assert [images.read(i).getpixel((3, 3)) for i in range(3)] == [0, 100, 200]


def labelled_table(path, labels, kind="int64"):
    pictures = [Image.new("L", (8, 8))] * len(labels)
    features = Features({"image": ImageFeature(), "label": Value(kind)})
    Dataset.from_dict({"image": pictures, "label": labels}, features=features).to_parquet(path)
    return path


def test_labels_outside_the_classes_are_an_error_and_hidden_ones_are_none(tmp_path):
    for labels, kind in (([0, 10], "int64"), ([0, -2], "int64"), ([0, None], "int64"), (["a", "b"], "string")):
        with pytest.raises(InputError, match=r"row \d: label .*classes 0 to 9"):
            open_images(labelled_table(tmp_path / "t.parquet", labels, kind), 10)
    assert open_images(labelled_table(tmp_path / "t.parquet", [-1, -1]), 10).labels is None


def test_unreadable_images_are_skipped_and_counted(tmp_path, vim):
    for i in range(3):
        write_image(tmp_path / f"{i}.png", i)
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "text.jpg").write_text("hello")
    (tmp_path / "cut.png").write_bytes((tmp_path / "0.png").read_bytes()[:200])
    batches = Batches(open_images(tmp_path, 10), vim.transform(), range(6), batch_size=2)
    for _ in range(2):
        assert sum(len(batch.images) for batch in batches) == 3
        assert sorted(name.rpartition("/")[2] for name in batches.unreadable_names()) == [
            "cut.png",
            "empty.png",
            "text.jpg",
        ]


def test_no_readable_image_at_all(tmp_path, vim):
    (tmp_path / "text.jpg").write_text("hello")
    with pytest.raises(InputError, match="none of the 1 images"):
        list(Batches(open_images(tmp_path, 10), vim.transform(), [0]))


def test_places_without_images(tmp_path):
    with pytest.raises(InputError, match="no images in"):
        open_images(tmp_path, 10)
    write_image(tmp_path / "val" / "cat" / "a.png", 0)
    with pytest.raises(InputError, match="did you mean .*val"):
        open_images(tmp_path, 10)
    write_image(tmp_path / "val" / "a.png", 0)
    with pytest.raises(InputError, match="both images and class folders"):
        open_images(tmp_path / "val", 1)
    with pytest.raises(InputError, match="expected a folder"):
        open_images(tmp_path / "nowhere", 10)
    (tmp_path / "data.parquet").write_bytes(b"PAR1 not really")
    with pytest.raises(InputError, match="not a whole parquet file"):
        open_images(tmp_path / "data.parquet", 10)
    Dataset.from_dict({"text": ["a"]}).to_parquet(tmp_path / "text.parquet")
    with pytest.raises(InputError, match="columns text: expected one with images"):
        open_images(tmp_path / "text.parquet", 10)


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "P", "1", "CMYK", "I;16"])
@pytest.mark.parametrize("channels", [1, 3])
def test_any_kind_of_image_fits_any_model(tmp_path, mode, channels):
    if mode == "I;16":
        Image.new(mode, (20, 30), 30000).save(tmp_path / "a.png")
    else:
        write_image(tmp_path / f"a.{'tif' if mode == 'CMYK' else 'png'}", 0, (30, 20), mode)
    model = make_vim(channels=channels)
    (batch,) = Batches(open_images(tmp_path, 10), model.transform(), [0])
    assert batch.images.shape == (1, channels, 16, 16)
    shown = batch.images[0, 0] * model.preprocessing.std[0] + model.preprocessing.mean[0]
    if mode == "I;16":
        assert torch.allclose(shown, torch.tensor(116 / 255))  # 30000 of 65535, not cut to white
    else:
        assert 0.2 < shown.mean() < 0.8


def test_preprocessing_defaults():
    small, large = make_vim(), make_vim(image=(224, 224), patch=56)
    assert small.preprocessing.mean == (0.485, 0.456, 0.406)
    assert (small.preprocessing.crop_pct, large.preprocessing.crop_pct) == (1.0, 0.875)
    gray = make_vim(channels=1)
    assert (gray.preprocessing.mean, gray.preprocessing.std) == ((0.5,), (0.5,))
    white = Image.new("L", (40, 40), 255)
    assert torch.allclose(gray.preprocessing.transform((16, 16))(white), torch.ones(1, 16, 16))


def test_preprocessing_values_are_checked(vim):
    for bad in ({"mean": (1.0, 2.0)}, {"std": (0.0,)}, {"crop_pct": 1.5}, {"interpolation": "cubic"}):
        with pytest.raises(InputError):
            vim.preprocessing.changed(**bad)
    assert vim.preprocessing.changed(mean=(0.5,)).mean == (0.5, 0.5, 0.5)
    assert vim.preprocessing.changed(std=0.5).std == (0.5, 0.5, 0.5)
    for scale in ({"mean": (123.675, 116.28, 103.53)}, {"std": (58.395, 57.12, 57.375)}, {"mean": 127.5}):
        with pytest.raises(InputError, match="expected those of pixels from 0 to 1: divide by 255"):
            vim.preprocessing.changed(**scale)


@pytest.mark.parametrize("mode", CROP_MODES)
def test_crop_modes_are_those_of_timm(vim, mode):
    prepared = vim.preprocessing.changed(crop_mode=mode, crop_pct=0.9)
    photo = Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 90, 3), np.uint8))
    settings = {"mean": prepared.mean, "std": prepared.std, "crop_pct": 0.9, "interpolation": "bicubic"}
    expected = timm.data.create_transform(16, is_training=False, crop_mode=mode, **settings)(photo)
    assert torch.equal(prepared.transform((16, 16))(photo), expected)
    assert Preprocessing.from_dict(prepared.to_dict(), 3) == prepared
    with pytest.raises(InputError, match="unknown crop mode 'cut': expected one of center, squash, border"):
        prepared.changed(crop_mode="cut")


def test_grey_images_with_a_last_axis_of_one_are_read(vim):
    pixels = np.random.default_rng(0).integers(0, 255, (20, 20, 1), np.uint8)
    assert np.array_equal(decode(pixels), pixels[..., 0])


def test_the_reason_is_told_if_no_image_can_be_read(vim):
    images = Images("floats", 3, lambda i: decode(np.zeros((8, 8, 3))), str)
    with pytest.raises(InputError, match=r"none of the 3 images of floats can be read .*pixels are float64"):
        list(Batches(images, vim.transform()))


def test_transparent_palettes_are_read_without_a_warning(tmp_path, vim):
    picture = Image.new("P", (20, 20), 1)
    picture.putpalette([0, 0, 0, 200, 100, 50])
    picture.save(tmp_path / "a.png", transparency=bytes([0, 90]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read = decode(tmp_path / "a.png").convert("RGB")
    assert read.getpixel((3, 3)) == (200, 100, 50)


def test_workers_and_batch_sizes_give_the_same_images(class_folders, vim):
    images = open_images(class_folders, 10)
    wanted = [(b.index, b.labels.tolist()) for b in Batches(images, vim.transform(), range(20), 20)]
    one = torch.cat([b.images for b in Batches(images, vim.transform(), range(20), 20)])
    other = list(Batches(images, vim.transform(), range(20), 3, workers=2))
    assert torch.equal(torch.cat([b.images for b in other]), one)
    assert [i for b in other for i in b.index] == wanted[0][0]


def test_without_data_the_folders_own_images_else_photographs(vim):
    bundled = ssmcompress.load(BUNDLED).find_images()
    assert (len(bundled), len(set(bundled.labels))) == (2000, 10)
    crops = vim.find_images()
    assert (crops.labels, crops.read(5).size) == (None, (16, 16))
    assert crops.read(7).tobytes() == photographs((16, 16)).read(7).tobytes()


def test_draws_are_disjoint_and_depend_on_the_seed():
    chosen, rest = sample_indices(100, 30, seed=1)
    assert sorted(chosen + rest) == list(range(100))
    assert len(chosen) == 30
    assert sample_indices(100, 30, seed=1) == (chosen, rest)
    assert sample_indices(100, 30, seed=2) != (chosen, rest)


def test_pixels_whose_scale_would_be_a_guess_are_unreadable(tmp_path, vim):
    Image.new("F", (16, 16), 0.7).save(tmp_path / "float.tif")
    write_image(tmp_path / "good.png", 0)
    batches = Batches(open_images(tmp_path, 10), vim.transform(), range(2))
    assert sum(len(b.images) for b in batches) == 1
    assert [name.rpartition("/")[2] for name in batches.unreadable_names()] == ["float.tif"]
    array = Dataset.from_dict({"image": [[[0, 255], [3, 4]], [[0.5, 0.25], [1.0, 0.0]]], "label": [1, 2]})
    array.to_parquet(tmp_path / "t.parquet")
    images = open_images(tmp_path / "t.parquet", 10)
    assert not images.readable(1)


def test_a_tables_classes_must_be_the_heads(tmp_path):
    def table(names):
        features = Features({"image": ImageFeature(), "label": ClassLabel(names=names)})
        data = {"image": [Image.new("L", (8, 8))] * 2, "label": [0, 1]}
        Dataset.from_dict(data, features=features).to_parquet(tmp_path / "t.parquet")
        return tmp_path / "t.parquet"

    with pytest.raises(InputError, match=r"2 classes.*the model has 10"):
        open_images(table(["cat", "dog"]), 10)
    assert open_images(table(["n01443537", "n15075141"]), 1000).labels == (1, 999)


def test_tables_that_do_not_go_together(tmp_path):
    labelled_table(tmp_path / "a.parquet", [1])
    labelled_table(tmp_path / "b.parquet", ["x"], "string")
    with pytest.raises(InputError, match="are not compatible"):
        open_images(tmp_path, 10)


def test_a_strangers_folder_names_no_data_of_mine(vim, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_image(tmp_path / "train" / "a.png", 0)
    ssmcompress.save(vim, tmp_path / "m")
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    for data in ("train", -1, [], "x" * 5000):
        (tmp_path / "m" / "config.json").write_text(json.dumps({**config, "data": data}))
        assert ssmcompress.load(tmp_path / "m").find_images().stand_in


def test_a_hub_name_with_a_split_is_loaded_by_datasets(tmp_path, monkeypatch):
    """The real loading code on a local repository in the Hub's layout; tests do not access the Hub itself."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "repo" / "data").mkdir(parents=True)
    for split, labels in (("train", [1, 2, 3]), ("validation", [4, 5])):
        labelled_table(tmp_path / "repo" / "data" / f"{split}-00000-of-00001.parquet", labels)
    repo = str(tmp_path / "repo")
    images = read_hub(repo, "validation", 10)
    assert images.labels == (4, 5)
    assert images.read(1).size == (8, 8)
    assert read_hub(repo, "train[1:]", 10).labels == (2, 3)
    with pytest.raises(InputError, match="neither here nor on the hub"):
        read_hub(repo, "test", 10)


# ------------------------------------------------------------------------------------------------------- shards


def write_shard(path, members):
    path.parent.mkdir(exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def png(seed):
    buffer = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def test_shards_are_read_in_place(tmp_path):
    """Labels before and after their image, in .cls and .json, in nested folders, over several files."""
    write_shard(
        tmp_path / "s" / "000.tar", [("a/0.png", png(0)), ("a/0.cls", b"3"), ("b/0.cls", b"1\n"), ("b/0.PNG", png(1))]
    )
    write_shard(
        tmp_path / "s" / "001.tar",
        [("7.json", b'{"label": 2, "text": "x"}'), ("7.png", png(2)), ("notes.txt", b"no image"), ("8.cls", b"1")],
    )
    images = open_images(tmp_path / "s", num_classes=4)
    assert images.labels == (3, 1, 2)
    for i in range(3):
        assert np.array_equal(np.asarray(images.read(i)), np.asarray(Image.open(io.BytesIO(png(i)))))
    assert "001.tar" in images.describe(2)
    one = open_images(tmp_path / "s" / "001.tar", num_classes=4)
    assert (len(one), one.labels) == (1, (2,))


def test_shards_without_labels(tmp_path):
    file = write_shard(tmp_path / "s" / "0.tar", [("0.png", png(0)), ("1.png", png(1))])
    assert open_images(file, num_classes=4).labels is None
    write_shard(tmp_path / "s" / "1.tar", [("0.png", png(0)), ("0.cls", b"1")])
    with pytest.raises(InputError, match="row 0: label -1"):
        open_images(tmp_path / "s", num_classes=4)


@pytest.mark.parametrize(
    ("content", "what"),
    [(b"", "expected members"), (b"x" * 600, "uncompressed tar"), (gzip.compress(b"x" * 600), "unpack it")],
    ids=["empty", "text", "compressed"],  # the compressed content holds the time, and processes must agree on ids
)
def test_files_that_are_no_shards(tmp_path, content, what):
    file = tmp_path / "a.tar"
    file.write_bytes(content)
    with pytest.raises(InputError, match="a.tar") as error:
        open_images(file, num_classes=4)
    assert what in str(error.value) or "not a whole" in str(error.value)


def test_a_shard_cut_off_anywhere_is_refused(tmp_path):
    file = write_shard(
        tmp_path / "s" / "0.tar", [("0.png", png(0)), ("0.cls", b"1"), ("1.png", png(1)), ("1.cls", b"1")]
    )
    content = file.read_bytes()
    with tarfile.open(file) as tar:
        last = tar.getmember("1.cls").offset_data + 1
    for length in (300, 700, last - 1025, last - 513, last - 1):
        file.write_bytes(content[:length])
        with pytest.raises(InputError, match="0.tar"):
            open_images(file, num_classes=4)


@pytest.mark.parametrize("label", [b"cat", b"1.5", b"true", b"[1]", b"", b"99999999999", b"-7", b"4"])
def test_labels_in_shards_that_are_none(tmp_path, label):
    file = write_shard(tmp_path / "s" / "0.tar", [("0.png", png(0)), ("0.cls", label)])
    with pytest.raises(InputError, match="label"):
        open_images(file, num_classes=4)


def test_large_parquet_files_are_mapped_not_read(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.setattr("ssmcompress.data.tables.IN_MEMORY", 10)
    table = pa.table({"image": [{"bytes": png(i), "path": None} for i in range(5)], "label": list(range(5))})
    pq.write_table(table, tmp_path / "a.parquet")
    images = open_images(tmp_path / "a.parquet", num_classes=5)
    assert images.labels == (0, 1, 2, 3, 4)
    assert np.array_equal(np.asarray(images.read(3)), np.asarray(Image.open(io.BytesIO(png(3)))))


def test_a_tree_of_many_files_takes_little_memory(tmp_path):
    """The names of 5,000 files in one buffer: less than 256 kB, and nothing that a fork would copy."""
    for label in range(10):
        (tmp_path / f"class{label}").mkdir()
        for i in range(500):
            (tmp_path / f"class{label}" / f"{i:04}.png").touch()
    tracemalloc.start()
    images = open_images(tmp_path, num_classes=10)
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(images) == 5000
    assert held < 1 << 18
    assert images.describe(4999) == str(tmp_path / "class9" / "0499.png")
