"""The ops that all models are built from. All tensors are channels-last, in token order.

`selective_scan`, `scan_paths`, `causal_conv1d`, `grid_conv2d`, `rms_norm`, `segment_sums`, `gather_tokens` and
`topk_tokens` choose a backend automatically; `backend=` sets it for one call, and `use_backend` for the body of a with
statement.
"""

from .causal_conv import causal_conv1d
from .dispatch import BACKENDS, register_backend, use_backend
from .gather_tokens import gather_tokens
from .grid_conv import grid_conv2d
from .rms_norm import rms_norm
from .segment_sums import segment_sums
from .selective_scan import SCORES, ScanPath, scan_paths, selective_scan
from .topk_tokens import topk_tokens

__all__ = [
    "BACKENDS",
    "SCORES",
    "ScanPath",
    "causal_conv1d",
    "gather_tokens",
    "grid_conv2d",
    "register_backend",
    "rms_norm",
    "scan_paths",
    "segment_sums",
    "selective_scan",
    "topk_tokens",
    "use_backend",
]
