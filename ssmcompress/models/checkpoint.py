"""Loading and saving of models: published checkpoints, and self-describing folders of compressed models."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from numbers import Integral
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .._version import __version__
from ..data.transforms import Preprocessing
from ..errors import InputError
from ..files import check_regular, new_folder, read_text, sha256
from ..pruning.plan import Plan
from .base import TokenModel, low_rank
from .inputs import check_model
from .learnt import ALL, SOME, LearntFrom
from .precision import check_not_quantised
from .records import MadeBy, Source, steps_from_dict, steps_to_dict
from .registry import MODELS, build, is_known, normalise_architecture, recognise
from .rewrite import install
from .safe_pickle import read_pickle
from .state_dict import clean, find_state_dict, looks_like_safetensors, read_metadata, read_safetensors, unwrap
from .statements import Statement, Statements, read_config, read_module, read_statements

FORMAT_VERSION = 1
WEIGHTS_FILE = "model.safetensors"
CONFIG_FILE = "config.json"


@dataclass(frozen=True)
class LoadOptions:
    """The arguments of `load`, apart from the model and the device."""

    image_size: int | tuple[int, int] | None = None
    stride: int | None = None
    weights: str = "model"
    unsafe_load: bool = False
    architecture: str | None = None

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


def load(
    path: str | Path | nn.Module | Mapping[str, Any],
    *,
    image_size: int | tuple[int, int] | None = None,
    stride: int | None = None,
    weights: str = "model",
    device: str | torch.device | None = None,
    unsafe_load: bool = False,
    architecture: str | None = None,
) -> TokenModel:
    """Load a vision state-space model; its architecture is recognised by its weights and by what is said about it.

    Args:
        path: a checkpoint (.pth, .pt, .safetensors), a folder that `save` wrote, a live module (a Vim of any fork, for
            instance), its state dict, or a checkpoint that `torch.load` has read.
        image_size: side, or (height, width), of the images it will run on, in pixels; the position
            embedding is interpolated. None: the size it was trained at.
        stride: step between patches, in pixels, if they overlap. None: the stride in the file, else the patch
            size.
        weights: the entry of a training checkpoint to read, "model" or "model_ema", or the name of another entry; for
            the state of our own fine-tuning also "best".
        device: the device of the model. None: the CPU.
        unsafe_load: unpickle also objects that torch refuses as unsafe. That can run any code; only for files you
            trust.
        architecture: "vim" or "plain_mamba". Needed only where neither the weights nor anything else says it: a bare
            state dict of a Vim has the names and shapes of a VideoMamba's.

    Returns:
        A module whose forward takes images (B, C, H, W) and returns logits (B, classes), in eval mode and
        float32, with `.config`, `.plan`, `.preprocessing` and `.source`.

    Raises:
        InputError: the file is missing, damaged, unsafe or not a checkpoint; or it is, or may be, another model than
            those that are supported.
    """
    model, _ = read_model(path, LoadOptions(image_size, stride, weights, unsafe_load, architecture))
    return model.to(device or "cpu")


def read_model(path: str | Path | nn.Module | Mapping[str, Any], options: LoadOptions) -> Loaded:
    """Load a model as `load` does, on the CPU, with what is said about it."""
    if isinstance(path, nn.Module):
        loaded = _read_module(getattr(path, "module", path), options)  # unwraps data parallelism
    elif isinstance(path, Mapping):
        loaded = _read_content(path, read_statements(path), options)
    else:
        loaded = _read_path(Path(path), options)
    model = loaded.model
    if model.preprocessing is None:
        model.preprocessing = Preprocessing.default(model.config.in_chans, model.config.image_size)
    return loaded


def _read_module(module: nn.Module, options: LoadOptions) -> Loaded:
    check_not_quantised(module)
    if isinstance(module, TokenModel) and module.plan is not None:
        raise InputError("the model is pruned and loaded already: use it, or copy.deepcopy() of it")
    state = unwrap(clean(module.state_dict()), is_known)
    if not isinstance(module, TokenModel):
        stride = options.stride or recognise(state).stride_of(module)
        return _build(state, read_module(module), replace(options, stride=stride))
    said = Statements(family=Statement(module.architecture, "its class"))
    return _build(
        state, said, replace(options, stride=options.stride or module.config.stride), module.config.image_size
    )


def _build(
    state: Mapping[str, Tensor], said: Statements, options: LoadOptions, trained_size: tuple[int, int] | None = None
) -> Loaded:
    """Build the model; what the caller says of its architecture counts where nothing else than a file name does."""
    if options.architecture is not None:
        said.set_family(normalise_architecture(options.architecture), "`architecture`")
    return Loaded(build(state, options.size or trained_size, options.stride, trained_size, said), said)


def _read_content(content: Any, said: Statements, options: LoadOptions) -> Loaded:
    """Build the model in an unpickled checkpoint."""
    state, part = find_state_dict(content, options.weights)
    return _build(unwrap(clean(state), is_known, part), said, options)


def _read_path(path: Path, options: LoadOptions) -> Loaded:
    """Load a model from a file or folder; errors begin with its path."""
    if not path.exists():
        raise InputError(f"{path}: no such file or folder")
    if path.is_dir() and not (path / WEIGHTS_FILE).is_file():
        raise InputError(f"{path}: a folder without {WEIGHTS_FILE}; expected a checkpoint file or a saved model")
    file = path / WEIGHTS_FILE if path.is_dir() else path
    try:
        check_regular(file)
        if file.suffix == ".safetensors" or looks_like_safetensors(file):
            if options.weights != "model":
                raise InputError(f"a safetensors file has no {options.weights!r} entry")
            content, texts = read_safetensors(file)
            config = _read_config(path / CONFIG_FILE) if path.is_dir() else None
            text = texts.get("ssmcompress")
        else:
            content, config = read_pickle(file, options.unsafe_load), None
            text = content.get("ssmcompress") if isinstance(content, Mapping) else None
        if config is None and isinstance(text, str):
            config = _parse_config(text)
        if config is not None and "format_version" in config:
            state, _ = find_state_dict(content, options.weights)
            model = _restore(config, clean(state), options, path, file)
            return Loaded(model, Statements(wrapped=True, writer=_made_by(config)))
        said = read_statements(content, file) if config is None else read_config(config)
        loaded = _read_content(content, said, options)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror or error}") from error
    loaded.model.source = Source(str(path.absolute()), sha256(file), options.weights)
    return loaded


def _made_by(config: Mapping[str, Any]) -> str:
    """Return the tool that wrote a configuration of ours, with its version if that is recorded."""
    pruning = config.get("pruning")
    made = pruning.get("versions") if isinstance(pruning, Mapping) else None
    version = made.get("ssmcompress") if isinstance(made, Mapping) else None
    return f"ssmcompress {version}" if isinstance(version, str) else "ssmcompress"


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
    """Return the configuration in a folder: ours, or one of another tool, which has no `format_version`."""
    try:
        text = read_text(file)
    except FileNotFoundError as error:
        raise InputError(f"{CONFIG_FILE} is missing; expected a folder that ssmcompress wrote") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{CONFIG_FILE} is not a text file") from error
    try:
        config = json.loads(text)
    except (ValueError, RecursionError):
        config = None
    is_foreign = (
        isinstance(config, dict)
        and not {"format_version", "pruning"} & config.keys()
        and not isinstance(config.get("architecture"), dict)
        and {"architecture", "architectures", "model_type"} & config.keys()
    )
    return config if is_foreign else _parse_config(text)


def _restore(config, state, options: LoadOptions, path: Path, file: Path) -> TokenModel:
    """Build the model, pruned or not, that a configuration and its tensors describe."""
    architecture = config["architecture"]
    supported = [model_class.architecture for model_class in MODELS]
    if architecture.get("type") not in supported:
        raise InputError(f"architecture {architecture.get('type')!r}: this version knows {', '.join(supported)}")
    gaps = {k: v for k, v in state.items() if k.rpartition(".")[2] == "gap_delta"}
    corrections = {k: v for k, v in state.items() if k.startswith("corrections.")}
    probes = {k: v for k, v in state.items() if k.startswith("pruners.")}
    learnt = {k: v for k, v in state.items() if k in (ALL, SOME)}
    weights = {k: v for k, v in state.items() if k not in {**gaps, **corrections, **probes, **learnt}}
    try:
        trained = tuple(int(side) for side in architecture["image_size"])
        stride = options.stride or int(architecture["stride"])
        if len(trained) != 2 or min(*trained, stride) < 1:
            raise ValueError(f"image_size {trained}, stride {stride}")
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise InputError(f"{CONFIG_FILE}: bad architecture block ({error})") from error
    said = Statements(family=Statement(architecture["type"], CONFIG_FILE))
    model = build(weights, options.size or trained, stride, trained, said)
    if model.architecture != architecture["type"]:
        raise InputError(f"{CONFIG_FILE} says {architecture['type']}, but the weights are a {model.architecture}'s")
    if options.architecture is not None and normalise_architecture(options.architecture) != model.architecture:
        raise InputError(f"`architecture` {options.architecture}: {CONFIG_FILE} says {model.architecture}")
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
        counts = [model.token_counts()[stage.after] for stage in plan.stages]
        if (
            options.size in (None, trained)
            and stride == architecture["stride"]
            and pruning.get("kept", counts) != counts
        ):
            raise InputError(f"{CONFIG_FILE}: its stages keep {counts} tokens, but it says {str(pruning['kept'])[:80]}")
        model.steps = steps_from_dict(pruning)
        model.learnt = LearntFrom.from_tensors(learnt)
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
    sizes = {"image_size": model.config.image_size, "stride": model.config.stride}
    dense = load(chosen, **sizes, weights=weights, architecture=model.architecture)
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
    """Read a plan from its own JSON, from the output of a dry run, or from what a pruned model was saved as.

    Args:
        file: a JSON file, also a model's config.json or report.json; a model's folder; or a .safetensors file with its
            configuration.

    Raises:
        InputError: a file that cannot be read, or that holds no plan.
    """
    path = Path(file)
    path = path / CONFIG_FILE if path.is_dir() else path
    expected = "expected a pruned model's folder or report, or the JSON of a dry run"
    try:
        embedded = path.suffix == ".safetensors"
        text = read_metadata(path).get("ssmcompress", "") if embedded else read_text(path)
        value = json.loads(text)
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}; {expected}") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{file}: not a plan; {expected}") from error
    if isinstance(value, dict):
        if "agreement" in value and "plan" not in value:  # a report of format 1 has counts of tokens, but no ratios
            if not (config := path.with_name(CONFIG_FILE)).is_file():
                raise InputError(f"{file}: a report without its plan; expected the {CONFIG_FILE} next to it")
            return read_plan(config)
        if "architecture" in value and value.get("pruning") is None:
            raise InputError(f"{file}: the model prunes nothing; {expected}")
        value = value.get("plan") or value.get("pruning") or value
    try:
        return Plan.from_dict(value)
    except InputError as error:
        raise InputError(f"{file}: {error}; {expected}") from error


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
        "preprocessing": model.preprocessing.to_dict(),
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
    state |= model.learnt.to_tensors() if model.learnt is not None else {}
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
    check_model(model)
    folder = Path(folder)
    with new_folder(folder, force) as temporary:
        (temporary / WEIGHTS_FILE).write_bytes(serialise(model))
        config = json.dumps(describe(model), indent=2)
        (temporary / CONFIG_FILE).write_text(config + "\n", encoding="utf-8")
        for name, content in (extra or {}).items():
            (temporary / name).write_bytes(content)
    return folder
