"""Videos written by tests, in which the colour of a frame encodes its number."""

import numpy as np
from PIL import Image


def make_frames(count, size=(12, 16), base=0):
    """Frames (count, height, width, 3) uint8; all pixels of frame i have the red value base + i."""
    frames = np.zeros((count, *size, 3), np.uint8)
    frames[..., 0] = (base + np.arange(count))[:, None, None]
    frames[..., 1] = np.arange(size[1])[None, None, :] * 8  # columns differ, so that crops do
    return frames


def write_frames(folder, count=6, size=(12, 16), base=0, name="frame_{}.png"):
    """A folder of frames, whose numbers have no zeros in front; returns it."""
    folder.mkdir(parents=True, exist_ok=True)
    for i, frame in enumerate(make_frames(count, size, base)):
        Image.fromarray(frame).save(folder / name.format(i))
    return folder


def write_video(file, count=6, size=(16, 32), codec="mpeg4", base=100):
    """A video file in which the grey values of frames rise by 10."""
    import av

    file.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(file), "w") as container:
        stream = container.add_stream(codec, rate=10)
        stream.width, stream.height, stream.pix_fmt = size[1], size[0], "yuv420p"
        for i in range(count):
            pixels = np.full((*size, 3), base + 10 * i, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    return file


def red_values(video):
    """The red value of each frame of a `Video`."""
    return [video.frame(i).convert("RGB").getpixel((0, 0))[0] for i in range(len(video))]
