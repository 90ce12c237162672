"""Triton kernels of the selective scan: the states of a channel live in the registers of a warp, in float32.

A program takes a block of channels of one image through its tokens one by one, path after path. A block is
(states, channels), so that for up to 16 states a thread holds all of them and their sum needs no other thread.
What a token brings is loaded one step ahead, for no load may pass the store that comes before it.

In tuples (`us`, `deltas`, ...) there is an element for each path; None stands for what a call does not have.
Activations are rows of `channels` numbers, B and C rows `state_stride` apart, z rows `z_stride` apart.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
# 2 artanh(s) / s - 2 as a polynomial in s^2 on [0, 1/9], 8e-9 of the whole at most.
S1 = tl.constexpr(0.6666654348373413)
S2 = tl.constexpr(0.4001464545726776)
S3 = tl.constexpr(0.2810843586921692)
S4 = tl.constexpr(0.2751307785511017)


@triton.jit
def sigmoid(x):
    return 1.0 / (1.0 + tl.exp2(x * -LOG2_E))


@triton.jit
def softplus(x):
    """log(1 + e^x) = max(x, 0) + 2 artanh(t / (2 + t)), t = e^-|x|: keeps its digits where e^x is small."""
    t = tl.exp2(tl.abs(x) * -LOG2_E)
    s = t / (2.0 + t)
    q = s * s
    return tl.maximum(x, 0.0) + s * (2.0 + q * (S1 + q * (S2 + q * (S3 + q * S4))))


@triton.jit
def optional_load(pointer, offset):
    if pointer is None:
        return 0.0
    else:
        return tl.load(pointer + offset).to(tl.float32)


@triton.jit
def optional_row(pointer, offset, e):
    if pointer is None:
        return 0.0
    else:
        return tl.load(pointer + offset + e)


@triton.jit
def load_states(pointer, n, STATES: tl.constexpr, N: tl.constexpr):
    """A row of B or C, (N, 1): zeros beyond the states that there are."""
    if N == STATES:
        return tl.load(pointer + n).to(tl.float32)
    else:
        return tl.load(pointer + n, mask=n < STATES, other=0.0).to(tl.float32)


@triton.jit
def store_states(pointer, value, STATES: tl.constexpr, N: tl.constexpr):
    """A row (N,) of the gradient of B or C."""
    n = tl.arange(0, N)
    if N == STATES:
        tl.store(pointer + n, value)
    else:
        tl.store(pointer + n, value, mask=n < STATES)


@triton.jit
def load_matrix(A, path, n, columns, channels, stride, STATES: tl.constexpr, N: tl.constexpr):
    """A block (N, channels) of a path's A times log2(e): zeros, so no decay, beyond the states that there are.

    `stride` is `channels`, but never specialised: not to be known as a multiple of anything is what keeps Triton from
    reading a few neighbours at once, and so from splitting the states of a channel among threads.
    """
    where = A + path * STATES * channels + n * stride + columns[None, :]
    if N == STATES:
        return tl.load(where).to(tl.float32) * LOG2_E
    else:
        return tl.load(where, mask=n < STATES, other=0.0).to(tl.float32) * LOG2_E


@triton.jit
def place(program, channels, APART: tl.constexpr, EVEN: tl.constexpr, BLOCK: tl.constexpr):
    """(image, channels, the same, which of them there are) of a program; where there is none, the last one's number.

    APART: neighbours belong to different threads, which then hold all states of their channels and exchange nothing.
    Else a thread may load a few neighbours at once, and share their states with others.
    """
    blocks = tl.cdiv(channels, BLOCK)
    columns = program % blocks * BLOCK + tl.arange(0, BLOCK)
    e = program % blocks * BLOCK + tl.arange(0, BLOCK)
    live = e < channels
    if not EVEN:
        e = tl.minimum(e, channels - 1)
        columns = e
    if APART:
        e = tl.max_contiguous(e, 1)
    return (program // blocks).to(tl.int64), e, columns, live


@triton.jit
def store_row(pointer, e, value, live, EVEN: tl.constexpr):
    if EVEN:
        tl.store(pointer + e, value.to(pointer.dtype.element_ty))
    else:
        tl.store(pointer + e, value.to(pointer.dtype.element_ty), mask=live)


@triton.jit
def row_of(step, first, count, REVERSE: tl.constexpr):
    """The row that step `step` of a path is at, of the tokens `first` .. `first + count - 1`."""
    return first + (count - 1 - step if REVERSE else step)


@triton.jit
def token_of(row, order):
    """The token whose u, z and y a step at `row` has: that of the same number, or the one an order says."""
    if order is None:
        return row
    else:
        return tl.load(order + row).to(tl.int32)


@triton.jit
def step_sizes(raw, bias, steps, gap_delta, gap, SOFTPLUS: tl.constexpr):
    """(delta, delta + gap) (channels,) of a token: the size of its input and that of its decay."""
    delta = raw.to(tl.float32) + bias
    if SOFTPLUS:
        delta = softplus(delta)
    return delta, delta + (steps * gap_delta + gap)


@triton.jit
def load_input(
    u, delta, B, steps, gap, here, there, e, n, channels, state_stride, STATES: tl.constexpr, N: tl.constexpr
):
    """What a step takes into the state: u of row `here`, delta, B, pruned steps and gap of row `there`."""
    return (
        tl.load(u + here * channels + e),
        tl.load(delta + there * channels + e),
        load_states(B + there * state_stride, n, STATES, N),
        optional_load(steps, there),
        optional_row(gap, there * channels, e),
    )


@triton.jit
def load_step(
    u, delta, B, C, steps, gap, z, here, there, e, n, channels, state_stride, z_stride,
    STATES: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """`load_input`, C and z of a step, in this order: u, delta, B, C, pruned steps, gap, z."""
    u, delta, B, steps, gap = load_input(u, delta, B, steps, gap, here, there, e, n, channels, state_stride, STATES, N)
    C = load_states(C + there * state_stride, n, STATES, N)
    return u, delta, B, C, steps, gap, optional_row(z, here * z_stride, e)


@triton.jit
def entering_state(h, ends, decays, a, n, columns, channels, stride, REVERSE: tl.constexpr, N: tl.constexpr):
    """The state that a chunk of tokens starts from: what all chunks before it on the path end with, decayed."""
    chunk, chunks = tl.program_id(1), tl.num_programs(1)
    before = chunks - 1 - chunk if REVERSE else chunk
    for i in range(before):
        slot = chunks - 1 - i if REVERSE else i
        decay = tl.load(decays + slot * channels + columns)
        end = tl.load(ends + slot * N * channels + n * stride + columns[None, :])
        h = tl.exp2(decay[None, :] * a) * h + end
    return h


@triton.jit
def token_score(y, live, SCORE: tl.constexpr, EVEN: tl.constexpr):
    """A block's part of the sum over channels that a score is made of."""
    if SCORE == "clip":
        y = tl.maximum(y, 0.0)
    elif SCORE == "l1":
        y = tl.abs(y)
    elif SCORE == "l2":
        y = y * y
    if not EVEN:
        y = tl.where(live, y, 0.0)
    return tl.sum(y, 0)


