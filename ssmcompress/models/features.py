"""timm's model interface: separate features and head, feature maps of intermediate layers, and their metadata.

Layers are numbered from 0 here, as in timm; everywhere else in the package they are numbered from 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..data.dense import DensePreprocessing
from ..errors import InputError
from ..ops import gather_tokens
from ..pruning.tokens import Level, Tokens
from .classifier import name_module, replace_classifier

FORMATS = ("NCHW", "NLC")
# Attribute of the features that holds the sums over dropped tokens; see `DroppedSums`.
ATTRIBUTE = "dropped_sums"


class NamePatterns(tuple):
    """Patterns of parameter names. Calling it returns them as a set, as timm's optimisers call `no_weight_decay()`."""

    def __call__(self) -> set[str]:
        return set(self)


class DroppedSums(NamedTuple):
    """The inputs of a mean-pooling readout other than the kept tokens.

    Attributes:
        total: (batch, d_model), `Tokens.pruned_sum`, if the mean is over all tokens; else None.
        summary: (batch, segments * (d_model + 1)), `Tokens.summarise`, if the logits are corrected; else None.
    """

    total: Tensor | None = None
    summary: Tensor | None = None


class FeatureModel(nn.Module):
    """The part of `TokenModel` that follows timm's interface.

    An architecture defines `normalise`, `select_read` and `classify`, from which its `readout` is composed.
    """

    # ------------------------------------------------------------------------- what an architecture defines

    def normalise(self, features: Tensor) -> Tensor:
        """Apply the norm after the last layer to features (batch, tokens, d_model)."""
        raise NotImplementedError(f"{type(self).__name__} does not define `normalise`, as features need it")

    def select_read(self, features: Tensor) -> Tensor:
        """Select the tokens (batch, read, d_model) that are read out from the result of `forward_features`."""
        raise NotImplementedError(f"{type(self).__name__} does not define `select_read`, as `forward_head` needs it")

    def classify(self, read: Tensor, sums: DroppedSums, pre_logits: bool = False) -> Tensor:
        """Compute the logits (batch, classes), or the classifier's input, from the normalised tokens to be read."""
        raise NotImplementedError(f"{type(self).__name__} does not define `classify`, as `forward_head` needs it")

    # ------------------------------------------------------------------------------------- features and head

    def forward_features(self, x: Tensor) -> Tensor:
        """Compute the tokens after the last layer, normalised: (batch, kept, d_model).

        The protected tokens, such as the class token, come first (`num_prefix_tokens` of them), then the kept patches
        in order, and last the fused tokens. The class token of a Vim is in the middle of the sequence, at a different
        index in each pruned image, and is moved to the front.

        If the head reads more than these tokens (a mean that includes the last features of dropped tokens, or a
        correction of the logits, both created by reconstruction), these sums are attached to the tensor as an
        attribute, which `forward_head` needs. Tensors computed from it do not have the attribute.

        Args:
            x: images (batch, channels, height, width).
        """
        return self._features(self.encode(x)[0])

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Compute the logits (batch, classes) from the result of `forward_features`.

        They equal the logits of `forward` up to rounding: `forward` computes the last layer only for the class token if
        only that is read out.

        Args:
            pre_logits: return the input of the classifier, (batch, `head_hidden_size`).

        Raises:
            InputError: the head reads more than the tokens, and `x` lacks the attribute for it.
        """
        sums = getattr(x, ATTRIBUTE, None)
        if sums is None and self._reads_dropped():
            raise InputError(
                "features without the sums over dropped tokens that this model's head reads: pass the very tensor that "
                "forward_features returned, or call the model"
            )
        return self.classify(self.select_read(x), sums or DroppedSums(), pre_logits)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> Any:
        """Compute the features after layers on the full patch grid, (batch, d_model, rows, columns), as timm does.

        The grid of a video stacks its frames vertically: `unflatten(2, (times, -1))` separates them.

        A dropped token keeps its last features: those after the layer of its stage or, in a ViT, after the attention of
        that layer.

        Args:
            x: images (batch, channels, height, width).
            indices: 0-based layer indices, negative ones from the end; an int n: the last n layers; None: all. The
                result is in the order of the layers.
            return_prefix_tokens: return each as a pair with the prefix tokens (batch, prefix, d_model), if the model
                has any.
            norm: apply the norm after the last layer to each.
            stop_early: do not run the layers after the last requested one.
            output_fmt: "NCHW", or "NLC" for (batch, rows * columns, d_model).
            intermediates_only: return the list alone.

        Returns:
            (result of `forward_features`, list), or the list.

        Raises:
            InputError: the model has no such layer, or the format is unknown.
        """
        if output_fmt not in FORMATS:
            raise InputError(f"`output_fmt` {output_fmt!r}: expected one of {', '.join(map(repr, FORMATS))}")
        taken = find_layers(indices, len(self.blocks))
        tokens, found = self.embed(x), []
        tokens = tokens if tokens.dropped is not None else replace(tokens, dropped=())
        for run in self.run_layers(tokens, range(1, (max(taken) + 1 if stop_early else len(self.blocks)) + 1)):
            tokens = run.after
            if run.layer - 1 in taken:
                found.append(self._on_grid(tokens, norm, output_fmt))
        maps = found if return_prefix_tokens and self.num_prefix_tokens else [values for values, _ in found]
        return maps if intermediates_only else (self._features(tokens), maps)

    def dropped_sums(self, tokens: Tokens) -> DroppedSums:
        """Return the inputs of the readout other than the features of the kept tokens."""
        total = tokens.pruned_sum if self.pools and tokens.alignment.pool else None
        return DroppedSums(total, tokens.summarise(self.segments) if self.readout_correction is not None else None)

    def _reads_dropped(self) -> bool:
        pooled = self.pools and self.alignment.pool and len(self.pruners) > 0
        return pooled or self.readout_correction is not None

    def _features(self, tokens: Tokens) -> Tensor:
        """Return normalised tokens in the order of `forward_features`, with the sums for the head attached, if any."""
        features = self.normalise(protected_first(tokens))
        sums = self.dropped_sums(tokens)
        if any(value is not None for value in sums):
            setattr(features, ATTRIBUTE, sums)
        return features

    def _on_grid(self, tokens: Tokens, norm: bool, output_fmt: str) -> tuple[Tensor, Tensor | None]:
        """Return the features of all patches, in one of `FORMATS`, and of the prefix tokens, if there are any."""
        filled = fill_dropped(tokens)
        filled = self.normalise(filled) if norm else filled
        positions = self.patch_positions
        if tokens.grid is not None:  # of these images
            positions = torch.arange(tokens.length, device="cpu").view(tokens.grid)
        values = filled[:, positions.flatten().to(filled.device)]
        if output_fmt == "NCHW":
            values = values.transpose(1, 2).unflatten(2, tuple(positions.shape)).contiguous()
        start, count = self.protected, self.num_prefix_tokens
        return values, filled[:, start : start + count] if count else None

    # ------------------------------------------------------------------------------------------- classifier

    def get_classifier(self) -> nn.Module:
        """Return the layer that computes the logits; in a model without classes, it returns its input."""
        return self.classifier

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Give the model a new classifier with random weights, in place, and keep the stages and all other weights.

        Corrections of features from a reconstruction are kept; the correction of the logits and the class names are
        removed. The recorded file of the dense model is removed too: it has other classes, so agreement with it would
        be meaningless. A record of kind "classifier" is added to `steps`.

        Args:
            num_classes: 0: no classifier; the model returns its input (batch, `head_hidden_size`).
            global_pool: the pooling, which cannot be changed. None: as before.

        Raises:
            InputError: the pooling differs, the number of classes is invalid, or the model is quantised.
        """
        if global_pool not in (None, self.global_pool):
            raise InputError(
                f"`global_pool` {global_pool!r}: expected None or {self.global_pool!r}, what the model has"
            )
        replace_classifier(self, num_classes)

    # --------------------------------------------------------------------------------------- what the model is

    @property
    def num_classes(self) -> int:
        """The number of classes; 0: the model returns features."""
        return self.config.num_classes

    @property
    def num_features(self) -> int:
        """The width of the features."""
        return self.d_model

    embed_dim = num_features

    @property
    def head_hidden_size(self) -> int:
        """The width of the classifier's input."""
        return self.classifier.weight.shape[1]

    @property
    def num_prefix_tokens(self) -> int:
        """The number of tokens before the patches in the features, which are never pruned."""
        return self.protected_count

    @property
    def global_pool(self) -> str:
        """What is read out: "token" or "avg" as in timm; "" for segmentation."""
        return "avg" if self.pools else "token" if self.protected_count else ""

    @property
    def feature_info(self) -> list[dict[str, Any]]:
        """The channels, the reduction in pixels and the module name of each layer, in timm's format."""
        name = name_module(self, self.blocks)
        info = {"num_chs": self.d_model, "reduction": self.config.stride}
        return [{**info, "module": f"{name}.{layer}"} for layer in range(len(self.blocks))]

    @property
    def pretrained_cfg(self) -> dict[str, Any]:
        """timm's configuration: sizes, preprocessing, the name of the classifier and the number of classes.

        For segmentation, the size is that of one image or window, and nothing is cropped.
        """
        prepared = self.preprocessing or self.default_preprocessing()
        dense = isinstance(prepared, DensePreprocessing)
        return {
            "architecture": self.architecture,
            "input_size": self.input_shape,
            "fixed_input_size": None not in self.image_shape,
            "interpolation": "bilinear" if dense else prepared.interpolation,
            "crop_pct": 1.0 if dense else prepared.crop_pct,
            "crop_mode": "center" if dense else prepared.crop_mode,
            "mean": tuple(prepared.mean),
            "std": tuple(prepared.std),
            "num_classes": self.num_classes,
            "classifier": name_module(self, self.classifier),
        }

    @property
    def default_cfg(self) -> dict[str, Any]:
        """timm's former name of `pretrained_cfg`."""
        return self.pretrained_cfg


