"""The backend of the exporter: each op becomes one node that calls a function defined in the ONNX file itself.

This backend computes nothing. A node is named after the kind of its op and the arguments that are present
("SelectiveScan_bf_D_bias_softplus"), and its inputs are the tensors of these arguments. `functions.function_text`
writes the function of any such name in ONNX operators. So the graph has one node for each op of the model, and the form
of a scan is chosen after the graph has been built.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops import reference
from ..ops.orders import invert_order, to_scan_order
from ..ops.reference import accumulation_dtype, rms_norm
from ..ops.selective_scan import SCORES, ScanPath, step_size

__all__ = ["causal_conv1d", "gather_tokens", "grid_conv2d", "rms_norm", "scan_paths", "selective_scan", "topk_tokens"]

DOMAIN = "ssmcompress"
_NUMBER_SIGNS = {ord("-"): "m", ord("."): "p"}  # function names consist of letters and digits only


def selective_scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus, gap, reverse, add, order) -> Tensor:
    """See `ssmcompress.ops.selective_scan`."""
    (y,) = _call_scans([ScanPath(u, delta, A, B, C, D, delta_bias, gap, reverse, order)], delta_softplus)
    y = y if z is None else y * F.silu(z.to(y.dtype))
    y = y if add is None else y + add.to(y.dtype)
    return y.to(u.dtype)


def scan_paths(paths, z, delta_softplus, score, scored) -> tuple[Tensor, Tensor | None]:
    """See `ssmcompress.ops.scan_paths`. All paths are in one node, with one output per path."""
    ys = _call_scans(paths, delta_softplus)
    gate = None if z is None else F.silu(z.to(ys[0].dtype))

    def sum_and_gate(ys: list[Tensor]) -> Tensor:
        total = ys[0]
        for y in ys[1:]:
            total = total + y
        return total if gate is None else total * gate

    result = sum_and_gate(ys)
    if score is None:
        return result, None
    if score == "delta":
        return result, sum(SCORES[score](step_size(path, delta_softplus)) for path in paths) / len(paths)
    return result, SCORES[score](result if scored in (None, len(ys)) else sum_and_gate(ys[:scored]))


def causal_conv1d(x, weight, bias, positions, activation, reverse) -> Tensor:
    """See `ssmcompress.ops.causal_conv1d`."""
    optional = {"bias": bias, "positions": positions}
    parts = [str(size) for size in (weight.shape[1], x.shape[2], x.shape[1])]
    parts += [name for name, tensor in optional.items() if tensor is not None]
    parts += [name for name, is_set in (("silu", activation == "silu"), ("reverse", reverse)) if is_set]
    tensors = (x, weight, *(tensor for tensor in optional.values() if tensor is not None))
    (y,) = _call("CausalConv", parts, tensors, [x])
    return y


def grid_conv2d(x, weight, bias, grid, positions, activation) -> Tensor:
    """See `ssmcompress.ops.grid_conv2d`. The convolution covers the whole grid, filled by a gather, not a scatter."""
    if positions is None:
        return reference.grid_conv2d(x, weight, bias, grid, None, activation)
    kept = x.shape[1]
    rows = positions.new_full((x.shape[0], grid[0] * grid[1]), kept)  # missing tokens refer to the row of zeros
    rows = rows.scatter(1, positions, torch.arange(kept, device=positions.device).expand_as(positions))
    full_grid = gather_tokens(F.pad(x, (0, 0, 0, 1)), rows)
    return gather_tokens(reference.grid_conv2d(full_grid, weight, bias, grid, None, activation), positions)


def topk_tokens(scores: Tensor, count: int) -> Tensor:
    """See `ssmcompress.ops.topk_tokens`. Emits ONNX TopK, which prefers the lower index for equal values."""
    best = scores.topk(count, dim=1).indices
    return best.topk(count, dim=1, largest=False).values


def gather_tokens(tokens: Tensor, index: Tensor) -> Tensor:
    """See `ssmcompress.ops.gather_tokens`. GatherND copies whole rows; torch's gather would index every element."""
    shape = (*index.shape, tokens.shape[2])
    inputs, attributes = (tokens, index.long()[..., None]), {"batch_dims": 1}
    return torch.onnx.ops.symbolic("GatherND", inputs, attributes, dtype=tokens.dtype, shape=shape, version=13)


