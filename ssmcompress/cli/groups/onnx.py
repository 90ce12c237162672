"""Options of commands that run onnxruntime."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Annotated

from ...errors import InputError
from ...extras import require_extra
from ..options import HARDWARE, OUTPUT, option
from ..values import ScanForm, Stored
from .images import Data
from .model import Dense

if TYPE_CHECKING:
    from ...export.onnx import OnnxOptions

Atol = Annotated[float, option(OUTPUT, min=0, help="Largest allowed difference of a logit.")]
Provider = Annotated[str, option(HARDWARE, help="onnxruntime's execution provider: cpu, cuda, ...")]


@dataclass(frozen=True)
class OnnxFile:
    """How an ONNX file is written and verified."""

    opset: Annotated[
        int | None, option(OUTPUT, help="ONNX opset. Default: the newest that the installed onnxruntime runs.")
    ] = None
    scan: Annotated[
        ScanForm,
        option(
            OUTPUT,
            help="How ONNX computes the scans: step by step (scan), onnxruntime's LinearAttention, or opset 27's "
            "(standard). auto: the fastest here.",
        ),
    ] = ScanForm.auto
    dtype: Annotated[
        Stored, option(OUTPUT, help="Type of the matrices in the ONNX file; it always computes in float32.")
    ] = Stored.float32
    debug_outputs: Annotated[
        bool, option(OUTPUT, "--debug-outputs", help="Also output the tokens that each stage keeps.")
    ] = False
    data: Data = None
    dense: Dense = None
    atol: Atol = 1e-4
    provider: Provider = "cpu"

    def check(self, onnx: bool) -> None:
        """Check that these options are given only with `onnx`, and that the packages for writing ONNX are installed.

        Raises:
            InputError: an option differs from its default, but no ONNX file is requested; or a required package is
                missing.
        """
        if onnx:
            require_extra("onnx")
        given = [f"--{f.name.replace('_', '-')}" for f in fields(self) if getattr(self, f.name) != f.default]
        if given and not onnx:
            verb = "belongs" if len(given) == 1 else "belong"
            raise InputError(f"{', '.join(given)} {verb} to --onnx: give --onnx as well")

    def options(self, latency: bool) -> OnnxOptions:
        """Return the options as the library takes them."""
        from ...export.onnx import OnnxOptions

        scan, dtype = self.scan.value, self.dtype.value
        return OnnxOptions(self.data, self.atol, self.opset, scan, dtype, self.provider, self.debug_outputs, latency)
