"""Write logits of an exported ONNX file in onnxruntime, with the input images, as JSON for checking other runtimes.

python examples/sample_run.py model.onnx sample.json
"""

import json
import sys

import numpy as np
import onnxruntime
from PIL import Image
from serve_onnx import prepare
from sklearn.datasets import load_sample_images

session = onnxruntime.InferenceSession(sys.argv[1], providers=["CPUExecutionProvider"])
about = json.loads(session.get_modelmeta().custom_metadata_map["ssmcompress"])
images = np.concatenate([prepare(Image.fromarray(photograph), about) for photograph in load_sample_images().images])
(logits,) = session.run(["logits"], {"images": images})
with open(sys.argv[2], "w", encoding="utf-8") as file:
    json.dump({"shape": images.shape, "images": images.ravel().tolist(), "logits": logits.ravel().tolist()}, file)
