"""Backend of the exporter: each op becomes one node that calls a function defined in the ONNX file itself.

Nothing here computes. An op's node is named for its
kind and the parts it has ("SelectiveScan_D_z_bias_softplus_reverse"), takes just their tensors, and
`function_text` writes the function of any such name in standard ONNX operators. So the graph shows one node
where the model has one op, and a runtime that knows only the standard can run it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .orders import inverse, visited
from .reference import grid_conv2d, rms_norm, skip_and_gate, wide

__all__ = ["causal_conv1d", "function_text", "grid_conv2d", "rms_norm", "selective_scan", "top_tokens"]

DOMAIN = "ssmcompress"
OPSET = 20


def selective_scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus, gap, reverse, add, order) -> Tensor:
    """See `ssmcompress.ops.selective_scan`."""
    if order is not None:
        steps = selective_scan(
            visited(u, order), delta, A, B, C, None, None, delta_bias, delta_softplus, gap, False, None, None
        )
        return skip_and_gate(visited(steps, inverse(order)), u, D, z, add)
    if isinstance(gap, tuple):
        gap = gap[0].to(torch.float32)[..., None] * gap[1]
    optional = {"D": D, "z": z, "bias": delta_bias, "gap": gap, "add": add}
    parts = [name for name, tensor in optional.items() if tensor is not None]
    parts += [name for name, wanted in (("softplus", delta_softplus), ("reverse", reverse)) if wanted]
    tensors = (u, delta, A, B, C, *(tensor for tensor in optional.values() if tensor is not None))
    return _call("SelectiveScan", parts, tuple(t.to(wide(t.dtype)) for t in tensors), u)


def causal_conv1d(x, weight, bias, positions, activation, reverse) -> Tensor:
    """See `ssmcompress.ops.causal_conv1d`."""
    taps = F.pad(weight.flip(1).t(), (0, 0, 0, 1))  # as in the reference: row d for distance d, then zeros
    reach = min(weight.shape[1], x.shape[1])
    optional = {"bias": bias, "positions": positions}
    parts = [f"width{weight.shape[1]}", f"reach{reach}"]
    parts += [name for name, tensor in optional.items() if tensor is not None]
    parts += [name for name, wanted in (("silu", activation == "silu"), ("reverse", reverse)) if wanted]
    tensors = (x, taps, *(tensor for tensor in optional.values() if tensor is not None))
    return _call("CausalConv", parts, tensors, x)


def top_tokens(scores: Tensor, count: int) -> Tensor:
    """See `ssmcompress.ops.top_tokens`. Becomes ONNX TopK, which gives equal values to the lower index."""
    best = scores.topk(count, dim=1).indices
    return best.topk(count, dim=1, largest=False).values


def _call(kind: str, parts: list[str], tensors: tuple[Tensor, ...], like: Tensor) -> Tensor:
    if not torch.onnx.is_in_onnx_export():
        raise RuntimeError("backend 'onnx' writes graphs and computes nothing; it is for torch.onnx.export alone")
    name = "_".join([kind, *parts])
    return torch.onnx.ops.symbolic(f"{DOMAIN}::{name}", tensors, dtype=like.dtype, shape=like.shape, version=1)


def function_text(name: str) -> str:
    """The ONNX function of a node that this backend made, in ONNX's textual syntax."""
    kind, *parts = name.split("_")
    inputs, lines = (_scan if kind == "SelectiveScan" else _conv)(parts)
    body = "\n".join(f"    {line}" for line in lines)
    return f'<domain: "{DOMAIN}", opset_import: ["": {OPSET}]>\n{name} ({", ".join(inputs)}) => (out) {{\n{body}\n}}'


