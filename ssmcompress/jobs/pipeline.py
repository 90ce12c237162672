"""The pipeline: steps that turn a dense model into a compressed one, run in order, with a snapshot after each.

A step is a frozen configuration with a name and a call `(model, context) -> model`; it does not modify its argument. It
takes what it needs from the context, and appends a record of what it did to `model.steps`. A job is a list of steps;
there are no hooks and no global session. `ssmcompress.jobs.steps` contains the steps that the commands use.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from ..data.batches import Batches
from ..models.base import TokenModel


@dataclass
class Context:
    """The environment of the steps, apart from the model.

    Attributes:
        dense: the model that the pipeline started from; None if it no longer exists, which some steps can do without.
        calibration: images for calibration and reconstruction. training, held_out: images to train on, and to select
            an epoch.
        seed: seed of every random choice. distributed: whether several processes run this pipeline together.
        command: the command line, for records.
        state, resume, log: as `ssmcompress.finetune` takes them.
        files: further files for the output folder, name -> content, which steps add to.
        seconds: how long each step took, by its name.
        uncut: the model before channels or tokens were removed, whose inner maps are the target of a reconstruction.
    """

    dense: TokenModel | None
    calibration: Batches | None = None
    training: Batches | None = None
    held_out: Batches | None = None
    seed: int = 0
    distributed: bool = False
    command: str = ""
    state: Path | None = None
    resume: bool = False
    log: Callable[[dict[str, float], int], None] | None = None
    files: dict[str, bytes] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    uncut: TokenModel | None = None


class Step(Protocol):
    """One step of a pipeline.

    Attributes:
        name: name in reports of the model after this step: "naive", "aligned", "reconstructed", ...
    """

    name: str

    def __call__(self, model: TokenModel, context: Context) -> TokenModel:
        """Return the model after this step, or `model` itself if there was nothing to do."""


def run_steps(
    steps: Sequence[Step], context: Context, start: TokenModel | None = None, keep: Container[str] | None = None
) -> dict[str, TokenModel]:
    """Run steps in order.

    Args:
        start: the input of the first step; None: `context.dense`.
        keep: names of the snapshots to keep; None: all. The last one is always kept.

    Returns:
        Snapshots by the name of their step; the last one is the result. A step that had nothing to do adds none.
    """
    model = context.dense if start is None else start
    snapshots: dict[str, TokenModel] = {}
    last = None
    for step in steps:
        begin = time.perf_counter()
        after = step(model, context)
        context.seconds[step.name] = time.perf_counter() - begin
        if after is model:
            continue
        if last is not None and keep is not None and last not in keep:
            del snapshots[last]
        model = snapshots[step.name] = after
        last = step.name
    return snapshots
