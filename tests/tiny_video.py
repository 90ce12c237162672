"""A small video model whose layers mix in a share of the mean token; a stand-in for any model with frames."""

from dataclasses import dataclass

import pytest
import torch
from torch import nn
from torch.nn.functional import silu

from ssmcompress.errors import InputError
from ssmcompress.models import Block, TokenModel, register_architecture, registry
from ssmcompress.models.reading import Shapes
from ssmcompress.models.sizes import ModelConfig
from ssmcompress.ops import SCORES
from ssmcompress.pruning.tokens import Tokens


@dataclass(frozen=True)
class TinyVideoConfig(ModelConfig):
    d_model: int
    depth: int
    in_chans: int
    num_classes: int
    stride: int
    frames: int
    image_size: tuple[int, int]

    @property
    def grid(self):
        return self.frames * self.image_size[0] // self.stride, self.image_size[1] // self.stride

    @property
    def frame_grid(self):
        return self.image_size[0] // self.stride, self.image_size[1] // self.stride


class TinyBlock(Block):
    scores = frozenset({"clip", "l1", "l2", "mean"})
    refitted = (("gate", "value"), ("out",))

    def __init__(self, width):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.gate, self.value, self.out = (nn.Linear(width, width) for _ in range(3))

    def begin(self, tokens, metric=None, protected_only=False):
        x = self.norm(tokens.features)
        y = silu(self.gate(x)) * self.value(x).mean(1, keepdim=True)
        return tokens.updated(tokens.features + self.out(y), SCORES[metric](y) if metric else None)


class TinyVideo(TokenModel):
    """Videos (batch, channels, frames, height, width) -> logits (batch, classes)."""

    architecture, config_class = "tiny_video", TinyVideoConfig
    telling_keys = ("volumes.weight", "layers.0.gate.weight", "head.weight")
    pools = True

    def __init__(self, config):
        super().__init__(config)
        c, side = config, (1, config.stride, config.stride)
        self.volumes = nn.Conv3d(c.in_chans, c.d_model, side, side)
        self.positions = nn.Parameter(torch.randn(1, c.patches, c.d_model))
        self.layers = nn.ModuleList(TinyBlock(c.d_model) for _ in range(c.depth))
        self.norm, self.head = nn.LayerNorm(c.d_model), nn.Linear(c.d_model, c.num_classes)

    blocks = property(lambda self: self.layers)
    classifier = property(lambda self: self.head)
    frames = property(lambda self: self.config.frames)

    def resize_frames(self, frames):
        assert frames == self.frames

    def check(self, images):
        if tuple(images.shape[1:]) != self.image_shape:
            raise InputError(f"videos {tuple(images.shape)}: expected (batch, {self.image_shape})")

    def embed(self, images):
        self.check(images)
        patches = self.volumes(images).flatten(2).transpose(1, 2)
        return Tokens(patches + self.positions, self.length, alignment=self.alignment)

    def readout(self, tokens):
        total, count = self.norm(tokens.features).sum(1), tokens.features.shape[1]
        return self.correct_logits(self.head(total / count), tokens)

    def memory(self, features):
        return self.norm(features)

    @classmethod
    def recognises(cls, state):
        return all(key in state for key in cls.telling_keys)

    @classmethod
    def infer_config(cls, state, image_size, stride, trained_size):
        shape = Shapes(state, cls.architecture)
        width, channels, _, side, _ = shape("volumes.weight", 5)
        size, patches = (8, 8), shape("positions", 3)[1]
        frames = patches * side**2 // (size[0] * size[1])
        sizes = width, shape.count("layers."), channels, shape.head("head.weight", width), side, frames, size
        return TinyVideoConfig(*sizes), dict(state)

    @classmethod
    def count_flops(cls, config, counts, convention, as_run=True):
        width, head = config.d_model, config.num_classes * config.d_model
        stem = config.patches * width * config.in_chans * config.stride**2
        return {"embedding": stem, "layers": 3 * sum(counts[:-1]) * width**2, "head": head}

    def matrix_products(self):
        counted = zip(self.token_counts()[:-1], self.layers, strict=True)
        layers = [(n, linear.weight) for n, layer in counted for linear in (layer.gate, layer.value, layer.out)]
        return [(self.length, self.volumes.weight.flatten(1)), *layers, (1, self.head.weight)]

    def activation_bytes(self, size=4):
        return self.length * self.d_model * (2 * 4 + 4 * size)


def make_tiny_video(classes=3, frames=4, seed=0):
    """A model of 8-pixel videos in patches of 4, with random weights."""
    torch.manual_seed(seed)
    model = TinyVideo(TinyVideoConfig(16, 4, 3, classes, 4, frames, (8, 8))).eval()
    model.preprocessing = model.default_preprocessing()
    return model


@pytest.fixture(scope="module", autouse=True)
def tiny_video_is_known():
    """The architecture is registered for the tests of a module that imports this, and for no others."""
    register_architecture(TinyVideo)
    yield
    registry.MODELS.remove(TinyVideo)
    registry._registered.remove(TinyVideo)
