"""Tables of comparisons of one model and of several models."""

import pytest

from ssmcompress.cli import comparison_tables as tables
from ssmcompress.jobs.fronts import place_rows
from ssmcompress.tasks import CLASSIFICATION

DATA = {"images": 3, "name": "x"}


def test_a_comparison_fits(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    row = {
        "method": "saliency, aligned, reconstructed", "ratio": 0.123, "flops_share": 0.998, "top1": 99.99,
        "agreement": 100.0, "kl": 12.3456, "latency_ms": 1234.5, "latency_share": 1.05,
    }  # fmt: skip
    tables.show_comparison({"rows": [row], "settings": {"data": DATA, "calibration": DATA}})
    out = capsys.readouterr().out
    for figure in ("0.123", "99.8 %", "99.99 %", "100.00 %", "12.3456", "1234.5 ms", "105 %"):
        assert figure in out
    assert max(map(len, out.splitlines())) <= 80


def test_columns_without_a_figure_are_left_out(capsys):
    row = {"method": "naive", "ratio": 0.3, "flops_share": 0.6, "agreement": 50.0, "kl": 0.1}
    tables.show_comparison({"rows": [row], "settings": {"data": DATA, "calibration": DATA}})
    table = capsys.readouterr().out.split("agrees: same")[0]
    assert "latency" not in table
    assert "top-1" not in table
    assert "50.00 %" in table


# ------------------------------------------------------------------------------------------------------ several models


def row(model, method, top1, gflops, ms, ratio=0.3):
    share = gflops / {"vim_t": 1.6, "plain_mamba_l1": 3.0}[model]
    figures = {
        "top1": top1,
        "agreement": None if method == "dense" else 90.0,
        "kl": None if method == "dense" else 0.123,
    }
    cost = {"flops": {"full": gflops}, "flops_share": share, "latency_ms": ms, "latency_share": share}
    return {"model": model, "method": method, "ratio": 0.0 if method == "dense" else ratio, **figures, **cost}


ROWS = [
    row("vim_t", "dense", 76.1, 1.6, 14.0),
    row("vim_t", "saliency, aligned, reconstructed", 75.0, 0.9, 9.5),
    row("vim_t", "naive", 60.0, 0.9, 9.0),
    row("plain_mamba_l1", "dense", 77.9, 3.0, 31.0),
    row("plain_mamba_l1", "naive", 74.0, 1.5, 18.0),
    {"model": "plain_mamba_l1", "method": "R-MeeTo", "ratio": 0.3, "images": None, "failed": "cannot"},
]
MODELS = [
    {"name": "vim_t", "architecture": "vim", "image_size": [224, 224], "left_out": {}},
    {
        "name": "plain_mamba_l1",
        "architecture": "plain_mamba",
        "image_size": [224, 224],
        "left_out": {"MTR": "ranks tokens"},
    },
]


def shown(capsys, monkeypatch, columns=100, rows=ROWS):
    monkeypatch.setenv("COLUMNS", str(columns))
    placed = place_rows(rows, CLASSIFICATION)
    settings = {"data": DATA, "calibration": DATA}
    tables.show_models({"task": "classification", "models": MODELS, "rows": placed, "settings": settings})
    return capsys.readouterr().out


def line_of(out, name):
    return next(line for line in out.splitlines() if line.strip().startswith(name))


def test_models_have_a_section_each_with_their_own_rows_best_first(capsys, monkeypatch):
    lines = [line.strip() for line in shown(capsys, monkeypatch).splitlines()]
    order = [
        "vim_t (vim, 224x224)",
        "dense",
        "saliency, aligned",
        "naive",
        "plain_mamba_l1 (",
        "dense",
        "naive",
        "R-MeeTo (out",
    ]
    places = [next(n for n, line in enumerate(lines) if line.startswith(text)) for text in (order[0], order[4])]
    first, second = lines[places[0] : places[1]], lines[places[1] :]
    assert [line.startswith(text) for line, text in zip(first, order[:4], strict=True)] == [True] * 4
    assert all(line.startswith(text) for line, text in zip(second, order[4:], strict=False))


def test_a_row_says_its_cost_its_speed_and_what_beats_it(capsys, monkeypatch):
    out = shown(capsys, monkeypatch, columns=160)
    cells = line_of(out, "naive").split()
    for cell in ("0.3", "0.9", "56.2", "60.00", "90.00", "0.1230", "7.9", "127.0", "1.78x", "-15.00"):
        assert cell in cells
    assert line_of(out, "saliency, aligned, reconstructed").split()[-2:] == ["*", "*"]
    assert line_of(out, "R-MeeTo (out of reach)").split()[-3:] == ["-", "-", "-"]
    assert "plain_mamba_l1: without 'MTR', which ranks tokens" in out
    assert "left out at this width" not in out


@pytest.mark.parametrize("columns", [60, 80, 100, 120])
def test_columns_are_left_out_in_a_fixed_order_where_there_is_no_room(capsys, monkeypatch, columns):
    out = shown(capsys, monkeypatch, columns)
    header = out.splitlines()[0].split()
    assert max(len(line.rstrip()) for line in out.splitlines()[: len(ROWS) + 4]) <= columns
    (note,) = (line for line in out.splitlines() if "left out at this width" in line)
    hidden = note.split(": ")[1].split(";")[0].split(", ")
    order = ["KL", "agrees", "ratio", "of dense", "images/s", "speed-up", "at FLOPs", "at ms"]
    assert hidden == order[: len(hidden)]
    assert {"GFLOPs", "top-1", "ms"} <= set(header)


def test_at_100_columns_speed_and_both_distances_are_shown(capsys, monkeypatch):
    header = shown(capsys, monkeypatch).splitlines()[0]
    for title in ("GFLOPs", "top-1", "ms", "images/s", "speed-up", "at FLOPs", "at ms"):
        assert title in header


def test_without_labels_agreement_is_what_is_left(capsys, monkeypatch):
    rows = [{**one, "top1": None} for one in ROWS]
    header = shown(capsys, monkeypatch, 80, rows).splitlines()[0]
    assert "agrees" in header
    assert "top-1" not in header
