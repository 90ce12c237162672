"""The selective scan of Mamba-1 ("S6", arXiv 2312.00752), with the decay of pruned positions folded in."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .dispatch import full_precision, select
from .observing import is_observed, tell
from .reference import accumulation_dtype

Gap = Tensor | tuple[Tensor, Tensor] | None

# Scores of a token: means over channels of its gated output y, or of the delta of its paths. "clip-paths" scores the
# output of each path separately and averages over the paths, so that values of opposite sign do not cancel.
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
    """Compute the selective scan of a sequence, aligned to the positions that pruning removed.

    For each channel e and state n, with `delta = softplus(delta + delta_bias)` if `delta_softplus`:

        h_t = exp((delta_t + gap_t) A) h_{t-1} + delta_t B_t u_t,   h_0 = 0
        y_t = (sum_n C_t h_t + D u_t) * silu(z_t) + add_t

    `gap_t` is the sum of delta over the positions pruned just before token t: these steps have no input, so the gap
    enters only the decay (ToP-ViM, arXiv 2409.18962, section 4).

    Args:
        u, delta, z: (batch, length, d_inner); `z` None: no gate.
        A: (d_inner, d_state), negative. B, C: (batch, length, d_state). D, delta_bias: (d_inner,).
        delta_softplus: apply softplus after adding the bias; it is the identity above 20.
        gap: (batch, length, d_inner) in the units of delta after softplus; or a pair
            (steps (batch, length), delta (d_inner,)), whose product is the gap; or None.
        reverse: run from the last token to the first. All tensors, `gap` included, stay in token order.
        add: (batch, length, d_inner), added to the result in the same pass over memory, for example the sum of other
            paths.
        order: (length,) or (batch, length) integers, a permutation: the token that each step visits; it replaces
            `reverse`. u, z, add and the result are in token order; delta, B, C and a gap are in the order of the steps,
            as in PlainMamba (arXiv 2403.17695).
        backend: "cpu", "triton", "reference", or None for the best one available.

    Returns:
        y (batch, length, d_inner) in the dtype of `u`. The state is float32 or wider for any input.

    Raises:
        ValueError: the shapes do not match, or the backend is unknown.
    """
    _check_shapes(u, delta, A, B, C, D, z, delta_bias, gap, add, order, reverse)
    with full_precision(u.device):
        scan = select(backend, u, delta, z, add).selective_scan
        return scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus, gap, reverse, add, order)


class ScanPath(NamedTuple):
    """One path of `scan_paths`; most fields are the arguments of `selective_scan` of the same names.

    A path may be given by the parameters of a layer: then the compiled CPU kernels compute delta and A during the scan
    instead of reading them from memory.

    Attributes:
        delta_weight: (d_inner, rank); then `delta` is (batch, length, rank), and their product is the actual delta.
            Or None.
        log_A: whether `A` holds the logarithm of -A.
    """

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
    delta_weight: Tensor | None = None
    log_A: bool = False  # noqa: N815

    def expanded(self) -> ScanPath:
        """Return the same path with delta (batch, length, d_inner) and A itself."""
        path = self
        if path.delta_weight is not None:
            path = path._replace(delta=F.linear(path.delta, path.delta_weight), delta_weight=None)
        if path.log_A:
            path = path._replace(A=-torch.exp(path.A.to(accumulation_dtype(path.A.dtype))), log_A=False)
        return path


class Expander:
    """Expands paths in sequence; values shared by consecutive paths, as in PlainMamba, are computed once."""

    def __init__(self):
        self._last: tuple[ScanPath, ScanPath] | None = None

    def __call__(self, path: ScanPath) -> ScanPath:
        """Return `path.expanded()`."""
        if self._last is not None:
            given, made = self._last
            if all(getattr(path, name) is getattr(given, name) for name in ("delta", "delta_weight", "A", "log_A")):
                return path._replace(delta=made.delta, A=made.A, delta_weight=None, log_A=False)
        made = path.expanded()
        self._last = path, made
        return made


class ScanCall(NamedTuple):
    """One path of a call of `scan_paths`, as observers see it (`ssmcompress.ops.observing`).

    Attributes:
        path: its inputs. delta_softplus: as in `selective_scan`.
    """

    path: ScanPath
    delta_softplus: bool


def scan_paths(
    paths: Iterable[ScanPath],
    z: Tensor | None = None,
    delta_softplus: bool = False,
    score: str | None = None,
    scored: int | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Compute selective scans of the same tokens along several paths, summed and gated, in token order.

    y = (sum over paths of sum_n C_t h_t + D u_t) * silu(z), with h of each path as in `selective_scan`. If one kernel
    computes all paths, u and z are neither flipped nor gathered, and scores need no further pass over y.

    Args:
        paths: paths with equal shapes and the same optional fields. A backend that scans one path at a time also
            consumes them one at a time, so a generator avoids holding all of them in memory.
        z: (batch, length, d_inner) or None. delta_softplus: as in `selective_scan`.
        score: a name in `SCORES`, or None.
        scored: the number of leading paths whose sum y is scored; None: all. The scores "delta" and "clip-paths" always
            use all paths.
        backend: "cpu", "triton", "reference", or None for the best one available.

    Returns:
        y (batch, length, d_inner) in the dtype of `u`, and scores (batch, length) float32, without gradient, or None.
        The score "delta" is per step, not per token, where there is an `order`.

    Raises:
        ValueError: the shapes do not match, there are no paths, or the score or the backend is unknown.
    """
    if score is not None and score not in SCORES:
        raise ValueError(f"scan_paths: unknown score {score!r}; expected one of {', '.join(SCORES)}")
    if is_observed():
        paths = _tell_paths(paths, delta_softplus)
    path_iterator = _check_paths(paths, z, scored)
    first = next(path_iterator, None)
    if first is None:
        raise ValueError("scan_paths: expected at least one path")
    module = select(backend, first.u, first.delta, z)
    scan_all = getattr(module, "scan_paths", None) if score != "clip-paths" else None
    if scan_all is None:
        paths, by_parameters = chain([first], path_iterator), getattr(module, "scan_parameters", None)
        return scan_one_by_one(module.selective_scan, paths, z, delta_softplus, score, scored, by_parameters)
    paths = list(map(Expander(), chain([first], path_iterator)))
    with full_precision(first.u.device):
        return scan_all(paths, z, delta_softplus, score, scored)


