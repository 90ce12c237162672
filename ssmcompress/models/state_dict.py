"""Extraction of state dicts from published files: safetensors and training checkpoints."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import InputError
from ..progress import note

# Keys of the weights in checkpoints of hustvl and DeiT, of Lightning and mmcv, and of DeepSpeed.
STATE_KEYS = ("model", "state_dict", "module")
# Keys of moving averages of the weights in checkpoints of hustvl and DeiT, of timm, and of others.
AVERAGE_KEYS = ("model_ema", "state_dict_ema", "ema_state_dict", "ema", "model_ema_state_dict", "ema_model")
# Keys of tensors that are not model weights.
OTHER_KEYS = (
    "optimizer",
    "lr_scheduler",
    "scaler",
    "scheduler",
    "optimizer_states",
    "amp",
    "amp_scaler",
    "loss_scaler",
)
# Buffers added to a model by tools: thop's FLOPs counter, torch.optim.swa_utils, and mmengine.
COUNTERS = re.compile(r"(^|\.)(total_ops|total_params)$|^(n_averaged|steps)$")
# Prefixes of classifiers that are stored next to their backbone.
HEADS = ("head.", "classifier.", "fc.")
DEPTH = 4


def looks_like_safetensors(file: Path) -> bool:
    """Return whether a file of any name starts like safetensors, with the length of a JSON header and the header."""
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


def find_state_dict(content: Any, weights: str = "model") -> tuple[Mapping[str, Tensor], str]:
    """Find the state dict in a checkpoint.

    Args:
        content: an unpickled checkpoint. weights: the entry to read: "model" or "model_ema", including their aliases
            (`STATE_KEYS`, `AVERAGE_KEYS`), or the name of an entry.

    Returns:
        The state dict, and the `weights` argument for `unwrap`: `weights` if the whole content is one state dict, and
        "model" if the state dict is an entry.

    Raises:
        InputError: there is no such entry, or it is ambiguous.
    """
    if isinstance(content, nn.Module):  # only with unsafe_load
        content = content.state_dict()
    if not isinstance(content, Mapping) or not content:
        raise InputError(f"holds a {type(content).__name__}: expected a state dict or a dict with one in it")
    if not _is_bare(content):
        return _find_entry(content, weights, DEPTH)
    if weights != "model" and not any(_inside(content, name) for name in _names(weights)):
        raise InputError(f"a bare state dict has no {weights!r} entry")
    return content, weights


def _names(weights: str) -> tuple[str, ...]:
    """Return the keys and prefixes that a `weights` argument stands for."""
    return {"model": STATE_KEYS, "model_ema": AVERAGE_KEYS}.get(weights, (weights,))


def _find_entry(content: Mapping[Any, Any], weights: str, depth: int) -> tuple[Mapping[str, Tensor], str]:
    entries = {
        key: value.state_dict() if isinstance(value, nn.Module) else value
        for key, value in content.items()
        if isinstance(key, str) and key not in OTHER_KEYS and _holds_weights(value, depth)
    }
    found = next((key for key in _names(weights) if key in entries), None)
    others = [key for key in entries if key not in AVERAGE_KEYS]
    if found is None and weights == "model" and len(others) == 1:
        found = others[0]
    if found is None:
        for key in others:
            if _is_bare(entries[key]) and any(_inside(entries[key], name) for name in _names(weights)):
                return entries[key], weights  # a part of that entry
        shown = ", ".join(str(key)[:40] for key in list(content)[:8])
        advice = f"; `weights` reads one of {', '.join(repr(key[:40]) for key in entries)}" if entries else ""
        raise InputError(
            f"no weights under {weights!r}: expected a dict of tensors there, found entries {shown}{advice}"
        )
    if weights == "model" and (averages := [key for key in entries if key in AVERAGE_KEYS]):
        note(f"read the weights under {found!r}; the averages under {averages[0]!r} are read with `weights` model_ema")
    state = entries[found]
    if _is_bare(state) or not any(_holds_weights(value, depth - 1) for value in state.values()):
        return state, "model"
    return _find_entry(state, "model", depth - 1)


def _is_bare(content: Mapping[Any, Any]) -> bool:
    return all(isinstance(value, Tensor) for value in content.values())


def _holds_weights(value: Any, depth: int) -> bool:
    """Return whether a value is a module, a state dict, or a dict that contains one at most `depth` levels deeper."""
    if isinstance(value, nn.Module):
        return True
    return (
        depth >= 0
        and isinstance(value, Mapping)
        and any(
            isinstance(key, str) and (isinstance(entry, Tensor) or _holds_weights(entry, depth - 1))
            for key, entry in value.items()
        )
    )


def _inside(state: Mapping[Any, Any], name: str) -> dict[str, Any]:
    """Return the entries whose names start with `name` and a dot, without this prefix."""
    return {
        key.removeprefix(f"{name}."): value
        for key, value in state.items()
        if isinstance(key, str) and key.startswith(f"{name}.")
    }


def clean(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return the tensors, detached, without counters and without the prefixes of compiled modules in their names.

    Raises:
        InputError: a value is not a plain dense tensor, or two names become equal without these prefixes.
    """
    cleaned = {}
    for key, value in state.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            raise InputError(f"{str(key)[:80]!r} holds a {type(value).__name__}: expected named tensors")
        if COUNTERS.search(key):
            continue
        plain = value.layout == torch.strided and not (value.is_meta or value.is_nested or value.is_quantized)
        if not plain or value.untyped_storage().nbytes() < value.numel() * value.element_size():
            raise InputError(f"{key[:80]!r} holds no plain dense tensor (it is sparse, nested, expanded or the like)")
        name = re.sub(r"(^|\.)_orig_mod\.", r"\1", re.sub(r"^module\.", "", key))
        if name in cleaned:
            raise InputError(
                f"holds {name[:80]!r} twice, once as {key[:80]!r}, so the model is not certain: remove one"
            )
        cleaned[name] = value.detach()
    return cleaned


