"""Recipes: a run as a file, written by commands and rerun by `run`, with useful errors for invalid recipes."""

import hashlib
import json
from pathlib import Path

import pytest
import torch
import yaml
from command_line import call
from conftest import make_vim, select_bundled_images, write_image

from ssmcompress.cli.recipes import options_of, schema
from ssmcompress.files import sha256

WEIGHTS = "model.safetensors"


def weights(folder) -> bytes:
    """The tensors of a model, without the header, which contains the command line."""
    content = Path(folder, WEIGHTS).read_bytes()
    return content[8 + int.from_bytes(content[:8], "little") :]


def recipe_of(folder) -> dict:
    return yaml.safe_load(Path(folder, "recipe.yaml").read_text())


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    return select_bundled_images(96, tmp_path_factory.mktemp("images") / "images.parquet")


RUNS = {
    "ratio": ["--ratio", "0.3", "--no-reconstruct", "--seed", "3"],
    "search": ["--flops", "80%", "--no-reconstruct", "--axes", "states,tokens", "--search-images", "12"],
    "reconstructed": ["--ratio", "20%,30%,30%", "--gap", "bias", "--reconstruct"],
}


@pytest.mark.usefixtures("in_an_empty_folder")
@pytest.mark.parametrize("options", RUNS.values(), ids=RUNS)
def test_a_folder_s_recipe_makes_the_same_weights_again(options, checkpoint, images, monkeypatch, tmp_path):
    call("prune", checkpoint, "--data", images, "--samples", 24, "--no-latency", *options, "-o", "first")
    first = Path("first").absolute()
    before = (first / "recipe.yaml").read_text()
    monkeypatch.chdir(tmp_path)  # paths in a recipe do not depend on the working folder
    call("run", first / "recipe.yaml", "-o", "second", "--batch-size", 7)
    assert weights("second") == weights(first)
    again = recipe_of("second")
    assert {k: v for k, v in again.items() if k not in ("model", "data")} == {
        k: v for k, v in yaml.safe_load(before).items() if k not in ("model", "data")
    }
    assert Path("second", again["model"]).samefile(checkpoint)
    assert Path("second", again["data"]).samefile(images)
    assert (first / "recipe.yaml").read_text() == before


@pytest.fixture
def recipe(checkpoint, class_folders, in_an_empty_folder) -> Path:
    """A hand-written recipe that names the checkpoint and the images next to it."""
    file = checkpoint.parent / "mine.yaml"
    file.write_text(f"model: {checkpoint.name}\ndata: {class_folders.name}\nratio: 0.5\nsamples: 8\nno_latency: true\n")
    return file


def test_options_of_the_command_line_override_the_recipe_and_are_recorded(recipe):
    call("run", recipe, "-o", "a", "--samples", 4, "--flops", "80%", "--no-search", "--no-reconstruct")
    found = recipe_of("a")
    assert (found["samples"], found["flops"], found["search"], found["reconstruct"]) == (4, "80%", False, False)
    assert "ratio" not in found  # one way to set the amount replaces the other
    assert json.loads(Path("a/report.json").read_text())["calibration"]["images"] == 4


def test_without_an_output_the_folder_has_the_default_name_and_is_not_overwritten(recipe, checkpoint):
    call("run", recipe)
    folder = Path(f"compressed/{checkpoint.stem}-r0.50")
    assert folder.is_dir()
    before = weights(folder)
    assert "--force" in call("run", folder / "recipe.yaml", "--seed", 0, code=2).stderr
    assert weights(folder) == before


def test_a_model_that_has_changed_is_refused_unless_it_is_named(recipe, checkpoint, tmp_path):
    call("run", recipe, "-o", "a")
    kept = checkpoint.rename(tmp_path / "kept.pth")
    torch.save({"model": make_vim(seed=7).state_dict()}, checkpoint)
    error = call("run", "a/recipe.yaml", "-o", "b", code=2).stderr
    assert f"{checkpoint.name} has changed" in error
    assert not Path("b").exists()
    call("run", "a/recipe.yaml", "-o", "b", "--model", kept)
    assert weights("a") == weights("b")


