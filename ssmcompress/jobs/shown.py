"""Selection of the images to show from a survey, by a rule that does not favour images on which a method looks good."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from torch import Tensor

from ..data.batches import Batches
from .survey import Survey
from .variants import DENSE

WRONG = "dense wrong"
SHOWN_BATCH = 8


@dataclass(frozen=True)
class Choice:
    """Images to show.

    Attributes:
        rows: their rows in the survey, with the name of each image's group. groups: the number of images of each group
            in the survey. rule: how they were chosen, as a sentence.
    """

    rows: tuple[tuple[int, str], ...]
    groups: Mapping[str, int]
    rule: str


def choose_shown(survey: Survey, count: int, seed: int) -> Choice:
    """Choose images to show: at random, from groups of images in turn.

    The groups contain the images that the dense model classifies correctly, by whether the first pruned model and the
    next one do: naive wrong and aligned right, both wrong, naive right and aligned wrong, both right. Without labels,
    the dense model's class counts as correct. Images that the dense model gets wrong are shown only if there are no
    others; images that cannot be judged by class are spread over their order.
    """
    size = len(survey.index)
    order = np.random.default_rng(seed).permutation(size).tolist()
    if all(row.right is None for rows in survey.predictions.values() for row in rows):
        return _choose_by_order(survey, count, order)
    compared = _find_compared(survey)
    members: dict[str, list[int]] = {group: [] for group in [*_list_groups(compared), WRONG]}
    for row in order:
        members[_name_group(survey, compared, row)].append(row)
    usual = [group for group in members if group != WRONG]
    turns = itertools.chain.from_iterable(itertools.zip_longest(*(members[group] for group in usual)))
    picked = [row for row in turns if row is not None][:count]
    picked += members[WRONG][: count - len(picked)]
    group_of = {row: group for group, rows in members.items() for row in rows}
    shown = sorted(picked, key=lambda row: [*members].index(group_of[row]))
    last = ", those that the dense model gets wrong last" if members[WRONG] else ""
    counts = "; ".join(f"{group}: {_count(len(rows))}" for group, rows in members.items() if rows)
    rule = f"{len(picked)} of {_count(size)}, drawn at random (seed {seed}) from these groups in turn{last}. "
    groups = {group: len(rows) for group, rows in members.items() if rows}
    return Choice(tuple((row, group_of[row]) for row in shown), groups, rule + counts[:1].upper() + counts[1:] + ".")


def _count(images: int) -> str:
    return f"{images:,} image{'s' if images != 1 else ''}"


def _find_compared(survey: Survey) -> tuple[str, ...]:
    """Return the models that define the groups: the first two pruned ones, if available."""
    judged = [name for name, rows in survey.predictions.items() if rows and rows[0].right is not None]
    return tuple(name for name in judged if name != DENSE)[:2] or tuple(judged)


def _list_groups(compared: Sequence[str]) -> list[str]:
    """Return the names of the groups, in the order in which images of them are shown."""
    if len(compared) == 2:
        verdicts = [(False, True), (False, False), (True, False), (True, True)]
    else:
        verdicts = [(False,), (True,)]
    return [_describe(compared, rights) for rights in verdicts]


def _describe(compared: Sequence[str], rights: Sequence[bool]) -> str:
    words = {True: "right", False: "wrong"}
    if len(compared) == 2 and rights[0] == rights[1]:
        return f"{' and '.join(compared)} {words[rights[0]]}"
    return ", ".join(f"{name} {words[right]}" for name, right in zip(compared, rights, strict=True))


def _name_group(survey: Survey, compared: Sequence[str], row: int) -> str:
    """Return the group of an image."""
    verdicts = {name: rows[row].right for name, rows in survey.predictions.items()}
    if verdicts.get(DENSE) is False and DENSE not in compared:
        return WRONG
    return _describe(compared, [bool(verdicts[name]) for name in compared])


def _choose_by_order(survey: Survey, count: int, order: Sequence[int]) -> Choice:
    """Choose images spread evenly over their order by the share of pixels that the last model has right."""
    *_, last = survey.predictions.values()
    size, known = len(order), any(row.label is None and row.probability is not None for row in last)
    rows = sorted(order, key=lambda row: last[row].probability or 0.0) if known else list(order)
    places = np.linspace(0, size - 1, min(count, size)).round().astype(int) if known else range(min(count, size))
    how = "spread evenly over their order by the share of pixels that are right" if known else "drawn at random"
    shown = tuple((rows[place], "") for place in places)
    return Choice(shown, {}, f"{len(shown)} of {_count(size)}, {how}.")


def read_shown(images: Batches, index: Iterable[int]) -> list[tuple[Tensor, Tensor | None]]:
    """Return images (channels, height, width) by their index in the source, each with its mask if there is one."""
    index = list(index)
    few = replace(images, index=index, batch_size=SHOWN_BATCH, workers=0, unreadable=set())
    found = {}
    for batch in few:
        masks = batch.labels if batch.labels is not None and batch.labels.ndim > 1 else [None] * len(batch.index)
        found |= {i: pair for i, *pair in zip(batch.index, batch.images, masks, strict=True)}
    return [tuple(found[i]) for i in index]
