"""The command line: parses, calls the library, prints."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from .. import processes
from .._version import __version__
from ..errors import InputError
from .terminal import (
    Commands,
    command_line,
    print_json,
    progress_bars,
    say,
    say_about_data,
    show_benchmark,
    show_export,
    show_preview,
    show_report,
    show_table,
    show_verification,
    shown_when_it_fails,
    verification_json,
)
from .values import (
    Atol,
    BatchSize,
    CropPct,
    Data,
    Dense,
    Device,
    Dtype,
    DtypeOrNone,
    Force,
    GapSource,
    ImageSize,
    Importance,
    Interpolation,
    Json,
    MaybeModel,
    Mean,
    Model,
    Precision,
    Provider,
    Quiet,
    Ramp,
    RecipeChanges,
    RecipeName,
    ScanForm,
    Seed,
    Std,
    Stored,
    Stride,
    TensorBoard,
    Threads,
    Unsafe,
    Weights,
    Workers,
    image_sides,
    numbers,
    ratios_removed,
    recipe_of,
    share_kept,
)

# Heavy imports (torch takes two seconds) stay inside the commands, so that --help answers at once.

app = typer.Typer(
    cls=Commands,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="Make vision state-space models cheaper to run: prune tokens with alignment, measure, export.",
)


def _version(wanted: bool) -> None:
    if wanted:
        print(f"ssmcompress {__version__}")
        raise typer.Exit


@app.callback()
def _app(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Show it.")] = False,
) -> None:
    pass


def _output_beside(model: str, suffix: str, inside: bool) -> Path:
    """Default output of an export: in a model's folder or beside it, beside a checkpoint file."""
    path = Path(model)
    if path.is_dir():
        return path / f"model{suffix}" if inside else path.resolve().with_name(path.resolve().name + suffix)
    return path.with_name(f"{path.stem}-export{suffix}") if path.suffix == suffix else path.with_suffix(suffix)


def _device(name: str):
    import torch

    try:
        device = torch.device(processes.start(name))
        torch.zeros(1, device=device).item()  # a meta device has no values
    except Exception as error:
        raise InputError(f"--device {name}: not available here") from error
    # float32 is to mean float32: torch lets convolutions, so the patch embedding, round to 10 bits unless told.
    torch.backends.cudnn.allow_tf32 = False
    return device


def _open(checkpoint, image_size, stride, weights, unsafe, mean, std, crop_pct, interpolation, device, threads):
    """A model with the preprocessing that the options ask for."""
    import torch

    from ..models.checkpoint import load

    if threads is not None:
        torch.set_num_threads(threads)
    model = load(
        checkpoint,
        image_size=image_sides(image_size),
        stride=stride,
        weights=weights,
        device=_device(device),
        unsafe_load=unsafe,
    )
    model.preprocessing = model.preprocessing.changed(
        mean=numbers(mean, "--mean"), std=numbers(std, "--std"), crop_pct=crop_pct, interpolation=interpolation
    )
    return model


@app.command()
def inspect(
    checkpoint: Model,
    image_size: ImageSize = None,
    stride: Stride = None,
    weights: Weights = "model",
    unsafe_load: Unsafe = False,
    as_json: Json = False,
) -> None:
    """What a checkpoint is: architecture, parameters, FLOPs by part, the reachable budget."""
    from dataclasses import asdict

    from ..evaluation.flops import by_part, flops, reachable
    from ..models.checkpoint import load
    from ..pruning.plan import default_stages

    model = load(
        checkpoint, image_size=image_sides(image_size), stride=stride, weights=weights, unsafe_load=unsafe_load
    )
    full, paper = by_part(model, "full"), by_part(model, "paper")
    depth = len(model.blocks)
    stages = [s.after for s in model.plan.stages] if model.plan else list(default_stages(depth)) if depth > 1 else []
    result = {
        "architecture": {"type": model.architecture, **asdict(model.config)},
        "params": sum(p.numel() for p in model.parameters()),
        "tokens": model.token_counts(),
        "flops": {**flops(model), "by_part": full, "by_part_paper": paper},
        "range": {"stages": stages, "min_percent": round(100 * reachable(model, stages), 2), "max_percent": 100.0},
        "pruned": model.plan is not None,
    }
    if as_json:
        print_json(result)
        return
    size = "x".join(map(str, model.config.image_size))
    counts = f"{result['tokens'][0]} tokens" + (f", {result['tokens'][-1]} at the end" if model.plan else "")
    print(f"{model.architecture}, {len(model.blocks)} layers, images {size}, {counts}, {result['params']:,} parameters")
    lines = [(part, [f"{full[part]:.4g}", f"{paper[part]:.4g}"]) for part in full]
    lines.append(("total", [f"{result['flops'][c]:.4g}" for c in ("full", "paper")]))
    show_table(["GFLOPs of one image", "full", "paper"], lines)
    if stages:
        print(
            f"  pruning after {','.join(map(str, stages))} leaves {result['range']['min_percent']:.1f}% "
            f"to 100% of the full FLOPs"
        )


