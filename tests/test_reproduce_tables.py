"""examples/reproduce_tables.py on stand-ins: data in ImageNet's and ADE20K's layout, random official files."""

import argparse
import json
import logging
import os
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_plain_mamba, make_vim, make_vit, make_vmamba, write_image
from PIL import Image
from segmenters import make_plain_mamba_upernet, scenes

import ssmcompress
from ssmcompress.compression.finetune.trainer import Trainer
from ssmcompress.files import MODEL_FILE
from ssmcompress.models.saved import WEIGHTS_FILE

EXAMPLES = Path(__file__).parent.parent / "examples"
FEW = ("--further", "", "--samples", "20", "--tune-images", "20", "--tune-epochs", "1", "--reason-images", "10")
PARTS = ("rows", "tuned", "best", "speed", "reasons", "inputs", "figure")


@pytest.fixture
def run(monkeypatch, tmp_path):
    """A function that runs the script in the folder of the stand-ins; `page` is what it wrote."""
    monkeypatch.syspath_prepend(EXAMPLES)
    monkeypatch.chdir(tmp_path)
    import reproduce_tables

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["reproduce_tables.py", "--cache", "cache", "-o", "page.md", *arguments])
        reproduce_tables.main()
        return Path("page.md").read_text(encoding="utf-8")

    return call


@pytest.fixture(scope="module")
def stand_ins(tmp_path_factory):
    """A folder with `imagenet`, `scenes`, and in `checkpoints` files in the official formats and with their names."""
    folder = tmp_path_factory.mktemp("stand-ins")
    for split, count in (("train", 4), ("val", 2)):
        for label in range(10):
            for number in range(count):
                seed = 1000 * count + 10 * label + number
                write_image(folder / "imagenet" / split / f"n0144{label:04}" / f"{number}.JPEG", seed, (80, 70))
    for split, count in (("training", 24), ("validation", 8)):
        for part, values in zip(("images", "annotations"), scenes(count, seed=count), strict=True):
            (folder / "scenes" / part / split).mkdir(parents=True)
            for number, pixels in enumerate(values):
                Image.fromarray(pixels).save(folder / "scenes" / part / split / f"{number:03}.png")
    write_models(folder / "checkpoints")
    return folder


def write_models(folder):
    folder.mkdir()
    args = argparse.Namespace(model="vim_tiny_patch16_224_bimambav2_final_pool_mean_abs_pos_embed_with_midclstok_div2")
    state = {"model": make_vim().state_dict(), "optimizer": {}, "epoch": 9, "args": args}
    torch.save(state, folder / "vim_t_midclstok_76p1acc.pth")
    torch.save({"meta": {"epoch": 9}, "state_dict": make_plain_mamba(6, d_model=48).state_dict()}, folder / "l1.pth")
    deit = make_vit(d_model=64, heads=1)
    torch.save({"model": deit.state_dict()}, folder / "deit_tiny_patch16_224-a1311bcf.pth")
    state = make_plain_mamba_upernet(d_model=64, d_inner=128).state_dict()
    torch.save({"meta": {"iter": 9}, "state_dict": state}, folder / "l1_upernet.pth")


def read_rows(folder):
    """The rows of a comparison without the times, which differ from run to run."""
    rows = json.loads((folder / "compare.json").read_text(encoding="utf-8"))["rows"]
    return [{k: v for k, v in row.items() if k != "seconds"} for row in rows]


