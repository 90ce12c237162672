"""The examples that come after an export: what a user deploys, without this package."""

import importlib.util
import json
import shutil
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import onnx
import pytest
from conftest import make_vim
from PIL import Image

import ssmcompress
from ssmcompress.data.transforms import Preprocessing

EXAMPLES = Path(__file__).parent.parent / "examples"


def load_example(name):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def serve_onnx():
    return load_example("serve_onnx")


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    file = tmp_path_factory.mktemp("exported") / "model.onnx"
    model = make_vim(depth=2)
    ssmcompress.export_onnx(
        ssmcompress.prune(model, ssmcompress.make_plan(model)), file, ssmcompress.OnnxOptions(scan="scan")
    )
    return file


@pytest.mark.parametrize("crop", [1.0, 0.875])
@pytest.mark.parametrize("target", [(16, 16), (24, 32)])
@pytest.mark.parametrize("size", [(16, 16), (61, 47), (33, 100), (12, 200)])
@pytest.mark.parametrize("channels", [1, 3])
def test_pictures_are_prepared_as_the_package_does(serve_onnx, size, target, crop, channels):
    pixels = np.random.default_rng(0).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
    how = Preprocessing((0.4,) * channels, (0.3,) * channels, crop, "bicubic")
    about = {"architecture": {"image_size": target, "in_chans": channels}, "preprocessing": asdict(how)}
    found = serve_onnx.prepare(Image.fromarray(pixels), about)
    expected = how.transform(target)(Image.fromarray(pixels)).numpy()[None]
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_a_picture_is_classified_with_nothing_of_this_package(exported, tmp_path):
    Image.fromarray(np.full((40, 30, 3), 90, np.uint8)).save(tmp_path / "picture.png")
    code = "import sys; sys.modules['ssmcompress'] = sys.modules['torch'] = None; import runpy; "
    script = f"sys.argv = ['serve', {str(exported)!r}, 'picture.png', '--top', '3']; "
    script += f"runpy.run_path({str(EXAMPLES / 'serve_onnx.py')!r}, run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", code + script], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 3
    assert "class" in done.stdout


SPINNING = "session.intra_op.allow_spinning"


def test_the_session_has_the_options_that_the_file_recommends(serve_onnx, exported, monkeypatch):
    monkeypatch.setattr(serve_onnx.os, "sched_getaffinity", lambda process: {0, 1, 2}, raising=False)
    options = serve_onnx.make_options(serve_onnx.read_metadata(str(exported)))
    assert (options.intra_op_num_threads, options.get_session_config_entry(SPINNING)) == (3, "0")
    one = serve_onnx.make_options({"session": {"intra_op_num_threads": 1, "config": {}}})
    assert one.intra_op_num_threads == 1
    assert serve_onnx.make_options({"session": {"intra_op_num_threads": 99}}).intra_op_num_threads == 3
    assert serve_onnx.make_options({}).intra_op_num_threads == 3  # a file of an earlier version
    assert serve_onnx.make_options({}, threads=2).intra_op_num_threads == 2


@pytest.mark.parametrize(
    "session",
    [
        3,
        [1],
        {"config": []},
        {"intra_op_num_threads": "2"},
        {"intra_op_num_threads": -1},
        {"intra_op_num_threads": True},
        {"config": {SPINNING: 0}},
        {"config": {SPINNING: ["0"]}},
    ],
)
def test_odd_session_options_end_in_one_line(serve_onnx, session):
    with pytest.raises(SystemExit, match=r"session options in the file are .*: expected .intra_op") as ended:
        serve_onnx.make_options({"session": session})
    assert "\n" not in str(ended.value)


def test_session_options_that_the_script_does_not_know_are_not_applied(serve_onnx, capsys):
    session = {"config": {"session.load_model_format": "ORT", SPINNING: "0"}, "inter_op_num_threads": 2}
    assert serve_onnx.make_options({"session": session}).get_session_config_entry(SPINNING) == "0"
    said = capsys.readouterr().err
    assert said == "unknown session options are not applied: ['inter_op_num_threads', 'session.load_model_format']\n"


def test_a_file_without_its_metadata_is_refused_in_one_line(serve_onnx, exported, tmp_path):
    graph = onnx.load(exported)
    no_object = [({"ssmcompress": text}, "is not a JSON object") for text in ("{", "[1]")]
    for metadata, message in (({}, "expected a file that"), *no_object):
        del graph.metadata_props[:]
        onnx.helper.set_model_props(graph, metadata)
        onnx.save(graph, tmp_path / "m.onnx")
        with pytest.raises(SystemExit, match=message):
            serve_onnx.read_metadata(str(tmp_path / "m.onnx"))


def test_the_runtime_of_browsers_agrees(exported, tmp_path):
    """Where Node and onnxruntime-web are: the folder with node_modules is the one the tests are run from."""
    node = shutil.which("node")
    if node is None or not Path("node_modules/onnxruntime-web").is_dir():
        pytest.skip("optional: `npm install onnxruntime-web` in the folder the tests are run from")
    subprocess.run([sys.executable, EXAMPLES / "sample_run.py", exported, tmp_path / "sample.json"], check=True)
    script = [node, EXAMPLES / "check_in_node.mjs", exported, tmp_path / "sample.json"]
    subprocess.run(script, check=True)
    sample = json.loads((tmp_path / "sample.json").read_text())
    sample["logits"][0] += 1
    (tmp_path / "sample.json").write_text(json.dumps(sample))
    assert subprocess.run(script, check=False).returncode == 4


def test_long_sequences_are_measured_and_drawn(in_an_empty_folder, monkeypatch, capsys):
    script, repeated = load_example("long_sequences"), ["--repeats", "1"]
    monkeypatch.setattr(sys, "argv", ["long_sequences", "16x32", "64", "32/16", *repeated, "--output", "chart.png"])
    script.main()
    assert capsys.readouterr().out.count("slope") == 2
    assert Image.open("chart.png").format == "PNG"
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--json"])
    script.main()
    found = json.loads(capsys.readouterr().out)
    assert found["points"].keys() == found["slopes"].keys() == {"scan", "Vim-tiny"}
    for points in found["points"].values():
        assert [point["tokens"] for point in points] == [3, 5, 17]
        assert all(point["ms"] > 0 for point in points)
    assert [point["mb"] for point in found["points"]["scan"]] == [tokens * 384 * 4 / 1e6 for tokens in (3, 5, 17)]
    for wrong in (["15", "64"], ["64", "nonsense"], ["64", "64/0"], ["64", "64x64"], ["64"]):
        monkeypatch.setattr(sys, "argv", ["long_sequences", *wrong])
        with pytest.raises(SystemExit, match=r"expected .*image") as ended:
            script.main()
        assert "\n" not in str(ended.value)


def test_the_slope_of_linear_and_of_quadratic_growth(monkeypatch):
    script = load_example("long_sequences")
    powers = {"scan": 1, "Vim-tiny": 2}
    monkeypatch.setattr(
        script, "time_calls", lambda calls, *others: {(what, n): [3.0 * n ** powers[what]] * 2 for what, n in calls}
    )
    assert script.measure(["16", "32", "64"], 2)["slopes"] == pytest.approx(powers)


def test_a_command_beside_busy_processes():
    script = [sys.executable, str(EXAMPLES / "beside_busy.py")]
    code = "import sys; print('beside'); sys.exit(3)"
    done = subprocess.run([*script, "1", sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (3, "beside\n")
    done = subprocess.run([*script, "many", "true"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "number of busy processes" in done.stderr
