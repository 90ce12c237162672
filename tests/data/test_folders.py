"""The data files of a folder, and the class of each folder: as in torchvision, or by name."""

import os
import random

import pytest
from conftest import write_image
from timm.data.readers.reader_image_folder import find_images_and_targets
from torchvision.datasets import ImageFolder

from ssmcompress.data import class_names, open_images
from ssmcompress.data.splits import split_of_file
from ssmcompress.errors import InputError
from ssmcompress.progress import FrontEnd, use_front_end


class Recorder(FrontEnd):
    def __init__(self):
        super().__init__()
        self.lines = []

    def line(self, text):
        self.lines.append(text)


@pytest.fixture
def lines():
    recorder = Recorder()
    with use_front_end(recorder):
        yield recorder.lines


def fill(root, *files):
    for i, file in enumerate(files):
        if file.endswith("/"):
            (root / file).mkdir(parents=True)
        elif file.endswith((".png", ".JPEG", ".jpg")):
            write_image(root / file, i, (4, 4))
        else:
            (root / file).parent.mkdir(parents=True, exist_ok=True)
            (root / file).write_text("text")
    return root


def labels_by_folder(images):
    """Class folder -> its label, for images of a folder `data`."""
    return {images.describe(i).split("/data/")[1].split("/")[0]: label for i, label in enumerate(images.labels)}


@pytest.fixture
def data(tmp_path):
    (tmp_path / "data").mkdir()
    return tmp_path / "data"


# ---------------------------------------------------------------------------------------------- order of the classes


@pytest.mark.parametrize("count", [3, 11, 37, 1000])
def test_folders_named_by_numbers_are_classes_by_number(data, lines, count):
    for i in range(count):
        (data / str(i)).mkdir()
        (data / str(i) / "a.png").touch()
    images = open_images(data, count)
    assert labels_by_folder(images) == {str(i): i for i in range(count)} == find_images_and_targets(str(data))[1]
    assert len(lines) == (count > 10)
    if count == 1000:
        assert "988 of 1000 would be other classes" in lines[0]
        assert class_names(images, 1000)[0].startswith("tench")


def test_numbers_from_one_or_with_gaps_are_classes_in_their_order(data, lines):
    fill(data, *(f"{i}/a.png" for i in range(1, 13)))
    assert labels_by_folder(open_images(data, 12)) == {str(i): i - 1 for i in range(1, 13)}
    assert "1 is class 0, 12 the last one" in lines[0]
    fill(data, "40/a.png")
    assert labels_by_folder(open_images(data, 13))["40"] == 12


def test_leading_zeros_need_no_line(data, lines):
    fill(data, *(f"{i:04}/a.png" for i in range(12)))
    assert labels_by_folder(open_images(data, 12)) == {f"{i:04}": i for i in range(12)}
    assert lines == []
    fill(data, "3/a.png")
    with pytest.raises(InputError, match="0003 and 3 are the same number|3 and 0003"):
        open_images(data, 13)


def test_some_of_the_numbers_are_these_classes_unless_they_could_be_other_data(data, lines):
    fill(data, "3/a.png", "17/a.png", "98/a.png")
    assert labels_by_folder(open_images(data, 100)) == {"3": 3, "17": 17, "98": 98}
    assert "97 others have no images" in lines[0]
    with pytest.raises(InputError, match="3 classes .* the model has 90 classes"):
        open_images(data, 90)


@pytest.mark.parametrize("first", [0, 1])
def test_ten_digits_are_not_the_first_classes_of_a_large_head(data, first):
    fill(data, *(f"{i}/a.png" for i in range(first, first + 10)))
    with pytest.raises(InputError, match="10 classes .* the model has 1000 classes.*add empty folders for the others"):
        open_images(data, 1000)


