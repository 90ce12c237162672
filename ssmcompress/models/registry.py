"""The registry of architectures that can be compressed: it recognises one by its weights and builds its model."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import InputError
from .base import StateDict, TokenModel
from .plain_mamba import PlainMamba
from .vim import VisionMamba

MODELS: tuple[type[TokenModel], ...] = (VisionMamba, PlainMamba)


def recognise(state: StateDict) -> type[TokenModel]:
    """Return the architecture that these parameter names belong to; InputError if it is none of `MODELS`."""
    for model_class in MODELS:
        if model_class.recognises(state):
            return model_class
    names = ", ".join(sorted(state)[:4]) or "none"
    expected = "; ".join(f"{m.architecture} has {', '.join(m.telling_keys)}" for m in MODELS)
    raise InputError(f"no known vision state-space model: found {len(state)} tensors ({names}, ...); {expected}")


def build(
    state: StateDict,
    image_size: tuple[int, int] | None = None,
    stride: int | None = None,
    trained_size: tuple[int, int] | None = None,
) -> TokenModel:
    """Build the dense float32 model that a state dict belongs to.

    Args:
        state: published parameter names -> tensors.
        image_size: (height, width) of the images it will run on; None: the size it was trained at.
        stride: step between patches in pixels; None: the patch size.
        trained_size: (height, width) that its position embedding was made for, if that is known.

    Raises:
        InputError: the architecture is unknown, or parameters are missing, left over, contradict each other or are
            not finite.
    """
    model_class = recognise(state)
    config, fitted = model_class.infer_config(state, image_size, stride, trained_size)
    with torch.device("meta"):
        model = model_class(config)
    _check(model, fitted)
    # Cloned, because the caller's own tensors, of a live module, must not change with the model.
    dtypes = {k: v.dtype for k, v in model.state_dict().items()}
    model.load_state_dict({k: v.to(dtypes[k], copy=True) for k, v in fitted.items()}, assign=True)
    return model.requires_grad_(True).eval()


def _check(model: TokenModel, state: dict[str, Tensor]) -> None:
    """Raise an InputError unless `state` has the names, shapes and kinds of dtype of the model, and finite values."""
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
