"""The forward pass of a model: layers one after the other, with stages and corrections between them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..openmp import one_thread
from ..pruning.importance import normalize_rms
from ..pruning.tokens import Tokens
from .precision import cast

# Activation bytes of a batch up to which two threads are not faster than one. For the bundled model on two cores, batch
# sizes 1 (1.0 MB), 2, 3 and 4: one thread takes 5.3, 7.6, 9.9 and 17 ms, two take 5.5, 7.6, 10.4 and 15 ms.
ONE_THREAD_BYTES = 2 << 20


class LayerRun(NamedTuple):
    """One executed layer: its 1-based number, the tokens before and after it, and the decision of its stage.

    `before` holds the tokens that the layer is run on, from `TokenModel.enter`.
    """

    layer: int
    before: Tokens
    after: Tokens
    decision: Decision | None


class Decision(NamedTuple):
    """The result of one stage: the candidate positions, their scores, both (batch, tokens), and the kept positions."""

    candidates: Tensor
    scores: Tensor
    kept: Tensor


class RunningModel(nn.Module):
    """The part of `TokenModel` that runs its layers."""

    def forward(self, images: Tensor) -> Tensor:
        """Compute the logits (batch, classes) of images (batch, channels, height, width)."""
        if torch.compiler.is_compiling():
            return self.trace(images)[0]
        with one_thread(self._is_small(images)):
            return self.trace(images)[0]

    def _is_small(self, images: Any) -> bool:
        """Return whether a forward pass is too small for a second CPU thread."""
        if not isinstance(images, Tensor) or not images.is_cpu or images.ndim != 1 + len(self.input_shape):
            return False  # anything but a batch of images is rejected later
        larger = max(1.0, math.prod(images.shape[2:]) / math.prod(self.input_shape[1:]))
        return len(images) * larger * self.activation_bytes() <= ONE_THREAD_BYTES

    def raw_outputs(self, images: Tensor) -> Tensor:
        """Return the logits (batch, classes, ...) that are used to compare the model with another one.

        For a segmentation model, these are the logits of the head, before upsampling to the image size.
        """
        return self(images)

    def trace(self, images: Tensor) -> tuple[Tensor, list[Decision]]:
        """Compute the logits (batch, classes); return them and the decision of each stage.

        If only the protected token is read out, the last layer is computed for that token only. The logits equal
        `readout(encode(images)[0])` up to rounding.
        """
        tokens, decisions = self._run(self.embed(images), len(self.blocks) - self.shortens_last)
        if self.shortens_last:
            last = len(self.blocks)
            tokens, _ = self.step(last, self.enter(last, tokens), protected_only=True)
        return self.readout(tokens), decisions

    @property
    def shortens_last(self) -> bool:
        """Whether the last layer is computed only for the tokens that are read out; False if it has a stage."""
        return self.reads_protected and str(len(self.blocks)) not in self.pruners

    def encode(self, images: Tensor) -> tuple[Tokens, list[Decision]]:
        """Return all tokens after the last layer, and the decision of each stage."""
        return self._run(self.embed(images), len(self.blocks))

    def _run(self, tokens: Tokens, layers: int) -> tuple[Tokens, list[Decision]]:
        """Run the first layers and their stages."""
        decisions = []
        for run in self.run_layers(tokens, range(1, layers + 1)):
            tokens = run.after
            decisions += [run.decision] if run.decision else []
        return tokens, decisions

    def run_layers(self, tokens: Tokens, numbers: Iterable[int] | None = None) -> Iterator[LayerRun]:
        """Run layers and their stages in sequence, and yield each.

        Args:
            tokens: the output of the layer before the first of these. numbers: layer numbers, ascending; None: all.
        """
        for layer in range(1, len(self.blocks) + 1) if numbers is None else numbers:
            before = self.enter(layer, tokens)
            tokens, decision = self.step(layer, before)
            yield LayerRun(layer, before, tokens, decision)

    def observe(self, layer: int, tokens: Tokens) -> Tokens:
        """Return the tokens at the stage of a layer (1-based), with its corrections applied.

        A model that reads out several layers appends an output level here; see `Tokens.levels`.
        """
        return tokens

    def step(self, layer: int, tokens: Tokens, protected_only: bool = False) -> tuple[Tokens, Decision | None]:
        """Run a layer (1-based) and its stage, if any; return the tokens and the decision of the stage.

        Args:
            tokens: the result of `enter` for the layer.
            protected_only: compute the layer only for the tokens that are read out.
        """
        tokens, decision = self.begin(layer, tokens, protected_only)
        return self.end(layer, tokens), decision

    def end(self, layer: int, tokens: Tokens) -> Tokens:
        """Run the part of a layer after its stage, if it has one."""
        block = self.blocks[layer - 1]
        return tokens if block.end_projection is None else block(tokens, part="end")

    def enter(self, layer: int, tokens: Tokens) -> Tokens:
        """Return the input tokens of a layer (1-based), given the output tokens of the layer before it.

        They are the same, except where all dropped tokens re-enter, or where a section starts.
        """
        return tokens.rejoin() if self.plan is not None and self.plan.reenter and self.changes_at(layer) else tokens

    def memory(self, features: Tensor) -> Tensor:
        """Return the values (batch, tokens, d_model) stored for pruned tokens: features scaled to mean square 1."""
        return normalize_rms(features)

    def begin(self, layer: int, tokens: Tokens, protected_only: bool = False) -> tuple[Tokens, Decision | None]:
        """Run the part of a layer before its stage, its corrections and the stage; arguments as for `step`."""
        name = str(layer)
        pruner = self.pruners[name] if name in self.pruners else None
        pruned_mean = tokens.pruned_mean() if name in self.corrections else None
        class_correction = self.class_corrections[name] if name in self.class_corrections else None
        before = class_correction.read(tokens) if class_correction is not None else None
        metric = pruner.block_metric if pruner else None
        tokens = self.blocks[layer - 1](tokens, metric, protected_only, part="begin")
        if name in self.corrections:
            linear = self.corrections[name]
            first = linear[0] if isinstance(linear, nn.Sequential) else linear
            features = tokens.features + linear(cast(pruned_mean, first))[:, None]
        else:
            features = tokens.features
        if class_correction is not None:
            features = class_correction.correct(features, before)
        if features is not tokens.features:
            tokens = tokens.corrected(features)
        tokens = self.observe(layer, tokens)
        if pruner is None:
            return tokens, None
        ranking = pruner.rank(tokens)
        kept = pruner(tokens, ranking)
        summed = self.readout_correction is not None or any(int(key) > layer for key in self.class_corrections)
        if summed:
            kept = kept.with_pruned_segments(tokens, self.segments)
        if tokens.alignment.pool or any(int(key) > layer for key in self.corrections):
            if summed and type(self).memory is RunningModel.memory:  # both sum the same values
                kept = kept.with_sum_of_segments(self.segments)
            else:
                kept = kept.with_pruned_sum(tokens, self.memory)
        return kept, Decision(tokens.explicit_positions(), ranking.scores, kept.explicit_positions())