def unwrap(
    state: Mapping[str, Tensor], recognises: Callable[[Mapping[str, Tensor]], bool], weights: str = "model"
) -> dict[str, Tensor]:
    """Remove the prefixes that wrappers add to parameter names: `module.`, `model.`, `net.`, `backbone.`, ...

    Args:
        state: cleaned tensors. recognises: returns whether names belong to a known model.
        weights: the part to use if several parts are known models: "model", "model_ema" or the name of a part.

    Returns:
        The tensors by their names without prefixes. Outside the part, only a head is kept; a note lists the rest.

    Raises:
        InputError: the part is ambiguous.
    """
    state = dict(state)
    for _ in range(DEPTH):
        if weights == "model" and recognises(state):
            break
        names = dict.fromkeys(key.partition(".")[0] for key in state if "." in key)
        insides = {name: _inside(state, name) for name in names}
        parts = [name for name in names if _is_known(insides[name], recognises)]
        if weights == "model":
            parts = [name for name in parts if name not in AVERAGE_KEYS] or parts
            parts = [name for name in parts if name in STATE_KEYS] or parts
        else:
            parts = [name for name in parts if name in _names(weights)]
        if not parts:
            break
        if len(parts) > 1:
            raise InputError(
                f"holds several models, under the prefixes {', '.join(f'{name}.' for name in parts)}: `weights` "
                f"chooses one ({', '.join(map(repr, parts))})"
            )
        inside = insides[parts[0]]
        outside = {k: v for k, v in state.items() if not k.startswith(f"{parts[0]}.")}
        head = {k: v for k, v in outside.items() if k.startswith(HEADS)}
        if head and (inner := [k for k in inside if k.startswith(HEADS)]):
            raise InputError(f"two classifiers, {next(iter(head))} and {parts[0]}.{inner[0]}: remove one of them")
        if left_out := [k for k in outside if k not in head]:
            shown = ", ".join(k[:60] for k in left_out[:3]) + (", ..." if len(left_out) > 3 else "")
            note(f"took the weights under {parts[0]}., and left out {len(left_out)} other tensors ({shown})")
        state, weights = head | inside, "model"
    return state


def _is_known(state: Mapping[str, Tensor], recognises: Callable[[Mapping[str, Tensor]], bool]) -> bool:
    """Return whether names belong to a known model, possibly after further prefixes."""
    for _ in range(DEPTH):
        if recognises(state):
            return True
        names = {key.partition(".")[0] for key in state}
        if len(names) != 1:
            return False
        state = _inside(state, names.pop())
    return False
