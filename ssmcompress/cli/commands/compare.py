"""`ssmcompress compare`: compression methods on one or several models."""

from __future__ import annotations

from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ...errors import InputError, OptionError
from ...hub_names import parse_hub_name
from ..comparison_tables import show_comparison, show_models
from ..groups import Hardware, Images, Load, Measure, NoLatency, Printing, Stages
from ..options import BUDGET, OUTPUT, PRUNING, option
from ..tables import print_json
from ..terminal import command_line, is_quiet, progress_bars, say, say_warnings
from ..values import parse_numbers, parse_shares

if TYPE_CHECKING:
    from ...jobs.requests import CompareRequest
    from ...models.base import TokenModel

EXAMPLE = "ssmcompress compare model.pt --data images --flops 75%,60% --reconstruct"

Checkpoints = Annotated[
    list[str],
    typer.Argument(
        metavar="CKPT",
        help="Dense checkpoints, files or folders. With several, the options under Model file apply only to files.",
    ),
]


def compare(
    checkpoints: Checkpoints,
    stages: Stages,
    images: Images,
    load: Load,
    printing: Printing,
    hardware: Hardware,
    measure: Measure,
    ratios: Annotated[
        str | None,
        option(BUDGET, help="Shares of tokens REMOVED at each stage, one per level. Default 0.1,0.2,0.3,0.5."),
    ] = None,
    flops: Annotated[str | None, option(BUDGET, help="Levels as shares of the FLOPs to KEEP: 75%,60%,50%.")] = None,
    methods: Annotated[
        str | None,
        option(PRUNING, help="Only these methods, separated by semicolons: 'naive; clip, aligned; all axes'."),
    ] = None,
    search: Annotated[bool, option(PRUNING, "--search", help="Also compare plans found by a search.")] = False,
    reconstruct: Annotated[
        bool,
        option(
            PRUNING,
            "--reconstruct",
            help="Also refit later layers; with --search, also trim states, channels or layers, or all axes.",
        ),
    ] = False,
    output: Annotated[
        str | None, option(OUTPUT, "--output", "-o", help="Output folder; a comparison in it is resumed.")
    ] = None,
    force: Annotated[
        bool, option(OUTPUT, "--force", help="Start over if the folder already has a comparison.")
    ] = False,
    no_latency: NoLatency = False,
) -> None:
    """Compare pruning methods on one or several models: a table, JSON, CSV and a plot."""
    if ratios is not None and flops is not None:
        raise InputError("--ratios and --flops: expected one of them")
    shares = parse_shares(flops, "--flops", "shares to keep")
    removed = parse_shares(ratios or "0.1,0.2,0.3,0.5", "--ratios", "shares of tokens to remove")
    names = tuple(name.strip() for name in methods.split(";") if name.strip()) if methods is not None else None
    from ...jobs.requests import CompareRequest

    where, gap = parse_numbers(stages.stages, "--stages", int), stages.gap.value if stages.gap else None
    data, measuring = images.options(measure), measure.options(not no_latency)
    request = CompareRequest(removed, shares, where, names, search, reconstruct, data, measuring, gap)
    request.check()
    for checkpoint in checkpoints:
        images.check(checkpoint)
    job = _compare_one if len(checkpoints) == 1 else _compare_several
    with progress_bars(printing.quiet):
        result, folder = job(checkpoints, load, hardware, request, output, force)
    if printing.as_json:
        print_json(result)
        say_warnings(result, printing.quiet)
    else:
        (show_models if "models" in result else show_comparison)(result)
    each = ", and a folder for each model" if "models" in result else ""
    say(f"wrote {folder}/compare.json, compare.csv, pareto.png and pareto.svg{each}", printing.quiet)


def _compare_one(
    checkpoints: list[str], load: Load, hardware: Hardware, request: CompareRequest, output: str | None, force: bool
) -> tuple[dict[str, Any], Path]:
    """Compare methods on one model; return the result and its folder."""
    from ...jobs.compare import compare_methods

    model = load.open(checkpoints[0], hardware)
    hub = parse_hub_name(checkpoints[0])
    folder = Path(output or Path("compared", hub.title if hub is not None else Path(checkpoints[0]).resolve().stem))
    return compare_methods(model, request, folder, command=command_line(), force=force), folder


def _open_any(load: Load, path: str, hardware: Hardware) -> TokenModel:
    """Open one of several models, ignoring options that only apply to others of them, such as the heads of a ViT."""
    try:
        return load.open(path, hardware)
    except OptionError as error:
        say(f"{error}; the option is ignored", is_quiet())
        return replace(load, num_heads=None, level=None).open(path, hardware)


def _compare_several(
    checkpoints: list[str], load: Load, hardware: Hardware, request: CompareRequest, output: str | None, force: bool
) -> tuple[dict[str, Any], Path]:
    """Compare methods on several models; return the result and its folder."""
    recorded = Load(task=load.task)  # folders record how they are loaded
    given = [f"`{field.name}`" for field in fields(Load) if getattr(load, field.name) != getattr(recorded, field.name)]
    folders = [checkpoint for checkpoint in checkpoints if Path(checkpoint).is_dir()]
    if given and folders:
        if len(folders) == len(checkpoints):
            raise InputError(f"{', '.join(given)}: only for checkpoint files, but all models are folders; leave it out")
        say(
            f"{', '.join(given)}: applied to files only; folders keep their own settings ({', '.join(folders)})",
            is_quiet(),
        )
    from ...jobs.compare_models import Candidate, compare_models, name_folder, name_models

    names = name_models(checkpoints)
    candidates = [
        Candidate(name, partial(_open_any, recorded if Path(path).is_dir() else load, path, hardware))
        for name, path in zip(names, checkpoints, strict=True)
    ]
    folder = Path(output) if output else name_folder(names)
    return compare_models(candidates, request, folder, command=command_line(), force=force), folder
