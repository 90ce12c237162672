"""`ssmcompress prune`: prune a dense model, or a pruned one further, and write it to a folder."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

from ... import processes
from ..groups import (
    Budget,
    Checkpoint,
    FinetuneToo,
    Hardware,
    Images,
    Load,
    Measure,
    NoLatency,
    Output,
    Pruning,
    ReportPrinting,
)
from ..options import MODEL_FILE, OUTPUT, option
from ..recipes import make_recipe
from ..tables import show_preview, show_report
from ..terminal import command_line, progress_bars, say, say_about_data, say_how_to_resume

EXAMPLE = """
ssmcompress prune model.pt --ratio 0.3 --data images
ssmcompress prune model.pt --flops 60% --data images -o compressed/small
ssmcompress prune compressed/model-r0.30 --ratio 0.4 --data images
"""


def prune(
    checkpoint: Checkpoint,
    budget: Budget,
    pruning: Pruning,
    images: Images,
    load: Load,
    tuning: FinetuneToo,
    output: Output,
    printing: ReportPrinting,
    hardware: Hardware,
    measure: Measure,
    no_latency: NoLatency = False,
    dense: Annotated[
        str | None,
        option(MODEL_FILE, help="Dense model of a compressed CKPT. Default: the one that it was made from."),
    ] = None,
    resume: Annotated[
        bool, option(OUTPUT, "--resume", help="Resume an interrupted run of this command from its saved results.")
    ] = False,
    dry_run: Annotated[bool, option(OUTPUT, "--dry-run", help="Show the plan and its FLOPs; write nothing.")] = False,
) -> None:
    """Trim tokens, and within a budget also states, channels and layers, of a model; write it with a report."""
    plan = pruning.plan_request(budget)
    plan.check()
    gap, finetune = pruning.gap.value if pruning.gap else None, tuning.options_if_asked()
    images.check(checkpoint)
    from ...jobs.finetune import FinetuneTarget
    from ...jobs.prune import CompressOptions, PruneRequest, preview_request, prune_model

    data, measuring = images.options(measure), measure.options(not no_latency)
    options = CompressOptions(data, measuring, gap, pruning.reconstruct, finetune=finetune)
    request = PruneRequest(plan, options, load.folder_labels)
    request.check()
    model = load.open(checkpoint, hardware)
    folder = output.path(request.folder(checkpoint))
    recipe = "" if dry_run else make_recipe(folder, checkpoint, model)
    target = FinetuneTarget(folder, output.force, command_line(), recipe, resume=resume)
    if model.plan is not None:  # its file is read again and must be kept for the recipe
        target = replace(target, inside=Path(checkpoint))
    again = f"ssmcompress finetune {target.path} ... -o {target.path} --resume"
    interrupted = {target.state: again, target.results: command_line() + " --resume" * (not resume)}
    with progress_bars(printing.quiet), say_how_to_resume(interrupted, printing.quiet):
        result = preview_request(model, request, dense) if dry_run else prune_model(model, request, target, dense)
    if not processes.is_main():
        return
    if dry_run:
        show_preview(result, printing.as_json)
        return
    show_report(result, printing.as_json, printing.verbose)
    say_about_data(result, printing.as_json, printing.quiet)
    say(f"wrote {target.path}", printing.quiet)