def test_published_checkpoints_on_a_data_set_of_the_user(run, stand_ins):
    data = ("--imagenet", str(stand_ins / "imagenet"), "--scenes", str(stand_ins / "scenes"))
    page = run(*data, "--models", str(stand_ins / "checkpoints"), *FEW, "--seeds", "0")
    for title in (
        "Table 1",
        "The best rows",
        "Table 2",
        "Table 3",
        "Table 4",
        "Why",
        "What the dropped",
        "Figure",
        "Time and",
    ):
        assert f"## {title}" in page
    assert "## What the dropped tokens" in page
    for name in ("vim_t_midclstok_76p1acc", "l1", "deit_tiny_patch16_224-a1311bcf", "l1_upernet"):
        assert f"**{name}**" in page
    for method in ("naive", "ToMe", "EViT, fused", "R-MeeTo", "MTR", "all axes", "smaller image", "zero-filled"):
        assert f"| {method} |" in page
    assert Path("page_attention_vim_t_midclstok_76p1acc.png").stat().st_size > 10_000
    assert Path("page_attention_l1.png").exists()
    assert Image.open("page_methods.png").height > 400  # a panel for each of four models
    results = json.loads(Path("page.json").read_text(encoding="utf-8"))["models"]
    tuned, rows = results["l1"]["tuned"], results["l1"]["rows"]
    assert tuned.keys() == {key for key, seeds in rows.items() if not seeds["0"].get("failed")}
    assert set(results["l1"]["cost"]) == set(PARTS)


def test_again_and_in_pieces(run, stand_ins):
    models = Path("checkpoints")
    models.mkdir()
    shutil.copy(stand_ins / "checkpoints" / "deit_tiny_patch16_224-a1311bcf.pth", models / "deit.pth")
    arguments = ("--imagenet", str(stand_ins / "imagenet"), "--models", str(models), *FEW, "--seeds", "0,1")
    run(*arguments, "--parts", "rows")
    first = read_rows(Path("cache/rows/deit-seed1"))
    shutil.rmtree("cache/rows/deit-seed1")
    kept = Path("cache/rows/deit-seed0/compare.json").stat().st_mtime_ns
    page = run(*arguments, "--parts", "rows,speed")
    assert read_rows(Path("cache/rows/deit-seed1")) == first  # to the last digit
    assert len(first) > 10
    assert page.count("\n| ToMe |") == 1
    rows = json.loads(Path("cache/rows/deit-seed0/compare.json").read_text(encoding="utf-8"))["rows"]
    assert [row["method"] for row in rows].count("ToMe") == 1
    assert Path("cache/rows/deit-seed0/compare.json").stat().st_mtime_ns >= kept


def test_a_fine_tuning_that_is_stopped_goes_on(run, stand_ins, monkeypatch):
    from reproduce import tuning

    models = Path("checkpoints")
    models.mkdir()
    shutil.copy(stand_ins / "checkpoints" / "l1.pth", models / "l1.pth")
    folder = Path("cache/rows/l1-seed0")
    dense = {"method": "dense", "share": 1.0, "top1": 10.0, "images": 20, "flops_share": 1.0}
    dense |= {"flops": {"full": 1.0, "paper": 1.0}}
    folder.mkdir(parents=True)
    (folder / "compare.json").write_text(json.dumps({"rows": [dense]}), encoding="utf-8")
    monkeypatch.setattr(tuning, "find_best", lambda *_: None)
    arguments = ("--imagenet", str(stand_ins / "imagenet"), "--models", str(models), *FEW, "--seeds", "0")

    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as context:
        context.setattr(tuning.ssmcompress, "evaluate", stop)
        with pytest.raises(SystemExit) as ended:
            run(*arguments, "--parts", "tuned")
        assert ended.value.code == 130
    (state,) = Path("cache/tuned").glob("*.pt")
    assert json.loads(Path("cache/cost/l1.json").read_text())["tuned"]["seconds"] > 0
    monkeypatch.setattr(Trainer, "take_step", stop)  # all steps are done
    run(*arguments, "--parts", "tuned")
    assert not state.exists()
    assert json.loads(Path("cache/tuned/l1.json").read_text())["dense"]["images"] == 20


