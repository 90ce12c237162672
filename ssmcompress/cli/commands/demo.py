"""`ssmcompress demo`: the whole workflow on the bundled model and images."""

from __future__ import annotations

from ..groups import Output, Processor, ReportPrinting
from ..recipes import describe_run
from ..tables import print_json, show_export, show_report, verification_json
from ..terminal import command_line, progress_bars, say

EXAMPLE = "ssmcompress demo"


def demo(output: Output, printing: ReportPrinting, processor: Processor) -> None:
    """Prune, measure and export a small trained Vim that is included."""
    from ...jobs.demo import BUNDLED, DEFAULT_FOLDER, RATIO, SAMPLES, STAGES, run_demo

    processor.start()
    folder = output.path(DEFAULT_FOLDER)
    options = {"ratio": RATIO, "stages": [*STAGES], "samples": SAMPLES}
    recipe = describe_run(folder, "prune", str(BUNDLED), None, options)
    with progress_bars(printing.quiet):
        report, exported = run_demo(folder, command=command_line(), force=output.force, recipe=recipe)
    file = folder / "model.onnx"
    if printing.as_json:
        print_json({**report, "onnx": None if exported is None else verification_json(exported, file)})
    else:
        show_report(report, False, printing.verbose)
        if exported is not None:
            show_export(exported, file, False)
    hint = "look at kept_tokens.png there, or run `ssmcompress report --html report.html`"
    say(f"wrote {folder}; {hint}", printing.quiet)
