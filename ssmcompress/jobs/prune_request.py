"""The request of `prune`: the plan, the images, and the further steps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from ..errors import InputError
from .finetune_run import FinetuneOptions
from .folder import folder_name
from .pipeline import Step
from .requests import DataOptions, MeasureOptions, PlanRequest

DEFAULT_RATIO = 0.3


@dataclass(frozen=True)
class CompressOptions:
    """Options of a compression, apart from the plan.

    Attributes:
        data: the images. measure: evaluation options.
        gap: "calibrated" or "bias"; None: as planned, else calibrated if the images are the user's own.
        reconstruct: whether to refit the later layers; None: if the images are the user's own and differ.
        steps: further steps after these, each with its own column in the report.
        finetune: how to fine-tune after that, on the images not used for evaluation; None: not at all.
    """

    data: DataOptions = DataOptions()
    measure: MeasureOptions = MeasureOptions()
    gap: str | None = None
    reconstruct: bool | None = None
    steps: tuple[Step, ...] = ()
    finetune: FinetuneOptions | None = None


@dataclass(frozen=True)
class PruneRequest:
    """The complete request of `prune`, apart from the model.

    Attributes:
        plan: which plan. options: how it is applied. loading: label -> text: options of loading the model, which are
            part of the default folder name.
    """

    plan: PlanRequest = PlanRequest()
    options: CompressOptions = CompressOptions()
    loading: Mapping[str, str | None] = field(default_factory=dict)

    def check(self) -> None:
        """Check the request before the model is loaded.

        Raises:
            InputError: arguments that cannot be combined.
        """
        self.plan.check()
        if self.options.finetune is not None and self.options.data.data is None:
            raise InputError("`finetune_epochs` needs training images: give `data`")

    def folder(self, checkpoint: str) -> Path:
        """Return the default output folder, whose name includes what differs from the defaults."""
        plan, options = self.plan, self.options
        searched = plan.file is None and bool(plan.budgets)
        chosen = plan.file is not None or searched or plan.merge is not None
        ratio = plan.ratio if chosen else plan.ratio or (DEFAULT_RATIO,)
        without_search = bool(plan.budgets) and not plan.search
        choices = {
            "plan": (Path(plan.file).resolve().name if Path(plan.file).is_dir() else Path(plan.file).stem)
            if plan.file
            else None,
            "f": plan.flops,
            "fb": plan.flops_backbone,
            "t": plan.latency,
            "d": plan.max_drop,
            "axes-": "+".join(plan.axes) if plan.axes else None,
            "r": ratio,
            "s": plan.stages,
            "": plan.importance if plan.importance != "clip" else None,
            "fuse": "" if plan.fuse else None,
            "merge": plan.merge,
            "no-align": "" if plan.align is False else None,
            "reenter": plan.reenter or None,
            "no-reconstruct": "" if options.reconstruct is False else None,
            "reconstruct": "" if options.reconstruct and options.data.data is None else None,
            "gap-": options.gap,
            "seed": options.data.seed or None,
            **self.loading,
            "ft": options.finetune.recipe.epochs if options.finetune else None,
            "no-search": "" if without_search else None,
            "by-labels": "" if plan.by_labels else None,
        }
        return Path("compressed", folder_name(checkpoint, choices))
