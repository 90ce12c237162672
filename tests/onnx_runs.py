"""Running ONNX files in tests, on one thread."""

from pathlib import Path

import onnxruntime


def open_session(graph):
    """A session of a file or of a graph in memory."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1  # its threads wait for each other by spinning
    content = str(graph) if isinstance(graph, (str, Path)) else graph.SerializeToString()
    return onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])


def run_file(file, images):
    """The logits that a file gives for images, as an array."""
    return open_session(file).run(None, {"images": images.numpy()})[0]
