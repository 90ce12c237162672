"""Checkpoint files that are something else: other formats, system paths, other models, inconsistent zip files."""

from __future__ import annotations

import argparse
import io
import os
import shutil
import struct
import warnings
import zipfile
import zlib
from collections.abc import Mapping

import numpy as np
import torch
from torch import nn

from .cases import Case, maker
from .checkpoints import KIND, checkpoint, reading, refusal, replace_member, save
from .judges import anything

_FILES = {
    "empty.pt": b"",
    "text.pt": b"the weights are elsewhere\n",
    "page.pth": b"<!DOCTYPE html><html><head><title>404 Not Found</title></head><body>no</body></html>",
    "pointer.pth": b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32\n",
    "zeros.pt": bytes(10_000),
    "one-byte.pt": b"\x80",
    "empty-zip.pt": b"PK\x05\x06" + bytes(18),
    "gzip.pt.gz": b"\x1f\x8b\x08\x00\x00\x00\x00\x00\x00\x03" + bytes(50),
    "json.pt": b'{"model": {"head.weight": [1, 2]}}',
    "pickle-opcodes.pt": b"\x80\x02}q\x00(X\x05\x00\x00\x00modelq\x01",
    "json.safetensors": b'{"model": 1}',
    "control\x1b[31mname.pt": b"nothing",
}


@maker(KIND, variants=list(_FILES))
def files_that_are_no_checkpoints(rng, box, variant):
    (box.folder / variant).write_bytes(_FILES[variant])
    return refusal(rng, box, variant)


@maker(KIND, variants=["jpeg", "png", "zip of text", "numpy", "onnx", "tar", "parquet name"])
def other_formats_with_the_name_of_a_checkpoint(rng, box, variant):
    file = box.folder / "model.pth"
    if variant in ("jpeg", "png"):
        from PIL import Image

        Image.new("RGB", (32, 32), "red").save(file, variant)
    elif variant == "zip of text":
        with zipfile.ZipFile(file, "w") as archive:
            archive.writestr("../outside.txt", "hello")
            archive.writestr("model/data.pkl", "hello")
            archive.writestr("model/version", "3\n")
    elif variant == "numpy":
        with open(file, "wb") as out:
            np.savez(out, **{k: v.numpy() for k, v in box.world.state.items()})
    elif variant == "onnx":
        import onnx
        from onnx import helper

        graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "g", [], [])
        onnx.save(helper.make_model(graph), file)
    elif variant == "tar":
        import tarfile

        with tarfile.open(file, "w") as tar:
            tar.add(box.world.vim, "../../model.pth")
    else:
        (box.folder / "model.parquet").write_bytes(b"PAR1" + bytes(100) + b"PAR1")
        return refusal(rng, box, "model.parquet")
    return refusal(rng, box, "model.pth")


@maker(
    KIND, variants=["folder", "loop", "dangling", "pipe", "socket", "no rights", "through a file", "a folder of one"]
)
def names_that_are_no_files(rng, box, variant):
    file = box.folder / "model.pt"
    if variant == "folder":
        (file / "inside").mkdir(parents=True)
    elif variant == "loop":
        file.symlink_to("model.pt")
    elif variant == "dangling":
        file.symlink_to("nowhere.pt")
    elif variant == "pipe":
        os.mkfifo(file)
    elif variant == "socket":
        import socket

        with socket.socket(socket.AF_UNIX) as server:
            server.bind(os.path.relpath(file))
    elif variant == "no rights":
        shutil.copy(box.world.vim, file)
        file.chmod(0)
        if os.access(file, os.R_OK):  # as root
            file.write_bytes(b"")
    elif variant == "through a file":
        file.write_bytes(b"text")
        return refusal(rng, box, "model.pt/model.pt")
    else:
        file.mkdir()
        os.mkfifo(file / "model.safetensors")
        (file / "config.json").write_text("{}")
    return refusal(rng, box, "model.pt")


