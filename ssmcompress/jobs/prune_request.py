"""What `prune` is asked for: which plan, on which images, and what is done by it."""

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
    """How a model is compressed, apart from the plan.

    Attributes:
        data: the images. measure: how models are measured.
        gap: "calibrated" or "bias"; None: as planned, else calibrated where the images are the user's own.
        reconstruct: whether to refit the later layers; None: where the images are the user's own and differ.
        steps: further steps after these, each with a column of its own in the report.
        finetune: how to fine-tune after that, on the images that are not measured on; None: not at all.
    """

    data: DataOptions = DataOptions()
    measure: MeasureOptions = MeasureOptions()
    gap: str | None = None
    reconstruct: bool | None = None
    steps: tuple[Step, ...] = ()
    finetune: FinetuneOptions | None = None


@dataclass(frozen=True)
class PruneRequest:
    """Everything that `prune` is asked for, apart from the model.

    Attributes:
        plan: which plan. options: what is done by it. loading: what changes the name of the folder besides, label ->
            text: how the model was loaded.
    """

    plan: PlanRequest = PlanRequest()
    options: CompressOptions = CompressOptions()
    loading: Mapping[str, str | None] = field(default_factory=dict)

    def check(self) -> None:
        """Check what is given before the model is loaded.

        Raises:
            InputError: arguments that do not go together.
        """
        self.plan.check()
        if self.options.finetune is not None and self.options.data.data is None:
            raise InputError("`finetune_epochs` needs images to learn from: give `data`")

    def folder(self, checkpoint: str) -> Path:
        """The default folder for the result: what differs from the defaults is in its name."""
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
