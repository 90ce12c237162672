"""The state of a run in one file, written atomically, which every command also takes as a checkpoint (MODEL)."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ...errors import InputError, SsmCompressError
from ...models.base import TokenModel
from ...models.checkpoint import describe
from ...models.safe_pickle import read_pickle

FORMAT = 1


@dataclass(frozen=True)
class StateFile:
    """Where a run keeps its state.

    Attributes:
        path: the file; it is no longer needed once the result of the run is saved.
        resume: whether to continue from the state in the file, if there is one. The state of a run with another model,
            recipe, seed or data set is refused.
    """

    path: Path
    resume: bool = False


def write_state(file: Path, model: TokenModel, entries: Mapping[str, Any]) -> None:
    """Replace `file` by the state of a run, atomically: after an interruption the file has the old or the new state.

    Args:
        model: the model whose configuration makes the file loadable.
        entries: "model" and "optimizer", state dicts, "run", a JSON value, and any others.

    Raises:
        SsmCompressError: the file cannot be written.
    """
    content = {"ssmcompress": json.dumps(describe(model)), "training_format": FORMAT, **entries}
    # Always the same name, so that the next run replaces what a killed run left behind.
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
        raise SsmCompressError(f"cannot keep the state of the run in {file}: {error}") from error


def read_state(file: Path) -> dict[str, Any]:
    """Return the entries of a state file; InputError for any other file."""
    try:
        content = read_pickle(file)
        if not isinstance(content, dict) or not isinstance(content.get("run"), dict):
            raise InputError("not the state of a fine-tuning run")
        if content.get("training_format") != FORMAT:
            raise InputError(f"state of format {content.get('training_format')!r}: this version reads {FORMAT}")
    except InputError as error:
        raise InputError(f"{file}: {error}; remove it to start afresh") from error
    return content


def remove_state(file: Path) -> None:
    """Remove a state that is no longer needed, and the partial file that a killed run may have left."""
    for path in (file, file.with_name(f".{file.name}.part")):
        path.unlink(missing_ok=True)


def check_same_run(file: Path, stored: Any, expected: Mapping[str, Any]) -> None:
    """Raise an InputError that names the differences if a state is of another run.

    Args:
        stored, expected: what identifies the run of the state and the present one, as JSON objects.
    """
    if stored == expected:
        return
    names = sorted(k for k in {*stored, *expected} if stored.get(k) != expected.get(k))
    old, new = ({k: about.get(k) for k in names} for about in (stored, expected))
    if isinstance(old.get("recipe"), dict) and isinstance(new.get("recipe"), dict):
        same = {k for k in old["recipe"] if old["recipe"][k] == new["recipe"].get(k)}
        old["recipe"], new["recipe"] = (
            {k: v for k, v in recipe.items() if k not in same} for recipe in (old["recipe"], new["recipe"])
        )
    raise InputError(f"{file} is of another run, with {old} for {new}; `force=True` starts afresh")


def fingerprint(model: TokenModel) -> str:
    """Return a hash of a model's weights and plan."""
    digest = hashlib.sha256(json.dumps(model.plan.to_dict(tensors=False) if model.plan else None).encode())
    for name, value in sorted(model.state_dict().items()):
        digest.update(name.encode() + value.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]