@pytest.fixture
def searched(checkpoint, images, in_an_empty_folder) -> Path:
    """A folder with a plan from a search and its sensitivity."""
    options = ["--flops", "80%", "--no-reconstruct", "--axes", "tokens", "--search-images", 12]
    call("prune", checkpoint, "--data", images, "--samples", 24, "--no-latency", *options, "-o", "searched")
    return Path("searched")


@pytest.mark.parametrize(
    ("option", "more", "file", "other"),
    [
        ("plan", (), "config.json", ["--ratio", "0.3"]),
        ("sensitivity", ("--flops", "75%", "--axes", "tokens", "--search-images", 12), "sensitivity.json", None),
    ],
)
def test_a_plan_or_a_sensitivity_that_has_changed_is_refused(searched, checkpoint, images, option, more, file, other):
    data = "--data", images, "--samples", 24, "--no-latency", "--no-reconstruct"
    call("prune", checkpoint, *data, f"--{option}", "searched", *more, "-o", "a")
    found = recipe_of("a")
    assert found[option] == "../searched"
    assert found[f"{option}_sha256"] == hashlib.sha256((searched / file).read_bytes()).hexdigest()
    call("run", "a/recipe.yaml", "-o", "b")
    assert weights("a") == weights("b")
    content = (searched / file).read_text()
    (searched / file).write_text(content + "\n")
    error = call("run", "a/recipe.yaml", "-o", "c", code=2).stderr
    assert "searched has changed since a/recipe.yaml was made" in error
    assert f"remove {option}_sha256" in error
    assert not Path("c").exists()
    Path("copy").mkdir()
    Path("copy", file).write_text(content)
    call("run", "a/recipe.yaml", "-o", "d", *(other or (f"--{option}", "copy")))  # it is ignored then


def test_images_that_have_changed_are_said_in_one_line(recipe, class_folders):
    said = "warning: the calibration images are not the ones that a/recipe.yaml was made with"
    call("run", recipe, "-o", "a")
    kept = json.loads(Path("a/report.json").read_text())["calibration"]["content"]
    assert recipe_of("a")["images_digest"] == kept
    assert "warning" not in call("run", "a/recipe.yaml", "-o", "b", "--batch-size", 3).stderr
    assert "warning" not in call("run", "a/recipe.yaml", "-o", "c", "--samples", 4).stderr  # other images are requested
    for number, file in enumerate(sorted(class_folders.rglob("*.*"))):
        write_image(file, seed=1000 + number)
    changed = call("run", "a/recipe.yaml", "-o", "d")
    assert changed.stderr.splitlines().count(said) == 1
    assert recipe_of("d")["images_digest"] != kept
    assert said not in call("run", "a/recipe.yaml", "-o", "e", "--quiet").stderr


def test_the_file_of_a_dense_model_is_hashed_once(checkpoint, in_an_empty_folder, monkeypatch):
    read = []
    for module in ("ssmcompress.models.checkpoint", "ssmcompress.cli.recipes"):
        monkeypatch.setattr(f"{module}.sha256", lambda path: read.append(path) or sha256(path))
    call("prune", checkpoint, "--no-latency", "-o", "a")
    assert read == [checkpoint]
    assert recipe_of("a")["model_sha256"] == sha256(checkpoint)


def test_fine_tuning_has_a_recipe_too(recipe):
    call("run", recipe, "-o", "a")
    data = Path("a", recipe_of("a")["data"])
    call("finetune", "a", "--data", data, "--epochs", 1, "--set", "lr=1e-4", "--no-latency", "-o", "tuned")
    found = recipe_of("tuned")
    assert (found["command"], found["model"], found["epochs"], found["set"]) == ("finetune", "../a", 1, ["lr=1e-4"])
    call("run", "tuned/recipe.yaml", "-o", "again")
    assert weights("tuned") == weights("again")


