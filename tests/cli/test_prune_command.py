"""`prune`: results, folders, options and plans."""

import json
import os
from pathlib import Path

import pytest
import torch
from command_line import call, call_json, refused
from conftest import GOLDEN, select_bundled_images, write_image
from PIL import Image

from ssmcompress.jobs.pictures import LINE

pytestmark = pytest.mark.usefixtures("in_an_empty_folder")


def test_prune_on_labelled_images_reports_everything(checkpoint, class_folders):
    found = call_json("prune", checkpoint, "--ratio", "0.5", "--data", class_folders, "--samples", 8, "--seed", 3)
    assert found["data"] == {
        "name": str(class_folders), "images": 12, "labelled": True, "overlap": 0, "unreadable": [],
    }  # fmt: skip
    assert (found["calibration"]["name"], found["calibration"]["images"]) == (str(class_folders), 8)
    assert found["stages"] == [
        {"after": 1, "kept": 9, "of": 17, "importance": "clip"},
        {"after": 2, "kept": 5, "of": 9, "importance": "clip"},
        {"after": 3, "kept": 3, "of": 5, "importance": "clip"},
    ]
    assert found["alignment"] == {"conv": True, "scan": True, "gap": "calibrated"}
    for name in ("dense", "naive", "pruned"):
        assert 0 <= found[name]["top1"] <= found[name]["top5"] <= 100
    assert found["pruned"]["flops"]["full"] < found["dense"]["flops"]["full"]
    fitted = found["reconstruction"]
    added = sum(2 * 16 * rank for rank in fitted["correction_ranks"].values())
    # The inputs of class token corrections are its update, and the sum and token count of each of five segments.
    added += sum((16 + 5 * 17 + 16) * rank for rank in fitted["class_correction_ranks"].values())
    assert found["pruned"]["params"] == found["dense"]["params"] + added
    assert min(found["pruned"]["latency_ms"], found["dense"]["latency_ms"]) > 0
    assert 0 <= found["agreement"]["top1"] <= 100 <= 100 + found["agreement"]["kl"]
    assert found["command"].startswith(f"ssmcompress prune {checkpoint} --ratio 0.5")
    assert found["versions"]["torch"] == torch.__version__
    folder = "compressed/model-r0.50-seed3"
    assert call_json("report", folder) == found
    again = call_json("evaluate", folder, "--data", class_folders)
    assert (again["images"], again["data"]["labelled"]) == (20, True)
    assert again["agreement"]["top1"] is not None
    config = json.loads(Path(folder, "config.json").read_text())
    assert config["pruning"]["kept"] == [9, 5, 3]
    assert config["pruning"]["source"]["path"] == str(checkpoint)
    assert config["data"] == str(class_folders)
    with Image.open(f"{folder}/kept_tokens.png") as picture:
        # Four images, each whole and after three stages, with titles of two lines.
        assert picture.width == picture.height - 2 * LINE


def test_evaluation_images_of_their_own_and_their_overlap(checkpoint, class_folders, tmp_path):
    options = ("--data", class_folders, "--no-latency", "--stages", 2)
    found = call_json("prune", checkpoint, "--eval-data", class_folders, *options, "-o", "a")
    assert (found["calibration"]["images"], found["data"]["images"], found["data"]["overlap"]) == (20, 20, 20)
    assert found["pruned"]["latency_ms"] is None
    write_image(tmp_path / "others" / "x.png", 777)
    found = call_json("prune", checkpoint, "--eval-data", tmp_path / "others", *options, "-o", "b")
    assert (found["data"]["images"], found["data"]["labelled"], found["data"]["overlap"]) == (1, False, 0)
    assert (found["pruned"]["top1"], found["dense"]["top5"]) == (None, None)


def test_no_align_is_the_naive_row(checkpoint, class_folders):
    options = ("--data", class_folders, "--ratio", 0.6, "--no-latency", "--no-reconstruct")
    aligned = call_json("prune", checkpoint, *options)
    naive = call_json("prune", checkpoint, *options, "--no-align")
    assert "naive" not in naive
    assert naive["pruned"] == aligned["naive"]
    assert naive["alignment"] == {"conv": False, "scan": False, "gap": None}
    assert os.path.isdir("compressed/model-r0.60-no-align-no-reconstruct")


def test_batch_size_changes_no_figure(checkpoint, class_folders):
    options = ("--data", class_folders, "--no-latency", "--ratio", 0.4)
    one, other = (call_json("prune", checkpoint, *options, "--batch-size", n, "-o", f"m{n}") for n in (1, 7))
    for block in ("data", "dense", "naive", "pruned"):
        assert one[block] == other[block]
    assert one["agreement"]["top1"] == other["agreement"]["top1"]


