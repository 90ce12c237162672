"""`report`: as a table, JSON and a web page."""

import json
import time
from pathlib import Path

import pytest
from command_line import call, refused

pytestmark = pytest.mark.usefixtures("in_an_empty_folder")


def test_report_as_a_web_page_and_of_the_newest_model(checkpoint):
    call("prune", checkpoint, "--no-latency", "--quiet")
    time.sleep(0.01)
    call("prune", checkpoint, "--no-latency", "--quiet", "--ratio", "0.5")
    result = call("report", "--html", "report.html")
    assert "model-r0.50" in result.stderr
    page = Path("report.html").read_text()
    assert "<h1>model-r0.50</h1>" in page
    assert "data:image/png;base64" in page
    refused("report", "--html", "report.html")
    call("report", "--html", "report.html", "--force")


def test_weights_of_the_last_epoch_are_called_so(checkpoint):
    call("prune", checkpoint, "--no-latency", "--quiet", "-o", "m")
    content = json.loads(Path("m/report.json").read_text())
    content["finetuning"] = {
        "labels": True, "teacher": False, "held_out": 0, "epoch": 2, "averaged": False, "images": 8, "name": "few",
        "steps": 4, "seconds": 1.0, "recipe": {"epochs": 2, "batch_size": 4},
    }  # fmt: skip
    Path("m/report.json").write_text(json.dumps(content))
    assert "weights of the last epoch" in " ".join(call("report", "m").stdout.split())


@pytest.mark.parametrize("change", [
    lambda r: r.update(data=None), lambda r: r.update(stages=[{}]), lambda r: r["dense"].update(flops=3),
    lambda r: r.update(alignment=[]), lambda r: r["pruned"].update(top1=float("inf")), lambda r: r.clear(),
])  # fmt: skip
def test_a_damaged_report(checkpoint, change):
    call("prune", checkpoint, "--no-latency", "--quiet", "-o", "m")
    content = json.loads(Path("m/report.json").read_text())
    change(content)
    Path("m/report.json").write_text(json.dumps(content))
    assert "not a report" in refused("report", "m", "--json")
