"""`ssmcompress finetune`: train a pruned model further."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from ... import processes
from ...errors import InputError
from ..groups import ForceFolder, Hardware, Load, Measure, NoLatency, ReportPrinting, Training, TrainingImages
from ..options import FINETUNING, OUTPUT, option
from ..recipes import make_recipe
from ..tables import show_report
from ..terminal import command_line, find_dense_or_say, progress_bars, say, say_about_data, say_how_to_resume

EXAMPLE = "ssmcompress finetune compressed/model-r0.30 --data images --epochs 2 -o tuned"


def finetune(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Pruned model, a folder that prune wrote.")],
    images: TrainingImages,
    load: Load,
    training: Training,
    printing: ReportPrinting,
    hardware: Hardware,
    measure: Measure,
    epochs: Annotated[
        int | None, option(FINETUNING, min=1, help="Number of epochs. Default: from the recipe, 3.")
    ] = None,
    dense: Annotated[
        str | None, option(FINETUNING, help="Teacher. Default: the dense model that MODEL was made from.")
    ] = None,
    teacher: Annotated[
        bool,
        option(
            FINETUNING, "--teacher/--no-teacher", help="Also train on the outputs of the dense model (distillation)."
        ),
    ] = True,
    output: Annotated[
        str | None,
        option(OUTPUT, "--output", "-o", help="Output folder; may be MODEL itself with --force or --resume."),
    ] = None,
    resume: Annotated[
        bool, option(OUTPUT, "--resume", help="Continue an interrupted run; a finished one returns at once.")
    ] = False,
    force: ForceFolder = False,
    no_latency: NoLatency = False,
) -> None:
    """Train a pruned model with the dense one as teacher, labels, or both."""
    if images.data is None:
        raise InputError("fine-tuning needs training images: give --data")
    if output is None:
        raise InputError("no output folder for the fine-tuned model: give -o FOLDER")
    if resume and force:
        raise InputError("--resume continues a run and --force starts over: give only one of them")
    options = training.options(epochs, teacher)
    images.check(model)
    from ...jobs.finetune import FinetuneTarget, finetune_folder

    loaded = load.open(model, hardware)
    found = find_dense_or_say(loaded, dense, "training on labels only; agreement will not be measured", printing.quiet)
    target = FinetuneTarget(Path(output), force, command_line(), inside=Path(model), resume=resume)
    if not target.in_place:  # otherwise the starting point of the recipe has been overwritten
        target = replace(target, recipe=make_recipe(target.path, model, loaded))
    again = f"ssmcompress finetune {model} ... -o {output} --resume"
    with progress_bars(printing.quiet), say_how_to_resume({target.state: again}, printing.quiet):
        data, measuring = images.options(measure), measure.options(not no_latency)
        report = finetune_folder(loaded, target, options, data, measuring, dense=found)
    if processes.is_main():
        show_report(report, printing.as_json, printing.verbose)
        say_about_data(report, printing.as_json, printing.quiet)
        say(f"wrote {output}", printing.quiet)
