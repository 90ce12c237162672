"""Hidden attention and its maps: the authors' values, matrices from unit inputs, and maps of pruned models."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import images_of, make_plain_mamba, make_vim, make_vit
from hypothesis import given, settings
from hypothesis import strategies as st
from segmenters import make_plain_mamba_upernet, make_vim_upernet, scene_tensors
from torch import Tensor

import ssmcompress
from ssmcompress.errors import InputError
from ssmcompress.evaluation.attention_maps import METHODS, attend, choose_layers
from ssmcompress.evaluation.hidden_attention import RowSum, view_layers
from ssmcompress.models.base import TokenModel
from ssmcompress.ops import ScanPath, selective_scan
from ssmcompress.ops.observing import is_observed, observe
from ssmcompress.ops.scan_rows import add_scan_rows
from ssmcompress.ops.selective_scan import ScanCall
from ssmcompress.pruning.alignment import UNALIGNED, Alignment
from ssmcompress.pruning.plan import Plan, Stage
from ssmcompress.pruning.tokens import Tokens

GOLDEN = Path(__file__).parents[1] / "golden"


@pytest.fixture(scope="module")
def golden():
    """The authors' values for image 0 of golden/vim: 3 layers, the class token at position 8 of 17."""
    values = dict(np.load(GOLDEN / "vim_attention.npz"))
    model = ssmcompress.load(GOLDEN / "vim.pth")
    return model, {name: torch.from_numpy(value) for name, value in values.items()}


def class_rows(model: TokenModel, images: Tensor, published: bool = False) -> list[Tensor]:
    """The row of the class token of each layer, (batch, tokens, channels), of the kept tokens."""
    sums: list[RowSum] = []

    def start(layer: int, before: Tokens) -> RowSum:
        sums.append(RowSum(one_hot(before), published))
        return sums[-1]

    with torch.no_grad():
        for _ in view_layers(model, model.embed(images), start):
            pass
    return [rows.total for rows in sums]


def see_calls(model: TokenModel, images: Tensor) -> tuple[list, list[list]]:
    """The views of all layers, and the calls of each."""
    calls: list[list] = []
    with torch.no_grad():
        views = list(view_layers(model, model.embed(images), lambda *_: calls.append([]) or calls[-1].append))
    return views, calls


def sum_rows(calls: list, weights: Tensor) -> Tensor:
    rows = RowSum(weights)
    for call in calls:
        rows(call)
    return rows.total


def one_hot(tokens: Tokens) -> Tensor:
    weights = torch.zeros(tokens.features.shape[:2])
    return weights.scatter(1, tokens.protected_index()[:, None], 1.0)


class TestAuthors:
    def test_rows_are_exact(self, golden):
        model, values = golden
        expected = values["forward_row"] + values["backward_row"]
        rows = torch.cat(class_rows(model, values["image"])).transpose(1, 2)
        # The values reach 1.3; in float32 the tokens of the first layer alone differ by 1.5e-6.
        torch.testing.assert_close(rows, expected, atol=2e-6, rtol=0)

    def test_rows_are_exact_in_float64(self, golden):
        _, values = golden
        rows = class_rows(ssmcompress.load(GOLDEN / "vim.pth").double(), values["image"].double())
        expected = (values["forward_row"] + values["backward_row"]).transpose(1, 2)
        torch.testing.assert_close(torch.cat(rows).float(), expected, atol=3e-7, rtol=0)

    def test_published_vector(self, golden):
        model, values = golden
        rows = torch.cat(class_rows(model, values["image"], published=True)).transpose(1, 2)
        torch.testing.assert_close(rows, values["xai"], atol=1e-5, rtol=0)

    @pytest.mark.parametrize("start", [0, 1])
    @pytest.mark.parametrize("method", ["raw", "rollout", "attribution"])
    def test_maps(self, golden, method, start):
        model, values = golden
        maps = ssmcompress.attention_maps(model, values["image"], layer=range(start + 1, 4), method=method)
        assert maps.shape == (1, 4, 4)
        torch.testing.assert_close(maps.flatten(), values[f"{method}_from{start}"], atol=1e-5, rtol=0)


