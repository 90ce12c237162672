"""Parquet and arrow files: damaged, with other columns, with invalid labels."""

from __future__ import annotations

import json
from typing import Any

import pyarrow as pa
from pyarrow import parquet

from .cases import Box, Case, maker
from .folders import COUNT, encoded, measuring, refusing
from .judges import all_right

KIND = "tables"
NAME = "data.parquet"


def columns(box: Box) -> dict[str, list]:
    """The pictures of the world as columns."""
    pictures = box.world.pictures
    return {
        "image": [{"bytes": encoded(pixels), "path": f"{k}.png"} for k, (_, pixels) in enumerate(pictures)],
        "label": [label for label, _ in pictures],
    }


def write(box: Box, values: dict[str, Any], name: str = NAME, metadata: Any = None, **options: Any) -> Any:
    """Write a parquet file; returns its path."""
    table = pa.table(values)
    if metadata is not None:
        text = metadata if isinstance(metadata, str) else json.dumps(metadata)
        table = table.replace_schema_metadata({"huggingface": text})
    file = box.folder / name
    parquet.write_table(table, file, **options)
    return file


@maker(KIND, times=3)
def cut_off(rng, box):
    file = write(box, columns(box))
    content = file.read_bytes()
    file.write_bytes(content[: rng.choice([rng.randrange(12), rng.randrange(len(content)), len(content) - 1])])
    return refusing(rng, box, NAME)


@maker(KIND, times=5)
def bytes_spoiled_in_the_footer(rng, box):
    file = write(box, columns(box))
    content = bytearray(file.read_bytes())
    length = int.from_bytes(content[-8:-4], "little")
    for _ in range(rng.randrange(1, 4)):
        content[-9 - rng.randrange(length)] = rng.randrange(256)
    file.write_bytes(content)
    return measuring(box, all_right(COUNT), NAME)


_FILES = {
    "empty.parquet": b"", "magic.parquet": b"PAR1PAR1", "text.parquet": b"image,label\n",
    "text.arrow": b"image,label\n",
    "empty.arrow": b"", "magic.arrow": b"ARROW1\0\0", "footer.parquet": b"PAR1" + b"\xff" * 8 + b"\xff\xff\xff\x7fPAR1",
    "length.arrow": b"\xff\xff\xff\xff\xff\xff\xff\x7f" + bytes(100), "table.csv": b"image,label\n0.png,1\n",
    "table.json": b'{"image": "0.png", "label": 1}', "script.py": b"open('../canary', 'w')\n",
    "base.zip": b"PK\x05\x06" + bytes(18),
}  # fmt: skip


@maker(KIND, variants=list(_FILES))
def files_that_are_no_tables(rng, box, variant):
    (box.folder / variant).write_bytes(_FILES[variant])
    return refusing(rng, box, variant)


_LABELS = {
    "one beyond": [12, *range(1, 24)], "negative": [-2] * COUNT, "some hidden": [-1, *[1] * 23], "texts": ["x"] * COUNT,
    "fractions": [0.5] * COUNT, "nan": [float("nan")] * COUNT, "huge": [2**40] * COUNT, "some null": [None, *[1] * 23],
    "lists": [[1]] * COUNT, "dicts": [{"a": 1}] * COUNT, "true": [True] * COUNT, "bytes": [b"1"] * COUNT,
    "code": ["__import__('os').system('touch ../canary')"] * COUNT,
}  # fmt: skip


@maker(KIND, variants=list(_LABELS))
def labels_that_are_none(rng, box, variant):
    write(box, columns(box) | {"label": _LABELS[variant]})
    return refusing(rng, box, NAME)


@maker(
    KIND, variants=["int8", "uint64", "float", "text", "class texts", "dictionary", "Label", "category", "y", "hidden"]
)
def labels_in_other_forms(rng, box, variant):
    values = columns(box)
    labels = values.pop("label")
    right = all_right(COUNT)
    if variant in ("int8", "uint64"):
        values["label"] = pa.array(labels, getattr(pa, variant)())
    elif variant == "float":
        values["label"] = [float(v) for v in labels]
    elif variant == "text":
        values["label"] = [str(v) for v in labels]
    elif variant == "class texts":
        values["label"] = [f"class{v:02d}" for v in labels]
    elif variant == "dictionary":
        values["label"] = pa.array(labels).dictionary_encode()
    elif variant == "hidden":
        values["label"] = [-1] * COUNT
        right = all_right(COUNT, labelled=False)
    else:
        values[variant] = labels
    write(box, values)
    return measuring(box, right, NAME)


def _feature(names: list[str] | None = None, image: Any = None) -> dict[str, Any]:
    label = {"_type": "ClassLabel", "names": names} if names is not None else {"dtype": "int64", "_type": "Value"}
    return {"info": {"features": {"image": image or {"_type": "Image"}, "label": label}}}


_METADATA: dict[str, Any] = {
    "names in order": _feature([f"class{k:02d}" for k in range(12)]),
    "one name more": _feature([f"class{k:02d}" for k in range(13)]),
    "no names": _feature([]),
    "names twice": _feature(["a"] * 12),
    "no JSON": "{",
    "deep JSON": "[" * 100_000,
    "features of text": {"info": {"features": "image"}},
    "unknown type": _feature(image={"_type": "os.system"}),
    "audio": _feature(image={"_type": "Audio"}),
    "other columns": {"info": {"features": {"picture": {"_type": "Image"}}}},
    "null": "null",
}


