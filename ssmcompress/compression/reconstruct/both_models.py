"""Layer-by-layer execution of a dense and a pruned model on the same images, with features stored in files."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ... import processes
from ...data.any_batches import AnyBatches, in_chunks
from ...data.batches import LabelledBatch, digest
from ...errors import InputError
from ...models.base import TokenModel
from ...models.fingerprint import fingerprint
from ...ops import gather_tokens
from ...progress import track
from ...pruning.tokens import Dropped, Tokens
from ..margin import margin_gradients
from ..remember import hash_of, keeps_results
from .chunks import ChunkFiles
from .readout import set_pool
from .recording import record

# One in HELD_OUT images is held out.
HELD_OUT = 5
# Minimum weight of a row, relative to the mean weight of the layer's rows: rows without influence on the output still
# determine which tokens are kept later. Values between 1e-4 and 0.5 made no difference (0.3 points).
LEAST_WEIGHT = 1e-3
# The fields of `Tokens` that change from layer to layer.
TOKENS = ("features", "positions", "pruned_sum", "pruned_segments", "sizes", "ranks")


class BothModels:
    """Runs a dense and a pruned model layer by layer on the same images.

    The images are processed in chunks, identified by their number. For each chunk, `files` stores the `weights` of all
    rows (points, images, tokens), see `margin_gradients`, the `dense` features and the `pruned` tokens before the
    current layer, and the dense `targets` of the layer's inner maps at the kept tokens.

    Args:
        layers: the layers to refit (1-based). folder: an empty folder for the values of chunks.
        distributed, reference: as for `reconstruct`.
    """

    def __init__(
        self,
        dense: TokenModel,
        pruned: TokenModel,
        layers: Sequence[int],
        folder: Path,
        distributed: bool,
        reference: TokenModel,
    ):
        self.dense, self.pruned, self.layers = dense, pruned, layers
        self.reference = reference
        # For each layer, and for the end, the layer number in the dense model.
        numbers = pruned.origin.layers if pruned.origin is not None else range(1, len(pruned.blocks) + 1)
        self.numbers = (*numbers, len(dense.blocks) + 1)
        self.device = next(pruned.parameters()).device
        self.files = ChunkFiles(folder, self.device)
        self.distributed = distributed
        self.size = dense.chunk_size()
        self.images = self.rows = self.held_out = 0
        self.held: list[Tensor] = []  # for each chunk (images,), whether an image is held out

    def get_tokens(self, chunk: int) -> Tokens:
        """Read the pruned model's tokens before the current layer."""
        *values, dropped = self.files.get("pruned", chunk)
        values = dict(zip(TOKENS, values, strict=True))
        groups = None if dropped is None else tuple(Dropped(*group) for group in dropped)
        values |= {"dropped": groups, "fused": self.fused}
        return replace(self.template, **values, paths=None, summary=None, layout=None)

    def put_tokens(self, chunk: int, tokens: Tokens) -> None:
        """Write the pruned model's tokens before the next layer."""
        dropped = None if tokens.dropped is None else tuple(map(tuple, tokens.dropped))
        self.files.put("pruned", chunk, (*(getattr(tokens, name) for name in TOKENS), dropped))

    @property
    def chunks(self) -> int:
        """The number of chunks."""
        return len(self.held)

    def start(self, batches: AnyBatches) -> float:
        """Run both models up to the first layer to be refitted, and return the mean KL on the held-out images."""
        points = 1 + self.dense.count_points(len(self.dense.blocks))
        self.totals = torch.zeros(points, dtype=torch.float64, device="cpu")
        kl = torch.zeros((), dtype=torch.float64, device="cpu")
        models = [fingerprint(model) for model in (self.dense, self.pruned, self.reference)] if keeps_results() else []
        seen: list[str] = []
        for images in in_chunks(_drop_repeats(track(batches, "collecting features", batches.total)), self.size):
            images = images.to(self.device)
            seen.append(hash_of(images) if keeps_results() else "")
            # The second image is held out, so that two images are enough.
            held = (self.images + torch.arange(len(images), device=self.device)) % HELD_OUT == 1
            if held.any():
                kl += self.pruned.task.total_distance(
                    self.dense.raw_outputs(images[held]), self.pruned.raw_outputs(images[held])
                )
            self.images += len(images)
            self.held_out += int(held.sum())
            self.add_chunk(images, held)
        self.content = (models, seen)  # hashed to identify the results, if they are cached
        counts = torch.tensor([self.images, self.rows, self.held_out], device="cpu")
        self.all_reduce_sum(self.totals, kl, counts)
        self.images, self.rows, self.held_out = counts.tolist()
        if not self.held_out:
            raise InputError(
                f"{self.images} different images: reconstruction needs at least 2, one to fit and one to check on "
                f"(or leave it out, `reconstruct=False`)"
            )
        return float(kl) / self.held_out

    def add_chunk(self, images: Tensor, held: Tensor) -> None:
        """Run both models on images up to the first layer to be refitted, and store their features there."""
        chunk, weights = self.chunks, [gradient.cpu() for gradient in margin_gradients(self.dense, images)]
        self.totals += torch.stack([gradient.sum(dtype=torch.float64) for gradient in weights])
        full, kept = self.dense.embed(images), set_pool(self.pruned.embed(images), self.pruned.pools)
        for run in self.dense.run_layers(full, range(1, self.numbers[self.layers[0] - 1])):
            full = run.after
        for run in self.pruned.run_layers(kept, range(1, self.layers[0])):
            kept = run.after
        self.take_template(kept)
        self.fused = kept.fused
        self.files.put("weights", chunk, weights)
        if self.dense.reads_levels:
            self.files.put("images", chunk, images)
        self.files.put("dense", chunk, full.features)
        self.put_tokens(chunk, kept)
        self.rows += len(images)
        self.held.append(held)

    def take_template(self, tokens: Tokens) -> None:
        """Store the fields of `Tokens` that all layers of a section and both models share."""
        nothing = dict.fromkeys(("positions", "dropped", "update", "summary", "layout", "scores", "keys", "paths"))
        nothing |= dict.fromkeys(("pruned_sum", "pruned_segments", "sizes", "ranks"))
        self.template = replace(tokens, features=tokens.features[:1], fused=0, levels=(), **nothing)

    def enter(self, layer: int) -> Iterator[None]:
        """Apply `TokenModel.enter` in both models where the input of a layer differs from the previous output."""
        for k in range(self.chunks):
            tokens = self.get_tokens(k)
            features = self.files.get("dense", k)
            full = self.dense.enter(self.numbers[layer - 1], replace(self.template, features=features, dropped=()))
            self.files.put("dense", k, full.features)
            self.put_tokens(k, entered := self.pruned.enter(layer, tokens))
            yield
        self.take_template(entered)
        self.fused = entered.fused

    def reference_block(self, layer: int) -> nn.Module:
        """Return the layer whose inner maps are the targets for a layer of the pruned model."""
        return self.reference.blocks[(self.numbers[layer - 1] if self.reference is self.dense else layer) - 1]

    def advance_dense(self, layer: int, inner: Sequence[str]) -> Iterator[None]:
        """Run the dense model up to the next projection to be refitted; store the inner maps' outputs at kept tokens.

        This is the end of this layer, or of the following layers that were dropped; or the position of its stage if the
        layer has a second part.
        """
        first, stop = self.numbers[layer - 1 : layer + 1]
        block, part = self.reference_block(layer), None
        if self.pruned.blocks[layer - 1].end_projection is not None:
            stop, part = first + 1, "begin"
        for k in range(self.chunks):
            tokens = replace(self.template, features=self.files.get("dense", k))
            done = self.reference is self.dense
            with record(block, inner) as records:
                after = block(tokens, part=part) if inner or done else tokens
            tokens = after if done else tokens
            for number in range(first + done, stop):
                tokens = self.dense.blocks[number - 1](tokens, part=part)
            self.files.put("dense", k, tokens.features)
            positions = self.get_tokens(k).explicit_positions()
            self.files.put("targets", k, {name: gather_tokens(out, positions) for name, (_, out) in records.items()})
            yield

    def advance_dense_end(self, layer: int) -> Iterator[None]:
        """Run the dense model from the stage of a layer up to the next layer that was kept."""
        first, stop = self.numbers[layer - 1 : layer + 1]
        for k in range(self.chunks):
            tokens = self.dense.end(first, replace(self.template, features=self.files.get("dense", k)))
            for number in range(first + 1, stop):
                tokens = self.dense.blocks[number - 1](tokens)
            self.files.put("dense", k, tokens.features)
            yield

    def advance_pruned(self, run: Callable[[int, Tokens], Any], layer: int) -> Iterator[None]:
        """Run a part of a layer of the pruned model, `TokenModel.begin` or `end`."""
        fused = self.fused
        for k in range(self.chunks):
            after = run(layer, self.get_tokens(k))
            after = after if isinstance(after, Tokens) else after[0]
            self.put_tokens(k, after)
            fused = after.fused
            yield
        self.fused = fused

    def targets_at(self, chunk: int, tokens: Tokens, point: int) -> tuple[Tensor, Tensor]:
        """Return the dense features (images, kept, d_model) of the kept tokens, and the weights of their rows.

        A token without a position has no counterpart in the dense model and gets a weight of zero.
        """
        positions, weights = tokens.explicit_positions(), self.row_weights(chunk, point)
        placed = positions.clamp(max=tokens.length - 1)
        weights = weights.gather(1, placed)
        if tokens.fused:
            weights = weights * (positions < tokens.length)
        return gather_tokens(self.files.get("dense", chunk), placed), weights

    def dense_logits(self, chunk: int) -> Tensor:
        """Return the dense logits (images, classes) of a chunk, after the dense model ran all layers."""
        return self.dense.readout(replace(self.template, features=self.files.get("dense", chunk)))

    def all_reduce_sum(self, *values: Tensor) -> None:
        """Sum each of the values over the processes, in place, if there are several."""
        if self.distributed:
            processes.all_reduce_sum(*values, device=self.device)

    def row_weights(self, chunk: int, point: int) -> Tensor:
        """Return the weights (images, tokens) of the rows after `point` parts of layers, relative to their mean."""
        weights = self.files.get("weights", chunk)[point]
        mean = float(self.totals[point]) / (self.rows * weights.shape[1])
        return weights / mean + LEAST_WEIGHT if mean > 0 else torch.ones_like(weights)


def _drop_repeats(batches: Iterable[LabelledBatch]) -> Iterator[LabelledBatch]:
    """Yield the batches without duplicate images, because a duplicate could be both fitted and held out."""
    digests: set[bytes] = set()
    for images, _ in batches:
        rows = []
        for row, image in enumerate(images):
            value = digest(image.float())  # numpy has no bfloat16
            if value not in digests:
                digests.add(value)
                rows.append(row)
        yield LabelledBatch(images[rows], None)
