"""Models by their names on the Hugging Face Hub, from a server on this machine that speaks its protocol."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import images_of, make_vim, make_vit
from fake_hub import TOKEN, serve_hub

import ssmcompress
from ssmcompress.errors import InputError, SsmCompressError
from ssmcompress.hub_names import HubName, check_no_address, name_model, parse_hub_name
from ssmcompress.models.checkpoint import find_dense
from ssmcompress.progress import FrontEnd, use_front_end


@pytest.fixture
def hub(tmp_path_factory, in_an_empty_folder):
    with serve_hub(tmp_path_factory.mktemp("cache")) as server:
        yield server


def set_offline(patch, value=True):
    patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", value)


def refuse(name, kind=InputError, **options):
    """The message of an error of exactly this kind, which is one line."""
    with pytest.raises(SsmCompressError) as caught:
        ssmcompress.load(name, **options)
    assert type(caught.value) is kind, caught.value
    assert "\n" not in str(caught.value)
    return str(caught.value)


def check_same(model, path):
    """Check that a model has the logits of the one in a local file or folder."""
    expected, images = ssmcompress.load(path), images_of(model)
    with torch.no_grad():
        torch.testing.assert_close(model(images), expected(images), rtol=0, atol=0)


# ---------------------------------------------------------------------------------------------------- names


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("hustvl/Vim-tiny", HubName("hustvl/Vim-tiny")),
        ("timm/vit_tiny_patch16_224.augreg_in21k", HubName("timm/vit_tiny_patch16_224.augreg_in21k")),
        ("a/b@v1.0", HubName("a/b", "v1.0")),
        ("a/b@refs/pr/1", HubName("a/b", "refs/pr/1")),
        ("a/b:x.pth", HubName("a/b", None, "x.pth")),
        ("a/b@v1:dir/x y.pth", HubName("a/b", "v1", "dir/x y.pth")),
        ("runs/model.pth", None),
        ("runs/report.json", None),
        ("runs/MODEL.SafeTensors", None),
        ("model", None),
        ("a/b/c", None),
        ("./a/b", None),
        ("../a", None),
        ("/a/b", None),
        ("~/a", None),
        ("C:/x", None),
        (r"C:\x", None),
        (r"a\b/c", None),
        ("a/b:../x.pth", None),
        ("a/b:", None),
        ("a/b@", None),
        ("a--b/c", None),
        ("a/b.", None),
        ("a/b.git", None),
        ("a/b c", None),
        ("x/" + 97 * "a", None),
        ("a/b\0", None),
        ("a/b:c\nd", None),
        ("a/b:c\x1b[2J", None),
        ("a/b:c\x85d", None),
        ("a/b:c\u202ed", None),
        ("a/b@v\x7f", None),
    ],
)
def test_names_of_the_hub_are_told_from_local_paths(text, expected, in_an_empty_folder):
    assert parse_hub_name(text) == expected
    if expected is not None:
        assert str(expected) == text
        assert parse_hub_name(Path(text)) is None


def test_a_local_path_wins(in_an_empty_folder):
    assert name_model("owner/name.v1") == "name.v1"  # a repository's name has no ending
    assert name_model("owner/name@main:folder/best.pth") == "best"
    os.makedirs("owner/name.v1")
    assert parse_hub_name("owner/name.v1") is None


@pytest.mark.parametrize(
    ("address", "advice"),
    [
        ("https://huggingface.co/hustvl/Vim-tiny", "write hustvl/Vim-tiny"),
        ("https://huggingface.co/hustvl/Vim-tiny/tree/main", "write hustvl/Vim-tiny"),
        ("https://huggingface.co/hustvl/Vim-tiny/tree/v1", "write hustvl/Vim-tiny@v1"),
        ("https://hf.co/a/b/blob/main/x/y.pth", "write a/b:x/y.pth"),
        ("https://huggingface.co/a/b/resolve/refs%2Fpr%2F1/y.pth?download=true", "write a/b@refs/pr/1:y.pth"),
        ("hf://a/b@v1/y.pth", "write a/b@v1:y.pth"),
        ("https://huggingface.co/datasets/a/b", "download the file"),
        ("https://huggingface.co/a", "download the file"),
        ("https://huggingface.co/a/b/blob/main/x%0Ay.pth", "download the file, and name that"),
        ("https://huggingface.co/a/b/tree/v%1B1", "download the file, and name that"),
        ("https://example.com/a/b", "download the file"),
        ("https://[a/b", "download the file"),
    ],
)
def test_a_web_address_is_answered_by_the_name(address, advice):
    with pytest.raises(InputError, match="is a web address: ") as caught:
        check_no_address(address)
    assert str(caught.value).endswith(advice) or advice == "download the file"
    assert str(caught.value).isprintable()
    assert advice in refuse(address)


# ---------------------------------------------------------------------------------------------------- files


def test_the_only_file_of_weights_is_fetched_and_nothing_else(hub, checkpoint):
    files = {"README.md": b"card", "vim.pth": checkpoint, "log/events.tfevents": b"x" * 99, "optimizer.pt": b"state"}
    commit = hub.add("owner/vim", files)
    model = ssmcompress.load("owner/vim")
    check_same(model, checkpoint)
    assert hub.sent() == ["vim.pth"]
    assert model.source.path == f"owner/vim@{commit}:vim.pth"
    assert model.source.sha256 == hashlib.sha256(checkpoint.read_bytes()).hexdigest()


def test_a_folder_that_save_wrote_is_read_as_one(hub, vim, images):
    pruned = ssmcompress.prune(vim, ratio=0.5, stages=[2])
    folder = ssmcompress.save(pruned, "saved")
    files = {name: folder / name for name in ("model.safetensors", "config.json")}
    hub.add("owner/pruned", {**files, "report.json": b"{}", "kept_tokens.png": b"png", "old.pth": b"other"})
    model = ssmcompress.load("owner/pruned")
    assert sorted(hub.sent()) == ["config.json", "model.safetensors"]
    assert model.plan == pruned.plan
    with torch.no_grad():
        torch.testing.assert_close(model(images), pruned(images), rtol=0, atol=0)


def test_a_folder_of_another_tool_is_read_with_its_configuration(hub):
    from safetensors.torch import save

    vit = make_vit(heads=2)  # the width over 64 says another number
    config = {"architecture": "vit_tiny_patch16_224", "num_classes": 10, "model_args": {"num_heads": 2}}
    commit = hub.add(
        "timm/vit", {"model.safetensors": save(vit.state_dict()), "config.json": json.dumps(config).encode()}
    )
    model = ssmcompress.load("timm/vit")
    assert model.config.num_heads == 2
    assert model.source.path == f"timm/vit@{commit}"


def test_one_of_several_files_is_named(hub, checkpoint):
    files = {f"epoch{number:02}.pth": b"x" * 2000 for number in range(12)}
    hub.add("owner/many", {**files, "best/vim.pth": checkpoint})
    said = refuse("owner/many")
    assert "owner/many has 13 files of weights, epoch00.pth (2.0 kB), epoch01.pth (2.0 kB)" in said
    assert "epoch09.pth (2.0 kB) and 3 more: write owner/many:FILE" in said
    assert hub.sent() == []
    check_same(ssmcompress.load("owner/many:best/vim.pth"), checkpoint)
    assert hub.sent() == ["best/vim.pth"]


def test_a_revision_is_fetched(hub, checkpoint, tmp_path):
    old = hub.add("owner/vim", {"vim.pth": checkpoint})
    torch.save({"model": make_vim(seed=5).state_dict()}, tmp_path / "new.pth")
    new = hub.add("owner/vim", {"vim.pth": tmp_path / "new.pth"})
    hub.repositories["owner/vim"].branches["v1"] = old
    check_same(ssmcompress.load("owner/vim"), tmp_path / "new.pth")
    for revision in ("v1", old):
        model = ssmcompress.load(f"owner/vim@{revision}")
        check_same(model, checkpoint)
        assert model.source.path == f"owner/vim@{old}:vim.pth"
    assert ssmcompress.load("owner/vim@main:vim.pth").source.path == f"owner/vim@{new}:vim.pth"


def test_a_local_path_is_not_looked_up(hub, checkpoint):
    os.mkdir("owner")
    os.link(checkpoint, "owner/vim")
    assert ssmcompress.load("owner/vim").source.path == str(Path("owner/vim").absolute())
    assert "no such file or folder" in refuse("runs/model.pth")
    assert "no such file or folder" in refuse(Path("owner/other"))
    assert hub.requests == []


def test_pickles_are_read_as_carefully_as_local_ones(hub):
    import pickle

    hub.add("owner/evil", {"model.pth": pickle.dumps({"model": os.system})})
    assert "owner/evil: " in refuse("owner/evil")
    hub.add("owner/damaged", {"model.safetensors": b"damaged"})
    assert refuse("owner/damaged").startswith("owner/damaged: ")


# ---------------------------------------------------------------------------------------------------- the dense model


def test_the_dense_model_of_a_pruned_one_is_fetched_again(hub, checkpoint, tmp_path_factory, monkeypatch):
    hub.add("owner/vim", {"vim.pth": checkpoint, "other.pth": b""})
    pruned = ssmcompress.prune(ssmcompress.load("owner/vim:vim.pth"), ratio=0.5, stages=[2])
    ssmcompress.save(pruned, "saved")
    hub.add("owner/vim", {"vim.pth": b"another one"})
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path_factory.mktemp("elsewhere")))
    check_same(find_dense(ssmcompress.load("saved")), checkpoint)
    hub.requests.clear()
    find_dense(ssmcompress.load("saved"))  # a commit that is in the cache needs no network
    assert hub.requests == []
    del hub.repositories["owner/vim"]
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path_factory.mktemp("empty")))
    with pytest.raises(InputError, match="the dense model is not available: owner/vim@.*no model owner/vim on the Hub"):
        find_dense(ssmcompress.load("saved"))


# ---------------------------------------------------------------------------------------------------- what goes wrong


def test_what_the_user_named_wrongly_is_said(hub, checkpoint):
    hub.add("owner/vim", {"vim_tiny.pth": checkpoint, "README.md": b""})
    hub.add("owner/text", {"README.md": b"12345", "config.json": b"{}"})
    assert "owner/vmi: no such file or folder, and no model owner/vmi on the Hub" in refuse("owner/vmi")
    assert refuse("owner/vim@v9") == "owner/vim has no branch, tag or commit v9"
    said = refuse("owner/vim:vim_tny.pth")
    assert "owner/vim has no file vim_tny.pth; did you mean vim_tiny.pth?: it has vim_tiny.pth (" in said
    assert "it has README.md (5 B), config.json (2 B)" in refuse("owner/text")
    assert hub.sent() == []


def test_a_gated_model_needs_a_login(hub, checkpoint, monkeypatch):
    hub.add("owner/gated", {"vim.pth": checkpoint}, gated=True)
    said = refuse("owner/gated")
    assert said.startswith(f"owner/gated is gated: accept its conditions at {hub.url}/owner/gated, then log in with ")
    assert "`hf auth login`" in said
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    check_same(ssmcompress.load("owner/gated"), checkpoint)


@pytest.mark.parametrize("name", ["owner/vim", "owner/vim@main", "owner/vim:vim.pth"])
def test_offline_the_cache_serves(hub, checkpoint, monkeypatch, name):
    hub.add("owner/vim", {"vim.pth": checkpoint})
    set_offline(monkeypatch)
    said = refuse(name, SsmCompressError)
    assert said.startswith(f"{name}: no such file or folder, and it is not in the cache of the Hub: HF_HUB_OFFLINE is")
    set_offline(monkeypatch, False)
    ssmcompress.load(name)
    set_offline(monkeypatch)
    hub.requests.clear()
    check_same(ssmcompress.load(name), checkpoint)
    assert hub.requests == []
    assert "HF_HUB_OFFLINE is set" in refuse("owner/vim:other.pth", SsmCompressError)


def test_without_network_the_cache_serves_with_a_note(hub, checkpoint, monkeypatch):
    hub.add("owner/vim", {"vim.pth": checkpoint})
    ssmcompress.load("owner/vim")
    nowhere = "http://127.0.0.1:1"
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", nowhere)
    monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", nowhere + "/{repo_id}")
    said = "the Hub cannot be reached: owner/vim is the version in the cache"
    with pytest.warns(ssmcompress.SsmCompressWarning, match=said):
        check_same(ssmcompress.load("owner/vim"), checkpoint)
    said = refuse("owner/other", SsmCompressError)
    assert f"owner/other: no such file or folder, and {nowhere} cannot be reached (" in said


def test_a_broken_transfer_leaves_nothing_behind(hub, checkpoint, monkeypatch):
    hub.add("owner/vim", {"vim.pth": checkpoint})
    hub.cut.add("vim.pth")
    monkeypatch.setattr("huggingface_hub.file_download.time", SimpleNamespace(sleep=lambda _: None))
    said = refuse("owner/vim", SsmCompressError)
    assert said.startswith("owner/vim: the download of vim.pth was interrupted (")
    assert os.listdir() == []
    hub.cut.clear()
    check_same(ssmcompress.load("owner/vim"), checkpoint)


@pytest.mark.parametrize(
    "answer", [b"<html>", b"[]", b'{"id": 3}', b'{"id": "a/b", "siblings": [{"size": 3}]}', b"null"]
)
def test_a_damaged_listing_is_said(hub, checkpoint, answer):
    hub.add("owner/vim", {"vim.pth": checkpoint})
    hub.damaged = answer
    assert "owner/vim: the response of http" in refuse("owner/vim", SsmCompressError)


# ---------------------------------------------------------------------------------------------------- progress


def test_a_download_is_shown_as_other_work_is(hub, checkpoint):
    class Shown(FrontEnd):
        bars = ()

        def track(self, items, what, total, done=0):
            self.bars = (*self.bars, (what, total, done))
            for item in items:
                yield item
                self.done = item + 1

    state = {**make_vim().state_dict(), "padding": torch.zeros(1_000_000)}  # 4 MB
    torch.save(state, "big.pth")
    hub.add("owner/big", {"big.pth": Path("big.pth")})
    front_end = Shown()
    with use_front_end(front_end), pytest.raises(InputError):  # `padding` is no weight of a Vim
        ssmcompress.load("owner/big")
    assert front_end.bars == (("download big.pth, MB", 4, 0),)
    assert front_end.done >= 3