def scan_one_by_one(
    scan, paths: Iterable[ScanPath], z, delta_softplus, score, scored, scan_parameters=None
) -> tuple[Tensor, Tensor | None]:
    """Compute `scan_paths` with a backend's scan of one path, accumulating the sum over the paths.

    Args:
        scan_parameters: a function of (path, z, delta_softplus, sum) that scans a path given by its parameters, or
            returns None if it cannot; then the path is expanded. The other arguments are those of `scan_paths`.
    """
    y, scores, parts, expand = None, None, [], Expander()
    for count, path in enumerate(paths, 1):  # the paths are computed by the caller's code, under the caller's autocast
        partial_sum, result = None if score == "clip-paths" else y, None
        if scan_parameters is not None and score != "delta":
            result = scan_parameters(path, z, delta_softplus, partial_sum)
        if result is None:
            path = expand(path)
            u, delta, A, B, C, D, bias, gap, reverse, order, _, _ = path
            with full_precision(u.device):
                result = scan(u, delta, A, B, C, D, z, bias, delta_softplus, gap, reverse, partial_sum, order)
        if score == "delta":
            parts.append(SCORES[score](step_size(path, delta_softplus)))
        elif score == "clip-paths":
            parts.append(SCORES[score](result.detach().float()))
            result = result if y is None else y + result
        elif score is not None and count == scored:
            scores = SCORES[score](result.detach().float())
        y = result
    if parts:
        scores = sum(parts) / len(parts)
    elif score is not None and scores is None:
        scores = SCORES[score](y.detach().float())
    return y, scores


def step_size(path: ScanPath, delta_softplus: bool) -> Tensor:
    """Return the step sizes (batch, length, d_inner) of a path after bias and softplus, float32, without gradient."""
    delta = path.delta.detach().float()
    if path.delta_bias is not None:
        delta = delta + path.delta_bias.detach().float()
    return F.softplus(delta) if delta_softplus else delta


def _tell_paths(paths: Iterable[ScanPath], delta_softplus: bool) -> Iterator[ScanPath]:
    """Yield the expanded paths, and notify observers of each."""
    for path in map(Expander(), paths):
        tell(ScanCall(path, delta_softplus))
        yield path


def _check_paths(paths: Iterable[ScanPath], z: Tensor | None, scored: int | None) -> Iterator[ScanPath]:
    """Yield the paths; ValueError for shapes that differ from the first path, or an invalid `scored`."""
    first, count = None, 0
    for path in paths:
        count += 1
        u, delta, A, B, C, D, bias, gap, reverse, order, weight, _ = path
        if weight is not None:
            _check_product(u, delta, weight)
            delta = None
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


def _check_product(u: Tensor, factor: Tensor, weight: Tensor) -> None:
    """Raise a ValueError unless the product of a factor and a weight has the shape of a delta for u."""
    fits = weight.ndim == 2 and weight.shape[0] == u.shape[-1] and weight.shape[1] > 0
    if not fits or factor.shape != (*u.shape[:-1], weight.shape[1]):
        raise ValueError(
            f"scan_paths: expected delta (batch, length, rank) and delta_weight (d_inner, rank) for u "
            f"{tuple(u.shape)}, found {tuple(factor.shape)} and {tuple(weight.shape)}"
        )


def _check_shapes(u, delta, A, B, C, D, z, delta_bias, gap, add, order, reverse) -> None:
    if u.ndim != 3 or A.ndim != 2 or A.shape[0] != u.shape[2]:
        raise ValueError(
            f"selective_scan: expected u (batch, length, d_inner) and A (d_inner, d_state), "
            f"found {tuple(u.shape)} and {tuple(A.shape)}"
        )
    sequence, (batch, length, d_inner) = u.shape, u.shape
    states, channels = (batch, length, A.shape[1]), (d_inner,)
    expected = [
        ("delta", delta, sequence),
        ("B", B, states),
        ("C", C, states),
        ("D", D, channels),
        ("z", z, sequence),
        ("delta_bias", delta_bias, channels),
        ("add", add, sequence),
    ]
    if isinstance(gap, tuple):
        expected += [("gap steps", gap[0], sequence[:2]), ("gap delta", gap[1], channels)]
    else:
        expected.append(("gap", gap, sequence))
    for name, tensor, shape in expected:
        if tensor is not None and tensor.shape != shape:
            raise ValueError(f"selective_scan: expected {name} {tuple(shape)}, found {tuple(tensor.shape)}")
    if order is not None:
        # Compare by the number of axes: an exporter would trace (batch, length) == (length,) as a condition.
        fits = tuple(order.shape) == ((length,) if order.ndim == 1 else (batch, length))
        if reverse or not fits or order.is_floating_point():
            raise ValueError(
                f"selective_scan: expected an order ({length},) or {(batch, length)}, of integers, and not together "
                f"with reverse, found {tuple(order.shape)} {order.dtype}{' and reverse' if reverse else ''}"
            )
