"""Tar shards: damaged, compressed, with links and unusual members, with invalid labels."""

from __future__ import annotations

import gzip
import io
import json
import tarfile
from collections.abc import Iterable
from typing import Any

from .cases import Box, maker
from .folders import COUNT, encoded, measuring, refusing
from .judges import all_right

KIND = "shards"
NAME = "data.tar"
Member = tuple[str, bytes]


def members(box: Box) -> list[Member]:
    """The pictures of the world as members of a shard, each with its label."""
    found = []
    for k, (label, pixels) in enumerate(box.world.pictures):
        found += [(f"{k:06d}.png", encoded(pixels)), (f"{k:06d}.cls", str(label).encode())]
    return found


def info_of(name: str, content: bytes = b"", **values: Any) -> tarfile.TarInfo:
    """The header of a member."""
    info = tarfile.TarInfo(name)
    info.size = len(content)
    for key, value in values.items():
        setattr(info, key, value)
    return info


def packed(entries: Iterable[Member | tarfile.TarInfo], form: int = tarfile.GNU_FORMAT) -> bytes:
    """A tar file of members, and of headers without content."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=form) as tar:
        for entry in entries:
            if isinstance(entry, tarfile.TarInfo):
                tar.addfile(entry)
            else:
                tar.addfile(info_of(*entry), io.BytesIO(entry[1]))
    return out.getvalue()


def write(box: Box, entries: Iterable[Member | tarfile.TarInfo], form: int = tarfile.GNU_FORMAT) -> Any:
    """Write a shard; returns its path."""
    file = box.folder / NAME
    file.write_bytes(packed(entries, form))
    return file


@maker(KIND, times=4)
def cut_off(rng, box):
    file = write(box, members(box))
    content = file.read_bytes()
    used = len(content.rstrip(b"\0"))
    file.write_bytes(
        content[: rng.choice([rng.randrange(512), rng.randrange(used), 512 * rng.randrange(1, used // 512)])]
    )
    return refusing(rng, box, NAME)


@maker(KIND, times=3)
def a_header_spoiled(rng, box):
    file = write(box, members(box))
    content = bytearray(file.read_bytes())
    with tarfile.open(file) as tar:
        start = rng.choice(tar.getmembers()).offset
    place = start + rng.randrange(512)
    content[place] ^= 1 << rng.randrange(7)
    file.write_bytes(content)
    # The rest of the shard must not be skipped silently.
    return measuring(box, all_right(COUNT), NAME, detail=f"byte {place}")


@maker(KIND, variants=["gz named tar", "tar.gz", "tgz", "zip", "text", "empty", "zeros", "random"])
def files_that_are_no_shards(rng, box, variant):
    content, name = packed(members(box)), NAME
    if variant in ("gz named tar", "tar.gz", "tgz"):
        content, name = gzip.compress(content), {"tar.gz": "data.tar.gz", "tgz": "data.tgz"}.get(variant, NAME)
    else:
        content = {
            "zip": b"PK\x03\x04" + bytes(600), "text": b"0.png 1\n" * 100, "empty": b"", "zeros": bytes(10240),
            "random": rng.randbytes(2048),
        }[variant]  # fmt: skip
    (box.folder / name).write_bytes(content)
    return refusing(rng, box, name)


_LABELS = {
    "nan": b"NaN", "infinite": b"1e999", "1e9": b"1e9", "code": b"__import__('os').system('touch ../canary')",
    "hexadecimal": b"0x3", "fraction": b"3.5", "true": b"true", "quoted": b'"3"', "list": b"[3]",
    "2^70": b"1180591620717411303424",
    "empty": b"", "minus 2": b"-2", "one beyond": b"12", "2^31 - 1": b"2147483647", "deep": b"[" * 60_000,
    "a class name": b"cat", "null": b"null", "object": b'{"label": 3}',
}  # fmt: skip


@maker(KIND, variants=list(_LABELS))
def a_label_that_is_none(rng, box, variant):
    entries = members(box)
    row = rng.randrange(COUNT)
    entries[2 * row + 1] = (entries[2 * row + 1][0], _LABELS[variant])
    write(box, entries)
    return refusing(rng, box, NAME)


@maker(KIND, variants=["one", "all", "all but one"])
def members_without_labels(rng, box, variant):
    entries = members(box)
    gone = {"one": [3], "all": range(COUNT), "all but one": range(1, COUNT)}[variant]
    write(box, [e for k, e in enumerate(entries) if not (k % 2 and k // 2 in gone)])
    if variant == "all":
        return measuring(box, all_right(COUNT, labelled=False), NAME, must_read=True)
    return refusing(rng, box, NAME)


@maker(KIND, variants=["label", "cls", "large", "text", "none", "nested"])
def labels_in_json(rng, box, variant):
    entries = []
    for name, content in members(box):
        if name.endswith(".cls"):
            label: Any = int(content)
            value = {
                "label": {"label": label}, "cls": {"cls": label}, "large": {"label": label, "caption": "x" * 70_000},
                "text": {"label": f"class{label:02d}"}, "none": {"label": None}, "nested": {"json": {"label": label}},
            }[variant]  # fmt: skip
            name, content = name.replace(".cls", ".json"), json.dumps(value).encode()
        entries.append((name, content))
    write(box, entries)
    # Labels elsewhere in the JSON may be ignored, if the result reports that there are no labels.
    right = all_right(COUNT, labelled=variant not in ("none", "nested"))
    return measuring(box, right, NAME)


@maker(
    KIND, variants=["labels first", "all images, then all labels", "shuffled", "names twice", "deeper", "mac", "dots"]
)
def orders_and_names(rng, box, variant):
    entries = members(box)
    if variant == "labels first":
        entries = [e for k in range(0, len(entries), 2) for e in (entries[k + 1], entries[k])]
    elif variant == "all images, then all labels":
        entries = entries[::2] + entries[1::2]
    elif variant == "shuffled":
        rng.shuffle(entries)
    elif variant == "names twice":
        entries = [("000000" + name[6:], content) for name, content in entries]
    elif variant == "deeper":
        entries = [(f"a/b/c/{name}", content) for name, content in entries]
    elif variant == "mac":
        entries = [e for name, content in entries for e in ((f"._{name}", b"\0\5\x16\7" + bytes(60)), (name, content))]
    else:
        entries = [(f"./{name}", content) for name, content in entries]
    write(box, entries)
    return measuring(box, all_right(COUNT, extra=["._"]), NAME)


@maker(KIND, variants=["up", "absolute", "newline", "escape", "long", "bytes"])
def names_that_lead_outside(rng, box, variant):
    entries = members(box)
    name = {
        "up": "../../canary.png", "absolute": f"{box.canary}.png", "newline": "a\nb.png",
        "escape": "\x1b[31m.png", "long": "d/" * 400 + "a.png", "bytes": "\udcff.png",
    }[variant]  # fmt: skip
    bad = rng.random() < 0.5
    entries[0] = (name, b"text" if bad else entries[0][1])
    entries[1] = (name.replace(".png", ".cls"), entries[1][1])
    write(box, entries)
    right = all_right(COUNT, maybe=["at byte", "png"] if bad else [])
    return measuring(box, right, NAME, detail="no picture" if bad else "")


_TYPES = {
    "symbolic link": tarfile.SYMTYPE, "hard link": tarfile.LNKTYPE, "device": tarfile.CHRTYPE, "pipe": tarfile.FIFOTYPE,
    "folder": tarfile.DIRTYPE,
}  # fmt: skip


@maker(KIND, variants=list(_TYPES))
def members_that_are_no_files(rng, box, variant):
    info = info_of("zz.png", type=_TYPES[variant], linkname="/etc/passwd", devmajor=1, devminor=5)
    place = 2 * rng.randrange(COUNT)
    entries: list = members(box)
    write(box, [*entries[:place], info, *entries[place:]])
    return measuring(box, all_right(COUNT), NAME)


@maker(
    KIND, variants=["size beyond", "size negative", "sparse", "huge pax", "pax size", "pax of text", "long name cut"]
)
def headers_that_lie(rng, box, variant):
    entries = members(box)
    content = packed(entries)
    with tarfile.open(fileobj=io.BytesIO(content)) as tar:
        end = max(m.offset_data + -(-m.size // 512) * 512 for m in tar.getmembers())
    info = info_of("zz.png")
    pax: dict[str, str] = {}
    if variant == "size beyond":
        info.size = 10**9
    elif variant == "size negative":
        info.size = -512
    elif variant == "sparse":
        info.type = tarfile.GNUTYPE_SPARSE
    elif variant == "huge pax":
        pax = {"size": str(10**18)}
    elif variant == "pax size":
        pax = {"size": "-1"}
    elif variant == "pax of text":
        pax = {"size": "many", "mtime": "nan", "path": "../../canary.png"}
    else:
        info.type, info.name, info.size = tarfile.GNUTYPE_LONGNAME, "././@LongLink", 10**6
    form = tarfile.PAX_FORMAT if pax else tarfile.GNU_FORMAT
    info.pax_headers = pax
    header = info.tobuf(form)
    (box.folder / NAME).write_bytes(content[:end] + header + bytes(1024))
    return measuring(box, all_right(COUNT, extra=["at byte"]), NAME)


@maker(KIND, variants=["two files joined", "zeros between", "text at the end"])
def after_the_end(rng, box, variant):
    entries = members(box)
    half = len(entries) // 2
    first, second = packed(entries[:half]), packed(entries[half:])
    if variant == "two files joined":  # by `cat`: the second file must not be skipped silently
        content = first + second
    elif variant == "zeros between":
        content = first.rstrip(b"\0")
        content += bytes(-len(content) % 512 + 1024) + second
    else:
        content = packed(entries) + b"the end"
    (box.folder / NAME).write_bytes(content)
    return measuring(box, all_right(COUNT), NAME)


@maker(KIND, variants=["a picture cut off", "a folder of one damaged shard", "pipe", "link to itself"])
def other_damage(rng, box, variant):
    import os

    entries = members(box)
    if variant == "a picture cut off":
        entries[4] = (entries[4][0], entries[4][1][:40])
        write(box, entries)
        return measuring(box, all_right(COUNT, unreadable=["at byte"]), NAME, must_read=True)
    folder = box.folder / "data"
    folder.mkdir()
    (folder / "0.tar").write_bytes(packed(entries))
    if variant == "pipe":
        os.mkfifo(folder / "1.tar")
        return measuring(box, all_right(COUNT))
    if variant == "link to itself":
        (folder / "1.tar").symlink_to("1.tar")
        return measuring(box, all_right(COUNT))
    (folder / "1.tar").write_bytes(packed(entries)[:700])
    return refusing(rng, box)
