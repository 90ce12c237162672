"""The architectures that can be compressed."""

from .base import Block, StateDict, TokenModel
from .registry import MODELS, build, recognise, register_architecture

__all__ = ["MODELS", "Block", "StateDict", "TokenModel", "build", "recognise", "register_architecture"]