@pytest.mark.parametrize("older", [True, False])
def test_a_fine_tuning_of_a_row_measured_anew_begins_again(monkeypatch, stand_ins, tmp_path, older):
    """The fine-tuning state of an earlier model of the row is discarded; that of the current one is not."""
    monkeypatch.syspath_prepend(EXAMPLES)
    from reproduce import tuning
    from reproduce.settings import Settings
    from reproduce.subjects import Subject

    images = [f"{stand_ins / 'imagenet'}:{split}" for split in ("train", "val")]
    subject = Subject("l1", stand_ins / "checkpoints" / "l1.pth", *images)
    dense = subject.load("cpu")
    ssmcompress.save(ssmcompress.prune(dense, ratio=0.3), tmp_path / "model")
    state = tmp_path / "l1-row-20-1-0.pt"
    state.write_bytes(b"of an earlier run")
    time = (tmp_path / "model" / MODEL_FILE).stat().st_mtime + (-10 if older else 10)
    os.utime(state, (time, time))

    def begin(*_, state, **__):
        assert state.resume
        raise InterruptedError(state.path.exists())

    monkeypatch.setattr(tuning.ssmcompress, "finetune", begin)
    run = tuning.Run(tmp_path / "tuned.json", "row", tmp_path / "model", 20, {}, ssmcompress.Recipe())
    with pytest.raises(InterruptedError) as begun:
        tuning.tune(dense, subject, Settings(tmp_path, seeds=(0,), tune_images=20, tune_epochs=1), run)
    assert begun.value.args == (not older,)


