"""`ssmcompress inspect`: what a checkpoint is."""

from __future__ import annotations

from ..groups import Model, Printing, Reading
from ..tables import print_json, show_inspection

EXAMPLE = "ssmcompress inspect model.pt"


def inspect(checkpoint: Model, reading: Reading, printing: Printing) -> None:
    """Show a checkpoint's architecture, size, FLOPs and budget range."""
    from ...jobs.inspect import inspect_model

    result = inspect_model(reading.open(checkpoint))
    if printing.as_json:
        print_json(result)
    else:
        show_inspection(result)
