"""Folders of pictures: damaged and unusual pictures, unusual names, folders that are not classes."""

from __future__ import annotations

import io
import os
import random
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from .cases import Box, Case, maker
from .judges import all_right, top1_is_100
from .world import CLASSES, EACH, SIDE

KIND = "folders"
COUNT = CLASSES * EACH
LAST = CLASSES - 1


def encoded(pixels: np.ndarray | Image.Image, form: str = "png", **options: Any) -> bytes:
    """A picture as the bytes of a file."""
    picture = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    out = io.BytesIO()
    picture.save(out, form, **options)
    return out.getvalue()


def class_name(label: int) -> str:
    """Names that sort in the order of the classes."""
    return f"class{label:02d}"


def write_folder(box: Box, name=class_name, root: str = "data") -> dict[int, Path]:
    """The pictures of the world in class folders: label -> folder. `name`: label -> name, of text or bytes."""
    folders = {}
    for k, (label, pixels) in enumerate(box.world.pictures):
        folder = folders[label] = Path(
            os.fsdecode(os.path.join(os.fsencode(box.folder / root), os.fsencode(name(label))))
        )
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{k % EACH}.png").write_bytes(encoded(pixels))
    return folders


def measuring(box: Box, right, data: str = "data", **options: Any) -> Case:
    """`evaluate` on a folder."""
    return Case(("evaluate", box.world.vim12, f"--data={data}", "--json"), right, **options)


def refusing(rng: random.Random, box: Box, data: str = "data", detail: str = "") -> Case:
    """A command that must refuse the data."""
    world = box.world
    return Case(
        rng.choice([
            ("evaluate", world.vim12, "--data", data),
            ("prune", world.vim12, "--data", data, "-o", "out", "--no-latency"),
            ("prune", world.vim12, "--data", world.images, "--eval-data", data, "-o", "out", "--no-latency"),
            ("finetune", world.pruned, "--data", data, "-o", "out"),
            ("compare", world.vim12, "--data", data, "-o", "out"),
            ("verify", world.pruned, world.onnx, "--data", data),
            ("export", world.pruned, "--onnx", "-o", "out.onnx", "--data", data),
        ]),
        detail=detail,
    )  # fmt: skip


def spare(box: Box, label: int) -> np.ndarray:
    """The first picture of a class."""
    return box.world.pictures[EACH * label][1]


def chunk(kind: bytes, content: bytes) -> bytes:
    """A chunk of a PNG file."""
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png_of(width: int, height: int, data: bytes, depth: int = 8, colour: int = 2) -> bytes:
    """A PNG file with these sides in its header, and this content."""
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")


