"""Resumed runs and finished folders are bound to models, recipe and content of the images."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from command_line import TUNE, call, call_json
from conftest import make_vim, write_image

import ssmcompress
from ssmcompress.compression.finetune.loop import finetune
from ssmcompress.compression.finetune.recipe import Recipe
from ssmcompress.compression.finetune.state import StateFile
from ssmcompress.compression.search.sensitivity import Sensitivity
from ssmcompress.data import Batches, open_images
from ssmcompress.data.signature import SIGNED, compare_signatures, sign_images
from ssmcompress.errors import InputError
from ssmcompress.jobs import finetune as job
from ssmcompress.jobs.methods import make_levels
from ssmcompress.models.fingerprint import fingerprint

pytestmark = pytest.mark.usefixtures("in_an_empty_folder")

RECIPE = Recipe(epochs=1, batch_size=10, ema=0.0)


def refuse(*arguments) -> str:
    """stderr of a command that must be rejected; earlier output is ignored."""
    result = call(*arguments, code=2)
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    return result.stderr.splitlines()[-1]


def batches(model, folder, index=None) -> Batches:
    return Batches(open_images(folder, 10), model.transform(), index)


def pruned_of(model):
    return ssmcompress.prune(model, ssmcompress.make_plan(model, ratio=0.4))


def change_picture(folder: Path, name="class3/1.png") -> None:
    write_image(folder / name, seed=999)


def move_to_other_class(folder: Path) -> None:
    """The same number of files, two of which are swapped."""
    one, other = folder / "class3" / "1.png", folder / "class4" / "0.png"
    content = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(content)


# ----------------------------------------------------------------------------------------------------- signatures


def test_images_are_signed_by_content_and_labels_whatever_their_names(vim, class_folders, tmp_path):
    first = sign_images(batches(vim, class_folders))
    copy = tmp_path / "copy"
    shutil.copytree(class_folders, copy)
    assert compare_signatures(first, sign_images(batches(vim, copy))) is None
    assert sign_images(batches(make_vim(image=(32, 32)), copy)) == first
    change_picture(copy)
    assert "20 images of other content" in compare_signatures(first, sign_images(batches(vim, copy)))
    shutil.rmtree(copy / "class3")
    shutil.copytree(class_folders / "class3", copy / "class3")
    (copy / "class3" / "1.png").rename(copy / "class4" / "2.png")
    moved = sign_images(batches(vim, copy))
    assert moved["images"] == 20
    assert compare_signatures(first, moved) is not None
    (copy / "class5" / "0.png").unlink()
    assert compare_signatures(first, sign_images(batches(vim, copy))) == "20 images instead of 19 images"
    assert compare_signatures(None, first) == "no images instead of 20 images"
    assert "not recorded" in compare_signatures({}, first)


def test_other_labels_of_the_same_pictures_are_other_images(vim, class_folders):
    images = open_images(class_folders, 10)
    first = sign_images(Batches(images, vim.transform()))
    relabelled = replace(images, labels=tuple(9 - label for label in images.labels))
    found = compare_signatures(first, sign_images(Batches(relabelled, vim.transform())))
    assert found == "20 images with other labels"


def test_a_large_data_set_is_signed_by_a_sample(vim, class_folders):
    images = open_images(class_folders, 10)
    reads = []
    many = replace(images, size=5000, labels=None, read=lambda i: reads.append(i) or images.read(i % 20))
    sign_images(Batches(many, vim.transform()))
    assert len(set(reads)) == len(reads) == SIGNED


def test_a_fingerprint_is_of_everything_that_the_outputs_depend_on(vim, tmp_path):
    assert fingerprint(vim) == fingerprint(make_vim())
    assert fingerprint(vim) != fingerprint(make_vim(seed=1))
    assert fingerprint(vim) != fingerprint(pruned_of(vim))
    pruned = pruned_of(vim)
    assert fingerprint(ssmcompress.load(ssmcompress.save(pruned, tmp_path / "m"))) == fingerprint(pruned)
    other = make_vim()
    other.preprocessing = replace(other.preprocessing, mean=(0.1, 0.2, 0.3))
    assert fingerprint(vim) != fingerprint(other)
    with torch.no_grad():
        other = make_vim()
        other.blocks[2].mixer.D.view(-1)[0] += 1e-3
    assert fingerprint(vim) != fingerprint(other)


# ------------------------------------------------------------------------------------------------------- the state


@pytest.fixture
def begun(vim, class_folders, tmp_path):
    """The arguments of a run that left its state."""
    state = StateFile(tmp_path / "state.pt", resume=True)
    held_out = batches(vim, class_folders, range(16, 20))
    arguments = {"dense": vim, "recipe": RECIPE, "held_out": held_out, "state": state}
    training = batches(vim, class_folders, range(16))
    finetune(pruned_of(vim), training, **arguments)
    return arguments


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"dense": "other"}, "another dense model to learn from"),
        ({"dense": None}, "a dense model to learn from"),
        ({"recipe": replace(RECIPE, lr=9e-3)}, "lr 0.00.* instead of 0.009"),
        ({"seed": 1}, "seed 0 instead of 1"),
        ({"held_out": None}, r"other images held out \(4 images instead of no images\)"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_state_is_bound_to_models_recipe_and_seed(vim, class_folders, begun, change, says):
    change = {name: make_vim(seed=7) if value == "other" else value for name, value in change.items()}
    with pytest.raises(InputError, match=f"to another run, with .*{says}"):
        finetune(pruned_of(vim), batches(vim, class_folders, range(16)), **begun | change)


def test_a_state_is_bound_to_the_content_of_the_images(vim, class_folders, begun):
    def resume(count=16):
        return finetune(pruned_of(vim), batches(vim, class_folders, range(count)), **begun)

    resume()  # the same
    whole = Path("whole")
    shutil.copytree(class_folders, whole)
    with pytest.raises(InputError, match=r"other images to learn from \(16 images instead of 14 images\)"):
        resume(14)
    change_picture(class_folders, "class2/0.png")
    with pytest.raises(InputError, match=r"other images to learn from \(16 images of other content\)"):
        resume()
    change_picture(class_folders, "class9/0.png")
    shutil.copy(whole / "class2" / "0.png", class_folders / "class2" / "0.png")
    with pytest.raises(InputError, match=r"other images held out \(4 images of other content\)"):
        resume()
    with pytest.raises(InputError, match="another model to start from"):
        finetune(pruned_of(make_vim(seed=5)), batches(vim, whole, range(16)), **begun)


def test_images_may_move_while_a_run_is_interrupted(vim, class_folders, begun, tmp_path):
    shutil.move(class_folders, tmp_path / "moved")
    begun["held_out"] = batches(vim, tmp_path / "moved", range(16, 20))
    finetune(pruned_of(vim), batches(vim, tmp_path / "moved", range(16)), **begun)


def test_a_state_that_does_not_say_its_images_is_refused(vim, class_folders, begun):
    file = begun["state"].path
    content = torch.load(file, weights_only=True)
    del content["run"]["about"]["images"]
    torch.save(content, file)
    with pytest.raises(InputError, match="other images to learn from"):
        finetune(pruned_of(vim), batches(vim, class_folders, range(16)), **begun)


def counted(images, reads: list[int]):
    """The same images, noting each read."""
    return replace(images, read=lambda i: reads.append(i) or images.read(i))


def test_a_run_that_goes_on_does_not_read_again_what_it_read_before(vim, class_folders, begun):
    """Of 16 images, 10 were in the only step; 16 are read to compare them with those of the state."""
    reads: list[int] = []
    images = counted(open_images(class_folders, 10), reads)
    first = finetune(pruned_of(vim), Batches(images, vim.transform(), range(16)), **begun | {"state": None})
    reads.clear()
    again = finetune(pruned_of(vim), Batches(images, vim.transform(), range(16)), **begun)
    assert len(reads) == 16 + 6
    assert np.array_equal(again.model.learnt.digests, first.model.learnt.digests)
    assert len(again.model.learnt.digests) == 20  # with those held out
    content = torch.load(begun["state"].path, weights_only=True)
    torch.save(content | {"digests": torch.zeros(3, dtype=torch.int64)}, begun["state"].path)
    with pytest.raises(InputError, match="damaged"):
        finetune(pruned_of(vim), Batches(images, vim.transform(), range(16)), **begun)


# ------------------------------------------------------------------------------------------------ a finished folder


FINISHED = ["finetune", "pruned", "--data", "images", "--eval-data", "measured", *TUNE, "-o", "tuned", "--resume"]


@pytest.fixture(scope="module")
def finished_once(pruned_once, tmp_path_factory):
    """A folder with a finished run, and with separate evaluation images."""
    root = tmp_path_factory.mktemp("finished")
    for name in ("pruned", "images"):
        shutil.copytree(pruned_once / name, root / name)
    shutil.copytree(root / "images", root / "measured")
    for file in (root / "measured").rglob("*.png"):
        write_image(file, seed=200 + int(file.parent.name[5:]))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        call(*FINISHED)
    return root


@pytest.fixture
def finished(finished_once):
    """The command of a run that is finished in the working folder."""
    shutil.copytree(finished_once, ".", dirs_exist_ok=True)
    return FINISHED


def test_a_finished_folder_is_what_it_was_made_from(finished):
    report = json.loads(Path("tuned/report.json").read_text())
    assert call_json(*finished) == report
    elsewhere = [{"images": "./images", "measured": "images/../measured"}.get(a, a) for a in finished]
    assert call_json(*elsewhere) == report


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda: change_picture(Path("images")), "other images to learn from (20 images of other content)"),
        (lambda: Path("images/class5/0.png").unlink(), "other images to learn from (20 images instead of 19 images)"),
        (lambda: move_to_other_class(Path("images")), "other images to learn from"),
        (lambda: change_picture(Path("measured")), "other images to measure on (20 images of other content)"),
    ],
    ids=["content", "number", "places", "measured"],
)
def test_a_finished_folder_is_bound_to_the_content_of_its_images(finished, change, says):
    change()
    found = refuse(*finished)
    assert "tuned holds another fine-tuned model" in found
    assert says in found


def test_a_finished_folder_is_bound_to_the_images_from_before_the_training(finished, monkeypatch):
    """An image that changes while the model is trained is not what the folder was made from."""
    before = json.loads(Path("tuned/config.json").read_text())["pruning"]["finetuning"]["run"]
    run_steps = job.run_steps

    def run_and_change(*arguments, **options):
        result = run_steps(*arguments, **options)
        change_picture(Path("images"))
        change_picture(Path("measured"))
        return result

    monkeypatch.setattr(job, "run_steps", run_and_change)
    call(*finished[:-3], "-o", "other")
    assert json.loads(Path("other/config.json").read_text())["pruning"]["finetuning"]["run"] == before


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--epochs", 3], "with epochs 2 instead of 3"),
        (["--seed", 4], "seed 0 instead of 4"),
        (["--no-teacher"], "a dense model to learn from"),
        (["--set", "lr=5e-3"], "lr "),
        (["--set", "batch_size=8"], "batch_size 6 instead of 8"),
    ],
    ids=lambda value: str(value[0]) if isinstance(value, list) else "",
)
def test_a_finished_folder_is_bound_to_its_options(finished, arguments, says):
    assert says in refuse(*finished, *arguments)


def test_a_finished_folder_is_bound_to_its_models(finished, checkpoint, class_folders):
    torch.save({"model": make_vim(seed=3).state_dict()}, "other.pt")
    assert "another dense model" in refuse(*finished, "--dense", "other.pt")
    call("prune", checkpoint, "--ratio", 0.4, "--data", class_folders, "--no-latency", "-o", "elsewhere")
    assert "another model to start from" in refuse("finetune", "elsewhere", *finished[2:])
    without = [a for a in finished if a not in ("--eval-data", "measured")]
    assert "other images to measure on (20 images instead of no images)" in refuse(*without)


def test_a_finished_folder_that_does_not_say_is_refused(finished):
    config = json.loads(Path("tuned/config.json").read_text())
    del config["pruning"]["finetuning"]["run"]
    Path("tuned/config.json").write_text(json.dumps(config))
    assert ssmcompress.load("tuned").find_record("finetuning").run is None
    assert "without a record of what it was made from" in refuse(*finished)


def test_a_model_that_was_replaced_by_its_result_is_finished(checkpoint, class_folders):
    """The initial model of the run is missing; the rest is still compared."""
    options = "--data", class_folders, *TUNE[2:]
    first = call_json("prune", checkpoint, "--ratio", 0.5, "--finetune-epochs", 2, *options, "-o", "m")
    again = "finetune", "m", *options, "--epochs", 2, "-o", "m", "--resume"
    assert call_json(*again) == first
    change_picture(class_folders)
    assert "other images to learn from" in refuse(*again)


# --------------------------------------------------------------------------------------- comparisons, sensitivities


def test_a_comparison_goes_on_with_the_same_content_alone(checkpoint, class_folders, tmp_path):
    options = "--ratios", 0.4, "--methods", "naive", "--no-latency", "-o", "c"
    first = call_json("compare", checkpoint, "--data", class_folders, "--eval-data", class_folders, *options)
    assert first["overlap"] == 20
    assert "all 20 measured images" in " ".join(first["warnings"])
    shutil.copytree(class_folders, tmp_path / "copy")
    copies = "--data", tmp_path / "copy", "--eval-data", tmp_path / "copy"
    assert call_json("compare", checkpoint, *copies, *options)["rows"] == first["rows"]
    change_picture(tmp_path / "copy")
    found = refuse("compare", checkpoint, *copies, *options)
    assert "other images to calibrate on (20 images of other content)" in found
    assert "other images to measure on (20 images of other content)" in found
    torch.save({"model": make_vim(seed=3).state_dict()}, checkpoint)
    images = "--data", class_folders, "--eval-data", class_folders
    assert "compare.json was made with other weights; choose" in refuse("compare", checkpoint, *images, *options)


def test_rows_belong_to_their_budget(checkpoint, class_folders):
    """Budgets so close that they have the same ratio of tokens are different levels for the other axes."""
    compared = "compare", checkpoint, "--methods", "smaller image", "--data", class_folders, "--no-latency", "-o", "c"
    levels = make_levels(ssmcompress.load(checkpoint), None, (0.3,))
    close = [f"{levels[0].flops + change:.6f}" for change in (0, 1e-5)]
    for flops in (close[0], close[1], close[1]):
        call(*compared, "--flops", flops)
    rows = json.loads(Path("c/compare.json").read_text())["rows"]
    assert [row["method"] for row in rows] == ["dense", "smaller image", "smaller image"]
    assert [f"{row['budget']:.6f}" for row in rows[1:]] == close


def test_a_comparison_that_starts_over_measures_its_sensitivity_again(checkpoint, class_folders):
    compared = "compare", checkpoint, "--ratios", 0.3, "--methods", "search", "--data", class_folders, "--no-latency"
    assert "sensitivity measured" in call(*compared, "-o", "c").stderr
    assert "sensitivity measured" in call(*compared, "-o", "c", "--seed", 5, "--force").stderr


def test_a_comparison_names_what_differs_once(checkpoint, class_folders):
    # Separate evaluation images, because a seed also changes the split.
    options = "compare", checkpoint, "--data", class_folders, "--eval-data", class_folders
    more = "--methods", "naive", "--no-latency", "-o", "c"
    call(*options, *more, "--ratios", 0.4)
    for says, *change in (
        ("other preprocessing", "--mean", "0.1,0.2,0.3"),
        ("another image size", "--image-size", 20),
        ("another seed", "--seed", 3),
        ("other stages", "--stages", 2),
        ("another dtype", "--dtype", "bfloat16"),
    ):
        assert f"compare.json was made with {says}; choose" in refuse(*options, *more, "--ratios", 0.4, *change)


def test_a_comparison_of_an_older_version_is_not_told_other_weights(checkpoint, class_folders):
    arguments = "compare", checkpoint, "--data", class_folders, "--ratios", 0.4, "--methods", "naive", "--no-latency"
    call(*arguments, "-o", "c")
    file = Path("c/compare.json")
    value = json.loads(file.read_text())
    del value["settings"]["weights"], value["settings"]["image_size"]
    file.write_text(json.dumps(value))
    said = refuse(*arguments, "-o", "c")
    assert "made with an older version of ssmcompress, which did not record weights, image size; choose" in said


def test_a_comparison_remembers_what_was_learnt_from_and_where_it_was_timed(checkpoint, class_folders):
    images = "--data", class_folders, "--eval-data", class_folders
    arguments = "compare", checkpoint, *images, "--ratios", 0.4, "--methods", "naive", "-o", "c"
    first = call_json(*arguments)
    again = call_json(*arguments)  # nothing is left to measure, so nothing is read
    assert (again["overlap"], again["warnings"]) == (first["overlap"], first["warnings"])
    assert again["overlap"] == 20
    first["settings"]["timing"] |= {"device": "another machine", "threads": 64}
    Path("c/compare.json").write_text(json.dumps(first))
    assert "latency on another machine with 64 threads" in refuse(*arguments)
    call(*arguments, "--no-latency")


def test_a_comparison_that_does_not_say_its_images_is_refused(checkpoint, class_folders):
    arguments = "compare", checkpoint, "--data", class_folders, "--ratios", 0.4, "--methods", "naive", "--no-latency"
    call(*arguments, "-o", "c")
    value = json.loads(Path("c/compare.json").read_text())
    del value["settings"]["content"]
    Path("c/compare.json").write_text(json.dumps(value))
    assert "the earlier images were not recorded" in refuse(*arguments, "-o", "c")
    value["settings"] = [1]
    Path("c/compare.json").write_text(json.dumps(value))
    assert "not a comparison" in refuse(*arguments, "-o", "c")


def test_a_sensitivity_is_bound_to_weights_and_preprocessing(checkpoint, class_folders):
    arguments = "--flops", "75%", "--data", class_folders, "--no-latency", "--sensitivity", "first"
    call("prune", checkpoint, *arguments[:5], "-o", "first")
    assert "other preprocessing" in refuse("prune", checkpoint, *arguments, "--mean", "0.1,0.2,0.3", "-o", "second")
    torch.save({"model": make_vim(seed=3).state_dict()}, checkpoint)
    assert "measured with other weights" in refuse("prune", checkpoint, *arguments, "-o", "second")
    value = json.loads(Path("first/sensitivity.json").read_text())
    del value["model"]["weights"]
    Path("old.json").write_text(json.dumps(value))
    said = refuse("prune", checkpoint, *arguments[:-1], "old.json", "-o", "second")
    assert "measured by an older version of ssmcompress, which did not record the weights: leave it out" in said
    for digests in (["zz"], "ab", [str(2**80)], [3]):
        Path("damaged.json").write_text(json.dumps({**value, "digests": digests}))
        with pytest.raises(InputError, match="not a sensitivity"):
            Sensitivity.read("damaged.json")
    assert np.issubdtype(Sensitivity.read("first").digests.dtype, np.uint64)
