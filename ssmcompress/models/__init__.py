"""The architectures that can be compressed."""

from .base import Block, StateDict, TokenModel
from .registry import MODELS, build, recognise

__all__ = ["MODELS", "Block", "StateDict", "TokenModel", "build", "recognise"]
