"""Several models in one comparison: their folders, the checks before it, and resuming an interrupted one."""

import csv
import gc
import json
import shutil
import weakref
from pathlib import Path

import pytest
from conftest import images_of, make_plain_mamba, make_vim, write_class_folders
from segmenters import make_vim_upernet

import ssmcompress
from ssmcompress.errors import BudgetError, InputError
from ssmcompress.jobs.compare import Comparison, compare_methods
from ssmcompress.jobs.compare_models import Candidate, ModelsComparison, compare_models, name_folder, name_models
from ssmcompress.jobs.fronts import COLUMNS
from ssmcompress.jobs.images import CalibrationImages
from ssmcompress.jobs.requests import CompareRequest, DataOptions, MeasureOptions
from ssmcompress.models.inputs import to_batches

MODELS = {"vim": make_vim, "plain": make_plain_mamba}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return str(write_class_folders(tmp_path_factory.mktemp("pictures")))


def request_of(data, methods=("naive", "smaller image"), latency=False, **others):
    return CompareRequest(
        (0.4,), methods=methods, data=DataOptions(data), measure=MeasureOptions("float32", latency), **others
    )


def candidates_of(**makers):
    return [Candidate(name, make) for name, make in makers.items()]


def compare(folder, data, makers=MODELS, **options):
    choices = {key: options.pop(key) for key in ("force", "choose") if key in options}
    return compare_models(candidates_of(**makers), request_of(data, **options), folder, **choices)


def keys(value):
    return [(row["model"], row["method"]) for row in value["rows"]]


ALL = [(model, method) for model in ("vim", "plain") for method in ("dense", "naive", "smaller image")]


@pytest.fixture(scope="module")
def compared(tmp_path_factory, pictures):
    """A folder with a comparison of two models, with latency, and its result."""
    folder = tmp_path_factory.mktemp("compared") / "c"
    return folder, compare(folder, pictures, latency=True)


# ------------------------------------------------------------------------------------------------------------ a folder


def test_each_model_has_a_comparison_of_its_own_and_the_table_has_all_rows(compared, pictures, tmp_path):
    folder, value = compared
    assert keys(value) == ALL
    for name, make in MODELS.items():
        alone = json.loads((folder / name / "compare.json").read_text())
        ours = [row for row in value["rows"] if row["model"] == name]
        assert [
            {key: row[key] for key in of_folder} for row, of_folder in zip(ours, alone["rows"], strict=True)
        ] == alone["rows"]
        files = {"compare.json", "compare.csv", "pareto.png", "pareto.svg"}
        assert {file.name for file in (folder / name).iterdir()} == files
        assert files <= {file.name for file in folder.iterdir()}
        single = compare_methods(make(), request_of(pictures), tmp_path / name)
        untimed = [{k: v for k, v in row.items() if "latency" not in k and k != "seconds"} for row in single["rows"]]
        assert untimed == [{key: row[key] for key in of} for row, of in zip(ours, untimed, strict=True)]


def test_the_files_say_what_each_model_is_and_how_fast(compared):
    folder, value = compared
    assert json.loads((folder / "compare.json").read_text()) == value
    for about, make in zip(value["models"], MODELS.values(), strict=True):
        model = make()
        dense = next(row for row in value["rows"] if row["model"] == about["name"] and row["method"] == "dense")
        assert about["architecture"] == model.architecture
        assert about["image_size"] == list(model.config.image_size)
        assert about["dense"]["flops"] == dense["flops"] == ssmcompress.flops(model)
        assert about["dense"]["top1"] == dense["top1"]
        assert about["dense"]["images_per_second"] == pytest.approx(1000 / dense["quiet_ms"])
    lines = list(csv.DictReader((folder / "compare.csv").open()))
    assert next(iter(lines[0])) == "model"
    assert [(line["model"], line["method"]) for line in lines] == ALL
    for line, row in zip(lines, value["rows"], strict=True):
        assert float(line["images_per_second"]) == row["images_per_second"]
        assert set(COLUMNS) <= line.keys()
        assert line["flops_front"] == str(row["flops_front"])


def test_all_models_are_measured_on_the_same_images(compared):
    folder, value = compared
    contents = [json.loads((folder / name / "compare.json").read_text())["settings"]["content"] for name in MODELS]
    assert contents[0] == contents[1] == value["settings"]["content"]


def test_models_are_in_memory_one_at_a_time(pictures, tmp_path):
    alive = []

    def load(make):
        def call():
            gc.collect()
            assert not [1 for reference in alive if reference() is not None]
            model = make()
            alive.append(weakref.ref(model))
            return model

        return call

    compare(tmp_path / "c", pictures, {name: load(make) for name, make in MODELS.items()})
    assert len(alive) == 4


# ----------------------------------------------------------------------------------------------------------- going on


def mark(folder, name):
    """Mark the rows of a model, to detect which are measured again."""
    file = folder / name / "compare.json"
    value = json.loads(file.read_text())
    value["rows"] = [{**row, "seconds": -1.0} for row in value["rows"]]
    file.write_text(json.dumps(value))


