"""Loading of models from published checkpoints, live modules and the files written by `saved`."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from numbers import Integral
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypedDict

import torch
from torch import Tensor, nn

from ..data.dense import DensePreprocessing
from ..data.transforms import INTERPOLATIONS, Preprocessing
from ..errors import InputError, OptionError, SsmCompressError
from ..files import check_regular, sha256
from ..hub_names import parse_hub_name
from ..progress import note
from ..tasks import SEGMENTATION
from .base import TokenModel
from .hub import fetch
from .precision import check_not_quantised
from .records import Source
from .registry import build, check_task, give_architecture, is_known, normalise_architecture
from .safe_pickle import read_pickle
from .saved import CONFIG_FILE, WEIGHTS_FILE, find_writer, parse_config, read_config_file, restore
from .state_dict import clean, find_state_dict, looks_like_safetensors, read_safetensors, unwrap
from .statements import Statement, Statements, read_config, read_module, read_statements

if TYPE_CHECKING:
    from typing_extensions import Unpack  # in typing from Python 3.11 on


# Arguments of `load` that set configuration fields which cannot be inferred from the weights of some architectures.
GIVEN = ("level", "num_heads")


@dataclass(frozen=True)
class LoadOptions:
    """The arguments of `load`, apart from the model and the device."""

    image_size: int | tuple[int, int] | None = None
    stride: int | None = None
    weights: str = "model"
    unsafe_load: bool = False
    architecture: str | None = None
    task: str | None = None
    level: str | None = None
    num_heads: int | None = None
    frames: int | None = None

    @property
    def size(self) -> tuple[int, int] | None:
        """(height, width) in pixels, or None; InputError if `image_size` is neither a side nor a pair."""
        if self.image_size is None:
            return None
        sides = self.image_size if isinstance(self.image_size, Sequence) else (self.image_size, self.image_size)
        if len(sides) != 2 or not all(isinstance(side, Integral) for side in sides):
            raise InputError(f"image_size {self.image_size}: expected a whole number of pixels, or (height, width)")
        return tuple(sides)


SMALL_SIDE = 32  # pixels; DeiT's code, which writes `eval_crop_ratio`, does not crop images of this size or smaller


class Loaded(NamedTuple):
    """A model, and the statements of its file or module about it."""

    model: TokenModel
    said: Statements


class Place(NamedTuple):
    """The location that a model is read from.

    Attributes:
        path: a file or folder. name: its name in messages. recorded: the path that the model records as its source.
    """

    path: Path
    name: str
    recorded: str


class LoadArguments(TypedDict, total=False):
    """The keyword arguments of `load`, apart from the device: the fields of `LoadOptions`."""

    image_size: int | tuple[int, int] | None
    stride: int | None
    weights: str
    unsafe_load: bool
    architecture: str | None
    task: str | None
    level: str | None
    num_heads: int | None
    frames: int | None


def load(
    path: str | Path | nn.Module | Mapping[str, Any],
    *,
    device: str | torch.device | None = None,
    **options: Unpack[LoadArguments],
) -> TokenModel:
    """Load a vision state-space model; its architecture is inferred from its weights and from its metadata.

    Args:
        path: a checkpoint (.pth, .pt, .safetensors), a folder written by `save`, a live module (for example a Vim of
            any fork), its state dict, or a checkpoint already read by `torch.load`. A string that is not a local path
            may name a repository of the Hugging Face Hub: "owner/name", "owner/name@revision" or
            "owner/name:folder/file.pth". It is downloaded into the Hub's cache, and none of its code is run.
        device: the device of the model. None: the CPU.
        image_size: side, or (height, width), of the input images in pixels; the position embedding is interpolated.
            None: the training size. A segmentation model takes images of any size: on a Vim this is the window size,
            on a PlainMamba the size for which FLOPs are counted.
        stride: step between overlapping patches, in pixels. None: the stride in the file, else the patch size.
        weights: the entry of a training checkpoint to read: "model", "model_ema" or the name of another entry; for a
            fine-tuning state of this package also "best".
        unsafe_load: also unpickle objects that torch rejects as unsafe. This can run arbitrary code; use it only for
            files you trust.
        architecture: "vim", "video_mamba", "plain_mamba", "vmamba" or "vit". Needed only if it cannot be inferred: a
            bare state dict of a Vim has the same names and shapes as an image VideoMamba.
        task: "classification" or "segmentation"; a file for another task is rejected. None: the task of the file.
        level: the kind of output levels of a segmentation model on a Vim, if its file does not say it: "hidden",
            "residual", "residual_norm" or "rope"; see `ssmcompress.models.vim_levels.LEVELS`. None: as in the file,
            else "hidden".
        num_heads: number of attention heads of a ViT, which cannot be inferred from its weights. None: the number in
            the file or of the timm model that it names, else the width divided by 64; required for widths whose
            published models have other heads.
        frames: number of frames of the input videos, for a video model; the temporal embedding is interpolated.
            None: the number used in training.

    Returns:
        A float32 module in eval mode whose forward takes images (B, C, H, W), or videos (B, C, frames, H, W), and
        returns logits, (B, classes) or, for segmentation, (B, classes, H, W). It has `.config`, `.plan`, `.task`,
        `.preprocessing` and `.source`.

    Raises:
        InputError: the file is missing, damaged, unsafe or not a checkpoint; or it holds, or may hold, an unsupported
            model or a model for another task. SsmCompressError: the Hub cannot be reached.
    """
    model, _ = read_model(path, LoadOptions(**options))
    return model.to(device or "cpu")


def read_model(path: str | Path | nn.Module | Mapping[str, Any], options: LoadOptions) -> Loaded:
    """Load a model on the CPU as `load` does, and return it with the statements about it."""
    if isinstance(path, nn.Module):
        loaded = _read_module(getattr(path, "module", path), options)  # unwraps data parallelism
    elif isinstance(path, Mapping):
        loaded = _read_content(path, read_statements(path), options)
    else:
        loaded = _read_path(_find_place(path), options)
    model = loaded.model
    if model.preprocessing is None:
        model.preprocessing = _find_preprocessing(model, loaded.said)
    return loaded


def _find_preprocessing(model: TokenModel, said: Statements) -> Preprocessing | DensePreprocessing:
    """Return the preprocessing stated with the model (at least mean and std), else the default one."""
    default = model.default_preprocessing()
    if model.task is SEGMENTATION:  # images are not cropped, and arguments do not give the scale of mean and std
        return _normalise(default, said, f"; `short_side` {default.short_side or 'none'} is assumed")
    prepared = _recrop(default, said, min(model.config.image_size))
    mean, std = (said.options[name].value if name in said.options else None for name in ("mean", "std"))
    if not isinstance(mean, tuple) or not isinstance(std, tuple):
        return _normalise(prepared, said)
    return _recolour(prepared, mean, std, said.options["mean"].where)


def _recrop(default: Preprocessing, said: Statements, side: int) -> Preprocessing:
    """Return the preprocessing with the stated crop and interpolation, and show a note if they change the images."""
    found = default
    for name in ("crop_pct", "crop_mode", "interpolation"):
        statement = said.options.get(name)
        if statement is None or statement.value is None:
            continue
        if name == "interpolation" and statement.value not in INTERPOLATIONS:
            continue  # "random", for instance, which is for training
        if statement.where.endswith("eval_crop_ratio") and side <= SMALL_SIDE:
            continue
        try:
            changed = found.changed(**{name: statement.value})
        except InputError as error:
            note(f"{statement.where} is not used: {str(error)[:200]}")
            continue
        if changed != found:
            note(f"`{name}` of the images, {statement.value}, is taken from {statement.where}")
        found = changed
    return found


def _normalise(
    default: Preprocessing | DensePreprocessing, said: Statements, more: str = ""
) -> Preprocessing | DensePreprocessing:
    """Return the preprocessing with the mean and std of an OpenMMLab configuration; `more` is appended to the note."""
    if said.normalisation is None:
        return default
    (mean, std), where = said.normalisation
    return _recolour(default, mean, std, where, more)


def _recolour(
    default: Preprocessing | DensePreprocessing, mean: Any, std: Any, where: str, more: str = ""
) -> Preprocessing | DensePreprocessing:
    """Return a preprocessing with other mean and std, or unchanged if they are invalid, and show a note."""
    try:
        found = default.changed(mean=mean, std=std)
    except InputError as error:
        note(f"mean and std of {where} are not used: {str(error)[:200]}")
        return default
    note(f"mean and std of the images are taken from {where}{more}")
    return found


def _read_module(module: nn.Module, options: LoadOptions) -> Loaded:
    check_not_quantised(module)
    if isinstance(module, TokenModel) and module.plan is not None:
        raise InputError("the model is pruned and loaded already: use it, or copy.deepcopy() of it")
    state = unwrap(clean(module.state_dict()), is_known)
    if not isinstance(module, TokenModel):
        return _build(state, read_module(module), options)
    said = Statements(family=Statement(module.architecture, "its class"))
    said.classes, said.palette = module.classes, module.palette
    if options.level is None:
        said.add_config(module.config.to_dict(), module.hidden_options, "its configuration")
    return _build(
        state, said, replace(options, stride=options.stride or module.config.stride), module.config.image_size
    )


def _build(
    state: Mapping[str, Tensor], said: Statements, options: LoadOptions, trained_size: tuple[int, int] | None = None
) -> Loaded:
    """Build the model; the caller's `architecture` overrides a file name, but no other statement."""
    if options.architecture is not None:
        give_architecture(said, options.architecture)
    check_task(state, options.task)
    for name in GIVEN:
        if (value := getattr(options, name)) is not None:
            said.options[name] = Statement(value, f"`{name}`")
    model = build(state, options.size or trained_size, options.stride, trained_size, said)
    for name in GIVEN:
        if getattr(options, name) is not None and name not in model.hidden_options:
            raise OptionError(f"`{name}`: a model of type {model.architecture} has no such option")
    if options.frames is not None:
        model.resize_frames(options.frames)
    return Loaded(model, said)


