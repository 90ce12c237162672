"""`ssmcompress export`: a model as one file."""

from __future__ import annotations

from typing import Annotated

from ..groups import Data, Dense, Force, Load, MaybeModel, NoLatency, Printing, Processor
from ..inputs import check_inputs
from ..onnx_options import Atol, Provider
from ..options import OUTPUT, option
from ..tables import print_json, show_export, show_when_it_fails
from ..terminal import find_dense_or_say, progress_bars, say
from ..values import ScanForm, Stored

EXAMPLE = "ssmcompress export compressed/model-r0.30 --onnx -o model.onnx"


def export(
    load: Load,
    printing: Printing,
    processor: Processor,
    model: MaybeModel = None,
    onnx: Annotated[
        bool, option(OUTPUT, "--onnx", help="Write an ONNX file; without it, one .safetensors file.")
    ] = False,
    output: Annotated[str | None, option(OUTPUT, "--output", "-o", help="File to write.")] = None,
    opset: Annotated[
        int | None, option(OUTPUT, help="ONNX opset. Default: the newest that the installed onnxruntime runs.")
    ] = None,
    scan: Annotated[
        ScanForm,
        option(
            OUTPUT,
            help="How ONNX computes the scans: step by step (scan), onnxruntime's LinearAttention, or opset 27's "
            "(standard). auto: the fastest here.",
        ),
    ] = ScanForm.auto,
    dtype: Annotated[
        Stored, option(OUTPUT, help="Type of the matrices in the ONNX file; it computes in float32 in any case.")
    ] = Stored.float32,
    debug_outputs: Annotated[
        bool, option(OUTPUT, "--debug-outputs", help="Also output the tokens that each stage keeps.")
    ] = False,
    force: Force = False,
    data: Data = None,
    dense: Dense = None,
    atol: Atol = 1e-4,
    no_latency: NoLatency = False,
    provider: Provider = "cpu",
) -> None:
    """Write a model as one file; ONNX is verified in onnxruntime first."""
    from ...jobs.export import choose_file, export_graph, export_weights
    from ...jobs.report import find_newest

    path = model or str(find_newest())
    check_inputs(path, {"--data": data})
    loaded, found = load.open(path, processor), None
    if onnx and (dense is not None or (not no_latency and loaded.plan is not None)):
        found = find_dense_or_say(loaded, dense, "the dense model was not timed", printing.quiet)
    file = choose_file(path, output, onnx, force)
    if not onnx:
        export_weights(loaded, path, file, force)
        if printing.as_json:
            print_json({"file": str(file)})
        say(f"wrote {file}, one file that every command takes as MODEL (--onnx writes an ONNX file)", printing.quiet)
        return
    from ...export.onnx import OnnxOptions

    options = OnnxOptions(data, atol, opset, scan.value, dtype.value, provider, debug_outputs, not no_latency)
    with progress_bars(printing.quiet), show_when_it_fails(file, printing.as_json):
        result = export_graph(loaded, path, file, options, dense=found, force=force)
    show_export(result, file, printing.as_json)
    say(f"wrote {file}", printing.quiet)
