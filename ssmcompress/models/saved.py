"""The format of saved models: a .safetensors file with weights and gap deltas, and a configuration as JSON.

The configuration is a file next to the weights, in a folder, or in the header of the .safetensors file.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .._version import __version__
from ..errors import InputError
from ..files import new_folder, read_text
from ..pruning.plan import Plan
from .base import TokenModel
from .inputs import check_model
from .learnt import ALL, SOME, LearntFrom
from .level_maps import fill_level_maps
from .records import TRIMMING, MadeBy, Source, steps_from_dict, steps_to_dict
from .registry import MODELS, build
from .rewrite import install
from .saved_corrections import CORRECTIONS, fill_corrections
from .sizes import LayeredConfig, Origin
from .state_dict import read_metadata
from .statements import Statement, Statements, read_classes

FORMAT_VERSION = 1
WEIGHTS_FILE = "model.safetensors"
CONFIG_FILE = "config.json"
MOST_LAYERS = 4096  # limit for the dense model in a configuration that may be damaged
# The sizes of the dense model that each kind of trimming record requires: those that it changes.
SIZES_OF = {"states": ("d_state",), "channels": ("d_inner",), "layers": ("depth",), "directions": ("directions",)}
PLAN_EXPECTED = "expected a pruned model's folder or report, or the JSON of a dry run"


def parse_config(text: str) -> dict[str, Any]:
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


def read_config_file(file: Path) -> dict[str, Any]:
    """Read the configuration in a folder: one of this package, or of another tool, which has no `format_version`."""
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
        and config
        and not {"format_version", "pruning"} & config.keys()
        and not isinstance(config.get("architecture"), dict)
    )
    return config if is_foreign else parse_config(text)


def restore(
    config: Mapping[str, Any],
    state: Mapping[str, Tensor],
    size: tuple[int, int] | None,
    stride: int | None,
    frames: int | None = None,
) -> TokenModel:
    """Build the model, pruned or dense, described by a configuration and its tensors.

    Args:
        config: from `parse_config`. state: cleaned tensors.
        size: (height, width) of the images. stride: step between patches. Both in pixels; None: as saved.
        frames: the number of frames of the videos; None: as saved.

    Returns:
        The model, without its source set.

    Raises:
        InputError: configuration and tensors do not match.
    """
    architecture = config["architecture"]
    supported = {model_class.architecture: model_class for model_class in MODELS}
    if not isinstance(architecture.get("type"), str) or architecture["type"] not in supported:
        raise InputError(f"architecture {architecture.get('type')!r}: this version knows {', '.join(supported)}")
    gaps = {k: v for k, v in state.items() if k.rpartition(".")[2] == "gap_delta"}
    corrections = {k: v for k, v in state.items() if k.startswith(CORRECTIONS)}
    probes = {k: v for k, v in state.items() if k.startswith("pruners.")}
    levels = {k: v for k, v in state.items() if k.startswith("level_maps.")}
    learnt = {k: v for k, v in state.items() if k in (ALL, SOME)}
    weights = {k: v for k, v in state.items() if k not in {**gaps, **corrections, **probes, **levels, **learnt}}
    try:
        trained = tuple(int(side) for side in architecture["image_size"])
        stride = stride or int(architecture["stride"])
        if len(trained) != 2 or min(*trained, stride) < 1:
            raise ValueError(f"image_size {trained}, stride {stride}")
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise InputError(f"{CONFIG_FILE}: bad architecture block ({error})") from error
    said = Statements(family=Statement(architecture["type"], CONFIG_FILE))
    said.add_config(architecture, supported[architecture["type"]].hidden_options, CONFIG_FILE)
    said.classes, said.palette = read_classes(config)
    directions = _parse_directions(architecture)
    model = build(weights, size or trained, stride, trained, said, directions)
    if model.architecture != architecture["type"]:
        raise InputError(f"{CONFIG_FILE} says {architecture['type']}, but the weights are a {model.architecture}'s")
    saved_length = None if size not in (None, trained) or stride != architecture["stride"] else model.length
    if frames is not None:
        model.resize_frames(frames)
    model.preprocessing = model.read_preprocessing(config.get("preprocessing") or {})
    model.reduce_zero_label = _parse_flag(config, "reduce_zero_label")
    pruning = config.get("pruning")
    if pruning is None and (extra := {**corrections, **levels}):
        raise InputError(f"corrections ({next(iter(extra))}, ...) in a model that prunes nothing")
    if pruning is not None:
        plan = Plan.from_dict(pruning)
        plan = replace(plan, gap=plan.gap or "bias", calibration=None)
        model.made_by = MadeBy(pruning.get("command"), pruning.get("versions"))
        install(model, replace(plan, gap="bias"))  # create the buffers for the deltas in the file
        _fill_buffers(model, "gap_delta", gaps, "gap deltas")
        _fill_buffers(model, "probe", probes, "saliency probes")
        fill_corrections(model, corrections)
        fill_level_maps(model, levels)
        model.plan = plan
        try:
            model.steps = steps_from_dict(pruning)
        except InputError as error:
            raise InputError(f"{CONFIG_FILE}: {error}") from error
        model.origin = _parse_origin(model, pruning)
        _check_trimming(model)
        counts = model.kept_counts()
        if model.length == saved_length and pruning.get("kept", counts) != counts:
            raise InputError(f"{CONFIG_FILE}: its stages keep {counts} tokens, but it says {str(pruning['kept'])[:80]}")
        model.learnt = LearntFrom.from_tensors(learnt)
    return model


def _parse_directions(architecture: Mapping[str, Any]) -> tuple[tuple[int, ...], ...] | None:
    """Return the scan paths of each layer in a configuration; InputError if they are invalid."""
    value = architecture.get("directions")
    if value is None:
        return None
    complete = next(m for m in MODELS if m.architecture == architecture["type"]).config_class.PATHS
    valid = isinstance(value, list) and all(
        isinstance(layer, list) and layer and all(type(path) is int and path in complete for path in layer)
        and layer == sorted(set(layer))
        for layer in value
    )  # fmt: skip
    if not valid or ("depth" in architecture and len(value) != architecture["depth"]):
        raise InputError(f"{CONFIG_FILE}: bad directions {str(value)[:80]}: expected lists of scan paths {complete}")
    return tuple(tuple(layer) for layer in value)


def _parse_origin(model: TokenModel, pruning: Mapping[str, Any]) -> Origin | None:
    """Return the sizes of the dense model in a configuration; None if the model was not trimmed.

    Raises:
        InputError: there are none although records state that the model was trimmed; or the model cannot have been
            trimmed from a model of these sizes.
    """
    value = pruning.get("trimmed_from")
    kinds = [step.kind for step in model.steps if step.kind in TRIMMING]
    if value is None:
        if kinds:
            raise InputError(f"{CONFIG_FILE}: `trimmed_from` is missing, although {', '.join(kinds)} were trimmed")
        return None
    try:
        layers = tuple(value["layers"])
        sizes = {k: _parse_size(k, v) for k, v in value["sizes"].items()}
        if missing := [key for kind in kinds for key in SIZES_OF[kind] if key not in sizes]:
            raise ValueError(f"sizes.{missing[0]} is missing, although a record says that it was trimmed")
        origin = Origin(replace(model.config, **sizes), layers)
        depth, numbers = origin.config.depth, [depth for depth in layers if type(depth) is int]
        ascending = list(layers) == sorted({*numbers}) and 1 <= layers[0] <= layers[-1] <= depth
        if len(layers) != len(model.blocks) or not ascending:
            raise ValueError(f"layers {layers}")
        if not depth <= MOST_LAYERS or min(min(size[:2]) for size in origin.config.layers) < 1:
            raise ValueError(f"{depth} layers, or sizes below 1")
        _check_origin(model.config, origin)
        model.count_flops(origin.config, [1] * len(model.counts_for((), config=origin.config)), "full")
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError, IndexError, RecursionError) as error:
        raise InputError(f"{CONFIG_FILE}: bad sizes of the dense model ({type(error).__name__} {error})") from error
    return origin


def _parse_size(name: str, value: Any) -> Any:
    """Return a size with lists converted to tuples; ValueError for anything but integers, lists of them, and None."""
    if isinstance(value, list):
        return tuple(_parse_size(name, part) for part in value)
    if value is not None and type(value) is not int:
        raise ValueError(f"sizes.{name} has {str(value)[:40]!r}, expected whole numbers")
    return value


def _check_origin(config: LayeredConfig, origin: Origin) -> None:
    """Raise a ValueError if a model of the sizes `config` cannot have been trimmed from `origin`."""
    ours, dense = config.layers, origin.config.layers
    for number, size in enumerate(dense, 1):
        if not size.directions or [p for p in origin.config.PATHS if p in size.directions] != list(size.directions):
            raise ValueError(f"layer {number} had scan paths {size.directions}, expected some of {origin.config.PATHS}")
    for number, size in zip(origin.layers, ours, strict=True):
        whole = dense[number - 1]
        if size.d_inner > whole.d_inner or size.d_state > whole.d_state:
            raise ValueError(
                f"layer {number} had {whole.d_inner} channels and {whole.d_state} states, fewer than the "
                f"{size.d_inner} and {size.d_state} that are left"
            )
        if not set(size.directions) <= set(whole.directions):
            raise ValueError(f"layer {number} had scan paths {whole.directions}, {size.directions} are left")
    # Everything else, such as the width or the number of classes, must equal that of the model itself.
    trimmed = origin.config.with_layers(dict(zip(origin.layers, ours, strict=True))).to_dict()
    expected = config.with_layers(dict(enumerate(ours, 1))).to_dict()
    if wrong := [key for key in {**expected, **trimmed} if expected.get(key) != trimmed.get(key)]:
        raise ValueError(f"{wrong[0]} {trimmed.get(wrong[0])}, the model has {expected.get(wrong[0])}")


def _check_trimming(model: TokenModel) -> None:
    """Raise an InputError if the trimming records contradict the sizes that the model has and has lost."""
    values = {step.kind: step.values for step in model.steps if step.kind in TRIMMING}
    if not values:
        return
    config, (dense, layers) = model.config, model.origin
    gone = [number for number in range(1, dense.depth + 1) if number not in layers]
    paths = values.get("directions", {}).get("directions", {})
    left = [[p for p in dense.layers[n - 1].directions if p not in paths.get(str(n), ())] for n in layers]
    known = all(0 < int(n) <= dense.depth and {*p} < {*dense.layers[int(n) - 1].directions} for n, p in paths.items())
    for kind, key, expected, found in (
        ("states", "n", [size.d_state for size in config.layers], None),
        ("channels", "e", [size.d_inner for size in config.layers], None),
        ("layers", "layers", gone, None),
        ("directions", "directions", [list(size.directions) for size in config.layers], left if known else None),
    ):
        if kind in values and (values[kind][key] if kind != "directions" else found) != expected:
            raise InputError(
                f"{CONFIG_FILE}: bad record of trimmed {kind}: `{key}` is {str(values[kind][key])[:60]}, but the model "
                + (f"lacks layers {expected}" if kind == "layers" else f"has {str(expected)[:60]}")
            )


def _describe_origin(model: TokenModel) -> dict[str, Any]:
    """Return the entries that `_parse_origin` reads; empty for a model that was not trimmed."""
    if model.origin is None:
        return {}
    dense, ours = model.origin.config.to_dict(), model.config.to_dict()
    recorded = {key: None for step in model.steps for key in SIZES_OF.get(step.kind, ())}
    keys = {**ours, **dense, **recorded}
    sizes = {k: dense.get(k) for k in keys if dense.get(k) != ours.get(k) or k in recorded}
    return {"trimmed_from": {"layers": list(model.origin.layers), "sizes": sizes}}


def find_writer(config: Mapping[str, Any]) -> str:
    """Return the tool that wrote a configuration in this package's format, with its version if recorded."""
    pruning = config.get("pruning")
    made = pruning.get("versions") if isinstance(pruning, Mapping) else None
    version = made.get("ssmcompress") if isinstance(made, Mapping) else None
    return f"ssmcompress {version}" if isinstance(version, str) else "ssmcompress"


