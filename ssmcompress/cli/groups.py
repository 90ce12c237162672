"""Option groups: dataclasses whose fields are options, shared by the commands.

A command names the groups it takes as parameters; what the options of a group mean together is a method of the group.
The heading of an option in `--help` is its `rich_help_panel`.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .. import processes
from ..errors import InputError
from ..extras import require_extra
from .devices import AUTO, choose_device, explain_device
from .inputs import check_inputs, check_model
from .log import start_log
from .options import BUDGET, FINETUNING, HARDWARE, IMAGES, MODEL_FILE, OUTPUT, PRUNING, option
from .terminal import command_line, is_quiet, progress_bars, say
from .values import (
    IMPORTANCE_NAMES,
    GapSource,
    Precision,
    parse_merge,
    parse_numbers,
    parse_ratios,
    parse_share,
    parse_size,
    parse_views,
)

if TYPE_CHECKING:
    from ..compression.finetune.recipe import Recipe
    from ..jobs.finetune import FinetuneOptions
    from ..jobs.requests import DataOptions, MeasureOptions, PlanRequest
    from ..models.base import TokenModel
    from ..models.checkpoint import LoadOptions

# Heavy imports (torch takes two seconds) stay inside the methods, so that --help answers at once.


def complete_importance(incomplete: str) -> list[str]:
    """The metrics whose names begin like that, for completion in a shell."""
    return [name for name in IMPORTANCE_NAMES if name.startswith(incomplete)]


def model_argument(metavar: str, text: str) -> Any:
    """An argument that is a model."""
    return typer.Argument(metavar=metavar, help=text)


Checkpoint = Annotated[
    str,
    model_argument(
        "CKPT",
        "Dense checkpoint (.pth, .pt, .safetensors), a folder that prune wrote, to drop more tokens, or a Hub name: "
        "owner/name[@rev][:file].",
    ),
]
Model = Annotated[str, model_argument("MODEL", "Checkpoint file, a folder that prune wrote, or a Hub name.")]
MaybeModel = Annotated[
    str | None, model_argument("MODEL", "Folder, file or Hub name; without it, the newest under compressed/.")
]
Dense = Annotated[
    str | None,
    option(
        MODEL_FILE,
        help="Dense model to compare with. Default: the one that MODEL was made from.",
    ),
]


@dataclass(frozen=True)
class Processor:
    """The CPU."""

    threads: Annotated[
        int | None, option(HARDWARE, min=1, max=1024, help="Threads of the CPU. Default: all cores.")
    ] = None

    def start(self) -> Any:
        """The device to work on, with its threads set."""
        import torch

        if self.threads is not None:
            torch.set_num_threads(self.threads)
        return torch.device("cpu")


@dataclass(frozen=True)
class Hardware(Processor):
    """Where to compute."""

    device: Annotated[
        str, option(HARDWARE, help="cpu, cuda, cuda:1, mps or xpu; auto: cuda if it works, else cpu.")
    ] = AUTO

    @cached_property
    def resolved(self) -> str:
        """The name of the device; where it was chosen by `auto`, a line has said so."""
        name, why = choose_device(self.device)
        if why:
            say(why, is_quiet())
        return name

    def start(self) -> Any:
        """The device to work on, of this process if there are several, with the threads of the CPU set.

        Raises:
            InputError: a device that is not there.
        """
        import torch

        super().start()
        try:
            device = torch.device(processes.start(self.resolved))
            torch.zeros(1, device=device).item()  # a meta device has no values
        except Exception as error:
            raise InputError(f"--device {self.device}: {explain_device(self.resolved, error)}") from error
        # By default torch lets convolutions in float32, and so the patch embedding, round to 10 bits.
        torch.backends.cudnn.allow_tf32 = False
        logging.getLogger("ssmcompress").debug("device %s, %d threads", device, torch.get_num_threads())
        return device


@dataclass(frozen=True)
class Reading:
    """How a model file is read."""

    image_size: Annotated[
        str | None, option(MODEL_FILE, help="Side of the images in pixels, or HEIGHTxWIDTH. Default: as trained.")
    ] = None
    stride: Annotated[
        int | None, option(MODEL_FILE, min=1, help="Step between patches in pixels. Default: the patch size.")
    ] = None
    weights: Annotated[
        str, option(MODEL_FILE, help="Entry of a checkpoint: model, model_ema, or the name of another one.")
    ] = "model"
    architecture: Annotated[
        str | None,
        option(
            MODEL_FILE,
            help="vim, video_mamba, plain_mamba, vmamba or vit, where neither the weights nor the rest of the file "
            "says it.",
        ),
    ] = None
    task: Annotated[
        str | None,
        option(MODEL_FILE, help="classification or segmentation: refuse a file of another task. Default: what it is."),
    ] = None
    level: Annotated[
        str | None,
        option(
            MODEL_FILE,
            help="What a segmentation model on a Vim reads, where its file does not say it: hidden, residual, "
            "residual_norm or rope.",
        ),
    ] = None
    num_heads: Annotated[
        int | None,
        option(MODEL_FILE, min=1, help="Attention heads of a ViT. Default: as its file says, else its width over 64."),
    ] = None
    frames: Annotated[
        int | None, option(MODEL_FILE, min=1, help="Frames of a video, of a model for videos. Default: as trained.")
    ] = None
    unsafe_load: Annotated[
        bool, option(MODEL_FILE, "--unsafe-load", help="Unpickle a file that could run code; only if trusted.")
    ] = False

    def open(self, checkpoint: str, hardware: Processor = Processor()) -> TokenModel:
        """The model in a file or folder, on the hardware.

        Raises:
            InputError: a file that cannot be read as one.
        """
        check_model(checkpoint)
        from ..models.checkpoint import load

        options, device = vars(self.options()), hardware.start()
        with progress_bars(is_quiet()):
            return load(checkpoint, device=device, **options)

    def options(self) -> LoadOptions:
        """As the library takes them."""
        from ..models.checkpoint import LoadOptions

        size = parse_size(self.image_size)
        names = ("architecture", "task", "level", "num_heads", "frames")
        own = {name: getattr(self, name) for name in names}
        return LoadOptions(size, self.stride, self.weights, self.unsafe_load, **own)

    @property
    def folder_labels(self) -> dict[str, Any]:
        """What the default name of a folder says of these options: label -> text or None."""
        weights = self.weights if self.weights != "model" else None
        own = {"level-": self.level, "heads": self.num_heads, "frames": self.frames}
        return {"weights-": weights, "image": self.image_size, "stride": self.stride, **own}


@dataclass(frozen=True)
class Load(Reading):
    """How a model file is read, and how images are prepared for it."""

    mean: Annotated[
        str | None, option(MODEL_FILE, help="Normalisation mean, one value or one a channel (0.485,0.456,0.406).")
    ] = None
    std: Annotated[str | None, option(MODEL_FILE, help="Standard deviation of the same.")] = None
    crop_pct: Annotated[
        str | None, option(MODEL_FILE, help="Share of the resized side that the centre crop keeps, 0.875 or 87.5%.")
    ] = None
    interpolation: Annotated[str | None, option(MODEL_FILE, help="bicubic, bilinear, nearest or lanczos.")] = None
    short_side: Annotated[
        int | None,
        option(
            MODEL_FILE, min=0, help="Segmentation: resize images to this shorter side; 0: do not. Default: as trained."
        ),
    ] = None

    def open(self, checkpoint: str, hardware: Processor = Processor()) -> TokenModel:
        """The model in a file or folder, on the hardware, with the preprocessing that the options ask for.

        Raises:
            InputError: a file that cannot be read as one, or preprocessing that cannot be.
        """
        mean, std = parse_numbers(self.mean, "--mean"), parse_numbers(self.std, "--std")
        crop_pct = parse_share(self.crop_pct, "--crop-pct")
        if crop_pct is not None and not 0 < crop_pct <= 1:
            raise InputError(f"--crop-pct {self.crop_pct}: expected a share above 0, at most 100%")
        model = super().open(checkpoint, hardware)
        changes = {"mean": mean, "std": std, "crop_pct": crop_pct, "interpolation": self.interpolation}
        changes["short_side"] = self.short_side
        model.preprocessing = model.preprocessing.changed(**changes)
        return model


@dataclass(frozen=True)
class Batching:
    """How images are read."""

    batch_size: Annotated[int, option(HARDWARE, min=1, help="Images at a time; changes no result.")] = 64
    workers: Annotated[int, option(HARDWARE, min=0, help="Processes that decode images; 0: the main process does.")] = 0
    reduce_zero_label: Annotated[
        bool | None,
        option(
            IMAGES,
            "--reduce-zero-label/--no-reduce-zero-label",
            help="In masks, 0 is no class and classes count from 1. Default: as the data says, else without.",
        ),
    ] = None


@dataclass(frozen=True)
class Measure(Batching):
    """How models are run when they are measured."""

    dtype: Annotated[
        Precision,
        option(HARDWARE, help="Precision when measuring; with bfloat16, reports have figures in float32 beside it."),
    ] = Precision.float32
    views: Annotated[
        str | None,
        option(
            IMAGES,
            metavar="CLIPSxCROPS",
            help="Videos: measure the mean of these views, 4x3. Default: 1x1, one clip and its centre crop.",
        ),
    ] = None

    def options(self, latency: bool = True) -> MeasureOptions:
        """As the library takes them."""
        from ..jobs.requests import MeasureOptions

        return MeasureOptions(self.dtype.value, latency, parse_views(self.views))


NoLatency = Annotated[bool, option(HARDWARE, "--no-latency", help="Do not time the models.")]
Data = Annotated[
    str | None,
    option(
        IMAGES,
        help="Folder of (class folders of) images or videos, parquet, arrow, tar, npz file, folder:split or hub:split.",
    ),
]


@dataclass(frozen=True)
class TrainingImages:
    """Images to learn from and to measure on."""

    data: Data = None
    eval_data: Annotated[
        str | None, option(IMAGES, help="Images to measure on. Default: those of --data that nothing was learnt from.")
    ] = None
    seed: Annotated[
        int,
        option(IMAGES, min=0, max=2**31 - 1, help="Seed for sampling images and for every other random choice."),
    ] = 0

    def check(self, model: str) -> None:
        """Check the names of these images, and of the model that they are for, before anything is loaded.

        Raises:
            InputError: a name that cannot be right.
        """
        check_inputs(model, {"--data": self.data, "--eval-data": self.eval_data})

    def options(self, batching: Batching) -> DataOptions:
        """As the library takes them."""
        from ..jobs.requests import SAMPLES, DataOptions

        samples = getattr(self, "samples", SAMPLES)
        reading = (batching.batch_size, batching.workers, batching.reduce_zero_label)
        return DataOptions(self.data, self.eval_data, samples, self.seed, *reading)


@dataclass(frozen=True)
class Images(TrainingImages):
    """Images to calibrate, to learn from and to measure on."""

    samples: Annotated[
        int, option(IMAGES, min=1, help="Images to calibrate and reconstruct on, at most half of --data.")
    ] = 1024


@dataclass(frozen=True)
class Budget:
    """How much to prune."""

    ratio: Annotated[
        str | None,
        option(BUDGET, help="Share of tokens REMOVED at each stage, or one a stage: 30%, 0.3, 20%,30%. Default 0.3."),
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
        option(BUDGET, help="Points of accuracy (of agreement without labels) that may be LOST; saves most within it."),
    ] = None
    axes: Annotated[
        str | None,
        option(BUDGET, help="What a search may trim: states,channels,layers,tokens. Default: all that the model has."),
    ] = None
    search: Annotated[
        bool, option(BUDGET, "--search/--no-search", help="Without: --flops prunes all stages alike by one metric.")
    ] = True
    sensitivity: Annotated[
        str | None, option(BUDGET, help="sensitivity.json of an earlier search, or its folder: not measured again.")
    ] = None
    search_images: Annotated[int, option(BUDGET, min=1, help="Images to search on, at most half of --samples.")] = 512
    by_labels: Annotated[
        bool, option(BUDGET, "--by-labels", help="Search by labels, not by the dense model's own outputs.")
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


@dataclass(frozen=True)
class Pruning(Stages):
    """What to prune, and how."""

    importance: Annotated[
        str | None,
        option(
            PRUNING,
            metavar="METRIC",
            autocompletion=complete_importance,
            help=f"What tokens are ranked by: {', '.join(IMPORTANCE_NAMES)}. Default: clip; of a ViT attention.",
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
            help="Refit later layers to the dense model, without training. Default: where data is given.",
        ),
    ] = None
    reenter: Annotated[
        int,
        option(PRUNING, min=0, help="Segmentation: number of last layers that all tokens enter again."),
    ] = 0
    plan: Annotated[
        str | None,
        option(PRUNING, help="Plan to use: a pruned model's folder, file or report, or the JSON of --dry-run --json."),
    ] = None

    def plan_request(self, budget: Budget) -> PlanRequest:
        """Which plan the options of both groups ask for."""
        from ..jobs.requests import PlanRequest

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


@dataclass(frozen=True)
class Training:
    """How to fine-tune."""

    recipe: Annotated[
        str,
        option(
            FINETUNING,
            help="How to fine-tune: default, top-vim (the paper's), or a JSON file with what differs from one.",
        ),
    ] = "default"
    recipe_changes: Annotated[
        list[str] | None,
        option(
            FINETUNING,
            "--set",
            metavar="NAME=VALUE",
            help="Change a value of the recipe (lr=2e-3, mixup=0.8); repeatable.",
        ),
    ] = None
    ramp: Annotated[
        str | None,
        option(FINETUNING, help="Share of the fine-tuning over which pruning rises from nothing to its target, 50%."),
    ] = None
    tensorboard: Annotated[
        str | None, option(FINETUNING, help="Folder to log the fine-tuning to, for TensorBoard.")
    ] = None

    def options(self, epochs: int | None, teacher: bool = True) -> FinetuneOptions:
        """As the library takes them."""
        require_extra("finetune")
        if self.tensorboard is not None:
            require_extra("tensorboard")
        from ..jobs.finetune import FinetuneOptions

        return FinetuneOptions(self._recipe(epochs), teacher, self.tensorboard)

    def _recipe(self, epochs: int | None) -> Recipe:
        from ..compression.finetune.recipe import Recipe

        values = {"epochs": epochs, "ramp": parse_share(self.ramp, "--ramp")}
        given = [f"{key}={value}" for key, value in values.items() if value is not None]
        return Recipe.from_name(self.recipe).with_changes([*(self.recipe_changes or []), *given])


@dataclass(frozen=True)
class FinetuneToo(Training):
    """Fine-tuning after something else."""

    finetune_epochs: Annotated[
        int | None,
        option(FINETUNING, min=1, help="Passes over --data to fine-tune for, with the dense model as teacher."),
    ] = None

    def options_if_asked(self) -> FinetuneOptions | None:
        """As the library takes them, or None without fine-tuning.

        Raises:
            InputError: an option says how to fine-tune, but none says to do it.
        """
        given = {
            "--recipe": self.recipe != "default", "--set": self.recipe_changes, "--ramp": self.ramp is not None,
            "--tensorboard": self.tensorboard,
        }  # fmt: skip
        if self.finetune_epochs is not None:
            return self.options(self.finetune_epochs)
        if unused := [name for name, value in given.items() if value]:
            raise InputError(f"{', '.join(unused)}: how to fine-tune, but --finetune-epochs is not given")
        return None


@dataclass(frozen=True)
class Printing:
    """What is printed."""

    as_json: Annotated[bool, option(OUTPUT, "--json", help="Print one JSON object instead of a table.")] = False
    quiet: Annotated[bool, option(OUTPUT, "--quiet", help="No progress and no messages.")] = False
    verbose: Annotated[bool, option(OUTPUT, "--verbose", help="Also say what is done, on stderr.")] = False
    log_file: Annotated[
        str | None, option(OUTPUT, help="Append messages, steps and warnings to this file, also with --quiet.")
    ] = None

    def begin(self) -> None:
        """Log the command as the options ask for.

        Raises:
            InputError: the log file cannot be written to, or holds something else.
        """
        start_log(self.log_file, self.verbose, self.quiet, command_line())


@dataclass(frozen=True)
class ReportPrinting(Printing):
    """What is printed of a report."""

    verbose: Annotated[
        bool,
        option(
            OUTPUT,
            "--verbose",
            help="Also show what each refitted map misses, before and after; on stderr what is done.",
        ),
    ] = False


Force = Annotated[bool, option(OUTPUT, "--force", help="Replace the output if it exists.")]
ForceFolder = Annotated[
    bool, option(OUTPUT, "--force", help="Replace the output if it exists, with the ONNX file exported from it.")
]


@dataclass(frozen=True)
class Output:
    """The folder that is written."""

    output: Annotated[str | None, option(OUTPUT, "--output", "-o", help="Folder to write.")] = None
    force: ForceFolder = False

    def path(self, default: Path) -> Path:
        """The folder, as asked or by default."""
        return Path(self.output or default)
