"""ViTs: comparison with timm's models, golden logits of DeiT and ToMe, and dropping tokens inside a layer."""

import copy
import json
from dataclasses import replace

import numpy as np
import pytest
import timm
import torch
from conftest import GOLDEN, images_of, make_vit
from timm.models._hub import save_for_hf

import ssmcompress
from ssmcompress.compression.reconstruct import reconstruct
from ssmcompress.errors import InputError
from ssmcompress.evaluation.flops import flops, flops_by_part, remaining_share
from ssmcompress.models.vit import VisionTransformer
from ssmcompress.models.vit_block import ViTConfig
from ssmcompress.progress import hold_notes
from ssmcompress.pruning import merging
from ssmcompress.pruning.alignment import UNALIGNED, Alignment
from ssmcompress.pruning.plan import Plan, Stage, token_counts
from ssmcompress.pruning.schedules import evit_stages, tome_stages

EVIT = (4, 7, 10)


@pytest.fixture(scope="module")
def golden():
    with np.load(GOLDEN / "deit.npz") as file:
        return {key: torch.from_numpy(np.asarray(file[key])) for key in file.files}


@pytest.fixture(scope="module")
def deit():
    return ssmcompress.load(GOLDEN / "deit.pth", num_heads=3)


def run(model, golden, plan=None):
    """(logits, decisions) in float64, as the authors' own were computed."""
    model = (model if plan is None else ssmcompress.prune(model, plan)).double()
    with torch.no_grad():
        return model.trace(golden["images"].double())


def check(logits, expected):
    torch.testing.assert_close(logits, expected.double(), atol=1e-6, rtol=0)


def test_golden_dense(deit, golden):
    check(run(ssmcompress.load(deit), golden)[0], golden["logits"])


@pytest.mark.parametrize("fuse", [False, True])
@pytest.mark.parametrize("keep", [0.7, 0.5])
def test_golden_evit(deit, golden, keep, fuse):
    """The authors list kept tokens by falling score, the fused one last; their order is followed stage by stage."""
    end = "_fused" if fuse else ""
    logits, decisions = run(deit, golden, Plan(evit_stages(EVIT, (1 - keep,) * 3, fuse)))
    check(logits, golden[f"logits_evit_{keep}{end}"])
    if keep == 0.5:
        return
    order = decisions[0].candidates[:, 1:]
    for number, decision in enumerate(decisions):
        order = order.gather(1, golden[f"idx_0.7{end}_stage{number}"].long())
        kept = decision.kept[:, 1:-1] if fuse else decision.kept[:, 1:]
        assert torch.equal(order.sort(1).values, kept)
        order = torch.cat([order, decision.kept[:, -1:]], 1) if fuse else order
        if not fuse:
            assert torch.equal(kept - 1, golden[f"kept_0.7_stage{number}"].long())


@pytest.mark.parametrize("proportional", [True, False])
@pytest.mark.parametrize(("name", "removed", "inflection"), [("r3", 3, 0), ("r3_decreasing", 3, -1), ("r13", 13, 0)])
def test_golden_tome(deit, golden, name, removed, inflection, proportional):
    stages = tome_stages(12, deit.length, 1, removed, inflection)
    plan = Plan(stages, Alignment() if proportional else UNALIGNED)
    check(run(deit, golden, plan)[0], golden[f"logits_tome_{name}{'' if proportional else '_noprop'}"])
    if name == "r3" and proportional:
        with torch.no_grad():
            tokens, _ = ssmcompress.prune(deit, plan).double().encode(golden["images"].double())
        sizes = tokens.sizes.gather(1, tokens.ranks.argsort(1))
        assert torch.equal(sizes, golden["size_tome_r3"].double())