@pytest.mark.parametrize(
    ("numbers", "classes"),
    [
        (set(range(1, 102)) - {57}, 102),  # Flowers-102, where class 102 is missing too
        (set(range(2, 12)), 12),
        (set(range(1, 103)) - {57}, 102),
    ],
)
def test_most_numbers_without_0_could_count_from_1(data, numbers, classes):
    fill(data, *(f"{i}/a.png" for i in numbers))
    advice = f"add empty folders for the others, so that there are 0 to {classes - 1}, or 1 to {classes}$"
    with pytest.raises(InputError, match=f"has {len(numbers)} classes.*{advice}"):
        open_images(data, classes)
    fill(data, *(f"{i}/" for i in set(range(1, classes + 1)) - numbers))
    assert labels_by_folder(open_images(data, classes)) == {str(i): i - 1 for i in sorted(numbers, key=str)}


def test_most_numbers_with_0_are_these_classes(data, lines):
    fill(data, *(f"{i}/a.png" for i in range(12) if i not in (3, 11)))
    assert labels_by_folder(open_images(data, 12))["10"] == 10
    assert "the numbers 0, 1, 2, ... are classes of the model, counted from 0; 2 others have no images" in lines[0]


def test_one_number_is_one_class(data, lines):
    fill(data, "3/a.png")
    assert open_images(data, 10).labels == (3,)
    assert "the number 3 is a class of the model, counted from 0; 9 others" in lines[0]


@pytest.mark.parametrize(
    ("numbers", "inside", "classes"),
    [
        ([3], ["n01443537", "n01629819"], 1000),  # ImageNet-C: a severity
        ([3], ["n01443537"], 1000),
        ([3, 5], ["n01443537", "n01629819"], 1000),
        ([1, 2, 3, 4, 5], ["n01443537", "n01629819"], 1000),
        ([3, 5], ["ant", "bee", "cat"], 100),
        ([2019, 2021], ["ant", "bee"], 21843),
    ],
)
def test_numbers_that_hold_class_folders_are_not_classes(data, numbers, inside, classes):
    fill(data, *(f"{i}/{name}/a.png" for i in numbers for name in inside))
    with pytest.raises(InputError, match=rf"folders with numbers \({numbers[0]}.*did you mean .*/data/{numbers[0]}\?$"):
        open_images(data, classes)


@pytest.mark.parametrize("inside", [["images"], ["x", "y"]])
def test_numbers_may_hold_further_folders(data, lines, inside):
    """One folder `images` in each, or different folders in each."""
    fill(data, *(f"{i}/{inside[i % len(inside)]}/a.png" for i in (3, 6, 7)))
    assert labels_by_folder(open_images(data, 10)) == {"3": 3, "6": 6, "7": 7}


def test_all_numbers_of_the_head_are_classes_whatever_they_hold(data, lines):
    fill(data, *(f"{i}/{name}/a.png" for i in range(1, 4) for name in ("left", "right")), "0/")
    assert labels_by_folder(open_images(data, 4)) == {"1": 1, "2": 2, "3": 3}
    fill(data, "0/left/a.png", "0/right/a.png")
    assert labels_by_folder(open_images(data, 4)) == {str(i): i for i in range(4)}


def test_a_number_whose_folders_are_the_classes_is_named(data):
    fill(data, *(f"1/{name}/a.png" for name in ("ant", "bee", "cat")), "2/a.png")
    with pytest.raises(InputError, match="has 2 classes.*did you mean .*/data/1"):
        open_images(data, 3)


def test_an_empty_folder_is_no_class_next_to_numbers(data):
    fill(data, *(f"{i}/a.png" for i in range(9)), "notes/")
    with pytest.raises(InputError, match="9 classes with images and 1 without .* the model has 10"):
        open_images(data, 10)


def test_numbers_and_other_names_are_sorted_as_text(data, lines):
    fill(data, "2/a.png", "10/a.png", "cat/a.png")
    assert labels_by_folder(open_images(data, 3)) == {"10": 0, "2": 1, "cat": 2}
    assert "class 0 is 10; timm's order has 2 there" in lines[0]


def test_names_are_sorted_as_in_torchvision_and_a_line_says_where_timm_differs(data, lines):
    fill(data, *(f"class{i}/a.png" for i in range(12)))
    images = open_images(data, 12)
    assert labels_by_folder(images) == ImageFolder(str(data)).class_to_idx
    assert labels_by_folder(images) != find_images_and_targets(str(data))[1]
    assert "sorted as text" in lines[0]


