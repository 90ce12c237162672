"""Checkpoint files: damaged, of other content, of other models."""

from __future__ import annotations

import argparse
import random
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

import ssmcompress

from .cases import Box, Case, maker
from .judges import same_logits
from .world import MODEL_NAME

KIND = "checkpoints"


def refusal(rng: random.Random, box: Box, file: Any, detail: str = "") -> Case:
    """A randomly chosen command that must reject a checkpoint."""
    commands = [
        ("inspect", file),
        ("inspect", file, "--json"),
        ("prune", file, "--ratio", "0.3", "--no-latency", "-o", "out"),
        ("prune", file, "--dry-run"),
        ("export", file, "-o", "out.safetensors"),
        ("export", file, "--onnx", "-o", "out.onnx"),
        ("evaluate", file, "--data", box.world.plain),
        ("evaluate", box.world.pruned, "--dense", file, "--data", box.world.images),
        ("benchmark", file),
        ("compare", file, "-o", "out"),
        ("finetune", file, "--data", box.world.plain, "-o", "out"),
        ("verify", file, box.world.root / "model.onnx"),
    ]
    return Case(rng.choice(commands), detail=detail)


def reading(
    box: Box, file: Path, expected: np.ndarray | None = None, must_read: bool = False, detail: str = ""
) -> Case:
    """`inspect`, which may reject a checkpoint or must read it correctly."""
    return Case(("inspect", file.name, "--json"), same_logits(box, file, expected), must_read=must_read, detail=detail)


def save(box: Box, content: Any, name: str = "model.pt", **options: Any) -> Path:
    """Write a torch checkpoint."""
    file = box.folder / name
    torch.save(content, file, **options)
    return file


def checkpoint(state: Mapping[str, Any], **others: Any) -> dict[str, Any]:
    """A training checkpoint with these weights, whose args name the model."""
    return {"model": dict(state), "epoch": 3, "args": argparse.Namespace(model=MODEL_NAME)} | others


def replace_member(file: Path, end: str, content: bytes) -> None:
    """Replace a member of a zip file, uncompressed."""
    with zipfile.ZipFile(file) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(file, "w") as archive:
        for name, old in members.items():
            archive.writestr(name, content if name.endswith(end) else old)


@maker(KIND, times=4)
def cut_off(rng, box):
    legacy = rng.random() < 0.5
    content = save(box, checkpoint(box.world.state), _use_new_zipfile_serialization=not legacy).read_bytes()
    end = rng.choice([rng.randrange(1, 64), rng.randrange(1, len(content)), len(content) - rng.randrange(1, 40)])
    (box.folder / "model.pt").write_bytes(content[:end])
    return refusal(rng, box, "model.pt", f"{end} of {len(content)} bytes, {'legacy' if legacy else 'zip'}")


@maker(KIND, times=5)
def a_bit_flipped_in_the_pickle(rng, box):
    file = save(box, checkpoint(box.world.state))
    content = bytearray(file.read_bytes())
    with zipfile.ZipFile(file) as archive:
        info = next(i for i in archive.infolist() if i.filename.endswith("data.pkl"))
    start = content.index(b"\x80\x02", info.header_offset + 30)
    place = start + rng.randrange(info.file_size)
    content[place] ^= 1 << rng.randrange(8)
    file.write_bytes(content)
    return reading(box, file, detail=f"byte {place}")


@maker(KIND, times=3)
def a_bit_flipped_in_the_directory(rng, box):
    file = save(box, checkpoint(box.world.state))
    content = bytearray(file.read_bytes())
    place = rng.randrange(content.index(b"PK\x01\x02"), len(content))
    content[place] ^= 1 << rng.randrange(8)
    file.write_bytes(content)
    return reading(box, file, detail=f"byte {place}")


@maker(KIND, times=2)
def bytes_overwritten_at_the_start(rng, box):
    file = save(box, checkpoint(box.world.state))
    content = bytearray(file.read_bytes())
    count = rng.randrange(1, 300)
    content[:count] = rng.randbytes(count)
    file.write_bytes(content)
    return refusal(rng, box, "model.pt", f"{count} bytes")


@maker(KIND, variants=["missing", "extra", "renamed", "two missing", "one layer gone", "a layer doubled"])
def other_keys(rng, box, variant):
    state = dict(box.world.state)
    keys = list(state)
    if variant == "missing":
        del state[rng.choice(keys)]
    elif variant == "two missing":
        for key in rng.sample(keys, 2):
            del state[key]
    elif variant == "extra":
        state["neck.weight"] = torch.zeros(3)
    elif variant == "renamed":
        key = rng.choice(keys)
        state[key + "_"] = state.pop(key)
    elif variant == "one layer gone":
        state = {k: v for k, v in state.items() if not k.startswith("layers.1.")}
    else:
        state |= {k.replace("layers.1.", "layers.1.mixer."): v for k, v in state.items() if k.startswith("layers.1.")}
    save(box, checkpoint(state))
    return refusal(rng, box, "model.pt")


