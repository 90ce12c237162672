"""Suffixes of image files, shared by the commands and the data package, which imports torch."""

# The suffixes of torchvision's ImageFolder, and .gif.
IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm", ".pgm", ".tif", ".tiff", ".gif"}
TABLE_SUFFIXES = {".parquet", ".arrow"}
VIDEO_SUFFIXES = {".mp4", ".avi", ".mkv", ".webm", ".mov"}
ARRAY_SUFFIXES = {".npy", ".npz"}  # arrays of frames
