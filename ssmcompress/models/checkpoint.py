"""Loading and saving of models: published checkpoints, and self-describing folders of compressed models."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from numbers import Integral
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .._version import __version__
from ..data.transforms import Preprocessing
from ..errors import InputError
from ..files import new_folder, sha256
from ..pruning.plan import Plan
from .base import TokenModel, low_rank
from .records import MadeBy, Source, steps_from_dict, steps_to_dict
from .registry import MODELS, build, recognise
from .rewrite import install
from .safe_pickle import read_pickle
from .state_dict import clean, find_state_dict, looks_like_safetensors, read_safetensors, read_stride

FORMAT_VERSION = 1
WEIGHTS_FILE = "model.safetensors"
CONFIG_FILE = "config.json"


def load(
    path: str | Path | nn.Module | Mapping[str, Tensor],
    *,
    image_size: int | tuple[int, int] | None = None,
    stride: int | None = None,
    weights: str = "model",
    device: str | torch.device | None = None,
    unsafe_load: bool = False,
) -> TokenModel:
    """Load a vision state-space model; its architecture is recognised by its weights.

    Args:
        path: a checkpoint (.pth, .pt, .safetensors), a folder that `save` wrote, a live module or its state
            dict (a Vim of any fork, for instance).
        image_size: side, or (height, width), of the images it will run on, in pixels; the position
            embedding is interpolated. None: the size it was trained at.
        stride: step between patches, in pixels, if they overlap. None: the stride in the file, else the patch
            size.
        weights: the entry of a training checkpoint to read, "model" or "model_ema"; for the state of our own
            fine-tuning also "best".
        device: the device of the model. None: the CPU.
        unsafe_load: unpickle also objects that torch refuses as unsafe. That can run any code; only for files you
            trust.

    Returns:
        A module whose forward takes images (B, C, H, W) and returns logits (B, classes), in eval mode and
        float32, with `.config`, `.plan`, `.preprocessing` and `.source`.

    Raises:
        InputError: the file is missing, damaged, unsafe or not a checkpoint.
    """
    if image_size is not None:
        sides = tuple(image_size) if isinstance(image_size, Sequence) else (image_size, image_size)
        if len(sides) != 2 or not all(isinstance(side, Integral) for side in sides):
            raise InputError(f"image_size {image_size}: expected a whole number of pixels, or (height, width)")
        image_size = sides
    if isinstance(path, nn.Module):
        path = getattr(path, "module", path)  # unwrap data parallelism
        state = clean(path.state_dict())
        trained = path.config.image_size if isinstance(path, TokenModel) else None
        model = build(state, image_size or trained, stride or recognise(state).stride_of(path), trained_size=trained)
    elif isinstance(path, Mapping):
        model = build(clean(path), image_size, stride)
    else:
        model = _load_path(Path(path), image_size, stride, weights, unsafe_load)
    if model.preprocessing is None:
        model.preprocessing = Preprocessing.default(model.config.in_chans, model.config.image_size)
    return model.to(device or "cpu")


def _load_path(path, image_size, stride, weights, unsafe_load) -> TokenModel:
    """Load a model from a file or folder; errors begin with its path."""
    if not path.exists():
        raise InputError(f"{path}: no such file or folder")
    if path.is_dir() and not (path / WEIGHTS_FILE).is_file():
        raise InputError(f"{path}: a folder without {WEIGHTS_FILE}; expected a checkpoint file or a saved model")
    file = path / WEIGHTS_FILE if path.is_dir() else path
    try:
        if file.suffix == ".safetensors" or looks_like_safetensors(file):
            if weights != "model":
                raise InputError(f"a safetensors file has no {weights!r} entry")
            state, texts = read_safetensors(file)
            if path.is_dir():
                return _restore(_read_config(path / CONFIG_FILE), state, image_size, stride, path, file)
            if "ssmcompress" in texts:
                return _restore(_parse_config(texts["ssmcompress"]), state, image_size, stride, path, file)
        else:
            content = read_pickle(file, unsafe_load)
            state = find_state_dict(content, weights)
            if isinstance(texts := content.get("ssmcompress") if isinstance(content, Mapping) else None, str):
                return _restore(_parse_config(texts), clean(state), image_size, stride, path, file)
            stride = stride or read_stride(content)
        model = build(clean(state), image_size, stride)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror or error}") from error
    model.source = Source(str(path.absolute()), sha256(file), weights)
    return model


def _parse_config(text: str) -> dict[str, Any]:
    """Parse a configuration; InputError if this version cannot read it."""
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
    """Build the model, pruned or not, that a configuration and its tensors describe."""
    architecture = config["architecture"]
    supported = [model_class.architecture for model_class in MODELS]
    if architecture.get("type") not in supported:
        raise InputError(f"architecture {architecture.get('type')!r}: this version knows {', '.join(supported)}")
    gaps = {k: v for k, v in state.items() if k.rpartition(".")[2] == "gap_delta"}
    corrections = {k: v for k, v in state.items() if k.startswith("corrections.")}
    probes = {k: v for k, v in state.items() if k.startswith("pruners.")}
    weights = clean({k: v for k, v in state.items() if not (k in gaps or k in corrections or k in probes)})
    try:
        trained = tuple(int(side) for side in architecture["image_size"])
        stride = stride or int(architecture["stride"])
        if len(trained) != 2 or min(*trained, stride) < 1:
            raise ValueError(f"image_size {trained}, stride {stride}")
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise InputError(f"{CONFIG_FILE}: bad architecture block ({error})") from error
    model = build(weights, image_size or trained, stride, trained_size=trained)
    if model.architecture != architecture["type"]:
        raise InputError(f"{CONFIG_FILE} says {architecture['type']}, but the weights are a {model.architecture}'s")
    model.preprocessing = Preprocessing.from_dict(config.get("preprocessing") or {}, model.config.in_chans)
    pruning = config.get("pruning")
    if pruning is None and corrections:
        raise InputError(f"corrections ({next(iter(corrections))}, ...) in a model that prunes nothing")
    if pruning is not None:
        plan = Plan.from_dict(pruning)
        plan = replace(plan, gap=plan.gap or "bias", calibration=None)
        model.made_by = MadeBy(pruning.get("command"), pruning.get("versions"))
        install(model, replace(plan, gap="bias"))  # creates the buffers for the deltas in the file
        _fill_buffers(model, "gap_delta", gaps, "gap deltas")
        _fill_buffers(model, "probe", probes, "saliency probes")
        _fill_corrections(model, corrections)
        model.plan = plan
        model.steps = steps_from_dict(pruning)
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
    """Load the dense model that a pruned one was made from, or `override` instead.

    Raises:
        InputError: the file is gone or has changed; or `override` is pruned, or has other classes or channels.
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
    chosen, weights = (source.path, source.weights) if override is None else (override, "model")
    dense = load(chosen, image_size=model.config.image_size, stride=model.config.stride, weights=weights)
    if dense.plan is not None:
        raise InputError(f"{chosen} is pruned itself; expected a dense model")
    classes, channels = dense.config.num_classes, dense.config.in_chans
    if (classes, channels) != (model.config.num_classes, model.config.in_chans):
        raise InputError(
            f"{chosen} has {classes} classes and {channels} channels, the compressed model "
            f"{model.config.num_classes} and {model.config.in_chans}"
        )
    dense.preprocessing = model.preprocessing
    return dense.to(next(model.parameters()).device)


