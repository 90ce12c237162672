"""Tables and datasets saved by `datasets`: the files of one dataset, and the columns of images and labels."""

import json
import os
import shutil

import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, List, Value, load_from_disk
from datasets import Image as ImageFeature
from PIL import Image
from test_folders import Recorder

from ssmcompress.data import find_images, open_images
from ssmcompress.data.find import absolute_name
from ssmcompress.errors import InputError
from ssmcompress.progress import use_front_end

ANIMALS = ["zebra", "ant", "cat"]  # an order of their own


@pytest.fixture
def lines():
    recorder = Recorder()
    with use_front_end(recorder):
        yield recorder.lines


def table(kinds=None, **columns):
    """A table of grey images, row i of grey value i, and other columns, of some kinds."""
    rows = len(next(iter(columns.values())))
    columns = {"image": [Image.new("L", (4, 4), i) for i in range(rows)], **columns}
    if kinds is None:
        return Dataset.from_dict(columns)
    return Dataset.from_dict(columns, features=Features({"image": ImageFeature(), **kinds}))


def write(file, labels, **columns):
    file.parent.mkdir(parents=True, exist_ok=True)
    table(label=labels, **columns).to_parquet(file)
    return file


def greys(images):
    return [images.read(i).getpixel((0, 0)) for i in range(len(images))]


# --------------------------------------------------------------------------------------------------------- splits


@pytest.mark.parametrize(
    "files",
    [
        ("train-00000-of-00002.parquet", "train-00001-of-00002.parquet", "test-00000-of-00001.parquet"),
        ("data/train-0.parquet", "data/train-1.parquet", "data/test.parquet"),
        ("pets_train_0.parquet", "pets_train_1.parquet", "pets_test.PARQUET"),
        ("default/train/0000.parquet", "default/train/0001.parquet", "default/test/0000.parquet"),
    ],
    ids=["clone", "data", "words", "converted"],
)
def test_splits_are_not_put_together(tmp_path, files):
    for file, labels in zip(files, ([0, 1], [2], [3, 4]), strict=True):
        write(tmp_path / "repo" / file, labels)
    (tmp_path / "repo" / "README.md").write_text("text")
    with pytest.raises(
        InputError, match=r"several splits \(.*test.*train.*\); name one of them, such as (.*)$"
    ) as error:
        open_images(tmp_path / "repo", 5)
    advised = str(error.value).rpartition("such as ")[2]
    assert open_images(advised, 5).labels == (3, 4)
    assert open_images(f"{tmp_path / 'repo'}:train", 5).labels == (0, 1, 2)
    with pytest.raises(InputError, match="no split validation"):
        open_images(f"{tmp_path / 'repo'}:validation", 5)


def test_files_without_a_split_next_to_a_split_are_asked_about(tmp_path, lines):
    write(tmp_path / "train.parquet", [0])
    write(tmp_path / "extra.parquet", [1])
    with pytest.raises(InputError, match=r"files of a split \(train\) and others \(extra.parquet\)"):
        open_images(tmp_path, 5)
    assert open_images(f"{tmp_path}:train", 5).labels == (0,)
    assert "1 file of no split (extra.parquet)" in lines[0]


def test_parts_of_one_split_are_one_data_set(tmp_path, lines):
    for i in range(3):
        write(tmp_path / f"a-{i:05}-of-00003.parquet", [i])
    assert open_images(tmp_path, 3).labels == (0, 1, 2)
    assert lines == []
    write(tmp_path / "b-00000-of-00001.parquet", [1])
    with pytest.raises(InputError, match=r"several splits \(a, b\)"):
        open_images(tmp_path, 3)


def test_tables_that_could_count_twice_or_are_of_several_data_sets(tmp_path):
    write(tmp_path / "two" / "a.parquet", [0])
    Dataset.from_parquet(str(tmp_path / "two" / "a.parquet")).save_to_disk(tmp_path / "saved")
    shutil.copy(next((tmp_path / "saved").glob("*.arrow")), tmp_path / "two" / "a.arrow")
    with pytest.raises(InputError, match="may be the same images twice"):
        open_images(tmp_path / "two", 5)
    write(tmp_path / "link" / "a.parquet", [0])
    os.symlink("a.parquet", tmp_path / "link" / "b.parquet")
    with pytest.raises(InputError, match="a.parquet and .*b.parquet are the same file"):
        open_images(tmp_path / "link", 5)
    write(tmp_path / "sets" / "cifar10" / "a.parquet", [0])
    write(tmp_path / "sets" / "cifar100" / "a.parquet", [0])
    with pytest.raises(InputError, match=r"tables in several folders \(cifar10, cifar100\)"):
        open_images(tmp_path / "sets", 5)


