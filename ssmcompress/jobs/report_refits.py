"""The refits of a reconstruction in a report: how they generalise, and the expected benefit of more images."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import Any

from ..compression.reconstruct.learning_curve import LearningCurve, learning_curve
from ..models.records import Reconstruction
from .continuation import INPUT_COLUMN
from .measuring import Measured

# Columns of models that were not made by the steps of a report.
EARLIER = ("dense", INPUT_COLUMN, "before")
# Smaller changes are considered insignificant.
LEAST_CHANGE = 0.005


def describe_learning(record: Reconstruction) -> dict[str, Any] | None:
    """Describe the errors of the refits by the number of images fitted on; None: there are too few images."""
    curve = learning_curve(record.fits, record.images)
    if curve is None:
        return None
    errors = {name: float(f"{getattr(curve, name):.6g}") for name in ("before", "half", "after", "twice")}
    return {"refits": curve.refits, **errors}


def add_measured(section: Mapping[str, Any] | None, measured: Measured) -> Mapping[str, Any] | None:
    """Return the section `reconstruction` of a report with KL(dense || model) on the evaluation images.

    `kl_measured_before` and `kl_measured_after` are the values before and after the reconstruction, if both models were
    evaluated. A section of an earlier report, whose model was not evaluated, is returned unchanged.
    """
    if not section or not section["kept"]:
        return section
    columns = [name for name, model in measured.models.items() if model is not None]
    found: dict[str, float] = {}
    for before, name in pairwise(columns):
        steps = measured.models[name].steps
        if name in EARLIER or not steps or steps[-1].kind != Reconstruction.kind:
            continue
        values = {"after": measured.results[name].figures.get("kl")}
        if before not in EARLIER:
            values = {"before": measured.results[before].figures.get("kl"), **values}
        found = {f"kl_measured_{key}": kl for key, kl in values.items() if kl is not None}
    kept = {key: value for key, value in section.items() if not key.startswith("kl_measured_")}
    return {**kept, **found} if found else section


def read_learning(section: Mapping[str, Any]) -> LearningCurve | None:
    """Return the learning curve in the section `reconstruction` of a report; None: it has none."""
    if not (value := section.get("learning")):
        return None
    return LearningCurve(*(value[name] for name in ("refits", "before", "half", "after")))


def describe_measured(section: Mapping[str, Any]) -> str:
    """Describe the KL on the evaluation images as the end of a sentence; empty if unknown."""
    after, before = section.get("kl_measured_after"), section.get("kl_measured_before")
    if after is None:
        return ""
    return ", on the measured images " + (f"{before:.4f} -> " if before is not None else "") + f"{after:.4f}"


def list_learning_notes(section: Mapping[str, Any]) -> list[str]:
    """Return a sentence about the expected benefit of more images for the refits."""
    if (curve := read_learning(section)) is None:
        return []
    worse, better = curve.half / curve.after - 1, 1 - curve.twice / curve.after
    if worse < LEAST_CHANGE:
        return ["refits on half of the images have the same error on held-out images: more images would help little"]
    return [
        f"with half of the images, the error of the refits on held-out images is {worse:.0%} higher; twice as many "
        f"would lower it by about {better:.0%}"
    ]
