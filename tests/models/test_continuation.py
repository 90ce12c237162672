"""Further pruning of a pruned model: ratios refer to the dense model, and no dropped token is restored."""

import numpy as np
import pytest
import torch
from conftest import images_of, make_plain_mamba, make_vim, make_vit
from segmenters import make_vim_upernet

import ssmcompress
from ssmcompress.compression.calibrate import mean_deltas
from ssmcompress.errors import InputError
from ssmcompress.models.inputs import as_batches
from ssmcompress.pruning.alignment import Alignment
from ssmcompress.pruning.plan import Plan, Stage
from ssmcompress.pruning.schedules import tome_stages

MAKERS = {"vim": make_vim, "plain_mamba": make_plain_mamba, "vit": make_vit, "segmenter": make_vim_upernet}


def logits(model, images):
    with torch.no_grad():
        return model(images)


def assert_same(one, other):
    """Weights, gap deltas and probes, the plan and what it was calibrated to are the same to the last bit."""
    state, others = one.state_dict(), other.state_dict()
    assert state.keys() == others.keys()
    assert all(torch.equal(value, others[name]) for name, value in state.items())
    assert one.plan == other.plan
    for name in ("gap_deltas", "kept", "scores", "probes"):
        pairs = zip(getattr(one.plan.calibration, name), getattr(other.plan.calibration, name), strict=True)
        assert all(torch.equal(*pair) for pair in pairs), name


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("importance", [None, "saliency"])
def test_pruning_further_is_pruning_the_dense_model_where_nothing_was_refitted(name, importance):
    dense = MAKERS[name]()
    images = images_of(dense, 6)
    first = ssmcompress.prune(dense, ssmcompress.calibrate(dense, images, ratio=0.2, importance=importance))
    further = ssmcompress.prune(first, ssmcompress.calibrate(first, images, ratio=0.4))
    assert_same(
        further, ssmcompress.prune(dense, ssmcompress.calibrate(dense, images, ratio=0.4, importance=importance))
    )
    assert further.token_counts()[-1] < first.token_counts()[-1]
    again = ssmcompress.prune(first, ssmcompress.calibrate(first, images, ratio=0.2))
    assert_same(again, first)
    assert first.plan.stages[0].ratio == 0.2  # the argument is not changed


def test_the_old_plan_takes_the_place_of_the_defaults(vim):
    stages = Stage(1, 0.2, "l2"), Stage(3, 0.1, "clip")
    first = ssmcompress.prune(vim, Plan(stages, Alignment(conv=True, scan=False), gap="bias"))
    plan = ssmcompress.make_plan(first, ratio=(0.3, 0.5))
    assert [(s.after, s.ratio, s.importance) for s in plan.stages] == [(1, 0.3, "l2"), (3, 0.5, "clip")]
    assert plan.alignment == Alignment(conv=True, scan=False)
    given = ssmcompress.make_plan(first, stages=(1, 2), ratio=0.5, importance="mean", alignment=True)
    assert [(s.after, s.importance) for s in given.stages] == [(1, "mean"), (2, "mean")]
    assert given.alignment == Alignment()
    # The metrics of two stages do not apply to other stages.
    assert {s.importance for s in ssmcompress.make_plan(first, stages=(1, 2), ratio=0.5).stages} == {"clip"}


def test_whether_pruned_tokens_are_read_out_goes_with_the_classifier(plain_mamba):
    first = ssmcompress.prune(plain_mamba, ratio=0.2, alignment=Alignment(pool=True))
    for alignment in (None, True, Alignment(pool=True)):
        assert ssmcompress.make_plan(first, alignment=alignment).alignment.pool
    assert ssmcompress.make_plan(first, alignment=False).alignment == Alignment(False, False, pool=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ratio": 0.1}, "the model has 13 tokens left before layer 2, and by this plan it would have 16"),
        ({"ratio": (0.3, 0.0, 0.0)}, "the model has 10 tokens left before layer 3, and by this plan it would have 13"),
        (
            {"ratio": 0.9, "stages": (2,)},
            "the model has 13 tokens left before layer 2, and by this plan it would have 17",
        ),
    ],
)
def test_tokens_that_are_gone_do_not_come_back(vim, images, options, message):
    first = ssmcompress.prune(vim, ratio=0.3)
    for call in (lambda: ssmcompress.prune(first, **options), lambda: ssmcompress.calibrate(first, images, **options)):
        with pytest.raises(InputError, match=message + ": prune more .* or start from the dense model"):
            call()


def test_all_tokens_cannot_enter_again_where_they_did_not():
    model = make_vim_upernet()
    first = ssmcompress.prune(model, ratio=0.3, stages=(2,))
    again = Plan((Stage(2, 0.5),), gap="bias", reenter=2)
    with pytest.raises(InputError, match="tokens left before layer 5"):
        ssmcompress.prune(first, again)
    entering = ssmcompress.prune(model, Plan((Stage(2, 0.3),), gap="bias", reenter=2))
    assert ssmcompress.prune(entering, ratio=0.5).token_counts() == ssmcompress.prune(model, again).token_counts()