@maker(KIND, variants=list(_METADATA))
def metadata(rng, box, variant):
    write(box, columns(box), metadata=_METADATA[variant])
    return measuring(box, all_right(COUNT), NAME, must_read=variant == "names in order")


def _picture(variant: str, box: Box) -> Any:
    content = encoded(box.world.pictures[0][1])
    return {
        "no picture": {"bytes": b"text", "path": "0.png"},
        "null": None,
        "null bytes": {"bytes": None, "path": None},
        "empty bytes": {"bytes": b"", "path": ""},
        "cut off": {"bytes": content[:60], "path": "0.png"},
        "passwd": {"bytes": None, "path": "/etc/passwd"},
        "outside": {"bytes": None, "path": "../../../../../../etc/passwd"},
        "device": {"bytes": None, "path": "/dev/zero"},
        "address": {"bytes": None, "path": "http://localhost:9/x.png"},
        "nul in a path": {"bytes": None, "path": "a\0b.png"},
        "itself": {"bytes": None, "path": NAME},
    }[variant]


_PICTURES = (
    "no picture", "null", "null bytes", "empty bytes", "cut off", "passwd", "outside", "device", "address",
    "nul in a path", "itself",
)  # fmt: skip


@maker(KIND, variants=_PICTURES)
def a_row_without_a_picture(rng, box, variant):
    values = columns(box)
    row = rng.randrange(COUNT)
    values["image"][row] = _picture(variant, box)
    described = _feature() if rng.random() < 0.5 else None
    write(box, values, metadata=described)
    return measuring(box, all_right(COUNT, unreadable=[f"row {row}"]), NAME, must_read=True, detail=f"row {row}")


@maker(
    KIND, variants=["texts", "numbers", "floats", "null", "lists of bytes", "another name", "none", "no rows", "dates"]
)
def columns_of_other_things(rng, box, variant):
    values = columns(box)
    pictures = values.pop("image")
    if variant == "another name":
        values["photo_of_it"] = [1] * COUNT
    elif variant == "no rows":
        values = {"image": pa.array([], pa.binary()), "label": pa.array([], pa.int64())}
    elif variant == "lists of bytes":
        values["image"] = [list(p["bytes"]) for p in pictures]
    elif variant != "none":
        import datetime

        values["image"] = {
            "texts": ["/etc/passwd"] * COUNT, "numbers": [7] * COUNT, "floats": [[[0.5, 0.5]]] * COUNT,
            "null": [None] * COUNT, "dates": [datetime.date(2020, 1, 1)] * COUNT,
        }[variant]  # fmt: skip
    write(box, values)
    return refusing(rng, box, NAME)


@maker(KIND, variants=["other columns", "one damaged", "a folder named so", "train and test", "one is arrow", "a pipe"])
def folders_of_tables(rng, box, variant):
    import os

    folder = box.folder / "data"
    folder.mkdir()
    values = columns(box)
    write(box, values, "data/0.parquet")
    if variant == "other columns":
        write(box, {"picture": [b"x"], "label": [1]}, "data/1.parquet")
        return measuring(box, all_right(COUNT + 1, unreadable=[f"row {COUNT}"]))
    elif variant == "one damaged":
        (folder / "1.parquet").write_bytes(b"PAR1")
    elif variant == "a folder named so":
        (folder / "1.parquet").mkdir()
        return measuring(box, all_right(COUNT))
    elif variant == "train and test":
        (folder / "0.parquet").rename(folder / "train-00000-of-00001.parquet")
        write(box, values, "data/test-00000-of-00001.parquet")
        return measuring(box, all_right(COUNT))
    elif variant == "one is arrow":
        (folder / "1.arrow").write_bytes((folder / "0.parquet").read_bytes())
    else:
        os.mkfifo(folder / "1.parquet")
        return measuring(box, all_right(COUNT))
    return refusing(rng, box)


@maker(KIND, variants=["snappy", "zstd", "row groups", "dictionary", "binary", "large binary", "file format", "stream"])
def unusual_but_whole(rng, box, variant):
    values = columns(box)
    if variant in ("binary", "large binary"):
        kind = pa.binary() if variant == "binary" else pa.large_binary()
        values["image"] = pa.array([p["bytes"] for p in values["image"]], kind)
    if variant in ("file format", "stream"):
        table = pa.table(values)
        new = pa.ipc.new_file if variant == "file format" else pa.ipc.new_stream
        with new(box.folder / "data.arrow", table.schema) as out:
            out.write_table(table)
        return measuring(box, all_right(COUNT), "data.arrow")
    options: dict[str, Any] = {
        "snappy": {"compression": "snappy"}, "zstd": {"compression": "zstd"}, "row groups": {"row_group_size": 5},
        "dictionary": {"use_dictionary": True},
    }.get(variant, {})  # fmt: skip
    write(box, values, **options)
    return measuring(box, all_right(COUNT), NAME, must_read=True)


@maker(KIND, times=2)
def an_arrow_stream_cut_off(rng, box):
    table = pa.table(columns(box))
    file = box.folder / "data.arrow"
    with pa.ipc.new_stream(file, table.schema) as out:
        out.write_table(table, max_chunksize=6)
    content = file.read_bytes()
    file.write_bytes(content[: rng.randrange(4, len(content) - 16)])
    return Case(("evaluate", box.world.vim12, "--data", "data.arrow", "--json"))
