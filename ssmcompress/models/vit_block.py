"""The layers of a ViT: attention and an MLP, built from timm's modules, with support for dropping tokens between them.

DeiT (arXiv 2012.12877), DeiT III (arXiv 2204.07118) and timm's other models of this kind; parameter names are timm's.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops import SCORES
from ..ops.observing import AttentionCall, is_observed, tell
from ..pruning.tokens import Tokens
from .blocks import Block
from .precision import LayerNorm, cast, project_rows, widen
from .sizes import ModelConfig

# Scores of `ssmcompress.ops.SCORES` that are computed from the output of attention before its projection.
OF_VALUES = ("clip", "l1", "l2", "mean")


@dataclass(frozen=True)
class ViTConfig(ModelConfig):
    """Sizes of a ViT; `num_heads`, `activation`, `epsilon`, `pool` and image size cannot be inferred from its weights.

    Attributes:
        mlp_dim: hidden width of the MLP.
        class_token, distillation_token: whether there is one. registers: number of register tokens. These tokens come
            before the patches, in this order.
        embeds_prefix: whether the tokens before the patches have entries in the position embedding.
        qkv_bias, qk_norm, layer_scale, pre_norm: options of timm's model. fc_norm: whether the last norm is after the
            pooling.
        activation: of the MLP: "gelu", "gelu_tanh", "quick_gelu", "relu" or "silu". epsilon: of the norms.
        pool: what is read out, "token" for the class token (and the distillation token) or "avg" for the mean over the
            patches.
    """

    d_model: int
    depth: int
    num_heads: int
    mlp_dim: int
    in_chans: int
    num_classes: int
    patch_size: tuple[int, int]
    stride: int
    image_size: tuple[int, int]
    class_token: bool = True
    distillation_token: bool = False
    registers: int = 0
    embeds_prefix: bool = True
    qkv_bias: bool = True
    qk_norm: bool = False
    layer_scale: bool = False
    pre_norm: bool = False
    fc_norm: bool = False
    activation: str = "gelu"
    epsilon: float = 1e-6
    pool: str = "token"

    @property
    def grid(self) -> tuple[int, int]:
        """The size of the patch grid, (rows, columns)."""
        (height, width), (ph, pw) = self.image_size, self.patch_size
        return height // ph, width // pw

    @property
    def prefix(self) -> int:
        """The number of tokens before the patches."""
        return self.class_token + self.distillation_token + self.registers

    @property
    def read(self) -> int:
        """The number of leading tokens that are read out; 0: the mean over the patches is read out."""
        return 1 + self.distillation_token if self.pool == "token" else 0


def make_parts(c: ViTConfig) -> nn.Module:
    """Return the modules of a layer, named as in timm's `Block`."""
    from timm.layers import get_act_layer
    from timm.models.vision_transformer import Block as TimmBlock

    return TimmBlock(
        c.d_model,
        c.num_heads,
        mlp_ratio=(c.mlp_dim + 0.5) / c.d_model,  # timm rounds the product down
        qkv_bias=c.qkv_bias,
        qk_norm=c.qk_norm,
        init_values=1.0 if c.layer_scale else None,
        act_layer=get_act_layer(c.activation),
        norm_layer=partial(LayerNorm, eps=c.epsilon),
    )


class ViTBlock(Block):
    """One layer: `begin` is attention, `end` the MLP; tokens are dropped between the two, as in EViT and ToMe."""

    end_projection: ClassVar[str] = "mlp.fc2"

    def __init__(self, c: ViTConfig):
        super().__init__()
        for name, part in make_parts(c).named_children():
            self.add_module(name, part)
        self.read = c.read
        self.scores = frozenset((*OF_VALUES, "keys", *(("attention",) if c.class_token else ())))

    @property
    def refitted(self) -> tuple[tuple[str, ...], ...]:
        return (("attn.proj",),)

    @property
    def residual_scale(self) -> float | Tensor:
        return getattr(self.ls1, "gamma", 1.0)

    @property
    def end_scale(self) -> float | Tensor:
        return getattr(self.ls2, "gamma", 1.0)

    def begin(self, tokens: Tokens, metric: str | None = None, protected_only: bool = False) -> Tokens:
        update, scores, keys = self.attend(self.norm1(tokens.features), tokens, metric, protected_only)
        if protected_only:
            index = torch.arange(self.read, device=update.device).expand(update.shape[0], -1)
            tokens = tokens.keep(index)
        return replace(tokens.updated(tokens.features + self.ls1(update), scores), keys=keys)

    def end(self, tokens: Tokens) -> Tokens:
        return tokens.updated(tokens.features + self.ls2(self.mlp(self.norm2(tokens.features))))

    def attend(
        self, x: Tensor, tokens: Tokens, metric: str | None, protected_only: bool
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Return the output of attention (batch, kept, d_model), scores of `metric` (batch, kept), and the mean keys.

        With `protected_only`, only the tokens that are read out have queries.

        Args:
            x: (batch, kept, d_model), normalised.
        """
        attn, width = self.attn, self.attn.attn_dim
        # Merged tokens are weighted by the number of tokens they represent (proportional attention, ToMe, equation 1).
        bias = tokens.sizes.log()[:, None, None] if tokens.sizes is not None and tokens.alignment.scan else None
        observed = is_observed()
        if not (protected_only or metric or observed) and bias is None:
            return attn(x), None, None
        queried = x[:, : self.read] if protected_only else x
        q = project_rows(attn.qkv, queried, slice(None, width))
        k, v = project_rows(attn.qkv, x, slice(width, None)).chunk(2, dim=-1)
        q, k, v = (part.unflatten(-1, (attn.num_heads, attn.head_dim)).transpose(1, 2) for part in (q, k, v))
        q, k = attn.q_norm(q), attn.k_norm(k)
        if observed:
            tell(AttentionCall(q, k, attn.scale, bias))
        # onnxruntime's attention requires a mask row for each query.
        mask = None if bias is None else bias.to(q.dtype).expand(-1, -1, q.shape[2], -1)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)
        scores = keys = None
        if metric == "attention":
            row = widen(q[:, :, :1]) * attn.scale @ widen(k).transpose(-2, -1)
            scores = (row if bias is None else row + bias).softmax(-1).mean(1)[:, 0]
        elif metric == "keys":
            keys = widen(k).mean(1)
        elif metric is not None:
            scores = SCORES[metric](widen(y))
        return attn.proj(cast(attn.norm(y), attn.proj)), scores, keys


def count_layers(c: ViTConfig, counts: Sequence[int], read_one: bool) -> dict[str, int]:
    """Return the FLOPs of the patch embedding and the layers by part, as in `TokenModel.count_flops`.

    4 N D^2 + 2 N^2 D for attention and 2 N D H for an MLP of hidden width H, where N is the number of tokens at each.

    Args:
        read_one: whether the last layer is computed only for the tokens that are read out.
    """
    D, parts = c.d_model, dict.fromkeys(("qkv", "attention", "proj", "mlp"), 0)
    for layer in range(1, c.depth + 1):
        tokens, left = counts[layer - 1 : layer + 1]
        short = read_one and layer == c.depth
        queries = c.read if short else tokens
        parts["qkv"] += (queries + 2 * tokens) * D * D
        parts["attention"] += 2 * queries * tokens * D
        parts["proj"] += queries * D * D
        parts["mlp"] += 2 * (c.read if short else left) * D * c.mlp_dim
    return {"embedding": c.patches * D * c.in_chans * math.prod(c.patch_size), **parts}