def test_images_next_to_tables_are_asked_about(tmp_path, lines):
    write(tmp_path / "data" / "train-0.parquet", [0])
    Image.new("L", (4, 4)).save(tmp_path / "card.png")
    with pytest.raises(InputError, match=r"holds images \(card.png\) and tables \(data/train-0.parquet\)"):
        open_images(tmp_path, 5)
    assert open_images(f"{tmp_path}:train", 5).labels == (0,)
    assert "1 image without a split (card.png)" in lines[0]


def test_a_split_is_a_folder_or_a_file_but_not_both(tmp_path, lines):
    """A clone may contain test pictures, or pictures of its splits next to the tables."""
    write(tmp_path / "repo" / "data" / "train-0.parquet", [0])
    write(tmp_path / "repo" / "data" / "test-0.parquet", [1, 2])
    (tmp_path / "repo" / "test").mkdir()
    Image.new("L", (4, 4)).save(tmp_path / "repo" / "test" / "a.png")
    with pytest.raises(InputError, match=r"the split test in test and in data/test-0.parquet; name one of them by its"):
        open_images(f"{tmp_path / 'repo'}:test", 5)
    assert open_images(tmp_path / "repo" / "data" / "test-0.parquet", 5).labels == (1, 2)
    assert open_images(f"{tmp_path / 'repo'}:train", 5).labels == (0,)
    assert "1 image without a split (test/a.png)" in lines[0]


def test_tables_next_to_folders_of_splits(tmp_path, lines):
    for split, labels in (("train", [0]), ("val", [1, 2])):
        write(tmp_path / "repo" / split / "0000.parquet", labels)
    write(tmp_path / "repo" / "extra.parquet", [3])
    write(tmp_path / "repo" / "test.parquet", [4])
    with pytest.raises(InputError, match="several splits"):
        open_images(tmp_path / "repo", 5)
    assert open_images(f"{tmp_path / 'repo'}:validation", 5).labels == (1, 2)
    assert "1 file of no split (extra.parquet)" in lines[0]
    assert open_images(f"{tmp_path / 'repo'}:test", 5).labels == (4,)


# ---------------------------------------------------------------------------------------------- saved by `datasets`


def test_a_saved_data_set_is_what_its_state_says(tmp_path, lines):
    table(label=[3, 1, 2]).save_to_disk(tmp_path / "saved")
    saved = load_from_disk(str(tmp_path / "saved"))
    saved.sort("label")  # writes a cache next to the data
    saved.map(lambda row: {"other": 1})
    assert list((tmp_path / "saved").glob("cache-*.arrow"))
    images = open_images(tmp_path / "saved", 5)
    assert images.labels == (3, 1, 2)
    assert greys(images) == [0, 1, 2]
    assert lines == []  # caches are never data
    shutil.copy(next((tmp_path / "saved").glob("data-*.arrow")), tmp_path / "saved" / "data-old.arrow")
    assert open_images(tmp_path / "saved", 5).labels == (3, 1, 2)
    assert "1 file outside of state.json (data-old.arrow)" in lines.pop()
    os.unlink(tmp_path / "saved" / "data-old.arrow")
    with pytest.raises(InputError, match="one dataset, which has no split test"):
        open_images(f"{tmp_path / 'saved'}:test", 5)
    next((tmp_path / "saved").glob("data-*.arrow")).write_bytes(b"no table")
    with pytest.raises(InputError, match="not a whole folder of `save_to_disk`"):
        open_images(tmp_path / "saved", 5)


