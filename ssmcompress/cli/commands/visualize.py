"""`ssmcompress visualize`: attention maps and kept tokens as pictures and as a web page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from ...hub_names import parse_hub_name
from ..groups import Batching, Data, Dense, Hardware, Load, Model, Printing
from ..inputs import check_inputs
from ..options import IMAGES, MAPS, OUTPUT, option
from ..tables import print_json, show_visualized
from ..terminal import command_line, find_dense_or_say, progress_bars, say, say_about_images
from ..values import parse_numbers

EXAMPLE = "ssmcompress visualize compressed/model-r0.30 --data images"


def visualize(
    model: Model,
    load: Load,
    printing: Printing,
    hardware: Hardware,
    batching: Batching,
    data: Data = None,
    dense: Dense = None,
    images: Annotated[int, option(IMAGES, min=1, help="Number of images to draw.")] = 8,
    survey: Annotated[int, option(IMAGES, min=1, help="Maximum number of images to compute the figures on.")] = 1000,
    seed: Annotated[int, option(IMAGES, min=0, max=2**31 - 1, help="Seed for the choice of images.")] = 0,
    layers: Annotated[
        str | None,
        option(MAPS, help="Layers to map, numbered as in the dense model. Default: the last 3/8 of them."),
    ] = None,
    method: Annotated[
        str,
        option(
            MAPS,
            metavar="METHOD",
            help="How to compute the maps: row (exact), or the published xai, raw, rollout or attribution.",
        ),
    ] = "row",
    output: Annotated[
        str | None,
        option(
            OUTPUT,
            "--output",
            "-o",
            help="Output folder. Default: attention in the folder of MODEL; for a file, visualized/NAME.",
        ),
    ] = None,
    force: Annotated[bool, option(OUTPUT, "--force", help="Replace the output if it exists.")] = False,
) -> None:
    """Show what pruning does: attention maps, kept tokens, and a web page to explore them."""
    check_inputs(model, {"--data": data})
    numbers = parse_numbers(layers, "--layers", int)
    from ...jobs.requests import DataOptions
    from ...jobs.visualize import VisualizeRequest, default_folder, visualize

    reading = {name: getattr(batching, name) for name in ("batch_size", "workers", "reduce_zero_label")}
    request = VisualizeRequest(DataOptions(data, seed=seed, **reading), images, survey, numbers, method)
    request.check()
    loaded = load.open(model, hardware)
    found = None
    if dense is not None or loaded.plan is not None:
        found = find_dense_or_say(loaded, dense, "the dense model is not shown", printing.quiet)
    folder = Path(output) if output else default_folder(model)
    with progress_bars(printing.quiet):
        title = Path(model).resolve().name if (hub := parse_hub_name(model)) is None else str(hub)
        result = visualize(loaded, request, folder, dense=found, title=title, command=command_line(), force=force)
    if printing.as_json:
        print_json(result)
    else:
        show_visualized(result)
    say_about_images(result, printing.quiet, agreement=len(result["variants"]) > 1)
    say(f"wrote {folder}/index.html, {len(result['files']) - 1} other files", printing.quiet)