@maker(KIND, variants=["/dev/null", "/dev/zero", "/dev/stdin", "/proc/self/mem", "/proc/version", "/", ".", "..", "~"])
def places_of_the_system(rng, box, variant):
    return refusal(rng, box, variant)


_OTHER_MODELS = (
    "mambar_small_patch16_224",
    "local_vim_small",
    "vim_tiny_patch16_224_bimambav2_final_pool_mean_abs_pos_embed_with_midclstok",
    "vim_tiny_patch16_224_bimambav2_final_pool_mean_abs_pos_embed_with_cls_token_div2",
    "vim_tiny_patch16_224_bimambav2_final_pool_mean_abs_pos_embed_with_double_cls_token_div2",
    "vim_tiny_patch16_224_bimambav2_final_pool_mean_abs_pos_embed_rope_with_midclstok_div2",
    "vim_tiny_patch16_224_bimambav2_final_pool_all_abs_pos_embed_with_noclstok_div2",
    "mambavision_tiny",
    "deit_tiny_patch16_224",
)


@maker(KIND, variants=_OTHER_MODELS)
def arguments_that_name_another_model(rng, box, variant):
    save(box, checkpoint(box.world.state, args=argparse.Namespace(model=variant)))
    return refusal(rng, box, "model.pt")


_ODD_ARGUMENTS = {
    "a list": [1, 2],
    "a text": "vim",
    "a number": 7,
    "a tensor": torch.zeros(3),
    "another": None,
    "a number as the name": argparse.Namespace(model=7),
    "no name": argparse.Namespace(model=None),
    "a long name": argparse.Namespace(model="x" * 1_000_000),
    "a name of control characters": argparse.Namespace(model="vim\x1b[2J\x00\n"),
    "a stride of nothing": argparse.Namespace(model="vim_tiny_stride0_224"),
    "a huge stride": argparse.Namespace(model="vim_tiny_stride999_224"),
    "a name that formats": argparse.Namespace(model="{0.__class__}%s%n"),
}


@maker(KIND, variants=list(_ODD_ARGUMENTS))
def odd_arguments(rng, box, variant):
    file = save(box, checkpoint(box.world.state, args=_ODD_ARGUMENTS[variant]))
    if variant == "a huge stride":  # it may be accepted: images of 3,005 pixels
        return Case(("inspect", file.name), anything)
    return reading(box, file)


