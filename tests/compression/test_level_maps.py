"""Maps of output levels: their targets, their gain, and when nothing is changed."""

import pytest
import torch
from conftest import images_of, make_vmamba
from segmenters import MAKERS, make_vim_upernet, scene_tensors

import ssmcompress
from ssmcompress.compression.reconstruct.levels import HELD_OUT, map_levels
from ssmcompress.compression.reconstruct.linear import LinearSums
from ssmcompress.errors import InputError
from ssmcompress.models.level_maps import fill_level
from ssmcompress.ops import gather_tokens
from ssmcompress.pruning.plan import Plan, Stage


@pytest.fixture(params=MAKERS)
def segmenter(request):
    return MAKERS[request.param]()


def pruned_of(model, images, **options):
    return ssmcompress.prune(model, ssmcompress.calibrate(model, images, **{"ratio": 0.4, "stages": [2, 4]} | options))


@torch.no_grad()
def level_errors(model, dense, images):
    """The squared error of each output level."""
    theirs = dense.encode(images)[0].levels
    ours = model.encode(images)[0].levels
    parts = [model.level_maps[str(n)] if str(n) in model.level_maps else None for n in range(1, 5)]
    return [
        float((fill_level(level, maps) - other.fill()).square().sum())
        for level, other, maps in zip(ours, theirs, parts, strict=True)
    ]


def test_levels_come_closer_on_images_that_nothing_was_fitted_on(segmenter):
    fitted, unseen = scene_tensors(segmenter, 100), scene_tensors(segmenter, 20, seed=1)
    pruned = pruned_of(segmenter, fitted)
    mapped = map_levels(pruned, segmenter, fitted)
    assert not pruned.level_maps
    stale, ours = level_errors(pruned, segmenter, unseen), level_errors(mapped, segmenter, unseen)
    assert stale[0] == ours[0] == 0  # read before anything is dropped
    assert all(after < 0.95 * before for before, after in zip(stale[1:], ours[1:], strict=True))


@torch.no_grad()
def test_each_group_has_a_fit_of_its_own_on_images_held_out(segmenter):
    images = scene_tensors(segmenter, 40)
    pruned = pruned_of(segmenter, images)
    mapped = map_levels(pruned, segmenter, images)
    fits = {fit["weight"]: fit for fit in mapped.find_record("level_maps").values["fits"]}
    assert list(fits) == [
        "level 1, kept",
        *(f"level 2, {group}" for group in ("dropped by stage 1", "kept")),
        *(f"level {n}, {g}" for n in (3, 4) for g in ("dropped by stage 1", "dropped by stage 2", "kept")),
    ]
    held = images[torch.arange(40) % HELD_OUT == 1]
    level, target = (model.encode(held)[0].levels[3] for model in (mapped, segmenter))
    context = level.values.mean(1)
    for number, (name, positions) in enumerate(
        (("dropped by stage 1", level.dropped[0].positions), ("kept", level.positions)), 0
    ):
        group = 0 if number == 0 else 2
        values, expected = level.groups()[group], gather_tokens(target.values, positions)
        power = expected.square().sum()
        fit = fits[f"level 4, {name}"]
        assert float((values - expected).square().sum() / power) == pytest.approx(fit["before"], rel=1e-3)
        part = mapped.level_maps["4"][group]
        assert float((part(values, context) - expected).square().sum() / power) == pytest.approx(fit["after"], rel=1e-3)
        assert fit["after"] < fit["before"]


def test_a_reconstruction_fits_the_maps_of_its_own_weights(segmenter):
    images = scene_tensors(segmenter, 60)
    pruned = pruned_of(segmenter, images)
    rebuilt = ssmcompress.reconstruct(pruned, segmenter, images)
    record = rebuilt.find_record("reconstruction")
    assert record.kept
    assert record.kl_after < record.kl_before
    assert any(fit.weight.startswith("level 4") for fit in record.fits)
    assert rebuilt.level_maps
    changed = [
        n for n, v in rebuilt.backbone.state_dict().items() if not torch.equal(v, pruned.backbone.state_dict()[n])
    ]
    assert changed
    assert all(name.startswith(("layers.2.", "layers.3.", "layers.4.", "layers.5.")) for name in changed)


@pytest.mark.parametrize("make", [make_vim_upernet, make_vmamba])
@torch.no_grad()
def test_maps_of_tokens_that_are_read_as_zeros_are_fitted_to_zeros(make):
    """The recorded error after the maps is the error of the level that the model reads."""
    model = make()
    images = images_of(model, 40)
    pruned = ssmcompress.prune(model, Plan((Stage(2, 0.5),), gap="bias", fill="zero"))
    mapped = map_levels(pruned, model, images)
    fits = {fit["weight"]: fit for fit in mapped.find_record("level_maps").values["fits"]}
    level = next(level for level in range(1, mapped.levels + 1) if len(mapped.group_sizes(level)) == 2)
    held = images[1::5]
    (ours,), (theirs,) = (m.read_levels(held, [level]) for m in (mapped, model))
    filled = mapped.fill(level, ours)
    for name, positions in (("dropped by stage 1", ours.dropped[0].positions), ("kept", ours.positions)):
        found, expected = (gather_tokens(values, positions) for values in (filled, theirs.values))
        fit = fits[f"level {level}, {name}"]
        error = float((found - expected).square().sum() / expected.square().sum())
        assert error == pytest.approx(fit["after"], rel=1e-3)
    assert fits[f"level {level}, dropped by stage 1"]["before"] == pytest.approx(1)


