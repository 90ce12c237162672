"""In Python and notebooks, without the command line: what the library says goes through `logging` and `warnings`."""

import logging
import subprocess
import sys

import pytest

from ssmcompress import progress

pytestmark = pytest.mark.usefixtures("in_an_empty_folder")

# What people do in a notebook, from reading a checkpoint to an ONNX file.
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
    assert "UserWarning: the images have values from" in done.stderr


def test_a_note_is_a_warning_and_a_line_is_information(monkeypatch, caplog):
    monkeypatch.setattr(progress, "_silent", progress.FrontEnd())
    with caplog.at_level(logging.DEBUG, "ssmcompress"), progress.use_front_end(progress.FrontEnd()):
        progress.note("assumed")
        progress.note("assumed")
        progress.line("epoch 1")
    assert [(r.name, r.levelname, r.message) for r in caplog.records] == [
        ("ssmcompress", "WARNING", "assumed"),
        ("ssmcompress", "INFO", "epoch 1"),
    ]


def test_without_a_command_loops_are_neither_recorded_nor_logged(caplog):
    items = [1, 2]
    with caplog.at_level(logging.DEBUG, "ssmcompress"):
        assert progress.track(items, "loop", 2) is items
    assert not caplog.records
