"""The functions of an ONNX file, in ONNX's textual syntax, that are called by the nodes of `lowering`.

The scan has three forms with the same inputs and outputs. Times in the docstrings are for one layer of Vim-tiny (two
paths of 197 tokens, 384 channels, 16 states, batch 1, two cores, onnxruntime 1.31).
"""

from __future__ import annotations

from functools import partial

from .lowering import DOMAIN, read_number

FORMS = ("scan", "linear-attention", "standard")
STANDARD_OPSET = 27  # the first one with LinearAttention


def function_text(name: str, opset: int, form: str = "scan") -> str:
    """Return the text of the function that a node of `lowering` calls.

    Args:
        name: name of the node's function. opset: opset of the file. form: form of the scans, one of `FORMS`.
    """
    kind, *parts = name.split("_")
    write = {"SelectiveScan": partial(_write_scan, form=form), "CausalConv": _write_conv, **_SHORT_FUNCTIONS}[kind]
    inputs, outputs, lines = write(parts)
    domains = f'"": {opset}' + (', "com.microsoft": 1' if form == "linear-attention" else "")
    body = "\n".join(f"    {line}" for line in lines)
    head = f'<domain: "{DOMAIN}", opset_import: [{domains}]>'
    return f"{head}\n{name} ({', '.join(inputs)}) => ({', '.join(outputs)}) {{\n{body}\n}}"


def _write_scan(parts: list[str], form: str) -> tuple[list[str], list[str], list[str]]:
    """Return the inputs, outputs and body of a scan.

    Everything that does not depend on the state is computed for all steps at once.
    """
    directions, channels, *flags = parts
    names = ["u", "delta", "A", "B", "C", *(p for p in ("D", "bias") if p in flags)]
    names += ["missing", "gap"] if "missing" in flags else ["gap"] if "gap" in flags else []
    paths = range(len(directions))
    lines = []
    for k in paths:
        lines += [f"raw{k} = Add (delta{k}, bias{k})" if "bias" in flags else f"raw{k} = Identity (delta{k})"]
        lines += _write_softplus(f"raw{k}", f"step{k}") if "softplus" in flags else [f"step{k} = Identity (raw{k})"]
        if "missing" in flags:
            lines += [f"inner{k} = Constant <value_ints = [2]> ()", f"count{k} = Unsqueeze (missing{k}, inner{k})"]
            lines += [f"wait{k} = Mul (count{k}, gap{k})", f"decay{k} = Add (step{k}, wait{k})"]
        else:
            lines += [f"decay{k} = Add (step{k}, gap{k})" if "gap" in flags else f"decay{k} = Identity (step{k})"]
        lines += [f"entering{k} = Mul (step{k}, u{k})"]
    if form == "scan":
        lines += _write_steps(directions)
    else:
        lines += _write_attention(directions, int(channels), form == "standard")
    for k in paths:
        lines += [f"through{k} = Mul (D{k}, u{k})", f"out{k} = Add (y{k}, through{k})"] if "D" in flags else []
        lines += [] if "D" in flags else [f"out{k} = Identity (y{k})"]
    return [f"{name}{k}" for k in paths for name in names], [f"out{k}" for k in paths], lines


def _write_softplus(x: str, out: str) -> list[str]:
    """Write out = softplus(x) = log(1 + w) with w = exp(x), accurate to the last digits even for a small w.

    onnxruntime's Softplus takes 11 ns per number on one thread, this takes 3. With s = 1 + w after rounding, log(1 + w)
    is log(s) + (w - (s - 1)) / s. Above 80, where w would overflow, softplus(x) is x.
    """
    return [
        f"{x}_one = Constant <value_float = 1.0> ()",
        f"{x}_most = Constant <value_float = 80.0> ()",
        f"{x}_low = Clip ({x}, , {x}_most)",
        f"{x}_w = Exp ({x}_low)",
        f"{x}_s = Add ({x}_w, {x}_one)",
        f"{x}_log = Log ({x}_s)",
        f"{x}_rounded = Sub ({x}_s, {x}_one)",
        f"{x}_missed = Sub ({x}_w, {x}_rounded)",
        f"{x}_correction = Div ({x}_missed, {x}_s)",
        f"{x}_sum = Add ({x}_log, {x}_correction)",
        f"{out} = Max ({x}_sum, {x})",
    ]


