"""Hostile and damaged inputs: no traceback, nothing left behind, no code run, no exit 0 with a wrong result.

`python -m tests.hostile --seed 1 --count 300` runs more of them, and prints the outcomes by kind.
"""

import sys

import pytest

pytest.importorskip("resource")

from hostile import cases, sandbox
from hostile.makers import SHARES, choose, load_makers
from hostile.worker import run_cases

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="limits of memory, /proc and named pipes")
SEED, COUNT = 22, 16
PARTS = (("checkpoints", "safetensors", "configs"), ("folders", "tables", "shards"), ("graphs", "arguments"))


def test_hostile_inputs_are_refused_or_read_right(tmp_path):
    """All in one process, since it takes 8 s until the first case."""
    load_makers()
    names = [name for kinds in PARTS for name in choose(SEED, COUNT, kinds)]
    results = list(run_cases(names, tmp_path))
    assert len(results) == len(PARTS) * COUNT
    failed = [
        f"{kind}/{index} {cases.name_of(seed, kind, index)}: {result['reason']}"
        for (seed, kind, index), result in zip(names, results, strict=True)
        if result["outcome"] == sandbox.FAILED
    ]
    assert not failed, "\n".join(failed)
    for first in range(0, len(results), COUNT):
        assert sandbox.REFUSED in {result["outcome"] for result in results[first : first + COUNT]}


def test_there_are_300_different_cases():
    load_makers()
    assert {kind: cases.size(kind) >= share for kind, share in SHARES.items()} == dict.fromkeys(SHARES, True)
    names = choose(1, 300, list(SHARES))
    assert len(set(names)) == 300
    assert [cases.name_of(*name) for name in names] == [cases.name_of(*name) for name in choose(1, 300, list(SHARES))]
    assert [cases.name_of(*name) for name in names] != [cases.name_of(*name) for name in choose(2, 300, list(SHARES))]


WHOLE = cases.Case(
    ["inspect"], lambda run: None if run.stdout == "17\n" else "exit 0 with another number", creates=["out"]
)
REFUSED = cases.Case(["inspect"])


@pytest.mark.parametrize(
    ("case", "run", "left", "reason"),
    [
        (WHOLE, (0, "17\n", ""), [], None),
        (WHOLE, (0, "17\n", ""), ["work/out", "work/out/a"], None),
        (WHOLE, (0, "18\n", ""), [], "another number"),
        (WHOLE, (0, "17\n", ""), ["work/output"], "files changed or left"),
        (WHOLE, (0, "17\n", "x.py:3: UserWarning: odd"), [], "noise"),
        (WHOLE, (0, "17\n\x1b[31m", ""), [], "control character"),
        (REFUSED, (2, "", "error: damaged\n"), [], None),
        (REFUSED, (2, "", "a message\nerror: damaged\n"), [], None),
        (REFUSED, (0, "17\n", ""), [], "expected a refusal"),
        (REFUSED, (2, "", "error: damaged\n"), ["canary"], "code of the input was run"),
        (REFUSED, (2, "", "error: damaged\n"), ["work/out"], "files changed or left"),
        (REFUSED, (2, "", "error: damaged\n"), ["tmp/x"], "files changed or left"),
        (REFUSED, (1, "", "error: internal error, KeyError: 'a'\n"), [], "internal error"),
        (REFUSED, (2, "", "Traceback (most recent call last):\nerror: damaged\n"), [], "noise"),
        (REFUSED, (2, "", "error: damaged\nin two lines\n"), [], "error lines"),
        (REFUSED, (2, "17\n", "error: damaged\n"), [], "output on stdout"),
        (REFUSED, (2, "", f"error: {'x' * 2000}\n"), [], "characters"),
    ],
)
def test_the_judgement_is_strict(case, run, left, reason):
    before = {"work/model.pt": ("file", 1, "a")}
    found = sandbox.judge(case, cases.Run(*run), before, before | dict.fromkeys(left, ("folder",)))
    assert (found is None) if reason is None else (reason in found)


def test_a_changed_input_is_found():
    before, after = {"work/model.pt": ("file", 1, "a")}, {"work/model.pt": ("file", 1, "b")}
    refused = cases.Run(2, "", "error: damaged\n")
    assert "work/model.pt" in sandbox.judge(REFUSED, refused, before, after)
    assert "work/model.pt" in sandbox.judge(REFUSED, refused, before, {})
