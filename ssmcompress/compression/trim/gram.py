"""Sums over tokens that determine the importance of the states of a scan: the Gram matrix of C and D.

The output of a scan is y_t = (sum over paths p and states n of (C_n . x_p) h_p,n + times * D u) * gate. An error dy
counts w_t |W dy_t|^2, where W is the projection into the residual stream. The output is linear in
theta = [D, C_1, C_2, ...]; with v_p,n = W (gate * h_p,n) and q_p,n = (W^T v_p,n) * gate * u, the Gram matrix is

    G[C_n, C_m] = sum w sum_p,q (v_p,n . v_q,m) x_p x_q^T
    G[C_n, D] = times * sum w sum_p x_p q_p,n^T
    G[D, D] = times^2 * (W^T W) * sum w (gate * u) (gate * u)^T

Products of a few hundred rows are computed in float32, and their sums in float64.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...models.sizes import ScanReading
from .chain import BlockSums

# Number of floats of the scaled rows that are multiplied at a time (4 MB), and the minimum number of rows.
ROW_FLOATS = 1 << 20
LEAST_ROWS = 256


class ScanSums:
    """The sums of one scan over chunks of images.

    Args:
        states: the states that may be kept. C: (d_state, d_inner). D: (d_inner,).
        projection: W (d_model, d_inner).
    """

    def __init__(self, states: Sequence[int], C: Tensor, D: Tensor, projection: Tensor):
        self.states, self.C, self.D, self.W = list(states), C.float(), D.float(), projection.detach().float()
        self.width = C.shape[1]
        size = (1 + len(self.states)) * self.width
        options = {"dtype": torch.float64, "device": "cpu" if C.device.type == "mps" else C.device}
        self.gram = torch.zeros(size, size, **options)
        # With a subset of candidate states, the target is the output of all states.
        self.cross = torch.zeros(size, **options) if len(self.states) < len(C) else None
        self.power = torch.zeros((), **options)

    def theta(self) -> Tensor:
        """Return the current parameters: D, then C of the candidates."""
        return torch.cat([self.D, self.C[self.states].flatten()]).to(self.gram)

    def add(self, reading: ScanReading, weights: Tensor) -> None:
        """Add the tokens of a chunk; weights (images, tokens)."""
        x = _inputs(reading)
        v = torch.stack([_project(reading, n, self.W) for n in self.states], dim=1)  # (rows, states, paths, d_model)
        w, gu = weights.flatten().float(), reading.times * (reading.gate * reading.u).flatten(0, 1).float()
        if self.cross is not None:
            self._add_target(reading, x, v, gu, w)
        self._add_states(x, v, w)
        self._add_skip(x, v, gu, w)

    def _add_states(self, x: Tensor, v: Tensor, w: Tensor) -> None:
        """Add the products of C with C: only the blocks on and above the diagonal, because the matrix is symmetric."""
        (rows, states, paths, _), E = v.shape, self.width
        # (v_p,n . v_q,m) as (rows, states and paths) squared
        products = v.flatten(1, 2) @ (v.flatten(1, 2) * w[:, None, None]).transpose(1, 2)
        products = products.view(rows, states, paths, states, paths)
        scaled = x.new_empty(max(LEAST_ROWS * paths * states * E, ROW_FLOATS))
        for n in range(states):
            columns = (states - n) * E
            size = max(LEAST_ROWS, ROW_FLOATS // (paths * columns))
            total = x.new_zeros(E, columns)
            for part, factors in zip(x.split(size), products[:, n, :, n:].split(size), strict=True):
                out = scaled[: len(part) * paths * columns].view(len(part), paths * (states - n), E)
                # For one path, an elementwise product is faster than matrix products with one column.
                multiply = torch.mul if paths == 1 else torch.bmm
                multiply(factors.reshape(len(part), -1, paths), part, out=out)
                total.addmm_(part.flatten(0, 1).T, out.view(-1, columns))
            start = E * (1 + n)
            self.gram[start : start + E, start:] += total.to(self.gram.device)

    def _add_skip(self, x: Tensor, v: Tensor, gu: Tensor, w: Tensor) -> None:
        """Add the products of C and D with D; the latter is multiplied by W^T W at the end."""
        E, weighted = self.width, gu * w[:, None]
        for n in range(v.shape[1]):
            q = (v[:, n] @ self.W) * weighted[:, None]
            product = x.flatten(0, 1).T @ q.flatten(0, 1)
            self.gram[E * (1 + n) : E * (2 + n), :E] += product.to(self.gram.device)
        self.gram[:E, :E] += (weighted.T @ gu).to(self.gram.device)

    def _add_target(self, reading: ScanReading, x: Tensor, v: Tensor, gu: Tensor, w: Tensor) -> None:
        """Add the products of the parameters with the output of all states."""
        target = (gu * self.D) @ self.W.T
        for n, C in enumerate(self.C):
            own = v[:, self.states.index(n)] if n in self.states else _project(reading, n, self.W)
            target += ((x @ C)[..., None] * own).sum(1)
        weighted = target * w[:, None]
        self.power += (weighted * target).sum().to(self.power.device)
        factors = (v * weighted[:, None, None]).sum(-1)  # (rows, states, paths)
        self.cross[self.width :] += torch.einsum("rnp,rpe->ne", factors, x).flatten().to(self.cross.device)
        self.cross[: self.width] += ((weighted @ self.W) * gu).sum(0).to(self.cross.device)

    def finish(self) -> BlockSums:
        """Return the sums; the matrix is not copied."""
        E = self.width
        self.gram[:E, :E] *= (self.W.T @ self.W).to(self.gram)
        for start in range(E, len(self.gram), E):
            rows, after = self.gram[start : start + E], start + E
            self.gram[:E, start:after] = rows[:, :E].T
            self.gram[after:, start:after] = rows[:, after:].T
        return BlockSums(self.gram, self.cross, None if self.cross is None else float(self.power))


def state_energies(reading: ScanReading, C: Tensor, projection: Tensor, weights: Tensor) -> Tensor:
    """Return (d_state,) float64: the weighted square of each state's contribution to the residual stream."""
    x, W, w = _inputs(reading), projection.detach().float(), weights.flatten().float()
    energies = []
    for n, row in enumerate(C.float()):
        update = ((x @ row)[..., None] * _project(reading, n, W)).sum(1)
        energies.append((w[:, None] * update.square()).sum())
    return torch.stack(energies).cpu().double()


def _inputs(reading: ScanReading) -> Tensor:
    """Return the input rows of C on each path, (rows, paths, d_inner)."""
    return torch.stack([reader.flatten(0, 1).float() for reader in reading.readers], dim=1)


def _project(reading: ScanReading, n: int, W: Tensor) -> Tensor:
    """Return v of a state, (rows, paths, d_model): its contribution to the residual stream for C . x = 1."""
    return torch.stack([(reading.gate * h).flatten(0, 1).float() @ W.T for h in reading.states(n)], dim=1)
