"""The methods of a comparison for a model, and the stages with which they reach a level."""

from dataclasses import replace

import pytest
from conftest import make_plain_mamba, make_vim, make_vmamba
from segmenters import make_vim_upernet
from torch import nn

from ssmcompress.compression.smaller_image import choose_image_size
from ssmcompress.errors import InputError
from ssmcompress.evaluation.flops import flops_of, remaining_share
from ssmcompress.jobs.methods import (
    METHODS,
    Method,
    choose_methods,
    find_obstacle,
    list_obstacles,
    make_levels,
    merge_every_second,
    remove_steadily,
    stages_for_level,
)
from ssmcompress.models.blocks import Block
from ssmcompress.models.vim_block import VimBlock
from ssmcompress.pruning.alignment import UNALIGNED
from ssmcompress.pruning.plan import Stage, share_removed, token_counts

ATTENTION = ("attention", "keys")  # metrics that scans do not have
CLASSIFIERS = tuple(m for m in METHODS if not m.of_levels and m.importance not in ATTENTION)


class WithoutScan(Block):
    """A layer without a scan, which computes only the score l2."""

    scores = frozenset({"l2"})

    def __init__(self, width):
        super().__init__()
        self.out = nn.Linear(width, width)

    @property
    def refitted(self):
        return (("out",),)

    def begin(self, tokens, metric=None):
        update = self.out(tokens.features)
        return tokens.updated(tokens.features + update, update.square().sum(-1) if metric == "l2" else None)


@pytest.fixture
def without_scan():
    """A Vim without scans: with respect to methods, like an attention architecture."""
    model = make_vim(depth=4)
    for layer in range(4):
        model.blocks[layer] = WithoutScan(model.d_model)
    return model


def everything(model):
    return {method.name for method in choose_methods(model, None, search=True, reconstruct=True)}


@pytest.mark.parametrize("make", [make_vim, make_plain_mamba])
def test_a_model_of_scans_has_all_methods_of_classifiers(make):
    assert choose_methods(make(), None, search=True, reconstruct=True) == CLASSIFIERS


def test_a_model_without_scans_has_what_its_layers_can_do(without_scan):
    names = everything(without_scan)
    assert {"l2", "random", "saliency", "R-MeeTo", "search, reconstructed", "smaller image"} <= names
    assert not any("aligned" in name for name in names)
    assert not names & {"naive", "l1", "delta", "unclipped", "MTR", "all axes", "states, reconstructed"}


def test_alignment_needs_a_scan_in_every_layer():
    """One layer without a scan excludes alignment and the axes, but not metrics that all layers support."""
    model = make_vim(depth=4)
    before = everything(model)
    model.blocks[2] = WithoutScan(model.d_model)
    left_out = before - everything(model)
    assert {"l2, aligned", "clip, aligned", "clip, conv aligned", "channels, reconstructed", "naive"} <= left_out
    assert "l2" not in left_out


def test_a_metric_that_the_layers_do_not_compute_is_left_out(monkeypatch):
    monkeypatch.setattr(VimBlock, "scores", frozenset({"l1", "l2"}))
    names = everything(make_vim())
    assert {"l1", "l2, aligned", "saliency, aligned", "all axes"} <= names
    assert not names & {"naive", "delta", "clip, aligned", "MTR, reconstructed"}


def test_a_segmentation_model_has_methods_of_its_own():
    names = everything(make_vim_upernet())
    assert {"zero-filled", "naive, mapped"} <= names
    assert not any("smaller image" in name for name in names)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("clip, aligned", "method 'clip, aligned' ranks tokens by 'clip', which the layers of this vim do not compute"),
        ("l2, aligned", "method 'l2, aligned' aligns scans, and this vim has layers without one"),
        ("states, reconstructed", "trims states, and this vim has none that can be trimmed"),
        ("all axes", "trims states, channels or layers, and this vim has none that can be trimmed"),
        ("zero-filled", "is only for segmentation models"),
    ],
)
def test_a_method_that_one_model_cannot_carry_out_is_refused_by_name(without_scan, name, says):
    with pytest.raises(InputError, match=says):
        choose_methods(without_scan, ["l2", name])
    assert list(list_obstacles(without_scan, ["l2", name])) == [name]
    assert [method.name for method in choose_methods(without_scan, ["l2"])] == ["l2"]