def _write_steps(directions: str) -> list[str]:
    """Write all paths as one ONNX Scan, each with its own state and direction: 3.2 ms for a layer of Vim-tiny.

    Measured on onnxruntime 1.31, two cores, whole Vim-tiny at batch 1 and 8:
    - channels innermost, so that products have long rows: 118 and 790 ms; states innermost: 220 and 1,570.
    - the states of both paths stacked in one tensor: 125 and 670 on an idle machine, but 160 to 220 and 1,800 on a busy
      one, because every product is then large enough for the runtime to split it over its threads and wait for them.
    - exponentials for all steps at once: the body is shorter but the scan slower (8.3 instead of 5.0 ms), because they
      do not fit in the cache.
    """
    paths = range(len(directions))
    lines = ["rows = Constant <value_ints = [2]> ()", "columns = Constant <value_ints = [3]> ()"]
    inputs, steps, body = [], [], []
    for k in paths:
        lines += [
            f"decay{k}_row = Unsqueeze (decay{k}, rows)",
            f"entering{k}_row = Unsqueeze (entering{k}, rows)",
            f"B{k}_column = Unsqueeze (B{k}, columns)",
            f"C{k}_row = Unsqueeze (C{k}, rows)",
            f"A{k}_rows = Transpose <perm = [1, 0]> (A{k})",
        ]
        inputs += [f"decay{k}_row", f"entering{k}_row", f"B{k}_column", f"C{k}_row"]
        steps += [f"float[batch, one, E] decay{k}_t", f"float[batch, one, E] entering{k}_t"]
        steps += [f"float[batch, N, one] B{k}_t", f"float[batch, one, N] C{k}_t"]
        body += [
            f"        exponent{k} = Mul (decay{k}_t, A{k}_rows)",
            f"        factor{k} = Exp (exponent{k})",
            f"        past{k} = Mul (factor{k}, state{k})",
            f"        present{k} = Mul (B{k}_t, entering{k}_t)",
            f"        next{k} = Add (past{k}, present{k})",
            f"        y{k}_t = MatMul (C{k}_t, next{k})",
        ]
    reverse = [int(direction == "b") for direction in directions]
    states = [f"float[batch, N, E] state{k}" for k in paths]
    results = [f"float[batch, N, E] next{k}" for k in paths] + [f"float[batch, one, E] y{k}_t" for k in paths]
    outputs = [f"end{k}" for k in paths] + [f"y{k}_row" for k in paths]
    return [
        *lines,
        "batch = Shape <start = 0, end = 1> (u0)",
        "sizes = Shape (A0_rows)",
        "state_shape = Concat <axis = 0> (batch, sizes)",
        "start = ConstantOfShape (state_shape)",
        f"{', '.join(outputs)} = Scan <num_scan_inputs = {len(inputs)}, scan_input_axes = {[1] * len(inputs)},",
        f"    scan_input_directions = {[flag for flag in reverse for _ in range(4)]},",
        f"    scan_output_axes = {[1] * len(directions)}, scan_output_directions = {reverse},",
        f"    body = one_step ({', '.join(states + steps)}) => ({', '.join(results)}) {{",
        *body,
        f"    }}> ({', '.join(['start'] * len(directions) + inputs)})",
        *(f"y{k} = Squeeze (y{k}_row, rows)" for k in paths),
    ]


def _write_attention(directions: str, channels: int, standard: bool) -> list[str]:
    """Write each path as gated linear attention with one head per channel: keys of size d_state, scalar values.

    In com.microsoft's operator all heads share one query and key; the standard operator needs a query and a key for
    each head.
    """
    operator, queries = ("LinearAttention", channels) if standard else ("com.microsoft.LinearAttention", 1)
    attributes = f'q_num_heads = {queries}, kv_num_heads = {channels}, update_rule = "gated", scale = 1.0'
    lines = [
        "last = Constant <value_ints = [-1]> ()",
        "second = Constant <value_ints = [1]> ()",
        "beyond = Constant <value_ints = [-9223372036854775807]> ()",
        "packed = Constant <value_ints = [0, 0, -1]> ()",
        f"heads = Constant <value_ints = [1, 1, {channels}]> ()",
    ]

    def reverse(x: str, out: str) -> str:
        return f"{out} = Slice ({x}, last, beyond, second, last)" if directions[k] == "b" else f"{out} = Identity ({x})"

    for k in range(len(directions)):
        lines += [reverse(f"{name}{k}", f"{name}{k}_s") for name in ("decay", "entering", "B", "C")]
        for name in ("B", "C"):
            lines += [
                f"{name}{k}_p = Tile ({name}{k}_s, heads)" if standard else f"{name}{k}_p = Identity ({name}{k}_s)"
            ]
        lines += [
            f"wide{k} = Unsqueeze (decay{k}_s, last)",
            f"exponent{k} = Mul (wide{k}, A{k})",
            f"decays{k} = Reshape (exponent{k}, packed)",
            f"y{k}_s, end{k} = {operator} <{attributes}> (C{k}_p, B{k}_p, entering{k}_s, , decays{k})",
            reverse(f"y{k}_s", f"y{k}"),
        ]
    return lines


def _write_conv(parts: list[str]) -> tuple[list[str], list[str], list[str]]:
    """Return the inputs, outputs and body of a convolution along the sequence.

    The last tap of `weight` (channels, width) is that of the token itself.
    """
    width, channels, length, *flags = parts
    inputs = ["x", "weight", *(p for p in ("bias", "positions") if p in flags)]
    write_sum = _write_shifted_sum if "positions" in flags else _write_plain_conv
    lines = write_sum(int(width), int(channels), int(length), "reverse" in flags)
    lines += ["y = Add (summed, bias)" if "bias" in flags else "y = Identity (summed)"]
    lines += ["opening = Sigmoid (y)", "out = Mul (y, opening)"] if "silu" in flags else ["out = Identity (y)"]
    return inputs, ["out"], lines


