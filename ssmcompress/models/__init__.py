"""The architectures that can be compressed."""

from .base import TokenModel
from .blocks import Block
from .families import StateDict
from .registry import MODELS, build, recognise, register_architecture

__all__ = ["MODELS", "Block", "StateDict", "TokenModel", "build", "recognise", "register_architecture"]
