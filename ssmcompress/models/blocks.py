"""Base classes of the models' layers, which map Tokens to Tokens and support pruning, alignment and trimming."""

from __future__ import annotations

import abc
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn.utils import skip_init

from ..ops import SCORES, ScanPath, selective_scan
from ..ops.selective_scan import Expander
from ..pruning.tokens import Tokens
from .sizes import ScanReading


def low_rank(
    inputs: int, rank: int, outputs: int | None = None, device: torch.device | str | None = None
) -> nn.Sequential:
    """Return a low-rank linear map (inputs) -> (outputs) without bias, as two float32 layers.

    Args:
        outputs: None: equal to `inputs`.
    """
    outputs = inputs if outputs is None else outputs
    options = {"bias": False, "device": device or "cpu", "dtype": torch.float32}
    return nn.Sequential(*(skip_init(nn.Linear, *side, **options) for side in ((inputs, rank), (rank, outputs))))


class Block(nn.Module, abc.ABC):
    """One layer, which maps Tokens to Tokens and aligns its ops to the positions of the tokens.

    A layer can have two parts that each add to the residual stream, such as attention and an MLP: `begin` and `end`.
    Tokens are then dropped between the two.

    Attributes:
        residual_scale: scalar or per-feature factor of the projection when it is added to the residual stream.
        scores: names of the token scores that `begin` can compute.
        end_projection: name of the linear layer whose output, times `end_scale`, `end` adds to the residual stream;
            None if the layer has no second part.
    """

    residual_scale: float | Tensor = 1.0
    scores: frozenset[str] = frozenset()
    end_projection: ClassVar[str | None] = None
    end_scale: float | Tensor = 1.0

    @property
    @abc.abstractmethod
    def refitted(self) -> tuple[tuple[str, ...], ...]:
        """Names of the linear layers of `begin` that reconstruction refits, in groups in execution order.

        Layers of one group do not feed each other. The last group is the projection into the residual stream:
        features out = features in + residual_scale * projection. Empty if the layer has no such projection.
        """

    @abc.abstractmethod
    def begin(self, tokens: Tokens, metric: str | None = None, protected_only: bool = False) -> Tokens:
        """Return the tokens at the point where a stage applies, with scores of `metric` unless it is None.

        Args:
            protected_only: compute, and return, only the protected tokens that are read out.
        """

    def end(self, tokens: Tokens) -> Tokens:
        """Run the second part of the layer on the tokens kept by its stage."""
        return tokens

    def forward(
        self, tokens: Tokens, metric: str | None = None, protected_only: bool = False, part: str | None = None
    ) -> Tokens:
        """Run the whole layer without a stage, or one of its parts.

        Args:
            part: "begin" or "end"; None: both. The other arguments are those of `begin`.
        """
        tokens = tokens if part == "end" else self.begin(tokens, metric, protected_only)
        return tokens if part == "begin" else self.end(tokens)


class ScanBlock(Block):
    """A layer of selective scans, whose hidden states decay at pruned positions."""

    scores = frozenset(SCORES)

    @abc.abstractmethod
    def deltas(self, tokens: Tokens) -> Tensor:
        """Return the step sizes after softplus (deltas, batch, kept, d_inner) of this layer, one for each dt_proj."""

    @abc.abstractmethod
    def bias_delta(self) -> Tensor:
        """Return the step size (deltas, d_inner) at a position without input: softplus of the bias."""

    @abc.abstractmethod
    def set_gap_delta(self, delta: Tensor | None) -> None:
        """Set the step size (deltas, d_inner) by which pruned positions decay the state; None: no alignment."""

    @property
    @abc.abstractmethod
    def scans(self) -> nn.Module:
        """The module of the scans; it has a buffer `gap_delta`."""


class TrimmableBlock(ScanBlock):
    """A layer of scans that can lose states, channels and directions; see `ssmcompress.compression.trim`.

    Its `scans` also have d_inner, d_state, directions, cut_states, cut_channels and keep_directions.
    """

    @property
    @abc.abstractmethod
    def channel_maps(self) -> tuple[tuple[str, ...], str]:
        """Names of the linear layers whose inputs are the channels: the inner ones, and the out-projection."""

    @property
    def d_inner(self) -> int:
        """The number of channels."""
        return self.scans.d_inner

    @property
    def d_state(self) -> int:
        """The number of states of each channel."""
        return self.scans.d_state

    @property
    def directions(self) -> tuple[int, ...]:
        """The indices of the scan paths of the layer."""
        return self.scans.directions

    @abc.abstractmethod
    def read_scans(self, tokens: Tokens) -> list[ScanReading]:
        """Return the inner values of each set of scan parameters."""

    @abc.abstractmethod
    def read_weights(self) -> list[tuple[Tensor, Tensor]]:
        """Return the rows of C (d_state, d_inner) and D (d_inner,) of each set of scan parameters."""

    def cut_states(self, index: Sequence[Tensor], weights: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Keep a subset of the states, in place.

        Args:
            index: the states to keep in each set of scan parameters, ascending, the same number in all sets.
            weights: the new rows of C (kept, d_inner), and D (d_inner,), of each set.
        """
        self.scans.cut_states(index, weights)

    def cut_channels(self, index: Tensor) -> None:
        """Keep the channels `index`, ascending, in place."""
        self.scans.cut_channels(index)
        if self.scans.gap_delta is not None:
            self.scans.gap_delta = self.scans.gap_delta[:, index]

    def drop_directions(self, directions: tuple[int, ...]) -> None:
        """Keep the scan paths `directions`, in place."""
        if self.scans.gap_delta is not None and len(self.scans.gap_delta) == len(self.directions):
            kept = [row for row, path in enumerate(self.directions) if path in directions]
            self.scans.gap_delta = self.scans.gap_delta[kept]
        self.scans.keep_directions(directions)


def read_state(paths: Sequence[ScanPath], state: int) -> list[Tensor]:
    """Return the trajectory (batch, tokens, d_inner) of one state on each scan path, in token order."""
    column, trajectories = slice(state, state + 1), []
    for path in map(Expander(), paths):
        B = path.B[..., column].contiguous()
        options = {name: getattr(path, name) for name in ("delta_bias", "gap", "reverse", "order")}
        inputs = path.u, path.delta, path.A[:, column], B, torch.ones_like(B)
        trajectories.append(selective_scan(*inputs, delta_softplus=True, **options))
    return trajectories
