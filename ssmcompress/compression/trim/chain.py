"""Closed-form optimal brain surgeon: selects parts of a linear map to drop, and refits the others to compensate.

A map is linear in its parameters theta, so its error on given rows is (theta - theta_0)^T G (theta - theta_0) with a
Gram matrix G, where the old parameters theta_0 are exact. With I = (G + ridge)^-1, setting a part n of theta to zero
increases the error by at least theta_n^T (I_nn)^-1 theta_n. This minimum is attained by

    theta -= I_:n (I_nn)^-1 theta_n,    I -= I_:n (I_nn)^-1 I_n:

(Hassibi and Stork, 1993; in blocks, Optimal BERT Surgeon, arXiv 2203.07259). The part with the smallest loss is dropped
first, then the next one with the updated theta and I, so one chain gives every count. The ridge regularises theta
towards theta_0. Everything is computed in float64.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...errors import NOT_FINITE, InputError

# Ridge of blocks, relative to the mean of the diagonal, separately for the blocks and for the rest. On 128 images, KL
# from the dense model with 1e-4 and 1e-3: bundled model, 2 states of 8, 0.0025 and 0.0022; another Vim, 8 layers, 4
# states of 16, 0.00030 and 0.00011, 2 states 0.0023 and 0.0006.
BLOCK_RIDGE = 1e-3
# Ridge of channels, relative to the mean of the diagonal.
CHANNEL_RIDGE = 1e-3
# Weight of the loss of the inner maps in the cost of a channel; the loss of the projection has weight 1.
INNER_WEIGHT = 0.1


@dataclass
class BlockSums:
    """Sums over rows that define the error of theta: power - 2 cross . theta + theta^T gram theta.

    theta consists of a part that is always kept (the rest), followed by blocks of equal width.

    Attributes:
        gram: (unknowns, unknowns) float64, symmetric.
        cross: (unknowns,), or None if the old theta is exact: it is then gram theta.
        power: weighted square of the output; None: that of the old theta.
    """

    gram: Tensor
    cross: Tensor | None = None
    power: float | None = None


@dataclass(frozen=True)
class Kept:
    """The result of a chain over blocks for one count.

    Attributes:
        index: (kept,) int64, the kept blocks, ascending.
        theta: (rest + kept * width,) float64, the refitted unknowns.
        loss: the error, including the ridge term, relative to the power of the output.
        power: weighted square of the output.
    """

    index: Tensor
    theta: Tensor
    loss: float
    power: float


def drop_blocks(sums: BlockSums, theta: Tensor, width: int, blocks: int, ridge: float = BLOCK_RIDGE) -> Iterator[Kept]:
    """Yield the chain over blocks: first all of them, then with one block dropped, and so on down to one block.

    Args:
        sums: its `gram` is overwritten, because it may take gigabytes.
        theta: (rest + blocks * width,), the old parameters.
        width: the number of parameters of a block. blocks: the number of blocks.

    Raises:
        InputError: the sums are not finite.
    """
    gram, theta = sums.gram, theta.to(sums.gram)
    image, rest = gram @ theta, len(theta) - blocks * width
    slope = torch.zeros_like(theta) if sums.cross is None else sums.cross - image
    power = float(theta @ image) if sums.power is None else sums.power
    loss = 0.0 if sums.cross is None else power + float(theta @ image - 2 * theta @ sums.cross)
    inverse = _invert(gram, _penalty(gram, (rest, blocks * width), ridge))
    step = inverse @ slope
    theta, loss, scale = theta + step, loss - float(slope @ step), power or 1.0
    live = list(range(blocks))
    while True:
        places = torch.tensor(sorted(range(len(live)), key=live.__getitem__), device=theta.device)
        ordered = theta[rest:].view(len(live), width)[places].flatten()
        index = torch.tensor(sorted(live), device=theta.device)
        yield Kept(index, torch.cat([theta[:rest], ordered]), max(0.0, loss) / scale, power)
        if len(live) == 1:
            return
        starts = range(rest, len(theta), width)
        inner = torch.stack([inverse[s : s + width, s : s + width] for s in starts])
        parts = theta[rest:].view(-1, width)
        losses = (torch.linalg.solve(inner, parts) * parts).sum(1)
        least = int(losses.argmin())
        loss += float(losses[least])
        last = starts[-1]
        _swap(inverse, theta, slice(starts[least], starts[least] + width), slice(last, last + width))
        live[least] = live[-1]
        live.pop()
        across = inverse[:last, last:]
        solved = torch.linalg.solve(inverse[last:, last:], torch.cat([across.T, theta[last:, None]], dim=1))
        theta = theta[:last] - across @ solved[:, -1]
        inverse = inverse[:last, :last].addmm_(across, solved[:, :-1], alpha=-1)


@dataclass(frozen=True)
class MapSums:
    """A linear map whose inputs are the channels, and the sums over its input rows x, in float64.

    Attributes:
        weight: (outputs, channels). gram: (channels, channels), sum of w x x^T.
        mean: (channels,), the weighted mean of x if the map has a bias; `gram` is then that of x - mean.
    """

    weight: Tensor
    gram: Tensor
    mean: Tensor | None = None

    def powers(self) -> Tensor:
        """Return the weighted square of each output, (outputs,)."""
        return (self.weight @ self.gram * self.weight).sum(1)


@dataclass(frozen=True)
class ChannelChain:
    """The order in which the channels of a layer are dropped, and the sums to refit its maps for any number of them.

    Attributes:
        order: (channels,) int64, the channels in dropping order; the last one is never dropped.
        costs: (channels,) float64, the cost after dropping none, one, ... of them.
        projection: the map into the residual stream. inner: the other maps whose inputs are the channels.
    """

    order: Tensor
    costs: Tensor
    projection: MapSums
    inner: tuple[MapSums, ...]
    ridge: float = CHANNEL_RIDGE

    def keep(self, count: int) -> Tensor:
        """Return the channels to keep for this number, (count,) int64, ascending."""
        return self.order[len(self.order) - count :].sort().values

    def refit(self, sums: MapSums, index: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the refitted weight (outputs, kept) of a map for the channels `index`, and the change of its bias."""
        dropped = torch.ones(len(self.order), dtype=torch.bool, device=index.device)
        dropped[index] = False
        gram = sums.gram + _penalty(sums.gram, (len(self.order),), self.ridge).diag()
        moved = torch.linalg.solve(gram[index][:, index], gram[index][:, dropped])
        weight = sums.weight[:, index] + sums.weight[:, dropped] @ moved.T
        return weight, None if sums.mean is None else sums.weight @ sums.mean - weight @ sums.mean[index]


