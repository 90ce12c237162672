"""The examples that come after an export: what a user deploys, without this package."""

import importlib.util
import json
import shutil
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from conftest import make_vim
from PIL import Image

import ssmcompress
from ssmcompress.data.transforms import Preprocessing

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.fixture(scope="module")
def serve_onnx():
    spec = importlib.util.spec_from_file_location("serve_onnx", EXAMPLES / "serve_onnx.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


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