def _spoiled(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {k: v * 0.5 for k, v in state.items()}


@maker(
    KIND, variants=["ema beside", "ema alone", "state_dict_ema", "both", "weights that are not there", "ema of text"]
)
def averages(rng, box, variant):
    state, content = box.world.state, checkpoint(box.world.state)
    if variant in ("ema beside", "weights that are not there"):
        content["model_ema"] = _spoiled(state)
    elif variant == "both":
        content["state_dict_ema"] = content["model_ema"] = _spoiled(state)
    elif variant == "ema of text":
        content["model_ema"] = "none"
    else:
        content["model_ema" if variant == "ema alone" else "state_dict_ema"] = content.pop("model")
    file = save(box, content)
    if variant == "weights that are not there":
        return Case(("inspect", file.name, "--weights", "average"))
    if variant == "ema of text":
        return Case(("inspect", file.name, "--weights", "model_ema"))
    return reading(box, file)


@maker(KIND, variants=["torchscript", "a pickled module", "a pickled optimizer", "an exported program"])
def modules_instead_of_weights(rng, box, variant):
    file = box.folder / "model.pt"
    if variant == "torchscript":
        # Its zip file is made by hand, because torch.jit takes seconds to start.
        save(box, checkpoint(box.world.state))
        with zipfile.ZipFile(file, "a") as archive:
            archive.writestr("model/constants.pkl", b"\x80\x02).")
            archive.writestr("model/code/__torch__.py", "open('../canary', 'w')\n")
        return reading(box, file)
    if variant == "a pickled module":
        torch.save(nn.Sequential(nn.Linear(2, 2)), file)
    elif variant == "a pickled optimizer":
        torch.save({"model": dict(box.world.state), "o": torch.optim.SGD(nn.Linear(2, 2).parameters(), 0.1)}, file)
    else:
        with zipfile.ZipFile(file, "w") as archive:
            archive.writestr("archive_format", "pt2")
            archive.writestr("models/model.json", "{}")
            archive.writestr("data/weights/model.pt", "")
    return refusal(rng, box, file.name)


@maker(KIND, variants=["storage too short", "storage gone", "huge claim", "junk before", "two pickles", "slip names"])
def zip_files_that_lie(rng, box, variant):
    file = save(box, checkpoint(box.world.state))
    if variant == "storage too short":
        replace_member(file, "/data/0", b"\0" * 7)
    elif variant == "storage gone":
        replace_member(file, "/data/1", b"")
    elif variant == "huge claim":
        content = bytearray(file.read_bytes())
        place = content.index(b"PK\x01\x02")
        content[place + 20 : place + 28] = b"\xff\xff\xff\x7f" * 2  # sizes of the first member
        file.write_bytes(content)
    elif variant == "junk before":
        file.write_bytes(rng.randbytes(100) + file.read_bytes())
    else:
        name = "model/data.pkl" if variant == "two pickles" else "../../canary"
        out = io.BytesIO(file.read_bytes())
        with zipfile.ZipFile(out, "a") as archive:
            prefix = archive.namelist()[0].partition("/")[0]
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                archive.writestr(name.replace("model", prefix), b"\x80\x02}.")
        file.write_bytes(out.getvalue())
        return reading(box, file)
    return reading(box, file) if variant in ("huge claim", "junk before") else refusal(rng, box, file.name)


@maker(KIND)
def a_bomb_of_compressed_zeros(rng, box):
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    block = packer.compress(bytes(1 << 20)) + packer.flush(zlib.Z_FULL_FLUSH)
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    first = packer.compress(bytes(1 << 20)) + packer.flush(zlib.Z_FULL_FLUSH)
    count, end = 12_000, b"\x03\x00"
    data, size = first + block * (count - 1) + end, count << 20
    name = b"model/data.pkl"
    common = struct.pack("<HHHHHIIIHH", 45, 0, 8, 0, 33, 0, len(data), 0xFFFFFFFF, len(name), 12)
    extra = struct.pack("<HHQ", 1, 8, size)
    local = b"PK\x03\x04" + common + name + extra
    central = b"PK\x01\x02" + struct.pack("<H", 45) + common + struct.pack("<HHHII", 0, 0, 0, 0, 0) + name + extra
    tail = struct.pack("<4sHHHHIIH", b"PK\x05\x06", 0, 0, 1, 1, len(central), len(local) + len(data), 0)
    (box.folder / "model.pt").write_bytes(local + data + central + tail)
    return refusal(rng, box, "model.pt", "12 GB in 12 MB")


@maker(
    KIND, variants=["legacy", "safetensors named pt", "pt named safetensors", "a link", "a name with spaces", "unsafe"]
)
def unusual_but_whole(rng, box, variant):
    content = checkpoint(box.world.state)
    if variant == "legacy":
        return reading(box, save(box, content, _use_new_zipfile_serialization=False), must_read=True)
    if variant == "safetensors named pt":
        from safetensors.torch import save_file

        save_file({k: v.contiguous() for k, v in box.world.state.items()}, box.folder / "vim_tiny_div2.pt")
        return reading(box, box.folder / "vim_tiny_div2.pt")
    if variant == "pt named safetensors":
        return reading(box, save(box, content, "model.safetensors"))
    if variant == "a link":
        (box.folder / "link.pt").symlink_to(box.world.vim)
        return reading(box, box.folder / "link.pt", must_read=True)
    if variant == "a name with spaces":
        return reading(box, save(box, content, "my model; $(touch ..canary) é\n.pt"), must_read=True)
    file = save(box, content | {"hook": print})
    return Case(("inspect", file.name, "--unsafe-load"), anything, must_read=True)
