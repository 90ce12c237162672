"""The commands with names of the Hugging Face Hub where they take a model."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
from command_line import call, call_json, refused
from fake_hub import serve_hub


@pytest.fixture
def hub(tmp_path_factory, in_an_empty_folder):
    with serve_hub(tmp_path_factory.mktemp("cache")) as server:
        yield server


def published(hub, folder):
    """Put the files of a folder into a repository."""
    hub.add("owner/pruned", {file.name: file for file in Path(folder).iterdir()})
    shutil.rmtree(folder)


def test_a_model_of_the_hub_is_pruned_into_a_folder_of_its_name(hub, checkpoint, class_folders):
    commit = hub.add("owner/vim", {"vim_t.pth": checkpoint, "other.pth": b""})
    assert call_json("inspect", "owner/vim:vim_t.pth")["params"] > 0
    call("prune", "owner/vim:vim_t.pth", "--ratio", 0.5, "--data", class_folders, "--no-latency")
    assert os.listdir("compressed") == ["vim_t-r0.50"]
    source = json.loads(Path("compressed/vim_t-r0.50/config.json").read_text())["pruning"]["source"]
    assert source["path"] == f"owner/vim@{commit}:vim_t.pth"
    shown = call("evaluate", "compressed/vim_t-r0.50", "--data", class_folders)
    assert "same class as dense" in shown.stdout  # the dense model came from the cache
    assert hub.sent() == ["vim_t.pth"]


def test_the_repository_names_the_folder(hub, checkpoint):
    hub.add("owner/vim.v2", {"vim_t.pth": checkpoint})
    plan = call_json("prune", "owner/vim.v2", "--ratio", 0.5, "--dry-run")
    assert plan
    call("compare", "owner/vim.v2", "--ratios", 0.5, "--methods", "naive", "--no-latency")
    call("export", "owner/vim.v2")
    assert sorted(os.listdir()) == ["compared", "vim.v2.safetensors"]
    assert os.listdir("compared") == ["vim.v2"]


def test_a_pruned_model_of_the_hub_has_its_report(hub, pruned_folder, checkpoint, class_folders):
    expected = json.loads((pruned_folder / "report.json").read_text())
    published(hub, pruned_folder)
    assert call_json("report", "owner/pruned") == expected
    call("report", "owner/pruned", "--html", "report.html")
    assert "<title>pruned" in Path("report.html").read_text()
    assert "model.safetensors" not in hub.sent()
    assert call_json("evaluate", "owner/pruned", "--data", class_folders, "--dense", checkpoint)["agreement"]
    hub.add("owner/dense", {"vim.pth": checkpoint})
    call("evaluate", "owner/pruned", "--data", class_folders, "--dense", "owner/dense")
    call("export", "owner/pruned")
    assert call_json("report", "pruned.safetensors") == expected
    assert sorted(os.listdir()) == ["pruned.safetensors", "report.html"]


def test_errors_are_one_line(hub, monkeypatch):
    hub.add("owner/many", {"a.pth": b"", "b.pth": b""})
    assert "owner/many has 2 files of weights, a.pth (0 B), b.pth (0 B): write owner/many:FILE" in refused(
        "inspect", "owner/many"
    )
    assert "no model owner/typo on the Hub" in refused("prune", "owner/typo")
    assert "no model compressed/typo on the Hub" in refused("report", "compressed/typo")
    assert "has no report.json" in refused("report", "owner/many")
    said = refused("prune", "https://huggingface.co/owner/many/blob/main/a.pth")
    assert "is a web address: write owner/many:a.pth" in said
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    said = refused("prune", "owner/vim", code=1)
    assert "owner/vim: no such file or folder, and it is not in the cache of the Hub: HF_HUB_OFFLINE is set" in said
