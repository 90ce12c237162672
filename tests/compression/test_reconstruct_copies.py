"""Altered copies of the images that reconstruction fits on."""

import pytest
import torch
from conftest import make_vim

import ssmcompress
from ssmcompress.compression.reconstruct.copies import make_copies
from ssmcompress.compression.reconstruct.layerwise import RefitOptions
from ssmcompress.errors import InputError


def noise(count, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 3, 1, 1, generator=generator) + torch.randn(count, 3, 16, 16, generator=generator) / 2


def test_a_copy_is_the_image_mirrored_or_not_and_shifted():
    images = noise(300, seed=1)[:, :, :, :15]
    copies = make_copies(images, torch.Generator().manual_seed(0))
    assert copies.shape == images.shape
    found = []
    for image, altered in zip(images, copies, strict=True):
        for mirrored in (False, True):
            back = altered.flip(-1) if mirrored else altered
            found += [
                (mirrored, down, right)
                for down in (-1, 0, 1)
                for right in (-1, 0, 1)
                if torch.equal(
                    back[:, max(0, -down) : 16 - max(0, down), max(0, -right) : 15 - max(0, right)],
                    image[:, max(0, down) : 16 + min(0, down), max(0, right) : 15 + min(0, right)],
                )
            ]
    assert len(found) == 300
    assert len(set(found)) == 18  # all of them
    assert torch.equal(copies, make_copies(images, torch.Generator().manual_seed(0)))


@pytest.fixture(scope="module")
def models():
    dense, images = make_vim(depth=3), noise(70, seed=2)
    return ssmcompress.prune(dense, ssmcompress.make_plan(dense, ratio=0.4, stages=(1,))), dense, images


def test_copies_are_fitted_on_and_the_images_held_out_decide(models):
    pruned, dense, images = models
    alone, more = (ssmcompress.reconstruct(pruned, dense, images, options=RefitOptions(copies=n)) for n in (0, 2))
    records = [model.find_record("reconstruction") for model in (alone, more)]
    assert [(r.images, r.held_out, r.kl_before) for r in records] == [(70, 14, records[0].kl_before)] * 2
    # The first weight has the same inputs in both, so the choice among more cannot be worse.
    assert records[1].fits[0].after <= records[0].fits[0].after
    assert any(not torch.equal(a, b) for a, b in zip(alone.parameters(), more.parameters(), strict=False))


def test_the_result_is_the_same_for_any_batches(models):
    pruned, dense, images = models
    whole = ssmcompress.reconstruct(pruned, dense, images, options=RefitOptions(copies=1)).state_dict()
    parts = ssmcompress.reconstruct(pruned, dense, images.split(9), options=RefitOptions(copies=1)).state_dict()
    assert whole.keys() == parts.keys()
    assert all(torch.equal(whole[k], parts[k]) for k in whole)


def test_two_images_are_enough(models):
    pruned, dense, images = models
    found = ssmcompress.reconstruct(pruned, dense, images[:2], options=RefitOptions(copies=2))
    assert found(images).isfinite().all()


@pytest.mark.parametrize("copies", [-1, 1.5, True, "3"])
def test_a_number_of_copies_that_is_none_is_refused(models, copies):
    pruned, dense, images = models
    with pytest.raises(InputError, match="`copies`"):
        ssmcompress.reconstruct(pruned, dense, images, options=RefitOptions(copies=copies))
