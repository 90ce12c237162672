"""Videos: frames read on demand from a folder of pictures, an array, a video file or a function."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from ..errors import raise_if_out_of_memory
from ..suffixes import ARRAY_SUFFIXES
from .frames import sample_frames
from .images import decode
from .labels import natural_key
from .listing import is_system, kind_of

# Number of frames used to identify a video in other data.
SIGNED_FRAMES = 8
# Allowed names of the array of one video, or of several, in an .npz file.
VIDEO_KEYS = ("videos", "video", "frames")


class Video:
    """A video whose frames are read on first use and then cached; all have one size.

    It takes the place of a picture in `Images` and has the interface that `digest_picture` needs: a video is identified
    by its number of frames and by `SIGNED_FRAMES` of them, evenly spaced.

    Args:
        length: number of frames, at least 1.
        read: function from a frame index, from 0, to a PIL image; it raises OSError for an unreadable frame.
    """

    mode = "RGB"

    def __init__(self, length: int, read: Callable[[int], Image.Image]):
        if length < 1:
            raise OSError("unreadable video: it has no frames")
        self.length, self.read = length, read
        self._frames: dict[int, Image.Image] = {}

    def __len__(self) -> int:
        return self.length

    def frame(self, index: int) -> Image.Image:
        """Return a frame; OSError if it is unreadable."""
        return self.pick(lambda length: [index])[0]

    def pick(self, choose: Callable[[int], Sequence[int]]) -> list[Image.Image]:
        """Return some of the frames.

        Args:
            choose: function from the number of frames to the indices of those to return, which may repeat.

        Raises:
            OSError: one of them is unreadable, or they differ in size.
        """
        wanted = choose(len(self))
        for index in sorted(set(wanted) - set(self._frames)):
            self._frames[index] = self.read(index)
        self._check_sizes()
        return [self._frames[index] for index in wanted]

    def _check_sizes(self) -> None:
        """Raise OSError if the frames read so far differ in size."""
        sizes = {frame.size for frame in self._frames.values()}
        if len(sizes) > 1:
            first, second = (f"{width}x{height}" for width, height in sorted(sizes)[:2])
            raise OSError(f"unreadable video: frames of {first} and {second}, expected one size")

    def read_signed(self) -> list[Image.Image]:
        """Return the frames that identify the video; OSError if it is unreadable."""
        return [frame.convert("RGB") for frame in self.pick(lambda length: sample_frames(length, SIGNED_FRAMES))]

    @property
    def size(self) -> tuple[int, int, int]:
        """(frames, width, height); OSError if the video is unreadable."""
        first = self.read_signed()[0]  # the number of frames in a file is known only after reading it
        return len(self), *first.size

    def tobytes(self) -> bytes:
        """Return the pixels that identify the video; OSError if it is unreadable."""
        return b"".join(frame.tobytes() for frame in self.read_signed())

    def load(self) -> None:
        """Read the frames that identify the video; OSError if it is unreadable."""
        self.read_signed()


class VideoFile(Video):
    """The first video stream of a file, read with PyAV. A rotation recorded in the file is not applied."""

    def __init__(self, path: Path):
        self.path = path
        super().__init__(self._count(), self.frame)

    def pick(self, choose: Callable[[int], Sequence[int]]) -> list[Image.Image]:
        """Return some of the frames, as `Video.pick`; this decodes the whole stream.

        The number of packets may differ from the number of frames; in that case, the frames are chosen again.
        """
        if missing := set(choose(len(self))) - set(self._frames):
            frames, count = self._decode(missing)
            if count != len(self):
                super().__init__(count, self.frame)
                frames, _ = self._decode(set(choose(count)))
            self._frames |= frames
        return super().pick(choose)

    def _count(self) -> int:
        """Return the number of packets of the stream, which requires no decoding."""
        with _Opened(self.path) as (container, stream):
            return sum(1 for packet in container.demux(stream) if packet.size)

    def _decode(self, wanted: set[int]) -> tuple[dict[int, Image.Image], int]:
        """Return the frames by their index, and the total number of frames."""
        frames, count = {}, 0
        with _Opened(self.path) as (container, stream):
            for frame in container.decode(stream):
                if count in wanted:
                    frames[count] = frame.to_image()
                count += 1
        return frames, count


class _Opened:
    """Context manager for an open video file: (container, stream); all its errors become OSErrors."""

    def __init__(self, path: Path):
        self.path = path

    def __enter__(self):
        import av

        try:
            self.container = av.open(str(self.path))
        except Exception as error:  # PyAV raises errors of many kinds for a damaged file
            raise_if_out_of_memory(error)
            raise OSError(f"unreadable video: {error}") from error
        if not self.container.streams.video:
            self.container.close()
            raise OSError("unreadable video: the file has no video stream")
        return self.container, self.container.streams.video[0]

    def __exit__(self, kind, error, trace):
        self.container.close()
        if isinstance(error, Exception):
            raise_if_out_of_memory(error)
            raise OSError(f"unreadable video: {error}") from error


def open_video(path: Path) -> Video:
    """Open the video at a path: a folder of frames, an .npy or .npz file, or a video file; OSError for anything else.

    The frames of a folder are its pictures in natural order of their names: frame_2 comes before frame_10.
    """
    if path.is_dir():
        with os.scandir(path) as entries:
            names = sorted(entry.name for entry in entries if _is_frame(entry))
        names.sort(key=natural_key)
        return Video(len(names), lambda i: decode(path / names[i]))
    if path.suffix.lower() in ARRAY_SUFFIXES:
        frames, _ = read_arrays(path)
        return array_video(frames)
    return VideoFile(path)


def _is_frame(entry: os.DirEntry[str]) -> bool:
    return kind_of(entry.name) == "images" and not is_system(entry.name) and not entry.is_dir()


def array_video(frames: np.ndarray) -> Video:
    """Return a video of frames (frames, height, width, 3) uint8; OSError for other arrays."""
    check_frames(frames, ("frames", "height", "width"))
    return Video(len(frames), lambda i: Image.fromarray(np.asarray(frames[i])))


def check_frames(array: np.ndarray, sides: Sequence[str]) -> None:
    """Raise OSError unless an array is uint8 and has these dimensions, with three channels last."""
    if array.dtype != np.uint8 or array.ndim != len(sides) + 1 or array.shape[-1] != 3:
        raise OSError(f"an array {array.shape} {array.dtype}: expected ({', '.join(sides)}, 3) uint8")


def read_arrays(path: Path) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Return the array of frames in an .npy or .npz file, and the other arrays by name; nothing is unpickled.

    The frames are the only array, or the one named as in `VIDEO_KEYS`. An .npy file is memory-mapped.

    Raises:
        OSError: the file is unreadable, or it is ambiguous which array it is.
    """
    try:
        loaded = np.load(path, allow_pickle=False, mmap_mode="r")
        if isinstance(loaded, np.ndarray):
            return loaded, {}
        with loaded:
            arrays = {name: loaded[name] for name in loaded.files}
    except Exception as error:  # numpy and zipfile raise errors of many kinds for a damaged file
        raise_if_out_of_memory(error)
        raise OSError(f"unreadable array: {error}") from error
    named = [name for name in VIDEO_KEYS if name in arrays]
    if len(named) != 1 and len(arrays) != 1:
        found = ", ".join(arrays) or "none"
        raise OSError(f"arrays {found}: expected a single one, or one of them called {' or '.join(VIDEO_KEYS)}")
    frames = arrays.pop(named[0] if named else next(iter(arrays)))
    return frames, arrays