def explicit_matrix(call: ScanCall, tokens: Tokens) -> Tensor:
    """The matrix (batch, readers, tokens, channels) of a path, by a scan of each unit input; None where it is cut."""
    path, columns = call.path, []
    for token in range(path.u.shape[1]):
        unit = torch.zeros_like(path.u)
        unit[:, token] = 1.0
        columns.append(
            selective_scan(
                unit, path.delta, path.A, path.B, path.C, None, None, path.delta_bias, call.delta_softplus,
                path.gap, path.reverse, order=path.order, backend="reference",
            )
        )  # fmt: skip
    return torch.stack(columns, dim=2)


def keep_some(model: TokenModel, images: Tensor, mask: list[bool], alignment: Alignment) -> Tokens:
    """The tokens of images after dropping those in a mask, which differs between images."""
    tokens = replace(model.embed(images), alignment=alignment)
    rows = []
    for image in range(len(images)):
        kept = np.roll(mask, 3 * image)
        if tokens.protected is not None:
            kept = np.concatenate([kept[: tokens.protected], [True], kept[tokens.protected :]])
        rows.append(torch.from_numpy(np.flatnonzero(kept)))
    return tokens.keep(torch.stack(rows))


MASKS = st.lists(st.booleans(), min_size=16, max_size=16).filter(any)


class TestExactForPruned:
    """The sum of rows equals that of the matrix computed from unit inputs, for any kept tokens."""

    @settings(max_examples=25, deadline=None)
    @given(mask=MASKS, aligned=st.booleans())
    def test_class_token(self, mask, aligned):
        model = ssmcompress.prune(make_vim(d_state=5), ratio=0.2, stages=(1,))
        with torch.no_grad():
            tokens = keep_some(model, images_of(model, 3), mask, Alignment() if aligned else UNALIGNED)
            calls = self.run(model, tokens)
            matrix = sum(explicit_matrix(call, tokens) for call in calls)
            index = tokens.protected_index()
            expected = matrix[torch.arange(3), index]
            torch.testing.assert_close(sum_rows(calls, one_hot(tokens)), expected, atol=1e-5, rtol=1e-5)

    @settings(max_examples=25, deadline=None)
    @given(mask=MASKS, aligned=st.booleans())
    def test_mean_over_readers(self, mask, aligned):
        model = ssmcompress.prune(make_plain_mamba(), ratio=0.2, stages=(1,))
        with torch.no_grad():
            tokens = keep_some(model, images_of(model, 3), mask, Alignment() if aligned else UNALIGNED)
            calls = self.run(model, tokens)
            assert len(calls) == 4
            matrix = sum(explicit_matrix(call, tokens) for call in calls)
            weights = torch.rand(tokens.features.shape[:2])
            expected = torch.einsum("br,brce->bce", weights, matrix)
            torch.testing.assert_close(sum_rows(calls, weights), expected, atol=1e-5, rtol=1e-5)

    @staticmethod
    def run(model: TokenModel, tokens: Tokens) -> list[ScanCall]:
        calls = []
        with observe(calls.append):
            model.blocks[2](tokens)
        return calls

    def test_alignment_changes_the_row(self):
        model = ssmcompress.prune(make_vim(), ratio=0.5, stages=(1,))
        naive = ssmcompress.prune(make_vim(), ratio=0.5, stages=(1,), alignment=False)
        images = images_of(model, 2)
        options = {"layer": 2, "method": "row"}
        assert not torch.allclose(*(ssmcompress.attention_maps(m, images, **options) for m in (model, naive)))

    def test_last_layer_for_the_class_token_alone(self):
        """The last layer is run for one token, and its row equals that of the full layer."""
        model = ssmcompress.prune(make_vim(), ratio=0.3, stages=(2,))
        images = images_of(model, 4)
        views, calls = see_calls(model, images)
        last, whole = views[-1], []
        assert min(call.path.u.shape[1] for call in calls[-1]) < last.before.features.shape[1]
        with torch.no_grad(), observe(whole.append):
            model.step(len(model.blocks), last.before)
        weights = one_hot(last.before)
        torch.testing.assert_close(sum_rows(calls[-1], weights), sum_rows(whole, weights))


