"""The methods of huggingface_hub's mixin on models."""

from pathlib import Path

import pytest
import torch
from conftest import images_of, make_plain_mamba

import ssmcompress
from ssmcompress.errors import InputError
from ssmcompress.models import TokenModel
from ssmcompress.models.plain_mamba import PlainMamba
from ssmcompress.models.vim import VisionMamba


@pytest.fixture
def folder(vim, tmp_path) -> Path:
    return ssmcompress.prune(vim, ratio=0.4).save_pretrained(tmp_path / "pruned")


@pytest.mark.parametrize("model_class", [TokenModel, VisionMamba])
def test_a_saved_model_is_loaded_by_its_class_and_by_that_of_all_models(model_class, vim, folder, images):
    loaded = model_class.from_pretrained(folder)
    assert type(loaded) is VisionMamba
    assert loaded.plan is not None
    torch.testing.assert_close(loaded(images), ssmcompress.prune(vim, ratio=0.4)(images), rtol=0, atol=0)


def test_another_class_is_refused(folder):
    with pytest.raises(InputError, match=r"pruned is a VisionMamba: expected a PlainMamba"):
        PlainMamba.from_pretrained(folder)


def test_options_of_load_are_taken(folder):
    assert VisionMamba.from_pretrained(folder, image_size=32).config.image_size == (32, 32)
    with pytest.raises(InputError, match="architecture"):
        VisionMamba.from_pretrained(str(folder), architecture="plain_mamba")


def test_a_folder_is_replaced_only_with_force(vim, folder):
    with pytest.raises(InputError, match="force"):
        vim.save_pretrained(folder)
    vim.save_pretrained(str(folder), force=True)
    assert TokenModel.from_pretrained(folder).plan is None


@pytest.mark.parametrize(
    ("name", "expected"), [("me/vim", "me/vim@v2"), ("me/vim:folder/vim.pth", "me/vim@v2:folder/vim.pth")]
)
def test_a_revision_is_a_part_of_the_name_that_load_gets(name, expected, vim, monkeypatch):
    monkeypatch.setattr(ssmcompress, "load", lambda name, **options: names.append((name, options)) or vim)
    names = []
    assert VisionMamba.from_pretrained(name, revision="v2", device="cpu") is vim
    assert names == [(expected, {"device": "cpu"})]


@pytest.mark.parametrize("name", ["own/vim", "./own/vim", Path("own/vim"), Path("else/where"), "model.pth", "a/b/c"])
def test_a_local_path_has_no_revision(name, vim, in_an_empty_folder):
    ssmcompress.save(vim, "own/vim")
    assert ssmcompress.load("own/vim").plan is None
    with pytest.raises(InputError, match="`revision` is for names of the Hub") as caught:
        VisionMamba.from_pretrained(name, revision="main")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "revision"), [("me/vim@v1", "v2"), ("me/vim", "v1:x.pth"), ("me/vim", "a\nb"), ("me/vim", "")]
)
def test_a_revision_that_cannot_be_is_refused(name, revision, in_an_empty_folder):
    with pytest.raises(InputError, match="`revision`") as caught:
        VisionMamba.from_pretrained(name, revision=revision)
    assert "\n" not in str(caught.value)


def test_what_is_pushed_is_a_folder_of_the_model(monkeypatch):
    """The upload itself is that of the command `push`."""
    from ssmcompress.jobs.push import PushRequest

    model, pushed = ssmcompress.prune(make_plain_mamba(), ratio=0.4), []

    def push_folder(folder, request):
        pushed.append((ssmcompress.load(folder), request))
        return {"url": "https://huggingface.co/me/vim"}

    monkeypatch.setattr(ssmcompress, "PushRequest", PushRequest, raising=False)
    monkeypatch.setattr(ssmcompress, "push_folder", push_folder, raising=False)
    url = model.push_to_hub("me/vim", private=True, license="mit", branch="dev", commit_message="first", force=True)
    assert url == "https://huggingface.co/me/vim"
    ((found, request),) = pushed
    assert request == PushRequest("me/vim", private=True, license="mit", revision="dev", message="first", force=True)
    torch.testing.assert_close(found(images_of(model)), model(images_of(model)), rtol=0, atol=0)