def _read_content(content: Any, said: Statements, options: LoadOptions) -> Loaded:
    """Build the model in an unpickled checkpoint."""
    state, part = find_state_dict(content, options.weights)
    return _build(unwrap(clean(state), is_known, part), said, options)


def _find_place(name: str | Path) -> Place:
    """Return the location of a model, downloading it if it is on the Hub."""
    if (hub := parse_hub_name(name)) is None:
        path = Path(name)
        return Place(path, str(path), str(path.absolute()))
    fetched = fetch(hub)
    return Place(fetched.path, str(hub), str(fetched.name))


def _read_path(place: Place, options: LoadOptions) -> Loaded:
    """Load a model from a file or folder; error messages start with its name."""
    path, name = place.path, place.name
    if not path.exists():
        raise InputError(f"{name}: no such file or folder")
    if path.is_dir() and not (path / WEIGHTS_FILE).is_file():
        raise InputError(f"{name}: a folder without {WEIGHTS_FILE}; expected a checkpoint file or a saved model")
    file = path / WEIGHTS_FILE if path.is_dir() else path
    try:
        check_regular(file)
        if file.suffix == ".safetensors" or looks_like_safetensors(file):
            if options.weights != "model":
                raise InputError(f"a safetensors file has no {options.weights!r} entry")
            content, texts = read_safetensors(file)
            config = read_config_file(path / CONFIG_FILE) if path.is_dir() else None
            text = texts.get("ssmcompress")
        else:
            content, config = read_pickle(file, options.unsafe_load), None
            text = content.get("ssmcompress") if isinstance(content, Mapping) else None
        if config is None and isinstance(text, str):
            config = parse_config(text)
        if config is not None and "format_version" in config:
            return _restore(config, content, options, place, file)
        said = read_statements(content, file) if config is None else read_config(config)
        loaded = _read_content(content, said, options)
    except InputError as error:
        raise type(error)(f"{name}: {error}") from error
    except OSError as error:
        raise InputError(f"{name}: cannot be read: {error.strerror or error}") from error
    loaded.model.source = Source(place.recorded, sha256(file), options.weights)
    return loaded