def _fill_buffers(model: TokenModel, name: str, tensors: Mapping[str, Tensor], what: str) -> None:
    """Copy tensors from a file into the buffers called `name`; InputError unless names and shapes match."""
    buffers = {k: v for k, v in model.named_buffers() if k.rpartition(".")[2] == name}
    wrong = sorted(set(buffers) ^ set(tensors)) or [k for k in tensors if tensors[k].shape != buffers[k].shape]
    if wrong:
        raise InputError(f"{what} do not fit the stages in {CONFIG_FILE}: {', '.join(wrong[:3])}")
    for key, buffer in buffers.items():
        if not tensors[key].to(buffer.dtype).isfinite().all():
            raise InputError(f"{key} holds values that are not finite; the file is damaged")
        buffer.copy_(tensors[key])


def _parse_flag(config: Mapping[str, Any], name: str) -> bool | None:
    value = config.get(name)
    if value is not None and not isinstance(value, bool):
        raise InputError(f"{CONFIG_FILE}: {name} {str(value)[:80]!r}: expected true or false")
    return value


def read_plan(file: str | Path) -> Plan:
    """Read a plan from its own JSON file, from the output of a dry run, or from a saved pruned model.

    Args:
        file: a JSON file, including a model's config.json or report.json; a model folder; or a .safetensors file that
            contains its configuration.

    Raises:
        InputError: the file cannot be read, or contains no plan.
    """
    value = read_plan_file(file)
    if isinstance(value, dict):
        if "architecture" in value and value.get("pruning") is None:
            raise InputError(f"{file}: the model prunes nothing; {PLAN_EXPECTED}")
        value = value.get("plan") or value.get("pruning") or value
    try:
        return Plan.from_dict(value)
    except InputError as error:
        raise InputError(f"{file}: {error}; {PLAN_EXPECTED}") from error


