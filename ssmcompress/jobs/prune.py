"""The main job: a dense model in, a pruned one with its report in a folder out."""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from .. import processes
from ..compression.calibrate import calibrate, make_plan
from ..compression.finetune.recipe import Recipe
from ..compression.reconstruct import reconstruct
from ..data.batches import Batches, sample_indices
from ..data.find import open_images
from ..data.images import Images
from ..errors import BudgetError, InputError
from ..evaluation.flops import corrections_share, dense_flops, flops, reachable, remaining_share
from ..evaluation.latency import latency, latency_settings
from ..evaluation.measure import Evaluation, autocast, measure
from ..files import check_target
from ..models.base import TokenModel
from ..models.checkpoint import load, save, versions
from ..models.records import MadeBy, Source
from ..models.rewrite import install, prune
from ..pruning.alignment import Alignment
from ..pruning.plan import Plan, Stage, default_stages, ratio_for_budget
from . import report as reports
from .pictures import kept_tokens

SAMPLES = 1024
UNALIGNED = Alignment(conv=False, scan=False)


@dataclass(frozen=True)
class Setup:
    """What a compression runs on, apart from the plan.

    Attributes:
        data, eval_data: images to calibrate and to measure on, see `ssmcompress.data.images.open_images`.
        samples: how many images to calibrate on at most.
        gap: "calibrated" or "bias"; None: calibrated where the data is the user's.
        reconstruct: whether to refit the later layers on the calibration images; None: where these are the user's,
            and two different ones at least.
        seed: of the images drawn.
        batch_size: images at a time; changes no result. workers: processes that decode them.
        dtype: float32, or bfloat16 for measuring under autocast.
        measure_latency: time both models at batch 1.
        recipe: to fine-tune by after pruning, on the images that are not measured on; None: no fine-tuning.
        teacher: whether fine-tuning learns from the dense model. tensorboard: folder for its logs, or None.
    """

    data: str | None = None
    eval_data: str | None = None
    samples: int = SAMPLES
    gap: str | None = None
    reconstruct: bool | None = None
    seed: int = 0
    batch_size: int = 64
    workers: int = 0
    dtype: torch.dtype = torch.float32
    measure_latency: bool = True
    recipe: Recipe | None = None
    teacher: bool = True
    tensorboard: str | None = None


def corrections_reserve(model: TokenModel, stages: Sequence[int], data: str | None, wanted: bool | None) -> float:
    """The share of the dense FLOPs that a budget must leave to corrections, 0 where nothing will be reconstructed.

    Args:
        data, wanted: as `Setup.data` and `Setup.reconstruct`.
    """
    return corrections_share(model, stages) if reconstruction_wanted(model, data, wanted) else 0.0


def reconstruction_wanted(model: TokenModel, data: str | None, wanted: bool | None) -> bool:
    """Whether a model is to be reconstructed: as told, else where there are images of the user's.

    Args:
        data, wanted: as `Setup.data` and `Setup.reconstruct`.
    """
    if wanted is not None:
        return wanted
    return data is not None or (model.source is not None and model.source.data is not None)


def gap_source(setup: Setup, images: Images, planned: str | None = None) -> str:
    """The gap source: as told, else as planned, else calibrated where the images are the user's."""
    return setup.gap or planned or ("bias" if images.stand_in else "calibrated")


def plan_for_budget(
    model: TokenModel, budget: float, stages: Sequence[int] | None, *, reserve: float = 0.0, **options: Any
) -> Plan:
    """The plan that prunes every stage alike and least, so that `budget` of the FLOPs (`full`) is left.

    Args:
        reserve: share of the dense FLOPs to leave to the corrections of a reconstruction, see `corrections_reserve`.

    Raises:
        BudgetError: these stages cannot reach it.
    """
    stages = tuple(stages or default_stages(len(model.blocks)))
    make_plan(model, stages=stages, **options)  # speaks up about stages before they are counted with
    least = reachable(model, stages) + reserve
    if not least <= budget < 1:
        raise BudgetError(
            f"{budget:.1%} of the FLOPs is out of reach: pruning after {','.join(map(str, stages))} "
            f"leaves between {least:.1%} and 100%"
        )
    ratio = ratio_for_budget(budget - reserve, lambda r: remaining_share(model, [Stage(after, r) for after in stages]))
    return make_plan(model, stages=stages, ratio=ratio, **options)


