"""safetensors files: false headers, and metadata that is not a configuration."""

from __future__ import annotations

import json
import random
from typing import Any

from .cases import Box, Case, maker
from .checkpoints import reading, refusal

KIND = "safetensors"
NAME = "vim_tiny.safetensors"


def parts(box: Box, text: str | None = None) -> tuple[dict[str, Any], bytes]:
    """Header and data of the golden Vim; `text`: its `ssmcompress` metadata."""
    header: dict[str, Any] = {} if text is None else {"__metadata__": {"format": "pt", "ssmcompress": text}}
    data = b""
    for key, value in box.world.state.items():
        content = value.contiguous().numpy().tobytes()
        header[key] = {
            "dtype": "F32",
            "shape": list(value.shape),
            "data_offsets": [len(data), len(data) + len(content)],
        }
        data += content
    return header, data


def write(box: Box, header: Any, data: bytes, length: int | None = None, name: str = NAME) -> None:
    """Write a file; `header` is an object, or its bytes."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    start = len(text) if length is None else length
    (box.folder / name).write_bytes((start % 2**64).to_bytes(8, "little") + text + data)


@maker(KIND, variants=["0", "1", "one less", "one more", "random", "10^9", "2^63", "2^64 - 1", "all of the file"])
def header_lengths(rng, box, variant):
    header, data = parts(box)
    size = len(json.dumps(header))
    length = {
        "0": 0, "1": 1, "one less": size - 1, "one more": size + 1, "random": rng.randrange(size), "10^9": 10**9,
        "2^63": 2**63, "2^64 - 1": 2**64 - 1, "all of the file": size + len(data),
    }[variant]  # fmt: skip
    write(box, header, data, length)
    return refusal(rng, box, NAME)


_GARBAGE = {
    "nothing": b"",
    "an empty object": b"{}",
    "a list": b"[]",
    "null": b"null",
    "deep lists": b"[" * 100_000,
    "deep objects": b'{"a":' * 100_000,
    "not UTF-8": b'{"\xff\xfe": {}}',
    "NaN": b'{"a": {"dtype": "F32", "shape": [NaN], "data_offsets": [0, 4]}}',
    "an exponent": b'{"a": {"dtype": "F32", "shape": [1e999], "data_offsets": [0, 4]}}',
    "a long number": b'{"a": {"dtype": "F32", "shape": [' + b"9" * 10_000 + b'], "data_offsets": [0, 4]}}',
    "only metadata": b'{"__metadata__": {"ssmcompress": "{}"}}',
    "metadata of numbers": b'{"__metadata__": {"ssmcompress": 1}}',
    "metadata of lists": b'{"__metadata__": []}',
}


@maker(KIND, variants=list(_GARBAGE))
def headers_that_are_none(rng, box, variant):
    write(box, _GARBAGE[variant], bytes(64))
    return refusal(rng, box, NAME)


def _spoil(rng: random.Random, header: dict[str, Any], variant: str) -> str:
    """Corrupt one random entry; returns its name."""
    keys = [k for k, v in header.items() if len(v["shape"]) and k != "__metadata__"]
    key, other = rng.sample(keys, 2)
    entry = header[key]
    start, end = entry["data_offsets"]
    changes: dict[str, Any] = {
        "overlap": {"data_offsets": header[other]["data_offsets"]},
        "beyond the end": {"data_offsets": [start, end + 10**9]},
        "negative": {"data_offsets": [-4, end]},
        "turned round": {"data_offsets": [end, start]},
        "a hole": {"data_offsets": [start + 4, end]},
        "floats": {"data_offsets": [float(start), float(end) + 0.5]},
        "one offset": {"data_offsets": [start]},
        "offsets of 2^64": {"data_offsets": [2**64, 2**64 + end - start]},
        "unknown type": {"dtype": "F31"},
        "narrow type": {"dtype": "F16"},
        "int type": {"dtype": "I32"},
        "no type": {"dtype": None},
        "other shape": {"shape": [*entry["shape"], 2]},
        "negative shape": {"shape": [-entry["shape"][0], *entry["shape"][1:]]},
        "product overflows": {"shape": [2**32, 2**32, *entry["shape"]]},
        "zero and huge": {"shape": [0, 2**60], "data_offsets": [start, start]},
        "no shape": {"shape": None},
        "flat": {"shape": [(end - start) // 4]},
    }
    if variant == "not an object":
        header[key] = []
    else:
        entry.update(changes[variant])
    return key


_SPOILED = (
    "overlap", "beyond the end", "negative", "turned round", "a hole", "floats", "one offset", "offsets of 2^64",
    "unknown type", "narrow type", "int type", "no type", "other shape", "negative shape", "product overflows",
    "zero and huge", "no shape", "not an object",
)  # fmt: skip


@maker(KIND, variants=_SPOILED)
def an_entry(rng, box, variant):
    header, data = parts(box)
    key = _spoil(rng, header, variant)
    write(box, header, data)
    return refusal(rng, box, NAME, key)


@maker(KIND)
def a_flat_matrix(rng, box):
    header, data = parts(box)
    del header["head.bias"]  # a gap
    write(box, header, data)
    return refusal(rng, box, NAME)


@maker(KIND)
def a_name_twice(rng, box):
    header, data = parts(box)
    text = json.dumps(header)
    twice = '{"head.bias": ' + json.dumps(header["cls_token"]) + ", " + text[1:]
    write(box, twice.encode(), data)
    return reading(box, box.folder / NAME)


@maker(KIND, times=3)
def a_bit_flipped_in_the_header(rng, box):
    header, data = parts(box)
    text = bytearray(json.dumps(header).encode())
    place = rng.randrange(len(text))
    text[place] ^= 1 << rng.randrange(8)
    write(box, bytes(text), data)
    return reading(box, box.folder / NAME, detail=f"byte {place}")


@maker(KIND, times=3)
def cut_off_or_longer(rng, box):
    header, data = parts(box)
    if rng.random() < 0.3:
        write(box, header, data + rng.randbytes(rng.randrange(1, 100)))
        return refusal(rng, box, NAME, "longer")
    write(box, header, data)
    content = (box.folder / NAME).read_bytes()
    end = rng.choice([rng.randrange(12), rng.randrange(len(content)), len(content) - 1])
    (box.folder / NAME).write_bytes(content[:end])
    return refusal(rng, box, NAME, f"{end} bytes")


@maker(KIND, times=2)
def a_number_that_is_none(rng, box):
    header, data = parts(box)
    place = 4 * rng.randrange(len(data) // 4)
    spoiled = data[:place] + rng.choice([b"\x00\x00\xc0\x7f", b"\x00\x00\x80\xff"]) + data[place + 4 :]
    write(box, header, spoiled)
    return refusal(rng, box, NAME)


def config() -> dict[str, Any]:
    """The configuration of the golden Vim, dense."""
    return {
        "format_version": 1,
        "architecture": {"type": "vim", "image_size": [32, 32], "stride": 8, "patch_size": [8, 8]},
        "preprocessing": {
            "mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225], "crop_pct": 1.0, "interpolation": "bicubic",
        },
        "data": None,
        "pruning": None,
    }  # fmt: skip


_TEXTS = {
    "empty": "",
    "null": "null",
    "a list": "[]",
    "cut off": '{"format_version": 1,',
    "deep": "[" * 100_000,
    "deep objects": '{"format_version": 1, "architecture": ' + '{"a":' * 10_000 + "1" + "}" * 10_001,
    "a pickle": "cos\nsystem\n(S'true'\ntR.",
    "infinite": '{"format_version": 1e999, "architecture": {}}',
    "not a number": '{"format_version": NaN, "architecture": {}}',
}


@maker(KIND, variants=list(_TEXTS))
def metadata_that_is_no_configuration(rng, box, variant):
    header, data = parts(box, _TEXTS[variant])
    write(box, header, data)
    return refusal(rng, box, NAME)


_REFUSED_CHANGES = {
    "a newer version": {"format_version": 999},
    "a version of text": {"format_version": "1"},
    "a version of none": {"format_version": None},
    "a fraction as version": {"format_version": 1.5},
    "no architecture": {"architecture": None},
    "a list of architectures": {"architecture": ["vim"]},
    "an unknown one": {"architecture": {"type": "transformer", "image_size": [32, 32], "stride": 8}},
    "another one": {"architecture": {"type": "plain_mamba", "image_size": [32, 32], "stride": 8}},
    "no image size": {"architecture": {"type": "vim", "stride": 8}},
    "a huge image size": {"architecture": {"type": "vim", "image_size": [10**9, 10**9], "stride": 8}},
    "another image size": {"architecture": {"type": "vim", "image_size": [64, 64], "stride": 8}},
    "a negative stride": {"architecture": {"type": "vim", "image_size": [32, 32], "stride": -8}},
    "a stride of zero": {"architecture": {"type": "vim", "image_size": [32, 32], "stride": 0}},
    "a list as type": {"architecture": {"type": ["vim"], "image_size": [32, 32], "stride": 8}},
    "preprocessing of text": {"preprocessing": "imagenet"},
    "pruning of text": {"pruning": "0.3"},
    "pruning of a list": {"pruning": []},
    "pruning of nothing": {"pruning": {}},
    "a deviation of zero": {"preprocessing": {**config()["preprocessing"], "std": [0, 1, 1]}},
    "a mean of nan": {"preprocessing": {**config()["preprocessing"], "mean": [float("nan"), 0, 0]}},
    "stages that are not in the file": {"pruning": {"stages": [{"after": 9, "ratio": 0.5}], "gap": "bias"}},
    "gaps that are not in the file": {"pruning": {"stages": [{"after": 1, "ratio": 0.5}], "gap": "calibrated"}},
}


@maker(KIND, variants=list(_REFUSED_CHANGES))
def a_damaged_configuration(rng, box, variant):
    header, data = parts(box, json.dumps(config() | _REFUSED_CHANGES[variant]))
    write(box, header, data)
    return refusal(rng, box, NAME)


@maker(KIND, variants=[("true", True), ("zero", 0), ("negative", -1), ("one", 1)])
def a_version(rng, box, variant):
    header, data = parts(box, json.dumps(config() | {"format_version": variant[1]}))
    write(box, header, data)
    return reading(box, box.folder / NAME, must_read=variant[0] == "one")


@maker(KIND, variants=["report", "export"])
def a_report_that_is_none(rng, box, variant):
    header, data = parts(box, json.dumps(config()))
    header["__metadata__"]["ssmcompress_report"] = rng.choice(["", "null", "[]", "{}", '{"data": 1}', "[" * 100_000])
    write(box, header, data)
    if variant == "report":
        return Case(("report", NAME))
    return Case(("export", NAME, "-o", "out.safetensors"), lambda _: None, creates=["out.safetensors"])