def test_a_folder_without_images_counts_where_the_head_needs_it(data, lines):
    fill(data, "ant/a.png", "bee/", "cat/a.png", "dog/notes.txt", "eel/a.png")
    assert labels_by_folder(open_images(data, 5)) == {"ant": 0, "cat": 2, "eel": 4}
    assert any("bee, dog" in line and "though they have no images" in line for line in lines)
    lines.clear()
    assert labels_by_folder(open_images(data, 3)) == {"ant": 0, "cat": 1, "eel": 2}
    assert any("no classes" in line and "bee, dog" in line for line in lines)
    with pytest.raises(InputError, match="3 classes with images and 2 without"):
        open_images(data, 4)


def test_an_empty_number_does_not_shift_the_others(data, lines):
    fill(data, *(f"{i}/a.png" for i in range(12) if i != 4), "4/", "logs/")
    assert labels_by_folder(open_images(data, 12)) == {str(i): i for i in range(12) if i != 4}
    assert any("logs" in line for line in lines)
    with pytest.raises(InputError, match="11 classes with images and 2 without"):
        open_images(data, 11)


def test_a_stranger_among_imagenets_folders_is_named(data):
    fill(data, "n01440764/a.JPEG", "samples/a.JPEG")
    with pytest.raises(InputError, match="samples is not one of ImageNet-1k's synsets"):
        open_images(data, 1000)


# ------------------------------------------------------------------------------------------------- which files count


def test_random_trees_are_read_as_torchvision_reads_them(data):
    generator = random.Random(0)
    names = ["ant", "bee", "Cat", "dog 1", "eel-2", "é"]
    for name in names:
        for i in range(generator.randint(1, 4)):
            depth = "/".join(generator.choices(["x", "y-1", "y", "images"], k=generator.randint(0, 2)))
            fill(data, f"{name}/{depth}/{i}.{generator.choice(['png', 'jpg', 'JPEG'])}")
        fill(data, f"{name}/{generator.choice(['notes.txt', 'clip.mp4'])}")
    images, theirs = open_images(data, len(names)), ImageFolder(str(data))
    assert [(images.describe(i), label) for i, label in enumerate(images.labels)] == theirs.samples
    assert list(images.classes) == theirs.classes


def test_images_further_down_count_for_their_class_folder(data, lines):
    fill(data, "ant/a.png", "ant/more/still/b.png", "bee/images/c.png")
    images = open_images(data, 2)
    assert images.labels == (0, 0, 1)
    assert any("nested folders count for their class folder: 2 (ant/more/still/b.png is ant)" in line for line in lines)


def test_system_files_and_folders_are_no_data(data, lines):
    system = ["__MACOSX/ant/._a.png", "lost+found/", "@eaDir/a.png", ".ipynb_checkpoints/a.png", "ant/.hidden.png"]
    fill(data, "ant/a.png", "ant/._a.png", "ant/.DS_Store", "ant/Thumbs.db", "bee/b.png", ".git/a.png", *system)
    images = open_images(data, 2)
    assert (len(images), images.classes) == (2, ("ant", "bee"))
    (line,) = lines
    assert "4 hidden or system folders (" in line
    assert "2 hidden or system files (ant/" in line


def test_files_that_are_no_images_are_named(data, lines):
    fill(data, "a.png", "b.heic", "c.heic", "labels.csv", "metadata.csv", "README.md")
    assert len(open_images(data, 10)) == 1
    (line,) = lines
    for part in ("2 .heic files (b.heic, ...)", "1 .csv file (labels.csv)", "1 metadata file (metadata.csv)"):
        assert part in line


def test_folders_of_other_files_say_what_they_hold(data):
    fill(data, "a.mp4", "cat/b.mp4")
    with pytest.raises(InputError, match=r"no images in .*only 2 .mp4 files \(a.mp4, ...\)"):
        open_images(data, 10)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("a.png", "a single image"),
        ("a.zip", "unpack it"),
        ("a.csv", "expected a folder of images"),
        ("noend", "expected a folder of images"),
    ],
)
def test_files_that_are_no_data(data, name, message):
    fill(data, name)
    with pytest.raises(InputError, match=message):
        open_images(data / name, 10)


