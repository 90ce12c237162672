"""`ssmcompress benchmark`: latency, throughput and memory."""

from __future__ import annotations

from typing import Annotated

import typer

from ...errors import InputError
from ..groups import Hardware, Printing, Reading
from ..options import HARDWARE, option
from ..tables import show_benchmark
from ..terminal import progress_bars, say
from ..values import Precision, parse_numbers

EXAMPLE = "ssmcompress benchmark compressed/model-r0.30 --batch-sizes 1,8"


def benchmark(
    reading: Reading,
    printing: Printing,
    hardware: Hardware,
    models: Annotated[
        list[str] | None,
        typer.Argument(metavar="MODEL", help="Files or folders. A single pruned model is timed with its dense model."),
    ] = None,
    batch_sizes: Annotated[str, option(HARDWARE, help="Comma-separated batch sizes, one table row each.")] = "1,8",
    repeats: Annotated[int, option(HARDWARE, min=1, help="Timed runs per model; the runs are interleaved.")] = 9,
    reference: Annotated[bool, option(HARDWARE, "--reference", help="Also time each with the reference scan.")] = False,
    peers: Annotated[
        bool, option(HARDWARE, "--peers", help="Also time timm's DeiT-tiny and DeiT-small, with random weights.")
    ] = False,
    ops: Annotated[
        bool, option(HARDWARE, "--ops", help="Time only the scan and the convolution, with each backend.")
    ] = False,
    shape: Annotated[
        str | None, option(HARDWARE, help="With --ops: batch,length,d_inner,d_state. Default: Vim-small's, 224 px.")
    ] = None,
    dtype: Annotated[
        Precision | None, option(HARDWARE, help="Precision. Default: float32; for --ops on a GPU bfloat16 and float32.")
    ] = None,
) -> None:
    """Time models next to each other in one run, or with --ops the ops."""
    sizes, extents = parse_numbers(batch_sizes, "--batch-sizes", int), parse_numbers(shape, "--shape", int)
    if not models and not ops:
        raise InputError("nothing to time: give models, or --ops")
    if peers and not models:
        raise InputError("--peers: expected at least one model to compare with")
    if extents and not ops:
        raise InputError("--shape is the shape of the input of --ops")
    if min(sizes) < 1:
        raise InputError(f"--batch-sizes {batch_sizes}: expected numbers above 0")
    if extents and (len(extents) != 4 or min(extents) < 1):
        raise InputError(f"--shape {shape}: expected batch,length,d_inner,d_state, all above 0")
    from ...jobs.benchmark import BenchmarkRequest, add_dense, benchmark_all

    device = hardware.start()
    loaded = {path: reading.open(path, hardware) for path in dict.fromkeys(models or [])}
    try:
        loaded = add_dense(loaded)
    except InputError as error:
        say(f"the dense model was not timed: {error}", printing.quiet)
    request = BenchmarkRequest(sizes, repeats, dtype.value if dtype else None, reference, peers, ops, extents)
    with progress_bars(printing.quiet):
        result = benchmark_all(loaded, request, device)
    show_benchmark(result, printing.as_json)
