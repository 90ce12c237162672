"""The state of a run in one file, written atomically and usable as a checkpoint (MODEL) in every command."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ...data.signature import compare_signatures
from ...errors import InputError, SsmCompressError, raise_if_out_of_memory
from ...models.base import TokenModel
from ...models.safe_pickle import read_pickle
from ...models.saved import describe

FORMAT = 2
# The models and images that identify a run, with their names in messages.
MODELS = {"model": "model to start from", "dense": "dense model", "teacher": "dense model to learn from"}
IMAGES = {"images": "images to learn from", "held_out": "images held out", "eval_images": "images to measure on"}


@dataclass(frozen=True)
class StateFile:
    """The file in which a run saves its state.

    Attributes:
        path: the file; it is no longer needed once the result of the run is saved.
        resume: whether to continue from the state in the file, if there is one. A state with a different model, dense
            model, recipe, seed or image content is rejected.
    """

    path: Path
    resume: bool = False


def write_state(file: Path, model: TokenModel, entries: Mapping[str, Any]) -> None:
    """Atomically replace `file` by the state of a run: an interruption leaves either the old or the new state.

    Args:
        model: the model whose configuration makes the file loadable.
        entries: "model" and "optimizer", state dicts, "run", a JSON value, and any others.

    Raises:
        SsmCompressError: the file cannot be written.
    """
    content = {"ssmcompress": json.dumps(describe(model)), "training_format": FORMAT, **entries}
    # A fixed name, so that the next run overwrites a file left by a killed run.
    temporary = file.with_name(f".{file.name}.part")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as out:
            torch.save(content, out)
            out.flush()
            os.fsync(out.fileno())
        os.replace(temporary, file)
    except (OSError, RuntimeError) as error:  # torch raises RuntimeError for a full disk
        temporary.unlink(missing_ok=True)
        raise_if_out_of_memory(error)
        raise SsmCompressError(f"cannot save the state of the run in {file}: {error}") from error


def read_state(file: Path) -> dict[str, Any]:
    """Return the entries of a state file; InputError for any other file."""
    try:
        content = read_pickle(file)
        if not isinstance(content, dict) or not isinstance(content.get("run"), dict):
            raise InputError("not the state of a fine-tuning run")
        if content.get("training_format") != FORMAT:
            raise InputError(f"state of format {content.get('training_format')!r}: this version reads {FORMAT}")
    except OSError as error:
        raise InputError(f"{file}: cannot be read: {error.strerror or error}") from error
    except InputError as error:
        raise InputError(f"{file}: {error}; remove it to start over") from error
    return content


def remove_state(file: Path) -> None:
    """Remove a state that is no longer needed, and a partial file of a killed run."""
    for path in (file, file.with_name(f".{file.name}.part")):
        path.unlink(missing_ok=True)


def check_same_run(file: Path, stored: Any, expected: Mapping[str, Any]) -> None:
    """Raise an InputError that names the differences if a state belongs to another run.

    Args:
        stored, expected: identification of the stored and the current run, see `describe_differences`.
    """
    if differences := describe_differences(stored, expected):
        raise InputError(f"{file} belongs to another run, with {', '.join(differences)}; `force=True` starts over")


def is_state_of(file: Path, expected: Mapping[str, Any]) -> bool:
    """Return whether there is a state that matches `expected`; InputError for any other file."""
    return file.exists() and not describe_differences(read_state(file)["run"].get("about"), expected)


def describe_differences(then: Any, now: Mapping[str, Any]) -> list[str]:
    """Describe the differences between two runs in words; an empty list if there are none.

    Args:
        then, now: JSON objects that identify the runs: `recipe`, fingerprints of the models in `MODELS` or None,
            signatures of the images in `IMAGES`, and single values. Keys missing from `now` are not compared; if
            `then` is not such an object, nothing is known about that run.
    """
    then = then if isinstance(then, Mapping) else {}
    found = []
    for name, new in now.items():
        old = then.get(name)
        if old == new:
            continue
        if name in MODELS:
            found.append(f"{'another' if old and new else 'no' if new else 'a'} {MODELS[name]}")
        elif name in IMAGES:
            found.append(f"other {IMAGES[name]} ({compare_signatures(old, new)})")
        elif isinstance(new, Mapping):
            found += describe_differences(old, new)
        else:
            found.append(f"{name} {old!r} instead of {new!r}")
    return found
