"""The layer-by-layer refit of a pruned model to a dense one, see `ssmcompress.compression.reconstruct`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ...models.base import TokenModel
from ...models.records import Fit
from ...models.saved_corrections import build_correction
from ...pruning.tokens import Level
from ..remember import hash_of, keep, keeps_results, recall
from .both_models import BothModels
from .class_corrections import ClassRows, ClassSums, empty_correction
from .levels import LevelSums, has_levels
from .linear import LinearSums, full_rank, zero_map
from .readout import ReadoutRefit
from .recording import find_name, record


@dataclass(frozen=True)
class RefitOptions:
    """Parts that are fitted in addition to the weights.

    Attributes:
        class_corrections: whether the class token of later layers, or the readout of a model without one, gets its own
            corrections. On the bundled Vim they take 0.2 % of the FLOPs and, because they are many small operations,
            5 % of the time at batch size 8 and 9 % at batch size 1.
    """

    class_corrections: bool = True


class LayerwiseRefit(BothModels):
    """Runs a dense and a pruned model layer by layer on the same images, and refits the layers of the pruned one.

    In addition to the values of `BothModels`, `files` stores the inputs of the fit of the `class` correction.

    Args:
        dense, pruned, layers, folder, distributed, reference: as for `BothModels`.
        options: as for `reconstruct`.
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
        super().__init__(dense, pruned, layers, folder, distributed, reference)
        self.counts = pruned.token_counts()
        self.old_corrections = dict(pruned.corrections.items())
        self.corrects_logits = options.class_corrections and pruned.pools and bool(pruned.plan.stages)
        self.add_corrections(options)
        self.kl = 0.0
        self.fits: list[Fit] = []

    def add_corrections(self, options: RefitOptions) -> None:
        """Install zero corrections where new ones will be fitted, so that the tokens carry the required sums.

        Corrections for all tokens have full rank while they are fitted.
        """
        model = self.pruned
        for layer in map(str, self.layers):
            *_, length, width = model.section_of(int(layer))
            if not model.blocks[int(layer) - 1].refitted or self.counts[model.count_index(int(layer))] == length:
                continue
            old = self.old_corrections.get(layer) or zero_map(width, width, self.device)
            model.corrections[layer] = full_rank(old)
            if options.class_corrections and model.protected is not None and layer not in model.class_corrections:
                model.class_corrections[layer] = empty_correction(model)
        if self.corrects_logits and model.readout_correction is None:
            inputs = model.segments * (model.d_model + 1)
            model.readout_correction = zero_map(inputs, model.config.num_classes, self.device)

    def refit(self) -> Iterator[None]:
        """Refit the layers and the classifier in sequence; yields after every pass over a chunk."""
        known = hash_of("reconstruction and its halves", *self.content, list(self.layers), self.corrects_logits)
        for layer in self.layers:
            yield from self.enter_layer(layer)
            key = hash_of(known, layer) if keeps_results() else ""
            if (kept := recall(key)) is not None:
                yield from self.restore(layer, *kept)
                continue
            count = len(self.fits)
            *inner, projections = self.pruned.blocks[layer - 1].refitted or ((),)
            inner = [names for group in inner if (names := self.comparable(layer, group))]
            yield from self.advance_dense(layer, [name for group in inner for name in group])
            for names in inner:
                yield from self.refit_inner(layer, names)
            for projection in projections:
                yield from self.refit_projection(layer, projection)
            yield from self.advance_pruned(self.pruned.begin, layer)
            if self.pruned.blocks[layer - 1].end_projection is not None:
                yield from self.advance_dense_end(layer)
                yield from self.refit_end(layer)
                yield from self.advance_pruned(self.pruned.end, layer)
            keep(key, self.describe(layer, self.fits[count:]))
        if self.dense.reads_levels:
            yield from self.refit_levels()
            return
        yield from self.refit_level_after(len(self.pruned.blocks))
        yield from self.refit_readout()

    def enter_layer(self, layer: int) -> Iterator[None]:
        """Enter a layer in both models; at the start of a section, apply the level map of the previous section."""
        if self.pruned.starts_section(layer):
            yield from self.refit_level_after(layer - 1)
        if self.pruned.changes_at(layer):
            yield from self.enter(layer)

    def refit_level_after(self, layer: int) -> Iterator[None]:
        """Fit the maps of the level after a layer, if there is one that later layers process."""
        level = next((n for (n,) in self.section_levels() if self.pruned.level_layer(n) == layer), None)
        if level is None:
            return
        sums = None
        for k in range(self.chunks):
            ours, theirs = self.get_tokens(k).level(), Level(None, self.files.get("dense", k))
            sums = sums or LevelSums(self.pruned, (level,), [ours])
            sums.add([theirs], [ours], self.held[k])
            yield
        self.fits += sums.install(self.pruned, self.distributed)

    def section_levels(self) -> list[tuple[int, ...]]:
        """Return the groups of levels whose maps feed later layers."""
        model = self.pruned
        return model.level_passes() if model.levels and not model.reads_levels and has_levels(model) else []

    def describe(self, layer: int, fits: Sequence[Fit]) -> dict[str, Any]:
        """Return the weights of a refitted layer and of its corrections, with the records."""
        key, model = str(layer), self.pruned
        corrections = {name: maps[key].state_dict() for name, maps in self.corrections() if key in maps}
        records = list(map(astuple, fits))
        return {"block": model.blocks[layer - 1].state_dict(), "corrections": corrections, "fits": records}

    def restore(self, layer: int, kept: dict[str, Any]) -> Iterator[None]:
        """Load the result of `describe`, and run both models past the layer; yields as `refit` does."""
        key, block = str(layer), self.pruned.blocks[layer - 1]
        yield from self.advance_dense(layer, ())
        block.load_state_dict(kept["block"])
        for name, maps in self.corrections():
            if key in maps:
                del maps[key]
            if (values := kept["corrections"].get(name)) is not None:
                maps[key] = build_correction(self.pruned, name, values).to(self.device)
        self.fits += [Fit(*values) for values in kept["fits"]]
        yield from self.advance_pruned(self.pruned.begin, layer)
        if block.end_projection is not None:
            yield from self.advance_dense_end(layer)
            yield from self.advance_pruned(self.pruned.end, layer)

    def corrections(self) -> tuple[tuple[str, nn.ModuleDict], ...]:
        """Return the corrections of the pruned model by kind, as (name, modules by layer)."""
        model = self.pruned
        return ("corrections", model.corrections), ("class_corrections", model.class_corrections)

    def refit_levels(self) -> Iterator[None]:
        """Fit the maps of the output levels, and evaluate the model on the held-out images."""
        sums = None
        for k in range(self.chunks):
            images = self.files.get("images", k)
            dense, pruned = (model.encode(images)[0].levels for model in (self.dense, self.pruned))
            sums = sums or LevelSums(self.pruned, range(1, self.pruned.levels + 1), pruned)
            sums.add(dense, pruned, self.held[k])
            yield
        if has_levels(self.pruned):
            self.fits += sums.install(self.pruned, self.distributed)
        kl = torch.zeros((), dtype=torch.float64, device="cpu")
        for k in range(self.chunks):
            images = self.files.get("images", k)[self.held[k]]
            if len(images):
                kl += self.pruned.task.total_distance(self.dense.raw_outputs(images), self.pruned.raw_outputs(images))
            yield
        self.all_reduce_sum(kl)
        self.kl = float(kl) / self.held_out

    def passes(self) -> int:
        """Return the number of passes of `refit` over the chunks."""
        inner = sum(bool(self.comparable(x, group)) for x in self.layers for group in self.maps(x)[:-1])
        ends = sum(self.pruned.blocks[layer - 1].end_projection is not None for layer in self.layers)
        entered = sum(map(self.pruned.changes_at, self.layers)) + len(self.section_levels())
        return inner + sum(len(self.maps(layer)[-1:]) + 2 for layer in self.layers) + 3 * ends + entered + 2

    def maps(self, layer: int) -> tuple[tuple[str, ...], ...]:
        """Return the names of the linear layers to refit in a layer."""
        return self.pruned.blocks[layer - 1].refitted

    def comparable(self, layer: int, names: Sequence[str]) -> tuple[str, ...]:
        """Return the names of the inner maps that have the same number of outputs in the reference."""
        ours, theirs = self.pruned.blocks[layer - 1], dict(self.reference_block(layer).named_modules())
        return tuple(
            name
            for name in names
            if name in theirs and theirs[name].out_features == ours.get_submodule(name).out_features
        )

    def refit_end(self, layer: int) -> Iterator[None]:
        """Refit the projection of the second part of a layer to the dense features, at tokens with a position."""
        block = self.pruned.blocks[layer - 1]
        name, point = block.end_projection, self.dense.count_points(self.numbers[layer - 1])
        sums = LinearSums(block.get_submodule(name), self.device, scale=block.end_scale)
        for k in range(self.chunks):
            tokens = self.get_tokens(k)
            with record(block, [name]) as records:
                block(tokens, part="end")
            targets, weights = self.targets_at(k, tokens, point)
            sums.add(records[name][0], targets - tokens.features, weights, self.held[k])
            yield
        self.fits.append(self.solve(sums))

    def refit_inner(self, layer: int, names: Sequence[str]) -> Iterator[None]:
        """Refit independent maps of a layer to their outputs in the dense model."""
        block = self.pruned.blocks[layer - 1]
        sums = {name: LinearSums(block.get_submodule(name), self.device) for name in names}
        for k in range(self.chunks):
            tokens, targets = self.get_tokens(k), self.files.get("targets", k)
            with record(block, names) as records:
                block(tokens)
            point = self.dense.input_point(self.numbers[layer - 1])
            weights = self.row_weights(k, point).gather(1, tokens.explicit_positions())
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
        scale, point = block.residual_scale, self.dense.stage_point(self.numbers[layer] - 1)
        if block.end_projection is not None:
            point = self.dense.stage_point(self.numbers[layer - 1])
        sums = LinearSums(block.get_submodule(name), self.device, correction, scale)
        for k in range(self.chunks):
            tokens = self.get_tokens(k)
            with record(block, [name]) as records:
                block(tokens, part="begin")
            inputs = records[name][0]
            targets, weights = self.targets_at(k, tokens, point)
            pruned_mean = None if correction is None else tokens.pruned_mean()
            sums.add(inputs, targets - tokens.features, weights, self.held[k], pruned_mean)
            if has_class:
                dense, weights = self.files.get("dense", k), self.row_weights(k, point)
                self.files.put("class", k, tuple(ClassRows.read(self.pruned, tokens, inputs, dense, weights)))
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
            rows = ClassRows(*self.files.get("class", k))
            sums.add(rows, block.get_submodule(name), block.residual_scale, correction, self.held[k])
        self.all_reduce_sum(*sums.rows.sums())
        result, class_correction = sums.refit()
        del self.pruned.class_corrections[key]
        if class_correction is not None:
            self.pruned.class_corrections[key] = class_correction
        label = f"{find_name(self.pruned, block)}.class_correction"
        self.fits.append(result.to_record(label))

    def refit_readout(self) -> Iterator[None]:
        """Refit the classifier to the dense logits."""
        readout = ReadoutRefit(self.pruned, self.device, self.corrects_logits)
        for k in range(self.chunks):
            readout.add(self.dense_logits(k), self.get_tokens(k), self.held[k])
            yield
        readout.solve(self.all_reduce_sum)
        for k in range(self.chunks):
            readout.measure(self.dense_logits(k), self.get_tokens(k), self.held[k])
            yield
        fit, kl = readout.choose(self.all_reduce_sum)
        self.fits.append(fit)
        self.kl = kl / self.held_out

    def solve(self, sums: LinearSums) -> Fit:
        """Refit a linear layer in place from its sums over all processes, and return the record."""
        self.all_reduce_sum(*sums.rows.sums())
        result = sums.refit()
        return result.to_record(find_name(self.pruned, sums.linear))
