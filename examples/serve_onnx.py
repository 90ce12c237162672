"""Classify a picture with an exported ONNX file, without ssmcompress or torch.

    python examples/serve_onnx.py model.onnx picture.jpg

It needs numpy, Pillow and onnxruntime. The preprocessing, the class names and the session options are stored in the
file.
"""

import argparse
import json
import os
import sys

import numpy as np
import onnxruntime
from PIL import Image


def prepare(picture: Image.Image, about: dict) -> np.ndarray:
    """Return (1, channels, height, width) float32: resized so that the crop fits, centre-cropped, normalised."""
    shape, how = about["architecture"], about["preprocessing"]
    height, width = shape["image_size"]
    mean, std = (np.array(how[name], np.float32).reshape(-1, 1, 1) for name in ("mean", "std"))
    picture = picture.convert("L" if shape["in_chans"] == 1 else "RGB")
    wanted = [int(side / how["crop_pct"]) for side in (width, height)]
    scale = max(side / has for side, has in zip(wanted, picture.size, strict=True))
    whole = int if height == width else round  # as in torchvision and timm
    size = [max(cut, whole(has * scale)) for cut, has in zip((width, height), picture.size, strict=True)]
    picture = picture.resize(size, Image.Resampling[how["interpolation"].upper()])
    left, top = (round((has - cut) / 2) for cut, has in zip((width, height), picture.size, strict=True))
    picture = picture.crop((left, top, left + width, top + height))
    pixels = np.asarray(picture, np.float32).reshape(height, width, -1).transpose(2, 0, 1) / 255
    return ((pixels - mean) / std)[None]


# Session options that a file may set in addition to the threads; they only affect the speed.
ENTRIES = ("session.intra_op.allow_spinning", "session.force_spinning_stop")


def read_metadata(file: str) -> dict:
    """Return the metadata that ssmcompress wrote to an ONNX file; the session skips optimisation, as it is not run."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    about = session.get_modelmeta().custom_metadata_map.get("ssmcompress")
    if about is None:
        sys.exit(f"{file}: expected a file that `ssmcompress export --onnx` wrote")
    try:
        found = json.loads(about)
    except ValueError:
        found = None
    if not isinstance(found, dict):
        sys.exit(f"{file}: its metadata is not a JSON object; export the file again")
    return found


def make_options(about: dict, threads: int = 0) -> onnxruntime.SessionOptions:
    """Return the session options that the file recommends, optionally with another number of threads.

    0 threads stands for all cores available to this process. (onnxruntime's own 0 also pins each thread to a core.)
    """
    recommended = about.get("session") or {}
    try:
        threads = threads or recommended.get("intra_op_num_threads", 0)
        config = recommended.get("config", {})
        values = {key: config[key] for key in ENTRIES if key in config}
        unknown = [*(recommended.keys() - {"intra_op_num_threads", "config"}), *(config.keys() - values.keys())]
        if type(threads) is not int or threads < 0 or not all(value in ("0", "1") for value in values.values()):
            raise TypeError
    except (AttributeError, TypeError):
        expected = 'expected "intra_op_num_threads", a whole number from 0, and "config", an object of texts "0" or "1"'
        sys.exit(f"the session options in the file are {str(recommended)[:200]!r}: {expected}; export the file again")
    if unknown:
        print(f"unknown session options are not applied: {str(sorted(unknown))[:200]}", file=sys.stderr)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = min(threads or cores, cores)
    for key, value in values.items():
        options.add_session_config_entry(key, value)
    return options


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="file that `ssmcompress export --onnx` wrote")
    parser.add_argument("picture")
    parser.add_argument("--top", type=int, default=5, help="number of classes to show")
    parser.add_argument("--threads", type=int, default=0, help="onnxruntime threads (default: as the file says)")
    args = parser.parse_args()
    if args.threads < 0:
        parser.error(f"--threads {args.threads}: expected a number from 0")
    about = read_metadata(args.model)
    options = make_options(about, args.threads)
    session = onnxruntime.InferenceSession(args.model, options, providers=["CPUExecutionProvider"])
    (logits,) = session.run(["logits"], {"images": prepare(Image.open(args.picture), about)})
    odds = np.exp(logits[0] - logits[0].max())
    odds /= odds.sum()
    for index in np.argsort(-odds)[: args.top]:
        name = about["classes"][index] if about["classes"] else f"class {index}"
        print(f"{odds[index]:6.1%}  {name}")


if __name__ == "__main__":
    main()
