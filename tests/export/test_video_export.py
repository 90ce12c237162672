"""ONNX files of models of videos, dense and pruned: the same logits and the same kept tokens as in PyTorch."""

import numpy as np
import pytest
import torch
from conftest import images_of, make_video_mamba
from onnx_runs import open_session

import ssmcompress
from ssmcompress.export.graph import KEPT_PREFIX, assemble, trace
from ssmcompress.export.runtime import newest_opset
from ssmcompress.pruning.plan import Plan, Stage


@pytest.mark.parametrize("sizes", [{"frames": 4, "image": (8, 8)}, {"frames": 4, "tubelet": 2}, {}], ids=str)
@pytest.mark.parametrize("plan", [None, Plan((Stage(1, 0.4),))], ids=["dense", "pruned"])
def test_a_file_computes_what_the_model_does(sizes, plan):
    model = make_video_mamba(depth=2, **sizes)
    model = model if plan is None else ssmcompress.prune(model, plan)
    kept = [] if plan is None else [f"{KEPT_PREFIX}1"]
    session = open_session(assemble(trace(model, newest_opset()), "scan", debug_outputs=kept))
    for batch in (1, 3, 0):
        videos = images_of(model, batch)
        with torch.no_grad():
            expected, decisions = model.trace(videos)
        found, *positions = session.run(None, {"images": videos.numpy()})
        np.testing.assert_allclose(found, expected.numpy(), atol=1e-4, rtol=0)
        for decision, theirs in zip(decisions, positions, strict=True):
            np.testing.assert_array_equal(theirs, decision.kept.numpy())
