"""The methods of a comparison, and how each of them reaches a level of FLOPs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from ..compression.search.axes import list_axes
from ..compression.search.equal import plan_for_budget
from ..errors import InputError, suggest
from ..evaluation.flops import remaining_share
from ..models.base import TokenModel
from ..models.blocks import ScanBlock
from ..pruning.alignment import UNALIGNED, Alignment
from ..pruning.plan import Plan, Stage, kept_count, ratio_for_budget, share_removed
from ..pruning.schedules import tome_stages
from .compare_axes import ALL, IMAGE
from .pipeline import Step
from .steps import Reconstruct, pruning_steps

ALIGNED = Alignment()
# Groups of methods, which have different markers in a chart of several models.
DROPPED, MERGED, SEARCHED, TRIMMED, SMALLER = (
    "tokens dropped", "tokens merged", "search", "states, channels or layers", "smaller image",
)  # fmt: skip


@dataclass(frozen=True)
class Level:
    """How much is pruned.

    Attributes:
        ratio: share of tokens to remove at each default stage. flops: the resulting share of the dense FLOPs.
        asked: the requested share of the FLOPs, which whole tokens may not reach exactly; None: none was requested.
    """

    ratio: float
    flops: float
    asked: float | None = None

    @property
    def budget(self) -> float:
        """The share of the FLOPs for methods that do not drop tokens."""
        return self.flops if self.asked is None else self.asked


# (method, model, level, layers to prune after or None for the default ones) -> the stages with which the method reaches
# the level without a search; InputError: it cannot save that much.
StageRule = Callable[["Method", TokenModel, Level, Sequence[int] | None], tuple[Stage, ...]]


def prune_alike(method: Method, model: TokenModel, level: Level, stages: Sequence[int] | None) -> tuple[Stage, ...]:
    """Return stages that remove the level's ratio at each of the layers, more if selecting tokens costs FLOPs."""
    after = tuple(stages or model.default_stages())

    def stages_with(ratio: float) -> tuple[Stage, ...]:
        return tuple(Stage(layer, ratio, method.importance, method.merge) for layer in after)

    if level.ratio == 0 or remaining_share(model, stages_with(level.ratio)) <= level.flops:
        return stages_with(level.ratio)
    # Selecting and merging cost FLOPs: fewer tokens compensate for them, so that no row exceeds the level.
    return stages_with(ratio_for_budget(level.flops, lambda ratio: remaining_share(model, stages_with(ratio))))


def remove_steadily(make: Callable[[Method, TokenModel, int], Sequence[Stage]]) -> StageRule:
    """Return a rule by which every stage removes the same number of tokens, the smallest that meets the FLOPs.

    The requested stages are ignored.

    Args:
        make: (method, model, number) -> stages that remove this number of tokens each, or fewer if they cannot.
    """

    def find(method: Method, model: TokenModel, level: Level, stages: Sequence[int] | None) -> tuple[Stage, ...]:
        if level.ratio == 0:
            return tuple(replace(stage, ratio=0.0) for stage in make(method, model, 1))
        for number in range(1, model.length):
            found = tuple(make(method, model, number))
            if found and remaining_share(model, found) <= level.flops:
                return found
        raise InputError(f"{method.name} cannot reach {level.flops:.1%}: a stage merges half of its tokens at most")

    return find