def test_a_saved_data_set_dict_asks_for_the_split(tmp_path):
    DatasetDict({"train": table(label=[0, 1]), "validation": table(label=[2])}).save_to_disk(tmp_path / "saved")
    with pytest.raises(InputError, match="name one of them, such as .*saved:validation"):
        open_images(tmp_path / "saved", 5)
    assert open_images(f"{tmp_path / 'saved'}:val", 5).labels == (2,)
    assert open_images(tmp_path / "saved" / "train", 5).labels == (0, 1)
    for content in ("[]", '{"splits": ["../x"]}', '{"splits": ["gone"]}', "no json", '{"splits": [3]}'):
        (tmp_path / "saved" / "dataset_dict.json").write_text(content)
        with pytest.raises(InputError, match="does not list the splits"):
            open_images(tmp_path / "saved", 5)


def test_what_lies_around_a_single_folder_is_named_once(tmp_path, lines):
    table(label=[3, 1]).save_to_disk(tmp_path / "mine" / "saved")
    for name in ("saved/cache-0123.arrow", "saved/notes.csv", "notes.txt"):
        (tmp_path / "mine" / name).write_text("text")
    assert open_images(tmp_path / "mine", 5).labels == (3, 1)
    (line,) = lines
    for part in ("(saved/cache-0123.arrow)", "1 .csv file (saved/notes.csv)", "1 .txt file (notes.txt)"):
        assert part in line


def test_caches_without_a_state_are_left_out(tmp_path, lines):
    table(label=[1, 2]).save_to_disk(tmp_path / "saved")
    for name in ("pets-train.arrow", "cache-0123.arrow", "tmpabc.arrow"):
        (tmp_path / "cached").mkdir(exist_ok=True)
        shutil.copy(next((tmp_path / "saved").glob("*.arrow")), tmp_path / "cached" / name)
    assert open_images(tmp_path / "cached", 5).labels == (1, 2)
    assert "2 cache or unfinished files (cache-0123.arrow, ...)" in lines[0]


# -------------------------------------------------------------------------------------------------------- columns


@pytest.mark.parametrize(
    "name", ["label", "Label", "LABELS", "category", "Category_ID", "target", "class_idx", "Class", "scene_category"]
)
def test_labels_may_have_similar_names(tmp_path, name):
    table(**{name: [2, 0, 1], "id": [7, 8, 9]}).to_parquet(tmp_path / "a.parquet")
    assert open_images(tmp_path / "a.parquet", 3).labels == (2, 0, 1)


def test_a_column_of_the_type_class_label_may_have_any_name(tmp_path):
    kinds = {"species": ClassLabel(names=ANIMALS)}
    table(kinds, species=[2, 0, 1]).to_parquet(tmp_path / "a.parquet")
    images = open_images(tmp_path / "a.parquet", 3)
    assert (images.labels, images.classes) == ((2, 0, 1), tuple(ANIMALS))


def test_a_table_without_labels_says_so(tmp_path, lines):
    table(species_number=[2, 0, 1]).to_parquet(tmp_path / "a.parquet")
    assert open_images(tmp_path / "a.parquet", 3).labels is None
    assert "columns image, species_number is called label or similar; the images count as unlabelled" in lines[0]


@pytest.mark.parametrize(("classes", "labels"), [(4, (3, 1, 0, 2)), (2, (1, 0, 0, 1))])
def test_of_two_labels_the_one_with_the_heads_classes_counts(tmp_path, lines, classes, labels):
    kinds = {"fine_label": ClassLabel(4), "coarse_label": ClassLabel(2)}
    table(kinds, fine_label=[3, 1, 0, 2], coarse_label=[1, 0, 0, 1]).to_parquet(tmp_path / "a.parquet")
    assert open_images(tmp_path / "a.parquet", classes).labels == labels
    assert "not used" in lines[0]


def test_labels_that_could_each_be_meant_are_asked_about(tmp_path):
    table(label=[0, 1, 2], target=[2, 1, 0]).to_parquet(tmp_path / "a.parquet")
    with pytest.raises(InputError, match=r"several columns of labels \(label, target\)"):
        open_images(tmp_path / "a.parquet", 3)
    table(label=[1, 2, 3], label_name=["cat", "bee", "ant"]).to_parquet(tmp_path / "a.parquet")
    with pytest.raises(InputError, match="labels start at 1 here"):  # the order of the names could be another
        open_images(tmp_path / "a.parquet", 3)
    table(label=[5, 6, 7], quality_label=[1, 1, 0]).to_parquet(tmp_path / "a.parquet")
    with pytest.raises(InputError, match="label 5"):
        open_images(tmp_path / "a.parquet", 3)
    table(label=[0, 1, 2], target=[0, 1, 2], label_name=["a", "b", "c"]).to_parquet(tmp_path / "a.parquet")
    assert open_images(tmp_path / "a.parquet", 3).labels == (0, 1, 2)


