"""Running ONNX files in tests."""

import onnxruntime


def run_file(file, images):
    """The logits that a file gives for images, as an array."""
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    return session.run(None, {"images": images.numpy()})[0]
