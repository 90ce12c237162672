"""The videos of a folder, their classes, and rejected folders."""

import itertools

import numpy as np
import pytest
from PIL import Image
from test_folders import Recorder
from videos import make_frames, red_values, write_frames

from ssmcompress.data import Batches, open_images
from ssmcompress.data.content import digest_picture
from ssmcompress.data.find import check_name, find_images
from ssmcompress.data.signature import compare_signatures, sign_images
from ssmcompress.data.video import Video
from ssmcompress.errors import InputError
from ssmcompress.progress import use_front_end


@pytest.fixture
def lines():
    recorder = Recorder()
    with use_front_end(recorder):
        yield recorder.lines


@pytest.fixture
def data(tmp_path):
    (tmp_path / "data").mkdir()
    return tmp_path / "data"


def open_videos(name, classes=2):
    return open_images(name, classes, videos=True)


def names_of(videos, root):
    return [videos.describe(i).removeprefix(f"{root}/") for i in range(len(videos))]


def test_class_folders_hold_videos_of_each_kind(data):
    """A folder of frames, an .npz and an .npy file, at any depth of their class folder."""
    write_frames(data / "cat" / "one", 3)
    np.savez(data / "cat" / "two.npz", video=make_frames(4))
    write_frames(data / "dog" / "outside" / "three", 5)
    np.save(data / "dog" / "four.npy", make_frames(6))
    videos = open_videos(data)
    lengths = {name: len(videos.read(i)) for i, name in enumerate(names_of(videos, data))}
    assert lengths == {"cat/one": 3, "cat/two.npz": 4, "dog/outside/three": 5, "dog/four.npy": 6}
    labels = dict(zip(names_of(videos, data), videos.labels, strict=True))
    assert labels == {"cat/one": 0, "cat/two.npz": 0, "dog/outside/three": 1, "dog/four.npy": 1}
    assert videos.classes == ("cat", "dog")


def test_frames_are_in_natural_order_without_hidden_files(data):
    write_frames(data / "a" / "v", 12)
    write_frames(data / "b" / "v", 1)
    (data / "a" / "v" / "._frame_0.png").write_bytes(b"attributes")
    (data / "a" / "v" / "notes.txt").write_text("text")
    assert red_values(open_videos(data).read(0)) == list(range(12))


def test_folders_of_pictures_are_videos_without_labels(data, lines):
    for name in ("first", "second", "third"):
        write_frames(data / name, 4)
    videos = open_videos(data)
    assert videos.labels is None
    assert names_of(videos, data) == ["first", "second", "third"]
    assert any("read as videos without labels" in line for line in lines)


def test_files_without_class_folders_have_no_labels(data):
    """As many files as classes do not count as class folders."""
    for name in "xy":
        np.save(data / f"{name}.npy", make_frames(3))
    assert open_videos(data).labels is None


def test_as_many_folders_of_pictures_as_classes_are_refused(data):
    """They may be class folders of pictures, as for a model that takes images."""
    for name in ("cat", "dog"):
        write_frames(data / name, 4)
    with pytest.raises(InputError, match=r"2 folders of pictures \(cat, dog\), as many as the model has classes"):
        open_videos(data)
    assert open_images(data, 2).labels == (0,) * 4 + (1,) * 4  # images of classes for such a model


def test_folders_called_as_imagenets_classes_are_refused(data):
    write_frames(data / "n01440764", 4)
    with pytest.raises(InputError, match="called as classes of ImageNet are"):
        open_videos(data, 1000)


def test_pictures_of_different_sizes_are_no_frames(data):
    for name, side in (("a", 8), ("b", 8), ("c", 8)):
        write_frames(data / name, 2, (side, side))
    Image.new("RGB", (9, 8)).save(data / "b" / "photo.png")
    with pytest.raises(InputError, match=r"pictures in .*b differ in size \(b/frame_0.png 8x8, b/photo.png 9x8\)"):
        open_videos(data)


def test_pictures_in_the_named_folder_are_refused(data):
    write_frames(data, 4)
    with pytest.raises(
        InputError, match=r"holds pictures \(frame_0.png\) where videos are expected.*name a folder that"
    ):
        open_videos(data)


def test_pictures_next_to_videos_in_a_class_folder_are_refused(data):
    write_frames(data / "a" / "v", 2)
    write_frames(data / "b" / "v", 2)
    write_frames(data / "a", 1, name="cover_{}.png")
    with pytest.raises(InputError, match=r"a holds pictures \(a/cover_0.png\) and videos \(a/v\)"):
        open_videos(data)