def folder_name(checkpoint: str | Path, choices: Mapping[str, Any]) -> str:
    """Default name of a compressed model: the checkpoint's, then what was chosen: `vim-r0.30-s2-4-6-seed1`.

    Args:
        choices: label -> what was chosen (a text, a number or several), None where nothing was.
    """

    def text(value: Any) -> str:
        if isinstance(value, float):
            return f"{value:.2f}" if round(value, 2) == value else f"{value:g}"
        return "-".join(map(text, value)) if isinstance(value, tuple) else str(value)

    path = Path(checkpoint)
    name = path.resolve().name if path.is_dir() else path.stem  # a folder may be called "."; a link keeps its name
    return "-".join([name, *(label + text(value) for label, value in choices.items() if value is not None)])


def preview(model: TokenModel, plan: Plan) -> dict[str, Any]:
    """What a plan would do to a model, without images: a JSON value that `--plan` takes, too."""
    dense = flops(model)
    pruned = install(copy.deepcopy(model), Plan(plan.stages, plan.alignment, seed=plan.seed))
    return {
        "plan": plan.to_dict(),
        "stages": stage_rows(pruned),
        "dense": {"flops": dense},
        "pruned": {"flops": flops(pruned)},
    }


def stage_rows(model: TokenModel) -> list[dict[str, Any]]:
    """What each stage of a pruned model keeps: after which layer, how many tokens of how many, by which metric."""
    counts = model.token_counts()
    return [
        {"after": s.after, "kept": counts[s.after], "of": counts[s.after - 1], "importance": s.importance}
        for s in model.plan.stages
    ]


def compress(
    model: TokenModel,
    plan: Plan,
    output: str | Path,
    setup: Setup = Setup(),
    *,
    command: str = "",
    force: bool = False,
    found: Mapping[str, Any] | None = None,
    extra: Mapping[str, bytes] | None = None,
) -> dict[str, Any]:
    """Calibrate, prune, reconstruct, measure and write a folder; returns the report that is in it.

    With a recipe, the model in that folder is then fine-tuned and replaced (`ssmcompress.jobs.finetune`). In several
    processes (`ssmcompress.processes`) each works on its share of the images, and the first one writes.

    Args:
        model: dense, from `load`.
        plan: from `make_plan`, `plan_for_budget` or a file.
        output: the folder to write; nothing is left there if anything fails.
        command: recorded as how it was made.
        force: replace `output` if ssmcompress wrote it.
        found: how the plan was searched for, for the report. extra: further files of the folder, name -> content.

    Raises:
        InputError: data, plan or output that cannot be used.
    """
    output = Path(output)
    plan.validate(len(model.blocks))
    check_output(model, output, setup, force)
    several = processes.count() > 1
    calibration, measured = calibration_and_measured(model, setup)
    gap = gap_source(setup, calibration.source, plan.gap)
    plan = calibrate(model, calibration, plan, gap=gap, name=calibration.source.name, distributed=several)
    calibration.sync()
    models = {"dense": model}
    if plan.alignment != UNALIGNED:
        models["naive"] = prune(model, replace(plan, alignment=UNALIGNED))
    models["pruned"] = pruned = prune(model, plan)
    wanted = setup.reconstruct
    if wanted is None:  # images that are all the same can be calibrated on, but show nothing to reconstruct by
        wanted = not calibration.source.stand_in and len(calibration.digests) > 1
    begun = time.perf_counter()
    rebuilt = pruned
    if wanted:
        rebuilt = reconstruct(pruned, model, calibration, name=calibration.source.name, distributed=several)
    seconds = time.perf_counter() - begun
    if rebuilt.find_record("reconstruction") is not None:
        models["aligned" if "naive" in models else "naive"] = models.pop("pruned")
        models["pruned"] = pruned = rebuilt
    results = measure(models, measured, dtype=setup.dtype, distributed=several)
    measured.sync()
    overlap = len(measured.digests & calibration.digests)
    pruned.made_by = MadeBy(command, versions())
    reconstruction = _reconstruction_block(pruned, seconds)
    about = {"calibration": _calibration_block(plan, calibration), "reconstruction": reconstruction}
    about |= {"search": dict(found)} if found else {}
    report = write_measured(
        models, results, measured, overlap, about, output, setup, command=command, force=force, extra=extra
    )
    if setup.recipe is None:
        return report
    from .finetune import finetune_folder

    processes.barrier()  # until the first has written
    written = load(output, device=next(model.parameters()).device)
    return finetune_folder(written, output, setup, dense=model, inside=output, force=True, command=command)