def lower_modules(model: nn.Module) -> None:
    """Replace the forward of batch norms and adaptive average pools of a model by the ops of this backend, in place."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.forward = partial(batch_norm, module)
        elif isinstance(module, nn.AdaptiveAvgPool2d):
            module.forward = partial(adaptive_avg_pool, module.output_size)


def batch_norm(norm: nn.BatchNorm2d, x: Tensor) -> Tensor:
    """Normalise maps (batch, channels, rows, columns) with the running statistics.

    It is a function call, because onnxscript's optimizer folds a BatchNormalization into the weights of the preceding
    convolution, which would then differ from the model's. A runtime does this when it loads the file.
    """
    tensors = (x, norm.weight, norm.bias, norm.running_mean, norm.running_var)
    (y,) = _call("BatchNorm", [name_number(norm.eps)], tensors, [x])
    return y


def adaptive_avg_pool(size: int | tuple[int | None, int | None], x: Tensor) -> Tensor:
    """Return the means (batch, channels, *size) of maps (batch, channels, rows, columns), as two matrix products.

    torch's exporter gathers every window and adds its elements one by one, with ranges computed in the graph: 130 nodes
    for the pyramid of a UperNet on a grid of 5 x 6, and more for larger windows.
    """
    parts = size if isinstance(size, tuple) else (size, size)
    rows, columns = (
        _means(int(side), side if count is None else count) for side, count in zip(x.shape[-2:], parts, strict=True)
    )
    return rows.to(x) @ x @ columns.t().to(x)


def _means(side: int, parts: int) -> Tensor:
    """Return the matrix (parts, side) of means over the parts of a side, which overlap if it is not divisible."""
    matrix = []
    for part in range(parts):
        first, last = part * side // parts, -(-(part + 1) * side // parts)
        matrix.append([1 / (last - first) if first <= place < last else 0.0 for place in range(side)])
    return torch.tensor(matrix, dtype=torch.float32, device="cpu")


def _call_scans(paths: list[ScanPath], delta_softplus: bool) -> list[Tensor]:
    """Emit the node of all paths and return (batch, length, d_inner) for each, in token order, ungated."""
    first, orders = paths[0], [path.order for path in paths]
    paths = [path if path.order is None else path._replace(u=to_scan_order(path.u, path.order)) for path in paths]
    optional = [name for name in ("D", "delta_bias") if getattr(first, name) is not None]
    parts = ["".join("b" if path.reverse else "f" for path in paths), str(first.u.shape[2])]
    parts += [name.removeprefix("delta_") for name in optional]
    parts += [] if first.gap is None else ["missing" if isinstance(first.gap, tuple) else "gap"]
    parts += ["softplus"] if delta_softplus else []
    tensors = []
    for path in paths:
        gap = path.gap if isinstance(path.gap, tuple) else () if path.gap is None else (path.gap,)
        inputs = (path.u, path.delta, path.A, path.B, path.C, *(getattr(path, name) for name in optional), *gap)
        tensors += [t.to(accumulation_dtype(t.dtype)) for t in inputs]
    ys = _call("SelectiveScan", parts, tensors, [path.u for path in paths])
    return [y if order is None else to_scan_order(y, invert_order(order)) for y, order in zip(ys, orders, strict=True)]


def name_number(value: float) -> str:
    """Encode a number as part of a function name, such as "1em05"; `read_number` decodes it."""
    return repr(value).translate(_NUMBER_SIGNS)


def read_number(part: str) -> float:
    """Decode a number from part of a function name."""
    return float(part.translate({ord(new): chr(old) for old, new in _NUMBER_SIGNS.items()}))


def _call(kind: str, parts: list[str], tensors: Sequence[Tensor], like: Sequence[Tensor]) -> Sequence[Tensor]:
    """Emit a call of the function of this kind and parts; its outputs have the shapes and dtypes of `like`."""
    if not torch.onnx.is_in_onnx_export():
        raise RuntimeError("backend 'onnx' writes graphs and computes nothing; it is for torch.onnx.export alone")
    dtypes, shapes = [t.dtype for t in like], [t.shape for t in like]
    name = "_".join([kind, *parts])
    return torch.onnx.ops.symbolic_multi_out(f"{DOMAIN}::{name}", tensors, dtypes=dtypes, shapes=shapes, version=1)