def test_videos_next_to_class_folders_are_refused(data):
    write_frames(data / "cat" / "v", 2)
    write_frames(data / "dog", 2)
    with pytest.raises(InputError, match=r"the pictures in dog\) next to folders of videos \(cat/v\)"):
        open_videos(data)


def test_class_folders_follow_the_rules_for_images(data, lines):
    """Numbers are classes by their value; other numbers of classes are refused."""
    for name in ("2", "10", "1"):
        write_frames(data / name / "v", 2)
    videos = open_videos(data, 11)
    assert dict(zip(names_of(videos, data), videos.labels, strict=True)) == {"1/v": 1, "10/v": 10, "2/v": 2}
    with pytest.raises(InputError, match="the model has 4 classes"):
        open_videos(data, 4)


def test_splits_are_chosen_as_for_images(data):
    for split, count in (("train", 3), ("val", 1)):
        for i in range(count):
            write_frames(data / split / "a" / f"v{i}", 2)
            np.save(data / split / "a" / f"w{i}.npy", make_frames(2))
    assert len(open_videos(f"{data}:validation", 1)) == 2
    check_name(f"{data}:train")
    with pytest.raises(InputError, match="holds several splits"):
        open_videos(data)
    with pytest.raises(InputError, match="has no split test"):
        check_name(f"{data}:test")


def test_a_split_of_video_files_is_found_before_the_model_is_known(data):
    """Only files, in which an image model finds nothing."""
    for split in ("train", "val"):
        (data / split).mkdir()
        np.save(data / split / "v.npy", make_frames(2))
    check_name(f"{data}:val")
    with pytest.raises(InputError, match="has no splits, so none called test"):
        check_name(f"{data}:test")


@pytest.mark.parametrize("suffix", [".parquet", ".tar"])
def test_tables_and_shards_are_refused(data, suffix):
    (data / f"data{suffix}").write_bytes(b"")
    with pytest.raises(InputError, match="holds tables or tar shards, from which videos are not read"):
        open_videos(data)
    with pytest.raises(InputError, match="holds no videos: expected a folder of videos"):
        open_videos(data / f"data{suffix}")


def test_what_is_not_there_is_refused(data):
    with pytest.raises(InputError, match="no videos in"):
        open_videos(data)
    with pytest.raises(InputError, match="no videos at owner/name:train"):
        open_videos("owner/name:train")


def test_a_model_of_images_reads_pictures_at_any_depth(data):
    """Folders of frames are images of their class, as before."""
    write_frames(data / "a" / "v", 3)
    write_frames(data / "b" / "v", 2)
    np.save(data / "b" / "w.npy", make_frames(2))
    assert open_images(data, 2).labels == (0, 0, 0, 1, 1)


# ---------------------------------------------------------------------------------------------------- arrays


def test_one_file_holds_several_videos(tmp_path):
    frames = np.stack([make_frames(5), make_frames(5, base=50)])
    np.savez(tmp_path / "set.npz", videos=frames, labels=np.array([1, 0]))
    videos = open_videos(tmp_path / "set.npz")
    assert videos.labels == (1, 0)
    assert red_values(videos.read(1)) == [50, 51, 52, 53, 54]
    np.savez(tmp_path / "text.npz", frames=frames, labels=np.array(["dog", "cat"]))
    assert open_videos(tmp_path / "text.npz").labels == (1, 0)
    np.save(tmp_path / "set.npy", frames)
    assert open_videos(tmp_path / "set.npy").labels is None


FRAMES = make_frames(4)[None]


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"videos": FRAMES.astype(np.float32)}, r"float32: expected \(videos, frames, height, width, 3\) uint8"),
        ({"videos": FRAMES.transpose(0, 1, 4, 2, 3)}, r"\(1, 4, 3, 12, 16\) uint8: expected"),
        ({"videos": FRAMES[0]}, r"is a single video \(4, 12, 16, 3\); name a folder that holds it"),
        ({"one": FRAMES, "two": FRAMES}, "arrays one, two: expected a single one, or one of them called videos"),
        ({"videos": FRAMES, "video": FRAMES}, "arrays videos, video: expected a single one"),
        ({"videos": FRAMES, "labels": np.array([5])}, "label 5; expected classes 0 to 1"),
        ({"videos": FRAMES, "labels": np.array([0, 1])}, r"labels \(2,\) int64, expected \(1,\)"),
        ({"videos": FRAMES, "labels": np.array([0.5])}, r"labels \(1,\) float64, expected"),
        ({"videos": np.array([{}])}, "unreadable array"),
    ],
    ids=["floats", "channels-first", "single", "unnamed", "two-names", "range", "count", "float-labels", "pickle"],
)
def test_files_of_another_form_are_refused(tmp_path, arrays, message):
    np.savez(tmp_path / "set.npz", **arrays)
    with pytest.raises(InputError, match=message):
        open_videos(tmp_path / "set.npz")


