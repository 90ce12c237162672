"""The notebook in examples/: its cells run from the first to the last, and hold no output."""

import json
from pathlib import Path

import pytest

NOTEBOOK = Path(__file__).parent.parent / "examples" / "compress_a_vim.ipynb"
# The images of the notebook, and fewer of them, with which it takes a sixth of the time.
IMAGES, FEWER = "range(256), range(256, 756)", "range(48), range(48, 112)"


@pytest.fixture(scope="module")
def cells() -> list[dict]:
    notebook = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    assert notebook["nbformat"] == 4
    return notebook["cells"]


def test_it_is_short_and_holds_no_output(cells):
    assert len(cells) <= 40
    assert len({cell["id"] for cell in cells}) == len(cells)
    assert all(not cell["outputs"] and cell["execution_count"] is None for cell in cells if "outputs" in cell)


@pytest.mark.usefixtures("in_an_empty_folder")
def test_its_cells_run(cells, monkeypatch, capsys):
    monkeypatch.setenv("MPLBACKEND", "agg")
    code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    assert sum(IMAGES in cell for cell in code) == 1
    names: dict = {}
    for number, cell in enumerate(code, 1):
        exec(compile(cell.replace(IMAGES, FEWER), f"cell {number}", "exec"), names)
    assert names["results"]["reconstructed"].agreement > names["results"]["naive"].agreement
    assert Path("compressed-vim/model.onnx").exists()
    assert len(names["plt"].get_fignums()) == 2
    names["plt"].close("all")
    out = capsys.readouterr()
    assert "onnxruntime differs by" in out.out
    assert "% of the FLOPs" in out.out
