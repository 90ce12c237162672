"""Loading of the corrections in saved models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from ..errors import InputError
from .base import TokenModel
from .blocks import low_rank
from .class_corrections import MAX_SEGMENTS, ClassCorrection, count_inputs

# Prefixes of their parameter names.
CORRECTIONS = ("corrections.", "class_corrections.", "readout_correction.")


def fill_corrections(model: TokenModel, corrections: Mapping[str, Tensor]) -> None:
    """Create the corrections from a file in the model; InputError if names, shapes or values are invalid."""
    remaining = dict(corrections)
    model.fitted_segments = _find_segments(model, corrections)
    segments = model.segments
    first, depth = min((int(layer) for layer in model.pruners), default=len(model.blocks)), len(model.blocks)
    for layer in map(str, range(first + 1, depth + 1)):
        width = model.section_of(int(layer)).width
        if (pair := _take_factors(remaining, f"corrections.{layer}.", width, width)) is not None:
            model.corrections[layer] = _with_weights(low_rank(width, len(pair[0])), pair)
        if model.protected is None:
            continue
        prefix, inputs = f"class_corrections.{layer}.", count_inputs(width, segments)
        if (pair := _take_factors(remaining, prefix, inputs, width)) is not None:
            model.class_corrections[layer] = _with_weights(ClassCorrection(width, segments, len(pair[0])), pair)
    if model.pools and first < depth:
        inputs, classes = segments * (model.d_model + 1), model.config.num_classes
        if (pair := _take_factors(remaining, "readout_correction.", inputs, classes)) is not None:
            model.readout_correction = _with_weights(low_rank(inputs, len(pair[0]), classes), pair)
    if remaining:
        raise InputError(f"corrections do not fit the stages in config.json: {', '.join(sorted(remaining)[:3])}")


def build_correction(model: TokenModel, kind: str, values: Mapping[str, Tensor]) -> nn.Sequential:
    """Return a correction of a layer with the weights of this state dict.

    Args:
        kind: "corrections" or "class_corrections".
    """
    inwards, outwards = values["0.weight"], values["1.weight"]
    rank, width = inwards.shape[0], outwards.shape[0]
    empty = low_rank(width, rank) if kind == "corrections" else ClassCorrection(width, model.segments, rank)
    return _with_weights(empty, (inwards, outwards))


def _find_segments(model: TokenModel, corrections: Mapping[str, Tensor]) -> int | None:
    """Infer the number of segments from the shapes of corrections; None if no number fits."""
    width = model.d_model
    for name, value in corrections.items():
        others = {"class_corrections": width, "readout_correction": 0}.get(name.partition(".")[0])
        if others is not None and name.endswith(".0.weight") and value.ndim == 2:
            count, rest = divmod(value.shape[1] - others, width + 1)
            return count if not rest and 1 <= count <= MAX_SEGMENTS else None
    return None


def _take_factors(values: dict[str, Tensor], prefix: str, inputs: int, outputs: int) -> list[Tensor] | None:
    """Pop the factors (rank, inputs) and (outputs, rank) of a correction from `values`; None if it is missing."""
    pair = [values.pop(f"{prefix}{side}.weight", None) for side in (0, 1)]
    if pair == [None, None]:
        return None
    rank = None if pair[0] is None or pair[0].ndim != 2 else len(pair[0])
    shapes = [None if value is None else tuple(value.shape) for value in pair]
    if not rank or shapes != [(rank, inputs), (outputs, rank)]:
        raise InputError(f"{prefix}*: expected matrices (rank, {inputs}) and ({outputs}, rank), found {shapes}")
    if not all(value.is_floating_point() and value.float().isfinite().all() for value in pair):
        raise InputError(f"{prefix}* holds values that are not finite numbers; the file is damaged")
    return pair


def _with_weights(correction: nn.Sequential, pair: Sequence[Tensor]) -> nn.Sequential:
    """Set the weights of the linear layers of a correction, and return it."""
    for linear, value in zip(correction, pair, strict=True):
        linear.weight.data.copy_(value)
    return correction
