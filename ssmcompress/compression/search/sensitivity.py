"""Sensitivity: what pruning at one place alone costs, for every layer, metric and number of tokens kept.

Measured once, on images; any budget can be planned with it afterwards (`ssmcompress.compression.search.propose`). For every block
of images the dense model runs once and leaves each layer's tokens; from there only the layers behind a stage are run.
"""

from __future__ import annotations

import copy
import functools
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ... import processes
from ...errors import NOT_FINITE, InputError
from ...models.base import TokenModel
from ...models.rewrite import install
from ...progress import track
from ...pruning.alignment import Alignment
from ...pruning.plan import LEAST_KEPT, Plan, Stage, kept_count, share_removed
from ...pruning.pruner import TokenPruner
from .proxy_loss import Collector, mean_losses, total_loss

FORMAT_VERSION = 1
SENSITIVITY_FILE = "sensitivity.json"
# Metrics worth choosing from. `mean`, `clip-paths` and `random` came first at none of layers 1 to 3 of the bundled Vim
# (60 % of the FLOPs, aligned, 1,024 images).
METRICS = ("clip", "l1", "l2", "delta", "saliency")
RATIOS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, LEAST_KEPT)
OBJECTIVES = ("kl", "labels")
# Candidates at most; of deeper models every second layer is one, or every third.
MOST_LAYERS = 12


