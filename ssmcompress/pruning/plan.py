"""Where and how much to prune: stages, kept counts, and the plan that carries them."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError
from .alignment import GAP_SOURCES, Alignment
from .importance import IMPORTANCES
from .merging import MERGES

# ToP-ViM prunes its 24-layer models after layers 5, 10 and 15.
DEFAULT_FRACTIONS = (5 / 24, 10 / 24, 15 / 24)


# A ratio that leaves two tokens of any length up to a million.
LEAST_KEPT = 0.999999


def default_stages(depth: int) -> tuple[int, ...]:
    """The layers (1-based) after which a model of `depth` layers is pruned unless told otherwise."""
    if depth < 2:
        raise InputError(f"a model of {depth} layer has no place to prune: nothing comes after it")
    stages = {min(max(1, math.floor(depth * f + 0.5)), depth - 1) for f in DEFAULT_FRACTIONS}
    return tuple(sorted(stages))


def kept_count(length: int, ratio: float, protected: bool) -> int:
    """Tokens left of `length` when the share `ratio` of those that may go is removed; at least 2.

    1 + ceil((length - 1) * keep) with a protected class token, ceil(length * keep) without. The product is
    rounded to 9 digits first, so that 10 * 0.7 = 7.000000000000001 keeps 7.
    """
    free = length - 1 if protected else length
    kept = math.ceil(round(free * (1 - ratio), 9)) + (length - free)
    return min(length, max(2, kept))


def share_removed(length: int, kept: int, protected: bool) -> float:
    """The ratio by which `kept_count` keeps `kept` of `length` tokens."""
    free = length - protected
    return max(0.0, 1 - (kept - protected) / free) if free else 0.0


@dataclass(frozen=True)
class Stage:
    """Remove the share `ratio` of the tokens after layer `after` (1-based), the least important by a metric.

    Attributes:
        merge: how removed tokens are merged into others (`ssmcompress.pruning.merging`); None: they are dropped.
    """

    after: int
    ratio: float
    importance: str = "clip"
    merge: str | None = None

    def to_dict(self) -> dict[str, Any]:
        return {key: value for key, value in asdict(self).items() if key != "merge" or value is not None}


@dataclass(frozen=True)
class Calibration:
    """What was seen on the calibration images.

    Attributes:
        name, images: the data and how many of its images were used.
        gap_deltas: per layer (deltas, d_inner), the mean of delta over images and tokens.
        kept: per stage (positions,), the share of images that kept each position.
        scores: per stage (positions,), the mean importance over the images that had the position (0: none).
        probes: per layer (d_model + positions,), what predicts the importance `saliency` (empty: nothing asks for it).
    """

    name: str
    images: int
    gap_deltas: tuple[Tensor, ...]
    kept: tuple[Tensor, ...] = ()
    scores: tuple[Tensor, ...] = ()
    probes: tuple[Tensor, ...] = ()


@dataclass(frozen=True)
class Plan:
    """What to prune, where and by which metric: made by calibration or by hand, carried out by `prune`.

    Attributes:
        stages: in order of depth.
        alignment: which ops make up for pruned positions.
        gap: where the delta of a pruned position comes from, "calibrated" or "bias" (softplus(dt_bias)); None
            while that is left to calibration: calibrated where there are images, else bias.
        seed: of the `random` metric.
        calibration: needed by gap "calibrated".
    """

    stages: tuple[Stage, ...]
    alignment: Alignment = Alignment()
    gap: str | None = None
    seed: int = 0
    calibration: Calibration | None = field(default=None, compare=False)

    def validate(self, depth: int) -> Plan:
        """This plan, or an InputError that says what is wrong with it for a model of `depth` layers."""
        for stage in self.stages:
            if not 1 <= stage.after < depth:
                raise InputError(
                    f"cannot prune after layer {stage.after}: the model has {depth} layers, "
                    f"so a stage is 1 to {depth - 1}"
                )
            if not 0 <= stage.ratio < 1:
                raise InputError(
                    f"ratio {stage.ratio:g} after layer {stage.after}: expected a share of tokens to remove, "
                    f"at least 0 and below 1"
                )
            if stage.importance not in IMPORTANCES:
                raise InputError(f"unknown importance {stage.importance!r}: expected one of {', '.join(IMPORTANCES)}")
            if stage.merge not in (None, *MERGES):
                raise InputError(f"unknown merge {stage.merge!r}: expected one of {', '.join(MERGES)}")
            if (stage.importance == "similarity") != (stage.merge == "ordered"):
                raise InputError(f"importance 'similarity' and merge 'ordered' go together, after layer {stage.after}")
            if stage.merge == "ordered" and stage.ratio > 0.5:
                raise InputError(f"ratio {stage.ratio:g} after layer {stage.after}: merging removes half at most")
        afters = [stage.after for stage in self.stages]
        if afters != sorted(set(afters)):
            raise InputError(f"stages {afters}: expected layers in rising order, each once")
        if not self.stages:
            raise InputError("a plan without stages prunes nothing")
        if self.gap is not None and self.gap not in GAP_SOURCES:
            raise InputError(f"unknown gap source {self.gap!r}: expected one of {', '.join(GAP_SOURCES)}")
        return self

    def probe(self, layer: int) -> Tensor | None:
        """(d_model + positions,) what was fitted for the saliency after a layer, or None."""
        probes = self.calibration.probes if self.calibration is not None else ()
        return probes[layer - 1] if len(probes) >= layer and len(probes[layer - 1]) else None

    def to_dict(self, tensors: bool = True) -> dict[str, Any]:
        """A JSON value that `from_dict` reads; `tensors` False leaves out the calibrated ones."""
        value: dict[str, Any] = {
            "stages": [stage.to_dict() for stage in self.stages],
            "alignment": {k: v for k, v in asdict(self.alignment).items() if v or k != "pool"},
            "gap": self.gap,
            "seed": self.seed,
        }
        if self.calibration is not None and tensors:
            value["calibration"] = {
                "name": self.calibration.name,
                "images": self.calibration.images,
                **{k: [t.tolist() for t in getattr(self.calibration, k)] for k in _CALIBRATED},
            }
        return value

    @classmethod
    def read(cls, file: str | Path) -> Plan:
        """A plan from its own JSON, from a dry run's, or from the pruning block of a config.json."""
        try:
            value = json.loads(Path(file).read_text(encoding="utf-8"))
        except OSError as error:
            raise InputError(f"cannot read {file}: {error.strerror}") from error
        except (ValueError, RecursionError) as error:
            raise InputError(f"{file}: not JSON ({error})") from error
        if isinstance(value, dict):
            value = value.get("plan") or value.get("pruning") or value
        return cls.from_dict(value)

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> Plan:
        """The plan that `to_dict` wrote; an InputError for anything else."""
        try:
            calibration = value.get("calibration")
            if calibration is not None:
                tensors = {k: tuple(torch.tensor(t) for t in calibration.get(k, ())) for k in _CALIBRATED}
                calibration = Calibration(str(calibration["name"]), int(calibration["images"]), **tensors)
            return cls(
                stages=tuple(
                    Stage(_whole(s["after"]), float(s["ratio"]), str(s.get("importance", "clip")), s.get("merge"))
                    for s in value["stages"]
                ),
                alignment=Alignment(**{k: bool(v) for k, v in value.get("alignment", {}).items()}),
                gap=value.get("gap"),
                seed=_whole(value.get("seed", 0)),
                calibration=calibration,
            )
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError, RuntimeError) as error:
            raise InputError(f"not a pruning plan: {type(error).__name__} {error}") from error


_CALIBRATED = ("gap_deltas", "kept", "scores", "probes")


def _whole(value: Any) -> int:
    if isinstance(value, bool) or int(value) != value or abs(value) > 2**31:
        raise ValueError(f"expected a whole number, found {str(value)[:20]}")
    return int(value)


def token_counts(depth: int, length: int, stages: Sequence[Stage], protected: bool) -> list[int]:
    """Tokens that each of the `depth` layers processes, then the count read out: depth + 1 values."""
    ratios = {stage.after: stage.ratio for stage in stages}
    counts = [length]
    for layer in range(1, depth + 1):
        left = counts[-1]
        counts.append(kept_count(left, ratios[layer], protected) if layer in ratios else left)
    return counts


def ratio_for_budget(budget: float, share: Callable[[float], float]) -> float:
    """The smallest ratio, in thousandths, whose share of the dense FLOPs is at most `budget`.

    Args:
        budget: wanted share of the dense model's FLOPs, within what `share` reaches.
        share: ratio -> the share that remains; falls as the ratio rises.
    """
    low, high = 0, 1000  # share(low) > budget >= share(high), the latter never asked for
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if share(middle / 1000) <= budget else (middle, high)
    return min(high / 1000, LEAST_KEPT)
