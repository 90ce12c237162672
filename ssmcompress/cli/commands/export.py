"""`ssmcompress export`: write a model as one file."""

from __future__ import annotations

from typing import Annotated

from ..groups import Force, Load, MaybeModel, NoLatency, OnnxFile, Printing, Processor
from ..inputs import check_inputs
from ..options import OUTPUT, option
from ..tables import print_json, show_export, show_when_it_fails, write
from ..terminal import find_dense_or_say, progress_bars, say

EXAMPLE = "ssmcompress export compressed/model-r0.30 --onnx -o model.onnx"


def export(
    load: Load,
    printing: Printing,
    processor: Processor,
    graph: OnnxFile,
    model: MaybeModel = None,
    onnx: Annotated[
        bool, option(OUTPUT, "--onnx", help="Write an ONNX file; without it, one .safetensors file.")
    ] = False,
    output: Annotated[str | None, option(OUTPUT, "--output", "-o", help="File to write.")] = None,
    force: Force = False,
    no_latency: NoLatency = False,
) -> None:
    """Write a model as one file; ONNX is verified in onnxruntime first."""
    graph.check(onnx)
    from ...export.runtime import describe_session
    from ...jobs.export import choose_file, export_graph, export_weights
    from ...jobs.report import find_newest

    path = model or str(find_newest())
    check_inputs(path, {"--data": graph.data})
    loaded, dense = load.open(path, processor), None
    if onnx and (graph.dense is not None or (not no_latency and loaded.plan is not None)):
        dense = find_dense_or_say(loaded, graph.dense, "the dense model was not timed", printing.quiet)
    file = choose_file(path, output, onnx, force)
    if model is None:
        say(f"{path}:", printing.quiet)
    if not onnx:
        export_weights(loaded, path, file, force)
        if printing.as_json:
            print_json({"file": str(file)})
        say(f"wrote {file}, which every command accepts as MODEL (use --onnx to write an ONNX file)", printing.quiet)
        return
    with progress_bars(printing.quiet), show_when_it_fails(file, printing.as_json):
        options = graph.options(latency=not no_latency)
        result = export_graph(loaded, path, file, options, dense=dense, force=force)
    show_export(result, file, printing.as_json)
    if not printing.as_json:
        write(f"  session options in its metadata: {describe_session(result.session)}")
    say(f"wrote {file}", printing.quiet)
