"""Output levels of pruned segmentation models: dropped tokens with last features, mapped, or re-entering."""

from dataclasses import replace

import pytest
import torch
from conftest import make_vim, make_vmamba
from segmenters import MAKERS, make_plain_mamba_upernet, make_vim_upernet, scene_tensors

import ssmcompress
from ssmcompress.errors import InputError
from ssmcompress.evaluation.flops import backbone_flops, flops_by_part
from ssmcompress.models.level_maps import LevelMap
from ssmcompress.pruning.plan import Plan, Stage

VIM_LEVELS = ("hidden", "residual", "residual_norm", "rope")


@pytest.fixture(params=[*VIM_LEVELS, "plain_mamba"])
def segmenter(request):
    return make_plain_mamba_upernet() if request.param == "plain_mamba" else make_vim_upernet(level=request.param)


@torch.no_grad()
def levels_of(model, images):
    return [level.fill() for level in model.encode(images)[0].levels]


@torch.no_grad()
def test_a_stage_that_drops_nothing_changes_nothing_to_the_bit(segmenter):
    images = scene_tensors(segmenter, 3)
    pruned = ssmcompress.prune(segmenter, ratio=0.0, stages=[2, 4])
    assert torch.equal(pruned(images), segmenter(images))


@torch.no_grad()
def test_a_dropped_token_is_read_as_it_was_last_seen(segmenter):
    """By an independent bookkeeping: all values of a run, token by token, after each layer."""
    images = scene_tensors(segmenter, 3)
    pruned = ssmcompress.prune(segmenter, ratio=0.4, stages=[2, 4])
    tokens, seen = pruned.embed(images), None
    expected = []
    for layer in range(1, 7):
        before = tokens
        block = pruned.blocks[layer - 1]
        tokens = pruned.observe(layer, block(before, metric="clip" if layer in (2, 4) else None))
        values = tokens.features if tokens.update is None else tokens.update
        seen = values.new_zeros(3, 16, 16) if seen is None else seen
        seen = rotated(pruned, layer, seen, tokens)
        index = tokens.explicit_positions()[..., None].expand_as(values)
        seen = seen.scatter(1, index, values)
        if layer in pruned.config.out_layers:
            expected.append(pruned.read_values(layer, seen))
        if str(layer) in pruned.pruners:
            tokens = pruned.pruners[str(layer)](tokens)
    found = levels_of(pruned, images)
    assert [level.shape for level in found] == [(3, 16, 16)] * 4
    for level, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(level, theirs, atol=1e-6, rtol=1e-5)


def rotated(model, layer, seen, tokens):
    """With a rotary embedding, the stream of dropped tokens is rotated like that of the others."""
    if model.is_residual or layer == len(model.blocks) or tokens.positions is None:
        return seen
    return model._rotate(seen, None)


@torch.no_grad()
def test_zero_filling_reads_nothing_of_dropped_tokens():
    model = make_vim_upernet(level="residual")
    images = scene_tensors(model, 2)
    pruned = ssmcompress.prune(model, Plan((Stage(2, 0.5),), gap="bias", fill="zero"))
    stale = ssmcompress.prune(model, Plan((Stage(2, 0.5),), gap="bias"))
    assert not torch.equal(pruned(images), stale(images))
    dropped = {}
    for name, model in (("zero", pruned), ("stale", stale)):
        level = model.encode(images)[0].levels[-1]
        dropped[name] = level.dropped[0].values
    torch.testing.assert_close(dropped["zero"], dropped["stale"])  # only the readout differs


@pytest.mark.parametrize(
    ("make", "option", "message"),
    [
        (make_vim, {"reenter": 1}, "`reenter` is for models that read out every position"),
        (make_vmamba, {"reenter": 1}, "`reenter` is for models that read out every position"),
        (make_vim, {"fill": "zero"}, "`fill` 'zero' says what is read of dropped tokens, and this vim reads nothing"),
    ],
    ids=["reenter vim", "reenter vmamba", "fill vim"],
)
def test_what_a_model_does_not_read_is_refused(make, option, message):
    """A VMamba has levels, but all tokens are restored at the end of each section in any case."""
    with pytest.raises(InputError, match=message):
        ssmcompress.prune(make(), Plan((Stage(2, 0.5),), gap="bias", **option))