def _scan(parts: list[str]) -> tuple[list[str], list[str]]:
    """The recurrence runs step by step in ONNX Scan; what does not depend on the state stays outside of it."""
    inputs = ["u", "delta", "A", "B", "C", *(p for p in ("D", "z", "bias", "gap", "add") if p in parts)]
    way = int("reverse" in parts)
    lines = ["raw = Add (delta, bias)" if "bias" in parts else "raw = Identity (delta)"]
    lines += ["step = Softplus (raw)" if "softplus" in parts else "step = Identity (raw)"]
    lines += ["decay = Add (step, gap)" if "gap" in parts else "decay = Identity (step)"]
    lines += [
        "entering = Mul (step, u)",
        "batch = Shape <start = 0, end = 1> (u)",
        "channels = Shape (A)",
        "state_shape = Concat <axis = 0> (batch, channels)",
        "start = ConstantOfShape (state_shape)",
        "end, scanned = Scan <num_scan_inputs = 4, scan_input_axes = [1, 1, 1, 1], scan_output_axes = [1],",
        f"    scan_input_directions = [{way}, {way}, {way}, {way}], scan_output_directions = [{way}],",
        "    body = one_step (float[batch, E, N] state, float[batch, E] decay_t, float[batch, E] entering_t,",
        "                     float[batch, N] B_t, float[batch, N] C_t)",
        "        => (float[batch, E, N] next_state, float[batch, E] y_t) {",
        "        middle = Constant <value_ints = [1]> ()",
        "        last = Constant <value_ints = [2]> ()",
        "        decay_e = Unsqueeze (decay_t, last)",
        "        exponent = Mul (decay_e, A)",
        "        factor = Exp (exponent)",
        "        past = Mul (factor, state)",
        "        entering_e = Unsqueeze (entering_t, last)",
        "        B_e = Unsqueeze (B_t, middle)",
        "        present = Mul (entering_e, B_e)",
        "        next_state = Add (past, present)",
        "        C_e = Unsqueeze (C_t, last)",
        "        y_e = MatMul (next_state, C_e)",
        "        y_t = Squeeze (y_e, last)",
        "    }> (start, decay, entering, B, C)",
    ]
    lines += ["through = Mul (D, u)", "y = Add (scanned, through)"] if "D" in parts else ["y = Identity (scanned)"]
    lines += ["opening = Sigmoid (z)", "gate = Mul (z, opening)"] if "z" in parts else []
    lines += ["gated = Mul (y, gate)"] if "z" in parts else ["gated = Identity (y)"]
    lines += ["out = Add (gated, add)"] if "add" in parts else ["out = Identity (gated)"]
    return inputs, lines


def _conv(parts: list[str]) -> tuple[list[str], list[str]]:
    """Shifted copies of x times the tap for the distance they stand at, summed."""
    inputs = ["x", "taps", *(p for p in ("bias", "positions") if p in parts)]
    width, reach = int(parts[0].removeprefix("width")), int(parts[1].removeprefix("reach"))
    lines = ["axis = Constant <value_ints = [1]> ()", "zero = Constant <value_ints = [0]> ()"]
    lines += ["end = Constant <value_ints = [9223372036854775807]> ()", f"limit = Constant <value_int = {width}> ()"]
    lines += ["tap0 = Gather (taps, zero)", "sum0 = Mul (x, tap0)"]
    for back in range(1, reach):
        lines += [f"back{back} = Constant <value_ints = [{back}]> ()", f"minus{back} = Neg (back{back})"]
        if "positions" in parts:
            lines += [
                f"later{back} = Slice (positions, back{back}, end, axis)",
                f"earlier{back} = Slice (positions, zero, minus{back}, axis)",
                f"apart{back} = Sub (later{back}, earlier{back})",
                f"distance{back} = Min (apart{back}, limit)",
            ]
        else:
            lines += [f"distance{back} = Identity (back{back})"]
        if "reverse" in parts:
            taken, sizes = f"back{back}, end", f"0, 0, 0, 0, {back}, 0"
        else:
            taken, sizes = f"zero, minus{back}", f"0, {back}, 0, 0, 0, 0"
        lines += [
            f"tap{back} = Gather (taps, distance{back})",
            f"source{back} = Slice (x, {taken}, axis)",
            f"product{back} = Mul (tap{back}, source{back})",
            f"padding{back} = Constant <value = int64[6] {{{sizes}}}> ()",  # value_ints fails in onnx < 1.21
            f"term{back} = Pad (product{back}, padding{back})",
            f"sum{back} = Add (sum{back - 1}, term{back})",
        ]
    total = f"sum{reach - 1}"
    lines += [f"y = Add ({total}, bias)" if "bias" in parts else f"y = Identity ({total})"]
    if "silu" in parts:
        lines += ["opening = Sigmoid (y)", "out = Mul (y, opening)"]
    else:
        lines += ["out = Identity (y)"]
    return inputs, lines
