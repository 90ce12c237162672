"""The selective scan of Mamba-1 ("S6", arXiv 2312.00752), with the decay of pruned positions folded in."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor

from .dispatch import full_precision, select

Gap = Tensor | tuple[Tensor, Tensor] | None

# Scores of a token: the mean over channels of its gated result y, or of the delta of its paths. "clip-paths" takes the
# result of each path by itself, then the mean over the paths: what is positive on one cannot cancel on another.
SCORES: dict[str, Callable[[Tensor], Tensor]] = {
    "clip": lambda y: y.relu().mean(-1),
    "l1": lambda y: y.abs().mean(-1),
    "l2": lambda y: y.square().mean(-1).sqrt(),
    "mean": lambda y: y.mean(-1),
    "delta": lambda delta: delta.mean(-1),
    "clip-paths": lambda y: y.relu().mean(-1),
}


def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    gap: Gap = None,
    reverse: bool = False,
    add: Tensor | None = None,
    order: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Selective scan over a sequence, aligned to the positions that pruning removed.

    Per channel e and state n, with `delta = softplus(delta + delta_bias)` where asked for:

        h_t = exp((delta_t + gap_t) A) h_{t-1} + delta_t B_t u_t,   h_0 = 0
        y_t = (sum_n C_t h_t + D u_t) * silu(z_t) + add_t

    `gap_t` is the sum of delta over the positions pruned just before token t: time passes there and nothing
    comes in, so it belongs to the decay and never to the input (ToP-ViM, arXiv 2409.18962, section 4).

    Args:
        u, delta, z: (batch, length, d_inner); `z` None: no gate.
        A: (d_inner, d_state), negative. B, C: (batch, length, d_state). D, delta_bias: (d_inner,).
        delta_softplus: apply softplus, the identity above 20, after adding the bias.
        gap: (batch, length, d_inner) in the units of delta after softplus, or a pair
            (steps (batch, length), delta (d_inner,)) whose product it is, or None.
        reverse: run from the last token to the first. All tensors, `gap` included, stay in token order.
        add: (batch, length, d_inner) that the result is added to, of another path say, in the same pass over memory.
        order: (length,) or (batch, length) integers, a permutation: the token that each step visits, instead of
            `reverse`. u, z, add and the result are in token order; delta, B, C and a gap are in the order of the steps,
            as PlainMamba (arXiv 2403.17695) has them.
        backend: "cpu", "triton", "reference", or None for the best one available.

    Returns:
        y (batch, length, d_inner) in the dtype of `u`. The state is float32 or wider whatever the input.

    Raises:
        ValueError: shapes that do not fit together, or an unknown backend.
    """
    _check_shapes(u, delta, A, B, C, D, z, delta_bias, gap, add, order, reverse)
    with full_precision(u.device):
        scan = select(backend, u, delta, z, add).selective_scan
        return scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus, gap, reverse, add, order)


class ScanPath(NamedTuple):
    """One path of `scan_paths`; the fields are those arguments of `selective_scan`."""

    u: Tensor
    delta: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    D: Tensor | None = None
    delta_bias: Tensor | None = None
    gap: Gap = None
    reverse: bool = False
    order: Tensor | None = None