@app.command()
def prune(
    checkpoint: Annotated[str, typer.Argument(metavar="CKPT", help="Dense checkpoint (.pth, .pt, .safetensors).")],
    ratio: Annotated[
        str | None,
        typer.Option(help="Share of tokens REMOVED at each stage, or one a stage: 0.3 or 0.2,0.3,0.4. Default 0.3."),
    ] = None,
    flops: Annotated[
        str | None, typer.Option(help="Share of the FLOPs to KEEP, 60%; searches for the plan that loses least.")
    ] = None,
    latency: Annotated[
        str | None, typer.Option(help="Share of the latency to KEEP at batch 1, 60%, timed here; searches likewise.")
    ] = None,
    search: Annotated[
        bool, typer.Option("--search/--no-search", help="Without: --flops prunes all stages alike by one metric.")
    ] = True,
    sensitivity: Annotated[
        str | None, typer.Option(help="sensitivity.json of an earlier search, or its folder: not measured again.")
    ] = None,
    search_images: Annotated[int, typer.Option(min=1, help="Images to search on, at most half of --samples.")] = 512,
    by_labels: Annotated[
        bool, typer.Option("--by-labels", help="Search by labels, not by the dense model's own outputs.")
    ] = False,
    stages: Annotated[
        str | None, typer.Option(help="Layers (from 1) after which to prune. Default: 5,10,15 scaled to the depth.")
    ] = None,
    importance: Annotated[Importance | None, typer.Option(help="What tokens are ranked by. Default: clip.")] = None,
    align: Annotated[
        bool | None, typer.Option("--align/--no-align", help="Align conv and scan to pruned tokens. Default: align.")
    ] = None,
    gap: Annotated[
        GapSource | None,
        typer.Option(help="Step size of pruned tokens. Default: calibrated where data is given, else bias."),
    ] = None,
    reconstruct: Annotated[
        bool | None,
        typer.Option(
            "--reconstruct/--no-reconstruct",
            help="Refit later layers to the dense model, without training. Default: where data is given.",
        ),
    ] = None,
    plan: Annotated[
        str | None, typer.Option(help="JSON file with a plan: --dry-run --json output, or a model's config.json.")
    ] = None,
    data: Data = None,
    eval_data: Annotated[
        str | None, typer.Option(help="Images to measure on. Default: those of --data not calibrated on.")
    ] = None,
    samples: Annotated[
        int, typer.Option(min=1, help="Images to calibrate and reconstruct on, at most half of --data.")
    ] = 1024,
    finetune_epochs: Annotated[
        int | None, typer.Option(min=1, help="Fine-tune for so many passes over --data, the dense model as teacher.")
    ] = None,
    recipe: RecipeName = "default",
    recipe_changes: RecipeChanges = None,
    ramp: Ramp = None,
    tensorboard: TensorBoard = None,
    seed: Seed = 0,
    output: Annotated[str | None, typer.Option("--output", "-o", help="Folder to write.")] = None,
    force: Force = False,
    image_size: ImageSize = None,
    stride: Stride = None,
    weights: Weights = "model",
    unsafe_load: Unsafe = False,
    mean: Mean = None,
    std: Std = None,
    crop_pct: CropPct = None,
    interpolation: Interpolation = None,
    device: Device = "cpu",
    dtype: Dtype = Precision.float32,
    batch_size: BatchSize = 64,
    workers: Workers = 0,
    threads: Threads = None,
    timing: Annotated[bool, typer.Option(" /--no-latency", help="Do not time the models at batch 1.")] = True,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the plan and its FLOPs; write nothing.")] = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Prune tokens of a dense model: calibrate, prune, reconstruct, measure, write a folder."""
    ratios = ratios_removed(ratio) if ratio is not None else None
    share = share_kept(flops, "--flops") if flops is not None else None
    time_share = share_kept(latency, "--latency") if latency is not None else None
    layers = numbers(stages, "--stages", int)
    ways = (("--ratio", ratio), ("--flops", flops), ("--latency", latency), ("--plan", plan))
    given = [name for name, value in ways if value is not None]
    if len(given) > 1:
        raise InputError(f"{' and '.join(given)}: expected one of them")
    own = [("--stages", stages), ("--importance", importance), ("--align or --no-align", align)]
    if plan is not None and (extra := [name for name, value in own if value is not None]):
        raise InputError(f"--plan and {', '.join(extra)}: a plan has that in it")
    searching = search and (flops is not None or latency is not None)
    if latency is not None and not search:
        raise InputError("--latency is met by a search: leave out --no-search")
    if not searching and (sensitivity is not None or by_labels):
        raise InputError("--sensitivity and --by-labels belong to a search: give --flops or --latency")
    training = [("--recipe", recipe != "default"), ("--set", recipe_changes), ("--ramp", ramp is not None)]
    if finetune_epochs is None and (unused := [name for name, given in training if given]):
        raise InputError(f"{', '.join(unused)}: how to fine-tune, but --finetune-epochs is not given")
    if finetune_epochs is not None and data is None:
        raise InputError("--finetune-epochs needs images to learn from: give --data")
    chosen_recipe = recipe_of(recipe, recipe_changes, finetune_epochs, ramp) if finetune_epochs else None
    from ..compression.calibrate import make_plan
    from ..evaluation.flops import reachable
    from ..jobs.prune import Setup, check_output, compress, corrections_reserve, folder_name, plan_for_budget, preview
    from ..pruning.alignment import Alignment
    from ..pruning.plan import Plan, default_stages

    model = _open(
        checkpoint, image_size, stride, weights, unsafe_load, mean, std, crop_pct, interpolation, device, threads
    )
    options = {"stages": layers, "importance": (importance or Importance.clip).value, "seed": seed}
    options["alignment"] = align is not False
    if plan is not None:
        chosen = Plan.read(plan).validate(len(model.blocks))
    elif searching:
        chosen = None
    elif share is not None:
        where = layers or default_stages(len(model.blocks))
        make_plan(model, **options)  # speaks up about stages before the range is counted with them
        reserve = corrections_reserve(model, where, data, reconstruct)
        say(
            f"reachable with stages {','.join(map(str, where))}: {reachable(model, where) + reserve:.1%} to 100%", quiet
        )
        chosen = plan_for_budget(model, share, reserve=reserve, **options)
    else:
        ratios = ratios or (0.3,)
        chosen = make_plan(model, ratio=ratios[0] if len(ratios) == 1 else ratios, **options)
    if dry_run and chosen is not None:
        show_preview(preview(model, chosen), as_json)
        return
    folder = Path(output or Path("compressed", folder_name(checkpoint, {
        "plan": Path(plan).stem if plan else None, "f": share, "t": time_share, "r": ratios, "s": layers,
        "": importance.value if importance not in (None, Importance.clip) else None,
        "no-align": "" if align is False else None, "no-reconstruct": "" if reconstruct is False else None,
        "reconstruct": "" if reconstruct and data is None else None,
        "gap-": gap.value if gap else None, "seed": seed or None,
        "weights-": weights if weights != "model" else None, "image": image_size, "stride": stride,
        "ft": finetune_epochs, "no-search": "" if share is not None and not search else None,
        "by-labels": "" if by_labels else None,
    })))  # fmt: skip
    import torch

    setup = Setup(
        data=data,
        eval_data=eval_data,
        samples=samples,
        gap=gap.value if gap else None,
        reconstruct=reconstruct,
        seed=seed,
        batch_size=batch_size,
        workers=workers,
        dtype=getattr(torch, dtype.value),
        measure_latency=timing,
        recipe=chosen_recipe,
        tensorboard=tensorboard,
    )
    found: dict[str, Any] = {}
    with progress_bars(quiet):
        if chosen is None:
            from ..compression.search.sensitivity import SENSITIVITY_FILE
            from ..jobs.search import Request, search_plan

            request = Request(
                flops=share,
                latency=time_share,
                stages=layers,
                importance=importance.value if importance else None,
                alignment=Alignment(align is not False, align is not False),
                labels=by_labels,
                sensitivity=sensitivity,
                images=search_images,
            )
            if not dry_run:
                check_output(model, folder, setup, force)
            searched = search_plan(model, request, setup)
            chosen = searched.plan
            found = {"found": searched.record, "extra": {SENSITIVITY_FILE: searched.sensitivity.to_json().encode()}}
        if not dry_run:
            report = compress(model, chosen, folder, setup, command=command_line(), force=force, **found)
    if dry_run:
        if processes.is_main():
            show_preview({**preview(model, chosen), "search": found["found"]}, as_json)
        return
    if not processes.is_main():
        return
    show_report(report, as_json)
    say_about_data(report, quiet)
    say(f"wrote {folder}", quiet)


@app.command()
def finetune(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Pruned model, a folder that prune wrote.")],
    data: Data = None,
    epochs: Annotated[int | None, typer.Option(min=1, help="Passes over the images. Default: the recipe's, 3.")] = None,
    output: Annotated[
        str | None, typer.Option("--output", "-o", help="Folder to write; MODEL itself with --force or --resume.")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with an interrupted run; a finished one is done at once.")
    ] = False,
    dense: Annotated[
        str | None, typer.Option(help="Teacher. Default: the dense model that MODEL was made from.")
    ] = None,
    teacher: Annotated[bool, typer.Option("--teacher/--no-teacher", help="Learn from the dense model, too.")] = True,
    recipe: RecipeName = "default",
    recipe_changes: RecipeChanges = None,
    ramp: Ramp = None,
    tensorboard: TensorBoard = None,
    eval_data: Annotated[
        str | None, typer.Option(help="Images to measure on. Default: a tenth of --data, which is not learnt from.")
    ] = None,
    seed: Seed = 0,
    force: Force = False,
    image_size: ImageSize = None,
    stride: Stride = None,
    weights: Weights = "model",
    unsafe_load: Unsafe = False,
    mean: Mean = None,
    std: Std = None,
    crop_pct: CropPct = None,
    interpolation: Interpolation = None,
    device: Device = "cpu",
    dtype: Dtype = Precision.float32,
    batch_size: BatchSize = 64,
    workers: Workers = 0,
    threads: Threads = None,
    latency: Annotated[bool, typer.Option("--latency/--no-latency", help="Time both models at batch 1.")] = True,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Train a pruned model further, with the dense one as teacher, labels, or both."""
    if data is None:
        raise InputError("fine-tuning needs images to learn from: give --data")
    if output is None:
        raise InputError("where to write the fine-tuned model: give -o FOLDER")
    if resume and force:
        raise InputError("--resume goes on and --force starts afresh: expected one of them")
    chosen = recipe_of(recipe, recipe_changes, epochs, ramp)
    import torch

    from ..jobs.finetune import finetune_folder
    from ..jobs.prune import Setup
    from ..models.checkpoint import find_dense

    loaded = _open(model, image_size, stride, weights, unsafe_load, mean, std, crop_pct, interpolation, device, threads)
    reference = None
    try:
        reference = find_dense(loaded, dense)
    except InputError as error:
        if dense is not None:
            raise
        say(f"learning from labels alone, agreement will not be measured: {error}; give --dense", quiet)
    setup = Setup(
        data=data,
        eval_data=eval_data,
        seed=seed,
        batch_size=batch_size,
        workers=workers,
        dtype=getattr(torch, dtype.value),
        measure_latency=latency,
        recipe=chosen,
        teacher=teacher,
        tensorboard=tensorboard,
    )
    with progress_bars(quiet):
        report = finetune_folder(
            loaded,
            output,
            setup,
            dense=reference,
            inside=Path(model),
            resume=resume,
            force=force,
            command=command_line(),
        )
    if not processes.is_main():
        return
    show_report(report, as_json)
    say_about_data(report, quiet)
    say(f"wrote {output}", quiet)


@app.command()
def evaluate(
    model: Model,
    data: Data = None,
    dense: Dense = None,
    image_size: ImageSize = None,
    stride: Stride = None,
    weights: Weights = "model",
    unsafe_load: Unsafe = False,
    mean: Mean = None,
    std: Std = None,
    crop_pct: CropPct = None,
    interpolation: Interpolation = None,
    device: Device = "cpu",
    dtype: Dtype = Precision.float32,
    batch_size: BatchSize = 64,
    workers: Workers = 0,
    threads: Threads = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Top-1 and top-5 on labelled images; agreement with the dense model where there is one."""
    import torch

    from ..data.batches import Batches
    from ..evaluation.measure import evaluate as evaluate_model
    from ..models.checkpoint import find_dense

    loaded = _open(model, image_size, stride, weights, unsafe_load, mean, std, crop_pct, interpolation, device, threads)
    reference = None
    if dense is not None or loaded.plan is not None:
        try:
            reference = find_dense(loaded, dense)
        except InputError as error:
            if dense is not None:
                raise
            say(f"agreement was not measured: {error}; give --dense", quiet)
    images = loaded.find_images(data)
    batches = Batches(images, loaded.transform(), processes.shard(range(len(images))), batch_size, workers)
    several = processes.count() > 1
    with progress_bars(quiet):
        found = evaluate_model(loaded, batches, dense=reference, dtype=getattr(torch, dtype.value), distributed=several)
    batches.sync()
    unreadable = batches.unreadable_names()
    result: dict[str, Any] = {
        "top1": found.top1,
        "top5": found.top5,
        "images": found.images,
        "data": {
            "name": images.name,
            "images": found.images,
            "labelled": found.labelled,
            "unreadable": unreadable,
        },
    }
    if reference is not None:
        result["agreement"] = {"top1": found.agreement, "kl": found.kl}
    if as_json:
        print_json(result)
    else:
        rows = [("top-1", found.top1, "%"), ("top-5", found.top5, "%")]
        rows += [("same class as dense", found.agreement, "%"), ("KL from dense", found.kl, "nats")]
        lines = [(name, [f"{value:.4g} {unit}"]) for name, value, unit in rows if value is not None]
        show_table(["", "model"], lines)
        print(f"  measured on {found.images} images of {images.name}")
    if not found.labelled:
        say(f"accuracy was not measured: {images.name} has no labels; give --data", quiet)
    if unreadable:
        say(f"skipped {len(unreadable)} unreadable images: {', '.join(unreadable[:3])}", quiet)


@app.command()
def report(
    model: MaybeModel = None,
    html: Annotated[str | None, typer.Option(help="Also write a web page to this file.")] = None,
    force: Force = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Show the report of a compressed model."""
    from ..files import write_file
    from ..jobs import report as reports

    folder, content = reports.read(model)
    if html is not None:
        picture = folder / reports.PICTURE_FILE
        page = reports.to_html(content, folder.name, picture.read_bytes() if picture.is_file() else None)
        write_file(Path(html), page.encode(), force)
        say(f"wrote {html}", quiet)
    if model is None:
        say(f"{folder}:", quiet)
    show_report(content, as_json)


@app.command()
def export(
    model: MaybeModel = None,
    onnx: Annotated[
        bool, typer.Option("--onnx", help="Write an ONNX file; without it, one .safetensors file.")
    ] = False,
    output: Annotated[str | None, typer.Option("--output", "-o", help="File to write.")] = None,
    opset: Annotated[
        int | None, typer.Option(help="ONNX opset. Default: the newest that the installed onnxruntime runs.")
    ] = None,
    scan: Annotated[
        ScanForm,
        typer.Option(
            help="How ONNX computes the scans: step by step (scan), onnxruntime's LinearAttention, or opset 27's "
            "(standard). auto: the fastest here."
        ),
    ] = ScanForm.auto,
    dtype: Annotated[
        Stored, typer.Option(help="Type of the matrices in the ONNX file; it computes in float32 in any case.")
    ] = Stored.float32,
    debug_outputs: Annotated[
        bool, typer.Option("--debug-outputs", help="The tokens that each stage keeps as outputs, too.")
    ] = False,
    latency: Annotated[
        bool, typer.Option("--latency/--no-latency", help="Time onnxruntime beside torch, dense beside pruned.")
    ] = True,
    provider: Provider = "cpu",
    dense: Dense = None,
    data: Data = None,
    atol: Atol = 1e-4,
    image_size: ImageSize = None,
    stride: Stride = None,
    weights: Weights = "model",
    unsafe_load: Unsafe = False,
    mean: Mean = None,
    std: Std = None,
    crop_pct: CropPct = None,
    interpolation: Interpolation = None,
    threads: Threads = None,
    force: Force = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Write a model, pruned or dense, as one file; an ONNX file is checked in onnxruntime first."""
    from ..files import check_target, write_file
    from ..jobs import report as reports
    from ..models.checkpoint import serialise

    path = model or str(reports.newest())
    file = Path(output) if output else _output_beside(path, ".onnx" if onnx else ".safetensors", inside=onnx)
    check_target(file, force, [path])
    loaded = _open(path, image_size, stride, weights, unsafe_load, mean, std, crop_pct, interpolation, "cpu", threads)
    if not onnx:
        try:
            text = json.dumps(reports.read(path)[1])
        except InputError:  # a model without a report is a model all the same
            text = None
        write_file(file, serialise(loaded, text), force)
        if as_json:
            print_json({"file": str(file)})
        say(f"wrote {file}", quiet)
        return
    from ..export.onnx import export_onnx
    from ..models.checkpoint import find_dense

    reference = None
    if dense is not None or (latency and loaded.plan is not None):
        try:
            reference = find_dense(loaded, dense)
        except InputError as error:
            if dense is not None:
                raise
            say(f"the dense model was not timed: {error}; give --dense", quiet)
    with progress_bars(quiet), shown_when_it_fails(file, as_json):
        result = export_onnx(
            loaded,
            file,
            data=data,
            atol=atol,
            opset=opset,
            scan=scan.value,
            dtype=dtype.value,
            provider=provider,
            debug_outputs=debug_outputs,
            latency=latency,
            dense=reference,
            force=force,
        )
    reports.record_export(path, file, result)
    show_export(result, file, as_json)
    say(f"wrote {file}", quiet)


@app.command()
def verify(
    model: Model,
    file: Annotated[str, typer.Argument(metavar="FILE.onnx", help="ONNX file made from it.")],
    data: Data = None,
    atol: Atol = 1e-4,
    provider: Provider = "cpu",
    image_size: ImageSize = None,
    stride: Stride = None,
    weights: Weights = "model",
    unsafe_load: Unsafe = False,
    mean: Mean = None,
    std: Std = None,
    crop_pct: CropPct = None,
    interpolation: Interpolation = None,
    threads: Threads = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Check that an ONNX file computes what a model computes, in onnxruntime, on real images."""
    from ..export.verify import verify_onnx

    loaded = _open(model, image_size, stride, weights, unsafe_load, mean, std, crop_pct, interpolation, "cpu", threads)
    with progress_bars(quiet), shown_when_it_fails(Path(file), as_json):
        result = verify_onnx(loaded, Path(file), data=data, atol=atol, provider=provider)
    show_verification(result, Path(file), as_json)


@app.command()
def benchmark(
    models: Annotated[
        list[str] | None,
        typer.Argument(metavar="MODEL...", help="Files and folders. A pruned one alone runs beside its dense model."),
    ] = None,
    batch_sizes: Annotated[str, typer.Option(help="Images at a time, one table row each.")] = "1,8",
    repeats: Annotated[int, typer.Option(min=1, help="Timed runs of each; the runs are interleaved.")] = 7,
    reference: Annotated[bool, typer.Option("--reference", help="Time each with the reference scan, too.")] = False,
    ops: Annotated[bool, typer.Option("--ops", help="Time the scan and the convolution alone, by backend.")] = False,
    shape: Annotated[
        str | None, typer.Option(help="Of --ops: batch,length,d_inner,d_state. Default: Vim-small's, 224 px.")
    ] = None,
    image_size: ImageSize = None,
    stride: Stride = None,
    weights: Weights = "model",
    unsafe_load: Unsafe = False,
    device: Device = "cpu",
    dtype: DtypeOrNone = None,
    threads: Threads = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Latency, images per second and memory of models side by side in one run, or with --ops of the ops."""
    import torch

    from ..evaluation import latency as benchmarks
    from ..evaluation.op_benchmark import benchmark_ops
    from ..models.checkpoint import find_dense

    sizes, extents = numbers(batch_sizes, "--batch-sizes", int), numbers(shape, "--shape", int)
    if not models and not ops:
        raise InputError("nothing to time: give models, or --ops")
    if min(sizes) < 1:
        raise InputError(f"--batch-sizes {batch_sizes}: expected numbers above 0")
    if extents and (len(extents) != 4 or min(extents) < 1):
        raise InputError(f"--shape {shape}: expected batch,length,d_inner,d_state, all above 0")
    where, chosen = _device(device), None if dtype is None else getattr(torch, dtype.value)
    precision = chosen or torch.float32
    if threads is not None:
        torch.set_num_threads(threads)
    result: dict[str, Any] = {"settings": benchmarks.settings(where, precision, repeats)}
    loaded = {}
    for path in dict.fromkeys(models or []):
        args = (path, image_size, stride, weights, unsafe_load, None, None, None, None, device, threads)
        loaded[path] = _open(*args)
    if len(loaded) == 1 and (only := next(iter(loaded.values()))).plan is not None:
        try:
            name = "dense" if "dense" not in loaded else "dense model"
            loaded = {name: find_dense(only).to(where), **loaded}
        except InputError as error:
            say(f"the dense model was not timed: {error}", quiet)
    with progress_bars(quiet):
        if loaded:
            result["models"] = benchmarks.benchmark(loaded, sizes, repeats, precision, reference)
        if ops:
            result["ops"] = benchmark_ops(extents, repeats, chosen, where)
            if not loaded:
                kinds = dict.fromkeys(row["dtype"] for row in result["ops"] if "dtype" in row)
                result["settings"]["dtype"] = " and ".join(kinds)
    show_benchmark(result, as_json)


@app.command()
def compare(
    checkpoint: Annotated[str, typer.Argument(metavar="CKPT", help="Dense checkpoint (.pth, .pt, .safetensors).")],
    ratios: Annotated[
        str | None, typer.Option(help="Shares of tokens REMOVED at each stage, a level each. Default 0.1,0.2,0.3,0.5.")
    ] = None,
    flops: Annotated[str | None, typer.Option(help="Levels as shares of the FLOPs to KEEP: 75%,60%,50%.")] = None,
    stages: Annotated[
        str | None, typer.Option(help="Layers (from 1) after which to prune. Default: 5,10,15 scaled to the depth.")
    ] = None,
    methods: Annotated[
        str | None, typer.Option(help="Only these, with semicolons between them: 'naive; clip, aligned; R-MeeTo'.")
    ] = None,
    search: Annotated[bool, typer.Option("--search", help="Also the plans that a search finds.")] = False,
    reconstruct: Annotated[bool, typer.Option("--reconstruct", help="Also with later layers refitted.")] = False,
    data: Data = None,
    eval_data: Annotated[
        str | None, typer.Option(help="Images to measure on. Default: those of --data not calibrated on.")
    ] = None,
    samples: Annotated[int, typer.Option(min=1, help="Images to calibrate on, at most half of --data.")] = 1024,
    gap: Annotated[GapSource | None, typer.Option(help="Step size of pruned tokens, as for prune.")] = None,
    seed: Seed = 0,
    output: Annotated[
        str | None, typer.Option("--output", "-o", help="Folder to write; one that is there goes on.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Start afresh in a folder that has a comparison.")] = False,
    image_size: ImageSize = None,
    stride: Stride = None,
    weights: Weights = "model",
    unsafe_load: Unsafe = False,
    mean: Mean = None,
    std: Std = None,
    crop_pct: CropPct = None,
    interpolation: Interpolation = None,
    device: Device = "cpu",
    dtype: Dtype = Precision.float32,
    batch_size: BatchSize = 64,
    workers: Workers = 0,
    threads: Threads = None,
    timing: Annotated[bool, typer.Option(" /--no-latency", help="Do not time the models at batch 1.")] = True,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Methods beside each other on a model and its images: a table, JSON, CSV and a Pareto plot."""
    if ratios is not None and flops is not None:
        raise InputError("--ratios and --flops: expected one of them")
    shares = [share_kept(part, "--flops") for part in flops.split(",")] if flops is not None else None
    removed = numbers(ratios or "0.1,0.2,0.3,0.5", "--ratios")
    if wrong := [value for value in removed if not 0 <= value < 1]:
        raise InputError(f"--ratios {wrong[0]:g}: expected shares of tokens to remove, at least 0 and below 1")
    import torch

    from ..jobs.compare import Comparison, table
    from ..jobs.methods import chosen_methods, level_for, levels
    from ..jobs.prune import Setup

    names = [name.strip() for name in methods.split(";") if name.strip()] if methods is not None else None
    rows = chosen_methods(names, search=search, reconstructed=reconstruct)
    where = numbers(stages, "--stages", int)
    model = _open(
        checkpoint, image_size, stride, weights, unsafe_load, mean, std, crop_pct, interpolation, device, threads
    )
    if model.plan is not None:
        raise InputError(f"{checkpoint} is pruned already: compare takes the dense model it came from")
    if processes.count() > 1:
        raise InputError("compare runs in one process: start it without a launcher")
    if shares is not None:
        removed = [level_for(model, where, share) for share in shares]
    setup = Setup(
        data=data,
        eval_data=eval_data,
        samples=samples,
        gap=gap.value if gap else None,
        seed=seed,
        batch_size=batch_size,
        workers=workers,
        dtype=getattr(torch, dtype.value),
        measure_latency=timing,
    )
    folder = Path(output or Path("compared", Path(checkpoint).resolve().stem))
    with progress_bars(quiet):
        comparison = Comparison(model, folder, setup, where, command_line(), force)
        result = comparison.run(levels(model, where, removed), rows)
    if as_json:
        print_json(result)
    else:
        show_table(*table(result["rows"]))
        about = result["settings"]
        print(f"  measured on {about['data']['images']} images of {about['data']['name']}")
        print(f"  calibrated on {about['calibration']['images']} images of {about['calibration']['name']}")
    say(f"wrote {folder}/compare.json, compare.csv, pareto.png and pareto.svg", quiet)


@app.command()
def demo(
    output: Annotated[str | None, typer.Option("--output", "-o", help="Folder to write.")] = None,
    force: Force = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """The whole chain on a small trained Vim and 2,000 images that come with the package."""
    from ..compression.calibrate import make_plan
    from ..export.onnx import export_onnx
    from ..jobs import report as reports
    from ..jobs.prune import compress
    from ..models.checkpoint import load

    bundled = Path(__file__).parents[1] / "assets" / "vim-fashion-mnist"
    folder = Path(output) if output else Path("compressed") / f"{bundled.name}-demo"
    model = load(bundled)
    with progress_bars(quiet):
        layers = len(model.blocks)
        say(f"pruning 60 % of the tokens after layer 2 of {layers} of a small Vim trained on Fashion-MNIST", quiet)
        plan = make_plan(model, stages=(2,), ratio=0.6)
        report = compress(model, plan, folder, command=command_line(), force=force)
        say("exporting to ONNX and checking it in onnxruntime", quiet)
        file = folder / "model.onnx"
        result = export_onnx(load(folder), file)
    reports.record_export(str(folder), file, result)
    if as_json:
        print_json({**report, "onnx": verification_json(result, file)})
    else:
        show_report(report, False)
        show_export(result, file, False)
    say(f"wrote {folder}; look at kept_tokens.png there, or run `ssmcompress report --html report.html`", quiet)


def main() -> None:
    """Entry point of the `ssmcompress` command."""
    app()
