"""Options of the budget and the pruning method."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from ..options import BUDGET, PRUNING, option
from ..values import IMPORTANCE_NAMES, GapSource, parse_merge, parse_numbers, parse_ratios, parse_share

if TYPE_CHECKING:
    from ...jobs.requests import PlanRequest


@dataclass(frozen=True)
class Budget:
    """How much to prune."""

    ratio: Annotated[
        str | None,
        option(BUDGET, help="Share of tokens REMOVED at each stage, or one per stage: 30%, 0.3, 20%,30%. Default 0.3."),
    ] = None
    flops: Annotated[
        str | None, option(BUDGET, help="Share of the FLOPs to KEEP, 60%; searches for the plan that loses least.")
    ] = None
    flops_backbone: Annotated[
        str | None, option(BUDGET, help="Segmentation: share of the backbone's FLOPs to KEEP; neck and head are fixed.")
    ] = None
    latency: Annotated[
        str | None,
        option(BUDGET, help="Share of the latency to KEEP at batch 1, 60%, timed here; also searches for the plan."),
    ] = None
    max_drop: Annotated[
        float | None,
        option(
            BUDGET,
            help="Points of accuracy (of agreement without labels) that may be LOST; saves as much as possible.",
        ),
    ] = None
    axes: Annotated[
        str | None,
        option(BUDGET, help="What a search may trim: states,channels,layers,tokens. Default: all that the model has."),
    ] = None
    search: Annotated[
        bool,
        option(BUDGET, "--search/--no-search", help="With --no-search, --flops prunes all stages alike by one metric."),
    ] = True
    sensitivity: Annotated[
        str | None,
        option(BUDGET, help="sensitivity.json of an earlier search, or its folder; reused instead of measured again."),
    ] = None
    search_images: Annotated[int, option(BUDGET, min=1, help="Images to search on, at most half of --samples.")] = 512
    by_labels: Annotated[
        bool, option(BUDGET, "--by-labels", help="Search by labels instead of the dense model's outputs.")
    ] = False


@dataclass(frozen=True)
class Stages:
    """Where to prune."""

    stages: Annotated[
        str | None,
        option(
            PRUNING,
            help="Layers (from 1) after which to prune; in a ViT or a VMamba, in which. Default: 5,10,15 of 24; in a "
            "ViT 4,7,10 of 12; scaled to the depth; in a VMamba some of each section.",
        ),
    ] = None
    gap: Annotated[
        GapSource | None,
        option(PRUNING, help="Step size of pruned tokens. Default: calibrated where data is given, else bias."),
    ] = None


def complete_importance(incomplete: str) -> list[str]:
    """Return the metrics whose names start with this text, for shell completion."""
    return [name for name in IMPORTANCE_NAMES if name.startswith(incomplete)]


@dataclass(frozen=True)
class Pruning(Stages):
    """What to prune, and how."""

    importance: Annotated[
        str | None,
        option(
            PRUNING,
            metavar="METRIC",
            autocompletion=complete_importance,
            help=f"Metric to rank tokens by: {', '.join(IMPORTANCE_NAMES)}. Default: clip; for a ViT, attention.",
        ),
    ] = None
    fuse: Annotated[
        bool, option(PRUNING, "--fuse", help="ViT: fuse removed tokens into one by their attention, as in EViT.")
    ] = False
    merge: Annotated[
        str | None,
        option(PRUNING, help="ViT: tokens merged in EVERY layer, as in ToMe: 8; or 8,-1: from twice as many to none."),
    ] = None
    align: Annotated[
        bool | None,
        option(PRUNING, "--align/--no-align", help="Align conv and scan to pruned tokens. Default: align."),
    ] = None
    reconstruct: Annotated[
        bool | None,
        option(
            PRUNING,
            "--reconstruct/--no-reconstruct",
            help="Refit later layers to the dense model, without training. Default: on if data is given.",
        ),
    ] = None
    reenter: Annotated[
        int,
        option(PRUNING, min=0, help="Segmentation: number of last layers that process all tokens again."),
    ] = 0
    plan: Annotated[
        str | None,
        option(PRUNING, help="Plan to use: a pruned model's folder, file or report, or the JSON of --dry-run --json."),
    ] = None

    def plan_request(self, budget: Budget) -> PlanRequest:
        """Return the plan requested by the options of both groups."""
        from ...jobs.requests import PlanRequest

        return PlanRequest(
            ratio=parse_ratios(budget.ratio),
            flops=parse_share(budget.flops, "--flops", "the share to keep"),
            flops_backbone=parse_share(budget.flops_backbone, "--flops-backbone", "the share to keep"),
            latency=parse_share(budget.latency, "--latency", "the share to keep"),
            max_drop=budget.max_drop,
            axes=None
            if budget.axes is None
            else tuple(part.strip() for part in budget.axes.split(",") if part.strip()),
            file=self.plan,
            search=budget.search,
            stages=parse_numbers(self.stages, "--stages", int),
            importance=self.importance,
            align=self.align,
            fuse=self.fuse,
            merge=parse_merge(self.merge),
            reenter=self.reenter,
            sensitivity=budget.sensitivity,
            by_labels=budget.by_labels,
            search_images=budget.search_images,
        )
