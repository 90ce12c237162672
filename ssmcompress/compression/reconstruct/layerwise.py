"""The layer-by-layer refit of a pruned model to a dense one, as `ssmcompress.compression.reconstruct` describes it."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ... import processes
from ...data.any_batches import AnyBatches, in_chunks
from ...data.batches import LabelledBatch, digest
from ...errors import InputError, SsmCompressError
from ...models.base import TokenModel
from ...models.records import Fit
from ...ops import gather_tokens
from ...progress import track
from ...pruning.tokens import Dropped, Tokens
from ..margin import margin_gradients
from .class_corrections import ClassRows, ClassSums, empty_correction
from .levels import LevelSums, has_levels
from .linear import LinearSums, full_rank

# One in HELD_OUT images is held out.
HELD_OUT = 5
# Least weight of a row, relative to the mean weight of the layer's rows: rows that are not read out still decide which
# tokens are kept later. Values between 1e-4 and 0.5 made no difference (0.3 points).
LEAST_WEIGHT = 1e-3
# The fields of `Tokens` that change from layer to layer.
TOKENS = ("features", "positions", "pruned_sum", "pruned_segments", "sizes")


@dataclass(frozen=True)
class RefitOptions:
    """What is fitted besides the weights.

    Attributes:
        class_corrections: whether the class token of later layers gets corrections of its own. On the bundled Vim they
            take 0.2 % of the FLOPs and, because their operations are many and small, 5 % of the time at batch size 8
            and 9 % at batch size 1.
    """

    class_corrections: bool = True


class LayerwiseRefit:
    """Runs a dense and a pruned model layer by layer on the same images, and refits the layers of the pruned one.

    The images are processed in chunks, which are identified by their number. `folder` has for each chunk the `weights`
    of all rows (layers + 1, images, tokens), the `dense` features and the `pruned` tokens before the current layer, the
    dense `targets` of the layer's inner maps at the kept tokens, and what the fit of its `class` correction needs.

    Args:
        layers: the layers to refit, from 1. folder: an empty folder for values of chunks.
        distributed, reference, options: as for `reconstruct`.
    """

    def __init__(
        self,
        dense: TokenModel,
        pruned: TokenModel,
        layers: Sequence[int],
        folder: Path,
        distributed: bool,
        reference: TokenModel,
        options: RefitOptions = RefitOptions(),
    ):
        self.dense, self.pruned, self.layers, self.folder = dense, pruned, layers, folder
        self.reference = reference
        # The dense model's number of each layer, and of the end.
        numbers = pruned.origin.layers if pruned.origin is not None else range(1, len(pruned.blocks) + 1)
        self.numbers = (*numbers, len(dense.blocks) + 1)
        self.counts = pruned.token_counts()
        self.old_corrections = dict(pruned.corrections.items())
        # Corrections have full rank while they are fitted. With them in place, the tokens carry the pruned sum.
        for layer in layers:
            if pruned.blocks[layer - 1].refitted and self.counts[layer - 1] < pruned.length:
                pruned.corrections[str(layer)] = full_rank(pruned, self.old_corrections.get(str(layer)))
                if (
                    options.class_corrections
                    and pruned.protected is not None
                    and str(layer) not in pruned.class_corrections
                ):
                    pruned.class_corrections[str(layer)] = empty_correction(pruned)
        self.device = next(pruned.parameters()).device
        self.distributed = distributed
        self.size = dense.chunk_size()
        self.images = self.rows = self.held_out = 0
        self.held: list[Tensor] = []  # for each chunk (images,), whether an image is held out
        self.kl = 0.0
        self.fits: list[Fit] = []

    # ------------------------------------------------------------------------------------------- files of chunks

    def put(self, kind: str, chunk: int, value: Any) -> None:
        """Write a value of a chunk; SsmCompressError if there is no room."""
        try:
            torch.save(value, self.folder / f"{kind}{chunk}")
        except (OSError, RuntimeError) as error:
            raise SsmCompressError(
                f"cannot keep features in {self.folder}: {error}; use fewer `samples`, or set TMPDIR to a folder with "
                f"more room"
            ) from error

    def get(self, kind: str, chunk: int) -> Any:
        """Read a value of a chunk."""
        return torch.load(self.folder / f"{kind}{chunk}", map_location=self.device, weights_only=True)

    def get_tokens(self, chunk: int) -> Tokens:
        """Read the pruned model's tokens before the current layer."""
        *values, dropped = self.get("pruned", chunk)
        values = dict(zip(TOKENS, values, strict=True))
        groups = None if dropped is None else tuple(Dropped(*group) for group in dropped)
        return replace(self.template, **values, dropped=groups, paths=None, summary=None, layout=None)

    def put_tokens(self, chunk: int, tokens: Tokens) -> None:
        """Write the pruned model's tokens before the next layer."""
        dropped = None if tokens.dropped is None else tuple(map(tuple, tokens.dropped))
        self.put("pruned", chunk, (*(getattr(tokens, name) for name in TOKENS), dropped))

    @property
    def chunks(self) -> int:
        """The number of chunks."""
        return len(self.held)

    # ------------------------------------------------------------------------------------------------- the passes

    def start(self, batches: AnyBatches) -> float:
        """Run both models up to the first layer to be refitted, and return the mean KL of the images held out."""
        self.totals = torch.zeros(len(self.dense.blocks) + 1, dtype=torch.float64, device="cpu")
        kl = torch.zeros((), dtype=torch.float64, device="cpu")
        for images in in_chunks(_drop_repeats(track(batches, "looking at images", batches.total)), self.size):
            images = images.to(self.device)
            # The second image is held out, so that two are enough.
            held = (self.images + torch.arange(len(images), device=self.device)) % HELD_OUT == 1
            if held.any():
                kl += self.distance(self.dense.raw_outputs(images[held]), self.pruned.raw_outputs(images[held]))
            self.images += len(images)
            self.held_out += int(held.sum())
            self.add_chunk(images, held)
        counts = torch.tensor([self.images, self.rows, self.held_out], device="cpu")
        self.all_reduce_sum(self.totals, kl, counts)
        self.images, self.rows, self.held_out = counts.tolist()
        if not self.held_out:
            raise InputError(
                f"{self.images} different images: reconstruction needs at least 2, one to fit and one to check on "
                f"(or leave it out, `reconstruct=False`)"
            )
        return float(kl) / self.held_out

    def distance(self, dense: Tensor, output: Tensor) -> Tensor:
        """Return the distance of outputs from the dense model's in nats, summed over the images, float64 on the CPU."""
        return self.pruned.task.distance(dense.cpu().double(), output.cpu().double()).sum()

    def add_chunk(self, images: Tensor, held: Tensor) -> None:
        """Run both models on images up to the first layer to be refitted, and write what they have there."""
        chunk, weights = self.chunks, margin_gradients(self.dense, images).cpu()
        self.totals += weights.sum((1, 2), dtype=torch.float64)
        full, kept = self.dense.embed(images), _set_pool(self.pruned.embed(images), self.pruned.pools)
        self.template = replace(kept, features=kept.features[:1], dropped=None)
        for layer in range(1, self.numbers[self.layers[0] - 1]):
            full, _ = self.dense.step(layer, full)
        for layer in range(1, self.layers[0]):
            kept, _ = self.pruned.step(layer, kept)
        self.put("weights", chunk, weights)
        if self.dense.levels:
            self.put("images", chunk, images)
        self.put("dense", chunk, full.features)
        self.put_tokens(chunk, kept)
        self.rows += len(images)
        self.held.append(held)

    def refit(self) -> Iterator[None]:
        """Refit the layers and the classifier, one after the other; yields after every pass over a chunk."""
        for layer in self.layers:
            *inner, projections = self.pruned.blocks[layer - 1].refitted or ((),)
            inner = [names for group in inner if (names := self.comparable(layer, group))]
            yield from self.advance_dense(layer, [name for group in inner for name in group])
            for names in inner:
                yield from self.refit_inner(layer, names)
            for projection in projections:
                yield from self.refit_projection(layer, projection)
            yield from self.advance_pruned(layer)
        yield from self.refit_levels() if self.dense.levels else self.refit_classifier()

    def refit_levels(self) -> Iterator[None]:
        """Fit the maps of the output levels, and measure the model on the images held out."""
        sums = None
        for k in range(self.chunks):
            images = self.get("images", k)
            dense, pruned = (model.encode(images)[0].levels for model in (self.dense, self.pruned))
            sums = sums or LevelSums(self.pruned, pruned)
            sums.add(dense, pruned, self.held[k])
            yield
        if has_levels(self.pruned):
            self.fits += sums.install(self.pruned, self.distributed)
        kl = torch.zeros((), dtype=torch.float64, device="cpu")
        for k in range(self.chunks):
            images = self.get("images", k)[self.held[k]]
            if len(images):
                kl += self.distance(self.dense.raw_outputs(images), self.pruned.raw_outputs(images))
            yield
        self.all_reduce_sum(kl)
        self.kl = float(kl) / self.held_out

    def passes(self) -> int:
        """Return how many times `refit` passes over the chunks."""
        inner = sum(bool(self.comparable(x, group)) for x in self.layers for group in self.maps(x)[:-1])
        return inner + sum(len(self.maps(layer)[-1:]) + 2 for layer in self.layers) + 2

    def maps(self, layer: int) -> tuple[tuple[str, ...], ...]:
        """Return the names of the linear layers of a layer that are refitted."""
        return self.pruned.blocks[layer - 1].refitted

    def reference_block(self, layer: int) -> nn.Module:
        """Return the layer whose inner maps are the targets of those of a layer of the pruned model."""
        return self.reference.blocks[(self.numbers[layer - 1] if self.reference is self.dense else layer) - 1]

    def comparable(self, layer: int, names: Sequence[str]) -> tuple[str, ...]:
        """Return those of the inner maps that have as many outputs in the reference."""
        ours, theirs = self.pruned.blocks[layer - 1], dict(self.reference_block(layer).named_modules())
        return tuple(
            name
            for name in names
            if name in theirs and theirs[name].out_features == ours.get_submodule(name).out_features
        )

    def advance_dense(self, layer: int, inner: Sequence[str]) -> Iterator[None]:
        """Run the dense model up to the next layer that is kept; write the inner maps' outputs at the kept tokens."""
        first, stop = self.numbers[layer - 1 : layer + 1]
        block = self.reference_block(layer)
        for k in range(self.chunks):
            tokens = replace(self.template, features=self.get("dense", k))
            done = self.reference is self.dense
            with _record(block, inner) as records:
                after = block(tokens) if inner or done else tokens
            tokens = after if done else tokens
            for number in range(first + done, stop):
                tokens = self.dense.blocks[number - 1](tokens)
            self.put("dense", k, tokens.features)
            positions = self.get_tokens(k).explicit_positions()
            self.put("targets", k, {name: gather_tokens(out, positions) for name, (_, out) in records.items()})
            yield

    def advance_pruned(self, layer: int) -> Iterator[None]:
        """Run a layer of the pruned model and its stage."""
        for k in range(self.chunks):
            self.put_tokens(k, self.pruned.step(layer, self.get_tokens(k))[0])
            yield

    def refit_inner(self, layer: int, names: Sequence[str]) -> Iterator[None]:
        """Refit maps of a layer that do not feed each other to their outputs in the dense model."""
        block = self.pruned.blocks[layer - 1]
        sums = {name: LinearSums(block.get_submodule(name), self.device) for name in names}
        for k in range(self.chunks):
            tokens, targets = self.get_tokens(k), self.get("targets", k)
            with _record(block, names) as records:
                block(tokens)
            weights = self.row_weights(k, self.numbers[layer - 1] - 1).gather(1, tokens.explicit_positions())
            for name, rows in sums.items():
                rows.add(records[name][0], targets[name], weights, self.held[k])
            yield
        for rows in sums.values():
            self.fits.append(self.solve(rows))

    def refit_projection(self, layer: int, name: str) -> Iterator[None]:
        """Refit a layer's projection, and its correction, to the dense features after it."""
        block, corrections = self.pruned.blocks[layer - 1], self.pruned.corrections
        correction = corrections[str(layer)] if str(layer) in corrections else None
        has_class = str(layer) in self.pruned.class_corrections
        scale = block.residual_scale
        sums = LinearSums(block.get_submodule(name), self.device, correction, scale)
        for k in range(self.chunks):
            tokens = self.get_tokens(k)
            with _record(block, [name]) as records:
                block(tokens)
            inputs, dense, positions = records[name][0], self.get("dense", k), tokens.explicit_positions()
            targets, weights = gather_tokens(dense, positions), self.row_weights(k, self.numbers[layer] - 1)
            targets = (targets - tokens.features) / scale
            pruned_mean = None if correction is None else tokens.pruned_mean()
            sums.add(inputs, targets, weights.gather(1, positions), self.held[k], pruned_mean)
            if has_class:
                self.put("class", k, tuple(ClassRows.read(self.pruned, tokens, inputs, dense, weights)))
            yield
        self.fits.append(self.solve(sums))
        if correction is None:
            return
        del corrections[str(layer)]
        if (correction := sums.new_correction or self.old_corrections.get(str(layer))) is not None:
            corrections[str(layer)] = correction
        if has_class:
            self.refit_class(layer, name)

    def refit_class(self, layer: int, name: str) -> None:
        """Fit the class token's own correction after a layer whose projection `name` has just been refitted."""
        block, key = self.pruned.blocks[layer - 1], str(layer)
        correction = self.pruned.corrections[key] if key in self.pruned.corrections else None
        sums = ClassSums(self.pruned, self.device)
        for k in range(self.chunks):
            rows = ClassRows(*self.get("class", k))
            sums.add(rows, block.get_submodule(name), block.residual_scale, correction, self.held[k])
        self.all_reduce_sum(*sums.rows.sums())
        result, class_correction = sums.refit()
        del self.pruned.class_corrections[key]
        if class_correction is not None:
            self.pruned.class_corrections[key] = class_correction
        label = f"{_find_name(self.pruned, block)}.class_correction"
        self.fits.append(Fit(label, result.ridges, result.before, result.after))

    def refit_classifier(self) -> Iterator[None]:
        """Refit the classifier to the dense logits.

        If a mean over tokens is read out, this is done with and without the pruned ones, and the closer classifier is
        used; a plan that aligns nothing keeps its readout.
        """
        classifier, alignment = self.pruned.classifier, self.pruned.alignment
        name = _find_name(self.pruned, classifier)
        choose = self.pruned.pools and bool(self.pruned.plan.stages) and (alignment.conv or alignment.scan)
        choices = (False, True) if choose else (alignment.pool,)
        sums = {pool: LinearSums(classifier, self.device) for pool in choices}
        for k in range(self.chunks):
            logits, tokens = self.dense_logits(k), self.get_tokens(k)
            ones = torch.ones_like(logits[:, 0])
            for pool, rows in sums.items():
                with _record(self.pruned, [name]) as records:
                    self.pruned.readout(_set_pool(tokens, pool))
                rows.add(records[name][0], logits, ones, self.held[k])
            yield
        old, candidates = copy.deepcopy(classifier.state_dict()), []
        for pool, rows in sums.items():
            classifier.load_state_dict(old)
            candidates.append((self.solve(rows), pool, copy.deepcopy(classifier.state_dict())))
        yield from self.choose_classifier(candidates)

    def choose_classifier(self, candidates: Sequence[tuple[Fit, bool, dict[str, Tensor]]]) -> Iterator[None]:
        """Choose the classifier (fit, `Alignment.pool`, weights) closest to the dense one on the images held out."""
        classifier = self.pruned.classifier
        kl = torch.zeros(len(candidates), dtype=torch.float64, device="cpu")
        for k in range(self.chunks):
            logits, tokens, held = self.dense_logits(k), self.get_tokens(k), self.held[k]
            for choice, (_, pool, weights) in enumerate(candidates):
                classifier.load_state_dict(weights)
                outputs = self.pruned.readout(_set_pool(tokens, pool))
                kl[choice] += self.distance(logits[held], outputs[held])
            yield
        self.all_reduce_sum(kl)
        best = int(kl.argmin())
        fit, pool, weights = candidates[best]
        classifier.load_state_dict(weights)
        self.fits.append(fit)
        self.pruned.alignment = replace(self.pruned.alignment, pool=pool)
        self.pruned.plan = replace(self.pruned.plan, alignment=self.pruned.alignment)
        self.kl = float(kl[best]) / self.held_out

    def dense_logits(self, chunk: int) -> Tensor:
        """Return the dense logits (images, classes) of a chunk, after the dense model ran all layers."""
        return self.dense.readout(replace(self.template, features=self.get("dense", chunk)))

    def all_reduce_sum(self, *values: Tensor) -> None:
        """Sum each of the values over the processes, in place, if there are several."""
        if self.distributed:
            processes.all_reduce_sum(*values, device=self.device)

    def row_weights(self, chunk: int, layer: int) -> Tensor:
        """Return the weights (images, tokens) of the rows after `layer`, relative to the layer's mean."""
        mean = float(self.totals[layer]) / (self.rows * self.dense.length)
        weights = self.get("weights", chunk)[layer]
        return weights / mean + LEAST_WEIGHT if mean > 0 else torch.ones_like(weights)

    def solve(self, sums: LinearSums) -> Fit:
        """Refit a linear layer by its sums over all processes, in place, and return the record."""
        self.all_reduce_sum(*sums.rows.sums())
        result = sums.refit()
        return Fit(_find_name(self.pruned, sums.linear), result.ridges, result.before, result.after)


