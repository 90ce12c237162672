"""Which methods the tables have, at which share of the dense model's FLOPs."""

from __future__ import annotations

from ssmcompress.jobs.methods import METHODS

# The share of the FLOPs of tables 1, 2 and 4; table 3 has all of them.
SHARE = 0.6
SHARES = (0.75, 0.6, 0.5)

# Names of `ssmcompress compare`; a model leaves out those that it cannot carry out.
CLASSIFIERS = (
    "naive", "clip, aligned", "EViT", "EViT, fused", "ToMe", "R-MeeTo", "MTR",
    "clip, aligned, reconstructed", "EViT, reconstructed", "ToMe, reconstructed", "R-MeeTo, reconstructed",
    "MTR, reconstructed", "search, reconstructed", "all axes", "smaller image", "smaller image, reconstructed",
)  # fmt: skip
SEGMENTERS = (
    "zero-filled", "naive", "clip, aligned", "naive, mapped", "clip, aligned, mapped", "clip, aligned, reconstructed",
    "search, reconstructed", "all axes",
)  # fmt: skip
WITH_AND_WITHOUT = (
    ("naive", "clip, aligned"), ("saliency", "saliency, aligned"),
    ("naive, reconstructed", "clip, aligned, reconstructed"),
)  # fmt: skip
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
KNOWN = {method.name for method in METHODS}


def list_names(share: float, task: str) -> tuple[str, ...]:
    """Return the names of the methods that the tables have at a share of the FLOPs."""
    pairs = tuple(name for pair in WITH_AND_WITHOUT for name in pair)
    if task == "segmentation":
        names = SEGMENTERS if share == SHARE else ()
    elif share == SHARE:
        names = (*CLASSIFIERS, *pairs, *(name for pair in IMPORTANCES.values() for name in pair), *HALVES)
    else:
        names = pairs
    return tuple(dict.fromkeys(names))