def _write_plain_conv(width: int, channels: int, length: int, back: bool) -> list[str]:
    """Write a two-dimensional ONNX Conv: 0.12 ms for Vim-tiny; one-dimensional 0.15, as a sum of products 0.25."""
    return [
        "second = Constant <value_ints = [1]> ()",
        "middle = Constant <value_ints = [2]> ()",
        "inner = Constant <value_ints = [1, 2]> ()",
        "last = Constant <value_ints = [-1]> ()",
        "beyond = Constant <value_ints = [-9223372036854775807]> ()",
        "taps = Slice (weight, last, beyond, second, last)" if back else "taps = Identity (weight)",
        "window = Unsqueeze (taps, inner)",
        "rows = Transpose <perm = [0, 2, 1]> (x)",
        "image = Unsqueeze (rows, middle)",
        f"seen = Conv <group = {channels}, pads = [0, {0 if back else width - 1}, 0, {width - 1 if back else 0}]> "
        "(image, window)",
        "flat = Squeeze (seen, middle)",
        "summed = Transpose <perm = [0, 2, 1]> (flat)",
    ]


def _write_shifted_sum(width: int, channels: int, length: int, back: bool) -> list[str]:
    """Write a sum of shifted copies of x, each times the tap for its distance; from distance `width` on, zero."""
    reach = min(width, length)
    lines = [
        "second = Constant <value_ints = [1]> ()",
        f"limit = Constant <value_int = {width}> ()",
        "ways = Transpose <perm = [1, 0]> (weight)",
        "beside = Constant <value = int64[4] {1, 0, 0, 0}> ()",
        "taps = Pad (ways, beside)",  # row width - d is for distance d; row 0, of zeros, from distance width
        f"own = Constant <value_ints = [{width}]> ()",
        "tap0 = Gather (taps, own)",
        "sum0 = Mul (x, tap0)",
    ]
    for d in range(1, reach):
        padding = f"0, 0, 0, 0, {d}, 0" if back else f"0, {d}, 0, 0, 0, 0"
        lines += [
            f"a{d} = Constant <value_ints = [{d}]> ()",
            f"zero{d} = Constant <value_ints = [0]> ()",
            f"end{d} = Constant <value_ints = [{length}]> ()",
            f"cut{d} = Constant <value_ints = [{length - d}]> ()",
            f"later{d} = Slice (positions, a{d}, end{d}, second)",
            f"earlier{d} = Slice (positions, zero{d}, cut{d}, second)",
            f"apart{d} = Sub (later{d}, earlier{d})",
            f"distance{d} = Min (apart{d}, limit)",
            f"row{d} = Sub (limit, distance{d})",
            f"tap{d} = Gather (taps, row{d})",
            f"seen{d} = Slice (x, {f'a{d}, end{d}' if back else f'zero{d}, cut{d}'}, second)",
            f"product{d} = Mul (tap{d}, seen{d})",
            f"padding{d} = Constant <value = int64[6] {{{padding}}}> ()",  # value_ints fails in onnx < 1.21
            f"term{d} = Pad (product{d}, padding{d})",
            f"sum{d} = Add (sum{d - 1}, term{d})",
        ]
    return [*lines, f"summed = Identity (sum{reach - 1})"]


def _write_batch_norm(parts: list[str]) -> tuple[list[str], list[str], list[str]]:
    """Write a batch norm of maps, with the mean and variance of each channel."""
    inputs = ["x", "scale", "bias", "mean", "variance"]
    epsilon = f"epsilon = {read_number(parts[0]):.12f}"  # without an exponent, as not every version of onnx parses one
    return inputs, ["y"], [f"y = BatchNormalization <{epsilon}> ({', '.join(inputs)})"]


def _write_fill_batch(parts: list[str]) -> tuple[list[str], list[str], list[str]]:
    """Write images or videos unchanged, or a single one of zeros for an empty batch.

    onnxruntime's Scan divides by the batch size (1.22 to 1.31 crash with SIGFPE), and its LinearAttention cannot
    reshape an empty batch.
    """
    lines = [
        "batch = Shape <start = 0, end = 1> (images)",
        "one = Constant <value_ints = [1]> ()",
        "zero = Constant <value_ints = [0]> ()",
        "lacking = Sub (one, batch)",
        "added = Max (lacking, zero)",
        "sides = Shape <start = 1> (images)",
        "shape = Concat <axis = 0> (added, sides)",
        "zeros = ConstantOfShape (shape)",
        "filled = Concat <axis = 0> (images, zeros)",
    ]
    return ["images"], ["filled"], lines


def _write_trim_batch(parts: list[str]) -> tuple[list[str], list[str], list[str]]:
    """Write the rows of `values` that belong to images: none for an empty batch, else all."""
    lines = [
        "batch = Shape <start = 0, end = 1> (images)",
        "zero = Constant <value_ints = [0]> ()",
        "trimmed = Slice (values, zero, batch)",
    ]
    return ["values", "images"], ["trimmed"], lines


_SHORT_FUNCTIONS = {"BatchNorm": _write_batch_norm, "FillBatch": _write_fill_batch, "TrimBatch": _write_trim_batch}
