"""The command line: parses, calls the library, prints. Results on stdout, progress and messages on stderr."""

from __future__ import annotations

import json
import math
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer

from ._version import __version__
from .errors import InputError, SsmCompressError, VerificationError

# Heavy imports (torch takes two seconds) stay inside the commands, so that --help answers at once.

INTERRUPTED = 130

_arguments: ContextVar[tuple[str, ...]] = ContextVar("ssmcompress_arguments", default=())


class Commands(typer.core.TyperGroup):
    """Errors as one plain line and an exit code, for usage errors as for our own."""

    def main(self, args=None, prog_name=None, standalone_mode=True, **extra):
        arguments = list(sys.argv[1:] if args is None else args) or ["--help"]
        _arguments.set(tuple(arguments))
        try:
            code = super().main(arguments, prog_name or "ssmcompress", standalone_mode=False, **extra)
            if code == INTERRUPTED:  # how newer typers hand on Ctrl-C
                _complain("interrupted", code)
        except typer.BadParameter.__base__ as error:  # click's UsageError, wherever typer keeps it
            code = _complain(f"{error.format_message()} (see ssmcompress --help)", 2)
        except SsmCompressError as error:
            code = _complain(str(error), error.exit_code)
        except (KeyboardInterrupt, typer.Abort):
            code = _complain("interrupted", INTERRUPTED)
        except BrokenPipeError:  # `ssmcompress report | head`
            sys.stderr.close()
            code = 1
        except OSError as error:  # a name too long, a folder that may not be read, ...
            code = _complain(f"{error.filename or 'input or output'}: {error.strerror or error}", 2)
        except Exception as error:
            if isinstance(error, MemoryError) or _looks_like_memory(error):
                code = _complain("out of memory; try a smaller --batch-size", 1)
            else:
                code = _complain(f"internal error, {type(error).__name__}: {error}; please report it", 1)
        if not standalone_mode:
            return code
        sys.exit(code if isinstance(code, int) else 0)


def _complain(message: str, code: int) -> int:
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    return code


def _looks_like_memory(error: Exception) -> bool:
    return "out of memory" in str(error) or "can't allocate memory" in str(error)


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


# ------------------------------------------------------------------------------------------ values of options


class Importance(str, Enum):
    clip = "clip"
    l1 = "l1"
    l2 = "l2"
    mean = "mean"
    random = "random"
    delta = "delta"


class GapSource(str, Enum):
    calibrated = "calibrated"
    bias = "bias"


class Precision(str, Enum):
    float32 = "float32"
    bfloat16 = "bfloat16"


def _numbers(text: str | None, option: str, kind: type = float) -> tuple | None:
    if text is None:
        return None
    try:
        return tuple(kind(part) for part in text.split(","))
    except ValueError as error:
        raise InputError(f"{option} {text}: expected numbers with commas between them") from error


