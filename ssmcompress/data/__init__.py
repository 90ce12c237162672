"""Images and videos from folders, tables, shards or the hub, with labels or without, and batches of model inputs."""

from .batches import Batches
from .find import find_images, open_images, photographs
from .images import Images
from .labels import class_names
from .video import Video

__all__ = ["Batches", "Images", "Video", "class_names", "find_images", "open_images", "photographs"]