def test_the_best_row_is_tuned_of_models_that_all_tables_have(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(EXAMPLES)
    from reproduce import tuning
    from reproduce.settings import Settings
    from reproduce.subjects import Subject

    asked = []
    monkeypatch.setattr(tuning, "read_rows", lambda name, *_: asked.append(name) or [])
    for name in ("whole", "brief"):
        subject = Subject(name, Path("x"), "", "", whole=name == "whole")
        tuning.tune_best(subject, Settings(tmp_path))
    assert asked == ["whole"]


@pytest.fixture
def kept_rows(monkeypatch, tmp_path):
    """Settings of a cache with a row "naive-60" of the model "m", whose files a test can change."""
    monkeypatch.syspath_prepend(EXAMPLES)
    from reproduce.settings import Settings

    settings = Settings(tmp_path, seeds=(0,))
    folder = settings.rows_of("m", 0)
    (folder / "models" / "naive-60").mkdir(parents=True)
    (folder / "models" / "naive-60" / WEIGHTS_FILE).write_bytes(b"weights")
    write_compared(settings, weights="a")
    return settings


def write_compared(settings, **more):
    rows = [{"method": "dense", "share": 1.0, "top1": 90.0}, {"method": "naive", "share": 0.6, "top1": 50.0}]
    value = {"settings": {"seed": 0, **more}, "rows": rows}
    (settings.rows_of("m", 0) / "compare.json").write_text(json.dumps(value), encoding="utf-8")


@pytest.mark.parametrize("change", ["nothing", "the row", "the dense model", "images to learn from", "epochs"])
def test_figures_of_another_model_or_with_other_options_are_not_taken(kept_rows, change):
    from reproduce.settings import write
    from reproduce.tuning import identify_run, read_tuned

    figures = {"of": identify_run("m", kept_rows, "naive-60", "tuned"), "figures": {"top1": 60.0}}
    write(kept_rows.file_of("tuned", "m"), {"naive-60": figures})
    settings = kept_rows
    if change == "the row":
        (kept_rows.rows_of("m", 0) / "models" / "naive-60" / WEIGHTS_FILE).write_bytes(b"other weights")
    elif change == "the dense model":
        write_compared(kept_rows, weights="b")
    elif change == "images to learn from":
        settings = replace(kept_rows, tune_images=7)
    elif change == "epochs":
        settings = replace(kept_rows, tune_epochs=7)
    assert read_tuned("m", settings) == ({"naive-60": figures} if change == "nothing" else {})


@pytest.mark.parametrize("change", ["nothing", "the row", "threads"])
def test_times_of_another_model_or_with_other_threads_are_not_taken(kept_rows, monkeypatch, change):
    from reproduce import speed
    from reproduce.rows import identify
    from reproduce.settings import write

    row = {"1": {"ms": 2.0, "share": 0.5}, "8": {"ms": 2.0, "share": 0.5}, "of": identify("m", kept_rows, "naive-60")}
    times = {"of": speed.identify_speed("m", kept_rows), "rows": {"naive-60": row}, "1": 4.0, "8": 4.0}
    write(kept_rows.file_of("speed", "m"), times)
    if change == "the row":
        (kept_rows.rows_of("m", 0) / "models" / "naive-60" / WEIGHTS_FILE).write_bytes(b"other weights")
    elif change == "threads":
        monkeypatch.setattr(speed.torch, "get_num_threads", lambda: 77)
    found = speed.read_speed("m", kept_rows)
    speeds = [speed.images_per_second(found, key, 8) for key in ("dense", "naive-60")]
    assert speeds == {"nothing": [2000.0, 4000.0], "the row": [2000.0, None], "threads": [None, None]}[change]


def test_rows_of_some_seeds_alone_say_so(kept_rows):
    from reproduce.found import Found
    from reproduce.tables import main_table
    from reproduce.text import show_seeds

    settings = replace(kept_rows, seeds=(0, 1, 2))
    flops = {"full": 1.0, "paper": 1.0}
    measured = {"share": 0.6, "flops": flops, "flops_share": 0.6, "images": 9}
    failed = {"method": "search, reconstructed", "share": 0.6, "failed": "no such layer", "images": None}
    rows = {
        "dense": {0: {**measured, "method": "dense", "top1": 90.0}},
        "naive-60": {seed: {**measured, "method": "naive", "top1": 50.0} for seed in range(3)},
        "all-axes-60": {0: {**failed, "method": "all axes"}, 1: {**measured, "method": "all axes", "top1": 80.0}},
        "search-reconstructed-60": {0: failed},
    }
    found = Found("m", rows, 20, {}, {}, {}, {}, {}, {})
    table = main_table(found, ["naive", "all axes", "search, reconstructed"], settings)
    assert "| naive | 50.00 |" in table
    assert "| all axes | 80.00 (1 of 3) |" in table
    assert show_seeds([1.0, 3.0, 5.0], 3) == "3.00 (1.00 to 5.00)"
    assert show_seeds([1.0, 3.0], 3) == "2.00 (1.00 to 3.00; 2 of 3)"
    assert show_seeds([1.001, 1.002]) == "1.00"
    assert "| search, reconstructed | out of reach |" in table
    assert "Out of reach, search, reconstructed: no such layer" in table


def test_a_model_that_fails_does_not_stop_the_others(run, stand_ins, monkeypatch):
    import reproduce_tables

    def part(subject, settings):
        if subject.name == "l1":
            raise ssmcompress.InputError("something is wrong with it")
        done.append(subject.name)

    done = []
    monkeypatch.setitem(reproduce_tables.PARTS, "rows", part)
    with pytest.raises(SystemExit, match="l1, rows: something is wrong"):
        run("--imagenet", str(stand_ins / "imagenet"), "--models", str(stand_ins / "checkpoints"), "--parts", "rows")
    assert len(done) == 2  # the segmentation model has no images
    assert Path("page.md").exists()


def test_what_is_no_checkpoint_is_left_out(monkeypatch, stand_ins, tmp_path, caplog):
    caplog.set_level(logging.INFO, logger="ssmcompress")
    monkeypatch.syspath_prepend(EXAMPLES)
    from reproduce.subjects import find_subjects

    torch.save({"lr": 0.1}, tmp_path / "optimizer.pt")
    with pytest.raises(SystemExit, match="no checkpoint"):
        find_subjects(tmp_path, stand_ins / "imagenet", None)
    shutil.copy(stand_ins / "checkpoints" / "l1.pth", tmp_path / "l1.pth")
    assert [subject.name for subject in find_subjects(tmp_path, stand_ins / "imagenet", None)] == ["l1"]
    assert "optimizer.pt is left out" in caplog.text
    shutil.copy(stand_ins / "checkpoints" / "l1.pth", tmp_path / "l1.ckpt")
    with pytest.raises(SystemExit, match="l1.ckpt and l1.pth"):
        find_subjects(tmp_path, stand_ins / "imagenet", None)


def test_inputs_at_dropped_positions(monkeypatch):
    """Given to neither op, the model is the aligned one; given to both, it is the dense one."""
    monkeypatch.syspath_prepend(EXAMPLES)
    from reproduce.inputs import run_cases

    dense, images = make_vim(6), torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    pruned = ssmcompress.prune(dense, ssmcompress.calibrate(dense, images, ratio=0.4, stages=[1, 3]))
    with torch.inference_mode():
        logits = run_cases(dense, pruned, images)
        torch.testing.assert_close(logits["neither"], pruned(images), rtol=0, atol=1e-5)
        torch.testing.assert_close(logits["both"], dense(images), rtol=0, atol=1e-5)
    values = list(logits.values())
    for number, one in enumerate(values):
        assert all((one - other).abs().max() > 1e-4 for other in values[number + 1 :])


def test_models_with_grids_of_several_sizes_are_not_explained(monkeypatch, tmp_path, caplog):
    caplog.set_level(logging.INFO, logger="ssmcompress")
    monkeypatch.syspath_prepend(EXAMPLES)
    from reproduce.reasons import explain
    from reproduce.settings import Settings
    from reproduce.subjects import Subject

    torch.save({"model": make_vmamba().state_dict()}, tmp_path / "vssm.pth")
    explain(Subject("vssm", tmp_path / "vssm.pth", "", ""), Settings(tmp_path))
    assert "vssm: not explained" in caplog.text
    assert not (tmp_path / "reasons").exists()


def test_a_page_keeps_models_that_were_measured_elsewhere(kept_rows, tmp_path):
    """With another cache and without the checkpoint; not if the checkpoint is there and has no results."""
    from reproduce.page import write_page
    from reproduce.settings import write
    from reproduce.subjects import Subject

    folder = kept_rows.rows_of("m", 0)
    flops = {"full": 2.0, "paper": 1.0}
    row = {"method": "naive", "share": 0.6, "top1": 51.25, "flops": flops, "flops_share": 0.6, "images": 9}
    dense = {**row, "method": "dense", "share": 1.0, "top1": 91.5}
    write(folder / "compare.json", {"settings": {"calibration": {"images": 7}}, "rows": [dense, row]})
    write(kept_rows.file_of("cost", "m"), {"rows": {"seconds": 240.0, "machine": "an old machine"}})
    write(tmp_path / "made.json", {"m.pth": {"command": "python m.py", "seconds": 60.0}, "other": {"seconds": 1.0}})
    subject = Subject("m", tmp_path / "m.pth", "", "")
    page = tmp_path / "page.md"
    write_page(page, [subject], kept_rows, ["m.pth"])
    first = page.read_text(encoding="utf-8")
    assert all(text in first for text in ("| naive | 51.25 |", "an old machine", "making m.pth", "7 images"))
    assert "making other" not in first
    (tmp_path / "page_attention_m.png").write_bytes(b"drawn there")
    for _ in range(2):
        write_page(page, [subject], replace(kept_rows, cache=tmp_path / "empty"), ["m.pth"])
        again = page.read_text(encoding="utf-8")
        assert again.partition("## Figures")[0] == first.partition("## Time")[0]
        assert "(page_attention_m.png)" in again
    subject.checkpoint.write_bytes(b"trained again")
    write_page(page, [subject], replace(kept_rows, cache=tmp_path / "empty"), ["m.pth"])
    assert "naive" not in page.read_text(encoding="utf-8")


def test_notes_of_a_page_are_kept(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(EXAMPLES)
    from reproduce.page import NOTES, write_page
    from reproduce.settings import Settings

    page = tmp_path / "page.md"
    write_page(page, [], Settings(tmp_path / "cache"))
    text = page.read_text(encoding="utf-8")
    page.write_text(text.replace(NOTES[0], f"{NOTES[0]}\n## Reading\n\nPlain *wins*.\n"), encoding="utf-8")
    for _ in range(2):
        write_page(page, [], Settings(tmp_path / "cache"))
    assert f"{NOTES[0]}\n## Reading\n\nPlain *wins*.\n{NOTES[1]}" in page.read_text(encoding="utf-8")
    page.write_text(NOTES[0], encoding="utf-8")
    with pytest.raises(SystemExit, match="end of notes"):
        write_page(page, [], Settings(tmp_path / "cache"))
    assert page.read_text(encoding="utf-8") == NOTES[0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--models", "m"), "--imagenet"),
        (("--imagenet", "i", "--models", "missing"), "missing"),
        (("--imagenet", "i", "--models", "."), "no checkpoint"),
        (("--parts", "rows,sped"), "sped"),
        (("--seeds", "a"), "0,1,2"),
        (("--tune-images", "0"), "above 0"),
        (("--best-images", "0"), "above 0"),
        (("--idx", "nowhere", "--only", "plain_mamba"), "not created"),
        (("--share", "0"), "--share"),
        (("--only", "resnet"), "expected some of vim, plain_mamba, deit, segmenter"),
    ],
)
def test_wrong_arguments(run, capsys, arguments, message):
    with pytest.raises(SystemExit) as error:
        run(*arguments)
    assert message in str(error.value) + capsys.readouterr().err


def test_shares_of_what_dropped_tokens_show(monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES)
    from reproduce.reasons import mean_gap, share_contents
    from reproduce.subjects import Subject

    drawn = np.zeros((16, 16), np.uint8)
    drawn[:4, :4], drawn[4:8, :4] = 2, 1  # patch 0 is the object, patch 4 clutter
    subject = Subject("x", Path("x"), "", "", draw=lambda number: drawn)
    vim = make_vim()  # 16 patches, the class token at 8
    kept = torch.tensor([[p for p in range(17) if p not in (0, 4, 5, 16)]])
    shares = share_contents(subject, vim, [0], kept)
    np.testing.assert_allclose(shares["dropped"], [0.5, 0.25, 0.25])
    np.testing.assert_allclose(shares["all"], [14 / 16, 1 / 16, 1 / 16])
    assert mean_gap(torch.tensor([[0, 1, 4, 6]])) == 1.5


def test_the_miniature_is_made_by_commands_that_exist(run, monkeypatch, tmp_path):
    """Also in several runs: finished parts are not repeated, and only those needed by the requested models are made."""
    import train_clutter
    import train_segmenter
    from reproduce import clutter

    monkeypatch.setattr(clutter, "EXAMPLES", tmp_path)
    calls = []
    monkeypatch.setattr(clutter.subprocess, "run", lambda command, check: calls.append(command[1:]))
    for file, making in clutter.list_makings().items():
        if making.script != "make_clutter":
            state = {"model": make_vim().state_dict(), "seconds": 1.0, "peak_mb": 2.0, "history": []}
            torch.save(state, tmp_path / file)
    clutter.make_all(tmp_path, ["deit"])
    assert [Path(call[0]).stem for call in calls] == ["make_clutter"] * 6 + ["train_clutter"] * 5
    clutter.make_all(tmp_path, ["segmenter"])  # which begins with the Vim
    scripts = [Path(call[0]).stem for call in calls]
    assert scripts[11:] == ["make_clutter"] * 2 + ["train_clutter"] * 3 + ["train_segmenter"]
    for script, call in zip(scripts, calls, strict=True):
        monkeypatch.setattr(sys, "argv", call)
        if script != "make_clutter":
            assert {"train_clutter": train_clutter, "train_segmenter": train_segmenter}[script].parse().checkpoint
    made = json.loads((tmp_path / "made.json").read_text())
    assert made["vim80.pth"]["seconds"] == 1.0
    assert made["deit.pth"]["command"].startswith(
        "python examples/train_clutter.py deit.pth train.parquet test.parquet "
    )
    clutter.make_all(tmp_path, ["vim", "plain_mamba", "deit", "segmenter"])
    assert len(calls) == 17