def scan_paths(
    paths: Iterable[ScanPath],
    z: Tensor | None = None,
    delta_softplus: bool = False,
    score: str | None = None,
    scored: int | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Selective scans of the same tokens along several paths, summed and gated, in token order.

    y = (sum over paths of sum_n C_t h_t + D u_t) * silu(z), with h of each path as in `selective_scan`. Where all is
    in one kernel, u and z are neither flipped nor gathered, and scores cost no further pass over y.

    Args:
        paths: alike in shape and in what they have; taken one at a time where a backend works that way, so that a
            generator need not hold them all.
        z: (batch, length, d_inner) or None. delta_softplus: as in `selective_scan`.
        score: a name in `SCORES`, or None.
        scored: how many paths, the first ones, the scored y is the sum of; None: all. The scores "delta" and
            "clip-paths" are of all paths in any case.
        backend: "cpu", "triton", "reference", or None for the best one available.

    Returns:
        y (batch, length, d_inner) in the dtype of `u`, and scores (batch, length) float32, without gradient, or None.
        The score "delta" belongs to steps, not to the tokens of an `order`.

    Raises:
        ValueError: shapes that do not fit together, no paths, an unknown score or backend.
    """
    if score is not None and score not in SCORES:
        raise ValueError(f"scan_paths: unknown score {score!r}; there are {', '.join(SCORES)}")
    checked = _checked(paths, z, scored)
    first = next(checked, None)
    if first is None:
        raise ValueError("scan_paths: expected at least one path")
    module = select(backend, first.u, first.delta, z)
    together = getattr(module, "scan_paths", None) if score != "clip-paths" else None
    if together is None:
        return one_by_one(module.selective_scan, chain([first], checked), z, delta_softplus, score, scored)
    paths = [first, *checked]
    with full_precision(first.u.device):
        return together(paths, z, delta_softplus, score, scored)


def one_by_one(scan, paths: Iterable[ScanPath], z, delta_softplus, score, scored) -> tuple[Tensor, Tensor | None]:
    """`scan_paths` by a backend's scan of one path, each on top of the ones before it."""
    y, scores, parts = None, None, []
    for count, path in enumerate(paths, 1):  # making a path is the caller's code, under the caller's autocast
        u, delta, A, B, C, D, bias, gap, reverse, order = path
        below = None if score == "clip-paths" else y
        with full_precision(u.device):
            found = scan(u, delta, A, B, C, D, z, bias, delta_softplus, gap, reverse, below, order)
        if score == "delta":
            parts.append(SCORES[score](step_size(path, delta_softplus)))
        elif score == "clip-paths":
            parts.append(SCORES[score](found.detach().float()))
            found = found if y is None else y + found
        elif score is not None and count == scored:
            scores = SCORES[score](found.detach().float())
        y = found
    if parts:
        scores = sum(parts) / len(parts)
    elif score is not None and scores is None:
        scores = SCORES[score](y.detach().float())
    return y, scores


def step_size(path: ScanPath, delta_softplus: bool) -> Tensor:
    """(batch, length, d_inner) float32 delta of a path after bias and softplus, without gradient."""
    delta = path.delta.detach().float()
    if path.delta_bias is not None:
        delta = delta + path.delta_bias.detach().float()
    return F.softplus(delta) if delta_softplus else delta


def _checked(paths: Iterable[ScanPath], z: Tensor | None, scored: int | None) -> Iterator[ScanPath]:
    """The paths as they come, each fitting together and like the first; at the end, `scored` of them."""
    first, count = None, 0
    for path in paths:
        count += 1
        u, delta, A, B, C, D, bias, gap, reverse, order = path
        _check_shapes(u, delta, A, B, C, D, z, bias, gap, None, order, reverse)
        first = first or path
        if (u.shape, A.shape) != (first.u.shape, first.A.shape):
            raise ValueError(
                f"scan_paths: expected all paths as the first, u {tuple(first.u.shape)} and A {tuple(first.A.shape)}, "
                f"found {tuple(u.shape)} and {tuple(A.shape)}"
            )
        for name in ("D", "delta_bias", "gap", "order"):
            if (getattr(path, name) is None) != (getattr(first, name) is None):
                raise ValueError(f"scan_paths: {name} is given for all paths or for none")
        yield path
    if scored is not None and not 1 <= scored <= count:
        raise ValueError(f"scan_paths: expected scored from 1 to the {count} paths there are, found {scored}")


def _check_shapes(u, delta, A, B, C, D, z, delta_bias, gap, add, order, reverse) -> None:
    if u.ndim != 3 or A.ndim != 2 or A.shape[0] != u.shape[2]:
        raise ValueError(
            f"selective_scan: expected u (batch, length, d_inner) and A (d_inner, d_state), "
            f"found {tuple(u.shape)} and {tuple(A.shape)}"
        )
    batch, length, d_inner = u.shape
    expected = {
        "delta": (delta, (batch, length, d_inner)),
        "B": (B, (batch, length, A.shape[1])),
        "C": (C, (batch, length, A.shape[1])),
        "D": (D, (d_inner,)),
        "z": (z, (batch, length, d_inner)),
        "delta_bias": (delta_bias, (d_inner,)),
        "add": (add, (batch, length, d_inner)),
    }
    if isinstance(gap, tuple):
        expected["gap steps"] = (gap[0], (batch, length))
        expected["gap delta"] = (gap[1], (d_inner,))
    else:
        expected["gap"] = (gap, (batch, length, d_inner))
    for name, (tensor, shape) in expected.items():
        if tensor is not None and tuple(tensor.shape) != shape:
            raise ValueError(f"selective_scan: expected {name} {shape}, found {tuple(tensor.shape)}")
    if order is not None:
        # One comparison by the number of axes: an exporter would take (batch, length) == (length,) for a condition.
        fits = tuple(order.shape) == ((length,) if order.ndim == 1 else (batch, length))
        if reverse or not fits or order.is_floating_point():
            raise ValueError(
                f"selective_scan: expected an order ({length},) or {(batch, length)}, of integers, and no reverse "
                f"beside it, found {tuple(order.shape)} {order.dtype}{' and reverse' if reverse else ''}"
            )
