"""Options of commands that run onnxruntime."""

from __future__ import annotations

from typing import Annotated

from .options import HARDWARE, OUTPUT, option

Atol = Annotated[float, option(OUTPUT, min=0, help="Largest difference of a logit that passes.")]
Provider = Annotated[str, option(HARDWARE, help="onnxruntime's execution provider: cpu, cuda, ...")]