def _restore(config: dict[str, Any], content: Any, options: LoadOptions, place: Place, file: Path) -> Loaded:
    """Build a model saved by this package in `file` (in the folder `place`, or `place` itself), and set its source."""
    path = place.path
    state, _ = find_state_dict(content, options.weights)
    check_task(state, options.task)
    model = restore(config, clean(state), options.size, options.stride, options.frames)
    for name in GIVEN:
        given, ours = getattr(options, name), getattr(model.config, name, None)
        if given not in (None, ours):
            raise InputError(f"`{name}` {given!r}: {CONFIG_FILE} says {ours!r}")
    if options.architecture is not None and normalise_architecture(options.architecture) != model.architecture:
        raise InputError(f"`architecture` {options.architecture}: {CONFIG_FILE} says {model.architecture}")
    pruning = config.get("pruning")
    data = config.get("data") if isinstance(config.get("data"), str) else None
    if data is not None and path.is_dir() and os.path.exists(path / data):
        data = str((path / data).absolute())
    origin = pruning.get("source") if isinstance(pruning, dict) else None
    if isinstance(origin, dict):
        model.source = Source(str(origin.get("path")), str(origin.get("sha256")), str(origin.get("weights")), data)
    else:
        model.source = Source(place.recorded, sha256(file), data=data)
    return Loaded(model, Statements(wrapped=True, writer=find_writer(config)))


