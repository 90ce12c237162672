"""The commands on a ViT: options of EViT and ToMe, rejected options, and the same outputs as for a Vim."""

import json
from pathlib import Path

import pytest
import torch
from command_line import TUNE, call, call_json, refused
from conftest import make_vit

from ssmcompress.jobs.methods import METHODS, choose_methods, make_levels


@pytest.fixture
def vit(tmp_path):
    torch.save({"model": make_vit().state_dict()}, tmp_path / "vit.pth")
    return tmp_path / "vit.pth"


@pytest.fixture
def work(in_an_empty_folder):
    return None


HEADS = ("--num-heads", 3)


def test_inspect_counts_attention(vit, work):
    report = call_json("inspect", vit, *HEADS)
    assert report["architecture"]["type"] == "vit"
    assert report["flops"]["by_part"]["attention"] == pytest.approx(4 * 2 * 17**2 * 24 / 1e9)
    assert report["range"]["stages"] == [1, 2, 3]
    assert list(report["range"]["axes"]) == ["tokens"]
    assert "give --num-heads" in refused("inspect", vit)


@pytest.mark.parametrize(
    ("options", "counts"),
    [
        (("--ratio", "0.3", "--stages", "1,3"), [13, 10]),
        (("--ratio", "0.3", "--stages", "1,3", "--fuse"), [14, 12]),
        (("--merge", "2"), [15, 13, 11, 9]),
        (("--merge", "2,-1"), [13, 11, 10]),
    ],
)
def test_prune_save_and_export(vit, class_folders, work, options, counts):
    report = call_json(
        "prune", vit, *HEADS, *options, "--data", class_folders, "--no-latency", "--reconstruct", "-o", "pruned"
    )
    assert [stage["kept"] for stage in report["stages"]] == counts
    assert report["reconstruction"]["images"] > 1
    again = call_json("evaluate", "pruned", "--data", class_folders)
    assert again["images"] == 20
    call("export", "pruned", "--onnx", "-o", "pruned.onnx", "--no-latency")
    verified = call_json("verify", "pruned", "pruned.onnx")
    assert verified["max_difference"] < 1e-4


def test_a_budget_is_searched_for_and_met(vit, class_folders, work):
    options = (*HEADS, "--data", class_folders, "--no-latency")
    report = call_json("prune", vit, *options, "--flops", "75%", "-o", "searched")
    assert report["pruned"]["flops"]["full"] <= 0.75 * report["dense"]["flops"]["full"]
    assert {stage["importance"] for stage in report["stages"]} <= {"clip", "l1", "l2", "saliency", "attention"}
    alike = call_json("prune", vit, *options, "--flops", "75%", "--no-search", "--fuse", "-o", "alike")
    assert alike["pruned"]["flops"]["full"] <= 0.75 * alike["dense"]["flops"]["full"]
    assert {stage["importance"] for stage in alike["stages"]} == {"attention"}


def test_fine_tuning(vit, class_folders, work):
    call("prune", vit, *HEADS, "--ratio", "0.3", "--data", class_folders, "--no-latency", "-o", "pruned")
    call("finetune", "pruned", "--data", class_folders, *TUNE, "-o", "tuned")
    config = json.loads(Path("tuned/config.json").read_text())
    assert config["architecture"]["num_heads"] == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--importance", "delta"), "importance 'delta': layer 1 of a vit has none"),
        (("--fuse", "--importance", "l1"), "merge 'fused' weighs tokens by importance 'attention'"),
        (("--fuse", "--flops", "60%"), "--fuse: a search drops tokens"),
        (("--merge", "2", "--ratio", "0.3"), "--ratio and --merge: expected one of them"),
        (("--merge", "2", "--stages", "1"), "--merge and --stages"),
        (("--merge", "two"), "--merge 'two': expected a number of tokens"),
        (("--merge", "0"), "0 tokens to merge in each layer: expected a whole number"),
        (("--merge", "2,3"), "inflection 3.0: expected from -1 to 1"),
        (("--flops", "60%", "--axes", "states"), "states"),
        (("--stages", "5"), "cannot prune after layer 5: the model has 4 layers, so a stage is 1 to 4"),
        (("--num-heads", "5"), "`num_heads` 5|--num-heads 5"),
    ],
)
def test_what_does_not_go_together_is_refused(vit, work, options, message):
    heads = () if "--num-heads" in options else HEADS
    assert any(part in refused("prune", vit, *heads, *options) for part in message.split("|"))


def test_a_vim_is_refused_what_only_attention_has(checkpoint, work):
    for options in (("--merge", "2"), ("--importance", "attention"), ("--fuse", "--importance", "attention")):
        assert "of a vim has none" in refused("prune", checkpoint, *options)
    assert "weighs tokens by importance 'attention'" in refused("prune", checkpoint, "--fuse")


def test_a_comparison_has_the_methods_of_attention(vit, class_folders, work):
    names = {method.name for method in choose_methods(make_vit(), None, reconstruct=True)}
    assert {"EViT", "EViT, fused", "ToMe", "EViT, reconstructed", "ToMe, reconstructed", "smaller image"} <= names
    assert not names & {"clip, aligned", "MTR", "all axes", "states, reconstructed"}
    methods = ("--methods", "EViT; EViT, fused; ToMe; smaller image")
    result = call_json("compare", vit, *HEADS, "--data", class_folders, "--ratios", "0.3", "--no-latency", *methods)
    rows = {row["method"]: row for row in result["rows"]}
    assert not [row for row in rows.values() if row.get("failed")]
    level = make_levels(make_vit(), None, (0.3,))[0].flops
    assert all(row["flops_share"] <= level for name, row in rows.items() if name != "dense")
    assert len(rows["ToMe"]["stages"]) == 4
    assert {"EViT", "ToMe"} <= {method.name for method in METHODS}
