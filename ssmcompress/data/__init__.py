"""Images from folders, tables, shards or the hub, with or without labels, and batches of model inputs."""

from .batches import Batches
from .find import find_images, open_images, photographs
from .images import Images
from .labels import class_names

__all__ = ["Batches", "Images", "class_names", "find_images", "open_images", "photographs"]
