"""Requests of jobs: values that need no torch, so that invalid ones are reported before it is imported."""

from __future__ import annotations

from dataclasses import dataclass
from numbers import Real
from typing import TYPE_CHECKING

from ..errors import InputError

if TYPE_CHECKING:
    import torch

SAMPLES = 1024
AXES = ("states", "channels", "layers", "tokens")
SEARCH_IMAGES = 512


@dataclass(frozen=True)
class DataOptions:
    """The images of a job, and how they are read.

    Attributes:
        data: images for calibration and training, as `ssmcompress.data.open_images` takes them; None: those named by
            the model's folder, else sample photographs.
        eval_data: images for evaluation; None: those of `data` that were not used for calibration or training.
        samples: maximum number of calibration images.
        seed: seed of the selection of images.
        batch_size: does not change any result. workers: processes that decode images; 0: the main process does.
        reduce_zero_label: whether 0 in a mask is an ignored pixel and classes count from 1; None: as the data says.
    """

    data: str | None = None
    eval_data: str | None = None
    samples: int = SAMPLES
    seed: int = 0
    batch_size: int = 64
    workers: int = 0
    reduce_zero_label: bool | None = None


@dataclass(frozen=True)
class MeasureOptions:
    """How models are evaluated.

    Attributes:
        dtype: "float32", or "bfloat16" (`evaluation.measure.run_in`). latency: whether to time the models at batch 1.
        views: clips and crops of each video, whose probabilities are averaged; None: one clip with a centre crop, the
            only choice for models that take images.
    """

    dtype: str = "float32"
    latency: bool = True
    views: tuple[int, int] | None = None

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype as a torch.dtype."""
        import torch

        return getattr(torch, self.dtype)


@dataclass(frozen=True)
class PlanRequest:
    """Which plan to make: at most one of ratio, a budget (flops, flops_backbone, latency, max_drop) and file.

    By default, the ratio is 0.3, unless `merge` is given.

    Attributes:
        ratio: shares of tokens to remove, one for all stages or one for each.
        flops, latency: share of the dense model's to keep. flops_backbone: the same of a segmentation model's backbone.
        file: a plan as JSON.
        max_drop: maximum loss in percentage points.
        axes: what a search may trim, among "states", "channels", "layers" and "tokens"; None: all that the model has.
        search: whether `flops` searches for the plan, instead of pruning all stages equally.
        stages: layers to prune after, or to choose from; None: the default ones, or all.
        importance: metric; None: the model's default, or a search over all metrics.
        fuse: whether removed tokens are fused into one (EViT). merge: tokens that are merged in every layer and an
            inflection (`ssmcompress.pruning.schedules.tome_stages`), instead of the other options. Both are for ViTs.
        align: whether the later layers are aligned; None: yes.
        reenter: number of last layers that all tokens enter again, as in a `Plan`; with `ratio`.
        sensitivity: file measured by an earlier search. by_labels: whether a search uses labels.
        search_images: maximum number of images for the search.
    """

    ratio: tuple[float, ...] | None = None
    flops: float | None = None
    latency: float | None = None
    max_drop: float | None = None
    axes: tuple[str, ...] | None = None
    file: str | None = None
    flops_backbone: float | None = None
    search: bool = True
    stages: tuple[int, ...] | None = None
    importance: str | None = None
    align: bool | None = None
    fuse: bool = False
    merge: tuple[int, float] | None = None
    reenter: int = 0
    sensitivity: str | None = None
    by_labels: bool = False
    search_images: int = SEARCH_IMAGES

    @property
    def searches(self) -> bool:
        """Whether the plan comes from a search."""
        return self.search and bool(self.budgets)

    @property
    def budgets(self) -> dict[str, float]:
        """The budgets that are given, by name."""
        names = ("flops", "flops_backbone", "latency", "max_drop")
        return {name: value for name in names if (value := getattr(self, name)) is not None}

    def check(self) -> None:
        """Check that the arguments can be combined.

        Raises:
            InputError: they cannot; the message names the arguments of this class, `plan` for `file`.
        """
        ways = {"ratio": self.ratio, **self.budgets, "plan": self.file, "merge": self.merge}
        given = [f"`{name}`" for name, value in ways.items() if value is not None]
        if len(given) > 1:
            raise InputError(f"{' and '.join(given)}: expected one of them")
        own = {"`stages`": self.stages, "`importance`": self.importance, "`align` or `align=False`": self.align}
        own |= {"`reenter`": self.reenter or None, "`fuse`": self.fuse or None}
        of_stages = {name: own[name] for name in ("`stages`", "`importance`", "`fuse`", "`reenter`")}
        if self.merge is not None and (extra := [name for name, value in of_stages.items() if value is not None]):
            raise InputError(f"`merge` and {', '.join(extra)}: merging uses a number of tokens for every layer instead")
        if self.fuse and self.searches:
            raise InputError("`fuse`: a search drops tokens; leave out `fuse`, or give `ratio` or `search=False`")
        if self.reenter and self.budgets:
            raise InputError("`reenter` needs `ratio`: with a budget, tokens stay dropped to the end")
        if self.file is not None and (extra := [name for name, value in own.items() if value is not None]):
            raise InputError(f"`plan` and {', '.join(extra)}: the plan already sets that")
        for name, value in (("latency", self.latency), ("max_drop", self.max_drop)):
            if value is not None and not self.search:
                raise InputError(f"`{name}` needs a search: leave out `search=False`")
        if self.max_drop is not None and (not isinstance(self.max_drop, Real) or not 0 < self.max_drop < 100):
            raise InputError(f"`max_drop` {self.max_drop}: expected percentage points, above 0 and below 100")
        if self.axes is not None:
            if unknown := [axis for axis in self.axes if axis not in AXES]:
                raise InputError(f"`axes` {unknown[0]!r}: expected some of {', '.join(AXES)}")
            if not self.axes:
                raise InputError(f"`axes` is empty: expected some of {', '.join(AXES)}")
            of_tokens = {"stages": self.stages, "importance": self.importance} if "tokens" not in self.axes else {}
            if extra := [f"`{name}`" for name, value in of_tokens.items() if value is not None]:
                raise InputError(f"{' and '.join(extra)}: only for tokens; add tokens to `axes`")
        if not self.search and self.flops is None and self.flops_backbone is None:
            raise InputError("`search=False` needs `flops`: give it, or leave out `search=False`")
        if not self.searches:
            searching = {"sensitivity": self.sensitivity, "by_labels": self.by_labels or None, "axes": self.axes}
            searching["search_images"] = self.search_images if self.search_images != SEARCH_IMAGES else None
            if extra := [f"`{name}`" for name, value in searching.items() if value is not None]:
                way_out = "give `flops` or `latency`, or `max_drop`" if self.search else "leave out `search=False`"
                raise InputError(f"{' and '.join(extra)}: only for a search; {way_out}")


@dataclass(frozen=True)
class CompareRequest:
    """The request of a comparison.

    Attributes:
        ratios: levels, as shares of tokens to remove at each stage. flops: levels as shares of the FLOPs to keep,
            instead of these.
        stages: layers to prune after; None: the default ones.
        methods: names of methods; None: all, including those with a search or a reconstruction if `search` and
            `reconstruct` are set.
        data: the images. measure: how rows are evaluated. gap: as for `prune`.
    """

    ratios: tuple[float, ...] = (0.1, 0.2, 0.3, 0.5)
    flops: tuple[float, ...] | None = None
    stages: tuple[int, ...] | None = None
    methods: tuple[str, ...] | None = None
    search: bool = False
    reconstruct: bool = False
    data: DataOptions = DataOptions()
    measure: MeasureOptions = MeasureOptions()
    gap: str | None = None

    def check(self) -> None:
        """Check the request before the model is loaded.

        Raises:
            InputError: a ratio is invalid.
        """
        if wrong := [value for value in self.ratios if not 0 <= value < 1]:
            raise InputError(f"`ratios` {wrong[0]:g}: expected shares of tokens to remove, at least 0 and below 1")
