"""The sizes of a model in reports: its layers, and what was trimmed from the dense model."""

from __future__ import annotations

from typing import Any

from ..compression.trim.trims import Trims, find_trims
from ..models.base import TokenModel
from ..models.sizes import LayeredConfig, ModelConfig, compact

# Report column of a trimmed model that drops no tokens, before reconstruction.
TRIMMED = "trimmed"


def describe_trims(model: TokenModel, trims: Trims | None = None) -> dict[str, Any]:
    """Describe what was trimmed from a model, as a JSON object that can itself be read as `Trims`.

    Args:
        trims: what was trimmed; None: taken from the records of its steps.

    Returns:
        `states`, `channels`, `layers` and `directions` as in `Trims.to_dict`; `dense`, the sizes of the dense model; if
        states or channels were trimmed, `fitted_on`, by axis the `name` and number of `images` used. {} if the model
        was not trimmed.
    """
    trims = find_trims(model.steps) if trims is None else trims
    if not trims:
        return {}
    records = {axis: model.find_record(axis) for axis in ("states", "channels")}
    fitted = {a: {key: r.values[key] for key in ("name", "images")} for a, r in records.items() if r is not None}
    return {**trims.to_dict(), "dense": describe_dense(model), **({"fitted_on": fitted} if fitted else {})}


def describe_dense(model: TokenModel) -> dict[str, Any]:
    """Return `describe_sizes` of a model's dense model, or of the model itself if it is dense."""
    return describe_sizes(model.origin.config if model.origin is not None else model.config)


def describe_sizes(config: ModelConfig) -> dict[str, Any]:
    """Return `states`, `channels` and `directions` of a layer, lists if layers differ, and the number of `layers`.

    A model without scans only has the last of these.
    """
    sizes = config.layers
    if not isinstance(config, LayeredConfig):
        return {"layers": len(sizes)}
    counts = {
        "states": [size.d_state for size in sizes],
        "channels": [size.d_inner for size in sizes],
        "directions": [len(size.directions) for size in sizes],
    }
    return {**{name: _to_json(compact(values)) for name, values in counts.items()}, "layers": len(sizes)}


def _to_json(value: int | tuple[int, ...]) -> int | list[int]:
    return list(value) if isinstance(value, tuple) else value
