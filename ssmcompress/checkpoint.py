"""Files <-> models: published checkpoints in, self-describing compressed folders out and in again."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ._version import __version__
from .errors import InputError
from .files import new_folder, sha256
from .models import MODELS, MadeBy, TokenModel, build
from .preprocess import Preprocessing
from .pruning.pruner import install
from .pruning.schedule import Plan
from .safe_pickle import read_pickle

FORMAT_VERSION = 1
WEIGHTS_FILE = "model.safetensors"
CONFIG_FILE = "config.json"
# Where checkpoints keep their weights: hustvl's and DeiT's, Lightning's and mmcv's.
STATE_KEYS = ("model", "state_dict")


@dataclass(frozen=True)
class Source:
    """The file a model was read from, or, for a compressed model, the dense file it was made from.

    Attributes:
        path: absolute path. sha256: of the weights file's content. weights: the entry that was read.
        data: what the folder names as its images (a path or a hub name), or None.
    """

    path: str
    sha256: str
    weights: str = "model"
    data: str | None = None


def load(
    path: str | Path | nn.Module | Mapping[str, Tensor],
    *,
    image_size: int | tuple[int, int] | None = None,
    stride: int | None = None,
    weights: str = "model",
    device: str | torch.device | None = None,
    unsafe_load: bool = False,
) -> TokenModel:
    """A vision state-space model, recognised from its weights alone.

    Args:
        path: a checkpoint (.pth, .pt, .safetensors), a folder that `save` wrote, a live module or its state
            dict (a Vim of any fork, for instance).
        image_size: side, or (height, width), of the images it will be run on, in pixels; the position
            embedding is interpolated. None: what it was trained at.
        stride: step between patches, in pixels, where they overlap. None: what the file says, else the patch
            size.
        weights: which entry of a training checkpoint, "model" or "model_ema".
        device: where to put it. None: the CPU.
        unsafe_load: unpickle what torch refuses as unsafe. It can run any code; only for files you trust.

    Returns:
        A module whose forward takes images (B, C, H, W) and returns logits (B, classes), in eval mode and
        float32, with `.config`, `.plan`, `.preprocessing` and `.source`.

    Raises:
        InputError: a file that is missing, damaged, unsafe or of something else.
    """
    if isinstance(image_size, int):
        image_size = (image_size, image_size)
    if isinstance(path, nn.Module):
        path = getattr(path, "module", path)  # as wrapped for data parallelism
        proj = getattr(getattr(path, "patch_embed", None), "proj", None)
        stride = stride or (proj.stride[0] if isinstance(proj, nn.Conv2d) else None)
        model = build(_clean(path.state_dict()), image_size, stride)
    elif isinstance(path, Mapping):
        model = build(_clean(path), image_size, stride)
    else:
        model = _load_path(Path(path), image_size, stride, weights, unsafe_load)
    if model.preprocessing is None:
        model.preprocessing = Preprocessing.default(model.config.in_chans, model.config.image_size)
    return model.to(device or "cpu")


def _load_path(path, image_size, stride, weights, unsafe_load) -> TokenModel:
    if not path.exists():
        raise InputError(f"{path}: no such file or folder")
    if path.is_dir() and not (path / WEIGHTS_FILE).is_file():
        raise InputError(f"{path}: a folder without {WEIGHTS_FILE}; expected a checkpoint file or a saved model")
    file = path / WEIGHTS_FILE if path.is_dir() else path
    try:
        if file.suffix == ".safetensors" or _looks_like_safetensors(file):
            if weights != "model":
                raise InputError(f"a safetensors file has no {weights!r} entry")
            state, config = _read_safetensors(file)
            if path.is_dir():
                config = _read_config(path / CONFIG_FILE)
            if config is not None:
                return _restore(config, state, image_size, stride, path, file)
        else:
            content = read_pickle(file, unsafe_load)
            state = _state_dict(content, weights)
            stride = stride or _told_stride(content)
        model = build(_clean(state), image_size, stride)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror or error}") from error
    model.source = Source(str(path.absolute()), sha256(file), weights)
    return model


# ---------------------------------------------------------------------------------------------- reading files


def _looks_like_safetensors(file: Path) -> bool:
    """Whether a file begins as safetensors do: the length of a JSON header, and that; whatever it is called."""
    with open(file, "rb") as content:
        start = content.read(9)
    return len(start) == 9 and start[8:] == b"{" and int.from_bytes(start[:8], "little") < file.stat().st_size


def _read_safetensors(file: Path) -> tuple[dict[str, Tensor], dict[str, Any] | None]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as tensors:
            metadata = tensors.metadata() or {}
            state = {k: tensors.get_tensor(k) for k in tensors.keys()}  # noqa: SIM118 (not a dict)
    except SafetensorError as error:
        raise InputError(f"not a whole safetensors file ({error})") from error
    return state, _parse_config(metadata["ssmcompress"]) if "ssmcompress" in metadata else None


def _state_dict(content: Any, weights: str) -> Mapping[str, Tensor]:
    """The weights inside what a checkpoint file held."""
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
    found = ", ".join(str(key) for key in list(content)[:8])
    raise InputError(f"no weights under {weights!r}: expected a dict of tensors there, found entries {found}")


def _told_stride(content: Any) -> int | None:
    """The patch stride in a training run's model name: hustvl's finer models are `..._stride8_...`."""
    args = content.get("args") if isinstance(content, Mapping) else None
    name = getattr(args, "model", None)
    told = re.search(r"stride(\d{1,3})(?!\d)", name) if isinstance(name, str) else None
    return int(told.group(1)) or None if told else None


def _clean(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """Parameter names without the prefixes that wrappers add."""
    for key, value in state.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            raise InputError(f"{str(key)[:80]!r} holds a {type(value).__name__}: expected named tensors")
        plain = value.layout == torch.strided and not (value.is_meta or value.is_nested or value.is_quantized)
        if not plain or value.untyped_storage().nbytes() < value.numel() * value.element_size():
            raise InputError(f"{key[:80]!r} holds no plain dense tensor (it is sparse, nested, expanded or the like)")
    return {re.sub(r"^(module\.|_orig_mod\.)+", "", k): v.detach() for k, v in state.items()}


# ------------------------------------------------------------------------------------------- our own format


def _parse_config(text: str) -> dict[str, Any]:
    try:
        config = json.loads(text)
        version = config["format_version"]
        if not isinstance(version, int) or not isinstance(config["architecture"], dict):
            raise TypeError("format_version or architecture")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise InputError(f"its configuration is not one of ssmcompress ({error})") from error
    if version > FORMAT_VERSION:
        raise InputError(f"format version {version}; this ssmcompress reads up to {FORMAT_VERSION}: upgrade it")
    return config


def _read_config(file: Path) -> dict[str, Any]:
    try:
        return _parse_config(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError(f"{CONFIG_FILE} is missing; expected a folder that ssmcompress wrote") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{CONFIG_FILE} is not a text file") from error


def _restore(config, state, image_size, stride, path: Path, file: Path) -> TokenModel:
    """The model, pruned where it was, of a configuration and its tensors."""
    architecture = config["architecture"]
    known = [model_class.architecture for model_class in MODELS]
    if architecture.get("type") not in known:
        raise InputError(f"architecture {architecture.get('type')!r}: this version knows {', '.join(known)}")
    gaps = {k: v for k, v in state.items() if k.rpartition(".")[2] == "gap_delta"}
    weights = _clean({k: v for k, v in state.items() if k not in gaps})
    try:
        trained = tuple(int(side) for side in architecture["image_size"])
        stride = stride or int(architecture["stride"])
        if len(trained) != 2 or min(*trained, stride) < 1:
            raise ValueError(f"image_size {trained}, stride {stride}")
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise InputError(f"{CONFIG_FILE}: bad architecture block ({error})") from error
    model = build(weights, image_size or trained, stride, trained_size=trained)
    model.preprocessing = Preprocessing.from_dict(config.get("preprocessing") or {}, model.config.in_chans)
    pruning = config.get("pruning")
    if pruning is not None:
        plan = Plan.from_dict(pruning)
        plan = replace(plan, gap=plan.gap or "bias", calibration=None)
        model.made_by = MadeBy(pruning.get("command"), pruning.get("versions"))
        install(model, replace(plan, gap="bias"))  # makes the buffers that the file's deltas go into
        _fill_gaps(model, gaps)
        model.plan = plan
    data = config.get("data") if isinstance(config.get("data"), str) else None
    if data is not None and path.is_dir() and os.path.exists(path / data):
        data = str((path / data).absolute())
    origin = pruning.get("source") if isinstance(pruning, dict) else None
    if isinstance(origin, dict):
        model.source = Source(str(origin.get("path")), str(origin.get("sha256")), str(origin.get("weights")), data)
    else:
        model.source = Source(str(path.absolute()), sha256(file), data=data)
    return model


def find_dense(model: TokenModel, override: str | Path | None = None) -> TokenModel:
    """The dense model that a pruned one was made from, or the one given instead.

    Raises:
        InputError: it is gone or has changed since; or `override` is pruned, or has other classes or channels.
    """
    source = model.source or Source("", "")
    if override is None:
        if not source.path:
            raise InputError("the dense model was never a file")
        path = Path(source.path)
        file = path / WEIGHTS_FILE if path.is_dir() else path
        if not file.is_file():
            raise InputError(f"the dense model {path} is gone")
        if sha256(file) != source.sha256:
            raise InputError(f"the dense model {path} has changed since")
    size, stride = model.config.image_size, model.config.stride
    dense = load(
        override or source.path, image_size=size, stride=stride, weights="model" if override else source.weights
    )
    if dense.plan is not None:
        raise InputError(f"{override or source.path} is pruned itself; expected a dense model")
    ours, theirs = model.config, dense.config
    if (ours.num_classes, ours.in_chans) != (theirs.num_classes, theirs.in_chans):
        raise InputError(
            f"{override} has {theirs.num_classes} classes and {theirs.in_chans} channels, the compressed model "
            f"{ours.num_classes} and {ours.in_chans}"
        )
    dense.preprocessing = model.preprocessing
    return dense.to(next(model.parameters()).device)


def _fill_gaps(model: TokenModel, gaps: Mapping[str, Tensor]) -> None:
    buffers = {k: v for k, v in model.named_buffers() if k.rpartition(".")[2] == "gap_delta"}
    wrong = sorted(set(buffers) ^ set(gaps)) or [k for k in gaps if gaps[k].shape != buffers[k].shape]
    if wrong:
        raise InputError(f"gap deltas do not fit the stages in {CONFIG_FILE}: {', '.join(wrong[:3])}")
    for key, buffer in buffers.items():
        if not gaps[key].isfinite().all():
            raise InputError(f"{key} holds values that are not finite; the file is damaged")
        buffer.copy_(gaps[key])


def describe(model: TokenModel) -> dict[str, Any]:
    """The configuration that makes a folder reload by itself: a JSON value, what config.json holds."""
    pruning = None
    if model.plan is not None:
        source = model.source or Source("", "")
        pruning = {
            **model.plan.to_dict(tensors=False),
            "kept": [model.token_counts()[stage.after] for stage in model.plan.stages],
            "source": {"path": source.path, "sha256": source.sha256, "weights": source.weights},
            "command": model.made_by.command,
            "versions": model.made_by.versions or versions(),
        }
    return {
        "format_version": FORMAT_VERSION,
        "architecture": {"type": model.architecture, **asdict(model.config)},
        "preprocessing": asdict(model.preprocessing),
        "data": model.source.data if model.source else None,
        "pruning": pruning,
    }


def versions() -> dict[str, str]:
    """What made a file."""
    import platform

    return {"ssmcompress": __version__, "torch": torch.__version__, "python": platform.python_version()}


def serialise(model: TokenModel, report: str | None = None) -> bytes:
    """A self-describing .safetensors file: weights and gap deltas, in its metadata the configuration and a report."""
    from safetensors.torch import save as to_bytes

    # Not save_file: its error on a full disk is no OSError.
    state = {k: v.detach().cpu().contiguous() for k, v in model.state_dict().items()}
    metadata = {"format": "pt", "ssmcompress": json.dumps(describe(model))}
    return to_bytes(state, metadata=metadata | ({"ssmcompress_report": report} if report else {}))


def read_metadata(file: Path) -> dict[str, str]:
    """The texts in a .safetensors file's header: what `serialise` put there, and more; InputError if it is none."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as tensors:
            return tensors.metadata() or {}
    except SafetensorError as error:
        raise InputError(f"{file}: not a whole safetensors file ({error})") from error


def save(
    model: TokenModel,
    folder: str | Path,
    *,
    extra: Mapping[str, bytes] | None = None,
    force: bool = False,
) -> Path:
    """Write a folder that `load` reads back anywhere: model.safetensors and config.json, whole or not at all.

    Args:
        model: from `load` or `prune`.
        folder: where; it must not exist unless `force`.
        extra: further files, name -> content (the report and the model card, for the command line).

    Raises:
        InputError: the folder exists, or cannot be written.
    """
    folder = Path(folder)
    with new_folder(folder, force) as temporary:
        (temporary / WEIGHTS_FILE).write_bytes(serialise(model))
        config = json.dumps(describe(model), indent=2)
        (temporary / CONFIG_FILE).write_text(config + "\n", encoding="utf-8")
        for name, content in (extra or {}).items():
            (temporary / name).write_bytes(content)
    return folder