def check_output(model: TokenModel, output: str | Path, setup: Setup, force: bool) -> None:
    """An InputError where `output` cannot be written, before the long work."""
    inputs = [setup.data, setup.eval_data]
    if model.source is not None:
        inputs += [model.source.path, model.source.data]
    if processes.is_main():
        check_target(Path(output), force, inputs)


def write_measured(
    models: Mapping[str, TokenModel | None],
    results: Mapping[str, Evaluation],
    measured: Batches,
    overlap: int,
    about: Mapping[str, Any],
    output: Path,
    setup: Setup,
    *,
    command: str,
    force: bool,
    extra: Mapping[str, bytes] | None = None,
    earlier: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Write the folder of `models["pruned"]` with its report, in the first process; returns the report, {} in others.

    Args:
        models, results: by name, as reports have them in their columns; "dense" may be None, if it is gone.
        overlap: how many of the measured images something was learnt from.
        about: further blocks of the report. extra: further files, name -> content.
        earlier: the report of a model that this one was made from: what it measured on the same images is taken over.
    """
    if not processes.is_main():
        return {}
    pruned = models["pruned"]
    sample = next(iter(measured)).images.to(next(pruned.parameters()).device)
    times = {}
    if setup.measure_latency:
        timed = {name: models[name] for name in ("dense", "pruned") if models.get(name) is not None}
        with autocast(sample.device, setup.dtype):
            times = latency(timed, sample[:1])
    blocks = {
        name: _model_block(model, results[name], times.get(name)) if model is not None else _gone(pruned)
        for name, model in models.items()
    }
    data = _data_block(measured, results["pruned"], overlap)
    if earlier and {**earlier["data"], "overlap": overlap} == data:
        blocks = {name: earlier[name] for name in reports.columns(earlier) if name != "pruned"} | blocks
    report = {
        "data": data,
        **blocks,
        "agreement": {"top1": results["pruned"].agreement, "kl": results["pruned"].kl},
        "stages": stage_rows(pruned),
        "alignment": _alignment_block(pruned),
        **about,
        "dtype": str(setup.dtype).removeprefix("torch."),
        "latency": latency_settings(sample.device) if times else None,
        "command": command,
        "versions": versions(),
    }
    if not measured.source.stand_in:
        pruned.source = replace(pruned.source or Source("", ""), data=_lasting_name(measured.source.name))
    files = {
        reports.REPORT_FILE: json.dumps(report, indent=2).encode() + b"\n",
        reports.PICTURE_FILE: kept_tokens(pruned, sample),
        "README.md": reports.to_card(report, output.name, picture=True).encode(errors="replace"),
    }
    save(pruned, output, extra={**files, **(extra or {})}, force=force)
    return report


def calibration_and_measured(model: TokenModel, setup: Setup) -> tuple[Batches, Batches]:
    """Images to calibrate on and, as far as they are not told apart, other images to measure on."""
    if setup.samples < 1:
        raise InputError(f"samples {setup.samples}: expected at least 1")
    images = model.find_images(setup.data)
    if setup.eval_data is None:
        if len(images) < 2:
            raise InputError(f"{images.name} has 1 image: expected one to calibrate and one to measure on")
        if setup.recipe is None:
            chosen, rest = sample_indices(len(images), min(setup.samples, len(images) // 2), setup.seed)
        else:
            learnt, rest = apart(len(images), setup.seed)
            chosen = [learnt[i] for i in sample_indices(len(learnt), setup.samples, setup.seed)[0]]
        if not any(images.readable(i) for i in chosen):  # of a few images, those drawn may be the damaged ones
            spare = [i for i in rest if images.readable(i)][:1]
            chosen, rest = [*chosen, *spare], [i for i in rest if i not in spare]
        others = images
    else:
        chosen, _ = sample_indices(len(images), setup.samples, setup.seed)
        others = open_images(setup.eval_data, model.config.num_classes)
        rest = range(len(others))
    return (
        Batches(images, model.transform(), processes.shard(chosen), setup.batch_size, setup.workers),
        Batches(others, model.transform(), processes.shard(rest), setup.batch_size, setup.workers),
    )


def apart(images: int, seed: int) -> tuple[list[int], list[int]]:
    """(indices to learn from, a tenth and at most 5,000 to measure on) of so many images, the same in every command."""
    measured, learnt = sample_indices(images, min(5000, max(1, images // 10)), seed)
    return learnt, measured


def _gone(pruned: TokenModel) -> dict[str, Any]:
    """The block of a dense model that is not there any more."""
    return {"top1": None, "top5": None, "flops": dense_flops(pruned), "params": None, "latency_ms": None}


def _data_block(measured: Batches, result: Evaluation, overlap: int) -> dict[str, Any]:
    return {
        "name": measured.source.name,
        "images": result.images,
        "labelled": result.labelled,
        "overlap": overlap,
        "unreadable": measured.unreadable_names(),
    }


def _calibration_block(plan: Plan, calibration: Batches) -> dict[str, Any]:
    """Also how often each stage kept each position, and its mean score: lists over positions."""
    seen = plan.calibration
    return {
        "name": seen.name,
        "images": seen.images,
        "unreadable": calibration.unreadable_names(),
        "kept_share": [[round(v, 4) for v in kept.tolist()] for kept in seen.kept],
        "mean_score": [[round(v, 6) for v in scores.tolist()] for scores in seen.scores],
    }


def _alignment_block(model: TokenModel) -> dict[str, Any]:
    """What is aligned; of a mean that is read out too, where there is one."""
    alignment = model.plan.alignment
    block = {"conv": alignment.conv, "scan": alignment.scan, "gap": model.plan.gap if alignment.scan else None}
    return block | ({"pool": alignment.pool} if model.pools else {})


def _reconstruction_block(model: TokenModel, seconds: float) -> dict[str, Any] | None:
    """Also the seconds it took, and the rank of each layer's correction."""
    record = model.find_record("reconstruction")
    if record is None:
        return None
    ranks = {layer: correction[0].out_features for layer, correction in model.corrections.items()}
    return {**asdict(record), "seconds": round(seconds, 2), "correction_ranks": ranks}


def _model_block(model: TokenModel, result: Evaluation, milliseconds: float | None) -> dict[str, Any]:
    return {
        "top1": result.top1,
        "top5": result.top5,
        "flops": flops(model),
        "params": sum(p.numel() for p in model.parameters()),
        "latency_ms": milliseconds,
    }


def _lasting_name(name: str) -> str:
    """A data set's name as it is found from any working directory."""
    return str(Path(name).absolute()) if Path(name).exists() else name
