"""Pickles that request code execution: any opcode, any protocol, anywhere in a file. None may run."""

from __future__ import annotations

import argparse
import io
import pickle
import struct
import tarfile
from typing import Any

import numpy as np
import torch

from .cases import Box, Case, maker
from .checkpoints import KIND, checkpoint, refusal, replace_member, save


class Calls:
    """Pickles as a call of a global."""

    def __init__(self, function: Any, *arguments: Any):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


class Named:
    """Pickles as a call of a global that this process need not import."""

    def __init__(self, module: str, name: str, *arguments: Any):
        self.module, self.name, self.arguments = module, name, arguments


def dumps(value: Any, protocol: int) -> bytes:
    """A pickle whose `Named` values are calls."""

    class Pickler(pickle._Pickler):  # the one in Python, whose parts can be called
        def save(self, value, save_persistent_id=True):
            if not isinstance(value, Named):
                return super().save(value, save_persistent_id)
            if self.proto >= 4:
                super().save(value.module)
                super().save(value.name)
                self.write(pickle.STACK_GLOBAL)
            else:
                self.write(pickle.GLOBAL + f"{value.module}\n{value.name}\n".encode())
            super().save(tuple(value.arguments))
            self.write(pickle.REDUCE)

    out = io.BytesIO()
    Pickler(out, protocol).dump(value)
    return out.getvalue()


def attacks(box: Box) -> dict[str, Named]:
    """Calls that would create the canary."""
    canary = str(box.canary)
    touch, code = f"touch {canary}", f"open({canary!r}, 'w')"
    return {
        "os.system": Named("os", "system", touch),
        "posix.system": Named("posix", "system", touch),
        "subprocess.call": Named("subprocess", "call", ["touch", canary]),
        "eval": Named("builtins", "eval", code),
        "exec": Named("builtins", "exec", code),
        "exec of Python 2": Named("__builtin__", "exec", code),
        "open": Named("builtins", "open", canary, "w"),
        "io.open": Named("io", "open", canary, "w"),
        "runpy": Named("runpy", "run_path", canary),
        "timeit": Named("timeit", "timeit", code),
        "os.mkdir": Named("os", "mkdir", canary),
        "numpy code": Named("numpy.testing._private.utils", "runstring", code, {}),
        "torch.load": Named("torch.serialization", "load", canary),
        "torch.hub": Named("torch.hub", "load", "owner/name"),
        "dynamo guards": Named("torch._dynamo.guards", "get_verbose_code_parts", code, None),
        "exit": Named("os", "_exit", 0),
        "import": Named("importlib", "import_module", "antigravity"),
        "a name with dots": Named("torch", "serialization.os.system", touch),
    }


NAMES = (
    "os.system", "posix.system", "subprocess.call", "eval", "exec", "exec of Python 2", "open", "io.open", "runpy",
    "timeit", "os.mkdir", "numpy code", "torch.load", "torch.hub", "dynamo guards", "exit", "import",
    "a name with dots",
)  # fmt: skip


@maker(KIND, variants=NAMES)
def a_pickle_alone(rng, box, variant):
    protocol = rng.randrange(6)
    (box.folder / "model.pt").write_bytes(dumps(attacks(box)[variant], protocol))
    return refusal(rng, box, "model.pt", f"protocol {protocol}")


def in_a_zip(box: Box, value: Any, protocol: int) -> None:
    """A torch checkpoint whose pickle has an additional entry."""
    file = save(box, checkpoint(box.world.state))
    replace_member(file, "data.pkl", dumps({"epoch": 3, "hook": value, "model": {"a": 1}}, protocol))


@maker(KIND, variants=NAMES[:8])
def in_a_checkpoint(rng, box, variant):
    protocol = rng.randrange(6)
    in_a_zip(box, attacks(box)[variant], protocol)
    return refusal(rng, box, "model.pt", f"protocol {protocol}")


@maker(KIND, variants=["in args", "in a list", "as a key", "in a path", "after a stop"])
def deep_inside(rng, box, variant):
    attack = attacks(box)[rng.choice(NAMES[:8])]
    protocol = rng.randrange(2, 6)
    if variant == "in args":
        value: Any = argparse.Namespace(model="vim", hook=attack)
    elif variant == "in a list":
        value = [[[(1, [attack])]]]
    elif variant == "as a key":
        value = {(attack,): 1}
    elif variant == "in a path":
        value = Named("pathlib", "PosixPath", attack)
    else:
        content = pickle.dumps({"model": {}}, 2) + dumps(attack, 2)
        (box.folder / "model.pt").write_bytes(content)
        return refusal(rng, box, "model.pt")
    in_a_zip(box, value, protocol)
    return refusal(rng, box, "model.pt", f"protocol {protocol}")


@maker(KIND, variants=["INST", "OBJ", "memo", "BUILD", "extension", "NEWOBJ_EX", "persistent", "bytes"])
def opcodes(rng, box, variant):
    text = f"touch {box.canary}".encode()
    short = struct.pack("<I", len(text))
    call = {
        "INST": b"(S'" + text + b"'\nios\nsystem\n.",
        "OBJ": b"(cos\nsystem\nS'" + text + b"'\no.",
        "memo": b"\x80\x04\x8c\x02os\x94\x8c\x06system\x94h\x00h\x01\x93X" + short + text + b"\x85R.",
        "BUILD": b"cargparse\nNamespace\n)\x81}(S'__setstate__'\ncos\nsystem\nubS'" + text + b"'\nb.",
        "extension": b"\x80\x02\x82\x01.",
        "NEWOBJ_EX": b"\x80\x04cbuiltins\nopen\n(S'" + str(box.canary).encode() + b"'\nS'w'\nt}\x92.",
        "persistent": b"\x80\x02(cos\nsystem\nS'" + text + b"'\ntQ.",
        "bytes": b"\x80\x04\x8e" + struct.pack("<Q", 2**62) + b"x.",
    }[variant]
    if rng.random() < 0.5:
        (box.folder / "model.pt").write_bytes(call)
    else:
        replace_member(save(box, checkpoint(box.world.state)), "data.pkl", call)
    return refusal(rng, box, "model.pt")


@maker(KIND, variants=["npy", "npz", "legacy torch", "old tar"])
def pickles_in_other_formats(rng, box, variant):
    import os

    attack = Calls(os.system, f"touch {box.canary}")
    file = box.folder / "model.pt"
    if variant in ("npy", "npz"):
        with open(file, "wb") as out:
            (np.save if variant == "npy" else np.savez)(out, np.array([attack], dtype=object))
    elif variant == "legacy torch":
        torch.save(checkpoint(box.world.state, hook=attack), file, _use_new_zipfile_serialization=False)
    else:
        with tarfile.open(file, "w") as tar:
            for name in ("sys_info", "pickle", "storages", "tensors"):
                content = pickle.dumps(attack, 2)
                info = tarfile.TarInfo(name)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    return refusal(rng, box, "model.pt")


@maker(KIND, variants=["plan", "report", "recipe", "data"])
def where_no_pickle_belongs(rng, box, variant):
    content = dumps(attacks(box)["os.system"], rng.randrange(6))
    (box.folder / "report.json").write_bytes(content)
    world = box.world
    arguments = {
        "plan": ("prune", world.vim, "--plan", "report.json", "--dry-run"),
        "report": ("report", "."),
        "recipe": ("finetune", world.pruned, "--data", world.images, "-o", "out", "--recipe", "report.json"),
        "data": ("evaluate", world.vim, "--data", "report.json"),
    }[variant]
    return Case(arguments)
