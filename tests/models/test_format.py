"""Folders of earlier versions: format 1 as the first round wrote it."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import GOLDEN

import ssmcompress
from ssmcompress.models.saved import CONFIG_FILE

FOLDERS = sorted((GOLDEN / "format_v1").iterdir())


@pytest.fixture(params=FOLDERS, ids=lambda folder: folder.name)
def folder(request) -> Path:
    return request.param


def test_a_folder_of_format_1_gives_the_logits_that_it_gave(folder):
    model, golden = ssmcompress.load(folder), np.load(folder / "logits.npz")
    with torch.no_grad():
        logits = model(torch.from_numpy(golden["images"]))
    np.testing.assert_allclose(logits.numpy(), golden["logits"], atol=1e-6)


def test_its_configuration_is_written_again_as_it_was(folder, tmp_path):
    model = ssmcompress.load(folder)
    ssmcompress.save(model, tmp_path / "again")
    old, new = (json.loads((place / CONFIG_FILE).read_text()) for place in (folder, tmp_path / "again"))
    assert new == old


def test_its_records_are_read(folder):
    pruning = json.loads((folder / CONFIG_FILE).read_text())["pruning"]
    model = ssmcompress.load(folder)
    kinds = [kind for kind in ("reconstruction", "finetuning") if pruning[kind] is not None]
    assert [step.kind for step in model.steps] == kinds


def test_another_alignment_gives_other_logits(folder, tmp_path):
    """The golden logits thus show how a folder is read."""
    shutil.copytree(folder, tmp_path / "copy")
    config = json.loads((tmp_path / "copy" / CONFIG_FILE).read_text())
    config["pruning"]["alignment"]["scan"] = not config["pruning"]["alignment"]["scan"]
    (tmp_path / "copy" / CONFIG_FILE).write_text(json.dumps(config))
    golden = np.load(folder / "logits.npz")
    with torch.no_grad():
        logits = ssmcompress.load(tmp_path / "copy")(torch.from_numpy(golden["images"]))
    assert np.abs(logits.numpy() - golden["logits"]).max() > 1e-4
