"""In Python and notebooks, without the command line, messages of the library use `logging` and `warnings`."""

import logging
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
from command_line import call

import ssmcompress
from ssmcompress import SsmCompressWarning, progress

pytestmark = pytest.mark.usefixtures("in_an_empty_folder")

# A typical notebook, from loading a checkpoint to exporting an ONNX file.
BEGIN = """
import logging, sys, warnings
import torch
import ssmcompress

model, images = ssmcompress.load(sys.argv[1]), sys.argv[2]
ssmcompress.evaluate(model, images)
ssmcompress.evaluate(model, torch.rand(4, 3, 16, 16))
"""
SILENT = """
import logging, warnings
logging.getLogger("ssmcompress").setLevel("CRITICAL")
warnings.filterwarnings("ignore")
"""
GO_ON = """
ssmcompress.calibrate(model, images)
pruned = ssmcompress.reconstruct(ssmcompress.prune(model, ssmcompress.make_plan(model, ratio=0.5)), model, images)
ssmcompress.evaluate(pruned, images, dense=model)
ssmcompress.save(pruned, "saved")
ssmcompress.compress(model, ssmcompress.make_plan(model, ratio=0.5), "out")
ssmcompress.load("out")
ssmcompress.finetune(pruned, images, dense=model, recipe=ssmcompress.Recipe(epochs=1, batch_size=6))
ssmcompress.export_onnx(pruned, "m.onnx")
ssmcompress.verify_onnx(pruned, "m.onnx")
"""


def run_session(text, *arguments):
    done = subprocess.run(
        [sys.executable, "-c", text, *map(str, arguments)], capture_output=True, text=True, timeout=250
    )
    assert done.returncode == 0, done.stderr
    return done


def test_nothing_is_written_when_the_logger_and_warnings_are_silenced(checkpoint, class_folders):
    done = run_session(SILENT + BEGIN + GO_ON, checkpoint, class_folders)
    assert (done.stdout, done.stderr) == ("", "")


def test_notes_and_warnings_are_shown_by_default_and_stdout_is_left_alone(checkpoint, class_folders):
    done = run_session(BEGIN, checkpoint, class_folders)
    assert done.stdout == ""
    assert "preprocessing is not in the file" in done.stderr
    assert "SsmCompressWarning: the images have values from" in done.stderr


def test_a_note_is_a_warning_and_a_line_is_information(caplog):
    with pytest.warns(SsmCompressWarning) as warned:
        progress.note("assumed")
    with caplog.at_level(logging.DEBUG, "ssmcompress"):
        progress.line("epoch 1")
    assert [(r.name, r.levelname, r.message) for r in caplog.records] == [("ssmcompress", "INFO", "epoch 1")]
    (warning,) = warned
    assert (str(warning.message), warning.filename) == ("assumed", __file__)


def test_a_warning_is_at_the_line_of_the_caller(checkpoint, class_folders):
    """Not of the package: so Python shows it once for each place, and names the place to act on it."""
    with pytest.warns(SsmCompressWarning, match="preprocessing is not in the file") as warned:
        [ssmcompress.load(checkpoint).transform() for _ in range(2)]
    assert [w.filename for w in warned] == [__file__, __file__]
    with pytest.warns(SsmCompressWarning, match="preprocessing is not in the file") as warned:
        ssmcompress.evaluate(ssmcompress.load(checkpoint), class_folders)  # under a decorator of torch
    assert {w.filename for w in warned} == {__file__}


def test_the_category_silences_the_warnings_of_the_package_alone(checkpoint, class_folders):
    silent = "import warnings, ssmcompress as s\nwarnings.filterwarnings('ignore', category=s.SsmCompressWarning)\n"
    done = run_session(silent + BEGIN, checkpoint, class_folders)
    assert (done.stdout, done.stderr) == ("", "")
    other = "import warnings; warnings.warn('of another package')"
    assert "of another package" in run_session(silent + other, checkpoint, class_folders).stderr


def test_a_warning_is_a_line_of_a_command_once(checkpoint, monkeypatch):
    def warn_twice(*_):
        for text in ("slow ops, use `force=True`", "slow ops, use `force=True`", "other"):
            progress.warn(text)
        warnings.warn("of another package", RuntimeWarning, stacklevel=1)

    monkeypatch.setattr("ssmcompress.evaluation.measure._check_outputs", warn_twice)
    for more in ([], ["--verbose"], ["--quiet"]):
        with pytest.warns(RuntimeWarning) as others:
            result = call("evaluate", checkpoint, "--log-file", "run.log", *more)
        assert {str(w.message) for w in others} == {"of another package"}
        lines = result.stderr.splitlines()
        assert [lines.count(text) for text in ("slow ops, use --force", "other")] == [int(more != ["--quiet"])] * 2
    logged = [line.partition(" ssmcompress: ")[::2] for line in Path("run.log").read_text().splitlines()]
    levels = [start.split()[-1] for start, text in logged if text == "slow ops, use --force"]
    assert levels == ["WARNING"] * 3
    assert "SsmCompressWarning" not in Path("run.log").read_text()


def test_without_a_command_loops_are_neither_recorded_nor_logged(caplog):
    items = [1, 2]
    with caplog.at_level(logging.DEBUG, "ssmcompress"):
        assert progress.track(items, "loop", 2) is items
    assert not caplog.records