@pytest.mark.parametrize(
    ("name", "values"),
    [("y", [5, 6, 7]), ("class", [0, 0, 1]), ("category", ["x", "x", "y"]), ("targets", [0.5, 1.5, 2.5])],
)
@pytest.mark.parametrize("label", ["label", "Label"])
def test_the_column_label_counts_before_similar_names(tmp_path, lines, label, name, values):
    table(**{name: values, label: [0, 1, 2]}).to_parquet(tmp_path / "a.parquet")
    assert open_images(tmp_path / "a.parquet", 10).labels == (0, 1, 2)
    assert f"labels are the column {label}; {name} not used" in lines[0]


def test_another_column_counts_if_it_alone_has_all_classes(tmp_path):
    table(label=[0, 1, 1], y=[2, 0, 1]).to_parquet(tmp_path / "a.parquet")
    assert open_images(tmp_path / "a.parquet", 3).labels == (2, 0, 1)
    table(target=[0, 1, 1], y=[2, 0, 1]).to_parquet(tmp_path / "a.parquet")
    with pytest.raises(InputError, match=r"several columns of labels \(target, y\)"):  # none is called label
        open_images(tmp_path / "a.parquet", 10)


@pytest.mark.parametrize("fine", ["fine_label", "fine_label_id"])
def test_fine_and_coarse_labels_are_equals(tmp_path, fine):
    table(**{fine: [0, 3, 3, 1], "coarse_label": [0, 1, 2, 0]}).to_parquet(tmp_path / "a.parquet")
    with pytest.raises(InputError, match=rf"several columns of labels \({fine}, coarse_label\)"):
        open_images(tmp_path / "a.parquet", 20)
    table(**{fine: [0, 3, 3, 1], "coarse_label": [0, 1, 2, 3]}).to_parquet(tmp_path / "a.parquet")
    assert open_images(tmp_path / "a.parquet", 4).labels == (0, 1, 2, 3)


def test_images_may_have_similar_names_and_masks_are_not_taken_for_them(tmp_path, lines):
    columns = {"Img": [Image.new("L", (4, 4), i) for i in (5, 6)], "label": [1, 0]}
    Dataset.from_dict(columns).to_parquet(tmp_path / "a.parquet")
    assert greys(open_images(tmp_path / "a.parquet", 2)) == [5, 6]
    masks = [Image.new("L", (4, 4), 200)] * 2
    Dataset.from_dict({"annotation": masks, **columns}).to_parquet(tmp_path / "a.parquet")
    assert greys(open_images(tmp_path / "a.parquet", 2)) == [5, 6]
    assert "images are the column Img; annotation not used" in lines[0]
    Dataset.from_dict({"left": masks, "right": masks}).to_parquet(tmp_path / "a.parquet")
    with pytest.raises(InputError, match=r"several columns of images \(left, right\)"):
        open_images(tmp_path / "a.parquet", 2)


def test_images_may_be_paths_next_to_the_table(tmp_path):
    (tmp_path / "pictures").mkdir()
    Image.new("L", (4, 4), 9).save(tmp_path / "pictures" / "x.png")
    Dataset.from_dict({"image": ["pictures/x.png"], "label": [1]}).to_parquet(tmp_path / "a.parquet")
    assert greys(open_images(tmp_path / "a.parquet", 2)) == [9]


