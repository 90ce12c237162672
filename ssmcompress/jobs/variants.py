"""The models that a compressed one is shown beside: the dense one, and pruned like it, without and with alignment."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ..errors import InputError
from ..models.base import TokenModel
from ..models.rewrite import prune_like
from ..pruning.alignment import UNALIGNED
from .pipeline import Context
from .steps import Align, Prune

DENSE = "dense"
# Names of a model by the last step that changed its weights.
LAST_STEPS = {"finetuning": "finetuned", "reconstruction": "reconstructed", "level_maps": "mapped"}


def list_variants(model: TokenModel, dense: TokenModel | None) -> dict[str, TokenModel]:
    """Return the models to show, by name, in the order of the steps: dense, naive, aligned, reconstructed or finetuned.

    The naive and the aligned model have the weights of the dense one and the plan of `model`, so that they differ from
    each other in the alignment alone. They are left out where weights were trimmed, too: which ones is not in the file.

    Args:
        model: dense or compressed. dense: the model that it was made from; None: gone, or `model` is dense itself.
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
    """Return what a model is called after the last step that changed its weights; None if they are the dense ones."""
    return next((LAST_STEPS[step.kind] for step in reversed(model.steps) if step.kind in LAST_STEPS), None)


def is_trimmed(model: TokenModel) -> bool:
    """Return whether a model has lost states, channels, layers or directions."""
    return model.dense_config != model.config


def number_layers(model: TokenModel) -> tuple[int, ...]:
    """Return the number that each layer of a model has in its dense model, from 1."""
    return model.origin.layers if model.origin is not None else tuple(range(1, len(model.blocks) + 1))


def match_layers(model: TokenModel, layers: Sequence[int]) -> tuple[int, ...]:
    """Return the layers of a model, from 1, that are these layers of its dense model.

    Raises:
        InputError: it has lost all of them.
    """
    numbers = number_layers(model)
    if found := tuple(layer for layer, number in enumerate(numbers, 1) if number in layers):
        return found
    raise InputError(
        f"the model has lost layers {', '.join(map(str, layers))}: expected some of {', '.join(map(str, numbers))}"
    )


def check_alike(variants: Mapping[str, TokenModel]) -> None:
    """Raise an InputError if models have other grids of patches than the first one."""
    first, *others = variants.values()
    for model in others:
        if model.config.grid != first.config.grid:
            raise InputError(f"models with {first.config.grid} and {model.config.grid} patches: expected the same")