def find_layers(indices: int | Sequence[int] | None, depth: int) -> set[int]:
    """Resolve the `indices` of `forward_intermediates` to 0-based layer indices; InputError if one is out of range."""
    if indices is None or isinstance(indices, int):
        count = depth if indices is None else indices
        if not 0 < count <= depth:
            raise InputError(f"`indices` {indices}, the last layers: expected 1 to {depth} of them")
        return set(range(depth - count, depth))
    layers = list(indices)
    if not layers or not all(-depth <= layer < depth for layer in layers):
        raise InputError(f"`indices` {layers}: expected numbers of layers, {-depth} to {depth - 1}")
    return {layer % depth for layer in layers}


def protected_first(tokens: Tokens) -> Tensor:
    """Return the features (batch, kept, d_model) with the protected tokens moved to the front."""
    if not tokens.protected:  # there are none, or they are there already
        return tokens.features
    start, count = tokens.protected_index()[:, None], tokens.protected_count
    places = torch.arange(tokens.features.shape[1], device=tokens.features.device)
    others = places[: len(places) - count].expand(len(start), -1)
    others = others + count * (others >= start)
    return gather_tokens(tokens.features, torch.cat([start + places[:count], others], dim=1))


def fill_dropped(tokens: Tokens) -> Tensor:
    """Return the features at all positions, (batch, length, d_model), with the last features of dropped tokens."""
    dropped = tuple(group._replace(values=group.features) for group in tokens.dropped)
    return Level(tokens.positions, tokens.features, dropped).fill()[:, : tokens.length]