class TestAttention:
    """Models with attention have its own rows."""

    def test_class_attention(self):
        model = make_vit()
        images = images_of(model, 2)
        with torch.no_grad():
            tokens = model.embed(images)
            block = model.blocks[0]
            qkv = block.attn.qkv(block.norm1(tokens.features)).unflatten(-1, (3, 3, 8)).permute(2, 0, 3, 1, 4)
            attention = (qkv[0] @ qkv[1].transpose(-2, -1) * block.attn.scale).softmax(-1).mean(1)
        maps = ssmcompress.attention_maps(model, images, layer=1)
        torch.testing.assert_close(maps.flatten(1), attention[:, 0, 1:], atol=1e-6, rtol=1e-5)

    @pytest.mark.parametrize("pool", ["token", "avg"])
    def test_rollout_is_the_product_of_matrices(self, pool):
        model = make_vit(pool=pool)
        images = images_of(model, 2)
        with torch.no_grad():
            _, calls = see_calls(model, images)
            joint = torch.eye(17).expand(2, -1, -1)
            for (call,) in calls:
                matrix = (call.queries @ call.keys.transpose(-2, -1) * call.scale).softmax(-1).mean(1)
                matrix = torch.cat([matrix, torch.zeros(2, 17 - matrix.shape[1], 17)], dim=1)  # rows nobody reads
                joint = (matrix + torch.eye(17)) / 2 @ joint
        expected = joint[:, 0] if pool == "token" else joint.mean(1)
        maps = ssmcompress.attention_maps(model, images, layer=range(1, 5), method="rollout")
        torch.testing.assert_close(maps.flatten(1), expected[:, 1:], atol=1e-6, rtol=1e-5)

    @pytest.mark.parametrize("method", ["row", "raw", "rollout"])
    def test_fused_tokens_have_no_place(self, method):
        plan = ssmcompress.make_plan(make_vit(), ratio=0.4, stages=(1, 3), fuse=True)
        model = ssmcompress.prune(make_vit(), plan)
        found = run(model, images_of(model, 3), method)
        _, decisions = model.trace(images_of(model, 3))
        assert torch.equal(found.kept.flatten(1).sum(1), (decisions[-1].kept < 17).sum(1) - 1)
        assert not found.maps[~found.kept].any()


@torch.no_grad()
def run(model: TokenModel, images: Tensor, method: str = "row"):
    return attend(model, images, range(1, len(model.blocks) + 1), method)


def list_models() -> dict[str, TokenModel]:
    return {"vim": make_vim(), "plain_mamba": make_plain_mamba(), "vit": make_vit()}


@pytest.mark.parametrize("name", ["vim", "plain_mamba", "vit"])
class TestMaps:
    @pytest.mark.parametrize("method", METHODS)
    def test_dropped_patches_are_zero(self, name, method):
        dense = list_models()[name]
        model = ssmcompress.prune(dense, ratio=0.5, stages=(2,))
        if (name, method) in (("vit", "xai"), ("vit", "attribution"), ("plain_mamba", "xai")):
            with pytest.raises(InputError, match="method"):
                ssmcompress.attention_maps(model, images_of(model), method=method)
            return
        images = images_of(model)
        found = attend(model, images, (3, 4), method)
        _, decisions = model.trace(images)
        kept = torch.stack([torch.isin(model.patch_positions, kept) for kept in decisions[0].kept])
        assert torch.equal(found.kept, kept)
        assert not found.maps[~kept].any()
        assert (found.maps[kept] != 0).float().mean() > 0.5
        assert torch.equal(ssmcompress.attention_maps(model, images, layer=(3, 4), method=method), found.maps)

    def test_outputs_are_those_of_the_model(self, name):
        model = ssmcompress.prune(list_models()[name], ratio=0.3, stages=(2,))
        images = images_of(model)
        found = attend(model, images, (4,), "row")
        torch.testing.assert_close(found.outputs, model(images), atol=1e-5, rtol=1e-5)

    def test_images_do_not_depend_on_each_other(self, name):
        model = ssmcompress.prune(list_models()[name], ratio=0.5, stages=(2,))
        images = images_of(model)
        maps = ssmcompress.attention_maps(model, images)
        alone = torch.cat([ssmcompress.attention_maps(model, image[None]) for image in images])
        torch.testing.assert_close(maps, alone, atol=1e-6, rtol=1e-4)

    def test_half_precision_weights(self, name):
        model = list_models()[name]
        images = images_of(model)
        maps = ssmcompress.attention_maps(model, images)
        half = ssmcompress.attention_maps(list_models()[name].bfloat16(), images.bfloat16())
        assert half.dtype == torch.float32
        assert torch.corrcoef(torch.stack([maps.flatten(), half.flatten()]))[0, 1] > 0.9


