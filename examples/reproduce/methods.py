"""The methods in each table, and their shares of the dense model's FLOPs."""

from __future__ import annotations

# Method names of `ssmcompress compare`; methods that a model does not support are skipped.
CLASSIFIERS = (
    "naive", "clip, aligned", "saliency", "saliency, aligned", "EViT", "EViT, fused", "ToMe", "R-MeeTo", "MTR",
    "clip, aligned, reconstructed", "saliency, aligned, reconstructed", "EViT, reconstructed", "ToMe, reconstructed",
    "R-MeeTo, reconstructed", "MTR, reconstructed", "search, reconstructed", "all axes", "smaller image",
    "smaller image, reconstructed",
)  # fmt: skip
SEGMENTERS = (
    "zero-filled", "naive", "clip, aligned", "naive, mapped", "clip, aligned, mapped", "clip, aligned, reconstructed",
    "search, reconstructed", "all axes",
)  # fmt: skip
# Token selection -> (without alignment, aligned).
WITH_AND_WITHOUT = {
    "clip": ("naive", "clip, aligned"),
    "saliency": ("saliency", "saliency, aligned"),
    "clip, reconstructed": ("naive, reconstructed", "clip, aligned, reconstructed"),
}
# Importance metric -> (without alignment, aligned).
IMPORTANCES = {
    "random": ("random", "random, aligned"),
    "l1": ("l1", "l1, aligned"),
    "l2": ("l2", "l2, aligned"),
    "unclipped": ("unclipped", "unclipped, aligned"),
    "clip": ("naive", "clip, aligned"),
    "delta": ("delta", "delta, aligned"),
    "saliency": ("saliency", "saliency, aligned"),
}
HALVES = ("clip, conv aligned", "clip, scan aligned")


def list_names(task: str, main: bool, whole: bool) -> tuple[str, ...]:
    """Return the names of the methods that the tables list for a model.

    Args:
        task: of the model. main: whether this is the main share of the FLOPs.
        whole: whether the model is included in table 4, and in table 3 at further shares.
    """
    pairs = tuple(name for pair in WITH_AND_WITHOUT.values() for name in pair)
    if task == "segmentation":
        names = SEGMENTERS if main else ()
    elif main:
        metrics = (*(name for pair in IMPORTANCES.values() for name in pair), *HALVES)
        names = (*CLASSIFIERS, *pairs, *(metrics if whole else ()))
    else:
        names = pairs if whole else ()
    return tuple(dict.fromkeys(names))
