"""Fingerprints that identify a model by its content, independent of its file."""

from __future__ import annotations

import hashlib
import json
from dataclasses import fields
from typing import Any

import torch

from .base import TokenModel


def describe_preprocessing(model: TokenModel) -> dict[str, Any] | None:
    """Return the preprocessing of a model's images as a JSON value, without its provenance."""
    given = model.preprocessing
    if given is None:
        return None
    return json.loads(json.dumps({f.name: getattr(given, f.name) for f in fields(given) if f.compare}))


def fingerprint(model: TokenModel) -> str:
    """Return a hash of a model's weights, architecture, image size, preprocessing and plan."""
    about = {
        "architecture": [model.architecture, model.config.to_dict()],
        "preprocessing": describe_preprocessing(model),
        "plan": model.plan.to_dict(tensors=False) if model.plan is not None else None,
    }
    digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode())
    for name, value in sorted(model.state_dict().items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()[:16]