def test_images_by_name(class_folders):
    model = make_vim()
    maps = ssmcompress.attention_maps(model, class_folders)
    assert maps.shape == (20, 4, 4)


@pytest.mark.parametrize("make", [make_vim_upernet, make_plain_mamba_upernet])
def test_segmentation_models_read_at_all_tokens(make):
    model = ssmcompress.prune(make(), ratio=0.3)
    images = scene_tensors(model, 2)
    maps = ssmcompress.attention_maps(model, images)
    assert maps.shape == (2, *model.config.grid)
    with pytest.raises(InputError, match="attribution"):
        ssmcompress.attention_maps(model, images, method="attribution")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layer": 0}, "`layer` 0: expected one or several numbers from 1 to 4"),
        ({"layer": 5}, "`layer` 5"),
        ({"layer": ()}, "`layer`"),
        ({"layer": 1.5}, "`layer` 1.5"),
        ({"layer": "2"}, "`layer` '2'"),
        ({"method": "grad"}, "`method` 'grad': expected one of row, xai, raw, rollout, attribution"),
    ],
)
def test_refused_options(vim, images, options, message):
    with pytest.raises(InputError, match=message):
        ssmcompress.attention_maps(vim, images, **options)


@pytest.mark.parametrize("method", METHODS)
def test_inside_inference_mode(vim, images, method):
    expected = ssmcompress.attention_maps(vim, images, method=method)
    with torch.inference_mode():
        assert torch.equal(ssmcompress.attention_maps(vim, images.clone(), method=method), expected)


def test_images_of_several_sizes_are_refused():
    model = make_plain_mamba_upernet()
    images = [scene_tensors(model, 1), scene_tensors(model, 1)[..., :32]]
    with pytest.raises(InputError, match="several sizes"):
        ssmcompress.attention_maps(model, images)


def test_tokens_that_enter_again_have_rows():
    model = ssmcompress.prune(make_vim_upernet(), Plan((Stage(1, 0.4), Stage(2, 0.4)), gap="bias", reenter=1))
    found = attend(model, scene_tensors(model, 2), (len(model.blocks),), "row")
    assert found.kept.all()
    assert (found.maps != 0).all()


def test_default_layers_are_those_of_the_published_maps():
    assert choose_layers(24) == tuple(range(16, 25))
    assert choose_layers(1) == (1,)


def test_models_are_not_observed_afterwards(vim, images):
    ssmcompress.attention_maps(vim, images)
    assert not is_observed()
    with pytest.raises(ZeroDivisionError), observe(lambda call: 1 / 0):
        vim(images)
    assert not is_observed()


@pytest.mark.parametrize("published", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["forward", "reverse", "order"])
@pytest.mark.parametrize("gap", [None, "pair", "tensor"])
def test_the_kernel_computes_what_the_scan_does(kind, gap, dtype, published):
    """The compiled rows equal those of the reference scan, for odd sizes, and are accumulated."""
    g = torch.Generator().manual_seed(0)
    batch, length, d_inner, d_state = 2, 7, 83, 3

    def draw(*shape):
        return torch.randn(*shape, generator=g)

    gaps = {
        "pair": (draw(batch, length).abs().round(), draw(d_inner).abs()),
        "tensor": draw(batch, length, d_inner).abs(),
    }
    path = ScanPath(
        *(draw(batch, length, d_inner).to(dtype) for _ in range(2)),
        -draw(d_inner, d_state).exp(),
        *(draw(batch, length, d_state).to(dtype) for _ in range(2)),
        None,
        draw(d_inner),
        gaps.get(gap),
        kind == "reverse",
        torch.stack([torch.randperm(length, generator=g) for _ in range(batch)]) if kind == "order" else None,
    )
    weights = torch.zeros(batch, length)
    weights[0, 3], weights[1, 5] = 1.0, 0.5
    start = draw(batch, length, d_inner)
    results = [start.clone() for _ in range(2)]
    for total, backend in zip(results, ("cpu", "reference"), strict=True):
        add_scan_rows(total, path, weights, True, published, backend)
    assert not torch.equal(results[0], start)
    torch.testing.assert_close(*results, atol=1e-5, rtol=1e-4)


def test_other_threads_are_not_observed(vim, images):
    from threading import Thread

    calls = []
    with observe(calls.append):
        thread = Thread(target=vim, args=(images,))
        thread.start()
        thread.join()
    assert not calls