@torch.no_grad()
def test_all_tokens_enter_the_last_layers_again(segmenter):
    images = scene_tensors(segmenter, 2)
    plan = Plan((Stage(2, 0.4),), gap="bias", reenter=2)
    pruned = ssmcompress.prune(segmenter, plan)
    assert pruned.token_counts() == [16, 16, 10, 10, 16, 16, 16]
    tokens, _ = pruned.encode(images)
    assert tokens.positions is None
    assert tokens.features.shape == (2, 16, 16)
    assert [len(level.dropped) for level in tokens.levels] == [0, 1, 0, 0]
    with pytest.raises(InputError, match="the last stage is after layer 3 at the latest, not after 4"):
        ssmcompress.prune(segmenter, replace(plan, stages=(Stage(4, 0.4),)))


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
@torch.no_grad()
def test_a_pruned_model_reloads_with_the_same_logits(make, tmp_path):
    model = make()
    images = scene_tensors(model, 20)
    pruned = ssmcompress.prune(model, ssmcompress.calibrate(model, images, ratio=0.3, stages=[2, 4]))
    rebuilt = ssmcompress.reconstruct(pruned, model, images)
    for number, one in enumerate((pruned, ssmcompress.prune(model, Plan((Stage(1, 0.4),), gap="bias", reenter=1)))):
        ssmcompress.save(one, tmp_path / str(number))
        assert torch.equal(ssmcompress.load(tmp_path / str(number))(images), one(images))
    mapped = map_all(rebuilt)
    ssmcompress.save(mapped, tmp_path / "m")
    again = ssmcompress.load(tmp_path / "m")
    assert torch.equal(again(images), mapped(images))
    assert flops_by_part(again) == flops_by_part(mapped)


def map_all(model):
    """The model with a map for every group of every level."""
    generator = torch.Generator().manual_seed(0)
    for number, level in enumerate(model.encode(scene_tensors(model, 1))[0].levels, 1):
        parts = torch.nn.ModuleList(LevelMap(model.d_model) for _ in level.groups())
        for weight in parts.parameters():
            weight.data.normal_(0, 0.2, generator=generator)
        model.level_maps[str(number)] = parts
    return model


@torch.no_grad()
def test_maps_count_in_the_flops_of_the_backbone():
    model = ssmcompress.prune(make_vim_upernet(), ratio=0.5, stages=[2, 4])
    before = backbone_flops(model)["full"]
    map_all(model)
    # Level 1: 16 kept. Level 2: 8 and 8. Levels 3 and 4: 8, 4 and 4. Each group has its mean, besides.
    tokens = (16 + 1) + (8 + 8 + 2) + 2 * (8 + 4 + 4 + 3)
    assert flops_by_part(model)["corrections"] == pytest.approx(tokens * 16**2 / 1e9)
    assert backbone_flops(model)["full"] == pytest.approx(before + tokens * 16**2 / 1e9)
    assert backbone_flops(ssmcompress.prune(make_vim_upernet(), ratio=0.0, stages=[2]))["full"] > before


def test_maps_that_do_not_belong_to_the_model_are_refused(tmp_path):
    model = ssmcompress.prune(make_vim_upernet(), ratio=0.5, stages=[2])
    model.level_maps["1"] = torch.nn.ModuleList([LevelMap(16), LevelMap(16)])  # before any stage: one group
    for weight in model.level_maps.parameters():
        weight.data.zero_()
    ssmcompress.save(model, tmp_path / "m")
    with pytest.raises(InputError, match="do not belong to the model"):
        ssmcompress.load(tmp_path / "m")


@torch.no_grad()
def test_other_sizes_of_images_are_pruned_too():
    model = make_plain_mamba_upernet()
    images = torch.randn(2, 3, 72, 104)
    for importance in ("clip", "random"):
        pruned = ssmcompress.prune(model, ratio=0.4, stages=[2], importance=importance)
        assert pruned(images).shape == (2, 5, 72, 104)
        level = pruned.encode(images)[0].levels[-1]
        assert level.values.shape[1] == 21  # 60 % of 5 x 7
        assert level.fill().shape == (2, 35, 16)