# Published MACs of DeiT-T, S and B in billions: EViT at its keep rates, dense, and ToMe (A2 and A3 of the method).
MACS = {
    192: ((1.083, 0.933, 0.812, 0.708, 0.622), 0.821, 1.254, (0.92, 0.73, 0.62)),
    384: ((3.988, 3.444, 2.997, 2.608, 2.282), 3.029, 4.599, (3.42, 2.70, 2.29)),
    768: ((15.268, 13.201, 11.485, 9.984, 8.716), 11.610, 17.564, (13.10, 10.37, 8.77)),
}
PARAMETERS = {192: 5_717_416, 384: 22_050_664, 768: 86_567_656}


@pytest.mark.parametrize("width", MACS)
def test_published_flops_and_parameters(width):
    evit, fused, dense, tome = MACS[width]
    with torch.device("meta"):
        model = VisionTransformer(ViTConfig(width, 12, width // 64, 4 * width, 3, 1000, (16, 16), 16, (224, 224)))
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS[width]

    def count(stages):
        counts = token_counts(12, 197, stages, 1)
        return sum(model.flops_by_part(counts, "paper").values()) / 1e9

    assert flops(model) == pytest.approx({"full": dense, "paper": dense}, abs=5e-4)
    found = [count(evit_stages(EVIT, (1 - keep,) * 3)) for keep in (0.9, 0.8, 0.7, 0.6, 0.5)]
    assert found == pytest.approx(evit, abs=5.1e-4)
    assert count(evit_stages(EVIT, (0.3,) * 3, fuse=True)) == pytest.approx(fused, abs=5.1e-4)
    assert [count(tome_stages(12, 197, 1, r)) for r in (8, 13, 16)] == pytest.approx(tome, abs=5.1e-3)


TIMM = {
    "deit_tiny_patch16_224": {},
    "deit_tiny_distilled_patch16_224": {},
    "deit3_small_patch16_224": {},
    "vit_base_patch16_clip_quickgelu_224": {"num_classes": 5},
    "vit_medium_patch16_gap_240": {},
    "vit_small_patch14_reg4_dinov2": {"num_classes": 4, "img_size": 56},
}


@pytest.mark.parametrize("name", TIMM)
def test_timm_models(name, tmp_path):
    """As `save_pretrained` writes them, and in DeiT's format, equal to timm's own model."""
    torch.manual_seed(0)
    model = timm.create_model(name, **TIMM[name]).eval()
    for parameter in model.parameters():
        if parameter.ndim == 1 or not parameter.any():
            torch.nn.init.normal_(parameter, 0.5 if parameter.ndim == 1 else 0, 0.1)
    save_for_hf(model, tmp_path / "hub", model_args=TIMM[name], safe_serialization=True)
    torch.save({"model": model.state_dict()}, tmp_path / "model.pth")
    ours = ssmcompress.load(tmp_path / "hub")
    images = images_of(ours, 2)
    with torch.no_grad():
        expected = model(images)
        torch.testing.assert_close(ours(images), expected, atol=1e-6, rtol=1e-6)
        if "clip" in name:  # its activation cannot be inferred from the weights
            with pytest.raises(InputError, match=r"timm's config\.json"):
                ssmcompress.load(tmp_path / "model.pth")
        else:
            torch.testing.assert_close(ssmcompress.load(tmp_path / "model.pth")(images), expected, atol=1e-6, rtol=1e-6)
    settings = model.pretrained_cfg
    assert ours.preprocessing.mean == settings["mean"]
    assert ours.preprocessing.crop_pct == settings["crop_pct"]


def test_layer_scale_in_the_names_of_deit():
    model = make_vit(layer_scale=True)
    names = {"ls1.gamma": "gamma_1", "ls2.gamma": "gamma_2"}
    state = {key.replace(k, v): w for key, w in model.state_dict().items() for k, v in names.items() if k in key}
    state |= {key: w for key, w in model.state_dict().items() if ".ls" not in key}
    again = ssmcompress.load(state, num_heads=3)
    assert torch.equal(again(images_of(model)), model(images_of(model)))


@pytest.mark.parametrize(
    ("heads", "message"),
    [(None, "not a multiple of 64, the width of a head"), (5, "`num_heads` 5: expected a divisor of the width 24")],
)
def test_heads_must_be_told(heads, message):
    with pytest.raises(InputError, match=message):
        ssmcompress.load(dict(make_vit().state_dict()), num_heads=heads)


def test_tokens_are_matched_once_in_each_stage(deit, golden, monkeypatch):
    calls = []
    matched = merging.match_keys
    monkeypatch.setattr(merging, "match_keys", lambda tokens: calls.append(0) or matched(tokens))
    stages = tome_stages(len(deit.blocks), deit.length, 1, 2)
    run(deit, golden, Plan(stages))
    assert len(calls) == len(stages)


LIVE = {
    "heads": ("vit_small_patch16_224", {"num_heads": 12}),
    "head width": ("vit_huge_patch14_224", {}),
    "small": ("test_vit", {}),
    "activation": ("vit_tiny_patch16_224", {"act_layer": "gelu_tanh"}),
    "mean": ("vit_tiny_patch16_224", {"global_pool": "avg", "fc_norm": False}),
}


@pytest.mark.parametrize("kind", LIVE)
def test_a_live_module_of_timm_says_what_its_weights_do_not_show(kind):
    name, options = LIVE[kind]
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=10, depth=1, **options).eval()
    for parameter in model.parameters():
        if parameter.ndim == 1 or not parameter.any():
            torch.nn.init.normal_(parameter, 0.5 if parameter.ndim == 1 else 0, 0.1)
    ours = ssmcompress.load(model)
    images = images_of(ours, 2)
    with torch.no_grad():
        torch.testing.assert_close(ours(images), model(images), atol=1e-5, rtol=1e-5)
    settings = {name: getattr(ours.preprocessing, name) for name in ("mean", "std", "crop_pct", "interpolation")}
    assert settings == {name: model.pretrained_cfg[name] for name in settings}


def test_heads_that_are_assumed_are_noted_or_asked_for():
    with pytest.raises(InputError, match="published models of width 1280 have 16, but heads of the usual width 64"):
        ssmcompress.load(dict(make_vit(d_model=1280, depth=1, heads=16).state_dict()))
    for width, expected in ((192, []), (128, ["the number of heads is not in the file; assumed: 2, of width 64"])):
        with hold_notes() as notes:
            assert ssmcompress.load(dict(make_vit(d_model=width, depth=1, heads=1).state_dict())).config.num_heads > 1
        assert [text.partition(" (")[0] for text in notes] == expected


def test_heads_of_other_models_and_of_files_that_say_other_ones(vim, tmp_path):
    with pytest.raises(InputError, match="`num_heads`: a model of type vim has no such option"):
        ssmcompress.load(dict(vim.state_dict()), num_heads=3, architecture="vim")
    folder = ssmcompress.save(make_vit(), tmp_path / "vit")
    assert ssmcompress.load(folder, num_heads=3).config.num_heads == 3
    with pytest.raises(InputError, match=r"`num_heads` 6: config\.json says 3"):
        ssmcompress.load(folder, num_heads=6)


@pytest.mark.parametrize(
    ("name", "part"), [("eva02_tiny_patch14_224", "Eva"), ("vit_base_patch16_xp_224", "ParallelScalingBlock")]
)
def test_models_of_timm_that_are_made_of_other_parts_are_refused(tmp_path, name, part):
    folder = ssmcompress.save(make_vit(d_model=64, heads=1), tmp_path / name)
    (folder / "config.json").write_text(json.dumps({"architecture": name, "num_classes": 10}))
    with pytest.raises(InputError, match=f"{name} is made of timm's {part}: not supported"):
        ssmcompress.load(folder)


KINDS = {
    "plain": {},
    "distilled": {"distillation_token": True},
    "registers": {"registers": 2, "embeds_prefix": False},
    "layer scale": {"layer_scale": True, "qk_norm": True},
    "mean": {"pool": "avg", "fc_norm": True},
    "no class token": {"class_token": False, "pool": "avg"},
}


@pytest.fixture(params=KINDS)
def kind(request):
    return make_vit(**KINDS[request.param])


def plans_for(model):
    yield "default", ssmcompress.make_plan(model, ratio=0.4)
    if model.config.class_token:
        yield "fused", Plan(evit_stages((1, 3), (0.4, 0.3), fuse=True))
    yield "merged", Plan(tome_stages(len(model.blocks), model.length, model.protected_count, 2))


def test_the_last_layer_for_the_tokens_that_are_read_out(kind):
    """Equal to the full layer, dense and pruned, at several batch sizes; and what is kept is never protected."""
    images = images_of(kind, 8)
    models = {"dense": kind} | {name: ssmcompress.prune(kind, plan) for name, plan in plans_for(kind)}
    with torch.no_grad():
        for model in models.values():
            logits, decisions = model.trace(images)
            torch.testing.assert_close(logits, model.readout(model.encode(images)[0]), atol=1e-5, rtol=0)
            torch.testing.assert_close(model(images[:1]), logits[:1], atol=1e-5, rtol=0)
            prefix = torch.arange(kind.protected_count).expand(8, -1)
            for decision in decisions:
                assert torch.equal(decision.kept[:, : kind.protected_count], prefix)
            stages, counts = model.plan.stages if model.plan else (), model.token_counts()
            assert [decision.kept.shape[1] for decision in decisions] == [counts[stage.after] for stage in stages]


def test_ratio_zero_changes_nothing(kind):
    images = images_of(kind)
    pruned = ssmcompress.prune(kind, ratio=0.0)
    with torch.no_grad():
        torch.testing.assert_close(pruned(images), kind(images), atol=1e-6, rtol=0)
        plain = ssmcompress.prune(kind, ratio=0.0, importance="random")
        assert torch.equal(plain(images), kind(images))


def test_saved_and_loaded_again(kind, tmp_path):
    images = images_of(kind, 40)
    for name, plan in plans_for(kind):
        pruned = ssmcompress.prune(kind, ssmcompress.calibrate(kind, images, plan))
        repaired = reconstruct(pruned, kind, images)
        again = ssmcompress.load(ssmcompress.save(repaired, tmp_path / name))
        with torch.no_grad():
            assert torch.equal(again(images), repaired(images))
        assert again.config == kind.config
        assert again.plan == repaired.plan


def test_reconstruction_comes_closer_on_other_images():
    """With its fits of both projections of a layer, on two plans; layer scales that are zero stay what they are."""
    dense = make_vit(depth=6, d_model=32, heads=2, image=(32, 32), layer_scale=True)
    with torch.no_grad():
        dense.blocks[4].ls1.gamma[:3] = 0
    images, others = images_of(dense, 200), images_of(dense, 200, seed=5)
    for stages in (evit_stages((2, 4), (0.5, 0.5)), evit_stages((2, 4), (0.5, 0.5), fuse=True)):
        pruned = ssmcompress.prune(dense, Plan(stages))
        repaired = reconstruct(pruned, dense, images)
        with torch.no_grad():
            target = dense(others)
            before, after = ((model(others) - target).square().mean() for model in (pruned, repaired))
        assert after < 0.7 * before
        names = {fit.weight for fit in repaired.find_record("reconstruction").fits}
        assert {"blocks.3.attn.proj", "blocks.3.mlp.fc2", "blocks.5.mlp.fc2", "head"} <= names
        assert torch.equal(repaired.blocks[4].attn.proj.weight[:3], dense.blocks[4].attn.proj.weight[:3])


def test_a_stage_in_the_last_layer_is_run_and_counted_in_full():
    model = make_vit(depth=3)
    plan = Plan((Stage(2, 0.5, "attention"), Stage(3, 0.5, "attention")))
    pruned = ssmcompress.prune(model, plan)
    assert pruned.token_counts() == [17, 17, 9, 5]
    parts = {name: round(1e9 * value) for name, value in flops_by_part(pruned).items()}
    width, hidden = 24, 48
    assert parts["qkv"] == (17 + 17 + 9) * 3 * width**2
    assert parts["attention"] == 2 * (17**2 + 17**2 + 9**2) * width
    assert parts["mlp"] == 2 * (17 + 9 + 5) * width * hidden
    assert remaining_share(model, plan.stages) == pytest.approx(flops(pruned)["full"] / flops(model)["full"])
    early = ssmcompress.prune(model, Plan(plan.stages[:1]))
    parts = {name: round(1e9 * value) for name, value in flops_by_part(early).items()}
    assert parts["qkv"] == ((17 + 17) * 3 + 2 * 9 + 1) * width**2
    assert parts["mlp"] == 2 * (17 + 9 + 1) * width * hidden
    assert remaining_share(model, plan.stages[:1]) == pytest.approx(flops(early)["full"] / flops(model)["full"])


def test_what_a_vit_cannot_give_is_refused_by_name():
    model = make_vit()
    for importance in ("delta", "clip-paths"):
        with pytest.raises(InputError, match=f"importance '{importance}': layer 2 of a vit has none; expected clip"):
            ssmcompress.make_plan(model, stages=(2,), importance=importance)
    bare = make_vit(class_token=False, pool="avg")
    assert bare.default_importance == "clip"
    with pytest.raises(InputError, match="importance 'attention': layer 1 of a vit has none"):
        ssmcompress.prune(bare, Plan((Stage(1, 0.3, "attention"),)))
    with pytest.raises(InputError, match="merge 'fused' weighs tokens by importance 'attention'"):
        ssmcompress.prune(model, Plan((Stage(1, 0.3, "l1", "fused"),)))
    for metric in ("random", "saliency"):  # which look a token up by its position
        with pytest.raises(InputError, match=f"'{metric}' after layer 3 goes by positions, and a fused token"):
            ssmcompress.prune(model, Plan((Stage(1, 0.3, "attention", "fused"), Stage(3, 0.3, metric))))
    with pytest.raises(InputError, match="importance 'keys' and merge 'bipartite' go together"):
        ssmcompress.prune(model, Plan((Stage(1, 0.3, "attention", "bipartite"),)))


def test_a_scan_has_neither_attention_nor_keys(vim):
    for stage in (Stage(1, 0.3, "attention", "fused"), Stage(1, 0.3, "keys", "bipartite")):
        with pytest.raises(InputError, match=f"importance '{stage.importance}': layer 1 of a vim has none"):
            ssmcompress.prune(vim, Plan((stage,)))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 0.05), (torch.float64, 1e-5)])
def test_models_of_other_dtypes(kind, dtype, tolerance):
    images = images_of(kind)
    for model in (kind, ssmcompress.prune(kind, Plan((Stage(1, 0.0, kind.default_importance),)))):
        with torch.no_grad():
            expected, found = model(images), copy.deepcopy(model).to(dtype)(images.to(dtype))
        assert (found.double() - expected.double()).abs().max() < tolerance * expected.abs().max()


def test_resized_positions():
    """At twice the size: bicubic on the grid, the entries before the patches unchanged."""
    model = make_vit(registers=1)
    large = ssmcompress.load(dict(model.state_dict()), num_heads=3, image_size=32)
    assert large.config.grid == (8, 8)
    assert torch.equal(large.pos_embed[:, :2], model.pos_embed[:, :2])
    grid = model.pos_embed[:, 2:].transpose(1, 2).unflatten(2, (4, 4))
    expected = torch.nn.functional.interpolate(grid, (8, 8), mode="bicubic", align_corners=False)
    torch.testing.assert_close(large.pos_embed[:, 2:], expected.flatten(2).transpose(1, 2))
    assert replace(large.config, image_size=(16, 16)) == model.config
