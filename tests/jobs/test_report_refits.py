"""Reports of the refits of a reconstruction: the gain from more images, and generalisation to other images."""

import json
from types import SimpleNamespace

import pytest
from command_line import call, call_json
from conftest import select_bundled_images

from ssmcompress.compression.reconstruct.learning_curve import LEAST_GAIN, LEAST_IMAGES, learning_curve
from ssmcompress.jobs.doubts import doubt_reconstruction
from ssmcompress.jobs.report_refits import add_measured, describe_learning, describe_measured, list_learning_notes
from ssmcompress.models.records import Fit, Reconstruction
from ssmcompress.tasks import Evaluation


def fits(*errors):
    return tuple(Fit(f"layers.{i}.out", (0.1,), *values) for i, values in enumerate(errors))


def section(before, after, half, images=100, **more):
    record = Reconstruction("few", images, images // 5, 2.0, 1.0, True, fits((before, after, half)))
    return {**record.to_dict(), "learning": describe_learning(record), "seconds": 1.0, **more}


def test_the_errors_of_several_refits_are_their_geometric_means():
    curve = learning_curve(fits((0.4, 0.1, 0.2), (0.1, 0.01, 0.02), (0.3, 0.3, None), (0.2, 0.0, 0.0)), 100)
    assert curve.refits == 2  # neither what was not refitted, nor what misses nothing
    assert (curve.before, curve.half, curve.after) == pytest.approx((0.2, 0.004**0.5, 0.001**0.5))
    assert curve.twice == pytest.approx(curve.after / 2)


def test_more_images_are_not_expected_to_do_harm():
    curve = learning_curve(fits((0.4, 0.2, 0.19)), 100)
    assert curve.twice == curve.after
    assert list_learning_notes(section(0.4, 0.2, 0.19)) == [
        "refits on half of the images have the same error on held-out images: more images would help little"
    ]


def test_a_few_images_say_nothing():
    assert learning_curve(fits((0.4, 0.1, 0.2)), LEAST_IMAGES - 1) is None
    few = section(0.4, 0.1, 0.2, images=LEAST_IMAGES - 1)
    assert few["learning"] is None
    assert list_learning_notes(few) == doubt_reconstruction(few) == []


def test_reports_of_earlier_versions_say_nothing_of_it():
    old = section(0.4, 0.1, 0.2)
    del old["learning"]
    assert list_learning_notes(old) == doubt_reconstruction(old) == doubt_reconstruction({}) == []
    assert describe_measured(old) == ""


def test_what_more_images_would_bring_in_words():
    assert list_learning_notes(section(0.4, 0.1, 0.11)) == [
        "with half of the images, the error of the refits on held-out images is 10% higher; twice as many would lower "
        "it by about 9%"
    ]


@pytest.mark.parametrize(("gain", "warned"), [(LEAST_GAIN - 0.05, True), (LEAST_GAIN + 0.05, False)])
def test_too_few_images_are_told(gain, warned):
    lines = doubt_reconstruction(section(0.4, 0.2, 0.4 - 0.2 * gain))
    assert bool(lines) == warned
    assert all(f"100 images are few to reconstruct on: half of them bring {gain:.0%}" in line for line in lines)


def measured(*columns, dense=True):
    """What was measured: (column, kind of the last step, KL) for each model."""
    models = {name: SimpleNamespace(steps=[SimpleNamespace(kind=kind)] if kind else []) for name, kind, _ in columns}
    results = {name: Evaluation(10, False, kl=kl) for name, _, kl in columns}
    first = {"dense": SimpleNamespace(steps=[])} if dense else {"dense": None}
    return SimpleNamespace(models={**first, **models}, results={"dense": Evaluation(10, False, kl=None), **results})


def test_the_divergence_on_the_measured_images_is_beside_that_on_the_images_held_out():
    one = section(0.4, 0.1, 0.11)
    found = add_measured(one, measured(("naive", None, 0.5), ("aligned", None, 0.3), ("pruned", "reconstruction", 0.1)))
    assert (found["kl_measured_before"], found["kl_measured_after"]) == (0.3, 0.1)
    assert describe_measured(found) == ", on the measured images 0.3000 -> 0.1000"
    assert doubt_reconstruction(found) == []
    tuned = add_measured(found, measured(("reconstructed", "reconstruction", 0.2), ("pruned", "finetuning", 0.1)))
    assert {k: v for k, v in tuned.items() if k.startswith("kl_m")} == {"kl_measured_after": 0.2}
    later = add_measured(found, measured(("before", "finetuning", 0.2), ("pruned", "finetuning", 0.1)))
    assert later == found  # an earlier report's section stays
    gone = add_measured(one, measured(("aligned", None, None), ("pruned", "reconstruction", None), dense=False))
    assert gone == one
    assert add_measured({**one, "kept": False}, None) == {**one, "kept": False}
    assert add_measured(None, None) is None


def test_a_reconstruction_that_does_not_hold_for_the_measured_images_is_told():
    found = add_measured(section(0.4, 0.1, 0.11), measured(("naive", None, 0.3), ("pruned", "reconstruction", 0.4)))
    (line,) = doubt_reconstruction(found)
    assert "KL from dense 0.3000 -> 0.4000 nats" in line


def test_prune_reports_it(checkpoint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    select_bundled_images(64, tmp_path / "images.parquet")
    block = call_json("prune", checkpoint, "--data", "images.parquet", "--no-latency", "-o", "m")["reconstruction"]
    assert block["images"] >= LEAST_IMAGES
    assert {"refits", "before", "half", "after", "twice"} == set(block["learning"])
    assert block["learning"]["refits"] == sum("half" in fit for fit in block["fits"]) > 0
    assert block["kl_measured_before"] != block["kl_measured_after"]
    call("report", "m", "--html", "r.html")
    files = (tmp_path.joinpath(file).read_text() for file in ("r.html", "m/README.md"))
    for text in (call("report", "m").stdout, *files):
        assert "on the measured images" in " ".join(text.split())
        assert "half of the images" in " ".join(text.split())
    report = json.loads((tmp_path / "m/report.json").read_text())
    del report["reconstruction"]["learning"], report["reconstruction"]["kl_measured_after"]
    report["warnings"] = []
    (tmp_path / "m/report.json").write_text(json.dumps(report))
    assert "half of the images" not in " ".join(call("report", "m").stdout.split())
