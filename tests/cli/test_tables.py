"""Tables in 80 columns, and a web page on a phone."""

import json
import re
import sys

import pytest
from conftest import GOLDEN

from ssmcompress.cli import tables
from ssmcompress.jobs import report_text


def shown(capsys, header, rows, columns=80, monkeypatch=None):
    monkeypatch.setenv("COLUMNS", str(columns))
    tables.show_table(header, rows)
    return capsys.readouterr().out


@pytest.mark.parametrize("count", [1, 2, 5, 9, 17])
@pytest.mark.parametrize("columns", [40, 80, 200])
def test_no_figure_is_cut_whatever_the_width(capsys, monkeypatch, count, columns):
    header = ["", *(f"quantity {i}" for i in range(count))]
    rows = [(f"model of a long name {r} " + "x" * 30, [f"{r}{i}.123456789" for i in range(count)]) for r in range(3)]
    out = shown(capsys, header, rows, columns, monkeypatch)
    for _, cells in rows:
        assert all(cell in out for cell in cells)
    assert all(name in " ".join(out.split()) for name in header[1:])
    assert "…" not in out
    assert max(map(len, out.splitlines())) <= columns


def test_a_table_that_fits_is_one_table(capsys, monkeypatch):
    out = shown(capsys, ["", "a", "b"], [("x", ["1", "2"])], 80, monkeypatch)
    assert len(re.findall("─{5,}", out)) == 1


@pytest.mark.parametrize("length", range(1, 40))
def test_names_are_whole_where_there_is_room(capsys, monkeypatch, length):
    """A name is wrapped only if it takes more than half of the width."""
    rows = [("n" * length, ["12345678"] * 6)]
    out = shown(capsys, ["", *"abcdef"], rows, 80, monkeypatch)
    assert ("n" * length) in out
    assert max(map(len, out.splitlines())) <= 80


def test_without_a_terminal_80_columns_are_assumed(capsys, monkeypatch):
    monkeypatch.delenv("COLUMNS", raising=False)
    assert not sys.stdout.isatty()
    tables.show_table(["", *map(str, range(30))], [("x", ["123456"] * 30)])
    assert max(map(len, capsys.readouterr().out.splitlines())) <= 80


def five_columns():
    report = json.loads((GOLDEN / "format_v1" / "vim" / "report.json").read_text())
    pruned = report.pop("pruned")
    block = {**pruned, "latency_ms": 1234.5, "params": 98_765_432}
    report |= {"aligned": block, "reconstructed": block, "pruned": block}
    return report


def test_a_report_of_five_models_is_one_table_of_80_columns(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    tables.show_report(five_columns(), as_json=False)
    out = capsys.readouterr().out
    table = out[: out.index("  kept:")]
    assert len(re.findall("─{5,}", table)) == 1
    assert max(map(len, table.splitlines())) <= 80
    assert table.count("98,765,432") == 3


def test_refitted_maps_are_shown_when_asked_for(capsys):
    report = five_columns()
    tables.show_report(report, as_json=False)
    assert "x_proj" not in capsys.readouterr().out
    tables.show_report(report, as_json=False, verbose=True)
    out = capsys.readouterr().out
    for fit in report["reconstruction"]["fits"]:
        assert fit["weight"].rpartition(".")[2] in out
        assert f"{fit['before']:.1%} -> {fit['after']:.1%}" in out


def test_a_web_page_scrolls_its_tables_on_a_phone():
    page = report_text.render_html(five_columns(), "x" * 100, {})
    assert 'name="viewport"' in page
    assert page.count("<table>") == page.count('<div class="wide"><table>') > 1
    assert re.search(r"\.wide \{[^}]*overflow-x: auto", page)
