"""The pruning plan: its stages, and the resulting token counts."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError, suggest
from .alignment import GAP_SOURCES, Alignment
from .importance import IMPORTANCES
from .merging import MERGED_BY, MERGES

# ToP-ViM prunes its 24-layer models after layers 5, 10 and 15.
DEFAULT_FRACTIONS = (5 / 24, 10 / 24, 15 / 24)
# The largest ratio: it keeps two tokens for any length up to a million.
MAX_RATIO = 0.999999
# Values of dropped tokens in output levels.
FILLS = ("stale", "zero")


def default_stages(depth: int) -> tuple[int, ...]:
    """Return the layers (1-based) after which a model of `depth` layers is pruned by default."""
    if depth < 2:
        raise InputError(f"a model of {depth} layer has no place to prune: nothing comes after it")
    stages = {min(max(1, math.floor(depth * f + 0.5)), depth - 1) for f in DEFAULT_FRACTIONS}
    return tuple(sorted(stages))


def kept_count(length: int, ratio: float, protected: int) -> int:
    """Return the number of kept tokens if the share `ratio` of the unprotected ones among `length` tokens is removed.

    With keep = 1 - ratio, it is protected + ceil((length - protected) * keep). The product is rounded to 9 digits
    first, so that 10 * 0.7 = 7.000000000000001 keeps 7. At least 2 tokens and one unprotected token are kept.

    Args:
        protected: number of tokens that are never removed, among `length`.
    """
    free = length - protected
    kept = math.ceil(round(free * (1 - ratio), 9)) + protected
    return min(length, max(2, protected + 1, kept))


def share_removed(length: int, kept: int, protected: int) -> float:
    """Return the ratio for which `kept_count` keeps `kept` of `length` tokens."""
    free = length - protected
    return max(0.0, 1 - (kept - protected) / free) if free else 0.0


@dataclass(frozen=True)
class Stage:
    """Removes the share `ratio` of the tokens, those with the lowest importance, after layer `after` (1-based).

    In a layer of attention and an MLP, tokens are removed between the two.

    Attributes:
        importance: the metric that ranks the tokens, one of `IMPORTANCES`.
        merge: the method to merge removed tokens into others (`ssmcompress.pruning.merging`); None: they are dropped.
    """

    after: int
    ratio: float
    importance: str = "clip"
    merge: str | None = None

    def to_dict(self) -> dict[str, Any]:
        value = {"after": int(self.after), "ratio": float(self.ratio), "importance": self.importance}
        return value | ({"merge": self.merge} if self.merge is not None else {})

    def count(self, tokens: int, protected: int) -> int:
        """Return how many of `tokens` remain, including the fused token."""
        kept = kept_count(tokens, self.ratio, protected)
        return kept + (self.merge == "fused" and kept < tokens)


@dataclass(frozen=True)
class Calibration:
    """Statistics of the calibration images.

    Attributes:
        name, images: the name of the data and the number of images used.
        gap_deltas: for each layer (deltas, d_inner), the mean of delta over images and tokens.
        kept: for each stage (positions,), the share of images that kept each position.
        scores: for each stage (positions,), the mean importance over the images that had the position (0: none).
        probes: for each layer (d_model + positions,), the predictor of the importance `saliency` (empty: not needed).
    """

    name: str
    images: int
    gap_deltas: tuple[Tensor, ...] = field(repr=False)
    kept: tuple[Tensor, ...] = field(default=(), repr=False)
    scores: tuple[Tensor, ...] = field(default=(), repr=False)
    probes: tuple[Tensor, ...] = field(default=(), repr=False)


@dataclass(frozen=True)
class Plan:
    """What to prune, where and by which metric; written by calibration or by hand and applied by `prune`.

    Attributes:
        stages: in order of depth.
        alignment: which ops compensate for pruned positions.
        gap: the source of the delta of a pruned position, "calibrated" or "bias" (softplus(dt_bias)); None leaves the
            choice to calibration: "calibrated" if there are images, else "bias".
        seed: seed of the `random` metric.
        calibration: required by gap "calibrated".
        reenter: number of last layers that process all tokens again, for models that read out every position.
        fill: the value of a dropped token in output levels: "stale", its last features, or "zero", which is worse and
            only for comparisons.
    """

    stages: tuple[Stage, ...]
    alignment: Alignment = Alignment()
    gap: str | None = None
    seed: int = 0
    calibration: Calibration | None = field(default=None, compare=False)
    reenter: int = 0
    fill: str = FILLS[0]

    def __repr__(self) -> str:
        """Return one line without tensors: the stages, the alignment, the gap source and the images."""
        layers: dict[str, list[int]] = {}
        for stage in self.stages:
            merged = f", merged {stage.merge}" if stage.merge else ""
            layers.setdefault(f"{round(stage.ratio, 4)} by {stage.importance}{merged}", []).append(stage.after)
        removed = [f"{text} after {', '.join(map(str, after))}" for text, after in layers.items()]
        aligned = [name for name, value in asdict(self.alignment).items() if value]
        gap = self.gap or "open"
        if self.calibration is not None:
            gap += f", calibrated on {self.calibration.images} images of {self.calibration.name}"
        return f"Plan(remove {'; '.join(removed) or 'nothing'}; align {', '.join(aligned) or 'nothing'}; gap {gap})"

    def validate(self, depth: int, inside: bool = False) -> Plan:
        """Return this plan, or raise an InputError if it is invalid for a model of `depth` layers.

        Args:
            inside: whether tokens are removed inside the layer of a stage, so that the last layer can have a stage.
        """
        last = depth if inside else depth - 1
        if not isinstance(self.stages, (tuple, list)) or not all(isinstance(stage, Stage) for stage in self.stages):
            raise InputError(f"`stages` of a plan: expected Stage(after, ratio) values, found {self.stages!r}"[:200])
        if not isinstance(self.alignment, Alignment):
            raise InputError(f"`alignment` {self.alignment!r}: expected True, False or an Alignment")
        if not isinstance(self.seed, Integral) or isinstance(self.seed, bool):
            raise InputError(f"`seed` {self.seed!r}: expected a whole number")
        for stage in self.stages:
            if not isinstance(stage.after, Integral) or isinstance(stage.after, bool):
                raise InputError(f"a stage after layer {stage.after!r}: expected the number of a layer, from 1")
            if not isinstance(stage.ratio, Real) or isinstance(stage.ratio, bool):
                raise InputError(f"ratio {stage.ratio!r} after layer {stage.after}: expected a share from 0 to below 1")
            if not 1 <= stage.after <= last:
                stages = "there is no stage" if last < 1 else "a stage is 1" + f" to {last}" * (last > 1)
                layers = f"{depth} layer{'s' if depth > 1 else ''}"
                raise InputError(f"cannot prune after layer {stage.after}: the model has {layers}, so {stages}")
            if not 0 <= stage.ratio < 1:
                raise InputError(
                    f"ratio {stage.ratio:g} after layer {stage.after}: expected a share of tokens to remove, "
                    f"at least 0 and below 1"
                )
            if not isinstance(stage.importance, str) or stage.importance not in IMPORTANCES:
                names = [name for name, importance in IMPORTANCES.items() if importance.ranks]
                hint = suggest(str(stage.importance), names)
                raise InputError(f"unknown importance {stage.importance!r}: expected one of {', '.join(names)}{hint}")
            if stage.merge not in (None, *MERGES):
                raise InputError(f"unknown merge {stage.merge!r}: expected one of {', '.join(MERGES)}")
            for importance, merge in MERGED_BY.items():
                if (stage.importance == importance) != (stage.merge == merge):
                    raise InputError(
                        f"importance {importance!r} and merge {merge!r} go together, after layer {stage.after}"
                    )
            if stage.merge == "fused" and stage.importance != "attention":
                raise InputError(
                    f"merge 'fused' weighs tokens by importance 'attention', after layer {stage.after}, not by "
                    f"{stage.importance!r}"
                )
            if stage.merge in MERGED_BY.values() and stage.ratio > 0.5:
                raise InputError(f"ratio {stage.ratio:g} after layer {stage.after}: merging removes half at most")
        afters = [stage.after for stage in self.stages]
        if afters != sorted(set(afters)):
            shown = ", ".join(map(str, afters[:10])) + (", ..." if len(afters) > 10 else "")
            raise InputError(f"stages {shown}: expected layers in rising order, each once")
        fused = False
        for stage in self.stages:
            metric = IMPORTANCES[stage.importance]
            if fused and (metric.draw or metric.probe):
                raise InputError(
                    f"importance {stage.importance!r} after layer {stage.after} goes by positions, and a fused token "
                    "of an earlier stage has none: expected another importance, or no merge 'fused' before it"
                )
            fused = fused or stage.merge == "fused"
        if not isinstance(self.reenter, Integral) or isinstance(self.reenter, bool) or self.reenter < 0:
            raise InputError(f"`reenter` {self.reenter!r}: expected a number of layers, from 0")
        if self.reenter and afters and afters[-1] + self.reenter >= depth:
            raise InputError(
                f"`reenter` {self.reenter}: all tokens enter layer {depth - self.reenter + 1} again, so the last stage "
                f"is after layer {depth - self.reenter - 1} at the latest, not after {afters[-1]}"
            )
        if self.fill not in FILLS:
            raise InputError(f"unknown fill {self.fill!r}: expected one of {', '.join(FILLS)}")
        if self.gap is not None and self.gap not in GAP_SOURCES:
            raise InputError(f"unknown gap source {self.gap!r}: expected one of {', '.join(GAP_SOURCES)}")
        return self

    @property
    def probed_layers(self) -> tuple[int, ...]:
        """The layers of stages whose metric needs a fitted predictor."""
        return tuple(stage.after for stage in self.stages if IMPORTANCES[stage.importance].probe)

    def probe(self, layer: int) -> Tensor | None:
        """Return the predictor (d_model + positions,) of the saliency after a layer, or None if none was fitted."""
        probes = self.calibration.probes if self.calibration is not None else ()
        return probes[layer - 1] if len(probes) >= layer and len(probes[layer - 1]) else None

    def to_dict(self, tensors: bool = True) -> dict[str, Any]:
        """Return a JSON value that `from_dict` can read; without `tensors`, it has no calibration."""
        value: dict[str, Any] = {
            "stages": [stage.to_dict() for stage in self.stages],
            "alignment": {k: v for k, v in asdict(self.alignment).items() if v or k != "pool"},
            "gap": self.gap,
            "seed": int(self.seed),
        }
        value |= {"reenter": int(self.reenter)} if self.reenter else {}
        value |= {"fill": self.fill} if self.fill != FILLS[0] else {}
        if self.calibration is not None and tensors:
            value["calibration"] = {
                "name": self.calibration.name,
                "images": self.calibration.images,
                **{k: [t.tolist() for t in getattr(self.calibration, k)] for k in _CALIBRATED},
            }
        return value

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> Plan:
        """Read a plan written by `to_dict`; InputError for any other value."""
        try:
            calibration = value.get("calibration")
            if calibration is not None:
                tensors = {k: tuple(_to_float32(t) for t in calibration.get(k, ())) for k in _CALIBRATED}
                calibration = Calibration(str(calibration["name"]), int(calibration["images"]), **tensors)
            return cls(
                stages=tuple(
                    Stage(
                        _parse_int(s["after"]),
                        _parse_share(s["ratio"]),
                        str(s.get("importance", "clip")),
                        s.get("merge"),
                    )
                    for s in value["stages"]
                ),
                alignment=Alignment(**{k: _parse_bool(v) for k, v in value.get("alignment", {}).items()}),
                gap=value.get("gap"),
                seed=_parse_int(value.get("seed", 0)),
                calibration=calibration,
                reenter=_parse_int(value.get("reenter", 0)),
                fill=str(value.get("fill", FILLS[0])),
            )
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError, RuntimeError) as error:
            reason = f" ({error.args[0]} is missing)" if isinstance(error, KeyError) else ""
            reason = f" ({error})" if isinstance(error, ValueError) else reason
            raise InputError(f"not a pruning plan{reason}") from error


_CALIBRATED = ("gap_deltas", "kept", "scores", "probes")


def _to_float32(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.float32, device="cpu")


def _parse_share(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f"expected a share, found {str(value)[:20]!r}")
    return float(value)


def _parse_bool(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError(f"expected true or false, found {str(value)[:20]!r}")
    return value


def _parse_int(value: Any) -> int:
    if isinstance(value, bool) or int(value) != value or abs(value) > 2**31:
        raise ValueError(f"expected a whole number, found {str(value)[:20]}")
    return int(value)


def token_counts(depth: int, length: int, stages: Sequence[Stage], protected: int, reenter: int = 0) -> list[int]:
    """Return depth + 1 values: the number of tokens that each of `depth` layers processes, and the number read out.

    Args:
        protected: number of tokens that are never removed. reenter: number of last layers that process all tokens.
    """
    removing = {stage.after: stage for stage in stages}
    counts = [length]
    for layer in range(1, depth + 1):
        count = counts[-1]
        counts.append(removing[layer].count(count, protected) if layer in removing else count)
    if reenter:
        counts[depth - reenter :] = [length] * (reenter + 1)
    return counts


def ratio_for_budget(budget: float, share: Callable[[float], float]) -> float:
    """Return the smallest ratio, in thousandths, whose share of the dense FLOPs is at most `budget`.

    Args:
        budget: target share of the dense model's FLOPs, within the range of `share`.
        share: function from a ratio to the share that remains; it decreases with the ratio.
    """
    low, high = 0, 1000  # share(low) > budget >= share(high), the latter is never evaluated
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if share(middle / 1000) <= budget else (middle, high)
    return min(high / 1000, MAX_RATIO)
