"""Loading of models: published checkpoints, live modules, and what `saved` wrote."""

from __future__ import annotations

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


# Arguments of `load` that say what the weights of some architectures do not show: fields of their configurations.
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


class Loaded(NamedTuple):
    """A model, and what its file or module says about it."""

    model: TokenModel
    said: Statements


class Place(NamedTuple):
    """Where a model is read from.

    Attributes:
        path: a file or folder. name: what messages call it. recorded: how the model remembers it.
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
    """Load a vision state-space model; its architecture is recognised by its weights and by what is said about it.

    Args:
        path: a checkpoint (.pth, .pt, .safetensors), a folder that `save` wrote, a live module (a Vim of any fork, for
            instance), its state dict, or a checkpoint that `torch.load` has read. A text that is no local path may be
            a name of the Hugging Face Hub: "owner/name", "owner/name@revision" or "owner/name:folder/file.pth". It is
            fetched into the Hub's cache, and nothing in it is run.
        device: the device of the model. None: the CPU.
        image_size: side, or (height, width), of the images it will run on, in pixels; the position
            embedding is interpolated. None: the size it was trained at. A segmentation model takes images of any size;
            this is the size of the windows of one on a Vim, and the size at which one on a PlainMamba is counted.
        stride: step between patches, in pixels, if they overlap. None: the stride in the file, else the patch
            size.
        weights: the entry of a training checkpoint to read, "model" or "model_ema", or the name of another entry; for
            the state of our own fine-tuning also "best".
        unsafe_load: unpickle also objects that torch refuses as unsafe. That can run any code; only for files you
            trust.
        architecture: "vim", "video_mamba", "plain_mamba", "vmamba" or "vit". Needed only where neither the weights
            nor anything else says it: a bare state dict of a Vim has the names and shapes of a VideoMamba's for images.
        task: "classification" or "segmentation", to be refused a file of another one. None: what the file is.
        level: what the output levels of a segmentation model on a Vim are, where its file does not say it: "hidden",
            "residual", "residual_norm" or "rope"; see `ssmcompress.models.vim_levels.LEVELS`. None: as the file says,
            else "hidden".
        num_heads: number of attention heads of a ViT, which its weights do not show. None: as the file says it, or the
            model of timm that it names, else the width divided by 64.
        frames: number of frames of a video that a model for videos will run on; the embedding of their times is
            interpolated. None: the number it was trained at.

    Returns:
        A module whose forward takes images (B, C, H, W), or videos (B, C, frames, H, W), and returns logits,
        (B, classes) or, for segmentation, (B, classes, H, W), in eval mode and float32, with `.config`, `.plan`,
        `.task`, `.preprocessing` and `.source`.

    Raises:
        InputError: the file is missing, damaged, unsafe or not a checkpoint; or it is, or may be, another model than
            those that are supported, or a model for another task. SsmCompressError: the Hub cannot be reached.
    """
    model, _ = read_model(path, LoadOptions(**options))
    return model.to(device or "cpu")


def read_model(path: str | Path | nn.Module | Mapping[str, Any], options: LoadOptions) -> Loaded:
    """Load a model as `load` does, on the CPU, with what is said about it."""
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
    """Return the preprocessing that is said with the model, by mean and std at least, or the default one."""
    default = model.default_preprocessing()
    if model.task is SEGMENTATION:  # images are not cropped, and arguments do not say of which scale their values are
        return _normalise(default, said, f"; `short_side` {default.short_side or 'none'} is assumed")
    names = [name for name in ("mean", "std", "crop_pct", "interpolation") if name in said.options]
    values = {name: said.options[name].value for name in names}
    if values.get("interpolation") not in INTERPOLATIONS:
        values.pop("interpolation", None)  # "random", for instance, which is for training
    if not {"mean", "std"} <= values.keys() or not all(isinstance(values[name], tuple) for name in ("mean", "std")):
        return _normalise(default, said)
    note(f"mean and std of the images are taken from {said.options['mean'].where}")
    return default.changed(**values)


def _normalise(
    default: Preprocessing | DensePreprocessing, said: Statements, more: str = ""
) -> Preprocessing | DensePreprocessing:
    """Return the preprocessing with mean and std of a configuration of mm's that fit it; `more` ends the note."""
    if said.normalisation is None:
        return default
    (mean, std), where = said.normalisation
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
    """Build the model; what the caller says of its architecture counts where nothing else than a file name does."""
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
    """Return where a model is; one of the Hub is fetched."""
    if (hub := parse_hub_name(name)) is None:
        path = Path(name)
        return Place(path, str(path), str(path.absolute()))
    fetched = fetch(hub)
    return Place(fetched.path, str(hub), str(fetched.name))


def _read_path(place: Place, options: LoadOptions) -> Loaded:
    """Load a model from a file or folder; errors begin with its name."""
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
    """Build the model that we saved in `file`, of the folder at `place` or itself that file, with its source."""
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
    """Return the file of the model that a name stands for, with its digest; one of the Hub is fetched."""
    place = _find_place(name)
    return Source(place.recorded, sha256(place.path / WEIGHTS_FILE if place.path.is_dir() else place.path))


def find_dense(model: TokenModel, override: str | Path | None = None) -> TokenModel:
    """Load the dense model that a pruned one was made from, or `override` instead; one of the Hub is fetched again.

    Raises:
        InputError: the file is gone or has changed, or cannot be fetched; or `override` is pruned, or has other classes
            or channels.
    """
    source = model.source or Source("", "")
    if override is None:
        if not source.path:
            raise InputError("the dense model was never a file")
        try:
            path = _find_place(source.path).path
        except SsmCompressError as error:  # callers do without the dense model, whatever the reason
            raise InputError(f"the dense model is not available: {error}") from error
        file = path / WEIGHTS_FILE if path.is_dir() else path
        if not file.is_file():
            raise InputError(f"the dense model {source.path} is gone")
        if sha256(file) != source.sha256:
            raise InputError(f"the dense model {source.path} has changed since")
    chosen, weights = (source.path, source.weights) if override is None else (override, "model")
    sizes = {"image_size": model.config.image_size, "stride": model.config.stride, "frames": model.frames}
    hidden = {name: getattr(model.config, name, None) for name in GIVEN}
    dense = load(chosen, **sizes, weights=weights, architecture=model.architecture, **hidden)
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