def test_layers_that_all_tokens_enter_again_are_fitted_on_all_of_them(segmenter, monkeypatch):
    """There are 16 tokens, 10 after the stage in layer 2, and all of them again in the last of 6 layers."""
    counts, add = {}, LinearSums.add

    def spy(self, inputs, *arguments):
        counts.setdefault(self.linear, set()).add(inputs.shape[1])
        add(self, inputs, *arguments)

    monkeypatch.setattr(LinearSums, "add", spy)
    images = scene_tensors(segmenter, 20)
    pruned = ssmcompress.prune(segmenter, Plan((Stage(2, 0.4),), gap="bias", reenter=1))
    ssmcompress.reconstruct(pruned, segmenter, images)
    fitted = [found for linear, found in counts.items() if linear.out_features == segmenter.d_model]
    assert fitted[:4] == [{10}, {10}, {10}, {16}]  # the projections of layers 3 to 6, before the maps of levels


def test_the_result_does_not_depend_on_batches():
    model = make_vim_upernet()
    images = scene_tensors(model, 24)
    pruned = pruned_of(model, images)
    one, other = (map_levels(pruned, model, [images[k : k + size] for k in range(0, 24, size)]) for size in (24, 5))
    for key, value in one.level_maps.state_dict().items():
        assert torch.equal(value, other.level_maps.state_dict()[key])


def test_what_has_no_levels_to_map_is_refused(vim, images):
    with pytest.raises(InputError, match="a segmentation model that drops tokens"):
        map_levels(ssmcompress.prune(vim, ratio=0.3), vim, images)
    model = make_vim_upernet()
    with pytest.raises(InputError, match="a segmentation model that drops tokens"):
        map_levels(model, model, scene_tensors(model, 4))
    with pytest.raises(InputError, match="at least 2 images"):
        map_levels(ssmcompress.prune(model, ratio=0.3, stages=[2]), model, scene_tensors(model, 1))
    rotary = make_vim_upernet(level="rope")
    with pytest.raises(InputError, match="rotary positions cannot be reconstructed"):
        ssmcompress.reconstruct(ssmcompress.prune(rotary, ratio=0.3, stages=[2]), rotary, scene_tensors(rotary, 4))


def test_maps_are_of_stages_also_where_one_drops_nothing():
    model = make_vim_upernet()
    images = scene_tensors(model, 40)
    plan = ssmcompress.calibrate(model, images, ratio=[0.0, 0.4], stages=(2, 4))
    mapped = map_levels(ssmcompress.prune(model, plan), model, images)
    names = [fit["weight"] for fit in mapped.find_record("level_maps").values["fits"]]
    assert [name for name in names if name.startswith("level 3")] == [
        "level 3, dropped by stage 1", "level 3, dropped by stage 2", "level 3, kept",
    ]  # fmt: skip
    changed = [fit["weight"] for fit in mapped.find_record("level_maps").values["fits"] if fit["ridges"]]
    assert "level 3, dropped by stage 2" in changed
    assert not [name for name in changed if name.endswith("stage 1")]


@pytest.mark.parametrize("size", [(16, 16), (32, 16), (96, 48)])
def test_a_mapped_plain_mamba_takes_grids_where_a_stage_drops_nothing(tmp_path, size):
    model = MAKERS["plain_mamba"]()
    images = scene_tensors(model, 40)
    mapped = map_levels(pruned_of(model, images, ratio=0.3), model, images)
    x = torch.rand(2, 3, *size)
    with torch.no_grad():
        assert mapped(x).isfinite().all()
        folder = ssmcompress.save(mapped, tmp_path / "m")
        assert torch.equal(ssmcompress.load(folder)(x), mapped(x))
        assert torch.equal(ssmcompress.load(folder, image_size=size)(x), mapped(x))


def test_models_that_do_not_belong_together_are_refused():
    model, other = make_vim_upernet(), make_vim_upernet(out_layers=(2, 3, 5, 6))
    images = scene_tensors(model, 8)
    pruned = pruned_of(model, images)
    for dense in (other, MAKERS["plain_mamba"](), make_vim_upernet(d_model=24, d_inner=48)):
        with pytest.raises(InputError, match="differ in architecture or image size"):
            map_levels(pruned, dense, images)
