"""timm's interface of the models: separate features and head, features of any layer, new classes, preprocessing."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import timm.data
import timm.optim
import torch
from conftest import GOLDEN, images_of, make_plain_mamba, make_vim, make_vit
from PIL import Image
from segmenters import make_plain_mamba_upernet, make_vim_upernet
from timm.models._features import FeatureGetterNet
from timm.models.vision_transformer import VisionTransformer as TimmViT

import ssmcompress
from ssmcompress.data.images import Images
from ssmcompress.errors import InputError
from ssmcompress.models.blocks import low_rank
from ssmcompress.models.checkpoint import find_dense
from ssmcompress.pruning.plan import Plan, Stage

MAKERS = {
    "vim": make_vim,
    "plain_mamba": make_plain_mamba,
    "deit": make_vit,
    "distilled": lambda **sizes: make_vit(distillation_token=True, **sizes),
    "mean": lambda **sizes: make_vit(pool="avg", fc_norm=True, **sizes),
}
FORMS = ("dense", "naive", "aligned", "reconstructed")
made = {}


def make(name, form):
    """A model of three layers with stages after the first two; the models are shared, and not to be changed."""
    if (name, form) not in made:
        dense = make(name, "dense") if form != "dense" else None
        if form == "dense":
            model = MAKERS[name](depth=3)
        elif form == "reconstructed":
            model = ssmcompress.reconstruct(make(name, "aligned"), dense, images_of(dense, 30, seed=3))
        else:
            plan = ssmcompress.make_plan(dense, stages=(1, 2), ratio=0.4, alignment=form == "aligned")
            model = ssmcompress.prune(dense, plan)
        made[name, form] = model.requires_grad_(False)
    return made[name, form]


@pytest.fixture(params=[(name, form) for name in MAKERS for form in FORMS], ids="-".join)
def any_model(request):
    return make(*request.param)


@pytest.fixture(params=["vim", "plain_mamba", "deit"])
def pruned(request):
    """A copy that may be changed, with a correction of its logits where a mean is read out."""
    model = copy.deepcopy(make(request.param, "reconstructed"))
    return correct(model) if model.pools else model


def correct(model):
    model.readout_correction = low_rank(model.segments * (model.d_model + 1), 3, model.num_classes)
    for seed, linear in enumerate(model.readout_correction):
        linear.weight.data.normal_(0, 0.1, generator=torch.Generator().manual_seed(seed))
    return model


def assert_near(found, expected, tolerance=1e-6):
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance * float(expected.detach().abs().max()))


def colours(classes, each=4):
    """Images of 16 x 16 or other pixels, a class in one colour, with a little noise."""

    def draw(i):
        pixels = np.random.default_rng(i).integers(0, 40, (64, 64, 3), dtype=np.uint8)
        pixels[..., i % classes] += 200
        return Image.fromarray(pixels)

    labels = tuple(i % classes for i in range(classes * each))
    return Images("colours", len(labels), draw, lambda i: f"image {i}", labels=labels)


# -------------------------------------------------------------------------------------------------- features and head


def test_the_head_of_the_features_gives_the_logits(any_model):
    images = images_of(any_model)
    features = any_model.forward_features(images)
    assert features.shape == (5, any_model.token_counts()[-1], any_model.num_features)
    assert_near(any_model.forward_head(features), any_model(images), 2e-6)
    read = any_model.forward_head(features, pre_logits=True)
    assert read.shape == (5, any_model.head_hidden_size)
    if any_model.readout_correction is None:
        assert_near(any_model.get_classifier()(read), any_model(images), 2e-6)


@pytest.mark.parametrize("form", FORMS)
def test_the_class_token_of_a_vim_comes_first_and_patches_stay_in_order(form):
    model, images = make("vim", form), images_of(make("vim", form))
    tokens, _ = model.encode(images)
    for image, features in enumerate(model.forward_features(images)):
        normed = model.norm_f(tokens.features[image])
        place = int(tokens.protected_index()[image])
        torch.testing.assert_close(features, torch.cat([normed[place, None], normed[:place], normed[place + 1 :]]))
    assert form == "dense" or len({int(i) for i in tokens.protected_index()}) > 1  # where it lies differs by image


def test_a_correction_of_the_logits_and_the_mean_over_dropped_tokens_travel_with_the_features():
    model = correct(copy.deepcopy(make("plain_mamba", "reconstructed")))
    model.alignment = replace(model.alignment, pool=True)
    images = images_of(model)
    features = model.forward_features(images)
    assert_near(model.forward_head(features), model(images))
    for without in (features.clone(), features[:2]):
        with pytest.raises(InputError, match="pass the very tensor that forward_features returned"):
            model.forward_head(without)
    model.readout_correction = None
    with pytest.raises(InputError, match="sums over dropped tokens"):
        model.forward_head(features.clone())


def test_features_have_gradients():
    model = copy.deepcopy(make("vim", "aligned")).requires_grad_(True)
    model.forward_head(model.forward_features(images_of(model))).sum().backward()
    assert all(p.grad is not None for p in model.layers[0].parameters())


# ---------------------------------------------------------------------------------------------------- timm's own model


@pytest.fixture(scope="module")
def golden():
    """The golden DeiT as this package's model and as timm's, and images for both."""
    ours = ssmcompress.load(GOLDEN / "deit.pth", num_heads=3)
    c = ours.config
    theirs = TimmViT(
        c.image_size, c.patch_size[0], num_classes=c.num_classes, embed_dim=c.d_model, depth=c.depth,
        num_heads=c.num_heads, mlp_ratio=c.mlp_dim / c.d_model,
    )  # fmt: skip
    theirs.load_state_dict(ssmcompress.load(GOLDEN / "deit.pth", num_heads=3).state_dict())
    with np.load(GOLDEN / "deit.npz") as file:
        images = torch.from_numpy(file["images"]).float()
    return ours.requires_grad_(False), theirs.eval().requires_grad_(False), images


def test_features_are_those_of_timm(golden):
    ours, theirs, images = golden
    features = ours.forward_features(images)
    torch.testing.assert_close(features, theirs.forward_features(images), rtol=0, atol=1e-5)
    for pre_logits in (False, True):
        expected = theirs.forward_head(theirs.forward_features(images), pre_logits=pre_logits)
        torch.testing.assert_close(ours.forward_head(features, pre_logits=pre_logits), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "options",
    [{}, {"indices": 3, "norm": True}, {"indices": [-1, 2, 2, 0], "output_fmt": "NLC"}, {"return_prefix_tokens": True},
     {"indices": (1, 4), "stop_early": True}, {"indices": [5], "intermediates_only": True}],
    ids=lambda options: "-".join(options) or "all",
)  # fmt: skip
def test_intermediates_are_those_of_timm(golden, options):
    ours, theirs, images = golden
    found, expected = (model.forward_intermediates(images, **options) for model in (ours, theirs))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_what_timm_says_of_its_model(golden):
    ours, theirs, _ = golden
    for name in ("num_classes", "num_features", "head_hidden_size", "num_prefix_tokens", "global_pool", "feature_info"):
        assert getattr(ours, name) == getattr(theirs, name), name


# ----------------------------------------------------------------------------------------- features of layers on a grid


def last_seen(model, images, layer):
    """Features at all positions, gathered token by token from every layer up to `layer` (from 1)."""
    tokens = model.embed(images)
    filled = torch.zeros(len(images), model.length, model.d_model)
    for run in model.run_layers(tokens, range(1, layer + 1)):
        # All tokens are recorded at the stage, and the kept ones also after the layer.
        unpruned = copy.copy(model)
        unpruned._modules = {**model._modules, "pruners": torch.nn.ModuleDict()}
        for part in (unpruned.begin(run.layer, run.before)[0], run.after):
            for image, positions in enumerate(part.explicit_positions()):
                filled[image, positions] = part.features[image]
    return filled


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ["vim", "plain_mamba", "deit"])
def test_dropped_tokens_are_as_last_seen_on_the_full_grid(name, form):
    model, images = make(name, form), images_of(make(name, form), 3)
    rows, columns = model.config.grid
    final, found = model.forward_intermediates(images)
    assert_near(final, model.forward_features(images))
    for layer, features in enumerate(found, 1):
        assert features.shape == (3, model.d_model, rows, columns)
        expected = last_seen(model, images, layer)[:, model.patch_positions.flatten()]
        assert_near(features, expected.transpose(1, 2).unflatten(2, (rows, columns)))
    _, flat = model.forward_intermediates(images, output_fmt="NLC", norm=True, return_prefix_tokens=True, indices=1)
    (patches, prefix) = flat[0] if model.num_prefix_tokens else (flat[0], None)
    assert_near(patches, model.normalise(found[-1].flatten(2).transpose(1, 2)))
    if prefix is not None:
        assert_near(prefix[:, 0], model.forward_features(images)[:, 0])


@pytest.mark.parametrize("merge", ["fused", "bipartite"])
def test_tokens_that_are_merged_leave_no_hole_in_the_grid(merge):
    dense = make_vit(depth=3)
    stages = [Stage(layer, 0.3, "attention" if merge == "fused" else "keys", merge) for layer in (1, 2)]
    model = ssmcompress.prune(dense, Plan(tuple(stages), gap="bias"))
    images = images_of(model, 3)
    with torch.no_grad():
        maps = model.forward_intermediates(images, intermediates_only=True)
        tokens, _ = model.encode(images)
    flat = maps[-1].flatten(2).transpose(1, 2)
    assert (flat.abs().sum(-1) > 0).all()
    for image, positions in enumerate(tokens.positions):
        kept = (positions >= 1) & (positions < model.length)
        assert_near(flat[image, positions[kept] - 1], tokens.features[image, kept])


@pytest.mark.parametrize("make_model", [make_vim_upernet, make_plain_mamba_upernet])
def test_segmentation_models_have_features_too(make_model):
    model = ssmcompress.prune(make_model(), Plan((Stage(2, 0.5, "l2"),), gap="bias"))
    images = images_of(model, 2)
    with torch.no_grad():
        final, maps = model.forward_intermediates(images, indices=[1, 5])
        assert model.forward_features(images).shape == final.shape == (2, model.token_counts()[-1], 16)
    assert [tuple(x.shape) for x in maps] == [(2, 16, 4, 4)] * 2
    with pytest.raises(InputError, match="reads 4 layers: call the model"):
        model.forward_head(final)
    model.reset_classifier(3)
    assert model(images).shape == (2, 3, 64, 64)
    with pytest.raises(InputError, match="at least 1"):
        model.reset_classifier(0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"indices": 4}, "1 to 3 of them"),
        ({"indices": [0, 3]}, "-3 to 2"),
        ({"indices": []}, "-3 to 2"),
        ({"output_fmt": "NHWC"}, "'NCHW', 'NLC'"),
    ],
)
def test_layers_and_formats_that_there_are_not_are_refused(options, message):
    model = make("vim", "dense")
    with pytest.raises(InputError, match=message):
        model.forward_intermediates(images_of(model), **options)


@pytest.mark.parametrize("name", MAKERS)
def test_timm_takes_it_for_a_backbone(name):
    model = make(name, "aligned")
    backbone = FeatureGetterNet(model, out_indices=(0, -1))
    maps = backbone(images_of(model))
    assert [x.shape[1] for x in maps] == backbone.feature_info.channels()
    side = model.config.image_size[0]
    assert [side // x.shape[2] for x in maps] == backbone.feature_info.reduction()
    assert [model.get_submodule(name) for name in backbone.feature_info.module_name()] == [
        model.blocks[0],
        model.blocks[2],
    ]


# -------------------------------------------------------------------------------------------------------- other classes


@torch.no_grad()
def test_a_new_classifier_has_other_classes_and_the_model_is_saved_and_loaded(pruned, tmp_path):
    model, images = pruned, images_of(pruned)
    corrections = {k: v.clone() for k, v in model.state_dict().items() if "corrections." in k}
    before = model.forward_head(model.forward_features(images), pre_logits=True)
    model.reset_classifier(3)
    assert model.num_classes == model.config.num_classes == model.pretrained_cfg["num_classes"] == 3
    assert model.readout_correction is None
    assert {k for k in model.state_dict() if "corrections." in k} == set(corrections)
    assert_near(model.forward_head(model.forward_features(images), pre_logits=True), before)
    loaded = ssmcompress.load(ssmcompress.save(model, tmp_path / "three"))
    assert loaded.config == model.config
    assert model(images).shape == (5, 3)
    torch.testing.assert_close(loaded(images), model(images), rtol=0, atol=0)
    assert loaded.find_record("classifier").values == {"classes": 3, "before": 10, "source_sha256": None}


@torch.no_grad()
def test_a_model_without_classes_returns_features_and_is_saved_and_loaded(pruned, tmp_path):
    model, images = pruned, images_of(pruned)
    read = model.forward_head(model.forward_features(images), pre_logits=True)
    model.reset_classifier(0)
    assert isinstance(model.get_classifier(), torch.nn.Identity)
    assert_near(model(images), read, 2e-6)
    loaded = ssmcompress.load(ssmcompress.save(model, tmp_path / "none"))
    assert loaded.num_classes == 0
    torch.testing.assert_close(loaded(images), model(images), rtol=0, atol=0)
    assert loaded.bfloat16()(images.bfloat16()).shape == read.shape
    loaded = loaded.float()
    loaded.reset_classifier(4)
    assert loaded(images).shape == (5, 4)


@torch.no_grad()
def test_a_trimmed_model_gets_other_classes(tmp_path):
    model = ssmcompress.drop_layers(make("vim", "dense"), [2])
    model.reset_classifier(3)
    loaded = ssmcompress.load(ssmcompress.save(model, tmp_path / "trimmed"))
    assert loaded.dense_config.num_classes == 3
    torch.testing.assert_close(loaded(images_of(loaded)), model(images_of(model)), rtol=0, atol=0)


def test_the_dense_model_is_not_compared_with_after_a_new_classifier(checkpoint, tmp_path):
    """With as many classes as before it would be, and agreement would be that of different classes."""
    model = ssmcompress.prune(ssmcompress.load(checkpoint), ratio=0.4)
    assert find_dense(model).plan is None
    digest = model.source.sha256
    model.reset_classifier(10)
    for again in (model, ssmcompress.load(ssmcompress.save(model, tmp_path / "again"))):
        with pytest.raises(InputError, match="never a file"):
            find_dense(again)
        assert again.find_record("classifier").values["source_sha256"] == digest


def test_the_names_of_the_old_classes_go():
    model = make_vim(depth=2)
    model.classes, model.palette, model.reduce_zero_label = tuple("abcdefghij"), ((0, 0, 0),) * 10, True
    model.reset_classifier(2)
    assert (model.classes, model.palette, model.reduce_zero_label) == (None, None, None)


def test_classes_of_the_former_dense_model_are_not_mixed_with_new_ones(checkpoint, class_folders, tmp_path):
    dense = ssmcompress.load(checkpoint)
    pruned, images = ssmcompress.prune(dense, ratio=0.3), images_of(dense)
    pruned.reset_classifier(dense.num_classes)
    for mix in (
        lambda: ssmcompress.evaluate(pruned, images, dense=dense),
        lambda: ssmcompress.reconstruct(pruned, dense, images),
        lambda: ssmcompress.finetune(pruned, class_folders, dense=dense),
    ):
        with pytest.raises(InputError, match="so the dense model has other classes: leave it out"):
            mix()
    torch.save({"model": make_vim(seed=9).state_dict()}, tmp_path / "trained.pth")  # a dense model of the new classes
    assert ssmcompress.evaluate(pruned, images, dense=ssmcompress.load(tmp_path / "trained.pth")).agreement is not None
    dense.reset_classifier(0)
    with pytest.raises(InputError, match="the models have no classes"):
        ssmcompress.reconstruct(ssmcompress.prune(dense, ratio=0.3), dense, images)


def test_a_new_classifier_has_the_dtype_and_mode_of_the_model(vim):
    model = vim.double().train()
    model.reset_classifier(2, global_pool="token")
    assert model.head.weight.dtype == torch.float64
    assert model.head.training
    assert model.head.weight.requires_grad


@pytest.mark.parametrize(
    ("arguments", "message"),
    [((-1,), "at least 0"), ((2.5,), "`num_classes` 2.5"), ((True,), "`num_classes` True"), ((3, "avg"), "'token'")],
)
def test_a_classifier_that_cannot_be_is_refused(vim, arguments, message):
    with pytest.raises(InputError, match=message):
        vim.reset_classifier(*arguments)
    assert vim.num_classes == 10


@pytest.mark.parametrize("form", ["aligned", "reconstructed"])
@pytest.mark.parametrize("name", ["vim", "plain_mamba", "deit"])
def test_a_pruned_model_learns_other_classes(name, form):
    model = copy.deepcopy(make(name, form)).requires_grad_(True)
    torch.manual_seed(0)
    model.reset_classifier(3)
    recipe = ssmcompress.Recipe(epochs=4, batch_size=6, lr=3e-2, lr_images=6, ema=0.0, teacher=0.0)
    data = ssmcompress.Batches(colours(3), model.transform())
    tuned = ssmcompress.finetune(model, data, recipe=recipe).model
    losses = [entry["loss"] for entry in tuned.find_record("finetuning").history]
    assert losses[-1] < 0.6 * losses[0], losses
    assert [step.kind for step in tuned.steps][-2:] == ["classifier", "finetuning"]


# ----------------------------------------------------------------------------------- preprocessing, optimisers, tracing


@pytest.mark.parametrize("name", ["vim", "plain_mamba", "deit"])
def test_timm_prepares_images_as_the_model_does(name):
    model = copy.deepcopy(make(name, "aligned"))
    model.preprocessing = model.preprocessing.changed(
        crop_pct=0.8, interpolation="bilinear", mean=(0.4,), std=(0.1, 0.2, 0.3)
    )
    config = timm.data.resolve_model_data_config(model)
    assert config == timm.data.resolve_data_config({}, pretrained_cfg=model.default_cfg)
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (90, 70, 3), dtype=np.uint8))
    theirs = timm.data.create_transform(**config, is_training=False)(picture)
    torch.testing.assert_close(theirs, model.transform()(picture), rtol=0, atol=0)
    assert model.get_submodule(model.pretrained_cfg["classifier"]) is model.get_classifier()


@pytest.mark.parametrize("name", ["vim", "plain_mamba", "deit"])
def test_timm_makes_an_optimiser_that_decays_what_ours_does(name):
    model = copy.deepcopy(make(name, "reconstructed")).requires_grad_(True)
    optimiser = timm.optim.create_optimizer_v2(model, opt="adamw", weight_decay=0.1)
    decayed = {id(p) for group in optimiser.param_groups if group["weight_decay"] for p in group["params"]}
    names = {name for name, p in model.named_parameters() if id(p) in decayed}
    assert not [name for name in names if name.endswith(("A_log", "A_b_log", "pos_embed", "cls_token", "direction_Bs"))]
    assert {name for name in names if name.endswith(("out_proj.weight", "fc1.weight"))}


def test_features_compile_as_one_graph():
    model = ssmcompress.prune(make_vim(depth=2), ratio=0.4, stages=[1]).requires_grad_(False)
    images = images_of(model)
    compiled = torch.compile(model.forward_features, fullgraph=True, backend="eager")
    assert_near(compiled(images), model.forward_features(images), 1e-5)