@contextmanager
def _record(module: nn.Module, names: Iterable[str]) -> Iterator[dict[str, tuple[Tensor, Tensor]]]:
    """Record the last input and output of linear layers of `module`, by name, in the body of the with statement."""
    records: dict[str, tuple[Tensor, Tensor]] = {}

    def record(name: str):
        return lambda layer, inputs, output: records.update({name: (inputs[0], output)})

    hooks = [module.get_submodule(name).register_forward_hook(record(name)) for name in names]
    try:
        yield records
    finally:
        for hook in hooks:
            hook.remove()


def _set_pool(tokens: Tokens, pool: bool) -> Tokens:
    return replace(tokens, alignment=replace(tokens.alignment, pool=pool))


def _find_name(model: nn.Module, part: nn.Module) -> str:
    return next(name for name, module in model.named_modules() if module is part)


def _drop_repeats(batches: Iterable[LabelledBatch]) -> Iterator[LabelledBatch]:
    """Yield the batches without repeated images, because a repeated image could be both fitted and held out."""
    digests: set[bytes] = set()
    for images, _ in batches:
        rows = []
        for row, image in enumerate(images):
            value = digest(image.float())  # numpy has no bfloat16
            if value not in digests:
                digests.add(value)
                rows.append(row)
        yield LabelledBatch(images[rows], None)