@pytest.mark.parametrize("name", ["vim", "plain_mamba", "vit"])
def test_a_reconstructed_model_keeps_its_weights_and_corrections(name, tmp_path):
    dense = MAKERS[name]()
    images = images_of(dense, 60)
    first = ssmcompress.reconstruct(ssmcompress.prune(dense, ratio=0.3, stages=(1, 2)), dense, images)
    assert len(first.corrections)
    assert first.find_record("reconstruction").kept
    plan = ssmcompress.calibrate(first, images, ratio=0.5)
    further = ssmcompress.prune(first, plan)
    kept, old = further.state_dict(), first.state_dict()
    assert kept.keys() == old.keys()
    assert all(torch.equal(kept[key], old[key]) for key in kept if not key.endswith("gap_delta"))
    refitted = ssmcompress.reconstruct(further, dense, images)
    assert refitted.find_record("reconstruction").kl_after < refitted.find_record("reconstruction").kl_before
    for number, model in enumerate((further, refitted)):
        loaded = ssmcompress.load(ssmcompress.save(model, tmp_path / str(number)))
        assert torch.equal(logits(loaded, images), logits(model, images))
        assert loaded.plan.stages == plan.stages


def test_gap_deltas_are_those_of_the_weights_without_corrections(vim):
    images = images_of(vim, 60)
    first = ssmcompress.reconstruct(ssmcompress.prune(vim, ratio=0.3, stages=(1, 2)), vim, images)
    assert len(first.corrections)
    assert len(first.class_corrections)
    same = make_vim()  # its weights, without a plan
    same.load_state_dict({key: value for key, value in first.state_dict().items() if key in same.state_dict()})
    expected = mean_deltas(same, as_batches(same, images))
    found = ssmcompress.calibrate(first, images, ratio=0.6).calibration.gap_deltas
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))


def test_a_trimmed_model_that_drops_tokens_drops_more(vim, tmp_path):
    images = images_of(vim, 30)
    trimmed = ssmcompress.trim_channels(
        ssmcompress.trim_states(ssmcompress.drop_layers(vim, [2]), 2, images), 24, images
    )
    first = ssmcompress.prune(trimmed, ssmcompress.calibrate(trimmed, images, ratio=0.2))
    further = ssmcompress.prune(first, ssmcompress.calibrate(first, images, ratio=0.5))
    assert_same(further, ssmcompress.prune(trimmed, ssmcompress.calibrate(trimmed, images, ratio=0.5)))
    assert further.origin == first.origin
    assert [step.kind for step in further.steps] == ["layers", "states", "channels"]
    loaded = ssmcompress.load(ssmcompress.save(further, tmp_path / "m"))
    assert torch.equal(logits(loaded, images), logits(further, images))


def test_images_that_were_learnt_from_add_up(vim, class_folders):
    from ssmcompress.data.batches import Batches
    from ssmcompress.data.find import open_images

    source = open_images(class_folders, 10)
    parts = [Batches(source, vim.transform(), index) for index in ([0, 1, 2], [2, 3])]
    model = vim
    for ratio, part in zip((0.3, 0.5), parts, strict=True):
        model = ssmcompress.reconstruct(ssmcompress.prune(model, ratio=ratio), vim, part)
    assert len(model.learnt.digests) == 4
    digests = np.union1d(*(part.digests[part.digests != 0] for part in parts))
    assert model.learnt.digests.tolist() == digests.tolist()


def test_a_fused_model_is_fused_further_and_a_merged_one_only_by_a_plan():
    vit = make_vit()
    fused = ssmcompress.prune(vit, ssmcompress.make_plan(vit, ratio=0.2, fuse=True))
    further = ssmcompress.prune(fused, ratio=0.5)
    assert further.plan.stages == ssmcompress.make_plan(vit, ratio=0.5, fuse=True).stages
    assert {s.merge for s in ssmcompress.make_plan(fused, ratio=0.5, importance="l2").stages} == {None}
    merged, more = (
        Plan(tome_stages(4, vit.length, vit.protected_count, count), Alignment(), gap="bias") for count in (1, 3)
    )
    first = ssmcompress.prune(vit, merged)
    for options in ({}, {"stages": (1, 2)}, {"importance": "attention"}):
        with pytest.raises(
            InputError, match=r"merges tokens in 4 layers \(bipartite\), which a ratio does not describe"
        ):
            ssmcompress.prune(first, ratio=0.4, **options)
    images = images_of(vit)
    assert torch.equal(logits(ssmcompress.prune(first, more), images), logits(ssmcompress.prune(vit, more), images))
    with pytest.raises(InputError, match="tokens left before layer 2"):
        ssmcompress.prune(ssmcompress.prune(vit, more), merged)


def test_maps_of_output_levels_stay_only_with_their_stages(recwarn):
    dense = make_vim_upernet()
    images = images_of(dense, 20)
    first = ssmcompress.map_levels(ssmcompress.prune(dense, ratio=0.2, stages=(2, 4)), dense, images)
    assert len(first.level_maps)
    further = ssmcompress.prune(first, ratio=0.4)
    assert further.level_maps.state_dict().keys() == first.level_maps.state_dict().keys()
    assert not [warning for warning in recwarn if "output levels" in str(warning.message)]
    with pytest.warns(UserWarning, match="the maps of output levels are for other stages and are left out"):
        others = ssmcompress.prune(first, ratio=0.4, stages=(1, 3, 4))
    assert not len(others.level_maps)
    assert others.find_record("level_maps") is None
    with torch.no_grad():
        assert others(images).isfinite().all()