def _fill_buffers(model: TokenModel, name: str, tensors: Mapping[str, Tensor], what: str) -> None:
    """Copy the tensors of a file into the buffers called `name`; InputError unless names and shapes match."""
    buffers = {k: v for k, v in model.named_buffers() if k.rpartition(".")[2] == name}
    wrong = sorted(set(buffers) ^ set(tensors)) or [k for k in tensors if tensors[k].shape != buffers[k].shape]
    if wrong:
        raise InputError(f"{what} do not fit the stages in {CONFIG_FILE}: {', '.join(wrong[:3])}")
    for key, buffer in buffers.items():
        if not tensors[key].to(buffer.dtype).isfinite().all():
            raise InputError(f"{key} holds values that are not finite; the file is damaged")
        buffer.copy_(tensors[key])


def _fill_corrections(model: TokenModel, corrections: Mapping[str, Tensor]) -> None:
    """Build the corrections of a file in the model; InputError if names, shapes or values are invalid."""
    width = model.d_model
    first = min(int(layer) for layer in model.pruners)
    remaining = dict(corrections)
    for layer in range(first + 1, len(model.blocks) + 1):
        prefix = f"corrections.{layer}."
        pair = [remaining.pop(f"{prefix}{side}.weight", None) for side in (0, 1)]
        if pair == [None, None]:
            continue
        rank = None if pair[0] is None or pair[0].ndim != 2 else len(pair[0])
        shapes = [None if value is None else tuple(value.shape) for value in pair]
        if not rank or shapes != [(rank, width), (width, rank)]:
            raise InputError(f"{prefix}*: expected matrices (rank, {width}) and ({width}, rank), found {shapes}")
        if not all(value.is_floating_point() and value.float().isfinite().all() for value in pair):
            raise InputError(f"{prefix}* holds values that are not finite numbers; the file is damaged")
        model.corrections[str(layer)] = low_rank(width, rank)
        for linear, value in zip(model.corrections[str(layer)], pair, strict=True):
            linear.weight.data.copy_(value)
    if remaining:
        raise InputError(f"corrections do not fit the stages in {CONFIG_FILE}: {', '.join(sorted(remaining)[:3])}")


