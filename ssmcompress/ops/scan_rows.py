"""Sums over rows of the matrix form of a selective scan: the contributions of each input to its outputs.

For each channel, y_r = sum over c <= r of alpha[r, c] u_c on the path (plus D u_r), with

    alpha[r, c] = sum_n C[r, n] exp(A[n] * sum over k = c+1..r of (delta_k + gap_k)) delta_c B[c, n]

(Ali et al., arXiv 2403.01590, with the gaps of pruned positions). A sum of rows can be computed by a scan in the other
direction, with as many operations as the scan, O(length * d_inner * d_state), without forming the matrix:

    s_c = w_c C_c + exp(A (delta_{c+1} + gap_{c+1})) s_{c+1},   sum_r w_r alpha[r, c] = delta_c sum_n B[c, n] s_c[n]
"""

from __future__ import annotations

import torch
from torch import Tensor

from .dispatch import full_precision, select
from .selective_scan import ScanPath, selective_scan, step_size

# Delta and input of the scan in the other direction, whose decays are all in its gap. It is a power of two, so that
# products with it are exact, and small, so that the gap, which compensates for it, loses no precision.
TINY = 2.0**-10


@torch.no_grad()
def add_scan_rows(
    total: Tensor,
    path: ScanPath,
    weights: Tensor,
    delta_softplus: bool = False,
    published: bool = False,
    backend: str | None = None,
) -> None:
    """Add the sum over rows r of weights[r] * alpha[r, :] of one path to `total`, in place.

    Args:
        total: (batch, length, d_inner) float32, in token order.
        path: the inputs of the scan; its u and D are not used, except for the shape. delta_softplus: as in
            `selective_scan`.
        weights: (batch, length), the weights of the rows, in token order.
        published: exclude the delta of tokens with a weight from the decays, as in Vim's published code.
        backend: "cpu", "triton", "reference", or None for the best one available.
    """
    order = None if path.order is None else path.order.expand(weights.shape[0], -1)
    if order is not None:
        weights = weights.gather(1, order)
    spends = (weights == 0).float() if published else None
    C = path.C.float() * weights[..., None]
    with full_precision(total.device):
        add = getattr(select(backend, path.delta, total), "scan_rows", _add_by_scan)
        add(
            path.delta, path.A, path.B, C, path.delta_bias, delta_softplus, path.gap, spends, path.reverse, order, total
        )  # fmt: skip


def _add_by_scan(delta, A, B, C, delta_bias, delta_softplus, gap, spends, reverse, order, total) -> None:
    """Compute `add_scan_rows` with `selective_scan`, for backends without their own kernel."""
    steps = step_size(ScanPath(delta, delta, A, B, C, delta_bias=delta_bias), delta_softplus)
    spent = steps if spends is None else steps * spends[..., None]
    if gap is not None:
        spent = spent + (gap if torch.is_tensor(gap) else gap[0][..., None] * gap[1])
    # The decay between two tokens is that of the later one on the path.
    decays, before, after = torch.zeros_like(spent), slice(None, -1), slice(1, None)
    to, of = (after, before) if reverse else (before, after)
    torch.sub(spent[:, of], TINY, out=decays[:, to])
    tiny = torch.full_like(steps, TINY)
    rows = selective_scan(tiny, tiny, A.float(), C / TINY**2, B.float(), gap=decays, reverse=not reverse)
    if order is None:
        total.addcmul_(rows, steps)
    else:
        total.scatter_add_(1, order[..., None].expand_as(rows), rows.mul_(steps))
