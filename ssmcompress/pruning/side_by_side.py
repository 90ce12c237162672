"""A dense and a pruned model run side by side, layer by layer, while the later layers of the pruned one are refitted.

The work behind `ssmcompress.pruning.reconstruct`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import skip_init

from ..batches import AnyBatches, Labelled, block_size, digest, in_blocks
from ..errors import InputError, SsmCompressError
from ..evaluation import kl_divergence
from ..models.base import TokenModel, low_rank
from ..progress import track
from ..tokens import Tokens, take
from .least_squares import Refit, Rows, reduce_rank, refit
from .margin import margin_gradients

# One image in so many is held out.
HELD_OUT = 5
# Of the mean weight of a layer's rows; rows that are not read out still decide which tokens are kept later. Between
# 1e-4 and 0.5 it made no difference (0.2 points).
LEAST_WEIGHT = 1e-3


@dataclass(frozen=True)
class Fit:
    """What became of one weight: see `ssmcompress.pruning.least_squares.Refit`."""

    weight: str
    ridges: tuple[float | None, ...]
    before: float
    after: float


class SideBySide:
    """A dense and a pruned model at the same layer, on the same images.

    A block of images is known by its number; `folder` holds, for each, the `weights` of all rows (layers + 1, images,
    tokens), the `dense` features and the `pruned` (features, positions) before the layer they have come to, and the
    dense `targets` of the layer's inner maps at the kept tokens.
    """

    def __init__(self, dense: TokenModel, pruned: TokenModel, layers: Sequence[int], folder: Path, distributed: bool):
        self.dense, self.pruned, self.layers, self.folder = dense, pruned, layers, folder
        self.given = dict(pruned.corrections.items())
        # Of any rank while they are fitted; with them in place, the tokens remember what was pruned.
        for layer in layers:
            pruned.corrections[str(layer)] = _full_rank(pruned, self.given.get(str(layer)))
        self.device = next(pruned.parameters()).device
        self.distributed = distributed
        self.size = block_size(dense)
        self.blocks = self.images = self.held_out = 0
        self.kl = 0.0
        self.fits: list[Fit] = []

    # ------------------------------------------------------------------------------------------- files of blocks

    def put(self, kind: str, block: int, value: Any) -> None:
        try:
            torch.save(value, self.folder / f"{kind}{block}")
        except (OSError, RuntimeError) as error:
            raise SsmCompressError(
                f"cannot keep features in {self.folder}: {error}; use fewer --samples, or set TMPDIR to a folder with "
                f"more room"
            ) from error

    def get(self, kind: str, block: int) -> Any:
        return torch.load(self.folder / f"{kind}{block}", map_location=self.device, weights_only=True)

    def tokens(self, block: int) -> Tokens:
        """The pruned model's tokens before the layer."""
        features, positions, pruned_sum = self.get("pruned", block)
        return replace(self.template, features=features, positions=positions, pruned_sum=pruned_sum)

    def keep(self, block: int, tokens: Tokens) -> None:
        """The pruned model's tokens before the next layer."""
        self.put("pruned", block, (tokens.features, tokens.positions, tokens.pruned_sum))

    def held(self, block: int, count: int) -> Tensor:
        """(count,) whether each image of a block is held out; the second is the first, so that two images will do."""
        index = block * self.size + torch.arange(count, device=self.device)
        return index % HELD_OUT == 1

    # ------------------------------------------------------------------------------------------------- the passes

    def start(self, batches: AnyBatches) -> float:
        """Take in the images and bring both models to the first layer to be refitted; mean KL of those held out."""
        self.totals = torch.zeros(len(self.dense.blocks) + 1, dtype=torch.float64)
        kl = torch.zeros((), dtype=torch.float64)
        for images in in_blocks(_distinct(track(batches, "looking at images", len(batches))), self.size):
            images = images.to(self.device)
            weights = margin_gradients(self.dense, images).cpu()
            self.totals += weights.sum((1, 2), dtype=torch.float64)
            held = self.held(self.blocks, len(images))
            if held.any():
                kl += kl_divergence(self.dense(images[held]).cpu(), self.pruned(images[held]).cpu())
            full, kept = self.dense.embed(images), self.pruned.embed(images)
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
                f"(or leave it out, --no-reconstruct)"
            )
        return float(kl) / self.held_out

    def refit(self) -> Iterator[None]:
        """Refit the layers and the classifier, one after the other; yields after every pass over a block."""
        for layer in self.layers:
            for number, names in enumerate(self.pruned.blocks[layer - 1].refitted):
                yield from self.refit_maps(layer, names, first=number == 0)
            for k in range(self.blocks):
                kept, _ = self.pruned.step(layer, self.tokens(k))
                self.keep(k, kept)
                yield
        yield from self.refit_classifier()

    def refit_maps(self, layer: int, names: Sequence[str], first: bool) -> Iterator[None]:
        """Refit maps of a layer that do not feed each other; the first time, the dense model passes the layer."""
        dense, pruned = self.dense.blocks[layer - 1], self.pruned.blocks[layer - 1]
        *inner, (projection,) = pruned.refitted
        inner = [name for group in inner for name in group]
        is_projection = names == (projection,)
        correction = self.pruned.corrections[str(layer)] if is_projection else None
        sums = {
            name: _Sums(pruned.get_submodule(name), self.device, correction, pruned.residual_scale) for name in names
        }
        for k in range(self.blocks):
            tokens = self.tokens(k)
            if first:
                full = replace(self.template, features=self.get("dense", k))
                with _recorded(dense, inner) as seen:
                    self.put("dense", k, dense(full).features)
                self.put("targets", k, {name: take(out, tokens.positions) for name, (_, out) in seen.items()})
            with _recorded(pruned, names) as seen:
                pruned(tokens)
            if is_projection:
                wanted = take(self.get("dense", k), tokens.positions) - tokens.features
                targets = {projection: wanted / pruned.residual_scale}
            else:
                targets = self.get("targets", k)
            weights = self.weights(k, layer if is_projection else layer - 1).gather(1, tokens.positions)
            held = self.held(k, len(weights))
            for name, rows in sums.items():
                rows.add(seen[name][0], targets[name], weights, held, tokens.pruned_mean() if is_projection else None)
            yield
        for rows in sums.values():
            self.replace(rows)
        if correction is not None:
            del self.pruned.corrections[str(layer)]
            if (thin := sums[projection].thin or self.given.get(str(layer))) is not None:
                self.pruned.corrections[str(layer)] = thin

    def refit_classifier(self) -> Iterator[None]:
        """Refit the classifier to the dense logits; then see how far the images held out are from the dense model."""
        classifier = self.pruned.classifier
        name = _name_of(self.pruned, classifier)
        sums = _Sums(classifier, self.device)
        for k in range(self.blocks):
            logits = self.dense_logits(k)
            with _recorded(self.pruned, [name]) as seen:
                self.pruned.readout(self.tokens(k))
            sums.add(seen[name][0], logits, torch.ones(len(logits), device=self.device), self.held(k, len(logits)))
            yield
        self.replace(sums)
        kl = torch.zeros((), dtype=torch.float64)
        for k in range(self.blocks):
            logits = self.dense_logits(k)
            held = self.held(k, len(logits))
            kl += kl_divergence(logits[held].cpu(), self.pruned.readout(self.tokens(k))[held].cpu())
            yield
        self.add_processes(kl)
        self.kl = float(kl) / self.held_out

    def dense_logits(self, block: int) -> Tensor:
        """(images, classes), once the dense model has passed all layers."""
        return self.dense.readout(replace(self.template, features=self.get("dense", block)))

    def add_processes(self, *values: Tensor) -> None:
        """Add each of the values up over the processes, where there are several."""
        if self.distributed:
            for value in values:
                total = value.to(self.device)  # where the group's backend takes it
                torch.distributed.all_reduce(total)
                value.copy_(total)

    def weights(self, block: int, layer: int) -> Tensor:
        """(images, tokens) what an error of a row after `layer` weighs, relative to the layer's mean."""
        mean = float(self.totals[layer]) / (self.images * self.dense.length)
        weights = self.get("weights", block)[layer]
        return weights / mean + LEAST_WEIGHT if mean > 0 else torch.ones_like(weights)

    def replace(self, sums: _Sums) -> None:
        """Give a linear layer the weight that its sums determine."""
        for rows in (sums.fitted, sums.held_out):
            self.add_processes(rows.gram, rows.cross, rows.power)
        found = sums.refit()
        name = _name_of(self.pruned, sums.linear)
        self.fits.append(Fit(name, found.ridges, found.before, found.after))


