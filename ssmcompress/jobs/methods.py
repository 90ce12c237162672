"""The methods of a comparison, and what each of them does to reach a level of FLOPs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from ..compression.search.equal import plan_for_budget
from ..errors import InputError, suggest
from ..evaluation.flops import remaining_share
from ..models.base import TokenModel
from ..pruning.alignment import UNALIGNED, Alignment
from ..pruning.plan import Plan, Stage, default_stages, kept_count, ratio_for_budget, share_removed
from .compare_axes import ALL, IMAGE
from .pipeline import Step
from .steps import Reconstruct, pruning_steps

ALIGNED = Alignment()


@dataclass(frozen=True)
class Method:
    """A way to make the model cheaper.

    Attributes:
        importance: the metric that ranks tokens. alignment: as in a plan. merge: as in a stage.
        searched: whether the plan comes from a search for the level's FLOPs. reconstructed: whether later layers are
            refitted.
        axis: what is trimmed instead of tokens, as `compare_axes.AxisModels.build` has it; None: tokens, by a plan.
        mapped: whether the output levels of a segmentation model are mapped to the dense ones.
        fill: what is read out of a dropped token, as in a plan. Both are for models with output levels alone.
    """

    name: str
    importance: str = "clip"
    alignment: Alignment = ALIGNED
    merge: str | None = None
    searched: bool = False
    reconstructed: bool = False
    axis: str | None = None
    mapped: bool = False
    fill: str = "stale"

    @property
    def of_levels(self) -> bool:
        """Whether it is for models with output levels alone."""
        return self.mapped or self.fill != "stale"

    def steps(self, plan: Plan) -> Sequence[Step]:
        """What the method does with a plan."""
        refit = Reconstruct() if self.reconstructed else None
        return pruning_steps(replace(plan, fill=self.fill), refit, self.mapped)


def _methods() -> tuple[Method, ...]:
    """Return all methods. `naive` is pruning as in EViT (arXiv 2202.07800), by the score of ToP-ViM."""
    rows = [Method("naive", alignment=UNALIGNED)]
    for importance in ("random", "l1", "l2", "mean", "delta", "saliency"):
        name = "unclipped" if importance == "mean" else importance
        rows += [Method(name, importance, UNALIGNED), Method(f"{name}, aligned", importance)]
    rows += [
        Method("clip, conv aligned", alignment=Alignment(True, False)),
        Method("clip, scan aligned", alignment=Alignment(False, True)),
        Method("clip, aligned"),
        Method("R-MeeTo", "similarity", UNALIGNED, "ordered"),
        Method("MTR", "delta", UNALIGNED, "grouped"),
        Method("search", searched=True),
    ]
    rows += [
        Method("zero-filled", alignment=UNALIGNED, fill="zero"),
        Method("naive, mapped", alignment=UNALIGNED, mapped=True),
        Method("clip, aligned, mapped", mapped=True),
    ]
    again = ("naive", "clip, aligned", "saliency, aligned", "R-MeeTo", "MTR", "search")
    rows += [replace(m, name=f"{m.name}, reconstructed", reconstructed=True) for m in rows if m.name in again]
    rows += [
        Method(f"{axis}, reconstructed", reconstructed=True, axis=axis) for axis in ("states", "channels", "layers")
    ]
    rows += [
        Method("all axes", searched=True, reconstructed=True, axis=ALL),
        Method("smaller image", axis=IMAGE),
    ]
    return tuple(rows)


METHODS = _methods()
NAMES = tuple(method.name for method in METHODS)


def choose_methods(
    names: Sequence[str] | None, *, search: bool, reconstruct: bool, levels: bool = False
) -> tuple[Method, ...]:
    """The methods with these names, in the order of `METHODS`.

    Args:
        names: None: all of them. search, reconstruct: whether those with a search or a reconstruction are among all;
            those of other axes than tokens, and the smaller image, are if both are true.
        levels: whether the model has output levels, as one for segmentation has.

    Raises:
        InputError: an unknown name, or a method that is not for the model.
    """
    if names is None:
        both = search and reconstruct
        tokens = (m for m in METHODS if (m.axis is None or both) and is_for(m, levels))
        return tuple(m for m in tokens if (search or not m.searched) and (reconstruct or not m.reconstructed))
    for name in names:
        if name not in NAMES:
            raise InputError(f"unknown method {name!r}{suggest(name, NAMES) or '; docs/compare.md lists them all'}")
        if not is_for(next(method for method in METHODS if method.name == name), levels):
            raise InputError(f"method {name!r} is for {'classifiers' if levels else 'segmentation models'} alone")
    return tuple(method for method in METHODS if method.name in names)


def is_for(method: Method, levels: bool) -> bool:
    """Whether a method is for models with output levels, or without."""
    return method.axis != IMAGE if levels else not method.of_levels


@dataclass(frozen=True)
class Level:
    """How much is pruned.

    Attributes:
        ratio: share of tokens to remove at each default stage. flops: the share of the dense FLOPs that leaves.
        asked: the share of the FLOPs that was asked for, of which whole tokens can fall short; None: none was.
    """

    ratio: float
    flops: float
    asked: float | None = None

    @property
    def budget(self) -> float:
        """The share of the FLOPs for methods that do not go by tokens."""
        return self.flops if self.asked is None else self.asked


def make_levels(model: TokenModel, stages: Sequence[int] | None, ratios: Sequence[float]) -> list[Level]:
    """Return a level for each ratio, removed at each of the stages (None: the default ones)."""
    stages = tuple(stages or default_stages(len(model.blocks)))
    result = []
    for ratio in ratios:
        plan = tuple(Stage(after, ratio) for after in stages)
        Plan(plan).validate(len(model.blocks))
        result.append(Level(ratio, remaining_share(model, plan)))
    return result


def ratio_for_flops(model: TokenModel, stages: Sequence[int] | None, budget: float) -> float:
    """Return the smallest ratio at each stage that leaves at most `budget` of the FLOPs."""
    return plan_for_budget(model, budget, stages).stages[0].ratio


def stages_for_level(
    method: Method, model: TokenModel, level: Level, stages: Sequence[int] | None
) -> tuple[Stage, ...]:
    """Return the stages by which a method reaches a level without a search.

    R-MeeTo merges the same number of tokens before every second layer from the third on, as its code does, and as few
    as the level's FLOPs allow; the others remove the level's ratio at each stage.

    Raises:
        InputError: the method cannot save as much.
    """
    depth = len(model.blocks)
    if method.merge != "ordered":
        after = tuple(stages or default_stages(depth))

        def stages_with(ratio: float) -> tuple[Stage, ...]:
            return tuple(Stage(layer, ratio, method.importance, method.merge) for layer in after)

        if level.ratio == 0 or remaining_share(model, stages_with(level.ratio)) <= level.flops:
            return stages_with(level.ratio)
        # Choosing and merging cost FLOPs: fewer tokens make up for them, so that no row exceeds the level.
        return stages_with(ratio_for_budget(level.flops, lambda ratio: remaining_share(model, stages_with(ratio))))
    if level.ratio == 0:
        return (Stage(2 if depth > 2 else 1, 0.0, method.importance, method.merge),)
    protected = model.protected is not None
    for removed in range(1, model.length):
        merges, count = [], model.length
        for layer in range(2, depth, 2):
            free = count - protected
            kept = count - min(removed, free // 2)
            ratio = share_removed(count, kept, protected)
            merges.append(Stage(layer, ratio, method.importance, method.merge))
            count = kept_count(count, ratio, protected)
        if merges and remaining_share(model, merges) <= level.flops:
            return tuple(merges)
    raise InputError(f"merging half of the tokens before every second layer does not get to {level.flops:.1%}")