@dataclass(frozen=True)
class Sensitivity:
    """Loss per layer, metric and count of kept tokens, each for a single stage and nothing else pruned.

    Attributes:
        model: {"sha256", "depth", "length"} of what it was measured on. data: {"name", "images"}.
        objective: "kl", mean KL(dense || pruned) in nats an image, or "labels", their cross entropy above the dense
            model's. refit: whether the classifier was refitted for it.
        alignment, gap: as in a plan.
        layers: candidates for a stage, from 1. metrics: of importance. kept: counts of tokens, falling.
        loss: (layers, metrics, kept) float64.
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
    loss: Tensor

    def to_json(self) -> str:
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
        }
        return json.dumps(value) + "\n"

    @classmethod
    def read(cls, file: str | Path) -> Sensitivity:
        """What `to_json` wrote; an InputError for anything else."""
        path = Path(file)
        path = path / SENSITIVITY_FILE if path.is_dir() else path
        try:
            value = json.loads(path.read_text(encoding="utf-8"))
            if value["format_version"] > FORMAT_VERSION:
                raise InputError(f"{path}: a sensitivity of a newer version of ssmcompress: upgrade it")
            found = cls(
                model={k: value["model"][k] for k in ("sha256", "depth", "length")},
                data={"name": str(value["data"]["name"]), "images": int(value["data"]["images"])},
                objective=value["objective"],
                refit=bool(value["refit"]),
                alignment=Alignment(bool(value["alignment"]["conv"]), bool(value["alignment"]["scan"])),
                gap=value["gap"],
                layers=tuple(int(v) for v in value["layers"]),
                metrics=tuple(str(v) for v in value["metrics"]),
                kept=tuple(int(v) for v in value["kept"]),
                loss=torch.tensor(value["loss"], dtype=torch.float64),
            )
            found._check()
        except OSError as error:
            raise InputError(f"cannot read {path}: {error.strerror}") from error
        except (KeyError, TypeError, ValueError, AttributeError, RecursionError, OverflowError) as error:
            if isinstance(error, InputError):
                raise
            raise InputError(f"{path}: not a sensitivity of ssmcompress ({type(error).__name__} {error})") from error
        return found

    def _check(self) -> None:
        depth, length = self.model["depth"], self.model["length"]
        if tuple(self.loss.shape) != (len(self.layers), len(self.metrics), len(self.kept)) or not self.loss.numel():
            raise ValueError(f"losses {tuple(self.loss.shape)} for its layers, metrics and counts")
        if not self.loss.isfinite().all() or self.objective not in OBJECTIVES:
            raise ValueError("losses that are not finite, or of an unknown objective")
        if list(self.layers) != sorted(set(self.layers)) or not all(1 <= v < depth for v in self.layers):
            raise ValueError(f"layers {self.layers}")
        if list(self.kept) != sorted(set(self.kept), reverse=True) or not all(2 <= v <= length for v in self.kept):
            raise ValueError(f"counts {self.kept}")

    def only(self, layers: Sequence[int] | None, metrics: Sequence[str] | None) -> Sensitivity:
        """This one for some of the layers and metrics."""
        for what, wanted, known in (("layer", layers, self.layers), ("importance", metrics, self.metrics)):
            if wanted and (missing := [v for v in wanted if v not in known]):
                raise InputError(
                    f"the sensitivity has no {what} {missing[0]}: it was measured for {', '.join(map(str, known))}"
                )
        rows = [i for i, layer in enumerate(self.layers) if not layers or layer in layers]
        columns = [i for i, metric in enumerate(self.metrics) if not metrics or metric in metrics]
        return replace(
            self,
            layers=tuple(self.layers[i] for i in rows),
            metrics=tuple(self.metrics[i] for i in columns),
            loss=self.loss[rows][:, columns],
        )

    def belongs_to(self, model: TokenModel) -> None:
        """An InputError if it was measured on another model."""
        ours = identity(model)
        if ours != self.model:
            wrong = next(k for k in ours if ours[k] != self.model[k])
            raise InputError(
                f"the sensitivity was measured on another model ({wrong} {self.model[wrong]}, this one has "
                f"{ours[wrong]}): leave it out to measure anew"
            )


def identity(model: TokenModel) -> dict[str, Any]:
    """What a sensitivity knows its model by."""
    sha = model.source.sha256 if model.source is not None else None
    return {"sha256": sha, "depth": len(model.blocks), "length": model.length}


def candidates(depth: int) -> tuple[int, ...]:
    """Layers after which a model of `depth` layers may be pruned, 12 of them at most."""
    step = max(1, -(-(depth - 1) // MOST_LAYERS))
    return tuple(range(1, depth, step))


@torch.no_grad()
def measure_sensitivity(
    model: TokenModel,
    images: Tensor,
    labels: Tensor | None = None,
    *,
    plan: Plan,
    layers: Sequence[int],
    metrics: Sequence[str] = METRICS,
    refit: bool = True,
    name: str = "images",
    distributed: bool = False,
) -> Sensitivity:
    """What each single stage costs on prepared images, best ones that nothing was fitted on.

    Args:
        model: dense. images: (count, C, H, W). labels: (count,) to judge by them; None: by the dense model's outputs.
        plan: its alignment, gap and seed, and a calibration with probes where "saliency" is among the metrics.
        layers, metrics: what to measure. refit: judge with the classifier refitted, as fits a model that is to be
            reconstructed (`ssmcompress.compression.search.proxy_loss`). name: what the images are called.
        distributed: every process of the default group makes this call, with images of its own.

    Raises:
        InputError: no images, or values that are not finite.
    """
    length, device = model.length, next(model.parameters()).device
    counts = dict.fromkeys(kept_count(length, ratio, model.protected is not None) for ratio in RATIOS)
    kept = tuple(count for count in counts if count < length)
    # A stage that drops nothing, taken out again: it leaves every later layer the delta of what will be gone.
    work = install(copy.deepcopy(model), replace(plan, stages=(Stage(1, 0.0),)))
    work.pruners.clear()
    order = [(i, j, k) for i in range(len(layers)) for j in range(len(metrics)) for k in range(len(kept))]
    cells: dict[tuple[int, int, int], list[Tensor]] = {cell: [] for cell in order}
    logits: list[Tensor] = []
    size = model.chunk_size()
    starts = range(0, len(images), size)
    steps = [(start, row, column) for start in starts for row in range(len(layers)) for column in range(len(metrics))]
    with Collector(work) as received:
        for start, row, column in track(steps, "measuring sensitivity", len(steps)):
            if (row, column) == (0, 0):
                part = slice(start, start + size)
                states = [work.embed(images[part].to(device))]
                for block in work.blocks:
                    states.append(block(states[-1]))
                logits.append(work.readout(states[-1]).cpu())
                received.take()
                if not logits[-1].isfinite().all():
                    raise InputError(NOT_FINITE)
            layer, metric = layers[row], metrics[column]
            probe = plan.probe(layer) if metric == "saliency" else None
            for k, count in enumerate(kept):
                ratio = share_removed(length, count, model.protected is not None)
                pruner = TokenPruner(ratio, metric, length, plan.seed, probe).to(device)
                if not k:
                    tokens = states[layer]
                    if pruner.asks_for is not None:
                        tokens = work.blocks[layer - 1](states[layer - 1], metric=pruner.asks_for)
                left = pruner(tokens)
                for block in work.blocks[layer:]:
                    left = block(left)
                work.readout(left)
                cells[row, column, k].append(received.take())
    add = functools.partial(processes.all_reduce_sum, device=device) if distributed else None
    dense = torch.cat(logits)
    totals = [
        total_loss(work.classifier, torch.cat(parts), dense, labels, refit=refit, add=add) for parts in cells.values()
    ]
    loss = mean_losses(totals, len(images), add).view(len(layers), len(metrics), len(kept))
    if not loss.isfinite().all():
        raise InputError(NOT_FINITE)
    data = {"name": name, "images": len(images)}
    objective = "kl" if labels is None else "labels"
    return Sensitivity(
        identity(model), data, objective, refit, plan.alignment, plan.gap, tuple(layers), tuple(metrics), kept, loss
    )
