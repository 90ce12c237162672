"""Cases: the files and command of a maker, the accepted results, and the seeded choice of cases of a kind."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .world import World


@dataclass(frozen=True)
class Run:
    """A finished command: exit code and output."""

    code: int
    stdout: str
    stderr: str


@dataclass(frozen=True)
class Box:
    """The folders of a case: `folder` is the working folder of the command. `canary` must never be created."""

    folder: Path
    canary: Path
    world: World


# Returns the error of a finished command with exit code 0, or None.
Judge = Callable[[Run], str | None]


@dataclass(frozen=True)
class Case:
    """A command and a judgement.

    Attributes:
        arguments: of the command line.
        right: judges a run with exit code 0; None: only a refusal is right.
        must_read: whether a refusal is wrong.
        creates: names in the working folder that may be new or changed after exit code 0.
        detail: what the input is, in addition to the name of the maker.
        codes: exit codes of a refusal.
    """

    arguments: Sequence[Any]
    right: Judge | None = None
    must_read: bool = False
    creates: Sequence[str] = ()
    detail: str = ""
    codes: Sequence[int] = (2, 3, 4)


@dataclass(frozen=True)
class _Entry:
    name: str
    make: Callable[..., Case]
    arguments: dict[str, Any] = field(default_factory=dict)


_ENTRIES: dict[str, list[_Entry]] = {}


def maker(kind: str, *, times: int = 1, variants: Sequence[Any] | None = None) -> Callable:
    """Register a function (rng, box[, variant]) -> Case: `times` random cases, or one for each of `variants`."""

    def register(make: Callable[..., Case]) -> Callable[..., Case]:
        name = make.__name__.replace("_", " ").strip()
        entries = _ENTRIES.setdefault(kind, [])
        if variants is None:
            entries.extend([_Entry(name, make)] * times)
        for variant in variants or ():
            text = variant[0] if isinstance(variant, tuple) else variant
            entries.append(_Entry(f"{name}: {text!s:.40}", make, {"variant": variant}))
        return make

    return register


def kinds() -> list[str]:
    """The names of all kinds."""
    return list(_ENTRIES)


def size(kind: str) -> int:
    """The number of different cases of a kind before random ones repeat with other values."""
    return len(_ENTRIES[kind])


def name_of(seed: int, kind: str, index: int) -> str:
    """The name of a case."""
    return _entry(seed, kind, index).name


def make(seed: int, kind: str, index: int, box: Box) -> Case:
    """Write the files of a case, and return it."""
    entry = _entry(seed, kind, index)
    return entry.make(random.Random(f"{seed}/{kind}/{index}"), box, **entry.arguments)


def _entry(seed: int, kind: str, index: int) -> _Entry:
    entries = _ENTRIES[kind]
    order = random.Random(f"{seed}/{kind}").sample(range(len(entries)), len(entries))
    return entries[order[index % len(entries)]]