@triton.jit
def forward_path(
    u, delta, A, B, C, D, bias, steps, gap_delta, gap, order, z, total, add, y, score, ends, decays,
    path, b, e, columns, live, first, count, length, channels, state_stride, z_stride, order_stride, stride,
    REVERSE: tl.constexpr, SOFTPLUS: tl.constexpr, GATED: tl.constexpr, SCORE: tl.constexpr, SCORE_SUM: tl.constexpr,
    STATES: tl.constexpr, N: tl.constexpr, EVEN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One path of `scan_forward` through the tokens `first` .. `first + count - 1`, on top of the paths before it."""
    n = tl.arange(0, N)[:, None]
    # From the image's first row on, 32 bits count the rows, which takes fewer instructions.
    first_row = b * length
    u += first_row * channels
    delta += first_row * channels
    B += first_row * state_stride
    C += first_row * state_stride
    y += first_row * channels
    if steps is not None:
        steps += first_row
    if gap is not None:
        gap += first_row * channels
    if order is not None:
        order += b * order_stride
    if z is not None:
        z += first_row * z_stride
    if total is not None:
        total += first_row * channels
    if add is not None:
        add += first_row * channels
    a = load_matrix(A, path, n, columns, channels, stride, STATES, N)
    skip, bias, gap_delta = optional_load(D, e), optional_load(bias, e), optional_load(gap_delta, e)
    h = tl.zeros([N, BLOCK], tl.float32)
    if ends is not None:
        h = entering_state(h, ends, decays, a, n, columns, channels, stride, REVERSE, N)
    row = row_of(0, first, count, REVERSE)
    token = token_of(row, order)
    upcoming = load_step(u, delta, B, C, steps, gap, z, token, row, e, n,
                         channels, state_stride, z_stride, STATES, N)  # fmt: skip
    for i in range(count):
        u_t, raw, B_t, C_t, steps_t, gap_t, z_t = upcoming
        row_t, token_t = row, token
        # Needed last, so early enough.
        out = optional_row(total, token * channels, e)
        more = optional_row(add, token * channels, e)
        row = row_of(tl.minimum(i + 1, count - 1), first, count, REVERSE)
        token = token_of(row, order)
        upcoming = load_step(u, delta, B, C, steps, gap, z, token, row, e, n,
                             channels, state_stride, z_stride, STATES, N)  # fmt: skip
        u_t = u_t.to(tl.float32)
        delta_t, decay = step_sizes(raw, bias, steps_t, gap_delta, gap_t, SOFTPLUS)
        h = tl.exp2(decay[None, :] * a) * h + (delta_t * u_t)[None, :] * B_t
        out = tl.sum(h * C_t, 0) + (skip * u_t + out)
        gated = out
        if z is not None:
            z_t = z_t.to(tl.float32)
            gated = out * (z_t * sigmoid(z_t))
        if SCORE == "delta":
            part = token_score(delta_t, live, SCORE, EVEN)
            if SCORE_SUM:
                part += tl.load(score + row_t)
            tl.store(score + row_t, part)
        elif SCORE is not None:
            tl.store(score + token_t, token_score(gated, live, SCORE, EVEN))
        store_row(y + token_t * channels, e, gated + more if GATED else out, live, EVEN)


@triton.jit(do_not_specialize=["length", "chunk", "order_stride", "stride"])
def scan_forward(
    us, deltas, A, Bs, Cs, Ds, biases, steps, gap_deltas, gaps, orders, z, add, y, scores, ends, decays,
    length, chunk, channels, state_stride, z_stride, order_stride, stride,
    PATHS: tl.constexpr, REVERSE: tl.constexpr, SOFTPLUS: tl.constexpr, SCORE: tl.constexpr, SCORED: tl.constexpr,
    STATES: tl.constexpr, N: tl.constexpr, EVEN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """y = (sum over paths) * silu(z) + add; grid: images x blocks of channels, chunks of tokens.

    With `ends` and `decays` from `scan_chunks`, a program starts from the state that enters its chunk. `scores`
    (images, blocks, length) gets each block's part of the sum over channels of the first SCORED paths, gated.
    """
    program, c = tl.program_id(0), tl.program_id(1)
    b, e, columns, live = place(program, channels, True, EVEN, BLOCK)
    first = c * chunk
    count = tl.minimum(chunk, length - first)
    score = scores + program.to(tl.int64) * length
    for p in tl.static_range(PATHS):
        # The sum of the paths stays ungated until all are in; a score alone looks at it gated before.
        forward_path(
            us[p], deltas[p], A, Bs[p], Cs[p], Ds[p], biases[p], steps[p], gap_deltas[p], gaps[p], orders[p],
            z if p == PATHS - 1 or (SCORE is not None and p == SCORED - 1) else None,
            y if p > 0 else None, add if p == PATHS - 1 else None, y, score,
            None if ends is None else ends + (b * PATHS + p) * tl.num_programs(1) * N * channels,
            None if decays is None else decays + (b * PATHS + p) * tl.num_programs(1) * channels,
            p, b, e, columns, live, first, count, length, channels, state_stride, z_stride, order_stride, stride,
            REVERSE[p], SOFTPLUS, p == PATHS - 1, SCORE if SCORE == "delta" or p == SCORED - 1 else None, p > 0,
            STATES, N, EVEN, BLOCK,
        )  # fmt: skip
        if p < PATHS - 1:
            tl.debug_barrier()  # the next path reads what this one wrote, in other threads where layouts differ


@triton.jit
def chunk_path(
    u, delta, A, B, bias, steps, gap_delta, gap, order, end, whole,
    path, b, e, columns, live, first, count, length, channels, state_stride, order_stride, stride,
    REVERSE: tl.constexpr, SOFTPLUS: tl.constexpr,
    STATES: tl.constexpr, N: tl.constexpr, EVEN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One path of `scan_chunks`."""
    n = tl.arange(0, N)[:, None]
    first_row = b * length
    u += first_row * channels
    delta += first_row * channels
    B += first_row * state_stride
    if steps is not None:
        steps += first_row
    if gap is not None:
        gap += first_row * channels
    if order is not None:
        order += b * order_stride
    a = load_matrix(A, path, n, columns, channels, stride, STATES, N)
    bias, gap_delta = optional_load(bias, e), optional_load(gap_delta, e)
    h = tl.zeros([N, BLOCK], tl.float32)
    decays = tl.zeros([BLOCK], tl.float32)
    for i in range(count):
        row = row_of(i, first, count, REVERSE)
        token = token_of(row, order)
        u_t, raw, B_t, steps_t, gap_t = load_input(u, delta, B, steps, gap, token, row, e, n,
                                                   channels, state_stride, STATES, N)  # fmt: skip
        delta_t, decay = step_sizes(raw, bias, steps_t, gap_delta, gap_t, SOFTPLUS)
        h = tl.exp2(decay[None, :] * a) * h + (delta_t * u_t.to(tl.float32))[None, :] * B_t
        decays += decay
    store_row(whole, e, decays, live, EVEN)
    tl.store(end + n * stride + columns[None, :], h, mask=live[None, :])


@triton.jit(do_not_specialize=["length", "chunk", "order_stride", "stride"])
def scan_chunks(
    us, deltas, A, Bs, biases, steps, gap_deltas, gaps, orders, ends, decays,
    length, chunk, channels, state_stride, order_stride, stride,
    PATHS: tl.constexpr, REVERSE: tl.constexpr, SOFTPLUS: tl.constexpr,
    STATES: tl.constexpr, N: tl.constexpr, EVEN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The state that each chunk of tokens ends in, had it started from zero, and the sum of its decay exponents.

    `ends` (images, paths, chunks, N, channels), `decays` (images, paths, chunks, channels); grid as `scan_forward`.
    """
    c = tl.program_id(1)
    b, e, columns, live = place(tl.program_id(0), channels, True, EVEN, BLOCK)
    first = c * chunk
    count = tl.minimum(chunk, length - first)
    for p in tl.static_range(PATHS):
        slot = (b * PATHS + p) * tl.num_programs(1) + c
        chunk_path(
            us[p], deltas[p], A, Bs[p], biases[p], steps[p], gap_deltas[p], gaps[p], orders[p],
            ends + slot * N * channels, decays + slot * channels, p, b, e, columns, live, first, count, length,
            channels, state_stride, order_stride, stride, REVERSE[p], SOFTPLUS, STATES, N, EVEN, BLOCK,
        )  # fmt: skip


@triton.jit
def backward_step(
    u, delta, B, C, steps, gap, z, dy, du, ddelta, dB, dC, dgap, dz, a, skip, bias, gap_delta,
    before, after, dh, dA, dD, dbias, token, row, e, live, n, channels, state_stride, z_stride,
    SOFTPLUS: tl.constexpr, DZ_SUM: tl.constexpr, STATES: tl.constexpr, N: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """(dh, dA, dD, dbias) with a step's share, from the states before and after it; its other gradients are stored."""
    u_t, raw, B_t, steps_t, gap_t = load_input(u, delta, B, steps, gap, token, row, e, n,
                                               channels, state_stride, STATES, N)  # fmt: skip
    C_t = load_states(C + row * state_stride, n, STATES, N)
    upper = tl.load(dy + token * channels + e).to(tl.float32)
    u_t = u_t.to(tl.float32)
    delta_t, decay = step_sizes(raw, bias, steps_t, gap_delta, gap_t, SOFTPLUS)
    if z is not None:
        z_t = tl.load(z + token * z_stride + e).to(tl.float32)
        share = sigmoid(z_t)
        out = tl.sum(after * C_t, 0) + skip * u_t
        slope = upper * out * share * (1.0 + z_t * (1.0 - share))
        if DZ_SUM:
            slope += tl.load(dz + token * channels + e)
        store_row(dz + token * channels, e, slope, live, EVEN)
        upper = upper * (z_t * share)
    if not EVEN:
        upper = tl.where(live, upper, 0.0)
    store_states(dC + row * STATES, tl.sum(upper[None, :] * after, 1), STATES, N)
    dh += upper[None, :] * C_t
    store_states(dB + row * STATES, tl.sum(dh * (delta_t * u_t)[None, :], 1), STATES, N)
    dinput = tl.sum(dh * B_t, 0)
    dh *= tl.exp2(decay[None, :] * a)
    through = dh * before
    dA += through * decay[None, :]
    ddecay = tl.sum(through * a, 0) * (1.0 / LOG2_E)
    store_row(du + token * channels, e, dinput * delta_t + upper * skip, live, EVEN)
    dD += upper * u_t
    if gap is not None:
        store_row(dgap + row * channels, e, ddecay, live, EVEN)
    slope = ddecay + dinput * u_t
    if SOFTPLUS:
        slope *= sigmoid(raw.to(tl.float32) + bias)
    dbias += slope
    store_row(ddelta + row * channels, e, slope, live, EVEN)
    return dh, dA, dD, dbias


@triton.jit
def backward_path(
    u, delta, A, B, C, D, bias, steps, gap_delta, gap, order, z, dy,
    du, ddelta, dA, dB, dC, dD, dbias, dgap, dz, entering,
    path, b, e, columns, live, length, channels, state_stride, z_stride, order_stride, stride,
    REVERSE: tl.constexpr, SOFTPLUS: tl.constexpr, DZ_SUM: tl.constexpr, CHUNK: tl.constexpr,
    STATES: tl.constexpr, N: tl.constexpr, EVEN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One path of `scan_backward`."""
    n = tl.arange(0, N)[:, None]
    first_row = b * length
    u += first_row * channels
    delta += first_row * channels
    B += first_row * state_stride
    C += first_row * state_stride
    dy += first_row * channels
    du += first_row * channels
    ddelta += first_row * channels
    if steps is not None:
        steps += first_row
    if gap is not None:
        gap += first_row * channels
    if order is not None:
        order += b * order_stride
    if gap is not None:
        dgap += first_row * channels
    if z is not None:
        z += first_row * z_stride
        dz += first_row * channels
    chunks = tl.cdiv(length, CHUNK)
    a = load_matrix(A, path, n, columns, channels, stride, STATES, N)
    skip, bias, gap_delta = optional_load(D, e), optional_load(bias, e), optional_load(gap_delta, e)
    state_block = n * channels + e[None, :]

    h = tl.zeros([N, BLOCK], tl.float32)
    for i in range(length):
        if i % CHUNK == 0:
            tl.store(entering + i // CHUNK * N * channels + state_block, h, mask=live[None, :])
        row = row_of(i, 0, length, REVERSE)
        token = token_of(row, order)
        u_t, raw, B_t, steps_t, gap_t = load_input(u, delta, B, steps, gap, token, row, e, n,
                                                   channels, state_stride, STATES, N)  # fmt: skip
        delta_t, decay = step_sizes(raw, bias, steps_t, gap_delta, gap_t, SOFTPLUS)
        h = tl.exp2(decay[None, :] * a) * h + (delta_t * u_t.to(tl.float32))[None, :] * B_t
    tl.debug_barrier()

    dh = tl.zeros([N, BLOCK], tl.float32)
    dA_sum = tl.zeros([N, BLOCK], tl.float32)
    dD_sum = tl.zeros([BLOCK], tl.float32)
    dbias_sum = tl.zeros([BLOCK], tl.float32)
    for c_back in range(chunks):
        c = chunks - 1 - c_back
        h = tl.load(entering + c * N * channels + state_block)
        states = (h,)
        for j in tl.static_range(CHUNK):
            # Beyond the last token it is taken again, for states that nobody looks at.
            row = row_of(tl.minimum(c * CHUNK + j, length - 1), 0, length, REVERSE)
            token = token_of(row, order)
            u_t, raw, B_t, steps_t, gap_t = load_input(u, delta, B, steps, gap, token, row, e, n,
                                                       channels, state_stride, STATES, N)  # fmt: skip
            delta_t, decay = step_sizes(raw, bias, steps_t, gap_delta, gap_t, SOFTPLUS)
            h = tl.exp2(decay[None, :] * a) * h + (delta_t * u_t.to(tl.float32))[None, :] * B_t
            states = states + (h,)
        for j in tl.static_range(CHUNK):
            i = c * CHUNK + (CHUNK - 1 - j)
            if i < length:
                row = row_of(i, 0, length, REVERSE)
                token = token_of(row, order)
                dh, dA_sum, dD_sum, dbias_sum = backward_step(
                    u, delta, B, C, steps, gap, z, dy, du, ddelta, dB, dC, dgap, dz, a, skip, bias, gap_delta,
                    states[CHUNK - 1 - j], states[CHUNK - j], dh, dA_sum, dD_sum, dbias_sum,
                    token, row, e, live, n, channels, state_stride, z_stride, SOFTPLUS, DZ_SUM, STATES, N, EVEN,
                )  # fmt: skip
    where = dA + (b * channels + e[None, :]) * STATES + n
    tl.store(where, dA_sum, mask=live[None, :] & (n < STATES))
    if D is not None:
        store_row(dD + b * channels, e, dD_sum, live, EVEN)
    if bias is not None and dbias is not None:
        store_row(dbias + b * channels, e, dbias_sum, live, EVEN)


@triton.jit(do_not_specialize=["length", "order_stride", "stride"])
def scan_backward(
    us, deltas, A, Bs, Cs, Ds, biases, steps, gap_deltas, gaps, orders, z, dy,
    dus, ddeltas, dAs, dBs, dCs, dDs, dbiases, dgaps, dz, entering,
    length, channels, state_stride, z_stride, order_stride, stride,
    PATHS: tl.constexpr, REVERSE: tl.constexpr, SOFTPLUS: tl.constexpr, CHUNK: tl.constexpr,
    STATES: tl.constexpr, N: tl.constexpr, EVEN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Gradients of all that `scan_forward` takes; grid: images x blocks of channels.

    A first walk leaves the state before every CHUNK tokens in `entering` (images, chunks, N, channels); then the
    chunks go by from the last to the first, each with its states made again and held in registers. Sums over images
    or channels come in parts: dAs (images, channels, STATES), dDs, dbiases (images, channels), dBs, dCs (images,
    blocks, length, STATES).
    """
    program = tl.program_id(0)
    b, e, columns, live = place(program, channels, False, EVEN, BLOCK)
    parts = program.to(tl.int64) * length * STATES
    entering += b * tl.cdiv(length, CHUNK) * N * channels
    for p in tl.static_range(PATHS):
        backward_path(
            us[p], deltas[p], A, Bs[p], Cs[p], Ds[p], biases[p], steps[p], gap_deltas[p], gaps[p], orders[p], z,
            dy, dus[p], ddeltas[p], dAs[p], dBs[p] + parts, dCs[p] + parts, dDs[p], dbiases[p], dgaps[p], dz, entering,
            p, b, e, columns, live, length, channels, state_stride, z_stride, order_stride, stride,
            REVERSE[p], SOFTPLUS, p > 0, CHUNK, STATES, N, EVEN, BLOCK,
        )  # fmt: skip
        tl.debug_barrier()
