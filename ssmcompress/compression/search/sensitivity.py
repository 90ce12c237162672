"""Sensitivity: the loss of pruning after a single layer, for every layer, metric and number of kept tokens.

It is measured once on images; afterwards plans for any budget can be derived from it
(`ssmcompress.compression.search.propose`). For each chunk of images the dense model runs once and the tokens of each
layer are stored; for each stage only the layers after it are rerun.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ... import processes
from ...data.batches import LabelledBatch
from ...errors import NOT_FINITE, InputError
from ...files import read_text
from ...models.base import TokenModel
from ...models.fingerprint import fingerprint
from ...models.rewrite import install
from ...progress import track
from ...pruning.alignment import Alignment
from ...pruning.importance import IMPORTANCES
from ...pruning.plan import MAX_RATIO, Plan, Stage, kept_count, share_removed
from ...pruning.pruner import TokenPruner
from ...pruning.tokens import Tokens
from ..remember import hash_of, keeps_results, remembered
from .axes import Option
from .proxy_loss import Collector, average_losses, sum_losses

FORMAT_VERSION = 1
SENSITIVITY_FILE = "sensitivity.json"
# Candidate metrics. `mean`, `clip-paths` and `random` were best at none of layers 1 to 3 of the bundled Vim (60 % of
# the FLOPs, aligned, 1,024 images).
METRICS = ("clip", "l1", "l2", "delta", "saliency", "attention")
RATIOS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, MAX_RATIO)
OBJECTIVES = ("kl", "labels")
# Maximum number of candidate layers; in deeper models every second or third layer is a candidate.
MOST_LAYERS = 12


NO_DIGESTS = np.zeros(0, np.uint64)


@dataclass(frozen=True)
class Sensitivity:
    """Loss per layer, metric and number of kept tokens, each for a single stage with nothing else pruned.

    Attributes:
        model: {"weights", "depth", "length"} of the model it was measured on. data: {"name", "images"}.
        objective: "kl", mean KL(dense || pruned) in nats per image, or "labels", the cross entropy in excess of the
            dense model's. refit: whether the classifier was refitted for it.
        alignment, gap: as in a plan.
        layers: candidate layers (1-based) for a stage. metrics: importance metrics. kept: token counts, decreasing.
        loss: (layers, metrics, kept) float64.
        digests: digests of the images that the search saw (`ssmcompress.data.content`), ascending; None: unknown.
        axes: losses of trimming the other axes alone (`ssmcompress.compression.search.axes`). Then losses of tokens,
            and layers, metrics and counts, may be empty.
    """

    model: dict[str, Any]
    data: dict[str, Any]
    objective: str
    refit: bool
    alignment: Alignment
    gap: str
    layers: tuple[int, ...]
    metrics: tuple[str, ...]
    kept: tuple[int, ...]
    loss: Tensor = field(repr=False)
    digests: np.ndarray | None = None
    axes: tuple[Option, ...] = ()

    @classmethod
    def empty(
        cls, model: dict[str, Any], data: dict[str, Any], objective: str, refit: bool, alignment: Alignment, gap: str
    ) -> Sensitivity:
        """Return a sensitivity without token losses."""
        nothing = torch.zeros(0, 0, 0, dtype=torch.float64)
        return cls(model, data, objective, refit, alignment, gap, (), (), (), nothing, NO_DIGESTS)

    def seen(self, digests: np.ndarray) -> Sensitivity:
        """Return the same sensitivity with the digests of further images added."""
        return replace(self, digests=None if self.digests is None else np.union1d(self.digests, digests))

    def to_json(self) -> str:
        """Return the content of a sensitivity file."""
        value = {
            "format_version": FORMAT_VERSION,
            "model": self.model,
            "data": self.data,
            "objective": self.objective,
            "refit": self.refit,
            "alignment": {"conv": self.alignment.conv, "scan": self.alignment.scan},
            "gap": self.gap,
            "layers": self.layers,
            "metrics": self.metrics,
            "kept": self.kept,
            "loss": [[[round(v, 7) for v in row] for row in table] for table in self.loss.tolist()],
            "digests": None if self.digests is None else [f"{v:016x}" for v in self.digests.tolist()],
        }
        if self.axes:
            value["axes"] = [option.to_dict() for option in self.axes]
        return json.dumps(value) + "\n"

    @classmethod
    def read(cls, file: str | Path) -> Sensitivity:
        """Read a sensitivity file, or the one in a folder; InputError for any other content."""
        path = Path(file)
        path = path / SENSITIVITY_FILE if path.is_dir() else path
        try:
            value = json.loads(read_text(path))
            if value["format_version"] > FORMAT_VERSION:
                raise InputError("a sensitivity of a newer version of ssmcompress: upgrade it")
            sensitivity = cls(
                model={k: value["model"][k] for k in ("depth", "length")} | {"weights": value["model"].get("weights")},
                data={"name": str(value["data"]["name"]), "images": int(value["data"]["images"])},
                objective=value["objective"],
                refit=bool(value["refit"]),
                alignment=Alignment(bool(value["alignment"]["conv"]), bool(value["alignment"]["scan"])),
                gap=value["gap"],
                layers=tuple(int(v) for v in value["layers"]),
                metrics=tuple(str(v) for v in value["metrics"]),
                kept=tuple(int(v) for v in value["kept"]),
                loss=_parse_losses(value["loss"]),
                digests=_parse_digests(value.get("digests")),
                axes=tuple(map(Option.from_dict, value.get("axes", ()))),
            )
            sensitivity._check()
        except OSError as error:
            raise InputError(f"cannot read {path}: {error.strerror}") from error
        except InputError as error:
            raise InputError(f"{path}: {error}") from error
        except (KeyError, TypeError, ValueError, AttributeError, RecursionError, OverflowError) as error:
            raise InputError(f"{path}: not a sensitivity of ssmcompress ({type(error).__name__} {error})") from error
        return sensitivity

    def _check(self) -> None:
        """Raise a ValueError if the fields are inconsistent."""
        depth, length = self.model["depth"], self.model["length"]
        sizes = (len(self.layers), len(self.metrics), len(self.kept))
        if tuple(self.loss.shape) != sizes or not (self.loss.numel() or (self.axes and not any(sizes))):
            raise ValueError(f"losses {tuple(self.loss.shape)} for its layers, metrics and counts")
        if not self.loss.isfinite().all() or self.objective not in OBJECTIVES:
            raise ValueError("losses that are not finite, or of an unknown objective")
        if list(self.layers) != sorted(set(self.layers)) or not all(1 <= v <= depth for v in self.layers):
            raise ValueError(f"layers {self.layers}")
        if list(self.kept) != sorted(set(self.kept), reverse=True) or not all(2 <= v <= length for v in self.kept):
            raise ValueError(f"counts {self.kept}")
        if wrong := [option for option in self.axes if option.trims.axes != (option.axis,)]:
            raise ValueError(f"an option of the axis {wrong[0].axis} that trims {wrong[0].trims.to_dict()}")

    def select(self, layers: Sequence[int] | None, metrics: Sequence[str] | None) -> Sensitivity:
        """Select some of the layers and metrics; None or an empty sequence selects all."""
        for what, selected, measured in (("layer", layers, self.layers), ("importance", metrics, self.metrics)):
            if selected and (missing := [v for v in selected if v not in measured]):
                raise InputError(
                    f"the sensitivity has no {what} {missing[0]}: it was measured for {', '.join(map(str, measured))}"
                )
        rows = [i for i, layer in enumerate(self.layers) if not layers or layer in layers]
        columns = [i for i, metric in enumerate(self.metrics) if not metrics or metric in metrics]
        return replace(
            self,
            layers=tuple(self.layers[i] for i in rows),
            metrics=tuple(self.metrics[i] for i in columns),
            loss=self.loss[rows][:, columns],
        )

    def check_model(self, model: TokenModel) -> None:
        """Raise an InputError if the sensitivity was measured on another model."""
        ours = identify(model)
        if ours != self.model:
            key = next(k for k in ours if ours[k] != self.model[k])
            what = f"on another model ({key} {self.model[key]}, this one has {ours[key]})"
            if key == "weights":
                what = "with other weights, another image size or other preprocessing"
                if self.model[key] is None:
                    what = "by an older version of ssmcompress, which did not record the weights"
            raise InputError(f"the sensitivity was measured {what}: leave it out to measure again")
        for option in self.axes:
            try:
                option.trims.apply_to(model.config)
            except InputError as error:
                raise InputError(f"the sensitivity has an option that this model cannot have: {error}") from error


def identify(model: TokenModel) -> dict[str, Any]:
    """Return what identifies the model of a sensitivity, as a JSON value."""
    return {"depth": len(model.blocks), "length": model.length, "weights": fingerprint(model)}


def _parse_losses(value: Any) -> Tensor:
    losses = torch.tensor(value, dtype=torch.float64)
    return losses if losses.numel() else losses.reshape(0, 0, 0)


def _parse_digests(value: Any) -> np.ndarray | None:
    if value is None:
        return None
    if not isinstance(value, list):
        raise TypeError("digests that are not a list")
    return np.unique(np.array([int(v, 16) for v in value], np.uint64))


def candidate_layers(depth: int) -> tuple[int, ...]:
    """Return the layers after which a model of `depth` layers may be pruned, at most 12."""
    step = max(1, -(-(depth - 1) // MOST_LAYERS))
    return tuple(range(1, depth, step))


class _StageRuns:
    """Runs single stages on successive chunks of images.

    Args:
        work: the model, without pruners. collector: collects its outputs. plan: has the seed and probes. kept: token
            counts.
    """

    def __init__(self, work: TokenModel, collector: Collector, plan: Plan, kept: Sequence[int]):
        self.work, self.collector, self.plan, self.kept = work, collector, plan, kept

    def start(self, images: Tensor) -> None:
        """Start with a new chunk (images, C, H, W)."""
        self.images = images
        # The dense model's tokens before each layer and, for each layer (1-based), at its stage.
        self.befores: list[Tokens] = []
        self.states: list[Tokens | None] = []

    def run_dense(self) -> Tensor:
        """Return the dense logits of the chunk, and store its tokens."""
        work = self.work
        self.befores, self.states, after = [], [None], work.embed(self.images)
        for number in range(1, len(work.blocks) + 1):
            self.befores.append(work.enter(number, after))
            self.states.append(work.begin(number, self.befores[-1])[0])
            after = work.end(number, self.states[-1])
        dense = work.readout(after).cpu()
        self.collector.take()
        return dense

    def run_stages(self, layer: int, metric: str, dense: Tensor, targets: Tensor | None) -> list[Tensor]:
        """Return the collected values with a stage after a layer, for each token count.

        Args:
            dense: dense logits of the chunk. targets: its labels, or None.
        """
        if not self.states:
            self.run_dense()
        work, found = self.work, []
        probe = self.plan.probe(layer) if IMPORTANCES[metric].probe else None
        length = work.section_of(layer).length
        for k, count in enumerate(self.kept):
            ratio = share_removed(work.length, count, work.protected_count)
            pruner = TokenPruner(ratio, metric, length, self.plan.seed, probe).to(self.images.device)
            if not k:
                tokens = self.states[layer]
                if pruner.block_metric is not None:
                    tokens = work.blocks[layer - 1](self.befores[layer - 1], pruner.block_metric, part="begin")
                    tokens = work.observe(layer, tokens)
            pruned = work.end(layer, pruner(tokens))
            for number in range(layer + 1, len(work.blocks) + 1):
                pruned, _ = work.step(number, work.enter(number, pruned))
            work.readout(pruned)
            found.append(self.collector.take(dense, targets))
        return found


@torch.no_grad()
def measure_sensitivity(
    model: TokenModel,
    data: LabelledBatch,
    *,
    plan: Plan,
    layers: Sequence[int],
    metrics: Sequence[str] = METRICS,
    refit: bool = True,
    name: str = "images",
    distributed: bool = False,
) -> Sensitivity:
    """Measure the loss of each single stage on prepared images, preferably images not used for fitting.

    Args:
        model: the dense model.
        data: images (count, C, H, W) and labels (count,) to compare with; no labels: the dense model's outputs.
        plan: its alignment, gap and seed are used, and its calibration's probes if "saliency" is among the metrics.
        layers, metrics: the layers and metrics to measure.
        refit: whether to refit the classifier first, recommended for a model that will be reconstructed
            (`ssmcompress.compression.search.proxy_loss`).
        name: name of the images.
        distributed: every process of the default group makes this call, each with its own images.

    Raises:
        InputError: there are no images, or values are not finite.
    """
    images, labels = data
    length, device = model.length, next(model.parameters()).device
    counts = dict.fromkeys(kept_count(length, ratio, model.protected_count) for ratio in RATIOS)
    kept = tuple(count for count in counts if count < length)
    # Installing and removing a stage that drops nothing sets the delta of dropped tokens in every later layer.
    work = install(copy.deepcopy(model), replace(plan, stages=(Stage(1, 0.0, "random"),)))
    work.pruners.clear()
    order = [(i, j, k) for i in range(len(layers)) for j in range(len(metrics)) for k in range(len(kept))]
    cells: dict[tuple[int, int, int], list[Tensor]] = {cell: [] for cell in order}
    logits: list[Tensor] = []
    size = model.chunk_size()
    starts = range(0, len(images), size)
    steps = [(start, row, column) for start in starts for row in range(len(layers)) for column in range(len(metrics))]
    calibration = plan.calibration
    statistics = (*calibration.gap_deltas, *calibration.probes) if calibration is not None else ()
    about = (plan.alignment, plan.gap, plan.seed, *statistics)
    run = hash_of("sensitivity", fingerprint(model), images, labels, about) if keeps_results() else ""
    with Collector(work) as collector:
        runs = _StageRuns(work, collector, plan, kept)
        for start, row, column in track(steps, "measuring sensitivity", len(steps)):
            if (row, column) == (0, 0):
                runs.start(images[start : start + size].to(device))
                logits.append(remembered(partial(hash_of, run, start), runs.run_dense))
                if not logits[-1].isfinite().all():
                    raise InputError(NOT_FINITE)
            chosen, targets = (layers[row], metrics[column]), None if labels is None else labels[start : start + size]
            compute = partial(runs.run_stages, *chosen, logits[-1], targets)
            for k, part in enumerate(remembered(partial(hash_of, run, start, *chosen, kept), compute)):
                cells[row, column, k].append(part)
    add = partial(processes.all_reduce_sum, device=device) if distributed else None
    dense = torch.cat(logits)
    totals = [
        sum_losses(work.classifier, torch.cat(parts), dense, labels, refit=refit, add=add) for parts in cells.values()
    ]
    loss = average_losses(totals, len(images), add).view(len(layers), len(metrics), len(kept))
    if not loss.isfinite().all():
        raise InputError(NOT_FINITE)
    source = {"name": name, "images": len(images)}
    objective = "kl" if labels is None else "labels"
    return Sensitivity(
        identify(model), source, objective, refit, plan.alignment, plan.gap, tuple(layers), tuple(metrics), kept, loss
    )
