"""The classifier of a model: replacing it for other classes, or removing it."""

from __future__ import annotations

from dataclasses import replace
from numbers import Integral
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import InputError
from .precision import check_not_quantised
from .records import StepRecord


class NoClassifier(nn.Identity):
    """The classifier of a model without classes, which returns its input features.

    Its empty weight (0, width) has the dtype and device of the model, and marks in a file that there are no classes.

    Args:
        width: number of input features.
    """

    def __init__(self, width: int, device: torch.device | None = None, dtype: torch.dtype | None = None):
        super().__init__()
        self.register_buffer("weight", torch.empty(0, width, device=device, dtype=dtype))
        self.register_buffer("bias", torch.empty(0, device=device, dtype=dtype))


def make_classifier(
    width: int, classes: int, device: torch.device | None = None, dtype: torch.dtype | None = None
) -> nn.Module:
    """Return a linear layer from features (..., width) to logits (..., classes), or for 0 classes a `NoClassifier`."""
    if classes == 0:
        return NoClassifier(width, device, dtype)
    return nn.Linear(width, classes, device=device, dtype=dtype)


def has_no_classes(weight: Tensor | None) -> bool:
    """Return whether the classifier weight in a file, if any, belongs to a `NoClassifier`."""
    return weight is not None and weight.ndim == 2 and weight.shape[0] == 0 < weight.shape[1]


def name_module(model: nn.Module, module: nn.Module) -> str:
    """Return the name of a module of a model."""
    return next(name for name, other in model.named_modules() if other is module)


def replace_classifier(model: Any, classes: int) -> None:
    """Replace the classifier of a `TokenModel` in place; see `TokenModel.reset_classifier`.

    Raises:
        InputError: the number of classes is invalid, or the model is quantised.
    """
    check_not_quantised(model)
    old = model.classifier
    least = int(isinstance(old, nn.Conv2d))
    if isinstance(classes, bool) or not isinstance(classes, Integral) or classes < least:
        raise InputError(f"`num_classes` {classes!r}: expected a number of classes, at least {least}")
    classes, options = int(classes), {"device": old.weight.device, "dtype": old.weight.dtype}
    if isinstance(old, nn.Conv2d):
        new = nn.Conv2d(old.in_channels, classes, old.kernel_size, **options)
    else:
        new = make_classifier(old.weight.shape[1], classes, **options)
    parent, _, name = name_module(model, old).rpartition(".")
    setattr(model.get_submodule(parent), name, new.train(model.training))
    before, model.config = model.config.num_classes, replace(model.config, num_classes=classes)
    if model.origin is not None:
        model.origin = model.origin._replace(config=replace(model.origin.config, num_classes=classes))
    # These belong to the old classes: the correction of their logits, their names, and the numbering in masks.
    model.readout_correction = None
    model.classes = model.palette = model.reduce_zero_label = None
    # The recorded dense model has the old classes, so agreement with it, and its images, are no longer meaningful.
    digest = model.source.sha256 if model.source is not None else None
    model.source = None
    model.add_record(StepRecord("classifier", {"classes": classes, "before": before, "source_sha256": digest}))