def read_plan_file(file: str | Path) -> Any:
    """Return the JSON value in a file that `read_plan` reads.

    Raises:
        InputError: the file cannot be read.
    """
    path = Path(file)
    path = path / CONFIG_FILE if path.is_dir() else path
    try:
        embedded = path.suffix == ".safetensors"
        text = read_metadata(path).get("ssmcompress", "") if embedded else read_text(path)
        value = json.loads(text)
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}; {PLAN_EXPECTED}") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{file}: not a plan; {PLAN_EXPECTED}") from error
    if isinstance(value, dict) and "agreement" in value and "plan" not in value:
        # A report of format 1 has token counts, but no ratios.
        if not (config := path.with_name(CONFIG_FILE)).is_file():
            raise InputError(f"{file}: a report without its plan; expected the {CONFIG_FILE} next to it")
        return read_plan_file(config)
    return value


def describe(model: TokenModel) -> dict[str, Any]:
    """Return the configuration that `load` needs as a JSON value: the content of config.json."""
    pruning = None
    if model.plan is not None:
        source = model.source or Source("", "")
        pruning = {
            **model.plan.to_dict(tensors=False),
            "kept": model.kept_counts(),
            **_describe_origin(model),
            **steps_to_dict(model.steps),
            "source": {"path": source.path, "sha256": source.sha256, "weights": source.weights},
            "command": model.made_by.command,
            "versions": model.made_by.versions or versions(),
        }
    return {
        "format_version": FORMAT_VERSION,
        "architecture": {"type": model.architecture, **model.config.to_dict()},
        **({"classes": model.classes, "palette": model.palette} if model.classes is not None else {}),
        "preprocessing": model.preprocessing.to_dict(),
        **({} if model.reduce_zero_label is None else {"reduce_zero_label": model.reduce_zero_label}),
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

    # Not save_file: its error on a full disk is not an OSError.
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
    """Write a folder that `load` can read, with model.safetensors and config.json, atomically.

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