def test_an_empty_name_is_not_the_working_directory(data, monkeypatch):
    monkeypatch.chdir(fill(data, "a.png"))
    with pytest.raises(InputError, match="empty"):
        open_images("", 10)


def test_links_are_followed_and_nothing_counts_twice(data, tmp_path):
    fill(tmp_path / "store", "a.png", "b.png")
    fill(data, "bee/c.png")
    os.symlink(tmp_path / "store", data / "ant")
    os.symlink(tmp_path / "gone.png", data / "bee" / "d.png")
    images = open_images(data, 2)
    assert images.labels == (0, 0, 1, 1)
    assert not images.readable(3)  # reported, as any unreadable image
    os.symlink(tmp_path / "store", data / "wasp")
    with pytest.raises(InputError, match="ant and .*wasp are the same folder"):
        open_images(data, 3)
    os.unlink(data / "wasp")
    os.symlink(data, data / "bee" / "loop")
    with pytest.raises(InputError, match="are the same folder"):
        open_images(data, 2)


def test_a_link_to_itself_is_an_unreadable_image(data):
    fill(data, "a.png")
    os.symlink("b.png", data / "b.png")
    images = open_images(data, 2)
    assert [images.readable(i) for i in range(len(images))] == [True, False]


def test_the_folder_of_a_model_is_no_class(data, lines):
    """The tool's own outputs next to the class folders, each with a picture in it."""
    output = [f"compressed/m-r0.30/{name}" for name in ("config.json", "model.safetensors", "kept_tokens.png")]
    fill(data, "ant/a.png", "bee/b.png", *output)
    assert open_images(data, 2).classes == ("ant", "bee")
    assert "1 folder of a model (compressed/m-r0.30)" in lines[0]
    with pytest.raises(InputError, match="has 2 classes .ant, bee., the model has 3"):
        open_images(data, 3)


def test_a_pipe_is_not_waited_for(data, lines):
    fill(data, "a.png")
    os.mkfifo(data / "b.png")
    assert len(open_images(data, 10)) == 1
    assert "1 special file (b.png)" in lines[0]


# --------------------------------------------------------------------------------------------------------- splits


@pytest.mark.parametrize(
    "names", [("train", "val"), ("training", "test"), ("pets-train", "pets-test"), ("train_images", "val2017")]
)
def test_split_folders_are_no_classes(data, names):
    for i, name in enumerate(names):
        fill(data, *(f"{name}/{label}/{k}.png" for label in ("ant", "bee") for k in range(i + 1)))
    for classes in (2, 5):
        with pytest.raises(InputError, match=f"several splits.*name one of them, such as .*data:{names[1]}"):
            open_images(data, classes)
    assert open_images(f"{data}:{names[1]}", 2).labels == (0, 0, 1, 1)
    assert open_images(data / names[0], 2).labels == (0, 1)
    with pytest.raises(InputError, match="no split extra"):
        open_images(f"{data}:extra", 2)


@pytest.mark.parametrize(("wrong", "split"), [("test1", "test2"), ("val_images", "dev")])
def test_two_folders_of_the_same_split_are_no_classes(data, wrong, split):
    fill(data, f"{wrong}/a.png", f"{split}/b.png", f"{split}/c.png")
    with pytest.raises(InputError, match="several splits"):
        open_images(data, 2)
    assert len(open_images(f"{data}:{split}", 2)) == 2


def test_names_with_the_same_split_word_are_classes(data):
    """Folders like `pets-train` are splits only next to another split."""
    fill(data, "pets-train/a.png", "pets-training/b.png")
    assert open_images(data, 2).classes == ("pets-train", "pets-training")