WRONG = {
    "nothing": ("", "expected lines such as"),
    "a list": ("- model\n- data\n", "expected lines such as"),
    "a text": ("prune the model\n", "expected lines such as"),
    "no YAML": ("model: [vim.pth\n", "not valid YAML"),
    "a tag of Python": ("model: !!python/object/apply:os.system [echo]\n", "not valid YAML"),
    "a key twice": ("model: vim.pth\nratio: 0.1\nratio: 0.2\n", "'ratio' is duplicated"),
    "no model": ("ratio: 0.3\n", "model is missing"),
    "a number as model": ("model: 3\n", "model is 3: expected its name"),
    "an unknown key": ("model: vim.pth\nflop: 60%\n", "unknown key 'flop' for prune; did you mean flops?"),
    "a key in other letters": ("model: vim.pth\nEval-Data: x\n", "did you mean eval_data?"),
    "a key far from all": ("model: vim.pth\nzzz: 1\n", "unknown key 'zzz' for prune; expected one of ratio, flops,"),
    "a key of the other command": ("model: vim.pth\nteacher: false\n", "finetune has it"),
    "another command": ("model: vim.pth\ncommand: export\n", "command is 'export': expected prune or finetune"),
    "a newer version": ("model: vim.pth\nformat_version: 2\n", "format_version is 2: this version reads 1"),
    "a text as number": ("model: vim.pth\nsamples: many\n", "samples is 'many': expected a whole number"),
    "a fraction as count": ("model: vim.pth\nsamples: 1.5\n", "samples is 1.5: expected a whole number"),
    "too small a number": ("model: vim.pth\nsamples: 0\n", "samples is 0: expected a number of at least 1"),
    "too large a number": ("model: vim.pth\nseed: 4294967296\n", "expected a number of at least 0 and at most"),
    "yes as number": ("model: vim.pth\nseed: yes\n", "seed is True: expected a whole number"),
    "a text as switch": ("model: vim.pth\nalign: maybe\n", "align is 'maybe': expected true or false"),
    "no such choice": ("model: vim.pth\ngap: guessed\n", "gap is 'guessed': expected one of calibrated, bias"),
    "a switch as text": ("model: vim.pth\nflops: true\n", "flops is True: expected a string, a number or a list"),
    "a mapping as text": ("model: vim.pth\nratio: {first: 0.1}\n", "expected a string, a number or a list"),
    "a list as file": ("model: vim.pth\ndata: [a, b]\n", "expected a name"),
    "a text as list": ("model: vim.pth\nset: lr=1\n", "set is 'lr=1': expected a list of strings"),
    "running code": ("model: vim.pth\nunsafe_load: true\n", "give --unsafe-load on the command line"),
    "overwriting": ("model: vim.pth\nforce: true\n", "give --force on the command line"),
    "an alias": ("model: vim.pth\nset: &a [x=1]\nstages: *a\n", "an alias (line 3)"),
    "a bomb": (
        "a: &a [x,x,x,x,x,x,x,x,x]\n"
        + "".join(f"{n}: &{n} [{','.join(['*' + m] * 9)}]\n" for m, n in zip("abcdefgh", "bcdefghi", strict=True))
        + "model: *i\n",
        "an alias",
    ),
    "a list as key": ("? [a, b]\n: 1\nmodel: vim.pth\n", "a key that is not a string (line 1)"),
    "versions as text": ("model: vim.pth\nversions: '1'\n", "versions: expected package names"),
    "a number as hash": ("model: vim.pth\nmodel_sha256: 12\n", "model_sha256 is 12: expected 64"),
    "a hash of nothing": (
        "model: vim.pth\nplan_sha256: " + "a" * 64 + "\n",
        "plan_sha256 is given, but plan is missing",
    ),
    "half a hash of a plan": ("model: vim.pth\nplan: p\nplan_sha256: ab\n", "plan_sha256 is 'ab': expected 64"),
    "a number for images": ("model: vim.pth\nimages_digest: 1\n", "images_digest is 1: expected 16 hexadecimal digits"),
    "images of a fine-tuning": (
        "model: vim.pth\ncommand: finetune\nimages_digest: '0123456789abcdef'\n",
        "unknown key 'images_digest' for finetune",
    ),
    "half a hash": ("model: vim.pth\nmodel_sha256: abcd\n", "model_sha256 is 'abcd': expected 64"),
}


@pytest.mark.usefixtures("in_an_empty_folder")
@pytest.mark.parametrize(("text", "message"), WRONG.values(), ids=WRONG)
def test_a_wrong_recipe_is_refused_in_useful_words(text, message):
    Path("wrong.yaml").write_text(text)
    error = call("run", "wrong.yaml", code=2).stderr
    assert "wrong.yaml" in error
    assert message in error
    assert len(error.splitlines()) == 1
    assert [path.name for path in Path().iterdir()] == ["wrong.yaml"]