def _size(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    sides = text.lower().split("x")
    if len(sides) > 2 or not all(side.isdecimal() and len(side) < 6 and int(side) > 0 for side in sides):
        raise InputError(f"--image-size {text}: expected a side in pixels, or HEIGHTxWIDTH")
    return int(sides[0]), int(sides[-1])


def _share(text: str) -> float:
    try:
        value = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError as error:
        raise InputError(f"--flops {text}: expected the share to keep, as 60% or 0.6") from error
    if not math.isfinite(value):
        raise InputError(f"--flops {text}: expected the share to keep, as 60% or 0.6")
    return value


def _ratios(text: str) -> tuple[float, ...]:
    values = _numbers(text, "--ratio")
    for value in values:
        if not 0 < value < 1:
            raise InputError(f"--ratio {value:g}: expected the share of tokens to remove, above 0 and below 1")
    return values


Model = Annotated[str, typer.Argument(metavar="MODEL", help="Checkpoint file, or a folder that prune wrote.")]
MaybeModel = Annotated[
    str | None, typer.Argument(metavar="[MODEL]", help="Folder or file; without it, the newest under compressed/.")
]
ImageSize = Annotated[
    str | None, typer.Option(help="Side of the images in pixels, or HEIGHTxWIDTH. Default: as trained.")
]
Stride = Annotated[int | None, typer.Option(min=1, help="Step between patches in pixels. Default: the patch size.")]
Weights = Annotated[str, typer.Option(help="Entry of a training checkpoint: model or model_ema.")]
Unsafe = Annotated[bool, typer.Option("--unsafe-load", help="Unpickle a file that could run code; only if trusted.")]
Mean = Annotated[str | None, typer.Option(help="Normalisation mean, one value or one a channel (0.485,0.456,0.406).")]
Std = Annotated[str | None, typer.Option(help="Normalisation deviation, likewise.")]
CropPct = Annotated[float | None, typer.Option(help="Share of the resized side that the centre crop keeps.")]
Interpolation = Annotated[str | None, typer.Option(help="bicubic, bilinear, nearest or lanczos.")]
Data = Annotated[
    str | None, typer.Option(help="Folder of (class folders of) images, parquet or arrow file, or hub name:split.")
]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...")]
Dtype = Annotated[Precision, typer.Option(help="Precision of matrix products when measuring.")]
BatchSize = Annotated[int, typer.Option(min=1, help="Images at a time; changes no result.")]
Workers = Annotated[int, typer.Option(min=0, help="Processes that decode images; 0: none besides this one.")]
Threads = Annotated[int | None, typer.Option(min=1, max=1024, help="Threads of the CPU. Default: all cores.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of a table.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="No progress and no messages.")]
Force = Annotated[bool, typer.Option("--force", help="Replace the output if it exists.")]
Atol = Annotated[float, typer.Option(min=0, help="Largest difference of a logit that is let pass.")]
Dense = Annotated[str | None, typer.Option(help="Dense model to compare with. Default: the one it was made from.")]


# ----------------------------------------------------------------------------------------------- shared steps


def _device(name: str):
    import torch

    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()  # a meta device has no values
    except Exception as error:
        raise InputError(f"--device {name}: not available here") from error
    return device


def _open(checkpoint, image_size, stride, weights, unsafe, mean, std, crop_pct, interpolation, device, threads):
    """A model with the preprocessing that the options ask for."""
    import torch

    from .checkpoint import load

    if threads is not None:
        torch.set_num_threads(threads)
    model = load(
        checkpoint,
        image_size=_size(image_size),
        stride=stride,
        weights=weights,
        device=_device(device),
        unsafe_load=unsafe,
    )
    model.preprocessing = model.preprocessing.changed(
        mean=_numbers(mean, "--mean"), std=_numbers(std, "--std"), crop_pct=crop_pct, interpolation=interpolation
    )
    return model


def _command() -> str:
    return shlex.join(["ssmcompress", *_arguments.get()])


def _say(message: str, quiet: bool) -> None:
    if not quiet:
        print(message, file=sys.stderr)


def _print_json(value: Any) -> None:
    print(json.dumps(value, indent=2, allow_nan=False))


@contextmanager
def _progress(quiet: bool) -> Iterator[None]:
    """Bars with the time left, on stderr, where that is a terminal."""
    from .progress import tracked_by

    if quiet or not sys.stderr.isatty():
        yield
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with (
        Progress(*columns, console=Console(stderr=True), transient=True) as progress,
        tracked_by(lambda items, what, total: progress.track(items, total=total, description=what)),
    ):
        yield


def _table(header: list[str], rows: list[tuple[str, list[str]]]) -> None:
    from rich.box import SIMPLE
    from rich.console import Console
    from rich.table import Table

    table = Table(box=SIMPLE, pad_edge=False)
    for i, name in enumerate(header):
        table.add_column(name, justify="right" if i else "left", no_wrap=True)
    for name, cells in rows:
        table.add_row(name, *cells)
    # No markup: names of users' folders are shown as they are.
    console = Console(markup=False, emoji=False, highlight=False, width=None if sys.stdout.isatty() else 160)
    console.print(table)


def _show_report(report: dict[str, Any], as_json: bool) -> None:
    from . import report as reports

    if as_json:
        _print_json(report)
        return
    _table(["", *reports.columns(report)], reports.rows(report))
    for note in reports.notes(report):
        print(f"  {note}")


def _output_beside(model: str, suffix: str, inside: bool) -> Path:
    """Default output of an export: in a model's folder or beside it, beside a checkpoint file."""
    path = Path(model)
    if path.is_dir():
        return path / f"model{suffix}" if inside else path.resolve().with_name(path.resolve().name + suffix)
    return path.with_name(f"{path.stem}-export{suffix}") if path.suffix == suffix else path.with_suffix(suffix)


# --------------------------------------------------------------------------------------------------- commands


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

    from .checkpoint import load
    from .flops import by_part, flops, reachable
    from .pruning.schedule import default_stages

    model = load(checkpoint, image_size=_size(image_size), stride=stride, weights=weights, unsafe_load=unsafe_load)
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
        _print_json(result)
        return
    size = "x".join(map(str, model.config.image_size))
    counts = f"{result['tokens'][0]} tokens" + (f", {result['tokens'][-1]} at the end" if model.plan else "")
    print(f"{model.architecture}, {len(model.blocks)} layers, images {size}, {counts}, {result['params']:,} parameters")
    lines = [(part, [f"{full[part]:.4g}", f"{paper[part]:.4g}"]) for part in full]
    lines.append(("total", [f"{result['flops'][c]:.4g}" for c in ("full", "paper")]))
    _table(["GFLOPs of one image", "full", "paper"], lines)
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
        str | None, typer.Option(help="Share of the FLOPs to KEEP, 60%; instead of --ratio, alike at each stage.")
    ] = None,
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
    plan: Annotated[
        str | None, typer.Option(help="JSON file with a plan: --dry-run --json output, or a model's config.json.")
    ] = None,
    data: Data = None,
    eval_data: Annotated[
        str | None, typer.Option(help="Images to measure on. Default: those of --data not calibrated on.")
    ] = None,
    samples: Annotated[int, typer.Option(min=1, help="Images to calibrate on, at most half of --data.")] = 1024,
    seed: Annotated[int, typer.Option(min=0, max=2**31 - 1, help="Of the images drawn and of importance random.")] = 0,
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
    latency: Annotated[bool, typer.Option("--latency/--no-latency", help="Time both models at batch 1.")] = True,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the plan and its FLOPs; write nothing.")] = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Prune tokens of a dense model: calibrate, prune, measure, and write a folder with the report."""
    ratios = _ratios(ratio) if ratio is not None else None
    share = _share(flops) if flops is not None else None
    layers = _numbers(stages, "--stages", int)
    given = [name for name, value in (("--ratio", ratio), ("--flops", flops), ("--plan", plan)) if value is not None]
    if len(given) > 1:
        raise InputError(f"{' and '.join(given)}: expected one of them")
    own = [("--stages", stages), ("--importance", importance), ("--align or --no-align", align)]
    if plan is not None and (extra := [name for name, value in own if value is not None]):
        raise InputError(f"--plan and {', '.join(extra)}: a plan has that in it")
    from .compression import Setup, compress, folder_name, plan_for_budget, preview
    from .flops import reachable
    from .pruning.calibrate import make_plan
    from .pruning.schedule import Plan, default_stages

    model = _open(
        checkpoint, image_size, stride, weights, unsafe_load, mean, std, crop_pct, interpolation, device, threads
    )
    options = {"stages": layers, "importance": (importance or Importance.clip).value, "seed": seed}
    options["alignment"] = align is not False
    if plan is not None:
        chosen = Plan.read(plan).validate(len(model.blocks))
    elif share is not None:
        where = layers or default_stages(len(model.blocks))
        make_plan(model, **options)  # speaks up about stages before the range is counted with them
        _say(f"reachable with stages {','.join(map(str, where))}: {reachable(model, where):.1%} to 100%", quiet)
        chosen = plan_for_budget(model, share, **options)
    else:
        ratios = ratios or (0.3,)
        chosen = make_plan(model, ratio=ratios[0] if len(ratios) == 1 else ratios, **options)
    if dry_run:
        _show_preview(preview(model, chosen), as_json)
        return
    folder = Path(output or Path("compressed", folder_name(checkpoint, {
        "plan": Path(plan).stem if plan else None, "f": share, "r": ratios, "s": layers,
        "": importance.value if importance not in (None, Importance.clip) else None,
        "no-align": "" if align is False else None, "gap-": gap.value if gap else None, "seed": seed or None,
        "weights-": weights if weights != "model" else None, "image": image_size, "stride": stride,
    })))  # fmt: skip
    import torch

    setup = Setup(
        data=data,
        eval_data=eval_data,
        samples=samples,
        gap=gap.value if gap else None,
        seed=seed,
        batch_size=batch_size,
        workers=workers,
        dtype=getattr(torch, dtype.value),
        measure_latency=latency,
    )
    with _progress(quiet):
        report = compress(model, chosen, folder, setup, command=_command(), force=force)
    _show_report(report, as_json)
    _say_about_data(report, quiet)
    _say(f"wrote {folder}", quiet)


def _show_preview(value: dict[str, Any], as_json: bool) -> None:
    if as_json:
        _print_json(value)
        return
    for stage in value["stages"]:
        print(f"  after layer {stage['after']}: {stage['kept']} of {stage['of']} tokens, {stage['importance']}")
    for convention in ("full", "paper"):
        dense, pruned = (value[name]["flops"][convention] for name in ("dense", "pruned"))
        print(f"  GFLOPs ({convention}): {dense:.4g} -> {pruned:.4g} ({pruned / dense - 1:+.1%})")


def _say_about_data(report: dict[str, Any], quiet: bool) -> None:
    if not report["data"]["labelled"]:
        _say(f"accuracy was not measured: {report['data']['name']} has no labels; give --data", quiet)
    for block in ("data", "calibration"):
        if names := report[block]["unreadable"]:
            _say(f"skipped {len(names)} unreadable images: {', '.join(names[:3])}", quiet)


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

    from .batches import Batches
    from .checkpoint import find_dense
    from .data import find_images
    from .evaluation import evaluate as evaluate_model

    loaded = _open(model, image_size, stride, weights, unsafe_load, mean, std, crop_pct, interpolation, device, threads)
    reference = None
    if dense is not None or loaded.plan is not None:
        try:
            reference = find_dense(loaded, dense)
        except InputError as error:
            if dense is not None:
                raise
            _say(f"agreement was not measured: {error}; give --dense", quiet)
    images = find_images(loaded, data)
    batches = Batches(images, loaded, range(len(images)), batch_size, workers)
    with _progress(quiet):
        found = evaluate_model(loaded, batches, dense=reference, dtype=getattr(torch, dtype.value))
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
        _print_json(result)
    else:
        rows = [("top-1", found.top1, "%"), ("top-5", found.top5, "%")]
        rows += [("same class as dense", found.agreement, "%"), ("KL from dense", found.kl, "nats")]
        lines = [(name, [f"{value:.4g} {unit}"]) for name, value, unit in rows if value is not None]
        _table(["", "model"], lines)
        print(f"  measured on {found.images} images of {images.name}")
    if not found.labelled:
        _say(f"accuracy was not measured: {images.name} has no labels; give --data", quiet)
    if unreadable:
        _say(f"skipped {len(unreadable)} unreadable images: {', '.join(unreadable[:3])}", quiet)


@app.command()
def report(
    model: MaybeModel = None,
    html: Annotated[str | None, typer.Option(help="Also write a web page to this file.")] = None,
    force: Force = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Show the report of a compressed model."""
    from . import report as reports
    from .files import write_file

    folder, content = reports.read(model)
    if html is not None:
        picture = folder / reports.PICTURE_FILE
        page = reports.to_html(content, folder.name, picture.read_bytes() if picture.is_file() else None)
        write_file(Path(html), page.encode(), force)
        _say(f"wrote {html}", quiet)
    if model is None:
        _say(f"{folder}:", quiet)
    _show_report(content, as_json)


@app.command()
def export(
    model: MaybeModel = None,
    onnx: Annotated[
        bool, typer.Option("--onnx", help="Write an ONNX file; without it, one .safetensors file.")
    ] = False,
    output: Annotated[str | None, typer.Option("--output", "-o", help="File to write.")] = None,
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
    from . import report as reports
    from .checkpoint import serialise
    from .files import check_target, write_file

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
            _print_json({"file": str(file)})
        _say(f"wrote {file}", quiet)
        return
    from .export import export_onnx

    with _progress(quiet), _shown_when_it_fails(file, as_json):
        result = export_onnx(loaded, file, data=data, atol=atol, force=force)
    _show_verification(result, file, as_json)
    _say(f"wrote {file}", quiet)


@app.command()
def verify(
    model: Model,
    file: Annotated[str, typer.Argument(metavar="FILE.onnx", help="ONNX file made from it.")],
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
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Check that an ONNX file computes what a model computes, in onnxruntime, on real images."""
    from .export import verify_onnx

    loaded = _open(model, image_size, stride, weights, unsafe_load, mean, std, crop_pct, interpolation, "cpu", threads)
    with _progress(quiet), _shown_when_it_fails(Path(file), as_json):
        result = verify_onnx(loaded, Path(file), data=data, atol=atol)
    _show_verification(result, Path(file), as_json)


@contextmanager
def _shown_when_it_fails(file: Path, as_json: bool) -> Iterator[None]:
    """A script that asked for JSON gets the figures of a verification that failed, too."""
    try:
        yield
    except VerificationError as error:
        if as_json and error.result is not None:
            _show_verification(error.result, file, as_json)
        raise


def _show_verification(result: Any, file: Path, as_json: bool) -> None:
    if as_json:
        from dataclasses import asdict

        worst = result.max_difference if math.isfinite(result.max_difference) else None
        _print_json({"file": str(file), **asdict(result), "max_difference": worst, "passed": result.passed})
        return
    print(
        f"{file}: largest difference {result.max_difference:.2g} (allowed {result.atol:g}), "
        f"{result.top1_agreement:.1f}% in the same class, {result.images} images of {result.data}"
    )
    if result.ties:
        print(
            f"  {len(result.ties)} images kept other tokens, their scores being equal but for rounding: "
            f"{', '.join(result.ties)}"
        )


@app.command()
def demo(
    output: Annotated[str | None, typer.Option("--output", "-o", help="Folder to write.")] = None,
    force: Force = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """The whole chain on a small trained Vim and 2,000 images that come with the package."""
    from .checkpoint import load
    from .compression import compress
    from .export import export_onnx
    from .pruning.calibrate import make_plan

    bundled = Path(__file__).parent / "assets" / "vim-fashion-mnist"
    folder = Path(output) if output else Path("compressed") / f"{bundled.name}-demo"
    model = load(bundled)
    with _progress(quiet):
        _say("pruning 60 % of the tokens after layer 3 of 8 of a small Vim trained on Fashion-MNIST", quiet)
        plan = make_plan(model, stages=(3,), ratio=0.6)
        report = compress(model, plan, folder, command=_command(), force=force)
        _say("exporting to ONNX and checking it in onnxruntime", quiet)
        result = export_onnx(load(folder), folder / "model.onnx")
    if as_json:
        from dataclasses import asdict

        _print_json({**report, "onnx": {"file": str(folder / "model.onnx"), **asdict(result), "passed": True}})
    else:
        _show_report(report, False)
        _show_verification(result, folder / "model.onnx", False)
    _say(f"wrote {folder}; look at kept_tokens.png there, or run `ssmcompress report --html report.html`", quiet)


def main() -> None:
    """Entry point of the `ssmcompress` command."""
    app()
