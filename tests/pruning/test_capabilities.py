"""Blocks that cannot give every score: what is refused, and what a search uses instead."""

import pytest
import torch
from conftest import make_vim

import ssmcompress
from ssmcompress.errors import InputError
from ssmcompress.models.base import ScanBlock
from ssmcompress.models.vim_block import VimBlock
from ssmcompress.ops import SCORES


@pytest.fixture
def few_scores(monkeypatch):
    """Blocks that give l1 and l2 alone."""
    monkeypatch.setattr(VimBlock, "scores", frozenset({"l1", "l2"}))


def test_scans_give_all_scores():
    assert ScanBlock.scores == set(SCORES)
    assert set(make_vim().importances) >= set(SCORES) | {"random", "saliency"}


def test_a_metric_that_a_block_cannot_give_is_refused_by_name(few_scores):
    model = make_vim()
    assert set(model.importances) == {"l1", "l2", "random", "saliency", "similarity"}
    refusal = r"importance 'clip': layer 1 of a vim has none; expected l1, l2, random, saliency"
    with pytest.raises(InputError, match=refusal):
        ssmcompress.make_plan(model, stages=(1,), importance="clip")
    with pytest.raises(InputError, match=refusal):
        ssmcompress.calibrate(model, torch.randn(4, *model.image_shape), stages=(1,), importance="clip")
    with pytest.raises(InputError, match=refusal):
        ssmcompress.search(model, torch.randn(8, *model.image_shape), flops=0.8, stages=(1,), importance="clip")
    ssmcompress.prune(model, ratio=0.3, stages=(1,), importance="l1")


def test_a_plan_for_another_model_is_refused(monkeypatch):
    plan = ssmcompress.make_plan(make_vim(), stages=(1,), importance="delta")
    monkeypatch.setattr(VimBlock, "scores", frozenset({"l1"}))
    with pytest.raises(InputError, match="importance 'delta': layer 1"):
        ssmcompress.prune(make_vim(), plan)


def test_a_search_uses_what_there_is(few_scores):
    model = make_vim(depth=4)
    plan = ssmcompress.search(model, torch.randn(24, *model.image_shape), flops=0.75)
    assert {stage.importance for stage in plan.stages} <= {"l1", "l2", "saliency"}
