"""The images of a search, and the plans and models evaluated on them."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .. import processes
from ..compression.calibrate import gap_deltas
from ..compression.remember import hash_of, keeps_results, remembered
from ..compression.saliency import fit_probes
from ..compression.search.axes import run
from ..compression.search.propose import Candidate
from ..compression.search.proxy_loss import Collector, average_losses, sum_losses
from ..data.batches import Batches, sample_indices
from ..errors import InputError
from ..evaluation.flops import remaining_share
from ..evaluation.latency import latency
from ..models.base import TokenModel
from ..models.blocks import ScanBlock
from ..models.fingerprint import fingerprint
from ..models.rewrite import prune
from ..progress import track
from ..pruning.alignment import UNALIGNED, Alignment
from ..pruning.plan import Calibration, Plan, Stage
from .images import CalibrationImages
from .requests import SEARCH_IMAGES, DataOptions

REPEATS = 31
# Alignments that a search chooses from. On the bundled model at 60 % of the FLOPs, the convolution alone left a KL of
# 0.061 after reconstruction, and both ops 0.066; on a smaller Vim the convolution alone left 0.066, and both 0.063. The
# order was the same before reconstruction.
ALIGNMENTS = (Alignment(True, True), Alignment(True, False), Alignment(False, True), UNALIGNED)


@dataclass(frozen=True)
class SearchRequest:
    """The request of a search.

    Attributes:
        flops, latency: share of the dense model's to keep; at most one of them.
        stages, importance: the layers and the metric to choose from; None: all.
        alignment: as in a plan. choose_alignment: whether to select the best of all alignments for the best plan.
        labels: use labels, not the dense model's outputs.
        sensitivity: file measured earlier, or None. images: maximum number of images to measure on.
        axes: what may be trimmed, among "states", "channels", "layers" and "tokens".
        max_drop: maximum loss in percentage points, instead of `flops` and `latency`; with axes other than tokens.
    """

    flops: float | None = None
    latency: float | None = None
    stages: tuple[int, ...] | None = None
    importance: str | None = None
    alignment: Alignment = Alignment()
    choose_alignment: bool = False
    labels: bool = False
    sensitivity: str | None = None
    images: int = SEARCH_IMAGES
    axes: tuple[str, ...] = ("tokens",)
    max_drop: float | None = None


class Trial:
    """The images of a search, and plans run on them."""

    def __init__(
        self,
        model: TokenModel,
        request: SearchRequest,
        images: CalibrationImages,
        data: DataOptions,
        *,
        gap: str,
        refit: bool,
    ):
        self.model, self.seed, self.request, self.refit = model, data.seed, request, refit
        self.several = processes.count() > 1
        for name, value in (("a latency", request.latency), ("a loss (`max_drop`)", request.max_drop)):
            if self.several and value is not None:
                raise InputError(f"{name} is searched for in one process: start ssmcompress without a launcher")
        if images.count < processes.count():
            raise InputError(f"{images.count} images to search on in {processes.count()} processes: expected one each")
        self.name = images.source.name
        if request.labels and not images.source.labelled:
            raise InputError(f"{self.name} has no labels to judge by")
        index = images.calibration.index
        chosen = sample_indices(len(index), min(len(index), 2 * request.images), data.seed)[0]
        self.read = replace(images.calibration, index=[index[i] for i in chosen], unreadable=set())
        pictures, labels = read_all(self.read)
        measured = slice(0, None, 2)
        self.images = pictures[measured][: request.images]
        self.all_labels = None if labels is None else labels[measured][: request.images]
        self.labels = self.all_labels if request.labels else None
        self.others = pictures[1::2] if len(pictures) > 1 else pictures
        self.gap = gap if request.alignment.scan else "bias"
        self.dense: Tensor | None = None
        self.device = next(model.parameters()).device
        # Hash of everything that determines losses on these images, apart from the plan.
        values = self.images, self.labels, self.others, self.gap, self.seed, self.refit, self.request.alignment
        self.key = hash_of(fingerprint(model), *values) if keeps_results() else ""

    def fit(self, layers: Sequence[int]) -> Plan:
        """Return a plan without stages, calibrated on the images that are not used for measuring."""
        model = self.model
        deltas = gap_deltas(model, self.others, self.gap, self.several)
        probes = fit_probes(model, self.others, layers, distributed=self.several) if layers else ()
        calibration = Calibration(self.name, len(self.others), deltas, probes=probes)
        return Plan((), self.request.alignment, self.gap, self.seed, calibration)

    def loss(self, plan: Plan) -> float:
        """Return the mean loss of a plan, measured by running it."""

        def key() -> str:
            calibration = plan.calibration
            statistics = (*calibration.gap_deltas, *calibration.probes) if calibration is not None else ()
            about = plan.stages, plan.alignment, plan.gap, plan.seed, plan.reenter, plan.fill
            return hash_of("plan", self.key, *about, *statistics)

        return remembered(key, lambda: self._loss(plan))

    @torch.no_grad()
    def _loss(self, plan: Plan) -> float:
        if self.dense is None:
            self.dense = run(self.model, self.images)
        pruned = prune(self.model, plan)
        with Collector(pruned) as collector:
            run(pruned, self.images)
        add = functools.partial(processes.all_reduce_sum, device=self.device) if self.several else None
        collected = collector.take(self.dense, self.labels)
        total = sum_losses(pruned.classifier, collected, self.dense, self.labels, refit=self.refit, add=add)
        return float(average_losses([total], len(self.images), add)[0])

    def run(
        self, proposed: Sequence[Candidate], plan: Plan, metrics: Sequence[str], budget: float
    ) -> list[dict[str, Any]]:
        """Return the plans with their measured loss, best first: the proposed ones, then other metrics for the best."""
        results: dict[tuple[Stage, ...], dict[str, Any]] = {}

        def try_plan(stages: tuple[Stage, ...], expected: float | None) -> None:
            if stages not in results and remaining_share(self.model, stages) <= budget:
                results[stages] = {
                    "stages": [stage.to_dict() for stage in stages],
                    "loss": round(self.loss(replace(plan, stages=stages)), 6),
                    "expected": None if expected is None else round(expected, 6),
                    "flops": round(remaining_share(self.model, stages), 6),
                }

        def best() -> tuple[Stage, ...]:
            return min(results, key=lambda stages: results[stages]["loss"])

        for candidate in track(proposed, "running the best plans", len(proposed)):
            try_plan(candidate.stages, candidate.expected)
        if not results:
            return []
        for index in range(len(best())):
            stages = best()
            for metric in metrics:
                changed = list(stages)
                if index < len(changed):
                    changed[index] = replace(changed[index], importance=metric)
                    try_plan(tuple(changed), None)
        return sorted(results.values(), key=lambda value: value["loss"])

    def choose_alignment(self, plan: Plan) -> tuple[Alignment, list[dict[str, Any]]]:
        """Return the alignment with the smallest loss for a plan, and the losses of all as a JSON value."""
        scans = any(isinstance(block, ScanBlock) for block in self.model.blocks)
        if not self.request.choose_alignment or not plan.stages or not scans:
            return self.request.alignment, []
        losses = [(self.loss(replace(plan, alignment=alignment)), alignment) for alignment in ALIGNMENTS]
        best = min(losses, key=lambda pair: pair[0])[1]
        return best, [{"conv": a.conv, "scan": a.scan, "loss": round(loss, 6)} for loss, a in losses]

    def latency_share(self, plan: Plan) -> float:
        """Return the latency of a plan's model over the dense one's at batch size 1, medians of interleaved runs."""
        models = {"dense": self.model, "pruned": prune(self.model, plan)}
        times = latency(models, self.images[:1].to(self.device), REPEATS)
        return times["pruned"] / times["dense"]


def read_all(batches: Batches) -> tuple[Tensor, Tensor | None]:
    """Return all images, prepared, and their labels."""
    read = list(batches)
    labels = None if read[0].labels is None else torch.cat([batch.labels for batch in read])
    return torch.cat([batch.images for batch in read]), labels
