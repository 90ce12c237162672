"""Judges of commands that have read their input: is the result correct?"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import numpy as np

from .cases import Box, Judge, Run

_LEFT_OUT = re.compile(r"left out (\d+)")


def _json(run: Run) -> Any:
    return json.loads(run.stdout, parse_constant=_no_constant)


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def same_logits(box: Box, file: Path, expected: np.ndarray | None = None, **options: Any) -> Judge:
    """The file loads as a model with the logits of the undamaged one, and `inspect --json` reports its shapes."""

    def right(_: Run) -> str | None:
        import torch

        import ssmcompress

        truth = box.world.golden["logits"] if expected is None else expected
        with torch.no_grad():
            logits = ssmcompress.load(file, **options)(torch.from_numpy(box.world.golden["images"])).numpy()
        if logits.shape != truth.shape:
            return f"exit 0 with logits {logits.shape}, expected {truth.shape}"
        difference = np.abs(logits - truth).max()
        return None if difference <= 1e-4 else f"exit 0 with logits that differ by {difference:.3g}"

    return right


def same_json(expected: Callable[[], Any], ignore: Collection[str] = ()) -> Judge:
    """The output is this JSON value."""

    def right(run: Run) -> str | None:
        found, truth = _json(run), expected()
        if found == truth:
            return None
        if not isinstance(found, dict) or not isinstance(truth, dict):
            return "exit 0 with another JSON value"
        wrong = [k for k in {*found, *truth} - set(ignore) if found.get(k) != truth.get(k)]
        return f"exit 0 with another result in {', '.join(sorted(wrong)[:4])}" if wrong else None

    return right


def all_right(
    pictures: int,
    unreadable: Collection[str] = (),
    maybe: Collection[str] = (),
    extra: Collection[str] = (),
    labelled: bool = True,
) -> Judge:
    """`evaluate --json` of `vim12`: every picture has its label (100 % top-1), and what was left out is named.

    Args:
        pictures: how many there are, those that are `unreadable`, or `maybe` so,
        included; both by parts of their names.
        extra: parts of the names of others, which may be passed over, or named as unreadable.
    """

    def right(run: Run) -> str | None:
        found = _json(run)
        skipped = list(found["data"]["unreadable"])
        if missing := [name for name in unreadable if not any(name in s for s in skipped)]:
            return f"exit 0, but {missing[0]} was read; expected it among the unreadable"
        if wrong := [s for s in skipped if not any(name in s for name in (*unreadable, *maybe, *extra))]:
            return f"exit 0, but {wrong[0]} was not read"
        count = pictures + sum(any(name in s for name in extra) for s in skipped)
        left_out = sum(map(int, _LEFT_OUT.findall(run.stderr)))
        if count - found["images"] - len(skipped) not in (0, left_out):
            return (
                f"exit 0 with {found['images']} images, {len(skipped)} skipped, {left_out} left out; expected {count}"
            )
        if not labelled:
            return None if found["top1"] is None else "exit 0 with an accuracy, but there are no labels"
        return None if found["top1"] == 100 else f"exit 0 with top-1 {found['top1']}, expected 100"

    return right


def top1_is_100(run: Run) -> str | None:
    """The table of `evaluate` says so."""
    return None if re.search(r"top-1 +100(\.0+)? %", run.stdout) else "exit 0, top-1 is not 100"


def anything(_: Run) -> None:
    """Any result is right: the case is about crashes, noise and files."""
