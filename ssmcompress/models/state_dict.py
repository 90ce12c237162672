"""State dicts from published files: safetensors and training checkpoints."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import InputError

# Keys of the weights in checkpoints: of hustvl and DeiT, and of Lightning and mmcv.
STATE_KEYS = ("model", "state_dict")


def looks_like_safetensors(file: Path) -> bool:
    """Return whether a file begins like safetensors, with the length of a JSON header and the header; for any name."""
    with open(file, "rb") as content:
        start = content.read(9)
    return len(start) == 9 and start[8:] == b"{" and int.from_bytes(start[:8], "little") < file.stat().st_size


def read_safetensors(file: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read (tensors, metadata of the header) of a .safetensors file; InputError if it is not one."""
    with _open_safetensors(file) as content:
        return {k: content.get_tensor(k) for k in content.keys()}, content.metadata() or {}  # noqa: SIM118


def read_metadata(file: Path) -> dict[str, str]:
    """Read the metadata of a .safetensors file only; InputError if it is not one."""
    with _open_safetensors(file) as content:
        return content.metadata() or {}


@contextmanager
def _open_safetensors(file: Path) -> Iterator[Any]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as content:
            yield content
    except SafetensorError as error:
        raise InputError(f"not a whole safetensors file ({error})") from error


def find_state_dict(content: Any, weights: str) -> Mapping[str, Tensor]:
    """Return the state dict in a checkpoint: its whole content, or its entry `weights`; InputError without one."""
    if isinstance(content, nn.Module):  # only with unsafe_load
        content = content.state_dict()
    if not isinstance(content, Mapping) or not content:
        raise InputError(f"holds a {type(content).__name__}: expected a state dict or a dict with one in it")
    if all(isinstance(value, Tensor) for value in content.values()):
        if weights == "model":
            return content
        raise InputError(f"a bare state dict has no {weights!r} entry")
    for key in STATE_KEYS if weights == "model" else (weights,):
        if isinstance(content.get(key), Mapping):
            return content[key]
    keys = ", ".join(str(key) for key in list(content)[:8])
    raise InputError(f"no weights under {weights!r}: expected a dict of tensors there, found entries {keys}")


def read_stride(content: Any) -> int | None:
    """Return the patch stride in the model name of a training run, or None: hustvl names them `..._stride8_...`."""
    args = content.get("args") if isinstance(content, Mapping) else None
    name = getattr(args, "model", None)
    match = re.search(r"stride(\d{1,3})(?!\d)", name) if isinstance(name, str) else None
    return int(match.group(1)) or None if match else None


def clean(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """Remove the prefixes of wrappers from parameter names; InputError unless all values are plain dense tensors."""
    for key, value in state.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            raise InputError(f"{str(key)[:80]!r} holds a {type(value).__name__}: expected named tensors")
        plain = value.layout == torch.strided and not (value.is_meta or value.is_nested or value.is_quantized)
        if not plain or value.untyped_storage().nbytes() < value.numel() * value.element_size():
            raise InputError(f"{key[:80]!r} holds no plain dense tensor (it is sparse, nested, expanded or the like)")
    return {re.sub(r"^(module\.|_orig_mod\.)+", "", k): v.detach() for k, v in state.items()}
