"""The variants that a compressed model is compared with: the dense one, and pruned ones without and with alignment."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ..errors import InputError
from ..models.base import TokenModel
from ..models.rewrite import prune_like
from ..pruning.alignment import UNALIGNED
from .pipeline import Context
from .steps import Align, Prune

DENSE = "dense"
# Names of models by the last step that changed their weights.
LAST_STEPS = {"finetuning": "finetuned", "reconstruction": "reconstructed", "level_maps": "mapped"}


def list_variants(model: TokenModel, dense: TokenModel | None) -> dict[str, TokenModel]:
    """Return the models to show, by name, in the order of the steps: dense, naive, aligned, reconstructed or finetuned.

    The naive and the aligned model have the weights of the dense one and the plan of `model`, so that they differ only
    in the alignment. They are left out if weights were also trimmed, since the file does not record which ones.

    Args:
        model: dense or compressed. dense: the model that it was made from; None: unavailable, or `model` is dense.
    """
    if model.plan is None:
        return {DENSE: model}
    variants = {} if dense is None else {DENSE: dense}
    if dense is not None and model.plan.stages and not is_trimmed(model):
        naive = prune_like(dense, model, UNALIGNED)
        variants[Prune.name] = naive
        aligned = naive
        if model.plan.alignment != UNALIGNED:
            aligned = Align(model.plan.alignment)(naive, Context(dense))
        if aligned is not naive:
            variants[Align.name] = aligned
    if (last := name_last_step(model)) is not None or len(variants) <= 1:
        variants[last or "pruned"] = model
    return variants


def name_last_step(model: TokenModel) -> str | None:
    """Return the name of a model after the last step that changed its weights; None if they are the dense ones."""
    return next((LAST_STEPS[step.kind] for step in reversed(model.steps) if step.kind in LAST_STEPS), None)


def is_trimmed(model: TokenModel) -> bool:
    """Return whether a model has lost states, channels, layers or directions."""
    return model.dense_config != model.config


def number_layers(model: TokenModel) -> tuple[int, ...]:
    """Return the number, from 1, of each of a model's layers in its dense model."""
    return model.origin.layers if model.origin is not None else tuple(range(1, len(model.blocks) + 1))


def match_layers(model: TokenModel, layers: Sequence[int]) -> tuple[int, ...]:
    """Return the layers of a model, from 1, that correspond to these layers of its dense model.

    Raises:
        InputError: all of them were dropped.
    """
    numbers = number_layers(model)
    if found := tuple(layer for layer, number in enumerate(numbers, 1) if number in layers):
        return found
    raise InputError(
        f"the model no longer has layers {', '.join(map(str, layers))}: expected some of {', '.join(map(str, numbers))}"
    )


def check_alike(variants: Mapping[str, TokenModel]) -> None:
    """Raise an InputError if the grid of patches of a model differs from that of the first one."""
    first, *others = variants.values()
    for model in others:
        if model.config.grid != first.config.grid:
            raise InputError(f"models with {first.config.grid} and {model.config.grid} patches: expected the same")
