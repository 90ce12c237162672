"""The registry of architectures that can be compressed: it recognises one by its weights and builds its model."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ..errors import InputError
from ..progress import note
from ..tasks import SEGMENTATION, TASKS
from .base import TokenModel
from .families import FAMILY_NAMES, HEAD_OF_SEGMENTATION, StateDict, find_family
from .plain_mamba import PlainMamba
from .plain_mamba_upernet import PlainMambaUperNet
from .statements import FILE_NAME, GIVEN_NAME, Statement, Statements, family_of_name
from .video_mamba import VideoMamba
from .vim import VisionMamba
from .vim_upernet import VimUperNet
from .vit import VisionTransformer
from .vmamba import VMamba

# In the order in which `recognises` is tried on a state dict. It is modified in place because other modules import the
# list object: they also see the additions of `register_architecture`.
MODELS: list[type[TokenModel]] = [
    VisionMamba,
    PlainMamba,
    VideoMamba,
    VimUperNet,
    PlainMambaUperNet,
    VisionTransformer,
    VMamba,
]
_registered: list[type[TokenModel]] = []  # those of `MODELS` that the package does not have itself


def register_architecture(model_class: type[TokenModel]) -> type[TokenModel]:
    """Add an architecture, which `load` and all commands then recognise; usable as a class decorator.

    It is tried before the built-in architectures and unsupported families, so its `recognises` must be true only for
    its own parameter names. A saved model can be loaded again only while its architecture is registered.

    Returns:
        The class.

    Raises:
        ValueError: the name is taken, or the class lacks a required attribute or method.
    """
    missing = [name for name in ("architecture", "config_class", "telling_keys") if not hasattr(model_class, name)]
    if missing := [*missing, *sorted(model_class.__abstractmethods__)]:
        raise ValueError(f"{model_class.__name__} lacks {', '.join(missing)}: define them, see `TokenModel`")
    if _key(model_class.architecture) in {_key(name) for m in MODELS for name in (*m.families, m.architecture)}:
        raise ValueError(f"architecture {model_class.architecture!r} is already registered")
    MODELS.insert(0, model_class)
    _registered.append(model_class)
    return model_class


def _key(name: str) -> str:
    """Return the name of an architecture in a spelling-independent form."""
    return name.strip().lower().replace("-", "").replace("_", "")


def is_known(state: StateDict) -> bool:
    """Return whether parameter names belong to a supported architecture or to a known unsupported family."""
    return find_family(state) is not None or any(model_class.recognises(state) for model_class in MODELS)


def is_named(model_class: type[TokenModel], family: str) -> bool:
    """Return whether this entry of `FAMILY_NAMES` denotes the architecture."""
    return family in (model_class.architecture, *model_class.families)


def recognise(state: StateDict, writer: str | None = None, family: str | None = None) -> type[TokenModel]:
    """Return the architecture that these parameter names belong to.

    Args:
        writer: the tool that wrote the file, for messages.
        family: the stated architecture. It decides between architectures with the same parameter names; otherwise, a
            size that is published for only one of them decides, and then their order in `MODELS`.

    Raises:
        InputError: it is not in `MODELS`; the message names it and its writer, if known.
    """
    fitting = [model_class for model_class in MODELS if model_class.recognises(state)]
    named = [model_class for model_class in fitting if family is not None and is_named(model_class, family)]
    typical = [model_class for model_class in fitting if model_class.has_own_size(state)]
    found = next(iter([*named, *typical, *fitting]), None)
    if found not in _registered and (family := find_family(state)) is not None:
        origin = f"written by {writer}" if writer else "the file does not say what wrote it"
        supported = ", ".join(m.architecture for m in MODELS)
        raise InputError(
            f"{family.name}, {family.task}, {origin}: not supported; this version compresses models of type {supported}"
        )
    if found is not None:
        return found
    names = ", ".join(sorted(state)[:4]) or "none"
    expected = "; ".join(f"{m.architecture} has {', '.join(m.telling_keys)}" for m in MODELS)
    raise InputError(f"no known vision state-space model: found {len(state)} tensors ({names}, ...); {expected}")


def normalise_architecture(name: str) -> str:
    """Return the name of an architecture as spelled in `MODELS`; InputError if it is not supported."""
    if not isinstance(name, str):
        raise InputError(f"`architecture` {name!r}: expected one of {', '.join(repr(m.architecture) for m in MODELS)}")
    supported = {_key(known): m.architecture for m in reversed(MODELS) for known in (*m.families, m.architecture)}
    if found := supported.get(_key(name)):
        return found
    title = {_key(known): title for known, title, _ in FAMILY_NAMES}.get(_key(name))
    reason = f"{title} is not supported" if title else f"unknown architecture {name!r}"
    raise InputError(f"`architecture`: {reason}; expected one of {', '.join(m.architecture for m in MODELS)}")


def give_architecture(said: Statements, name: str) -> None:
    """Set the architecture given by the caller, which overrides the name of a file.

    Raises:
        InputError: it is not supported, or contradicts another statement.
    """
    architecture = normalise_architecture(name)
    said.set_family(architecture, GIVEN_NAME)
    if not any(is_named(m, said.family.value) and is_named(m, architecture) for m in MODELS):
        raise InputError(f"{said.family.where} says {said.family.value}, but {GIVEN_NAME} says {architecture}")


def build(
    state: StateDict,
    image_size: tuple[int, int] | None = None,
    stride: int | None = None,
    trained_size: tuple[int, int] | None = None,
    said: Statements | None = None,
    directions: tuple[tuple[int, ...], ...] | None = None,
) -> TokenModel:
    """Build the dense float32 model that a state dict belongs to.

    Args:
        state: published parameter names -> tensors.
        image_size: (height, width) of the input images; None: the training size.
        stride: step between patches in pixels; None: the stride stated in `said`, else the patch size.
        trained_size: (height, width) for which the position embedding was trained, if known.
        said: the statements of the file or module about the model.
        directions: the scan paths of each layer, which cannot always be inferred from the weights; None: all.

    Raises:
        InputError: the architecture is unknown, ambiguous or not the one named in `said`, an option has an unsupported
            value, or parameters are missing, unexpected, inconsistent or not finite.
    """
    said = said or Statements()
    model_class = recognise(state, said.writer, said.family.value if said.family is not None else None)
    _check_statements(model_class, said)
    stride = stride or _find_stride(model_class, state, said)
    config, fitted = model_class.infer_config(state, image_size, stride, trained_size)
    config = model_class.complete_config(config, said, image_size)
    if directions is not None:
        config = replace(config, directions=directions)
    with torch.device("meta"):
        model = model_class(config).float()  # whatever torch's default dtype is
    _check(model, fitted)
    model_class.check_identity(config, said)
    # Cloned because the tensors may belong to the caller's live module and must not change with the model.
    dtypes = {k: v.dtype for k, v in model.state_dict().items()}
    model.load_state_dict({k: v.to(dtypes[k], copy=True) for k, v in fitted.items()}, assign=True)
    if model.task is SEGMENTATION:
        _add_classes(model, said)
    return model.requires_grad_(True).eval()


def check_task(state: StateDict, task: str | None) -> None:
    """Raise an InputError unless parameter names belong to a model for the task with this name; None: any task."""
    if task is None:
        return
    if task not in TASKS:
        raise InputError(f"`task` {task!r}: expected one of {', '.join(map(repr, TASKS))}")
    is_segmentation = HEAD_OF_SEGMENTATION in state
    if is_segmentation == (task == SEGMENTATION.name):
        return
    if is_segmentation:
        missing = "head.weight or head.fc.weight, its classifier, is missing, and decode_head.* is there"
    else:
        missing = "decode_head.*, the head that segments, is missing"
    raise InputError(f"`task` {task!r}: this is not a model for {TASKS[task].title}; {missing}")


def _add_classes(model: TokenModel, said: Statements) -> None:
    """Set the names and colours of the model's classes if their number in the file matches."""
    if said.classes is None:
        return
    if len(said.classes) != model.config.num_classes:
        note(f"names of {len(said.classes)} classes are left out: the model has {model.config.num_classes}")
        return
    model.classes, model.palette = said.classes, said.palette


