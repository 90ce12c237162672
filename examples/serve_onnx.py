"""Classify a picture with an exported ONNX file; nothing of ssmcompress is needed, nor torch.

    python examples/serve_onnx.py model.onnx picture.jpg

It needs numpy, Pillow and onnxruntime. How pictures are prepared, and the names of the classes, are in the file.
"""

import argparse
import json

import numpy as np
import onnxruntime
from PIL import Image


def prepare(picture: Image.Image, about: dict) -> np.ndarray:
    """(1, channels, height, width) float32: resized so that the crop fits, cut from the centre, normalised."""
    shape, how = about["architecture"], about["preprocessing"]
    height, width = shape["image_size"]
    mean, std = (np.array(how[name], np.float32).reshape(-1, 1, 1) for name in ("mean", "std"))
    picture = picture.convert("L" if shape["in_chans"] == 1 else "RGB")
    wanted = [int(side / how["crop_pct"]) for side in (width, height)]
    scale = max(side / has for side, has in zip(wanted, picture.size, strict=True))
    whole = int if height == width else round  # as torchvision and timm do it
    size = [max(cut, whole(has * scale)) for cut, has in zip((width, height), picture.size, strict=True)]
    picture = picture.resize(size, Image.Resampling[how["interpolation"].upper()])
    left, top = (round((has - cut) / 2) for cut, has in zip((width, height), picture.size, strict=True))
    picture = picture.crop((left, top, left + width, top + height))
    pixels = np.asarray(picture, np.float32).reshape(height, width, -1).transpose(2, 0, 1) / 255
    return ((pixels - mean) / std)[None]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="file that `ssmcompress export --onnx` wrote")
    parser.add_argument("picture")
    parser.add_argument("--top", type=int, default=5, help="classes to show")
    args = parser.parse_args()
    session = onnxruntime.InferenceSession(args.model, providers=["CPUExecutionProvider"])
    about = json.loads(session.get_modelmeta().custom_metadata_map["ssmcompress"])
    (logits,) = session.run(["logits"], {"images": prepare(Image.open(args.picture), about)})
    odds = np.exp(logits[0] - logits[0].max())
    odds /= odds.sum()
    for index in np.argsort(-odds)[: args.top]:
        name = about["classes"][index] if about["classes"] else f"class {index}"
        print(f"{odds[index]:6.1%}  {name}")


if __name__ == "__main__":
    main()
