"""`ssmcompress verify`: check an ONNX file against its model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ...extras import require_extra
from ..groups import Atol, Data, Load, Model, Printing, Processor, Provider
from ..inputs import check_inputs, check_onnx_pair
from ..tables import show_verification, show_when_it_fails
from ..terminal import progress_bars

EXAMPLE = "ssmcompress verify compressed/model-r0.30 model.onnx"


def verify(
    model: Model,
    file: Annotated[str, typer.Argument(metavar="FILE.onnx", help="ONNX file made from it.")],
    load: Load,
    printing: Printing,
    processor: Processor,
    data: Data = None,
    atol: Atol = 1e-4,
    provider: Provider = "cpu",
) -> None:
    """Check in onnxruntime that an ONNX file computes what its model does."""
    check_onnx_pair(model, file)
    require_extra("onnx")
    check_inputs(model, {"--data": data})
    from ...export.verify import verify_onnx

    loaded = load.open(model, processor)
    with progress_bars(printing.quiet), show_when_it_fails(Path(file), printing.as_json):
        result = verify_onnx(loaded, Path(file), data=data, atol=atol, provider=provider)
    show_verification(result, Path(file), printing.as_json)