def test_a_budget(checkpoint):
    result = call("prune", checkpoint, "--flops", "80%", "--no-search", "--json", "--no-latency")
    found = json.loads(result.stdout)
    assert "reachable with stages 1,2,3" in result.stderr
    assert found["pruned"]["flops"]["full"] <= 0.8 * found["dense"]["flops"]["full"]
    for share in ("1%", "100%", "140%", "0"):
        assert "out of reach" in refused("prune", checkpoint, "--flops", share, "--quiet", code=3)


def test_a_dry_run_writes_nothing_and_its_plan_can_be_used(checkpoint, class_folders):
    found = call_json("prune", checkpoint, "--ratio", "0.2,0.5", "--stages", "1,3", "--importance", "l1", "--dry-run")
    assert os.listdir() == []
    assert [s["kept"] for s in found["stages"]] == [14, 8]
    with open("plan.json", "w") as file:
        json.dump(found, file)
    made = call_json("prune", checkpoint, "--plan", "plan.json", "--no-latency", "-o", "m")
    assert made["stages"] == found["stages"]
    again = call_json("prune", checkpoint, "--plan", "m/config.json", "--no-latency", "-o", "n")
    assert again["stages"] == made["stages"]
    with_images = ("--data", class_folders, "--no-latency")
    call("prune", checkpoint, *with_images, "-o", "calibrated")
    made = call_json("prune", checkpoint, "--plan", "calibrated/config.json", *with_images, "-o", "o")
    assert made["alignment"]["gap"] == "calibrated"
    for option in (("--importance", "l1"), ("--no-align",), ("--stages", "1")):
        assert "the plan already sets that" in refused("prune", checkpoint, "--plan", "plan.json", *option)
    Path("empty.json").write_text('{"stages": []}')
    assert "prunes nothing" in refused("prune", checkpoint, "--plan", "empty.json")


def test_gap_is_calibrated_where_data_is_given_else_bias(checkpoint, class_folders):
    def gap(*options):
        return call_json("prune", checkpoint, "--no-latency", "--force", *options)["alignment"]["gap"]

    assert gap() == "bias"
    assert gap("--data", class_folders) == "calibrated"
    assert gap("--data", class_folders, "--gap", "bias") == "bias"


def test_default_names_say_what_was_chosen(checkpoint):
    os.symlink(checkpoint, "linked.pt")
    call("prune", "linked.pt", "--no-latency", "--quiet")
    options = ("--ratio", "0.2,0.301", "--stages", "1,3", "--importance", "l2", "--no-align", "--gap", "bias")
    call("prune", checkpoint, *options, "--seed", 4, "--image-size", "20x16", "--no-latency", "--quiet")
    names = sorted(os.listdir("compressed"))
    assert names == ["linked-r0.30", "model-r0.20-0.301-s1-3-l2-no-align-gap-bias-seed4-image20x16"]


@pytest.mark.parametrize("value", ["0", "1", "-1", "nan", "inf", "0.3,0", "lots", "", "0.1,0.2"])
def test_bad_ratios(checkpoint, value):
    assert "ratio" in refused("prune", checkpoint, "--ratio", value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--stages", "4"], "cannot prune after layer 4: the model has 4 layers, so a stage is 1 to 3"),
        (["--stages", "0"], "stage is 1 to 3"),
        (["--stages", "a"], "--stages a: expected comma-separated numbers"),
        (["--stages", "2,1"], "rising order"),
        (["--importance", "best"], "'best'"),
        (["--flops", "60%", "--ratio", "0.3"], "expected one of them"),
        (["--flops", "nan%"], "--flops nan%"),
        (["--plan", "none.json"], "cannot read none.json"),
        (["--image-size", "tall"], "--image-size tall"),
        (["--image-size", "2"], "smaller than the patches"),
        (["--stride", "0"], "--stride"),
        (["--device", "cuda:99"], "--device cuda:99"),
        (["--mean", "1,2"], "mean"),
        (["--weights", "model_ema"], "no weights under 'model_ema'"),
        (["--data", "nowhere"], "no data at nowhere"),
        (["--data", "/dev/null"], "expected a folder of images"),
        (["--batch-size", "0"], "--batch-size"),
        (["--nonsense"], "No such option"),
        (["--samples", "0"], "--samples"),
    ],
    ids=lambda v: " ".join(v) if isinstance(v, list) else "",
)
def test_bad_options(checkpoint, options, message):
    assert message in refused("prune", checkpoint, *options)


