"""Hidden attention: how much each token contributes to the outputs of a layer's scans, or of its attention.

A scan is a matrix for each channel (`ssmcompress.ops.scan_rows`), which accounts for the gaps of dropped tokens, so
its rows are also exact for pruned and aligned models. Attention is a matrix for each head.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import NamedTuple

import torch
from torch import Tensor

from ..models.base import TokenModel
from ..models.running import Decision
from ..ops import ScanPath
from ..ops.observing import AttentionCall, Observer, observe
from ..ops.scan_rows import add_scan_rows
from ..ops.selective_scan import ScanCall
from ..pruning.tokens import Tokens


class LayerView(NamedTuple):
    """A layer and its tokens in a forward pass.

    Attributes:
        layer: its number, from 1. before, after: its input tokens, and the tokens after its stage.
        decision: of its stage, or None.
    """

    layer: int
    before: Tokens
    after: Tokens
    decision: Decision | None


def view_layers(
    model: TokenModel, tokens: Tokens, reader: Callable[[int, Tokens], Observer | None]
) -> Iterator[LayerView]:
    """Run all layers of a model, as its `forward` does, and yield a view of each.

    Args:
        tokens: returned by `embed`.
        reader: function from the number of a layer, and its tokens, to an observer of its scan or attention calls;
            None: no observer.
    """
    last = len(model.blocks)
    for layer in range(1, last + 1):
        tokens = model.enter(layer, tokens)
        observer = reader(layer, tokens)
        with nullcontext() if observer is None else observe(observer):
            after, decision = model.step(layer, tokens, protected_only=layer == last and model.shortens_last)
        yield LayerView(layer, tokens, after, decision)
        tokens = after


class RowSum:
    """An observer that sums rows of the matrices of a layer with weights, giving a value for each token that is read.

    The arguments of a call are used immediately and not stored: intermediate values of one path are then still in the
    cache, and their memory can be reused for the next one.

    Attributes:
        total: (batch, tokens, channels) float32 without gradient, for attention (batch, tokens, heads); all paths are
            summed.
        attention: the attention call, if there was one.
    """

    def __init__(self, weights: Tensor, published: bool = False):
        """Initialise the sum.

        Args:
            weights: (batch, tokens) of the rows, one for each token that reads, in token order.
            published: omit, like `compute_middle_attn_vector` in Vim's code, the time step of the token that reads, and
                its own contribution; there must be one such token in each image.
        """
        self.weights, self.published = weights, published
        self.total: Tensor | None = None
        self.attention: AttentionCall | None = None

    @torch.no_grad()
    def __call__(self, call: ScanCall | AttentionCall) -> None:
        if isinstance(call, AttentionCall):
            self.attention = call
            self.total = sum_attention_rows(call, self.weights)
            return
        if self.total is None:
            shape = *self.weights.shape, call.path.u.shape[2]
            self.total = torch.zeros(shape, dtype=torch.float32, device=self.weights.device)
        _add_rows(call, self.weights, self.published, self.total)
        if self.published:
            self.total.masked_fill_(self.weights[..., None] != 0, 0)


def sum_attention_rows(call: AttentionCall, weights: Tensor) -> Tensor:
    """Return the weighted sum of the rows of attention, (batch, tokens, heads)."""
    # Rows without a weight are not computed: possibly only the first tokens are queried, or a single one is read.
    queried = weights.ne(0).any(0).nonzero()[:, 0]
    queries, keys = call.queries[:, :, queried].float(), call.keys.float()
    products = call.scale * queries @ keys.transpose(-2, -1)
    attention = (products if call.bias is None else products + call.bias).softmax(-1)
    return torch.einsum("bhqk,bq->bkh", attention, weights[:, queried])


def _add_rows(call: ScanCall, weights: Tensor, published: bool, total: Tensor) -> None:
    """Add the weighted sum of the rows of one path to `total` (batch, tokens, channels), in place."""
    path = call.path
    start = weights.shape[1] - path.u.shape[1] if path.reverse else 0  # the last layer may not have all tokens
    weights = weights[:, start : start + path.u.shape[1]]
    if path.order is None:
        path, weights, skipped = _cut_to_readers(path, weights)
        start += skipped
    part = total[:, start : start + path.u.shape[1]]
    add_scan_rows(part, path, weights, call.delta_softplus, published)


def _cut_to_readers(path: ScanPath, weights: Tensor) -> tuple[ScanPath, Tensor, int]:
    """Return a raster path without the tokens after the last one that reads, with its weights, and its first token."""
    readers = weights.ne(0).any(0).nonzero()[:, 0]
    rows = slice(int(readers[0]), None) if path.reverse else slice(0, int(readers[-1]) + 1)
    gap = path.gap
    if gap is not None:
        gap = gap[:, rows] if torch.is_tensor(gap) else (gap[0][:, rows], gap[1])
    parts = {name: getattr(path, name)[:, rows] for name in ("u", "delta", "B", "C")}
    return path._replace(**parts, gap=gap), weights[:, rows], rows.start
