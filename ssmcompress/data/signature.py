"""Signatures of images: what tells whether a run, a folder or a comparison goes on with the images it was made from."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from .. import processes
from .batches import Batches, sample_indices, skip_picture

# Images whose pixels are part of a signature. Reading them takes 5 s from ImageNet's JPEG files in one process.
SIGNED = 512


def sign_images(batches: Batches) -> dict[str, Any]:
    """Return what identifies images by content, whatever their names and the number of processes: a JSON object.

    It has the number of images, a hash of their indices and labels, and a hash of the pixels of up to `SIGNED` of them,
    chosen at random but always the same ones. So a change of any label or of the order is noticed, and a change of
    pixels in any of up to `SIGNED` images; in larger data it is noticed unless it concerns few images. Masks, which
    take as long to read as images, are signed as pixels are, those of the same images.

    Every process of a group makes this call; the images of all of them are signed together.
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
    """Return in what way images differ, in words; None if they do not.

    Args:
        then, now: signatures; None where there were no images, and anything else where they were not recorded.
    """
    if then == now:
        return None
    if then is None or now is None:
        return f"{_count(then)} for {_count(now)}"
    if not isinstance(then, Mapping) or not then.keys() >= now.keys():
        return "it is not known which they were"
    if then["images"] != now["images"]:
        return f"{_count(then)} for {_count(now)}"
    if then["content"] != now["content"]:
        return f"{_count(now)} of other content"
    return f"{_count(now)} with other labels"


def _count(signature: Any) -> str:
    count = signature.get("images") if isinstance(signature, Mapping) else None
    return "no images" if signature is None else f"{count} image{'s' * (count != 1)}"


def _hash(values: np.ndarray) -> str:
    return hashlib.sha256(values.tobytes()).hexdigest()[:16]
