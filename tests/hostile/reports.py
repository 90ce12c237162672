"""report.json: damaged, and with names that would be code in a web page or a terminal."""

from __future__ import annotations

import copy
import json
import os
import random
import re
from typing import Any

from .cases import Box, Case, Run, maker
from .configs import JUNK, KIND, paths, pruned, put, take_away, write
from .judges import same_json

FILE = "pruned/report.json"
_ACTIVE = re.compile(r"<script|<img[^>]*onerror|<iframe|<svg|(href|src)=.?javascript:|<meta http", re.IGNORECASE)


def showing(rng: random.Random, box: Box, report: Any, detail: str, refused: bool = False) -> Case:
    """A command that shows the report or rejects it; a page must have no active content."""
    form = rng.choice(["table", "json", "html", "verbose"])
    if form == "json":
        return Case(("report", "pruned", "--json"), None if refused else same_json(lambda: report), detail=detail)
    if form == "html":
        page = box.folder / "page.html"

        def right(_: Run) -> str | None:
            found = _ACTIVE.search(page.read_text().replace("data:image/png;base64", ""))
            return f"the page has {found.group()!r} in it" if found else None

        command = ("report", "pruned", "--html", "page.html")
        return Case(command, None if refused else right, creates=["page.html"], detail=detail)
    command = ("report", "pruned", *(["--verbose"] if form == "verbose" else []))
    return Case(command, None if refused else _shown, detail=detail)


def _shown(run: Run) -> str | None:
    return None if "tokens after layer" in run.stdout else "exit 0 without the stages in the table"


def _report(box: Box) -> Any:
    pruned(box)
    return json.loads((box.folder / FILE).read_text())


@maker(KIND, times=10)
def a_value_of_the_report(rng, box):
    report = _report(box)
    place = rng.choice(list(paths(report)))
    new = rng.choice(JUNK)
    put(report, place, new)
    write(box, report, FILE)
    return showing(rng, box, copy.deepcopy(report), f"{'.'.join(map(str, place))}: {new!r:.30}")


@maker(KIND, times=3)
def a_value_missing_in_the_report(rng, box):
    report = _report(box)
    place = rng.choice([p for p in paths(report) if len(p) < 3])
    take_away(report, place)
    write(box, report, FILE)
    return showing(rng, box, report, ".".join(map(str, place)))


_NAMES = (
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "{{ 7 * 7 }}{% for x in y %}",
    "</title><svg onload=alert(1)>",
    "\x1b]0;title\x07\x1b[2J\x1b[31m",
    "[red]markup[/red] [/] [link=file:///etc/passwd]x[/link]",
    "javascript:alert(1)//%0A\r\nSet-Cookie: a=b",
    "\u202egnp.exe \u0000",
)


@maker(KIND, variants=_NAMES)
def names_that_are_code(rng, box, variant):
    report = _report(box)
    report["data"]["name"] = report["calibration"]["name"] = variant
    report["data"]["unreadable"] = [variant]
    report["stages"][0]["importance"] = variant
    report["command"] = variant
    report[variant] = copy.deepcopy(report["pruned"])
    write(box, report, FILE)
    return showing(rng, box, report, "")


_TEXTS = {
    "empty": "", "null": "null", "a list": "[1]", "cut off": '{"data": {', "nan": '{"data": NaN}',
    "deep": "[" * 100_000,
    "another": '{"accuracy": 0.9}',
}  # fmt: skip


@maker(KIND, variants=[*_TEXTS, "pipe", "folder", "missing"])
def report_files(rng, box, variant):
    _report(box)
    file = box.folder / FILE
    file.unlink()
    if variant == "pipe":
        os.mkfifo(file)
    elif variant == "folder":
        file.mkdir()
    elif variant != "missing":
        file.write_text(_TEXTS[variant])
    return showing(rng, box, None, "", refused=True)


@maker(KIND, variants=["the report", "the model", "a folder", "nowhere", "exists"])
def pages_that_cannot_be_written(rng, box, variant):
    _report(box)
    (box.folder / "page.html").write_text("mine")
    page = {
        "the report": FILE, "the model": "pruned/model.safetensors", "a folder": "pruned",
        "nowhere": "/proc/x/page.html",
        "exists": "page.html",
    }[variant]  # fmt: skip
    return Case(("report", "pruned", "--html", page, *(["--force"] if variant == "a folder" else [])))