def read_plan(file: str | Path) -> Plan:
    """Read a plan from its own JSON, from the output of a dry run, or from the pruning section of a config.json.

    Raises:
        InputError: a file that cannot be read, or that holds no plan.
    """
    try:
        value = json.loads(Path(file).read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"cannot read {file}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{file}: not JSON ({error})") from error
    if isinstance(value, dict):
        value = value.get("plan") or value.get("pruning") or value
    return Plan.from_dict(value)


def describe(model: TokenModel) -> dict[str, Any]:
    """Return the configuration that `load` needs: a JSON value, the content of config.json."""
    pruning = None
    if model.plan is not None:
        source = model.source or Source("", "")
        pruning = {
            **model.plan.to_dict(tensors=False),
            "kept": [model.token_counts()[stage.after] for stage in model.plan.stages],
            **steps_to_dict(model.steps),
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
    """Return the versions to record in a file."""
    import platform

    return {"ssmcompress": __version__, "torch": torch.__version__, "python": platform.python_version()}


def serialise(model: TokenModel, report: str | None = None) -> bytes:
    """Return a self-describing .safetensors file: weights and gap deltas, with configuration and report as metadata."""
    from safetensors.torch import save as to_bytes

    # Not save_file, whose error on a full disk is not an OSError.
    state = {k: v.detach().cpu().contiguous() for k, v in model.state_dict().items()}
    metadata = {"format": "pt", "ssmcompress": json.dumps(describe(model))}
    return to_bytes(state, metadata=metadata | ({"ssmcompress_report": report} if report else {}))


def save(
    model: TokenModel,
    folder: str | Path,
    *,
    extra: Mapping[str, bytes] | None = None,
    force: bool = False,
) -> Path:
    """Write a folder that `load` can read: model.safetensors and config.json, completely or not at all.

    Args:
        model: from `load` or `prune`.
        folder: the folder to write. force: replace it if it exists.
        extra: further files, name -> content (for instance the report and the model card).

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