def describe_file(name: str | Path) -> Source:
    """Return the file of a named model with its digest, downloading it if it is on the Hub."""
    place = _find_place(name)
    return Source(place.recorded, sha256(place.path / WEIGHTS_FILE if place.path.is_dir() else place.path))


def _find_entries(name: str | Path, source: Source) -> list[str]:
    """Return the entries of a file that may have the weights a model was made from, the first one first.

    A note is shown if the file is not the recorded one.
    """
    place = _find_place(name).path
    file = place / WEIGHTS_FILE if place.is_dir() else place
    if not source.sha256 or not file.is_file() or sha256(file) == source.sha256:
        return [source.weights]
    note(f"{name} is not the file that the model was made from: it has another SHA-256")
    return list(dict.fromkeys([source.weights, "model"]))


def find_dense(model: TokenModel, override: str | Path | None = None) -> TokenModel:
    """Load the dense model that a pruned one was made from, or `override`; Hub models are downloaded again.

    Raises:
        InputError: the file is missing, has changed or cannot be downloaded; or `override` is pruned, or has other
            classes or channels.
    """
    source = model.source or Source("", "")
    if override is None:
        if not source.path:
            raise InputError("the dense model was never a file")
        try:
            path = _find_place(source.path).path
        except SsmCompressError as error:  # callers can continue without the dense model, whatever the reason
            raise InputError(f"the dense model is not available: {error}") from error
        file = path / WEIGHTS_FILE if path.is_dir() else path
        if not file.is_file():
            raise InputError(f"the dense model {source.path} is gone")
        if sha256(file) != source.sha256:
            raise InputError(f"the dense model {source.path} has changed since")
    chosen = source.path if override is None else override
    sizes = {"image_size": model.config.image_size, "stride": model.config.stride, "frames": model.frames}
    hidden = {name: getattr(model.config, name, None) for name in GIVEN}
    *others, last = _find_entries(chosen, source)
    for entry in others:
        with contextlib.suppress(InputError):
            dense = load(chosen, **sizes, weights=entry, architecture=model.architecture, **hidden)
            break
    else:
        dense = load(chosen, **sizes, weights=last, architecture=model.architecture, **hidden)
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
