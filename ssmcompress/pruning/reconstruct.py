"""Reconstruction without training: later layers refitted in closed form to what the dense model computes.

Pruning changes what every later layer receives. Dense and pruned model are run side by side over unlabelled images,
layer by layer, whatever was refitted before in place; in each layer some linear maps (`Block.refitted`) and at last
the classifier are replaced by the ridge regression (`ssmcompress.pruning.least_squares`) of

- for the projection into the residual stream: the dense model's features after the layer, minus the pruned ones before;
- for the maps before it: what the same map gives in the dense model;
- for the classifier: the dense logits,

at the kept tokens. With the projection goes a correction, the one thing that is new in the model: a linear map of low
rank from the mean of the tokens pruned so far to an addition to all kept ones, once an image and layer. What was
pruned tells what is missing; on two small Vims this alone took another fifth to a third off the divergence.

A row weighs what an error there would do to the decision: the squared gradient of the dense model's margin between
its two best classes by that token's features. That finds by itself which tokens are read out, in any architecture.

A fifth of the images is held out: it chooses each ridge, a weight is replaced only where that helps on it, and a
model that does not come closer to the dense one on it is left as it was.

The residual streams of both models wait in temporary files between layers, so memory does not grow with the images;
running the models anew for each layer instead would take depth / 2 times as long (12 times for 24 layers).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import skip_init
from torch.utils.checkpoint import checkpoint

from ..batches import AnyBatches, Labelled, block_size, digest, in_blocks
from ..errors import NOT_FINITE, InputError, SsmCompressError
from ..evaluation import kl_divergence
from ..models.base import TokenModel, low_rank
from ..progress import track
from ..tokens import Tokens, take
from .least_squares import Refit, Rows, reduce_rank, refit

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


@dataclass(frozen=True)
class Reconstruction:
    """How a model was reconstructed.

    Attributes:
        name, images: the data, and how many different images of it were used. held_out: how many of them only chose.
        kl_before, kl_after: mean KL(dense || pruned) on those held out in nats an image, with old and new weights.
        kept: whether the model has the new weights: it keeps the old ones if they were closer.
        fits: in the order in which they were made.
    """

    name: str
    images: int
    held_out: int
    kl_before: float
    kl_after: float
    kept: bool
    fits: tuple[Fit, ...]

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> Reconstruction:
        """What `dataclasses.asdict` made of one; an InputError for anything else."""
        try:
            fits = tuple(
                Fit(
                    str(f["weight"]),
                    tuple(None if ridge is None else float(ridge) for ridge in f["ridges"]),
                    float(f["before"]),
                    float(f["after"]),
                )
                for f in value["fits"]
            )
            counts = (int(value[k]) for k in ("images", "held_out"))
            return cls(str(value["name"]), *counts, *(float(value[k]) for k in _KL), bool(value["kept"]), fits)
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            raise InputError(f"not a record of a reconstruction: {type(error).__name__} {error}") from error


_KL = ("kl_before", "kl_after")


@torch.no_grad()
def reconstruct(
    pruned: TokenModel, dense: TokenModel, images: Any, *, name: str = "images", distributed: bool = False
) -> TokenModel:
    """A copy of `pruned` whose later layers are refitted to follow `dense`; the arguments are left as they are.

    The result does not depend on how the images are batched.

    Args:
        pruned: a pruned model. dense: the model it was made from.
        images: a tensor (count, C, H, W) of prepared images, or batches of them (tensors, (images, labels) pairs, or
            `ssmcompress.batches.Batches`), passed over once; a generator is read into memory first. Labels are not
            used. The same image counts once.
        name: what the images are called in reports.
        distributed: every process of the default `torch.distributed` group makes this call, with the same models and
            images of its own; their sums are added, and all end with the same weights. If one fails, the others wait
            for it as long as the group lets them.

    Returns:
        The model, with `reconstruction` telling what was done. Where nothing was pruned, nothing is done.

    Raises:
        InputError: fewer than two different images, values that are not finite, or models that do not belong together.
        SsmCompressError: no room for temporary files.
    """
    if pruned.plan is None or dense.plan is not None:
        raise InputError("reconstruct takes a pruned model and the dense one it was made from, in this order")
    if pruned.config != dense.config:
        raise InputError("the pruned and the dense model differ in architecture or image size")
    if next(pruned.parameters()).device != next(dense.parameters()).device:
        raise InputError("the pruned and the dense model are on different devices")
    model = copy.deepcopy(pruned)
    counts = model.token_counts()
    incomplete = [layer for layer in range(1, len(model.blocks) + 1) if counts[layer - 1] < model.length]
    if not incomplete:
        return model
    with TemporaryDirectory(prefix="ssmcompress-", ignore_cleanup_errors=True) as folder:
        run = _SideBySide(dense, model, incomplete, Path(folder), distributed)
        before = run.start(AnyBatches(images))
        work = run.blocks * (sum(len(model.blocks[layer - 1].refitted) + 1 for layer in incomplete) + 2)
        for _ in track(run.refit(), "reconstructing", work):
            pass
    after = run.kl
    if not math.isfinite(before) or not math.isfinite(after):
        raise InputError(NOT_FINITE)
    kept = after < before
    if not kept:
        model = copy.deepcopy(pruned)
    model.reconstruction = Reconstruction(name, run.images, run.held_out, before, after, kept, tuple(run.fits))
    return model


class _SideBySide:
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


def margin_gradients(model: TokenModel, images: Tensor) -> Tensor:
    """What an error would do to a model's decision: (layers + 1, images, tokens) float32.

    Entry 0 is the squared length of the gradient of the margin, the best logit minus the second, by each token's
    features before the first layer, entry i by those after layer i. One layer's activations are held at a time.
    """
    with torch.enable_grad():
        tokens = model.embed(images)
        states = [tokens.features.detach().requires_grad_()]
        for block in model.blocks:
            after = checkpoint(
                lambda x, block=block: block(tokens.updated(x)).features, states[-1], use_reentrant=False
            )
            states.append(after)
        logits = model.readout(tokens.updated(states[-1]))
        if not logits.isfinite().all():
            raise InputError(NOT_FINITE)
        best = logits.topk(min(2, logits.shape[1]), dim=1).values
        margin = 2 * best[:, 0] - best.sum(1)
        gradients = torch.autograd.grad(margin.sum(), states)
    return torch.stack([gradient.square().sum(-1) for gradient in gradients])


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