@maker(KIND, variants=["jpeg", "png", "webp", "gif", "bmp", "ppm", "tiff"])
def a_picture_cut_off(rng, box, variant):
    folders = write_folder(box)
    pixels = np.random.default_rng(rng.randrange(10**6)).integers(0, 256, (SIDE, SIDE, 3), np.uint8)
    content = encoded(pixels, variant)
    suffix = {"jpeg": "jpg", "tiff": "tif"}.get(variant, variant)
    (folders[3] / f"cut.{suffix}").write_bytes(content[: rng.randrange(10, len(content) * 3 // 4)])
    return measuring(box, all_right(COUNT + 1, unreadable=["cut."]), must_read=True)


_BROKEN = {
    "empty": b"",
    "text": b"not a picture",
    "page": b"<html><body>404</body></html>",
    "svg": b'<svg xmlns="http://www.w3.org/2000/svg" onload="alert(1)"/>',
    "eps": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 32 32\n(touch ../canary) run\n%%EOF\n",
    "a bomb of sides": png_of(60_000, 60_000, bytes(1000)),
    "sides of 2^31": png_of(2**31 - 1, 2**31 - 1, bytes(100)),
    "sides of zero": png_of(0, 0, b""),
    "too little data": png_of(32, 32, bytes(100)),
    "unknown depth": png_of(32, 32, bytes(4000), depth=7),
    "unknown chunk first": b"\x89PNG\r\n\x1a\n" + chunk(b"ABCD", b"x" * 10),
    "a huge chunk": b"\x89PNG\r\n\x1a\n\x7f\xff\xff\xffIHDR" + bytes(40),
    "a text bomb": (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", 32, 32, 8, 2, 0, 0, 0))
        + chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(100 << 20))) + chunk(b"IEND", b"")
    ),
    "a bmp of huge sides": b"BM" + struct.pack("<IIIIiiHHIIiiII", 54, 0, 54, 40, 2**30, 2**30, 1, 24, 0, 0, 0, 0, 0, 0),
    "a tiff that points to itself": b"II*\0\x08\0\0\0\x01\0\x00\x01\x03\0\x01\0\0\0\x20\0\0\0\x08\0\0\0",
    "a ppm of huge sides": b"P6\n999999999 999999999\n255\n" + bytes(100),
    "a gif without frames": b"GIF89a\x20\0\x20\0\x80\0\0\0\0\0\xff\xff\xff;",
    "a pickle": b"\x80\x04cos\nsystem\n\x8c\x10touch ../canary\x85R.",
}  # fmt: skip


@maker(KIND, variants=list(_BROKEN))
def a_file_that_is_no_picture(rng, box, variant):
    folders = write_folder(box)
    name = rng.choice(["bad.png", "bad.jpg", "bad.JPEG", "bad.webp", "bad.tiff"])
    (folders[rng.randrange(CLASSES)] / name).write_bytes(_BROKEN[variant])
    workers = rng.choice([(), (), ("--workers", 1)])
    case = measuring(box, all_right(COUNT + 1, unreadable=["bad."]), must_read=True, detail=name)
    return Case((*case.arguments, *workers), case.right, must_read=True, detail=name)


@maker(KIND, times=2)
def no_picture_is_one(rng, box):
    for folder in write_folder(box).values():
        for file in folder.iterdir():
            file.write_bytes(rng.choice([b"", b"text", file.read_bytes()[:30]]))
    return refusing(rng, box)


def _odd(variant: str, pixels: np.ndarray) -> tuple[str, bytes, Image.Image]:
    """(suffix, content, the picture that it should be read as)."""
    rgb = Image.fromarray(pixels)
    grey = rgb.convert("L")
    if variant == "16 bits":
        wide = Image.fromarray(np.asarray(grey).astype(np.uint16) * 257)
        return "png", encoded(wide), grey
    if variant in ("1 pixel", "a column", "a row", "a wide one"):
        size = {"1 pixel": (1, 1), "a column": (1, 10_000), "a row": (10_000, 1), "a wide one": (3_000, 40)}[variant]
        picture = rgb.resize(size)
        return "png", encoded(picture), picture
    if variant == "animated gif":
        first, second = rgb.quantize(64), Image.fromarray(255 - pixels).quantize(64)
        content = encoded(first, "gif", save_all=True, append_images=[second], duration=100)
        return "gif", content, Image.open(io.BytesIO(content)).convert("RGB")
    if variant == "palette with transparency":
        content = encoded(rgb.quantize(16), transparency=3)
        return "png", content, rgb.quantize(16).convert("RGB")
    if variant == "turned by EXIF":
        exif = Image.Exif()
        exif[0x0112] = 6
        content = encoded(rgb, "jpeg", quality=95, exif=exif)
        return "jpg", content, Image.open(io.BytesIO(content))
    if variant == "multi-page tiff":
        content = encoded(rgb, "tiff", save_all=True, append_images=[Image.fromarray(255 - pixels)])
        return "tif", content, rgb
    modes = {"cmyk jpeg": "CMYK", "grey jpeg": "L", "alpha": "RGBA", "grey alpha": "LA", "one bit": "1", "grey": "L"}
    picture = rgb.convert(modes[variant])
    form = "jpeg" if "jpeg" in variant else "png"
    content = encoded(picture, form, **({"quality": 95} if form == "jpeg" else {}))
    return form, content, Image.open(io.BytesIO(content))


_ODD = (
    "16 bits", "1 pixel", "a column", "a row", "a wide one", "animated gif", "palette with transparency",
    "turned by EXIF", "multi-page tiff", "cmyk jpeg", "grey jpeg", "alpha", "grey alpha", "one bit", "grey",
)  # fmt: skip


@maker(KIND, variants=_ODD)
def an_odd_picture(rng, box, variant):
    folders = write_folder(box)
    suffix, content, truth = _odd(variant, spare(box, rng.randrange(CLASSES)))
    (folders[box.world.label_of(truth)] / f"odd.{suffix}").write_bytes(content)
    return measuring(box, all_right(COUNT + 1), must_read=True)


@maker(KIND)
def a_large_empty_picture(rng, box):
    folders = write_folder(box)
    side = 9_500  # just above the size at which PIL warns
    picture = Image.new("L", (side, side))
    (folders[box.world.label_of(Image.new("L", (SIDE, SIDE)))] / "large.png").write_bytes(encoded(picture))
    return measuring(box, all_right(COUNT + 1, maybe=["large.png"]))


_FILE_NAMES = (
    "ünï中.png", "new\nline.png", "-o.png", "--force.png", "'\"quotes.png", "$(touch ..canary).png", "a" * 250 + ".png",
    b"\xff\xfe.png", "\x1b[31mred.png", " .png", "a.PNG", "%s%n{0}.png", "*.png", "CON.png",
)  # fmt: skip


@maker(KIND, variants=_FILE_NAMES)
def names_of_files(rng, box, variant):
    folder = write_folder(box)[2]
    (folder / os.fsdecode(os.fsencode(variant))).write_bytes(encoded(spare(box, 2)))
    bad = rng.random() < 0.4
    if bad:  # so that the name is printed
        (folder / os.fsdecode(os.fsencode(variant))).write_bytes(b"")
    right = all_right(COUNT + 1, maybe=[".png", ".PNG"] if bad else [])
    case = measuring(box, right, must_read=True, detail="unreadable" if bad else "")
    if bad and rng.random() < 0.5:
        return Case(case.arguments[:-1], top1_is_100)
    return case


_CLASS_NAMES = {
    "numbers": str,
    "numbers from 1": lambda k: str(k + 1),
    "numbers with zeros": lambda k: f"{k:03d}",
    "spaces and quotes": lambda k: f'{k:02d} it\'s "a" class',
    "lines": lambda k: f"{k:02d}\nline",
    "leading dashes": lambda k: f"--{k:02d}",
    "no UTF-8": lambda k: b"\xff%02d" % k,
    "escapes": lambda k: f"{k:02d}\x1b[31m",
    "case": lambda k: "ABCDEFabcdef"[k] + "x",
    "code": lambda k: f"{k:02d}<script>",
    "long": lambda k: f"{k:02d}" + "x" * 240,
}


@maker(KIND, variants=list(_CLASS_NAMES))
def names_of_classes(rng, box, variant):
    write_folder(box, _CLASS_NAMES[variant])
    return measuring(box, all_right(COUNT))


@maker(
    KIND, variants=["one more", "one less", "one renamed to __MACOSX", "splits", "files beside", "only text", "empty"]
)
def other_classes(rng, box, variant):
    if variant in ("only text", "empty"):
        (box.folder / "data").mkdir()
        if variant == "only text":
            (box.folder / "data/labels.txt").write_text("cat")
        return refusing(rng, box)
    if variant == "splits":
        write_folder(box, root="data/train")
        write_folder(box, root="data/val")
        return refusing(rng, box)
    folders = write_folder(box)
    if variant == "one more":
        (box.folder / "data/zebra").mkdir()
        (box.folder / "data/zebra/0.png").write_bytes(encoded(spare(box, 0)))
    elif variant == "one less":
        for file in folders[5].iterdir():
            file.unlink()
        folders[5].rmdir()
    elif variant == "files beside":
        (box.folder / "data/0.png").write_bytes(encoded(spare(box, 0)))
    else:
        folders[5].rename(box.folder / "data/__MACOSX")
    return refusing(rng, box)


_BESIDE = ("__MACOSX", "lost+found", ".ipynb_checkpoints", "._class00", ".DS_Store", "Thumbs.db", "@eaDir", "empty")


@maker(KIND, variants=_BESIDE)
def what_systems_leave(rng, box, variant):
    folders = write_folder(box)
    place = box.folder / "data" / variant
    if variant in (".DS_Store", "Thumbs.db", "._class00"):
        place.write_bytes(rng.randbytes(100))
        (folders[1] / "._0.png").write_bytes(rng.randbytes(100))
    else:
        place.mkdir()
        if variant in ("__MACOSX", "@eaDir"):
            (place / "._0.png").write_bytes(rng.randbytes(100))
    return measuring(box, all_right(COUNT, extra=["._"]))


@maker(KIND, variants=["a class deeper", "all deeper", "a picture deeper"])
def pictures_one_level_deeper(rng, box, variant):
    folders = write_folder(box)
    for label in range(CLASSES) if variant == "all deeper" else [4]:
        (folders[label] / "more").mkdir()
        for file in list(folders[label].glob("*.png"))[: 1 if variant == "a picture deeper" else EACH]:
            file.rename(folders[label] / "more" / file.name)
    return measuring(box, all_right(COUNT))


_LINKS = ("loop of folders", "loop of files", "to passwd", "dangling", "to a picture", "a pipe", "a socket", "a device")


@maker(KIND, variants=_LINKS)
def links_and_devices(rng, box, variant):
    folder = write_folder(box)[LAST]
    place = folder / "extra.png"
    if variant == "loop of folders":
        (folder / "loop").symlink_to(folder)
    elif variant == "loop of files":
        place.symlink_to("extra.png")
    elif variant == "to passwd":
        place.symlink_to("/etc/passwd")
        return measuring(box, all_right(COUNT + 1, unreadable=["extra.png"]))
    elif variant == "dangling":
        place.symlink_to("nowhere.png")
    elif variant == "to a picture":
        place.symlink_to("0.png")
        return measuring(box, all_right(COUNT + 1))
    elif variant == "a pipe":
        os.mkfifo(place)
    elif variant == "a socket":
        import socket

        with socket.socket(socket.AF_UNIX) as server:
            server.bind(os.path.relpath(place))
    else:
        place.symlink_to("/dev/zero")
    return measuring(box, all_right(COUNT, extra=["extra.png"]))


@maker(
    KIND,
    variants=[
        "a picture",
        "a text",
        "nothing",
        "a pipe",
        "/dev/null",
        "/dev/zero",
        "a loop",
        "/proc/self/fd",
        "a colon",
    ],
)
def data_that_is_no_folder(rng, box, variant):
    place = box.folder / "data"
    if variant == "a picture":
        place.with_suffix(".png").write_bytes(encoded(spare(box, 0)))
        return refusing(rng, box, "data.png")
    if variant == "a text":
        place.write_text("images are elsewhere")
    elif variant == "a pipe":
        os.mkfifo(place)
    elif variant == "a loop":
        place.symlink_to("data")
    elif variant == "a colon":
        return refusing(rng, box, rng.choice(["file:///etc/passwd", ":", "a:", ":b", "a:b:c", "../x:train"]))
    elif variant.startswith("/"):
        return refusing(rng, box, variant)
    return refusing(rng, box)