def drop_channels(projection: MapSums, inner: Sequence[MapSums], ridge: float = CHANNEL_RIDGE) -> ChannelChain:
    """Return the chain over the channels of a layer.

    The cost of a channel is its loss in the projection, relative to the power of the outputs, plus `INNER_WEIGHT` times
    its losses in the inner maps, each a mean over outputs, relative to their power.

    Raises:
        InputError: the sums are not finite.
    """
    maps = []
    for sums, scale in ((projection, 1.0), *((m, INNER_WEIGHT) for m in inner)):
        powers = sums.powers()
        # One scale for all outputs of the projection, which are added to the same stream; one per output for inner
        # maps.
        unit = powers.sum().expand(len(powers)) if sums is projection else powers * len(powers)
        weight = sums.weight * torch.where(unit > 0, scale / unit, 0).sqrt()[:, None]
        gram = sums.gram.clone()
        maps.append((weight, _invert(gram, _penalty(gram, (len(gram),), ridge))))
    live, dropped, costs = list(range(projection.weight.shape[1])), [], [0.0]
    while len(live) > 1:
        losses = sum(weight.square().sum(0) / inverse.diagonal() for weight, inverse in maps)
        least, last = int(losses.argmin()), len(live) - 1
        costs.append(costs[-1] + float(losses[least]))
        for k, (weight, inverse) in enumerate(maps):
            _swap(inverse, weight.T, slice(least, least + 1), slice(last, last + 1))
            row = inverse[last, :last] / inverse[last, last]
            weight = weight[:, :last].addr_(weight[:, last], row, alpha=-1)
            maps[k] = weight, inverse[:last, :last].addr_(inverse[:last, last], row, alpha=-1)
        dropped.append(live[least])
        live[least] = live[-1]
        live.pop()
    device = projection.gram.device
    return ChannelChain(
        torch.tensor(dropped + live, device=device),
        torch.tensor(costs, dtype=torch.float64, device=device),
        projection,
        tuple(inner),
        ridge,
    )


def _penalty(gram: Tensor, groups: Sequence[int], ridge: float) -> Tensor:
    """Return the ridge (unknowns,) relative to the mean of each group's diagonal, or to 1 if that is 0."""
    means = [part.mean() for part in gram.diagonal().split(list(groups))]
    return torch.cat(
        [torch.where(mean > 0, ridge * mean, 1).expand(size) for mean, size in zip(means, groups, strict=True)]
    )


def _invert(gram: Tensor, penalty: Tensor) -> Tensor:
    """Return (gram + penalty)^-1 in the memory of `gram`."""
    if not gram.isfinite().all():
        raise InputError(NOT_FINITE)
    while True:
        gram.diagonal().add_(penalty)
        factor, failed = torch.linalg.cholesky_ex(gram)
        if not failed:
            return torch.cholesky_inverse(factor, out=gram)
        penalty = 9 * penalty  # rounding made the sums indefinite: ten times the ridge


def _swap(matrix: Tensor, vector: Tensor, one: slice, other: slice) -> None:
    """Swap two parts of equal size of a symmetric matrix and of the rows of `vector`, in place."""
    if one == other:
        return
    for value in (matrix, matrix.T, vector):
        kept = value[one].clone()
        value[one] = value[other]
        value[other] = kept
