"""Video files, read through PyAV."""

import sys

import pytest
from videos import write_frames, write_video

from ssmcompress.data import Batches, open_images
from ssmcompress.data.clips import VideoTransform
from ssmcompress.data.transforms import Preprocessing
from ssmcompress.data.video import VideoFile, open_video
from ssmcompress.errors import InputError

PLAIN = Preprocessing((0.0,) * 3, (1.0,) * 3, 1.0, "bilinear", recorded=True)
FORMATS = {".mp4": "mpeg4", ".avi": "mpeg4", ".mkv": "mpeg4", ".mov": "mpeg4", ".webm": "libvpx"}


def read_greys(video):
    """The grey value of each frame, rounded to the tens in which `write_video` counts."""
    return [round(frame.getpixel((8, 8))[0], -1) for frame in video.pick(range)]


@pytest.mark.parametrize("suffix", sorted(FORMATS))
def test_frames_of_a_file_are_read_in_order(tmp_path, suffix):
    pytest.importorskip("av")
    video = open_video(write_video(tmp_path / f"v{suffix}", 9, codec=FORMATS[suffix]))
    assert read_greys(video) == [100 + 10 * i for i in range(9)]
    assert video.size == (9, 32, 16)


def test_files_and_folders_of_frames_go_together(tmp_path):
    pytest.importorskip("av")
    write_video(tmp_path / "a" / "v.MP4", 5)
    write_frames(tmp_path / "b" / "w", 5, (16, 32))
    (batch,) = Batches(open_images(tmp_path, 2, videos=True), VideoTransform(PLAIN, (8, 8), 3))
    assert batch.images.shape == (2, 3, 3, 8, 8)
    assert batch.labels.tolist() == [0, 1]
    greys = (batch.images[0].mean((0, 2, 3)) * 255).tolist()
    assert greys == pytest.approx([100, 120, 140], abs=4)


def test_a_file_with_other_packets_than_frames_is_sampled_over_its_frames(tmp_path, monkeypatch):
    """The number of packets is only an estimate; here it is three times too large."""
    pytest.importorskip("av")
    file = write_video(tmp_path / "v.mp4", 6)
    count = VideoFile._count
    monkeypatch.setattr(VideoFile, "_count", lambda self: 3 * count(self))
    video = open_video(file)
    clip = VideoTransform(PLAIN, (8, 8), 3)(video)
    assert (clip.mean((0, 2, 3)) * 255).tolist() == pytest.approx([100, 120, 140], abs=16)
    assert read_greys(open_video(file)) == [100 + 10 * i for i in range(6)]
    assert len(video) == 6


def test_damaged_files_are_left_out(tmp_path):
    pytest.importorskip("av")
    whole = write_video(tmp_path / "a.mp4", 5).read_bytes()
    (tmp_path / "b.mp4").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "c.mkv").write_bytes(b"")
    (tmp_path / "d.avi").write_bytes(b"no video at all")
    videos = open_images(tmp_path, 2, videos=True)
    batches = Batches(videos, VideoTransform(PLAIN, (8, 8), 3))
    assert [len(batch.images) for batch in batches] == [1]
    assert len(batches.unreadable_names()) == 3
    assert [videos.readable(i) for i in range(4)] == [True, False, False, False]


def test_files_without_the_package_name_the_extra(tmp_path, monkeypatch):
    """Folders of frames need no package."""
    (tmp_path / "v.mp4").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(
        InputError, match=r"video files need av, which is not installed: pip install 'ssmcompress\[video\]'"
    ):
        open_images(tmp_path, 2, videos=True)
    (tmp_path / "v.mp4").unlink()
    write_frames(tmp_path / "w", 2)
    assert len(open_images(tmp_path, 2, videos=True)) == 1


def test_a_single_video_is_refused_by_name(tmp_path):
    (tmp_path / "v.mp4").write_bytes(b"")
    with pytest.raises(InputError, match="is a single video; name a folder that holds it"):
        open_images(tmp_path / "v.mp4", 2, videos=True)
    with pytest.raises(InputError, match="no images in .*it holds only 1 .mp4 file"):
        open_images(tmp_path, 2)
