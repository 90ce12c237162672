"""`ssmcompress compare`: methods of compression on one model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from ...errors import InputError
from ..groups import Checkpoint, Hardware, Images, Load, Measure, NoLatency, Printing, Stages
from ..options import BUDGET, OUTPUT, PRUNING, option
from ..tables import print_json, show_comparison
from ..terminal import command_line, progress_bars, say, say_warnings
from ..values import parse_numbers, parse_shares

EXAMPLE = "ssmcompress compare model.pt --data images --flops 75%,60% --reconstruct"


def compare(
    checkpoint: Checkpoint,
    stages: Stages,
    images: Images,
    load: Load,
    printing: Printing,
    hardware: Hardware,
    measure: Measure,
    ratios: Annotated[
        str | None,
        option(BUDGET, help="Shares of tokens REMOVED at each stage, a level each. Default 0.1,0.2,0.3,0.5."),
    ] = None,
    flops: Annotated[str | None, option(BUDGET, help="Levels as shares of the FLOPs to KEEP: 75%,60%,50%.")] = None,
    methods: Annotated[
        str | None, option(PRUNING, help="Only these, with semicolons between them: 'naive; clip, aligned; all axes'.")
    ] = None,
    search: Annotated[bool, option(PRUNING, "--search", help="Also the plans that a search finds.")] = False,
    reconstruct: Annotated[
        bool,
        option(
            PRUNING,
            "--reconstruct",
            help="Also with later layers refitted; with --search also states, channels or layers trimmed, all axes "
            "together, and a smaller image.",
        ),
    ] = False,
    output: Annotated[
        str | None, option(OUTPUT, "--output", "-o", help="Folder to write; a comparison in it is continued.")
    ] = None,
    force: Annotated[bool, option(OUTPUT, "--force", help="Start afresh in a folder that has a comparison.")] = False,
    no_latency: NoLatency = False,
) -> None:
    """Compare pruning methods on a model: a table, JSON, CSV and a plot."""
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
    images.check(checkpoint)
    from ...jobs.compare import compare_methods

    model = load.open(checkpoint, hardware)
    folder = Path(output or Path("compared", Path(checkpoint).resolve().stem))
    with progress_bars(printing.quiet):
        result = compare_methods(model, request, folder, command=command_line(), force=force)
    if printing.as_json:
        print_json(result)
        say_warnings(result, printing.quiet)
    else:
        show_comparison(result)
    say(f"wrote {folder}/compare.json, compare.csv, pareto.png and pareto.svg", printing.quiet)