@pytest.mark.parametrize("outer", ["dogs-vs-cats", "ILSVRC/Data/CLS-LOC"])
def test_a_split_may_lie_further_in(data, lines, outer):
    for i, split in enumerate(("train", "val")):
        fill(data, *(f"{outer}/{split}/{label}/{k}.png" for label in ("ant", "bee") for k in range(i + 1)))
    fill(data, f"{outer}/Annotations/a.xml", "notes.csv", "preview.png")
    assert open_images(f"{data}:val", 2).labels == (0, 0, 1, 1)
    (line,) = lines
    for part in (f"1 .xml file ({outer}/Annotations/a.xml)", "(notes.csv)", "1 image without a split (preview.png)"):
        assert part in line
    with pytest.raises(InputError, match=f"{outer} has no split test; it has train, val"):
        open_images(f"{data}:test", 2)


def test_a_picture_next_to_the_splits_belongs_to_none(data, lines):
    fill(data, "train/ant/a.png", "train/bee/b.png", "val/a.png", "preview.png", "train/notes.csv")
    with pytest.raises(InputError, match=r"several splits \(train, val\); name one of them, such as .*data:val"):
        open_images(data, 2)
    assert open_images(f"{data}:train", 2).labels == (0, 1)
    assert sorted(line.partition("left out ")[2] for line in lines) == [
        "1 .csv file (notes.csv)",
        "1 image without a split (preview.png)",
    ]


def test_a_picture_next_to_a_single_split(data, lines):
    fill(data, "train/ant/a.png", "train/bee/b.png", "preview.png")
    with pytest.raises(InputError, match=r"holds both images and class folders \(train\)"):
        open_images(data, 2)
    assert open_images(f"{data}:training", 2).labels == (0, 1)
    assert "1 image without a split (preview.png)" in lines[0]


def test_a_folder_after_the_colon_is_opened_whatever_it_is_called(data):
    """Office-Home's domains; and a single split next to another folder."""
    fill(data, *(f"{domain}/{label}/a.png" for domain in ("Art", "Real", "train") for label in ("ant", "bee", "cat")))
    assert open_images(f"{data}:Real", 3).labels == open_images(f"{data}:train", 3).labels == (0, 1, 2)
    with pytest.raises(InputError, match="has no splits, so none called real"):
        open_images(f"{data}:real", 3)


def test_val_valid_and_validation_are_the_same_split(data):
    fill(data, "train/a.png", "valid/b.png", "valid/c.png", "devkit/notes.txt")
    assert {len(open_images(f"{data}:{name}", 2)) for name in ("val", "valid", "validation")} == {2}


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("train-00000-of-00002.parquet", "train"), ("v1.0-test-00000-of-00001.parquet", "test"),
        ("fashion.train.parquet", "train"), ("pets.val.000.tar", "val"), ("train.test.parquet", None),
        ("en.data-00000-of-00001.arrow", "en.data"), ("images.parquet", None),
    ],
)  # fmt: skip
def test_the_split_in_the_name_of_a_table_or_shard(name, split):
    assert split_of_file(f"folder/{name}") == split


@pytest.mark.parametrize("names", [("bus", "train"), ("test tube", "train station", "ant")])
def test_classes_may_be_called_as_splits_are(data, names):
    fill(data, *(f"{name}/a.png" for name in names))
    assert open_images(data, len(names)).classes == tuple(sorted(names))


def test_a_folder_without_splits_has_none(data):
    fill(data, "ant/a.png", "bee/b.png")
    with pytest.raises(InputError, match="has no splits"):
        open_images(f"{data}:test", 2)
    with pytest.raises(InputError, match="is a file, which has no split test"):
        open_images(f"{data / 'ant' / 'a.png'}:test", 2)


def test_a_colon_in_a_path_is_no_split(data):
    fill(data, "a:b/c.png")
    assert len(open_images(data / "a:b", 2)) == 1


@pytest.mark.parametrize(
    ("classes", "message"), [(4, "did you mean .*data/images"), (3, "cannot be scored$"), (1, "cannot be scored$")]
)
def test_the_advice_never_leads_into_one_class(data, classes, message):
    fill(data, *(f"images/class{i}/a.png" for i in range(4)), "more/sub/a.png")
    with pytest.raises(InputError, match=message):
        open_images(data, classes)
