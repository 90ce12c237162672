"""The sizes of a model in reports: those of its layers, and what was trimmed off those of the dense model."""

from __future__ import annotations

from typing import Any

from ..compression.trim.trims import Trims, find_trims
from ..models.base import TokenModel
from ..models.sizes import LayeredConfig, ModelConfig, compact

# What reports call a trimmed model that drops no tokens, before it is reconstructed.
TRIMMED = "trimmed"


def describe_trims(model: TokenModel, trims: Trims | None = None) -> dict[str, Any]:
    """Describe what was trimmed off a model, a JSON object that is itself read as `Trims`.

    Args:
        trims: what was trimmed; None: what the records of its steps say.

    Returns:
        `states`, `channels`, `layers` and `directions` as `Trims.to_dict` has them; `dense`, the sizes of the dense
        model; where states or channels were trimmed, `fitted_on`, by axis the `name` and number of `images` used. {} if
        the model was not trimmed.
    """
    trims = find_trims(model.steps) if trims is None else trims
    if not trims:
        return {}
    records = {axis: model.find_record(axis) for axis in ("states", "channels")}
    fitted = {a: {key: r.values[key] for key in ("name", "images")} for a, r in records.items() if r is not None}
    return {**trims.to_dict(), "dense": describe_dense(model), **({"fitted_on": fitted} if fitted else {})}


def describe_dense(model: TokenModel) -> dict[str, Any]:
    """Return `describe_sizes` of the dense model that a model was made from, or that it is."""
    return describe_sizes(model.origin.config if model.origin is not None else model.config)


def describe_sizes(config: ModelConfig) -> dict[str, Any]:
    """Return `states`, `channels` and `directions` of a layer, lists if layers differ, and the number of `layers`.

    A model without scans has the last of these alone.
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