def _find_stride(model_class: type[TokenModel], state: StateDict, said: Statements) -> int | None:
    """Return the patch stride that follows from the statements, with a note if patches overlap; None without any."""
    if any(key not in state or state[key].ndim < 3 for key in ("pos_embed", "patch_embed.proj.weight")):
        return None  # not a Vim, or a damaged one
    found, size = said.number("stride", "patch_stride"), said.number("input_size", "img_size", "image_size")
    if found is None and size is not None and (stride := model_class.infer_stride(state, size.value)):
        found = Statement(stride, size.where)
    if found is not None and found.value != state["patch_embed.proj.weight"].shape[-1]:
        note(f"patches overlap, with a stride of {found.value} pixels by {found.where}")
    return found.value if found is not None else None


def _check_statements(model_class: type[TokenModel], said: Statements) -> None:
    """Raise an InputError if a statement about a model contradicts this architecture."""
    if said.family is not None and not is_named(model_class, said.family.value):
        if said.family.value in [m.architecture for m in MODELS]:
            way_out = ": rename it, or give `architecture`" if said.family.where == FILE_NAME else ""
            raise InputError(
                f"{said.family.where} says {said.family.value}, but the weights are a {model_class.architecture}'s"
                f"{way_out}"
            )
        title = next(title for key, title, _ in FAMILY_NAMES if key == said.family.value)
        raise InputError(
            f"{said.family.where} says that the model is {title}, which is not supported, although its weights fit "
            f"into a {model_class.architecture}"
        )
    _note_another_name(said)
    for name, expected in model_class.expected_options.items():
        statement = said.options.get(name)
        if statement is not None and statement.value not in expected.values:
            raise InputError(
                f"{statement.where} says {name}={statement.value!r}: this version supports only a "
                f"{model_class.architecture} with {expected.meaning}"
            )


