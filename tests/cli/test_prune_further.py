"""`prune` of a compressed folder continues from its weights and plan, or explains why it cannot."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from command_line import TUNE, call, call_json, refused
from conftest import images_of, make_plain_mamba, make_vim, make_vit, write_image
from segmenters import make_vim_upernet, write_scenes

import ssmcompress
from ssmcompress.errors import InputError

QUICK = ("--no-latency",)


@pytest.fixture(autouse=True)
def work(in_an_empty_folder):
    return None


def state_of(folder):
    return ssmcompress.load(folder).state_dict()


def same(one, other):
    one, other = state_of(one), state_of(other)
    return one.keys() == other.keys() and all(torch.equal(value, other[key]) for key, value in one.items())


def test_a_plain_folder_becomes_what_the_dense_model_becomes(checkpoint, class_folders):
    options = ("--data", class_folders, "--no-reconstruct", *QUICK)
    call("prune", checkpoint, "--ratio", "0.2", "--stages", "1,3", "--importance", "l2", *options, "-o", "first")
    said = call("prune", "first", "--ratio", "0.5", *options).stderr
    assert "taken over from the plan of the model: stages 1,3; importance l2; alignment conv and scan" in said
    call("prune", checkpoint, "--ratio", "0.5", "--stages", "1,3", "--importance", "l2", *options, "-o", "direct")
    folder = "compressed/first-r0.50-no-reconstruct"
    assert same(folder, "direct")
    configs = [json.loads(Path(name, "config.json").read_text()) for name in (folder, "direct")]
    assert configs[0]["pruning"]["stages"] == configs[1]["pruning"]["stages"]
    assert configs[0]["pruning"]["source"] == configs[1]["pruning"]["source"]
    images = images_of(make_vim())
    with torch.no_grad():
        logits = ssmcompress.load(folder)(images)
        shutil.rmtree("first")
        os.remove(checkpoint)
        assert torch.equal(ssmcompress.load(folder)(images), logits)  # nothing else is needed
    assert configs[0]["pruning"]["kept"] == [9, 5]


def test_the_report_has_the_model_as_it_came_and_says_what_it_was(pruned_folder, class_folders):
    report = call_json("prune", "pruned", "--ratio", "0.7", "--data", class_folders, *QUICK, "-o", "m")
    assert [name for name in report if isinstance(report[name], dict) and "flops" in report[name]] == [
        "dense", "input", "naive", "aligned", "pruned",
    ]  # fmt: skip
    before = call_json("evaluate", "pruned", "--data", class_folders)
    first = json.loads(Path("pruned/report.json").read_text())
    assert report["input"]["flops"] == first["pruned"]["flops"]
    assert report["input"]["top1"] == first["pruned"]["top1"]
    assert before["images"] == 20
    assert report["pruned"]["flops"]["full"] < report["input"]["flops"]["full"]
    made_from = report["made_from"]
    assert made_from["path"] == str(Path("pruned").absolute())
    assert made_from["stages"] == [{"after": s["after"], "kept": s["kept"]} for s in first["stages"]]
    assert made_from["steps"] == ["reconstruction"]
    sentence = (
        f"made from {Path('pruned').absolute()}, which keeps 9, 5, 3 tokens after layers 1, 2, 3 and was reconstructed"
    )
    assert sentence in Path("m/README.md").read_text()
    assert sentence in " ".join(call("report", "m").stdout.split())
    assert "column input: the compressed model that was pruned further" in Path("m/README.md").read_text()
    call("report", "m", "--html", "m.html")
    steps = [step["kind"] for step in json.loads(Path("m/config.json").read_text())["pruning"]["steps"]]
    assert steps == ["input", "reconstruction"]
    # Prune a third time: each record appears once, with the whole chain of models.
    further = call_json("prune", "m", "--ratio", "0.8", "--no-reconstruct", *QUICK, "-o", "n")
    assert further["made_from"]["input"] == made_from
    assert further["reconstruction"] is None  # the reconstruction of the input model does not belong to this run
    loaded = ssmcompress.load("n")
    assert [step.kind for step in loaded.steps] == ["reconstruction", "input"]
    assert loaded.learnt.complete
    assert set(ssmcompress.load("m").learnt.digests) <= set(loaded.learnt.digests)


def test_the_recipe_makes_the_same_weights(pruned_folder, class_folders):
    call("prune", "pruned", "--ratio", "0.7", "--data", class_folders, *QUICK, "-o", "m")
    call("run", "m/recipe.yaml", "-o", "again")
    assert same("m", "again")
    (folder := Path("pruned/model.safetensors")).write_bytes(folder.read_bytes() + b" ")
    assert "has changed since" in refused("run", "m/recipe.yaml", "-o", "other")


def test_a_run_that_was_stopped_goes_on_to_the_same_weights(pruned_folder, class_folders, monkeypatch):
    options = ("--ratio", "0.7", "--data", class_folders, *QUICK)
    call("prune", "pruned", *options, "-o", "m")

    def stop(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("ssmcompress.jobs.prune.write_folder", stop)
        patch.setattr("ssmcompress.jobs.prune.WORTH_KEEPING", 0)
        assert "--resume`" in call("prune", "pruned", *options, "-o", "n", code=130).stderr
    assert os.listdir("n.results")
    call("prune", "pruned", *options, "-o", "n", "--resume")
    assert same("m", "n")
    assert not os.path.exists("n.results")


def test_an_exported_file_goes_on_too(pruned_folder, class_folders):
    call("export", "pruned", "-o", "one.safetensors")
    options = ("--ratio", "0.7", "--data", class_folders, *QUICK)
    report = call_json("prune", "one.safetensors", *options, "-o", "m")
    call("prune", "pruned", *options, "-o", "n")
    assert same("m", "n")
    assert report["made_from"]["path"] == str(Path("one.safetensors").absolute())
    assert call_json("inspect", "pruned")["commands"][0] == "prune"


def test_a_dry_run_counts_and_makes_a_plan(checkpoint, pruned_folder, class_folders):
    value = call_json("prune", "pruned", "--ratio", "0.7", "--dry-run")
    dense = call_json("prune", checkpoint, "--ratio", "0.7", "--dry-run")
    assert (value["stages"], value["dense"], value["plan"]) == (dense["stages"], dense["dense"], dense["plan"])
    assert value["pruned"]["flops"]["full"] < value["input"]["flops"]["full"] < value["dense"]["flops"]["full"]
    Path("plan.json").write_text(json.dumps(value))
    options = ("--data", class_folders, *QUICK)
    call("prune", "pruned", "--plan", "plan.json", *options, "-o", "m")
    call("prune", "pruned", "--ratio", "0.7", *options, "-o", "n")
    assert same("m", "n")


def test_a_budget_is_a_share_of_the_dense_model(checkpoint, pruned_folder, class_folders):
    options = ("--flops", "40%", "--no-search", "--data", class_folders, *QUICK)
    report = call_json("prune", "pruned", *options, "-o", "m")
    assert report["pruned"]["flops"]["full"] <= 0.4 * report["dense"]["flops"]["full"]
    direct = call_json("prune", checkpoint, *options, "-o", "n")
    assert report["stages"] == direct["stages"]
    said = call("prune", "pruned", "--flops", "95%", "--no-search", "-o", "x", code=2).stderr
    assert "by this plan it would have" in said
    report = call_json("prune", "pruned", *options, "--no-reconstruct", "-o", "o")  # its corrections are kept
    assert report["pruned"]["flops"]["full"] <= 0.4 * report["dense"]["flops"]["full"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--ratio", "0.2"), "tokens left before layer 2, and by this plan it would have"),
        (("--ratio", "0.2"), "or start from the dense model, {DENSE}"),
        (("--stages", "2"), "tokens left before layer 2, and by this plan it would have 17"),
        (
            ("--flops", "50%"),
            "give --ratio, --plan or --no-search to compress it further, or search on the dense model, {DENSE}",
        ),
        (("--latency", "50%"), "--latency: a search measures what a dense model loses"),
        (("--max-drop", "1"), "give --ratio, --plan or --flops with --no-search"),
        (("--plan", "trims.json"), "trims {{'states': 2}}, and the model has lost nothing but tokens"),
        (("--ratio", "0.7", "--dense", "pruned"), "pruned is pruned itself; expected a dense model"),
        (("--ratio", "0.7", "--dense", "OTHER"), "--dense differs in size"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_what_cannot_go_on_says_why(checkpoint, pruned_folder, tmp_path, options, message):
    plan = ssmcompress.make_plan(make_vim(), ratio=0.7).to_dict()
    Path("trims.json").write_text(json.dumps({"plan": plan, "trims": {"states": 2}}))
    other = tmp_path / "other.pt"
    torch.save({"model": make_vim(depth=5).state_dict(), "args": {"model": "vim"}}, other)
    options = [str(other) if word == "OTHER" else word for word in options]
    assert message.format(DENSE=checkpoint) in refused("prune", "pruned", *options)
    refused("prune", "pruned", *options, "--dry-run")


def test_the_input_is_not_replaced(pruned_folder, class_folders):
    before = state_of("pruned")
    for folder in ("pruned", "."):
        said = call("prune", "pruned", "--ratio", "0.7", "-o", folder, "--force", code=2).stderr
        assert f"{folder} is, or holds, the input pruned; choose another output" in said
    after = state_of("pruned")
    assert all(torch.equal(value, after[key]) for key, value in before.items())


def test_the_dense_model_has_to_be_there(checkpoint, pruned_folder):
    moved = checkpoint.with_name("moved.pt")
    os.rename(checkpoint, moved)
    said = refused("prune", "pruned", "--ratio", "0.7")
    assert f"further needs the dense one, but the dense model {checkpoint} is gone: give it as --dense" in said
    call("prune", "pruned", "--ratio", "0.7", "--dense", moved, *QUICK, "-o", "m")
    shutil.copy(moved, checkpoint)
    with open(checkpoint, "ab") as file:
        file.write(b" ")
    assert f"{checkpoint} has changed since: give it as --dense" in refused("prune", "pruned", "--ratio", "0.7")
    assert "--dense is for compressed models" in refused("prune", moved, "--dense", moved)


def test_a_fine_tuned_model_is_measured_on_images_that_it_did_not_learn_from(checkpoint, tmp_path):
    for number in range(40):
        write_image(tmp_path / "many" / f"class{number % 10}" / f"{number}.png", seed=number)
    data = ("--data", tmp_path / "many")
    call("prune", checkpoint, "--ratio", "0.2", *data, *QUICK, "-o", "first")
    call("finetune", "first", *data, *TUNE, "-o", "tuned")
    report = call_json("prune", "tuned", "--ratio", "0.5", *data, *QUICK, "-o", "m")
    assert (report["data"]["overlap"], report["data"]["images"]) == (0, 4)
    assert report["made_from"]["steps"] == ["reconstruction", "finetuning"]
    assert "reconstructed, fine-tuned" in Path("m/README.md").read_text()
    options = ("--finetune-epochs", 1, "--set", "batch_size=6")
    report = call_json("prune", "tuned", "--ratio", "0.5", "--reconstruct", *data, *QUICK, *options, "-o", "n")
    assert {"dense", "input", "naive", "pruned"} < report.keys()
    assert "before" not in report
    assert report["made_from"]["steps"] == ["reconstruction", "finetuning"]


def test_a_trimmed_folder_drops_tokens(checkpoint, class_folders):
    images = images_of(make_vim(), 30)
    trimmed = ssmcompress.trim_states(ssmcompress.drop_layers(ssmcompress.load(checkpoint), [2]), 2, images)
    ssmcompress.save(trimmed, "trimmed")
    options = ("--data", class_folders, *QUICK)
    report = call_json("prune", "trimmed", "--ratio", "0.3", *options, "-o", "m")
    assert report["trims"]["states"] == 2
    assert report["trims"]["layers"] == [2]
    assert report["made_from"]["steps"] == ["layers", "states"]
    assert "made from" in Path("m/README.md").read_text()
    further = call_json("prune", "m", "--ratio", "0.6", *options, "-o", "n")
    assert further["trims"]["layers"] == [2]
    assert [s["kept"] for s in further["stages"]] < [s["kept"] for s in report["stages"]]
    # Its own plan includes its trims, and a plan for other layers would not fit.
    Path("plan.json").write_text(call("prune", "m", "--ratio", "0.6", "--dry-run", "--json").stdout)
    call("prune", "m", "--plan", "plan.json", *options, "-o", "o")
    assert same("n", "o")
    call("prune", checkpoint, "--ratio", "0.6", *options, "-o", "direct")
    said = refused("prune", "m", "--plan", "direct")
    assert "direct: the plan trims nothing, and the model has lost {'states': 2, 'layers': [2]}" in said


def test_in_python(checkpoint, class_folders):
    dense = ssmcompress.load(checkpoint)
    first = ssmcompress.prune(dense, ratio=0.2)
    report = ssmcompress.compress(first, ssmcompress.make_plan(first, ratio=0.5), "m")
    assert report["made_from"]["path"] is None
    assert "made from a compressed model, which keeps" in Path("m/README.md").read_text()
    assert first.steps == ()
    in_memory = ssmcompress.prune(make_vim(), ratio=0.2)
    with pytest.raises(InputError, match="the dense model was never a file: give it as `dense`"):
        ssmcompress.compress(in_memory, ssmcompress.make_plan(in_memory, ratio=0.5), "n")
    ssmcompress.compress(in_memory, ssmcompress.make_plan(in_memory, ratio=0.5), "n", dense=make_vim())
    with pytest.raises(InputError, match="`dense` is compressed itself"):
        ssmcompress.compress(in_memory, ssmcompress.make_plan(in_memory, ratio=0.5), "o", dense=first)
    with pytest.raises(InputError, match="by this plan it would have"):
        ssmcompress.compress(in_memory, ssmcompress.make_plan(make_vim(), ratio=0.1), "o", dense=make_vim())


@pytest.mark.parametrize("value", [[], {}, {"stages": [{"after": 1}], "steps": []}, {"stages": [], "steps": [1]}])
def test_a_damaged_record_of_the_model_before_is_refused(pruned_folder, value):
    call("prune", "pruned", "--ratio", "0.7", *QUICK, "-o", "m")
    config = json.loads(Path("m/config.json").read_text())
    next(step for step in config["pruning"]["steps"] if step["kind"] == "input")["values"] = value
    Path("m/config.json").write_text(json.dumps(config))
    assert "config.json" in refused("evaluate", "m")


@pytest.mark.parametrize("name", ["plain_mamba", "vit", "vit fused", "vit merged"])
def test_other_architectures_go_on(name, tmp_path, class_folders):
    model = make_plain_mamba() if name == "plain_mamba" else make_vit()
    torch.save({"model": model.state_dict()}, tmp_path / "dense.pth")
    given = ("--num-heads", 3) if name != "plain_mamba" else ()
    data = ("--data", class_folders, "--reconstruct", *QUICK)
    ways = {"vit fused": (("--ratio", "0.2", "--fuse"), ("--ratio", "0.5"))}
    ways["vit merged"] = (("--merge", "1"), ("--merge", "3"))
    first, second = ways.get(name, (("--ratio", "0.2"), ("--ratio", "0.5")))
    call("prune", tmp_path / "dense.pth", *given, *first, *data, "-o", "first")
    report = call_json("prune", "first", *second, *data, "-o", "m")
    direct = call_json("prune", tmp_path / "dense.pth", *given, *second, *first[2:], *data, "-o", "n")
    assert report["stages"] == direct["stages"]
    assert report["plan"]["stages"] == direct["plan"]["stages"]
    assert {"dense", "input", "naive", "pruned"} < report.keys()
    again = call_json("evaluate", "m", "--data", class_folders)
    assert again["images"] == 20
    if name == "vit merged":
        assert "which a ratio does not describe: give --merge with more tokens" in refused(
            "prune", "m", "--ratio", "0.9"
        )


def test_a_segmentation_model_maps_its_levels_anew(tmp_path):
    torch.save({"state_dict": make_vim_upernet().state_dict()}, tmp_path / "s.pth")
    write_scenes(tmp_path / "scenes", 24)
    data = ("--data", tmp_path / "scenes", *QUICK)
    call("prune", tmp_path / "s.pth", "--ratio", "0.2", "--stages", "2,4", *data, "-o", "first")
    report = call_json("prune", "first", "--ratio", "0.5", *data, "-o", "m")
    assert [stage["after"] for stage in report["stages"]] == [2, 4]
    assert {"dense", "input", "naive", "aligned", "mapped", "pruned"} < report.keys()
    steps = [step["kind"] for step in json.loads(Path("m/config.json").read_text())["pruning"]["steps"]]
    assert steps == ["input", "level_maps", "reconstruction"]
    # Corrections of such a small model exceed most budgets.
    data = (*data, "--no-reconstruct")
    call("prune", tmp_path / "s.pth", "--ratio", "0.2", "--stages", "2,4", *data, "-o", "first", "--force")
    budget = ("--flops-backbone", "70%", "--no-search")
    report = call_json("prune", "first", *budget, *data, "-o", "n")
    direct = call_json("prune", tmp_path / "s.pth", *budget, "--stages", "2,4", *data, "-o", "o")
    assert (report["stages"], report["plan"]) == (direct["stages"], direct["plan"])
