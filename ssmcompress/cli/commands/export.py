"""`ssmcompress export`: a model as one file."""

from __future__ import annotations

from typing import Annotated

from ..groups import Data, Dense, Force, Load, MaybeModel, Printing, Processor
from ..onnx_options import Atol, Provider
from ..options import HARDWARE, OUTPUT, option
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
    latency: Annotated[
        bool, option(HARDWARE, "--latency/--no-latency", help="Time onnxruntime and torch, dense and pruned.")
    ] = True,
    provider: Provider = "cpu",
) -> None:
    """Write a model as one file; ONNX is verified in onnxruntime first."""
    from ...jobs.export import choose_file, export_graph, export_weights
    from ...jobs.report import find_newest

    path = model or str(find_newest())
    file = choose_file(path, output, onnx, force)
    loaded = load.open(path, processor)
    if not onnx:
        export_weights(loaded, path, file, force)
        if printing.as_json:
            print_json({"file": str(file)})
        say(f"wrote {file}", printing.quiet)
        return
    from ...export.onnx import OnnxOptions

    options = OnnxOptions(data, atol, opset, scan.value, dtype.value, provider, debug_outputs, latency)
    found = None
    if dense is not None or (latency and loaded.plan is not None):
        found = find_dense_or_say(loaded, dense, "the dense model was not timed", printing)
    with progress_bars(printing.quiet), show_when_it_fails(file, printing.as_json):
        result = export_graph(loaded, path, file, options, dense=found, force=force)
    show_export(result, file, printing.as_json)
    say(f"wrote {file}", printing.quiet)