def test_arrays_of_another_form_in_a_folder_are_refused(data):
    np.save(data / "v.npy", make_frames(3).astype(np.float32))
    with pytest.raises(InputError, match=r"v.npy: .*float32: expected \(frames, height, width, 3\) uint8"):
        open_videos(data)


def test_several_videos_in_a_file_of_a_folder_are_refused(data):
    np.save(data / "v.npy", FRAMES)
    with pytest.raises(InputError, match=r"name .*v.npy alone if it holds several videos"):
        open_videos(data)


# ------------------------------------------------------------------------------------------ damage and content


def take_first(video):
    import torch

    return torch.tensor(float(video.frame(0).convert("RGB").getpixel((0, 0))[0]))


def test_unreadable_videos_are_left_out_by_name(data):
    """A damaged frame that is read, an empty file, and frames of two sizes."""
    write_frames(data / "good", 3, base=7)
    write_frames(data / "damaged", 3)
    (data / "damaged" / "frame_0.png").write_bytes(b"no picture")
    (data / "empty.npy").write_bytes(b"")
    write_frames(data / "sizes", 40, (8, 8))
    Image.new("RGB", (9, 8)).save(data / "sizes" / "frame_2.png")  # no header is read of it when the data is opened
    batches = Batches(open_videos(data, 10), take_first)
    values = [batch.images.tolist() for batch in batches]
    assert values == [[7.0]]
    assert sorted(name.rpartition("/")[2] for name in batches.unreadable_names()) == ["damaged", "empty.npy", "sizes"]
    assert [open_videos(data, 10).readable(i) for i in range(4)].count(True) == 1


def test_a_video_has_one_digest_however_it_is_stored(tmp_path):
    frames = make_frames(20)
    stored = Video(20, lambda i: Image.fromarray(frames[i]))
    write_frames(tmp_path / "all" / "v", 20)
    np.save(tmp_path / "all" / "w.npy", frames)
    videos = open_videos(tmp_path / "all", 1)
    assert {digest_picture(videos.read(i)) for i in range(2)} == {digest_picture(stored)}
    others = (frames[:19], frames[::-1], make_frames(20, base=1))
    assert len({digest_picture(Video(len(f), lambda i, f=f: Image.fromarray(f[i]))) for f in others}) == 3
    assert digest_picture(stored) not in {
        digest_picture(Video(len(f), lambda i, f=f: Image.fromarray(f[i]))) for f in others
    }


def test_videos_of_other_lengths_have_other_digests():
    """Even if all frames are equal."""
    still = Image.new("RGB", (8, 8))
    assert len({digest_picture(Video(length, lambda i: still)) for length in (8, 9, 16)}) == 3


def test_signatures_tell_videos_apart(data):
    for name in ("v", "w", "x"):
        write_frames(data / name, 5)
    then = sign_images(Batches(open_videos(data), take_first))
    assert compare_signatures(then, sign_images(Batches(open_videos(data), take_first))) is None
    write_frames(data / "w", 5, base=90)
    assert compare_signatures(then, sign_images(Batches(open_videos(data), take_first))) == "3 images of other content"


def test_sample_photographs_move():
    videos = find_images(None, (8, 12), 10, frames=5)
    assert videos.stand_in
    assert isinstance(videos.read(0), Video)
    frames = [np.asarray(videos.read(1).frame(t)).astype(int) for t in range(5)]
    assert frames[0].shape == (8, 12, 3)
    assert all(np.abs(a - b).mean() > 0.5 for a, b in itertools.pairwise(frames))
    images = find_images(None, (8, 12), 10)
    assert np.array_equal(np.asarray(images.read(1)), frames[0].astype(np.uint8))  # a clip begins as the image does
