"""Hidden attention: what the outputs of a layer's scans, or of its attention, take from each token.

A scan is a matrix, one for each channel (Ali et al., arXiv 2403.01590): on its path, the output of token r is
y_r = sum over c <= r of alpha[r, c] u_c, and D u_r besides, with

    alpha[r, c] = sum_n C[r, n] exp(A[n] * sum over k = c+1..r of (delta_k + gap_k)) delta_c B[c, n]

`gap` is the time that passes at pruned positions, so that this is exact for pruned and aligned models, too. No matrix
is formed. A sum of its rows, sum_r w_r alpha[r, c], follows from the scan in the other direction

    s_c = w_c C_c + exp(A (delta_{c+1} + gap_{c+1})) s_{c+1},   sum_r w_r alpha[r, c] = delta_c sum_n B[c, n] s_c[n]

in as many operations as the scan of the layer, O(tokens * channels * states).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..models.base import Decision, TokenModel
from ..ops import ScanPath, selective_scan
from ..ops.observing import AttentionCall, observe
from ..ops.selective_scan import ScanCall, step_size
from ..pruning.tokens import Tokens

# Delta and input of the scan in the other direction, whose decays are all in its gap. A power of two, so that products
# with it are exact, and small, so that the gap, which makes up for it, loses no precision.
TINY = 2.0**-10


class LayerView(NamedTuple):
    """A layer as it was run.

    Attributes:
        layer: its number, from 1. before, after: the tokens that it is run on, and those after its stage.
        decision: of its stage, or None.
        calls: of its scans or its attention.
    """

    layer: int
    before: Tokens
    after: Tokens
    decision: Decision | None
    calls: Sequence[ScanCall | AttentionCall]


def view_layers(model: TokenModel, tokens: Tokens) -> Iterator[LayerView]:
    """Run all layers of a model, as its `forward` does, and yield a view of each.

    Args:
        tokens: those that `embed` returns.
    """
    last = len(model.blocks)
    for layer in range(1, last + 1):
        calls: list[Any] = []
        tokens = model.enter(layer, tokens)
        with observe(calls.append):
            after, decision = model.step(layer, tokens, protected_only=layer == last and model.shortens_last)
        yield LayerView(layer, tokens, after, decision, calls)
        tokens = after


def sum_rows(view: LayerView, weights: Tensor, published: bool = False) -> Tensor:
    """Return the sum of the rows of a layer's matrices, each times a weight, as a value for each token that is read.

    Args:
        view: the layer. weights: (batch, tokens) of the rows, which are the tokens that read, in token order.
        published: leave out, as `compute_middle_attn_vector` of Vim's code does, the time that passes at the token that
            reads, and what it takes from itself; there must be one such token in each image.

    Returns:
        (batch, tokens, channels) float32, of attention (batch, tokens, heads); both directions are summed.
    """
    total = None
    for call in view.calls:
        if isinstance(call, AttentionCall):
            return _sum_attention_rows(call, weights)
        if total is None:
            total = call.path.u.new_zeros(*weights.shape, call.path.u.shape[2], dtype=torch.float32)
        _add_scan_rows(call, weights, published, total)
    return total.masked_fill_(weights[..., None] != 0, 0) if published else total


def _sum_attention_rows(call: AttentionCall, weights: Tensor) -> Tensor:
    """Return the sum of the rows of attention, (batch, tokens, heads)."""
    # Rows without a weight are not computed: only the first tokens may be queried, or a single one be read.
    queried = weights.ne(0).any(0).nonzero()[:, 0]
    queries, keys = call.queries[:, :, queried].float(), call.keys.float()
    products = call.scale * queries @ keys.transpose(-2, -1)
    attention = (products if call.bias is None else products + call.bias).softmax(-1)
    return torch.einsum("bhqk,bq->bkh", attention, weights[:, queried])


def _add_scan_rows(call: ScanCall, weights: Tensor, published: bool, total: Tensor) -> None:
    """Add the sum of the rows of one path to `total` (batch, tokens, channels), in place."""
    path = call.path
    start = weights.shape[1] - path.u.shape[1] if path.reverse else 0  # the last layer may not have all tokens
    weights = weights[:, start : start + path.u.shape[1]]
    if path.order is None:
        path, weights, skipped = _cut_to_readers(path, weights)
        start += skipped
    else:
        order = path.order.expand(weights.shape[0], -1)
        weights = weights.gather(1, order)
    steps = step_size(path, call.delta_softplus)
    spent = steps * (weights[..., None] == 0) if published else steps
    if path.gap is not None:
        spent = spent + (path.gap if torch.is_tensor(path.gap) else path.gap[0][..., None] * path.gap[1])
    # Between two tokens passes the time of the one that comes later on the path.
    decays, before, after = torch.zeros_like(spent), slice(None, -1), slice(1, None)
    to, of = (after, before) if path.reverse else (before, after)
    torch.sub(spent[:, of], TINY, out=decays[:, to])
    tiny = torch.full_like(steps, TINY)
    C = path.C.detach().float() * (weights / TINY**2)[..., None]
    A, B = path.A.detach().float(), path.B.detach().float()
    rows = selective_scan(tiny, tiny, A, C, B, gap=decays, reverse=not path.reverse)
    if path.order is None:
        total[:, start : start + rows.shape[1]].addcmul_(rows, steps)
    else:
        total.scatter_add_(1, order[..., None].expand_as(rows), rows.mul_(steps))


def _cut_to_readers(path: ScanPath, weights: Tensor) -> tuple[ScanPath, Tensor, int]:
    """Return a raster path without the tokens that come after all that read, with its weights, and its first token."""
    readers = weights.ne(0).any(0).nonzero()[:, 0]
    rows = slice(int(readers[0]), None) if path.reverse else slice(0, int(readers[-1]) + 1)
    gap = path.gap
    if gap is not None:
        gap = gap[:, rows] if torch.is_tensor(gap) else (gap[0][:, rows], gap[1])
    parts = {name: getattr(path, name)[:, rows] for name in ("u", "delta", "B", "C")}
    return path._replace(**parts, gap=gap), weights[:, rows], rows.start
