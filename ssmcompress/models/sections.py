"""The sections of a model, which are layers on a grid of one size, and the counts of tokens and points along layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from ..pruning.plan import Stage, token_counts
from .sizes import Section


class SectionedModel(nn.Module):
    """The part of `TokenModel` that defines how many tokens each layer processes."""

    @property
    def sections(self) -> tuple[Section, ...]:
        """Groups of layers that process tokens of the same grid; most models have one section."""
        return self.config.sections(self.length - self.config.patches)

    def section_of(self, layer: int) -> Section:
        """Return the section of a layer (1-based)."""
        return next(section for section in self.sections if layer <= section.last)

    def starts_section(self, layer: int) -> bool:
        """Return whether a layer (1-based) is the first one of a section other than the first."""
        return any(layer == section.first for section in self.sections[1:])

    def changes_at(self, layer: int) -> bool:
        """Return whether the input tokens of a layer (1-based) differ from the output of the previous one (`enter`)."""
        again = self.plan is not None and self.plan.reenter and layer == len(self.blocks) - self.plan.reenter + 1
        return bool(again) or self.starts_section(layer)

    def count_points(self, layers: int) -> int:
        """Return the number of points of the residual stream up to the end of the first `layers` layers.

        There is one after each part of a layer that adds to the stream, and one at the start of each further section.
        """
        parts = sum(1 + (block.end_projection is not None) for block in self.blocks[:layers])
        return parts + sum(section.first <= layers for section in self.sections[1:])

    def input_point(self, layer: int) -> int:
        """Return the number of points up to the input of a layer (1-based)."""
        return self.count_points(layer - 1) + self.starts_section(layer)

    def stage_point(self, layer: int) -> int:
        """Return the number of points up to the stage after (or in) a layer (1-based)."""
        return self.input_point(layer) + 1

    def count_index(self, layer: int) -> int:
        """Return the index in `token_counts` of the input of a layer (1-based); the next entry is its output."""
        return layer - 1 + sum(section.first <= layer for section in self.sections[1:])

    def name_count(self, index: int) -> str:
        """Describe the location of an entry of `token_counts`, such as "before layer 3"."""
        layers = range(1, len(self.blocks) + 1)
        before = next((layer for layer in layers if self.count_index(layer) == index), None)
        after = next((layer for layer in layers if self.count_index(layer) + 1 == index), None)
        if before is not None:
            return f"before layer {before}"
        return "after the last layer" if after == len(self.blocks) else f"after layer {after}"

    def token_counts(self) -> list[int]:
        """Return the number of tokens that each layer processes, and the number left at the end of each section.

        A model of one section has depth + 1 values, the last of which is the number of tokens read out. In other
        models, `count_index` returns the index of a layer.
        """
        return self.counts_for(self.plan.stages, self.plan.reenter) if self.plan else self.counts_for(())

    def kept_counts(self) -> list[int]:
        """Return the number of kept tokens after each stage."""
        counts = self.token_counts()
        return [counts[self.count_index(stage.after) + 1] for stage in self.plan.stages] if self.plan else []

    def counts_for(self, stages: Sequence[Stage], reenter: int = 0, config: Any = None) -> list[int]:
        """Return the `token_counts` of the model, or of a model with the sizes `config`, with these stages."""
        sections = self.sections if config is None else config.sections(self.length - self.config.patches)
        counts: list[int] = []
        for first, last, length, _ in sections:
            inside = [replace(s, after=s.after - first + 1) for s in stages if first <= s.after <= last]
            counts += token_counts(last - first + 1, length, inside, self.protected_count, reenter)
        return counts