class _Sums:
    """Rows of a linear layer, those to fit and those held out; a bias is one more input, which is always 1."""

    def __init__(
        self, linear: nn.Linear, device: torch.device, correction: nn.Linear | None = None, scale: float = 1.0
    ):
        self.linear, self.correction, self.scale = linear, correction, scale
        self.thin: nn.Sequential | None = None
        self.groups = [linear.in_features + (linear.bias is not None)]
        if correction is not None:
            self.groups.append(correction.in_features)
        self.fitted, self.held_out = (Rows.none(sum(self.groups), linear.out_features, device) for _ in range(2))

    def add(
        self, inputs: Tensor, targets: Tensor, weights: Tensor, held: Tensor, pruned_mean: Tensor | None = None
    ) -> None:
        """Rows of a block.

        Args:
            inputs: (images, ..., n). targets: (images, ..., m). weights: (images, ...). held: (images,).
            pruned_mean: (images, d_model), what the correction receives, if there is one.
        """
        if self.linear.bias is not None:
            inputs = torch.cat([inputs, torch.ones_like(inputs[..., :1])], dim=-1)
        if pruned_mean is not None:
            inputs = torch.cat([inputs, pruned_mean[:, None].expand(-1, inputs.shape[1], -1)], dim=-1)
        for rows, chosen in ((self.fitted, ~held), (self.held_out, held)):
            rows.add(inputs[chosen].flatten(0, -2), targets[chosen].flatten(0, -2), weights[chosen].flatten())

    def refit(self) -> Refit:
        """The refit, put into the layer; a new correction is in `thin`, as two thin matrices."""
        weight, bias = self.linear.weight, self.linear.bias
        old = [weight] + ([] if bias is None else [bias[:, None]])
        old += [] if self.correction is None else [self.correction.weight / self.scale]
        found = refit(self.fitted, self.held_out, torch.cat(old, dim=1).to(self.fitted.gram.device), self.groups)
        if len(found.ridges) == 2 and found.ridges[1] is not None:
            reduced, outwards, inwards = reduce_rank(found, self.fitted, self.held_out, self.groups[1])
            if reduced.after >= found.before:  # a rank that is too low for any gain
                return replace(found, ridges=(), after=found.before)
            self.thin = low_rank(self.groups[1], len(inwards), weight.device)
            self.thin[0].weight.copy_(inwards * self.scale)
            self.thin[1].weight.copy_(outwards)
            found = reduced
        if found.ridges:
            new = found.weight.split([part.shape[1] for part in old], dim=1)
            weight.copy_(new[0])
            if bias is not None:
                bias.copy_(new[1][:, 0])
        return found


def _full_rank(model: TokenModel, thin: nn.Sequential | None) -> nn.Linear:
    """A correction as one matrix; without one, zero."""
    width, device = model.classifier.in_features, model.classifier.weight.device
    linear = skip_init(nn.Linear, width, width, bias=False, device=device)
    linear.weight.copy_(torch.zeros(()) if thin is None else thin[1].weight @ thin[0].weight)
    return linear


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