def _note_another_name(said: Statements) -> None:
    """Show a note if the file name contradicts a stronger statement of the architecture and the caller gave none."""
    if said.family is None or said.family.where == GIVEN_NAME:
        return
    others = {family_of_name(s.value) for s in said.names if s.where == FILE_NAME} - {None, said.family.value}
    for other in sorted(others):
        if not any(is_named(m, other) and is_named(m, said.family.value) for m in MODELS):
            note(f"{FILE_NAME} says {other}, but {said.family.where} says {said.family.value}, which takes precedence")


def _check(model: TokenModel, state: dict[str, Tensor]) -> None:
    """Raise an InputError unless `state` matches the model's names, shapes and kinds of dtype and has finite values."""
    expected = model.state_dict()
    missing = [k for k in expected if k not in state]
    extra = [k for k in state if k not in expected]
    if missing or extra:
        faults = [f"{len(keys)} {what} ({', '.join(keys[:3])})" for what, keys in
                  (("missing", missing), ("unknown", extra)) if keys]  # fmt: skip
        meaning = next((text for key, text in model.foreign_keys.items() if any(key in k for k in extra)), "")
        meaning = f", which means {meaning}: not supported" if meaning else ""
        raise InputError(f"the parameters are not those of a {model.architecture}: {'; '.join(faults)}{meaning}")
    for key, value in state.items():
        if value.shape != expected[key].shape:
            raise InputError(
                f"contradicting shapes: {key} is {tuple(value.shape)}, the other parameters "
                f"say {tuple(expected[key].shape)}"
            )
        if value.is_floating_point() != expected[key].is_floating_point():
            raise InputError(f"{key} holds {value.dtype}: expected {expected[key].dtype}")
        if not value.to(expected[key].dtype).isfinite().all():
            raise InputError(f"{key} holds values that are not finite; the checkpoint is damaged")