def test_an_axis_that_has_nothing_to_spare_is_left_out():
    model = make_vim(d_state=1)
    obstacle = find_obstacle(next(m for m in METHODS if m.name == "states, reconstructed"), model)
    assert "trims states" in obstacle
    assert "channels, reconstructed" in everything(model)


# ------------------------------------------------------------------------------------------------------------- stages


def own_method(layers):
    """A method that drops a number of tokens after each of these layers, whatever stages are asked for."""

    def make(method, model, number):
        stages, count = [], model.length
        for layer in layers:
            kept = max(2, count - number)
            stages.append(Stage(layer, share_removed(count, kept, 1), method.importance))
            count = kept
        return stages

    return make, Method("own", "l2", UNALIGNED, stages=remove_steadily(make))


@pytest.mark.parametrize("layers", [(1, 2, 3, 4, 5), (2, 5)])
def test_a_method_brings_its_own_rule_for_stages(layers):
    model, (make, method) = make_vim(depth=6, image=(40, 40)), own_method(layers)
    (level,) = make_levels(model, (2, 4), [0.2])
    stages = stages_for_level(method, model, level, (2, 4))
    assert [stage.after for stage in stages] == list(layers)
    counts = token_counts(6, model.length, stages, 1)
    removed = {counts[layer - 1] - counts[layer] for layer in layers}
    assert len(removed) == 1
    fewer = make(method, model, removed.pop() - 1)
    assert remaining_share(model, stages) <= level.flops < remaining_share(model, fewer)
    (zero,) = make_levels(model, None, [0])
    assert {stage.ratio for stage in stages_for_level(method, model, zero, None)} == {0.0}


def test_r_meeto_merges_before_every_second_layer_from_the_third_on():
    model = make_vim(depth=7, image=(40, 40))
    method = next(method for method in METHODS if method.name == "R-MeeTo")
    (level,) = make_levels(model, (2, 4), [0.2])
    stages = stages_for_level(method, model, level, (2, 4))
    assert [(stage.after, stage.importance, stage.merge) for stage in stages] == [
        (after, "similarity", "ordered") for after in (2, 4, 6)
    ]


def test_r_meeto_merges_as_many_tokens_in_every_section():
    """Or half of those that there are; not where a section ends, since all tokens are there again after it."""
    model = make_vmamba(depths=(3, 1, 6, 3), image=(64, 64))
    method = next(method for method in METHODS if method.name == "R-MeeTo")
    stages = merge_every_second(method, model, 5)
    assert [stage.after for stage in stages] == [2, 6, 8, 12]
    assert model.counts_for(stages) == [256, 256, 251, 251, 64, 64, 16, 16, 11, 11, 6, 6, 6, 4, 4, 2, 2]


def test_merging_that_does_not_save_as_much_says_so():
    model = make_vim(depth=4, image=(40, 40))
    (level,) = make_levels(model, (1,), [0.95])
    method = next(method for method in METHODS if method.name == "R-MeeTo")
    with pytest.raises(InputError, match=r"R-MeeTo cannot reach \d+.\d%: a stage merges half of its tokens at most"):
        stages_for_level(method, model, level, None)


def test_the_smaller_image_counts_tokens_without_a_patch_once():
    """In a model with further special tokens, all of them stay when patches are dropped."""

    class TwoMore(type(make_vim())):
        @property
        def length(self):
            return super().length + 2

    model = make_vim(image=(32, 32))
    model.__class__ = TwoMore
    size = choose_image_size(model, 0.6)
    patches = (size[0] // 4) * (size[1] // 4)
    config = replace(model.config, image_size=size)
    share = flops_of(model, config, [patches + 3] * 5)
    assert share <= 0.6
    bigger = replace(model.config, image_size=(size[0] + 4, size[1] + 4))
    assert flops_of(model, bigger, [bigger.patches + 3] * 5) > 0.6
    # A level between the counts with and without them tells them apart.
    between = (share + flops_of(model, config, [patches + 1] * 5)) / 2
    assert choose_image_size(model, between) != size
