"""Tar shards with members in any order, and with unrelated members."""

import random
import tarfile
import tracemalloc

import numpy as np
import pytest
from test_data import png, write_shard
from test_folders import Recorder

from ssmcompress.data import open_images
from ssmcompress.data.shards import read_index
from ssmcompress.errors import InputError
from ssmcompress.progress import use_front_end


@pytest.fixture
def lines():
    recorder = Recorder()
    with use_front_end(recorder):
        yield recorder.lines


def pixels(images):
    return [np.asarray(images.read(i)).tobytes() for i in range(len(images))]


@pytest.mark.parametrize("seed", range(5))
def test_the_order_of_members_does_not_matter(tmp_path, lines, seed):
    members = [(f"{'ab'[i % 2]}/{i // 2}.png", png(i)) for i in range(14)]
    members += [(f"{'ab'[i % 2]}/{i // 2}.{'cls' if i % 3 else 'json'}", label(i)) for i in range(14)]
    random.Random(seed).shuffle(members)
    images = open_images(write_shard(tmp_path / "s" / "0.tar", members), num_classes=14)
    order = [i for name, content in members if name.endswith("png") for i in range(14) if content == png(i)]
    assert images.labels == tuple(order)
    assert [np.asarray(images.read(k)).tobytes() for k in range(14)] == [decoded(i) for i in order]
    assert lines == []


def label(i):
    return str(i).encode() if i % 3 else f'{{"caption": "a", "label": {i}}}'.encode()


def decoded(i):
    return np.random.default_rng(i).integers(0, 256, (8, 8, 3), dtype=np.uint8).tobytes()


def test_what_macs_and_tar_add_is_no_image(tmp_path, lines):
    members = [
        ("./._0.png", b"Mac OS X"),
        ("./0.png", png(0)),
        ("./._0.cls", b"Mac OS X"),
        ("./0.cls", b"2"),
        ("__MACOSX/._0.png", b"Mac OS X"),
        ("PaxHeaders.12/0.png", b"30 mtime=1"),
        (".DS_Store", b"x"),
    ]
    images = open_images(write_shard(tmp_path / "s" / "0.tar", members), num_classes=3)
    assert (images.labels, pixels(images)) == ((2,), [decoded(0)])
    assert "3 hidden or system members (./._0.png, ...)" in lines[0]


def test_every_member_that_is_not_read_is_named(tmp_path, lines):
    members = [("0.png", png(0)), ("0.seg.png", png(1)), ("0.txt", b"a cat"), ("0.cls", b"1"), ("9.cls", b"1")]
    file = write_shard(tmp_path / "s" / "0.tar", members)
    with tarfile.open(file, "a") as tar:
        link = tarfile.TarInfo("1.png")
        link.type, link.linkname = tarfile.LNKTYPE, "0.png"
        tar.addfile(link)
    assert len(open_images(file, num_classes=3)) == 1
    for part in (
        "1 .seg.png member (0.seg.png)",
        "1 .txt member (0.txt)",
        "1 .cls member without an image (9.cls)",
        "1 link or sparse member (1.png)",
    ):
        assert part in lines[0]


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([("a/0.png", 0), ("a/1.png", 1), ("a/0.jpg", 2)], "a/0.png and a/0.jpg belong to the same sample"),
        ([("0.png", 0), ("1.png", 1), ("0.png", 2)], "0.png and 0.png belong to the same sample"),
        ([("0.png", 0), ("0.cls", b"1"), ("1.png", 1), ("0.cls", b"2")], "0.cls and 0.cls belong to the same sample"),
        ([("0.json", b'{"label": 2}'), ("0.png", 0), ("0.cls", b"1")], "0.json and 0.cls have different labels"),
        ([("0.json", b'{"label": "cat"}'), ("0.png", 0)], "0.json: no label"),
        ([("0.png", 0), ("1.png", 1), ("1.cls", b"1")], "row 0: label -1; 1 of 2 images have no .cls member"),
    ],
    ids=["suffixes", "appended", "labels", "json", "text", "missing"],
)
def test_samples_that_are_not_clear(tmp_path, members, message):
    members = [(name, png(content) if isinstance(content, int) else content) for name, content in members]
    with pytest.raises(InputError, match=message):
        open_images(write_shard(tmp_path / "s" / "0.tar", members), num_classes=3)


