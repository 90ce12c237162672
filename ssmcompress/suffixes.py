"""Suffixes of files of images, for the commands and for the data, which imports torch."""

# Those of torchvision's ImageFolder, and .gif.
IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm", ".pgm", ".tif", ".tiff", ".gif"}
TABLE_SUFFIXES = {".parquet", ".arrow"}
VIDEO_SUFFIXES = {".mp4", ".avi", ".mkv", ".webm", ".mov"}
ARRAY_SUFFIXES = {".npy", ".npz"}  # of frames
