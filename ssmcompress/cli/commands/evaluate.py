"""`ssmcompress evaluate`: measure a model on images."""

from __future__ import annotations

from ..groups import Data, Dense, Hardware, Load, Measure, Model, Printing
from ..inputs import check_inputs
from ..tables import print_json, show_evaluation
from ..terminal import find_dense_or_say, progress_bars, say, say_about_images, say_warnings

EXAMPLE = "ssmcompress evaluate compressed/model-r0.30 --data images"


def evaluate(
    model: Model,
    load: Load,
    printing: Printing,
    hardware: Hardware,
    measure: Measure,
    data: Data = None,
    dense: Dense = None,
) -> None:
    """Measure accuracy on images, and agreement with the dense model."""
    check_inputs(model, {"--data": data})
    from ...jobs.evaluate import evaluate_model
    from ...jobs.report_text import describe_overlap
    from ...jobs.requests import DataOptions

    loaded = load.open(model, hardware)
    found = None
    if dense is not None or loaded.plan is not None:
        found = find_dense_or_say(loaded, dense, "agreement was not measured", printing.quiet)
    reading = {name: getattr(measure, name) for name in ("batch_size", "workers", "reduce_zero_label")}
    options = DataOptions(data, **reading)
    with progress_bars(printing.quiet):
        result = evaluate_model(loaded, options, measure.options(), dense=found)
    if printing.as_json:
        print_json(result)
        say_warnings(result, printing.quiet)
    else:
        show_evaluation(result)
    say_about_images(result, printing.quiet, agreement="agreement" in result)
    if loaded.plan is not None and (overlap := describe_overlap(result["data"])):
        say(overlap, printing.quiet)