@pytest.mark.parametrize(
    ("labels", "classes", "expected"),
    [
        (["cat", "ant", "cat", "bee"], 3, (2, 0, 2, 1)),
        (["10", "2", "0"], 12, (10, 2, 0)),
        (["n15075141", "n01440764"], 1000, (999, 0)),
        ([None, None], 3, None),
        (["", ""], 3, None),
    ],
    ids=["names", "numbers", "synsets", "missing", "blank"],
)
def test_labels_that_are_text(tmp_path, labels, classes, expected):
    table({"label": Value("string")}, label=labels).to_parquet(tmp_path / "a.parquet")
    assert open_images(tmp_path / "a.parquet", classes).labels == expected


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (["cat", "ant"], "found 2"),
        (["cat", None, "ant", "bee"], "row 1: no label"),
        (["10", "2"], "expected classes 0 to 2"),
        ([1, 2, 3], "labels start at 1 here"),
        ([[0], [1, 2]], "does not hold one class for each image"),
        ([0.5, 1.0], "label 0.5"),
    ],
)
def test_labels_that_are_not_the_heads(tmp_path, labels, message):
    table(label=labels).to_parquet(tmp_path / "a.parquet")
    with pytest.raises(InputError, match=message):
        open_images(tmp_path / "a.parquet", 3)


def test_a_table_of_numbered_folders_has_the_classes_of_the_folders(tmp_path, lines):
    """`datasets` sorts the folders 0 to 11 as text, so its class 2 is called 10."""
    names = sorted(map(str, range(12)))
    table({"label": ClassLabel(names=names)}, label=list(range(12))).to_parquet(tmp_path / "a.parquet")
    assert open_images(tmp_path / "a.parquet", 12).labels == tuple(map(int, names))
    assert "numbers are classes by their value" in lines[0]
    lines.clear()
    table({"label": ClassLabel(12)}, label=list(range(12))).to_parquet(tmp_path / "b.parquet")
    assert open_images(tmp_path / "b.parquet", 12).labels == tuple(range(12))
    assert lines == []


def test_lists_of_labels_next_to_one_label(tmp_path):
    kinds = {"labels": List(Value("int64")), "label": Value("int64")}
    table(kinds, labels=[[0], [1, 2]], label=[1, 0]).to_parquet(tmp_path / "a.parquet")
    assert open_images(tmp_path / "a.parquet", 2).labels == (1, 0)


# ---------------------------------------------------------------------------------------- names that a model records


def test_a_recorded_split_is_found_from_any_folder(tmp_path, monkeypatch):
    write(tmp_path / "repo" / "train-0.parquet", [0])
    write(tmp_path / "repo" / "test-0.parquet", [1, 2])
    monkeypatch.chdir(tmp_path)
    recorded = absolute_name("repo:test")
    assert recorded == f"{tmp_path / 'repo'}:test"
    monkeypatch.chdir("/")
    assert len(find_images(None, (8, 8), 5, recorded)) == 2


@pytest.mark.parametrize("recorded", ["C:\\Users\\me\\images", "/gone/images:test", "repo:test", "", "~:x"])
def test_a_recorded_path_that_is_gone_or_relative_is_no_hub_name(tmp_path, monkeypatch, recorded):
    write(tmp_path / "repo" / "test-0.parquet", [1, 2])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("ssmcompress.data.find.read_hub", lambda *args: pytest.fail("asked the hub"))
    assert find_images(None, (8, 8), 5, recorded).stand_in


def test_a_hub_name_may_have_a_configuration_and_needs_a_split(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(
        "datasets.load_dataset", lambda *args, **kw: asked.append((*args, kw["split"])) or table(label=[1])
    )
    for name in ("me/pets:test", "me/pets:small:test", "me/pets:test[:10%]", "mnist:train"):
        open_images(name, 3)
    assert asked == [
        ("me/pets", None, "test"),
        ("me/pets", "small", "test"),
        ("me/pets", None, "test[:10%]"),
        ("mnist", None, "train"),
    ]
    with pytest.raises(InputError, match="needs its split, such as me/pets:validation"):
        open_images("me/pets", 3)


def test_several_configurations_are_named(tmp_path, monkeypatch):
    """The real loading code, on a local repository with two configurations."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    from ssmcompress.data.tables import read_hub

    for config in ("large", "small"):
        write(tmp_path / "repo" / config / "test-0.parquet", [1])
    configs = [{"config_name": c, "data_files": f"{c}/*.parquet"} for c in ("large", "small")]
    (tmp_path / "repo" / "README.md").write_text(f"---\nconfigs: {json.dumps(configs)}\n---\n")
    with pytest.raises(InputError, match=r"name one, such as .*repo:NAME:train .*'large', 'small'"):
        read_hub(str(tmp_path / "repo"), "train", 3)
    assert read_hub(str(tmp_path / "repo"), "small:train", 3).labels == (1,)