NO_YAML = ("no YAML", "a tag of Python", "a key twice", "an alias", "a bomb", "a list as key")


@pytest.mark.parametrize("name", [n for n in WRONG if n not in NO_YAML])
def test_the_schema_refuses_what_run_refuses(name):
    jsonschema = pytest.importorskip("jsonschema")
    content = yaml.safe_load(WRONG[name][0])
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(content, json.loads(schema()))


def test_the_schema_takes_what_commands_write(recipe):
    jsonschema = pytest.importorskip("jsonschema")
    call("run", recipe, "-o", "a")
    for file in (recipe, Path("a/recipe.yaml")):
        jsonschema.validate(yaml.safe_load(file.read_text()), json.loads(call("run", "--schema").stdout))


def test_names_are_relative_to_the_recipe_alone(recipe, class_folders, tmp_path, monkeypatch):
    """Also if the working folder has files of the same names, and for outputs."""
    elsewhere = tmp_path / "elsewhere"
    (elsewhere / class_folders.name).mkdir(parents=True)
    (elsewhere / "moved").mkdir()
    monkeypatch.chdir(elsewhere)
    recipe.write_text(recipe.read_text() + "output: small\n")
    call("run", recipe)
    assert (recipe.parent / "small").is_dir()
    assert not (elsewhere / "small").exists()
    moved = elsewhere / "moved" / "mine.yaml"
    moved.write_text(recipe.read_text().replace("model: ", "model: ../../"))
    error = call("run", moved, code=2).stderr
    assert f"no data at moved/{class_folders.name}" in error


def test_a_folder_behind_a_link_knows_where_its_files_are(recipe, tmp_path, monkeypatch):
    deep = tmp_path / "a" / "b"
    deep.mkdir(parents=True)
    monkeypatch.chdir(recipe.parent)
    Path("link").symlink_to(deep)
    call("run", recipe.name, "-o", "link/out")
    call("run", "link/out/recipe.yaml", "-o", "again")
    assert weights("link/out") == weights("again")


def test_fine_tuning_in_place_has_no_recipe(recipe):
    """The input of the run is missing."""
    call("run", recipe, "-o", "a")
    data = Path("a", recipe_of("a")["data"])
    call("finetune", "a", "--data", data, "--epochs", 1, "--no-latency", "-o", "a", "--force")
    assert not Path("a/recipe.yaml").exists()


def test_numbers_may_be_written_as_yaml_does_not_know_them(recipe):
    recipe.write_text(recipe.read_text().replace("samples: 8", "samples: '8'").replace("ratio: 0.5", "ratio: 5e-1"))
    call("run", recipe, "-o", "a")
    assert recipe_of("a")["samples"] == 8


def test_values_that_contradict_each_other_are_refused_by_the_command(recipe):
    recipe.write_text(recipe.read_text() + "flops: 60%\n")
    error = call("run", recipe, code=2).stderr
    assert "--ratio" in error
    assert "--flops" in error


@pytest.mark.usefixtures("in_an_empty_folder")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "no recipe to run"),
        (["gone.yaml"], "gone.yaml: no such file"),
        (["-o", "out", "mine.yaml"], "expected the recipe first"),
        (["mine.yaml", "extra.pt"], "extra"),
        (["folder"], "folder: cannot be read"),
        (["mine.yaml", "--bogus", "1"], "--bogus"),
        (["mine.yaml"], "vim.pth: no such file"),
    ],
)
def test_what_cannot_be_run_is_one_line(arguments, message):
    Path("folder").mkdir()
    Path("mine.yaml").write_text("model: vim.pth\n")
    assert message in call("run", *arguments, code=2).stderr


def test_every_option_of_the_commands_can_be_written_and_read_back():
    for command in ("prune", "finetune"):
        for key, option in options_of(command).items():
            value = {bool: True, int: option.least or 1, float: 0.5}.get(option.kind, "text")
            value = ["a=1"] if option.several else option.choices[0] if option.choices else value
            typed = option.arguments(value)
            assert typed[0] == option.flag, key
            assert typed[0].lstrip("-").replace("-", "_") == key
