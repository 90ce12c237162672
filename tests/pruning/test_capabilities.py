"""Blocks that are not scans, or lack some scores: supported features, rejections, and alternatives in a search."""

import pytest
import torch
from conftest import make_vim
from torch import nn

import ssmcompress
from ssmcompress.compression.search.axes import list_axes
from ssmcompress.errors import InputError
from ssmcompress.models.blocks import Block, ScanBlock
from ssmcompress.models.vim_block import VimBlock
from ssmcompress.ops import SCORES
from ssmcompress.pruning.plan import Plan


@pytest.fixture
def few_scores(monkeypatch):
    """Blocks that compute only l1 and l2."""
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


class Mixing(Block):
    """A layer without a scan: each token gets a map of itself and of the mean of all."""

    scores = frozenset({"l2"})

    def __init__(self, width):
        super().__init__()
        self.out = nn.Linear(2 * width, width)

    @property
    def refitted(self):
        return (("out",),)

    def begin(self, tokens, metric=None, protected_only=False):
        mean = tokens.features.mean(1, keepdim=True).expand_as(tokens.features)
        update = self.out(torch.cat([tokens.features, mean], dim=-1)).tanh()
        scores = update.square().sum(-1) if metric == "l2" else None
        return tokens.updated(tokens.features + update, scores)


@pytest.fixture
def mixed():
    """A Vim of four layers, the third of which is not a scan."""
    model = make_vim(depth=4, image=(32, 32))
    torch.manual_seed(0)
    model.blocks[2] = Mixing(model.d_model)
    return model.requires_grad_(False)


def test_layers_without_scans_are_pruned_calibrated_and_reconstructed(mixed):
    images = torch.randn(60, *mixed.image_shape, generator=torch.Generator().manual_seed(0))
    plan = ssmcompress.calibrate(mixed, images, stages=(1, 3), ratio=0.4, importance="l2")
    assert [tuple(delta.shape) for delta in plan.calibration.gap_deltas] == [(2, 32), (2, 32), (0,), (2, 32)]
    again = Plan.from_dict(plan.to_dict())
    assert again.to_dict() == plan.to_dict()
    pruned = ssmcompress.prune(mixed, again)
    assert pruned.token_counts()[-1] < mixed.length
    rebuilt = ssmcompress.reconstruct(pruned, mixed, images)
    record = rebuilt.find_record("reconstruction")
    assert "layers.2.out" in [fit.weight for fit in record.fits]
    assert record.kl_after < record.kl_before


def test_a_search_over_them_drops_tokens_alone_by_scores_that_all_layers_give(mixed):
    assert list_axes(mixed) == ()
    assert "clip" not in mixed.importances
    images = torch.randn(24, *mixed.image_shape, generator=torch.Generator().manual_seed(0))
    plan = ssmcompress.search(mixed, images, flops=0.75)
    assert {stage.importance for stage in plan.stages} <= {"l2", "saliency"}
    with pytest.raises(InputError, match="layer 3 of a vim has none"):
        ssmcompress.make_plan(mixed, stages=(1, 3), importance="clip")
    ssmcompress.make_plan(mixed, stages=(1,), importance="clip")  # the layer before the stage has it
    assert {stage.importance for stage in ssmcompress.make_plan(mixed, stages=(1, 3)).stages} == {"l2"}
