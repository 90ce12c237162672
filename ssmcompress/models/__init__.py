"""The architectures that can be compressed, and the registry that tells them apart by their weights."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import InputError
from .base import Block, StateDict, TokenModel
from .plain_mamba import PlainMamba
from .vim import VisionMamba

MODELS: tuple[type[TokenModel], ...] = (VisionMamba, PlainMamba)

__all__ = ["MODELS", "Block", "StateDict", "TokenModel", "build", "recognise"]


def recognise(state: StateDict) -> type[TokenModel]:
    """The architecture that these parameter names belong to; InputError for none that is known."""
    for model_class in MODELS:
        if model_class.recognises(state):
            return model_class
    found = ", ".join(sorted(state)[:4]) or "none"
    known = "; ".join(f"{m.architecture} has {', '.join(m.telling_keys)}" for m in MODELS)
    raise InputError(f"no known vision state-space model: found {len(state)} tensors ({found}, ...); {known}")


def build(
    state: StateDict,
    image_size: tuple[int, int] | None = None,
    stride: int | None = None,
    trained_size: tuple[int, int] | None = None,
) -> TokenModel:
    """The dense model, in float32, that a state dict belongs to.

    Args:
        state: published parameter names -> tensors.
        image_size: (height, width) it will be run at; None: what it was trained at.
        stride: step between patches in pixels; None: the patch size.
        trained_size: (height, width) that its position embedding is for, where that is known.

    Raises:
        InputError: an unknown architecture, parameters missing, left over, contradicting each other or not
            finite.
    """
    model_class = recognise(state)
    config, fitted = model_class.infer_config(state, image_size, stride, trained_size)
    with torch.device("meta"):
        model = model_class(config)
    _check(model, fitted)
    # Cloned: the caller's own tensors, of a live module, must not change with the model.
    dtypes = {k: v.dtype for k, v in model.state_dict().items()}
    model.load_state_dict({k: v.to(dtypes[k], copy=True) for k, v in fitted.items()}, assign=True)
    return model.requires_grad_(True).eval()


def _check(model: TokenModel, state: dict[str, Tensor]) -> None:
    expected = model.state_dict()
    missing = [k for k in expected if k not in state]
    extra = [k for k in state if k not in expected]
    if missing or extra:
        faults = [f"{len(keys)} {what} ({', '.join(keys[:3])})" for what, keys in
                  (("missing", missing), ("unknown", extra)) if keys]  # fmt: skip
        raise InputError(f"the parameters are not those of a {model.architecture}: {'; '.join(faults)}")
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
