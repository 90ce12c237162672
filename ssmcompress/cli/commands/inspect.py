"""`ssmcompress inspect`: describe a checkpoint."""

from __future__ import annotations

from ..groups import Model, Printing, Reading
from ..inputs import check_model
from ..tables import print_json, show_inspection
from ..terminal import progress_bars

EXAMPLE = "ssmcompress inspect model.pt"


def inspect(checkpoint: Model, reading: Reading, printing: Printing) -> None:
    """Show a checkpoint's architecture, size, FLOPs and budget range."""
    check_model(checkpoint)
    from ...jobs.inspect import inspect_file

    with progress_bars(printing.quiet):
        result = inspect_file(checkpoint, reading.options())
    if printing.as_json:
        print_json(result)
    else:
        show_inspection(result)
