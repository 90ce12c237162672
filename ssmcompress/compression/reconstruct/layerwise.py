"""A dense and a pruned model run side by side, layer by layer, while the later layers of the pruned one are refitted.

The work behind `ssmcompress.compression.reconstruct`.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ... import processes
from ...data.batches import AnyBatches, Labelled, digest, in_chunks
from ...errors import InputError, SsmCompressError
from ...evaluation.measure import kl_divergence
from ...models.base import TokenModel
from ...models.records import Fit
from ...ops import gather_tokens
from ...progress import track
from ...pruning.tokens import Tokens
from ..margin import margin_gradients
from .linear import LinearSums, full_rank

# One image in so many is held out.
HELD_OUT = 5
# Of the mean weight of a layer's rows; rows that are not read out still decide which tokens are kept later. Between
# 1e-4 and 0.5 it made no difference (0.3 points).
LEAST_WEIGHT = 1e-3


class SideBySide:
    """A dense and a pruned model at the same layer, on the same images.

    A block of images is known by its number; `folder` holds, for each, the `weights` of all rows (layers + 1, images,
    tokens), the `dense` features and the `pruned` (features, positions, pruned sum, sizes) before the layer they
    have come to, and the dense `targets` of the layer's inner maps at the kept tokens.
    """

    def __init__(self, dense: TokenModel, pruned: TokenModel, layers: Sequence[int], folder: Path, distributed: bool):
        self.dense, self.pruned, self.layers, self.folder = dense, pruned, layers, folder
        self.given = dict(pruned.corrections.items())
        # Of any rank while they are fitted; with them in place, the tokens remember what was pruned.
        for layer in layers:
            if pruned.blocks[layer - 1].refitted:
                pruned.corrections[str(layer)] = full_rank(pruned, self.given.get(str(layer)))
        self.device = next(pruned.parameters()).device
        self.distributed = distributed
        self.size = dense.chunk_size()
        self.blocks = self.images = self.held_out = 0
        self.kl = 0.0
        self.fits: list[Fit] = []

    # ------------------------------------------------------------------------------------------- files of blocks

    def put(self, kind: str, block: int, value: Any) -> None:
        try:
            torch.save(value, self.folder / f"{kind}{block}")
        except (OSError, RuntimeError) as error:
            raise SsmCompressError(
                f"cannot keep features in {self.folder}: {error}; use fewer `samples`, or set TMPDIR to a folder with "
                f"more room"
            ) from error

    def get(self, kind: str, block: int) -> Any:
        return torch.load(self.folder / f"{kind}{block}", map_location=self.device, weights_only=True)

    def tokens(self, block: int) -> Tokens:
        """The pruned model's tokens before the layer."""
        features, positions, pruned_sum, sizes = self.get("pruned", block)
        known = {"features": features, "positions": positions, "pruned_sum": pruned_sum, "sizes": sizes}
        return replace(self.template, **known, paths=None)

    def keep(self, block: int, tokens: Tokens) -> None:
        """The pruned model's tokens before the next layer."""
        self.put("pruned", block, (tokens.features, tokens.positions, tokens.pruned_sum, tokens.sizes))

    def held(self, block: int, count: int) -> Tensor:
        """(count,) whether each image of a block is held out; the second is the first, so that two images will do."""
        index = block * self.size + torch.arange(count, device=self.device)
        return index % HELD_OUT == 1

    # ------------------------------------------------------------------------------------------------- the passes

    def start(self, batches: AnyBatches) -> float:
        """Take in the images and bring both models to the first layer to be refitted; mean KL of those held out."""
        self.totals = torch.zeros(len(self.dense.blocks) + 1, dtype=torch.float64)
        kl = torch.zeros((), dtype=torch.float64)
        for images in in_chunks(_distinct(track(batches, "looking at images", len(batches))), self.size):
            images = images.to(self.device)
            weights = margin_gradients(self.dense, images).cpu()
            self.totals += weights.sum((1, 2), dtype=torch.float64)
            held = self.held(self.blocks, len(images))
            if held.any():
                kl += kl_divergence(self.dense(images[held]).cpu(), self.pruned(images[held]).cpu())
            full, kept = self.dense.embed(images), _pooling(self.pruned.embed(images), self.pruned.pools)
            self.template = replace(kept, features=kept.features[:1])
            for passed in range(1, self.layers[0]):
                full, _ = self.dense.step(passed, full)
                kept, _ = self.pruned.step(passed, kept)
            self.put("weights", self.blocks, weights)
            self.put("dense", self.blocks, full.features)
            self.keep(self.blocks, kept)
            self.blocks += 1
            self.images += len(images)
            self.held_out += int(held.sum())
        counts = torch.tensor([self.images, self.held_out])
        self.add_processes(self.totals, kl, counts)
        self.images, self.held_out = counts.tolist()
        if not self.held_out:
            raise InputError(
                f"{self.images} different images: reconstruction needs at least 2, one to fit and one to check on "
                f"(or leave it out, `reconstruct=False`)"
            )
        return float(kl) / self.held_out

    def refit(self) -> Iterator[None]:
        """Refit the layers and the classifier, one after the other; yields after every pass over a block."""
        for layer in self.layers:
            *inner, projections = self.pruned.blocks[layer - 1].refitted or ((),)
            yield from self.pass_dense(layer, [name for group in inner for name in group])
            for names in inner:
                yield from self.refit_inner(layer, names)
            for projection in projections:
                yield from self.refit_projection(layer, projection)
            yield from self.pass_pruned(layer)
        yield from self.refit_classifier()

    def passes(self) -> int:
        """How often `refit` goes over the blocks."""
        return sum(len(self.pruned.blocks[layer - 1].refitted) + 2 for layer in self.layers) + 2

    def pass_dense(self, layer: int, inner: Sequence[str]) -> Iterator[None]:
        """Bring the dense model behind a layer, and note what its inner maps give at the kept tokens."""
        dense = self.dense.blocks[layer - 1]
        for k in range(self.blocks):
            with _recorded(dense, inner) as seen:
                self.put("dense", k, dense(replace(self.template, features=self.get("dense", k))).features)
            positions = self.tokens(k).positions
            self.put("targets", k, {name: gather_tokens(out, positions) for name, (_, out) in seen.items()})
            yield

    def pass_pruned(self, layer: int) -> Iterator[None]:
        """Bring the pruned model behind a layer and its stage."""
        for k in range(self.blocks):
            self.keep(k, self.pruned.step(layer, self.tokens(k))[0])
            yield

    def refit_inner(self, layer: int, names: Sequence[str]) -> Iterator[None]:
        """Refit maps of a layer that do not feed each other to what they give in the dense model."""
        block = self.pruned.blocks[layer - 1]
        sums = {name: LinearSums(block.get_submodule(name), self.device) for name in names}
        for k in range(self.blocks):
            tokens, targets = self.tokens(k), self.get("targets", k)
            with _recorded(block, names) as seen:
                block(tokens)
            weights = self.weights(k, layer - 1).gather(1, tokens.positions)
            for name, rows in sums.items():
                rows.add(seen[name][0], targets[name], weights, self.held(k, len(weights)))
            yield
        for rows in sums.values():
            self.fits.append(self.solve(rows))

    def refit_projection(self, layer: int, name: str) -> Iterator[None]:
        """Refit a layer's projection, and its correction, to the dense features after it."""
        block, corrections = self.pruned.blocks[layer - 1], self.pruned.corrections
        sums = LinearSums(block.get_submodule(name), self.device, corrections[str(layer)], block.residual_scale)
        for k in range(self.blocks):
            tokens = self.tokens(k)
            with _recorded(block, [name]) as seen:
                block(tokens)
            wanted = (gather_tokens(self.get("dense", k), tokens.positions) - tokens.features) / block.residual_scale
            weights = self.weights(k, layer).gather(1, tokens.positions)
            sums.add(seen[name][0], wanted, weights, self.held(k, len(weights)), tokens.pruned_mean())
            yield
        self.fits.append(self.solve(sums))
        del corrections[str(layer)]
        if (thin := sums.thin or self.given.get(str(layer))) is not None:
            corrections[str(layer)] = thin

    def refit_classifier(self) -> Iterator[None]:
        """Refit the classifier to the dense logits.

        Where a mean over tokens is read out, with and without the pruned ones, of which the closer one is taken; a plan
        that aligns nothing stays so.
        """
        classifier, alignment = self.pruned.classifier, self.pruned.alignment
        name = _name_of(self.pruned, classifier)
        choose = self.pruned.pools and (alignment.conv or alignment.scan)
        choices = (False, True) if choose else (alignment.pool,)
        sums = {pool: LinearSums(classifier, self.device) for pool in choices}
        for k in range(self.blocks):
            logits, tokens = self.dense_logits(k), self.tokens(k)
            ones, held = torch.ones(len(logits), device=self.device), self.held(k, len(logits))
            for pool, rows in sums.items():
                with _recorded(self.pruned, [name]) as seen:
                    self.pruned.readout(_pooling(tokens, pool))
                rows.add(seen[name][0], logits, ones, held)
            yield
        old, found = copy.deepcopy(classifier.state_dict()), []
        for pool, rows in sums.items():
            classifier.load_state_dict(old)
            found.append((self.solve(rows), pool, copy.deepcopy(classifier.state_dict())))
        yield from self.take_closest(found)

    def take_closest(self, found: Sequence[tuple[Fit, bool, dict[str, Tensor]]]) -> Iterator[None]:
        """Of classifiers (fit, `Alignment.pool`, weights) the closest to the dense model on the images held out."""
        classifier = self.pruned.classifier
        kl = torch.zeros(len(found), dtype=torch.float64)
        for k in range(self.blocks):
            logits, tokens = self.dense_logits(k), self.tokens(k)
            held = self.held(k, len(logits))
            for choice, (_, pool, weights) in enumerate(found):
                classifier.load_state_dict(weights)
                given = self.pruned.readout(_pooling(tokens, pool))
                kl[choice] += kl_divergence(logits[held].cpu(), given[held].cpu())
            yield
        self.add_processes(kl)
        best = int(kl.argmin())
        fit, pool, weights = found[best]
        classifier.load_state_dict(weights)
        self.fits.append(fit)
        self.pruned.alignment = replace(self.pruned.alignment, pool=pool)
        self.pruned.plan = replace(self.pruned.plan, alignment=self.pruned.alignment)
        self.kl = float(kl[best]) / self.held_out

    def dense_logits(self, block: int) -> Tensor:
        """(images, classes), once the dense model has passed all layers."""
        return self.dense.readout(replace(self.template, features=self.get("dense", block)))

    def add_processes(self, *values: Tensor) -> None:
        """Add each of the values up over the processes, where there are several."""
        if self.distributed:
            processes.all_reduce_sum(*values, device=self.device)

    def weights(self, block: int, layer: int) -> Tensor:
        """(images, tokens) what an error of a row after `layer` weighs, relative to the layer's mean."""
        mean = float(self.totals[layer]) / (self.images * self.dense.length)
        weights = self.get("weights", block)[layer]
        return weights / mean + LEAST_WEIGHT if mean > 0 else torch.ones_like(weights)

    def solve(self, sums: LinearSums) -> Fit:
        """Give a linear layer the weight that its sums over all processes determine."""
        for rows in (sums.fitted, sums.held_out):
            self.add_processes(rows.gram, rows.cross, rows.power)
        found = sums.refit()
        return Fit(_name_of(self.pruned, sums.linear), found.ridges, found.before, found.after)


@contextmanager
def _recorded(module: nn.Module, names: Iterable[str]) -> Iterator[dict[str, tuple[Tensor, Tensor]]]:
    """While in the `with` block: by name, what linear layers of `module` last received and gave."""
    seen: dict[str, tuple[Tensor, Tensor]] = {}

    def record(name: str):
        return lambda layer, received, given: seen.update({name: (received[0], given)})

    hooks = [module.get_submodule(name).register_forward_hook(record(name)) for name in names]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def _pooling(tokens: Tokens, pool: bool) -> Tokens:
    return replace(tokens, alignment=replace(tokens.alignment, pool=pool))


def _name_of(model: nn.Module, part: nn.Module) -> str:
    return next(name for name, module in model.named_modules() if module is part)


def _distinct(batches: Iterable[Labelled]) -> Iterator[Labelled]:
    """The batches without the images that were there before: the same image would stand on both sides of a check."""
    known: set[bytes] = set()
    for images, _ in batches:
        fresh = []
        for row, image in enumerate(images):
            mark = digest(image)
            if mark not in known:
                known.add(mark)
                fresh.append(row)
        yield Labelled(images[fresh], None)
