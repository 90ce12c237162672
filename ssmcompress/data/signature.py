"""Signatures of images, to check whether a run, folder or comparison is resumed with the same images."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from .. import processes
from .batches import Batches, sample_indices, skip_picture

# Number of images whose pixels are signed. Reading them takes 5 s from ImageNet's JPEG files in one process.
SIGNED = 512


def sign_images(batches: Batches) -> dict[str, Any]:
    """Return a JSON object that identifies images by content, independent of names and the number of processes.

    It contains the number of images, a hash of their indices and labels, and a hash of the pixels of up to `SIGNED` of
    them, selected at random with a fixed seed. Any change of a label or of the order is detected, and any change of
    pixels in up to `SIGNED` images; in larger data, changes of few images may be missed. Masks, which take as long to
    read as images, are signed like pixels, for the same images.

    Every process of a group must call this; the images of all of them are signed together.
    """
    source = batches.source
    index = batches.all_indices()
    labels = [-1] * len(index) if source.labels is None else [source.labels[i] for i in index]
    chosen = [index[k] for k in sample_indices(len(index), SIGNED, 0)[0]]
    sample = Batches(source, skip_picture, processes.shard(chosen), batches.batch_size, batches.workers)
    sample.read_rest()
    known = np.array([index, labels], np.int64).ravel()
    if source.masks is not None:
        known = np.concatenate([known, sample.mask_digests[chosen].view(np.int64)])
    return {
        "images": len(index),
        "labels": _hash(known),
        "content": _hash(sample.digests[chosen]),
    }


def compare_signatures(then: Any, now: Mapping[str, Any] | None) -> str | None:
    """Describe how images differ, in words; None if they do not.

    Args:
        then, now: signatures; None if there were no images, and anything else if they were not recorded.
    """
    if then == now:
        return None
    if then is None or now is None:
        return f"{_count(then)} instead of {_count(now)}"
    if not isinstance(then, Mapping) or not then.keys() >= now.keys():
        return "the earlier images were not recorded"
    if then["images"] != now["images"]:
        return f"{_count(then)} instead of {_count(now)}"
    if then["content"] != now["content"]:
        return f"{_count(now)} of other content"
    return f"{_count(now)} with other labels"


def _count(signature: Any) -> str:
    count = signature.get("images") if isinstance(signature, Mapping) else None
    return "no images" if signature is None else f"{count} image{'s' * (count != 1)}"


def _hash(values: np.ndarray) -> str:
    return hashlib.sha256(values.tobytes()).hexdigest()[:16]