def test_a_number_in_cls_counts_before_a_text_in_json(tmp_path):
    members = [("0.json", b'{"label": "cat"}'), ("0.png", png(0)), ("0.cls", b"1")]
    assert open_images(write_shard(tmp_path / "s" / "0.tar", members), num_classes=3).labels == (1,)


def test_a_json_without_a_label_is_named(tmp_path, lines):
    members = [
        (f"{i}.{end}", png(i) if end == "png" else b'{"class_id": 1}') for i in range(3) for end in ("png", "json")
    ]
    assert open_images(write_shard(tmp_path / "s" / "0.tar", members), num_classes=3).labels is None
    (line,) = lines
    assert "3 .json members without label, cls or class (0.json, ...)" in line


@pytest.mark.parametrize("folder", ["../x/", "./../", "a/./b/", "../../data/"])
def test_members_below_dots_are_not_hidden(tmp_path, lines, folder):
    file = write_shard(tmp_path / "s" / "0.tar", [(f"{folder}0.png", png(0)), (f"{folder}0.cls", b"2")])
    assert open_images(file, num_classes=3).labels == (2,)
    assert lines == []
    hidden = write_shard(tmp_path / "h" / "0.tar", [(f"{folder}.x/0.png", png(0)), (f"{folder}0.png", png(1))])
    assert pixels(open_images(hidden, num_classes=3)) == [decoded(1)]


@pytest.mark.parametrize("text", [b"007", b"7", b" 07\n", b"+7", b"0000007\r\n"])
def test_numbers_in_cls_are_read_as_webdataset_reads_them(tmp_path, text):
    file = write_shard(tmp_path / "s" / "0.tar", [("0.png", png(0)), ("0.cls", text)])
    assert open_images(file, num_classes=8).labels == (int(text),)


@pytest.mark.parametrize("text", [b"cat", b"1_0", b"7 8", b"7.0", b'"7"', b"", b"\xff7", b"0x7", b"9" * 5000])
def test_what_is_no_number_in_cls_is_quoted(tmp_path, text):
    file = write_shard(tmp_path / "s" / "0.tar", [("0.png", png(0)), ("0.cls", text)])
    with pytest.raises(InputError, match=r"0.cls: no label \(expected a whole number, found '.{0,20}'\)$"):
        open_images(file, num_classes=80)


def test_folders_in_a_shard_are_not_taken_for_labels_in_silence(tmp_path, lines):
    file = write_shard(tmp_path / "s" / "0.tar", [("cat/0.png", png(0)), ("dog/0.png", png(1))])
    assert open_images(file, num_classes=2).labels is None
    assert "cat, dog" in lines[0]
    assert "unlabelled" in lines[0]


def test_shards_of_several_splits_are_asked_about(tmp_path):
    for i, name in enumerate(("pets-train-000.tar", "pets-train-001.tar", "pets-val-000.tar")):
        write_shard(tmp_path / "s" / name, [("0.png", png(i)), ("0.cls", b"%d" % i)])
    with pytest.raises(InputError, match=r"several splits \(train, val\); name one of them, such as .*s:val"):
        open_images(tmp_path / "s", 3)
    assert open_images(f"{tmp_path / 's'}:validation", 3).labels == (2,)
    assert open_images(f"{tmp_path / 's'}:train", 3).labels == (0, 1)


def test_an_index_of_many_members_takes_little_memory(tmp_path):
    """28 bytes for each sample; the names alone would take a hundred."""
    count = 2000
    members = [(f"train/images/{i:09}.png", b"x") for i in range(count)]
    members += [(f"train/images/{i:09}.cls", b"1") for i in range(count)]
    file = write_shard(tmp_path / "s" / "0.tar", members)
    del members
    tracemalloc.start()
    index = read_index([file])
    held, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(index) == count
    assert held < 28 * count + 20_000
    assert peak < 160 * count + 20_000