def merge_every_second(method: Method, model: TokenModel, number: int) -> list[Stage]:
    """Return the stages of R-MeeTo, which merges before every second layer from the third on, as in its code.

    It does not merge before the first layer of a section, since all tokens are restored there.
    """
    merges, count, protected = [], model.length, model.protected_count
    for layer in range(2, len(model.blocks), 2):
        if model.starts_section(layer + 1):
            continue
        section = model.section_of(layer)
        count = section.length if not merges or merges[-1].after < section.first else count
        ratio = share_removed(count, count - min(number, (count - protected) // 2), protected)
        merges.append(Stage(layer, ratio, method.importance, method.merge))
        count = kept_count(count, ratio, protected)
    return merges


def merge_every_layer(method: Method, model: TokenModel, number: int) -> Sequence[Stage]:
    """Return the stages of ToMe, which merges in every layer."""
    return tome_stages(len(model.blocks), model.length, model.protected_count, number)


@dataclass(frozen=True)
class Method:
    """A way to make the model cheaper.

    Attributes:
        importance: the metric that ranks tokens. alignment: as in a plan. merge: as in a stage.
        stages: the rule by which a level becomes stages.
        searched: whether the plan comes from a search for the level's FLOPs. reconstructed: whether later layers are
            refitted; for a smaller image, whether the classifier is.
        axis: what is trimmed instead of tokens, as for `compare_axes.AxisModels.build`; None: tokens, by a plan.
        mapped: whether the output levels of a segmentation model are mapped to the dense ones.
        fill: how the output of a dropped token is filled, as in a plan. Both are only for models with output levels.
    """

    name: str
    importance: str = "clip"
    alignment: Alignment = ALIGNED
    merge: str | None = None
    stages: StageRule = prune_alike
    searched: bool = False
    reconstructed: bool = False
    axis: str | None = None
    mapped: bool = False
    fill: str = "stale"

    @property
    def of_levels(self) -> bool:
        """Whether it is only for models with output levels."""
        return self.mapped or self.fill != "stale"

    @property
    def group(self) -> str:
        """The kind of the method: DROPPED, MERGED, SEARCHED, TRIMMED or SMALLER."""
        if self.axis is not None and not self.searched:
            return SMALLER if self.axis == IMAGE else TRIMMED
        return SEARCHED if self.searched else MERGED if self.merge is not None else DROPPED

    def steps(self, plan: Plan) -> Sequence[Step]:
        """Return the steps that apply a plan with this method."""
        refit = Reconstruct() if self.reconstructed else None
        return pruning_steps(replace(plan, fill=self.fill), refit, self.mapped)


def _methods() -> tuple[Method, ...]:
    """Return all methods. `naive` is pruning as in EViT (arXiv 2202.07800), by the score of ToP-ViM.

    EViT itself and ToMe are for models with attention; ToMe's alignment is its proportional attention.
    """
    rows = [Method("naive", alignment=UNALIGNED)]
    for importance in ("random", "l1", "l2", "mean", "delta", "saliency"):
        name = "unclipped" if importance == "mean" else importance
        rows += [Method(name, importance, UNALIGNED), Method(f"{name}, aligned", importance)]
    rows += [
        Method("clip, conv aligned", alignment=Alignment(True, False)),
        Method("clip, scan aligned", alignment=Alignment(False, True)),
        Method("clip, aligned"),
        Method("R-MeeTo", "similarity", UNALIGNED, "ordered", remove_steadily(merge_every_second)),
        Method("MTR", "delta", UNALIGNED, "grouped"),
        Method("EViT", "attention", UNALIGNED),
        Method("EViT, fused", "attention", UNALIGNED, "fused"),
        Method("ToMe", "keys", ALIGNED, "bipartite", remove_steadily(merge_every_layer)),
        Method("search", searched=True),
    ]
    rows += [
        Method("zero-filled", alignment=UNALIGNED, fill="zero"),
        Method("naive, mapped", alignment=UNALIGNED, mapped=True),
        Method("clip, aligned, mapped", mapped=True),
        Method("saliency, aligned, mapped", "saliency", mapped=True),
    ]
    again = ("naive", "clip, aligned", "saliency, aligned", "R-MeeTo", "MTR", "EViT", "EViT, fused", "ToMe", "search")
    rows += [replace(m, name=f"{m.name}, reconstructed", reconstructed=True) for m in rows if m.name in again]
    rows += [
        Method(f"{axis}, reconstructed", reconstructed=True, axis=axis) for axis in ("states", "channels", "layers")
    ]
    rows += [
        Method("all axes", searched=True, reconstructed=True, axis=ALL),
        Method("smaller image", axis=IMAGE),
        Method("smaller image, reconstructed", axis=IMAGE, reconstructed=True),
    ]
    return tuple(rows)


METHODS = _methods()
NAMES = tuple(method.name for method in METHODS)


def choose_methods(
    model: TokenModel, names: Sequence[str] | None, *, search: bool = False, reconstruct: bool = False
) -> tuple[Method, ...]:
    """Return the methods with these names, in the order of `METHODS`.

    Args:
        names: None: all that the model supports.
        search, reconstruct: whether "all" includes methods with a search or a reconstruction; those that trim states,
            channels or layers are included if both are true.

    Raises:
        InputError: an unknown name, or a method that the model does not support.
    """
    check_names(names)
    if names is None:
        asked = (m for m in METHODS if _is_asked_for(m, search, reconstruct))
        return tuple(m for m in asked if find_obstacle(m, model) is None)
    chosen = tuple(method for method in METHODS if method.name in names)
    for method in chosen:
        if (obstacle := find_obstacle(method, model)) is not None:
            raise InputError(f"method {method.name!r} {obstacle}")
    return chosen


def check_names(names: Sequence[str] | None) -> None:
    """Raise an InputError if a name is not that of a method."""
    for name in names or ():
        if name not in NAMES:
            raise InputError(f"unknown method {name!r}{suggest(name, NAMES) or '; docs/compare.md lists them all'}")


def list_obstacles(model: TokenModel, names: Sequence[str]) -> dict[str, str]:
    """Return the methods with these names that a model does not support, each with the reason."""
    found = {method.name: find_obstacle(method, model) for method in METHODS if method.name in names}
    return {name: obstacle for name, obstacle in found.items() if obstacle is not None}


def find_obstacle(method: Method, model: TokenModel) -> str | None:
    """Return why a model does not support a method, as the end of a sentence about the method; None: it does.

    This depends on what the layers of the model can do, not on the name of its architecture.
    """
    if method.axis == IMAGE:
        return "is only for classifiers" if model.reads_levels else None
    if method.of_levels and not model.levels:
        return "is only for segmentation models and models with several resolutions"
    if method.axis is not None:
        axes = list_axes(model)
        if axes and method.axis in (ALL, *axes):
            return None
        what = "states, channels or layers" if method.axis == ALL else method.axis
        return f"trims {what}, and this {model.architecture} has none that can be trimmed"
    if method.searched:
        return None  # a search only uses metrics that the model supports
    if method.importance not in model.importances:
        return f"ranks tokens by {method.importance!r}, which the layers of this {model.architecture} do not compute"
    aligns = method.alignment.conv or method.alignment.scan
    if aligns and method.merge is None and not all(isinstance(block, ScanBlock) for block in model.blocks):
        return f"aligns scans, and this {model.architecture} has layers without one"
    return None


def _is_asked_for(method: Method, search: bool, reconstruct: bool) -> bool:
    """Return whether "all" includes a method, with or without search and reconstruction."""
    if method.axis not in (None, IMAGE):
        return search and reconstruct
    return (search or not method.searched) and (reconstruct or not method.reconstructed)


def find_group(name: str) -> str:
    """Return the group of the method with this name; DROPPED if it does not exist (any more)."""
    return next((method.group for method in METHODS if method.name == name), DROPPED)


def is_reconstructed(name: str) -> bool:
    """Return whether the method with this name refits later layers."""
    return any(method.reconstructed for method in METHODS if method.name == name)


def make_levels(model: TokenModel, stages: Sequence[int] | None, ratios: Sequence[float]) -> list[Level]:
    """Return a level for each ratio, removed at each of the stages (None: the default ones)."""
    stages = tuple(stages or model.default_stages())
    result = []
    for ratio in ratios:
        plan = tuple(Stage(after, ratio) for after in stages)
        Plan(plan).validate(len(model.blocks), model.drops_inside)
        result.append(Level(ratio, remaining_share(model, plan)))
    return result


def ratio_for_flops(model: TokenModel, stages: Sequence[int] | None, budget: float) -> float:
    """Return the smallest ratio at each stage that leaves at most `budget` of the FLOPs."""
    return plan_for_budget(model, budget, stages).stages[0].ratio


def stages_for_level(
    method: Method, model: TokenModel, level: Level, stages: Sequence[int] | None
) -> tuple[Stage, ...]:
    """Return the stages with which a method reaches a level without a search; `stages`: layers, None: the default ones.

    Raises:
        InputError: the method cannot save that much.
    """
    return method.stages(method, model, level, stages)