def test_an_output_that_exists_is_left_alone_and_a_pruned_model_is_not_pruned_less(checkpoint):
    os.mkdir("m")
    with open("m/mine.txt", "w") as file:
        file.write("mine")
    assert "m exists" in refused("prune", checkpoint, "-o", "m")
    assert "did not write" in refused("prune", checkpoint, "-o", "m", "--force")
    assert os.listdir("m") == ["mine.txt"]
    os.remove("m/mine.txt")
    call("prune", checkpoint, "-o", "m", "--force", "--no-latency")
    call("prune", checkpoint, "-o", "m", "--force", "--no-latency")
    assert "by this plan it would have" in refused("prune", "m", "--ratio", "0.1", "-o", "n")
    Path("m", "model.onnx").write_bytes(b"a graph")  # where `export` puts it
    assert "m/model.onnx exists" in refused("export", "m", "--onnx")


def test_figures_of_the_trained_model(tmp_path):
    """An independent implementation measured 83.95 % dense, 65.2 % aligned and 52.1 % naive on 2,000 images.

    It had 75.8 % after a reconstruction on 1,024 images; this test uses 128. On 500 of its images the standard errors
    are 1.4, 1.8 and 1.9 points; two of them are allowed in addition to the 1 and 1.5 points of all 2,000.
    """
    images = select_bundled_images(500, tmp_path / "images.parquet")
    found = call_json(
        "prune", GOLDEN / "vim_fashion_mnist.pth", "--mean", 0.2860, "--std", 0.3530, "--crop-pct", 1.0,
        "--stages", "2,4,6", "--ratio", 0.3, "--data", images, "--eval-data", images, "--samples", 128, "--no-latency",
    )  # fmt: skip
    assert (found["data"]["images"], found["data"]["labelled"], found["data"]["overlap"]) == (500, True, 128)
    assert found["dense"]["top1"] == pytest.approx(84, abs=1 + 2 * 1.4)
    assert found["aligned"]["top1"] == pytest.approx(65.2, abs=1.5 + 2 * 1.8)
    assert found["pruned"]["top1"] >= found["aligned"]["top1"] + 7  # on the same images: 72 % of all 2,000
    assert found["naive"]["top1"] == pytest.approx(52, abs=1.5 + 2 * 1.9)
    assert [s["kept"] for s in found["stages"]] == [139, 98, 69]


def test_the_seed_chooses_the_images(checkpoint, class_folders):
    options = ("--data", class_folders, "--no-latency", "--samples", 3)
    one, other = (call_json("prune", checkpoint, *options, "--seed", s)["calibration"] for s in (1, 2))
    assert one["mean_score"] != other["mean_score"]


def test_a_few_images_one_of_them_damaged(checkpoint, tmp_path):
    for i in range(3):
        write_image(tmp_path / "few" / f"{i}.png", i)
    (tmp_path / "few" / "x.png").write_text("no image")
    for seed in range(4):
        options = ("--data", tmp_path / "few", "--samples", 1, "--seed", seed, "--no-latency")
        assert call_json("prune", checkpoint, *options)["calibration"]["images"] >= 1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_prune_on_a_gpu(checkpoint, class_folders):
    options = ("--data", class_folders, "--ratio", 0.5)
    there = call_json("prune", checkpoint, *options, "--device", "cuda", "-o", "gpu")
    here = call_json("prune", checkpoint, *options, "--device", "cpu", "-o", "cpu")
    assert there["stages"] == here["stages"]
    assert there["dense"]["top1"] == here["dense"]["top1"]


def test_prune_fine_tunes_too(checkpoint, class_folders):
    options = "--ratio", "0.5", "--data", class_folders, "--eval-data", class_folders, "--no-latency"
    found = call_json(
        "prune", checkpoint, *options, "--finetune-epochs", 2, "--set", "batch_size=6", "--recipe", "top-vim"
    )
    assert os.path.isdir("compressed/model-r0.50-ft2")
    assert {"dense", "naive", "pruned"} < found.keys()
    assert {"aligned", "reconstructed"} & found.keys()
    assert (found["finetuning"]["images"], found["finetuning"]["recipe"]["mixup"]) == (20, 0.8)
    assert found["data"]["overlap"] == 20
    # Without other images, a tenth is held out for evaluation and not used for fitting in either step.
    found = call_json("prune", checkpoint, *options[:4], "--finetune-epochs", 1, "--set", "batch_size=6", "-o", "apart")
    assert (found["data"]["images"], found["data"]["overlap"]) == (2, 0)
    assert (found["calibration"]["images"], found["finetuning"]["images"]) == (18, 18)
    assert "--recipe, --ramp" in refused("prune", checkpoint, "--recipe", "top-vim", "--ramp", "0.5")
    assert "--data" in refused("prune", checkpoint, "--finetune-epochs", 1)