@maker(KIND, variants=["-1", "999999999", "99999999999999999999", "٢", "01", "1e1", "", "2 ", "0x2"])
def layer_numbers(rng, box, variant):
    state = {k.replace("layers.2.", f"layers.{variant}."): v for k, v in box.world.state.items()}
    save(box, checkpoint(state))
    return refusal(rng, box, "model.pt")


_SHAPES = {
    "transposed": lambda v: v.t() if v.ndim == 2 and v.shape[0] != v.shape[1] else v[..., None],
    "a row less": lambda v: v[1:],
    "no rows": lambda v: v[:0],
    "five dimensions": lambda v: v[None, None, None, None, None],
    "a number": lambda v: v.flatten()[0].clone(),
    "one more": lambda v: torch.cat([v, v[:1]]),
    "expanded to 10^12": lambda v: torch.zeros(1).expand(10**12),
    "expanded to its shape": lambda v: torch.zeros(1).expand(v.shape),
    "no elements, huge sides": lambda v: torch.zeros(2**40, 0),
}


@maker(KIND, variants=list(_SHAPES))
def shapes(rng, box, variant):
    state = dict(box.world.state)
    key = rng.choice([k for k, v in state.items() if v.ndim])
    state[key] = _SHAPES[variant](state[key])
    save(box, checkpoint(state))
    return refusal(rng, box, "model.pt", key)


_BAD_TYPES = {
    "int8": lambda v: v.to(torch.int8),
    "bool": lambda v: v > 0,
    "complex": lambda v: v.to(torch.complex64),
    "int64": lambda v: v.long(),
    "quantised": lambda v: torch.quantize_per_tensor(v, 0.1, 0, torch.qint8),
    "sparse": lambda v: v.to_sparse(),
    "sparse rows": lambda v: v.to_sparse_csr() if v.ndim == 2 else v.to_sparse(),
    "meta": lambda v: v.to("meta"),
    "nested": lambda v: torch.nested.nested_tensor([v]),
    "numpy": lambda v: v.numpy(),
    "list": lambda v: v.tolist(),
    "none": lambda v: None,
    "text": lambda v: "0.1",
    "not a number": lambda v: torch.full_like(v, float("nan")),
    "infinite": lambda v: torch.full_like(v, float("-inf")),
    "float64 above float32": lambda v: torch.full_like(v.double(), 1e300),
}


@maker(KIND, variants=list(_BAD_TYPES))
def types(rng, box, variant):
    state = dict(box.world.state)
    key = rng.choice([k for k, v in state.items() if v.ndim])
    state[key] = _BAD_TYPES[variant](state[key])
    save(box, checkpoint(state))
    return refusal(rng, box, "model.pt", key)


@maker(KIND, variants=["float64", "float16", "bfloat16", "float8_e4m3fn"])
def rounded(rng, box, variant):
    state = {k: v.to(getattr(torch, variant)) for k, v in box.world.state.items()}
    images = torch.from_numpy(box.world.golden["images"])
    truth = box.folder.parent / "truth.pt"
    torch.save(checkpoint({k: v.float() for k, v in state.items()}), truth)
    with torch.no_grad():
        expected = ssmcompress.load(truth)(images).numpy()
    return reading(box, save(box, checkpoint(state)), expected)


_CONTENT = {
    "an empty dict": {},
    "an empty state": {"model": {}},
    "a number": 7,
    "a text": "model",
    "none": None,
    "a tensor": torch.zeros(3),
    "a list of pairs": [("head.weight", torch.zeros(3))],
    "keys of numbers": {0: torch.zeros(2), 1: torch.zeros(2)},
    "none as a key": {"model": {None: torch.zeros(2)}},
    "an optimizer": {"optimizer": {"state": {}, "param_groups": [{"lr": 0.1, "params": [0]}]}, "epoch": 3},
    "a dict of dicts": {"model": {"layers": {"0": {"weight": torch.zeros(2)}}}},
    "other weights": {"fc.weight": torch.zeros(2, 2), "fc.bias": torch.zeros(2)},
    "a set": {1, 2},
    "a long number": {"model": 10**5000},
}


@maker(KIND, variants=list(_CONTENT))
def content_that_is_no_model(rng, box, variant):
    save(box, _CONTENT[variant])
    return refusal(rng, box, "model.pt")


@maker(KIND)
def a_dict_that_holds_itself(rng, box):
    content = checkpoint(box.world.state)
    content["model"]["self"] = content
    save(box, content)
    return refusal(rng, box, "model.pt")


@maker(KIND, variants=["deep list", "deep dict", "deep args"])
def depth(rng, box, variant):
    value: Any = []
    for _ in range(100):
        value = [value] if variant == "deep list" else {"a": value}
    content = checkpoint(box.world.state)
    if variant == "deep args":
        content["args"].extra = value
    else:
        content["extra"] = value
    return reading(box, save(box, content))