def test_a_comparison_that_was_killed_goes_on_where_it_was(pictures, tmp_path, monkeypatch):
    folder, evaluate, count = tmp_path / "c", Comparison.evaluate, []

    def stop(self, model):
        count.append(1)
        if len(count) == 5:
            raise KeyboardInterrupt
        return evaluate(self, model)

    monkeypatch.setattr(Comparison, "evaluate", stop)
    with pytest.raises(KeyboardInterrupt):
        compare(folder, pictures)
    assert keys(json.loads((folder / "compare.json").read_text())) == ALL[:4]
    for name in MODELS:
        mark(folder, name)
    value = compare(folder, pictures)
    assert keys(value) == ALL
    assert [row["seconds"] == -1.0 for row in value["rows"]] == [True] * 4 + [False] * 2


def test_a_comparison_that_was_killed_between_a_models_folder_and_the_table_goes_on(pictures, tmp_path, monkeypatch):
    folder = tmp_path / "c"
    with monkeypatch.context() as patch:
        patch.setattr(ModelsComparison, "_take", lambda *arguments: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            compare(folder, pictures)
    mark(folder, "vim")
    value = compare(folder, pictures)
    assert keys(value) == ALL
    assert value["rows"][0]["seconds"] == -1.0


def test_a_model_whose_folder_is_gone_is_measured_again_and_another_one_can_be_added(compared, pictures, tmp_path):
    folder = Path(shutil.copytree(compared[0], tmp_path / "c"))
    mark(folder, "vim")
    shutil.rmtree(folder / "plain")
    value = compare(folder, pictures, {**MODELS, "third": lambda: make_vim(seed=2)})
    assert keys(value) == [*ALL, *(("third", method) for method in ("dense", "naive", "smaller image"))]
    assert [row["seconds"] == -1.0 for row in value["rows"]] == [True] * 3 + [False] * 6


def test_a_folder_of_other_models_is_refused_and_force_starts_afresh(compared, pictures, tmp_path):
    folder = Path(shutil.copytree(compared[0], tmp_path / "c"))
    with pytest.raises(InputError, match=r"compare.json also has plain; give that model too"):
        compare(folder, pictures, {"vim": make_vim, "other": make_vim})
    with pytest.raises(InputError, match="vim: .*was made with other weights"):
        compare(folder, pictures, {"vim": lambda: make_vim(seed=3), "plain": make_plain_mamba})
    mark(folder, "vim")
    value = compare(folder, pictures, {"vim": lambda: make_vim(seed=3), "plain": make_plain_mamba}, force=True)
    assert all(row["seconds"] != -1.0 for row in value["rows"])
    value = compare(folder, pictures, {"vim": make_vim, "other": make_vim}, force=True)
    assert {row["model"] for row in value["rows"]} == {"vim", "other"}


def test_one_and_several_models_do_not_share_a_folder(compared, pictures, tmp_path):
    folder = Path(shutil.copytree(compared[0], tmp_path / "c"))
    for force in (False, True):
        with pytest.raises(InputError, match="is a comparison of several models; choose another output"):
            compare_methods(make_vim(), request_of(pictures), folder, force=force)
        with pytest.raises(InputError, match="is a comparison of one model; choose another output"):
            compare(folder / "vim", pictures, force=force)
    mark(folder, "vim")
    alone = compare_methods(make_vim(), request_of(pictures), folder / "vim")
    assert all(row["seconds"] == -1.0 for row in alone["rows"])


@pytest.mark.parametrize("damage", ["[1]", "{", '{"models": 3}', '{"models": [{"name": "vim"}], "task": "x"}', "row"])
def test_a_damaged_folder_is_refused(compared, pictures, tmp_path, damage):
    folder = tmp_path / "c"
    folder.mkdir()
    text = damage if damage != "row" else json.dumps({**compared[1], "rows": [{"model": "vim"}]})
    (folder / "compare.json").write_text(text)
    with pytest.raises(InputError, match="not a comparison of ssmcompress"):
        compare(folder, pictures)
    (folder / "compare.json").rename(folder / "mine.txt")
    with pytest.raises(InputError, match="exists but has no compare.json"):
        compare(folder, pictures)


# ---------------------------------------------------------------------------------------- what cannot be compared


@pytest.mark.parametrize(
    ("makers", "says"),
    [
        ({"a": make_vim, "b": lambda: make_vim(classes=7)}, "b: 7 classes, and a has 10"),
        ({"a": make_vim, "b": make_vim_upernet}, "b: a model for semantic segmentation, and a is for image class"),
        ({"a": make_vim, "b": lambda: ssmcompress.prune(make_vim(), ratio=0.3)}, "b: the model is pruned already"),
    ],
)
def test_models_that_cannot_be_compared_are_refused_before_anything_is_written(makers, says, pictures, tmp_path):
    with pytest.raises(InputError, match=says):
        compare(tmp_path / "c", pictures, makers, methods=("naive",))
    assert not (tmp_path / "c").exists()


def test_a_level_or_stage_that_one_model_does_not_have_is_refused_by_its_name(pictures, tmp_path):
    makers = {"deep": lambda: make_vim(depth=6), "flat": make_vim}
    with pytest.raises(InputError, match="flat: cannot prune after layer 5"):
        compare(tmp_path / "c", pictures, makers, stages=(5,))
    with pytest.raises(BudgetError, match="deep: 1.0% of the FLOPs is out of reach"):
        compare(tmp_path / "c", pictures, makers, flops=(0.01,))
    assert not (tmp_path / "c").exists()


def test_prepared_images_fit_models_of_one_size_alone(tmp_path):
    images = images_of(make_vim(), 12)

    def choose(model):
        batches = to_batches(model, images)
        return CalibrationImages(batches, batches, 12)

    says = r"plain: the images are prepared already, for vim \(3x16x16\), and this model takes 3x64x64: give pictures"
    with pytest.raises(InputError, match=says):
        compare(tmp_path / "c", None, choose=choose)
    value = compare(tmp_path / "c", None, {"a": make_vim, "b": lambda: make_vim(seed=1)}, choose=choose)
    assert len(value["rows"]) == 6


def test_images_of_ones_own_are_needed(tmp_path):
    with pytest.raises(InputError, match="vim: comparing several models needs labels"):
        compare(tmp_path / "c", None)


def test_folders_that_record_other_images_need_images_to_compare_on(pictures, tmp_path):
    other = write_class_folders(tmp_path)
    for file in list(other.rglob("*.png"))[:3]:
        file.unlink()

    def recording(data):
        def make():
            model = make_vim()
            model.source = ssmcompress.models.records.Source("", "", data=str(data))
            return model

        return make

    makers = {"a": recording(pictures), "b": recording(other)}
    says = (
        r"a and b would be calibrated on different images \(10 images instead of 8 images\); give `data`"
        r"|8 images instead of 10 images"
    )
    with pytest.raises(InputError, match=says):
        compare(tmp_path / "c", None, makers)
    value = compare(tmp_path / "c", None, {"a": recording(pictures), "b": recording(pictures)})
    assert len(value["rows"]) == 6


def test_images_without_labels_compare_a_model_with_its_own_dense_one(pictures, tmp_path):
    folder = tmp_path / "flat"
    folder.mkdir()
    for number, file in enumerate(sorted(Path(pictures).rglob("*.png"))):
        shutil.copy(file, folder / f"{number}.png")
    value = compare(tmp_path / "c", str(folder))
    assert any("no labels: each model is compared with its own dense model" in text for text in value["warnings"])
    assert all(row["flops_best"]["model"] == row["model"] for row in value["rows"])


# ------------------------------------------------------------------------------------------------------------- methods


def test_a_method_that_a_model_cannot_carry_out_is_left_out_for_that_model(pictures, tmp_path):
    makers = {"vim": make_vim, "one state": lambda: make_vim(d_state=1)}
    value = compare(tmp_path / "c", pictures, makers, methods=("naive", "states, reconstructed"))
    assert keys(value) == [
        ("vim", "dense"), ("vim", "naive"), ("vim", "states, reconstructed"),
        ("one state", "dense"), ("one state", "naive"),
    ]  # fmt: skip
    assert "trims states" in value["models"][1]["left_out"]["states, reconstructed"]
    assert value["models"][0]["left_out"] == {}


def test_a_method_that_no_model_can_carry_out_is_refused(pictures, tmp_path):
    with pytest.raises(InputError, match="'zero-filled' is only for segmentation models and .*: no model has it"):
        compare(tmp_path / "c", pictures, methods=("naive", "zero-filled"))
    with pytest.raises(InputError, match="unknown method 'naiv'; did you mean naive"):
        compare(tmp_path / "c", pictures, methods=("naiv",))


# --------------------------------------------------------------------------------------------------------------- names


def test_models_have_distinct_names():
    assert name_models(["a/vim.pt", "b/plain.pth"]) == ["vim", "plain"]
    assert name_models(["a/best.pth", "b/best.pth", "b/last.pth"]) == ["a-best", "b-best", "last"]
    assert name_models(["a/best.pth", "a/best.pt"]) == ["a-best", "a-best-2"]
    assert name_models(["a/Best.pth", "b/best.pt"]) == ["a-Best", "b-best"]
    assert name_models(["x/compare.json.pt", "vim.pt"]) == ["compare.json-2", "vim"]


def test_a_folder_has_its_whole_name_and_a_link_is_the_file_it_points_to(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("vim-r0.30").mkdir()
    assert name_models(["vim-r0.30", "vim.pt"]) == ["vim-r0.30", "vim"]
    Path("vim.pt").touch()
    Path("link.pt").symlink_to("vim.pt")
    for again in ("vim.pt", "./vim.pt", "link.pt"):
        with pytest.raises(InputError, match=f"{again} is given twice"):
            name_models(["vim.pt", again])


def test_the_default_folder_has_the_names_of_the_models():
    assert name_folder(["vim", "plain"]) == Path("compared/vim+plain")
    assert len(name_folder(["x" * 60] * 5).name) < 100
